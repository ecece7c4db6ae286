"""Advantages from rewards: pure functions `rewards_PG -> advantages_PG`, and the table that names them.

A row of the table has no knowledge of losses, masks or models. All tensors are fp32.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastreason.types import Group

AdvantageFunction = Callable[..., Tensor]


def reinforce_advantages(rewards_PG: Tensor) -> Tensor:
    """A = r: the reward itself, no baseline (arXiv 2504.11343)."""
    return rewards_PG.clone()


def grpo_advantages(rewards_PG: Tensor, *, std: bool = True, bessel: bool = True, eps: float = 1e-6) -> Tensor:
    """A = (r - mean) / (std + eps) within each prompt's group (arXiv 2402.03300).

    `std=False` leaves out the division (Dr.GRPO, arXiv 2503.20783), `bessel` is the sample standard deviation. A group
    whose rewards are all equal gets exactly zero. A group of one has no mean to compare with: its advantage is zero.
    """
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    constant_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
    if std and rewards_PG.shape[1] > 1:
        centred_PG = centred_PG / (rewards_PG.std(dim=1, keepdim=True, correction=int(bessel)) + eps)
    # The mean of equal floats can differ from them in the last bit; without this, rounding noise would be trained on.
    return torch.where(constant_P1, torch.zeros_like(centred_PG), centred_PG)


ADVANTAGES: dict[str, AdvantageFunction] = {
    "reinforce": reinforce_advantages,
    "grpo": grpo_advantages,
}


def advantage_arguments(name: str) -> list[str]:
    """The names of the arguments of one advantage function, beside the rewards."""
    return [p.name for p in inspect.signature(ADVANTAGES[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]


def rewards_tensor(groups: Sequence[Group]) -> Tensor:
    """The rewards of a batch of groups, [P, G] fp32; every group has the same number of samples."""
    return torch.tensor([group.rewards_G for group in groups], dtype=torch.float32)
