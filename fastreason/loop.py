"""The training loop: pull a batch, compute advantages, update, publish, evaluate, save. It knows no algorithm.

Runs on every rank; rank 0 alone talks to the producer and writes files. Synchronous and asynchronous training are the
same code: the producer's staleness bound decides.
"""

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import torch

from fastreason.algorithms import ResolvedAlgorithm
from fastreason.checkpoint import CheckpointStore, TrainerState, read_producer_state
from fastreason.config import Config
from fastreason.critic import Critic
from fastreason.errors import InterruptedWaitError
from fastreason.figures import rollout_figures
from fastreason.frozen import FrozenModel
from fastreason.metrics import MetricsLog, Progress, SampleLog
from fastreason.packing import Layout
from fastreason.ranks import Ranks
from fastreason.sync import Publisher
from fastreason.tenancy import Tenancy
from fastreason.trace import Trace
from fastreason.training import TrainingStep
from fastreason.types import EvalResult, Group, LoadReport, WeightUpdate
from fastreason.update.updater import Updater


class Delivery(Protocol):
    """A batch as the producer hands it over, with the seconds that it took."""

    groups: list[Group]
    generate_s: float
    grade_s: float
    figures: dict[str, float]


class Rollouts(Protocol):
    """The producer as the loop sees it."""

    def start(self, version: int, trained: int, state: bytes | None) -> None: ...

    def next_batch(self) -> Delivery: ...

    def publish(self, update: WeightUpdate, trained: int) -> LoadReport: ...

    def evaluate(self, name: str) -> EvalResult: ...

    def save_state(self, trained: int, settle: bool) -> bytes: ...


class Order(msgspec.Struct):
    """What rank 0 tells the others to do next."""

    action: Literal["train", "stop"]
    groups: list[Group] = []


@dataclass
class Totals:
    """Running totals of a run, carried through checkpoints."""

    tokens_generated: int = 0
    tokens_trained: int = 0
    train_wall_s: float = 0.0
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    first_mismatch: dict[str, float] = field(default_factory=dict)


@dataclass
class Parts:
    """Everything that the loop uses; `rollouts`, `metrics` and `samples` exist on rank 0 only.

    `target`, `critic`, `silent` and `attention_tokens` are the training step's. `tenancy` is given where the engine sleeps
    while the ranks compute.
    """

    config: Config
    algorithm: ResolvedAlgorithm
    updater: Updater
    ranks: Ranks
    publisher: Publisher
    checkpoints: CheckpointStore
    run_dir: Path
    layout: Layout
    pad_token_id: int
    stop_requested: Callable[[], bool]
    resume_from: tuple[Path, TrainerState] | None = None
    rollouts: Rollouts | None = None
    metrics: MetricsLog | None = None
    samples: SampleLog | None = None
    progress: Progress | None = None
    trace: Trace = field(default_factory=lambda: Trace(None, "trainer"))
    target: FrozenModel | None = None
    critic: Critic | None = None
    silent: frozenset[int] = frozenset()
    tenancy: Tenancy | None = None
    attention_tokens: float = math.inf


class Loop:
    """One run. `run()` returns True when all steps are done, False when it was told to stop (state is saved)."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.step = 0
        self.version = 0
        self.num_groups = 0
        self.saved_step = 0  # an untrained run needs no checkpoint
        self.score = float("-inf")
        self.totals = Totals()
        self._training = TrainingStep(
            parts.config,
            parts.algorithm,
            parts.updater,
            parts.ranks,
            parts.layout,
            parts.pad_token_id,
            parts.target,
            parts.critic,
            parts.silent,
            parts.attention_tokens,
        )

    def run(self) -> bool:
        parts, steps = self.parts, self.parts.config.train.steps
        self._begin()
        while self.step < steps:
            if not self._one_step():
                self._save()
                return False
        if parts.config.eval.num_prompts and "after" not in self.totals.evals and not parts.stop_requested():
            self._evaluate("after")  # an earlier start was stopped or killed amid it
        if self.saved_step < self.step and parts.config.checkpoint.every:
            self._save()
        return True

    def _begin(self) -> None:
        """Bring back the checkpoint and its weights in the engine, or measure the start."""
        parts = self.parts
        state = None
        if parts.resume_from is not None:
            folder, saved = parts.resume_from
            parts.updater.load(folder / "updater")
            if parts.critic is not None:
                parts.critic.engine.load(folder / "critic")
            self._training.coefficients = replace(self._training.coefficients, **saved.coefficients)
            self.step, self.version, self.num_groups = saved.step, saved.version, saved.num_groups
            self.saved_step, self.score = saved.step, saved.score
            state = read_producer_state(folder) if parts.rollouts is not None else None
            self.totals = Totals(**saved.figures)
            if self.step < parts.config.train.steps:
                self.totals.evals.pop("after", None)  # of a run that was to be shorter
            if self.version:
                self._publish(self.version)
        self._release()
        if parts.resume_from is None and parts.config.eval.num_prompts:
            self._evaluate("before")
        if parts.rollouts is not None and not parts.stop_requested():
            parts.rollouts.start(self.version, self.num_groups, state)

    def _one_step(self) -> bool:
        """Train on one batch and publish; False when told to stop instead."""
        trace, started = self.parts.trace, time.perf_counter()
        with trace.span("trainer", "pull", step=self.step + 1):
            groups, delivery = self._pull()
        if groups is None:
            return False
        pulled = time.perf_counter()
        self._say("train", step=self.step + 1)
        with trace.span("trainer", "train", step=self.step + 1):
            figures = self._training(groups, self.step)
        trained = time.perf_counter()
        self.step += 1
        self.num_groups += len(groups)
        figures |= rollout_figures(groups, self.version, self.parts.config.rollout.max_staleness)
        self._say("publish", step=self.step)
        report = self._publish(self.version + 1)
        ended = time.perf_counter()
        self.totals.train_wall_s += ended - started
        self.totals.tokens_generated += int(figures["rollout/tokens"])
        self.totals.tokens_trained += int(figures["train/tokens"])
        if delivery is not None:
            assert report is not None
            seconds = {"step": ended - started, "wait": pulled - started, "train": trained - pulled}
            seconds |= {"publish": ended - trained, "pause": report.pause_s, "wall": self.totals.train_wall_s}
            if self.parts.tenancy is not None:
                seconds["wake"] = report.wake_s
            self._write(groups, figures | step_figures(seconds, delivery, figures))
        if self._due(self.parts.config.checkpoint.every):
            self._save()
        return True

    def _write(self, groups: list[Group], figures: dict[str, float]) -> None:
        """Evaluate where it is due, and log the step."""
        parts = self.parts
        if not self.totals.first_mismatch:
            self.totals.first_mismatch = {k: v for k, v in figures.items() if k.startswith("mismatch/")}
        if parts.samples is not None:
            parts.samples.write(self.step, groups)
        figures |= self._due_evaluation()
        if parts.metrics is not None:
            parts.metrics.write({"step": self.step, **figures})
        if "eval/accuracy" in figures or not parts.config.eval.every:
            self.score = figures.get("eval/accuracy", figures["reward/mean"])

    def _pull(self) -> tuple[list[Group] | None, Delivery | None]:
        """The next batch on every rank, or None where the run was told to stop."""
        parts = self.parts
        delivery, message = None, None
        if parts.rollouts is not None:
            self._say("generate", detail="waiting for the next batch", step=self.step + 1)
            try:
                stop = parts.stop_requested()
                delivery = None if stop else parts.rollouts.next_batch()
                if delivery is not None and parts.tenancy is not None:
                    parts.tenancy.take()
            except InterruptedWaitError:
                delivery = None
            order = Order(action="train", groups=delivery.groups) if delivery else Order(action="stop")
            message = msgspec.msgpack.encode(order)
        order = msgspec.msgpack.decode(parts.ranks.broadcast(message), type=Order)
        return (order.groups if order.action == "train" else None), delivery

    def _publish(self, version: int) -> LoadReport | None:
        """New weights to the engines: gathered and written while they generate, loaded in a pause of theirs."""
        parts = self.parts
        with parts.trace.span("publication", "gather and write", version=version):
            update = parts.publisher.write(parts.updater, version)
        self.version = version
        self._release()
        if parts.rollouts is None or update is None:
            return None
        started = time.time()
        report = parts.rollouts.publish(update, self.num_groups)
        parts.trace.complete(
            "publication", "load", started, time.time(), version=version, pause_s=round(report.pause_s, 4)
        )
        return report

    def _release(self) -> None:
        """The ranks compute no more until the next batch: the engine may have its memory back."""
        if self.parts.tenancy is not None:
            self.parts.tenancy.release()

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _due_evaluation(self) -> dict[str, float]:
        config = self.parts.config
        last = self.step == config.train.steps
        if not config.eval.num_prompts or not (last or self._due(config.eval.every)):
            return {}
        result = self._evaluate("after" if last else f"step-{self.step:06d}")
        return {"eval/accuracy": result.accuracy, "eval/standard_error": result.standard_error} if result else {}

    def _evaluate(self, name: str) -> EvalResult | None:
        if self.parts.rollouts is None:
            return None
        try:
            with self.parts.trace.span("trainer", f"evaluate {name}"):
                result = self.parts.rollouts.evaluate(name)
        except InterruptedWaitError:
            return None  # told to stop: the next look at the stop flag ends the run
        self.totals.evals[name] = msgspec.to_builtins(result)
        return result

    def _save(self) -> None:
        parts = self.parts
        if self.step == self.saved_step:
            return
        self._say("checkpoint", step=self.step)
        with parts.trace.span("trainer", "save", step=self.step):
            self._save_parts()
        self.saved_step = self.step

    def _save_parts(self) -> None:
        parts = self.parts
        if parts.ranks.is_first:
            parts.checkpoints.aside(self.step)
        parts.ranks.barrier()
        aside = parts.checkpoints.folder / f"step-{self.step:06d}.writing"
        parts.updater.save(aside / "updater")
        if parts.critic is not None:
            parts.critic.engine.save(aside / "critic")
        parts.ranks.barrier()
        if parts.rollouts is not None:
            state = TrainerState(
                step=self.step,
                version=self.version,
                num_groups=self.num_groups,
                score=self.score,
                figures=vars(self.totals),
                coefficients=parts.algorithm.kept_state(self._training.coefficients),
            )
            # Told to stop, it does not wait for what is still being generated: those prompts are asked again.
            producer = parts.rollouts.save_state(self.num_groups, settle=not parts.stop_requested())
            parts.checkpoints.commit(state, producer)

    def _say(self, phase: str, detail: str = "", step: int | None = None) -> None:
        if self.parts.progress is not None:
            self.parts.progress.update(phase, detail, step=step)


def step_figures(seconds: dict[str, float], delivery: Delivery, figures: dict[str, float]) -> dict[str, float]:
    """The seconds and rates of a step, and what the producer counted."""
    return {
        **{f"time/{name}_s": value for name, value in seconds.items()},
        "time/rank_wait_s": rank_wait_s(seconds["train"], figures["train/imbalance"]),
        "time/generate_s": delivery.generate_s,
        "time/grade_s": delivery.grade_s,
        # Replayed groups took no time.
        "rollout/tok_per_s": figures["rollout/tokens"] / delivery.generate_s if delivery.generate_s else 0.0,
        "train/tok_per_s": figures["train/tokens"] / max(1e-9, seconds["train"]),
        **delivery.figures,
        "memory/peak_gib": peak_memory_gib(),
    }


def rank_wait_s(train_s: float, imbalance: float) -> float:
    """Seconds of an update that a rank waits for the slowest, in the mean over ranks, where its time goes with its cost."""
    return train_s * (1 - 1 / imbalance)


def peak_memory_gib() -> float:
    """Peak resident memory of this process, and on a GPU the peak of its allocator, whichever is of the device used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
