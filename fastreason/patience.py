"""A limit on waiting that counts only the time in which this process itself was running.

A run that was stopped (SIGSTOP, a closed laptop) and continued finds all clocks far ahead; nobody is stuck for that.
"""

import time
from collections.abc import Callable

LONGEST_LOOK_S = 2.0  # between two looks of a process that runs, its waits are shorter


class Patience:
    """At most `limit_s` seconds of waiting: a loop calls `look` every second or so and ends once it is `exhausted`.

    `spent_s` sums min(time since the last look, LONGEST_LOOK_S).
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] | None = None) -> None:
        self.limit_s = limit_s
        self.spent_s = 0.0
        self._clock = clock or time.monotonic  # looked up here, so that a simulation's clock is found
        self._looked_at = self._clock()

    def look(self) -> float:
        """Count the time since the last look; returns the seconds that were counted."""
        now = self._clock()
        counted = min(now - self._looked_at, LONGEST_LOOK_S)
        self._looked_at = now
        self.spent_s += counted
        return counted

    def renew(self) -> None:
        """Start again from nothing spent: what is waited for has shown life."""
        self._looked_at = self._clock()
        self.spent_s = 0.0

    @property
    def exhausted(self) -> bool:
        return self.spent_s >= self.limit_s
