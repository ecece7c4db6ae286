"""The panels of a run's picture: reward against steps, tokens and time, where a step's time went, staleness.

Each draws rows of `metrics.jsonl` into given axes; none reads a file. One colour per phase, the same in every panel.
"""

import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fastreason.report.reward_curve import ACCURACY, FEW_STEPS, INK, REWARD, quiet, running_mean

MOST_BARS = 40
CUT = 3.0  # a bar is cut off above this many times the median bar: a first step that compiles would flatten all others

Row = dict[str, Any]

PHASES = {
    "wait": "#c3c7cd",
    "train": "#2f6db3",
    "publish": "#f0a54a",
    "pause": "#c0392b",
    "generate": "#4f9d69",
    "grade": "#8a5aa8",
}
LABELS = {"wait": "wait for groups", "pause": "publish while generation pauses"}
STALENESS = ("#bfd7ea", "#7fb0d8", "#4283b8", "#1f5a8f", "#123a5f", "#0a2138")


@dataclass(frozen=True)
class Scale:
    """An x axis: its label and a position for every step, step 0 included."""

    label: str
    at: dict[int, float]


def step_scale(rows: Sequence[Row]) -> Scale:
    return Scale("step", {0: 0.0, **{int(row["step"]): float(row["step"]) for row in rows}})


def token_scale(rows: Sequence[Row]) -> Scale:
    """Tokens trained up to a step, prompts included."""
    sums = list(itertools.accumulate(float(row.get("train/tokens") or 0.0) for row in rows))
    unit, name = next(
        (u, n)
        for u, n in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (1.0, ""))
        if sums[-1] >= u or u == 1
    )
    return Scale(
        f"{name}tokens trained", {0: 0.0, **{int(r["step"]): s / unit for r, s in zip(rows, sums, strict=True)}}
    )


def time_scale(rows: Sequence[Row]) -> Scale:
    """Time in steps up to a step: evaluations, saving and the start are not in it."""
    sums = list(itertools.accumulate(float(row.get("time/step_s") or 0.0) for row in rows))
    unit, name = next(
        (u, n) for u, n in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")) if sums[-1] >= 3 * u or u == 1
    )
    return Scale(f"{name} of training", {0: 0.0, **{int(r["step"]): s / unit for r, s in zip(rows, sums, strict=True)}})


def draw_reward(axes: Axes, scale: Scale, rows: Sequence[Row], evals: Sequence[tuple[int, float, float]]) -> None:
    """Mean reward, its running mean and held-out accuracy with standard errors, against `scale`."""
    points = [(int(row["step"]), float(row["reward/mean"])) for row in rows if row.get("reward/mean") is not None]
    x, rewards = [scale.at[step] for step, _ in points], [reward for _, reward in points]
    window = min(20, max(3, len(x) // 10))
    marker = "." if len(x) <= FEW_STEPS else ""
    axes.plot(x, rewards, color=REWARD, alpha=0.4, linewidth=1, marker=marker, label="mean reward")
    if len(x) > window:
        axes.plot(x, running_mean(rewards, window), color=REWARD, linewidth=2.2, label=f"mean of {window} steps")
    if known := [(scale.at[step], accuracy, error) for step, accuracy, error in evals if step in scale.at]:
        positions, values, errors = zip(*known, strict=True)
        style: dict[str, Any] = {"fmt": "D", "markersize": 5.5, "capsize": 4, "zorder": 5}
        axes.errorbar(
            positions, values, yerr=errors, color=ACCURACY, label="held-out accuracy ± standard error", **style
        )
    axes.set_xlabel(scale.label)
    if scale.label == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.03 * max(scale.at.values()), 1.03 * max(scale.at.values()))
    quiet(axes)


# Of a run on written responses: panels of one or two curves, each with the key that it shows and its colour.
OFFLINE_PANELS = (
    ("loss", (("loss", "loss/policy", REWARD),)),
    (
        "log-probability per token, nats",
        (("chosen", "logp/chosen", REWARD), ("rejected", "logp/rejected", ACCURACY)),
    ),
    ("share, nats", (("accuracy", "pairs/accuracy", REWARD), ("margin", "pairs/margin", ACCURACY))),
    ("norm of the gradient", (("gradient", "train/grad_norm", REWARD),)),
)


def draw_curves(
    axes: Axes, scale: Scale, rows: Sequence[Row], label: str, curves: Sequence[tuple[str, str, str]]
) -> None:
    """Curves of keys of the rows against `scale`; a key that no row has is left out."""
    for name, key, color in curves:
        points = [(scale.at[int(row["step"])], float(row[key])) for row in rows if row.get(key) is not None]
        if not points:
            continue
        marker = "." if len(points) <= FEW_STEPS else ""
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.6, marker=marker, label=name)
    axes.set_xlabel(scale.label)
    axes.set_ylabel(label, color=INK)
    quiet(axes)


@dataclass(frozen=True)
class Bar:
    """Consecutive steps drawn as one bar, as the means over them."""

    steps: range
    rows: Sequence[Row]

    def mean(self, key: str) -> float:
        return statistics.fmean(float(row.get(key) or 0.0) for row in self.rows)

    @property
    def middle(self) -> float:
        return (self.steps[0] + self.steps[-1]) / 2


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """At most `MOST_BARS` bars of equally many steps (the last one may have fewer)."""
    size = -(-len(rows) // MOST_BARS)
    pieces = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [Bar(range(int(piece[0]["step"]), int(piece[-1]["step"]) + 1), piece) for piece in pieces]


def draw_phases(axes: Axes, bars: Sequence[Bar]) -> None:
    """Two bars a step: what the trainer's time went into, and beside it how long generation and grading were at work.

    Where the sum of both is higher than the trainer's bar, they overlapped.
    """
    width = 0.42 * len(bars[0].steps)
    stacks = [_stack(bar) for bar in bars]
    for side, names in ((-0.5, ("wait", "train", "publish", "pause")), (0.5, ("generate", "grade"))):
        bottoms = [0.0] * len(bars)
        for name in names:
            heights = [stack[name] for stack in stacks]
            x = [bar.middle + side * width for bar in bars]
            axes.bar(x, heights, width * 0.94, bottom=bottoms, color=PHASES[name], label=LABELS.get(name, name))
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    totals = [max(sum(s[n] for n in ("wait", "train", "publish", "pause")), s["generate"] + s["grade"]) for s in stacks]
    limit = CUT * statistics.median(totals)
    if limit and max(totals) > limit:
        shown = max(total for total in totals if total <= limit)
        axes.set_ylim(0, shown * 1.15)
        for bar, total in zip(bars, totals, strict=True):
            if total > limit:
                note: dict[str, Any] = {"ha": "left", "va": "top", "fontsize": 9, "color": INK}
                axes.annotate(f"{total:.3g} s", (bar.middle + width, shown * 1.12), **note)
    per = "" if len(bars[0].steps) == 1 else f" (mean of {len(bars[0].steps)} steps a bar)"
    axes.set_xlabel(f"step{per}")
    axes.set_ylabel("seconds a step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    quiet(axes)


def _stack(bar: Bar) -> dict[str, float]:
    seconds = {name: bar.mean(f"time/{name}_s") for name in PHASES}
    seconds["pause"] = min(seconds["pause"], seconds["publish"])
    seconds["publish"] -= seconds["pause"]
    return seconds


def staleness_shares(rows: Sequence[Row]) -> list[int]:
    """Which k the metrics have a share of groups for."""
    keys = {key for row in rows for key in row}
    return sorted(int(found[1]) for key in keys if (found := re.fullmatch(r"staleness/share_(\d+)", key)))


def draw_staleness(axes: Axes, bars: Sequence[Bar], rows: Sequence[Row]) -> None:
    """The share of groups by how many versions their oldest token was behind, stacked by step."""
    bottoms = [0.0] * len(bars)
    for k in staleness_shares(rows):
        heights = [bar.mean(f"staleness/share_{k}") for bar in bars]
        color = STALENESS[min(k, len(STALENESS) - 1)]
        mean = statistics.fmean(float(row.get(f"staleness/share_{k}") or 0.0) for row in rows)
        label = f"{k}: {mean:.0%}"
        width = 0.9 * len(bars[0].steps)
        axes.bar([bar.middle for bar in bars], heights, width, bottom=bottoms, color=color, label=label)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    quiet(axes)
