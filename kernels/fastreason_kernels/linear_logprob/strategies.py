"""How log-probabilities and their gradients are made: statistics first and a recompute (B), or a frozen head (F).

It owns the walks over tiles of both. It refuses autograd: function.py wires these into it.

Derivation of F. With z = W x and the gradient of a token g for logp_y and e for the entropy H,
    dx = g (W[y] - p W) - e (p (log p + H)) W = g A + e B,
and neither A nor B knows g or e: both can be made while the logits are in hand, before the loss exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreason_kernels.gemm import HeadGradients, Tiles, clear_tail
from fastreason_kernels.head import HeadOptions, HeadTensors
from fastreason_kernels.partials import finish, merge
from fastreason_kernels.rows import RowCoefficients, RowOps, RowStatistics, row_ops
from fastreason_kernels.shards import first_column, merge_ranks, sum_ranks

OP = "linear_logprob"


def statistics(head: HeadTensors, rows: Tensor, options: HeadOptions) -> RowStatistics:
    """[K] statistics of the tokens rows [K], by blocks of columns where those are smaller than whole rows."""
    tiles = Tiles(head, rows, options, by_columns=True)
    ops = row_ops(OP, head, tiles, options)
    offset = first_column(head, options.group)
    whole = [torch.empty(0, 4, dtype=head.stat_dtype, device=rows.device)]
    for chunk in tiles.row_chunks():
        parts = []
        for columns in tiles.column_blocks():
            parts.append(_tile_partials(head, ops, chunk, tiles.logits(chunk, columns), offset + columns.start))
        whole.append(parts[0] if len(parts) == 1 else merge(torch.stack(parts)))
    partials = torch.cat(whole)
    if options.group:
        partials = merge_ranks(partials, head.weight.shape[0], options.group)
    return RowStatistics(*finish(partials))


def _tile_partials(head: HeadTensors, ops: RowOps, rows: Tensor, logits: Tensor, first: int) -> Tensor:
    parts = []
    for part, z in zip(rows.split(ops.rows), logits.split(ops.rows), strict=True):
        ids, temperature = select(part, head.ids, head.temperature)
        parts.append(ops.partials(z, ids - first, temperature))
    return torch.cat(parts)


def recompute_gradients(
    head: HeadTensors, stats: RowStatistics, g: RowCoefficients, options: HeadOptions, needs: list[bool]
) -> list[Tensor]:
    """Gradients of the five tensors from [N] coefficients and statistics, with the logits of nonzero rows made again."""
    rows = g.nonzero.nonzero().squeeze(1)
    tiles = Tiles(head, rows, options, by_columns=True)
    grads = HeadGradients(head, needs, tiles)
    ops = row_ops(OP, head, tiles, options)
    offset = first_column(head, options.group)
    for chunk in tiles.row_chunks():
        for columns in tiles.column_blocks():
            logits = tiles.logits(chunk, columns)
            out = tiles.gradient_view(logits)
            start = 0
            for part in chunk.split(ops.rows):
                block = slice(start, start + part.shape[0])
                ids, temperature = select(part, head.ids, head.temperature)
                at = RowStatistics(*(x.index_select(0, part) for x in stats))
                c = RowCoefficients(g.logp[part], None if g.entropy is None else g.entropy[part])
                ops.recall(logits[block], temperature, at.lse, g.entropy is not None)
                local = ids - offset - columns.start
                ops.write_dlogits(logits[block], out[block], local, temperature, c, at)
                start = block.stop
            grads.add(out, chunk, columns)
            del logits, out  # so that result() can release their memory
    results = grads.result()
    if options.group:
        results = [sum_ranks(x, options.group) if i in (0, 3) and x.numel() else x for i, x in enumerate(results)]
    return results


def frozen_head(
    head: HeadTensors, rows: Tensor, options: HeadOptions, entropy_grad: bool
) -> tuple[RowStatistics, Tensor, Tensor]:
    """([K] statistics, A [K, D], B [K, D] or empty) of the tokens rows [K], where only hidden wants a gradient."""
    tiles = Tiles(head, rows, options, copies=2 if entropy_grad else 1)
    ops = row_ops(OP, head, tiles, options)
    width, dtype, device = head.hidden.shape[1], head.hidden.dtype, rows.device
    slope = [torch.empty(0, width, dtype=dtype, device=device)]
    entropy_slope = [torch.empty(0, width, dtype=dtype, device=device)]
    found = [torch.empty(0, 3, dtype=head.stat_dtype, device=device)]
    for chunk in tiles.row_chunks():
        logits = tiles.logits(chunk, slice(0, tiles.columns))
        parts = zip(chunk.split(ops.rows), logits.split(ops.rows), strict=True)
        spare = tiles.gradient_view(logits, buffer=1) if entropy_grad else None
        out, start = tiles.gradient_view(logits), 0
        for part, z in parts:
            block = slice(start, start + part.shape[0])
            ids, temperature = select(part, head.ids, head.temperature)
            stats = RowStatistics(*finish(ops.partials(z, ids, temperature)))
            one, zero = torch.ones_like(stats.logp), torch.zeros_like(stats.logp)
            if spare is not None:
                ops.write_dlogits(z, spare[block], ids, temperature, RowCoefficients(zero, one), stats)
                ops.recall(z, temperature, stats.lse, False)
            ops.write_dlogits(z, out[block], ids, temperature, RowCoefficients(one, None), stats)
            found.append(torch.stack(stats, dim=1))
            start = block.stop
        clear_tail(out)
        slope.append(out @ head.weight)
        if spare is not None:
            clear_tail(spare)
            entropy_slope.append(spare @ head.weight)
    return RowStatistics(*torch.cat(found).unbind(1)), torch.cat(slope), torch.cat(entropy_slope)


def select(rows: Tensor, ids: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """ids and temperature of the tokens `rows`."""
    return ids.index_select(0, rows), None if temperature is None else temperature.index_select(0, rows)
