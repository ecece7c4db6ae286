"""Generalised advantage estimation: by hand, and against a slow loop over one sequence at a time."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastreason.gae import gae_advantages, gae_of_batches, whitened


def slow_gae(rewards, values, gamma, lam):
    """The sums as arXiv 1506.02438 writes them: A_t = sum_l (gamma lam)^l delta_{t + l}."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** (j - t) * delta[j] for j in range(t, len(delta))) for t in range(len(delta))]


def test_by_hand():
    # delta: 0 + 0.5 * 2 - 1 = 0, 4 - 2 = 2; then A_0 = 0 + 0.5 * 0.5 * 2. The second sequence: 1 - 3.
    advantages, returns = gae_advantages(
        torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]), [2, 1], gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [0.5, 2.0, -2.0] and returns.tolist() == [1.5, 4.0, 1.0]
    assert advantages.dtype == torch.float32


def test_without_discounts_the_return_is_what_is_still_to_come():
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.5, -1.0])
    values = torch.tensor([0.25, 0.5, 0.75, -0.5, 0.5])
    advantages, returns = gae_advantages(rewards, values, [3, 2])
    assert returns.tolist() == [1.0, 1.0, 1.0, -0.5, -1.0]
    assert advantages.tolist() == [0.75, 0.5, 0.25, 0.0, -1.5]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.5, 1.0)])
def test_against_a_slow_loop(gamma, lam):
    random = torch.Generator().manual_seed(5)
    lengths = [1, 7, 3, 12]
    rewards, values = (torch.randn(sum(lengths), generator=random, dtype=torch.float64) for _ in range(2))
    expected, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        expected += slow_gae(rewards[part].tolist(), values[part].tolist(), gamma, lam)
        start += length
    advantages, returns = gae_advantages(rewards, values, lengths, gamma=gamma, lam=lam)
    expected_T = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(advantages, expected_T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, expected_T + values, rtol=1e-12, atol=1e-12)


def test_a_critic_that_knows_the_reward_leaves_no_advantage():
    rewards = torch.tensor([0.0, 0.0, 1.0])
    advantages, _ = gae_advantages(rewards, torch.ones(3), [3], lam=0.5)
    assert advantages.tolist() == [0.0, 0.0, 0.0]


def test_nothing_and_what_does_not_add_up():
    advantages, returns = gae_advantages(torch.zeros(0), torch.zeros(0), [])
    assert advantages.shape == returns.shape == (0,)
    with pytest.raises(ValueError, match="lengths: sum 3"):
        gae_advantages(torch.zeros(2), torch.zeros(2), [3])
    with pytest.raises(ValueError, match="rewards_T"):
        gae_advantages(torch.zeros(3), torch.zeros(2), [2])


def test_values_get_no_gradient():
    values = torch.ones(2, requires_grad=True)
    advantages, returns = gae_advantages(torch.ones(2), values, [2])
    assert not advantages.requires_grad and not returns.requires_grad


def test_whitening_by_hand():
    """Of 1, 3 and 5 the mean is 3 and the sample variance 4; a token that does not count changes neither."""
    advantages = [torch.tensor([1.0, 100.0]), torch.tensor([3.0, 5.0])]
    counted = [torch.tensor([True, False]), torch.tensor([True, True])]
    found = whitened(advantages, counted, lambda values: values)
    assert [part.tolist() for part in found] == [pytest.approx([-1.0, 0.0]), pytest.approx([0.0, 1.0])]
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("values", [[], [0.7], [0.1, 0.1, 0.1, 0.1, 0.1]])
def test_advantages_that_are_all_equal_become_exactly_nothing(values):
    counted = torch.ones(len(values), dtype=torch.bool)
    (found,) = whitened([torch.tensor(values)], [counted], lambda sums: sums)
    assert torch.equal(found, torch.zeros(len(values)))


class Halves:
    """Two ranks in two threads: sums over both."""

    def __init__(self):
        self.barrier, self.sums = threading.Barrier(2, timeout=20), [[], []]

    def of(self, rank):
        def total(values):
            self.sums[rank] = values
            self.barrier.wait()
            both = [sum(pair) for pair in zip(*self.sums, strict=True)]
            self.barrier.wait()
            return both

        return total


@pytest.mark.parametrize("whiten", [True, False])
def test_ranks_and_micro_batches_change_nothing(whiten):
    random = torch.Generator().manual_seed(7)
    lengths = [[3, 2], [4], [1, 5]]
    rewards, values = ([torch.randn(sum(n), generator=random) for n in lengths] for _ in range(2))
    counted = [torch.rand(sum(n), generator=random) > 0.3 for n in lengths]
    keys = {"gamma": 0.9, "lam": 0.8, "whiten": whiten}
    flat = ([torch.cat(x)] for x in (rewards, values))
    (whole,), (returns,) = gae_of_batches(
        *flat, [[*itertools.chain(*lengths)]], [torch.cat(counted)], total=lambda sums: sums, **keys
    )
    ranks, halves = [slice(0, 1), slice(1, 3)], Halves()

    def of_rank(rank):
        part = ranks[rank]
        return gae_of_batches(rewards[part], values[part], lengths[part], counted[part], total=halves.of(rank), **keys)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(of_rank, range(2)))
    torch.testing.assert_close(
        torch.cat([x for advantages, _ in found for x in advantages]), whole, rtol=1e-6, atol=1e-7
    )
    assert torch.equal(torch.cat([x for _, each in found for x in each]), returns)
    kept = whole[torch.cat(counted)]
    near = kept.mean().abs() < 1e-6 and (kept.std() - 1).abs() < 1e-6
    assert bool(near) == whiten
