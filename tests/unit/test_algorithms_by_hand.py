"""The loss of a batch of two prompts with two answers each, by the way of the loop and worked out by hand."""

import math

import pytest
import torch
from algorithm_config import config
from fastreason_kernels import policy_loss

from fastreason.algorithms import resolve_algorithm
from fastreason.packing import collate, loss_denominator, rows_of, units_of
from fastreason.types import Grade, Group, Prompt, Sample

# Per group and sample: reward, and for each token the trainer's and the sampler's log-probability as (logp, ratio).
BATCH = [
    [(1.0, [(-1.0, 0.95), (-2.0, 1.5)]), (0.0, [(-0.5, 0.9)])],
    [(0.0, [(-3.0, 0.5), (-1.0, 1.0), (-2.0, 1.3)]), (3.0, [(-1.5, 0.7), (-0.7, 1.0)])],
]


def groups():
    made = []
    for number, answers in enumerate(BATCH):
        samples = [
            Sample(
                token_ids=list(range(1, len(tokens) + 1)),
                sampler_logp=[logp - math.log(ratio) for logp, ratio in tokens],
                token_versions=[0] * len(tokens),
                text="",
                finish_reason="stop",
                grade=Grade(reward=reward, correct=False),
            )
            for reward, tokens in answers
        ]
        prompt = Prompt(id=str(number), text="")
        made.append(Group(ticket=number, prompt=prompt, prompt_token_ids=[9], samples=samples, version_issued=0))
    return made


def loss_of_the_batch(**algorithm):
    """The path of the loop: rewards, advantages, rows, one micro-batch, the summed loss, one division."""
    resolved = resolve_algorithm(config(**algorithm))
    rewards = torch.tensor([[answer[0] for answer in answers] for answers in BATCH])
    rows = rows_of(groups(), resolved.advantage(rewards), resolved.aggregation)
    batch = collate(units_of(rows, "padded"), "padded")
    logp_N = torch.tensor([logp for answers in BATCH for _, tokens in answers for logp, _ in tokens])
    output = policy_loss(
        logp_N,
        None,
        batch.advantages_N,
        resolved.spec,
        behaviour_logp=batch.sampler_logp_N,
        token_weight=batch.token_weight_N,
    )
    tokens = sum(row.num_response for row in rows)
    return float(output.loss_sum) / loss_denominator(tokens, len(rows), 5, resolved.aggregation)


def test_reinforce_by_hand():
    # A = r; the ratio is held to [0.8, 1.2] where that lowers the objective. Rewards of 0 give nothing.
    # group 1, answer 1 (A = 1): 0.95, min(1.5, 1.2) = 1.2;  group 2, answer 2 (A = 3): min(0.7, 0.8) = 0.7, 1.0
    total = -(1.0 * (0.95 + 1.2) + 3.0 * (0.7 + 1.0))
    assert loss_of_the_batch(name="reinforce") == pytest.approx(total / 8, rel=1e-6)


def test_reinforce_with_other_clips_by_hand():
    total = -(1.0 * (0.95 + 1.28) + 3.0 * (0.7 + 1.0))
    assert loss_of_the_batch(name="reinforce", clip_high=0.28) == pytest.approx(total / 8, rel=1e-6)


# grpo without std: A = +-0.5 in the first group, -1.5 and +1.5 in the second.
# A > 0: min(rho, 1.2); A < 0: max(rho, 0.8).
ANSWERS = [
    [0.5 * 0.95, 0.5 * 1.2],
    [-0.5 * 0.9],
    [-1.5 * 0.8, -1.5 * 1.0, -1.5 * 1.3],
    [1.5 * 0.7, 1.5 * 1.0],
]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", -sum(map(sum, ANSWERS)) / 8),
        ("sequence_mean", -sum(sum(answer) / len(answer) for answer in ANSWERS) / 4),
        ("constant", -sum(map(sum, ANSWERS)) / (4 * 5)),
    ],
)
def test_grpo_by_hand_with_each_aggregation(aggregation, expected):
    loss = loss_of_the_batch(name="grpo", advantage={"std": False}, aggregation=aggregation)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_grpo_with_std_by_hand():
    # Sample deviations: sqrt(1/2) and sqrt(9/2).
    first, second = 1 / (math.sqrt(0.5) + 1e-6), 1 / (math.sqrt(4.5) + 1e-6)
    total = first * (sum(ANSWERS[0]) + sum(ANSWERS[1])) + second * (sum(ANSWERS[2]) + sum(ANSWERS[3]))
    assert loss_of_the_batch(name="grpo") == pytest.approx(-total / 8, rel=1e-5)


def test_dr_grpos_constant_is_the_longest_response():
    """Every token weighs 1 / (rows * max_new_tokens), however long its response is; no deviation."""
    assert loss_of_the_batch(name="dr_grpo") == pytest.approx(-sum(map(sum, ANSWERS)) / (4 * 5), rel=1e-6)


def test_raft_by_hand():
    # Two responses are the best of their groups, with rewards of 1 and 3: -log pi of their four tokens, over all eight.
    assert loss_of_the_batch(name="raft") == pytest.approx((1 + 2 + 1.5 + 0.7) / 8, rel=1e-6)
    assert loss_of_the_batch(name="raft_pp") == pytest.approx(-(0.95 + 1.2 + 0.7 + 1.0) / 8, rel=1e-6)
    assert loss_of_the_batch(name="raft_pp_no_clip") == pytest.approx(-(0.95 + 1.5 + 0.7 + 1.0) / 8, rel=1e-6)


def test_rloo_by_hand():
    # n / (n - 1) = 2 times what grpo without std has.
    assert loss_of_the_batch(name="rloo") == pytest.approx(2 * -sum(map(sum, ANSWERS)) / 8, rel=1e-6)


def test_cispo_by_hand():
    # -min(rho, 5) A log pi, the ratio detached; A as in grpo without std.
    terms = [
        0.5 * (0.95 * -1.0 + 1.5 * -2.0),
        -0.5 * (0.9 * -0.5),
        -1.5 * (0.5 * -3.0 + 1.0 * -1.0 + 1.3 * -2.0),
        1.5 * (0.7 * -1.5 + 1.0 * -0.7),
    ]
    assert loss_of_the_batch(name="cispo", advantage={"std": False}) == pytest.approx(-sum(terms) / 8, rel=1e-6)
