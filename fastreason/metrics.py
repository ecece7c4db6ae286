"""What a run writes down: `metrics.jsonl`, `samples.jsonl`, `progress.json`, `summary.json`, TensorBoard and W&B.

Owns the files' formats, their readers and the clean lineage after a resume. Draws nothing, prints nothing, judges
nothing (see `alerts.py`, `display.py`, `report/`). Imports torch only when TensorBoard is asked for.
"""

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec

from fastreason.config import LogConfig
from fastreason.errors import ConfigError, DataError
from fastreason.types import Group, Sample

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
PROGRESS_FILE = "progress.json"
SUMMARY_FILE = "summary.json"

_KEY = re.compile(r"[a-z]+/\S+")


class MetricsLog:
    """Appends one line a step to `metrics.jsonl`, and the same numbers to TensorBoard and W&B where `config` says so.

    `resume_step` is the step of the checkpoint that training continues from: lines of later steps are dropped first,
    so that every step occurs once. None starts a new file. W&B gets one run per start, grouped under the folder's
    name, because a run there cannot take steps back.

    Raises `ConfigError` when a package that the config asks for is missing, W&B refuses, or a new run meets old lines.
    """

    def __init__(self, run_dir: str | Path, config: LogConfig, resume_step: int | None = None) -> None:
        self.run_dir = Path(run_dir)
        # The optional sinks come first: where their package is missing, the run's files are still untouched.
        self._tensorboard = _open_tensorboard(self.run_dir, resume_step) if config.tensorboard else None
        self._wandb = _open_wandb(self.run_dir, config.wandb_project, resume_step) if config.wandb else None
        self._file = _open_lineage(self.run_dir / METRICS_FILE, resume_step)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step: `step` and keys `area/name`; a NaN or infinity is written as null."""
        step = int(metrics["step"])
        values = {key: float(value) for key, value in metrics.items() if key != "step"}
        for key in values:
            assert _KEY.fullmatch(key), f"metric key {key!r} is not of the form area/name"
        _append(self._file, {"step": step, **values})
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SampleLog:
    """Appends one line per response to `samples.jsonl`: at most `config.samples_per_step` a step (0: all).

    Whole groups come first, in the order of the batch. `resume_step` as in `MetricsLog`. Raises `ConfigError` when a
    new run meets old lines.
    """

    def __init__(self, run_dir: str | Path, config: LogConfig, resume_step: int | None = None) -> None:
        self._limit = config.samples_per_step
        self._file = _open_lineage(Path(run_dir) / SAMPLES_FILE, resume_step)

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Log the graded responses of one step."""
        pairs = [(group, sample) for group in groups for sample in group.samples]
        for group, sample in pairs[: self._limit or None]:
            _append(self._file, _sample_line(step, group, sample))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "SampleLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ProgressState(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is doing right now: `done` of `total` parts of `phase` (total 0: unknown), in `step` of `steps`."""

    phase: str
    detail: str = ""
    done: int = 0
    total: int = 0
    step: int = 0
    steps: int = 0
    time: float = 0.0


class Progress:
    """Writes `progress.json` of a run folder, which the launcher's display reads; the last writer wins.

    Safe to call from several processes and as often as one likes: within a phase it writes at most every `interval_s`.
    """

    def __init__(self, run_dir: str | Path, steps: int = 0, interval_s: float = 0.2) -> None:
        self.path = Path(run_dir) / PROGRESS_FILE
        self.interval_s = interval_s
        self._last = ProgressState(phase="", steps=steps)

    def update(self, phase: str, detail: str = "", done: int = 0, total: int = 0, step: int | None = None) -> None:
        """Say what is being done; `step` stays as it was where it is not given."""
        now = time.time()
        last = self._last
        step = last.step if step is None else step
        same = (phase, step) == (last.phase, last.step) and not (total and done >= total)
        # A clock that was set back must not silence the display, hence the lower bound.
        if same and 0 <= now - last.time < self.interval_s:
            return
        self._last = ProgressState(
            phase=phase, detail=detail, done=done, total=total, step=step, steps=last.steps, time=now
        )
        write_atomically(self.path, msgspec.json.encode(self._last).decode(), durable=False)


def read_progress(run_dir: str | Path) -> ProgressState | None:
    """What the run last said it was doing, or None where it has said nothing readable yet."""
    try:
        return msgspec.json.decode((Path(run_dir) / PROGRESS_FILE).read_bytes(), type=ProgressState)
    except (OSError, msgspec.DecodeError):
        return None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` (or of its run folder), oldest first; null stays None; no torn last line.

    A missing file is an empty list. Raises `DataError` when any other line is not a JSON object with a `step`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    return [record for _, record in _read_lines(path)]


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """The summary of a finished run, or {} where there is none that can be read."""
    try:
        summary = json.loads((Path(run_dir) / SUMMARY_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write a JSON file that is either the old one or the whole new one; NaN and infinity become null."""
    text = json.dumps(_finite(summary), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(path), text + "\n")


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replace a file by way of a temporary one beside it, named by process so that two writers do not mix.

    `durable` waits for the disk; what is rewritten many times a second does not need to survive a power cut.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """The same JSON value with null for every float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _sample_line(step: int, group: Group, sample: Sample) -> dict[str, Any]:
    assert sample.grade is not None, "the sample has not been graded"
    return {
        "step": step,
        "ticket": group.ticket,
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "completion": sample.text,
        "reward": sample.grade.reward,
        "parts": sample.grade.parts,
        "correct": sample.grade.correct,
        "finish_reason": sample.finish_reason,
        "num_tokens": len(sample.token_ids),
        "version": min(sample.token_versions, default=group.version_issued),
    }


def _append(file: TextIO, record: Mapping[str, Any]) -> None:
    # One write of a whole line and a flush: a killed run tears at most its last line.
    file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line's bytes with its record; a last line that does not end or does not parse is left out."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    # Not splitlines(): a response may hold other line separators, which JSON leaves as they are.
    *lines, torn = raw.split(b"\n")
    records: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append((line, {**record, "step": int(record["step"])}))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and not torn:
                break
            raise DataError(
                f"{path}, line {number} is not a JSON object with a step: {line[:80]!r}. "
                "The file was damaged or edited; remove that line."
            ) from error
    return records


def _open_lineage(path: Path, resume_step: int | None) -> TextIO:
    """Open a step log for appending, after dropping what a resumed run will write again."""
    if resume_step is None:
        if path.exists() and path.stat().st_size > 0:
            raise ConfigError(
                f"{path} already has lines, and this run does not resume: two runs would be mixed. "
                "Choose another run.name, or pass --resume."
            )
    elif path.exists():
        kept = [line for line, record in _read_lines(path) if record["step"] <= resume_step]
        write_atomically(path, b"".join(line + b"\n" for line in kept).decode("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a", encoding="utf-8", errors="backslashreplace")


def _open_tensorboard(run_dir: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard=true, but the package tensorboard cannot be imported. "
            "Install the extra: pip install 'fastreason[tensorboard]', or set log.tensorboard=false."
        ) from error
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)


def _open_wandb(run_dir: Path, project: str, resume_step: int | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "log.wandb=true, but the package wandb cannot be imported. "
            "Install the extra: pip install 'fastreason[wandb]', or set log.wandb=false."
        ) from error
    name = run_dir.name if resume_step is None else f"{run_dir.name}-from-{resume_step}"
    try:
        return wandb.init(project=project, group=run_dir.name, name=name, dir=str(run_dir))
    except wandb.errors.Error as error:
        raise ConfigError(
            f"log.wandb=true, but W&B did not start: {error}. Run 'wandb login', or set WANDB_MODE=offline."
        ) from error
