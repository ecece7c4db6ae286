"""From the summaries of bench/chain.py's stages to its table. Pure: no process, no file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# {level: (the stage that measures it, the key of that run's summary.json)}
LEVELS = {
    "base": ("base_eval", "accuracy_before"),
    "SFT": ("sft_eval", "accuracy_before"),
    "REDI": ("rl", "accuracy_before"),
    "RL": ("rl", "accuracy_after"),
}


def levels_of(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """{level: accuracy} from {stage: its summary}; None where the stage is not there."""
    return {level: summaries.get(stage, {}).get(key) for level, (stage, key) in LEVELS.items()}


def table(found: Mapping[int, Mapping[str, float | None]]) -> list[dict[str, Any]]:
    """A row per level: each seed's accuracy, their mean, and its standard error (None for fewer than two seeds).

    change is to the level before, over the seeds that have both, with the standard error of these differences.
    """
    rows: list[dict[str, Any]] = []
    former: str | None = None
    for level in LEVELS:
        values = {seed: levels[level] for seed, levels in found.items() if levels[level] is not None}
        row = {"level": level, "seeds": {str(seed): value for seed, value in values.items()}}
        row["mean"], row["standard_error"] = mean_and_error(list(values.values()))
        steps = [] if former is None else [levels[level] - levels[former] for levels in both(found, former, level)]
        row["change"], row["change_error"] = mean_and_error(steps)
        rows.append(row)
        former = level
    return rows


def both(found: Mapping[int, Mapping[str, float | None]], first: str, second: str) -> list[Mapping[str, float | None]]:
    return [levels for levels in found.values() if levels[first] is not None and levels[second] is not None]


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean and the standard error of it."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return (statistics.fmean(values) if values else None), error


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    print("level    held out         change           seeds")
    for row in rows:
        seeds = ", ".join(f"{value:.3f}" for value in row["seeds"].values())
        held_out = _with_error(row["mean"], row["standard_error"])
        change = _with_error(row["change"], row["change_error"], "+")
        print(f"{row['level']:9}{held_out:17}{change:17}{seeds}", flush=True)


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + (f" ± {error:.3f}" if error is not None else "")
