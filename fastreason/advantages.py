"""Advantages from rewards: pure functions `rewards_PG -> advantages_PG`, and the table that names them.

A row of the table has no knowledge of losses, masks or models. Keyword-only arguments with a default are options, which a
config may set; those without one are data that the training step hands over (a greedy response's reward). All tensors are
fp32. Wherever a constant is subtracted, a group whose rewards are all equal gets exactly zero: the mean of equal floats can
differ from them in the last bit, and that rounding noise would be trained on.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreason.gae import gae_of_batches
from fastreason.types import Group

AdvantageFunction = Callable[..., Any]


def reinforce_advantages(rewards_PG: Tensor) -> Tensor:
    """A = r: the reward itself, no baseline (arXiv 2504.11343)."""
    return rewards_PG.clone()


def grpo_advantages(
    rewards_PG: Tensor, *, mean: bool = True, std: bool = True, bessel: bool = True, eps: float = 1e-6
) -> Tensor:
    """A = (r - mean) / (std + eps) within each prompt's group (arXiv 2402.03300).

    `std=False` leaves out the division (Dr.GRPO, arXiv 2503.20783), `mean=False` the subtraction (the normalised std alone,
    an ablation of arXiv 2504.11343); `bessel` is the sample standard deviation. A group without a deviation gets exactly
    zero, and so does a group of one, which has nothing to be compared with. Left out: one deviation for the whole batch.
    """
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True) if mean else rewards_PG.clone()
    if std and rewards_PG.shape[1] > 1:
        centred_PG = centred_PG / (rewards_PG.std(dim=1, keepdim=True, correction=int(bessel)) + eps)
    return _zero_where_constant(centred_PG, rewards_PG) if mean or std else centred_PG


def raft_advantages(rewards_PG: Tensor, *, literal: bool = False) -> Tensor:
    """A = 1[r = max and r > 0] within each prompt's group: the best responses, where they are any good (arXiv 2504.11343).

    literal: 1[r = max] as that paper prints it, which also trains on groups where every response is wrong. All responses
    that share the maximum count. Left out: dividing by their number.
    """
    best_PG = rewards_PG == rewards_PG.amax(dim=1, keepdim=True)
    return (best_PG if literal else best_PG & (rewards_PG > 0)).to(rewards_PG.dtype)


def rloo_advantages(rewards_PG: Tensor) -> Tensor:
    """A = r less the mean reward of the prompt's other responses = n / (n - 1) (r - mean), n >= 2 (arXiv 2402.14740).

    Left out: that paper's KL in the reward, which is kl_place=reward for every algorithm.
    """
    size = rewards_PG.shape[1]
    centred_PG = (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)) * (size / max(1, size - 1))
    return _zero_where_constant(centred_PG, rewards_PG)


def remax_advantages(rewards_PG: Tensor, *, greedy_P: Tensor) -> Tensor:
    """A = r - r_greedy, greedy_P [P] the rewards of one response at temperature 0 per prompt (arXiv 2310.10505)."""
    return rewards_PG - greedy_P[:, None]


def reinforce_pp_advantages(rewards_PG: Tensor, *, baseline: bool = False, eps: float = 1e-8) -> Tensor:
    """A = (r - mean) / (std + eps), both over the whole batch (REINFORCE++, arXiv 2501.03262); the population's deviation.

    baseline: the group's mean comes off first, A = (r - mean_group) / (std of that over the batch + eps). Needs the step's
    whole [P, G]. Left out: statistics weighted by the responses' lengths, and the running sum of per-token KL that the paper
    puts into the reward (kl_place=reward takes the whole response's sum).
    """
    if baseline:
        centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
        centred_PG = _zero_where_constant(centred_PG, rewards_PG)
    else:
        constant = bool((rewards_PG == rewards_PG[:1, :1]).all())
        centred_PG = torch.zeros_like(rewards_PG) if constant else rewards_PG - rewards_PG.mean()
    return centred_PG / (centred_PG.square().mean().sqrt() + eps)


def _zero_where_constant(values_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    constant_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
    return values_PG.masked_fill(constant_P1, 0.0)


class Pairs(NamedTuple):
    """advantages_PG, 0 outside of pairs; num (of pairs), and means over them: loss (nats), accuracy, margin."""

    advantages_PG: Tensor
    num: int
    loss: float
    accuracy: float
    margin: float


def pair_coefficients(rewards_PG: Tensor, *, policy_logp_PG: Tensor, ref_logp_PG: Tensor, beta: float = 0.1) -> Pairs:
    """What makes `-A log pi`, summed and divided by `num`, have the gradient of the mean DPO loss over pairs.

        m = beta ((logp_w - ref_w) - (logp_l - ref_l))      loss = -log sigmoid(m)      A_w = beta sigmoid(-m) = -A_l

    w and l are a prompt's best and worst response, the first of equals; a prompt whose rewards are all equal makes no pair.
    policy_logp_PG, ref_logp_PG: [P, G] log-probabilities of whole responses, summed over their tokens, nats; m is in nats
    too. The coefficients hold at the weights that gave policy_logp_PG. DPO (arXiv 2305.18290) on a batch's own samples: the
    iterative DPO of arXiv 2504.11343. Left out: all pairs of a prompt, label smoothing, a term on the winner alone.
    """
    best_P1, worst_P1, paired_P1 = _pair_places(rewards_PG)
    log_ratio_PG = policy_logp_PG.detach() - ref_logp_PG.detach()
    margin_P1 = beta * (log_ratio_PG.gather(1, best_P1) - log_ratio_PG.gather(1, worst_P1))
    weight_P1 = (beta * torch.sigmoid(-margin_P1)).masked_fill(~paired_P1, 0.0)
    zeros_PG = torch.zeros_like(log_ratio_PG)
    advantages_PG = zeros_PG.scatter(1, best_P1, weight_P1).scatter_add(1, worst_P1, -weight_P1)
    margins, num = margin_P1[paired_P1], int(paired_P1.sum())
    figures = (torch.nn.functional.softplus(-margins), (margins > 0).to(margins.dtype), margins)
    return Pairs(advantages_PG, num, *(float(x.sum()) / max(1, num) for x in figures))


def pair_members(rewards_PG: Tensor) -> Tensor:
    """[P, G] fp32: 1 for the responses that `pair_coefficients` pairs, 0 for the others, which have no gradient there."""
    best_P1, worst_P1, paired_P1 = _pair_places(rewards_PG)
    ones_P1 = paired_P1.to(torch.float32)
    return torch.zeros(rewards_PG.shape).scatter(1, best_P1, ones_P1).scatter_add(1, worst_P1, ones_P1)


def _pair_places(rewards_PG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """([P, 1] place of the best response, [P, 1] of the worst, [P, 1] bool: they make a pair)."""
    best_P1, worst_P1 = (pick(dim=1, keepdim=True) for pick in (rewards_PG.argmax, rewards_PG.argmin))
    return best_P1, worst_P1, rewards_PG.gather(1, best_P1) > rewards_PG.gather(1, worst_P1)


# gae and pairs return more than advantages: rows with them say `critic` and `pairs`.
ADVANTAGES: dict[str, AdvantageFunction] = {
    "reinforce": reinforce_advantages,
    "grpo": grpo_advantages,
    "raft": raft_advantages,
    "rloo": rloo_advantages,
    "remax": remax_advantages,
    "reinforce_pp": reinforce_pp_advantages,
    "gae": gae_of_batches,
    "pairs": pair_coefficients,
}


def advantage_arguments(name: str) -> list[str]:
    """The names of the options of one advantage function: its keyword-only arguments that have a default."""
    parameters = inspect.signature(ADVANTAGES[name]).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]


def rewards_tensor(groups: Sequence[Group]) -> Tensor:
    """The rewards of a batch of groups, [P, G] fp32; every group has the same number of samples."""
    return torch.tensor([group.rewards_G for group in groups], dtype=torch.float32)
