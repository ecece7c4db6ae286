"""Virtual time for an event loop and one synchronous thread beside it, which talk over a socket that is none.

The two run strictly in turn: the thread for as long as it has something to do, else the loop, and only when both wait
does the clock jump to the next timer. So nothing sleeps, and every run of the same code is the same. Refuses to wait
for anything real: where the two wait for each other it raises.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

CLOCKS = ("time.perf_counter", "time.monotonic", "time.time")
TOLERANCE_S = 1e-9


class SimulationStuckError(RuntimeError):
    """The event loop and the thread wait for each other."""


class VirtualTime:
    """The clock, and whose turn it is; `now_s` counts from the start of the simulation."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.loop = VirtualLoop(self)
        self._turn = threading.Condition()
        self._thread_runs = False
        # The thread's first turn comes when the loop has nothing to do.
        self._thread_goes_on: Callable[[], bool] | None = lambda: True

    def run(self, serve: Callable[[], Coroutine[Any, Any, None]], body: Callable[[], None]) -> None:
        """Run `serve()` in the loop and `body` in a thread, both to their end; raises what either raised."""
        errors: list[BaseException] = []
        ended = asyncio.Event()

        async def both() -> None:
            await serve()
            await ended.wait()

        def beside() -> None:
            try:
                self._wait_for_turn()
                body()
            except BaseException as error:
                errors.append(error)
            finally:
                self.loop.call_soon(ended.set)
                self._give_turn(None)

        thread = threading.Thread(target=beside, daemon=True)
        with ExitStack() as stack:
            for clock in CLOCKS:
                stack.enter_context(patch(clock, lambda: self.now_s))
            runner = stack.enter_context(asyncio.Runner(loop_factory=lambda: self.loop))
            thread.start()
            try:
                runner.run(both())
            except SimulationStuckError as stuck:
                raise errors[0] if errors else stuck from stuck
        if errors:
            raise errors[0]

    # For the thread

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass; what the loop has to do until then it does meanwhile."""
        until = self.now_s + seconds
        self.loop.call_at(until, lambda: None)  # so that the clock stops there
        self.wait_for(lambda: self.now_s >= until - TOLERANCE_S)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Give the loop its turn until `condition` holds."""
        if not condition():
            self._give_turn(condition)
            self._wait_for_turn()

    def _give_turn(self, condition: Callable[[], bool] | None) -> None:
        with self._turn:
            self._thread_goes_on, self._thread_runs = condition, False
            self._turn.notify_all()

    def _wait_for_turn(self) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._thread_runs)

    # For the loop

    def pass_on(self, timeout_s: float | None) -> None:
        """The loop has nothing to do before `timeout_s`: the thread's turn, or that time passes."""
        if self._thread_goes_on is not None and self._thread_goes_on():
            with self._turn:
                self._thread_runs = True
                self._turn.notify_all()
                self._turn.wait_for(lambda: not self._thread_runs)
        elif timeout_s is None:
            raise SimulationStuckError(f"after {self.now_s:.3f} s everything waits")
        else:
            self.now_s += timeout_s


class _Selector(selectors.SelectSelector):
    """Waits for nothing: what the loop would wait is virtual."""

    def __init__(self, time: VirtualTime) -> None:
        super().__init__()
        self._time = time

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events and timeout != 0:
            self._time.pass_on(timeout)
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop by the virtual clock. A Unix server started in it is reached by `connect`, from the thread."""

    def __init__(self, time: VirtualTime) -> None:
        super().__init__(_Selector(time))
        self._virtual = time
        self._protocol_factory: Callable[[], Any] | None = None

    def time(self) -> float:
        return self._virtual.now_s

    async def create_unix_server(self, protocol_factory: Any, path: Any = None, **options: Any) -> Any:
        self._protocol_factory = protocol_factory
        return asyncio.Server(self, [], protocol_factory, None, 100, None)

    def connect(self) -> VirtualSocket:
        """The client's end of a new connection to the server, once there is one."""
        self._virtual.wait_for(lambda: self._protocol_factory is not None)
        assert self._protocol_factory is not None
        return VirtualSocket(self._virtual, self._protocol_factory())


class VirtualSocket(asyncio.Transport):
    """Both ends of a connection: a blocking socket for the thread, the transport of `protocol` for the loop."""

    def __init__(self, time: VirtualTime, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._virtual, self._protocol = time, protocol
        self._answers = bytearray()
        self._closed = False
        time.loop.call_soon(protocol.connection_made, self)

    def settimeout(self, timeout: float | None) -> None:
        """A wait ends with an answer or the server's end."""

    def sendall(self, data: bytes) -> None:
        if self._closed:
            raise BrokenPipeError("the server has closed the connection")
        self._virtual.loop.call_soon(self._protocol.data_received, data)

    def recv(self, size: int) -> bytes:
        self._virtual.wait_for(lambda: bool(self._answers) or self._closed)
        data = bytes(self._answers[:size])
        del self._answers[:size]
        return data

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._answers += data

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        """From either end."""
        if not self._closed:
            self._closed = True
            self._virtual.loop.call_soon(self._protocol.connection_lost, None)

    def pause_reading(self) -> None:
        """The whole request is in memory already."""

    def resume_reading(self) -> None: ...
