"""The low-rank update of a head, as the operations take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LoraHead(NamedTuple):
    """Adds `scale * (hidden @ a.T) @ b.T` to the head's logits (LoRA, arXiv 2106.09685).

    a [r, D], b [V, r], in the dtype of hidden, both differentiated. scale: alpha / r. Left out: dropout, DoRA.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
