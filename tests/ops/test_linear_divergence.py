"""linear_divergence: exact and top-k divergences against float64, their digits, edge columns, and what may be allocated."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fastreason_kernels.linear_divergence.function import linear_divergence
from fastreason_kernels.linear_divergence.topk import DivergenceSpec, topk_divergence
from fastreason_kernels.lora import LoraHead
from fastreason_kernels.testing import HeadCase, Recorder, assert_no_worse, head_case

DIRECTIONS = ["reverse", "forward", "jsd"]
TAILS = ["bucket", "drop", "renormalise"]
BOTH = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Whatever is read before it is written shows as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def five_rows(monkeypatch):
    """Blocks of few rows of 301 columns: one buffer of ten, or four to six that share the bytes of two."""
    monkeypatch.setattr("fastreason_kernels.rows.CPU_BUFFER_BYTES", 10 * 301 * 4)
    monkeypatch.setattr("fastreason_kernels.gemm.CPU_BLOCK", 100)


def run(student: HeadCase, dtype, impl, *, teacher=None, known=None, bias=False, lora=False, **options):
    """divergence, loss_sum and the gradients of the student's tensors, all computed in `dtype`."""
    own = student.to(dtype)
    leaves = {"hidden": own.hidden, "weight": own.weight}
    sides = {}
    if teacher is not None:
        other = teacher.to(dtype)
        sides |= {"teacher_hidden": other.hidden, "teacher_weight": other.weight}
        sides |= {"teacher_bias": other.bias} if bias else {}
    else:
        sides |= {"teacher_topk_ids": known[0], "teacher_topk_logp": known[1]}
    if bias:
        leaves["bias"] = sides["bias"] = own.bias
    if lora:
        generator = torch.Generator().manual_seed(5)
        a, b = (torch.randn(*shape, generator=generator) for shape in ((3, own.hidden.shape[1]), (len(own.weight), 3)))
        leaves["lora_a"], leaves["lora_b"] = (x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (a, b))
        sides["lora"] = LoraHead(leaves["lora_a"], leaves["lora_b"], 0.3)
    out = linear_divergence(own.hidden, own.weight, **sides, impl=impl, **options)
    grads = torch.autograd.grad(out.loss_sum, list(leaves.values()))
    assert not out.divergence.requires_grad and not out.computed.requires_grad
    return out, {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def check(student: HeadCase, dtype, chunk_tokens=None, logits="auto", gradient_atol=None, **options):
    exact_out, exact = run(student, torch.float64, "reference", **options)
    eager_out, eager = run(student, dtype, "reference", **options)
    out, grads = run(student, dtype, "torch", chunk_tokens=chunk_tokens, logits=logits, **options)
    stat_dtype = torch.promote_types(dtype, torch.float32)
    assert out.loss_sum.dtype == out.divergence.dtype == stat_dtype and out.loss_sum.shape == ()
    assert torch.equal(out.computed, exact_out.computed)
    mask = exact_out.computed
    assert out.divergence[~mask].isnan().all()
    values = [x.divergence[mask] for x in (out, eager_out, exact_out)]
    assert values[2].isfinite().all() and (values[2].abs() > 1e-4).any()
    assert_no_worse("divergence", *values, dtype=dtype)
    assert_no_worse("loss_sum", *(x.loss_sum.detach() for x in (out, eager_out, exact_out)), dtype=dtype)
    for name, gradient in grads.items():
        assert gradient.dtype == dtype and exact[name].isfinite().all()
        assert_no_worse(name, gradient, eager[name], exact[name], dtype=dtype, atol=gradient_atol)


def teacher_case(num_tokens, vocab, dtype=torch.float32, **options) -> HeadCase:
    """A teacher of another width, unrelated to the student."""
    return head_case(num_tokens, vocab, width=24, dtype=dtype, seed=7, **options)


def known_case(num_tokens, vocab, k, dtype=torch.float32):
    """(ids, logp) of a teacher's top k, with an absent id, an absent logp, an empty row and one full row."""
    teacher = teacher_case(num_tokens, vocab).to(torch.float64)
    logp, ids = torch.log_softmax(teacher.hidden @ teacher.weight.T, -1).detach().topk(k)
    logp = logp.to(dtype)
    if num_tokens > 4 and k > 2:
        ids[1, 2], logp[2, 1], ids[3], ids[4, 0] = -1, -math.inf, -1, -1
        logp[1, 2] = math.nan
    return ids, logp


def token_options(case: HeadCase, seed=3):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = case.hidden.shape[0]
    weights, mask = torch.rand(num_tokens, generator=generator) + 0.2, torch.rand(num_tokens, generator=generator) > 0.2
    mask[0] = True
    return {"token_weight": weights, "mask": mask}


# One token; V smaller than a block; many chunks with a ragged last one; a chunk boundary; V far above a power of two.
SHAPES = [(1, 17, None), (7, 1000, 3), (7, 5003, 1), (130, 17, 64), (64, 1000, 64), (65, 1000, 64)]


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("num_tokens", "vocab", "chunk_tokens"), SHAPES)
def test_matches_float64(num_tokens, vocab, chunk_tokens, direction, dtype):
    case, teacher = (make(num_tokens, vocab, dtype=dtype) for make in (head_case, teacher_case))
    check(case, dtype, chunk_tokens, teacher=teacher, direction=direction, beta=0.3)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("num_tokens", "vocab", "k"), [(1, 17, 1), (33, 1000, 5)])
def test_top_k_matches_float64(num_tokens, vocab, k, direction, tail, dtype):
    case = head_case(num_tokens, vocab, dtype=dtype)
    known = known_case(num_tokens, vocab, k)
    if tail == "renormalise" and k == 1:
        known = known_case(num_tokens, vocab, 2)  # of one token alone nothing would be left
    check(case, dtype, 16, known=known, direction=direction, tail=tail, beta=0.3)


EVERYTHING = {"bias": True, "lora": True, "softcap": 6.0, "logit_scale": 0.7, "beta": 0.8}


@pytest.mark.parametrize("dtype", [*BOTH, torch.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_option_of_both_heads(direction, dtype, five_rows):
    case, teacher = (make(39, 301, dtype=dtype) for make in (head_case, teacher_case))
    options = {**EVERYTHING, **token_options(case), "teacher_softcap": 9.0, "teacher_logit_scale": 1.4}
    temperatures = {"temperature": case.temperature, "teacher_temperature": teacher.temperature.flip(0)}
    check(case, dtype, 16, teacher=teacher, direction=direction, **options, **temperatures)
    check(case, dtype, 16, "fp32", teacher=teacher, direction=direction, **options, temperature=0.6)


@pytest.mark.parametrize("dtype", [*BOTH, torch.float64])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_option_with_top_k(direction, tail, dtype, five_rows):
    case = head_case(39, 301, dtype=dtype)
    known = known_case(39, 301, 6, torch.promote_types(dtype, torch.float32))
    options = {**EVERYTHING, **token_options(case), "temperature": case.temperature}
    check(case, dtype, 16, known=known, direction=direction, tail=tail, **options)


def test_unrounded_logits_are_better_than_rounded():
    """bf16 heads with logits="fp32" against the float64 truth: the error of a rounded logit is gone."""
    case, teacher = (make(40, 1000, dtype=torch.bfloat16) for make in (head_case, teacher_case))
    exact, _ = run(case, torch.float64, "reference", teacher=teacher)
    errors = {}
    for logits in ("bf16", "fp32"):
        out, _ = run(case, torch.bfloat16, "torch", teacher=teacher, logits=logits)
        errors[logits] = float((out.divergence - exact.divergence).abs().max())
    assert errors["fp32"] < 1e-5 < 1e-3 < errors["bf16"]


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_shifted_down(direction, dtype):
    case, teacher = (make(33, 1000, dtype=dtype, shift=-40.0) for make in (head_case, teacher_case))
    check(case, dtype, 8, bias=True, teacher=teacher, direction=direction)
    check(case, dtype, 8, bias=True, known=known_case(33, 1000, 4), direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_far_apart(direction):
    """Log-ratios of several hundred: the exponential of one would overflow."""
    case, teacher = head_case(30, 200), teacher_case(30, 200)
    exact, _ = run(case, torch.float64, "reference", teacher=teacher, temperature=0.02)
    assert direction == "jsd" or float(exact.divergence.max()) > 200
    # The mixture's gradient is 0 to all digits where p is 1 somewhere; then one rounding, divided by 0.02, is what is left.
    atol = 2e-5 if direction == "jsd" else None
    check(case, torch.float32, 8, teacher=teacher, direction=direction, temperature=0.02, gradient_atol=atol)
    for sides in ({"temperature": 0.02}, {"teacher_temperature": 0.02}):
        check(case, torch.float32, 8, teacher=teacher, direction=direction, gradient_atol=atol, **sides)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_small_divergences_keep_their_digits(direction):
    """About 2e-7 nats: five digits here, none in the textbook sum. The error of the logits is left out by fp32 operands of
    few bits, whose products are exact."""
    case = head_case(64, 5003)
    with torch.no_grad():
        case.hidden.mul_(64).round_().div_(64)
        case.weight.mul_(256).round_().div_(256)
        teacher = case.to(torch.float32)
        steps = torch.randint(-1, 2, case.hidden.shape, generator=torch.Generator().manual_seed(1))
        teacher.hidden.add_(steps / 2048)
    exact, exact_grads = run(case, torch.float64, "reference", teacher=teacher, direction=direction)
    book, _ = run(case, torch.float32, "reference", teacher=teacher, direction=direction)
    out, grads = run(case, torch.float32, "torch", teacher=teacher, direction=direction, chunk_tokens=40)
    assert 5e-8 < float(exact.divergence.mean()) < 6e-7

    def relative(x):
        return ((x.divergence - exact.divergence).abs() / exact.divergence).max()

    assert relative(book) > 0.3
    assert relative(out) < (2e-4 if direction == "jsd" else 1e-4)
    for name, gradient in grads.items():
        torch.testing.assert_close(
            gradient.double(), exact_grads[name], rtol=0, atol=2e-4 * float(exact_grads[name].abs().max())
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [*BOTH, torch.float64])
def test_equal_heads_have_no_divergence(dtype, direction):
    """Exactly 0, and the teacher may be the student's own tensors: nothing flows into it."""
    case = head_case(33, 1000, dtype=dtype)
    out = linear_divergence(case.hidden, case.weight, case.hidden, case.weight, direction=direction, chunk_tokens=8)
    assert out.divergence.tolist() == [0.0] * 33 and float(out.loss_sum.detach()) == 0.0
    for gradient in torch.autograd.grad(out.loss_sum, (case.hidden, case.weight)):
        assert float(gradient.abs().max()) < (1e-6 if dtype != torch.float64 else 1e-14)


def test_shared_weight_has_the_students_gradient_only():
    case, teacher = head_case(12, 50), head_case(12, 50, seed=4)
    out = linear_divergence(case.hidden, case.weight, teacher.hidden, case.weight)
    shared = torch.autograd.grad(out.loss_sum, (case.weight, teacher.hidden), allow_unused=True)
    apart = linear_divergence(case.hidden, case.weight, teacher.hidden, case.weight.detach().clone())
    assert torch.equal(shared[0], torch.autograd.grad(apart.loss_sum, case.weight)[0])
    assert shared[1] is None and float(shared[0].abs().max()) > 0.1


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_removed_columns(direction, dtype):
    """Biases of -inf: on both sides, and on the side where the divergence stays finite."""
    case, teacher = (make(20, 130, dtype=dtype) for make in (head_case, teacher_case))
    with torch.no_grad():
        for side in (case, teacher):
            side.bias[[3, 64, 129]] = -math.inf
    check(case, dtype, 8, teacher=teacher, bias=True, direction=direction, softcap=7.0, teacher_softcap=7.0)
    with torch.no_grad():
        if direction != "forward":
            case.bias[100:110] = -math.inf
        if direction != "reverse":
            teacher.bias[20:30] = -math.inf
    check(case, dtype, 8, teacher=teacher, bias=True, direction=direction)


def test_mass_where_the_other_has_none_is_infinite():
    case, teacher = head_case(5, 30), teacher_case(5, 30)
    with torch.no_grad():
        teacher.bias[4] = -math.inf
    out, grads = run(case, torch.float32, "torch", teacher=teacher, bias=True)
    assert out.divergence.tolist() == [math.inf] * 5 and grads["d_hidden"].isnan().any()
    out, _ = run(teacher, torch.float32, "torch", teacher=case, bias=True, direction="forward")
    assert out.divergence.tolist() == [math.inf] * 5


P, Q = [1 / 8, 2 / 8, 5 / 8], [2 / 8, 2 / 8, 4 / 8]


def by_hand(**options) -> tuple[float, list[float]]:
    """(divergence, gradient of the logits) of p against q, three tokens, by every implementation."""
    results = []
    for impl in ("reference", "torch"):
        hidden, weight = torch.ones(1, 1), torch.tensor(P).log()[:, None].requires_grad_()
        if "teacher_topk_ids" not in options:
            options |= {"teacher_hidden": torch.ones(1, 1), "teacher_weight": torch.tensor(Q).log()[:, None]}
        out = linear_divergence(hidden, weight, impl=impl, **options)
        assert float(out.loss_sum.detach()) == float(out.divergence)
        results.append((float(out.divergence), torch.autograd.grad(out.loss_sum, weight)[0].squeeze(1).tolist()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)
    return results[1]


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def test_exact_divergences_by_hand():
    value, gradient = by_hand(direction="reverse")
    assert value == pytest.approx(math.log(1 / 2) / 8 + 5 / 8 * math.log(5 / 4), rel=1e-5)
    assert gradient == pytest.approx([p * (math.log(p / q) - value) for p, q in zip(P, Q, strict=True)], abs=1e-6)
    value, gradient = by_hand(direction="forward")
    assert value == pytest.approx(math.log(2) / 4 + math.log(4 / 5) / 2, rel=1e-5)
    assert gradient == pytest.approx([-1 / 8, 0, 1 / 8], abs=1e-6)
    # m = q / 4 + 3 p / 4 = (5, 8, 19) / 32.
    value, gradient = by_hand(direction="jsd", beta=0.25)
    m = [5 / 32, 8 / 32, 19 / 32]
    assert value == pytest.approx(kl(Q, m) / 4 + 3 * kl(P, m) / 4, rel=1e-5)
    assert gradient == pytest.approx(
        [0.75 * p * (math.log(p / x) - kl(P, m)) for p, x in zip(P, m, strict=True)], abs=1e-6
    )


def test_top_k_by_hand():
    """The teacher names token 2 (4/8), and in the second half token 0 (2/8) too; what it does not name is the rest."""
    one = {"teacher_topk_ids": torch.tensor([[2]]), "teacher_topk_logp": torch.tensor([[4 / 8]]).log()}
    assert by_hand(tail="bucket", **one)[0] == pytest.approx(kl([5 / 8, 3 / 8], [4 / 8, 4 / 8]), rel=1e-5)
    assert by_hand(tail="bucket", direction="forward", **one)[0] == pytest.approx(
        kl([0.5, 0.5], [*P[2:], 3 / 8]), rel=1e-5
    )
    # z_2 has p - q of the bucket; the others share the rest in proportion to p.
    assert by_hand(tail="bucket", direction="forward", **one)[1] == pytest.approx([-1 / 24, -2 / 24, 1 / 8], abs=1e-6)
    assert by_hand(tail="drop", **one)[0] == pytest.approx(5 / 8 * math.log(5 / 4), rel=1e-5)
    assert by_hand(tail="drop", direction="forward", **one)[0] == pytest.approx(math.log(4 / 5) / 2, rel=1e-5)
    # d/dz of -(1/2) log p_2.
    assert by_hand(tail="drop", direction="forward", **one)[1] == pytest.approx([1 / 16, 2 / 16, -3 / 16], abs=1e-6)
    assert by_hand(tail="renormalise", **one) == (0.0, [0.0, 0.0, 0.0])
    two = {
        "teacher_topk_ids": torch.tensor([[2, -1, 0]]),
        "teacher_topk_logp": torch.tensor([[4 / 8, 1.0, 2 / 8]]).log(),
    }
    value, gradient = by_hand(tail="renormalise", **two)
    assert value == pytest.approx(kl([5 / 6, 1 / 6], [4 / 6, 2 / 6]), rel=1e-5)
    assert gradient[1] == pytest.approx(0, abs=1e-7) and gradient[2] == pytest.approx(-gradient[0], rel=1e-4)
    assert by_hand(tail="drop", **two)[0] == pytest.approx(kl([5 / 8, 1 / 8], [4 / 8, 2 / 8]), rel=1e-5)
    m = [7 / 12, 2 / 12, 3 / 12]  # (2 p + q) / 3 of (5, 1, 2) / 8 and (4, 2, 2) / 8
    jsd = kl([4 / 8, 2 / 8, 2 / 8], m) / 3 + 2 * kl([5 / 8, 1 / 8, 2 / 8], m) / 3
    assert by_hand(tail="bucket", direction="jsd", beta=1 / 3, **two)[0] == pytest.approx(jsd, rel=1e-5)


def test_reference_is_kl_div():
    case, teacher = (make(9, 40, dtype=torch.float64) for make in (head_case, teacher_case))
    log_p, log_q = (torch.log_softmax((x.hidden @ x.weight.T).detach(), -1) for x in (case, teacher))
    log_m = (0.3 * log_q.exp() + 0.7 * log_p.exp()).log()

    def divergence(log_other, log_base):
        return F.kl_div(log_other, log_base, reduction="none", log_target=True).sum(-1)

    expected = {
        "reverse": divergence(log_q, log_p),
        "forward": divergence(log_p, log_q),
        "jsd": 0.3 * divergence(log_m, log_q) + 0.7 * divergence(log_m, log_p),
    }
    for direction, value in expected.items():
        out, _ = run(case, torch.float64, "reference", teacher=teacher, direction=direction, beta=0.3)
        torch.testing.assert_close(out.divergence, value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_top_k_of_the_whole_vocabulary_is_exact(direction, tail):
    case, teacher = head_case(20, 37), teacher_case(20, 37)
    logp = torch.log_softmax(teacher.hidden @ teacher.weight.T, -1).detach()
    ids = torch.rand(20, 37, generator=torch.Generator().manual_seed(0)).argsort(-1)
    out, grads = run(case, torch.float32, "torch", known=(ids, logp.gather(1, ids)), direction=direction, tail=tail)
    exact, exact_grads = run(case, torch.float32, "torch", teacher=teacher, direction=direction)
    torch.testing.assert_close(out.divergence, exact.divergence, rtol=2e-6, atol=2e-6)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, exact_grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gap", [14.0, 40.0, 200.0])
def test_rest_of_a_confident_student(gap, direction):
    """A student whose rest has e^-gap: 1 - sum p is 0 in fp32, its logarithm and gradient are not."""
    hidden, ids = torch.ones(1, 1), torch.tensor([[0]])
    logp = torch.tensor([[0.9]]).log()

    def values(dtype):
        weight = torch.tensor([[gap], [0.0], [0.5], [-1.0]], dtype=dtype, requires_grad=True)
        out = linear_divergence(
            hidden.to(dtype), weight, teacher_topk_ids=ids, teacher_topk_logp=logp, direction=direction
        )
        return out.divergence, torch.autograd.grad(out.loss_sum, weight)[0]

    # In float64 1 - sum p is no better at 200; the log-probability of the rest is known in closed form.
    rest = (
        math.log(1 + math.exp(0.5) + math.exp(-1))
        - gap
        - math.log1p((1 + math.exp(0.5) + math.exp(-1)) * math.exp(-gap))
    )
    q, p_rest = float(logp.double().exp()), math.exp(rest)
    if direction == "forward":
        expected = q * (math.log(q) - math.log1p(-p_rest)) + (1 - q) * (math.log(1 - q) - rest)
    elif direction == "reverse":
        expected = (1 - p_rest) * (math.log1p(-p_rest) - math.log(q)) + p_rest * (rest - math.log(1 - q))
    else:
        m = (q + 1 - p_rest) / 2
        expected = (kl([q, 1 - q], [m, 1 - m]) + (1 - p_rest) * math.log((1 - p_rest) / m)) / 2
        expected += p_rest / 2 * (rest - math.log(1 - m))
    wide, wide_gradient = values(torch.float64)
    narrow, gradient = values(torch.float32)
    assert float(wide) == pytest.approx(expected, rel=1e-9) and float(narrow) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient.double(), wide_gradient, rtol=1e-4, atol=1e-8)
    if direction == "forward":
        assert float(wide_gradient[0]) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_top_k_derivatives_are_those_of_its_value(direction, tail):
    generator = torch.Generator().manual_seed(0)
    logp, other = (torch.log_softmax(torch.randn(6, 9, generator=generator).double(), -1) for _ in range(2))
    present = torch.rand(6, 5, generator=generator) > 0.2
    present[0], present[1] = False, True
    spec = DivergenceSpec(direction, 0.3, tail)
    leaves = (logp[:, :5].clone().requires_grad_(), logp[:, 5:].logsumexp(-1).requires_grad_())
    value, *slopes = topk_divergence(*leaves, other[:, :5], present, spec, 9)
    expected = torch.autograd.grad(value.sum() + 0 * (leaves[0].sum() + leaves[1].sum()), leaves)
    for slope, by_autograd in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, by_autograd)
    assert (slopes[0].abs() > 0.01).any() and (tail != "bucket" or (slopes[1].abs() > 0.01).any())


@pytest.mark.parametrize("wider", ["student", "teacher"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padded_vocabulary(wider, direction):
    """The columns that only one side has, however likely, count nothing and have no gradient."""
    case, teacher = head_case(12, 60), teacher_case(12, 60)
    tall = case if wider == "student" else teacher
    with torch.no_grad():
        tall.bias[50:] = 30.0
    cut = [
        HeadCase(x.hidden, x.weight[:50], x.bias[:50], x.ids, x.temperature).to(torch.float32) for x in (case, teacher)
    ]
    options = {"bias": True, "direction": direction, "chunk_tokens": 5}
    expected, expected_grads = run(cut[0], torch.float32, "torch", teacher=cut[1], **options)
    sides = (case, cut[1]) if wider == "student" else (cut[0], teacher)
    for lora in (False, True):
        out, grads = run(sides[0], torch.float32, "torch", teacher=sides[1], lora=lora, **options)
        if lora:
            assert wider == "teacher" or not grads["d_lora_b"][50:].any()
            continue
        assert torch.equal(out.divergence, expected.divergence)
        for name, gradient in grads.items():
            assert torch.equal(gradient[: len(expected_grads[name])], expected_grads[name])
            assert not gradient[len(expected_grads[name]) :].any()
    check(*sides[:1], torch.float32, 5, teacher=sides[1], bias=True, lora=True, direction=direction)


def sources(num_tokens, vocab):
    return [{"teacher": teacher_case(num_tokens, vocab)}, {"known": known_case(num_tokens, vocab, 3)}]


@pytest.mark.parametrize("source", [0, 1])
def test_masked_and_weightless_tokens_are_skipped_whatever_they_hold(source):
    case, teacher = head_case(30, 50), sources(30, 50)[source]
    options = token_options(case)
    options["token_weight"][7], options["mask"][7] = 0.0, True
    active = options["mask"] & (options["token_weight"] != 0)
    with Recorder() as recorder:
        expected, grads = run(case, torch.float32, "torch", **teacher, **options)
    count = int(active.sum())
    rows = [left[0] for left, _ in recorder.products]
    assert 0 < count < 30 and rows == ([count, count, count, 50] if source == 0 else [count, count, 50])
    assert torch.equal(expected.computed, active) and torch.equal(expected.divergence.isnan(), ~active)
    with torch.no_grad():
        case.hidden[~active] = math.nan
        if source == 0:
            teacher["teacher"].hidden[~active] = math.nan
        else:
            teacher["known"][0][~active] = 1000
    options["token_weight"][~options["mask"]] = math.nan
    out, junk_grads = run(case, torch.float32, "torch", **teacher, **options)
    assert torch.equal(out.loss_sum, expected.loss_sum) and torch.equal(out.computed, active)
    for name, gradient in grads.items():
        assert torch.equal(junk_grads[name], gradient), name


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_empty_mask_is_a_connected_zero(impl, source):
    case, mask = head_case(6, 20), torch.zeros(6, dtype=torch.bool)
    out, grads = run(case, torch.float32, impl, bias=True, mask=mask, **sources(6, 20)[source])
    assert float(out.loss_sum.detach()) == 0.0 and not any(bool(gradient.any()) for gradient in grads.values())
    assert not out.computed.any() and out.divergence.isnan().all()


@pytest.mark.parametrize("source", [0, 1])
def test_never_holds_whole_logits(source, monkeypatch):
    case, teacher = head_case(300, 500), sources(300, 500)[source]
    with Recorder() as recorder:
        run(case, torch.float32, "torch", **teacher, chunk_tokens=30)
    assert recorder.largest == 30 * 500
    # Both sides share the budget of one chunk.
    monkeypatch.setattr("fastreason_kernels.gemm.CPU_ROW_BYTES", 100 * 500 * 4)
    with Recorder() as recorder:
        run(case, torch.float32, "torch", **teacher)
    assert recorder.largest == (50 if source == 0 else 100) * 500


@pytest.mark.parametrize("source", [0, 1])
def test_what_is_frozen_costs_no_product(source):
    teacher = sources(20, 50)[source]
    for frozen, products in (("hidden", 3), ("weight", 3), ("both", 2)):
        case = head_case(20, 50)
        for name in ("hidden", "weight") if frozen == "both" else (frozen,):
            getattr(case, name).requires_grad_(False)
        sides = {}
        if source == 0:
            sides = {"teacher_hidden": teacher["teacher"].hidden, "teacher_weight": teacher["teacher"].weight}
        else:
            sides = dict(zip(("teacher_topk_ids", "teacher_topk_logp"), teacher["known"], strict=True))
        with Recorder() as recorder:
            loss = linear_divergence(case.hidden, case.weight, **sides).loss_sum
            loss.backward() if loss.requires_grad else None
        assert len(recorder.products) == products - source and loss.requires_grad == (frozen != "both")
        assert source == 1 or teacher["teacher"].weight.grad is None


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck_in_float64(direction):
    case, teacher = (make(5, 7, dtype=torch.float64) for make in (head_case, teacher_case))
    lora = (
        torch.randn(2, 16, dtype=torch.float64).requires_grad_(),
        torch.randn(7, 2, dtype=torch.float64).requires_grad_(),
    )
    ids, logp = known_case(5, 7, 3, torch.float64)
    weights = token_options(case)["token_weight"].double()

    def function(hidden, weight, bias, a, b):
        head = {"bias": bias, "lora": LoraHead(a, b, 0.5), "softcap": 4.0, "logit_scale": 0.6, "chunk_tokens": 2}
        options = {"temperature": case.temperature, "direction": direction, "beta": 0.3, "token_weight": weights}
        known = {"teacher_topk_ids": ids, "teacher_topk_logp": logp}
        sums = [linear_divergence(hidden, weight, teacher.hidden, teacher.weight, **head, **options).loss_sum]
        sums += [linear_divergence(hidden, weight, **known, tail=tail, **head, **options).loss_sum for tail in TAILS]
        return tuple(sums)

    assert torch.autograd.gradcheck(function, (case.hidden, case.weight, case.bias, *lora), fast_mode=True)


def test_incoming_gradient_scales_and_can_come_twice():
    case, teacher = head_case(20, 50), teacher_case(20, 50)
    loss = linear_divergence(case.hidden, case.weight, teacher.hidden, teacher.weight).loss_sum
    leaves = (case.hidden, case.weight)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(loss * 3, leaves)
    for first, scaled in zip(once, thrice, strict=True):
        torch.testing.assert_close(scaled, first * 3)


@pytest.mark.parametrize("source", [0, 1])
def test_autocast_is_the_explicit_cast(source):
    case, teacher = head_case(20, 50), sources(20, 50)[source]
    options = {**teacher, "bias": True, "direction": "jsd", "chunk_tokens": 7}
    expected, twin = run(case, torch.bfloat16, "auto", **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = run(case, torch.float32, "auto", **options)
    assert torch.equal(out.loss_sum, expected.loss_sum)
    for name, gradient in grads.items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, twin[name].float()), name


def test_teacher_of_another_dtype():
    case, teacher = head_case(20, 50), teacher_case(20, 50, dtype=torch.bfloat16)
    wide = teacher.to(torch.float32)
    out = linear_divergence(case.hidden, case.weight, teacher.hidden, teacher.weight, logits="fp32")
    expected = linear_divergence(case.hidden, case.weight, wide.hidden, wide.weight)
    torch.testing.assert_close(out.divergence, expected.divergence, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", [0, 1])
def test_compiles_in_one_graph(source):
    case, teacher = head_case(9, 20), sources(9, 20)[source]

    def loss(hidden, weight):
        sides = {}
        if source == 0:
            sides = {"teacher_hidden": teacher["teacher"].hidden, "teacher_weight": teacher["teacher"].weight}
        else:
            sides = dict(zip(("teacher_topk_ids", "teacher_topk_logp"), teacher["known"], strict=True))
        return linear_divergence(hidden * 2, weight, **sides, direction="forward").loss_sum

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = (case.hidden, case.weight)
    for actual, expected in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        assert float(expected.abs().max()) > 0.01
        torch.testing.assert_close(actual, expected)


def test_wrong_input_is_named():
    case, teacher = head_case(4, 10), teacher_case(4, 10)
    own, other = (case.hidden, case.weight), (teacher.hidden, teacher.weight)
    ids, logp = torch.tensor([[1, 2]] * 4), torch.full((4, 2), -2.0)
    known = {"teacher_topk_ids": ids, "teacher_topk_logp": logp}
    wrong = [
        (other, {"direction": "up"}, r"direction: got 'up', allowed: reverse \| forward \| jsd"),
        (other, {"tail": "cut"}, r"tail: got 'cut', allowed: bucket"),
        (other, {"direction": "jsd", "beta": 1.0}, "beta: got 1.0, allowed: 0 < beta < 1"),
        (other, {"impl": "numpy"}, "impl: got 'numpy'"),
        (other, known, "teacher: got .*pass one pair"),
        ((), {}, r"teacher: got \[\]"),
        (other[:1], {}, r"teacher: got \['teacher_hidden'\]"),
        ((), {"teacher_topk_ids": ids}, r"teacher: got \['teacher_topk_ids'\]"),
        ((), {**known, "teacher_temperature": 0.5}, "teacher_temperature.*final log-probabilities"),
        ((), {**known, "teacher_logit_scale": 2.0}, "teacher_logit_scale: given"),
        ((teacher.hidden[:3], teacher.weight), {}, "teacher_hidden: 3 tokens, allowed: N = 4"),
        ((case.hidden, teacher.weight), {}, "teacher's hidden, weight: shapes"),
        (other, {"teacher_temperature": -1.0}, "teacher's temperature: got -1.0"),
        (other, {"mask": torch.ones(4)}, "mask: dtype torch.float32, allowed: a bool"),
        (other, {"token_weight": torch.ones(5)}, r"token_weight: shape \(5,\), allowed: \[N\] = \[4\]"),
        ((), {**known, "teacher_topk_ids": ids.int()}, "teacher_topk_ids: .*int32"),
        ((), {**known, "teacher_topk_logp": logp[:, :1]}, r"teacher_topk_logp: \(4, 1\)"),
        ((), {**known, "teacher_topk_ids": ids * 5}, "teacher_topk_ids: values 5 to 10, allowed: 0 to 9"),
        ((), {**known, "teacher_topk_ids": ids - 3}, "teacher_topk_ids: values -2 to"),
        ((), {**known, "teacher_topk_ids": ids * 0 + 6}, "teacher_topk_ids: token 6 twice"),
        ((), {**known, "teacher_topk_logp": logp + 3}, "teacher_topk_logp: a row sums to a probability of 5"),
    ]
    for teacher_head, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            linear_divergence(*own, *teacher_head, **options)
    linear_divergence(*own, **{**known, "teacher_topk_logp": logp + 3}, tail="renormalise")
    linear_divergence(*own, **{**known, "teacher_topk_ids": ids * 0 - 1})
    with pytest.raises(NotImplementedError, match="triton"):
        linear_divergence(*own, *other, impl="triton")


INTERPRETED = """
import torch
from fastreason_kernels.linear_divergence.function import linear_divergence
from fastreason_kernels.testing import assert_no_worse, head_case

dtype, logits = getattr(torch, {dtype!r}), {logits!r}
student, teacher = head_case(9, 301, dtype=dtype), head_case(9, 301, width=24, seed=7, dtype=dtype)
logp, ids = torch.log_softmax(teacher.hidden.double() @ teacher.weight.double().T, -1).detach().float().topk(5)
ids[1, 2], ids[3], logp[2, 1] = -1, -1, -torch.inf


def run(dtype, impl, known, **options):
    own, other = student.to(dtype), teacher.to(dtype)
    if known:
        options |= {{"teacher_topk_ids": ids, "teacher_topk_logp": logp}}
    else:
        options |= {{"teacher_hidden": other.hidden, "teacher_weight": other.weight, "teacher_softcap": 4.0}}
    options |= {{"softcap": 5.0, "logit_scale": 0.7, "temperature": own.temperature, "beta": 0.3, "impl": impl}}
    out = linear_divergence(own.hidden, own.weight, token_weight=torch.arange(9.0), chunk_tokens=5, **options)
    return out.divergence[1:], *torch.autograd.grad(out.loss_sum, (own.hidden, own.weight))


for direction, known in (("reverse", False), ("forward", False), ("jsd", False), ("forward", True), ("jsd", True)):
    wide, eager = (run(x, "reference", known, direction=direction) for x in (torch.float64, dtype))
    made = run(dtype, "triton", known, direction=direction, logits=logits)
    for name, kernel, plain, exact in zip(("divergence", "d_hidden", "d_weight"), made, eager, wide):
        assert_no_worse(direction + " " + name, kernel, plain, exact, dtype=dtype)
print("all right")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"
)
@pytest.mark.parametrize(("dtype", "logits"), [("float32", "auto"), ("bfloat16", "fp32")])
def test_triton_rows_in_the_interpreter(dtype, logits):
    """In a process of its own, since Triton decides at import whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = INTERPRETED.format(dtype=dtype, logits=logits)
    done = subprocess.run([sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("all right\n"), done.stderr
