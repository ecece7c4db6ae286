"""The table of algorithms: a row is an advantage function, a loss spec, an aggregation, and what the ratio divides by.

The loop, the producer and the updater know no algorithm: they move batches. A new algorithm is a new row.
"""

import difflib
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

from fastreason_kernels import PolicyLossSpec

from fastreason.advantages import ADVANTAGES, AdvantageFunction, advantage_arguments
from fastreason.config import AlgorithmConfig, Config
from fastreason.errors import ConfigError
from fastreason.losses import LOSSES

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True)
class Algorithm:
    """One row. `min_group` is the fewest samples per prompt with which its advantage means anything."""

    advantage: str
    loss: str
    paper: str
    aggregation: Aggregation = "token_mean"
    ratio_against: Literal["sampler", "trainer"] = "sampler"
    advantage_args: dict[str, Any] = field(default_factory=dict)
    min_group: int = 1


@dataclass(frozen=True)
class ResolvedAlgorithm:
    """A row with a config's overrides applied: what the loop runs."""

    advantage: AdvantageFunction
    spec: PolicyLossSpec
    aggregation: Aggregation
    ratio_against: Literal["sampler", "trainer"]

    @property
    def zero_advantage_is_zero_gradient(self) -> bool:
        """Whether a token of advantage zero has no other term that would move the policy."""
        return not self.spec.entropy_coef and (self.spec.kl == "none" or not self.spec.kl_coef)


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(advantage="grpo", loss="clip", paper="arXiv 2402.03300", min_group=2),
    "reinforce": Algorithm(advantage="reinforce", loss="clip", paper="arXiv 2504.11343"),
}


def resolve_algorithm(config: Config) -> ResolvedAlgorithm:
    """The row that a config names, with its overrides; raises ConfigError naming key, value and what is allowed."""
    wanted = config.algorithm
    row = ALGORITHMS.get(wanted.name)
    if row is None:
        near = difflib.get_close_matches(wanted.name, ALGORITHMS, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"algorithm.name={wanted.name!r}: no such row. {guess}There are: {', '.join(ALGORITHMS)}.")
    allowed = advantage_arguments(row.advantage)
    for key in wanted.advantage:
        if key not in allowed:
            raise ConfigError(
                f"algorithm.advantage.{key}: {row.advantage!r} has no such argument; it takes: "
                f"{', '.join(allowed) or 'none'}."
            )
    if config.rollout.samples_per_prompt < row.min_group:
        raise ConfigError(
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} with algorithm.name={wanted.name}: it "
            f"compares the samples of a prompt and needs at least {row.min_group}. Raise it, or use "
            "algorithm.name=reinforce."
        )
    return ResolvedAlgorithm(
        advantage=partial(ADVANTAGES[row.advantage], **{**row.advantage_args, **wanted.advantage}),
        spec=_override_spec(LOSSES[row.loss], wanted),
        aggregation=wanted.aggregation or row.aggregation,
        ratio_against=wanted.ratio_against or row.ratio_against,
    )


def _override_spec(spec: PolicyLossSpec, wanted: AlgorithmConfig) -> PolicyLossSpec:
    names = {f.name for f in fields(PolicyLossSpec)}
    changes = {k: v for k, v in wanted.model_dump().items() if k in names and v is not None}
    try:
        return replace(spec, **changes)
    except ValueError as error:
        raise ConfigError(f"algorithm: {error}") from error
