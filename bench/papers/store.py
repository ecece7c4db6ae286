"""What lies in the folder of the miniatures: settings, finished and failed runs, run folders. It starts and judges nothing.

settings.json    overrides of each arm that has started, and job.yaml as it was: runs with others are not mixed in
finished.jsonl   a line per finished run, written as it ends
failed.jsonl     a line per run that ended by an error
runs/ARM-seedN   metrics.jsonl, summary.json, eval-before.jsonl, eval-after.jsonl, logs
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arms import Run
from curves import Curve, read_curve

from fastreason.checkpoint import CheckpointStore, read_state
from fastreason.config import load_config
from fastreason.metrics import METRICS_FILE, read_summary, write_atomically

EVAL_AFTER = "eval-after.jsonl"


class Store:
    """The folder, made where it does not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.runs = self.folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Raises SystemExit where another process is making runs here."""
        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SystemExit(
                    f"--out {self.folder}: another process makes runs here. Wait, or use another."
                ) from None
            yield

    def path(self, run: Run) -> Path:
        return self.runs / run.name

    def finished(self) -> dict[Run, dict[str, Any]]:
        """The finished runs whose folders are there, with their lines."""
        lines = self._lines("finished.jsonl")
        found = {Run(line["arm"], line["seed"]): line for line in lines}
        return {run: line for run, line in found.items() if (self.path(run) / METRICS_FILE).is_file()}

    def seconds(self) -> dict[str, list[float]]:
        """{arm: seconds of its finished runs}, of those that were made in one go."""
        found: dict[str, list[float]] = {}
        for run, line in self.finished().items():
            if not line["resumed"]:
                found.setdefault(run.arm, []).append(line["seconds"])
        return found

    def curves(self) -> dict[str, dict[int, Curve]]:
        """{arm: {seed: curve}} of the finished runs."""
        found: dict[str, dict[int, Curve]] = {}
        for run in self.finished():
            found.setdefault(run.arm, {})[run.seed] = read_curve(self.path(run))
        return found

    def add_finished(self, run: Run, seconds: float, resumed: bool) -> None:
        """Keep a finished run; its checkpoints, of no more use and several times the model's size, go."""
        steps = read_summary(self.path(run)).get("steps")
        line = {"arm": run.arm, "seed": run.seed, "seconds": round(seconds, 1), "resumed": resumed, "steps": steps}
        self._append("finished.jsonl", line)
        shutil.rmtree(self.path(run) / "checkpoints", ignore_errors=True)

    def add_failed(self, run: Run, code: int) -> None:
        self._append("failed.jsonl", {"arm": run.arm, "seed": run.seed, "exit_code": code})

    def complete(self, run: Run) -> bool:
        """Whether a run has trained to its end and, where problems are held out, been evaluated there."""
        folder = self.path(run)
        if not read_summary(folder).get("finished") or not (folder / "config.yaml").is_file():
            return False
        wanted, found = load_config(folder / "config.yaml").eval, folder / EVAL_AFTER
        lines = found.read_bytes().count(b"\n") if found.is_file() else 0
        return lines >= wanted.num_prompts * wanted.samples_per_prompt

    def share_left(self, run: Run) -> float:
        """The share of a run's steps behind its checkpoint; 1 where it has none, or none with steps to come."""
        folder = self.path(run)
        found = CheckpointStore(folder, keep_last=1, keep_best=False).complete()
        if not found or not (folder / "config.yaml").is_file():
            return 1.0
        steps = load_config(folder / "config.yaml").train.steps
        return max(0, steps - read_state(found[-1]).step) / steps or 1.0

    def resumable(self, run: Run) -> bool:
        """Whether an interrupted run has a checkpoint with steps to come."""
        return self.share_left(run) < 1

    def clear(self, run: Run) -> None:
        """Move what an interrupted run without a checkpoint has left out of the way; its logs may explain something."""
        folder = self.path(run)
        number = 1
        while (aside := folder.with_name(f"{folder.name}-given-up-{number}")).exists():
            number += 1
        if folder.exists():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            folder.rename(aside)

    def settle(self, arm: str, overrides: Sequence[str], job: str) -> None:
        """Note an arm's settings before its first run; raises SystemExit where it has runs with others."""
        path = self.folder / "settings.json"
        settings: dict[str, Any] = {"job": job, "arms": {}}
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
        known = settings["arms"].setdefault(arm, list(overrides))
        if known != list(overrides) or settings["job"] != job:
            raise SystemExit(
                f"--out {self.folder}: the runs of {arm} there have other settings, {' '.join(known)}; these are "
                f"{' '.join(overrides)} (or job.yaml has changed). Use another --out, or remove that folder."
            )
        write_atomically(path, json.dumps(settings, indent=1) + "\n")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def _append(self, name: str, line: dict[str, Any]) -> None:
        # The whole file anew, by way of another: no line is ever torn.
        lines = [*self._lines(name), line]
        write_atomically(self.folder / name, "".join(json.dumps(each) + "\n" for each in lines))
