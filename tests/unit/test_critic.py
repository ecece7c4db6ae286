"""The critic: its model, its loss by hand and against autograd, what is said of its fit."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastreason.critic import ValueModel, fit_figures, value_loss
from fastreason.packing import Row, collate
from fastreason.ranks import Ranks
from fastreason.update.updater import UpdateResult


def tiny_model(tied=False):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def example(layout="padded"):
    rows = [Row([1, 2, 3], [4, 5, 6], [-1.0] * 3, 1.0), Row([1, 2, 3], [7, 8], [-1.0] * 2, -1.0)]
    units = [rows] if layout == "shared" else [[row] for row in rows]
    return collate(units, layout)


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_values_are_zero_and_the_lm_head_is_gone(tied):
    critic = ValueModel(tiny_model(tied))
    values = critic(example())
    assert values.shape == (5,) and values.dtype == torch.float32 and not values.any()
    names = [name for name, _ in critic.named_parameters()]
    assert not any("lm_head" in name for name in names)
    assert {"head.weight", "head.bias"} <= set(names)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_value_is_that_of_the_state_before_its_token(layout):
    """A linear map of the last hidden state of everything before the token, and of nothing after."""
    model = tiny_model()
    critic = ValueModel(copy.deepcopy(model))
    with torch.no_grad():
        critic.head.weight.normal_()
        critic.head.bias.fill_(0.5)
    found = critic(example(layout))
    expected = []
    for response in ([4, 5, 6], [7, 8]):
        for place in range(len(response)):
            state = model.model(torch.tensor([[1, 2, 3, *response[:place]]])).last_hidden_state[0, -1]
            expected.append(critic.head.weight[0] @ state + 0.5)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_every_parameter_of_the_critic_learns():
    critic = ValueModel(tiny_model())
    with torch.no_grad():
        critic.head.weight.normal_()
    critic(example()).sum().backward()
    assert [name for name, p in critic.named_parameters() if p.grad is None or not p.grad.any()] == []


def fitted(values, returns, weights=None):
    batch = collate([[Row([1], [2] * len(values), [-1.0] * len(values), 1.0)]], "padded")
    batch.values_N, batch.returns_N = torch.tensor(values), torch.tensor(returns)
    if weights is not None:
        batch.token_weight_N = torch.tensor(weights)
    return batch


def test_the_clipped_loss_by_hand():
    """V_old = 0 and R = 1 (or -1): the larger error of V and of V within 0.2 of V_old; the last token weighs nothing."""
    batch = fitted([0.0] * 5, [1.0, 1.0, -1.0, 1.0, 9.0], [0.5, 1.0, 1.0, 1.0, 0.0])
    values = torch.tensor([0.1, 0.5, 0.5, 1.5, 0.0], requires_grad=True)
    loss = value_loss(values, batch, 0.2)
    # 0.9^2; clipped to 0.2: 0.8^2; -1.5 unclipped; clipped again: 0.8^2.
    assert loss.item() == pytest.approx((0.81 + 0.64 + 2.25 + 0.64) / 2)
    loss.backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, 1.5, 0.0, 0.0])
    assert float(value_loss(values.detach(), batch, None)) == pytest.approx((0.81 + 0.25 + 2.25 + 0.25) / 2)


def test_how_much_of_the_returns_is_explained():
    batches = [fitted([0.0, 1.0], [0.0, 2.0]), fitted([1.0, 5.0], [4.0, 5.0], [1.0, 0.0])]
    results = [UpdateResult([], 0.5, 1.0, 1e-5, True), UpdateResult([], 0.25, 3.0, 1e-5, True)]
    figures = fit_figures(results, batches, Ranks())
    returns, errors = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 3.0])
    assert figures["critic/explained_variance"] == pytest.approx(1 - float(errors.var() / returns.var()))
    assert figures["critic/value_mean"] == pytest.approx(2 / 3)
    assert (figures["critic/loss"], figures["critic/grad_norm"]) == (0.375, 2.0)
    same = fit_figures(results, [fitted([0.0, 1.0], [1.0, 1.0])], Ranks())
    assert same["critic/explained_variance"] == 0.0
