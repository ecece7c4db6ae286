"""The trainer's turns on GPUs that an engine has too and sleeps on meanwhile.

It owns the sign that the trainer is there, a file, and the return of memory that no tensor needs. It refuses to talk to the
engine: who has handed out a batch has put it to sleep, and what is published wakes it.
"""

import gc
from pathlib import Path

import torch

from fastreason.ranks import Ranks


class Tenancy:
    """`take` before the ranks compute, `release` before the engine is asked for anything; on all ranks, in the same order."""

    def __init__(self, file: Path, ranks: Ranks) -> None:
        self._file, self._ranks = file, ranks

    def take(self) -> None:
        if self._ranks.is_first:
            self._file.touch()

    def release(self) -> None:
        """Give freed memory back to the device: torch keeps it, and the engine could not have it. Waits for all ranks."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self._ranks.barrier()
        if self._ranks.is_first:
            self._file.unlink(missing_ok=True)
