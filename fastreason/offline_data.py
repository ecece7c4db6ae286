"""What the launcher of an offline run does before it starts: tokenizes the traces, counts the steps, looks at a resumed run.

Loads no model. What it needs of transformers is in a process of its own, which gives its memory back.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from fastreason.config import Config, check_arithmetic, load_config
from fastreason.data.traces import TraceReport, Traces, num_examples, write_traces
from fastreason.errors import ConfigError
from fastreason.models import read_model_config, resolve_model
from fastreason.objectives import resolve_objective
from fastreason.packing import Layout
from fastreason.policy import choose_layout
from fastreason.preflight import Decisions, decide_attention
from fastreason.processes import die_with_parent

TRACES = "traces"
SHARED_TOKENS = 2048  # the mask of a shared line grows with its square, and sdpa leaves out half of a causal one


def prepare_offline(config: Config, run_dir: Path, decisions: Decisions) -> tuple[Config, Decisions]:
    """Write RUN/traces and return the config with the number of steps, and decisions for lines as long as they are.

    What it loads is gone with the process that does it. Removes the run's folder where the data cannot be used.
    """
    try:
        with stopped_by_sigterm():
            report = in_own_process(config, run_dir / TRACES)
        config = with_steps(config, report.kept)
        check_arithmetic(config)
        decisions = decide_offline(config, report, decisions)
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise
    print("\n".join(report.lines()))
    return config, decisions


def in_own_process(config: Config, folder: Path) -> TraceReport:
    """`tokenize` in a process that ends with this call, however that ends."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=die_with_parent) as pool:
        worker = pool.submit(os.getpid).result()
        try:
            return pool.submit(tokenize, config, folder).result()
        except BaseException:
            # Leaving the block waits for it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)
            raise


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the command by an exception, so that what was begun is cleaned up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def resume_offline(config: Config, run_dir: Path, decisions: Decisions) -> Decisions:
    """The decisions of a run that goes on with its traces; raises ConfigError where the config asks for others."""
    before, report = load_config(run_dir / "config.yaml"), Traces(run_dir / TRACES).report
    keys = [(name, key) for name in ("data", "offline") for key in type(getattr(config, name)).model_fields]
    for name, key in [*keys, ("run", "seed"), ("train", "prompts_per_step")]:
        then, now = (getattr(getattr(each, name), key) for each in (before, config))
        if then != now:
            raise ConfigError(
                f"--resume {run_dir}: {name}.{key}={now!r}, but its traces and their order were made with {then!r}. Leave the "
                f"key out, or start a new run; from its trained model on with model.path={run_dir}."
            )
    with_steps(config, report.kept, f"start a new run with model.path={run_dir}")
    return decide_offline(config, report, decisions)


def decide_offline(config: Config, report: TraceReport, decisions: Decisions) -> Decisions:
    """The decisions of preflight, with the attention for lines as long as the traces make them."""
    shared = offline_layout(config, report, decisions.attention, decisions.device) == "shared"
    longest = report.longest_line if shared else report.longest
    return dataclasses.replace(decisions, attention=decide_attention(config, decisions.device, longest))


def offline_layout(config: Config, report: TraceReport, attention: str, device: str) -> Layout:
    """How rows lie in a micro-batch: a pair's prompt is computed once where `auto` may and the lines are short."""
    layout = choose_layout(config.train.share_prompts, attention, device)
    gains = resolve_objective(config).pairs and report.longest_line <= SHARED_TOKENS
    return layout if layout != "shared" or gains or config.train.share_prompts == "on" else "padded"


def tokenize(config: Config, folder: Path) -> TraceReport:
    """Write the traces of a config, in the process that is given to it."""
    from fastreason.compose import load_tokenizer_of

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model_dir = resolve_model(config.model)
    limit = longest_sequence(config, read_model_config(model_dir))
    return write_traces(config, load_tokenizer_of(model_dir, config), folder, limit, resolve_objective(config).pairs)


def longest_sequence(config: Config, model_config: dict[str, Any]) -> int | None:
    """Tokens that a row may have; raises ConfigError where offline.max_tokens is more than the model's positions."""
    wanted = config.offline.max_tokens
    positions = config.model.max_position_embeddings or model_config.get("max_position_embeddings")
    if wanted is not None and positions is not None and wanted > positions:
        raise ConfigError(
            f"offline.max_tokens={wanted} is more than the model's max_position_embeddings={positions}. Lower it, or edit "
            "the model with model.max_position_embeddings (and model.rope_theta)."
        )
    return wanted or positions


def with_steps(config: Config, num_rows: int, otherwise: str = "raise offline.epochs") -> Config:
    """The config with train.steps: as many as offline.epochs make of so many rows, where it does not say fewer.

    otherwise: what to do for more steps than that.
    """
    most = most_steps(config, num_rows)
    if most is None:
        return config
    if config.train.steps > most:
        raise ConfigError(
            f"train.steps={config.train.steps}: offline.epochs={config.offline.epochs:g} of {num_rows} rows make only {most} "
            f"steps. Leave train.steps out, or {otherwise}."
        )
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": config.train.steps or most})})


def most_steps(config: Config, num_rows: int) -> int | None:
    """Steps that offline.epochs make of so many rows; None where nothing limits them."""
    if config.offline.epochs is None:
        return None
    return math.ceil(num_examples(num_rows, config.offline.epochs) / config.train.prompts_per_step)


def how_to_train_on(config: Config, run_dir: Path) -> str:
    """What a user can do with a run that has made all of its train.steps."""
    most = most_steps(load_config(run_dir / "config.yaml"), Traces(run_dir / TRACES).report.kept)
    if most is None or most > config.train.steps:
        return "Pass train.steps=N with a larger N to train on" + (f", up to {most}." if most else ".")
    return f"Its offline.epochs={config.offline.epochs:g} are over: to train on, start a new run with model.path={run_dir}."
