"""A run's folder: made new, held by one start at a time, and its config.

Two starts on one folder would cut each other's ledger and metrics. So the launcher holds `.lock` there, and the processes
that write into the folder hold the folder itself: those of a launcher that was killed may still be saving.
"""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastreason.config import Config, dump_config
from fastreason.errors import ConfigError
from fastreason.metrics import write_atomically

LOCK_FILE = ".lock"
ENDING_S = 30.0  # for so long the processes of a launcher that was killed may save what they have
LOOK_S = 0.1


def make_run_dir(config: Config) -> Path:
    """A new folder for the run, never one that exists: with `run.on_exists: number`, name-2, name-3, ..."""
    parent = Path(config.run.dir)
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        path = parent / (config.run.name if number == 1 else f"{config.run.name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            if config.run.on_exists == "number":
                continue
            raise ConfigError(
                f"run.name={config.run.name!r}: {path} exists already, and a run never shares a folder. Choose another "
                f"run.name, set run.on_exists=number, or go on with it: fastreason train --resume {path}"
            ) from None
        return path.resolve()
    raise ConfigError(f"run.name={config.run.name!r}: ten thousand runs of that name exist under {parent}.")


def write_config(config: Config, run_dir: Path) -> None:
    write_atomically(run_dir / "config.yaml", dump_config(config))


@contextlib.contextmanager
def held(run_dir: Path, ending_s: float = ENDING_S) -> Iterator[None]:
    """Hold a run's folder; raises ConfigError where another start of it is alive, or its processes do not end."""
    with open(run_dir / LOCK_FILE, "a+") as file:
        if not _lock(file.fileno(), fcntl.LOCK_EX, run_dir):
            file.seek(0)
            pid = file.read().strip()
            raise ConfigError(
                f"{run_dir}: the run is under way{f' (process {pid})' if pid else ''}, and two starts would spoil each "
                "other's files. Wait for its end, or stop it with Ctrl-C or SIGTERM."
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        _await_others(run_dir, ending_s)
        try:
            yield
        finally:
            file.truncate(0)


def share(run_dir: Path) -> None:
    """As a process of the run, until its end: no other start takes the folder meanwhile."""
    _lock(os.open(run_dir, os.O_RDONLY), fcntl.LOCK_SH, run_dir)


def _await_others(run_dir: Path, ending_s: float) -> None:
    deadline = time.monotonic() + ending_s
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        while not _lock(folder, fcntl.LOCK_EX, run_dir):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{run_dir}: processes of its last start are still there after {ending_s:g} s, and write into it. See "
                    "`fuser -v` of that folder; end them first."
                )
            time.sleep(LOOK_S)
    finally:
        os.close(folder)  # and so unlocks it


def _lock(descriptor: int, kind: int, run_dir: Path) -> bool:
    """Whether the lock could be had; where the file system has none, say so and go on without."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"{run_dir} cannot be locked ({error}): nothing keeps a second start away from it", file=sys.stderr)
    return True
