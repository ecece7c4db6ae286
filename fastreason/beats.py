"""Signs of life: each process of a run rewrites one small file, and the launcher finds out who has stopped doing so.

A beat says that the process gets to run, not that its work goes on: what hangs in a wait has that wait's own limit.
"""

import asyncio
import os
import struct
import threading
import time
from pathlib import Path
from typing import NoReturn

from fastreason.patience import Patience

_TIME = struct.Struct("<d")


class Beat:
    """This process's sign of life, named `name` in `folder`, written every `interval_s` seconds once it is set going."""

    def __init__(self, folder: str | Path, name: str, interval_s: float = 0.5) -> None:
        self._file = os.open(_path(folder, name), os.O_RDWR | os.O_CREAT, 0o600)
        self._interval_s = interval_s

    def in_thread(self) -> None:
        """Beat from a daemon thread, whatever the main thread does."""
        threading.Thread(target=self._run, name="beat", daemon=True).start()

    async def in_loop(self) -> NoReturn:
        """Beat for as long as the event loop turns; to be awaited as a task."""
        while True:
            self._write()
            await asyncio.sleep(self._interval_s)

    def _run(self) -> None:
        while True:
            self._write()
            time.sleep(self._interval_s)

    def _write(self) -> None:
        os.pwrite(self._file, _TIME.pack(time.monotonic()), 0)


def age_s(folder: str | Path, name: str) -> float | None:
    """Seconds since the last beat of `name`, or None before its first; time in which we were stopped counts too."""
    beat = _read(folder, name)
    return None if beat is None else max(0.0, time.monotonic() - beat)


def forget_beat(folder: str | Path, name: str) -> None:
    """Remove the beat of a process that has ended: the next of that name starts without one."""
    _path(folder, name).unlink(missing_ok=True)


class BeatWatch:
    """Watches one process's beats: `look` says whether the newest is more than `limit_s` seconds of our own time old."""

    def __init__(self, folder: str | Path, name: str, limit_s: float) -> None:
        self._folder, self._name = folder, name
        self._patience = Patience(limit_s)
        self._last: float | None = None

    def look(self) -> bool:
        """Whether it hangs; never before its first beat. To be called every second or so."""
        beat = _read(self._folder, self._name)
        self._patience.look()
        if beat is None or beat != self._last:
            self._last = beat
            self._patience.renew()
        return self._patience.exhausted

    @property
    def silent_s(self) -> float:
        """Seconds of our own running time since the last beat that was seen."""
        return self._patience.spent_s


def _read(folder: str | Path, name: str) -> float | None:
    try:
        content = _path(folder, name).read_bytes()
    except FileNotFoundError:
        return None
    return _TIME.unpack(content)[0] if len(content) == _TIME.size else None


def _path(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"beat-{name}"
