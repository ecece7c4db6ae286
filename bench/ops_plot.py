"""Draws the figures of bench/ops.py: time and memory in grouped bars, the measured error on each bar.

It owns the picture. It refuses to measure, and to draw a speed that the table did not print. Also a command:
`python bench/ops_plot.py bench/results/cpu.json picture.png`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MAX_GROUPS = 8


def groups_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Forward-and-backward rows by case, those cases first that compare the most implementations."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["pass"] == "fwd_bwd":
            groups.setdefault(row["case"], []).append(row)
    compared = {case: found for case, found in groups.items() if len({row["impl"] for row in found}) > 1}
    ranked = sorted(compared or groups, key=lambda case: -len(groups[case]))[:MAX_GROUPS]
    return {case: groups[case] for case in groups if case in ranked}


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes the picture of a document that bench/ops.py wrote; raises SystemExit without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = groups_of(document["rows"])
    if not groups:
        raise SystemExit("--plot: no forward-and-backward figures to draw")
    labels = list(dict.fromkeys(_label(row) for rows in groups.values() for row in rows))
    colours = {label: pyplot.get_cmap("tab20")(i % 20) for i, label in enumerate(labels)}
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 2 + 0.24 * sum(map(len, groups.values()))), sharey=True)
    ticks, names, position = [], [], 0.0
    for case, rows in groups.items():
        start = position
        for row in rows:
            for axis, key, unit in ((axes[0], "median_ms", "ms"), (axes[1], "extra_mb", "MB")):
                value = row[key]
                axis.barh(position, value or 0, 0.9, color=colours[_label(row)])
                note = f" {value:.0f} {unit}" if value is not None else " not measured"
                if key == "median_ms":
                    note = (
                        f"{note}, error {row['error']:.0e}"
                        if row["error_ok"]
                        else f" error {row['error']:.0e}: refused"
                    )
                axis.annotate(note, (value or 0, position), va="center", fontsize=6)
            position += 1
        ticks.append((start + position - 1) / 2)
        names.append(case.replace("  ", "\n"))
        position += 1
    axes[0].set_yticks(ticks, names, fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set_title("forward + backward, median ms (error against float64)", fontsize=9)
    axes[1].set_title("extra memory, gradients included, MB", fontsize=9)
    for axis in axes:
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[label]) for label in labels]
    figure.legend(handles, labels, loc="lower center", ncols=min(6, len(labels)), fontsize=7)
    head = document["head"]
    figure.suptitle(f"{head['device_name']}, {head['threads']} CPU threads, torch {head['torch']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label(row: dict[str, Any]) -> str:
    return f"{row['impl']} {row['variant']}".strip()


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
