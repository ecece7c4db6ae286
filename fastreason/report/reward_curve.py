"""Draws the reward curve of a run, `reward.png`, from its `metrics.jsonl` and `summary.json`.

Uses matplotlib's objects and its Agg canvas directly: no display is needed and no global pyplot state is touched.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastreason.errors import DataError
from fastreason.metrics import read_metrics, read_summary

CURVE_FILE = "reward.png"
EVAL = "eval/accuracy"
SMOOTHING = 0.1  # the running mean looks back over this share of the run, but over 3 to 20 steps
FEW_STEPS = 60  # up to here every step gets a dot of its own

REWARD, ACCURACY, LENGTH, ENTROPY, INK = "#1f6fb4", "#c8511b", "#4a7d3a", "#8a5aa8", "#333333"


def draw_reward_curve(run_dir: str | Path) -> Path:
    """Write `reward.png` into the run folder and return its path.

    Above: mean reward per step, its running mean, and held-out accuracy with standard errors where the run was
    evaluated. Below: response length and entropy. Raises `DataError` when no step with a reward was logged.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir)
    steps, rewards = column(rows, "reward/mean")
    if not steps:
        raise DataError(f"{run_dir} has no reward/mean in metrics.jsonl yet: let the run finish a step first.")
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    figure.suptitle(f"{run_dir.resolve().name}: reward by step", x=0.02, ha="left", fontsize=13, color=INK)
    _draw_reward(above, steps, rewards)
    _draw_evaluations(above, evaluations(rows, read_summary(run_dir), last_step=steps[-1]))
    above.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9)
    _draw_length_and_entropy(below, rows)
    below.set_xlabel("step")
    margin = max(0.5, 0.02 * steps[-1])
    below.set_xlim(-margin, steps[-1] + margin)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    path = run_dir / CURVE_FILE
    canvas.print_png(str(path))
    return path


def column(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the rows that lack it or where it was not finite."""
    pairs = [(int(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value with the `window - 1` before it; the first ones have fewer to look back on."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def evaluations(
    rows: Sequence[dict[str, Any]], summary: dict[str, Any], last_step: int
) -> list[tuple[int, float, float]]:
    """Held-out (step, accuracy, standard error), oldest first.

    The summary's `evals` has `before` and `after`; what came between, and a run that is not over, is in the log.
    """
    results = [(int(row["step"]), row[EVAL], row.get("eval/standard_error")) for row in rows if EVAL in row]
    for name, step in (("before", 0), ("after", last_step)):
        if result := (summary.get("evals") or {}).get(name):
            results.append((step, result["accuracy"], result["standard_error"]))
    found = {step: (float(accuracy), float(error or 0.0)) for step, accuracy, error in results if accuracy is not None}
    return [(step, *found[step]) for step in sorted(found)]


def _draw_reward(axes: Axes, steps: list[int], rewards: list[float]) -> None:
    window = min(20, max(3, round(len(steps) * SMOOTHING)))
    style: dict[str, Any] = {"marker": "." if len(steps) <= FEW_STEPS else "", "markersize": 6, "linewidth": 1}
    axes.plot(steps, rewards, color=REWARD, alpha=0.4, label="mean reward", **style)
    label = f"mean of the last {window} steps"
    axes.plot(steps, running_mean(rewards, window), color=REWARD, linewidth=2.2, label=label)
    axes.set_ylabel("reward, accuracy", color=INK)
    quiet(axes)


def _draw_evaluations(axes: Axes, points: list[tuple[int, float, float]]) -> None:
    if not points:
        return
    steps, values, errors = zip(*points, strict=True)
    style: dict[str, Any] = {"fmt": "D", "color": ACCURACY, "markersize": 5.5, "capsize": 4, "zorder": 5}
    axes.errorbar(steps, values, yerr=errors, label="held-out accuracy ± standard error", **style)
    ends = sorted({points[0], points[-1]}, key=lambda point: point[1])
    for index, (step, accuracy, _) in enumerate(ends):
        axes.axhline(accuracy, color=ACCURACY, linewidth=0.9, linestyle=(0, (4, 4)), alpha=0.7)
        # In the right margin, where no curve can run through it; away from the other one, should they be close.
        side = "bottom" if index == len(ends) - 1 else "top"
        note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": ACCURACY, "va": side}
        text = f"{accuracy:.3f}\nstep {step}"
        axes.annotate(text, (1.0, accuracy), xytext=(5, 0), xycoords=("axes fraction", "data"), **note)


def _draw_length_and_entropy(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _draw_small(axes, column(rows, "rollout/response_tokens_mean"), LENGTH, "length (tokens)")
    quiet(axes)
    right = axes.twinx()
    _draw_small(right, column(rows, "loss/entropy"), ENTROPY, "entropy (nats)")
    for side in ("top", "left", "bottom"):
        right.spines[side].set_visible(False)


def _draw_small(axes: Axes, series: tuple[list[int], list[float]], color: str, label: str) -> None:
    axes.plot(*series, color=color, linewidth=1.6, marker="." if len(series[0]) <= FEW_STEPS else "", markersize=5)
    axes.set_ylabel(label, color=color)
    axes.tick_params(axis="y", colors=color)


def quiet(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """No frame above and at the right, and a pale grid behind everything."""
    axes.grid(axis=grid, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
