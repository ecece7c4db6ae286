"""Work memory of one call: buffers that its parts use in turn, and large CPU tensors on huge pages.

It owns no memory beyond the call. It refuses to keep a buffer from one call to the next: a trainer needs that memory for
its own activations.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

# From here on the kernel's faults on small pages show: 100 MB of fresh memory cost 40 ms of a 400 ms call.
HUGE_FROM_BYTES = 8 << 20
HUGE_PAGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14


class Workspace:
    """Buffers by name, each as large as its largest use so far; a second use of a name overwrites the first."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def clear(self) -> None:
        """Forgets all buffers; those in use elsewhere live on there."""
        self._held.clear()

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor of `shape` in the buffer `name`."""
        count = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.shape[0] < count:
            self._held.pop((name, dtype), None)
            held = self._held[name, dtype] = empty((count,), dtype, device)
        return held[:count].view(shape)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; on a CPU the kernel is asked for huge pages where the tensor is large."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= HUGE_FROM_BYTES and (advise := _madvise()):
        first = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        advise(first, end - first, MADV_HUGEPAGE)  # advice: a kernel without huge pages says no, which changes nothing
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError, AttributeError):
        function = ctypes.CDLL(None).madvise
        function.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
        return function
    return None
