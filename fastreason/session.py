"""What the launcher hands to the processes of a run: one small file in a folder that only this user can enter.

The folder also holds the producer's socket, the file whose existence asks the run to stop, and what each process says
at its end. The engine's key is not here: it goes through the environment.
"""

import os
import signal
from pathlib import Path
from types import FrameType

import msgspec

SESSION_VARIABLE = "FASTREASON_SESSION"


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Where things are, and what the launcher has decided once for all processes."""

    folder: str
    run_dir: str
    model_dir: str
    engine_url: str | None
    exchange_dir: str
    device: str
    attention: str
    liger: bool
    resume: bool

    @property
    def socket_path(self) -> str:
        return str(Path(self.folder) / "producer.sock")

    @property
    def stop_file(self) -> Path:
        return Path(self.folder) / "stop"

    def write(self) -> Path:
        path = Path(self.folder) / "session.json"
        path.write_bytes(msgspec.json.encode(self))
        return path


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended. `expected` errors are told to the user as they are; others come with the log's tail."""

    finished: bool
    step: int = 0
    error: str | None = None
    expected: bool = True
    saved: str | None = None


def read_session() -> Session:
    return msgspec.json.decode(Path(os.environ[SESSION_VARIABLE]).read_bytes(), type=Session)


def write_outcome(session: Session, name: str, outcome: Outcome) -> None:
    """Leave the end of process `name` for the launcher."""
    path = Path(session.folder) / f"outcome-{name}.json"
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_bytes(msgspec.json.encode(outcome))
    os.replace(aside, path)


def read_outcome(folder: str | Path, name: str) -> Outcome | None:
    try:
        return msgspec.json.decode((Path(folder) / f"outcome-{name}.json").read_bytes(), type=Outcome)
    except (OSError, msgspec.DecodeError):
        return None


class StopFlag:
    """True once the run was asked to stop: by the launcher's stop file, or by SIGTERM or SIGINT to this process."""

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        return self._signalled or self._stop_file.exists()
