"""What a divergence is, and its value where only the top k log-probabilities of a teacher are known.

It owns DivergenceSpec, and a pure function of [N, K] tensors with its derivatives (an operator's body runs below
autograd). It refuses to read logits: of the student it needs the log-probabilities of the k tokens and of all the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS = ("reverse", "forward", "jsd")
TAILS = ("bucket", "drop", "renormalise")

# Lowest log-probability of a term. All is float64 here, where exp of it and of its negative are finite: K is small.
LOWEST = -600.0

# What the rounding of bf16 log-probabilities may make of a mass of 1.
LARGEST_MASS = 1.05


@dataclass(frozen=True)
class DivergenceSpec:
    """Chooses KL(p||q) ("reverse"), KL(q||p) ("forward") or "jsd" with its beta, and what a top-k teacher's tail counts.

    p is the student, q the teacher. Raises ValueError for a value outside of what is allowed.
    """

    direction: str = "reverse"
    beta: float = 0.5
    tail: str = "bucket"

    def __post_init__(self) -> None:
        for key, allowed in (("direction", DIRECTIONS), ("tail", TAILS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: got {getattr(self, key)!r}, allowed: {' | '.join(allowed)}")
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta: got {self.beta}, allowed: 0 < beta < 1; for its ends use direction 'forward' or 'reverse'"
            )


def topk_divergence(
    logp: Tensor, tail_logp: Tensor, teacher_logp: Tensor, present: Tensor, spec: DivergenceSpec, vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N] in nats, d/d logp [N, K], d/d tail_logp [N]), float64, of p (student) and q (teacher) over k tokens.

        bucket       the rest is one more token: q_rest = 1 - sum_k q_k, at least the resolution of that sum;
                     no rest where all of the vocabulary is listed
        drop         the k terms alone: sum_k p_k (log p_k - log q_k), or as the direction says; may be negative
        renormalise  p_k / sum_k p_k against q_k / sum_k q_k

    logp [N, K], tail_logp [N]: the student's. teacher_logp [N, K], present [N, K] bool: absent entries belong to the rest,
    whatever stands there. A row without entries gives 0. Logarithms below -600 count as -600.
    """
    floor = torch.finfo(torch.promote_types(teacher_logp.dtype, torch.float32)).eps
    log_p = logp.double().masked_fill(~present, LOWEST).clamp(min=LOWEST)
    log_q = teacher_logp.double().masked_fill(~present, LOWEST).clamp(min=LOWEST)
    if spec.tail == "renormalise":
        log_p, log_q = (x - x.logsumexp(-1, keepdim=True) for x in (log_p, log_q))
    terms, slopes = (x.masked_fill(~present, 0.0) for x in _terms(log_p, log_q, spec, positive=spec.tail != "drop"))
    value, no_slope = terms.sum(-1), torch.zeros_like(tail_logp, dtype=torch.float64)
    if spec.tail == "renormalise":
        # The normaliser of p depends on each of its entries.
        return value, slopes - log_p.exp().masked_fill(~present, 0.0) * slopes.sum(-1, keepdim=True), no_slope
    if spec.tail == "drop":
        return value, slopes, no_slope
    log_rest = torch.log((1 - log_q.exp().masked_fill(~present, 0.0).sum(-1)).clamp(min=floor))
    gone = present.sum(-1) == vocab
    rest = _terms(tail_logp.double().clamp(min=LOWEST), log_rest, spec, positive=True)
    rest_term, rest_slope = (x.masked_fill(gone, 0.0) for x in rest)
    return value + rest_term, slopes, rest_slope


def _terms(log_p: Tensor, log_q: Tensor, spec: DivergenceSpec, *, positive: bool) -> tuple[Tensor, Tensor]:
    """The terms of a divergence, and the derivative of each with respect to its log_p.

    `positive` adds to each term b - a of a KL(a||b), which sums to 0 over a distribution: each is then >= 0.
    """
    p, q = log_p.exp(), log_q.exp()
    if spec.direction == "reverse":
        slopes = p * (log_p - log_q)
        return (slopes - p + q, slopes) if positive else (slopes, slopes + p)
    if spec.direction == "forward":
        terms = q * (log_q - log_p)
        return (terms - q + p, p - q) if positive else (terms, -q)
    # Here the sums of b - a cancel term by term.
    log_m = torch.logaddexp(log_q + math.log(spec.beta), log_p + math.log1p(-spec.beta))
    slopes = (1 - spec.beta) * p * (log_p - log_m)
    return spec.beta * q * (log_q - log_m) + slopes, slopes


def check_top_k(ids: Tensor, teacher_logp: Tensor, vocab: int, spec: DivergenceSpec) -> None:
    """Raises ValueError for ids outside [-1, vocab) or twice in a row, and for log-probabilities that sum to more than 1.

    On a CPU only: elsewhere it would wait for the device.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    if not -1 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(
            f"teacher_topk_ids: values {int(ids.min())} to {int(ids.max())}, allowed: 0 to {vocab - 1}, or -1 for an absent "
            "entry; make what the student's vocabulary lacks absent"
        )
    present = (ids >= 0) & (teacher_logp > -math.inf)
    ordered = ids.masked_fill(~present, -1).sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(
            f"teacher_topk_ids: token {int(ordered[:, 1:][twice][0])} twice in a row, allowed: once; make its "
            "repeat absent (-1)"
        )
    mass = teacher_logp.double().exp().masked_fill(~present, 0.0).sum(-1)
    if spec.tail != "renormalise" and bool((mass > LARGEST_MASS).any()):
        raise ValueError(
            f"teacher_topk_logp: a row sums to a probability of {float(mass.max()):.4g}, allowed: 1; pass log-probabilities "
            "over the whole vocabulary, or tail='renormalise' for logits"
        )
