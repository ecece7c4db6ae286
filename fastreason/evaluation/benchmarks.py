"""The benchmarks: a table of known ones, and how a name, a file, a hub data set, a task or a run becomes problems.

It owns where problems come from, and what judges the answers to them. A known benchmark is read from the folder that the
environment variable FASTREASON_DATA names, else from the hub, which is asked only where downloads are allowed.
"""

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fastreason.config import DataConfig, load_config
from fastreason.data import load_problems, split_held_out
from fastreason.errors import ConfigError, DataError
from fastreason.evaluation.section import EvaluationRun
from fastreason.models import checksum
from fastreason.rewards import check_prompts, resolve_rewards
from fastreason.sections import RewardConfig
from fastreason.types import Prompt

FOLDER_VARIABLE = "FASTREASON_DATA"
ENDINGS = (".jsonl", ".json", ".parquet")
TASK_PROBLEMS = 100
MATH = {"math": 1.0, "format": 0.0, "strict": 0.0}
TASK = {"reasoning_gym": 1.0, "format": 0.0}


@dataclass(frozen=True)
class Known:
    """A benchmark of the table: its file, how many problems it has, and where the hub has it."""

    title: str
    file: str
    num_problems: tuple[int, ...]
    hub: str
    split: str = "test"
    hub_config: str | None = None
    problem_column: str = "problem"
    answer_column: str = "answer"
    answer_mark: str | None = None  # the answer is what follows it


KNOWN: dict[str, Known] = {
    "math500": Known("MATH-500", "math500.jsonl", (500,), "HuggingFaceH4/MATH-500"),
    "aime24": Known("AIME 2024", "aime24.jsonl", (30,), "HuggingFaceH4/aime_2024", split="train"),
    "aime25": Known("AIME 2025", "aime25.jsonl", (30,), "math-ai/aime25"),
    "amc23": Known("AMC 2023", "amc23.jsonl", (40,), "math-ai/amc23", problem_column="question"),
    # REDI's AMC: those of 2022 and 2023.
    "amc": Known("AMC", "amc_83.jsonl", (83,), "AI-MO/aimo-validation-amc", split="train"),
    "minerva": Known("Minerva", "minerva_math.jsonl", (272,), "math-ai/minervamath", problem_column="question"),
    "olympiadbench": Known(
        "OlympiadBench",
        "olympiadbench.jsonl",
        (675, 674),
        "math-ai/olympiadbench",
        problem_column="question",
        answer_column="final_answer",
    ),
    "gsm8k": Known(
        "GSM8K",
        "gsm8k_test.jsonl",
        (1319,),
        "openai/gsm8k",
        hub_config="main",
        problem_column="question",
        answer_mark="####",
    ),
    # Not a test set: for small models, and for what a model has learnt of its training problems.
    "gsm8k_train": Known(
        "GSM8K (train)",
        "gsm8k_train.jsonl",
        (7473,),
        "openai/gsm8k",
        split="train",
        hub_config="main",
        problem_column="question",
        answer_mark="####",
    ),
}


@dataclass(frozen=True)
class Benchmark:
    """Where problems come from (section data's keys), what judges them, and how many of a run's are held out.

    `asked_as_in_run`: `data` says how a model is asked too, unless a template does.
    """

    name: str
    data: DataConfig
    functions: dict[str, float] = field(default_factory=lambda: dict(MATH))
    known: Known | None = None
    answer_mark: str | None = None
    held_out: int = 0
    num_problems: int | None = None
    asked_as_in_run: bool = False

    @property
    def title(self) -> str:
        return self.known.title if self.known is not None else self.name

    @property
    def reward(self) -> RewardConfig:
        return RewardConfig(functions=self.functions)

    def describe(self) -> dict[str, Any]:
        """Plain data from which `described` makes the same benchmark."""
        return {
            "name": self.name,
            "data": self.data.model_dump(mode="json"),
            "functions": dict(self.functions),
            "answer_mark": self.answer_mark,
            "held_out": self.held_out,
            "num_problems": self.num_problems,
        }


def described(told: dict[str, Any]) -> Benchmark:
    """The benchmark of `Benchmark.describe`."""
    keys = ("name", "functions", "answer_mark", "held_out", "num_problems")
    return Benchmark(data=DataConfig.model_validate(told["data"]), **{key: told[key] for key in keys})


def find_benchmarks(names: Sequence[str], config: EvaluationRun) -> list[Benchmark]:
    """A benchmark for each name; raises ConfigError for one that nobody knows, and for one named twice."""
    found = [find_benchmark(name, config) for name in names]
    if not found:
        raise ConfigError(f"--benchmarks: name at least one of {', '.join(KNOWN)}, {_OTHERS}.")
    twice = next((each.name for index, each in enumerate(found) if each.name in [b.name for b in found[:index]]), None)
    if twice is not None:
        raise ConfigError(f"--benchmarks: {twice!r} is named twice. Leave one out, or rename the file.")
    return found


_OTHERS = "a .jsonl, .json or .parquet file, hub:OWNER/NAME, task:NAME (of reasoning-gym), held_out:RUN"


def find_benchmark(name: str, config: EvaluationRun) -> Benchmark:
    """What `name` means: a row of KNOWN, a file, hub:OWNER/NAME, task:NAME or held_out:RUN. Reads no problem."""
    num = config.eval.num_problems
    kind, _, rest = name.partition(":")
    if name in KNOWN:
        return _known(name, config)
    if kind == "task" and rest:
        data = _data(config, source="reasoning_gym", task=rest, num_prompts=num or TASK_PROBLEMS)
        return Benchmark(rest, data, _judges(config, TASK))
    if kind == "hub" and rest:
        data = _data(config, source="hub", path=rest)
        return Benchmark(rest.replace("/", "--"), data, _judges(config, MATH), num_problems=num)
    if kind == "held_out" and rest:
        return _held_out(Path(rest), config)
    if Path(name).suffix in ENDINGS:
        path = Path(name)
        if not path.is_file():
            raise DataError(
                f"--benchmarks {name}: there is no such file. Give the path of a {', '.join(ENDINGS)} file."
            )
        data = _data(config, source="file", path=str(path.resolve()))
        return Benchmark(path.stem, data, _judges(config, MATH), num_problems=num)
    near = difflib.get_close_matches(name.lower(), KNOWN, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"--benchmarks {name}: there is no such benchmark.{guess} There are: {', '.join(KNOWN)}; also {_OTHERS}."
    )


def load_benchmark(benchmark: Benchmark) -> list[Prompt]:
    """Its problems, in order, with answers; raises DataError that says how to get what is not there."""
    known = benchmark.known
    try:
        problems = load_problems(benchmark.data)
    except DataError as error:
        if known is None:
            raise
        raise DataError(_how_to_get(benchmark.name, known, error)) from error
    if benchmark.held_out:
        _, problems = split_held_out(problems, benchmark.held_out, benchmark.data.seed)
    if known is not None and len(problems) not in known.num_problems:
        allowed = " or ".join(map(str, known.num_problems))
        print(
            f"warning: {benchmark.name}: {len(problems)} problems in {benchmark.data.path}, where {allowed} are known",
            file=sys.stderr,
        )
    problems = problems[: benchmark.num_problems]
    if benchmark.answer_mark is not None:
        problems = [_marked(problem, benchmark.answer_mark) for problem in problems]
    check_prompts(resolve_rewards(benchmark.reward), problems)
    return problems


def problems_checksum(problems: Sequence[Prompt]) -> str:
    """xxh3-128 over ids, texts and answers, in order."""
    return checksum(msgspec.json.encode([problem.id, problem.text, problem.answer]) for problem in problems)


def _known(name: str, config: EvaluationRun) -> Benchmark:
    known, num = KNOWN[name], config.eval.num_problems
    folder = data_folder()
    if folder is not None and (file := folder / known.file).is_file():
        columns = {"problem_column": "problem", "answer_column": "answer", "id_column": "id"}
        data = _data(config, source="file", path=str(file), **columns)
        return Benchmark(name, data, known=known, num_problems=num)
    data = _data(
        config,
        source="hub",
        path=known.hub,
        hub_config=known.hub_config,
        split=known.split,
        problem_column=known.problem_column,
        answer_column=known.answer_column,
        id_column=None,
    )
    return Benchmark(name, data, known=known, answer_mark=known.answer_mark, num_problems=num)


def data_folder() -> "Path | None":
    """The folder that FASTREASON_DATA names, or None."""
    told = os.environ.get(FOLDER_VARIABLE)
    return Path(told) if told else None


def _held_out(run: Path, config: EvaluationRun) -> Benchmark:
    """The problems that a training run held out, judged as it judges and, unless a template is named, asked as it asks."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--benchmarks held_out:{run}: no run there (no {file}). Give the folder of a run.")
    told = load_config(file)
    if not told.eval.num_prompts:
        raise ConfigError(
            f"--benchmarks held_out:{run}: it held no problems out (eval.num_prompts=0). Name another benchmark."
        )
    functions = _with_opinions(told.reward.functions)
    if functions is None:
        raise ConfigError(
            f"--benchmarks held_out:{run}: none of its rewards says what is right. Name another benchmark."
        )
    data = told.data.model_copy(update={"allow_download": config.data.allow_download})
    name = f"held_out-{told.run.name}"
    num = config.eval.num_problems
    return Benchmark(name, data, functions, held_out=told.eval.num_prompts, num_problems=num, asked_as_in_run=True)


def _judges(config: EvaluationRun, usual: dict[str, float]) -> dict[str, float]:
    """The rewards that judge problems of the user's own: reward.functions where it is given."""
    if "functions" not in config.reward.model_fields_set:
        return dict(usual)
    functions = _with_opinions(config.reward.functions)
    if functions is None:
        raise ConfigError(
            f"reward.functions={config.reward.functions}: none of them says what is right. Add math, or another reward that "
            "judges the answer."
        )
    return functions


def _with_opinions(functions: Mapping[str, float]) -> dict[str, float] | None:
    """Rewards with `format`, and with `strict` beside `math`; without a reward model. None where nothing judges the answer."""
    kept = {name: weight for name, weight in functions.items() if name != "reward_model"}
    for name in ("format", *(["strict"] if "math" in kept else [])):
        kept.setdefault(name, 0.0)
    return None if set(kept) == {"format"} else kept


def _data(config: EvaluationRun, **keys: Any) -> DataConfig:
    """Section data as the user gave it, with the keys of a benchmark; what is set stays known as set."""
    given = config.data.model_dump(include=config.data.model_fields_set)
    return DataConfig.model_validate({**given, **keys})


def _marked(problem: Prompt, mark: str) -> Prompt:
    _, found, answer = (problem.answer or "").rpartition(mark)
    if not found:
        raise DataError(f"problem {problem.id!r}: its answer has no {mark!r}: {(problem.answer or '')[-80:]!r}.")
    return msgspec.structs.replace(problem, answer=answer.strip().replace(",", ""))


def _how_to_get(name: str, known: Known, error: DataError) -> str:
    folder = data_folder()
    where = f"{folder} has no {known.file}" if folder is not None else f"{FOLDER_VARIABLE} is not set"
    rows = " or ".join(map(str, known.num_problems))
    return (
        f"--benchmarks {name}: {known.title} is not here: {where}, and the hub's {known.hub} could not be loaded. Let it be "
        f"fetched with data.allow_download=true, or put it as {known.file} ({rows} rows, JSON Lines with id, problem and "
        f"answer) into a folder that {FOLDER_VARIABLE} names. ({error})"
    )
