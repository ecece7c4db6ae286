"""Which implementation runs: resolved once per call site, logged once, never swapped silently.

It owns the names auto | triton | torch | reference. It refuses to fall back: an implementation that was asked for by
name and is not there is an error.
"""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger(__name__)

IMPLS = ("auto", "triton", "torch", "reference")

# Operations that have Triton kernels. An operation enters here together with its kernels.py.
TRITON_OPS: frozenset[str] = frozenset()


@functools.cache
def resolve(op: str, impl: str, device_type: str) -> str:
    """Returns triton | torch | reference for `op` on `device_type`; "auto" is triton where it exists, else torch.

    Raises ValueError for an unknown name and NotImplementedError for Triton where `op` has no kernels for the device.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: got {impl!r}, allowed: {' | '.join(IMPLS)}")
    has_triton = op in TRITON_OPS and device_type == "cuda"
    if impl == "triton" and not has_triton:
        raise NotImplementedError(
            f"impl: 'triton' is not available yet for {op} on {device_type}; use impl='auto' or impl='torch'"
        )
    chosen = ("triton" if has_triton else "torch") if impl == "auto" else impl
    logger.info("%s on %s: impl=%s (asked for %s, torch %s)", op, device_type, chosen, impl, torch.__version__)
    return chosen
