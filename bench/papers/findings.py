"""Do the findings of three papers show? Pure functions of the arms' curves over seeds.

It owns what each finding means in figures, and when figures count as an answer. It refuses to read, run and draw. A finding
is a conjunction of claims; a claim is one effect per seed, the arms compared under the same seed, and positive where the
paper's finding shows. With the mean's 90 % interval [low, high] (Student's t over the seeds):

    yes      low > 0, and the mean is at least the smallest effect that would matter
    no       high is below the smallest effect that would matter
    unclear  else; and always with fewer than two seeds

A finding showed if all of its claims did, and did not if one did not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from curves import Curve, accuracy, first_reach, first_third, last_quarter, pass_at_k, smoothed, value_at

Verdict = Literal["yes", "no", "unclear"]
Curves = Mapping[str, Curve]  # of one seed, by arm

# Student's t, 95 % one-sided, by degrees of freedom from 1; beyond the table its last value, which is the stricter.
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)

# Smallest effects that would matter: reward of range [-1, 1], nats, shares.
REWARD, ENTROPY, SHARE, ACCURACY = 0.05, 0.02, 0.1, 0.05
MIN_RISE = 0.1  # of the reward, which arms must have in common before the way there is compared
LEVELS = (0.5, 0.75, 1.0)  # shares of that rise
K = 8


@dataclass(frozen=True)
class Claim:
    """One effect per seed; nan where a seed cannot tell."""

    text: str
    effects: tuple[float, ...]
    smallest: float

    @property
    def known(self) -> list[float]:
        return [effect for effect in self.effects if math.isfinite(effect)]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.known) if self.known else math.nan

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds; nan with fewer than two."""
        return statistics.stdev(self.known) if len(self.known) > 1 else math.nan

    @property
    def verdict(self) -> Verdict:
        num = len(self.known)
        if num < 2:
            return "unclear"
        half = T_95[min(num - 2, len(T_95) - 1)] * self.spread / math.sqrt(num)
        if self.mean - half > 0 and self.mean >= self.smallest:
            return "yes"
        return "no" if self.mean + half < self.smallest else "unclear"


@dataclass(frozen=True)
class Finding:
    """What a paper found, the arms that it is about, and its claims: (text, smallest effect that matters, effect)."""

    statement: str
    paper: str
    arms: tuple[str, ...]
    claims: tuple[tuple[str, float, Callable[[Curves], float]], ...]


@dataclass(frozen=True)
class Answer:
    """A finding's verdict, with the seeds that have all of its arms."""

    letter: str
    showed: Verdict
    seeds: tuple[int, ...]
    claims: tuple[Claim, ...]

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        claims = [
            {
                "claim": claim.text,
                "showed": claim.verdict,
                "mean": claim.mean,
                "spread": claim.spread,
                "smallest": claim.smallest,
                "by_seed": dict(zip(map(str, self.seeds), claim.effects, strict=True)),
            }
            for claim in self.claims
        ]
        statement = FINDINGS[self.letter].statement
        return {"finding": self.letter, "statement": statement, "showed": self.showed, "claims": claims}


def lead(curves: Curves, arm: str, part: Callable[[Sequence[float]], float]) -> float:
    """How far an arm's reward, over a part of the steps, is above the best of the others'."""
    return part(curves[arm].reward) - max(part(curve.reward) for name, curve in curves.items() if name != arm)


def entropy_lost_before_others(curves: Curves, arm: str) -> float:
    """Nats by which an arm's entropy, mean over the run, is below the lowest of the others'; all start from one model."""
    others = [statistics.fmean(curve.entropy) for name, curve in curves.items() if name != arm]
    return min(others) - statistics.fmean(curves[arm].entropy)


def common_levels(curves: Curves) -> list[float]:
    """Rewards that all arms have reached, at shares of the rise that they have in common; empty where that is too small."""
    start = statistics.fmean(curve.reward[0] for curve in curves.values())
    rise = min(max(smoothed(curve.reward)) for curve in curves.values()) - start
    # A little less, so that rounding does not put the last level above what was reached.
    return [start + share * rise - 1e-9 for share in LEVELS] if rise >= MIN_RISE else []


def kl_saved(curves: Curves, arm: str, other: str) -> float:
    """1 - KL of an arm / KL of the other, means over the levels of reward that both reach, where they reach them."""
    levels = common_levels(curves)
    if not levels:
        return math.nan

    def spent(curve: Curve) -> float:
        reward, kl = smoothed(curve.reward), smoothed(curve.kl)
        return statistics.fmean(value_at(kl, first_reach(reward, level)) for level in levels)

    base = spent(curves[other])
    return 1 - spent(curves[arm]) / base if base > 0 else math.nan


def steps_saved(curves: Curves, arm: str, other: str) -> float:
    """1 - steps of an arm / steps of the other, sums over the levels of reward that all arms reach."""
    levels = common_levels(curves)
    if not levels:
        return math.nan
    needed = {name: sum(first_reach(smoothed(curves[name].reward), level) for level in levels) for name in (arm, other)}
    return 1 - needed[arm] / needed[other] if needed[other] > 0 else math.nan


def gain(curves: Curves, arm: str, base: str) -> float:
    """Reward of an arm above that of another, at the end."""
    return last_quarter(curves[arm].reward) - last_quarter(curves[base].reward)


def raised(curve: Curve, measure: Callable[[Any], float]) -> float:
    """How far training has raised a measure of the held-out answers."""
    return measure(curve.after) - measure(curve.before)


def at_k(counts: Any) -> float:
    return pass_at_k(counts, K)


FINDINGS: dict[str, Finding] = {
    "a": Finding(
        "RAFT++ rises fastest early and loses entropy fastest",
        "arXiv 2504.11343",
        ("raft_pp", "grpo", "reinforce"),
        (
            ("early reward above the next", REWARD, lambda c: lead(c, "raft_pp", first_third)),
            ("entropy below the next, nats", ENTROPY, lambda c: entropy_lost_before_others(c, "raft_pp")),
        ),
    ),
    "b": Finding(
        "Reinforce-Rej reaches GRPO's reward at less KL to the initial model",
        "arXiv 2504.11343",
        ("reinforce_rej", "grpo"),
        (
            (
                f"final reward above GRPO's less {REWARD}",
                0.0,
                lambda c: gain(c, "reinforce_rej", "grpo") + REWARD,
            ),
            ("share of GRPO's KL saved at equal reward", SHARE, lambda c: kl_saved(c, "reinforce_rej", "grpo")),
        ),
    ),
    "c": Finding(
        "removing all-wrong prompts explains most of GRPO's gain over Reinforce",
        "arXiv 2504.11343",
        ("grpo", "reinforce", "drop_all_wrong"),
        (
            ("GRPO's gain in reward", REWARD, lambda c: gain(c, "grpo", "reinforce")),
            (
                "gain by removal above half of GRPO's",
                0.0,
                lambda c: gain(c, "drop_all_wrong", "reinforce") - gain(c, "grpo", "reinforce") / 2,
            ),
        ),
    ),
    "d": Finding(
        "KDRL reaches a reward in fewer steps than GRPO and than KD alone",
        "arXiv 2506.02208",
        ("kdrl", "rlvr", "kd_rkl"),
        (
            ("share of GRPO's steps saved", SHARE, lambda c: steps_saved(c, "kdrl", "rlvr")),
            ("share of KD-RKL's steps saved", SHARE, lambda c: steps_saved(c, "kdrl", "kd_rkl")),
        ),
    ),
    "e": Finding(
        "RLVR raises accuracy more than pass@k",
        "arXiv 2505.14216",
        ("rlvr",),
        (
            ("held-out accuracy raised", ACCURACY, lambda c: raised(c["rlvr"], accuracy)),
            (
                f"that above what pass@{K} was raised",
                ACCURACY,
                lambda c: raised(c["rlvr"], accuracy) - raised(c["rlvr"], at_k),
            ),
        ),
    ),
}


def answer(letter: str, arms: Mapping[str, Mapping[int, Curve]]) -> Answer:
    """The answer to a finding from {arm: {seed: curve}}; seeds that lack one of its arms are left out."""
    finding = FINDINGS[letter]
    shared = set.intersection(*(set(arms.get(arm, {})) for arm in finding.arms))
    seeds = tuple(sorted(shared))
    by_seed = [{arm: arms[arm][seed] for arm in finding.arms} for seed in seeds]
    claims = tuple(
        Claim(text, tuple(effect(curves) for curves in by_seed), smallest) for text, smallest, effect in finding.claims
    )
    verdicts = {claim.verdict for claim in claims}
    showed: Verdict = "no" if "no" in verdicts else "yes" if verdicts == {"yes"} else "unclear"
    return Answer(letter, showed, seeds, claims)
