"""Curves of several training runs in one picture: runs that differ only in their seed are one line with its spread.

Reads each run's `config.yaml`, `metrics.jsonl` and `summary.json`; a run that is still going is fine.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastreason.errors import ConfigError, DataError
from fastreason.evaluation.tables import Grid
from fastreason.metrics import read_metrics, read_summary
from fastreason.report.compare_pictures import color_of
from fastreason.report.reward_curve import EVAL, FEW_STEPS, INK, column, evaluations, quiet

# What to draw of a run, where it is known: key of metrics.jsonl and the axis' label.
PANELS = {
    "reward/mean": "mean reward",
    EVAL: "held-out accuracy",
    "rollout/response_tokens_mean": "response length, tokens",
    "loss/entropy": "token entropy, nats",
    "kl/reference": "KL to the initial model, nats",
    "kl/teacher": "KL to the teacher, nats",
    "loss/kl": "KL in the loss",
    "loss/policy": "loss",
}
# What makes two runs of one experiment different without making them another experiment.
_OF_ONE_RUN = ("run", "log", "checkpoint")


@dataclass(frozen=True)
class Run:
    """What one run has so far: for each key of PANELS its (step, value), oldest first."""

    last_step: int
    points: Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one experiment with different seeds."""

    label: str
    runs: list[Run]

    def series(self, key: str) -> list[tuple[int, float, float, int]]:
        """(step, mean over the runs that have it, sample standard deviation, number of runs), in order of steps.

        The deviation is 0 where one run alone has the step.
        """
        values: dict[int, list[float]] = {}
        for run in self.runs:
            for step, value in run.points[key]:
                values.setdefault(step, []).append(value)
        return [
            (step, statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else 0.0, len(each))
            for step, each in sorted(values.items())
        ]


def read_run_groups(run_dirs: Sequence[Path]) -> list[RunGroup]:
    """Read runs and group those whose configs differ in section `run` alone (name, seed).

    Raises ConfigError for a folder without a run, DataError for one without a step.
    """
    groups: dict[str, tuple[str, list[Run]]] = {}
    for run_dir in dict.fromkeys(path.resolve() for path in run_dirs):
        if not (run_dir / "config.yaml").is_file():
            raise ConfigError(f"--runs {run_dir}: no run there (no config.yaml). Give folders of runs, e.g. runs/try.")
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        groups.setdefault(_experiment(config), (run_dir.name, []))[1].append(read_run(run_dir))
    return [
        RunGroup(name if len(runs) == 1 else f"{name} and its seeds ({len(runs)} runs)", runs)
        for name, runs in groups.values()
    ]


def read_run(run_dir: Path) -> Run:
    """The curves of one run; raises DataError where no step is done yet."""
    rows = read_metrics(run_dir)
    if not rows:
        raise DataError(f"--runs {run_dir}: no step is done yet. Let the run finish one first.")
    last_step = max(int(row["step"]) for row in rows)
    points = {key: list(zip(*column(rows, key), strict=True)) for key in PANELS}
    # The one before the first step, and those of a run that logged none, are in the summary.
    points[EVAL] = [(step, accuracy) for step, accuracy, _ in evaluations(rows, read_summary(run_dir), last_step)]
    return Run(last_step, points)


def known_panels(groups: Sequence[RunGroup]) -> list[str]:
    """The keys of PANELS that some run has."""
    return [key for key in PANELS if any(group.series(key) for group in groups)]


def training_grid(groups: Sequence[RunGroup]) -> Grid:
    """The last figure of each panel: its mean and, of several runs, its deviation over seeds."""
    shown, rows = known_panels(groups), []
    for group in groups:
        cells = [_last(group.series(key)) for key in shown]
        rows.append([group.label, str(len(group.runs)), str(max(run.last_step for run in group.runs)), *cells])
    heads = ["runs", "number", "last step", *(PANELS[key] for key in shown)]
    return Grid("Training: at the last step that has the figure, mean and deviation over seeds", heads, rows)


def training_picture(groups: Sequence[RunGroup]) -> Figure | None:
    """A panel for each figure that some run has: means over seeds, and bands of one standard deviation."""
    shown = known_panels(groups)
    if not shown:
        return None
    num_columns = min(2, len(shown))
    num_rows = -(-len(shown) // num_columns)
    figure = Figure(figsize=(11, 3.1 * num_rows + 0.4), dpi=120, layout="constrained")
    lines: dict[int, Line2D] = {}
    for place, key in enumerate(shown):
        axes = figure.add_subplot(num_rows, num_columns, place + 1)
        for number, group in enumerate(groups):
            if not (series := group.series(key)):
                continue
            steps, means, spreads, _ = (list(each) for each in zip(*series, strict=True))
            color = color_of(number + 1)
            # A run has few evaluations, maybe one.
            style: dict[str, Any] = {"marker": "." if len(steps) <= FEW_STEPS else "", "markersize": 6}
            (lines[number],) = axes.plot(steps, means, color=color, linewidth=1.7, label=group.label, **style)
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_ylabel(PANELS[key], color=INK)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        quiet(axes)
    # No panel need have a line of every group.
    figure.legend(
        handles=[lines[number] for number in sorted(lines)],
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return figure


def _last(series: Sequence[tuple[int, float, float, int]]) -> str:
    """The last mean as a cell, of several runs with its deviation."""
    if not series:
        return "-"
    _, mean, spread, num = series[-1]
    digits = 4 if abs(mean) < 10 else 1
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if num > 1 else "")


def _experiment(config: Mapping[str, Any]) -> str:
    """The config without what tells runs of one experiment apart, as text to compare."""
    kept = {section: values for section, values in config.items() if section not in _OF_ONE_RUN}
    return yaml.safe_dump(kept, sort_keys=True)
