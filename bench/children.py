"""What benchmarks of whole trainers share: a trainer as a child process, its memory, its end, the machine's name."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import threading
from pathlib import Path

import psutil

PART_SECONDS = 1800  # longest run of one trainer
LOOK_S = 1.0  # between two looks at the memory


class MemoryPeak(threading.Thread):
    """Samples the memory of a process and all below it; `mb` is the largest sum, shared pages counted once (PSS)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.mb = 0.0
        self._pid, self._ended = pid, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            total = 0
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self._pid)
                for process in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        memory = process.memory_full_info()
                        total += getattr(memory, "pss", memory.rss)
            self.mb = max(self.mb, total / 1e6)

    def stop(self) -> None:
        self._ended.set()


def run_child(command: list[str], log: Path, seconds: float = PART_SECONDS, grace_s: float = 20) -> float:
    """Run a command to its end, all that it prints into `log`; returns its peak memory, MB.

    Raises SystemExit with the end of the log when it fails or takes longer than `seconds`; whatever happens, nothing of it
    keeps running.
    """
    with open(log, "wb") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        peak = MemoryPeak(child.pid)
        peak.start()
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{' '.join(command)}: not done in {seconds:g} s; see {log}") from None
        finally:
            peak.stop()
            end_group(child, grace_s)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text(errors='replace')[-3000:]}")
    return peak.mb


def end_group(child: subprocess.Popen[bytes], grace_s: float = 20) -> None:
    """End a child and its process group: asked first, since it cleans up after itself, killed after `grace_s`."""
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
            return


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()
