"""A file of JSON lines that one process at a time appends to, and that a kill leaves whole.

It owns the lock, the place of each line, and what becomes of a line that did not get to its end. It refuses to know what is in
a line.
"""

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastreason.errors import ConfigError, DataError


class Line(NamedTuple):
    """A whole line that is there: its number from 1, where it begins, and its bytes with the end."""

    number: int
    offset: int
    content: bytes


class LineFile:
    """Holds `path`, which is made where it is not there; `scan` it once before `append`.

    Raises ConfigError, naming `folder_key`, where another process holds it.
    """

    def __init__(self, path: Path, folder_key: str = "--out") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._size = 0
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (held for as long as this object)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(
                f"{folder_key} {path.parent}: another process is writing to {path}. Wait for its end."
            ) from None

    def scan(self, take: Callable[[Line], None]) -> None:
        """Hand over every whole line in order; a last one without its end, which is what a kill leaves, is cut off.

        Closes the file where `take` raises.
        """
        try:
            for line in read_whole_lines(self.path):
                take(line)
                self._size = line.offset + len(line.content)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(self._size)

    def append(self, content: bytes) -> int:
        """Write one whole line in one write, so that a kill loses no other; returns where it begins.

        Raises DataError where the disk is full; nothing is left of a line that did not fit.
        """
        offset = self._size
        try:
            written = self._file.write(content)
        except OSError as error:
            self._file.truncate(offset)
            raise DataError(f"{self.path} cannot be written: {error}. Make room, then go on.") from error
        if written != len(content):
            self._file.truncate(offset)
            raise DataError(f"{self.path}: the disk is full. Make room, then go on.")
        self._size += len(content)
        return offset

    def read(self, offset: int, num_bytes: int) -> bytes:
        return os.pread(self._file.fileno(), num_bytes, offset)

    def replace(self, lines: Iterable[bytes]) -> None:
        """Put other lines in the place of all that are there, at once; then the file is closed."""
        replace_file(self.path, lines)
        self.close()

    def close(self) -> None:
        """Bring everything to the disk and let go of the lock. May be called twice."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def read_whole_lines(path: Path) -> Iterator[Line]:
    """The lines of a file but for a last one without its end."""
    offset = 0
    with open(path, "rb") as lines:
        for number, content in enumerate(lines, start=1):
            if not content.endswith(b"\n"):
                return
            yield Line(number, offset, content)
            offset += len(content)


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file aside, bring it to the disk, and rename it into place."""
    aside = path.with_name(f"{path.name}.writing")
    with open(aside, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
