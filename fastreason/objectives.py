"""The table of offline objectives: what an update on written responses minimises. A new objective is a new row.

A row is either a weight for each response, and then a policy loss without a ratio, or a loss of pairs. What a config asks for
and could not have an effect is refused here too. Data, order and updates are `offline.py`'s.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fastreason.config import Config
from fastreason.errors import ConfigError
from fastreason.losses import LOSSES
from fastreason.losses.preference import PairSpec
from fastreason.policy import LossSpec
from fastreason.sections import Section

# Sections and keys that say something about prompts that are asked and graded: nothing of it happens offline.
ONLINE_SECTIONS = ("rollout", "reward", "algorithm", "teacher", "critic", "eval")
ONLINE_KEYS = {
    "run": ("max_restarts",),
    "data": (
        *("source", "task", "task_args", "path", "hub_config", "split", "answer_column", "id_column", "num_prompts"),
        *("seed", "allow_download"),
    ),
    "train": ("prompts_per_update", "skip_zero_advantage"),
    "log": ("samples_per_step", "entropy_floor"),
    "checkpoint": ("keep_best",),
}
# Columns and overrides that only some objectives read.
SINGLE_KEYS = ("response_column", "messages_column")
PAIR_KEYS = ("chosen_column", "rejected_column")


@dataclass(frozen=True)
class Objective:
    """One row: numbers are defaults of the config's keys of the same names, None those that it does not have.

    pairs: an example is a chosen and a rejected response, else one response. c, alpha: weights of the log-probability of the
    chosen (or only) response and of minus that of the rejected one. margin: a loss of pairs instead, see `PairSpec`.
    """

    paper: str
    pairs: bool = True
    aggregation: Literal["token_mean", "sequence_mean"] | None = None
    c: float | None = None
    alpha: float | None = None
    margin: Literal["reference", "mean"] | None = None
    beta: float | None = None
    gamma: float | None = None

    @property
    def needs_reference(self) -> bool:
        return self.margin == "reference"

    @property
    def coupled(self) -> bool:
        """Whether both responses of a pair must be in one micro-batch."""
        return self.margin is not None

    @property
    def spec(self) -> LossSpec:
        if self.margin is None:
            return LOSSES["log_prob"]
        return PairSpec(self.margin, self.beta or 0.0, self.gamma or 0.0)

    def advantage(self, place: int) -> float:
        """A of the loss -A log pi: of the chosen or only response at place 0, of the rejected one at 1."""
        if self.margin is not None:
            return 0.0
        return 1.0 if self.c is None and not place else -(self.alpha or 0.0) if place else float(self.c or 0.0)

    def token_weight(self, num_trained: int, weight: float) -> float:
        """What each trained token of a response counts: all but token means are means over a response's tokens."""
        return weight if self.aggregation == "token_mean" or self.margin is not None else weight / num_trained

    def denominator(self, num_examples: int, num_trained: Sequence[int]) -> float:
        """What the summed loss of an update is divided by: its rows or pairs, or the trained tokens."""
        return float(max(1, sum(num_trained) if self.aggregation == "token_mean" else num_examples))

    def margin_of(self, chosen: float, rejected: float, lengths: tuple[int, int], reference: float = 0.0) -> float:
        """A pair's margin in nats: beta * h of a pair loss, else the difference of the mean log-probabilities of tokens."""
        beta = 1.0 if self.beta is None else self.beta
        if self.needs_reference:
            return beta * (chosen - rejected - reference)
        return beta * (chosen / lengths[0] - rejected / lengths[1])


OBJECTIVES: dict[str, Objective] = {
    # -log pi(y | x), the mean over tokens; aggregation=sequence_mean is the paper's l(y) = log pi / |y|.
    "sft": Objective(paper="arXiv 2505.14216", pairs=False, aggregation="token_mean"),
    # -c l(y_w) + alpha l(y_l), mean over pairs.
    "redi": Objective(paper="arXiv 2505.24850", c=1.0, alpha=0.8),
    "symmetric": Objective(paper="arXiv 2505.24850", c=1.0, alpha=1.0),
    "dpo": Objective(paper="arXiv 2305.18290", margin="reference", beta=0.1),
    "simpo": Objective(paper="arXiv 2405.14734", margin="mean", beta=2.0, gamma=1.0),
}
# What makes a row that row: another value would be another row.
FIXED = {"symmetric": ("alpha", "c")}


def resolve_objective(config: Config) -> Objective:
    """The row that a config names, with its overrides; raises ConfigError naming key, value and what is allowed."""
    wanted = config.offline
    row = OBJECTIVES.get(str(wanted.objective))
    if row is None:
        near = difflib.get_close_matches(str(wanted.objective), OBJECTIVES, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"offline.objective={wanted.objective!r}: no such row. {guess}There are: {', '.join(OBJECTIVES)}."
        )
    if wanted.path is None:
        kind = "pairs (chosen and rejected)" if row.pairs else "responses"
        raise ConfigError(f"offline.path: missing; offline.objective={wanted.objective} needs a file of {kind}.")
    changes: dict[str, Any] = {}
    for key in sorted({f.name for f in fields(Objective)} & set(type(wanted).model_fields)):
        value = getattr(wanted, key)
        if value is None:
            continue
        if getattr(row, key) is None or key in FIXED.get(str(wanted.objective), ()):
            raise ConfigError(
                f"offline.{key}={value}: has no effect with offline.objective={wanted.objective}. It belongs to: "
                f"{', '.join(name for name, r in OBJECTIVES.items() if _takes(name, r, key))}. Leave it out."
            )
        changes[key] = value
    for key in SINGLE_KEYS if row.pairs else PAIR_KEYS:
        _require_default(wanted, "offline", key, f"offline.objective={wanted.objective}")
    check_offline(config)
    return replace(row, **changes)


def _takes(name: str, row: Objective, key: str) -> bool:
    return getattr(row, key) is not None and key not in FIXED.get(name, ())


def check_offline(config: Config) -> None:
    """Raise ConfigError where a key could have no effect in a run on written responses, or keys contradict each other."""
    where = f"an offline run (offline.objective={config.offline.objective})"
    for name in ONLINE_SECTIONS:
        section = getattr(config, name)
        for key in type(section).model_fields:
            _require_default(section, name, key, where)
    for name, keys in ONLINE_KEYS.items():
        for key in keys:
            _require_default(getattr(config, name), name, key, where)
    if config.offline.messages_column is not None:
        _require_default(config.offline, "offline", "response_column", "offline.messages_column")
        if config.data.system_prompt is not None or config.data.user_template != "{problem}":
            raise ConfigError(
                "offline.messages_column with data.system_prompt or data.user_template: a conversation has its own messages. "
                "Leave both keys out."
            )
        if not config.data.chat_template:
            raise ConfigError(
                "offline.messages_column with data.chat_template=false: conversations are rendered by the chat template. "
                "Leave data.chat_template out, or train on single responses."
            )
    if not 0 < config.train.ranks <= config.train.prompts_per_step:
        raise ConfigError(
            f"train.ranks={config.train.ranks}: one update has only train.prompts_per_step="
            f"{config.train.prompts_per_step} rows or pairs, fewer than the ranks. Use fewer ranks or larger batches."
        )


def _require_default(section: Section, name: str, key: str, where: str) -> None:
    value = getattr(section, key)
    if value != type(section).model_fields[key].get_default(call_default_factory=True):
        raise ConfigError(f"{name}.{key}={value}: has no effect in {where}. Leave it out.")
