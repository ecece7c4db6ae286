"""Child processes that never outlive the run: started in a group of their own, watched, ended with all they started."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
SHARED_MEMORY = Path("/dev/shm")
SEGMENT_NAMES = ("psm_", "sem.mp-")
_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask Linux to signal this process when its parent ends; where that cannot be asked for, do nothing."""
    if _libc is not None and hasattr(_libc, "prctl"):
        _libc.prctl(PR_SET_PDEATHSIG, number)


@dataclass
class Child:
    """A started process with the name that messages use and the file that has its output, from `log_start` on."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path
    log_start: int = 0
    family: set[psutil.Process] = field(default_factory=set)
    segments: set[Path] = field(default_factory=set)

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def note_family(self) -> None:
        """Remember its processes and the shared memory in use, so that `stop` finds both where it is killed meanwhile."""
        self.family = {process for process in self.family if process.is_running()} | set(_family(self.process.pid))
        self.segments |= _shared_memory([self.process.pid, *(process.pid for process in self.family)])

    def stop(self, grace_s: float = 10.0) -> None:
        """End the process and everything it started: SIGTERM, then after `grace_s` SIGKILL; with 0 SIGKILL alone."""
        self.note_family()
        if grace_s:
            _signal_group(self.process.pid, signal.SIGTERM)
            _signal_group(self.process.pid, signal.SIGCONT)  # what is stopped ends only when it goes on
            deadline = time.monotonic() + grace_s
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=grace_s)
            psutil.wait_procs(self.family, timeout=max(0.0, min(2.0, deadline - time.monotonic())))
        _signal_group(self.process.pid, signal.SIGKILL)
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(self.family, timeout=2.0)
        remove_segments(self.segments)


def spawn(
    name: str, command: list[str], log_path: Path, environment: dict[str, str], cores: list[int] | None = None
) -> Child:
    """Start `command` in its own session with its output in `log_path`; `environment` is added to ours.

    It and all that it starts run on `cores` only, where those are given and the system can be asked for that.

    PYTHONSAFEPATH keeps the working folder off the child's sys.path: in a checkout, the folder `kernels` there would
    shadow the Hugging Face package of that name.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **environment}

    def prepare() -> None:
        die_with_parent()
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

    with open(log_path, "ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=merged,
            start_new_session=True,
            preexec_fn=prepare,
        )
    return Child(name, process, log_path, log_start)


def free_port(host: str = "") -> int:
    """A port that nobody has at the moment, on all addresses of this machine or on one."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def tail(log_path: Path, num_lines: int = 25) -> str:
    """The end of a log, indented for a message."""
    if not log_path.is_file():
        return "  (no log)"
    lines = log_path.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join(f"  | {line[:300]}" for line in lines) or "  (the log is empty)"


def remove_segments(paths: Iterable[Path]) -> None:
    """Remove shared memory of Python's multiprocessing, and nothing else that may be named."""
    for path in paths:
        if path.parent == SHARED_MEMORY and path.name.startswith(SEGMENT_NAMES):
            path.unlink(missing_ok=True)


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _shared_memory(pids: list[int]) -> set[Path]:
    """The named segments and semaphores of Python's multiprocessing that these processes have mapped."""
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                name = line.partition(f"{SHARED_MEMORY}/")[2]
                if name.startswith(SEGMENT_NAMES) and "/" not in name and not name.endswith("(deleted)"):
                    found.add(SHARED_MEMORY / name)
    return found


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
