"""The LM head in chunks of tokens: the chunk rule, checked inputs, logits, and the gradients dX, dW, db.

It owns every GEMM and every buffer as large as a chunk. It refuses to hold `[N, V]` when N is more than a chunk, and to
know what is done to the logits of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20

# Vocabulary rows of one partial dW product, when several chunks are summed in fp32: bounds the product's own buffer.
DW_BLOCK = 8192

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class HeadInputs:
    """Checked inputs of an operation on `logits = (hidden @ weight.T + bias) / temperature`, in one dtype.

    hidden [N, D], weight [V, D], bias [V] or None, ids [N] int64, temperature [N] or None for 1. `needs` tells which of
    (hidden, weight, bias) wants a gradient in this call.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    temperature: Tensor | None
    chunk_tokens: int | None
    needs: tuple[bool, bool, bool]

    @property
    def stat_dtype(self) -> torch.dtype:
        """The dtype of statistics and row arithmetic: fp32, or fp64 for fp64 inputs."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    chunk_tokens: int | None,
) -> HeadInputs:
    """Checks the inputs, applies autocast's cast, and returns them; raises ValueError naming what is wrong."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden, weight: shapes {tuple(hidden.shape)}, {tuple(weight.shape)}, allowed: [N, D], [V, D]; flatten "
            "batch and sequence into N"
        )
    num_tokens, vocab = hidden.shape[0], weight.shape[0]
    if ids.shape != (num_tokens,) or ids.dtype != torch.int64:
        raise ValueError(f"ids: shape {tuple(ids.shape)} {ids.dtype}, allowed: [N] = [{num_tokens}] int64")
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias: shape {tuple(bias.shape)}, allowed: [V] = [{vocab}]")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: got {chunk_tokens}, allowed: None or >= 1")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if len(dtypes) > 1 or hidden.dtype not in DTYPES:
        names = sorted(str(dtype) for dtype in dtypes)
        raise ValueError(f"hidden, weight, bias: dtypes {names}, allowed: one of {DTYPES} for all of them")
    grad = torch.is_grad_enabled()
    needs = (
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    stat_dtype = torch.promote_types(hidden.dtype, torch.float32)
    scale = _temperature(temperature, num_tokens, stat_dtype, hidden.device)
    return HeadInputs(hidden, weight, bias, ids, scale, chunk_tokens, needs)


def check_ids(ids: Tensor, vocab: int) -> None:
    """Raises ValueError for an id outside [0, V). On a CPU only: elsewhere it would wait for the device."""
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(
            f"ids: values {int(ids.min())} to {int(ids.max())}, allowed: 0 to {vocab - 1}; mask the others"
        )


def _temperature(
    temperature: float | Tensor, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if isinstance(temperature, Tensor):
        if temperature.shape != (num_tokens,):
            raise ValueError(f"temperature: shape {tuple(temperature.shape)}, allowed: a float or [N] = [{num_tokens}]")
        if temperature.device.type == "cpu" and not bool((temperature > 0).all()):
            raise ValueError(f"temperature: smallest value {float(temperature.min())}, allowed: > 0")
        return temperature.detach().to(dtype)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, allowed: > 0")
    return None if temperature == 1 else torch.full((num_tokens,), temperature, dtype=dtype, device=device)


def chunk_rows(num_rows: int, vocab: int, itemsize: int, chunk_tokens: int | None) -> int:
    """Tokens of a chunk: `chunk_tokens`, or as many as keep its logits within CHUNK_BYTES, spread evenly."""
    limit = chunk_tokens or max(1, CHUNK_BYTES // (vocab * itemsize))
    num_chunks = max(1, math.ceil(num_rows / limit))
    return min(limit, max(1, math.ceil(num_rows / num_chunks)))


class HeadGradients:
    """Sums dX, dW and db over chunks of dlogits, in fp32, each cast once at the end."""

    def __init__(self, head: HeadInputs, needs: tuple[bool, bool, bool], num_chunks: int) -> None:
        self._head = head
        self._single = num_chunks == 1
        self._hidden_grad = torch.zeros_like(head.hidden) if needs[0] else None
        self._wants_weight = needs[1]
        self._weight_grad: Tensor | None = None
        self._bias_grad: Tensor | None = None
        if needs[2]:
            self._bias_grad = torch.zeros(head.weight.shape[0], dtype=head.stat_dtype, device=head.hidden.device)

    def add(self, dlogits: Tensor, rows: Tensor) -> None:
        """Adds dlogits [K, V], the gradient of the head's output for the tokens rows [K]."""
        if rows.shape[0] == 0:
            return
        if self._hidden_grad is not None:
            self._hidden_grad.index_copy_(0, rows, dlogits @ self._head.weight)
        if self._wants_weight:
            self._add_weight(dlogits, self._head.hidden.index_select(0, rows))
        if self._bias_grad is not None:
            self._bias_grad += dlogits.sum(0, dtype=self._bias_grad.dtype)

    def _add_weight(self, dlogits: Tensor, hidden: Tensor) -> None:
        weight = self._head.weight
        if self._single:
            self._weight_grad = dlogits.T @ hidden
            return
        if self._weight_grad is None:
            self._weight_grad = torch.zeros(weight.shape, dtype=self._head.stat_dtype, device=weight.device)
        if hidden.dtype == self._weight_grad.dtype:
            self._weight_grad.addmm_(dlogits.T, hidden)
            return
        for start in range(0, weight.shape[0], DW_BLOCK):
            # A bf16 GEMM rounds its result once; the sum over chunks is not rounded again.
            self._weight_grad[start : start + DW_BLOCK] += dlogits[:, start : start + DW_BLOCK].T @ hidden

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX, dW, db) in the dtypes of their tensors, None where no gradient was asked for."""
        weight_grad = self._weight_grad
        if self._wants_weight:
            weight_grad = torch.zeros_like(self._head.weight) if weight_grad is None else weight_grad
            weight_grad = weight_grad.to(self._head.weight.dtype)
        bias_grad = self._bias_grad
        if bias_grad is not None:
            bias_grad = bias_grad.to(self._head.weight.dtype)
        return self._hidden_grad, weight_grad, bias_grad


class LogitChunks:
    """Walks over chosen tokens of a head, one chunk of logits at a time, in one reused buffer."""

    def __init__(self, head: HeadInputs, rows: Tensor) -> None:
        self._head = head
        self._rows = rows
        vocab, dtype = head.weight.shape[0], head.hidden.dtype
        self.chunk = chunk_rows(rows.shape[0], vocab, dtype.itemsize, head.chunk_tokens)
        self.count = math.ceil(rows.shape[0] / self.chunk)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (rows [C] int64, logits [C, V] before temperature); the logits may be overwritten."""
        head = self._head
        size = min(self.chunk, self._rows.shape[0])
        buffer = torch.empty(size, head.weight.shape[0], dtype=head.hidden.dtype, device=head.hidden.device)
        for rows in self._rows.split(self.chunk) if self._rows.shape[0] else ():
            hidden, logits = head.hidden.index_select(0, rows), buffer[: rows.shape[0]]
            if head.bias is None:
                torch.mm(hidden, head.weight.T, out=logits)
            else:
                torch.addmm(head.bias, hidden, head.weight.T, out=logits)
            yield rows, logits
