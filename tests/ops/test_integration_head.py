"""FusedLMHead as a module, in a model, and in a plain transformers Trainer against the model's own loss."""

import pytest
import torch
import torch.nn.functional as F
from fastreason_kernels import LoraHead, PolicyLossSpec, linear_logprob, linear_policy_loss
from fastreason_kernels.integrations import torch_loss
from fastreason_kernels.integrations.head import FusedLMHead
from fastreason_kernels.integrations.torch_loss import linear_cross_entropy
from fastreason_kernels.testing import assert_no_worse, head_case

BATCH, LENGTH, VOCAB, WIDTH, RANK = 4, 7, 61, 16, 3


def make(dtype=torch.float32, *, bias=True, lora=True, **options):
    case = head_case(BATCH * LENGTH, VOCAB, width=WIDTH, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    pair = [torch.randn(shape, generator=generator).to(dtype) for shape in ((RANK, WIDTH), (VOCAB, RANK))]
    pair = LoraHead(torch.nn.Parameter(pair[0]), torch.nn.Parameter(pair[1]), 0.3) if lora else None
    weight = torch.nn.Parameter(case.weight.detach())
    head = FusedLMHead(weight, torch.nn.Parameter(case.bias.detach()) if bias else None, lora=pair, **options)
    hidden = case.hidden.detach().view(BATCH, LENGTH, WIDTH).requires_grad_()
    return head, hidden, case.ids.view(BATCH, LENGTH)


def eager(head, hidden, ids, temperature=1.0):
    """Whole logits, in the dtype of the parameters."""
    logits = F.linear(hidden, head.weight, head.bias)
    if head.lora_a is not None:
        logits = logits + F.linear(F.linear(hidden, head.lora_a) * head.lora_scale, head.lora_b)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    z = z / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, ids[..., None]).squeeze(-1)
    return logp, -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": False, "lora": False},
        {"lora": False},
        {},
        {"lora": False, "softcap": 4.0, "logit_scale": 0.7},
        {"softcap": 5.0},
    ],
    ids=["plain", "bias", "lora", "softcap", "all"],
)
def test_values_and_gradients(options, dtype):
    head, hidden, ids = make(dtype, **options)
    temperature = torch.linspace(0.6, 1.4, ids.numel()).view(ids.shape)
    factor = torch.linspace(-1, 2, ids.numel()).view(ids.shape)
    wide, wide_hidden, _ = make(dtype, **options)
    wide, wide_hidden = wide.double(), wide_hidden.detach().double().requires_grad_()

    def measure(function, module, x, scale):
        logp, entropy, lse = function(x, ids, temperature=scale)
        loss = (logp * factor).sum() + 0.3 * (entropy * factor.flip(0)).sum()
        parameters = dict(module.named_parameters())
        grads = torch.autograd.grad(loss, (x, *parameters.values()))
        return {"logp": logp, "entropy": entropy, "lse": lse, **dict(zip(("hidden", *parameters), grads, strict=True))}

    ours = measure(head, head, hidden, temperature)
    theirs = measure(lambda *args, **kwargs: eager(head, *args, **kwargs), head, hidden, temperature)
    exact = measure(lambda *args, **kwargs: eager(wide, *args, **kwargs), wide, wide_hidden, temperature.double())
    assert ours.keys() == exact.keys() and ours["logp"].shape == ids.shape
    for name, value in ours.items():
        assert_no_worse(name, value, theirs[name], exact[name], dtype=dtype)


def test_policy_loss_runs_inside_forward():
    head, hidden, ids = make(lora=False)
    spec = PolicyLossSpec(entropy_coef=0.1, kl="k3", kl_coef=0.2, ratio="sequence")
    columns = {
        "advantages": torch.linspace(-1, 1, ids.numel()).view(ids.shape),
        "ref_logp": torch.full(ids.shape, -4.0),
        "behaviour_logp": torch.full(ids.shape, -4.1),
        "token_weight": torch.rand(ids.shape),
        "sequence_ids": torch.arange(BATCH)[:, None].expand(ids.shape),
        "mask": torch.arange(LENGTH) < torch.tensor([7, 3, 0, 5])[:, None],
    }
    inside = []
    head.register_forward_hook(lambda *_: inside.append("forward"))
    head.register_full_backward_pre_hook(lambda *_: inside.append("backward"))
    out = head(hidden, ids, spec, temperature=0.8, **columns)
    flat = {name: value.reshape(-1) for name, value in columns.items()}
    expected = linear_policy_loss(
        hidden.view(-1, WIDTH), head.weight, ids.view(-1), spec=spec, bias=head.bias, temperature=0.8, **flat
    )
    torch.testing.assert_close(out.loss_sum, expected.loss_sum)
    for our, right in zip(out[1:], expected[1:], strict=True):
        assert our.shape == ids.shape
        torch.testing.assert_close(our.reshape(-1), right, equal_nan=True)
    grads = torch.autograd.grad(out.loss_sum, (hidden, head.weight, head.bias))
    # The hook that ZeRO-3 gathers by: it sees the loss only because the output is a tuple.
    assert inside == ["forward", "backward"]
    torch.testing.assert_close(grads, torch.autograd.grad(expected.loss_sum, (hidden, head.weight, head.bias)))


def test_from_linear_shares_parameters_and_stands_in_for_it():
    linear = torch.nn.Linear(WIDTH, VOCAB)
    head = FusedLMHead.from_linear(linear)
    assert head.weight is linear.weight and head.bias is linear.bias
    assert head.state_dict().keys() == linear.state_dict().keys()
    hidden = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(head(hidden), linear(hidden))
    with pytest.raises(TypeError, match="lm_head: got Identity"):
        FusedLMHead.from_linear(torch.nn.Identity())
    lora, hidden, ids = make(softcap=4.0)
    z = 4.0 * torch.tanh(lora(hidden) / 4.0)
    torch.testing.assert_close(z.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1), lora(hidden, ids)[0])


def test_errors():
    head, hidden, ids = make(lora=False)
    with pytest.raises(ValueError, match=r"ids: shape \(28,\), allowed: \(4, 7\)"):
        head(hidden, ids.view(-1))
    with pytest.raises(ValueError, match=r"advantages: shape \(4,\), allowed: that of ids, \(4, 7\)"):
        head(hidden, ids, PolicyLossSpec(), advantages=torch.ones(4))
    with pytest.raises(ValueError, match=r"bias: shape \(3,\), allowed: \[V\] = \[61\]"):
        FusedLMHead(torch.zeros(61, 4), torch.zeros(3))


def test_ignored_rows_have_no_gradient():
    head, hidden, ids = make()
    ids[1, 2:] = -100
    logp, entropy, _ = head(hidden, ids, ignore_index=-100)
    assert not logp[1, 2:].any() and not entropy[1, 2:].any() and (logp[1, :2] < 0).all()
    (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), hidden)
    assert not gradient[1, 2:].any() and gradient[1, :2].any()


WORDS = 40


def tiny_model(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


class FusedModel(torch.nn.Module):
    """A causal model whose loss never sees whole logits; `kind` says by which of the drop-ins."""

    accepts_loss_kwargs = True

    def __init__(self, model, kind):
        super().__init__()
        self.model, self.kind = model, kind
        self.config = model.config
        if kind == "head":
            model.lm_head = FusedLMHead.from_linear(model.lm_head)

    def forward(self, input_ids, attention_mask, labels, num_items_in_batch=None):
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        if self.kind == "head":
            logp, _, _ = self.model.lm_head(hidden, labels, ignore_index=-100)
            return {"loss": -logp.sum() / num_items_in_batch}
        loss = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), self.model.lm_head.weight, labels.reshape(-1), reduction="sum"
        )
        return {"loss": loss / num_items_in_batch}


def fit(model, folder):
    """Losses, gradient norms and parameters after two steps of two unequal microbatches."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(2)
    rows = []
    for length in (12, 3, 9, 5, 7, 11, 4, 10):
        ids = torch.randint(3, WORDS, (12,), generator=generator)
        labels = ids.masked_fill(torch.arange(12) >= length, -100).masked_fill(torch.arange(12) < 2, -100)
        rows.append({"input_ids": ids, "attention_mask": (torch.arange(12) < length).long(), "labels": labels})
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        seed=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    logs = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    return logs, {name.removeprefix("model.model."): x.detach().clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["head", "linear_cross_entropy"])
def test_two_steps_of_a_plain_trainer(kind, tied, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="the trainer to compare with is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    start = dict(tiny_model(tied).named_parameters())
    theirs, their_weights = fit(tiny_model(tied), tmp_path / "theirs")
    calls = []

    def counted(name):
        real = {"linear_logprob": linear_logprob, "linear_policy_loss": linear_policy_loss}[name]
        return lambda *args, **kwargs: calls.append(name) or real(*args, **kwargs)

    monkeypatch.setattr("fastreason_kernels.integrations.head.linear_logprob", counted("linear_logprob"))
    monkeypatch.setattr(torch_loss, "linear_policy_loss", counted("linear_policy_loss"))
    ours, our_weights = fit(FusedModel(tiny_model(tied), kind), tmp_path / "ours")
    assert calls == [{"head": "linear_logprob", "linear_cross_entropy": "linear_policy_loss"}[kind]] * 4
    assert len(ours) == len(theirs) == 2
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-4)
    for (name, value), (_, their) in zip(our_weights.items(), their_weights.items(), strict=True):
        torch.testing.assert_close(value, their, rtol=1e-4, atol=2e-5, msg=name)
    assert not torch.equal(their_weights["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
