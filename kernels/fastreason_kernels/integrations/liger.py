"""Liger's `LigerFusedLinearGRPOLoss` with the same constructor, forward arguments and results, on the library's losses.

It owns the translation of Liger's options into a `PolicyLossSpec`, token weights and advantages, and Liger's two metrics. It
refuses options that would silently do nothing, which Liger takes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastreason_kernels.linear_logprob.function import linear_logprob
from fastreason_kernels.linear_policy_loss.function import linear_policy_loss
from fastreason_kernels.policy_math import LOG_RATIO_BOUND, PolicyLossOutput, policy_loss
from fastreason_kernels.policy_spec import PolicyLossSpec

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")

# Stands for masked tokens, whatever id they hold.
IGNORED = -100

# VESPO's bound below its sequence log-ratio, as in Liger and TRL.
VESPO_LOG_FLOOR = math.log(1e-8)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO and its variants straight from hidden states and the head, as the module of that name of Liger 0.8.5.

    With z = (input @ weight.T + bias) / temperature, logp of the selected tokens, rho = exp(logp - old_logp), A, and
    w = vllm_is_ratio (or 1), the loss of a token is

        w * policy(rho, A) + beta * kl,  kl = exp(ref - logp) - (ref - logp) - 1, times rho with use_bias_correction_kl

        grpo bnpo dr_grpo dapo luspo   -min(min(rho, delta) A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A)
        cispo                          -sg(min(rho, epsilon_high)) A logp                     (arXiv 2506.13585)
        sapo                           -(4 / tau) sigmoid(tau (rho - 1)) A                    (arXiv 2511.20347)
        vespo                          -sg(phi) A logp, phi from the sequence's ratio, w inside it

    and the losses are summed over unmasked tokens with these weights, for B sequences of lengths n_b:
    grpo, sapo: 1 / (B n_b). bnpo: 1 / sum n. dr_grpo: 1 / (B max_completion_length). luspo: 1 / B. dapo, cispo, vespo:
    world size / (num_items_in_batch, or the sum of n over all ranks). importance_sampling_level "sequence" replaces rho
    by the exponential of its sequence's mean log-ratio (GSPO, arXiv 2507.18071).

    compiled: changes nothing here. chunk_size: sequences of a chunk; Liger's default of 1 leaves it to the library.
    vespo, use_bias_correction_kl, and "sequence" with old log-probabilities take four head GEMMs with both gradients, the
    others three.

    Differences, each where Liger's value is not meant: masked tokens contribute nothing even where they hold NaN or
    infinity; log-ratios are bounded at 20, so nothing overflows; "luspo" masks each token before it sums (with token
    ratios or a KL term Liger adds the padding's losses, weights by n_b^2 / T, and depends on the padding).

    Raises ValueError for wrong or missing values and for options without effect in the chosen loss; NotImplementedError
    for delta < 1 and for cispo with epsilon_high < 1, which bound the ratio below 1.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        self._check_options()

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss [] fp32, metrics): metrics are the mean kl (only with beta != 0) and the share of clipped tokens.

        _input [B, T, D], lin_weight [V, D], bias [V]: differentiated. selected_token_ids [B, T] int64, attention_mask
        [B, T] of 0 and 1 (the loss mask), advantages [B] or, beyond Liger, [B, T]. ref_per_token_logps, or else
        ref_input [B, T, D] and ref_weight [V, D] and ref_bias; old_per_token_logps (None: the detached logp): [B, T].
        vllm_is_ratio [B], [B, 1] or [B, T], at least 0. num_items_in_batch: tokens of the whole batch on all ranks.
        """
        shape = tuple(selected_token_ids.shape)
        if len(shape) != 2 or _input.shape[:-1] != shape or tuple(attention_mask.shape) != shape:
            raise ValueError(
                f"_input, selected_token_ids, attention_mask: shapes {tuple(_input.shape)}, {shape}, "
                f"{tuple(attention_mask.shape)}, allowed: [B, T, D], [B, T], [B, T]"
            )
        mask = attention_mask != 0
        head = (_input.reshape(-1, _input.shape[-1]), lin_weight, selected_token_ids.reshape(-1))
        options: dict[str, Any] = {
            "bias": bias,
            "temperature": self.temperature,
            "chunk_tokens": self._chunk_tokens(shape[1]),
        }
        reference = (ref_per_token_logps, ref_input, ref_weight, ref_bias)
        ref_logp = self._reference_logp(head[2], mask.reshape(-1), *reference)
        advantages_BT = _per_token("advantages", advantages, shape).expand(shape)
        weights = None if vllm_is_ratio is None else _per_token("vllm_is_ratio", vllm_is_ratio, shape)
        columns: dict[str, Any] = {
            # Every policy term is linear in |A|, so the importance weight goes there; the KL term has none.
            "advantages": advantages_BT if weights is None or self.loss_type == "vespo" else advantages_BT * weights,
            "behaviour_logp": old_per_token_logps,
            "ref_logp": ref_logp,
            "token_weight": self._token_weight(mask, num_items_in_batch),
            "sequence_ids": torch.arange(shape[0], device=mask.device)[:, None].expand(shape),
        }
        flat: dict[str, Any] = {name: None if x is None else x.reshape(-1) for name, x in columns.items()}
        if self.loss_type == "vespo" or (self.use_bias_correction_kl and ref_logp is not None):
            loss, out = self._composed(head, flat, mask, weights, **options)
        else:
            spec = self._spec(ref_logp is not None)
            hidden, weight, ids = head
            advantages = flat.pop("advantages")
            out = linear_policy_loss(hidden, weight, ids, advantages, spec, mask=mask.reshape(-1), **flat, **options)
            loss = out.loss_sum
        return loss, self._metrics(out, advantages_BT, mask)

    def _check_options(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type: got {self.loss_type!r}, allowed: {' | '.join(LOSS_TYPES)}")
        if self.importance_sampling_level not in LEVELS:
            raise ValueError(
                f"importance_sampling_level: got {self.importance_sampling_level!r}, allowed: {' | '.join(LEVELS)}"
            )
        if self.importance_sampling_level == "sequence" and self.loss_type not in CLIPPED:
            raise ValueError(f"importance_sampling_level: 'sequence', allowed for loss_type {self.loss_type!r}: token")
        for key in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: got {getattr(self, key)}, allowed: > 0")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length: None, but loss_type 'dr_grpo' divides by it; pass a number")
        if self.delta is None:
            return
        if self.delta <= 0:
            raise ValueError(f"delta: got {self.delta}, allowed: None or > 0")
        if self.loss_type not in CLIPPED:
            raise ValueError(
                f"delta: got {self.delta}, but loss_type {self.loss_type!r} has no such bound; pass None, or one of "
                f"loss_type {' | '.join(CLIPPED)}"
            )

    def _spec(self, has_kl: bool) -> PolicyLossSpec:
        """What linear_policy_loss shall do; the KL term needs reference log-probabilities."""
        spec = PolicyLossSpec(ratio="sequence" if self.importance_sampling_level == "sequence" else "token")
        if has_kl:
            spec = replace(spec, kl="k3", kl_coef=self.beta)
        if self.loss_type == "sapo":
            return replace(
                spec, gate="sapo", sapo_tau_pos=self.sapo_temperature_pos, sapo_tau_neg=self.sapo_temperature_neg
            )
        if self.loss_type == "vespo":
            return replace(spec, ratio="none")
        if self.loss_type == "cispo":
            _require_at_least_one("epsilon_high", self.epsilon_high)
            return replace(spec, gate="cispo", clip_low=None, clip_high=self.epsilon_high - 1)
        high = 1 + self.epsilon_high
        if self.delta is None:
            return replace(spec, clip_low=self.epsilon_low, clip_high=self.epsilon_high)
        # min(rho, delta) bounds from above: for A > 0 together with the clip, for A < 0 once it passes the clip's bound.
        _require_at_least_one("delta", self.delta)
        return replace(
            spec, clip_low=self.epsilon_low, clip_high=min(high, self.delta) - 1, dual_clip=max(high, self.delta)
        )

    def _chunk_tokens(self, length: int) -> int | None:
        return None if self.chunk_size == 1 else self.chunk_size * length

    def _reference_logp(
        self,
        ids: Tensor,
        mask: Tensor,
        ref_logp: Tensor | None,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> Tensor | None:
        """The reference's log-probabilities where the loss has a KL term with a gradient, else None."""
        if not self.use_ref_model:
            if self.beta != 0 and (ref_logp is not None or ref_input is not None):
                raise ValueError(
                    f"use_ref_model: False, but beta is {self.beta} and a reference was given, which would have no "
                    "effect; construct the loss with use_ref_model=True, or with beta=0"
                )
            return None
        if ref_logp is None and (ref_input is None or ref_weight is None):
            raise ValueError("ref_per_token_logps: None; use_ref_model needs it, or else ref_input and ref_weight")
        if ref_logp is not None and ref_input is not None:
            warnings.warn("ref_input is not used: ref_per_token_logps was given too", stacklevel=3)
        if self.beta == 0 or ref_logp is not None:
            return ref_logp if self.beta != 0 else None
        assert ref_input is not None and ref_weight is not None
        with torch.no_grad():
            logp, _, _ = linear_logprob(
                ref_input.reshape(-1, ref_input.shape[-1]),
                ref_weight,
                ids.masked_fill(~mask, IGNORED),
                ignore_index=IGNORED,
                entropy_grad=False,
                bias=ref_bias,
                temperature=self.temperature,
            )
        return logp

    def _token_weight(self, mask: Tensor, num_items: Tensor | float | None) -> Tensor:
        """[B, T] the weights that turn the loss type's average into a sum."""
        lengths = mask.sum(-1, keepdim=True).float()
        if self.loss_type in ("grpo", "sapo"):
            weight = 1 / (mask.shape[0] * lengths.clamp(min=1))
        elif self.loss_type == "bnpo":
            weight = 1 / lengths.sum().clamp(min=1)
        elif self.loss_type == "luspo":
            weight = torch.ones_like(lengths) / mask.shape[0]
        elif self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            weight = torch.ones_like(lengths) / (mask.shape[0] * self.max_completion_length)
        else:
            weight = 1 / _tokens_per_rank(lengths.sum(), num_items)
        return weight.expand(mask.shape)

    def _composed(
        self,
        head: tuple[Tensor, Tensor, Tensor],
        columns: dict[str, Any],
        mask: Tensor,
        weights: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, PolicyLossOutput]:
        """Log-probabilities first, for losses whose factors depend on them."""
        hidden, weight, ids = head
        keep = mask.reshape(-1)
        ids = ids.masked_fill(~keep, IGNORED)
        logp, _, _ = linear_logprob(hidden, weight, ids, ignore_index=IGNORED, entropy_grad=False, **options)
        old = columns["behaviour_logp"]
        log_ratio = (logp - (logp.detach() if old is None else old)).masked_fill(~keep, 0.0)
        if self.loss_type == "vespo":
            phi = self._vespo_factor(log_ratio.detach().view(mask.shape), columns["advantages"], weights, mask)
            columns = {**columns, "advantages": columns["advantages"] * phi.reshape(-1)}
        corrected = self.use_bias_correction_kl and columns["ref_logp"] is not None
        spec = self._spec(columns["ref_logp"] is not None)
        if corrected:
            spec = replace(spec, kl_coef=0.0)
        out = policy_loss(logp, None, spec=spec, mask=keep, **columns)
        if not corrected:
            return out.loss_sum, out
        r = (columns["ref_logp"] - logp).masked_fill(~keep, 0.0).clamp(max=LOG_RATIO_BOUND)
        if self.importance_sampling_level == "sequence":
            lengths = mask.sum(-1, keepdim=True).clamp(min=1)
            log_ratio = (log_ratio.view(mask.shape).sum(-1, keepdim=True) / lengths).expand(mask.shape).reshape(-1)
        kl = (torch.expm1(r) - r) * log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        total = out.loss_sum + self.beta * (columns["token_weight"] * kl.masked_fill(~keep, 0.0)).sum()
        return total, out._replace(kl=kl.detach())

    def _vespo_factor(self, log_ratio_BT: Tensor, advantages: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
        """[B, T] phi = e^lambda W^k e^(-lambda W), W the sequence's importance ratio (a product over its tokens)."""
        log_w = log_ratio_BT.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).sum(-1, keepdim=True)
        if weights is not None:
            log_weights = weights.log().clamp(VESPO_LOG_FLOOR, LOG_RATIO_BOUND)
            if log_weights.shape == mask.shape:
                log_weights = log_weights.masked_fill(~mask, 0.0)
            log_w = log_w + log_weights.sum(-1, keepdim=True)
        log_w = log_w.clamp(VESPO_LOG_FLOOR, LOG_RATIO_BOUND)
        positive = advantages.view(mask.shape) >= 0
        k = torch.where(positive, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(positive, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return (rate + k * log_w - rate * log_w.exp()).exp()

    def _metrics(self, out: PolicyLossOutput, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        count = mask.sum().clamp(min=1)
        # The ratio of masked tokens is NaN, which compares as not clipped.
        ratio = out.ratio.view(mask.shape)
        if self.loss_type in CLIPPED:
            clipped = ((ratio < 1 - self.epsilon_low) & (advantages < 0)) | (
                (ratio > 1 + self.epsilon_high) & (advantages > 0)
            )
        else:
            clipped = (ratio > self.epsilon_high) & (advantages > 0) & (self.loss_type == "cispo")
        share = clipped.sum() / count
        if self.beta == 0:
            return (share,)
        return (out.kl.view(mask.shape).masked_fill(~mask, 0.0).sum() / count, share)


def _require_at_least_one(key: str, value: float) -> None:
    if value < 1:
        raise NotImplementedError(f"{key}: got {value}, allowed: >= 1, as it is a bound of the ratio itself")


def _per_token(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """values [B], [B, 1] or [B, T] as [B, 1] or [B, T], fp32 (fp64)."""
    column = values[:, None] if values.dim() == 1 else values
    if column.dim() != 2 or column.shape[0] != shape[0] or column.shape[1] not in (1, shape[1]):
        raise ValueError(f"{name}: shape {tuple(values.shape)}, allowed: [B], [B, 1] or [B, T] = {list(shape)}")
    return column.to(torch.promote_types(values.dtype, torch.float32))


def _tokens_per_rank(local: Tensor, num_items: Tensor | float | None) -> Tensor:
    """The denominator of dapo: tokens of the whole batch over the number of ranks, whose gradients are averaged."""
    distributed = dist.is_available() and dist.is_initialized()
    if num_items is not None:
        total = torch.as_tensor(num_items, dtype=torch.float32, device=local.device)
    else:
        total = local.clone()
        if distributed:
            dist.all_reduce(total)
    return (total / (dist.get_world_size() if distributed else 1)).clamp(min=1)
