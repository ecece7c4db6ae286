"""The folder that a preparation writes: all of its files or none, the rows it could not use, counts that add up.

Files are written aside (`.writing`), synced, and renamed when all of them are complete, `report.json` last: what a kill
leaves behind is never taken for data. Knows no column and no filter.
"""

import contextlib
import json
import os
import sys
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash

from fastreason.data.raw_rows import RawRow
from fastreason.errors import DataError

REPORT, BAD_ROWS, CONTAMINATED, PICTURE = "report.json", "bad_rows.jsonl", "contaminated.jsonl", "lengths.png"
BAD_ROWS_SHOWN = 20
PROGRESS_EVERY_S = 10.0


class PreparedFolder:
    """Collects files aside; leaving the `with` block without an error puts them in place, with an error deletes them."""

    def __init__(self, folder: Path, names: Sequence[str], overwrite: bool = False) -> None:
        """`names`: what it will hold, besides `report.json`; raises `DataError` where one of them is there already."""
        self.folder = folder
        self._known = [*names, BAD_ROWS, CONTAMINATED, PICTURE, REPORT]
        self._open: dict[str, BinaryIO] = {}
        self._closing = contextlib.ExitStack()
        self.num_bad = 0
        there = [name for name in self._known if (folder / name).exists()]
        if there and not overwrite:
            raise DataError(
                f"--out {folder} already holds {', '.join(there)}. Give another folder, or --overwrite to replace them."
            )

    def __enter__(self) -> "PreparedFolder":
        """Raises `DataError` where the folder cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--out {self.folder} cannot be made: {error}.") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            with self._closing:
                if error is None:
                    for file in self._open.values():
                        file.flush()
                        os.fsync(file.fileno())
            if error is None:
                self._put_in_place()
        finally:
            for name in self._open:
                self._aside(name).unlink(missing_ok=True)

    def file(self, name: str) -> BinaryIO:
        """The file of this name, open for writing, aside."""
        if name not in self._open:
            self._open[name] = self._closing.enter_context(open(self._aside(name), "w+b"))  # noqa: SIM115
        return self._open[name]

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one line of JSON to a file."""
        self.file(name).write(json_line(row))

    def refuse(self, row: RawRow, reason: str, start: str) -> None:
        """Count a row that cannot be used: a line in `bad_rows.jsonl`, the first 20 also on stderr."""
        self.num_bad += 1
        self.write(BAD_ROWS, {"place": row.place, "row": row.number, "reason": reason, "start": start})
        if self.num_bad <= BAD_ROWS_SHOWN:
            print(f"bad row: {row.place}: {reason}", file=sys.stderr)
        if self.num_bad == BAD_ROWS_SHOWN:
            print(f"more of them are only in {BAD_ROWS}", file=sys.stderr)

    def _aside(self, name: str) -> Path:
        return self.folder / f"{name}.writing"

    def _put_in_place(self) -> None:
        # Without its report a folder is incomplete: so the old one goes first, and the new one comes last.
        for name in reversed(self._known):
            if name not in self._open or name == REPORT:
                (self.folder / name).unlink(missing_ok=True)
        for name in sorted(self._open, key=lambda name: name == REPORT):
            os.replace(self._aside(name), self.folder / name)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ShuffledLines:
    """Lines that arrive in one order and are written in another: they wait in a file, and memory holds 24 bytes a line."""

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool
        self._ranks, self._starts, self._sizes = array("q"), array("q"), array("q")
        self._end = 0

    def __len__(self) -> int:
        return len(self._ranks)

    def add(self, rank: int, line: bytes) -> None:
        self._ranks.append(rank)
        self._starts.append(self._end)
        self._sizes.append(len(line))
        self._end += self._spool.write(line)

    def write_sorted(self, out: BinaryIO) -> None:
        """Write the lines by rank, ascending."""
        for index in np.argsort(np.frombuffer(self._ranks, dtype=np.int64), kind="stable") if self._ranks else ():
            self._spool.seek(self._starts[index])
            out.write(self._spool.read(self._sizes[index]))


class Progress:
    """A line on stderr every ten seconds: rows done, rows a second, time left."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows, self._done = num_rows, 0
        self._started = self._said = time.monotonic()

    def add(self, num_rows: int) -> None:
        self._done += num_rows
        now = time.monotonic()
        if now - self._said >= PROGRESS_EVERY_S:
            self._said = now
            left_s = round((self._num_rows - self._done) * self.seconds / self._done)
            print(
                f"{self._done:,} of {self._num_rows:,} rows, {self._done / self.seconds:,.0f} rows/s, "
                f"{left_s // 60}:{left_s % 60:02d} left",
                file=sys.stderr,
            )

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of JSON Lines; a lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def text_key(text: str) -> int:
    """64 bits by which equal texts are found without holding them."""
    return xxhash.xxh3_64_intdigest(text.encode())


def check_sum(num_in: int, dropped: Mapping[str, int], num_out: int) -> None:
    assert num_in == sum(dropped.values()) + num_out, f"{num_in} rows came in, {dict(dropped)} and {num_out} went out"


def print_counts(lines: Iterable[tuple[str, int]]) -> None:
    """A table of two columns: what, and how many rows."""
    for name, count in lines:
        print(f"{name:<44}{count:>12,}")


def print_contamination(sets: Sequence[Mapping[str, Any]]) -> None:
    for evaluation in sets:
        print(
            f"{evaluation['file']}, {evaluation['problems']} problems: {evaluation['rows_with_same_text']} rows have the "
            f"text of one, {evaluation['rows_with_half_of_8grams']} at least half of its word 8-grams, "
            f"{evaluation['rows_with_shared_8gram']} share one with it"
        )
