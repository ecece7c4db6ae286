"""Advantages against numbers worked out by hand."""

import math

import pytest
import torch

from fastreason.advantages import (
    ADVANTAGES,
    advantage_arguments,
    grpo_advantages,
    pair_coefficients,
    raft_advantages,
    reinforce_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rewards_tensor,
    rloo_advantages,
)
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


def test_grpo_without_the_mean_divides_the_reward_alone():
    # Sample variances 1/3 and 1; the ablation of Minimal-RL that normalises by the deviation only.
    first, second = 1 / (math.sqrt(1 / 3) + 1e-6), 1 / (1 + 1e-6)
    close(grpo_advantages(REWARDS, mean=False), [[first, 0.0, 0.0, first], [3 * second, second, second, second]])
    assert torch.equal(grpo_advantages(REWARDS, mean=False, std=False), REWARDS)


def test_raft_takes_the_best_where_they_are_any_good():
    rewards = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0], [0.5, 2.0, 0.0], [0.0, 0.0, -1.0]])
    close(raft_advantages(rewards), [[1.0, 0.0, 1.0], [0.0] * 3, [0.0, 1.0, 0.0], [0.0] * 3])
    # The formula as printed also trains on groups where every response is wrong.
    close(raft_advantages(rewards, literal=True), [[1.0, 0.0, 1.0], [1.0] * 3, [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])


def test_rloo_leaves_the_response_itself_out_of_the_mean():
    # Others' means: 1/3 for a right one, 2/3 for a wrong one; 1 and (3 + 1 + 1) / 3.
    close(rloo_advantages(REWARDS), [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [2.0, -2 / 3, -2 / 3, -2 / 3]])
    by_hand = torch.tensor([[r - (sum(row) - r) / 3 for r in row] for row in REWARDS.tolist()])
    torch.testing.assert_close(rloo_advantages(REWARDS), by_hand, rtol=1e-6, atol=1e-7)


def test_remax_compares_with_the_greedy_response():
    close(
        remax_advantages(REWARDS, greedy_P=torch.tensor([1.0, 2.0])), [[0.0, -1.0, -1.0, 0.0], [1.0, -1.0, -1.0, -1.0]]
    )


def test_reinforce_pp_normalises_over_the_batch():
    # Mean (2 + 6) / 8 = 1; deviations 0, -1, -1, 0, 2, 0, 0, 0; variance 6/8.
    scale = 1 / (math.sqrt(0.75) + 1e-8)
    close(reinforce_pp_advantages(REWARDS), [[0.0, -scale, -scale, 0.0], [2 * scale, 0.0, 0.0, 0.0]])


def test_reinforce_pp_with_the_groups_mean_as_baseline():
    # Group deviations +-1/2 (four times), 3/2, -1/2 (three times); their mean square (4 / 4 + 9 / 4 + 3 / 4) / 8 = 1/2.
    scale = 1 / (math.sqrt(0.5) + 1e-8)
    half = 0.5 * scale
    close(
        reinforce_pp_advantages(REWARDS, baseline=True),
        [[half, -half, -half, half], [1.5 * scale, -half, -half, -half]],
    )


@pytest.mark.parametrize("function", [rloo_advantages, lambda r: reinforce_pp_advantages(r, baseline=True)])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e6 / 7])
def test_a_constant_group_beside_others_gets_exactly_nothing(function, reward):
    rewards = torch.tensor([[reward] * 7, [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]])
    advantages = function(rewards)
    assert torch.equal(advantages[0], torch.zeros(7)) and bool(advantages[1].abs().min() > 0)


@pytest.mark.parametrize("baseline", [False, True])
def test_a_constant_batch_gets_exactly_nothing(baseline):
    for reward in (0.0, 0.1, 1 / 3):
        rewards = torch.full((3, 7), reward)
        assert torch.equal(reinforce_pp_advantages(rewards, baseline=baseline), torch.zeros(3, 7))


def dpo_loss(policy_logp, ref_logp, pairs, beta):
    """The mean of -log sigmoid(beta (winner's log-ratio - loser's)), as the paper has it."""
    total = 0.0
    for prompt, winner, loser in pairs:
        ratio = policy_logp[prompt] - ref_logp[prompt]
        total = total - torch.nn.functional.logsigmoid(beta * (ratio[winner] - ratio[loser]))
    return total / len(pairs)


def test_pairs_have_the_gradient_of_dpo():
    random = torch.Generator().manual_seed(3)
    policy_logp = (-20 * torch.rand(4, 3, generator=random, dtype=torch.float64)).requires_grad_()
    ref_logp = -20 * torch.rand(4, 3, generator=random, dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.7, -1.0], [0.0, 1.0, 1.0]])
    beta, pairs = 0.3, [(0, 0, 1), (2, 1, 2), (3, 1, 0)]  # none of the second prompt; the first of equals
    expected = dpo_loss(policy_logp, ref_logp, pairs, beta)
    (gradient,) = torch.autograd.grad(expected, policy_logp)
    made = pair_coefficients(rewards, policy_logp_PG=policy_logp, ref_logp_PG=ref_logp, beta=beta)
    (ours,) = torch.autograd.grad((-made.advantages_PG * policy_logp).sum() / made.num, policy_logp)
    torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-15)
    assert made.num == 3 and made.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    difference = (policy_logp - ref_logp).detach()
    margins = [beta * float(difference[p, w] - difference[p, other]) for p, w, other in pairs]
    assert made.margin == pytest.approx(sum(margins) / 3) and made.accuracy == sum(m > 0 for m in margins) / 3
    assert not made.advantages_PG.requires_grad


def test_pairs_by_hand():
    # At the reference every margin is 0 and sigmoid(0) = 1/2.
    logp = torch.tensor([[-3.0, -5.0], [-1.0, -2.0]])
    made = pair_coefficients(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), policy_logp_PG=logp, ref_logp_PG=logp, beta=0.1)
    close(made.advantages_PG, [[-0.05, 0.05], [0.0, 0.0]])
    assert (made.num, made.accuracy, made.margin) == (1, 0.0, 0.0) and made.loss == pytest.approx(math.log(2))
    nothing = pair_coefficients(torch.ones(2, 2), policy_logp_PG=logp, ref_logp_PG=logp)
    assert nothing[1:] == (0, 0.0, 0.0, 0.0) and not bool(nothing.advantages_PG.any())


@pytest.mark.parametrize("arguments", [{}, {"std": False}, {"bessel": False}, {"eps": 0.0}, {"mean": False}])
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
