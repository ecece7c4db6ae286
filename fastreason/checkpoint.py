"""Checkpoints: written aside, synced, renamed; an incomplete one is never seen. Keeps the newest and the best.

One that is removed is renamed first, so that a death amid the removal leaves none with half its files either.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastreason.errors import CheckpointError

STATE_FILE = "trainer.json"
PRODUCER_FILE = "producer.msgpack"
FORMAT = 2
WRITING, REMOVING = ".writing", ".removing"


@dataclass
class TrainerState:
    """What a checkpoint holds beside the updater's own state.

    `version` weights have been published, `num_groups` groups are trained. `figures` are running totals that the summary
    reports, `coefficients` those that adapt, for the step to come. The producer's own state lies beside it, as bytes that
    only the producer reads.
    """

    step: int
    version: int
    num_groups: int
    score: float
    figures: dict[str, Any] = field(default_factory=dict)
    coefficients: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


class CheckpointStore:
    """The folder `checkpoints/` of a run: `step-000012` is complete; what is being written or removed has a suffix."""

    def __init__(self, run_dir: Path, keep_last: int, keep_best: bool) -> None:
        self.folder = run_dir / "checkpoints"
        self._keep_last, self._keep_best = keep_last, keep_best

    def sweep(self) -> None:
        """Remove what a death has left half written or half removed; nobody else may be at work in the folder."""
        for suffix in (WRITING, REMOVING):
            for path in self.folder.glob(f"step-*{suffix}"):
                shutil.rmtree(path)

    def aside(self, step: int) -> Path:
        """The folder to write a checkpoint into, empty; `commit` makes it one."""
        path = self.folder / f"step-{step:06d}{WRITING}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def commit(self, state: TrainerState, producer: bytes) -> Path:
        """Write both states beside the updater's files, sync everything to disk, rename, and remove what is not kept."""
        aside = self.folder / f"step-{state.step:06d}{WRITING}"
        (aside / PRODUCER_FILE).write_bytes(producer)
        (aside / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        target = self.folder / f"step-{state.step:06d}"
        if target.exists():
            _remove(target)
        aside.rename(target)
        _sync(self.folder)
        self._prune()
        return target

    def complete(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        found = [p for p in self.folder.glob("step-*") if not p.suffix and (p / STATE_FILE).is_file()]
        return sorted(found)

    def latest(self) -> tuple[Path, TrainerState]:
        """The newest complete checkpoint; raises CheckpointError where there is none."""
        found = self.complete()
        if not found:
            raise CheckpointError(
                f"{self.folder.parent}: no complete checkpoint to resume from. Runs save every checkpoint.every steps and "
                "at the end, unless that is 0 (the default), and when Ctrl-C or SIGTERM stops them."
            )
        return found[-1], read_state(found[-1])

    def _prune(self) -> None:
        found = self.complete()
        keep = set(found[-self._keep_last :])
        if self._keep_best:
            keep.add(max(found, key=lambda path: (read_state(path).score, path.name)))
        for path in found:
            if path not in keep:
                _remove(path)


def _remove(path: Path) -> None:
    aside = path.with_name(path.name + REMOVING)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def read_producer_state(folder: Path) -> bytes:
    """The producer's state of a checkpoint; raises CheckpointError where it is missing."""
    try:
        return (folder / PRODUCER_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder}: the producer's state cannot be read: {error}") from error


def read_state(folder: Path) -> TrainerState:
    """The trainer's state of a checkpoint; raises CheckpointError where it cannot be read or is of another format."""
    try:
        raw = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if raw.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: checkpoint format {raw.get('format')}, this version reads {FORMAT}.")
        return TrainerState(**raw)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the trainer's state cannot be read: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
