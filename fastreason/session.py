"""What the launcher hands to the processes of a run: one small file in a folder that only this user can enter.

The folder also holds the producer's socket and its spool, the files whose existence asks the run to stop, says that the
engine has answered, that the trainer has its GPUs, or that a part is given up, or asks for a restart, and what each process
says at its end. The engine's key is not here: it goes through the environment.
"""

import os
import signal
from pathlib import Path
from types import FrameType

import msgspec

SESSION_VARIABLE = "FASTREASON_SESSION"
SEGMENTS = "segments"


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Where things are, and what the launcher has decided once for all processes."""

    folder: str
    run_dir: str
    model_dir: str
    exchange_dir: str
    device: str
    attention: str
    liger: bool
    resume: bool
    engine_urls: tuple[str, ...] = ()  # of engines with a server, here or elsewhere
    only: str | None = None  # "rollout" | "train": one phase alone
    groups_dir: str | None = None  # only="train": the written groups
    teacher_dir: str | None = None  # of a teacher in the trainer
    critic_dir: str | None = None  # of a critic that does not begin as the policy does
    silent_ids: tuple[int, ...] = ()  # ends of a response that policy and teacher do not share
    colocated: bool = False  # trainer and engine share GPUs: the engine takes its memory first
    sleeps: bool = False  # and gives it up whenever the trainer computes

    @property
    def socket_path(self) -> str:
        return str(Path(self.folder) / "producer.sock")

    @property
    def stop_file(self) -> Path:
        return Path(self.folder) / "stop"

    @property
    def ready_file(self) -> Path:
        """Touched by the producer once its engine has answered: before, a death is a failed start."""
        return Path(self.folder) / "ready"

    @property
    def tenant_file(self) -> Path:
        """There while the trainer has the GPUs of an engine that sleeps: no engine is started or woken meanwhile."""
        return Path(self.folder) / "trainer-has-the-gpus"

    def given_up_file(self, key: str) -> Path:
        """Touched by the launcher once the part `key` is gone for good, while others of its kind do its work."""
        return Path(self.folder) / f"given-up-{key}"

    @property
    def spool_dir(self) -> Path:
        """Where the producer keeps what it would lose by dying."""
        return Path(self.folder) / "spool"

    @property
    def segments_file(self) -> Path:
        """Where the launcher lists the run's shared memory, for whoever cleans up after a launcher that was killed."""
        return Path(self.folder) / SEGMENTS

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
    _replace(Path(session.folder) / f"outcome-{name}.json", msgspec.json.encode(outcome))


def read_outcome(folder: str | Path, name: str) -> Outcome | None:
    try:
        return msgspec.json.decode((Path(folder) / f"outcome-{name}.json").read_bytes(), type=Outcome)
    except (OSError, msgspec.DecodeError):
        return None


def request_restart(folder: str | Path, name: str, reason: str) -> None:
    """Ask the launcher to end process `name` ("engine") and start it again; `reason` is what the user is told."""
    _replace(Path(folder) / f"restart-{name}", reason.encode())


def take_restart_request(folder: str | Path, name: str) -> str | None:
    """The reason of a request to restart `name`, which is thereby answered; None where there is none."""
    path = Path(folder) / f"restart-{name}"
    try:
        reason = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    path.unlink(missing_ok=True)
    return reason


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, path)


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
