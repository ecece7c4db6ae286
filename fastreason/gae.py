"""Generalised advantage estimation on packed token tensors. Pure; knows no critic, and no way that values come about."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Sums of numbers over all ranks.
Total = Callable[[list[float]], list[float]]
# What a deviation of rounding alone is below, and what verl and TRL add to the variance.
SMALLEST_VARIANCE, WHITENING_EPS = 1e-12, 1e-8


def gae_of_batches(
    rewards: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Sequence[int]],
    counted: Sequence[Tensor],
    *,
    total: Total,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """(advantages, returns) of a step's micro-batches, each as `gae_advantages` has them; whiten: the advantages `whitened`.

    counted: [T] bool of each, the tokens that are trained on. total: sums over all ranks. The returns, which a critic learns,
    are never whitened. Default as in verl and TRL, which whiten; the papers (arXiv 1506.02438, 1707.06347) do not say.
    """
    parts = zip(rewards, values, lengths, strict=True)
    found = [gae_advantages(*part, gamma=gamma, lam=lam) for part in parts]
    advantages, returns = [each[0] for each in found], [each[1] for each in found]
    return (whitened(advantages, counted, total) if whiten else advantages), returns


def whitened(advantages: Sequence[Tensor], counted: Sequence[Tensor], total: Total) -> list[Tensor]:
    """(A - mean) / sqrt(var + 1e-8), mean and sample variance over the counted tokens of all ranks' micro-batches.

    advantages: [T] of each micro-batch. counted: [T] bool; what does not count becomes 0, and so does all where every counted
    token has the same advantage. Sums are float64, so that their order does not show.
    """
    kept = [values_T[counted_T].double() for values_T, counted_T in zip(advantages, counted, strict=True)]
    num, first = total([float(sum(map(len, kept))), float(sum(part.sum() for part in kept))])
    mean = first / max(1.0, num)
    (squares,) = total([float(sum((part - mean).square().sum() for part in kept))])
    variance = squares / max(1.0, num - 1)
    scale = (variance + WHITENING_EPS) ** -0.5 if variance > SMALLEST_VARIANCE else 0.0
    return [
        ((values_T.double() - mean) * scale).masked_fill(~counted_T, 0.0).to(values_T.dtype)
        for values_T, counted_T in zip(advantages, counted, strict=True)
    ]


def gae_advantages(
    rewards_T: Tensor, values_T: Tensor, lengths: Sequence[int], *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(advantages_T, returns_T) of sequences that lie one behind the other, `lengths` tokens each (arXiv 1506.02438).

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      return_t = A_t + V_t

    rewards_T: [T], the reward that token t earns (a verifiable reward stands on a response's last token). values_T: [T],
    V_t the critic's value before token t is chosen; behind the last token both V and A are 0, for a response that was cut
    off too. Computed in float64, returned as values_T's dtype, detached. Raises ValueError where the lengths do not add up.

    Left out: a bootstrap value behind a response that was cut off.
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
