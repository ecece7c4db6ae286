"""The drop-in for Liger's fused linear GRPO loss against Liger's own."""

import importlib.util
import inspect
import math

import pytest
import torch
from fastreason_kernels.integrations.liger import LigerFusedLinearGRPOLoss
from fastreason_kernels.testing import Recorder, assert_no_worse, head_case

if importlib.util.find_spec("liger_kernel") is None:
    pytest.skip("liger-kernel is not installed", allow_module_level=True)
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as TheirLoss

BATCH, LENGTH, VOCAB = 5, 9, 61

# Constructor arguments; then what forward is given beside the required: b bias, o old logps, r reference logps,
# i reference inputs, w / W vllm ratios [B, T] / [B, 1], n num_items_in_batch.
CASES = {
    "default": ({}, "r"),
    "off_policy": ({"beta": 0.0}, "or"),
    "old_kl": ({"beta": 0.3}, "or"),
    "grpo": ({"loss_type": "grpo"}, "bor"),
    "bnpo": ({"loss_type": "bnpo"}, "or"),
    "dr_grpo": ({"loss_type": "dr_grpo", "max_completion_length": 20}, "or"),
    "dapo_items": ({"loss_type": "dapo"}, "orn"),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3}, "orw"),
    "sapo": ({"loss_type": "sapo", "sapo_temperature_pos": 0.9}, "or"),
    "luspo_sequence": ({"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0}, "or"),
    "gspo": ({"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.05}, "bor"),
    "gspo_grpo": ({"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.0}, "orw"),
    "delta": ({"delta": 1.5}, "or"),
    "delta_below_clip": ({"delta": 1.1, "epsilon_high": 0.4}, "or"),
    "gspo_delta": ({"delta": 1.2, "importance_sampling_level": "sequence"}, "or"),
    "ratio": ({"temperature": 0.7}, "orw"),
    "ratio_sequence": ({"beta": 0.0}, "orW"),
    "corrected_kl": ({"use_bias_correction_kl": True, "beta": 0.5}, "or"),
    "corrected_kl_on_policy": ({"use_bias_correction_kl": True, "loss_type": "grpo"}, "r"),
    "corrected_kl_gspo": (
        {"use_bias_correction_kl": True, "importance_sampling_level": "sequence", "delta": 1.3},
        "orw",
    ),
    "vespo": ({"loss_type": "vespo", "vespo_k_pos": 1.5}, "or"),
    "vespo_ratio": ({"loss_type": "vespo", "beta": 0.0}, "orw"),
    "vespo_ratio_sequence": ({"loss_type": "vespo", "vespo_lambda_neg": 1.0}, "orW"),
    "vespo_corrected_kl": ({"loss_type": "vespo", "use_bias_correction_kl": True}, "ron"),
    "reference_inputs": ({"temperature": 1.3, "chunk_size": 2}, "boi"),
    "no_reference": ({"use_ref_model": False}, "o"),
    "frozen": ({"beta": 0.0}, "orf"),
}


def inputs(dtype, seed=0):
    """Ragged masks with one sequence masked wholly; ratios that stay away from every bound."""
    generator = torch.Generator().manual_seed(seed)
    case = head_case(BATCH * LENGTH, VOCAB, dtype=dtype, seed=seed)
    lengths = torch.tensor([9, 4, 0, 1, 7])

    def choice(*values):
        return torch.tensor(values)[torch.randint(0, len(values), (BATCH, LENGTH), generator=generator)]

    logits = torch.nn.functional.linear(case.hidden.double(), case.weight.double())
    logp = logits.log_softmax(-1).gather(1, case.ids[:, None]).view(BATCH, LENGTH).float().detach()
    mask = torch.arange(LENGTH) < lengths[:, None]
    return case, {
        "mask": mask.long(),
        "advantages": torch.tensor([1.2, -0.7, 2.0, 0.0, -1.5]),
        "old": logp + choice(0.02, -0.6, 0.5, -0.3, -0.15),
        "ref": logp + choice(0.3, -0.4),
        "ratio": choice(0.4, 0.9, 1.7).masked_fill(~mask & (torch.arange(LENGTH) > 0), 1.0),
    }


def run(loss_class, options, given, dtype, *, case, columns):
    fresh = case.to(dtype)
    hidden = fresh.hidden.view(BATCH, LENGTH, -1)
    if "f" in given:
        fresh.weight.requires_grad_(False)
    leaves = [fresh.hidden, *([] if "f" in given else [fresh.weight]), *([fresh.bias] if "b" in given else [])]
    other = head_case(BATCH * LENGTH, VOCAB, dtype=dtype, seed=9).to(fresh.hidden.dtype)
    keywords = {
        "bias": fresh.bias if "b" in given else None,
        "old_per_token_logps": columns["old"] if "o" in given else None,
        "ref_per_token_logps": columns["ref"] if "r" in given else None,
        "num_items_in_batch": torch.tensor(77) if "n" in given else None,
    }
    if "i" in given:
        keywords |= {"ref_input": other.hidden.view(hidden.shape), "ref_weight": other.weight, "ref_bias": other.bias}
    if "w" in given or "W" in given:
        keywords["vllm_is_ratio"] = columns["ratio"] if "w" in given else columns["ratio"][:, :1]
    ids = case.ids.view(BATCH, LENGTH)
    loss, metrics = loss_class(compiled=False, **options)(
        hidden, fresh.weight, ids, columns["mask"], columns["advantages"], **keywords
    )
    grads = torch.autograd.grad(loss * 1.7, leaves)
    return loss.detach(), metrics, grads


def specification(constructed, given, case, columns):
    """Liger's formulas in float64: its own loss function on whole logits."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    fresh = case.to(torch.float64)
    options = {"beta": 0.04, "loss_type": "dapo", "use_ref_model": True, "temperature": 1.0, **constructed}
    use_reference, temperature = options.pop("use_ref_model"), options.pop("temperature")
    options.pop("chunk_size", None)

    def logps(head, bias):
        z = torch.nn.functional.linear(head.hidden, head.weight, bias) / temperature
        return z.log_softmax(-1).gather(1, case.ids[:, None]).view(BATCH, LENGTH)

    reference = columns["ref"].double() if "r" in given else None
    if "i" in given:
        other = head_case(BATCH * LENGTH, VOCAB, dtype=case.hidden.dtype, seed=9).to(torch.float64)
        reference = logps(other, other.bias).detach()
    ratio = columns["ratio"].double() if "w" in given else columns["ratio"][:, :1].double() if "W" in given else None
    loss, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        per_token_logps=logps(fresh, fresh.bias if "b" in given else None),
        attention_mask=columns["mask"],
        advantages=columns["advantages"].double(),
        full_attention_mask=columns["mask"],
        ref_per_token_logps=reference if use_reference else None,
        old_per_token_logps=columns["old"].double() if "o" in given else None,
        vllm_is_ratio=ratio,
        num_items_in_batch=torch.tensor(77) if "n" in given else None,
        **options,
    )
    leaves = [fresh.hidden, *([] if "f" in given else [fresh.weight]), *([fresh.bias] if "b" in given else [])]
    return loss.detach(), metrics, torch.autograd.grad(loss * 1.7, leaves)


def test_signatures():
    for name in ("__init__", "forward"):
        ours, theirs = (
            [(x.name, x.kind, x.default) for x in inspect.signature(getattr(c, name)).parameters.values()]
            for c in (LigerFusedLinearGRPOLoss, TheirLoss)
        )
        assert ours == theirs
    options = vars(TheirLoss()).keys() - vars(torch.nn.Module()).keys()
    assert options <= vars(LigerFusedLinearGRPOLoss()).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("options", "given"), CASES.values(), ids=CASES.keys())
def test_values_metrics_and_gradients(options, given, dtype):
    case, columns = inputs(dtype)
    exact, exact_metrics, exact_grads = specification(options, given, case, columns)
    theirs, their_metrics, their_grads = run(TheirLoss, options, given, dtype, case=case, columns=columns)
    ours, our_metrics, our_grads = run(LigerFusedLinearGRPOLoss, options, given, dtype, case=case, columns=columns)
    assert ours.dtype == torch.float32 and ours.shape == ()
    # The terms of the sum cancel: rounding is measured against their size.
    assert_no_worse("loss", ours, theirs, exact, dtype=dtype, atol=2e-5 if dtype == torch.float32 else 2e-2)
    assert len(our_metrics) == len(their_metrics) == len(exact_metrics)
    for our, their, right in zip(our_metrics, their_metrics, exact_metrics, strict=True):
        assert not our.requires_grad
        assert_no_worse("metric", our, their, right, dtype=dtype, atol=2e-6 if dtype == torch.float32 else 4e-3)
    for our, their, right in zip(our_grads, their_grads, exact_grads, strict=True):
        assert our.dtype == their.dtype == dtype
        assert_no_worse("gradient", our, their, right, dtype=dtype)


def both(options, given, **replaced):
    """(theirs, ours), each (loss, metrics, gradients), in fp32 on the same inputs with some columns replaced."""
    case, columns = inputs(torch.float32)
    columns |= {name: change(columns) for name, change in replaced.items()}
    return [
        run(kind, options, given, torch.float32, case=case, columns=columns)
        for kind in (TheirLoss, LigerFusedLinearGRPOLoss)
    ]


def test_per_token_advantages_go_beyond_liger():
    case, columns = inputs(torch.float32)
    expected = run(LigerFusedLinearGRPOLoss, {}, "or", torch.float32, case=case, columns=columns)
    columns["advantages"] = columns["advantages"][:, None].expand(BATCH, LENGTH).contiguous()
    columns["advantages"][columns["mask"] == 0] = 99.0
    ours = run(LigerFusedLinearGRPOLoss, {}, "or", torch.float32, case=case, columns=columns)
    torch.testing.assert_close(ours, expected)
    columns["advantages"][0, 3] = 50.0
    changed = run(LigerFusedLinearGRPOLoss, {}, "or", torch.float32, case=case, columns=columns)
    assert (changed[2][0] != ours[2][0]).any(-1).nonzero().flatten().tolist() == [3]


def test_all_masked_is_a_connected_zero():
    theirs, ours = both({"loss_type": "grpo"}, "or", mask=lambda c: torch.zeros_like(c["mask"]))
    torch.testing.assert_close(ours, theirs)
    assert float(ours[0]) == 0 and not any(gradient.any() for gradient in ours[2])


def test_world_size_divides_the_denominator(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x, op=None: x.mul_(5))
    for given in ("or", "orn"):
        theirs, ours = both({}, given)
        torch.testing.assert_close(ours, theirs)


# Where Liger's value is not what its formula means; ours is, and these show both.


def test_masked_tokens_may_hold_anything():
    # Liger multiplies the loss by the mask, and 0 * inf is NaN: old log-probabilities of -inf in the padding spoil all.
    replaced = {"old": lambda c: c["old"].masked_fill(c["mask"] == 0, -torch.inf)}
    theirs, ours = both({}, "or", **replaced)
    assert theirs[0].isnan()
    _, clean = both({}, "or")
    torch.testing.assert_close(ours, clean, rtol=0, atol=0)


def test_k3_does_not_overflow():
    # exp(ref - logp) of one token that the policy has all but forgotten: beyond 88 nats it is inf in fp32.
    def lifted(columns):
        ref = columns["ref"].clone()
        ref[0, 0] += 100.0
        return ref

    theirs, ours = both({"beta": 0.1}, "or", ref=lifted)
    assert theirs[0].isinf() and not torch.stack([x.isfinite().all() for x in theirs[2]]).all()
    assert ours[0].isfinite() and all(x.isfinite().all() for x in ours[2])


def test_zero_advantage_with_an_overflowing_ratio():
    # Sequence 3 has advantage 0, and inf * 0 is NaN.
    def fallen(columns):
        old = columns["old"].clone()
        old[3, 0] -= 100.0
        return old

    theirs, ours = both({"beta": 0.0}, "or", old=fallen)
    assert theirs[0].isnan()
    _, clean = both({"beta": 0.0}, "or")
    torch.testing.assert_close(ours[0], clean[0])


def test_luspo_with_token_ratios_does_not_depend_on_padding():
    # Liger weights a sequence by its length and averages over all columns, padding included (as TRL did before its
    # pull request 6654): masked tokens contribute, and the value changes with the padded length.
    options = {"loss_type": "luspo", "beta": 0.0}
    plain_theirs, plain_ours = both(options, "or")
    junk = {"old": lambda c: c["old"] + (c["mask"] == 0) * 0.7}
    junk_theirs, junk_ours = both(options, "or", **junk)
    assert abs(junk_theirs[0] - plain_theirs[0]) > 0.01
    torch.testing.assert_close(junk_ours, plain_ours, rtol=0, atol=0)
    case, columns = inputs(torch.float32)
    # What TRL 1.16 does: mask, sum over tokens, mean over sequences. That is dr_grpo with a length of 1.
    expected = run(
        TheirLoss,
        {"loss_type": "dr_grpo", "max_completion_length": 1, "beta": 0.0},
        "or",
        torch.float32,
        case=case,
        columns=columns,
    )
    torch.testing.assert_close(plain_ours, expected)


def test_vespo_ratio_of_the_padding_does_not_count():
    # Liger sums the logarithms of the sampler's ratios over the padding too; TRL fills it with 0, so exp(-18) a token.
    options = {"loss_type": "vespo", "beta": 0.0}
    _, plain = both(options, "orw")
    theirs, ours = both(options, "orw", ratio=lambda c: c["ratio"] * c["mask"])
    torch.testing.assert_close(ours, plain)
    assert abs(theirs[0] - plain[0]) > 0.01


def test_weight_gradient_of_many_sequences_is_not_summed_in_bf16():
    # Liger adds each sequence's gradient to a bf16 buffer, so later ones vanish in what is there.
    batch = 400
    case = head_case(batch, 16, dtype=torch.bfloat16)
    grads = {}
    for name, kind, dtype in (
        ("theirs", TheirLoss, torch.bfloat16),
        ("ours", LigerFusedLinearGRPOLoss, torch.bfloat16),
        ("exact", LigerFusedLinearGRPOLoss, torch.float64),
    ):
        fresh = case.to(dtype)
        loss, _ = kind(compiled=False, beta=0.0, use_ref_model=False)(
            fresh.hidden[:, None],
            fresh.weight,
            torch.zeros(batch, 1, dtype=torch.int64),
            torch.ones(batch, 1),
            torch.ones(batch),
        )
        (grads[name],) = torch.autograd.grad(loss, fresh.weight)
    errors = {name: float((grads[name].double() - grads["exact"]).abs().max()) for name in ("theirs", "ours")}
    assert errors["theirs"] > 5 * errors["ours"], errors


def test_what_has_no_effect_or_cannot_be_expressed_is_an_error():
    with pytest.raises(ValueError, match="loss_type: got 'ppo'"):
        LigerFusedLinearGRPOLoss(loss_type="ppo")
    with pytest.raises(ValueError, match=r"delta: got 1\.5, but loss_type 'cispo' has no such bound"):
        LigerFusedLinearGRPOLoss(loss_type="cispo", delta=1.5)
    with pytest.raises(ValueError, match="importance_sampling_level: 'sequence', allowed for loss_type 'sapo': token"):
        LigerFusedLinearGRPOLoss(loss_type="sapo", importance_sampling_level="sequence")
    with pytest.raises(ValueError, match="max_completion_length: None"):
        LigerFusedLinearGRPOLoss(loss_type="dr_grpo")
    with pytest.raises(ValueError, match="sapo_temperature_neg: got 0"):
        LigerFusedLinearGRPOLoss(sapo_temperature_neg=0)
    for options, message in (
        ({"delta": 0.9}, "delta: got 0.9, allowed: >= 1"),
        ({"loss_type": "cispo"}, "epsilon_high: got 0.2, allowed: >= 1"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            both(options, "or")[1]
    for options, given, message in (
        ({"use_ref_model": False}, "or", "use_ref_model: False, but beta is 0.04"),
        ({}, "o", "ref_per_token_logps: None; use_ref_model needs it"),
    ):
        case, columns = inputs(torch.float32)
        with pytest.raises(ValueError, match=message):
            run(LigerFusedLinearGRPOLoss, options, given, torch.float32, case=case, columns=columns)


def test_masked_rows_cost_nothing_and_no_logits_are_whole():
    case, columns = inputs(torch.float32)
    with Recorder() as recorder:
        loss, _ = LigerFusedLinearGRPOLoss(chunk_size=1, beta=0.0, use_ref_model=False)(
            case.hidden.view(BATCH, LENGTH, -1),
            case.weight,
            case.ids.view(BATCH, LENGTH),
            columns["mask"],
            columns["advantages"],
        )
        loss.backward()
    flops = sum(2 * math.prod(left) * right[1] for left, right in recorder.products)
    # Sequence 3 has advantage 0: its one token is computed, for the ratio, and has no gradient.
    active, idle = 9 + 4 + 7, 1
    assert flops == 2 * VOCAB * case.hidden.shape[1] * (3 * active + idle)
