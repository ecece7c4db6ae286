"""What each token of a batch is trained with, where that takes more than the rewards: another model's probabilities, or values.

It owns the way from log-probabilities and values of micro-batches to advantages, and which tokens a KL term acts on. It
refuses to run a model, and knows no algorithm by name.
"""

from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from fastreason.advantages import Pairs
from fastreason.filtering import is_right
from fastreason.kl import KlTerm, advantage_addend, estimate, guided_mask, kept_scale
from fastreason.packing import MicroBatch, Row
from fastreason.ranks import Ranks
from fastreason.types import Group


def kept_responses(groups: Sequence[Group], term: KlTerm) -> Tensor:
    """[P, G] bool: the responses that a KL term acts on, by its mask."""
    correct_PG = torch.tensor([[is_right(sample) for sample in group.samples] for group in groups])
    return guided_mask(correct_PG, term.mask)


def set_kl_weights(batches: Sequence[MicroBatch], kept_PG: Tensor, silent: Set[int]) -> None:
    """The tokens that a KL term acts on: those of kept responses, but for ids in `silent`; nothing is set where that is all."""
    if bool(kept_PG.all()) and not silent:
        return
    kept_R, silent_S = kept_PG.flatten().float(), torch.tensor(sorted(silent), dtype=torch.int64)
    for batch in batches:
        batch.kl_weight_N = batch.of_rows(kept_R).masked_fill(torch.isin(batch.ids_N, silent_S), 0.0)


def kl_scale(rows: Sequence[Row], kept_PG: Tensor, term: KlTerm, by_sequence: bool) -> float:
    """What multiplies the KL term of an update of `rows`: 1, or with mask_mean=kept what makes it a mean over what is kept."""
    counts_R = torch.zeros(kept_PG.numel())
    for row in rows:
        counts_R[row.index] = 1 if by_sequence else row.num_response
    return kept_scale(kept_PG.flatten(), counts_R, term.mask_mean)


def response_sums(
    batches: Sequence[MicroBatch], values: Sequence[Tensor], shape: tuple[int, int], ranks: Ranks
) -> Tensor:
    """[P, G] fp32: for every response the sum of a per-token value over all ranks; 0 for one that is in no micro-batch."""
    sums_R = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
    for batch, values_N in zip(batches, values, strict=True):
        # Padding among ranks repeats a row, with weight 0.
        counted_N = torch.where(batch.token_weight_N != 0, values_N.double(), 0.0)
        sums_R.index_add_(0, batch.index_B, batch.sequence_sums(counted_N))
    return torch.tensor(ranks.sum(sums_R.tolist())).reshape(shape)


def token_kl(batch: MicroBatch, logp_N: Tensor, term: KlTerm) -> Tensor:
    """[N] nats: the term's estimate at each token that it acts on, 0 elsewhere."""
    assert batch.ref_logp_N is not None
    kl_N = estimate(logp_N, batch.ref_logp_N, term.estimator)
    return kl_N if batch.kl_weight_N is None else kl_N * batch.kl_weight_N


def add_kl_to_advantages(batch: MicroBatch, logp_N: Tensor, term: KlTerm, coef: float) -> None:
    """A_t - coef k_t, detached (kl_place=advantage)."""
    assert batch.ref_logp_N is not None
    addend_N = advantage_addend(logp_N, batch.ref_logp_N, term, coef)
    batch.advantages_N = batch.advantages_N + (addend_N if batch.kl_weight_N is None else addend_N * batch.kl_weight_N)


def set_advantages(batches: Sequence[MicroBatch], advantages_PG: Tensor) -> None:
    """Every token gets its response's."""
    for batch in batches:
        batch.advantages_N = batch.of_rows(advantages_PG.flatten())


def set_gae(
    batches: Sequence[MicroBatch],
    rewards_PG: Tensor,
    trained_PG: Tensor,
    values: Sequence[Tensor],
    gae: Callable[..., Any],
    costs: Sequence[Tensor] | None,
    ranks: Ranks,
) -> None:
    """Advantages and returns from a critic's values; a response's reward stands on its last token, each token pays its cost.

    Tokens that are not trained on, and padding among ranks, have no advantage, and no say in the statistics of others.
    """
    lengths, rewards, counted = [], [], []
    for number, (batch, values_N) in enumerate(zip(batches, values, strict=True)):
        lengths_B = torch.bincount(batch.sequence_N, minlength=batch.num_rows)
        rewards_N = torch.zeros_like(values_N) if costs is None else -costs[number].to(values_N.dtype)
        earned_B = rewards_PG.flatten()[batch.index_B].to(values_N.dtype)
        rewards.append(rewards_N.index_add(0, lengths_B.cumsum(0) - 1, earned_B))
        lengths.append(lengths_B.tolist())
        counted.append((batch.token_weight_N != 0) & (batch.of_rows(trained_PG.flatten()) != 0))
    made = zip(batches, values, counted, *gae(rewards, values, lengths, counted, total=ranks.sum), strict=True)
    for batch, values_N, counted_N, advantages_N, returns_N in made:
        batch.values_N, batch.returns_N = values_N, returns_N
        batch.advantages_N = advantages_N.masked_fill(~counted_N, 0.0)


def set_pairs(
    batches: Sequence[MicroBatch],
    logp: Sequence[Tensor],
    rewards_PG: Tensor,
    ranks: Ranks,
    coefficients: Callable[..., Pairs],
) -> Pairs:
    """Advantages of a pairwise loss, at the weights that gave `logp`; `rewards_PG` of all responses of the step.

    Responses outside of `batches` make no pair: their rewards are replaced by those of one that is there.
    """
    shape = (rewards_PG.shape[0], rewards_PG.shape[1])
    sums = [response_sums(batches, logp, shape, ranks)]
    sums += [response_sums(batches, [require_ref(batch) for batch in batches], shape, ranks)]
    there = response_sums(batches, [torch.ones_like(batch.token_weight_N) for batch in batches], shape, ranks) > 0
    pairs = coefficients(only_there(rewards_PG, there), policy_logp_PG=sums[0], ref_logp_PG=sums[1])
    set_advantages(batches, pairs.advantages_PG)
    return pairs


def only_there(rewards_PG: Tensor, there_PG: Tensor) -> Tensor:
    """Rewards with those of missing responses replaced, so that none of them is its prompt's first best or first worst."""
    lowest_P1 = rewards_PG.masked_fill(~there_PG, torch.inf).amin(dim=1, keepdim=True)
    highest_P1 = rewards_PG.masked_fill(~there_PG, -torch.inf).amax(dim=1, keepdim=True)
    none_P1 = ~there_PG.any(dim=1, keepdim=True)
    middle_P1 = torch.where(none_P1, torch.zeros_like(lowest_P1), (lowest_P1 + highest_P1) / 2)
    return torch.where(there_PG, rewards_PG, middle_P1)


def require_ref(batch: MicroBatch) -> Tensor:
    assert batch.ref_logp_N is not None
    return batch.ref_logp_N
