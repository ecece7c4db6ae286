"""The table of algorithms: what a config can change, what it cannot, and a batch's loss worked out by hand."""

import math

import pytest
import torch
import yaml
from fastreason_kernels import policy_loss

from fastreason.algorithms import ALGORITHMS, Algorithm, resolve_algorithm
from fastreason.config import dump_config, parse_config
from fastreason.errors import ConfigError
from fastreason.packing import collate, loss_denominator, rows_of, units_of
from fastreason.types import Grade, Group, Prompt, Sample


def config(samples_per_prompt=2, max_staleness=1, **algorithm):
    return parse_config(
        {
            "model": {"path": "none"},
            "data": {"task": "chain_sum"},
            "rollout": {
                "samples_per_prompt": samples_per_prompt,
                "max_new_tokens": 5,
                "max_staleness": max_staleness,
            },
            "train": {"steps": 1, "prompts_per_step": 2},
            "algorithm": algorithm,
        }
    )


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(ConfigError, match=r"algorithm\.name='gropo': no such row. Did you mean 'grpo'\?") as caught:
        resolve_algorithm(config(name="gropo"))
    assert all(name in str(caught.value) for name in ALGORITHMS)


def test_an_argument_that_the_advantage_does_not_take_is_an_error():
    with pytest.raises(
        ConfigError, match=r"algorithm\.advantage\.sdt: 'grpo' has no such argument.*mean, std, bessel, eps"
    ):
        resolve_algorithm(config(name="grpo", advantage={"sdt": False}))
    with pytest.raises(ConfigError, match=r"algorithm\.advantage\.std: 'reinforce' has no such argument.*none"):
        resolve_algorithm(config(name="reinforce", advantage={"std": False}))


def test_a_group_of_one_is_refused_where_samples_are_compared():
    with pytest.raises(ConfigError, match=r"rollout\.samples_per_prompt=1 with algorithm\.name=grpo.* at least 2"):
        resolve_algorithm(config(samples_per_prompt=1, name="grpo"))
    assert resolve_algorithm(config(samples_per_prompt=1, name="reinforce"))


def test_overrides_reach_the_spec_and_the_advantage():
    algorithm = resolve_algorithm(
        config(
            name="grpo",
            advantage={"std": False},
            clip_low=0.1,
            clip_high=0.28,
            dual_clip=3.0,
            entropy_coef=0.01,
            aggregation="constant",
            ratio_against="trainer",
        )
    )
    spec = algorithm.spec
    assert (spec.clip_low, spec.clip_high, spec.dual_clip, spec.entropy_coef) == (0.1, 0.28, 3.0, 0.01)
    assert (algorithm.aggregation, algorithm.ratio_against) == ("constant", "trainer")
    assert algorithm.advantage(torch.tensor([[1.0, 0.0]])).tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_importance_weights_reach_the_spec_at_every_staleness(max_staleness):
    keys = {"importance": "mask", "importance_level": "geometric", "importance_cap": 3.0, "importance_floor": 0.25}
    resolved = resolve_algorithm(config(max_staleness=max_staleness, ratio_against="trainer", **keys))
    assert {key: getattr(resolved.spec, key) for key in keys} == keys
    resolved = resolve_algorithm(config(max_staleness=max_staleness, ratio_against="trainer", importance="truncate"))
    assert (resolved.spec.importance_level, resolved.spec.importance_cap, resolved.spec.importance_floor) == (
        *("token", 2.0),
        0.0,
    )


def test_filters_and_truncation_are_resolved():
    resolved = resolve_algorithm(config(filter="both"))
    assert (resolved.filter, resolved.filtered) == ("both", "zero")
    resolved = resolve_algorithm(config(filter="constant", filtered="refill", max_refills=3, truncated="mask"))
    assert (resolved.filter, resolved.filtered, resolved.truncated) == ("constant", "refill", "mask")
    resolved = resolve_algorithm(config(truncated="penalise", truncation_penalty=0.5, truncation_buffer=5))
    assert (resolved.truncated, resolved.truncation_penalty, resolved.truncation_buffer) == ("penalise", 0.5, 5)


def test_a_row_has_defaults_that_a_config_overrides(monkeypatch):
    row = Algorithm(
        advantage="grpo",
        loss="clip",
        paper="",
        ratio_against="trainer",
        loss_args={"clip_high": 0.28, "importance": "truncate"},
        filter="both",
        filtered="refill",
        truncated="mask",
    )
    monkeypatch.setitem(ALGORITHMS, "shaped", row)
    resolved = resolve_algorithm(config(name="shaped"))
    assert (resolved.spec.clip_high, resolved.spec.importance) == (0.28, "truncate")
    assert (resolved.filter, resolved.filtered, resolved.truncated) == ("both", "refill", "mask")
    # A key of what the row asks for may stand alone.
    assert resolve_algorithm(config(name="shaped", max_refills=2, importance_cap=1.5)).spec.importance_cap == 1.5
    changed = resolve_algorithm(
        config(name="shaped", importance="none", filtered="zero", truncated="keep", filter="constant")
    )
    assert (changed.spec.importance, changed.filter, changed.filtered) == ("none", "constant", "zero")
    assert changed.truncated == "keep"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"importance": "truncate"},
            r"algorithm\.importance=truncate with algorithm\.ratio_against=sampler.*Use algorithm\.ratio_against=trainer",
        ),
        (
            {"importance_level": "sequence"},
            r"algorithm\.importance_level=sequence: has no effect without algorithm\.imp",
        ),
        ({"importance_cap": 3.0}, r"algorithm\.importance_cap=3\.0: has no effect without algorithm\.importance"),
        ({"importance_floor": 0.5}, r"algorithm\.importance_floor: got 0\.5, allowed: 0 when importance is 'none'"),
        (
            {"importance": "truncate", "ratio_against": "trainer", "importance_floor": 0.5},
            r"algorithm\.importance_floor: got 0\.5, allowed: 0 when importance is 'truncate'",
        ),
        (
            {"importance": "mask", "ratio_against": "trainer", "importance_floor": 2.5},
            r"algorithm\.importance_floor: got 2\.5, allowed: 0 to importance_cap = 2\.0",
        ),
        ({"filtered": "zero"}, r"algorithm\.filtered=zero: has no effect without algorithm\.filter other than none"),
        ({"filtered": "zero", "filter": "none"}, r"algorithm\.filtered=zero: has no effect"),
        ({"max_refills": 3}, r"algorithm\.max_refills=3: has no effect without algorithm\.filtered=refill"),
        ({"max_refills": 3, "filter": "both"}, r"algorithm\.max_refills=3: has no effect"),
        (
            {"truncation_penalty": 0.5},
            r"algorithm\.truncation_penalty=0\.5: has no effect without algorithm\.truncated",
        ),
        ({"truncation_buffer": 2, "truncated": "mask"}, r"algorithm\.truncation_buffer=2: has no effect without"),
        (
            {"truncation_buffer": 6, "truncated": "penalise"},
            r"algorithm\.truncation_buffer=6 is more than rollout\.max_new_tokens=5",
        ),
        (
            {"name": "reinforce", "filter": "both", "samples_per_prompt": 1},
            r"algorithm\.filter=both with rollout\.samples_per_prompt=1: every group of one response is left out",
        ),
    ],
)
def test_what_could_have_no_effect_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        resolve_algorithm(config(**keys))


def test_a_resolved_config_resolves_again():
    """A run's dumped config names every key, those at their defaults too."""
    dumped = parse_config(yaml.safe_load(dump_config(config(filter="both", filtered="refill", truncated="penalise"))))
    assert resolve_algorithm(dumped).filtered == "refill"
    assert resolve_algorithm(parse_config(yaml.safe_load(dump_config(config())))).filter == "none"


def test_the_default_advantage_is_that_of_the_row():
    rewards = torch.tensor([[1.0, 0.0]])
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert resolve_algorithm(config(name="grpo")).advantage(rewards).tolist() == [pytest.approx([expected, -expected])]
    assert resolve_algorithm(config(name="reinforce")).advantage(rewards).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("entropy", "zero"), [(None, True), (0.0, True), (0.01, False)])
def test_rows_without_advantage_are_left_out_only_where_nothing_else_moves_them(entropy, zero):
    assert resolve_algorithm(config(name="grpo", entropy_coef=entropy)).zero_advantage_is_zero_gradient is zero


# A batch of two prompts with two answers each, all of it by hand.

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
