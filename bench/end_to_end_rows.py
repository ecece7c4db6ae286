"""From the steps of several runs to the rows of bench/end_to_end.py. Pure: no process, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

TARGETS = {"ours": 2.2, "ours_exact": 4.0}  # tokens trained a second, as multiples of TRL's


@dataclass(frozen=True)
class Step:
    """One training step: wall seconds without evaluation, prompt and response tokens of all samples, mean reward."""

    seconds: float
    tokens: float
    reward: float
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One run of one trainer; `evals` is [(seconds of training so far, held-out accuracy)]."""

    trainer: str
    steps: list[Step]
    evals: list[tuple[float, float]]
    peak_mb: float
    number: int = 0


def curve(seconds: Sequence[float], accuracy: Mapping[int, float]) -> list[tuple[float, float]]:
    """[(training seconds, accuracy)] from the steps' seconds and {steps done: accuracy}.

    While the held-out prompts are answered the next batch is generated too, and no step's clock runs: the step after
    an evaluation counts for no less than the median step.
    """
    usual = statistics.median(seconds) if seconds else 0.0
    counted = [max(s, usual) if number in accuracy else s for number, s in enumerate(seconds)]
    return [(sum(counted[:done]), accuracy[done]) for done in sorted(accuracy)]


def measured(part: Part, skip_first: int, skip_last: int) -> list[Step]:
    """The steps of a run that count; raises ValueError where none is left."""
    steps = part.steps[skip_first : len(part.steps) - skip_last]
    if not steps:
        raise ValueError(
            f"{part.trainer}: of {len(part.steps)} steps the first {skip_first} and the last {skip_last} are not "
            "measured. Give --steps more."
        )
    return steps


def rows_of(parts: Sequence[Part], skips: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """A row per trainer; the ratio to TRL's tokens a second, if it ran.

    A run's tokens a second are all tokens over all seconds of its measured steps, and a row has the median over its runs:
    where generation and training take turns in making each other wait, no single step is typical.
    `skips`: {trainer: (steps at the start, steps at the end) that are not measured}.
    """
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(part.trainer for part in parts):
        mine = [part for part in parts if part.trainer == name]
        windows = [measured(part, *skips[name]) for part in mine]
        steps = [step for window in windows for step in window]
        seconds = sorted(step.seconds for step in steps)
        phases = {key: statistics.median(step.phases[key] for step in steps) for key in steps[0].phases}
        rows.append(
            {
                "trainer": name,
                "step_s": statistics.median(statistics.fmean(step.seconds for step in window) for window in windows),
                "step_s_min": seconds[0],
                "step_s_max": seconds[-1],
                "num_steps": len(steps),
                "tokens_per_step": statistics.fmean(step.tokens for step in steps),
                "trained_tok_per_s": statistics.median(
                    sum(step.tokens for step in window) / sum(step.seconds for step in window) for window in windows
                ),
                "peak_mb": max(part.peak_mb for part in mine),
                "accuracy": max((part.evals for part in mine), key=len),
                "phases": phases,
                "steps": [[asdict(step) for step in part.steps] for part in mine],
            }
        )
    base = next((row["trained_tok_per_s"] for row in rows if row["trainer"] == "trl"), None)
    for row in rows:
        row["times_trl"] = row["trained_tok_per_s"] / base if base else None
        row["target"] = TARGETS.get(row["trainer"])
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as text."""
    heads = (("s/step", 8), ("least", 8), ("most", 8), ("tok/s", 8), ("x TRL", 7), ("wanted", 8), ("peak MB", 9))
    print("trainer     " + "".join(f"{name:>{width}}" for name, width in heads) + "  accuracy")
    for row in rows:
        times = f"{row['times_trl']:.2f}" if row["times_trl"] else "-"
        wanted = f"{row['target']:.1f}" if row["target"] else "-"
        accuracy = ", ".join(f"{value:.2f} at {wall_s:.0f} s" for wall_s, value in row["accuracy"])
        print(
            f"{row['trainer']:12}{row['step_s']:8.2f}{row['step_s_min']:8.2f}{row['step_s_max']:8.2f}"
            f"{row['trained_tok_per_s']:8.0f}{times:>7}{wanted:>8}{row['peak_mb']:9.0f}  {accuracy}",
            flush=True,
        )
