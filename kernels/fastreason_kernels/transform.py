"""What a head does to a raw logit before the temperature: scale, then a soft cap.

It owns the two numbers and their checks. It refuses the temperature, which may differ from row to row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """z = softcap * tanh(scale * raw / softcap), or scale * raw where softcap is None; the caller divides by temperature.

    scale > 0: Cohere's logit scale. softcap > 0: Gemma 2's final cap (arXiv 2408.00118). A raw logit of -inf is a removed
    column and stays -inf under the cap too. Raises ValueError for other values.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("softcap", self.softcap)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}, allowed: a finite number > 0; leave it out for none")

    @property
    def is_identity(self) -> bool:
        """True where the transform changes no logit."""
        return self.scale == 1 and self.softcap is None

    def apply(self, raw: Tensor) -> Tensor:
        """z of raw [...] in raw's dtype, differentiable: the specification that the kernels are tested against."""
        z = raw if self.scale == 1 else raw * self.scale
        if self.softcap is None:
            return z
        return torch.where(raw == -math.inf, raw, self.softcap * torch.tanh(z / self.softcap))


IDENTITY = Transform()
