"""Reads what finished runs have written into curves over steps and held-out counts. It judges nothing and draws nothing."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastreason.metrics import read_metrics, read_summary

Counts = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Curve:
    """One run, a value per step: mean reward, token entropy (nats), KL to the initial model (nats a token; nan: not logged).

    before, after: (responses, right ones) of each held-out prompt, at the two ends of training.
    """

    reward: tuple[float, ...]
    entropy: tuple[float, ...]
    kl: tuple[float, ...]
    before: Counts = ()
    after: Counts = ()


def read_curve(folder: Path) -> Curve:
    """The curve of a run folder; raises ValueError where it has no step."""
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(f"{folder}: metrics.jsonl has no step. Remove its line from finished.jsonl and run again.")

    def column(key: str) -> tuple[float, ...]:
        return tuple(math.nan if row.get(key) is None else float(row[key]) for row in rows)

    return Curve(
        column("reward/mean"),
        column("loss/entropy"),
        column("kl/reference"),
        read_counts(folder / "eval-before.jsonl"),
        read_counts(folder / "eval-after.jsonl"),
    )


def read_counts(path: Path) -> Counts:
    """(responses, right ones) per prompt, in the file's order; empty where there is no file."""
    if not path.is_file():
        return ()
    found: dict[Any, list[bool]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            found.setdefault(row["prompt_id"], []).append(row["correct"])
    return tuple((len(right), sum(right)) for right in found.values())


def read_minutes(folder: Path) -> float:
    """Minutes of training alone, without start, evaluations and end; nan where the summary does not say."""
    return float(read_summary(folder).get("train_wall_s") or math.nan) / 60


def accuracy(counts: Counts) -> float:
    """Mean over prompts of the share of right responses; nan of none."""
    return statistics.fmean(right / num for num, right in counts) if counts else math.nan


def pass_at_k(counts: Counts, k: int) -> float:
    """Mean over prompts of 1 - C(n - c, k) / C(n, k), the unbiased estimate from n responses of which c are right.

    nan of no prompts; raises ValueError where a prompt has fewer than k responses. arXiv 2107.03374.
    """
    if any(num < k for num, _ in counts):
        raise ValueError(
            f"pass@{k}: a prompt has {min(counts)[0]} responses, allowed: {k} or more; raise eval.samples_per_prompt"
        )
    if not counts:
        return math.nan
    return statistics.fmean(1 - math.comb(num - right, k) / math.comb(num, k) for num, right in counts)


def smoothed(values: Sequence[float], window: int = 3) -> list[float]:
    """Mean of each value with the `window` - 1 before it; the first ones have fewer to look back on."""
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def first_reach(values: Sequence[float], level: float) -> float:
    """Index, with a fraction between two steps, at which values first reach a level; inf where they never do."""
    for index, value in enumerate(values):
        if value >= level:
            below = values[index - 1] if index else value
            return index - (value - level) / (value - below) if value > below else float(index)
    return math.inf


def value_at(values: Sequence[float], position: float) -> float:
    """The value at an index with a fraction, between its two neighbours."""
    index = min(int(position), len(values) - 2) if len(values) > 1 else 0
    after = values[min(index + 1, len(values) - 1)]
    return values[index] + (position - index) * (after - values[index])


def last_quarter(values: Sequence[float]) -> float:
    """Mean over the last quarter of the steps."""
    return statistics.fmean(values[-max(1, len(values) // 4) :])


def first_third(values: Sequence[float]) -> float:
    """Mean over the first third of the steps."""
    return statistics.fmean(values[: max(1, len(values) // 3)])
