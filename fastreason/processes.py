"""Child processes that never outlive the run: started in a group of their own, watched, ended with all they started."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends; where that cannot be asked for, do nothing."""
    if _libc is not None and hasattr(_libc, "prctl"):
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Child:
    """A started process with the name that messages use and the file that has its output."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path
    segments: set[Path] = field(default_factory=set)

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def note_shared_memory(self) -> None:
        """Remember the shared memory in use, so that `stop` can remove what processes that were killed left there."""
        pids = [self.process.pid, *(process.pid for process in _family(self.process.pid))]
        self.segments |= _shared_memory(pids)

    def stop(self, grace_s: float = 10.0) -> None:
        """End the process and everything it started: SIGTERM, then after `grace_s` SIGKILL."""
        family = _family(self.process.pid)
        self.note_shared_memory()
        _signal_group(self.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=grace_s)
        psutil.wait_procs(family, timeout=max(0.0, min(2.0, deadline - time.monotonic())))
        _signal_group(self.process.pid, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=2.0)
        for segment in self.segments:
            segment.unlink(missing_ok=True)


def spawn(name: str, command: list[str], log_path: Path, environment: dict[str, str]) -> Child:
    """Start `command` in its own session with its output in `log_path`; `environment` is added to ours.

    PYTHONSAFEPATH keeps the working folder off the child's sys.path: in a checkout, the folder `kernels` there would
    shadow the Hugging Face package of that name.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **environment}
    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=merged,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return Child(name, process, log_path)


def tail(log_path: Path, num_lines: int = 25) -> str:
    """The end of a log, indented for a message."""
    if not log_path.is_file():
        return "  (no log)"
    lines = log_path.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join(f"  | {line[:300]}" for line in lines) or "  (the log is empty)"


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
                path = line.partition("/dev/shm/")[2]
                if path.startswith(("psm_", "sem.mp-")) and "/" not in path and not path.endswith("(deleted)"):
                    found.add(Path("/dev/shm") / path)
    return found


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
