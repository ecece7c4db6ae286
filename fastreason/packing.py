"""From graded groups to tensors: rows, their shares among ranks, and token-budgeted micro-batches. Pure.

A row is one prompt with one response. Micro-batches are either padded (rows of similar length side by side, right
padding, so that a causal model needs no mask) or packed (one long row of length sum, for attention that knows where a
sequence begins, such as flash-attn through its position ids).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastreason.types import Group


@dataclass(frozen=True)
class Row:
    """One sequence: `token_ids` = prompt + response, of which the last `num_response` are the response.

    `advantage` is per sequence; `token_weight` multiplies each response token's loss (1, or 1 / num_response).
    """

    token_ids: list[int]
    num_response: int
    sampler_logp: list[float]
    advantage: float
    token_weight: float = 1.0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class MicroBatch:
    """Tensors of one forward. L is the padded length; N the response tokens of all rows, in row order.

    input_ids_BL, position_ids_BL int64; head_index_N int64: position in the flattened [B * L] whose hidden state
    predicts response token n; ids_N int64; sampler_logp_N, advantages_N, token_weight_N fp32; sequence_N int64: which
    row a token belongs to. `behaviour_logp_N` is what the ratio divides by; None means the current policy, detached: a
    ratio of exactly 1.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    head_index_N: Tensor
    ids_N: Tensor
    sampler_logp_N: Tensor
    advantages_N: Tensor
    token_weight_N: Tensor
    sequence_N: Tensor
    num_rows: int
    num_tokens: int
    packed: bool = False
    behaviour_logp_N: Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MicroBatch(**{**vars(self), **moved})


def rows_of(groups: Sequence[Group], advantages_PG: Tensor, aggregation: str) -> list[Row]:
    """The rows of a batch of groups in order; responses without a token make no row."""
    rows = []
    for group, advantages in zip(groups, advantages_PG.tolist(), strict=True):
        for sample, advantage in zip(group.samples, advantages, strict=True):
            length = len(sample.token_ids)
            if length == 0:
                continue
            rows.append(
                Row(
                    token_ids=group.prompt_token_ids + sample.token_ids,
                    num_response=length,
                    sampler_logp=sample.sampler_logp,
                    advantage=advantage,
                    token_weight=1.0 / length if aggregation == "sequence_mean" else 1.0,
                )
            )
    return rows


def loss_denominator(
    num_response_tokens: int,
    num_rows: int,
    max_new_tokens: int,
    aggregation: Literal["token_mean", "sequence_mean", "constant"],
) -> float:
    """What an update's summed loss is divided by, once, over all ranks and micro-batches.

    token_mean: the response tokens. sequence_mean: the rows (each row's tokens weigh 1 / its length). constant: rows
    times the longest response allowed (Dr.GRPO, arXiv 2503.20783).
    """
    count = {
        "token_mean": num_response_tokens,
        "sequence_mean": num_rows,
        "constant": num_rows * max_new_tokens,
    }[aggregation]
    return float(max(1, count))


def split_balanced(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Indices of `lengths` in `num_shares` shares of nearly equal total length, longest first to the lightest share."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(num_shares), key=lambda s: (totals[s], len(shares[s]), s))
        shares[lightest].append(index)
        totals[lightest] += lengths[index]
    return shares


def plan_micro_batches(lengths: Sequence[int], budget: int, packed: bool) -> list[list[int]]:
    """Indices of rows, longest first, in micro-batches of at most `budget` tokens (padding included unless `packed`).

    A row longer than the budget goes alone: it cannot be cut, and leaving it out would change the loss.
    """
    plans: list[list[int]] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if plans and packed and total + lengths[index] <= budget:
            plans[-1].append(index)
            total += lengths[index]
        elif plans and not packed and (len(plans[-1]) + 1) * lengths[plans[-1][0]] <= budget:
            plans[-1].append(index)
        else:
            plans.append([index])
            total = lengths[index]
    return plans


def collate(rows: Sequence[Row], packed: bool, pad_token_id: int = 0) -> MicroBatch:
    """The tensors of one micro-batch; hidden state m - 1 + i predicts response token i of a prompt of m tokens."""
    width = sum(map(len, rows)) if packed else max(map(len, rows))
    height = 1 if packed else len(rows)
    input_ids_BL = torch.full((height, width), pad_token_id, dtype=torch.int64)
    position_ids_BL = torch.arange(width).repeat(height, 1)
    head_index, ids, logp, advantages, weights, sequence = [], [], [], [], [], []
    start = 0
    for number, row in enumerate(rows):
        line, column = (0, start) if packed else (number, 0)
        input_ids_BL[line, column : column + len(row)] = torch.tensor(row.token_ids)
        position_ids_BL[line, column : column + len(row)] = torch.arange(len(row))
        first = line * width + column + len(row) - row.num_response - 1
        head_index.append(torch.arange(first, first + row.num_response))
        ids += row.token_ids[-row.num_response :]
        logp += row.sampler_logp
        advantages += [row.advantage] * row.num_response
        weights += [row.token_weight] * row.num_response
        sequence += [number] * row.num_response
        start += len(row)
    return MicroBatch(
        input_ids_BL=input_ids_BL,
        position_ids_BL=position_ids_BL,
        head_index_N=torch.cat(head_index),
        ids_N=torch.tensor(ids),
        sampler_logp_N=torch.tensor(logp, dtype=torch.float32),
        advantages_N=torch.tensor(advantages, dtype=torch.float32),
        token_weight_N=torch.tensor(weights, dtype=torch.float32),
        sequence_N=torch.tensor(sequence),
        num_rows=len(rows),
        num_tokens=sum(map(len, rows)),
        packed=packed,
    )
