"""What a run has written, in one picture (`report.png`), a short table and a page: reward, staleness, where the time went.

Reads `metrics.jsonl`, `summary.json`, `ledger.jsonl` and the timeline of a run folder, of a run that is over or still going.
Talks to no process and changes nothing but its picture and page.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from fastreason.config import load_config
from fastreason.errors import ConfigError, DataError
from fastreason.ledger import LedgerAudit, audit_ledger, read_ledger
from fastreason.metrics import read_metrics, read_summary
from fastreason.report.panels import (
    OFFLINE_PANELS,
    Row,
    bars_of,
    draw_curves,
    draw_phases,
    draw_reward,
    draw_staleness,
    staleness_shares,
    step_scale,
    time_scale,
    token_scale,
)
from fastreason.report.reward_curve import INK, evaluations
from fastreason.report.run_page import write_run_page
from fastreason.report.timeline import Piece, draw_timeline, read_piece

REPORT_FILE = "report.png"
SMALLEST_SHARE = 0.1  # of the time: the shorter of generation and training, for an overlap to be told


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds: `rows` are the trained steps, `audit` is None where the run has no ledger."""

    run_dir: Path
    num_steps: int
    rows: list[Row]
    summary: dict[str, Any]
    evals: list[tuple[int, float, float]]
    audit: LedgerAudit | None
    piece: Piece | None


def report_run(run_dir: Path, out: Path | None = None, console: Console | None = None) -> Path:
    """Draw the picture of a run, write its page (`report.html`), print its table, and return the picture's path.

    Raises ConfigError where the folder is no run or `out` cannot be written, DataError where no step is done yet.
    """
    out = out or run_dir / REPORT_FILE
    record = read_run(run_dir)
    if out.suffix != ".png" or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: a PNG is written, into a folder that exists. Give FOLDER/NAME.png.")
    offline = "logp/chosen" in record.rows[-1]
    (draw_offline if offline else draw_run)(record, out)
    lines = (describe_offline if offline else describe_run)(record)
    page = write_run_page(run_dir, lines, record.rows, out)
    lines = [*lines, ("picture", str(out)), ("page", str(page))]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        (console or Console()).print(f"{label:<{width}}   {text}", markup=False, highlight=False, soft_wrap=True)
    return out


def read_run(run_dir: Path) -> RunRecord:
    """Read a run folder; raises ConfigError where it is none, DataError where no step is done yet."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: no run there (no config.yaml). Give the folder of a run, e.g. runs/quickstart.")
    logged = read_metrics(run_dir)
    rows = [row for row in logged if row.get("time/step_s") is not None]
    if not rows:
        raise DataError(f"{run_dir}: no step is done yet (metrics.jsonl has none). Let the run finish one first.")
    summary, events = read_summary(run_dir), read_ledger(run_dir)
    return RunRecord(
        run_dir=run_dir,
        num_steps=load_config(run_dir / "config.yaml").train.steps,
        rows=rows,
        summary=summary,
        evals=evaluations(logged, summary, last_step=int(rows[-1]["step"])),
        audit=audit_ledger(events, finished=bool(summary.get("finished"))) if events else None,
        piece=read_piece(run_dir),
    )


def draw_run(record: RunRecord, out: Path) -> None:
    """Write the picture: three panels of reward, where the time went, staleness, and a piece of the timeline if traced."""
    panels = [3.0, 3.2, 3.6] if record.piece else [3.0, 3.2]  # heights, inches
    between, above, below = 1.2, 1.25, 0.6
    height = sum(panels) + between * (len(panels) - 1) + above + below
    figure = Figure(figsize=(13, height), dpi=120)
    canvas = FigureCanvasAgg(figure)
    # Fixed margins: a constrained layout gives up on legends that stand above narrow axes.
    edges = {"left": 0.075, "right": 0.985, "top": 1 - above / height, "bottom": below / height}
    spaces = {"hspace": between * len(panels) / sum(panels), "wspace": 0.45}
    grid = figure.add_gridspec(len(panels), 6, height_ratios=panels, **edges, **spaces)
    steps = f"{record.rows[-1]['step']} of {record.num_steps} steps"
    figure.suptitle(
        f"{record.run_dir.resolve().name}: {steps}",
        x=0.02,
        y=1 - 0.15 / height,
        ha="left",
        va="top",
        fontsize=15,
        color=INK,
    )
    left: Axes | None = None
    for place, scale in enumerate((step_scale, token_scale, time_scale)):
        axes = figure.add_subplot(grid[0, 2 * place : 2 * place + 2], sharey=left)
        draw_reward(axes, scale(record.rows), record.rows, record.evals)
        axes.tick_params(labelleft=left is None)
        left = left or axes
    assert left is not None
    left.set_ylabel("reward, accuracy", color=INK)
    _legend(left, "Reward", num_columns=3)
    bars, shares = bars_of(record.rows), staleness_shares(record.rows)
    axes = figure.add_subplot(grid[1, :4] if shares else grid[1, :])
    draw_phases(axes, bars)
    _legend(
        axes, "A step's time: the trainer's (left bars), and what was at work beside it (right bars)", num_columns=6
    )
    if shares:
        axes = figure.add_subplot(grid[1, 4:])
        draw_staleness(axes, bars, record.rows)
        _legend(axes, "Share of the groups by versions behind", num_columns=4)
    if record.piece:
        axes = figure.add_subplot(grid[2, :])
        draw_timeline(axes, record.piece)
        _legend(axes, "A piece of the timeline, from the middle of the run", num_columns=8)
    canvas.print_png(str(out))


def draw_offline(record: RunRecord, out: Path) -> None:
    """Write the picture of a run on written responses: loss, log-probabilities, what becomes of pairs, the gradient."""
    last = record.rows[-1]
    panels = [panel for panel in OFFLINE_PANELS if any(key in last for _, key, _ in panel[1])]
    figure = Figure(figsize=(13, 7.5), dpi=120, layout="constrained")
    figure.suptitle(
        f"{record.run_dir.resolve().name}: {last['step']} of {record.num_steps} steps", fontsize=15, color=INK
    )
    for place, (label, curves) in enumerate(panels):
        axes = figure.add_subplot(2, 2, place + 1)
        draw_curves(axes, step_scale(record.rows), record.rows, label, curves)
        axes.legend(frameon=False, fontsize=9.5)
    FigureCanvasAgg(figure).print_png(str(out))


def describe_offline(record: RunRecord) -> list[tuple[str, str]]:
    """The lines of the table of a run on written responses."""
    rows, first, last = record.rows, record.rows[0], record.rows[-1]
    total = _sum(rows, "time/step_s")
    tokens = _sum(rows, "train/tokens")
    lines = [
        ("run", f"{record.run_dir}: {last['step']} of {record.num_steps} steps, epoch {last['train/epoch']:.2f}"),
        ("time", f"{total:.1f} s in {len(rows)} steps, {tokens / max(1e-9, total):,.0f} tokens a second"),
    ]
    shown = (
        ("loss", "loss/policy"),
        ("chosen", "logp/chosen"),
        ("rejected", "logp/rejected"),
        ("accuracy of pairs", "pairs/accuracy"),
        ("margin", "pairs/margin"),
    )
    for label, key in shown:
        if first.get(key) is not None and last.get(key) is not None:
            lines.append((label, f"{first[key]:.4f} at step {first['step']}, {last[key]:.4f} at step {last['step']}"))
    return lines


def _legend(axes: Axes, title: str, num_columns: int) -> None:
    """A title and below it the legend, both above the axes, where no curve can run through them."""
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0.1}
    look: dict[str, Any] = {"frameon": False, "fontsize": 9.5, "columnspacing": 1.2, "handlelength": 1.4}
    legend = axes.legend(**place, **look, ncols=num_columns)
    num_lines = -(-len(legend.get_texts()) // num_columns)
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=8 + 15 * num_lines)


def describe_run(record: RunRecord) -> list[tuple[str, str]]:
    """The lines of the table: label and text."""
    rows, summary = record.rows, record.summary
    state = (
        "finished" if summary.get("finished") else "stopped" if summary else "still running, or ended before its end"
    )
    total = _sum(rows, "time/step_s")
    wall = f", the whole run {summary['wall_s']:.1f} s" if summary.get("wall_s") else ""
    lines = [
        ("run", f"{record.run_dir}: {rows[-1]['step']} of {record.num_steps} steps ({state})"),
        ("time", f"{total:.1f} s in {len(rows)} steps, {total / len(rows):.2f} s a step{wall}"),
        (
            "the trainer's time",
            _shares(rows, total, ("wait", "train", "publish"))
            + f" (generation paused for {_sum(rows, 'time/pause_s') / max(1e-9, total):.1%})",
        ),
        ("at work beside it", _shares(rows, total, ("generate", "grade"))),
        ("overlap efficiency", describe_overlap(rows)),
        ("staleness", describe_staleness(rows)),
        (
            "reward",
            f"{rows[0].get('reward/mean') or 0:.3f} at step {rows[0]['step']}, "
            f"{rows[-1].get('reward/mean') or 0:.3f} at step {rows[-1]['step']}",
        ),
    ]
    if record.evals:
        text = ", ".join(
            f"{accuracy:.3f} (step {step})" for step, accuracy, _ in record.evals[:1] + record.evals[1:][-1:]
        )
        lines.append(("held-out accuracy", text))
    lines += _describe_faults(record)
    return lines


def _describe_faults(record: RunRecord) -> list[tuple[str, str]]:
    last = record.rows[-1]
    counts = {name: int(last.get(f"rollout/{name}_restarts") or 0) for name in ("engine", "producer")}
    for name, number in (record.summary.get("restarts") or {}).items():
        counts[name] = max(counts.get(name, 0), int(number))
    audit = record.audit
    dropped = audit.num_dropped if audit else int(last.get("rollout/dropped") or 0)
    lines = [
        ("restarts", ", ".join(f"{name} {number}" for name, number in counts.items())),
        ("dropped groups", str(dropped)),
    ]
    if audit is None:
        return [*lines, ("ledger", "none (no ledger.jsonl)")]
    parts = [f"{audit.num_issued} issued", f"{audit.num_trained} trained", f"{audit.num_dropped} dropped"]
    if not record.summary.get("finished"):
        parts.append(f"{len(audit.pending)} not trained yet")
    parts += [
        f"{len(audit.lost)} lost{_examples(audit.lost)}",
        f"{len(audit.twice)} trained twice{_examples(audit.twice)}",
    ]
    return [*lines, ("ledger", ", ".join(parts))]


def overlap_efficiency(rows: Sequence[Row]) -> float | None:
    """(g + t - T) / min(g, t), with the sums of generation, training and whole steps; None below two steps.

    1 where the shorter of the two is hidden altogether, 0 where nothing is. The first step has nothing to overlap with
    and is left out. An estimate: g and t were taken while both ran, and one may have slowed the other down.
    """
    g, t, total = (_sum(rows[1:], f"time/{name}_s") for name in ("generate", "train", "step"))
    return (g + t - total) / min(g, t) if min(g, t) > 0 else None


def describe_overlap(rows: Sequence[Row]) -> str:
    value = overlap_efficiency(rows)
    if value is None:
        return "not known before the second step of generation and training"
    g, t, total = (_sum(rows[1:], f"time/{name}_s") for name in ("generate", "train", "step"))
    if min(g, t) < SMALLEST_SHARE * total:
        # A ratio to next to nothing: every other second of the run would look like a loss.
        return f"not told: generate {g:.1f} s, train {t:.1f} s of {total:.1f} s, too little of one to hide"
    return f"{value:.2f} = (generate + train - step) / min(generate, train), an estimate from step {rows[1]['step']} on"


def describe_staleness(rows: Sequence[Row]) -> str:
    means = [float(row["rollout/staleness_mean"]) for row in rows if row.get("rollout/staleness_mean") is not None]
    if not means:
        return "not logged"
    largest = max(float(row.get("rollout/staleness_max") or 0.0) for row in rows)
    text = f"mean {statistics.fmean(means):.2f}, max {largest:.0f} version(s)"
    shares = [
        f"{statistics.fmean(float(row.get(f'staleness/share_{k}') or 0.0) for row in rows):.0%} are {k} behind"
        for k in staleness_shares(rows)
    ]
    return f"{text}: {', '.join(shares)}" if shares else text


def _sum(rows: Sequence[Row], key: str) -> float:
    return sum(float(row.get(key) or 0.0) for row in rows)


def _shares(rows: Sequence[Row], total: float, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_sum(rows, f'time/{name}_s') / max(1e-9, total):.0%}" for name in names)


def _examples(items: Sequence[Any], num: int = 3) -> str:
    if not items:
        return ""
    return f" ({', '.join(str(item) for item in items[:num])}{', ...' if len(items) > num else ''})"
