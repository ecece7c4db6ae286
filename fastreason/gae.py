"""Generalised advantage estimation on packed token tensors. Pure; knows no critic, and no way that values come about."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gae_advantages(
    rewards_T: Tensor, values_T: Tensor, lengths: Sequence[int], *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(advantages_T, returns_T) of sequences that lie one behind the other, `lengths` tokens each (arXiv 1506.02438).

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      return_t = A_t + V_t

    rewards_T: [T], the reward that token t earns (a verifiable reward stands on a response's last token). values_T: [T],
    V_t the critic's value before token t is chosen; behind the last token both V and A are 0, for a response that was cut
    off too. Computed in float64, returned as values_T's dtype, detached. Raises ValueError where the lengths do not add up.

    Left out: whitening the advantages over the batch, and a bootstrap value behind a response that was cut off.
    """
    if sum(lengths) != len(values_T) or rewards_T.shape != values_T.shape:
        raise ValueError(
            f"lengths: sum {sum(lengths)}, rewards_T {tuple(rewards_T.shape)}, values_T {tuple(values_T.shape)}; allowed: "
            "one and the same number of tokens"
        )
    rewards_BL, values_BL = (_padded(x.detach().double(), lengths) for x in (rewards_T, values_T))
    after_BL = torch.cat([values_BL[:, 1:], torch.zeros_like(values_BL[:, :1])], dim=1)
    delta_BL = rewards_BL + gamma * after_BL - values_BL
    advantages_BL, following_B = torch.zeros_like(delta_BL), torch.zeros_like(delta_BL[:, 0])
    for t in reversed(range(delta_BL.shape[1])):
        following_B = delta_BL[:, t] + gamma * lam * following_B
        advantages_BL[:, t] = following_B
    pieces = [row[:length] for row, length in zip(advantages_BL, lengths, strict=True)]
    advantages_T = torch.cat([advantages_BL.new_zeros(0), *pieces])
    return advantages_T.to(values_T.dtype), (advantages_T + values_T.detach().double()).to(values_T.dtype)


def _padded(values_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T] -> [B, L], zeros behind each sequence: they add nothing to what comes before them."""
    pieces = [*values_T.split(list(lengths)), values_T.new_zeros(1)]  # one more row, so that L is at least 1
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)[:-1]
