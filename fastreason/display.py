"""What the launcher shows while a run trains, and the table at its end.

Reads `metrics.jsonl` and `progress.json` of a run folder and talks to no process, so it can neither slow a run nor
break it, and may start before those files exist. On a terminal it draws a live panel; into a pipe or a CI log it
prints one line per step.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastreason.alerts import Alerts
from fastreason.config import Config
from fastreason.errors import DataError
from fastreason.metrics import METRICS_FILE, ProgressState, read_metrics, read_progress
from fastreason.types import EvalResult

POLL_S = 0.25
QUIET_S = 10.0  # a phase is worth a line in a log when nothing else was printed for so long
STALE_S = 20.0  # a phase line older than this says so
WINDOW = 20  # steps whose median time predicts the time left
ALERTS_SHOWN = 3

QUALITY = (
    ("reward", "reward/mean", "{:.3f}"),
    ("accuracy", "reward/accuracy", "{:.3f}"),
    ("length", "rollout/response_tokens_mean", "{:.1f} tokens"),
    ("entropy", "loss/entropy", "{:.3f}"),
)
# Of a run on written responses, which has no rewards.
OFFLINE = (
    ("epoch", "train/epoch", "{:.2f}"),
    ("loss", "loss/policy", "{:.4f}"),
    ("chosen", "logp/chosen", "{:.4f}"),
    ("rejected", "logp/rejected", "{:.4f}"),
    ("accuracy", "pairs/accuracy", "{:.3f}"),
    ("margin", "pairs/margin", "{:.4f}"),
    ("grad norm", "train/grad_norm", "{:.3f}"),
    ("lr", "train/lr", "{:.2e}"),
)
HEALTH = (
    ("loss", "loss/policy", "{:.4f}"),
    ("KL", "loss/kl", "{:.4f}"),
    ("grad norm", "train/grad_norm", "{:.3f}"),
    ("cut off", "rollout/truncated_share", "{:.0%}"),
    ("signal", "rollout/signal_share", "{:.0%}"),
    ("mismatch", "mismatch/logp_abs_mean", "{:.4f}"),
)
STALENESS = (("staleness", "rollout/staleness_mean", "{:.2f}"),)
# Counted since the start of the run; shown once there are any.
FAULTS = (
    ("engine restarts", "rollout/engine_restarts", "{:.0f}"),
    ("producer restarts", "rollout/producer_restarts", "{:.0f}"),
    ("dropped", "rollout/dropped", "{:.0f} groups"),
)
SECONDS = (
    ("generate", "time/generate_s", "{:.1f}"),
    ("grade", "time/grade_s", "{:.1f}"),
    ("wait", "time/wait_s", "{:.1f}"),
    ("train", "time/train_s", "{:.1f}"),
    ("publish", "time/publish_s", "{:.1f}"),
)
SPEED = (
    ("generated", "rollout/tok_per_s", "{:,.0f} tok/s"),
    ("trained", "train/tok_per_s", "{:,.0f} tok/s"),
    ("memory", "memory/peak_gib", "{:.1f} GiB"),
)

Row = dict[str, Any]


class RunView:
    """What the files of one run say, kept up to date by `poll`; never raises on a missing or torn file."""

    def __init__(self, run_dir: str | Path, config: Config) -> None:
        self.run_dir = Path(run_dir)
        self.config = config
        self.rows: list[Row] = []
        self.progress: ProgressState | None = None
        self.messages: list[str] = []
        self._alerts = Alerts(config)
        self._stamp: tuple[int, int, int] | None = None

    def poll(self) -> tuple[list[Row], list[str]]:
        """Read what changed and return the new metric rows with the new alerts."""
        self.progress = read_progress(self.run_dir) or self.progress
        try:
            status = (self.run_dir / METRICS_FILE).stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._stamp:
                return [], []
            rows = read_metrics(self.run_dir)
        except OSError:
            return [], []
        except DataError as error:
            new = [str(error)] if str(error) not in self.messages else []
            self.messages += new
            return [], new
        self._stamp = stamp
        kept = _common_length(self.rows, rows)
        if kept < len(self.rows):
            # A resume took steps back: the alerts are judged again along the new lineage.
            self._alerts = Alerts(self.config)
            for row in rows[:kept]:
                self._alerts.feed(row)
        self.rows = rows
        messages = [message for row in rows[kept:] for message in self._alerts.feed(row)]
        self.messages += messages
        return rows[kept:], messages

    @property
    def last(self) -> Row:
        """The newest row of a training step, {} before the first."""
        return next((row for row in reversed(self.rows) if _trained(row)), {})

    @property
    def step(self) -> int:
        return int(self.last.get("step", 0))

    def series(self, key: str) -> list[float]:
        return [float(row[key]) for row in self.rows if row.get(key) is not None]

    def time_left_s(self, step: int) -> float | None:
        """Seconds from a step to the end, from the median of the last steps; None before the first."""
        times = self.series("time/step_s")[-WINDOW:]
        return statistics.median(times) * max(0, self.config.train.steps - step) if times else None


class Display:
    """Shows a run from its files in a thread of its own, between `start` and `stop` (or as a context manager)."""

    def __init__(self, run_dir: str | Path, config: Config, console: Console | None = None) -> None:
        self.console = console or Console()
        self.view = RunView(run_dir, config)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None
        self._printed_phase = ""
        self._printed_at = 0.0
        self._stepped = False

    def start(self) -> None:
        assert self._thread is None, "the display was started twice"
        # What an earlier start of this run logged is history, not news.
        self.view.poll()
        self.view.messages.clear()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(render_panel(self.view, self.console), console=self.console, auto_refresh=False)
            self._live.start(refresh=True)
        elif self.view.step:
            self._line(f"continuing after step {self.view.step}")
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Show the last state and end the thread; harmless when called twice."""
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join()
        self._thread = None
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> "Display":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            # The files are read once more after the call to stop, so that the last step is always shown.
            stopping = self._stopping.wait(POLL_S)
            rows, messages = self.view.poll()
            if self._live is not None:
                self._live.update(render_panel(self.view, self.console), refresh=True)
            else:
                self._print_news(rows, messages)

    def _print_news(self, rows: list[Row], messages: list[str]) -> None:
        for row in rows:
            self._stepped = True
            self._line(step_line(row, self.view))
        for message in messages:
            self._line(f"warning: {message}")
        progress = self.view.progress
        if progress is None or progress.phase == self._printed_phase:
            return
        if not self._stepped or time.monotonic() - self._printed_at > QUIET_S:
            self._printed_phase = progress.phase
            self._line(phase_line(progress, time.time()))

    def _line(self, text: str) -> None:
        self._printed_at = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def step_line(row: Mapping[str, Any], view: RunView) -> str:
    """One metrics row as a line of a log."""
    parts = [f"step {row['step']}/{view.config.train.steps}"]
    offline = _is_offline(row)
    parts += [f"{label} {text}" for label, text in _fields(row, OFFLINE if offline else QUALITY + STALENESS)]
    if row.get("time/step_s") is not None:
        inside = ", ".join(f"{label} {text}" for label, text in _fields(row, SECONDS))
        parts.append(f"{row['time/step_s']:.1f} s ({inside})" if inside else f"{row['time/step_s']:.1f} s")
    parts += [text for label, text in _fields(row, SPEED) if label == ("trained" if offline else "generated")]
    parts += [f"{label} {text}" for label, text in _faults(row)]
    left = view.time_left_s(row["step"])
    if left and _trained(row):
        parts.append(f"{format_duration(left)} left")
    if row.get("eval/accuracy") is not None:
        parts.append(f"held-out accuracy {row['eval/accuracy']:.3f}")
    return "  ".join(parts)


def phase_line(progress: ProgressState, now: float) -> str:
    """What the run is doing, with a note when it has said nothing for a while."""
    parts = [progress.phase]
    if progress.total:
        parts.append(f"{progress.done}/{progress.total}")
    if progress.detail:
        parts.append(progress.detail)
    if now - progress.time > STALE_S:
        parts.append(f"(for {format_duration(now - progress.time)})")
    return "  ".join(parts)


def render_panel(view: RunView, console: Console) -> Panel:
    """The live panel of a run."""
    config, row = view.config, view.last
    bar = Table.grid(padding=(0, 1), expand=True)
    for ratio in (None, 1, None):
        bar.add_column(ratio=ratio, no_wrap=True)
    left = view.time_left_s(view.step)
    note = "" if left is None else f"{format_duration(left)} left"
    bar.add_row(
        f"step {view.step}/{config.train.steps}", ProgressBar(total=config.train.steps, completed=view.step), note
    )
    lines: list[Any] = [bar, Text(phase_line(view.progress, time.time()) if view.progress else "starting", "cyan")]
    if row:
        lines.append(Text())
        groups = (OFFLINE,) if _is_offline(row) else (QUALITY, HEALTH + STALENESS)
        lines += [_labelled(_fields(row, fields)) for fields in groups if any(_fields(row, fields))]
        if row.get("time/step_s") is not None:
            total = ("seconds", f"{row['time/step_s']:.1f}")
            lines.append(_labelled([total, *_fields(row, SECONDS)]))
        lines.append(_labelled(_fields(row, SPEED)))
        if faults := _faults(row):
            lines.append(_labelled(faults))
    ascii_only = console.options.ascii_only
    name, key = ("loss", "loss/policy") if _is_offline(row) else ("reward", "reward/mean")
    values = view.series(key)
    if len(values) > 1:
        width = max(8, min(60, console.width - 40))
        curve = Text.assemble((f"{name} ", "dim"), (sparkline(values, width, ascii_only), "green"))
        curve.append(f"  {min(values):.3f} to {max(values):.3f}", "dim")
        lines.append(curve)
    evals = [(row["step"], row["eval/accuracy"]) for row in view.rows if row.get("eval/accuracy") is not None]
    if evals:
        shown = evals[:1] + evals[1:][-3:]
        lines.append(_labelled([("held-out accuracy", "  ".join(f"{a:.3f} (step {s})" for s, a in shown))]))
    lines += [Text(message, "yellow") for message in view.messages[-ALERTS_SHOWN:]]
    title = Text(
        "  ".join([config.run.name, Path(config.model.path).name, config.offline.objective or config.algorithm.name]),
        "bold",
    )
    return Panel(Group(*lines), title=title, title_align="left", padding=(0, 1))


def sparkline(values: list[float], width: int, ascii_only: bool = False) -> str:
    """The curve of a series in at most `width` characters; a longer series is averaged in equal pieces."""
    marks = "_.-=+*#@" if ascii_only else "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(marks[round((value - low) / span * (len(marks) - 1))] if span else marks[0] for value in means)


def format_duration(seconds: float) -> str:
    """Seconds as `45 s`, `3:07` or `2:03:07`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def final_table(
    before: EvalResult | None,
    after: EvalResult | None,
    files: Mapping[str, str | Path] | None = None,
    console: Console | None = None,
) -> None:
    """Print held-out accuracy before and after training, whether the change is beyond noise, and where `files` are."""
    console = console or Console()
    if before is not None or after is not None:
        table = Table("held out", "accuracy", "error", "reward", "cut off", "samples", "T")
        for name, result in (("before", before), ("after", after)):
            if result is not None:
                table.add_row(name, *_result_cells(result))
        console.print(table)
    if before is not None and after is not None:
        error = (before.standard_error**2 + after.standard_error**2) ** 0.5
        change = after.accuracy - before.accuracy
        verdict = "more" if abs(change) > 2 * error else "not more"
        text = f"change {change:+.3f} ± {error:.3f} (one standard error): {verdict} than two standard errors"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for label, path in (files or {}).items():
        console.print(f"{label}: {path}", markup=False, highlight=False, soft_wrap=True)


def _result_cells(result: EvalResult) -> list[str]:
    return [
        f"{result.accuracy:.3f}",
        f"{result.standard_error:.3f}",
        f"{result.reward_mean:.3f}",
        f"{result.truncated_share:.0%}",
        f"{result.num_samples} ({result.num_prompts} prompts)",
        f"{result.temperature:g}",
    ]


def _trained(row: Mapping[str, Any]) -> bool:
    return "time/step_s" in row


def _is_offline(row: Mapping[str, Any]) -> bool:
    return "logp/chosen" in row


def _fields(row: Mapping[str, Any], fields: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Label and text of those fields that the row has; a number that was not finite is shown as such."""
    present = [(label, row[key], template) for label, key, template in fields if key in row]
    return [(label, "not finite" if value is None else template.format(value)) for label, value, template in present]


def _faults(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return _fields({key: value for key, value in row.items() if value}, FAULTS)


def _labelled(pairs: list[tuple[str, str]]) -> Text:
    text = Text()
    for label, value in pairs:
        text.append(f"{label} ", "dim")
        text.append(f"{value}   ")
    return text


def _common_length(old: list[Row], new: list[Row]) -> int:
    for index, (a, b) in enumerate(zip(old, new, strict=False)):
        if a != b:
            return index
    return min(len(old), len(new))
