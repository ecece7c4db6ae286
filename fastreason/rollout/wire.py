"""Messages between the trainer and the producer: MessagePack over a Unix socket in a folder only this user can enter.

Each message is a length (4 bytes, big endian) and the MessagePack of one tagged struct. The trainer asks, the producer
answers; a `Failure` may come instead of any answer, and a `Waiting` any number of times before one.
"""

import asyncio
import socket
import struct
from collections.abc import Callable

import msgspec

from fastreason.errors import InterruptedWaitError, PeerLostError, StuckError
from fastreason.patience import Patience
from fastreason.types import EvalResult, Group, LoadReport, WeightUpdate

SEND_TIMEOUT_S = 120.0


class Start(msgspec.Struct, tag=True):
    """Begin issuing; `version` is that of the engines now, `trained` the groups trained so far, `state` a checkpoint's."""

    version: int
    trained: int
    state: bytes | None = None


class Rejoin(msgspec.Struct, tag=True):
    """To a producer that took the place of one that died: where the trainer stands.

    `update` is what the engines are to hold, which may be the version that is about to follow; `holding` are the tickets of
    the batch that the trainer has and has not trained. `started` is False where Start had not been sent yet.
    """

    version: int
    trained: int
    holding: list[int]
    started: bool
    update: WeightUpdate | None = None


class NextBatch(msgspec.Struct, tag=True):
    pass


class Publish(msgspec.Struct, tag=True):
    """Load new weights into the engines; the batch handed out last is in them."""

    update: WeightUpdate


class Collected(msgspec.Struct, tag=True):
    """The batch handed out last is written down and will not be trained on here; no new weights follow from it."""


class Evaluate(msgspec.Struct, tag=True):
    name: str


class SaveState(msgspec.Struct, tag=True):
    """Ask for the state; `trained` groups are in the trainer's weights, whatever was handed out after them is not.

    `settle` first waits for what older weights are still generating, so that a resumed run finds it finished.
    """

    trained: int
    settle: bool = False


class Stop(msgspec.Struct, tag=True):
    pass


class Ready(msgspec.Struct, tag=True):
    engine: str
    num_train_prompts: int
    num_eval_prompts: int


class Batch(msgspec.Struct, tag=True):
    groups: list[Group]
    generate_s: float
    grade_s: float
    figures: dict[str, float] = {}


class Published(msgspec.Struct, tag=True):
    report: LoadReport


class Evaluated(msgspec.Struct, tag=True):
    result: EvalResult


class State(msgspec.Struct, tag=True):
    state: bytes


class Done(msgspec.Struct, tag=True):
    pass


class Failure(msgspec.Struct, tag=True):
    message: str


class Waiting(msgspec.Struct, tag=True):
    """What the producer itself waits for, so that a wait that is too long can name it; no answer."""

    what: str


Request = Start | Rejoin | NextBatch | Publish | Collected | Evaluate | SaveState | Stop
Answer = Ready | Batch | Published | Evaluated | State | Done | Failure
Message = Answer | Waiting

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_answer_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Request | Message) -> bytes:
    body = _encoder.encode(message)
    return struct.pack(">I", len(body)) + body


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request, or None when the trainer has closed the connection."""
    try:
        (size,) = struct.unpack(">I", await reader.readexactly(4))
        return _request_decoder.decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None


class Connection:
    """The trainer's end: a blocking socket with a limit on every wait."""

    def __init__(self, sock: socket.socket, interrupted: Callable[[], bool] = lambda: False) -> None:
        self._sock, self._interrupted = sock, interrupted
        self._said = ""

    def send(self, message: Request) -> None:
        # Waits only where the request is larger than the socket's buffers and the producer's event loop is busy.
        self._sock.settimeout(SEND_TIMEOUT_S)
        try:
            self._sock.sendall(encode(message))
        except TimeoutError as error:
            raise StuckError(
                f"waited {SEND_TIMEOUT_S:g} s for the producer to read a {type(message).__name__} request: it hangs. See "
                "logs/producer.log in the run's folder."
            ) from error
        except OSError as error:
            raise PeerLostError(f"the producer closed its connection: {error}") from error

    def receive(self, timeout_s: float, waiting_for: str, interruptible: bool = True) -> Answer:
        """The next answer.

        Raises StuckError naming what was waited for, PeerLostError if the producer is gone, InterruptedWaitError if the run
        was told to stop before anything arrived (the connection stays usable).
        """
        patience, self._said = Patience(timeout_s), ""
        while True:
            (size,) = struct.unpack(">I", self._read(4, patience, waiting_for, interruptible))
            message = _answer_decoder.decode(self._read(size, patience, waiting_for, False))
            if not isinstance(message, Waiting):
                return message
            self._said = message.what
            patience.look()
            if patience.exhausted:
                raise self._stuck(patience, waiting_for)

    def _read(self, size: int, patience: Patience, waiting_for: str, interruptible: bool) -> bytes:
        self._sock.settimeout(0.5)  # so that a signal to stop is seen within half a second
        chunks: list[bytes] = []
        missing = size
        while missing:
            try:
                chunk = self._sock.recv(min(missing, 1 << 20))
            except TimeoutError as error:
                if interruptible and not chunks and self._interrupted():
                    raise InterruptedWaitError(f"told to stop while {waiting_for}") from None
                patience.look()
                if not patience.exhausted:
                    continue
                raise self._stuck(patience, waiting_for) from error
            except OSError as error:
                raise PeerLostError(f"the producer closed its connection while {waiting_for}: {error}") from error
            if not chunk:
                raise PeerLostError(
                    f"the producer ended while {waiting_for}; see logs/producer.log in the run's folder"
                )
            chunks.append(chunk)
            missing -= len(chunk)
        return b"".join(chunks)

    def _stuck(self, patience: Patience, waiting_for: str) -> StuckError:
        said = f" It last said that it waits for {self._said}." if self._said else ""
        return StuckError(
            f"waited {patience.limit_s:g} s (run.timeout_s) for the producer: {waiting_for}.{said} See logs/producer.log and "
            "logs/engine*.log in the run's folder; raise run.timeout_s if generation is that slow."
        )

    def close(self) -> None:
        self._sock.close()
