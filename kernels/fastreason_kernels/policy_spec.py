"""Which policy loss it is: the choices, their bounds, and what follows from them without any tensor."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class PolicyLossSpec:
    """Chooses the loss of one token: gate(ratio, A), plus `kl_coef * kl`, minus `entropy_coef * entropy`.

    ratio       "none": loss -A log pi.  "token": rho = exp(logp - behaviour_logp).  "sequence": rho is the exponential
                of the sequence's mean log-ratio (GSPO, arXiv 2507.18071), differentiated through that mean.
    gate        "clip": -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347).
                "cispo": -sg(clip(rho)) A log pi (arXiv 2506.13585).
                "sapo": -(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A (arXiv 2511.20347).
    clip_low    distance below 1, clip_high above 1; None leaves that side unclipped. Unused by "sapo".
    dual_clip   c > 1: for A < 0 the loss is at most -c A (arXiv 1912.09729). None: off.
    kl          estimator against ref_logp, r = ref_logp - logp: k1 = -r, k2 = r^2 / 2, k3 = e^r - r - 1, differentiated
                through logp. So, on-policy, k1's gradient is zero in expectation and k2's is the reverse KL's.
    kl_weight   "none": the KL term of every token counts alike.  "ratio": times the token's own rho (1 without
                behaviour_logp) whatever `ratio` is, and times w, both detached: off-policy too, with the prefix as given,
                the expectation of the gradient is then the one on-policy.
    importance  weight w, detached, on the policy term (by kl_weight on KL too, never on entropy); "truncate":
                min(w, importance_cap), "mask": w where importance_floor <= w <= importance_cap, else 0 (IcePop,
                arXiv 2510.18855).
    importance_level   with d_t = behaviour_logp - sampler_logp, "token": w = exp(d_t).  "sequence": the product over the
                sequence's tokens, exp(sum d).  "geometric": their geometric mean, exp(mean d).

    encoded is the spec as a string, for torch.library operators. Raises ValueError for a value outside of what is allowed.
    Left out: GSPO-token (a detached sequence ratio with per-token advantages), a floor under truncated weights, weights
    divided by their mean over the batch, a weighted entropy bonus.
    """

    ratio: Literal["none", "token", "sequence"] = "token"
    gate: Literal["clip", "cispo", "sapo"] = "clip"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coef: float = 0.0
    kl_weight: Literal["none", "ratio"] = "none"
    entropy_coef: float = 0.0
    importance: Literal["none", "truncate", "mask"] = "none"
    importance_cap: float = 2.0
    importance_level: Literal["token", "sequence", "geometric"] = "token"
    importance_floor: float = 0.0
    encoded: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for key in ("ratio", "gate", "kl", "kl_weight", "importance", "importance_level"):
            self._require(key, getattr(self, key) in get_args(hints[key]), " | ".join(get_args(hints[key])))
        for key in ("clip_low", "clip_high"):
            self._require(key, getattr(self, key) is None or _at_least_zero(getattr(self, key)), "None or >= 0")
        self._require("dual_clip", self.dual_clip is None or self.dual_clip > 1, "None or > 1")
        self._require("sapo_tau_pos", self.sapo_tau_pos > 0, "> 0")
        self._require("sapo_tau_neg", self.sapo_tau_neg > 0, "> 0")
        self._require("kl_coef", math.isfinite(self.kl_coef), "a finite number")
        self._require("entropy_coef", math.isfinite(self.entropy_coef), "a finite number")
        self._require("importance_cap", self.importance_cap > 0, "> 0")
        below_cap = 0 <= self.importance_floor <= self.importance_cap
        self._require("importance_floor", below_cap, f"0 to importance_cap = {self.importance_cap}")
        masks = self.importance == "mask" or self.importance_floor == 0
        self._require("importance_floor", masks, f"0 when importance is {self.importance!r}")
        self._require("gate", self.ratio != "none" or self.gate == "clip", "clip when ratio is 'none'")
        if self.dual_clip is not None:
            self._require("dual_clip", self.ratio != "none", "None when ratio is 'none'")
            self._require("dual_clip", self.gate == "clip", "None unless gate is 'clip'")
        self._require("kl", self.kl != "none" or self.kl_coef == 0, f"k1 | k2 | k3 when kl_coef is {self.kl_coef}")
        self._require("kl_weight", self.kl != "none" or self.kl_weight == "none", "none when kl is 'none'")
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        object.__setattr__(self, "encoded", json.dumps(values))

    @staticmethod
    @functools.cache
    def decode(encoded: str) -> PolicyLossSpec:
        """The spec that `encoded` stands for."""
        return PolicyLossSpec(**json.loads(encoded))

    def _require(self, key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"PolicyLossSpec.{key}: got {getattr(self, key)!r}, allowed: {allowed}")

    @property
    def acts_at_zero_advantage(self) -> bool:
        """Whether a token whose advantage is 0 has a gradient of its own, by KL or entropy."""
        return self.kl_coef != 0 or self.entropy_coef != 0

    def couples_tokens(self, has_behaviour_logp: bool) -> bool:
        """Whether a token's gradient depends on log-probabilities of other tokens: then no gradient can be made in forward.

        A sequence's ratio does so, unless it is 1 by definition; with "cispo" its value is detached but still theirs. So
        does its importance weight, unless behaviour_logp gives it.
        """
        on_policy = not has_behaviour_logp and (self.importance == "none" or self.gate == "cispo")
        return (self.ratio == "sequence" and not on_policy) or self.couples_weights(has_behaviour_logp)

    def couples_weights(self, has_behaviour_logp: bool) -> bool:
        """Whether a token's importance weight depends on log-probabilities that are yet to be computed, of other tokens."""
        return self.weighs_sequences and not has_behaviour_logp

    @property
    def weighs_sequences(self) -> bool:
        """Whether the tokens of a sequence share one importance weight."""
        return self.importance != "none" and self.importance_level != "token"


def _at_least_zero(value: float) -> bool:
    return value >= 0
