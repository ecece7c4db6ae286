"""policy_loss: hand-computed scalars, equivalences, masks, and what each KL estimator's gradient is."""

import math

import pytest
import torch
from fastreason_kernels import PolicyLossSpec, importance_weight, policy_loss

F64 = torch.float64


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def one_token(spec: PolicyLossSpec, *, logp=-1.0, advantage=1.0, entropy=2.0, **columns: float):
    """(loss, d loss / d logp, d loss / d entropy, output) of a single token."""
    leaf, entropy_leaf = column(logp).requires_grad_(), column(entropy).requires_grad_()
    given = {name: column(value) for name, value in columns.items()}
    out = policy_loss(leaf, entropy_leaf, column(advantage), spec, **given)
    grads = torch.autograd.grad(out.loss_sum, (leaf, entropy_leaf), allow_unused=True)
    g_logp, g_entropy = (0.0 if g is None else float(g) for g in grads)
    return float(out.loss_sum.detach()), g_logp, g_entropy, out


# ratio, advantage -> loss, d loss / d logp, clipped; clip_low 0.2, clip_high 0.28, dual clip at 3.
CLIP_CASES = [
    (1.0, 2.0, -2.0, -2.0, False),
    (1.2, 2.0, -2.4, -2.4, False),
    (1.5, 2.0, -2.56, 0.0, True),
    (0.5, 2.0, -1.0, -1.0, False),
    (1.0, -2.0, 2.0, 2.0, False),
    (1.5, -2.0, 3.0, 3.0, False),
    (0.9, -2.0, 1.8, 1.8, False),
    (0.5, -2.0, 1.6, 0.0, True),
    (4.0, -2.0, 6.0, 0.0, True),
    (4.0, 2.0, -2.56, 0.0, True),
    (4.0, 0.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "clipped"), CLIP_CASES)
def test_ppo_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    spec = PolicyLossSpec(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    value, g_logp, _, out = one_token(spec, advantage=advantage, behaviour_logp=-1.0 - math.log(ratio))
    assert value == pytest.approx(loss, abs=1e-12) and g_logp == pytest.approx(gradient, abs=1e-12)
    assert bool(out.clipped) is clipped and float(out.ratio) == pytest.approx(ratio)


def test_without_dual_clip_a_negative_token_is_unbounded():
    value, g_logp, _, out = one_token(PolicyLossSpec(), advantage=-2.0, behaviour_logp=-1.0 - math.log(4))
    assert (value, g_logp, bool(out.clipped)) == (pytest.approx(8.0), pytest.approx(8.0), False)


@pytest.mark.parametrize(
    ("low", "high", "ratio", "advantage", "bounded"), [(None, 0.2, 0.1, -1.0, 0.1), (0.2, None, 9.0, 1.0, 9.0)]
)
def test_a_side_without_bound(low, high, ratio, advantage, bounded):
    spec = PolicyLossSpec(clip_low=low, clip_high=high)
    value, g_logp, _, out = one_token(spec, advantage=advantage, behaviour_logp=-1.0 - math.log(ratio))
    assert value == pytest.approx(-bounded * advantage) and g_logp == pytest.approx(-ratio * advantage)
    assert not bool(out.clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "clipped"),
    [(1.1, 2.0, 1.1, False), (5.0, 2.0, 1.2, True), (5.0, -2.0, 1.2, True), (0.1, -2.0, 0.8, True)],
)
def test_cispo_by_hand(ratio, advantage, weight, clipped):
    """The weight is truncated but the gradient goes on: -weight * A / d logp, at loss -weight * A * logp."""
    spec = PolicyLossSpec(gate="cispo")
    value, g_logp, _, out = one_token(spec, advantage=advantage, behaviour_logp=-1.0 - math.log(ratio))
    assert value == pytest.approx(weight * advantage) and g_logp == pytest.approx(-weight * advantage)
    assert bool(out.clipped) is clipped


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
def test_sapo_by_hand(advantage, tau):
    ratio = 1.5
    gate = 1 / (1 + math.exp(-tau * 0.5))
    value, g_logp, _, out = one_token(
        PolicyLossSpec(gate="sapo"), advantage=advantage, behaviour_logp=-1.0 - math.log(ratio)
    )
    assert value == pytest.approx(-4 / tau * gate * advantage)
    assert g_logp == pytest.approx(-4 * gate * (1 - gate) * ratio * advantage)
    assert not bool(out.clipped)
    # On-policy the gate's slope is 1: the plain policy gradient.
    assert one_token(PolicyLossSpec(gate="sapo"), advantage=advantage)[1] == pytest.approx(-advantage)


@pytest.mark.parametrize(
    ("kl", "value", "gradient"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", math.exp(-0.5) + 0.5 - 1, 1 - math.exp(-0.5))],
)
def test_kl_by_hand(kl, value, gradient):
    """logp = -1, ref_logp = -1.5, so r = ref - logp = -0.5."""
    loss, g_logp, _, out = one_token(PolicyLossSpec(kl=kl, kl_coef=0.1), advantage=0.0, ref_logp=-1.5)
    assert float(out.kl) == pytest.approx(value)
    assert loss == pytest.approx(0.1 * value) and g_logp == pytest.approx(0.1 * gradient)


@pytest.mark.parametrize("ratio", ["none", "token"])
@pytest.mark.parametrize(
    ("importance", "columns", "weight"),
    [
        ({}, {}, 1.0),
        ({}, {"behaviour_logp": -1.0 - math.log(1.5)}, 1.5),
        ({"importance": "truncate"}, {"sampler_logp": -1.0 - math.log(1.2)}, 1.2),
        (
            {"importance": "truncate"},
            {"behaviour_logp": -1.0 - math.log(0.5), "sampler_logp": -1.0 - math.log(0.5) - math.log(9)},
            0.5 * 2.0,  # the importance weight ends at 2
        ),
        (
            {"importance": "mask"},
            {"behaviour_logp": -1.0 - math.log(0.5), "sampler_logp": -1.0 - math.log(0.5) - math.log(9)},
            0.0,
        ),
    ],
)
def test_the_weight_of_a_kl_term_by_hand(ratio, importance, columns, weight):
    """Of a token without an advantage, k2 = 0.3^2 / 2: value and gradient times a constant, whatever the ratio."""
    spec = PolicyLossSpec(ratio=ratio, kl="k2", kl_coef=2.0, kl_weight="ratio", **importance)
    value, g_logp, _, out = one_token(spec, advantage=0.0, ref_logp=-0.7, **columns)
    assert value == pytest.approx(2 * weight * 0.045) and g_logp == pytest.approx(-2 * weight * 0.3)
    assert float(out.kl) == pytest.approx(0.045), "reported as it is"


def test_the_weight_of_a_kl_term_stays_finite():
    spec = PolicyLossSpec(ratio="none", kl="k2", kl_coef=0.1, kl_weight="ratio")
    value, g_logp, _, _ = one_token(spec, advantage=0.0, ref_logp=-2.0, behaviour_logp=-500.0)
    assert value == pytest.approx(0.1 * math.exp(20) * 0.5) and g_logp == pytest.approx(0.1 * math.exp(20))


def test_kl_is_reported_without_being_optimised():
    loss, g_logp, _, out = one_token(PolicyLossSpec(kl="k2"), advantage=0.0, ref_logp=-1.5)
    assert (loss, g_logp, float(out.kl)) == (0.0, 0.0, 0.125)


def test_entropy_bonus_by_hand():
    loss, g_logp, g_entropy, out = one_token(PolicyLossSpec(ratio="none", entropy_coef=0.01), logp=-3.0, advantage=2.0)
    assert (loss, g_logp, g_entropy) == (pytest.approx(6.0 - 0.02), -2.0, pytest.approx(-0.01))
    assert float(out.entropy) == 2.0


@pytest.mark.parametrize(("importance", "weight"), [("truncate", 2.0), ("mask", 0.0)])
def test_importance_weight_bounds_the_policy_term_alone_by_default(importance, weight):
    spec = PolicyLossSpec(
        importance=importance, importance_cap=2.0, kl="k2", kl_coef=1.0, entropy_coef=1.0, clip_high=None
    )
    # exp(behaviour - sampler) = 3 is over the cap; the ratio's denominator is the behaviour.
    columns = {"behaviour_logp": -1.5, "sampler_logp": -1.5 - math.log(3), "ref_logp": -3.0}
    loss, g_logp, g_entropy, _ = one_token(spec, **columns)
    rho = math.exp(0.5)
    assert loss == pytest.approx(-weight * rho + 2.0 - 2.0)
    assert g_logp == pytest.approx(-weight * rho + 2.0) and g_entropy == -1.0
    # Under the cap both leave the weight as it is.
    loss, g_logp, _, _ = one_token(spec, **{**columns, "sampler_logp": -1.5 - math.log(1.5)})
    assert loss == pytest.approx(-1.5 * rho) and g_logp == pytest.approx(-1.5 * rho + 2.0)


def test_importance_weight_without_behaviour_uses_the_detached_logp():
    spec = PolicyLossSpec(importance="truncate", importance_cap=5.0)
    loss, g_logp, _, _ = one_token(spec, logp=-1.0, advantage=2.0, sampler_logp=-1.0 - math.log(1.5))
    assert loss == pytest.approx(-3.0) and g_logp == pytest.approx(-3.0)


@pytest.mark.parametrize(
    ("factor", "weight"), [(0.4, 0.0), (0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (2.1, 0.0)], ids=lambda x: str(x)
)
def test_masked_weights_are_kept_between_floor_and_cap(factor, weight):
    spec = PolicyLossSpec(importance="mask", importance_floor=0.5, importance_cap=2.0, kl="k2", kl_coef=1.0)
    # Powers of two and a sampler at 0 make the bounds themselves exact.
    columns = {"behaviour_logp": math.log(factor), "sampler_logp": 0.0, "ref_logp": math.log(factor) - 2.0}
    loss, g_logp, _, _ = one_token(spec, logp=math.log(factor), **columns)
    assert loss == pytest.approx(-weight + 2.0) and g_logp == pytest.approx(-weight + 2.0)


# Two sequences, interleaved, their ids in no order: 7 has tokens 0, 2, 4 (3 is masked), 3 has 1 and 5, 9 is masked whole.
WEIGHED_IDS = torch.tensor([7, 3, 7, 7, 7, 3, 9])
WEIGHED_MASK = torch.tensor([True, True, True, False, True, True, False])
LOG_WEIGHTS = [0.5, -1.0, 0.7, math.nan, -0.3, 0.4, math.nan]
PRODUCTS = {7: math.exp(0.9), 3: math.exp(-0.6)}
MEANS = {7: math.exp(0.3), 3: math.exp(-0.3)}
SEQUENCE_WEIGHTS = [
    # level, kind, cap, floor, weight of 7, weight of 3
    ("sequence", "truncate", 3.0, 0.0, PRODUCTS[7], PRODUCTS[3]),
    ("sequence", "truncate", 2.0, 0.0, 2.0, PRODUCTS[3]),
    ("sequence", "mask", 2.0, 0.0, 0.0, PRODUCTS[3]),
    ("sequence", "mask", 3.0, 0.6, PRODUCTS[7], 0.0),
    ("geometric", "truncate", 3.0, 0.0, MEANS[7], MEANS[3]),
    ("geometric", "truncate", 1.2, 0.0, 1.2, MEANS[3]),
    ("geometric", "mask", 1.2, 0.5, 0.0, MEANS[3]),
    ("geometric", "mask", 1.5, 0.8, MEANS[7], 0.0),
]


@pytest.mark.parametrize("has_behaviour", [True, False])
@pytest.mark.parametrize(("level", "kind", "cap", "floor", "first", "second"), SEQUENCE_WEIGHTS)
def test_weights_of_sequences_by_hand(level, kind, cap, floor, first, second, has_behaviour):
    spec = PolicyLossSpec(
        importance=kind, importance_level=level, importance_cap=cap, importance_floor=floor, kl="k2", kl_coef=1.0
    )
    logp = column(-1.0, -2.0, -1.5, math.nan, -0.5, -2.5, math.nan).requires_grad_()
    # Without behaviour_logp the log-probabilities stand for it, detached: the weight has no gradient of its own.
    behaviour = logp.detach() - (0.1 if has_behaviour else 0.0)
    advantages = column(1.0, -2.0, 0.5, math.nan, 3.0, 1.0, math.nan)
    out = policy_loss(
        logp,
        None,
        advantages,
        spec,
        behaviour_logp=behaviour if has_behaviour else None,
        ref_logp=logp.detach() + 1.0,
        sampler_logp=behaviour - column(*LOG_WEIGHTS),
        sequence_ids=WEIGHED_IDS,
        mask=WEIGHED_MASK,
    )
    ratio = math.exp(0.1) if has_behaviour else 1.0
    total = -ratio * (first * (1.0 + 0.5 + 3.0) + second * (-2.0 + 1.0)) + 5 * 0.5
    assert float(out.loss_sum.detach()) == pytest.approx(total)
    out.loss_sum.backward()
    policy = -ratio * column(first, -2.0 * second, 0.5 * first, 0.0, 3.0 * first, second, 0.0)
    torch.testing.assert_close(logp.grad, policy - WEIGHED_MASK.double())
    # The same weights from the function that a trainer logs.
    weight, bounded = importance_weight(
        behaviour, behaviour - column(*LOG_WEIGHTS), spec, sequence_ids=WEIGHED_IDS, mask=WEIGHED_MASK
    )
    assert weight[WEIGHED_MASK].tolist() == pytest.approx([first, second, first, first, second])
    raw = {"sequence": PRODUCTS, "geometric": MEANS}[level]
    changed = {7: first != raw[7], 3: second != raw[3]}
    assert bounded[WEIGHED_MASK].tolist() == [changed[7], changed[3], changed[7], changed[7], changed[3]]


def test_weights_of_single_tokens_are_the_same_at_every_level():
    logp, advantages = column(-1.0, -3.0, -2.0), column(1.0, -1.0, 2.0)
    sampler, ids = column(-1.4, -2.0, -2.2), torch.tensor([5, 1, 3])
    totals = []
    for level in ("token", "sequence", "geometric"):
        spec = PolicyLossSpec(importance="truncate", importance_level=level)
        leaf = logp.clone().requires_grad_()
        out = policy_loss(leaf, None, advantages, spec, sampler_logp=sampler, sequence_ids=ids)
        totals.append([out.loss_sum.detach(), *torch.autograd.grad(out.loss_sum, leaf)[0]])
    assert totals[0] == totals[1] == totals[2] and abs(float(totals[0][0])) > 0.5


def test_the_gradient_of_weighted_sequences_is_that_of_autograd():
    """The weights as constants, written down a second time, under a sequence's ratio and a clip."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(12, generator=generator, dtype=F64).requires_grad_()
    behaviour, sampler = (logp.detach() + 0.3 * torch.randn(12, generator=generator, dtype=F64) for _ in range(2))
    advantages = torch.randn(12, generator=generator, dtype=F64)
    ids = torch.tensor([4, 0, 4, 2, 2, 0, 4, 2, 0, 0, 2, 4])
    spec = PolicyLossSpec(ratio="sequence", importance="truncate", importance_level="sequence", importance_cap=1.1)
    columns = {"behaviour_logp": behaviour, "sampler_logp": sampler, "sequence_ids": ids}
    out = policy_loss(logp, None, advantages, spec, **columns)
    total, weights = 0.0, []
    for name in (0, 2, 4):
        tokens = ids == name
        ratio = (logp - behaviour)[tokens].mean().exp()
        weights.append(min(1.1, float((behaviour - sampler)[tokens].sum().exp())))
        clipped = torch.minimum(ratio * advantages[tokens], ratio.clamp(0.8, 1.2) * advantages[tokens])
        total = total - weights[-1] * clipped.sum()
    assert 1.1 in weights and min(weights) < 1.05
    (ours,), (theirs,) = (torch.autograd.grad(x, logp) for x in (out.loss_sum, total))
    torch.testing.assert_close(out.loss_sum, total)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("gap", "weight"), [(3.0, 20.0), (-3.0, -20.0)])
def test_a_long_sequence_has_a_finite_weight(gap, weight):
    spec = PolicyLossSpec(importance="truncate", importance_level="sequence", importance_cap=1e12)
    logp = torch.full((4000,), -5.0).requires_grad_()
    ids = torch.zeros(4000, dtype=torch.int64)
    found, _ = importance_weight(logp, logp.detach() - gap, spec, sequence_ids=ids)
    assert not found.requires_grad and found.log().tolist() == pytest.approx([weight] * 4000, rel=1e-5)
    out = policy_loss(logp, None, torch.ones(4000), spec, sampler_logp=logp.detach() - gap, sequence_ids=ids)
    out.loss_sum.backward()
    assert bool(logp.grad.isfinite().all()) and bool((logp.grad != 0).all())


def test_without_importance_every_weight_is_one():
    weight, bounded = importance_weight(column(-1.0, -2.0), column(-9.0, -2.0), PolicyLossSpec())
    assert weight.tolist() == [1.0, 1.0] and not bounded.any()
    spec = PolicyLossSpec(importance="mask", importance_level="geometric")
    with pytest.raises(ValueError, match="sequence_ids: None, but importance_level is 'geometric'"):
        importance_weight(column(-1.0), column(-1.0), spec)


@pytest.mark.parametrize(
    ("fields", "alone", "with_behaviour"),
    [
        ({}, False, False),
        ({"importance": "truncate"}, False, False),
        ({"importance_level": "sequence"}, False, False),
        ({"importance": "truncate", "importance_level": "sequence"}, True, False),
        ({"importance": "mask", "importance_level": "geometric", "ratio": "none"}, True, False),
        ({"importance": "mask", "importance_level": "geometric", "gate": "cispo"}, True, False),
        ({"ratio": "sequence"}, False, True),
        ({"ratio": "sequence", "importance": "truncate"}, True, True),
        ({"ratio": "sequence", "importance": "truncate", "gate": "cispo"}, False, True),
        ({"ratio": "sequence", "importance": "truncate", "importance_level": "sequence", "gate": "cispo"}, True, True),
    ],
)
def test_which_losses_couple_tokens(fields, alone, with_behaviour):
    """By the Jacobian of the gradient: whether a token's gradient changes with the log-probability of another."""
    spec = PolicyLossSpec(**fields, clip_low=None, clip_high=None)
    assert (spec.couples_tokens(False), spec.couples_tokens(True)) == (alone, with_behaviour)
    ids, advantages, sampler = torch.tensor([0, 0, 1]), column(1.0, 2.0, 1.0), column(-1.3, -0.9, -2.0)

    def gradient(logp, behaviour):
        leaf = logp.clone().requires_grad_()
        columns = {"behaviour_logp": behaviour, "sampler_logp": sampler, "sequence_ids": ids}
        return torch.autograd.grad(policy_loss(leaf, None, advantages, spec, **columns).loss_sum, leaf)[0]

    start, moved = column(-1.0, -1.0, -1.0), column(-1.0, -1.1, -1.0)
    for behaviour, coupled in ((None, alone), (column(-1.1, -1.2, -0.9), with_behaviour)):
        assert bool(gradient(start, behaviour)[0] != gradient(moved, behaviour)[0]) is coupled


def test_sequence_ratio_by_hand():
    """GSPO: two sequences, interleaved; the masked token counts for neither mean nor sum."""
    logp = column(-1.0, -2.0, -1.5, -9.0, -2.5).requires_grad_()
    behaviour = column(-1.1, -1.0, -1.9, 0.0, -2.0)
    ids = torch.tensor([7, 3, 7, 7, 3])
    mask = torch.tensor([True, True, True, False, True])
    weight, advantages = column(0.5, 0.5, 0.5, 0.5, 0.5), column(1.0, -1.0, 1.0, 1.0, -1.0)
    spec = PolicyLossSpec(ratio="sequence", clip_low=None, clip_high=None)
    out = policy_loss(
        logp, None, advantages, spec, behaviour_logp=behaviour, sequence_ids=ids, mask=mask, token_weight=weight
    )
    first, second = math.exp((0.1 + 0.4) / 2), math.exp((-1.0 - 0.5) / 2)
    assert float(out.loss_sum.detach()) == pytest.approx(-first + second)
    torch.testing.assert_close(out.ratio, column(first, second, first, math.nan, second), equal_nan=True)
    out.loss_sum.backward()
    # Each of the two tokens of a sequence carries half of its gradient.
    torch.testing.assert_close(logp.grad, column(-first / 2, second / 2, -first / 2, 0.0, second / 2))


def test_sequence_clip_is_for_the_whole_sequence():
    logp = column(-1.0, -1.0, -1.0).requires_grad_()
    spec = PolicyLossSpec(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
    behaviour, ids = column(-1.01, -1.0, -1.0001), torch.tensor([0, 0, 1])
    out = policy_loss(logp, None, column(1.0, 1.0, 1.0), spec, behaviour_logp=behaviour, sequence_ids=ids)
    assert out.clipped.tolist() == [True, True, False]
    out.loss_sum.backward()
    assert logp.grad[:2].tolist() == [0.0, 0.0] and float(logp.grad[2]) < -0.99


@pytest.mark.parametrize("gate", ["clip", "cispo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_on_policy_every_gate_is_the_policy_gradient(gate, ratio):
    logp = torch.linspace(-4, -0.1, 6, dtype=F64).requires_grad_()
    # With one advantage per sequence: otherwise a sequence ratio shares their mean.
    advantages = column(1.0, 1.0, -2.0, -2.0, 0.5, 0.5)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    out = policy_loss(logp, None, advantages, PolicyLossSpec(ratio=ratio, gate=gate), sequence_ids=ids)
    assert out.ratio.tolist() == [1.0] * 6 and not out.clipped.any()
    (gradient,) = torch.autograd.grad(out.loss_sum, logp)
    torch.testing.assert_close(gradient, -advantages)


def test_without_ratio_it_is_weighted_likelihood():
    logp = torch.linspace(-4, -0.1, 6, dtype=F64).requires_grad_()
    advantages, weight = torch.linspace(-1, 1, 6, dtype=F64), torch.linspace(0, 3, 6, dtype=F64)
    out = policy_loss(logp, None, advantages, PolicyLossSpec(ratio="none"), token_weight=weight)
    assert float(out.loss_sum.detach()) == pytest.approx(float((-advantages * weight * logp).sum().detach()))


def test_masked_tokens_may_hold_anything():
    spec = PolicyLossSpec(kl="k3", kl_coef=0.1, entropy_coef=0.1, importance="truncate")
    junk = column(-1.0, math.nan, math.inf)
    mask = torch.tensor([True, False, False])
    leaves = [junk.clone().requires_grad_() for _ in range(2)]
    others = {name: junk for name in ("behaviour_logp", "ref_logp", "sampler_logp", "token_weight")}
    out = policy_loss(*leaves, junk, spec, mask=mask, **others)
    out.loss_sum.backward()
    alone = policy_loss(*(x.detach()[:1] for x in (*leaves, junk)), spec, **{k: v[:1] for k, v in others.items()})
    assert float(out.loss_sum.detach()) == pytest.approx(float(alone.loss_sum))
    for leaf in leaves:
        assert leaf.grad[1:].tolist() == [0.0, 0.0] and float(leaf.grad[0]) != 0
    assert out.computed.tolist() == [True, False, False]
    assert out.logp.isnan().tolist() == out.ratio.isnan().tolist() == [False, True, True]


def test_empty_mask_is_a_connected_zero():
    logp = column(-1.0, -2.0).requires_grad_()
    out = policy_loss(logp, None, column(1.0, 1.0), PolicyLossSpec(), mask=torch.zeros(2, dtype=torch.bool))
    out.loss_sum.backward()
    assert float(out.loss_sum.detach()) == 0.0 and logp.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("gap", [90.0, -90.0])
@pytest.mark.parametrize("gate", ["clip", "cispo", "sapo"])
def test_huge_log_ratios_stay_finite(gate, gap):
    spec = PolicyLossSpec(gate=gate, kl="k3", kl_coef=0.1, importance="truncate")
    leaf = torch.tensor([-100.0]).requires_grad_()
    other = torch.tensor([-100.0 + gap])
    out = policy_loss(leaf, None, torch.tensor([-1.0]), spec, behaviour_logp=other, ref_logp=other, sampler_logp=other)
    out.loss_sum.backward()
    assert bool(out.loss_sum.isfinite()) and bool(leaf.grad.isfinite().all())


def test_gradient_of_each_kl_estimator_in_expectation():
    """On-policy on a categorical: E grad k1 = 0, E grad k2 = grad KL(pi || ref), E grad k3 = grad KL(ref || pi)."""
    logits = column(0.3, -1.0, 0.8, 0.1, -0.4).requires_grad_()
    ref = torch.log_softmax(column(-0.5, 0.7, 0.2, 0.0, 1.0), 0)

    def expected_gradient(kl):
        logp = torch.log_softmax(logits, 0)
        spec = PolicyLossSpec(ratio="none", kl=kl, kl_coef=1.0)
        # Every token once, weighted with its probability: the expectation over samples, exactly.
        out = policy_loss(logp, None, torch.zeros(5), spec, ref_logp=ref, token_weight=logp.detach().exp())
        return torch.autograd.grad(out.loss_sum, logits)[0]

    logp = torch.log_softmax(logits, 0)
    (reverse,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(5, dtype=F64), rtol=0, atol=1e-15)
    torch.testing.assert_close(expected_gradient("k2"), reverse)
    torch.testing.assert_close(expected_gradient("k3"), forward)


@pytest.mark.parametrize("ratio", ["none", "token"])
def test_off_policy_a_weighted_kl_has_the_expected_gradient_of_on_policy(ratio):
    """Tokens of mu: E_mu[pi / mu grad k2] = grad KL(pi || ref), k3 likewise; without the weight neither is."""
    logits = column(0.3, -1.0, 0.8, 0.1, -0.4).requires_grad_()
    ref = torch.log_softmax(column(-0.5, 0.7, 0.2, 0.0, 1.0), 0)
    sampler = torch.log_softmax(column(1.0, 0.2, -0.9, 0.6, 0.0), 0)
    # The sampler's own log-probabilities, or the trainer's of a while ago and the rest as an importance weight.
    earlier = torch.log_softmax(column(0.7, -0.3, 0.1, 0.2, 0.0), 0)
    given = [{"behaviour_logp": sampler}, {"behaviour_logp": earlier, "sampler_logp": sampler}]

    def expected_gradient(kl, weight, columns):
        logp = torch.log_softmax(logits, 0)
        importance = {"importance": "truncate", "importance_cap": 100.0} if "sampler_logp" in columns else {}
        spec = PolicyLossSpec(ratio=ratio, kl=kl, kl_coef=1.0, kl_weight=weight, **importance)
        out = policy_loss(logp, None, torch.zeros(5), spec, ref_logp=ref, token_weight=sampler.exp(), **columns)
        return torch.autograd.grad(out.loss_sum, logits)[0]

    logp = torch.log_softmax(logits, 0)
    exact = {"k2": (logp.exp() * (logp - ref)).sum(), "k3": (ref.exp() * (ref - logp)).sum()}
    for kl, divergence in exact.items():
        (gradient,) = torch.autograd.grad(divergence, logits, retain_graph=True)
        for columns in given:
            torch.testing.assert_close(expected_gradient(kl, "ratio", columns), gradient)
            assert float((expected_gradient(kl, "none", columns) - gradient).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": "seq"}, r"PolicyLossSpec.ratio: got 'seq', allowed: none \| token \| sequence"),
        ({"gate": "ppo"}, r"PolicyLossSpec.gate: got 'ppo', allowed: clip \| cispo \| sapo"),
        ({"kl": "k4"}, "PolicyLossSpec.kl: got 'k4'"),
        ({"importance": "clip"}, "PolicyLossSpec.importance: got 'clip'"),
        ({"clip_low": -0.1}, "PolicyLossSpec.clip_low: got -0.1"),
        ({"clip_high": -0.1}, "PolicyLossSpec.clip_high: got -0.1"),
        ({"dual_clip": 1.0}, "PolicyLossSpec.dual_clip: got 1.0"),
        ({"dual_clip": 3.0, "gate": "cispo"}, "PolicyLossSpec.dual_clip: got 3.0, allowed: None unless"),
        ({"dual_clip": 3.0, "ratio": "none"}, "PolicyLossSpec.dual_clip: got 3.0, allowed: None when"),
        ({"ratio": "none", "gate": "sapo"}, "PolicyLossSpec.gate: got 'sapo'"),
        ({"kl_coef": 0.1}, "PolicyLossSpec.kl: got 'none'"),
        ({"kl_coef": math.nan, "kl": "k1"}, "PolicyLossSpec.kl_coef"),
        ({"kl_weight": "rho", "kl": "k2"}, r"PolicyLossSpec.kl_weight: got 'rho', allowed: none \| ratio"),
        ({"kl_weight": "ratio"}, "PolicyLossSpec.kl_weight: got 'ratio', allowed: none when kl is 'none'"),
        ({"entropy_coef": math.inf}, "PolicyLossSpec.entropy_coef"),
        ({"sapo_tau_pos": 0.0}, "PolicyLossSpec.sapo_tau_pos"),
        ({"sapo_tau_neg": -1.0}, "PolicyLossSpec.sapo_tau_neg"),
        ({"importance_cap": 0.0}, "PolicyLossSpec.importance_cap"),
        (
            {"importance": "mask", "importance_level": "seq"},
            r"PolicyLossSpec.importance_level: got 'seq', allowed: token \| sequence \| geometric",
        ),
        ({"importance": "mask", "importance_floor": -0.1}, "PolicyLossSpec.importance_floor: got -0.1"),
        ({"importance": "mask", "importance_floor": math.nan}, "PolicyLossSpec.importance_floor: got nan"),
        (
            {"importance": "mask", "importance_floor": 2.1},
            "importance_floor: got 2.1, allowed: 0 to importance_cap = 2.0",
        ),
        ({"importance": "truncate", "importance_floor": 0.5}, "got 0.5, allowed: 0 when importance is 'truncate'"),
        ({"importance_floor": 0.5}, "got 0.5, allowed: 0 when importance is 'none'"),
    ],
)
def test_spec_names_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossSpec(**fields)


@pytest.mark.parametrize(
    ("spec", "columns", "message"),
    [
        (PolicyLossSpec(kl="k3"), {}, "ref_logp: None"),
        (PolicyLossSpec(importance="mask"), {}, "sampler_logp: None"),
        (PolicyLossSpec(ratio="sequence"), {}, "sequence_ids: None"),
        (
            PolicyLossSpec(importance="mask", importance_level="geometric"),
            {"sampler_logp": torch.zeros(3)},
            "sequence_ids: None",
        ),
        (PolicyLossSpec(entropy_coef=0.1), {}, "entropy: None"),
        (PolicyLossSpec(), {"mask": torch.ones(3)}, "mask: dtype torch.float32, allowed: a bool"),
        (PolicyLossSpec(), {"token_weight": torch.ones(3, dtype=torch.int64)}, "token_weight: dtype"),
        (PolicyLossSpec(), {"behaviour_logp": torch.ones(3, 1)}, "behaviour_logp: shape"),
        (PolicyLossSpec(), {"mask": torch.ones(3, dtype=torch.bool, device="meta")}, "advantages, mask: devices"),
    ],
)
def test_columns_are_checked(spec, columns, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(3), None, torch.ones(3), spec, **columns)
