"""The error rule of this library's tests, shipped so that users can run it on their own machine and shapes.

It owns the rule, the tolerance table, random inputs, and a recorder of what was allocated. It refuses to know any
operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class Recorder(TorchDispatchMode):
    """Records, while active, the largest tensor made (in elements) and the shapes of each matrix product.

    products: a list of ((rows, inner), (inner, columns)), forward and backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.products.append((tuple(left.shape), tuple(right.shape)))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result
