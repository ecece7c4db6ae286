"""The table of algorithms: a row is an advantage, a loss, an aggregation, what the ratio divides by, and what is left out.

The loop, the producer and the updater know no algorithm: they move batches. A new algorithm is a new row. What a config asks
for and could not have an effect is refused here.
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
Filter = Literal["none", "constant", "all_right", "all_wrong", "both"]
Filtered = Literal["zero", "remove", "refill"]
Truncated = Literal["keep", "mask", "penalise"]


@dataclass(frozen=True)
class Algorithm:
    """One row. `min_group` is the fewest samples per prompt with which its advantage means anything.

    `advantage_args` and `loss_args` are overrides of the advantage's arguments and of the loss's PolicyLossSpec (its
    importance weights too); `filter`, `filtered` and `truncated` are defaults of the config's keys of these names.
    """

    advantage: str
    loss: str
    paper: str
    aggregation: Aggregation = "token_mean"
    ratio_against: Literal["sampler", "trainer"] = "sampler"
    advantage_args: dict[str, Any] = field(default_factory=dict)
    loss_args: dict[str, Any] = field(default_factory=dict)
    filter: Filter = "none"
    filtered: Filtered = "zero"
    truncated: Truncated = "keep"
    min_group: int = 1


@dataclass(frozen=True)
class ResolvedAlgorithm:
    """A row with a config's overrides applied: what the loop runs."""

    advantage: AdvantageFunction
    spec: PolicyLossSpec
    aggregation: Aggregation
    ratio_against: Literal["sampler", "trainer"]
    filter: Filter = "none"
    filtered: Filtered = "zero"
    truncated: Truncated = "keep"
    truncation_penalty: float = 1.0
    truncation_buffer: int = 0

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
    algorithm = ResolvedAlgorithm(
        advantage=partial(ADVANTAGES[row.advantage], **{**row.advantage_args, **wanted.advantage}),
        spec=_override_spec(replace(LOSSES[row.loss], **row.loss_args), wanted),
        aggregation=wanted.aggregation or row.aggregation,
        ratio_against=wanted.ratio_against or row.ratio_against,
        filter=wanted.filter or row.filter,
        filtered=wanted.filtered or row.filtered,
        truncated=wanted.truncated or row.truncated,
        truncation_penalty=wanted.truncation_penalty,
        truncation_buffer=wanted.truncation_buffer,
    )
    check_importance(algorithm, wanted)
    check_left_out(algorithm, config)
    return algorithm


def check_importance(algorithm: ResolvedAlgorithm, wanted: AlgorithmConfig) -> None:
    """Raise ConfigError where importance weights, or their keys, could have no effect."""
    spec = algorithm.spec
    if spec.importance == "none":
        for key in ("importance_level", "importance_cap", "importance_floor"):
            _require_use(wanted, key, False, "algorithm.importance=truncate or mask")
    elif algorithm.ratio_against == "sampler":
        raise ConfigError(
            f"algorithm.importance={spec.importance} with algorithm.ratio_against=sampler: that ratio corrects for the "
            "sampler by itself, and a weight would do it twice. Use algorithm.ratio_against=trainer, or "
            "algorithm.importance=none."
        )


def check_left_out(algorithm: ResolvedAlgorithm, config: Config) -> None:
    """Raise ConfigError where a filter leaves nothing, or keys of filters and of truncation could have no effect."""
    wanted, rollout = config.algorithm, config.rollout
    penalises, refills = algorithm.truncated == "penalise", algorithm.filtered == "refill"
    _require_use(wanted, "filtered", algorithm.filter != "none", "algorithm.filter other than none")
    _require_use(wanted, "max_refills", algorithm.filter != "none" and refills, "algorithm.filtered=refill")
    for key in ("truncation_penalty", "truncation_buffer"):
        _require_use(wanted, key, penalises, "algorithm.truncated=penalise")
    if algorithm.filter in ("constant", "both") and rollout.samples_per_prompt == 1:
        raise ConfigError(
            f"algorithm.filter={algorithm.filter} with rollout.samples_per_prompt=1: every group of one response is left "
            "out. Raise rollout.samples_per_prompt, or use algorithm.filter=none."
        )
    if penalises and algorithm.truncation_buffer > rollout.max_new_tokens:
        raise ConfigError(
            f"algorithm.truncation_buffer={algorithm.truncation_buffer} is more than "
            f"rollout.max_new_tokens={rollout.max_new_tokens}: it counts the last tokens before that limit. Lower it."
        )


def _require_use(wanted: AlgorithmConfig, key: str, used: bool, needs: str) -> None:
    value = getattr(wanted, key)
    if not used and value != AlgorithmConfig.model_fields[key].default:
        raise ConfigError(
            f"algorithm.{key}={value}: has no effect without {needs}. Set that too, or leave the key out."
        )


def _override_spec(spec: PolicyLossSpec, wanted: AlgorithmConfig) -> PolicyLossSpec:
    names = {f.name for f in fields(PolicyLossSpec)}
    changes = {k: v for k, v in wanted.model_dump().items() if k in names and v is not None}
    try:
        return replace(spec, **changes)
    except ValueError as error:
        raise ConfigError(str(error).replace(f"{PolicyLossSpec.__name__}.", "algorithm.")) from error
