"""The table of algorithms: what a config can change, and what it cannot."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from algorithm_config import config
from fastreason_kernels import PolicyLossSpec, policy_loss

from fastreason.algorithm_checks import algorithm_warnings
from fastreason.algorithms import ALGORITHMS, Algorithm, resolve_algorithm
from fastreason.config import dump_config, parse_config
from fastreason.errors import ConfigError
from fastreason.kl import KlTerm


def resolve_row(name, **algorithm):
    """A row with what it cannot do without."""
    return resolve_algorithm(config(name=name, teacher={"path": "t"} if name in TAUGHT else None, **algorithm))


TAUGHT = {"kdrl", "kd_rkl"}


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


# advantage of the rewards 1, -1 in one group, spec as it differs from a clip of 0.2, aggregation, filter, truncation.
HALF = 1 / (math.sqrt(2) + 1e-6)
PUBLISHED = {
    "grpo": ([HALF, -HALF], {}, "token_mean", ("none", "zero"), "keep"),
    "dr_grpo": ([1.0, -1.0], {}, "constant", ("none", "zero"), "keep"),
    "dapo": ([HALF, -HALF], {"clip_high": 0.28}, "token_mean", ("both", "refill"), "penalise"),
    "reinforce": ([1.0, -1.0], {}, "token_mean", ("none", "zero"), "keep"),
    "reinforce_rej": ([1.0, -1.0], {}, "token_mean", ("both", "remove"), "keep"),
    "raft": ([1.0, 0.0], {"ratio": "none"}, "token_mean", ("none", "zero"), "keep"),
    "raft_pp": ([1.0, 0.0], {}, "token_mean", ("none", "zero"), "keep"),
    "raft_pp_no_clip": ([1.0, 0.0], {"clip_low": None, "clip_high": None}, "token_mean", ("none", "zero"), "keep"),
    "rloo": ([2.0, -2.0], {}, "token_mean", ("none", "zero"), "keep"),
    "remax": ([0.5, -1.5], {}, "token_mean", ("none", "zero"), "keep"),
    "reinforce_pp": ([1.0, -1.0], {}, "token_mean", ("none", "zero"), "keep"),
    "reinforce_pp_baseline": ([1.0, -1.0], {}, "token_mean", ("none", "zero"), "keep"),
    "gspo": (
        [HALF, -HALF],
        {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        *("sequence_mean", ("none", "zero"), "keep"),
    ),
    "cispo": (
        [HALF, -HALF],
        {"gate": "cispo", "clip_low": None, "clip_high": 4.0},
        *("token_mean", ("none", "zero"), "keep"),
    ),
    "sapo": ([HALF, -HALF], {"gate": "sapo"}, "sequence_mean", ("none", "zero"), "keep"),
    "ppo": (None, {}, "token_mean", ("none", "zero"), "keep"),
    "iterative_dpo": (None, {"ratio": "none"}, "token_mean", ("none", "zero"), "keep"),
    "kdrl": ([HALF, -HALF], {}, "token_mean", ("none", "zero"), "keep"),
    "kd_rkl": (None, {}, "token_mean", ("none", "zero"), "keep"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_row_without_overrides_is_as_published(name):
    advantage, spec, aggregation, left_out, truncated = PUBLISHED[name]
    resolved = resolve_row(name)
    assert resolved.spec == replace(PolicyLossSpec(clip_low=0.2, clip_high=0.2), **spec)
    assert (resolved.aggregation, resolved.filter, resolved.filtered) == (aggregation, *left_out)
    assert (resolved.truncated, resolved.truncation_buffer) == (truncated, 1 if name == "dapo" else 0)
    assert (resolved.ratio_against, resolved.entropy.active) == ("sampler", False)
    assert ALGORITHMS[name].paper.startswith("arXiv ")
    if advantage is not None:
        data = {"greedy_P": torch.tensor([0.5])} if resolved.greedy_baseline else {}
        made = resolved.advantage(torch.tensor([[1.0, -1.0]]), **data)
        assert made[0].tolist() == pytest.approx(advantage, rel=1e-6)


def test_what_rows_need_beside_rewards():
    needs = {
        name: [n for n in ("greedy_baseline", "critic", "pairs") if getattr(row, n)] for name, row in ALGORITHMS.items()
    }
    assert {name: n for name, n in needs.items() if n} == {
        "remax": ["greedy_baseline"],
        "ppo": ["critic"],
        "iterative_dpo": ["pairs"],
    }
    assert [name for name, row in ALGORITHMS.items() if not row.use_rewards] == ["kd_rkl"]
    assert {name for name, row in ALGORITHMS.items() if row.kl.active} == TAUGHT
    kdrl = ALGORITHMS["kdrl"].kl
    assert (kdrl.estimator, kdrl.place, kdrl.target, kdrl.coef, kdrl.schedule) == (
        *("k2", "loss", "teacher"),
        2e-3,
        "fixed",
    )


REWARDS = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, -1.0, -1.0, -1.0], [1.0, 0.5, -1.0, 1.0], [1.0] * 4])


def test_raft_pp_is_grpo_with_the_best_as_advantage():
    """The same loss, aggregation and ratio; A = 1[r = max and r > 0] in the place of the normalised reward."""
    raft, grpo = resolve_row("raft_pp", samples_per_prompt=4), resolve_row("grpo", samples_per_prompt=4)
    indicator = ((REWARDS.amax(dim=1, keepdim=True) == REWARDS) & (REWARDS > 0)).float()
    assert torch.equal(raft.advantage(REWARDS), indicator)
    assert replace(raft, advantage=None) == replace(grpo, advantage=None)


def test_one_update_of_grpo_without_std_is_reinforce_with_the_mean_as_baseline():
    """At a ratio of exactly 1 the clip and the ratio have the gradient of -(r - mean) log pi."""
    grpo = resolve_row("grpo", advantage={"std": False})
    logp = torch.linspace(-3, -0.1, 16, dtype=torch.float64, requires_grad=True)
    advantages = grpo.advantage(REWARDS.double()).flatten()
    (gradient,) = torch.autograd.grad(policy_loss(logp, None, advantages, grpo.spec).loss_sum, logp)
    baseline = (REWARDS.double() - REWARDS.double().mean(dim=1, keepdim=True)).flatten()
    torch.testing.assert_close(gradient, -baseline, rtol=1e-14, atol=1e-15)


def test_dapo_with_equal_clips_and_no_shaping_is_grpo_with_the_token_mean():
    plain = resolve_row("dapo", clip_high=0.2, filter="none", truncated="keep")
    grpo = resolve_row("grpo", aggregation="token_mean")
    assert torch.equal(plain.advantage(REWARDS), grpo.advantage(REWARDS))
    same = {"advantage": None, "filtered": "zero", "truncation_buffer": 0}
    assert replace(plain, **same) == replace(grpo, **same)


def test_dapos_buffer_is_a_share_of_the_longest_response():
    assert resolve_row("dapo").truncation_buffer == 1  # 0.2 of 5 tokens; 4096 of 20480 in the paper
    assert resolve_row("dapo", truncation_buffer=3).truncation_buffer == 3
    assert resolve_row("dapo", truncation_buffer=0).truncation_buffer == 0


def test_a_beta_of_zero_is_grpo():
    zero, grpo = resolve_row("kdrl", kl_coef=0.0), resolve_row("grpo")
    assert zero.spec_at(0, zero.initial_state()) == grpo.spec_at(0, grpo.initial_state()) == grpo.spec
    assert torch.equal(zero.advantage(REWARDS), grpo.advantage(REWARDS))
    assert not zero.kl.active and zero.zero_advantage_is_zero_gradient


def test_the_annealed_coefficient_reaches_the_spec():
    resolved = resolve_row("kdrl", kl_coef=5e-3, kl_schedule="annealed", kl_anneal=5e-5, kl_floor=1e-3)
    specs = [resolved.spec_at(step, resolved.initial_state()) for step in (0, 20, 1000)]
    assert [spec.kl_coef for spec in specs] == pytest.approx([5e-3, 4e-3, 1e-3])
    assert {spec.kl for spec in specs} == {"k2"} and resolved.spec.kl == "none"


def test_kl_keys_reach_the_term():
    keys = {
        "kl": "k3",
        "kl_coef": 0.1,
        "kl_target": "reference",
        "kl_mask": "wrong_group",
        "kl_mask_mean": "kept",
        "kl_schedule": "adaptive",
        "kl_goal": 0.2,
        "kl_horizon": 50.0,
    }
    term = resolve_algorithm(config(**keys)).kl
    assert term == KlTerm(
        "k3", "loss", "reference", 0.1, "adaptive", goal=0.2, horizon=50.0, mask="wrong_group", mask_mean="kept"
    )
    assert resolve_row("kdrl", kl="top_k", kl_top_k=8).kl.top_k == 8
    assert resolve_row("kdrl", kl="k1", kl_place="advantage").kl.target == "teacher"


def test_ratio_and_gate_may_be_overridden():
    spec = resolve_algorithm(config(gate="sapo", sapo_tau_neg=1.2)).spec
    assert (spec.gate, spec.sapo_tau_pos, spec.sapo_tau_neg) == ("sapo", 1.0, 1.2)
    assert resolve_algorithm(config(ratio="sequence", clip_low=1e-3, clip_high=1e-3)).spec.ratio == "sequence"
    assert resolve_algorithm(config(ratio="none")).spec.ratio == "none"


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


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"name": "kdrl"}, "ratio"),
        ({"name": "kd_rkl"}, "ratio"),
        ({"name": "kdrl", "kl": "k3"}, "ratio"),
        ({"name": "kdrl", "kl_weight": "none"}, "none"),
        # The row's weight has nothing to act on there.
        ({"name": "kdrl", "kl": "exact"}, "none"),
        ({"name": "kdrl", "kl": "k1", "kl_place": "advantage"}, "none"),
        # As in the published code.
        ({"name": "grpo", "kl": "k3", "kl_coef": 0.001}, "none"),
        ({"name": "raft", "kl": "k3", "kl_coef": 0.001, "kl_weight": "ratio", "ratio_against": "trainer"}, "ratio"),
    ],
)
def test_the_weight_of_a_kl_term_reaches_the_spec(keys, weight):
    teacher = {"teacher": {"path": "t"}} if keys["name"] in TAUGHT else {}
    resolved = resolve_algorithm(config(**keys, **teacher))
    spec = resolved.spec_at(0, resolved.initial_state())
    assert resolved.kl.weight == spec.kl_weight == weight
    assert resolved.spec.kl_weight == "none", "it comes and goes with the term"


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
        ({"gate": "cispo", "ratio": "none"}, r"algorithm\.gate: got 'cispo', allowed: clip when ratio is 'none'"),
        ({"name": "raft", "clip_high": 0.28}, r"algorithm\.clip_high=0\.28: has no effect without a ratio"),
        ({"name": "sapo", "clip_low": 0.1}, r"algorithm\.clip_low=0\.1: has no effect without.*other than sapo"),
        ({"sapo_tau_pos": 2.0}, r"algorithm\.sapo_tau_pos=2\.0: has no effect without algorithm\.gate=sapo"),
        (
            {"name": "raft", "ratio_against": "trainer"},
            r"algorithm\.ratio_against=trainer: has no effect without a ratio",
        ),
        ({"entropy_step": 0.1}, r"algorithm\.entropy_step=0\.1: has no effect without algorithm\.entropy_goal"),
        ({"kl_coef": 0.1}, r"algorithm\.kl_coef=0\.1: has no effect without algorithm\.kl other than none"),
        ({"kl_top_k": 8}, r"algorithm\.kl_top_k=8: has no effect without algorithm\.kl other than none"),
        ({"kl": "k2"}, r"algorithm\.kl_coef: missing; algorithm\.kl=k2 needs a coefficient"),
        (
            {"kl": "k2", "kl_coef": 0.1, "kl_top_k": 8},
            r"algorithm\.kl_top_k=8: has no effect without algorithm\.kl=top_k",
        ),
        (
            {"kl": "k2", "kl_coef": 0.1, "kl_floor": 0.1},
            r"algorithm\.kl_floor=0\.1: .*without algorithm\.kl_schedule=annealed",
        ),
        (
            {"kl": "k2", "kl_coef": 0.1, "kl_goal": 0.1},
            r"algorithm\.kl_goal=0\.1: .*without algorithm\.kl_schedule=adaptive",
        ),
        (
            {"kl": "k2", "kl_coef": 0.1, "kl_mask_mean": "kept"},
            r"kl_mask_mean=kept: .*without algorithm\.kl_mask other",
        ),
        ({"kl_weight": "ratio"}, r"algorithm\.kl_weight=ratio: has no effect without algorithm\.kl=k2 or k3 and"),
        (
            {"kl": "k2", "kl_coef": 0.1, "kl_place": "advantage", "kl_weight": "ratio"},
            r"algorithm\.kl_weight=ratio: .* and algorithm\.kl_place=loss",
        ),
        (
            {"kl": "exact", "kl_coef": 0.1, "kl_weight": "ratio"},
            r"algorithm\.kl_weight=ratio: has no effect without algorithm\.kl=k2 or k3",
        ),
        ({"kl": "k2", "kl_coef": 0.1, "kl_schedule": "annealed"}, r"algorithm\.kl_anneal: missing"),
        (
            {"kl": "k2", "kl_coef": 0.1, "kl_schedule": "annealed", "kl_anneal": 0.01, "kl_floor": 0.2},
            r"algorithm\.kl_floor=0\.2 is above algorithm\.kl_coef=0\.1",
        ),
        ({"kl": "k2", "kl_coef": 0.1, "kl_schedule": "adaptive"}, r"algorithm\.kl_goal=None with .*adaptive"),
        (
            {"kl": "k2", "kl_coef": 0.0, "kl_schedule": "adaptive", "kl_goal": 0.1},
            r"algorithm\.kl_coef=0\.0 with .*adaptive.*Set algorithm\.kl_coef to a number above 0",
        ),
        (
            {"kl": "k1", "kl_coef": 0.1},
            r"algorithm\.kl=k1 with algorithm\.kl_place=loss: .*zero in expectation.*Use algorithm\.kl=k2",
        ),
        (
            {"name": "kdrl", "kl": "k1", "teacher": {"path": "t"}},
            r"algorithm\.kl=k1 with algorithm\.kl_place=loss: .*the target drops out",
        ),
        ({"kl": "exact", "kl_coef": 0.1, "kl_place": "advantage"}, r"algorithm\.kl=exact with .*kl_place=advantage"),
        ({"kl": "top_k", "kl_coef": 0.1, "kl_place": "reward"}, r"algorithm\.kl=top_k with .*kl_place=reward"),
        (
            {"name": "gspo", "kl": "k1", "kl_coef": 0.1, "kl_place": "advantage"},
            r"algorithm\.kl=k1 with algorithm\.kl_place=advantage: a ratio of whole sequences",
        ),
        (
            {"kl": "k1", "kl_coef": 0.1, "kl_place": "reward", "kl_mask": "wrong"},
            r"algorithm\.kl_mask=wrong with algorithm\.kl_place=reward",
        ),
        ({"use_rewards": False}, r"algorithm\.use_rewards=false with algorithm\.name=grpo.*nothing else would train"),
        (
            {"use_rewards": False, "kl": "k1", "kl_coef": 0.1, "kl_place": "reward"},
            r"algorithm\.use_rewards=false with .*kl_place=reward",
        ),
        (
            {"use_rewards": False, "kl": "k2", "kl_coef": 0.1, "advantage": {"std": False}},
            r"algorithm\.advantage=.*has no effect with algorithm\.use_rewards=false",
        ),
        ({"name": "kd_rkl", "kl_coef": 0.0, "teacher": {"path": "t"}}, r"algorithm\.use_rewards=false .*nothing else"),
        ({"name": "iterative_dpo", "kl": "k2", "kl_coef": 0.1}, r"algorithm\.kl=k2 with algorithm\.name=iterative_dpo"),
        (
            {"name": "iterative_dpo", "aggregation": "constant"},
            r"algorithm\.aggregation=constant with .*mean over pairs",
        ),
        ({"name": "ppo", "ratio": "sequence"}, r"algorithm\.ratio=sequence with algorithm\.name=ppo"),
        ({"name": "kdrl"}, r"teacher\.path: missing; algorithm\.name=kdrl has algorithm\.kl_target=teacher"),
        ({"kl": "k2", "kl_coef": 0.1, "kl_target": "teacher"}, r"teacher\.path: missing"),
        ({"teacher": {"path": "t"}}, r"teacher\.path=t: has no effect without algorithm\.kl_target=teacher"),
        ({"teacher": {"dtype": "float32"}}, r"teacher\.dtype=float32: has no effect"),
        (
            {"name": "kdrl", "teacher": {"path": "t", "url": "http://x"}},
            r"teacher\.url=http://x: has no effect without teacher\.where=server",
        ),
        ({"name": "kdrl", "teacher": {"path": "t", "where": "server"}}, r"teacher\.url: missing"),
        (
            {"name": "kdrl", "teacher": {"path": "t", "where": "server", "url": "host:8000"}},
            r"teacher\.url='host:8000': .*http://host:port",
        ),
        (
            {"name": "kdrl", "teacher": {"path": "t", "where": "server", "url": "http://u"}, "temperature": 0.9},
            r"rollout\.temperature=0\.9 with teacher\.where=server",
        ),
        (
            {"name": "kdrl", "kl": "exact", "teacher": {"path": "t", "where": "server", "url": "http://u"}},
            r"algorithm\.kl=exact with teacher\.where=server",
        ),
        (
            {"name": "kdrl", "teacher": {"path": "t", "where": "server", "url": "http://u", "dtype": "float32"}},
            r"teacher\.dtype=float32: has no effect without teacher\.where=trainer",
        ),
        (
            {"name": "kd_rkl", "teacher": {"path": "t"}, "truncated": "penalise"},
            r"algorithm\.truncated=penalise: has no effect with algorithm\.use_rewards=false",
        ),
        (
            {"name": "kd_rkl", "teacher": {"path": "t"}, "filter": "all_right"},
            r"algorithm\.filter=all_right: has no effect with algorithm\.use_rewards=false.*filtered=remove",
        ),
        (
            {"name": "ppo", "critic": {"warmup_steps": 1}},
            r"critic\.warmup_steps=1 with train\.steps=1: the policy would never train",
        ),
        ({"critic": {"lr": 1e-4}}, r"critic\.lr=0\.0001: has no effect without an algorithm with a critic"),
        ({"critic": {"value_clip": None}}, r"critic\.value_clip=None: has no effect"),
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
    for name in ALGORITHMS:
        made = config(name=name, teacher={"path": "t"} if name in TAUGHT else None)
        again = resolve_algorithm(parse_config(yaml.safe_load(dump_config(made))))
        assert replace(again, advantage=None) == replace(resolve_algorithm(made), advantage=None)


def test_the_default_advantage_is_that_of_the_row():
    rewards = torch.tensor([[1.0, 0.0]])
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert resolve_algorithm(config(name="grpo")).advantage(rewards).tolist() == [pytest.approx([expected, -expected])]
    assert resolve_algorithm(config(name="reinforce")).advantage(rewards).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("keys", "zero"),
    [
        ({}, True),
        ({"entropy_coef": 0.0}, True),
        ({"entropy_coef": 0.01}, False),
        ({"entropy_goal": 0.2}, False),
        ({"kl": "k2", "kl_coef": 0.0}, True),
        ({"kl": "k2", "kl_coef": 0.1}, False),
        ({"kl": "exact", "kl_coef": 0.1}, False),
        ({"kl": "k1", "kl_coef": 0.1, "kl_place": "advantage"}, False),
        ({"kl": "k1", "kl_coef": 0.1, "kl_place": "reward"}, True),
    ],
)
def test_rows_without_advantage_are_left_out_only_where_nothing_else_moves_them(keys, zero):
    assert resolve_algorithm(config(name="grpo", **keys)).zero_advantage_is_zero_gradient is zero


K2 = {"kl": "k2", "kl_coef": 0.1}
K1 = {"kl": "k1", "kl_coef": 0.1, "kl_place": "advantage"}
KD = {"name": "kdrl", "teacher": {"path": "t"}}
TRAINER = {"ratio_against": "trainer"}
SEVERAL = {"prompts_per_step": 4, "prompts_per_update": 2}
AGES, UPDATES = "rollout.max_staleness=1", "train.prompts_per_update=2 of train.prompts_per_step=4"


@pytest.mark.parametrize(
    ("algorithm", "staleness", "train", "causes", "advice"),
    [
        ({}, 1, SEVERAL, None, None),
        (K2, 0, {}, None, None),
        (K2, 1, {}, AGES, "Use algorithm.kl_weight=ratio; or"),
        (K2, 0, SEVERAL, UPDATES, "Use algorithm.kl_weight=ratio; or"),
        (K2, 1, SEVERAL, f"{AGES} and {UPDATES}", "Use algorithm.kl_weight=ratio; or"),
        ({**KD, "kl_weight": "none"}, 1, {}, AGES, "algorithm.kl_weight=ratio"),
        ({"kl": "k3", "kl_coef": 0.0}, 1, SEVERAL, None, None),
        # The sampler's ratio is the whole weight; the trainer's own knows of the step's updates alone.
        (KD, 1, SEVERAL, None, None),
        ({**KD, **TRAINER}, 0, SEVERAL, None, None),
        ({**KD, **TRAINER}, 1, SEVERAL, AGES, "Use algorithm.ratio_against=sampler, or algorithm.importance=truncate"),
        ({**KD, **TRAINER, "importance": "truncate"}, 1, SEVERAL, None, None),
        (
            {**K2, **TRAINER},
            1,
            {},
            AGES,
            "kl_weight=ratio with algorithm.ratio_against=sampler, or algorithm.importance",
        ),
        ({**K2, **TRAINER, "importance": "truncate"}, 1, {}, AGES, "Use algorithm.kl_weight=ratio; or"),
        # In the advantage the weights of the policy term are the KL's; over the vocabulary nothing is sampled.
        ({**KD, "kl": "k1", "kl_place": "advantage"}, 1, SEVERAL, None, None),
        ({"kl": "k2", "kl_coef": 0.1, "kl_place": "reward"}, 1, SEVERAL, None, None),
        ({**KD, "kl": "exact"}, 1, SEVERAL, None, None),
        ({"name": "raft", **K1}, 0, {}, None, None),
        ({"name": "raft", **K1}, 1, {}, f"kl_place=advantage and {AGES}", "Use algorithm.ratio=token; or"),
        ({"ratio": "none", **K1}, 0, SEVERAL, f"kl_place=advantage and {UPDATES}", "Use algorithm.ratio=token; or"),
        ({**K1, **TRAINER}, 1, {}, AGES, "Use algorithm.ratio_against=sampler, or algorithm.importance"),
    ],
)
def test_a_kl_that_is_off_policy_without_a_weight_is_warned_of(algorithm, staleness, train, causes, advice):
    made = config(max_staleness=staleness, **algorithm)
    made = made.model_copy(update={"train": made.train.model_copy(update=train)})
    lines = algorithm_warnings(resolve_algorithm(made), made)
    assert bool(lines) == (causes is not None)
    for line in lines:
        assert line.startswith("warning: algorithm.kl=k") and f"{causes}: some" in line and advice in line
        assert "or rollout.max_staleness=0 and train.prompts_per_update=null" in line
