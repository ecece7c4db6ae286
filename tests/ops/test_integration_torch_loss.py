"""The drop-in for torch's linear_cross_entropy against torch's own, whole and chunked."""

import dataclasses
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from fastreason_kernels.integrations import torch_loss
from fastreason_kernels.integrations.torch_loss import linear_cross_entropy
from fastreason_kernels.testing import Recorder, assert_no_worse, head_case

if not hasattr(F, "linear_cross_entropy"):
    pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy to compare with", allow_module_level=True)

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignore": {"ignore_index": 7},
    "weight": {"weight": True},
    "weight_ignore_none": {"weight": True, "ignore_index": 7, "reduction": "none"},
    "smooth": {"label_smoothing": 0.2},
    "smooth_none": {"label_smoothing": 0.2, "reduction": "none"},
    "smooth_all": {"label_smoothing": 0.1, "weight": True, "ignore_index": 7},
    "smooth_one": {"label_smoothing": 1.0, "reduction": "sum", "weight": True},
    "chunked": {"options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)},
    "chunked_ratio": {"options": torch.nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio:2"), "weight": True},
}


def run(function, case, dtype, options, *, bias, target):
    fresh = case.to(dtype)
    leaves = (fresh.hidden, fresh.weight, fresh.bias)[: 3 if bias else 2]
    options = dict(options)
    if options.pop("weight", False):
        options["weight"] = (torch.arange(case.weight.shape[0]) % 5 + 0.5).to(dtype)
    loss = function(fresh.hidden, fresh.weight, target, linear_bias=fresh.bias if bias else None, **options)
    factor = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).to(loss.dtype).view(loss.shape) + 0.3
    return loss.detach(), torch.autograd.grad((loss * factor).sum(), leaves)


def test_signature():
    ours, theirs = (
        [(x.name, x.kind, x.default) for x in inspect.signature(function).parameters.values()]
        for function in (linear_cross_entropy, F.linear_cross_entropy)
    )
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_values_and_gradients(options, dtype, monkeypatch):
    if dtype == torch.bfloat16 and options.get("label_smoothing") == 1:
        pytest.skip("without any weight on the target, two gradients already rounded to bf16 cancel: see the docstring")
    monkeypatch.setattr(torch_loss, "ROW_BLOCK", 100)
    case = head_case(61, 301, dtype=dtype)
    target = case.ids.clone()
    target[::3], target[5], target[6:30] = -100, 7, 11  # a frequent token
    if "ignore_index" in options:
        target[target == -100] = options["ignore_index"]
    exact_options = {**options, "options": None}
    exact, exact_grads = run(F.linear_cross_entropy, case, torch.float64, exact_options, bias=True, target=target)
    theirs, their_grads = run(F.linear_cross_entropy, case, dtype, options, bias=True, target=target)
    ours, our_grads = run(linear_cross_entropy, case, dtype, options, bias=True, target=target)
    assert ours.dtype == torch.float32
    assert_no_worse("loss", ours, theirs, exact, dtype=dtype)
    for name, gradient, their, right in zip(
        ("input", "weight", "bias"), our_grads, their_grads, exact_grads, strict=True
    ):
        assert gradient.dtype == dtype
        assert_no_worse(name, gradient, their, right, dtype=dtype)


def test_smoothing_sums_a_frequent_token_in_fp32():
    # 4096 gradients of one row, all of one sign: in a bf16 sum the later ones vanish.
    case = head_case(4096, 40, dtype=torch.bfloat16)
    case = dataclasses.replace(case, hidden=case.hidden.detach().abs())
    target = torch.zeros(4096, dtype=torch.int64)
    options = {"label_smoothing": 0.3, "reduction": "sum"}
    exact, right = run(F.linear_cross_entropy, case, torch.float64, options, bias=False, target=target)
    theirs, their = run(F.linear_cross_entropy, case, torch.bfloat16, options, bias=False, target=target)
    ours, our = run(linear_cross_entropy, case, torch.bfloat16, options, bias=False, target=target)
    assert_no_worse("loss", ours, theirs, exact, dtype=torch.bfloat16)
    assert_no_worse("weight", our[1], their[1], right[1], dtype=torch.bfloat16)


def test_one_sample_without_batch():
    case = head_case(1, 40)
    ours = linear_cross_entropy(case.hidden[0], case.weight, case.ids[0])
    torch.testing.assert_close(ours, F.linear_cross_entropy(case.hidden[0], case.weight, case.ids[0]))
    ours = linear_cross_entropy(case.hidden[0], case.weight, case.ids[0], reduction="none")
    torch.testing.assert_close(ours, F.linear_cross_entropy(case.hidden[0], case.weight, case.ids[0], reduction="none"))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_mean_over_nothing_is_zero(label_smoothing):
    # torch: 0 / 0, which one microbatch of prompts alone turns into NaN weights (pytorch issue 70348).
    case, target = head_case(5, 40), torch.full((5,), -100)
    options = {"label_smoothing": label_smoothing}
    assert F.linear_cross_entropy(case.hidden, case.weight, target, **options).isnan()
    loss = linear_cross_entropy(case.hidden, case.weight, target, **options)
    assert float(loss.detach()) == 0
    for gradient in torch.autograd.grad(loss, (case.hidden, case.weight)):
        assert not gradient.any()


def test_three_products_without_whole_logits_and_none_for_ignored_rows():
    case = head_case(64, 300)
    target = case.ids.clone()
    target[:32] = -100
    with Recorder() as recorder:
        loss = linear_cross_entropy(
            case.hidden, case.weight, target, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8)
        )
        loss.backward()
    assert recorder.largest < 32 * 300
    flops = sum(2 * math.prod(left) * right[1] for left, right in recorder.products)
    assert flops == 3 * 2 * 32 * 300 * case.hidden.shape[1]


def test_what_it_cannot_do_is_an_error():
    case = head_case(5, 40)
    with pytest.raises(NotImplementedError, match="class probabilities"):
        linear_cross_entropy(case.hidden, case.weight, torch.rand(5, 40))
    with pytest.raises(NotImplementedError, match="K-dimensional"):
        linear_cross_entropy(case.hidden, case.weight.view(20, 2, -1), torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match=r"acc_dtype: got torch\.bfloat16"):
        options = torch.nn.LinearCrossEntropyOptions(acc_dtype=torch.bfloat16)
        linear_cross_entropy(case.hidden, case.weight, case.ids, options=options)
    with pytest.raises(ValueError, match="target: values 0 to 40, allowed: 0 to 39"):
        linear_cross_entropy(case.hidden, case.weight, torch.tensor([0, 1, 40, 3, 4]))
    with pytest.raises(ValueError, match="reduction: got 'batchmean'"):
        linear_cross_entropy(case.hidden, case.weight, case.ids, reduction="batchmean")
    with pytest.raises(ValueError, match=r"weight: shape \(39,\)"):
        linear_cross_entropy(case.hidden, case.weight, case.ids, weight=torch.ones(39))
