"""The drop-in for TRL's chunked log-probabilities against TRL's own, and under its real GRPO trainer."""

import contextlib
import importlib.util
import inspect

import pytest
import torch
from fastreason_kernels import linear_logprob
from fastreason_kernels.integrations import trl as drop_in
from fastreason_kernels.integrations.trl import OPTIONAL_OUTPUTS, ChunkedLogProbFunction, patch_trl
from fastreason_kernels.testing import assert_no_worse, head_case

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed (bench.lock has it)", allow_module_level=True)
from trl.kernels import ChunkedLogProbFunction as TheirFunction

# (temperature, chunk_size, final_logit_softcapping, logit_scale): the vocabulary of 301 ends inside a tile of 128.
CALLS = {
    "plain": (1.0, 128),
    "one_tile": (1.0, 32768),
    "temperature": (0.7, 128),
    "softcap": (1.0, 128, 3.0),
    "scale": (1.3, 100, None, 0.25),
    "all": (0.8, 128, 5.0, 1.7),
}


def run(function, case, dtype, call, outputs=OPTIONAL_OUTPUTS, *, bias=True):
    fresh = case.to(dtype)
    leaves = (fresh.hidden, fresh.weight, fresh.bias)[: 3 if bias else 2]
    bias_arg = fresh.bias if bias else None
    defaults = (1.0, 128, None, 1.0)
    call = (*call, *defaults[len(call) :])
    results = function.apply(fresh.hidden, fresh.weight, bias_arg, case.ids, *call, outputs)
    factor = torch.linspace(-1, 2, case.ids.shape[0])
    factor[::4] = 0
    loss = (results[0] * factor).sum()
    if results[1] is not None:
        loss = loss + 0.3 * (results[1] * factor.flip(0)).sum()
    return results, torch.autograd.grad(loss, leaves)


def test_signature():
    ours = list(inspect.signature(ChunkedLogProbFunction.apply).parameters.values())
    theirs = list(inspect.signature(TheirFunction.forward).parameters.values())[1:]
    assert [(x.name, x.kind, x.default) for x in ours] == [(x.name, x.kind, x.default) for x in theirs]


class Eager:
    """Whole logits in the inputs' dtype: the specification, and in float64 the exact values."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        log_p = z.log_softmax(-1)
        found = {
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
            "mean_logits": z.mean(-1),
            "is_top1": z.argmax(-1) == targets,
        }
        logp = log_p.gather(1, targets[:, None]).squeeze(1)
        return (logp, *(found[name] if name in outputs else None for name in OPTIONAL_OUTPUTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_values_and_gradients(call, bias, dtype):
    case = head_case(61, 301, dtype=dtype)
    # Every third target is the argmax, else is_top1 would be False throughout.
    top = torch.nn.functional.linear(case.hidden, case.weight, case.bias if bias else None).argmax(-1)
    case.ids[::3] = top[::3]
    exact, exact_grads = run(Eager, case, torch.float64, call, bias=bias)
    theirs, their_grads = run(TheirFunction, case, dtype, call, bias=bias)
    ours, our_grads = run(ChunkedLogProbFunction, case, dtype, call, bias=bias)
    assert len(ours) == len(theirs)
    for name, our, their, right in zip(("logp", *OPTIONAL_OUTPUTS), ours, theirs, exact, strict=True):
        assert our.dtype == their.dtype and our.requires_grad == their.requires_grad, name
        if name == "is_top1":
            assert torch.equal(our, their) and our[::3].sum() > 10 and not our.all()
        else:
            assert_no_worse(name, our, their, right, dtype=dtype)
    for name, our, their, right in zip(("hidden", "weight", "bias"), our_grads, their_grads, exact_grads, strict=False):
        assert our.dtype == their.dtype
        assert_no_worse(name, our, their, right, dtype=dtype)


@pytest.mark.parametrize("outputs", [(), ("log_probs",), ("log_probs", "entropy"), ("is_top1", "mean_logits")])
def test_only_what_was_asked_for(outputs):
    case = head_case(20, 50)
    theirs, their_grads = run(TheirFunction, case, torch.float32, (1.0, 32), outputs)
    ours, our_grads = run(ChunkedLogProbFunction, case, torch.float32, (1.0, 32), outputs)
    assert [x is None for x in ours] == [x is None for x in theirs]
    torch.testing.assert_close(our_grads, their_grads)


def test_mixed_dtypes_and_frozen_head():
    # Under autocast TRL's head keeps fp32 weights; with cast_lm_head_to_fp32 its hidden states are fp32, weights bf16.
    for hidden_dtype, weight_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        case = head_case(30, 70, dtype=torch.bfloat16)
        grads = []
        for function in (TheirFunction, ChunkedLogProbFunction):
            hidden = case.hidden.detach().to(hidden_dtype).requires_grad_()
            weight = case.weight.detach().to(weight_dtype).requires_grad_()
            logp, *_ = function.apply(hidden, weight, None, case.ids, 1.0, 32768, None, 1.0, ())
            grads.append(torch.autograd.grad(logp.sum(), (hidden, weight)))
            assert [x.dtype for x in grads[-1]] == [hidden_dtype, weight_dtype]
        torch.testing.assert_close(grads[1], grads[0], rtol=2e-2, atol=2e-2)
    case = head_case(30, 70)
    logp, *_ = ChunkedLogProbFunction.apply(case.hidden, case.weight.detach(), None, case.ids, 1.0, 32768)
    expected, *_ = TheirFunction.apply(case.hidden, case.weight.detach(), None, case.ids, 1.0, 32768)
    (ours,), (theirs,) = (torch.autograd.grad(x.square().sum(), case.hidden) for x in (logp, expected))
    torch.testing.assert_close(ours, theirs)


def test_autocast():
    case = head_case(30, 70)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, their_grads = run(TheirFunction, case, torch.float32, (1.0, 32768))
        ours, our_grads = run(ChunkedLogProbFunction, case, torch.float32, (1.0, 32768))
        exact, exact_grads = run(Eager, case.to(torch.bfloat16), torch.float64, (1.0, 32768))
    for name, our, their, right in zip(("logp", "entropy"), ours, theirs, exact, strict=False):
        assert_no_worse(name, our, their, right, dtype=torch.bfloat16)
    for our, their, right in zip(our_grads, their_grads, exact_grads, strict=True):
        assert our.dtype == torch.float32
        assert_no_worse("gradient", our, their, right, dtype=torch.bfloat16)


def test_a_removed_column_and_shifted_logits_do_not_spoil_the_entropy():
    # A column is removed by a bias of -inf (padded vocabularies). TRL sums exp(z) * z and so multiplies 0 by -inf; and
    # its lse - E[z] cancels where all logits are large: here 600 nats.
    case = head_case(12, 40, dtype=torch.float32)
    case.ids.clamp_(max=38)
    bias = torch.full((40,), 600.0)
    exact = Eager.apply(
        case.hidden.double(), case.weight.double(), bias.double(), case.ids, 1.0, 1, None, 1.0, ("entropy",)
    )
    theirs = TheirFunction.apply(case.hidden, case.weight, bias, case.ids, 1.0, 16)
    ours = ChunkedLogProbFunction.apply(case.hidden, case.weight, bias, case.ids, 1.0, 32768)
    assert (ours[1] - exact[1]).abs().max() < 4e-5 < 2 * (theirs[1] - exact[1]).abs().max()
    bias = torch.zeros(40)
    bias[39] = -torch.inf
    exact = Eager.apply(
        case.hidden.double(), case.weight[:39].double(), None, case.ids, 1.0, 1, None, 1.0, ("entropy",)
    )
    theirs = TheirFunction.apply(case.hidden, case.weight, bias, case.ids, 1.0, 16)
    ours = ChunkedLogProbFunction.apply(case.hidden, case.weight, bias, case.ids, 1.0, 32768)
    assert theirs[1].isnan().all()
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2e-6, atol=0)


def test_zero3_head_is_gathered_again_in_backward(monkeypatch):
    """A parameter that is empty except inside of the gathering context, as DeepSpeed's ZeRO-3 leaves it."""
    case = head_case(20, 50)
    weight = torch.nn.Parameter(case.weight.detach().clone())
    weight.ds_id = 0
    full, events = weight.data, []

    @contextlib.contextmanager
    def gathered(*parameters):
        assert parameters[0] is weight and parameters[1] is None
        weight.data = full
        events.append("gather")
        yield
        events.append("release")
        weight.data = torch.empty(0)

    monkeypatch.setattr("trl.trainer.utils.maybe_gather_lm_head_ctx", gathered)
    exact = Eager.apply(case.hidden, case.weight, None, case.ids, 1.0, 1, None, 1.0, ())[0]
    expected = torch.autograd.grad(exact.sum(), (case.hidden, case.weight))
    with gathered(weight, None):
        logp, *_ = ChunkedLogProbFunction.apply(case.hidden, weight, None, case.ids, 1.0, 32768, None, 1.0, ())
    assert weight.numel() == 0
    ours = torch.autograd.grad(logp.sum(), (case.hidden, weight))
    assert events == ["gather", "release"] * 2
    torch.testing.assert_close(ours, expected)


def test_errors():
    case = head_case(4, 10)
    with pytest.raises(ValueError, match=r"outputs: got \['logits'\]"):
        ChunkedLogProbFunction.apply(case.hidden, case.weight, None, case.ids, 1.0, 16, None, 1.0, ("logits",))
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        ChunkedLogProbFunction.apply(case.hidden, case.weight, None, case.ids, 1.0, 0)


def test_patch_covers_every_holder_and_is_undone(monkeypatch):
    import trl.kernels
    import trl.trainer.utils

    with patch_trl() as patch:
        assert trl.kernels.ChunkedLogProbFunction is ChunkedLogProbFunction
        assert trl.trainer.utils._ChunkedLogProbFunction is ChunkedLogProbFunction
        assert trl.kernels.chunked_logprob.ChunkedLogProbFunction is ChunkedLogProbFunction
        assert "trl.trainer.utils._ChunkedLogProbFunction" in patch.replaced and len(patch.replaced) >= 3
        with pytest.raises(RuntimeError, match="patched already"):
            patch_trl()
    patch.undo()
    assert trl.kernels.ChunkedLogProbFunction is TheirFunction
    assert trl.trainer.utils._ChunkedLogProbFunction is TheirFunction

    class Newer:
        def forward(ctx, hidden, weight, targets):  # noqa: N805
            """Another TRL."""

    monkeypatch.setattr("trl.kernels.chunked_logprob.ChunkedLogProbFunction", Newer)
    with pytest.raises(RuntimeError, match=r"takes \['hidden', 'weight', 'targets'\]"):
        patch_trl()


WORDS = 24
REWARDS = {3: 1.0, 7: -0.5, 11: 2.0}


def tiny_tokenizer():
    """Words w3 ... w23 and <pad> <bos> <eos>, split at spaces: no files, no network."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def save_tiny_model(folder, tied):
    """In a file, because TRL loads the reference model again from where the model came from."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def test_fused_lm_head_of_every_trainer(tmp_path):
    """The one place where TRL's trainers call the function, with all its outputs, on ragged labels."""
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    save_tiny_model(tmp_path / "model", tied=True)
    ids = torch.randint(3, WORDS, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) >= torch.tensor([9, 4, 0])[:, None], -100)
    results = []
    for patched in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *OPTIONAL_OUTPUTS))
        with patch_trl() if patched else contextlib.nullcontext():
            out = model(ids, labels=labels, fused_lm_head=True)
            (out.loss - 0.1 * out.entropy.mean()).backward()
        results.append(({name: value for name, value in out.items()}, [x.grad for x in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def load_start(folder):
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())


def train(folder, tied, **options):
    """Logged losses, gradient norms and entropies, and the weights after two steps of the real GRPO trainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    save_tiny_model(folder / "model", tied)
    prompts = ["w3 w4 w5", "w6", "w7 w8 w9 w10 w11", "w12 w13"] * 2
    args = GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        seed=5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=12,
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
        **options,
    )

    def reward(completion_ids, **_):
        return [sum(REWARDS.get(i, 0.1 * (i % 3)) for i in ids) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    logs = [{k: v for k, v in row.items() if "time" not in k} for row in trainer.state.log_history if "loss" in row]
    return logs, {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


TRAININGS = {
    "off_policy_with_kl_and_entropy": {"tied": True, "num_iterations": 2, "beta": 0.1, "entropy_coef": 0.02},
    "sequence_ratio_untied": {
        "tied": False,
        "num_iterations": 2,
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "temperature": 0.8,
    },
    "masked_truncated_cispo": {
        "tied": True,
        "loss_type": "cispo",
        "epsilon_high": 5.0,
        "mask_truncated_completions": True,
    },
}


@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS.keys())
def test_two_steps_of_the_grpo_trainer(options, tmp_path, monkeypatch):
    theirs, their_weights = train(tmp_path / "theirs", **options)
    rows = []

    def counted(hidden, *args, **kwargs):
        rows.append((hidden.shape[0], torch.is_grad_enabled()))
        return linear_logprob(hidden, *args, **kwargs)

    monkeypatch.setattr(drop_in, "linear_logprob", counted)
    with patch_trl():
        ours, our_weights = train(tmp_path / "ours", **options)
    assert sum(grad for _, grad in rows) == 4, "two steps of two microbatches"
    if options.get("num_iterations"):
        assert len(rows) > 4, "the behaviour's or the reference's log-probabilities"
    count = len(rows)
    train(tmp_path / "undone", **options)
    assert len(rows) == count
    assert len(ours) == len(theirs) == 2
    assert ours[0]["completions/min_length"] < ours[0]["completions/max_length"], "not ragged: the test shows less"
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys() and {"loss", "grad_norm", "entropy"} <= our.keys()
        for key, value in their.items():
            assert our[key] == pytest.approx(value, rel=1e-4, abs=2e-6), key
    start = load_start(tmp_path / "ours")
    for name, value in their_weights.items():
        assert not torch.equal(value, start[name]) or "bias" in name
        torch.testing.assert_close(our_weights[name], value, rtol=1e-4, atol=1e-5)
