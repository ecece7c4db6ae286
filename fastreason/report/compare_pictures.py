"""The pictures of a comparison: one function a picture, each draws into a figure of its own and reads no file.

One colour a model, the same in every picture, the base first and grey. A picture that has nothing to show is None.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

from fastreason.report.analysis import (
    Habits,
    bin_changes,
    by_bin,
    habits_by_difficulty,
    row_shares,
    success_bins,
    transitions,
)
from fastreason.report.comparison import Comparison, Evaluation
from fastreason.report.reward_curve import INK, quiet

COLORS = ("#6b7280", "#1f6fb4", "#c8511b", "#4a7d3a", "#8a5aa8", "#b08900", "#0f8b8d", "#a23b72")
BINS_OF_HISTOGRAM = 30
WIDTH, HEIGHT = 8.0, 4.4  # inches


def color_of(place: int) -> str:
    return COLORS[place % len(COLORS)]


def pass_at_k_picture(comparison: Comparison) -> Figure:
    """Unbiased pass@k against k with 95 % bootstrap bands over problems, and maj@k dashed."""
    figure, axes = _figure(f"{comparison.title}: pass@k of {comparison.n} responses (dashed: maj@k)")
    for place, evaluation in enumerate(comparison.evaluations):
        scores, color = evaluation.scores, color_of(place)
        ks = sorted(scores.pass_at_k)
        low, high = zip(*(scores.pass_at_k_interval[k] for k in ks), strict=True)
        marker = "o" if len(ks) < 12 else ""
        axes.plot(
            ks, [scores.pass_at_k[k] for k in ks], color=color, marker=marker, markersize=4, label=evaluation.label
        )
        axes.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(ks, [scores.maj_at_k[k] for k in ks], color=color, linestyle=(0, (4, 3)), linewidth=1.1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ks)
    axes.set_xlabel("k")
    _share_axis(axes, "share of problems")
    _legend(axes)
    return figure


def bins_picture(comparison: Comparison) -> Figure | None:
    """Mean change of accuracy by the base's success count, a group of bars a bin, with standard errors over problems."""
    if not comparison.others:
        return None
    figure, axes = _figure(
        f"{comparison.title}: mean change of accuracy by the base's right responses of {comparison.n}"
    )
    width = 0.8 / len(comparison.others)
    for place, other in enumerate(comparison.others):
        changes = bin_changes(comparison.counts(comparison.base), comparison.counts(other), comparison.n)
        x = [number + (place - (len(comparison.others) - 1) / 2) * width for number in range(len(changes))]
        heights = [100 * (change.change or 0.0) for change in changes]
        errors = [100 * (change.error or 0.0) for change in changes]
        style: dict[str, Any] = {"capsize": 3, "ecolor": INK, "error_kw": {"linewidth": 0.9}}
        axes.bar(x, heights, width * 0.92, yerr=errors, color=color_of(place + 1), label=other.label, **style)
    axes.axhline(0, color=INK, linewidth=0.8)
    names = [f"{change.bin.label}\n({change.num_problems})" for change in changes]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("right responses of the base (number of problems)")
    axes.set_ylabel("change, percentage points", color=INK)
    _legend(axes)
    return figure


def transitions_picture(comparison: Comparison) -> Figure | None:
    """A heat map for each other model: from the base's bin (rows) to its own (columns), percent of the row and count."""
    if not comparison.others:
        return None
    labels = [one.label for one in success_bins(comparison.n)]
    size = 1.4 + 0.62 * len(labels)
    num = len(comparison.others)
    figure = Figure(figsize=(max(size, 5.0) * num, max(size, 4.2)), dpi=120, layout="constrained")
    for place, other in enumerate(comparison.others):
        axes = figure.add_subplot(1, num, place + 1)
        counts_BB = transitions(comparison.counts(comparison.base), comparison.counts(other), comparison.n)
        shares_BB = row_shares(counts_BB)
        axes.imshow(shares_BB, cmap="Blues", vmin=0, vmax=1, aspect="equal")
        for row, column in itertools.product(range(len(labels)), repeat=2):
            if counts_BB[row, column]:
                ink = "white" if shares_BB[row, column] > 0.55 else INK
                text = f"{shares_BB[row, column]:.0%}\n{counts_BB[row, column]}"
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)
        axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=45 if len(labels) > 6 else 0)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_xlabel(f"right responses of {other.label}")
        axes.set_ylabel(f"right responses of {comparison.base.label}", color=INK)
        axes.set_title(f"{comparison.title}: where problems went", loc="left", fontsize=11, color=INK)
    return figure


def lengths_picture(comparison: Comparison) -> Figure | None:
    """Histograms of response lengths, right responses above and wrong ones below."""
    rows = {verdict: [_lengths(e, verdict) for e in comparison.evaluations] for verdict in (True, False)}
    top = max((length for series in rows.values() for each in series for length in each), default=0)
    if not top:
        return None
    figure = Figure(figsize=(WIDTH, 5.2), dpi=120, layout="constrained")
    edges = np.linspace(0, top, min(BINS_OF_HISTOGRAM, top) + 1)
    for panel, (verdict, series) in enumerate(rows.items()):
        axes = figure.add_subplot(2, 1, panel + 1)
        for place, (evaluation, each) in enumerate(zip(comparison.evaluations, series, strict=True)):
            _histogram(axes, each, edges, place, f"{evaluation.label} ({len(each)})")
        title = f"{comparison.title}: length of {'right' if verdict else 'wrong'} responses"
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_ylabel("responses", color=INK)
        _legend(axes, inside=True)
    axes.set_xlabel("tokens")
    return figure


def answer_entropy_picture(comparison: Comparison) -> Figure:
    """The entropy of the answers to a problem: its mean by the base's bins, and its histogram over problems."""
    figure = Figure(figsize=(WIDTH * 1.3, HEIGHT), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = success_bins(comparison.n)
    top = max(0.1, *(max(e.entropies.values()) for e in comparison.evaluations))
    for place, evaluation in enumerate(comparison.evaluations):
        means = by_bin(evaluation.entropies, comparison.difficulty, len(bins))
        known = [(number, mean) for number, mean in enumerate(means) if mean is not None]
        left.plot(*zip(*known, strict=True), color=color_of(place), marker="o", markersize=4, label=evaluation.label)
        _histogram(right, list(evaluation.entropies.values()), np.linspace(0, top, 21), place, evaluation.label)
    left.set_xticks(range(len(bins)), [one.label for one in bins])
    left.set_xlabel(f"right responses of the base, of {comparison.n}")
    left.set_ylabel("entropy of the answers, nats", color=INK)
    left.set_ylim(bottom=0)
    left.set_title(f"{comparison.title}: answer entropy by difficulty", loc="left", fontsize=11, color=INK)
    right.set_xlabel("entropy of the answers to a problem, nats")
    right.set_ylabel("problems", color=INK)
    quiet(left)
    _legend(left, inside=True)
    return figure


def habits_picture(comparison: Comparison) -> Figure:
    """Length, and reflection words, by the base's bins; right responses full, wrong ones dashed."""
    figure = Figure(figsize=(WIDTH * 1.3, HEIGHT), dpi=120, layout="constrained")
    bins = success_bins(comparison.n)
    panels: tuple[tuple[str, Callable[[Habits], float | None]], ...] = (
        ("mean length, tokens", lambda one: one.tokens),
        ("reflection words a response", lambda one: one.reflections),
    )
    found = [habits_by_difficulty(e.by_problem, comparison.difficulty, len(bins)) for e in comparison.evaluations]
    for panel, (label, figure_of) in enumerate(panels):
        axes = figure.add_subplot(1, 2, panel + 1)
        for (place, evaluation), verdict in itertools.product(enumerate(comparison.evaluations), (True, False)):
            values = [figure_of(by[verdict]) for by in found[place]]
            points = [(number, value) for number, value in enumerate(values) if value is not None]
            if points:
                style: dict[str, Any] = {
                    "linestyle": "-" if verdict else (0, (4, 3)),
                    "marker": "o" if verdict else "x",
                }
                name = f"{evaluation.label}, {'right' if verdict else 'wrong'}"
                axes.plot(*zip(*points, strict=True), color=color_of(place), markersize=4, label=name, **style)
        axes.set_xticks(range(len(bins)), [one.label for one in bins])
        axes.set_xlabel(f"right responses of the base, of {comparison.n}")
        axes.set_ylabel(label, color=INK)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{comparison.title}: {label}", loc="left", fontsize=11, color=INK)
        quiet(axes)
    _legend(figure.axes[0], inside=True)
    return figure


PICTURES: dict[str, Callable[[Comparison], Figure | None]] = {
    "pass_at_k": pass_at_k_picture,
    "bins": bins_picture,
    "transitions": transitions_picture,
    "answer_entropy": answer_entropy_picture,
    "habits": habits_picture,
    "lengths": lengths_picture,
}
CAPTIONS = {
    "pass_at_k": "pass@k, and maj@k dashed; bands are 95 % bootstrap intervals over problems",
    "bins": "mean change of accuracy by difficulty, with standard errors over problems",
    "transitions": "where the problems of each bin went",
    "answer_entropy": "how much the answers to one problem differ; 0 where all agree",
    "habits": "length and reflection words by difficulty and correctness",
    "lengths": "lengths of responses",
}


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    quiet(axes)
    return figure, axes


def _legend(axes: Axes, inside: bool = False) -> None:
    place: dict[str, Any] = {"loc": "best"} if inside else {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes.legend(frameon=False, fontsize=9, **place)


def _share_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(label, color=INK)


def _histogram(axes: Axes, values: Sequence[float], edges: Any, place: int, label: str) -> None:
    style: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.25, "color": color_of(place)}
    axes.hist(values, bins=edges, **style)
    axes.hist(values, bins=edges, histtype="step", color=color_of(place), linewidth=1.4, label=label)
    quiet(axes)


def _lengths(evaluation: Evaluation, verdict: bool) -> list[int]:
    return [row.num_tokens for row in evaluation.rows if row.correct is verdict]
