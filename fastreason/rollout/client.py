"""The trainer's view of the producer: ask for the next batch, publish weights, evaluate, save state."""

import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fastreason.errors import EngineError, InterruptedWaitError, PeerLostError, StuckError
from fastreason.rollout import wire
from fastreason.types import EvalResult, LoadReport, WeightUpdate

A = TypeVar("A", wire.Ready, wire.Batch, wire.Published, wire.Evaluated, wire.State, wire.Done)


class ProducerClient:
    """Implements the loop's `Rollouts` protocol over the producer's socket.

    Every call waits at most `timeout_s`; `Failure` from the producer becomes EngineError with its message.
    """

    def __init__(
        self,
        socket_path: str,
        timeout_s: float,
        startup_timeout_s: float,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._timeout_s = timeout_s
        self._connection = wire.Connection(_connect(socket_path, startup_timeout_s, interrupted), interrupted)
        self.ready = self._answer(wire.Ready, startup_timeout_s, "starting the engine", interruptible=True)

    def start(self, version: int, trained: int, state: dict[str, Any] | None) -> None:
        self._ask(wire.Start(version=version, trained=trained, state=state), wire.Done, "starting to generate")

    def next_batch(self) -> wire.Batch:
        """Raises InterruptedWaitError when the run is told to stop meanwhile; so does `evaluate`."""
        return self._ask(wire.NextBatch(), wire.Batch, "generating and grading the next batch", interruptible=True)

    def publish(self, update: WeightUpdate) -> LoadReport:
        return self._ask(
            wire.Publish(update), wire.Published, f"loading version {update.version} into the engine"
        ).report

    def evaluate(self, name: str) -> EvalResult:
        return self._ask(wire.Evaluate(name), wire.Evaluated, f"evaluating ({name})", interruptible=True).result

    def save_state(self, trained: int) -> dict[str, Any]:
        """The producer's state for a checkpoint whose weights contain `trained` groups.

        Answers to requests that were given up (the run was told to stop while waiting) are passed over: what they
        carried is in the state.
        """
        self._connection.send(wire.SaveState(trained=trained))
        while True:
            answer = self._connection.receive(self._timeout_s, "saving its state", interruptible=False)
            if isinstance(answer, wire.State):
                return answer.state
            if isinstance(answer, wire.Failure):
                raise EngineError(answer.message)

    def stop(self) -> None:
        """Tell the producer to end; it is not waited for."""
        try:
            self._connection.send(wire.Stop())
        finally:
            self._connection.close()

    def _ask(self, request: wire.Request, answer: type[A], waiting_for: str, interruptible: bool = False) -> A:
        self._connection.send(request)
        return self._answer(answer, self._timeout_s, waiting_for, interruptible)

    def _answer(self, kind: type[A], timeout_s: float, waiting_for: str, interruptible: bool) -> A:
        answer = self._connection.receive(timeout_s, waiting_for, interruptible)
        if isinstance(answer, wire.Failure):
            raise EngineError(answer.message)
        assert isinstance(answer, kind), f"asked for {kind.__name__}, got {type(answer).__name__}"
        return answer


def _connect(socket_path: str, timeout_s: float, interrupted: Callable[[], bool]) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(socket_path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError) as error:
            sock.close()
            if interrupted():
                raise InterruptedWaitError("told to stop while starting") from None
            if time.monotonic() > deadline:
                raise StuckError(f"waited {timeout_s:g} s for the producer to open its socket {socket_path}") from error
            time.sleep(0.1)
        except OSError as error:
            sock.close()
            raise PeerLostError(f"cannot connect to the producer at {socket_path}: {error}") from error
