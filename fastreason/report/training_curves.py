"""Curves of several training runs in one picture: runs that differ only in their seed are one line with its spread.

Reads each run's `config.yaml` and `metrics.jsonl`; a run that is still going is fine.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastreason.errors import ConfigError, DataError
from fastreason.metrics import read_metrics
from fastreason.report.compare_pictures import color_of
from fastreason.report.reward_curve import INK, column, quiet

# What to draw of a run, where it logged it: key of metrics.jsonl and the axis' label.
PANELS = {
    "reward/mean": "mean reward",
    "rollout/response_tokens_mean": "response length, tokens",
    "loss/entropy": "token entropy, nats",
    "kl/reference": "KL to the initial model, nats",
    "kl/teacher": "KL to the teacher, nats",
    "loss/kl": "KL in the loss",
    "loss/policy": "loss",
}
MAX_PANELS = 6
# What makes two runs of one experiment different without making them another experiment.
_OF_ONE_RUN = ("run", "log", "checkpoint")


@dataclass(frozen=True)
class RunGroup:
    """Runs of one experiment with different seeds, and their logged rows."""

    label: str
    runs: list[list[dict[str, Any]]]

    def series(self, key: str) -> list[tuple[int, float, float, int]]:
        """(step, mean over the runs that have it, sample standard deviation, number of runs), in order of steps.

        The deviation is 0 where one run alone has the step.
        """
        values: dict[int, list[float]] = {}
        for rows in self.runs:
            for step, value in zip(*column(rows, key), strict=True):
                values.setdefault(step, []).append(value)
        return [
            (step, statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else 0.0, len(each))
            for step, each in sorted(values.items())
        ]


def read_run_groups(run_dirs: Sequence[Path]) -> list[RunGroup]:
    """Read runs and group those whose configs differ in section `run` alone (name, seed).

    Raises ConfigError for a folder without a run, DataError for one without a step.
    """
    groups: dict[str, tuple[str, list[list[dict[str, Any]]]]] = {}
    for run_dir in dict.fromkeys(path.resolve() for path in run_dirs):
        if not (run_dir / "config.yaml").is_file():
            raise ConfigError(f"--runs {run_dir}: no run there (no config.yaml). Give folders of runs, e.g. runs/try.")
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        rows = read_metrics(run_dir)
        if not rows:
            raise DataError(f"--runs {run_dir}: no step is done yet. Let the run finish one first.")
        groups.setdefault(_experiment(config), (run_dir.name, []))[1].append(rows)
    return [
        RunGroup(name if len(runs) == 1 else f"{name} and its seeds ({len(runs)} runs)", runs)
        for name, runs in groups.values()
    ]


def training_picture(groups: Sequence[RunGroup]) -> Figure | None:
    """A panel for each figure that some run logged: means over seeds, and bands of one standard deviation."""
    shown = [key for key in PANELS if any(group.series(key) for group in groups)][:MAX_PANELS]
    if not shown:
        return None
    num_rows = -(-len(shown) // 2)
    figure = Figure(figsize=(11, 3.1 * num_rows), dpi=120, layout="constrained")
    for place, key in enumerate(shown):
        axes = figure.add_subplot(num_rows, min(2, len(shown)), place + 1)
        for number, group in enumerate(groups):
            if not (series := group.series(key)):
                continue
            steps, means, spreads, _ = (list(each) for each in zip(*series, strict=True))
            color = color_of(number + 1)
            axes.plot(steps, means, color=color, linewidth=1.7, label=group.label)
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_ylabel(PANELS[key], color=INK)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        quiet(axes)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def _experiment(config: Mapping[str, Any]) -> str:
    """The config without what tells runs of one experiment apart, as text to compare."""
    kept = {section: values for section, values in config.items() if section not in _OF_ONE_RUN}
    return yaml.safe_dump(kept, sort_keys=True)
