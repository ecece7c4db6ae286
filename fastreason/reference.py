"""The reference's scores of a run's pairs, kept on disk chunk by chunk with the name of what they were computed from.

It owns the two files and says when kept scores are of no use. It computes nothing, and refuses to let training go on against
another reference than it began with.
"""

import json
import os
from pathlib import Path

import numpy as np

from fastreason.errors import CheckpointError, ConfigError

KEY_FILE, SCORES_FILE = "reference.json", "reference.f64"
COLUMNS = 2  # chosen, rejected


class KeptScores:
    """[rows, 2] fp64 nats of whole responses under the initial weights, the first rows first."""

    def __init__(self, folder: Path, key: dict[str, str]) -> None:
        """key: of which data (`traces`), weights (`model`) and `dtype` they are."""
        self._folder, self._key = folder, key

    def read(self, step: int, num_rows: int) -> np.ndarray:
        """The rows that are there, at most `num_rows`; those of anything else than the key are removed.

        Raises ConfigError where `step` steps were trained against others, and CheckpointError where any is missing then.
        """
        try:
            kept = json.loads((self._folder / KEY_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        differ = [name for name, value in self._key.items() if kept.get(name) != value]
        if step and kept and differ:
            raise ConfigError(
                f"{self._folder}: the pairs' scores that {step} steps were trained against are of another "
                f"{' and '.join(differ)}. Resume with the model.path and model.dtype that the run began with, or start a "
                "new run."
            )
        found = np.empty((0, COLUMNS)) if differ else self._whole_rows()
        if step and len(found) < num_rows:
            raise CheckpointError(
                f"{self._folder}: {len(found)} of {num_rows} pairs' scores are left, and {step} steps were trained against "
                "them. Start a new run."
            )
        if differ:
            self._begin()
        return found[:num_rows]

    def append(self, scores: np.ndarray) -> None:
        """Keep the next rows, on disk when it returns."""
        with open(self._folder / SCORES_FILE, "ab") as file:
            file.write(np.ascontiguousarray(scores, dtype="<f8").tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _whole_rows(self) -> np.ndarray:
        """What is in the file, cut after its last whole row: the write of another may have been interrupted."""
        path = self._folder / SCORES_FILE
        if not path.is_file():
            return np.empty((0, COLUMNS))
        num, torn = divmod(path.stat().st_size, 8 * COLUMNS)
        if torn:
            os.truncate(path, num * 8 * COLUMNS)
        return np.fromfile(path, dtype="<f8").reshape(num, COLUMNS)

    def _begin(self) -> None:
        (self._folder / SCORES_FILE).unlink(missing_ok=True)
        aside = self._folder / f"{KEY_FILE}.writing"
        aside.write_text(json.dumps(self._key), encoding="utf-8")
        aside.replace(self._folder / KEY_FILE)
