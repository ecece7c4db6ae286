"""Adapters: which layers get one, what is published of them against peft's own merge, and the model as it was without one."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastreason import lora as module
from fastreason.algorithms import resolve_algorithm
from fastreason.config import LoraConfig, ModelConfig, load_config
from fastreason.errors import ConfigError
from fastreason.frozen import AdapterOff, FrozenModel, HeadDivergence, load_frozen
from fastreason.lora import adapter_off, adapter_weights, check_lora, merged_weights, save_adapter
from fastreason.losses import LOSSES
from fastreason.packing import Row, collate
from fastreason.policy import load_policy
from fastreason.preflight import check_reference
from fastreason.update.dither import spread

SPEC, CPU = LOSSES["clip"], torch.device("cpu")
BODY = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def save_model(folder, tied=False, dtype=torch.float32):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def load(folder, dtype="float32", moved=True, **keys):
    """A policy with an adapter, whose product is not 0 any more."""
    torch.manual_seed(4)
    config = LoraConfig(**{"rank": 4, "alpha": 6.0, **keys})
    policy = load_policy(folder, ModelConfig(path=str(folder), dtype=dtype), "cpu", "sdpa", False, config)
    for name, parameter in policy.named_parameters():
        if moved and ("lora_B" in name or "lora_b" in name):
            torch.nn.init.normal_(parameter, std=0.05)
    return policy


def example():
    rows = [
        Row([1, 2, 3], [4, 5, 6, 7], [-4.0, -4.5, -5.0, -4.0], 1.0),
        Row([1, 2, 3], [8, 9], [-4.2, -4.4], -0.7),
    ]
    return collate([[row] for row in rows], "padded")


def made(weights):
    return {weight.name: weight.make().clone() for weight in weights}


def by_peft(policy, folder, tmp_path, dtype=torch.float32):
    """The weights that peft itself merges, from the folders of the model and of the adapter."""
    save_adapter(made(adapter_weights(policy.model)).items(), policy.model, str(folder), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    whole = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False).merge_and_unload()
    state = whole.state_dict()
    if whole.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize(
    ("tied", "keys"), [(True, {}), (False, {"head": True}), (False, {"targets": ["q_proj", "up_proj"]})]
)
def test_what_is_published_is_what_peft_merges_to_the_last_bit(tmp_path, tied, keys):
    folder = save_model(tmp_path / "m", tied)
    policy = load(folder, **keys)
    before = made(merged_weights(policy.model))
    expected = by_peft(policy, folder, tmp_path)
    assert list(before) == list(load_file(folder / "model.safetensors")) or set(before) == set(expected)
    assert set(before) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(before[name], tensor), name
    start = load_file(folder / "model.safetensors")
    wanted = set(keys.get("targets", BODY)) | ({"lm_head"} if keys.get("head") else set())
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, start[name])}
    assert {name.split(".")[-2] for name in changed} == wanted
    # Making them has left the trainer's own weights alone.
    again = made(merged_weights(policy.model))
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())


def test_in_bf16_it_is_peft_s_merge_but_for_one_rounding(tmp_path):
    folder = save_model(tmp_path / "m", dtype=torch.bfloat16)
    policy = load(folder, "bfloat16", head=True)
    found, expected = made(merged_weights(policy.model)), by_peft(policy, folder, tmp_path, torch.bfloat16)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        # peft rounds the product before it adds it: at most half a unit of each, and the sum may then fall to the neighbour.
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2**-7, atol=2**-9, msg=name)


def test_a_young_adapter_reaches_bf16_weights(tmp_path):
    """A product of a tenth of what bf16 resolves: mostly rounded away without the dither, there in the mean with it."""
    folder = save_model(tmp_path / "m", dtype=torch.bfloat16)
    policy, start = load(folder, "bfloat16", moved=False), load_file(folder / "model.safetensors")
    assert all(torch.equal(t, start[name]) for name, t in made(merged_weights(policy.model, spread)).items())
    with torch.no_grad():
        for layer in filter(module.is_adapted, policy.model.modules()):
            a, b, _ = module.factors(layer)
            a.fill_(0.25)
            b.fill_(5e-5)  # x 4 x 1.5: 7.5e-5, while weights of 0.1 to 0.2 are 4.9e-4 to 9.8e-4 apart
    found = {how: made(merged_weights(policy.model, how)) for how in (None, spread)}
    moved = {
        how: torch.cat([(state[n].float() - t.float()).flatten() for n, t in start.items() if "proj" in n])
        .mean()
        .item()
        for how, state in found.items()
    }
    assert moved[spread] == pytest.approx(7.5e-5, rel=0.1) and moved[None] < 2e-5
    again = made(merged_weights(policy.model, spread))
    assert all(torch.equal(tensor, again[name]) for name, tensor in found[spread].items())


@pytest.mark.parametrize("head", [False, True])
def test_the_adapter_alone_has_a_gradient_and_it_is_that_of_the_merged_weights(tmp_path, head):
    """d loss / d b = scale (d loss / d W) a', and likewise of a."""
    policy = load(save_model(tmp_path / "m"), head=head)
    policy(example(), SPEC, 0.7).loss_sum.backward()
    with_gradient = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in policy.named_parameters() if "lora_" in name and p.grad.any()}
    assert len(with_gradient) == 2 * (2 * len(BODY) + head)

    plain = load_policy(tmp_path / "m", ModelConfig(path="m", dtype="float32"), "cpu", "sdpa", False)
    plain.model.load_state_dict(made(merged_weights(policy.model)))
    plain(example(), SPEC, 0.7).loss_sum.backward()
    whole = {name: p.grad for name, p in plain.model.named_parameters()}
    pairs = {name: module.factors(layer) for name, layer in policy.model.named_modules() if module.is_adapted(layer)}
    for name, (a, b, scale) in {**pairs, **dict(module.head_pairs(policy.model))}.items():
        expected = whole[f"{name}.weight"]
        torch.testing.assert_close(b.grad, scale * expected @ a.T, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(a.grad, scale * b.T @ expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("head", [False, True])
def test_without_its_adapter_it_is_the_model_that_it_began_as(tmp_path, head):
    folder, batch = save_model(tmp_path / "m"), example()
    policy = load(folder, head=head)
    reference = FrozenModel(load_frozen(folder, ModelConfig(path="m", dtype="float32"), CPU, "sdpa", False), CPU)
    target = FrozenModel(AdapterOff(policy), CPU)
    (expected,), (found,) = (model.logprobs([batch], SPEC, 0.7) for model in (reference, target))
    assert torch.equal(found, expected)
    assert not torch.equal(policy(batch, SPEC, 0.7).logp, expected)
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())
    # The divergence is taken amid the forward of the policy, whose gradients must not notice.
    outputs = []
    for model in (reference, target):
        policy.zero_grad()
        batch.divergence = HeadDivergence(model, 0.5)
        output = policy(batch, SPEC, 0.7)
        output.loss_sum.backward()
        outputs.append((output.loss_sum.detach(), output.kl, [p.grad for p in policy.parameters() if p.requires_grad]))
    assert outputs[0][1].min() > 1e-4, "the policy is the reference: the test shows nothing"
    for one, other in zip(*outputs, strict=True):
        for a, b in zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]:
            assert torch.equal(a, b)


def test_before_any_update_the_policy_is_the_model(tmp_path):
    policy = load(save_model(tmp_path / "m"), moved=False, head=True)
    start = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(tensor, start[name]) for name, tensor in made(merged_weights(policy.model)).items())
    with adapter_off(policy):
        off = policy(example(), SPEC, 1.0).logp
    assert torch.equal(policy(example(), SPEC, 1.0).logp, off)


def check(folder, **keys):
    check_lora(LoraConfig(**keys), ModelConfig(path=str(folder)), folder)


def test_what_cannot_be_had_is_refused_before_anything_loads(tmp_path, monkeypatch):
    tied, untied = save_model(tmp_path / "tied", tied=True), save_model(tmp_path / "untied")
    for folder in (tied, untied):
        (folder / "model.safetensors").unlink()  # nothing is loaded
        check(folder, rank=4, targets=["q_proj", "up_proj"])
    check(untied, rank=4, head=True)
    with pytest.raises(ConfigError, match=r"lora\.head=true: the head of the model of model\.path is its embedding"):
        check(tied, rank=4, head=True)
    with pytest.raises(
        ConfigError, match=r"no linear layer c_attn or lm_head; it has: down_proj, .*use lora\.head=true"
    ):
        check(untied, rank=4, targets=["q_proj", "c_attn", "lm_head"])
    with pytest.raises(ConfigError, match=r"lora\.alpha=8\.0: has no effect without lora\.rank\. Set that too"):
        check(None, alpha=8.0)
    check(None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lora\.rank=4: peft is not installed.*fastreason\[lora\]"):
        check(None, rank=4)


def test_a_divergence_from_the_start_is_refused_where_weights_are_divided(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {path: m}\ndata: {task: chain_sum}\ntrain: {steps: 1, prompts_per_step: 1}\nalgorithm: {kl_coef: 0.1}\n"
    )
    for estimator, stage in (("exact", 3), ("exact", 2), ("k2", 3)):
        config = load_config(
            tmp_path / "c.yaml", ["lora.rank=4", f"algorithm.kl={estimator}", f"train.zero_stage={stage}"]
        )
        if (estimator, stage) == ("exact", 3):
            with pytest.raises(
                ConfigError, match=r"algorithm\.kl=exact with lora\.rank=4 and train\.zero_stage=3.*Use train"
            ):
                check_reference(resolve_algorithm(config), config)
        else:
            check_reference(resolve_algorithm(config), config)


@pytest.mark.parametrize("wrong", ["rank=0", "alpha=0", "targets=[]", "dropout=0.1"])
def test_wrong_values_are_named_with_their_key(tmp_path, wrong):
    (tmp_path / "c.yaml").write_text(
        "model: {path: m}\ndata: {task: chain_sum}\ntrain: {steps: 1, prompts_per_step: 1}\n"
    )
    with pytest.raises(ConfigError, match=rf"lora\.{wrong.split('=')[0]}"):
        load_config(tmp_path / "c.yaml", ["lora.rank=4", f"lora.{wrong}"])


def test_an_adapters_folder_names_its_model_and_replaces_the_one_before(tmp_path):
    folder = save_model(tmp_path / "m")
    policy, target = load(folder, targets=["v_proj"]), tmp_path / "adapter"
    target.mkdir()
    (target / "old").touch()
    save_adapter(made(adapter_weights(policy.model)).items(), policy.model, "nobody/model", target)
    settings = json.loads((target / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"], settings["lora_alpha"]) == ("nobody/model", 4, 6.0)
    assert settings["inference_mode"] and settings["target_modules"] == ["v_proj"] and settings["lora_dropout"] == 0.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "m"] and not (target / "old").exists()
    assert sorted(load_file(target / "adapter_model.safetensors")) == [
        f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_{factor}.weight"
        for layer in (0, 1)
        for factor in "AB"
    ]
