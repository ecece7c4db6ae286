"""The model behind the fused head: what is chosen where, what is refused, and that no choice changes the numbers."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fastreason_kernels import PolicyLossSpec, importance_weight
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from fastreason.config import ModelConfig
from fastreason.errors import ConfigError, ModelError
from fastreason.packing import Row, collate
from fastreason.policy import (
    SHORT_LINE,
    FusedHead,
    apply_liger,
    choose_attention,
    choose_layout,
    choose_liger,
    load_policy,
    score_batch,
    without_dropout,
)

SPEC = PolicyLossSpec(clip_low=0.2, clip_high=0.2)


@pytest.mark.parametrize(
    ("wanted", "device", "flash", "line_tokens", "chosen"),
    [
        ("auto", "cuda", True, 100, "flash_attention_2"),
        ("auto", "cuda", False, 100, "sdpa"),
        ("auto", "cpu", True, SHORT_LINE, "eager"),
        ("auto", "cpu", True, SHORT_LINE + 1, "sdpa"),
        ("sdpa", "cpu", True, 100, "sdpa"),
        ("eager", "cpu", False, 5000, "eager"),
        ("flash_attention_2", "cuda", True, 100, "flash_attention_2"),
    ],
)
def test_attention(wanted, device, flash, line_tokens, chosen):
    assert choose_attention(wanted, device, flash, line_tokens) == chosen


@pytest.mark.parametrize(("device", "flash"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_flash_attention_that_cannot_be_had_is_refused(device, flash):
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=flash_attention_2: .* Use auto or sdpa"):
        choose_attention("flash_attention_2", device, flash, 100)


@pytest.mark.parametrize(
    ("wanted", "attention", "device", "layout"),
    [
        ("auto", "sdpa", "cpu", "shared"),
        ("auto", "sdpa", "cuda", "padded"),
        ("auto", "flash_attention_2", "cuda", "packed"),
        ("on", "sdpa", "cuda", "shared"),
        ("on", "eager", "cpu", "shared"),
        ("off", "sdpa", "cpu", "padded"),
        ("off", "flash_attention_2", "cuda", "packed"),
    ],
)
def test_layout(wanted, attention, device, layout):
    assert choose_layout(wanted, attention, device) == layout


def test_sharing_prompts_with_flash_attention_is_refused():
    with pytest.raises(ConfigError, match=r"train\.share_prompts=on: flash-attn takes no mask"):
        choose_layout("on", "flash_attention_2", "cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "installed", "chosen"),
    [
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("auto", "cpu", True, False),
        ("on", "cuda", True, True),
        ("off", "cuda", True, False),
        ("off", "cpu", False, False),
    ],
)
def test_liger(wanted, device, installed, chosen):
    assert choose_liger(wanted, device, installed) is chosen


@pytest.mark.parametrize(("device", "installed"), [("cpu", True), ("cuda", False)])
def test_liger_that_cannot_be_had_is_refused(device, installed):
    with pytest.raises(ConfigError, match=r"model\.liger=on: .* Use auto or off"):
        choose_liger("on", device, installed)


def save_model(folder, tied=True, **keys):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    if keys:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def load(folder, attention="sdpa", liger=False, **keys):
    return load_policy(folder, ModelConfig(path=str(folder), dtype="float32", **keys), "cpu", attention, liger)


def example():
    rows = [
        Row([1, 2, 3], [4, 5, 6, 7], [-4.0, -4.5, -5.0, -4.0], 1.0),
        Row([1, 2, 3], [8, 9], [-4.2, -4.4], -0.7),
    ]
    return collate([[rows[0]], [rows[1]]], "padded")


def gradients(policy):
    policy.zero_grad()
    policy(example(), SPEC, 1.0).loss_sum.backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_log_probabilities_are_those_of_the_loaded_model(tmp_path, tied):
    folder = save_model(tmp_path / "m", tied)
    policy = load(folder)
    batch = example()
    logp_N, entropy_N, _ = policy(batch, None, 0.5)
    whole = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for ids, expected, first in (([1, 2, 3, 4, 5, 6, 7], logp_N[:4], 0), ([1, 2, 3, 8, 9], logp_N[4:], 4)):
        log_probs_TV = (whole(torch.tensor([ids])).logits[0] / 0.5).log_softmax(-1)[2:-1]
        picked = log_probs_TV.gather(1, torch.tensor(ids[3:])[:, None]).squeeze(1)
        torch.testing.assert_close(expected.double(), picked, rtol=1e-5, atol=1e-5)
        entropy = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
        torch.testing.assert_close(entropy_N[first : first + len(entropy)].double(), entropy, rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_the_embedding_and_is_named_once(tmp_path):
    policy = load(save_model(tmp_path / "m", tied=True))
    names = [name for name, _ in policy.model.named_parameters()]
    assert policy.head.weight is policy.model.get_input_embeddings().weight
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    # Token 50 occurs nowhere in the input: only the head's part of the gradient reaches its embedding.
    assert gradients(policy)["model.embed_tokens.weight"][50].any()


def test_a_head_of_its_own_keeps_its_name(tmp_path):
    policy = load(save_model(tmp_path / "m", tied=False))
    assert isinstance(policy.model.lm_head, FusedHead)
    assert "lm_head.weight" in dict(policy.model.named_parameters())
    both = gradients(policy)
    assert both["lm_head.weight"][50].any() and not both["model.embed_tokens.weight"][50].any()


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    folder = save_model(tmp_path / "m")
    plain, checkpointed = load(folder), load(folder, gradient_checkpointing=True)
    assert checkpointed.model.is_gradient_checkpointing and not plain.model.is_gradient_checkpointing
    expected = gradients(plain)
    for name, gradient in gradients(checkpointed).items():
        assert torch.equal(gradient, expected[name]), name
        assert gradient.any(), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_with_dropout_is_trained_without_and_its_ratio_before_any_change_is_1(tmp_path, attention, caplog):
    caplog.set_level("INFO")
    folder = save_model(tmp_path / "m", attention_dropout=0.1)
    policy = load(folder, attention)
    assert policy.training and "is trained without its dropout: attention_dropout=0.1" in caplog.text
    batch = example()
    with torch.no_grad():
        before_N = policy(score_batch(batch), SPEC, 1.0).logp
    output = policy(replace(batch, behaviour_logp_N=before_N), SPEC, 1.0)
    assert torch.equal(output.logp, before_N) and bool((output.ratio == 1).all())
    # What is saved of it keeps its own config.
    assert json.loads((folder / "config.json").read_text())["attention_dropout"] == 0.1


def test_dropout_of_modules_and_of_a_config_within_a_config_is_found_too(tmp_path, caplog):
    caplog.set_level("INFO")
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.2)).save_pretrained(tmp_path / "m")
    policy = load(tmp_path / "m", "eager")
    assert {module.p for module in policy.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert "resid_pdrop=0.2" in caplog.text and "embd_pdrop=0.1" in caplog.text
    outer = PretrainedConfig()
    outer.text_config = LlamaConfig(attention_dropout=0.3)
    outer.drop_path_rate, outer.token_drop, outer.use_dropout = 0.25, "random", True
    assert sorted(without_dropout(outer)) == ["attention_dropout=0.3", "drop_path_rate=0.25"]
    assert (outer.text_config.attention_dropout, outer.drop_path_rate, outer.use_dropout) == (0.0, 0.0, True)


def test_a_folder_without_weights_names_the_key(tmp_path):
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.path: .* cannot be loaded by transformers"):
        load(folder)


@pytest.mark.parametrize("has_behaviour", [True, False])
@pytest.mark.parametrize("weight", ["none", "ratio"])
@pytest.mark.parametrize("level", [None, "token", "sequence"])
def test_a_kl_term_that_acts_on_some_tokens_weighs_them_as_one_that_acts_on_all(tmp_path, level, weight, has_behaviour):
    """The weight of a sequence is that of its whole, silent tokens included."""
    policy, batch = load(save_model(tmp_path / "m")).double(), example()
    logp_N = policy(batch, None, 1.0)[0].detach()
    batch.ref_logp_N = logp_N + torch.tensor([0.5, -0.3, 0.2, 0.6, -0.4, 0.1])
    # Importance weights of 1.25 and less, which the bound below reaches in the first response.
    batch.sampler_logp_N = logp_N - torch.tensor([0.4, 0.1, -0.1, 0.2, -0.3, 0.1])
    if has_behaviour:
        batch.behaviour_logp_N = logp_N - torch.tensor([0.3, -0.2, 0.1, 0.0, 0.2, -0.1])
    importance = {} if level is None else {"importance": "truncate", "importance_level": level, "importance_cap": 1.25}
    spec = PolicyLossSpec(kl="k2", kl_coef=0.5, kl_weight=weight, **importance)

    def found(kl_weight):
        policy.zero_grad()
        output = policy(replace(batch, kl_weight_N=kl_weight), spec, 1.0)
        output.loss_sum.backward()
        return output, {name: p.grad.clone() for name, p in policy.model.named_parameters()}

    (whole, expected), (masked, made) = found(None), found(torch.ones(6))
    torch.testing.assert_close(masked.loss_sum, whole.loss_sum, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked.kl, whole.kl, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-4, atol=1e-6)

    v_N = torch.ones(6)
    if weight == "ratio":
        known = batch.behaviour_logp_N if has_behaviour else logp_N
        w_N, bounded_N = importance_weight(known, batch.sampler_logp_N, spec, sequence_ids=batch.sequence_N)
        assert bool(bounded_N.any()) is (level is not None)
        v_N = w_N * (logp_N - known).exp()
    silent = torch.tensor([1, 4])
    kept_N = torch.ones(6).index_fill(0, silent, 0.0)
    some, _ = found(kept_N)
    missing = float((0.5 * v_N * whole.kl)[silent].sum())
    assert missing > 0.01
    torch.testing.assert_close(some.loss_sum, whole.loss_sum - missing, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.kl, whole.kl * kept_N, rtol=1e-5, atol=1e-6)


@pytest.fixture
def liger_calls(monkeypatch):
    """liger-kernel's table of patches, with one model type that writes down how it was called."""
    calls = []
    module = ModuleType("liger_kernel.transformers.monkey_patch")

    def llama(rope, rms_norm, swiglu, cross_entropy, fused_linear_cross_entropy, model):
        calls.append(locals())

    def gemma(rope, rms_norm, geglu, cross_entropy, fused_linear_cross_entropy, model):
        calls.append(locals())

    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": llama, "gemma": gemma}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_liger_patches_everything_but_the_head_and_the_loss(tmp_path, liger_calls):
    load(save_model(tmp_path / "m"), liger=True)
    apply_liger(SimpleNamespace(config=SimpleNamespace(model_type="gemma")))
    llama, gemma = ({k: v for k, v in call.items() if k not in ("calls", "model")} for call in liger_calls)
    assert isinstance(liger_calls[0]["model"], LlamaForCausalLM)
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert llama == {"rope": True, "rms_norm": True, "swiglu": True, **losses}
    assert gemma == {"rope": True, "rms_norm": True, "geglu": True, **losses}


def test_liger_is_left_alone_where_it_was_not_chosen_or_knows_no_such_model(tmp_path, liger_calls):
    load(save_model(tmp_path / "m"), liger=False)
    assert apply_liger(SimpleNamespace(config=SimpleNamespace(model_type="unheard_of"))) is False
    assert liger_calls == []


def test_the_patches_that_liger_has_take_these_arguments():
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch", reason="liger-kernel is not installed here")
    import inspect

    for kind, mlp in (("llama", "swiglu"), ("qwen2", "swiglu"), ("qwen3", "swiglu"), ("gemma2", "geglu")):
        names = inspect.signature(patches.MODEL_TYPE_TO_APPLY_LIGER_FN[kind]).parameters
        assert {"rope", "rms_norm", mlp, "cross_entropy", "fused_linear_cross_entropy", "model"} <= set(names)
