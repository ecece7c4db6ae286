"""`fastreason eval`: checks, samples what is missing, scores, compares; and how it ends when it is told to.

A part of the composition root: it chooses engine and graders. It owns the order of the steps. Every model is sampled on all
benchmarks with one start of its engine, and not at all where all responses are there.
"""

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastreason.errors import ConfigError, FastreasonError, ModelError
from fastreason.evaluation.benchmarks import find_benchmarks, load_benchmark
from fastreason.evaluation.regrading import regrade_folder
from fastreason.evaluation.rows import EvalSample
from fastreason.evaluation.sampling import Loaded, Model, make_settings, renderer, with_template
from fastreason.evaluation.scores import Scores
from fastreason.evaluation.scoring import score_folder
from fastreason.evaluation.section import SAMPLING, EvaluationRun, engine_config
from fastreason.evaluation.store import EvalStore, evaluation_folder, held_settings, unasked_row, write_settings
from fastreason.rollout.sampling_job import Ask, EngineSampler, Tally, cancel_on_signals, missing_asks, run_job
from fastreason.types import Prompt, SamplingParams


@dataclass(frozen=True)
class Part:
    """One model on one benchmark: its folder, and what of it is still to be asked."""

    model: Model
    loaded: Loaded
    folder: Path
    settings: dict[str, Any]
    asks: list[Ask]
    long_prompts: list[Prompt]


def check_command(
    names: Sequence[str], benchmarks: Sequence[str], config: EvaluationRun
) -> tuple[list[Loaded], list[str]]:
    """Every check that needs no model; returns the benchmarks with their problems, and what stays unchecked."""
    from fastreason.cores import parse_cores, require_cores
    from fastreason.models import check_model, max_model_len, model_folder, read_model_config

    found = find_benchmarks(benchmarks, config)
    for benchmark in found:
        with_template(benchmark, [], config)
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm: vllm is not installed. Run `make setup` (CPU), pip install 'fastreason[vllm]' (GPU), "
            "or use rollout.engine=hf."
        )
    if config.rollout.cores:
        require_cores(config.rollout.cores, "rollout.cores")
    if config.rollout.gpus:
        parse_cores(config.rollout.gpus, "rollout.gpus")
    unchecked, seen = [], set[str]()
    for name in names:
        told = config.model.model_copy(update={"path": str(model_folder(name)) if Path(name).is_dir() else name})
        if told.path in seen:
            raise ModelError(f"{name}: the model is named twice. Leave one out.")
        seen.add(told.path)
        unchecked += check_model(told)
        if Path(told.path).is_dir():
            for benchmark in found:
                max_model_len(engine_config(config, benchmark.data, told.path), read_model_config(told.path))
    return [with_template(each, load_benchmark(each), config) for each in found], unchecked


def run_evaluation(names: Sequence[str], loaded: Sequence[Loaded], config: EvaluationRun, out: Path) -> "Results | int":
    """Sample what is missing of every model on every benchmark, and score; 128 + the signal where one asked to stop."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    models = resolve_models(names, config)
    results: Results = {}
    for model in models:
        tokenizer = _tokenizer(model, config)
        with contextlib.ExitStack() as held:
            stores, parts = [], []
            for each in loaded:
                settings = make_settings(model, each, config, tokenizer)
                folder = evaluation_folder(out, model.label, settings)
                _regrade_where_needed(folder, settings, config)
                write_settings(folder, settings)
                store = EvalStore(folder)
                held.callback(store.close)
                stores.append(store)
                parts.append(_part(model, each, folder, settings, store, tokenizer, config))
            _announce(model, parts, stores)
            if any(part.asks for part in parts) and (number := _sample(parts, stores, tokenizer, config)):
                say(f"stopped: {sum(map(len, stores))} responses are kept. Give the same command again to go on.")
                return 128 + number
            for part, store in zip(parts, stores, strict=True):
                _add_unasked(part, store, config.eval.n)
        results[model.label] = {}
        for part in parts:
            functions = part.loaded.benchmark.functions
            scores = score_folder(part.folder, functions, config.reward, config.eval.n, config.ks)
            results[model.label][part.loaded.benchmark.name] = part.folder, scores
    return results


Results = dict[str, dict[str, tuple[Path, Scores]]]
"""For each model's label and each benchmark's name, the folder and the scores."""


def _add_unasked(part: Part, store: EvalStore, n: int) -> None:
    """Rows for the problems that were too long to be asked."""
    for prompt in part.long_prompts:
        for number in sorted(set(range(n)) - store.kept.get(prompt.id, set())):
            store.add(unasked_row(prompt, number))


def resolve_models(names: Sequence[str], config: EvaluationRun) -> list[Model]:
    """The models' folders, labels and checksums; a folder of a run is the model that it has trained."""
    from fastreason.models import model_checksum, model_folder, resolve_model

    models = []
    for name in names:
        path = str(model_folder(name)) if Path(name).is_dir() else name
        folder = resolve_model(config.model.model_copy(update={"path": path}))
        models.append(Model(name, folder, _label(name), model_checksum(folder)))
    labels = [model.label for model in models]
    return [
        model
        if labels.count(model.label) == 1
        else Model(model.name, model.folder, f"{model.label}-{model.checksum[:6]}", model.checksum)
        for model in models
    ]


def _label(name: str) -> str:
    """What a model is called: the name of its folder or run, or behind the owner's name or `package:`."""
    path = Path(name).resolve() if Path(name).is_dir() else Path(name.rpartition(":")[2])
    return path.parent.name if path.name == "model" and (path.parent / "config.yaml").is_file() else path.name


def _tokenizer(model: Model, config: EvaluationRun) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.folder, trust_remote_code=config.model.trust_remote_code)


def _regrade_where_needed(folder: Path, settings: dict[str, Any], config: EvaluationRun) -> None:
    """Have rows that another grader has judged judged by this one, so that verdicts are never mixed."""
    there = held_settings(folder)
    if there is not None and there["grader"] != settings["grader"]:
        say(f"{folder}: its responses were graded otherwise; grading them anew")
        regrade_folder(folder, config.reward.workers, config.reward.deadline_s, settings)


def _part(
    model: Model,
    loaded: Loaded,
    folder: Path,
    settings: dict[str, Any],
    store: EvalStore,
    tokenizer: Any,
    config: EvaluationRun,
) -> Part:
    """What is missing; raises ConfigError where the model's positions do not reach the longest response."""
    from fastreason.models import max_model_len, read_model_config

    max_model_len(engine_config(config, loaded.asking, str(model.folder)), read_model_config(model.folder))
    render, limit = renderer(loaded, tokenizer), loaded.asking.max_prompt_tokens
    lengths = [len(render(problem)) for problem in loaded.problems]
    fitting = [problem for problem, length in zip(loaded.problems, lengths, strict=True) if length <= limit]
    long = [problem for problem, length in zip(loaded.problems, lengths, strict=True) if length > limit]
    return Part(model, loaded, folder, settings, list(missing_asks(fitting, config.eval.n, store)), long)


def _announce(model: Model, parts: Sequence[Part], stores: Sequence[EvalStore]) -> None:
    for part, store in zip(parts, stores, strict=True):
        long = f", {len(part.long_prompts)} too long for data.max_prompt_tokens: wrong" if part.long_prompts else ""
        say(
            f"{model.label} on {part.loaded.benchmark.name}: {len(part.loaded.problems)} problems{long}, {len(store)} "
            f"responses there, {len(part.asks)} to sample"
        )


def _sample(parts: Sequence[Part], stores: Sequence[EvalStore], tokenizer: Any, config: EvaluationRun) -> int | None:
    """Ask all that is missing; returns the signal that ended it, or None where it is done."""
    stopped_by: list[int] = []

    async def main() -> None:
        cancel_on_signals(stopped_by)
        async with _engine(parts, config) as served:
            for part, store in zip(parts, stores, strict=True):
                if part.asks:
                    await _run_part(part, store, served, tokenizer, config)

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        return stopped_by[0]
    except FastreasonError as error:
        text = str(error).replace("rollout.max_new_tokens", "eval.max_new_tokens")
        error.args = (f"{text}\n{sum(map(len, stores))} responses are kept. Give the same command again to go on.",)
        raise
    return None


async def _run_part(part: Part, store: EvalStore, served: Any, tokenizer: Any, config: EvaluationRun) -> None:
    from fastreason.rollout.graders import GraderPool

    params = SamplingParams(**{key: getattr(config.eval, key) for key in SAMPLING})
    sampler = EngineSampler(served.engine, tokenizer, renderer(part.loaded, tokenizer), params, config.eval.seed)
    name = f"{part.model.label} on {part.loaded.benchmark.name}"
    tally = Tally(len(part.asks), lambda line: say(f"{name}: {line}"))

    def on_response(row: EvalSample) -> None:
        served.note_life()
        tally.add(row)

    reward = config.reward.model_copy(update={"functions": part.loaded.benchmark.functions})
    async with GraderPool(reward) as pool:
        tally.begin()
        await served.beside(
            run_job(part.asks, sampler, pool, store, concurrency=config.eval.concurrency, on_response=on_response)
        )


@contextlib.asynccontextmanager
async def _engine(parts: Sequence[Part], config: EvaluationRun) -> AsyncIterator[Any]:
    from fastreason.preflight import choose_device
    from fastreason.serving import served_engine

    longest = max((part.loaded.asking for part in parts), key=lambda asking: asking.max_prompt_tokens)
    model, out = parts[0].model, parts[0].folder.parent.parent
    say(f"starting the engine {config.rollout.engine} with {model.label}")
    told = engine_config(config, longest, str(model.folder))
    async with served_engine(told, model.folder, out / "logs" / "engine.log", choose_device("auto"), say) as served:
        yield served


def say(text: str) -> None:
    """A line for the person who waits; what is asked for goes to stdout."""
    print(text, file=sys.stderr, flush=True)
