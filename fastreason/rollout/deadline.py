"""A deadline for another process that counts only the time in which it could work.

A process that was stopped, or waited for a core, has not worked; nor does it count when we were stopped ourselves and
could not have seen its answer. What to do about a process that is late is the caller's business.
"""

import contextlib
from pathlib import Path

import psutil

from fastreason.patience import Patience

LOOK_S = 0.25
STARVED = 10  # times the limit: a process that got no further in so long is as good as stopped


class LateError(Exception):
    """It could work for as long as the limit, and has not answered."""


class FrozenError(Exception):
    """It has not answered, and did not get to work: it was stopped, or other processes had its core."""


class Deadline:
    """Judges the wait for one answer of process `pid`: wait for at most `next_look_s`, then `look`."""

    def __init__(self, pid: int, limit_s: float) -> None:
        self._pid, self._limit_s = pid, limit_s
        self._waited = Patience(STARVED * limit_s)
        self._worked_s = self._stopped_s = 0.0
        self._coreless_s = _coreless_s(pid)

    @property
    def next_look_s(self) -> float:
        return max(0.01, min(LOOK_S, self._limit_s - self._worked_s))

    def look(self) -> Exception | None:
        """Count the time since the last look; returns a `LateError` or `FrozenError` once there is no more."""
        # Looks are `next_look_s` apart; what is beyond is time in which we were stopped, and with us perhaps everybody.
        counted_s = min(self._waited.look(), 2 * LOOK_S)
        coreless_s = _coreless_s(self._pid)
        if _is_stopped(self._pid):
            self._stopped_s += counted_s
        else:
            self._worked_s += max(0.0, counted_s - (coreless_s - self._coreless_s))
        self._coreless_s = coreless_s
        if self._worked_s >= self._limit_s:
            return LateError()
        if self._stopped_s >= self._limit_s or self._waited.exhausted:
            return FrozenError()
        return None


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _coreless_s(pid: int) -> float:
    """Seconds that its main thread was ready to run and waited for a core; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * 1e-9
    return 0.0
