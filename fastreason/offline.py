"""The loop of an offline run: take a batch of written responses, update, log, save. It knows no objective and no file format.

Runs on every rank; rank 0 alone writes. The batch of a step is a function of the step, so that a resumed run needs nothing
but the updater's state and the number of steps done.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastreason.checkpoint import CheckpointStore, TrainerState
from fastreason.config import Config
from fastreason.data.traces import Trace, TraceOrder
from fastreason.loop import peak_memory_gib, rank_wait_s
from fastreason.metrics import MetricsLog, Progress
from fastreason.objectives import Objective
from fastreason.packing import Layout, MicroBatch, Row, micro_batches_of
from fastreason.ranks import Ranks, imbalance
from fastreason.trace import Trace as Timeline
from fastreason.update.updater import Updater

REFERENCE_ROWS = 64  # pairs scored by the reference at a time, a rank
TEMPERATURE = 1.0


class Rows(Protocol):
    """Tokenized traces, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Trace: ...


@dataclass
class OfflineTotals:
    """Running totals, carried through checkpoints.

    tokens_trained: of prompts and responses, as train/tokens. first: the log-probabilities of step 1, which changes count from
    where there is no reference.
    """

    tokens_trained: int = 0
    train_wall_s: float = 0.0
    first: dict[str, float] = field(default_factory=dict)


@dataclass
class OfflineParts:
    """Everything that the loop uses; `metrics` and `progress` exist on rank 0 only.

    reference: [rows, 2] fp64 nats, log-probabilities of whole responses under the initial weights, where the objective
    compares with them.
    """

    config: Config
    objective: Objective
    updater: Updater
    ranks: Ranks
    rows: Rows
    order: TraceOrder
    checkpoints: CheckpointStore
    layout: Layout
    pad_token_id: int
    stop_requested: Callable[[], bool]
    resume_from: tuple[Path, TrainerState] | None = None
    reference: np.ndarray | None = None
    metrics: MetricsLog | None = None
    progress: Progress | None = None
    attention_tokens: float = math.inf
    trace: Timeline = field(default_factory=lambda: Timeline(None, "trainer"))


class OfflineLoop:
    """One run. `run()` returns True when all steps are done, False when it was told to stop (state is saved)."""

    def __init__(self, parts: OfflineParts) -> None:
        self.parts = parts
        self.step = 0
        self.saved_step = 0
        self.totals = OfflineTotals()

    def run(self) -> bool:
        parts = self.parts
        if parts.resume_from is not None:
            folder, saved = parts.resume_from
            parts.updater.load(folder / "updater")
            self.step = self.saved_step = saved.step
            self.totals = OfflineTotals(**saved.figures)
        while self.step < parts.config.train.steps:
            if stops_now(parts.ranks, parts.stop_requested):
                self._save()
                return False
            self._one_step()
        if parts.config.checkpoint.every:
            self._save()
        return True

    def _one_step(self) -> None:
        parts, started = self.parts, time.perf_counter()
        self._say("train", self.step + 1)
        chosen = parts.order.batch(self.step)
        rows = rows_of_examples(parts.objective, parts.rows, chosen, parts.reference)
        batches = self._micro_batches(rows)
        prepared = time.perf_counter()
        with parts.trace.span("trainer", "train", step=self.step + 1):
            denominator = parts.objective.denominator(len(chosen), [row.num_trained for row in rows])
            result = parts.updater.update(batches, parts.objective.spec, TEMPERATURE, denominator)
            sums = response_sums(batches, [output.logp for output in result.outputs], len(rows), parts.ranks)
        ended = time.perf_counter()
        self.step += 1
        figures = example_figures(parts.objective, rows, sums)
        self.totals.first = self.totals.first or {
            key: value for key, value in figures.items() if key.startswith("logp/") and not key.endswith("_change")
        }
        ratio = imbalance(parts.ranks, sum(batch.cost for batch in batches))
        (computed,) = parts.ranks.sum([float(sum(batch.num_tokens for batch in batches))])
        tokens = float(sum(len(row) for row in rows))
        self.totals.train_wall_s += ended - started
        self.totals.tokens_trained += int(tokens)
        figures = changes(figures, self.totals.first) | figures
        figures |= {
            "loss/policy": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.lr,
            "train/skipped_updates": float(not result.applied),
            "train/epoch": min(self.step * parts.order.batch_size, parts.order.total or 2**62) / len(parts.rows),
            "train/tokens": tokens,
            "train/tokens_in_loss": float(sum(row.num_trained for row in rows)),
            "train/tokens_computed": computed,
            "train/imbalance": ratio,
            "train/tok_per_s": tokens / (ended - started),
            "time/step_s": ended - started,
            "time/data_s": prepared - started,
            "time/train_s": ended - prepared,
            "time/rank_wait_s": rank_wait_s(ended - prepared, ratio),
            "time/wall_s": self.totals.train_wall_s,
            "memory/peak_gib": peak_memory_gib(),
        }
        if parts.metrics is not None:
            parts.metrics.write({"step": self.step, **figures})
        if parts.config.checkpoint.every and self.step % parts.config.checkpoint.every == 0:
            self._save()

    def _micro_batches(self, rows: list[Row]) -> list[MicroBatch]:
        parts, ranks = self.parts, self.parts.ranks
        budget, pairs = parts.config.train.micro_batch_tokens, parts.objective.coupled
        return micro_batches_of(
            rows, parts.layout, budget, ranks.rank, ranks.num, parts.pad_token_id, pairs, parts.attention_tokens
        )

    def _save(self) -> None:
        parts = self.parts
        if self.step == self.saved_step:
            return
        self._say("checkpoint", self.step)
        if parts.ranks.is_first:
            parts.checkpoints.aside(self.step)
        parts.ranks.barrier()
        parts.updater.save(parts.checkpoints.folder / f"step-{self.step:06d}.writing" / "updater")
        parts.ranks.barrier()
        if parts.ranks.is_first:
            state = TrainerState(
                step=self.step,
                version=self.step,
                num_groups=0,
                score=float(self.step),  # nothing is held out: the newest counts as the best
                figures=vars(self.totals),
            )
            parts.checkpoints.commit(state, b"")
        self.saved_step = self.step

    def _say(self, phase: str, step: int) -> None:
        if self.parts.progress is not None:
            self.parts.progress.update(phase, step=step)


def stops_now(ranks: Ranks, stop_requested: Callable[[], bool]) -> bool:
    """What rank 0 sees of the request to stop, on every rank."""
    return ranks.broadcast(bytes([stop_requested()]) if ranks.is_first else None) == b"\1"


def rows_of_examples(
    objective: Objective, traces: Rows, chosen: Sequence[int], reference: np.ndarray | None = None
) -> list[Row]:
    """The rows of a batch of examples; a pair's are neighbours, the chosen response first."""
    rows = []
    for number, index in enumerate(chosen):
        trace = traces[index]
        for place, response in enumerate(trace.responses):
            num_trained = len(response) if trace.trained is None else sum(trace.trained)
            rows.append(
                Row(
                    prompt=trace.prompt,
                    response=response,
                    sampler_logp=[0.0] * len(response),
                    advantage=objective.advantage(place),
                    token_weight=objective.token_weight(num_trained, trace.weight),
                    index=number * len(trace.responses) + place,
                    trained=trace.trained,
                    ref_logp=None if reference is None else float(reference[index, place]),
                )
            )
    return rows


def response_sums(batches: Sequence[MicroBatch], logp: Sequence[Any], num_rows: int, ranks: Ranks) -> list[float]:
    """Log-probabilities of whole responses by `Row.index`, nats, from each rank's micro-batches of them."""
    sums = [0.0] * num_rows
    for batch, logp_N in zip(batches, logp, strict=True):
        if batch.is_filler:
            continue
        for index, value in zip(batch.index_B.tolist(), batch.sequence_sums(logp_N).tolist(), strict=True):
            sums[index] = value
    return ranks.sum(sums)


def example_figures(objective: Objective, rows: Sequence[Row], sums: Sequence[float]) -> dict[str, float]:
    """Means over a batch: log-probability of a response per token and of the whole, nats, and what a pair's margin is.

    logp/x per token, logp/x_sum of the whole response, x being chosen (or the only one) and rejected; with a reference,
    logp/x_change and logp/x_sum_change count from it. pairs/accuracy is the share of pairs with a margin above 0.
    """
    stride = 2 if objective.pairs else 1
    figures: dict[str, float] = {}
    for name, place in (("chosen", 0), ("rejected", 1))[:stride]:
        part = list(zip(rows[place::stride], sums[place::stride], strict=True))
        figures[f"logp/{name}"] = _mean([total / row.num_trained for row, total in part])
        figures[f"logp/{name}_sum"] = _mean([total for _, total in part])
        moved = [(row.num_trained, total - row.ref_logp) for row, total in part if row.ref_logp is not None]
        if moved:
            figures[f"logp/{name}_change"] = _mean([change / num for num, change in moved])
            figures[f"logp/{name}_sum_change"] = _mean([change for _, change in moved])
    if objective.pairs:
        margins = [
            objective.margin_of(
                sums[i],
                sums[i + 1],
                (rows[i].num_trained, rows[i + 1].num_trained),
                (rows[i].ref_logp or 0.0) - (rows[i + 1].ref_logp or 0.0),
            )
            for i in range(0, len(rows), 2)
        ]
        figures |= {
            "pairs/num": float(len(margins)),
            "pairs/accuracy": _mean([float(margin > 0) for margin in margins]),
            "pairs/margin": _mean(margins),
        }
    return figures


def changes(figures: dict[str, float], first: dict[str, float]) -> dict[str, float]:
    """logp/x_change of every logp/x: since the batch of step 1, whose rows were others."""
    return {f"{key}_change": value - first[key] for key, value in figures.items() if key in first}


def score_reference(parts: OfflineParts, done: np.ndarray, keep: Callable[[np.ndarray], None]) -> np.ndarray | None:
    """[rows, 2] fp64 nats: every pair under the weights as they are, on every rank; None where told to stop.

    done: the first rows, known already. keep: is given the rows of each chunk, on rank 0.
    """
    ranks, found = parts.ranks, np.zeros((len(parts.rows), 2))
    found[: len(done)] = done
    size = REFERENCE_ROWS * ranks.num
    for first in range(len(done), len(parts.rows), size):
        if stops_now(ranks, parts.stop_requested):
            return None
        chosen = range(first, min(first + size, len(parts.rows)))
        if parts.progress is not None:
            parts.progress.update("score pairs with the initial weights", done=first, total=len(parts.rows), step=0)
        rows = rows_of_examples(parts.objective, parts.rows, chosen)
        budget = parts.config.train.micro_batch_tokens
        batches = micro_batches_of(rows, parts.layout, budget, ranks.rank, ranks.num, parts.pad_token_id)
        logp = parts.updater.logprobs(batches, parts.objective.spec, TEMPERATURE)
        sums = response_sums(batches, logp, len(rows), ranks)
        found[first : first + len(chosen)] = np.array(sums).reshape(-1, 2)
        if ranks.is_first:
            keep(found[first : first + len(chosen)])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
