"""A frozen model beside the trained one: its log-probabilities, and divergences from it, against whole logits in float64."""

import copy

import pytest
import torch
from fastreason_kernels import PolicyLossSpec
from fastreason_kernels.testing import assert_no_worse
from transformers import LlamaConfig, LlamaForCausalLM

from fastreason.errors import ModelError
from fastreason.frozen import FrozenModel, FrozenScorer, HeadDivergence, largest
from fastreason.packing import Row, collate
from fastreason.policy import Policy

VOCABULARY, TEMPERATURE = 61, 0.7
CPU = torch.device("cpu")
# The policy's own term is switched off by advantages of 0, so that only the KL is left.
PLAIN = PolicyLossSpec(ratio="none")
LAYOUTS = ("padded", "packed", "shared")


def tiny_model(seed, vocabulary=VOCABULARY, width=32, bias=False):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(vocabulary))
    return model


def make_rows(advantage=0.0):
    """Two prompts with two responses each, of ragged lengths and weights."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(4):
        if number % 2 == 0:
            prompt = torch.randint(1, VOCABULARY, (3 + number,), generator=generator).tolist()
        response = torch.randint(1, VOCABULARY, (2 + number,), generator=generator).tolist()
        rows.append(Row(prompt, response, [-4.0] * len(response), advantage, 1.0 + number / 4, number))
    return rows


def batches_of(rows, layout="padded", num=1):
    from fastreason.packing import units_of

    units = units_of(rows, layout)
    return [collate(units[i::num], layout) for i in range(num)]


def frozen(model, num_columns=None, name="teacher"):
    return FrozenModel(FrozenScorer(Policy(copy.deepcopy(model)), num_columns), CPU, name)


def whole_log_probs(model, row, columns=None):
    """[n, V] fp64: log-probabilities at each response token."""
    ids = torch.tensor([row.prompt + row.response])
    logits = model.double()(ids).logits[0, len(row.prompt) - 1 : -1, :columns] / TEMPERATURE
    return logits.log_softmax(-1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_are_those_of_whole_logits(layout):
    model, rows = tiny_model(1, bias=True), make_rows()
    (found,) = frozen(model).logprobs(batches_of(rows, layout), PLAIN, TEMPERATURE)
    expected = [whole_log_probs(model, row).gather(1, torch.tensor(row.response)[:, None])[:, 0] for row in rows]
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_longer_vocabulary_counts_as_far_as_the_policys():
    model, rows = tiny_model(1, vocabulary=VOCABULARY + 3, bias=True), make_rows()
    (found,) = frozen(model, VOCABULARY).logprobs(batches_of(rows), PLAIN, TEMPERATURE)
    expected = [
        whole_log_probs(model, row, VOCABULARY).gather(1, torch.tensor(row.response)[:, None])[:, 0] for row in rows
    ]
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_token_beyond_its_vocabulary_is_refused():
    target = frozen(tiny_model(1, vocabulary=40), VOCABULARY)
    with pytest.raises(ModelError, match=r"teacher: its vocabulary has 40 entries, but token \d+ was sampled"):
        target.logprobs(batches_of(make_rows()), PLAIN, TEMPERATURE)


def gradients(loss, policy):
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.double().clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def fused(policy, batches, spec=PLAIN):
    outputs = [policy(batch, spec, TEMPERATURE) for batch in batches]
    loss = sum(output.loss_sum for output in outputs)
    return float(loss.detach()), gradients(loss, policy), outputs


def by_hand(student, rows, kl_of):
    """(loss, gradients) in float64 of sum_t weight_t kl_of(row's [n, V] log p, row's number)."""
    model = copy.deepcopy(student).double()
    loss = sum((row.token_weight * kl_of(whole_log_probs(model, row), i)).sum() for i, row in enumerate(rows))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    for name, gradient in expected[1].items():
        error = float((found[1][name] - gradient).abs().max() / gradient.abs().max())
        assert error < 2e-5, f"{name}: off by {error:.1e} of its largest"


@pytest.mark.parametrize(("layout", "num"), [("padded", 1), ("packed", 2), ("shared", 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_exact_divergence_is_that_of_float64_autograd(layout, num, masked):
    """Against a wider teacher with a longer vocabulary; the coefficient, token weights and the mask of a response count."""
    student, teacher = tiny_model(1), tiny_model(2, vocabulary=VOCABULARY + 3, width=48)
    rows, coef, dropped = make_rows(), 0.3, 1
    target = frozen(teacher, VOCABULARY)
    batches = batches_of(rows, layout, num)
    for batch in batches:
        batch.divergence = HeadDivergence(target, coef)
        if masked:
            batch.kl_weight_N = (batch.index_B[batch.sequence_N] != dropped).float()

    def kl_of(log_p, number):
        log_q = whole_log_probs(teacher, rows[number], VOCABULARY).detach()
        kept = 0.0 if masked and number == dropped else coef
        return kept * (log_p.exp() * (log_p - log_q)).sum(-1)

    loss, grads, outputs = fused(Policy(copy.deepcopy(student)), batches)
    assert_same((loss, grads), by_hand(student, rows, kl_of))
    reported = sum(float((o.kl * b.token_weight_N).sum()) for o, b in zip(outputs, batches, strict=True))
    assert reported * coef == pytest.approx(loss, rel=1e-5)


def test_the_top_k_divergence_puts_the_rest_into_one_token():
    student, teacher, rows, k = tiny_model(1), tiny_model(2), make_rows(), 5
    (batch,) = batches_of(rows)
    batch.divergence = HeadDivergence(frozen(teacher), 1.0, top_k=k)

    def kl_of(log_p, number):
        log_q, ids = whole_log_probs(teacher, rows[number]).detach().topk(k)
        log_p = log_p.gather(1, ids)
        rest_p, rest_q = 1 - log_p.exp().sum(-1), 1 - log_q.exp().sum(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()

    assert_same(fused(Policy(copy.deepcopy(student)), [batch])[:2], by_hand(student, rows, kl_of))


def test_the_largest_are_found_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr("fastreason.frozen.CHUNK_BYTES", 4 * 20 * 3)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 8), torch.randn(20, 8), torch.randn(20)
    ids, logp = largest(hidden, weight, bias, 0.5, 4)
    expected = ((hidden @ weight.T + bias) / 0.5).log_softmax(-1).topk(4)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(logp, expected.values)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_largest_of_bf16_weights_are_as_good_as_fp32_products(monkeypatch, with_bias):
    """Rounded to bf16, logits of this size would be off by some hundredths, and the likeliest tokens be others."""
    monkeypatch.setattr("fastreason.frozen.CHUNK_BYTES", 4 * 3000 * 5)
    torch.manual_seed(0)
    weight = (torch.randn(3000, 64) * 2).bfloat16()
    hidden, bias = torch.randn(12, 64).bfloat16(), torch.randn(3000).bfloat16() if with_bias else None

    def whole(dtype):
        logits = torch.nn.functional.linear(*(None if x is None else x.to(dtype) for x in (hidden, weight, bias)))
        return (logits / 0.7).log_softmax(-1)

    ids, logp = largest(hidden, weight, bias, 0.7, 8)
    expected = whole(torch.float64).topk(8)
    assert logp.dtype == torch.float32 and torch.equal(ids, expected.indices)
    eager = whole(torch.float32).gather(1, ids)
    assert_no_worse("top-k logp", logp, eager, expected.values, dtype=torch.float32)


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_a_masked_estimator_is_that_of_float64_autograd(kl):
    """The policy's own term on every token, the KL on those of three responses of four, and not on the token 9."""
    student, teacher, rows, coef = tiny_model(1), tiny_model(2), make_rows(advantage=0.5), 0.4
    rows[0].response[0] = 9
    (batch,) = batches_of(rows)
    (batch.ref_logp_N,) = frozen(teacher).logprobs([batch], PLAIN, TEMPERATURE)
    batch.kl_weight_N = ((batch.index_B[batch.sequence_N] != 2) & (batch.ids_N != 9)).float()

    def kl_of(log_p, number):
        ids = torch.tensor(rows[number].response)[:, None]
        r = (whole_log_probs(teacher, rows[number]).detach().gather(1, ids) - log_p.gather(1, ids))[:, 0]
        value = r.square() / 2 if kl == "k2" else r.exp() - r - 1
        kept = (ids[:, 0] != 9) & (number != 2)
        return -0.5 * log_p.gather(1, ids)[:, 0] + coef * value * kept

    spec = PolicyLossSpec(ratio="none", kl=kl, kl_coef=coef)
    loss, grads, (output,) = fused(Policy(copy.deepcopy(student)), [batch], spec)
    assert_same((loss, grads), by_hand(student, rows, kl_of))
    assert not output.kl[batch.kl_weight_N == 0].any() and output.kl[batch.kl_weight_N == 1].all()


@pytest.mark.parametrize("kl", ["k2", "k3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teacher_that_is_the_student_has_exactly_no_gradient(kl, layout):
    student, rows = tiny_model(1), make_rows()
    spec = PolicyLossSpec(ratio="token", kl=kl, kl_coef=0.7)
    batches = batches_of(rows, layout, 2)
    for batch in batches:
        batch.behaviour_logp_N = batch.sampler_logp_N
    for batch, ref in zip(batches, frozen(student).logprobs(batches, spec, TEMPERATURE), strict=True):
        batch.ref_logp_N = ref
    policy = Policy(student)
    loss, grads, _ = fused(policy, batches, spec)
    assert loss == 0.0 and not any(bool(g.any()) for g in grads.values())
    # And it would show: the same with another teacher.
    for batch in batches:
        batch.ref_logp_N = batch.ref_logp_N + 0.1
    assert any(bool(g.any()) for g in fused(policy, batches, spec)[1].values())


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_head_that_is_the_students_own_has_no_divergence(top_k):
    student = tiny_model(1)
    (batch,) = batches_of(make_rows())
    batch.divergence = HeadDivergence(frozen(student), 1.0, top_k)
    loss, grads, _ = fused(Policy(student), [batch])
    assert abs(loss) < 1e-6 and max(float(g.abs().max()) for g in grads.values()) < 1e-4


def test_nothing_of_a_frozen_model_is_trained():
    student, teacher = tiny_model(1), tiny_model(2)
    scorer = FrozenScorer(Policy(teacher))
    (batch,) = batches_of(make_rows())
    batch.divergence = HeadDivergence(FrozenModel(scorer, CPU), 1.0)
    fused(Policy(student), [batch])
    assert not scorer.training
    assert all(p.grad is None and not p.requires_grad for p in scorer.parameters())
