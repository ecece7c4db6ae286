"""The trainer's view of the producer: ask for the next batch, publish weights, evaluate, save state."""

import socket
import time
from collections.abc import Callable
from typing import TypeVar

from fastreason.errors import EngineError, InterruptedWaitError, PeerLostError, StuckError
from fastreason.patience import Patience
from fastreason.rollout import wire
from fastreason.types import EvalResult, LoadReport, WeightUpdate

A = TypeVar("A", wire.Ready, wire.Batch, wire.Published, wire.Evaluated, wire.State, wire.Done)


class ProducerClient:
    """Implements the loop's `Rollouts` protocol over the producer's socket.

    Every call waits at most `timeout_s`; `Failure` from the producer becomes EngineError with its message. Where
    `may_rejoin`, a producer that dies is waited for until the launcher has started another (at most `startup_timeout_s`),
    which is told where the trainer stands; the call that was interrupted is then made again.
    """

    def __init__(
        self,
        socket_path: str,
        timeout_s: float,
        startup_timeout_s: float,
        interrupted: Callable[[], bool] = lambda: False,
        may_rejoin: bool = False,
    ) -> None:
        self._socket_path, self._timeout_s, self._startup_timeout_s = socket_path, timeout_s, startup_timeout_s
        self._interrupted, self._may_rejoin = interrupted, may_rejoin
        self._standing = wire.Rejoin(version=0, trained=0, holding=[], started=False)
        self._connect(interrupted)

    def _connect(self, interrupted: Callable[[], bool]) -> None:
        sock = _connect(self._socket_path, self._startup_timeout_s, interrupted)
        self._connection = wire.Connection(sock, self._interrupted)
        self.ready = self._receive(
            wire.Ready, self._startup_timeout_s, "starting the engine", interrupted is self._interrupted
        )

    def start(self, version: int, trained: int, state: bytes | None) -> None:
        self._ask(wire.Start(version=version, trained=trained, state=state), wire.Done, "starting to generate")
        self._standing.started, self._standing.version, self._standing.trained = True, version, trained

    def next_batch(self) -> wire.Batch:
        """Raises InterruptedWaitError when the run is told to stop meanwhile; so does `evaluate`."""
        batch = self._ask(wire.NextBatch(), wire.Batch, "generating and grading the next batch", interruptible=True)
        self._standing.holding = [group.ticket for group in batch.groups]
        return batch

    def publish(self, update: WeightUpdate, trained: int) -> LoadReport:
        """Load `update` into the engines; the weights contain `trained` groups, the batch received last among them."""
        # Where the producer dies before it answers, its heir takes these weights over: there may be no older ones any more.
        self._standing.trained, self._standing.holding, self._standing.update = trained, [], update
        waiting_for = f"loading version {update.version} into the engine"
        report = self._ask(wire.Publish(update), wire.Published, waiting_for).report
        self._standing.version = update.version
        return report

    def collected(self) -> None:
        """The batch received last is safe elsewhere: without training, the next one may follow."""
        self._standing.trained += len(self._standing.holding)
        self._standing.holding = []
        self._ask(wire.Collected(), wire.Done, "noting that a batch is written down")

    def evaluate(self, name: str) -> EvalResult:
        return self._ask(wire.Evaluate(name), wire.Evaluated, f"evaluating ({name})", interruptible=True).result

    def save_state(self, trained: int, settle: bool) -> bytes:
        """The producer's state for a checkpoint whose weights contain `trained` groups.

        Answers to requests that were given up (the run was told to stop while waiting) are passed over: what they
        carried is in the state.
        """
        request = wire.SaveState(trained=trained, settle=settle)
        return self._ask(request, wire.State, "saving its state", passing_over=True).state

    def stop(self) -> None:
        """Tell the producer to end; it is not waited for."""
        try:
            self._connection.send(wire.Stop())
        finally:
            self._connection.close()

    def _ask(
        self,
        request: wire.Request,
        answer: type[A],
        waiting_for: str,
        interruptible: bool = False,
        passing_over: bool = False,
    ) -> A:
        while True:
            try:
                self._connection.send(request)
                return self._receive(answer, self._timeout_s, waiting_for, interruptible, passing_over)
            except PeerLostError:
                if not self._may_rejoin:
                    raise
            self._rejoin(self._interrupted if interruptible else lambda: False)

    def _rejoin(self, interrupted: Callable[[], bool]) -> None:
        """Find the producer that took the place of the one that died, and tell it where we stand."""
        while True:
            self._connection.close()
            try:
                self._connect(interrupted)
                self._connection.send(self._standing)
                self._receive(wire.Done, self._startup_timeout_s, "taking over from the producer that died", False)
                return
            except PeerLostError:
                continue  # that one died as well: the launcher decides whether there will be another

    def _receive(
        self, kind: type[A], timeout_s: float, waiting_for: str, interruptible: bool, passing_over: bool = False
    ) -> A:
        while True:
            answer = self._connection.receive(timeout_s, waiting_for, interruptible)
            if isinstance(answer, wire.Failure):
                raise EngineError(answer.message)
            if isinstance(answer, kind):
                return answer
            assert passing_over, f"asked for {kind.__name__}, got {type(answer).__name__}"


def _connect(socket_path: str, timeout_s: float, interrupted: Callable[[], bool]) -> socket.socket:
    patience = Patience(timeout_s)
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(socket_path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError) as error:
            sock.close()
            if interrupted():
                raise InterruptedWaitError("told to stop while starting") from None
            patience.look()
            if patience.exhausted:
                raise StuckError(f"waited {timeout_s:g} s for the producer to open its socket {socket_path}") from error
            time.sleep(0.1)
        except OSError as error:
            sock.close()
            raise PeerLostError(f"cannot connect to the producer at {socket_path}: {error}") from error
