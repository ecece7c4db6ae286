"""The table of reward functions, and the arithmetic that makes one reward of several. Pure: no process, no clock.

A reward function is `(text: str, prompt: Prompt) -> float`: the response's text, the prompt with its gold answer and
metadata, and a finite number back. `reward_model` is not in the table: it is a server, asked by
`fastreason.rollout.reward_model`, and its score joins a grade with `RewardSpec.with_part`.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastreason.config import RewardConfig
from fastreason.errors import ConfigError, RewardError
from fastreason.rewards.form import format_reward
from fastreason.rewards.procedural import reasoning_gym_reward
from fastreason.rewards.strict import strict_reward
from fastreason.rewards.verification import math_reward
from fastreason.types import Grade, Prompt

RewardFunction = Callable[[str, Prompt], float]

REWARDS: dict[str, RewardFunction] = {
    "math": math_reward,
    "reasoning_gym": reasoning_gym_reward,
    "format": format_reward,
    "strict": strict_reward,
}
REWARD_MODEL = "reward_model"


@dataclass(frozen=True)
class RewardSpec:
    """Which reward functions, with what weights: `reward = sum_i weight_i * part_i`.

    `range` = `plus_minus_one` replaces each verifiable part r (`math`, `strict`, `reasoning_gym`, `format` and user
    functions, not `reward_model`) by `2 r - 1` in that sum, so `{math: 1.0}` gives exactly {0, 1} or {-1, 1}. `Grade.parts`
    keeps the raw parts. The weights are not normalised.

    `Grade.correct` is: the first part, in the order of the config, that judges the answer (`math`, `reasoning_gym` or
    a user function) is at least 0.5. Without such a part nothing is ever correct.
    """

    weights: Mapping[str, float]
    range: Literal["zero_one", "plus_minus_one"] = "zero_one"
    functions: Mapping[str, RewardFunction] = field(default_factory=dict)

    @property
    def needs_reward_model(self) -> bool:
        return REWARD_MODEL in self.weights

    def parts(self, text: str, prompt: Prompt, truncated: bool = False) -> dict[str, float]:
        """Every part but `reward_model`; `format` is 0 where the response was cut off at the token limit.

        Raises `RewardError` that names the function where a user function raises, or returns something that is not a
        finite number, or (with `plus_minus_one`) a number outside [0, 1].
        """
        parts = {name: self._part(name, text, prompt) for name in self.functions}
        if truncated and "format" in parts:
            parts["format"] = 0.0
        return parts

    def combine(self, parts: Mapping[str, float], timed_out: bool = False) -> Grade:
        """The grade that the parts make; a part that is absent (a reward model not asked yet) adds nothing."""
        reward = sum(
            weight * self._in_range(name, parts[name]) for name, weight in self.weights.items() if name in parts
        )
        judge = next((name for name in self.weights if name not in ("format", REWARD_MODEL)), None)
        correct = judge is not None and parts.get(judge, 0.0) >= 0.5
        return Grade(reward=float(reward), correct=correct, parts=dict(parts), timed_out=timed_out)

    def grade(self, text: str, prompt: Prompt, truncated: bool = False) -> Grade:
        """Grade one response in this process: no deadline (`GraderPool` has one)."""
        return self.combine(self.parts(text, prompt, truncated))

    def wrong(self, timed_out: bool = False) -> Grade:
        """The grade of a response that could not be graded: every part 0."""
        return self.combine(dict.fromkeys(self.functions, 0.0), timed_out)

    def with_part(self, grade: Grade, name: str, value: float) -> Grade:
        """The grade with one more part, combined anew: how a reward model's score joins."""
        return self.combine({**grade.parts, name: value}, grade.timed_out)

    def _in_range(self, name: str, part: float) -> float:
        return 2.0 * part - 1.0 if self.range == "plus_minus_one" and name != REWARD_MODEL else part

    def _part(self, name: str, text: str, prompt: Prompt) -> float:
        if name in REWARDS:
            return self.functions[name](text, prompt)
        try:
            value = self.functions[name](text, prompt)
        except Exception as error:
            raise RewardError(
                f"reward function {name!r} raised {type(error).__name__}: {str(error)[:500]} on prompt {prompt.id!r}. "
                "A reward function returns a number for every text: catch it there and return 0."
            ) from error
        try:
            part = float(value)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward function {name!r} returned {value!r:.200} ({type(value).__name__}) on prompt {prompt.id!r}; "
                "it must return one finite number."
            ) from error
        if not math.isfinite(part):
            raise RewardError(f"reward function {name!r} returned {part} on prompt {prompt.id!r}; it must be finite.")
        if self.range == "plus_minus_one" and not 0.0 <= part <= 1.0:
            raise RewardError(
                f"reward function {name!r} returned {part} on prompt {prompt.id!r}; reward.range=plus_minus_one maps "
                "[0, 1] to [-1, 1], so return a number in [0, 1], or use reward.range=zero_one, which takes any."
            )
        return part


def resolve_rewards(config: RewardConfig) -> RewardSpec:
    """Look up every name of `reward.functions`, importing user functions.

    Raises `ConfigError` for an unknown name (with near matches), a weight that is not finite, a user function that
    cannot be imported (saying why) or cannot be called with two arguments.
    """
    for name, weight in config.functions.items():
        if not math.isfinite(weight):
            raise ConfigError(f"reward.functions.{name}={weight}: the weight must be a finite number.")
    functions = {name: _resolve(name) for name in config.functions if name != REWARD_MODEL}
    return RewardSpec(weights=dict(config.functions), range=config.range, functions=functions)


def check_prompts(spec: RewardSpec, prompts: Sequence[Prompt]) -> None:
    """Raise `ConfigError` where a reward cannot judge these: `math` needs answers, `reasoning_gym` its own problems."""
    if {"math", "strict"} & set(spec.functions):
        lacking = [prompt for prompt in prompts if prompt.answer is None or not prompt.answer.strip()]
        if lacking:
            raise ConfigError(
                f"reward.functions names math, but {len(lacking)} of {len(prompts)} problems have no gold answer (the "
                f"first is {lacking[0].id!r}). Set data.answer_column, or use a reward that needs none"
                + (": this task has its own scorer, reasoning_gym." if "task" in lacking[0].metadata else ".")
            )
    if "reasoning_gym" in spec.functions:
        foreign = next((prompt for prompt in prompts if "entry" not in prompt.metadata), None)
        if foreign is not None:
            raise ConfigError(
                f"reward.functions names reasoning_gym, but problem {foreign.id!r} was not generated by one of its "
                "tasks. Use data.source=reasoning_gym, or the reward math."
            )


def _resolve(name: str) -> RewardFunction:
    if name in REWARDS:
        return REWARDS[name]
    if ":" in name:
        return _import(name)
    allowed = [*REWARDS, REWARD_MODEL]
    near = difflib.get_close_matches(name, allowed, n=1)
    raise ConfigError(
        f"reward.functions names {name!r}, which is not a reward"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" There are: {', '.join(allowed)}, and functions of your own as package.module:function."
    )


def _import(name: str) -> RewardFunction:
    module_name, _, attribute = name.partition(":")
    key = f"reward.functions names {name!r}"
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key}, but importing {module_name!r} failed: {type(error).__name__}: {error}. "
            "Put its folder on PYTHONPATH or install its package."
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        names = [item for item in vars(module) if callable(getattr(module, item)) and not item.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1)
        raise ConfigError(
            f"{key}, but {module_name!r} has no {attribute!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; it has: {', '.join(sorted(names)[:10]) or 'nothing'}.")
        )
    if not callable(function):
        raise ConfigError(f"{key}, which is a {type(function).__name__}, not a function (text, prompt) -> float.")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{key}, which is async; a reward function is a plain function (text, prompt) -> float.")
    try:
        inspect.signature(function).bind("text", Prompt(id="0", text=""))
    except TypeError as error:
        raise ConfigError(f"{key}, which cannot be called as (text, prompt): {error}.") from error
    except ValueError:
        pass
    return function
