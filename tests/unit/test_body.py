"""Bodies that see no padding: the states and gradients of padded lines, from the real tokens alone."""

import sys

import pytest
import torch
from test_families import FAMILIES, load, save_family

from fastreason.body import BASES, PREFIX, enable_unpadded, response_states
from fastreason.packing import Row, collate, units_of

ROWS = [
    Row([3, 1, 4, 1], [5, 9, 2, 6, 5], [-4.0] * 5, 1.0, index=0),
    Row([3, 1, 4, 1], [3, 5], [-4.0] * 2, 1.0, index=1),
    Row([2, 7], [1, 8, 2, 8, 1, 8, 2, 8, 4], [-4.0] * 9, 1.0, index=2),
    Row([6], [2], [-4.0], 1.0, index=3),
]


def batch_of(layout):
    return collate(units_of(ROWS, layout), layout)


def states_and_gradients(model, batch):
    model.zero_grad()
    states_ND = response_states(model, batch)
    weights_ND = torch.linspace(-1, 1, states_ND.numel()).view_as(states_ND)
    (states_ND * weights_ND).sum().backward()
    return states_ND.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", BASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_real_tokens_alone_have_the_states_and_gradients_of_padded_lines(name, attention, tmp_path):
    model = load(save_family(name, tmp_path / name), attention).model
    used = model.config._attn_implementation
    assert used.startswith(PREFIX), "this family went back to padding"
    for layout in ("padded", "shared"):
        batch = batch_of(layout)
        assert batch.num_tokens < batch.input_ids_BL.numel()
        states_ND, gradients = states_and_gradients(model, batch)
        model.set_attn_implementation(used.removeprefix(PREFIX))
        padded_ND, padded_gradients = states_and_gradients(model, batch)
        model.set_attn_implementation(used)
        # fp32 sums of other shapes: each within a few roundings of 1.2e-7 of values and gradients up to some tens.
        torch.testing.assert_close(states_ND, padded_ND, rtol=1e-5, atol=2e-5)
        assert gradients.keys() == padded_gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, padded_gradients[key], rtol=1e-4, atol=2e-4, msg=key)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_no_layer_but_attention_sees_padding(layout, tmp_path):
    model = load(save_family("qwen2", tmp_path / "m")).model
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    batch = batch_of(layout)
    response_states(model, batch)
    assert seen == [batch.num_tokens] * 2


def test_gradient_checkpointing_computes_the_same_again(tmp_path):
    folder, batch = save_family("qwen3", tmp_path / "m"), batch_of("padded")
    _, expected = states_and_gradients(load(folder).model, batch)
    _, found = states_and_gradients(load(folder, gradient_checkpointing=True).model, batch)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=0, msg=key)


def test_a_model_that_does_not_tell_attention_of_the_lines_keeps_its_padding(tmp_path, monkeypatch):
    model = load(save_family("qwen2", tmp_path / "m")).model
    model.set_attn_implementation("sdpa")
    expected, _ = states_and_gradients(model, batch_of("padded"))
    attention = sys.modules[type(model).__module__].Qwen2Attention
    forward = attention.forward

    def deaf(self, *args, real_T=None, line_shape=None, **options):
        return forward(self, *args, **options)

    monkeypatch.setattr(attention, "forward", deaf)
    assert not enable_unpadded(model)
    assert model.config._attn_implementation == "sdpa"
    found, _ = states_and_gradients(model, batch_of("padded"))
    assert torch.equal(found, expected)


def test_layers_of_other_kinds_keep_their_padding(tmp_path):
    """They would pass the test of short lines, and differ on long ones."""
    model = load(save_family("qwen2", tmp_path / "m")).model
    model.set_attn_implementation("sdpa")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert not enable_unpadded(model) and model.config._attn_implementation == "sdpa"


def test_only_layers_with_a_window_are_given_a_mask_by_sdpa(tmp_path):
    model = load(save_family("gemma3", tmp_path / "m")).model
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, _, options: seen.append(options["attention_mask"].shape), with_kwargs=True
        )
    batch = batch_of("padded")
    width = batch.input_ids_BL.shape[1]
    response_states(model, batch)
    assert seen == [(1, 1, width, width), (1, 1, 1, 1)], "the layer without a window goes on with causal attention"


def test_attention_that_reads_rows_from_positions_is_left_as_it_is(tmp_path):
    model = load(save_family("qwen2", tmp_path / "m")).model
    model.config._attn_implementation = "flash_attention_2"
    assert not enable_unpadded(model)
