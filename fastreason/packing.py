"""From graded groups to tensors: rows, their shares among ranks, and token-budgeted micro-batches. Pure.

A row is one prompt with one response. A unit is what is never divided among micro-batches: a single row, in the shared
layout all rows of one prompt, or the two rows of a pair. In the shared layout a unit is one line, else each row is one.
Three layouts, the same loss:

    padded   units side by side, right padding, so that a causal model needs no mask (and only attention sees it: body.py)
    packed   one long line, for attention that reads from the position ids where a row begins (flash-attn)
    shared   a prompt once, its responses after it, each seeing the prompt and itself (a mask per line); the prompt's
             hidden states do not depend on what follows, so nothing but rounding changes
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from fastreason_kernels import LoraHead
from fastreason_kernels.transform import Transform
from torch import Tensor

from fastreason.types import Group, Sample

Layout = Literal["padded", "packed", "shared"]


@dataclass(frozen=True)
class Row:
    """One sequence: the token ids of a prompt and of a response to it.

    `advantage` is per sequence; `token_weight` multiplies each response token's loss (1, or 1 / num_response; 0 for a
    row that only counts in the denominator). `index` is p * G + g, the response's place among the batch's [P, G] rewards.
    `teacher_logp` are a server's log-probabilities of the response's tokens, where one was asked. `trained` says which tokens
    of the response are trained (None: all): those of a conversation's user are not. `ref_logp` is the log-probability of the
    whole response under the reference, where a loss of pairs compares with it.
    """

    prompt: list[int]
    response: list[int]
    sampler_logp: list[float]
    advantage: float
    token_weight: float = 1.0
    index: int = 0
    teacher_logp: list[float] | None = None
    trained: list[bool] | None = None
    ref_logp: float | None = None

    @property
    def num_response(self) -> int:
        return len(self.response)

    @property
    def num_trained(self) -> int:
        return len(self.response) if self.trained is None else sum(self.trained)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class Divergence(Protocol):
    """A KL over the whole vocabulary, made where the trained model's hidden states and head are at hand."""

    @property
    def coef(self) -> float: ...

    def __call__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        batch: "MicroBatch",
        temperature: float,
        transform: Transform,
        lora: LoraHead | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(the differentiable sum over tokens, without `coef`; [N] nats, detached, NaN where not computed)."""
        ...


@dataclass
class MicroBatch:
    """Tensors of one forward. L is the line's length; N the trained response tokens of all rows, in row order.

    input_ids_BL, position_ids_BL: int64. real_T: int64, the positions in the flattened [B * L] that are no padding, T being
    num_tokens. mask_B1LL: bool, True where a query may look, or None for causal.
    head_index_N: int64, the position in the flattened [B * L] whose hidden state predicts response token n.
    ids_N: int64. sampler_logp_N, advantages_N, token_weight_N: fp32. sequence_N: int64, the row that a token belongs to.
    index_B: int64, `Row.index` of each row. behaviour_logp_N: fp32, what the ratio divides by; None means the current
    policy, detached: a ratio of exactly 1. ref_logp_N: fp32, of the model that a KL term compares with. kl_weight_N: fp32,
    0 or 1, which tokens that term acts on; None: all. divergence: a KL that needs the whole vocabulary, in the loss.
    values_N, returns_N: fp32, what a critic said before the step, and what it is to learn. weight_B: fp32, `Row.token_weight`
    of each row. ref_sum_B: fp64, `Row.ref_logp` of each row, None where one has none. is_filler: only there because other
    ranks have more micro-batches. cost: of its units, `unit_cost`; 0 of a filler.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    real_T: Tensor
    head_index_N: Tensor
    ids_N: Tensor
    sampler_logp_N: Tensor
    advantages_N: Tensor
    token_weight_N: Tensor
    sequence_N: Tensor
    index_B: Tensor
    num_rows: int
    num_tokens: int
    mask_B1LL: Tensor | None = None
    behaviour_logp_N: Tensor | None = None
    ref_logp_N: Tensor | None = None
    kl_weight_N: Tensor | None = None
    divergence: Divergence | None = None
    values_N: Tensor | None = None
    returns_N: Tensor | None = None
    weight_B: Tensor | None = None
    ref_sum_B: Tensor | None = None
    is_filler: bool = False
    cost: float = 0.0

    def sequence_sums(self, values_N: Tensor) -> Tensor:
        """[N] -> [num_rows] fp64: the sum over each row's response tokens."""
        sums_B = torch.zeros(self.num_rows, dtype=torch.float64)
        return sums_B.index_add(0, self.sequence_N.cpu(), values_N.detach().double().cpu())

    def of_rows(self, values_R: Tensor) -> Tensor:
        """Values by `Row.index` -> [N]: each response token gets its row's."""
        return values_R[self.index_B[self.sequence_N]]

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MicroBatch(**{**vars(self), **moved})


def makes_row(sample: Sample, with_truncated: bool = True) -> bool:
    """Whether a response is trained on at all: it has a token, and was not cut off where those are left out."""
    return bool(sample.token_ids) and (with_truncated or not sample.truncated)


def rows_of(
    groups: Sequence[Group],
    advantages_PG: Tensor,
    aggregation: str,
    *,
    weight: float = 1.0,
    with_truncated: bool = True,
    first_index: int = 0,
) -> list[Row]:
    """The rows of a batch of groups in order, `weight` times their token weights; responses without a token make no row.

    with_truncated: False leaves out the responses that were cut off too. first_index: that of the first group's first.
    """
    rows = []
    for number, (group, advantages) in enumerate(zip(groups, advantages_PG.tolist(), strict=True)):
        for place, (sample, advantage) in enumerate(zip(group.samples, advantages, strict=True)):
            length = len(sample.token_ids)
            if not makes_row(sample, with_truncated):
                continue
            rows.append(
                Row(
                    prompt=group.prompt_token_ids,
                    response=sample.token_ids,
                    sampler_logp=sample.sampler_logp,
                    advantage=advantage,
                    token_weight=weight / length if aggregation == "sequence_mean" else weight,
                    index=first_index + number * len(group.samples) + place,
                    teacher_logp=sample.teacher_logp,
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


def unit_cost(lengths: Sequence[int], attention_tokens: float) -> float:
    """What a unit of lines of so many tokens costs, in tokens of a short line: sum of L (1 + L / attention_tokens).

    attention_tokens: the length at which a line's attention, which grows with its square, costs as much as all else.
    """
    return sum(length * (1 + length / attention_tokens) for length in lengths)


def split_balanced(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Indices of `costs` in `num_shares` shares of nearly equal totals, the greatest first to the lightest share."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0.0] * num_shares
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(num_shares), key=lambda s: (totals[s], len(shares[s]), s))
        shares[lightest].append(index)
        totals[lightest] += costs[index]
    return shares


def units_of(rows: Sequence[Row], layout: Layout, pairs: bool = False) -> list[list[Row]]:
    """The units of rows in order: neighbours with the same prompt together in the shared layout, else each row alone.

    pairs: rows come two by two, and each two are a unit in every layout.
    """
    if pairs:
        return [list(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    units: list[list[Row]] = []
    for row in rows:
        if layout == "shared" and units and units[-1][0].prompt == row.prompt:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def unit_length(unit: Sequence[Row]) -> int:
    """Tokens of a unit's line: its prompt once, and every response."""
    return len(unit[0].prompt) + sum(row.num_response for row in unit)


def unit_lines(unit: Sequence[Row], layout: Layout) -> list[list[Row]]:
    """The lines of a unit: one in the shared layout, else one a row."""
    return [list(unit)] if layout == "shared" else [[row] for row in unit]


def micro_batches_of(
    rows: Sequence[Row],
    layout: Layout,
    budget: int,
    rank: int = 0,
    num_ranks: int = 1,
    pad_token_id: int = 0,
    pairs: bool = False,
    attention_tokens: float = math.inf,
) -> list[MicroBatch]:
    """One rank's micro-batches of an update's rows, at most `budget` tokens each where a unit does not need more.

    The ranks' shares are balanced by `unit_cost`. Every rank makes equally many micro-batches, as ZeRO's collectives need:
    those without enough add fillers, whose rows weigh nothing. Nothing without rows. pairs: as in `units_of`.
    """
    units = units_of(rows, layout, pairs)
    lines = [[unit_length(line) for line in unit_lines(unit, layout)] for unit in units]
    costs = [unit_cost(lengths, attention_tokens) for lengths in lines]
    shares = split_balanced(costs, num_ranks)
    plans = []
    for share in shares:
        lengths = [sum(lines[i]) if layout == "packed" else max(lines[i]) for i in share]
        plans.append(plan_micro_batches(lengths, budget, layout, [len(lines[i]) for i in share]))
    share, plan = shares[rank], plans[rank]
    batches = [
        replace(collate([units[share[i]] for i in part], layout, pad_token_id), cost=sum(costs[share[i]] for i in part))
        for part in plan
    ]
    while len(batches) < max(map(len, plans)):
        cheapest = min(range(len(units)), key=costs.__getitem__)
        filler = [replace(row, advantage=0.0, token_weight=0.0) for row in units[cheapest][: 1 + pairs]]
        batches.append(replace(collate([filler], layout, pad_token_id), is_filler=True))
    return batches


def plan_micro_batches(
    lengths: Sequence[int], budget: int, layout: Layout, num_lines: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of units, longest first, in micro-batches of at most `budget` tokens (padding included unless packed).

    lengths: of each unit's longest line; packed: of the whole unit. num_lines: of each unit, None: one.
    A unit longer than the budget goes alone: it cannot be cut, and leaving it out would change the loss.
    """
    plans: list[list[int]] = []
    total = height = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if plans and layout == "packed":
            fits = total + lengths[index] <= budget
        else:
            more = 1 if num_lines is None else num_lines[index]
            fits = bool(plans) and (height + more) * lengths[plans[-1][0]] <= budget
            height = height + more if fits else more
        if fits:
            plans[-1].append(index)
            total += lengths[index]
        else:
            plans.append([index])
            total = lengths[index]
    return plans


def collate(units: Sequence[Sequence[Row]], layout: Layout, pad_token_id: int = 0) -> MicroBatch:
    """The tensors of one micro-batch.

    Hidden state m - 1 of a prompt of m tokens predicts the first token of its response (of each, in the shared layout),
    the state at response token i - 1 predicts token i.
    """
    units = [line for unit in units for line in unit_lines(unit, layout)]
    lengths = [unit_length(unit) for unit in units]
    width = sum(lengths) if layout == "packed" else max(lengths)
    height = 1 if layout == "packed" else len(units)
    input_ids_BL = torch.full((height, width), pad_token_id, dtype=torch.int64)
    position_ids_BL = torch.arange(width).repeat(height, 1)
    mask_B1LL = torch.zeros(height, 1, width, width, dtype=torch.bool) if layout == "shared" else None
    head_index, real = [], []
    start = 0
    for number, unit in enumerate(units):
        line, first = (0, start) if layout == "packed" else (number, 0)
        start += lengths[number]
        prompt, end = unit[0].prompt, first
        real.append(torch.arange(lengths[number]) + line * width + first)
        _write(input_ids_BL, position_ids_BL, line, end, prompt, 0)
        end += len(prompt)
        for row in unit:
            _write(input_ids_BL, position_ids_BL, line, end, row.response, len(prompt))
            positions = torch.arange(end - 1, end - 1 + row.num_response)
            positions[0] = first + len(prompt) - 1
            head_index.append(line * width + _kept(positions, row))
            if mask_B1LL is not None:
                mask_B1LL[line, 0, end : end + row.num_response, end : end + row.num_response] = True
            end += row.num_response
        if mask_B1LL is not None:
            # Padding too: a query that saw nothing would be NaN.
            mask_B1LL[line, 0, :, first : first + len(prompt)] = True
    if mask_B1LL is not None:
        mask_B1LL &= torch.ones(width, width, dtype=torch.bool).tril()
    rows = [row for unit in units for row in unit]
    repeats = torch.tensor([row.num_trained for row in rows])
    references = [row.ref_logp for row in rows if row.ref_logp is not None]
    return MicroBatch(
        input_ids_BL=input_ids_BL,
        position_ids_BL=position_ids_BL,
        real_T=torch.cat(real),
        mask_B1LL=mask_B1LL,
        head_index_N=torch.cat(head_index),
        ids_N=torch.cat([_kept(torch.tensor(row.response), row) for row in rows]),
        sampler_logp_N=torch.cat([_kept(torch.tensor(row.sampler_logp, dtype=torch.float32), row) for row in rows]),
        advantages_N=torch.tensor([row.advantage for row in rows], dtype=torch.float32).repeat_interleave(repeats),
        token_weight_N=torch.tensor([row.token_weight for row in rows], dtype=torch.float32).repeat_interleave(repeats),
        sequence_N=torch.arange(len(rows)).repeat_interleave(repeats),
        index_B=torch.tensor([row.index for row in rows]),
        ref_logp_N=_teacher_logp(rows),
        num_rows=len(rows),
        num_tokens=sum(lengths),
        weight_B=torch.tensor([row.token_weight for row in rows], dtype=torch.float32),
        ref_sum_B=torch.tensor(references, dtype=torch.float64) if len(references) == len(rows) else None,
    )


def _kept(values: Tensor, row: Row) -> Tensor:
    """Of a value per response token those of trained tokens."""
    return values if row.trained is None else values[torch.tensor(row.trained)]


def _teacher_logp(rows: Sequence[Row]) -> Tensor | None:
    known = [row.teacher_logp for row in rows if row.teacher_logp is not None]
    if len(known) < len(rows):
        return None
    return torch.tensor([logp for row in known for logp in row], dtype=torch.float32)


def _write(ids_BL: Tensor, positions_BL: Tensor, line: int, at: int, token_ids: list[int], position: int) -> None:
    ids_BL[line, at : at + len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)
    positions_BL[line, at : at + len(token_ids)] = torch.arange(position, position + len(token_ids))
