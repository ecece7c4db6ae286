"""The arms of the miniatures: what each changes of job.yaml, and the order in which runs are made.

It owns the table of arms and the arithmetic of what a run is expected to take. It refuses to start anything, and to judge.

Every Minimal-RL arm logs entropy and KL to the initial model over all of its responses. With a coefficient of exactly 0 the
trainer would leave out whatever has no gradient, and the figures of RAFT++ would be those of its right answers alone: so
the coefficient is 1e-12, which no weight can feel, and filtered groups stay in the batch at advantage zero, as in the
published code. KDRL's KL term is the teacher's, so its arms log no KL to the initial model.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LOGGED_KL = ("algorithm.kl=k3", "algorithm.kl_coef=1e-12")
FOUR_UPDATES = ("train.prompts_per_update=8", "train.lr=2e-4", "algorithm.ratio_against=trainer", *LOGGED_KL)
# Held-out problems cost 1,600 responses twice: only where a finding is about them, or where arms must have the same prompts.
HELD_OUT = ("eval.num_prompts=100", "eval.samples_per_prompt=16")
ONE_UPDATE = ("train.lr=4e-4", "algorithm.ratio_against=trainer", *HELD_OUT)
DUAL_CLIP = ("algorithm.dual_clip=3.0",)
TAUGHT = ("algorithm.kl=k2", "algorithm.kl_target=teacher")

TEACHER = "teacher"
TEACHER_SEED = 1000  # no student has its samples


@dataclass(frozen=True)
class Arm:
    """label: in figures. overrides: of job.yaml. taught: needs the teacher. guess_s: seconds on one core, until measured."""

    label: str
    overrides: tuple[str, ...]
    taught: bool = False
    guess_s: float = 120.0


ARMS: dict[str, Arm] = {
    "grpo": Arm("GRPO", ("algorithm.name=grpo", *FOUR_UPDATES, *DUAL_CLIP)),
    "reinforce": Arm("Reinforce", ("algorithm.name=reinforce", *FOUR_UPDATES, *DUAL_CLIP)),
    "raft_pp": Arm("RAFT++", ("algorithm.name=raft_pp", *FOUR_UPDATES)),
    "reinforce_rej": Arm(
        "Reinforce-Rej", ("algorithm.name=reinforce_rej", "algorithm.filtered=zero", *FOUR_UPDATES, *DUAL_CLIP)
    ),
    "drop_all_wrong": Arm(
        "Reinforce, no all-wrong",
        (
            "algorithm.name=reinforce",
            "algorithm.filter=all_wrong",
            "algorithm.filtered=zero",
            *FOUR_UPDATES,
            *DUAL_CLIP,
        ),
    ),
    "rlvr": Arm("GRPO, one update", ("algorithm.name=grpo", *ONE_UPDATE, *LOGGED_KL)),
    # 0.1 is ours: of a reward's size here, where the paper's 0.002 is beside responses of thousands of tokens.
    "kdrl": Arm("KDRL", ("algorithm.name=kdrl", "algorithm.kl_coef=0.1", *TAUGHT, *ONE_UPDATE), taught=True),
    "kd_rkl": Arm("KD-RKL", ("algorithm.name=kd_rkl", "algorithm.kl_coef=1.0", *TAUGHT, *ONE_UPDATE), taught=True),
    TEACHER: Arm(
        "teacher",
        (
            "algorithm.name=grpo",
            "train.steps=80",
            "train.lr=4e-4",
            "train.lr_schedule=linear",
            *HELD_OUT,
            "rollout.samples_per_prompt=16",
            "checkpoint.save_model=true",
        ),
        guess_s=240.0,
    ),
}


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


TEACHER_RUN = Run(TEACHER, TEACHER_SEED)


def runs_wanted(arms: Iterable[str], seeds: Sequence[int]) -> list[Run]:
    """The runs in order: the teacher where an arm needs it, then every arm with the first seed, with the second, ...

    So that whatever a budget allows is complete for the seeds that it reached.
    """
    arms = list(dict.fromkeys(arms))
    first = [TEACHER_RUN] if any(ARMS[arm].taught for arm in arms) else []
    return first + [Run(arm, seed) for seed in seeds for arm in arms if arm != TEACHER]


def arm_overrides(arm: str, given: Sequence[str]) -> list[str]:
    """An arm's overrides and those of the command line, `key=value` for all but the teacher, `arm:key=value` for one."""
    mine = []
    for item in given:
        name, colon, rest = item.partition(":")
        if colon and name in ARMS:
            mine += [rest] * (name == arm)
        elif arm != TEACHER:
            mine.append(item)
    return [*ARMS[arm].overrides, *mine]


def expected_s(arm: str, seconds: Mapping[str, Sequence[float]]) -> tuple[float, bool]:
    """(seconds that a run of this arm is expected to take, whether that arm was measured).

    seconds: {arm: those of its finished runs, start to end}. Measured: the longest of them. Else the table's guess, times
    the median factor by which the guesses for other arms were wrong.
    """
    if seconds.get(arm):
        return max(seconds[arm]), True
    factors = [max(values) / ARMS[name].guess_s for name, values in seconds.items() if values]
    return ARMS[arm].guess_s * (statistics.median(factors) if factors else 1.0), False
