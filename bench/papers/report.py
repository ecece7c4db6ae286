"""Draws the miniatures' curves and prints what showed: `python bench/papers/report.py DIR [--json FILE]`.

It owns the picture (curves.png), the Markdown tables (report.md) and findings.json. It refuses to run and to judge.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arms import ARMS, TEACHER
from curves import Curve, accuracy, last_quarter, pass_at_k, read_minutes, smoothed
from findings import FINDINGS, Answer, K, answer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from store import Store

from fastreason.metrics import write_atomically

PANELS = (("reward", "mean reward"), ("entropy", "entropy, nats"), ("kl", "KL to the initial model, nats a token"))
COLOURS = {arm: f"C{number}" for number, arm in enumerate(ARMS)}


def write_report(store: Store, findings: Sequence[str], json_path: Path | None = None) -> str:
    """Write report.md, findings.json and curves.png for what is finished; returns the Markdown."""
    curves = store.curves()
    answers = [answer(letter, curves) for letter in findings]
    minutes = {arm: [read_minutes(store.path(run)) for run in store.finished() if run.arm == arm] for arm in curves}
    text = f"{findings_table(answers)}\n\n{arms_table(curves, minutes)}"
    write_atomically(store.folder / "report.md", text + "\n")
    records = json.dumps([_plain(each.record()) for each in answers], indent=1, allow_nan=False)
    for path in (store.folder / "findings.json", *([json_path] if json_path else [])):
        write_atomically(path, records + "\n")
    if curves:
        draw(curves, store.folder / "curves.png")
    return text


def findings_table(answers: Sequence[Answer]) -> str:
    """A row per finding: whether it showed, and each claim's mean ± spread over seeds, with the least that would matter."""
    lines = ["| finding | showed | figures: mean ± standard deviation over seeds (least that would matter) | seeds |"]
    lines.append("|---|---|---|---|")
    for each in answers:
        finding = FINDINGS[each.letter]
        figures = "; ".join(
            f"{claim.text} {number(claim.mean, sign=True)} ± {number(claim.spread)} ({claim.smallest:g}): {claim.verdict}"
            for claim in each.claims
        )
        seeds = ", ".join(map(str, each.seeds)) or "none"
        lines.append(f"| {each.letter}: {finding.statement} ({finding.paper}) | {each.showed} | {figures} | {seeds} |")
    return "\n".join(lines)


def arms_table(curves: Mapping[str, Mapping[int, Curve]], minutes: Mapping[str, Sequence[float]]) -> str:
    """A row per arm, mean ± standard deviation over its seeds; the last quarter of the steps for what has curves."""
    columns: tuple[tuple[str, Callable[[Curve], float]], ...] = (
        ("reward, first step", lambda c: c.reward[0]),
        ("reward", lambda c: last_quarter(c.reward)),
        ("entropy", lambda c: last_quarter(c.entropy)),
        ("KL", lambda c: last_quarter(c.kl)),
        ("accuracy before", lambda c: accuracy(c.before)),
        ("after", lambda c: accuracy(c.after)),
        (f"pass@{K} before", lambda c: pass_at_k(c.before, K)),
        ("after", lambda c: pass_at_k(c.after, K)),
    )
    heads = ["arm", "seeds", *(name for name, _ in columns), "minutes of training"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in (arm for arm in ARMS if arm in curves):
        cells = [mean_and_spread([value(curve) for curve in curves[arm].values()]) for _, value in columns]
        cells = [ARMS[arm].label, str(len(curves[arm])), *cells, mean_and_spread(minutes[arm], ".1f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_spread(values: Sequence[float], form: str = ".3f") -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):{form}}{spread}"


def number(value: float, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.3f}" if math.isfinite(value) else "-"


def draw(curves: Mapping[str, Mapping[int, Curve]], path: Path) -> None:
    """Reward, entropy and KL over steps, and reward over KL; a line is the mean over seeds, a band their range."""
    figure = Figure(figsize=(12, 8), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    for arm in (arm for arm in ARMS if arm in curves and arm != TEACHER):
        found = list(curves[arm].values())
        for axis, (name, _) in zip(axes, PANELS, strict=False):
            columns = [smoothed(getattr(curve, name)) for curve in found]
            _band(axis, arm, columns)
        reward = _over_seeds([smoothed(curve.reward) for curve in found])
        kl = _over_seeds([smoothed(curve.kl) for curve in found])
        if any(map(math.isfinite, (each[0] for each in kl))):
            axes[3].plot([k[0] for k in kl], [r[0] for r in reward], color=COLOURS[arm])
            low, high = [r[1] for r in reward], [r[2] for r in reward]
            axes[3].fill_between([k[0] for k in kl], low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
    for axis, (_, label) in zip(axes, PANELS, strict=False):
        axis.set(xlabel="step", ylabel=label)
    axes[3].set(xlabel=PANELS[2][1], ylabel=PANELS[0][1])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("A 0.4M Llama on sums; means over seeds of running means over 3 steps, and their range")
    canvas.print_png(str(path))


def _band(axis: Axes, arm: str, columns: Sequence[Sequence[float]]) -> None:
    points = _over_seeds(columns)
    if not any(math.isfinite(mean) for mean, _, _ in points):
        return
    steps = range(1, len(points) + 1)
    axis.plot(steps, [mean for mean, _, _ in points], color=COLOURS[arm], label=f"{ARMS[arm].label} ({len(columns)})")
    low, high = [low for _, low, _ in points], [high for _, _, high in points]
    axis.fill_between(steps, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)


def _over_seeds(columns: Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    """(mean, least, most) at each step that all seeds have."""
    return [(statistics.fmean(values), min(values), max(values)) for values in zip(*columns, strict=False)]


def _plain(value: Any) -> Any:
    """The same with null for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what run.py --out was given")
    parser.add_argument("--json", type=Path, help="file for the answers, besides DIR/findings.json")
    options = parser.parse_args()
    if not options.folder.is_dir():
        raise SystemExit(f"{options.folder}: no such folder. Give the one that run.py --out was given.")
    print(write_report(Store(options.folder), list(FINDINGS), options.json))


if __name__ == "__main__":
    main()
