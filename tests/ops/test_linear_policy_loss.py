"""linear_policy_loss: every option against float64, skipping, masks, and what it may compute and allocate."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fastreason_kernels import PolicyLossSpec, linear_logprob, linear_policy_loss
from fastreason_kernels.linear_logprob.reference import linear_logprob_reference
from fastreason_kernels.testing import HeadCase, Recorder, assert_no_worse, head_case

SPECS = {
    "nll": PolicyLossSpec(ratio="none"),
    "ppo": PolicyLossSpec(),
    "dual": PolicyLossSpec(clip_high=0.28, dual_clip=3.0),
    "unclipped": PolicyLossSpec(clip_low=None, clip_high=None),
    "cispo": PolicyLossSpec(gate="cispo"),
    "sapo": PolicyLossSpec(gate="sapo"),
    "k1": PolicyLossSpec(kl="k1", kl_coef=0.3),
    "k2": PolicyLossSpec(kl="k2", kl_coef=0.3),
    "k3": PolicyLossSpec(kl="k3", kl_coef=0.3),
    "k2 weighted": PolicyLossSpec(kl="k2", kl_coef=0.3, kl_weight="ratio"),
    "k3 weighted": PolicyLossSpec(ratio="none", kl="k3", kl_coef=0.3, kl_weight="ratio", importance="truncate"),
    "sequence, k2 weighted": PolicyLossSpec(ratio="sequence", kl="k2", kl_coef=0.3, kl_weight="ratio"),
    "entropy": PolicyLossSpec(entropy_coef=0.2),
    "truncate": PolicyLossSpec(importance="truncate"),
    "mask": PolicyLossSpec(ratio="none", importance="mask", kl="k3"),
    "sequence": PolicyLossSpec(ratio="sequence"),
    "weighed": PolicyLossSpec(importance="truncate", importance_level="sequence", kl="k3", kl_coef=0.1),
    "geometric": PolicyLossSpec(ratio="none", importance="truncate", importance_level="geometric", importance_cap=1.5),
    "weighed sequence": PolicyLossSpec(ratio="sequence", importance="truncate", importance_level="geometric"),
    "all": PolicyLossSpec(dual_clip=3.0, kl="k3", kl_coef=0.1, entropy_coef=0.1, importance="truncate"),
}


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Whatever is read before it is written shows as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def columns_for(case: HeadCase, *, bias=False, temperature=1.0, seed=0) -> dict[str, torch.Tensor]:
    """Columns whose ratios and weights stay far from every bound, so that rounding cannot move one across it."""
    num_tokens = case.ids.shape[0]
    generator = torch.Generator().manual_seed(seed)
    exact = case.to(torch.float64)
    with torch.no_grad():
        logp, _, _ = linear_logprob_reference(
            exact.hidden, exact.weight, exact.ids, exact.bias if bias else None, temperature
        )

    def offset(*choices: float) -> torch.Tensor:
        return torch.tensor(choices)[torch.randint(0, len(choices), (num_tokens,), generator=generator)]

    behaviour = logp + offset(0.0, 0.5, -0.5, -1.6)
    return {
        "advantages": torch.randn(num_tokens, generator=generator) * offset(1.0, 1.0, 0.0),
        "behaviour_logp": behaviour.float(),
        "ref_logp": (logp + offset(-0.7, 0.4)).float(),
        "sampler_logp": (behaviour + offset(-1.2, 0.1)).float(),
        "token_weight": torch.rand(num_tokens, generator=generator) + 0.2,
        "sequence_ids": torch.arange(num_tokens) // 6,
        "mask": offset(1.0, 1.0, 1.0, 0.0) > 0,
    }


def run(case: HeadCase, spec, columns, *, impl, dtype, bias=False, **options):
    fresh = case.to(dtype)
    leaves = (fresh.hidden, fresh.weight, fresh.bias) if bias else (fresh.hidden, fresh.weight)
    columns = dict(columns)
    out = linear_policy_loss(
        fresh.hidden,
        fresh.weight,
        fresh.ids,
        columns.pop("advantages"),
        spec,
        bias=fresh.bias if bias else None,
        impl=impl,
        **columns,
        **options,
    )
    grads = torch.autograd.grad(out.loss_sum, leaves)
    return out, dict(zip(("d_hidden", "d_weight", "d_bias"), grads, strict=False))


def check(case: HeadCase, spec, columns, dtype, chunk_tokens, **options):
    exact_out, exact = run(case, spec, columns, impl="reference", dtype=torch.float64, **options)
    eager_out, eager = run(case, spec, columns, impl="reference", dtype=dtype, **options)
    out, grads = run(case, spec, columns, impl="torch", dtype=dtype, chunk_tokens=chunk_tokens, **options)
    # The terms of the sum cancel, so its rounding is measured against their size.
    atol = 4e-3 if dtype == torch.bfloat16 else 2e-6
    scale = float(exact_out.logp.nan_to_num().abs().sum()) + 1
    assert out.loss_sum.dtype == torch.float32 and out.loss_sum.shape == ()
    loss = (x.loss_sum.detach() for x in (out, eager_out, exact_out))
    assert_no_worse("loss_sum", *loss, dtype=dtype, atol=atol * scale)
    mask = exact_out.computed
    for name in ("logp", "entropy", "kl", "ratio"):
        values = [getattr(x, name) for x in (out, eager_out, exact_out)]
        assert values[0].dtype == torch.float32 and not values[0].requires_grad
        assert values[0][~mask].isnan().all()
        assert_no_worse(name, *(x[mask] for x in values), dtype=dtype)
    for name in ("clipped", "computed"):
        assert torch.equal(getattr(out, name), getattr(exact_out, name)), name
    for name, gradient in grads.items():
        assert gradient.dtype == dtype
        assert_no_worse(name, gradient, eager[name], exact[name], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_every_option_matches_float64(spec, dtype, monkeypatch):
    # Five rows a block: a chunk of 16 has blocks of 5, 5, 5, 1.
    monkeypatch.setattr("fastreason_kernels.rows.CPU_BUFFER_BYTES", 5 * 301 * 4)
    monkeypatch.setattr("fastreason_kernels.gemm.CPU_BLOCK", 100)
    case = head_case(61, 301, dtype=dtype)
    options = {"bias": True, "temperature": case.temperature}
    columns = columns_for(case, **options)
    check(case, spec, columns, dtype, 16, **options)
    del columns["mask"], columns["behaviour_logp"]
    check(case, spec, columns, dtype, None)


def test_the_columns_above_reach_every_branch():
    case = head_case(61, 301)
    columns = columns_for(case, bias=True, temperature=case.temperature)
    options = {"bias": True, "temperature": case.temperature, "impl": "torch", "dtype": torch.float32}
    ppo, dual = (run(case, SPECS[name], columns, **options)[0] for name in ("ppo", "dual"))
    positive = columns["advantages"] > 0
    assert (ppo.clipped & positive).any() and (ppo.clipped & ~positive).any() and (~ppo.clipped).any()
    assert (dual.clipped & ~ppo.clipped).any()
    weight = (columns["behaviour_logp"] - columns["sampler_logp"]).exp()[columns["mask"]]
    assert (weight > 2).any() and (weight < 2).any()
    assert ((columns["advantages"] == 0) & columns["mask"]).any()


SHAPES = [(1, 17, None), (7, 1000, 3), (7, 5003, 1), (257, 17, 64), (257, 1000, 100), (64, 1000, 64), (65, 1000, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "vocab", "chunk_tokens"), SHAPES)
def test_ragged_shapes(num_tokens, vocab, chunk_tokens, dtype):
    case = head_case(num_tokens, vocab, dtype=dtype)
    columns = columns_for(case)
    columns["mask"][0] = True
    check(case, SPECS["all"], columns, dtype, chunk_tokens)


@pytest.mark.parametrize("name", ["k2 weighted", "k3 weighted"])
def test_every_strategy_weighs_the_kl_term_alike(name):
    case = head_case(41, 50)
    columns, spec = columns_for(case), SPECS[name]
    exact, expected = run(case, spec, columns, impl="reference", dtype=torch.float64)
    plain, _ = run(case, replace(spec, kl_weight="none"), columns, impl="reference", dtype=torch.float64)
    assert abs(float(exact.loss_sum.detach() - plain.loss_sum.detach())) > 0.1
    for strategy, frozen in (("A", False), ("B", False), ("F", True)):
        fresh = case.to(torch.float32)
        fresh.weight.requires_grad_(not frozen)
        options = {**columns, "strategy": strategy, "chunk_tokens": 8}
        out = linear_policy_loss(fresh.hidden, fresh.weight, fresh.ids, options.pop("advantages"), spec, **options)
        out.loss_sum.backward()
        torch.testing.assert_close(out.loss_sum.double(), exact.loss_sum, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(fresh.hidden.grad.double(), expected["d_hidden"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.kl.double(), exact.kl, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_shifted_down(dtype):
    case = head_case(33, 1000, dtype=dtype, shift=-40.0)
    check(case, SPECS["all"], columns_for(case, bias=True), dtype, 8, bias=True)


@pytest.mark.parametrize("spec", ["all", "sequence"])
def test_gradcheck_in_float64(spec):
    case = head_case(8, 7, width=3, dtype=torch.float64)
    columns = columns_for(case, bias=True, temperature=case.temperature)
    advantages = columns.pop("advantages")

    def function(hidden, weight, bias):
        options = {"bias": bias, "temperature": case.temperature, "chunk_tokens": 3}
        return linear_policy_loss(hidden, weight, case.ids, advantages, SPECS[spec], **columns, **options).loss_sum

    assert torch.autograd.gradcheck(function, (case.hidden, case.weight, case.bias))


def test_weight_gradient_of_many_chunks_is_summed_in_fp32():
    """400 equal contributions: a bf16 sum stops growing at a fraction of the truth."""
    case = head_case(1, 50, dtype=torch.bfloat16)
    with torch.no_grad():
        many = HeadCase(case.hidden.repeat(400, 1), case.weight, case.bias, case.ids.repeat(400), case.temperature)
    check(many, SPECS["nll"], {"advantages": torch.ones(400)}, torch.bfloat16, 1, bias=True)


def test_no_ratio_and_unit_advantage_is_cross_entropy():
    case = head_case(23, 90)
    out, grads = run(case, SPECS["nll"], {"advantages": torch.ones(23)}, impl="auto", dtype=torch.float32)
    twin = case.to(torch.float32)
    loss = F.cross_entropy(twin.hidden @ twin.weight.T, case.ids, reduction="sum")
    loss.backward()
    torch.testing.assert_close(out.loss_sum, loss)
    torch.testing.assert_close(grads["d_hidden"], twin.hidden.grad)
    torch.testing.assert_close(grads["d_weight"], twin.weight.grad)


@pytest.mark.parametrize("gate", ["clip", "cispo", "sapo"])
def test_without_behaviour_the_ratio_is_exactly_one(gate):
    case = head_case(23, 90, dtype=torch.bfloat16)
    advantages = torch.randn(23, generator=torch.Generator().manual_seed(3))
    spec = PolicyLossSpec(gate=gate, clip_low=0.0, clip_high=0.0)
    out, grads = run(case, spec, {"advantages": advantages}, impl="auto", dtype=torch.bfloat16)
    assert out.ratio.tolist() == [1.0] * 23 and not out.clipped.any()
    _, plain = run(case, SPECS["nll"], {"advantages": advantages}, impl="auto", dtype=torch.bfloat16)
    torch.testing.assert_close(grads["d_weight"], plain["d_weight"])


def test_its_logp_is_that_of_linear_logprob():
    """Bit-equal, so that a trainer may recompute behaviour_logp with one and train with the other."""
    case = head_case(40, 301, dtype=torch.bfloat16)
    with torch.no_grad():
        logp, entropy, _ = linear_logprob(case.hidden, case.weight, case.ids, chunk_tokens=16)
    columns = {"advantages": torch.ones(40), "behaviour_logp": logp}
    out, _ = run(case, SPECS["ppo"], columns, impl="auto", dtype=torch.bfloat16, chunk_tokens=16)
    assert torch.equal(out.logp, logp) and torch.equal(out.entropy, entropy)
    assert out.ratio.tolist() == [1.0] * 40


@pytest.mark.parametrize("spec", ["all", "sequence"])
def test_masked_tokens_may_hold_anything(spec):
    case = head_case(30, 50)
    columns = columns_for(case)
    mask = columns["mask"]
    expected, grads = run(case, SPECS[spec], columns, impl="auto", dtype=torch.float32)
    with torch.no_grad():
        case.hidden[~mask] = math.nan
    case.ids[~mask] = -100
    for name in ("advantages", "behaviour_logp", "ref_logp", "sampler_logp", "token_weight"):
        columns[name][~mask] = math.nan
    out, junk_grads = run(case, SPECS[spec], columns, impl="auto", dtype=torch.float32)
    assert torch.equal(out.loss_sum, expected.loss_sum)
    assert torch.equal(out.computed, mask)
    for name, gradient in grads.items():
        assert torch.equal(junk_grads[name], gradient), name
    assert not junk_grads["d_hidden"][~mask].any()


@pytest.mark.parametrize("spec", ["all", "sequence"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_empty_mask_is_a_connected_zero(spec, impl):
    case = head_case(6, 20)
    columns = {**columns_for(case), "mask": torch.zeros(6, dtype=torch.bool)}
    out, grads = run(case, SPECS[spec], columns, impl=impl, dtype=torch.float32, bias=True)
    assert float(out.loss_sum.detach()) == 0.0
    assert not any(bool(gradient.any()) for gradient in grads.values())
    assert not out.computed.any() and out.logp.isnan().all()


def test_active_statistics_skip_tokens_without_a_gradient():
    case = head_case(40, 50)
    columns = columns_for(case)
    columns["token_weight"][5] = 0.0
    active = columns["mask"] & (columns["advantages"] != 0) & (columns["token_weight"] != 0)
    num_active, num_idle = int(active.sum()), int((columns["mask"] & ~active).sum())
    assert num_active and num_idle
    whole, expected = run(case, SPECS["unclipped"], columns, impl="auto", dtype=torch.float32)
    assert torch.equal(whole.computed, columns["mask"])
    with Recorder() as recorder:
        out, grads = run(case, SPECS["unclipped"], columns, impl="auto", dtype=torch.float32, statistics="active")
    assert [shapes[0][0] for shapes in recorder.products] == [num_active, num_active, 50]
    assert torch.equal(out.computed, active) and torch.equal(out.logp.isnan(), ~active)
    assert torch.equal(out.loss_sum, whole.loss_sum)
    for name, gradient in expected.items():
        assert torch.equal(grads[name], gradient)
    with Recorder() as recorder:
        run(case, SPECS["unclipped"], columns, impl="auto", dtype=torch.float32)
    # The idle tokens cost one more product, of their rows only.
    assert [shapes[0][0] for shapes in recorder.products] == [num_active, num_active, 50, num_idle]
    # With a KL term a token of zero advantage has a gradient, and only that of zero weight is idle.
    out, _ = run(case, SPECS["k2"], columns, impl="auto", dtype=torch.float32, statistics="active")
    assert torch.equal(out.computed, columns["mask"] & (columns["token_weight"] != 0))


def test_clipped_tokens_cost_no_gradient_product(monkeypatch):
    monkeypatch.setattr("fastreason_kernels.rows.CPU_BUFFER_BYTES", 5 * 50 * 4)
    case = head_case(40, 50)
    columns = columns_for(case)
    with Recorder() as recorder:
        out, _ = run(case, SPECS["ppo"], columns, impl="auto", dtype=torch.float32, statistics="active")
    num_active, num_clipped = int(out.computed.sum()), int(out.clipped.sum())
    assert 0 < num_clipped < num_active
    kept = num_active - num_clipped
    assert recorder.products == [((num_active, 16), (16, 50)), ((kept, 50), (50, 16)), ((50, kept), (kept, 16))]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_part_costs_no_product(frozen):
    case = head_case(20, 50)
    columns = columns_for(case)
    advantages = columns.pop("advantages")
    getattr(case, frozen).requires_grad_(False)
    with Recorder() as recorder:
        loss = linear_policy_loss(case.hidden, case.weight, case.ids, advantages, SPECS["all"], **columns).loss_sum
        loss.backward()
    assert len(recorder.products) == 2
    assert getattr(case, frozen).grad is None
    trained = "weight" if frozen == "hidden" else "hidden"
    whole = case.to(torch.float32)
    linear_policy_loss(whole.hidden, whole.weight, whole.ids, advantages, SPECS["all"], **columns).loss_sum.backward()
    assert torch.equal(getattr(case, trained).grad, getattr(whole, trained).grad)


def test_without_gradients_there_is_one_product():
    case = head_case(20, 50)
    advantages = torch.ones(20)
    with torch.no_grad(), Recorder() as recorder:
        out = linear_policy_loss(case.hidden, case.weight, case.ids, advantages, SPECS["ppo"])
    assert recorder.products == [((20, 16), (16, 50))] and not out.loss_sum.requires_grad


@pytest.mark.parametrize("spec", ["all", "sequence"])
def test_never_holds_whole_logits(spec):
    num_tokens, vocab, chunk = 300, 500, 30
    case = head_case(num_tokens, vocab)
    columns = {**columns_for(case), "mask": torch.ones(num_tokens, dtype=torch.bool)}
    with Recorder() as recorder:
        run(case, SPECS[spec], columns, impl="auto", dtype=torch.float32, chunk_tokens=chunk)
    assert recorder.largest == chunk * vocab


def test_incoming_gradient_scales_and_can_come_twice():
    case = head_case(20, 50)
    loss = linear_policy_loss(case.hidden, case.weight, case.ids, torch.ones(20), SPECS["ppo"]).loss_sum
    leaves = (case.hidden, case.weight)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for first, scaled, leaf in zip(once, thrice, leaves, strict=True):
        torch.testing.assert_close(scaled, first * 3)
        torch.testing.assert_close(leaf.grad, first * 2)


def test_sum_does_not_depend_on_how_tokens_are_split():
    case = head_case(40, 50)
    columns = columns_for(case)
    whole, grads = run(case, SPECS["all"], columns, impl="auto", dtype=torch.float32)
    parts = case.to(torch.float32)
    total = 0.0
    for rows in (slice(0, 13), slice(13, 40)):
        share = {name: value[rows] for name, value in columns.items()}
        advantages = share.pop("advantages")
        out = linear_policy_loss(
            parts.hidden[rows], parts.weight, parts.ids[rows], advantages, SPECS["all"], **share, chunk_tokens=4
        )
        out.loss_sum.backward()
        total += float(out.loss_sum.detach())
    assert total == pytest.approx(float(whole.loss_sum.detach()), rel=1e-5)
    torch.testing.assert_close(parts.hidden.grad, grads["d_hidden"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.weight.grad, grads["d_weight"], rtol=1e-4, atol=1e-5)


def test_tied_weight():
    """The table that makes the hidden states is the head: both paths must reach its gradient."""
    case = head_case(12, 30)
    tokens, advantages = torch.arange(12), torch.ones(12)
    gradients = []
    for impl, dtype in (("torch", torch.float32), ("reference", torch.float64)):
        table = case.to(dtype).weight
        hidden = F.embedding(tokens, table) * 2
        linear_policy_loss(hidden, table, case.ids, advantages, SPECS["ppo"], impl=impl).loss_sum.backward()
        gradients.append(table.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["all", "sequence"])
def test_autocast_is_the_explicit_cast(spec):
    case = head_case(20, 50)
    columns = columns_for(case)
    expected, twin = run(case, SPECS[spec], columns, impl="auto", dtype=torch.bfloat16, bias=True, chunk_tokens=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = run(case, SPECS[spec], columns, impl="auto", dtype=torch.float32, bias=True, chunk_tokens=7)
    assert torch.equal(out.loss_sum, expected.loss_sum)
    for name, gradient in grads.items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, twin[name].float()), name


WEIGHED = {
    "truncate": PolicyLossSpec(importance="truncate", importance_level="sequence"),
    "mask": PolicyLossSpec(importance="mask", importance_level="geometric", importance_cap=1.6, importance_floor=1.0),
    "cispo": PolicyLossSpec(gate="cispo", importance="mask", importance_level="sequence", importance_floor=0.2),
    "kl": PolicyLossSpec(
        kl="k2", kl_coef=0.3, kl_weight="ratio", importance="truncate", importance_level="sequence", importance_cap=1.1
    ),
    "all": PolicyLossSpec(dual_clip=3.0, entropy_coef=0.1, importance="truncate", importance_level="geometric"),
}


@pytest.mark.parametrize("statistics", ["all", "active"])
@pytest.mark.parametrize("has_behaviour", [True, False])
@pytest.mark.parametrize("spec", WEIGHED.values(), ids=WEIGHED.keys())
def test_weights_of_sequences_are_those_of_whole_sequences(spec, has_behaviour, statistics):
    """Chunks cut sequences, their tokens lie apart, some have no advantage, some are masked: the weight counts them all."""
    case = head_case(41, 50)
    columns = columns_for(case)
    columns["sequence_ids"] = 3 * (torch.arange(41) * 17 % 7)  # seven sequences, ids 0 to 18 in no order
    columns["sampler_logp"] = columns["behaviour_logp"] + columns["sequence_ids"] * 0.02 - 0.2
    columns["advantages"][columns["sequence_ids"] == 3] = 0.0
    columns["mask"] &= columns["sequence_ids"] != 6
    if not has_behaviour:
        columns["sampler_logp"] += columns["ref_logp"] - columns["behaviour_logp"]
        del columns["behaviour_logp"]
    exact, expected = run(case, spec, columns, impl="reference", dtype=torch.float64)
    strategies = {"B": False, "F": True, **({"A": False} if has_behaviour else {}), "auto": False}
    for strategy, frozen in strategies.items():
        fresh = case.to(torch.float32)
        fresh.weight.requires_grad_(not frozen)
        options = {**columns, "strategy": strategy, "statistics": statistics, "chunk_tokens": 8}
        advantages = options.pop("advantages")
        out = linear_policy_loss(fresh.hidden, fresh.weight, fresh.ids, advantages, spec, **options)
        out.loss_sum.backward()
        torch.testing.assert_close(out.loss_sum.double(), exact.loss_sum, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(fresh.hidden.grad.double(), expected["d_hidden"], rtol=1e-4, atol=1e-5)
        if not frozen:
            torch.testing.assert_close(fresh.weight.grad.double(), expected["d_weight"], rtol=1e-4, atol=1e-5)
        kept = out.computed
        assert torch.equal(kept | columns["mask"], columns["mask"])
        torch.testing.assert_close(out.ratio[kept].double(), exact.ratio[kept], rtol=1e-4, atol=1e-5)
        assert torch.equal(out.clipped, exact.clipped)
        if statistics == "active" and not spec.acts_at_zero_advantage:
            skipped = columns["mask"] & (columns["sequence_ids"] == 3)
            assert skipped.any() and not kept[skipped].any(), "a sequence without any advantage needs no weight"


def test_a_weight_of_sequences_that_is_not_known_beforehand_makes_no_gradient_in_forward():
    case = head_case(6, 20)
    spec, ids = WEIGHED["truncate"], torch.arange(6) // 3
    columns = {"sampler_logp": torch.zeros(6), "sequence_ids": ids}
    arguments = (case.hidden, case.weight, case.ids, torch.ones(6), spec)
    with pytest.raises(ValueError, match=r"allowed: auto \| B \| F, as a sequence's importance weight without"):
        linear_policy_loss(*arguments, **columns, strategy="A")
    for behaviour, products in ((None, 4), (torch.zeros(6), 3)):
        with Recorder() as recorder:
            linear_policy_loss(*arguments, **columns, behaviour_logp=behaviour).loss_sum.backward()
        assert len(recorder.products) == products


def test_wrong_input_is_named():
    case = head_case(4, 10)
    arguments = (case.hidden, case.weight, case.ids, torch.ones(4))
    with pytest.raises(ValueError, match=r"statistics: got 'none', allowed: all \| active"):
        linear_policy_loss(*arguments, PolicyLossSpec(), statistics="none")
    with pytest.raises(ValueError, match="ref_logp: None"):
        linear_policy_loss(*arguments, PolicyLossSpec(kl="k1"))
    with pytest.raises(ValueError, match="mask: dtype"):
        linear_policy_loss(*arguments, PolicyLossSpec(), mask=torch.ones(4))
    with pytest.raises(ValueError, match="advantages: shape"):
        linear_policy_loss(*arguments[:3], torch.ones(5), PolicyLossSpec())
    case.ids[2] = 10
    with pytest.raises(ValueError, match="ids: values"):
        linear_policy_loss(*arguments, PolicyLossSpec())
    linear_policy_loss(*arguments, PolicyLossSpec(), mask=torch.tensor([True, True, False, True]))
