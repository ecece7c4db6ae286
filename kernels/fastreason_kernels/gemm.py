"""The matrix products of a head, tile by tile: logits, and the sums dX, dW, db and those of a low-rank update.

It owns every product and every buffer as large as a tile. It refuses to hold `[N, V]` when that is more than a tile, and
to know what is done to the logits of a tile. Sums over tiles are fp32 and are cast once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastreason_kernels.head import HeadOptions, HeadTensors
from fastreason_kernels.row_kernels.launch import gradient_view
from fastreason_kernels.workspace import Workspace, empty

# Tiles of whole rows. On a CPU what stays cheap to allocate; on a device 4096 fp32 rows of 152,064 columns, because every
# chunk after the first reads and writes the fp32 dW.
CPU_ROW_BYTES = 256 << 20
DEVICE_ROW_BYTES = 2_500_000_000

# Tiles of columns (strategy B on a device): 8192 columns at 8192 rows in fp32.
TILE_BYTES = 256 << 20
FEWEST_COLUMNS = 2048

# Columns of one CPU product that is widened or transposed on the way: bounds the copy beside its result.
CPU_BLOCK = 1024

# Rows up to which a CPU's bf16 product a.T @ b is the faster one for dW.
FEW_ROWS = 1536

ROW_SIDE, COLUMN_SIDE = (0, 3), (1, 4)  # hidden, lora_hidden; weight, lora_weight


class Tiles:
    """Walks over chosen tokens of a head, one tile of logits `[rows, columns]` at a time, in one reused buffer.

    A tile has whole rows, unless `by_columns`: then it is a block of columns on a device, or where options.chunk_vocab
    asks for it. `copies` buffers as large as a tile share the budget.
    """

    def __init__(
        self,
        head: HeadTensors,
        rows: Tensor,
        options: HeadOptions,
        *,
        by_columns: bool = False,
        copies: int = 1,
        workspace: Workspace | None = None,
    ) -> None:
        self._head, self._rows = head, rows
        device, vocab, count = head.hidden.device, head.weight.shape[0], rows.shape[0]
        self._operands = {index: _Gathered(tensor) for index, tensor in enumerate(head) if index in ROW_SIDE}
        dtype = logits_dtype(head, options)
        if by_columns and (device.type != "cpu" or options.chunk_vocab):
            self.rows = even_split(count, options.chunk_tokens or TILE_BYTES // (FEWEST_COLUMNS * dtype.itemsize))
            fitting = TILE_BYTES // (self.rows * dtype.itemsize) // 256 * 256
            self.columns = min(vocab, options.chunk_vocab or max(FEWEST_COLUMNS, fitting))
        else:
            budget = (CPU_ROW_BYTES if device.type == "cpu" else DEVICE_ROW_BYTES) // copies
            self.rows = even_split(
                count, options.chunk_tokens or max(1, budget // (row_width(vocab, device) * dtype.itemsize))
            )
            self.columns = vocab
        self.num_row_chunks = math.ceil(count / self.rows)
        shape = (min(self.rows, count), row_width(self.columns, device))
        self._workspace = workspace = Workspace() if workspace is None else workspace
        self._buffers = [workspace.empty(f"tile {i}", shape, dtype, device) for i in range(copies)]

    def release(self) -> None:
        """Gives the tile's memory back before sums over several chunks are cast: the peak is one or the other."""
        if self.num_row_chunks > 1:
            self._buffers.clear()
            self._workspace.clear()

    def row_chunks(self) -> Iterator[Tensor]:
        """Yields the tokens [K] int64 of each chunk of rows."""
        return iter(self._rows.split(self.rows) if self._rows.shape[0] else ())

    def column_blocks(self) -> Iterator[slice]:
        """Yields the columns of each tile of a chunk of rows, in order."""
        vocab = self._head.weight.shape[0]
        return (slice(start, min(vocab, start + self.columns)) for start in range(0, vocab, self.columns))

    def logits(self, rows: Tensor, columns: slice) -> Tensor:
        """[K, C] head outputs of the tokens `rows`, before any transform, in the first buffer; free to be overwritten."""
        head, hidden = self._head, self.operand(0, rows)
        weight = head.weight[columns]
        out = self._buffers[0][: rows.shape[0], : weight.shape[0]]
        if head.bias is not None and out.dtype == hidden.dtype:
            torch.addmm(head.bias[columns], hidden, weight.T, out=out)
        else:
            product(hidden, weight.T, out)
            if head.bias is not None:
                out += head.bias[columns]
        if head.lora_hidden is not None and head.lora_weight is not None:
            accumulate(out, self.operand(3, rows), head.lora_weight[columns].T)
        return out

    def operand(self, index: int, rows: Tensor) -> Tensor:
        """Rows of hidden (0) or lora_hidden (3), gathered once for all columns of a chunk."""
        return self._operands[index].at(rows)

    def gradient_view(self, logits: Tensor, buffer: int = 0) -> Tensor:
        """[K, C] in the operands' dtype, in the memory of a buffer: by default that of the logits themselves.

        Where logits are wider than the operands, each row's gradient begins where its logits begin.
        """
        out = self._buffers[buffer][: logits.shape[0], : logits.shape[1]]
        return gradient_view(out) if self._head.hidden.dtype == torch.bfloat16 else out


class _Gathered:
    """The rows of a tensor that were asked for last."""

    def __init__(self, tensor: Tensor | None) -> None:
        self._tensor = tensor
        self._rows: Tensor | None = None
        self._found: Tensor | None = None

    def at(self, rows: Tensor) -> Tensor:
        if self._rows is not rows:
            assert self._tensor is not None
            self._rows, self._found = rows, self._tensor.index_select(0, rows)
        assert self._found is not None
        return self._found


class HeadGradients:
    """Sums the gradients of a head's five tensors over tiles of dlogits, in fp32, each cast once.

    dtypes: of the five results; None takes that of the tensors.
    """

    def __init__(
        self, head: HeadTensors, needs: list[bool], tiles: Tiles, dtypes: list[torch.dtype] | None = None
    ) -> None:
        self._head, self._tiles, self._vocab = head, tiles, head.weight.shape[0]
        self._dtypes = [head.hidden.dtype] * 5 if dtypes is None else dtypes
        self._grads: dict[int, Tensor] = {}
        for index, tensor in enumerate(head.differentiable()):
            if needs[index] and tensor is not None:
                wide = index == 2 or (index in COLUMN_SIDE and tiles.num_row_chunks > 1)
                dtype = head.stat_dtype if wide else self._dtypes[index]
                made = empty(tensor.shape, dtype, tensor.device)
                self._grads[index] = made if index in COLUMN_SIDE else made.zero_()
        self._row_sums: dict[int, Tensor] = {}
        self._first: Tensor | None = None

    def add(self, dlogits: Tensor, rows: Tensor, columns: slice) -> None:
        """Adds dlogits [K, C], the gradient of the head's output `columns` for the tokens `rows` [K].

        The column blocks of one set of rows (the same tensor) come in order, from column 0 to the last.
        """
        if rows.shape[0] == 0:
            return
        clear_tail(dlogits)
        self._first = rows if self._first is None else self._first
        for row_side, column_side in zip(ROW_SIDE, COLUMN_SIDE, strict=True):
            if row_side in self._grads:
                self._add_rows(row_side, dlogits, rows, columns, self._tensor(column_side)[columns])
            if column_side in self._grads:
                operand = self._tiles.operand(row_side, rows)
                add_outer(self._grads[column_side][columns], dlogits, operand, fresh=rows is self._first)
        if 2 in self._grads:
            self._grads[2][columns] += dlogits.sum(0, dtype=self._grads[2].dtype)

    def _add_rows(self, index: int, dlogits: Tensor, rows: Tensor, columns: slice, operand: Tensor) -> None:
        if columns == slice(0, self._vocab):
            self._grads[index].index_copy_(0, rows, dlogits @ operand)
            return
        if columns.start == 0:
            shape = (rows.shape[0], operand.shape[1])
            self._row_sums[index] = torch.zeros(shape, dtype=self._head.stat_dtype, device=dlogits.device)
        accumulate(self._row_sums[index], dlogits, operand)
        if columns.stop == self._vocab:
            self._grads[index].index_copy_(0, rows, self._row_sums.pop(index).to(operand.dtype))

    def _tensor(self, index: int) -> Tensor:
        tensor = self._head[index]
        assert tensor is not None
        return tensor

    def result(self) -> list[Tensor]:
        """The five gradients in their dtypes; an empty tensor where none was asked for. It releases the tiles."""
        self._tiles.release()
        results = []
        for index, dtype in enumerate(self._dtypes):
            grad = self._grads.pop(index, None)
            if grad is not None and self._first is None:
                grad.zero_()
            results.append(self._head.hidden.new_empty(0) if grad is None else grad.to(dtype))
        return results


def logits_dtype(head: HeadTensors, options: HeadOptions) -> torch.dtype:
    """bf16 operands give fp32 logits on a device by default, bf16 logits on a CPU; other operands logits of their own."""
    if head.hidden.dtype != torch.bfloat16:
        return head.hidden.dtype
    if options.logits == "auto":
        return torch.bfloat16 if head.hidden.device.type == "cpu" else torch.float32
    return torch.float32 if options.logits == "fp32" else torch.bfloat16


def gradient_dtypes(head: HeadTensors) -> list[torch.dtype]:
    """The dtypes of gradients that are made in forward and scaled in backward.

    On a device the sums over rows stay fp32 until then, so that one pass scales and casts them; on a CPU, where the scale
    is seen to be 1, they are cast at once and take half of the memory.
    """
    dtype = head.hidden.dtype
    late = dtype if head.hidden.device.type == "cpu" else head.stat_dtype
    return [late if index in COLUMN_SIDE else dtype for index in range(5)]


def scale_gradients(
    grads: tuple[Tensor, ...], needs: list[bool], factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """The gradients [any] that were made in forward times the loss's own gradient [], in `dtype`; None where not needed."""
    # On a CPU the usual factor of 1 is seen without a wait, and spares a pass over dW; a traced one has no value.
    traced = type(factor) is not Tensor
    if not traced and factor.device.type == "cpu" and float(factor) == 1:
        scaled = grads
    elif traced:
        scaled = tuple((grad * factor).to(dtype) for grad in grads)
    else:
        scaled = tuple(torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype)) for grad in grads)
    return tuple(grad if need else None for grad, need in zip(scaled, needs, strict=True))


def row_width(columns: int, device: torch.device) -> int:
    """Elements from one row of a tile to the next: on a device a multiple of 64, which fast products ask for."""
    return columns if device.type == "cpu" else -(-columns // 64) * 64


def even_split(count: int, limit: int) -> int:
    """The size of each part when `count` things are split evenly into as few parts as `limit` allows; at least 1."""
    num_parts = max(1, math.ceil(count / limit))
    return max(1, math.ceil(count / num_parts))


def _accumulates_wide(a: Tensor) -> bool:
    """Whether products of bf16 operands can be written, and added, to fp32: cuBLAS can; a CPU, ROCm and MPS cannot."""
    return a.device.type == "cuda" and torch.version.hip is None


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out [M, L] = a [M, K] @ b [K, L]; out may be fp32 where a and b are bf16, and is then never rounded to bf16."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif not _accumulates_wide(a):
        wide = a.to(out.dtype)
        for start in range(0, b.shape[1], CPU_BLOCK):
            out[:, start : start + CPU_BLOCK] = wide @ b[:, start : start + CPU_BLOCK].to(out.dtype)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def clear_tail(a: Tensor) -> None:
    """Zeroes what lies behind the columns of a [K, C] view into wider bf16 rows, on a CPU, up to a multiple of 32.

    oneDNN's AMX products read it and multiply it by zeros, which makes NaN of stale bits (seen in torch 2.13).
    """
    stride, width = a.stride(0), a.shape[1]
    tail = min(-width % 32, stride - width)
    if a.device.type == "cpu" and a.dtype == torch.bfloat16 and tail > 0:
        a.as_strided((a.shape[0], tail), (stride, 1), a.storage_offset() + width).zero_()


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [M, L] += a [M, K] @ b [K, L]; out may be fp32 where a and b are bf16."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif not _accumulates_wide(a):
        for start in range(0, b.shape[1], CPU_BLOCK):
            # A bf16 product rounds once; the sum is not rounded again.
            out[:, start : start + CPU_BLOCK] += a @ b[:, start : start + CPU_BLOCK]
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def add_outer(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """out [C, D] (+)= a.T @ b for a [K, C], b [K, D]; `fresh` overwrites instead of adding."""
    if a.device.type == "cpu" and a.dtype == torch.bfloat16:
        _add_outer_bf16(out, a, b, fresh)
    elif fresh:
        product(a.T, b, out)
    else:
        accumulate(out, a.T, b)


def _add_outer_bf16(out: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """add_outer on a CPU, a block of out at a time, which bounds the product's own memory."""
    few = a.shape[0] <= FEW_ROWS
    b_transposed = b if few else b.T.contiguous()
    for start in range(0, a.shape[1], CPU_BLOCK):
        columns, block = a[:, start : start + CPU_BLOCK], out[start : start + CPU_BLOCK]
        if few and fresh and out.dtype == a.dtype:
            torch.mm(columns.T, b, out=block)
            continue
        # oneDNN's product of many rows wants the small operand transposed, not the large one: 0.7 of the time.
        part = columns.T @ b if few else (b_transposed @ columns).T
        block.copy_(part) if fresh else block.add_(part)
