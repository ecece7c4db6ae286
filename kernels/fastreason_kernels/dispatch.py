"""Which implementation runs: resolved once per call site, logged once, never swapped silently.

It owns the names auto | triton | torch | reference. It refuses to fall back: an implementation that was asked for by
name and is not there is an error.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

logger = logging.getLogger(__name__)

IMPLS = ("auto", "triton", "torch", "reference")

# Operations that have Triton kernels. An operation enters here together with its kernels.
TRITON_OPS = frozenset({"linear_logprob", "linear_policy_loss", "linear_divergence"})


# The operators choose rows, so a CUDA graph cannot hold them; older versions of torch have no such tag.
OPERATOR_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


@functools.cache
def resolve(op: str, impl: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """Returns triton | torch | reference for `op` on `device_type`; "auto" is triton where it runs, else torch.

    Triton runs on GPUs (and on a CPU where TRITON_INTERPRET=1 asks for its interpreter), in bf16 and fp32. Raises
    ValueError for an unknown name and NotImplementedError for Triton where it does not run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: got {impl!r}, allowed: {' | '.join(IMPLS)}")
    missing = _triton_missing(op, device_type, dtype)
    if impl == "triton" and missing:
        raise NotImplementedError(f"impl: 'triton' does not run here: {missing}; use impl='auto' or impl='torch'")
    chosen = ("torch" if missing else "triton") if impl == "auto" else impl
    why = f", as {missing}" if impl == "auto" and missing else ""
    logger.info("%s on %s: impl=%s (asked for %s%s, torch %s)", op, device_type, chosen, impl, why, torch.__version__)
    return chosen


def _triton_missing(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Why Triton does not run, or an empty string."""
    if op not in TRITON_OPS:
        return f"{op} has no Triton kernels"
    if dtype == torch.float64:
        return "its kernels take no float64"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the device is {device_type}, not a GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return ""
