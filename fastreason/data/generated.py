"""Problems that reasoning-gym generates: one task, its arguments and a seed give the same problems everywhere."""

import dataclasses
import difflib
import json
import logging
from typing import Any

from fastreason.config import DataConfig
from fastreason.errors import ConfigError, DataError
from fastreason.rewards.procedural import pack
from fastreason.types import Prompt

log = logging.getLogger(__name__)

DEFAULT_NUM_PROMPTS = 2000
# One-digit sums of two terms have 200 texts: a task is taken for exhausted after so many repeats in a row.
MAX_REPEATS = 1000


def generate_problems(config: DataConfig) -> list[Prompt]:
    """`data.num_prompts` problems of different text, fewer (with a warning) where the task repeats itself.

    `Prompt.metadata` has `task`, `task_args` and the generated `entry` (packed by `fastreason.rewards.procedural`),
    from which the reward `reasoning_gym` scores. Raises `ConfigError` for an unknown task or bad arguments.
    """
    wanted = config.num_prompts or DEFAULT_NUM_PROMPTS
    most = 20 * wanted + MAX_REPEATS
    task_args = _checked_args(config)
    dataset = _create(str(config.task), {**task_args, "seed": config.seed, "size": most}, config)
    problems: list[Prompt] = []
    texts: set[str] = set()
    repeats = 0
    for index in range(most):
        if len(problems) == wanted or repeats >= MAX_REPEATS:
            break
        problem = _problem(dataset, index, config, task_args)
        if problem.text in texts:
            repeats += 1
            continue
        repeats = 0
        texts.add(problem.text)
        problems.append(problem)
    if len(problems) < wanted:
        log.warning(
            "data.task=%s gave %d different problems of the %d that data.num_prompts asks for, then only repeats",
            *(config.task, len(problems), wanted),
        )
    return problems


def _checked_args(config: DataConfig) -> dict[str, Any]:
    for name, key in (("seed", "data.seed"), ("size", "data.num_prompts")):
        if name in config.task_args:
            raise ConfigError(f"data.task_args.{name}={config.task_args[name]!r}: set {key} instead.")
    try:
        # What the scorer gets later, from the prompt's metadata, must be what the generator gets now.
        return json.loads(json.dumps(config.task_args))
    except TypeError as error:
        raise ConfigError(
            f"data.task_args={config.task_args!r}: only text, numbers, lists and mappings ({error})."
        ) from error


def _create(task: str, arguments: dict[str, Any], config: DataConfig) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {len(DATASETS)}, e.g. 'chain_sum'."
        raise ConfigError(f"data.task={task!r}: reasoning-gym has no such task; {hint}")
    _, config_class = DATASETS[task]
    allowed = [item.name for item in dataclasses.fields(config_class) if item.name not in ("seed", "size")]
    unknown = next((name for name in config.task_args if name not in allowed), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, allowed, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"data.task_args.{unknown}: the task {task!r} has no such argument; {guess}It has: {', '.join(allowed)}."
        )
    try:
        return reasoning_gym.create_dataset(task, **arguments)
    except Exception as error:
        raise ConfigError(
            f"data.task_args={config.task_args!r}: the task {task!r} refuses them: "
            f"{str(error) or type(error).__name__}. Its arguments: {', '.join(allowed)}."
        ) from error


def _problem(dataset: Any, index: int, config: DataConfig, task_args: dict[str, Any]) -> Prompt:
    try:
        entry = dataset[index]
        text, answer = str(entry["question"]), entry["answer"]
        metadata = {"task": config.task, "task_args": task_args, "entry": pack(dict(entry))}
    except Exception as error:
        raise DataError(
            f"data.task={config.task!r} failed to generate problem {index} with data.task_args={config.task_args!r}: "
            f"{type(error).__name__}: {error}. Change the arguments or the seed."
        ) from error
    return Prompt(
        id=f"{config.task}-{config.seed}-{index}",
        text=text,
        answer=None if answer is None else str(answer),
        metadata=metadata,
    )
