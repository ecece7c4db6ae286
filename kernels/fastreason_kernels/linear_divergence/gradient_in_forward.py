"""A divergence and its gradient are made while the logits of both models are in hand: 3 head products, and the teacher's 1.

It owns the walks over chunks. It refuses autograd and arithmetic on logits: the latter is rows.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastreason_kernels import gemm
from fastreason_kernels.dispatch import resolve
from fastreason_kernels.gemm import HeadGradients, Tiles, gradient_dtypes, logits_dtype
from fastreason_kernels.head import HeadOptions, HeadTensors
from fastreason_kernels.linear_divergence.rows import (
    AtenDivergence,
    AtenOthers,
    DivergenceRows,
    TopKRows,
    TritonDivergence,
    TritonOthers,
)
from fastreason_kernels.linear_divergence.topk import DivergenceSpec, topk_divergence

OP = "linear_divergence"


def against_teacher(
    heads: tuple[HeadTensors, HeadTensors],
    options: tuple[HeadOptions, HeadOptions],
    spec: DivergenceSpec,
    rows: Tensor,
    weight: Tensor,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """([K] divergence of the tokens rows [K], the student's five gradients of sum(weight [N] * divergence)).

    heads, options: the student's and the teacher's, with the same columns.
    """
    student, teacher = _paired_tiles(heads, options, rows)
    grads = HeadGradients(heads[0], needs, student, gradient_dtypes(heads[0]))
    ops = _divergence_rows(heads, options, spec, student)
    columns = slice(0, student.columns)
    values = [torch.empty(0, dtype=heads[0].stat_dtype, device=rows.device)]
    for chunk in student.row_chunks():
        logits, others = student.logits(chunk, columns), teacher.logits(chunk, columns)
        gradient = student.gradient_view(logits)
        blocks = (x.split(ops.rows) for x in (chunk, logits, others, gradient))
        for part, z, z_teacher, out in zip(*blocks, strict=True):
            values.append(ops.load(z, z_teacher, *(_at(head.temperature, part) for head in heads)))
            if any(needs):
                ops.write_dlogits(z, out, weight.index_select(0, part))
        if any(needs):
            grads.add(gradient, chunk, columns)
    return torch.cat(values).to(heads[0].stat_dtype), grads.result()


def against_top_k(
    head: HeadTensors,
    options: HeadOptions,
    spec: DivergenceSpec,
    ids: Tensor,
    teacher_logp: Tensor,
    rows: Tensor,
    weight: Tensor,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """As against_teacher, for a teacher known by its log-probabilities [N, K] at ids [N, K]."""
    tiles = Tiles(head, rows, options)
    grads = HeadGradients(head, needs, tiles, gradient_dtypes(head))
    ops = _top_k_rows(head, options, tiles)
    columns = slice(0, tiles.columns)
    values = [torch.empty(0, dtype=head.stat_dtype, device=rows.device)]
    for chunk in tiles.row_chunks():
        logits = tiles.logits(chunk, columns)
        gradient = tiles.gradient_view(logits)
        for part, z, out in zip(*(x.split(ops.rows) for x in (chunk, logits, gradient)), strict=True):
            known, at = teacher_logp.index_select(0, part), ids.index_select(0, part)
            present = (at >= 0) & (known > -torch.inf)
            logp, rest = ops.load(z, at, present, _at(head.temperature, part))
            value, slope, rest_slope = topk_divergence(logp, rest, known, present, spec, tiles.columns)
            values.append(value.to(head.stat_dtype))
            if any(needs):
                at_weight = weight.index_select(0, part)
                ops.write_dlogits(z, out, slope * at_weight[:, None], rest_slope * at_weight)
        if any(needs):
            grads.add(gradient, chunk, columns)
    return torch.cat(values), grads.result()


def _paired_tiles(
    heads: tuple[HeadTensors, HeadTensors], options: tuple[HeadOptions, HeadOptions], rows: Tensor
) -> tuple[Tiles, Tiles]:
    """The tiles of both heads: the same rows, together within the budget of one."""
    limit = options[0].chunk_tokens
    if limit is None:
        budget = gemm.CPU_ROW_BYTES if rows.device.type == "cpu" else gemm.DEVICE_ROW_BYTES
        itemsize = sum(logits_dtype(head, option).itemsize for head, option in zip(heads, options, strict=True))
        limit = max(1, budget // (heads[0].weight.shape[0] * itemsize))
    first, second = (
        Tiles(head, rows, replace(option, chunk_tokens=limit)) for head, option in zip(heads, options, strict=True)
    )
    return first, second


def _divergence_rows(
    heads: tuple[HeadTensors, HeadTensors],
    options: tuple[HeadOptions, HeadOptions],
    spec: DivergenceSpec,
    tiles: Tiles,
) -> DivergenceRows:
    head, transforms = heads[0], (options[0].transform, options[1].transform)
    wider = torch.promote_types(head.hidden.dtype, heads[1].hidden.dtype)
    if resolve(OP, options[0].impl, head.hidden.device.type, wider) == "triton":
        return TritonDivergence(tiles.rows, spec, transforms)
    # Only a bias of -inf removes columns.
    removed = head.bias is not None or heads[1].bias is not None
    stat_dtype = torch.promote_types(wider, torch.float32)
    return AtenDivergence(tiles.rows, tiles.columns, stat_dtype, head.hidden.device, spec, transforms, removed)


def _top_k_rows(head: HeadTensors, options: HeadOptions, tiles: Tiles) -> TopKRows:
    device, transform = head.hidden.device, options.transform
    if resolve(OP, options.impl, device.type, head.hidden.dtype) == "triton":
        return TopKRows(TritonOthers(tiles.rows, transform), transform)
    return TopKRows(AtenOthers(tiles.rows, tiles.columns, head.stat_dtype, device, transform), transform)


def _at(temperature: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if temperature is None else temperature.index_select(0, rows)
