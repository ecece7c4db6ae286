"""Softmax statistics of a row from statistics of its parts: tiles of columns, or ranks of a sharded vocabulary.

It owns the four numbers of a part and their merge. It refuses to read logits. The order of the merges is the caller's:
the same order gives the same bits.

    m = max_j z_j,  s = sum_j exp(z_j - m),  z_id (-inf where the target is in another part),
    ez = sum_j exp(z_j - m) (z_j - m);  a part without any column has m = -inf, s = ez = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(parts: Tensor) -> Tensor:
    """Partials [R, 4] of the union of disjoint parts, from partials [P, R, 4] of each, in their dtype."""
    # A finite stand-in for -inf: the difference of two absent maxima is then 0 instead of NaN.
    floor = torch.finfo(parts.dtype).min / 4
    maxima, sums, targets, weighted = parts.unbind(2)
    top = maxima.amax(0)
    below = maxima.clamp(min=floor) - top.clamp(min=floor)
    shrink = below.exp()
    total = (sums * shrink).sum(0)
    return torch.stack([top, total, targets.amax(0), ((weighted + sums * below) * shrink).sum(0)], dim=1)


def finish(partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), each [R] in nats, from partials [R, 4] of whole rows.

        lse = m + log s,  logp = z_id - m - log s,  entropy = log s - ez / s

    A row without any column left gives lse = -inf and NaN for the others.
    """
    top, total, target, weighted = partials.unbind(1)
    log_total = total.log()
    return target - top - log_total, log_total - weighted / total, top + log_total
