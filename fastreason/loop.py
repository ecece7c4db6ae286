"""The training loop: pull a batch, compute advantages, update, publish, evaluate, save. It knows no algorithm.

Runs on every rank; rank 0 alone talks to the producer and writes files. Synchronous and asynchronous training are the
same code: the producer's staleness bound decides.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import torch

from fastreason.algorithms import ResolvedAlgorithm
from fastreason.checkpoint import CheckpointStore, TrainerState
from fastreason.config import Config
from fastreason.errors import InterruptedWaitError
from fastreason.figures import rollout_figures
from fastreason.metrics import MetricsLog, Progress, SampleLog
from fastreason.packing import Layout
from fastreason.ranks import Ranks
from fastreason.sync import Publisher
from fastreason.training import TrainingStep
from fastreason.types import EvalResult, Group, LoadReport, WeightUpdate
from fastreason.update.updater import Updater


class Delivery(Protocol):
    """A batch as the producer hands it over, with the seconds that it took."""

    groups: list[Group]
    generate_s: float
    grade_s: float
    num_grader_timeouts: int
    num_long_prompts: int


class Rollouts(Protocol):
    """The producer as the loop sees it."""

    def start(self, version: int, trained: int, state: dict[str, Any] | None) -> None: ...

    def next_batch(self) -> Delivery: ...

    def publish(self, update: WeightUpdate) -> LoadReport: ...

    def evaluate(self, name: str) -> EvalResult: ...

    def save_state(self, trained: int) -> dict[str, Any]: ...


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
    """Everything that the loop uses; `rollouts`, `metrics` and `samples` exist on rank 0 only."""

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
            parts.config, parts.algorithm, parts.updater, parts.ranks, parts.layout, parts.pad_token_id
        )

    def run(self) -> bool:
        parts, steps = self.parts, self.parts.config.train.steps
        self._begin()
        while self.step < steps:
            if not self._one_step():
                self._save()
                return False
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
            self.step, self.version, self.num_groups = saved.step, saved.version, saved.num_groups
            self.saved_step, self.score, state = saved.step, saved.score, saved.producer
            self.totals = Totals(**saved.figures)
            if self.version:
                self._publish(self.version)
        elif parts.config.eval.num_prompts:
            self._evaluate("before")
        if parts.rollouts is not None and not parts.stop_requested():
            parts.rollouts.start(self.version, self.num_groups, state)

    def _one_step(self) -> bool:
        """Train on one batch and publish; False when told to stop instead."""
        started = time.perf_counter()
        groups, delivery = self._pull()
        if groups is None:
            return False
        pulled = time.perf_counter()
        self._say("train", step=self.step + 1)
        figures = self._training(groups)
        self.totals.tokens_trained += int(figures["train/tokens"])
        trained = time.perf_counter()
        self.step += 1
        self.num_groups += len(groups)
        staleness = rollout_figures(groups, self.version)
        self._say("publish", step=self.step)
        report = self._publish(self.version + 1)
        ended = time.perf_counter()
        self.totals.train_wall_s += ended - started
        tokens = int(staleness["rollout/tokens"])
        self.totals.tokens_generated += tokens
        if parts_metrics := self.parts.metrics:
            assert delivery is not None and report is not None
            figures |= staleness | {
                "time/step_s": ended - started,
                "time/wait_s": pulled - started,
                "time/train_s": trained - pulled,
                "time/publish_s": ended - trained,
                "time/pause_s": report.pause_s,
                "time/generate_s": delivery.generate_s,
                "time/grade_s": delivery.grade_s,
                "time/wall_s": self.totals.train_wall_s,
                "rollout/tok_per_s": tokens / max(1e-9, delivery.generate_s),
                "train/tok_per_s": figures["train/tokens"] / max(1e-9, trained - pulled),
                "reward/timeouts": float(delivery.num_grader_timeouts),
                "rollout/long_prompts": float(delivery.num_long_prompts),
                "memory/peak_gib": peak_memory_gib(),
            }
            if not self.totals.first_mismatch:
                self.totals.first_mismatch = {k: v for k, v in figures.items() if k.startswith("mismatch/")}
            if self.parts.samples is not None:
                self.parts.samples.write(self.step, groups)
            figures |= self._due_evaluation()
            parts_metrics.write({"step": self.step, **figures})
            if "eval/accuracy" in figures or not self.parts.config.eval.every:
                self.score = figures.get("eval/accuracy", figures["reward/mean"])
        if self._due(self.parts.config.checkpoint.every):
            self._save()
        return True

    def _pull(self) -> tuple[list[Group] | None, Delivery | None]:
        """The next batch on every rank, or None where the run was told to stop."""
        parts = self.parts
        delivery, message = None, None
        if parts.rollouts is not None:
            self._say("generate", detail="waiting for the next batch", step=self.step + 1)
            try:
                stop = parts.stop_requested()
                delivery = None if stop else parts.rollouts.next_batch()
            except InterruptedWaitError:
                delivery = None
            order = Order(action="train", groups=delivery.groups) if delivery else Order(action="stop")
            message = msgspec.msgpack.encode(order)
        order = msgspec.msgpack.decode(parts.ranks.broadcast(message), type=Order)
        return (order.groups if order.action == "train" else None), delivery

    def _publish(self, version: int) -> LoadReport | None:
        update = self.parts.publisher.write(self.parts.updater, version)
        self.version = version
        if self.parts.rollouts is None or update is None:
            return None
        return self.parts.rollouts.publish(update)

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
        if parts.ranks.is_first:
            parts.checkpoints.aside(self.step)
        parts.ranks.barrier()
        parts.updater.save(parts.checkpoints.folder / f"step-{self.step:06d}.writing" / "updater")
        parts.ranks.barrier()
        if parts.rollouts is not None:
            state = TrainerState(
                step=self.step,
                version=self.version,
                num_groups=self.num_groups,
                score=self.score,
                producer=parts.rollouts.save_state(self.num_groups),
                figures=vars(self.totals),
            )
            parts.checkpoints.commit(state)
        self.saved_step = self.step

    def _say(self, phase: str, detail: str = "", step: int | None = None) -> None:
        if self.parts.progress is not None:
            self.parts.progress.update(phase, detail, step=step)


def peak_memory_gib() -> float:
    """Peak resident memory of this process, and on a GPU the peak of its allocator, whichever is of the device used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
