"""Every option of a head under every strategy of both operations, against float64 autograd of whole logits."""

import math
from dataclasses import replace

import pytest
import torch
from fastreason_kernels import LoraHead, PolicyLossSpec, linear_logprob, linear_policy_loss
from fastreason_kernels.testing import Recorder, assert_no_worse, head_case

NUM_TOKENS, VOCAB, WIDTH, RANK = 61, 301, 16, 3

# Options of a head beside bias and per-token temperature. The caps bend logits of standard deviation 2 well.
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.25},
    "softcap and scale": {"softcap": 2.5, "logit_scale": 1.5},
    "lora": {"lora": True},
    "lora and softcap": {"lora": True, "softcap": 3.0},
    "unrounded": {"logits": "fp32"},
    "unrounded lora": {"logits": "fp32", "lora": True, "softcap": 3.0},
}

# Tiles: whole rows in chunks; blocks of columns (strategy B), a ragged last one; both.
TILES = {"rows": {"chunk_tokens": 16}, "columns": {"chunk_vocab": 64}, "both": {"chunk_tokens": 16, "chunk_vocab": 100}}


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Whatever is read before it is written shows as NaN; small row blocks, so that a chunk has several."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr("fastreason_kernels.rows.CPU_BUFFER_BYTES", 5 * VOCAB * 4)
    monkeypatch.setattr("fastreason_kernels.gemm.CPU_BLOCK", 100)
    monkeypatch.setattr("fastreason_kernels.gemm.FEW_ROWS", 8)


class Case:
    """Leaves of one dtype, with the same numbers in every dtype that is asked for."""

    def __init__(self, dtype, frozen_head, lora):
        base = head_case(NUM_TOKENS, VOCAB, width=WIDTH, dtype=torch.bfloat16).to(dtype)
        generator = torch.Generator().manual_seed(3)
        self.lora = None
        leaves = {"hidden": base.hidden, "weight": base.weight, "bias": base.bias}
        if lora:
            a, b = (torch.randn(*s, generator=generator).bfloat16() for s in ((RANK, WIDTH), (VOCAB, RANK)))
            self.lora = LoraHead(a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), 0.5)
            leaves |= {"lora_a": self.lora.a, "lora_b": self.lora.b}
        if frozen_head:
            for name in leaves.keys() - {"hidden"}:
                leaves[name].requires_grad_(False)
        self.base, self.leaves = base, {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

    def head(self, options):
        options = {**options, "bias": self.base.bias, "temperature": self.base.temperature}
        return {**options, "lora": self.lora}


def run(function, dtype, options, frozen_head=False, **call):
    """(outputs by name, gradients by name) of `function(case, head)`, which returns a dict with a `loss`."""
    case = Case(dtype, frozen_head, options.get("lora"))
    outputs = function(case, {**case.head(options), **call})
    grads = torch.autograd.grad(outputs.pop("loss"), tuple(case.leaves.values()))
    return outputs, dict(zip(case.leaves, grads, strict=True))


def compare(function, dtype, options, frozen_head=False, **call):
    exact, exact_grads = run(function, torch.float64, options, frozen_head, impl="reference")
    eager, eager_grads = run(function, dtype, options, frozen_head, impl="reference")
    actual, grads = run(function, dtype, options, frozen_head, **call)
    for name in actual:
        assert_no_worse(name, actual[name], eager[name], exact[name], dtype=dtype)
    for name in grads:
        assert grads[name].dtype == dtype
        assert_no_worse(f"d_{name}", grads[name], eager_grads[name], exact_grads[name], dtype=dtype)


def logprob(entropy_grad=True):
    generator = torch.Generator().manual_seed(1)
    g_logp, g_entropy = torch.randn(2, NUM_TOKENS, generator=generator)

    def function(case, head):
        logp, entropy, lse = linear_logprob(
            case.base.hidden, case.base.weight, case.base.ids, entropy_grad=entropy_grad, **head
        )
        loss = (g_logp * logp).sum()
        if entropy_grad:
            loss = loss + (g_entropy * entropy).sum()
        return {"loss": loss, "logp": logp, "entropy": entropy, "lse": lse}

    return function


def policy(spec, **columns):
    generator = torch.Generator().manual_seed(2)
    sequence_ids = torch.arange(NUM_TOKENS) // 7
    advantages = torch.randn(int(sequence_ids.max()) + 1, generator=generator)[sequence_ids]
    advantages[14:28] = 0.0  # two sequences without a gradient
    columns = {
        "ref_logp": torch.full((NUM_TOKENS,), -6.0),
        "token_weight": torch.rand(NUM_TOKENS, generator=generator) + 0.2,
        "mask": torch.arange(NUM_TOKENS) % 5 != 2,
        "sequence_ids": sequence_ids,
        **columns,
    }

    def function(case, head):
        out = linear_policy_loss(case.base.hidden, case.base.weight, case.base.ids, advantages, spec, **columns, **head)
        values = {name: getattr(out, name)[columns["mask"]] for name in ("logp", "entropy", "kl", "ratio")}
        return {"loss": out.loss_sum, **values}

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_recompute(options, tiles, dtype):
    compare(logprob(), dtype, options, strategy="B", **tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("options", [name for name in OPTIONS if "lora" not in name])
def test_frozen_head(options, entropy_grad, dtype):
    compare(logprob(entropy_grad), dtype, OPTIONS[options], frozen_head=True, strategy="F", chunk_tokens=16)


SPEC = PolicyLossSpec(kl="k3", kl_coef=0.1, entropy_coef=0.1, clip_low=None, clip_high=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["A", "B"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_policy_loss(options, strategy, dtype):
    compare(policy(SPEC), dtype, options, strategy=strategy, chunk_tokens=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["A", "B", "F"])
@pytest.mark.parametrize("spec", [replace(SPEC, entropy_coef=0.0), SPEC])
def test_policy_loss_with_a_frozen_head(spec, strategy, dtype):
    compare(policy(spec), dtype, {"softcap": 3.0}, frozen_head=True, strategy=strategy, chunk_tokens=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("extras", [{}, {"kl": "k2", "kl_coef": 0.1, "entropy_coef": 0.1}])
def test_strictly_on_policy_sequence_ratio_needs_three_products(gate, extras, dtype):
    """Its ratio is 1 by definition, so the gradient is known before the log-probabilities are: strategy A, exactly."""
    spec = PolicyLossSpec(ratio="sequence", gate=gate, **extras)
    function = policy(spec)
    compare(function, dtype, {}, chunk_tokens=16)
    with Recorder() as recorder:
        run(function, torch.float32, {}, statistics="active")
    assert len(recorder.products) == 3
    loss = {}
    for strategy in ("A", "B"):
        outputs = function(case := Case(torch.float64, False, False), {**case.head({}), "strategy": strategy})
        loss[strategy] = float(outputs["loss"].detach())
    assert loss["A"] == pytest.approx(loss["B"], rel=1e-12)


def test_automatic_strategies():
    """The number of head products shows which strategy ran: A 3, B 4, F 2, or one less without a weight gradient."""
    off_policy = {"behaviour_logp": torch.full((NUM_TOKENS,), -6.0)}
    sequence = PolicyLossSpec(ratio="sequence")

    def products(function, frozen_head=False, **call):
        with Recorder() as recorder:
            run(function, torch.float32, {}, frozen_head, **call)
        return [pair[0][0] == VOCAB for pair in recorder.products].count(False), len(recorder.products)

    active = {"statistics": "active"}
    assert products(policy(PolicyLossSpec(), **off_policy), **active) == (2, 3)
    assert products(policy(PolicyLossSpec(), **off_policy), frozen_head=True, **active) == (2, 2)
    assert products(policy(sequence, **off_policy), **active) == (3, 4)
    assert products(policy(sequence, **off_policy), frozen_head=True, **active) == (2, 2)
    assert products(policy(replace(sequence, entropy_coef=0.1), **off_policy), frozen_head=True, **active) == (3, 3)
    assert products(logprob()) == (3, 4)
    assert products(logprob(), frozen_head=True) == (3, 3)
    assert products(logprob(entropy_grad=False), frozen_head=True) == (2, 2)


@pytest.mark.parametrize("strategy", ["B", "F"])
def test_sequences_without_a_gradient_are_skipped(strategy):
    columns = {"behaviour_logp": torch.full((NUM_TOKENS,), -6.0)}
    function = policy(PolicyLossSpec(ratio="sequence", clip_low=None, clip_high=None), **columns)
    mask = torch.arange(NUM_TOKENS) % 5 != 2
    skipped = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    skipped[14:28] = True
    for statistics in ("all", "active"):
        case = Case(torch.float32, strategy == "F", False)
        with Recorder() as recorder:
            outputs = function(case, {**case.head({}), "strategy": strategy, "statistics": statistics})
            outputs["loss"].backward()
        rows = [left[0] for left, right in recorder.products if right == (WIDTH, VOCAB)]
        active, unmasked = int((mask & ~skipped).sum()), int(mask.sum())
        expected = {
            ("B", "all"): [unmasked, active],
            ("B", "active"): [active, active],
            ("F", "all"): [active, unmasked - active],
            ("F", "active"): [active],
        }
        assert rows == expected[strategy, statistics]
        assert outputs["logp"].isnan().any() == (statistics == "active")
        assert case.base.hidden.grad[skipped].abs().max() == 0


def test_ignore_index_skips_tokens_exactly():
    case = head_case(20, 50)
    ids = case.ids.clone()
    ids[::4] = -100
    with pytest.raises(ValueError, match="ids: values -100"):
        linear_logprob(case.hidden, case.weight, ids)
    for frozen, strategy in ((False, "B"), (True, "F")):
        case = head_case(20, 50)
        case.weight.requires_grad_(not frozen)
        with Recorder() as recorder:
            outputs = linear_logprob(
                case.hidden, case.weight, ids, ignore_index=-100, strategy=strategy, entropy_grad=not frozen
            )
            outputs[0].sum().backward()  # a gradient of 1 arrives at ignored tokens too
        assert {left[0] for left, _ in recorder.products} <= {15, 50}
        keep = ids != -100
        kept = linear_logprob(case.hidden[keep].detach(), case.weight.detach(), ids[keep], entropy_grad=not frozen)
        for value, expected in zip(outputs, kept, strict=True):
            assert torch.equal(value[keep], expected) and (value[~keep] == 0).all()
        assert (case.hidden.grad[~keep] == 0).all() and (case.hidden.grad[keep] != 0).any(1).all()


@pytest.mark.parametrize("strategy", ["B", "F"])
def test_ignored_tokens_stop_even_a_gradient_of_nan(strategy):
    case = head_case(8, 50)
    case.weight.requires_grad_(strategy == "B")
    ids = case.ids.clone()
    ids[2] = -100
    logp, entropy, _ = linear_logprob(case.hidden, case.weight, ids, ignore_index=-100, strategy=strategy)
    factor = torch.ones(8)
    factor[2] = math.nan
    (factor * logp + factor * entropy).sum().backward()
    assert case.hidden.grad.isfinite().all() and (case.hidden.grad[2] == 0).all()


@pytest.mark.parametrize("spec", [PolicyLossSpec(kl="k3", kl_coef=0.1), PolicyLossSpec(ratio="sequence")])
def test_columns_may_be_float64(spec):
    """Rewards and stored log-probabilities often are; the loss stays in the dtype of the statistics."""
    columns = {"behaviour_logp": torch.full((NUM_TOKENS,), -6.0), "ref_logp": torch.full((NUM_TOKENS,), -6.0)}
    columns |= {"sequence_ids": torch.arange(NUM_TOKENS) // 7}
    results = []
    for dtype in (torch.float32, torch.float64):
        case, wide = head_case(NUM_TOKENS, 50), {}
        wide = {name: x if name == "sequence_ids" else x.to(dtype) for name, x in columns.items()}
        out = linear_policy_loss(case.hidden, case.weight, case.ids, torch.ones(NUM_TOKENS, dtype=dtype), spec, **wide)
        out.loss_sum.backward()
        assert out.loss_sum.dtype == out.logp.dtype == torch.float32
        results.append((out.loss_sum.detach(), case.weight.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("logits", ["bf16", "fp32"])
@pytest.mark.parametrize("strategy", ["A", "B"])
def test_rows_may_lie_apart(strategy, logits, monkeypatch):
    """As on a GPU, where rows of a tile begin at multiples of 64 elements."""
    compare(policy(SPEC), torch.bfloat16, {"logits": logits}, strategy=strategy, chunk_tokens=16)
    monkeypatch.setattr("fastreason_kernels.gemm.row_width", lambda columns, device: columns + 19)
    compare(policy(SPEC), torch.bfloat16, {"logits": logits}, strategy=strategy, chunk_tokens=16)
    compare(logprob(), torch.bfloat16, {"logits": logits}, strategy="B", chunk_vocab=64)


def test_advantages_of_sequences():
    case = head_case(20, 50)
    sequence_ids = torch.arange(20) // 6
    per_sequence = torch.tensor([1.0, -2.0, 0.5, 3.0])
    for spec in (PolicyLossSpec(), PolicyLossSpec(ratio="sequence")):
        a, b = (
            linear_policy_loss(case.hidden, case.weight, case.ids, advantages, spec, sequence_ids=sequence_ids).loss_sum
            for advantages in (per_sequence, per_sequence[sequence_ids])
        )
        assert torch.equal(a, b) and float(a.detach()) != 0


def test_unrounded_logits_are_exact_where_rounded_ones_are_not():
    """Products of bf16 are exact in fp32 sums: only the rounding of logits to bf16 costs accuracy."""
    case = head_case(64, 1000, width=256, dtype=torch.bfloat16)
    wide = case.to(torch.float64)
    exact = linear_logprob(wide.hidden, wide.weight, wide.ids, impl="reference")[0]
    with torch.no_grad():
        error = {
            logits: float((linear_logprob(case.hidden, case.weight, case.ids, logits=logits)[0] - exact).abs().max())
            for logits in ("auto", "bf16", "fp32")
        }
    assert error["fp32"] < 2e-5 < 1e-3 < error["bf16"] == error["auto"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"logit_scale": -1.0}, "logit_scale: got -1.0"),
        ({"logits": "fp16"}, r"logits: got 'fp16', allowed: auto \| bf16 \| fp32"),
        ({"strategy": "C"}, "strategy: got 'C'"),
        ({"strategy": "A"}, r"strategy: got 'A', allowed: auto \| B \| F"),
        ({"strategy": "F"}, "strategy: got 'F', allowed: 'B'"),
        ({"chunk_vocab": 0}, "chunk_vocab: got 0"),
        ({"lora": LoraHead(torch.zeros(2, 5), torch.zeros(50, 2))}, "lora: shapes"),
        ({"lora": LoraHead(torch.zeros(2, 16), torch.zeros(50, 3))}, "lora: shapes"),
        ({"lora": LoraHead(torch.zeros(2, 16).double(), torch.zeros(50, 2))}, "dtypes"),
    ],
)
def test_wrong_options_are_named(changes, message):
    case = head_case(4, 50)
    with pytest.raises(ValueError, match=message):
        linear_logprob(case.hidden, case.weight, case.ids, **changes)


def test_strategy_a_refuses_coupled_tokens():
    case = head_case(4, 50)
    columns = {"behaviour_logp": torch.zeros(4), "sequence_ids": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match="strategy: got 'A', allowed: auto"):
        linear_policy_loss(
            case.hidden, case.weight, case.ids, torch.ones(4), PolicyLossSpec(ratio="sequence"), strategy="A", **columns
        )
