"""linear_logprob: values and every gradient against float64, and what it may compute and allocate."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastreason_kernels import linear_logprob
from fastreason_kernels.gemm import CPU_ROW_BYTES, even_split
from fastreason_kernels.linear_logprob.reference import linear_logprob_reference
from fastreason_kernels.testing import HeadCase, Recorder, assert_no_worse, head_case

DTYPES = [torch.float32, torch.bfloat16]
# One token; fewer than a chunk; many chunks with a ragged last one; V below, near and far above a power of two.
SHAPES = [(1, 17, None), (7, 1000, 3), (7, 5003, 1), (257, 17, 64), (257, 1000, 100), (64, 1000, 64), (65, 1000, 64)]


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Whatever is read before it is written shows as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def run(function, case: HeadCase, g_logp, g_entropy, *, bias, temperature):
    """logp, entropy, lse and the gradients of sum(g_logp * logp + g_entropy * entropy)."""
    leaves = (case.hidden, case.weight, case.bias) if bias else (case.hidden, case.weight)
    logp, entropy, lse = function(
        case.hidden, case.weight, case.ids, bias=case.bias if bias else None, temperature=temperature
    )
    grads = torch.autograd.grad((g_logp * logp + g_entropy * entropy).sum(), leaves)
    names = ("logp", "entropy", "lse", "d_hidden", "d_weight", "d_bias")
    return dict(zip(names, (logp, entropy, lse, *grads), strict=False))


def check(case: HeadCase, dtype, chunk_tokens, *, bias=False, temperature=1.0, entropy_gradient=True):
    num_tokens = case.ids.shape[0]
    generator = torch.Generator().manual_seed(1)
    g_logp = torch.randn(num_tokens, generator=generator)
    g_entropy = torch.randn(num_tokens, generator=generator) if entropy_gradient else torch.zeros(num_tokens)

    def kernel(*args, **kwargs):
        return linear_logprob(*args, **kwargs, impl="torch", chunk_tokens=chunk_tokens)

    options = {"bias": bias, "temperature": temperature}
    exact = run(linear_logprob_reference, case.to(torch.float64), g_logp, g_entropy, **options)
    eager = run(linear_logprob_reference, case.to(dtype), g_logp, g_entropy, **options)
    actual = run(kernel, case.to(dtype), g_logp, g_entropy, **options)
    for name, value in actual.items():
        assert value.dtype == (dtype if name.startswith("d_") else torch.float32), name
        assert_no_worse(name, value, eager[name], exact[name], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "vocab", "chunk_tokens"), SHAPES)
def test_matches_float64(num_tokens, vocab, chunk_tokens, dtype):
    check(head_case(num_tokens, vocab, dtype=dtype), dtype, chunk_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_bias_temperature_and_row_blocks(dtype, entropy_gradient, monkeypatch):
    # Five rows a block, so that a chunk of 16 has four blocks, the last of one row.
    monkeypatch.setattr("fastreason_kernels.rows.CPU_BUFFER_BYTES", 5 * 301 * 4)
    monkeypatch.setattr("fastreason_kernels.gemm.CPU_BLOCK", 100)
    case = head_case(39, 301, dtype=dtype)
    check(case, dtype, 16, bias=True, temperature=case.temperature, entropy_gradient=entropy_gradient)
    check(case, dtype, 16, bias=True, temperature=0.6, entropy_gradient=entropy_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_shifted_down(dtype):
    check(head_case(33, 1000, dtype=dtype, shift=-40.0), dtype, 8, bias=True)


def test_reference_by_hand():
    """Logits (0, log 2, log 5) at temperature 1: p = (1, 2, 5) / 8."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    expected = [math.log(2 / 8), -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)), math.log(8)]
    for function in (linear_logprob_reference, linear_logprob):
        assert [float(x) for x in function(hidden, weight, torch.tensor([1]))] == pytest.approx(expected, rel=1e-6)
    # At temperature 2 the probabilities are proportional to the square roots.
    logp, _, _ = linear_logprob(hidden, weight, torch.tensor([2]), temperature=2.0)
    assert float(logp) == pytest.approx(math.log(5**0.5 / (1 + 2**0.5 + 5**0.5)), rel=1e-6)


def test_gradcheck_in_float64():
    case = head_case(5, 7, width=3, dtype=torch.float64)

    def function(hidden, weight, bias):
        return linear_logprob(hidden, weight, case.ids, bias=bias, temperature=case.temperature, chunk_tokens=2)[:2]

    assert torch.autograd.gradcheck(function, (case.hidden, case.weight, case.bias))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_part_costs_no_product(frozen):
    case = head_case(20, 50)
    getattr(case, frozen).requires_grad_(False)
    with Recorder() as recorder:
        logp, _, _ = linear_logprob(case.hidden, case.weight, case.ids)
        logp.sum().backward()
    d_hidden, d_weight = ((20, 50), (50, 16)), ((50, 20), (20, 16))
    assert (d_hidden in recorder.products) == (frozen == "weight")
    assert (d_weight in recorder.products) == (frozen == "hidden")
    assert getattr(case, frozen).grad is None
    trained = "weight" if frozen == "hidden" else "hidden"
    whole = case.to(torch.float32)
    linear_logprob(whole.hidden, whole.weight, whole.ids)[0].sum().backward()
    assert torch.equal(getattr(case, trained).grad, getattr(whole, trained).grad)


def test_never_holds_whole_logits():
    num_tokens, vocab, chunk = 300, 500, 30
    case = head_case(num_tokens, vocab)
    with Recorder() as recorder:
        logp, entropy, _ = linear_logprob(case.hidden, case.weight, case.ids, chunk_tokens=chunk)
        (logp + entropy).sum().backward()
    assert recorder.largest == chunk * vocab
    with Recorder() as recorder:
        linear_logprob(case.hidden, case.weight, case.ids, impl="reference")
    assert recorder.largest == num_tokens * vocab


def test_backward_recomputes_only_rows_with_a_gradient():
    case = head_case(40, 50)
    logp, entropy, _ = linear_logprob(case.hidden, case.weight, case.ids)
    keep = torch.zeros(40)
    keep[[3, 4, 17]] = 1
    with Recorder() as recorder:
        (logp * keep + entropy * keep.roll(1)).sum().backward()
    # Rows 3, 4, 17 by logp and 4, 5, 18 by entropy: five in all.
    assert recorder.products == [((5, 16), (16, 50)), ((5, 50), (50, 16)), ((50, 5), (5, 16))]
    rows = case.hidden.grad.abs().sum(1).nonzero().squeeze(1).tolist()
    assert rows == [3, 4, 5, 17, 18]


def test_tied_weight():
    """The table that makes the hidden states is the head: both paths must reach its gradient."""
    case = head_case(12, 30)
    tokens = torch.arange(12)
    table, twin = case.weight, case.to(torch.float64).weight
    linear_logprob(F.embedding(tokens, table) * 2, table, case.ids, chunk_tokens=5)[0].sum().backward()
    linear_logprob_reference(F.embedding(tokens, twin) * 2, twin, case.ids)[0].sum().backward()
    torch.testing.assert_close(table.grad.double(), twin.grad, rtol=1e-5, atol=1e-5)


def test_column_removed_by_bias():
    case = head_case(6, 20)
    bias = torch.zeros(20)
    bias[13:] = -math.inf
    ids = case.ids % 13
    logp, entropy, lse = linear_logprob(case.hidden, case.weight, ids, bias=bias)
    (logp + entropy).sum().backward()
    small = case.to(torch.float32)
    expected = linear_logprob(small.hidden, small.weight[:13], ids)
    (expected[0] + expected[1]).sum().backward()
    torch.testing.assert_close((logp, entropy, lse), expected)
    torch.testing.assert_close(case.hidden.grad, small.hidden.grad)
    torch.testing.assert_close(case.weight.grad, small.weight.grad)


def test_autocast_is_the_explicit_cast():
    case = head_case(9, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, entropy, _ = linear_logprob(case.hidden, case.weight, case.ids, bias=case.bias, chunk_tokens=4)
        (logp + entropy).sum().backward()
    twin = case.to(torch.bfloat16)
    expected = linear_logprob(twin.hidden, twin.weight, twin.ids, bias=twin.bias, chunk_tokens=4)
    (expected[0] + expected[1]).sum().backward()
    assert torch.equal(logp, expected[0]) and torch.equal(entropy, expected[1])
    for name in ("hidden", "weight", "bias"):
        gradient = getattr(case, name).grad
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, getattr(twin, name).grad.float()), name


def test_results_that_carry_no_graph():
    case = head_case(4, 10)
    logp, _, lse = linear_logprob(case.hidden, case.weight, case.ids)
    assert logp.requires_grad and not lse.requires_grad
    with torch.no_grad():
        assert not linear_logprob(case.hidden, case.weight, case.ids)[0].requires_grad


def test_no_tokens_give_a_connected_zero():
    case = head_case(0, 10)
    logp, entropy, _ = linear_logprob(case.hidden, case.weight, case.ids)
    (logp.sum() + entropy.sum()).backward()
    assert case.hidden.grad.shape == (0, 16) and not case.weight.grad.any()


def test_strided_hidden():
    case = head_case(8, 20)
    strided = case.hidden.detach().T.contiguous().T.requires_grad_()
    first = linear_logprob(strided, case.weight, case.ids)[0]
    torch.testing.assert_close(first, linear_logprob(case.hidden, case.weight, case.ids)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 2, 16)}, "hidden, weight: shapes"),
        ({"weight": torch.zeros(10, 15)}, "hidden, weight: shapes"),
        ({"weight": torch.zeros(10, 16, dtype=torch.bfloat16)}, "dtypes"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids: shape"),
        ({"ids": torch.tensor([0, 1, 2, 10])}, "ids: values 0 to 10, allowed: 0 to 9"),
        ({"ids": torch.tensor([0, 1, 2, -100])}, "ids: values -100 to 2"),
        ({"bias": torch.zeros(9)}, "bias: shape"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": torch.tensor([1.0, 1.0, 0.0, 1.0])}, "temperature: smallest value 0.0"),
        ({"temperature": torch.ones(3)}, "temperature: shape"),
        ({"chunk_tokens": 0}, "chunk_tokens: got 0"),
        ({"impl": "cuda"}, "impl: got 'cuda'"),
    ],
)
def test_wrong_input_is_named(changes, message):
    arguments = {
        "hidden": torch.zeros(4, 16),
        "weight": torch.zeros(10, 16),
        "ids": torch.zeros(4, dtype=torch.int64),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


@pytest.mark.parametrize(
    ("num_rows", "vocab", "itemsize"), [(2048, 49152, 2), (16384, 151936, 2), (1, 17, 4), (5000, 49152, 4)]
)
def test_default_chunk_fits_its_budget(num_rows, vocab, itemsize):
    chunk = even_split(num_rows, CPU_ROW_BYTES // (vocab * itemsize))
    assert chunk * vocab * itemsize <= CPU_ROW_BYTES
    # As few chunks as the budget allows, and none much smaller than another.
    fewest = math.ceil(num_rows * vocab * itemsize / CPU_ROW_BYTES)
    count = math.ceil(num_rows / chunk)
    assert count <= fewest + 1 and num_rows - (count - 1) * chunk > chunk - count
    assert even_split(num_rows, 7) <= 7
