"""The model that is trained: a transformers causal LM whose LM head is replaced by the fused head.

The body gives hidden states; the head goes straight from them to log-probabilities or a summed policy loss, and logits
never exist whole. Everything that an update computes happens inside `forward`, so that ZeRO-3 can gather the weights
where they are used.
"""

import logging
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from fastreason_kernels import LoraHead, PolicyLossOutput, PolicyLossSpec, linear_logprob, linear_policy_loss
from fastreason_kernels.transform import IDENTITY, Transform
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastreason.body import BASES, enable_unpadded, response_states
from fastreason.config import LoraConfig, ModelConfig
from fastreason.errors import ConfigError, ModelError
from fastreason.families import attention_of, check_head, head_transform
from fastreason.lora import add_adapter, split_head
from fastreason.losses.preference import PairSpec, pair_loss
from fastreason.packing import Layout, MicroBatch

log = logging.getLogger(__name__)

LossSpec = PolicyLossSpec | PairSpec

# Tokens; bench/README.md has the measurement. The scores of eager attention take memory with the square.
SHORT_LINE = 384
LIGER_PATCHES = dict.fromkeys(("rope", "rms_norm", "layer_norm", "swiglu", "geglu"), True)
LIGER_PATCHES |= dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy"), False)


class FusedHead(nn.Module):
    """The LM head as an op: holds the weight (tied or not), and an adapter where it has one; never returns logits.

    transform: what the model does to a raw logit: a scale, a cap.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        transform: Transform = IDENTITY,
        lora: LoraHead | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.transform = transform
        # Parameters of this module, so that ZeRO-3 gathers them where they are used.
        self.lora_a: Tensor | None = lora.a if lora else None
        self.lora_b: Tensor | None = lora.b if lora else None
        self._scale = lora.scale if lora else 1.0
        self._adapts = True

    @property
    def pair(self) -> LoraHead | None:
        """The adapter's factors, also while it is off."""
        if self.lora_a is None or self.lora_b is None:
            return None
        return LoraHead(self.lora_a, self.lora_b, self._scale)

    def enable_adapters(self, enabled: bool) -> None:
        """As peft's layers do; see `lora.adapter_off`."""
        self._adapts = enabled

    @property
    def _lora(self) -> LoraHead | None:
        return self.pair if self._adapts else None

    def forward(self, hidden_ND: Tensor, batch: MicroBatch, spec: LossSpec | None, temperature: float) -> Any:
        if spec is None:
            return self._logprob(hidden_ND, batch, temperature)
        if isinstance(spec, PairSpec):
            return self._pairs(hidden_ND, batch, spec, temperature)
        output = self._loss(hidden_ND, batch, policy_spec(batch, spec), temperature)
        if batch.kl_weight_N is not None and spec.kl_coef:
            output = _plus(output, *self._masked_kl(hidden_ND, batch, spec, temperature))
        if batch.divergence is not None:
            head = (hidden_ND, self.weight, self.bias, batch, temperature, self.transform, self._lora)
            loss_sum, kl_N = batch.divergence(*head)
            output = _plus(output, batch.divergence.coef * loss_sum, kl_N)
        return output

    def _logprob(self, hidden_ND: Tensor, batch: MicroBatch, temperature: float, **options: Any) -> Any:
        return linear_logprob(
            hidden_ND,
            self.weight,
            batch.ids_N,
            bias=self.bias,
            lora=self._lora,
            temperature=temperature,
            softcap=self.transform.softcap,
            logit_scale=self.transform.scale,
            **options,
        )

    def _loss(
        self,
        hidden_ND: Tensor,
        batch: MicroBatch,
        spec: PolicyLossSpec,
        temperature: float,
        mask_N: Tensor | None = None,
    ) -> PolicyLossOutput:
        head = (hidden_ND, self.weight, self.bias)
        return fused_loss(*head, batch, spec, temperature, mask_N, transform=self.transform, lora=self._lora)

    def _pairs(self, hidden_ND: Tensor, batch: MicroBatch, spec: PairSpec, temperature: float) -> PolicyLossOutput:
        """A loss of pairs: the rows of the batch are chosen and rejected in turn."""
        logp_N, entropy_N, _ = self._logprob(hidden_ND, batch, temperature, entropy_grad=False)
        # Sums of thousands of tokens: fp32 would round away what one pair differs by.
        zeros_B = torch.zeros(batch.num_rows, dtype=torch.float64, device=logp_N.device)
        logp_B = zeros_B.index_add(0, batch.sequence_N, logp_N.double())
        num_tokens_B = zeros_B.index_add(0, batch.sequence_N, torch.ones_like(logp_N, dtype=torch.float64))
        assert batch.weight_B is not None
        loss_sum = pair_loss(logp_B, num_tokens_B, batch.weight_B.double(), spec, batch.ref_sum_B).loss_sum
        zeros_N = torch.zeros_like(entropy_N)
        none_N, all_N = zeros_N.bool(), ~zeros_N.bool()
        ones_N = torch.ones_like(zeros_N)
        return PolicyLossOutput(loss_sum.float(), logp_N.detach(), entropy_N, zeros_N, ones_N, none_N, all_N)

    def _masked_kl(
        self, hidden_ND: Tensor, batch: MicroBatch, spec: PolicyLossSpec, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The KL term of the tokens that have one, by itself: a policy loss without advantages."""
        assert batch.kl_weight_N is not None
        alone = replace(batch, advantages_N=torch.zeros_like(batch.advantages_N))
        mask_N = batch.kl_weight_N != 0
        kl_spec = replace(spec, ratio="none", gate="clip", dual_clip=None, entropy_coef=0.0)
        if spec.kl_weight == "none":
            kl_spec = replace(kl_spec, importance="none", importance_floor=0.0)
        elif spec.weighs_sequences:
            # The weight of a sequence is that of all of its tokens: those without a KL term stay in, and count 0.
            alone.token_weight_N = batch.token_weight_N * mask_N
            term = self._loss(hidden_ND, alone, kl_spec, temperature)
            return term.loss_sum, term.kl.masked_fill(~mask_N, 0.0)
        term = self._loss(hidden_ND, alone, kl_spec, temperature, mask_N)
        return term.loss_sum, term.kl


def fused_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    batch: MicroBatch,
    spec: PolicyLossSpec,
    temperature: float,
    mask_N: Tensor | None = None,
    transform: Transform = IDENTITY,
    lora: LoraHead | None = None,
) -> PolicyLossOutput:
    """The policy loss of a micro-batch's response tokens, from the hidden states that predict them and a head."""
    return linear_policy_loss(
        hidden_ND,
        weight_VD,
        batch.ids_N,
        batch.advantages_N,
        spec,
        behaviour_logp=batch.behaviour_logp_N,
        ref_logp=batch.ref_logp_N,
        sampler_logp=batch.sampler_logp_N,
        token_weight=batch.token_weight_N,
        mask=mask_N,
        sequence_ids=batch.sequence_N,
        bias=bias_V,
        temperature=temperature,
        lora=lora,
        softcap=transform.softcap,
        logit_scale=transform.scale,
    )


def score_batch(batch: MicroBatch) -> MicroBatch:
    """A micro-batch whose policy loss gives the log-probabilities that its update would find, to the last bit.

    Those of products of another shape may round otherwise: so the update's own operator, with a ratio.
    """
    known = batch.sampler_logp_N
    return replace(batch, behaviour_logp_N=known, ref_logp_N=known, kl_weight_N=None, divergence=None)


def policy_spec(batch: MicroBatch, spec: PolicyLossSpec) -> PolicyLossSpec:
    """`spec` of the part that acts on every token: without the KL where the batch says which tokens that acts on."""
    return spec if batch.kl_weight_N is None else replace(spec, kl="none", kl_coef=0.0, kl_weight="none")


def _plus(output: PolicyLossOutput, loss_sum: Tensor, kl_N: Tensor) -> PolicyLossOutput:
    """With a KL term more; tokens that it does not act on have a KL of 0."""
    return output._replace(loss_sum=output.loss_sum + loss_sum, kl=kl_N.nan_to_num(nan=0.0))


class Policy(nn.Module):
    """`forward(batch, spec, temperature)` gives a PolicyLossOutput; with `spec=None`, (logp, entropy, lse), each [N].

    A PairSpec is a loss of pairs: rows of the batch are chosen and rejected in turn.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        head, pair = split_head(model.get_output_embeddings())
        fused = FusedHead(head.weight, getattr(head, "bias", None), head_transform(model.config), pair)
        model.set_output_embeddings(fused)
        self.model = model
        self.head = fused

    def forward(
        self, batch: MicroBatch, spec: LossSpec | None, temperature: float
    ) -> PolicyLossOutput | tuple[Tensor, Tensor, Tensor]:
        return self.head(self.hidden(batch), batch, spec, temperature)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """[N, D]: the states that predict the response tokens."""
        return response_states(self.model, batch)


def choose_attention(wanted: str, device: str, flash_attn_installed: bool, line_tokens: int) -> str:
    """auto: flash-attn where it can be imported and the device is a GPU, else sdpa; an explicit wish is met or refused.

    On a CPU, auto is eager where the longest line of a micro-batch has few tokens, `line_tokens`: sdpa's backward there
    takes longer than the plain products, whose scores are still small.
    """
    if wanted == "auto" and device == "cpu":
        return "eager" if line_tokens <= SHORT_LINE else "sdpa"
    if wanted == "auto":
        return "flash_attention_2" if flash_attn_installed else "sdpa"
    if wanted == "flash_attention_2" and (device != "cuda" or not flash_attn_installed):
        missing = "the device is not a GPU" if device != "cuda" else "flash-attn is not installed"
        raise ConfigError(
            f"model.attn_implementation=flash_attention_2: {missing}. Use auto or sdpa, or install fastreason[flash-attn]."
        )
    return wanted


def choose_layout(wanted: str, attention: str, device: str) -> Layout:
    """How rows lie in a micro-batch.

    flash-attn packs: it reads from the position ids where each row begins. Elsewhere `auto` shares prompts on a CPU,
    where time goes with tokens and rows are short (the mask grows with the square of a line), and pads on a GPU.
    """
    if attention == "flash_attention_2":
        if wanted == "on":
            raise ConfigError(
                "train.share_prompts=on: flash-attn takes no mask. Use auto, or model.attn_implementation=sdpa."
            )
        return "packed"
    return "shared" if wanted == "on" or (wanted == "auto" and device == "cpu") else "padded"


def choose_liger(wanted: str, device: str, installed: bool) -> bool:
    """auto: liger-kernel's RMSNorm, RoPE and SwiGLU on a GPU; they are Triton kernels, so `on` needs one."""
    if wanted == "on" and (device != "cuda" or not installed):
        missing = "the device is not a GPU" if device != "cuda" else "liger-kernel is not installed"
        raise ConfigError(f"model.liger=on: {missing}. Use auto or off.")
    return wanted != "off" and device == "cuda" and installed


def apply_liger(model: Any) -> bool:
    """Patch a loaded model's norms, rotary embedding and MLPs with liger-kernel's; False where it knows no such model.

    The head and the loss stay ours: both of Liger's fused losses are left out.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        return False
    # Which of its patches a family has differs: GeGLU in Gemma's, no rotary embedding in some.
    known = signature(apply).parameters
    apply(model=model, **{name: wanted for name, wanted in LIGER_PATCHES.items() if name in known})
    return True


def without_dropout(config: Any) -> list[str]:
    """Set every dropout of a model's config, and of those in it, to 0; returns those that were not, as key=value.

    With any, the ratio of an update against the log-probabilities from before it would not be 1 where nothing has changed,
    and a run would not go on from a checkpoint as it would have without.
    """
    found = []
    for key, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found += without_dropout(value)
        elif "drop" in key and isinstance(value, int | float) and not isinstance(value, bool) and value:
            setattr(config, key, 0.0)
            found.append(f"{key}={value:g}")
    return found


def load_policy(
    folder: Path, config: ModelConfig, device: str, attention: str, liger: bool, lora: LoraConfig | None = None
) -> Policy:
    """Load a causal LM from a local folder as a Policy in training mode on `device`, without its dropout.

    lora: with a rank, the model is frozen and gets an adapter. Raises ModelError where the folder cannot be loaded or its
    logits are none that the fused head computes, ConfigError where an adapter cannot be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        transform = head_transform(model_config)
        attention = attention_of(model_config, attention, config.attn_implementation, folder)
        dropped = without_dropout(model_config)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model.path: {folder} cannot be loaded by transformers: {error}") from error
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p:
            dropped.append(f"{name}={module.p:g}")
            module.p = 0.0
    if dropped:
        log.info("%s is trained without its dropout: %s", folder, ", ".join(dropped))
    check_head(model.to(device), transform, folder)
    if not enable_unpadded(model) and attention in BASES:
        log.info("%s: padding goes through all of its layers", folder)
    if liger:
        apply_liger(model)
    if lora is not None and lora.rank is not None:
        add_adapter(model, lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model).train()
