"""The error rule of this library's tests, shipped so that users can run it on their own machine and shapes.

It owns the rule, the tolerance table, random inputs, and a recorder of what was allocated. It refuses to know any
operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SLACK = 1.5

# Absolute error allowed beside the rule, relative to the largest entry of the float64 result: what one more rounding in
# that dtype may cost where the eager path happens to be exact.
ATOL: Mapping[torch.dtype, float] = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 4e-3}


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from `exact`; infinite where it is NaN."""
    difference = (actual.detach().double() - exact.detach().double()).abs()
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def assert_no_worse(
    name: str,
    kernel: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    dtype: torch.dtype,
    slack: float = SLACK,
    atol: float | None = None,
) -> None:
    """Asserts err(kernel, exact) <= slack * err(eager, exact) + atol.

    exact: the float64 reference. eager: plain torch in `dtype`. kernel: what is judged, in the same `dtype` (that of
    the inputs: statistics of bf16 logits are fp32 numbers of bf16 quality). Shapes must be equal. atol: absolute; None
    takes ATOL[dtype] * max |exact|. Raises AssertionError with the numbers.
    """
    if not kernel.shape == eager.shape == exact.shape:
        raise AssertionError(f"{name}: shapes {tuple(kernel.shape)}, {tuple(eager.shape)}, {tuple(exact.shape)}")
    if atol is None:
        atol = ATOL[dtype] * (float(exact.detach().double().abs().max()) if exact.numel() else 0.0)
    kernel_error, eager_error = error(kernel, exact), error(eager, exact)
    limit = slack * eager_error + atol
    if not kernel_error <= limit:
        raise AssertionError(
            f"{name}: error {kernel_error:.3e} > {limit:.3e} = {slack} * {eager_error:.3e} (eager) + {atol:.3e}"
        )


@dataclass(frozen=True)
class HeadCase:
    """Random hidden [N, D], weight [V, D], bias [V], ids [N], temperature [N] as an operation takes them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    ids: Tensor
    temperature: Tensor

    def to(self, dtype: torch.dtype) -> HeadCase:
        """The same numbers as fresh leaves in `dtype`; from a narrow dtype to float64 it is exact."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype, copy=True).requires_grad_()

        return HeadCase(leaf(self.hidden), leaf(self.weight), leaf(self.bias), self.ids, self.temperature)


def head_case(
    num_tokens: int,
    vocab: int,
    *,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    shift: float = 0.0,
    seed: int = 0,
) -> HeadCase:
    """Random inputs whose logits have standard deviation 2 and mean `shift`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    case = HeadCase(
        hidden=normal(num_tokens, width),
        weight=normal(vocab, width) * (2 / width**0.5),
        bias=normal(vocab) * 0.3 + shift,
        ids=torch.randint(0, vocab, (num_tokens,), generator=generator),
        temperature=torch.rand(num_tokens, generator=generator) + 0.5,
    )
    return case.to(dtype)


class Recorder:
    """Records, while active, the largest tensor that an ATen operator takes, and the shapes of each matrix product.

    It looks through torch's profiler, which sees inside of custom operators too. largest: elements. products: a list of
    ((rows, inner), (inner, columns)), forward and backward, in order. Both are filled on leaving.
    """

    def __init__(self) -> None:
        self.largest = 0
        self.products: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self._profiler = torch.profiler.profile(record_shapes=True)

    def __enter__(self) -> Recorder:
        self._profiler.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profiler.__exit__(*exception)
        for event in sorted(self._profiler.events(), key=lambda event: event.time_range.start):
            shapes = [tuple(shape) for shape in event.input_shapes if shape and isinstance(shape[0], int)]
            self.largest = max([self.largest, *map(math.prod, shapes)])
            if event.name == "aten::mm":
                self.products.append((shapes[0], shapes[1]))
            elif event.name in ("aten::addmm", "aten::addmm_"):
                self.products.append((shapes[1], shapes[2]))
