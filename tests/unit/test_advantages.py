"""Advantages against numbers worked out by hand."""

import math

import pytest
import torch

from fastreason.advantages import ADVANTAGES, advantage_arguments, grpo_advantages, reinforce_advantages, rewards_tensor
from fastreason.types import Grade, Group, Prompt, Sample

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=0)


def test_reinforce_is_the_reward_itself():
    advantages = reinforce_advantages(REWARDS)
    assert torch.equal(advantages, REWARDS) and advantages is not REWARDS


def test_grpo_with_the_sample_deviation():
    # First group: mean 1/2, deviations +-1/2, variance 4 * (1/4) / 3. Second: mean 3/2, variance (9/4 + 3/4) / 3 = 1.
    first = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    second = 1 + 1e-6
    close(
        grpo_advantages(REWARDS),
        [[first, -first, -first, first], [1.5 / second, -0.5 / second, -0.5 / second, -0.5 / second]],
    )


def test_grpo_with_the_deviation_of_the_whole_group():
    # Variances 4 * (1/4) / 4 = 1/4 and (9/4 + 3/4) / 4 = 3/4.
    first, second = 0.5 + 1e-6, math.sqrt(0.75) + 1e-6
    close(
        grpo_advantages(REWARDS, bessel=False),
        [[0.5 / first, -0.5 / first, -0.5 / first, 0.5 / first], [1.5 / second, *[-0.5 / second] * 3]],
    )


def test_grpo_with_another_epsilon():
    first = 0.5 / (math.sqrt(1 / 3) + 0.25)
    close(grpo_advantages(REWARDS, eps=0.25)[0], [first, -first, -first, first])


def test_grpo_without_the_deviation_is_reinforce_with_the_mean_as_baseline():
    close(grpo_advantages(REWARDS, std=False), [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]])
    baseline = REWARDS.mean(dim=1, keepdim=True)
    assert torch.equal(grpo_advantages(REWARDS, std=False), reinforce_advantages(REWARDS) - baseline)


@pytest.mark.parametrize("arguments", [{}, {"std": False}, {"bessel": False}, {"eps": 0.0}])
@pytest.mark.parametrize("reward", [0.0, -1.0, 0.1, 1 / 3, 1e6 / 7])
def test_a_group_that_is_all_the_same_gets_exactly_nothing(reward, arguments):
    for size in (2, 3, 7, 10):
        advantages = grpo_advantages(torch.full((1, size), reward), **arguments)
        assert torch.equal(advantages, torch.zeros(1, size)), f"rounding noise in a group of {size}"


def test_a_group_of_one_gets_exactly_nothing():
    for arguments in ({}, {"std": False}, {"bessel": False}):
        assert torch.equal(grpo_advantages(torch.tensor([[0.7]]), **arguments), torch.zeros(1, 1))


def test_groups_do_not_touch_each_other():
    together = grpo_advantages(REWARDS)
    for number in range(2):
        assert torch.equal(grpo_advantages(REWARDS[number : number + 1])[0], together[number])


def test_a_group_is_centred_and_the_better_answer_wins():
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(1))
    advantages = grpo_advantages(rewards)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(5), rtol=0, atol=1e-5)
    assert torch.equal(advantages.argsort(dim=1), rewards.argsort(dim=1))


def test_the_arguments_are_known_by_name():
    assert advantage_arguments("grpo") == ["mean", "std", "bessel", "eps"]
    assert advantage_arguments("reinforce") == []
    # The greedy response's reward and log-probabilities are data, not options.
    assert advantage_arguments("remax") == []
    assert advantage_arguments("pairs") == ["beta"]
    assert advantage_arguments("gae") == ["gamma", "lam", "whiten"]
    assert set(ADVANTAGES) == {"reinforce", "grpo", "raft", "rloo", "remax", "reinforce_pp", "gae", "pairs"}


def test_rewards_come_from_the_grades_in_order():
    def group(rewards):
        samples = [
            Sample(
                token_ids=[1],
                sampler_logp=[0.0],
                token_versions=[0],
                text="",
                finish_reason="stop",
                grade=Grade(reward=reward, correct=False),
            )
            for reward in rewards
        ]
        prompt = Prompt(id="", text="")
        return Group(ticket=0, prompt=prompt, prompt_token_ids=[1], samples=samples, version_issued=0)

    rewards_PG = rewards_tensor([group([1.0, -1.0]), group([0.5, 0.25])])
    assert rewards_PG.dtype == torch.float32 and rewards_PG.tolist() == [[1.0, -1.0], [0.5, 0.25]]
