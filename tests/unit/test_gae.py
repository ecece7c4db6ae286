"""Generalised advantage estimation: by hand, and against a slow loop over one sequence at a time."""

import pytest
import torch

from fastreason.gae import gae_advantages


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
