"""The clock of bench/train.py: seconds by phase of one update after another, whichever trainer makes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PHASES = ("body", "head", "backward", "optimizer", "rest")


def nothing() -> None:
    """On a CPU there is nothing to wait for."""


class Clock:
    """Seconds by phase of a trainer's updates.

    An update is from `start` to `stop`, a phase in it from `begin` to `end`; "rest" is what no phase took.
    wait: returns once the device has done its work; on a GPU each border waits, which costs a little of what is measured.
    after_first: called at the end of the first update, which warms up. updates: of each update the phases, and "total".
    """

    def __init__(self, wait: Callable[[], None] = nothing, after_first: Callable[[], None] = nothing) -> None:
        self.updates: list[dict[str, float]] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._wait, self._after_first = wait, after_first
        self._started = self._began = 0.0

    def start(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._wait()
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        total = time.perf_counter() - self._started
        rest = total - sum(self._seconds.values())
        self.updates.append({**self._seconds, "rest": rest, "total": total})
        if len(self.updates) == 1:
            self._after_first()

    def begin(self) -> None:
        self._wait()
        self._began = time.perf_counter()

    def end(self, name: str) -> None:
        self._wait()
        self._seconds[name] += time.perf_counter() - self._began

    def watch(self, name: str, module: Any) -> None:
        """Count every forward of a module as a phase."""
        module.register_forward_pre_hook(lambda *_: self.begin())
        module.register_forward_hook(lambda *_: self.end(name))

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, counted as a phase."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self.begin()
            result = call(*arguments, **options)
            self.end(name)
            return result

        return timed
