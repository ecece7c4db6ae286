"""A vocabulary that is split over the ranks of a process group: rank r holds rows [r * V / ranks, (r + 1) * V / ranks).

It owns the two collectives: one all-gather of four numbers a token, merged in the order of the ranks, and one sum of dX.
It refuses uneven shards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastreason_kernels.head import HeadTensors
from fastreason_kernels.partials import merge


def first_column(head: HeadTensors, group: str) -> int:
    """The vocabulary id of this rank's first row."""
    return dist.get_rank(_resolve(group)) * head.weight.shape[0] if group else 0


def whole_vocab(head: HeadTensors, group: str) -> int:
    """V over all ranks."""
    return head.weight.shape[0] * (dist.get_world_size(_resolve(group)) if group else 1)


def merge_ranks(partials: Tensor, num_rows: int, group: str) -> Tensor:
    """[N, 4] of the whole vocabulary, the same bits on every rank, from this rank's [N, 4] of `num_rows` ids.

    Raises ValueError where ranks have different numbers of rows: then ids would mean other rows. Elsewhere than on a CPU
    the result is NaN instead, as reading the numbers would wait for the device.
    """
    process_group = _resolve(group)
    sent = torch.cat([partials, partials.new_full((1, 4), num_rows)])
    gathered = [torch.empty_like(sent) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, sent, group=process_group)
    sizes = torch.stack([part[-1, 0] for part in gathered])
    uneven = (sizes != num_rows).any()
    if partials.device.type == "cpu" and bool(uneven):
        raise ValueError(
            f"weight: shards of {sizes.long().tolist()} rows over the group, allowed: as many on each rank; pad the "
            "vocabulary, and remove the padding with a bias of -inf"
        )
    return merge(torch.stack(gathered))[:-1].masked_fill(uneven, torch.nan)


def sum_ranks(grad: Tensor, group: str) -> Tensor:
    """The sum over ranks of a gradient that each rank has of its own columns only, summed in fp32."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    dist.all_reduce(wide, group=_resolve(group))
    return wide.to(grad.dtype)


def _resolve(group: str) -> dist.ProcessGroup:
    name: Any = group  # newer versions of torch have a type of their own for it
    return dist.distributed_c10d._resolve_process_group(name)
