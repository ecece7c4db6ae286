"""A clock that runs while at least one of many overlapping activities does."""

import time
from types import TracebackType


class BusyClock:
    """Enter and leave it as a context manager, from any number of tasks; `take` returns the busy seconds since the last."""

    def __init__(self) -> None:
        self._inside = 0
        self._since = 0.0
        self._busy_s = 0.0

    def __enter__(self) -> None:
        if self._inside == 0:
            self._since = time.perf_counter()
        self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside -= 1
        if self._inside == 0:
            self._busy_s += time.perf_counter() - self._since

    @property
    def num_inside(self) -> int:
        return self._inside

    def take(self) -> float:
        now = time.perf_counter()
        if self._inside:
            self._busy_s += now - self._since
            self._since = now
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s
