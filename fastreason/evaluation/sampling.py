"""One model on one benchmark: what is asked, how, and everything that its responses depend on.

It owns the settings that name an evaluation's folder. Nothing is sampled here.
"""

import importlib.metadata
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fastreason import __version__
from fastreason.config import DataConfig
from fastreason.data import render_token_ids
from fastreason.evaluation.benchmarks import Benchmark, problems_checksum
from fastreason.evaluation.section import SAMPLING, EvaluationRun
from fastreason.evaluation.templates import ASKING, find_template
from fastreason.models import checksum
from fastreason.types import Prompt

GRADER_PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy", "reasoning-gym")
DEFAULT_TEMPLATE = "chat"


@dataclass(frozen=True)
class Loaded:
    """A benchmark with its problems, and how each is asked: section data and the beginning of the answer."""

    benchmark: Benchmark
    problems: list[Prompt]
    asking: DataConfig
    template: str
    opening: str

    @cached_property
    def checksum(self) -> str:
        return problems_checksum(self.problems)


@dataclass(frozen=True)
class Model:
    """A model as it was named, its folder, what it is called in tables, and its checksum."""

    name: str
    folder: Path
    label: str
    checksum: str


def with_template(benchmark: Benchmark, problems: list[Prompt], config: EvaluationRun) -> Loaded:
    """The benchmark asked as `eval.template` says; raises ConfigError for a template that is not in the table."""
    said = config.data.model_fields_set
    if benchmark.asked_as_in_run and config.eval.template is None:
        told = {key: getattr(config.data, key) for key in said & {*ASKING, "max_prompt_tokens"}}
        return Loaded(benchmark, problems, benchmark.data.model_copy(update=told), "run", "")
    name = config.eval.template or DEFAULT_TEMPLATE
    template = find_template(name)
    return Loaded(benchmark, problems, template.applied(benchmark.data, said), name, template.opening)


def renderer(loaded: Loaded, tokenizer: Any) -> "partial[list[int]]":
    return partial(render_token_ids, config=loaded.asking, tokenizer=tokenizer, opening=loaded.opening)


def make_settings(model: Model, loaded: Loaded, config: EvaluationRun, tokenizer: Any) -> dict[str, Any]:
    """All that the responses and their verdicts depend on, as plain data."""
    asking = loaded.asking
    chat = getattr(tokenizer, "chat_template", None) if asking.chat_template else None
    told = loaded.benchmark.describe()
    return {
        "model": {"path": str(model.folder), "checksum": model.checksum},
        "benchmark": {
            **told,
            "num_problems": len(loaded.problems),
            "checksum": loaded.checksum,
            "first": told["num_problems"],
        },
        "template": {
            "name": loaded.template,
            "system_prompt": asking.system_prompt,
            "user_template": asking.user_template,
            "chat_template": checksum([str(chat).encode()]) if chat else None,
            "opening": loaded.opening,
            "max_prompt_tokens": asking.max_prompt_tokens,
        },
        "sampling": {key: getattr(config.eval, key) for key in (*SAMPLING, "seed")},
        "engine": config.rollout.engine,
        "dtype": config.model.dtype,
        "grader": grader_settings(loaded.benchmark, config.reward.deadline_s),
    }


def grader_settings(benchmark: Benchmark, deadline_s: float) -> dict[str, Any]:
    """What verdicts depend on beside the responses."""
    versions = {"fastreason": __version__}
    for package in GRADER_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"functions": dict(benchmark.functions), "deadline_s": deadline_s, "versions": versions}
