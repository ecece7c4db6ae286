"""What bench/offline.py trains on, and from the steps of its runs to rows of a table. Pure: no process, no clock."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGET = 1.5  # tokens trained a second, as a multiple of TRL's fastest setting
SKIP_FIRST = 1  # steps of a run that are not measured
SAME_LOSS = 0.02  # by how much the first loss of two trainers may differ on the same rows: bf16


@dataclass(frozen=True)
class Step:
    """One update: wall seconds, tokens of its rows (prompt and response of each), those of them in the loss, the loss."""

    seconds: float
    tokens: int
    tokens_in_loss: int
    loss: float


@dataclass(frozen=True)
class Part:
    """One run of one trainer. same_rows: whether each of its updates has the rows of ours; wall_s: of all its processes."""

    objective: str
    trainer: str
    steps: list[Step]
    peak_mb: float
    wall_s: float
    same_rows: bool = True
    number: int = 0


def responses(path: Path, num: int) -> list[dict[str, str]]:
    """The first `num` rows of a file with problem and response (or solution)."""
    return [
        {"problem": row["problem"], "response": row.get("response") or row["solution"]}
        for _, row in zip(range(num), _lines(path), strict=False)
    ]


def words_that_fit(words: Sequence[str], limit: int, count: Callable[[str], int]) -> str:
    """The longest text of the first words, joined, of which `count` is at most `limit`; the words go round."""
    low, high = 0, limit  # a word has a token at least
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(_joined(words, middle)) <= limit else (low, middle - 1)
    return _joined(words, low)


def check_same_work(parts: Sequence[Part]) -> None:
    """Raise ValueError where the runs of an objective did not train on the same tokens, or began with another loss."""
    for name in dict.fromkeys(part.objective for part in parts):
        mine = [part for part in parts if part.objective == name]
        work = {(sum(s.tokens for s in p.steps), sum(s.tokens_in_loss for s in p.steps), len(p.steps)) for p in mine}
        first = [part.steps[0].loss for part in mine if part.same_rows] or [0.0]
        if len(work) > 1 or max(first) - min(first) > SAME_LOSS:
            found = [(p.trainer, [asdict(step) for step in p.steps]) for p in mine]
            raise ValueError(f"{name}: the trainers did not do the same work: {json.dumps(found)}")


def rows_of(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """A row per (objective, trainer), medians over the measured steps of all its runs.

    times_trl: tokens a second over those of TRL's fastest setting with the same objective; mb_of_trl: the peak over that
    setting's. Raises ValueError where a run has no measured step.
    """
    rows = []
    for key in dict.fromkeys((part.objective, part.trainer) for part in parts):
        mine = [part for part in parts if (part.objective, part.trainer) == key]
        steps = [step for part in mine for step in part.steps[SKIP_FIRST:]]
        if not steps:
            raise ValueError(f"{key[1]}: the first {SKIP_FIRST} steps are not measured. Give --steps more.")
        seconds = sorted(step.seconds for step in steps)
        rows.append(
            {
                "objective": key[0],
                "trainer": key[1],
                "step_s": statistics.median(seconds),
                "step_s_min": seconds[0],
                "step_s_max": seconds[-1],
                "num_steps": len(steps),
                "tokens_per_step": statistics.fmean(step.tokens for part in mine for step in part.steps),
                "tokens_in_loss_per_step": statistics.fmean(s.tokens_in_loss for part in mine for s in part.steps),
                "trained_tok_per_s": statistics.median(step.tokens / step.seconds for step in steps),
                "peak_mb": max(part.peak_mb for part in mine),
                "loss_first": mine[0].steps[0].loss,
                "loss_last": mine[0].steps[-1].loss,
                "wall_s": statistics.median(part.wall_s for part in mine),
                "steps": [[asdict(step) for step in part.steps] for part in mine],
            }
        )
    for row in rows:
        others = [r for r in rows if r["objective"] == row["objective"] and r["trainer"].startswith("trl")]
        best = max(others, key=lambda r: r["trained_tok_per_s"], default=None)
        row["times_trl"] = row["trained_tok_per_s"] / best["trained_tok_per_s"] if best else None
        row["mb_of_trl"] = row["peak_mb"] / best["peak_mb"] if best else None
        row["target"] = TARGET if row["trainer"] == "ours" else None
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as text."""
    heads = ("s/step", "least", "most", "tok/s", "x TRL", "wanted", "peak MB", "of TRL", "loss 1st", "last", "all s")
    print("objective  trainer     " + "".join(f"{name:>9}" for name in heads))
    for row in rows:
        figures = [f"{row[key]:.2f}" for key in ("step_s", "step_s_min", "step_s_max")]
        figures += [f"{row['trained_tok_per_s']:.0f}", _ratio(row["times_trl"]), _ratio(row["target"])]
        figures += [f"{row['peak_mb']:.0f}", _ratio(row["mb_of_trl"])]
        figures += [f"{row['loss_first']:.3f}", f"{row['loss_last']:.3f}", f"{row['wall_s']:.0f}"]
        print(f"{row['objective']:11}{row['trainer']:12}" + "".join(f"{figure:>9}" for figure in figures), flush=True)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _joined(words: Sequence[str], num: int) -> str:
    return " ".join(words[i % len(words)] for i in range(num))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
