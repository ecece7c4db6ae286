"""The terms beside the policy loss: KL to a reference or a teacher, entropy; their coefficients over time, and their masks.

It owns estimators on log-probabilities, schedules, and which responses a term acts on. It refuses to know models, and the
divergences of whole distributions (exact, top_k), which the loss library computes. How the gradients of the estimators
differ, with pi the policy, q the target, r = log q - log pi on a token that pi sampled (derivations: KDRL, arXiv 2506.02208):

    estimator            as a loss, through pi            as a detached advantage, -k
    k1 = -r              zero in expectation              that of KL(pi || q)
    k2 = r^2 / 2         that of KL(pi || q)              neither's
    k3 = e^r - r - 1     that of KL(q || pi)              that of KL(pi || q) - KL(q || pi)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["none", "k1", "k2", "k3", "exact", "top_k"]

# As in the loss library: beyond it the exponential of k3 would overflow.
LOG_RATIO_BOUND = 20.0

ADAPTIVE_ERROR_BOUND = 0.2


@dataclass(frozen=True)
class CoefficientState:
    """What coefficients carry from step to step: plain numbers, so that a checkpoint can hold them.

    kl: the adaptive KL coefficient. entropy: the adaptive entropy coefficient. entropy_acts: whether it was needed last.
    """

    kl: float = 0.0
    entropy: float = 0.0
    entropy_acts: bool = True


@dataclass(frozen=True)
class KlTerm:
    """coef * KL(pi || target), estimated on the sampled tokens (k1, k2, k3) or over the vocabulary (exact, its top_k).

    place      loss: a term of the loss, differentiated through pi.  advantage: A_t - coef k_t, detached.
               reward: r - coef sum_t k_t, detached, before advantages are made.
    schedule   fixed: coef.  annealed: max(coef - anneal step, floor).  adaptive: towards goal nats per token, with horizon
               in responses (arXiv 1909.08593).
    mask       which responses it acts on.  wrong: those that are not correct (a right one teaches itself).  wrong_group:
               those of groups without a correct one.  none: all.
    weight     ratio: in the loss, each token's k2 or k3 times pi / behaviour and any importance weight, detached, so that
               tokens of an older policy do not bias the gradient.  none: every token alike, as in most published code.
    mask_mean  all: divided as the loss is.  kept: by what the kept responses count, so that a mask does not weaken it.
    """

    estimator: Estimator = "none"
    place: Literal["loss", "advantage", "reward"] = "loss"
    target: Literal["reference", "teacher"] = "reference"
    coef: float = 0.0
    schedule: Literal["fixed", "annealed", "adaptive"] = "fixed"
    anneal: float = 0.0
    floor: float = 0.0
    goal: float = 0.0
    horizon: float = 10_000.0
    top_k: int = 32
    mask: Literal["none", "wrong", "wrong_group"] = "none"
    mask_mean: Literal["kept", "all"] = "all"
    weight: Literal["none", "ratio"] = "none"

    @property
    def active(self) -> bool:
        """Whether it moves the policy at any step."""
        return self.estimator != "none" and self.coef > 0

    @property
    def sampled(self) -> bool:
        """Whether it needs no more of the target than log-probabilities of the sampled tokens."""
        return self.estimator in ESTIMATORS

    @property
    def weighable(self) -> bool:
        """Whether `weight` has anything to act on: elsewhere the policy term's own weights act, or nothing was sampled."""
        return self.place == "loss" and self.estimator in ("k2", "k3")

    def coefficient(self, step: int, state: CoefficientState) -> float:
        """The coefficient at `step`, from 0 on."""
        if self.estimator == "none":
            return 0.0
        return {"fixed": self.coef, "annealed": max(self.coef - self.anneal * step, self.floor), "adaptive": state.kl}[
            self.schedule
        ]

    def adapted(self, coef: float, measured: float, num_responses: int) -> float:
        """The coefficient after a step in which the KL was `measured` (nats per token); `coef` unless it is adaptive.

        coef (1 + clip(measured / goal - 1, -0.2, 0.2) num_responses / horizon), the controller of arXiv 1909.08593; its
        factor is kept from below 0, which a batch of more than 5 horizons would reach.
        """
        if self.schedule != "adaptive":
            return coef
        error = min(ADAPTIVE_ERROR_BOUND, max(-ADAPTIVE_ERROR_BOUND, measured / self.goal - 1))
        return coef * max(0.0, 1 + error * num_responses / self.horizon)


@dataclass(frozen=True)
class EntropyTerm:
    """-coef * entropy in the loss; with a goal (nats per token), coef moves by `step` towards it (arXiv 2505.22312).

    There: c rises by step where the entropy is below the goal, falls where it is above, and acts only where it is not above.
    Ours is measured in the training step, so it acts one step later; c stays at least 0.
    """

    coef: float = 0.0
    goal: float | None = None
    step: float = 0.005

    @property
    def active(self) -> bool:
        """Whether it moves the policy at any step."""
        return self.coef > 0 or self.goal is not None

    def coefficient(self, state: CoefficientState) -> float:
        """The coefficient that acts."""
        if self.goal is None:
            return self.coef
        return state.entropy if state.entropy_acts else 0.0

    def adapted(self, coef: float, measured: float) -> float:
        """The coefficient after a step in which the mean token entropy was `measured`; `coef` without a goal."""
        if self.goal is None or measured == self.goal:
            return coef
        return max(0.0, coef + (self.step if measured < self.goal else -self.step))


def _k3(r: Tensor) -> Tensor:
    r = r.clamp(max=LOG_RATIO_BOUND)
    return torch.expm1(r) - r


# Of r = target_logp - logp.
ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda r: -r,
    "k2": lambda r: r.square() / 2,
    "k3": _k3,
}


def estimate(logp: Tensor, target_logp: Tensor, estimator: str) -> Tensor:
    """The estimate of KL(pi || target) at each token, nats, shaped as logp; differentiable through both.

    logp, target_logp: the policy's and the target's log-probabilities of tokens that the policy sampled, at one temperature.
    Raises ValueError for an estimator that needs more than these (exact, top_k). Estimators: J. Schulman, "Approximating KL
    divergence" (2020).
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: got {estimator!r}, allowed on sampled tokens: {' | '.join(ESTIMATORS)}")
    return ESTIMATORS[estimator](target_logp - logp)


def advantage_addend(logp: Tensor, target_logp: Tensor, term: KlTerm, coef: float) -> Tensor:
    """-coef k_t, detached, shaped as logp: what place=advantage adds to a token's advantage (k1: +coef (log q - log pi))."""
    return -coef * estimate(logp.detach(), target_logp.detach(), term.estimator)


def guided_mask(correct_PG: Tensor, mask: str) -> Tensor:
    """[P, G] bool: the responses that a term with this mask acts on, from which of them are correct ([P, G] bool)."""
    kept = {"none": torch.ones_like(correct_PG), "wrong": ~correct_PG}
    kept["wrong_group"] = (~correct_PG.any(dim=1, keepdim=True)).expand_as(correct_PG)
    return kept[mask]


def kept_scale(kept_PG: Tensor, counts_PG: Tensor, mask_mean: str) -> float:
    """What multiplies a masked term's sum, so that mask_mean=kept is a mean over what is kept; 1 for all, 0 if none is.

    kept_PG: [P, G] bool. counts_PG: [P, G], what each response of the update adds to the loss's denominator (its tokens, or
    1 where the aggregation is over sequences; 0 for one that is left out).
    """
    kept = float((counts_PG * kept_PG).sum())
    return 1.0 if mask_mean == "all" else float(counts_PG.sum()) / kept if kept else 0.0
