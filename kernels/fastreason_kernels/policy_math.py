"""The one pure function of `[N]` tensors that holds every policy loss.

It owns the arithmetic of ratios, gates, KL estimators, entropy bonus and importance weights. It refuses to know about
hidden states, heads or chunks: those call it, so that no strategy can drift from another.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreason_kernels.policy_spec import PolicyLossSpec

# exp(20) = 4.9e8: large enough to be clipped by any gate, small enough to stay finite in a fp32 sum of squares.
LOG_RATIO_BOUND = 20.0

# The columns that tell which tokens have a gradient: read together, so they lie on one device.
ROW_COLUMNS = ("advantages", "token_weight", "mask", "sequence_ids")


class PolicyLossOutput(NamedTuple):
    """What a policy loss returns: the differentiable sum, and detached values of each token.

    A tuple, because the hooks of DeepSpeed's ZeRO-3 and of FSDP look for a module's output tensors in tuples only.

    loss_sum: [] fp32, a sum over tokens (never a mean), connected to the graph even when nothing is active.
    logp, entropy (nats), kl (the spec's estimator, unweighted; 0 without one), ratio: [N] fp32, NaN where not computed.
    clipped: [N] bool, the gate changed this token's ratio. computed: [N] bool, False for masked and skipped tokens.
    """

    loss_sum: Tensor
    logp: Tensor
    entropy: Tensor
    kl: Tensor
    ratio: Tensor
    clipped: Tensor
    computed: Tensor


def policy_loss(
    logp: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    spec: PolicyLossSpec,
    *,
    behaviour_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> PolicyLossOutput:
    """Sums the policy loss that `spec` describes over tokens whose log-probabilities are already known.

        loss_sum = sum_t token_weight_t * (w_t * gate(ratio_t, A_t) + kl_coef * v_t * kl_t - entropy_coef * entropy_t)

    v_t is 1, or with kl_weight="ratio" w_t * exp(logp_t - behaviour_logp_t), detached.

    logp, entropy (may be None without an entropy term): [N] nats, any float dtype, differentiated.
    advantages, behaviour_logp (ratio's denominator; None: the detached logp, ratio exactly 1), ref_logp (a reference's or
    a teacher's), sampler_logp, token_weight: [N] float, not differentiated. mask: [N] bool, False contributes nothing,
    whatever stands there (NaN). sequence_ids: [N] int64, for a ratio or an importance_level of sequences: tokens with one
    id are one sequence, its sum and mean over unmasked tokens. advantages may be [S], one a sequence, where sequence_ids
    are 0 to S - 1.

    Raises ValueError for a missing or misshapen tensor. Log-ratios, and logarithms of importance weights, are clamped to
    +-20 before the exponential, and have no gradient there.
    """
    columns: dict[str, Any] = {
        "advantages": per_token(advantages, sequence_ids, logp.shape[0]),
        "behaviour_logp": behaviour_logp,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
        "token_weight": token_weight,
        "mask": mask,
        "sequence_ids": sequence_ids,
    }
    check_columns(spec, logp.shape[0], columns)
    if entropy is None and spec.entropy_coef != 0:
        raise ValueError(f"entropy: None, but entropy_coef is {spec.entropy_coef}; pass entropy [N]")
    return evaluate(logp, entropy, spec, **columns)


def per_token(advantages: Tensor, sequence_ids: Tensor | None, num_tokens: int) -> Tensor:
    """[N] advantages, from [N] or from one for each sequence [S], taken by sequence_ids (0 to S - 1); detached."""
    if advantages.dim() == 1 and advantages.shape[0] != num_tokens and sequence_ids is not None:
        return advantages.detach().index_select(0, sequence_ids)
    return advantages.detach()


def gradient_rows(spec: PolicyLossSpec, columns: dict[str, Any], mask: Tensor | None) -> Tensor:
    """[N] bool: the tokens that may have a gradient, as far as it is known before any log-probability.

    A token has none where it is masked, or every coefficient on it is 0: its advantage times weight (under a sequence's
    ratio, or an importance weight yet to be computed: that of every token of the sequence), and its weight where KL or
    entropy terms act.
    """
    weight = columns.get("token_weight")
    weighted = torch.ones_like(columns["advantages"], dtype=torch.bool) if weight is None else weight != 0
    weighted = weighted if mask is None else weighted & mask
    rows = weighted & (columns["advantages"] != 0)
    if spec.ratio == "sequence" or spec.couples_weights(columns.get("behaviour_logp") is not None):
        rows = _over_sequences(rows.float(), columns["sequence_ids"], mask, mean=True) > 0
    if spec.acts_at_zero_advantage:
        rows = rows | weighted
    return rows if mask is None else rows & mask


def check_columns(spec: PolicyLossSpec, num_tokens: int, columns: dict[str, Any]) -> None:
    """Raises ValueError when a column that `spec` needs is missing, or one has the wrong shape or kind."""
    needed = {
        "advantages": True,
        "ref_logp": spec.kl != "none",
        "sampler_logp": spec.importance != "none",
        "sequence_ids": spec.ratio == "sequence" or spec.weighs_sequences,
    }
    chosen_by = {name: x.device for name, x in columns.items() if name in ROW_COLUMNS and x is not None}
    if len(set(chosen_by.values())) > 1:
        raise ValueError(f"{', '.join(chosen_by)}: devices {list(chosen_by.values())}, allowed: one for all of them")
    for name, value in columns.items():
        if value is None:
            if needed.get(name, False):
                raise ValueError(f"{name}: None, but the spec needs it ({spec}); pass a tensor [N]")
            continue
        if value.shape != (num_tokens,):
            raise ValueError(f"{name}: shape {tuple(value.shape)}, allowed: [N] = [{num_tokens}]")
        kind = {"mask": "bool", "sequence_ids": "integer"}.get(name, "float")
        actual = "bool" if value.dtype == torch.bool else "float" if value.is_floating_point() else "integer"
        if actual != kind:
            raise ValueError(f"{name}: dtype {value.dtype}, allowed: a {kind} tensor")


def importance_weight(
    trainer_logp: Tensor,
    sampler_logp: Tensor,
    spec: PolicyLossSpec,
    *,
    sequence_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """([N] w of the policy term as `spec` bounds it, [N] bool: bounded), both detached; 1 everywhere without importance.

    trainer_logp: [N] behaviour_logp, or logp where there is none; the others as in `policy_loss`, which uses these weights.
    Raises ValueError where the spec needs sequence_ids and there are none.
    """
    if spec.weighs_sequences and sequence_ids is None:
        raise ValueError(f"sequence_ids: None, but importance_level is {spec.importance_level!r}; pass a tensor [N]")
    if spec.importance == "none":
        return torch.ones_like(trainer_logp), torch.zeros_like(trainer_logp, dtype=torch.bool)
    return _bounded_weight(log_importance_weight(trainer_logp, sampler_logp, spec, sequence_ids, mask), spec)


def log_importance_weight(
    trainer_logp: Tensor, sampler_logp: Tensor, spec: PolicyLossSpec, sequence_ids: Tensor | None, mask: Tensor | None
) -> Tensor:
    """[N] log w before its bounds, by the spec's level, clamped to +-20; detached."""
    log_weight = trainer_logp.detach() - sampler_logp.detach()
    if spec.weighs_sequences:
        assert sequence_ids is not None
        log_weight = log_weight if mask is None else log_weight.masked_fill(~mask, 0.0)
        log_weight = _over_sequences(log_weight, sequence_ids, mask, mean=spec.importance_level == "geometric")
    return log_weight.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def known_log_weight(spec: PolicyLossSpec, columns: dict[str, Any], mask: Tensor | None) -> Tensor | None:
    """[N] `log_importance_weight` of sequences that behaviour_logp gives before any log-probability; else None."""
    behaviour_logp = columns.get("behaviour_logp")
    if behaviour_logp is None or not spec.weighs_sequences:
        return None
    return log_importance_weight(behaviour_logp, columns["sampler_logp"], spec, columns["sequence_ids"], mask)


def _bounded_weight(log_weight: Tensor, spec: PolicyLossSpec) -> tuple[Tensor, Tensor]:
    weight = log_weight.exp()
    if spec.importance == "truncate":
        return weight.clamp(max=spec.importance_cap), weight > spec.importance_cap
    outside = (weight > spec.importance_cap) | (weight < spec.importance_floor)
    return weight.masked_fill(outside, 0.0), outside


def evaluate(
    logp: Tensor,
    entropy: Tensor | None,
    spec: PolicyLossSpec,
    *,
    advantages: Tensor,
    behaviour_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    log_weight: Tensor | None = None,
) -> PolicyLossOutput:
    """`policy_loss` without its checks, for callers that checked once and come once per chunk.

    log_weight: [N] `log_importance_weight` where it is known already, because the tokens of a sequence are not all here.
    """
    if mask is not None:
        # Every term of a blanked token is 0. Masking the loss instead would multiply a masked NaN by 0 in backward.
        logp, advantages = logp.masked_fill(~mask, 0.0), advantages.masked_fill(~mask, 0.0)
        entropy, behaviour_logp, ref_logp, sampler_logp, token_weight, log_weight = (
            None if x is None else x.masked_fill(~mask, 0.0)
            for x in (entropy, behaviour_logp, ref_logp, sampler_logp, token_weight, log_weight)
        )
    ratio = _ratio(logp, behaviour_logp, sequence_ids, mask, spec)
    loss, clipped = _gate(logp, ratio, advantages, spec)
    weight = None
    if spec.importance != "none":
        if log_weight is None:
            assert sampler_logp is not None
            trainer_logp = logp if behaviour_logp is None else behaviour_logp
            log_weight = log_importance_weight(trainer_logp, sampler_logp, spec, sequence_ids, mask)
        weight = _bounded_weight(log_weight, spec)[0]
        loss = loss * weight
    kl = _kl(logp, ref_logp, spec)
    if spec.kl_coef != 0:
        loss = loss + spec.kl_coef * _weighted_kl(kl, logp, behaviour_logp, weight, spec)
    if spec.entropy_coef != 0:
        assert entropy is not None
        loss = loss - spec.entropy_coef * entropy
    if token_weight is not None:
        loss = loss * token_weight

    def report(x: Tensor | None) -> Tensor:
        if x is None:
            return torch.full_like(logp, math.nan)
        return x.detach() if mask is None else x.detach().masked_fill(~mask, math.nan)

    return PolicyLossOutput(
        loss_sum=loss.sum(),
        logp=report(logp),
        entropy=report(entropy),
        kl=report(kl),
        ratio=report(ratio),
        clipped=clipped,
        computed=torch.ones_like(clipped) if mask is None else mask,
    )


def _ratio(
    logp: Tensor, behaviour_logp: Tensor | None, sequence_ids: Tensor | None, mask: Tensor | None, spec: PolicyLossSpec
) -> Tensor:
    if spec.ratio == "none":
        return torch.ones_like(logp)
    log_ratio = logp - (logp.detach() if behaviour_logp is None else behaviour_logp)
    if spec.ratio == "sequence":
        assert sequence_ids is not None
        log_ratio = _over_sequences(log_ratio, sequence_ids, mask, mean=True)
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def _over_sequences(values: Tensor, sequence_ids: Tensor, mask: Tensor | None, *, mean: bool) -> Tensor:
    """[N] -> [N]: each token gets the sum or mean over the unmasked tokens of its sequence; masked values must be 0."""
    index = _dense_ids(sequence_ids)
    # In float64 the order of the sum, which a GPU does not fix, cannot reach a fp32 result.
    zeros = torch.zeros(values.shape[0], dtype=torch.float64, device=values.device)
    total = zeros.index_add(0, index, values.double())
    if mean:
        counts = torch.ones_like(values) if mask is None else mask
        total = total / zeros.index_add(0, index, counts.double()).clamp(min=1)
    return total[index].to(values.dtype)


def _dense_ids(sequence_ids: Tensor) -> Tensor:
    """[N] int64 -> [N] int64: the rank of each id among the distinct ones; of a known shape, unlike torch.unique."""
    ordered, order = sequence_ids.sort(stable=True)
    rank = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    return torch.empty_like(order).index_copy(0, order, rank)


def _gate(logp: Tensor, ratio: Tensor, advantages: Tensor, spec: PolicyLossSpec) -> tuple[Tensor, Tensor]:
    """([N] loss, [N] bool clipped) of the policy term."""
    unclipped = torch.zeros_like(advantages, dtype=torch.bool)
    if spec.ratio == "none":
        return -advantages * logp, unclipped
    if spec.gate == "sapo":
        tau = torch.where(advantages > 0, spec.sapo_tau_pos, spec.sapo_tau_neg).to(ratio.dtype)
        return -torch.sigmoid(tau * (ratio - 1)) * (4 / tau) * advantages, unclipped
    low = -math.inf if spec.clip_low is None else 1 - spec.clip_low
    high = math.inf if spec.clip_high is None else 1 + spec.clip_high
    if spec.gate == "cispo":
        bounded = ratio.detach().clamp(low, high)
        loss = -bounded * advantages * logp
    else:
        # min(rho A, clip(rho) A) = A min(rho, high) for A > 0, A max(rho, low) for A < 0; dual_clip bounds the latter.
        dual = math.inf if spec.dual_clip is None else spec.dual_clip
        bounded = torch.where(advantages > 0, ratio.clamp(max=high), ratio.clamp(low, dual))
        loss = -bounded * advantages
    return loss, (bounded != ratio) & (advantages != 0)


def _kl(logp: Tensor, ref_logp: Tensor | None, spec: PolicyLossSpec) -> Tensor:
    if spec.kl == "none":
        return torch.zeros_like(logp)
    assert ref_logp is not None
    r = ref_logp - logp
    if spec.kl == "k1":
        return -r
    if spec.kl == "k2":
        return r.square() / 2
    # Only the upper side overflows. Bounding all of r, not just the exponent, keeps the gradient's sign right there.
    r = r.clamp(max=LOG_RATIO_BOUND)
    return torch.expm1(r) - r


def _weighted_kl(
    kl: Tensor, logp: Tensor, behaviour_logp: Tensor | None, weight: Tensor | None, spec: PolicyLossSpec
) -> Tensor:
    """[N] the KL term as `spec.kl_weight` counts it; weight: the policy term's importance weights."""
    if spec.kl_weight == "none":
        return kl
    if behaviour_logp is not None:
        kl = kl * (logp.detach() - behaviour_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    return kl if weight is None else kl * weight
