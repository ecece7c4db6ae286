"""A second model that is never trained: the reference (the model of the start) or a teacher.

It owns what a KL term asks of that model: log-probabilities of the response tokens, and the divergence of the trained model
from it over the whole vocabulary. Both go straight from hidden states and a head; logits never exist whole. It refuses to
know how its weights lie on the ranks: it is given a callable module, and a context in which weights are whole.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastreason_kernels import LoraHead, PolicyLossSpec, linear_divergence
from fastreason_kernels.gemm import product
from fastreason_kernels.transform import IDENTITY, Transform
from torch import Tensor, nn

from fastreason.body import response_states
from fastreason.config import ModelConfig
from fastreason.errors import ModelError
from fastreason.lora import adapter_off
from fastreason.packing import MicroBatch
from fastreason.policy import Policy, fused_loss, load_policy, policy_spec, score_batch

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
CHUNK_BYTES = 256 << 20  # of fp32 logits at a time, where a teacher's largest are looked for


def whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """The context of weights that are not divided among ranks."""
    return nullcontext()


class FrozenScorer(nn.Module):
    """`forward(batch, spec, temperature)` gives logp [N] fp32, rounded as in the loss `spec`; without a spec, states [N, D].

    num_columns: the vocabulary is its first so many columns (None: all), and probabilities are normalised over those.
    """

    def __init__(self, policy: Policy, num_columns: int | None = None) -> None:
        super().__init__()
        self.model, self.head = policy.model, FrozenHead(policy.head, num_columns)
        self.eval().requires_grad_(False)

    def forward(self, batch: MicroBatch, spec: PolicyLossSpec | None = None, temperature: float = 1.0) -> Tensor:
        hidden_ND = response_states(self.model, batch)
        return hidden_ND if spec is None else self.head(hidden_ND, batch, spec, temperature)


class FrozenHead(nn.Module):
    """An LM head, tied or not, that scores tokens."""

    def __init__(self, head: Any, num_columns: int | None) -> None:
        super().__init__()
        self.weight, self.bias, self.transform = head.weight, head.bias, head.transform
        size = int(getattr(head.weight, "ds_shape", head.weight.shape)[0])
        self.num_columns = min(size, num_columns or size)

    def columns(self) -> tuple[Tensor, Tensor | None]:
        """The weight [W, E] and bias [W] of the columns that count."""
        return self.weight[: self.num_columns], None if self.bias is None else self.bias[: self.num_columns]

    def forward(self, hidden_ND: Tensor, batch: MicroBatch, spec: PolicyLossSpec, temperature: float) -> Tensor:
        same, spec = score_batch(batch), policy_spec(batch, spec)
        return fused_loss(hidden_ND, *self.columns(), same, spec, temperature, transform=self.transform).logp


class AdapterOff:
    """In the place of a `FrozenScorer`: a policy with an adapter as it was before it had one, without a copy of its weights.

    run: calls the policy (its engine, where ZeRO-3 divides the weights).
    """

    def __init__(self, policy: Policy, run: Callable[..., Any] | None = None) -> None:
        self._policy, self._run = policy, run or policy
        self.head = FrozenHead(policy.head, None)

    def __call__(self, batch: MicroBatch, spec: PolicyLossSpec | None = None, temperature: float = 1.0) -> Tensor:
        with adapter_off(self._policy):
            if spec is None:
                return self._policy.hidden(batch)
            return self._run(score_batch(batch), policy_spec(batch, spec), temperature).logp


class FrozenModel:
    """A model to compare with; every method is called on all ranks alike.

    run: calls the scorer (its ZeRO-3 engine, where weights are divided). gather: makes weights whole. name: of messages.
    """

    def __init__(
        self,
        scorer: FrozenScorer | AdapterOff,
        device: torch.device,
        name: str = "reference",
        run: Callable[..., Any] | None = None,
        gather: Gather = whole,
    ) -> None:
        self.name = name
        self._scorer, self._device, self._run, self._gather = scorer, device, run or scorer, gather

    @torch.no_grad()
    def logprobs(self, batches: Sequence[MicroBatch], spec: PolicyLossSpec, temperature: float) -> list[Tensor]:
        """Log-probabilities of the response tokens of each micro-batch, [N] fp32 on the CPU, at `temperature`.

        To the last bit those that an update with `spec` finds for the same weights. Raises ModelError for a token that is not
        in the vocabulary.
        """
        scores = []
        for batch in batches:
            self._check(batch)
            scores.append(self._run(batch.to(self._device), spec, temperature).float().cpu())
        return scores

    @torch.no_grad()
    def hidden(self, batch: MicroBatch) -> Tensor:
        """[N, E]: the states that predict the response tokens."""
        return self._run(batch.to(self._device))

    @contextmanager
    def head(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The head's weight [W, E] and bias [W], whole as long as the context lasts."""
        head = self._scorer.head
        with self._gather([p for p in (head.weight, head.bias) if p is not None]):
            yield head.columns()

    @property
    def transform(self) -> Transform:
        """What the head does to a raw logit."""
        return self._scorer.head.transform

    def _check(self, batch: MicroBatch) -> None:
        highest, size = int(batch.ids_N.max()), self._scorer.head.num_columns
        if highest >= size:
            raise ModelError(
                f"{self.name}: its vocabulary has {size} entries, but token {highest} was sampled. It must have "
                "the vocabulary of model.path."
            )


@dataclass(frozen=True)
class HeadDivergence:
    """`packing.Divergence`: the reverse KL(policy || teacher) at each response token, exact over the common vocabulary.

    top_k: from the teacher's k most probable tokens and one for the rest of both (a lower bound of the exact one).
    """

    teacher: FrozenModel
    coef: float
    top_k: int | None = None

    def __call__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        batch: MicroBatch,
        temperature: float,
        transform: Transform,
        lora: LoraHead | None = None,
    ) -> tuple[Tensor, Tensor]:
        teacher_NE = self.teacher.hidden(batch)
        token_weight_N = batch.token_weight_N if batch.kl_weight_N is None else batch.token_weight_N * batch.kl_weight_N
        with self.teacher.head() as (teacher_WE, teacher_bias_W):
            known: dict[str, Any] = {"teacher_hidden": teacher_NE, "teacher_weight": teacher_WE}
            own = self.teacher.transform
            known |= {"teacher_bias": teacher_bias_W, "teacher_softcap": own.softcap, "teacher_logit_scale": own.scale}
            if self.top_k is not None:
                columns = min(len(teacher_WE), len(weight_VD))
                bias_W = None if teacher_bias_W is None else teacher_bias_W[:columns]
                ids_NK, logp_NK = largest(teacher_NE, teacher_WE[:columns], bias_W, temperature, self.top_k, own)
                known = {"teacher_topk_ids": ids_NK, "teacher_topk_logp": logp_NK}
            output = linear_divergence(
                hidden_ND,
                weight_VD,
                **known,
                direction="reverse",
                token_weight=token_weight_N,
                bias=bias_V,
                temperature=temperature,
                lora=lora,
                softcap=transform.softcap,
                logit_scale=transform.scale,
            )
        return output.loss_sum, output.divergence


@torch.no_grad()
def largest(
    hidden_NE: Tensor,
    weight_WE: Tensor,
    bias_W: Tensor | None,
    temperature: float,
    k: int,
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor]:
    """(ids [N, k], logp [N, k] fp32 nats): the k most probable tokens at `temperature`, a chunk of logits at a time.

    The products of bf16 tensors stay in the fp32 that they are summed in: rounded to bf16, a logit of 20 is off by up to
    0.06, more than many probabilities differ.
    """
    rows = max(1, CHUNK_BYTES // (4 * len(weight_WE)))
    dtype = torch.promote_types(hidden_NE.dtype, torch.float32)
    found = []
    for chunk_CE in hidden_NE.split(rows):
        logits_CW = torch.empty(len(chunk_CE), len(weight_WE), dtype=dtype, device=chunk_CE.device)
        product(chunk_CE, weight_WE.T, logits_CW)
        if bias_W is not None:
            logits_CW += bias_W
        logits_CW = transform.apply(logits_CW)
        logits_CW /= temperature
        logp_CK, ids_CK = logits_CW.topk(min(k, len(weight_WE)), dim=-1)
        found.append((ids_CK, logp_CK - logits_CW.logsumexp(-1, keepdim=True)))
    ids, logp = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(logp)


def load_frozen(
    folder: Path, model: ModelConfig, device: torch.device, attention: str, liger: bool, num_columns: int | None = None
) -> FrozenScorer:
    """Load a causal LM for scoring: `model` says dtype and whether its own code is trusted; raises ModelError."""
    quiet = model.model_copy(update={"gradient_checkpointing": False})
    return FrozenScorer(load_policy(folder, quiet, str(device), attention, liger), num_columns)
