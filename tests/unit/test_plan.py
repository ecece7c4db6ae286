"""fastreason plan: the arithmetic by hand, against torch's own count of a real forward, and the words of the command."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from fastreason_kernels import gemm
from test_families import FAMILIES, SIZES
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastreason import preflight
from fastreason.cli import main
from fastreason.config import load_config
from fastreason.errors import ConfigError, ModelError
from fastreason.placement import Placement, place
from fastreason.plan import calibration, command, memory, sharing
from fastreason.plan.hardware import DEVICES, Device, Rates, changed_rates, named_device
from fastreason.plan.memory import GIB, Beside, TrainerSetup, engine_memory, layer_bytes, loss_bytes, trainer_memory
from fastreason.plan.shapes import GATED, SHAPES, UNGATED, Shape, named_shape, shape_of
from fastreason.plan.split import (
    SLACK,
    Layout,
    Plan,
    fewest,
    fitting_setup,
    in_turn,
    judge,
    needed_tensor_parallel,
    plan_gpus,
    totals,
)
from fastreason.plan.times import StepTimes, Workload, generation, publication, token_step, training, training_flops

ROOT = Path(__file__).resolve().parents[2]
# D 4, Q 4, K 2, F 8, V 10: a layer multiplies with 4 (2 4 + 2 2) + 3 4 8 = 144.
TOY = Shape("toy", 2, 4, 2, 1, 2, 8, 10, tied=False)
DEVICE = Device("toy", 1e9, 1000.0, 100.0, 50.0, 10.0, "a test", per_node=4)
EXACT = Rates(1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1e-6, 1e-6)
WORK = Workload(prompts=2, samples=4, prompt=6.0, response=10.0, longest=20, updates=2, micro_batch_tokens=40)


def test_the_parameters_are_those_that_were_published():
    published = {
        "smollm2-135m": 134_515_008,
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen2.5-7b": 7_615_616_512,
        "qwen2.5-32b": 32_763_876_352,
        "llama-3-8b": 8_030_261_248,
        "llama-3-70b": 70_553_706_496,
    }
    assert {name: shape.num_parameters for name, shape in SHAPES.items()} == published


def test_a_shape_by_hand():
    assert (TOY.layer_matrices, TOY.body_matrices, TOY.head_matrix) == (144, 288, 40)
    assert TOY.num_parameters == 2 * 40 + 288 + 2 * 8 + 4
    assert replace(TOY, qkv_bias=True, qk_norm=True, tied=True).num_parameters == 388 - 40 + 2 * (8 + 4)
    assert TOY.kv_bytes() == 2 * 2 * 2 * 2
    assert TOY.forward_flops(3, 5, 2) == 3 * (2 * 288 + 4 * 2 * 4 * 5) + 2 * 2 * 40


def built(kind, **keys):
    """(config.json, number of parameters) of a small model without its weights."""
    config = AutoConfig.for_model(kind, **{**SIZES, "initializer_range": 0.02, **keys})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # As published, without the library's own keys; and what is tied counts once.
    return json.loads(config.to_json_string()), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parameters_of_every_tested_family_are_those_of_its_model(name):
    kind, keys = FAMILIES[name]
    raw, number = built(getattr(transformers, kind).model_type, **keys)
    assert shape_of(raw, name).num_parameters == pytest.approx(number, rel=0.02)


@pytest.mark.parametrize("kind", [*GATED, *UNGATED])
def test_the_parameters_of_every_planned_family_are_those_of_its_model(kind):
    heads = {} if kind not in ("gpt_neox", "persimmon") else {"num_key_value_heads": 4}
    raw, number = built(kind, head_dim=8, **heads)
    assert shape_of(raw, kind).num_parameters == pytest.approx(number, rel=0.03)
    del raw["tie_word_embeddings"]  # published ones leave it out where it is the family's own
    assert shape_of(raw, kind).num_parameters == pytest.approx(number, rel=0.03)


def test_a_layer_without_a_gate_by_hand():
    bare = replace(TOY, gated=False)
    assert (bare.layer_matrices, bare.num_parameters) == (144 - 4 * 8, 388 - 2 * 4 * 8)
    assert layer_bytes(TOY, TrainerSetup()) - layer_bytes(bare, TrainerSetup()) == 2 * 8
    loose = TrainerSetup(fused=False)
    assert layer_bytes(TOY, loose) - layer_bytes(bare, loose) == 2 * 2 * 8
    layer = calibration.Layer(bare, torch.float32)
    assert sum(p.numel() for p in layer.parameters()) == bare.layer_matrices
    assert layer(torch.randn(calibration.LINE, 4)).shape == (calibration.LINE, 4)


def tiny_llama(**keys):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **keys))


def test_operations_are_those_that_torch_counts():
    """A forward and backward of a Llama, whose eager attention multiplies with all 16 tokens of a line."""
    model = tiny_llama()
    shape = shape_of(model.config.to_dict(), "tiny")
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    ids = torch.arange(32).view(2, 16)
    with FlopCounterMode(display=False) as counter:
        loss = model(ids).logits.sum()
    assert counter.get_total_flops() == shape.forward_flops(32, 16, 32)
    work = Workload(prompts=2, samples=1, prompt=0, response=16, longest=16)
    # The embedding's gradient is no product; seen is 16 there and 16 / 2, causal, here.
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    attention = 3 * 32 * 4 * shape.num_layers * shape.query_width * 8
    assert counter.get_total_flops() * 3 / 2 == training_flops(shape, TrainerSetup(), work) + attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_as_many_bytes_as_torch_saves(dtype):
    """Between two depths, so that head and embedding drop out."""
    sizes = []
    for layers in (1, 3):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="sdpa",
        )
        model = LlamaForCausalLM(config).to(dtype)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no address occurs twice
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = model(torch.arange(48)[None], use_cache=False).logits
        storages = {address: x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights}
        sizes.append(sum(storages.values()))
        assert output.requires_grad
    shape = shape_of(config.to_dict(), "tiny")
    expected = layer_bytes(shape, TrainerSetup(itemsize=dtype.itemsize, fused=False))
    assert (sizes[1] - sizes[0]) / 2 / 48 == pytest.approx(expected, rel=0.01)


def test_the_memory_of_a_rank_by_hand():
    def parts(**keys):
        return trainer_memory(TOY, TrainerSetup(**keys), 10, 5)

    # 388 parameters; buckets are never below a million elements.
    two = parts(ranks=4, zero_stage=2)
    assert two["weights"] == 776 and two["gradients"] == 388 and two["optimizer"] == 3 * 388
    assert two["buckets"] == 4e6
    one = parts(ranks=4, zero_stage=0)  # bf16 at stage 0 runs as stage 1
    assert one["weights"] == 776 and one["gradients"] == 6 * 388 and one["optimizer"] == 3 * 388
    three = parts(ranks=4, zero_stage=3)
    assert three["weights"] == 194 and (three["buckets"], three["gathered"]) == (4e6, 776)
    fp32 = parts(ranks=4, zero_stage=0, itemsize=4)
    assert [fp32[part] for part in ("weights", "gradients", "optimizer", "buckets")] == [1552, 1552, 8 * 388, 0]
    host = parts(zero_stage=2, offload=True)
    assert (host["weights"], host["gradients"], host["optimizer"], host["gathered"]) == (776, 0, 0, 0)
    assert parts(zero_stage=1, offload=True)["gradients"] == 2 * 388, "backward's own"
    host = parts(zero_stage=3, offload=True, offload_weights=True)
    assert (host["weights"], host["gradients"], host["optimizer"]) == (0, 0, 0)
    assert host["gathered"] == 776, "one rank too has them from elsewhere"
    # A layer and token: 2 (4 4 + 2 4 + 2 2 + 3 8) = 104.
    assert two["activations"] == 10 * 2 * 104
    assert parts(checkpointing=True)["activations"] == 10 * (2 * 2 * 4 + 104)
    assert parts(fused=False)["activations"] == 10 * 2 * (104 + 16 + 32)
    assert parts(scores=6)["activations"] == 10 * 2 * (104 + 2 * 2 * 2 * 6)
    # 4 5 10 of logits, 2 2 5 4 of states, 4 40 of the head.
    assert two["loss"] == 200 + 80 + 160
    assert parts(on_gpu=False)["loss"] == 200 + 80 + 80


def test_the_loss_holds_one_tile_of_logits_however_many_there_are():
    shape = SHAPES["qwen2.5-7b"]
    few, many = (loss_bytes(shape, TrainerSetup(), rows) for rows in (8192, 16384))
    assert many - few == 2 * 2 * 8192 * 3584


def test_the_constants_are_the_trainers_and_the_loss_librarys():
    assert (memory.LOGITS_BYTES_GPU, memory.LOGITS_BYTES_CPU) == (gemm.DEVICE_ROW_BYTES, gemm.CPU_ROW_BYTES)
    source = (ROOT / "fastreason" / "update" / "deepspeed.py").read_text()
    assert int(re.search(r"^MAX_BUCKET = (\w+)", source, re.M)[1]) == memory.MAX_BUCKET
    assert "num_parameters // 8" in source


def test_an_engine_fills_its_share_with_the_cache():
    device = replace(DEVICE, memory=100 * GIB)
    parts = engine_memory(TOY, device, replace(EXACT, memory_share=0.9, reserve_gib=4.0), 2)
    assert parts == {"weights": 388, "kv cache": pytest.approx(86 * GIB - 388)}


def test_a_token_step_by_hand():
    # Reads 776 + 3 7 16 = 1112 bytes at 100; 3 (576 + 4 2 4 7) + 3 80 = 2640 operations at 1000.
    assert token_step(TOY, DEVICE, EXACT, 3, 7) == pytest.approx(11.12)
    assert token_step(TOY, replace(DEVICE, flops=100.0), EXACT, 3, 7) == pytest.approx(26.4)
    assert token_step(TOY, DEVICE, replace(EXACT, decode_step_s=0.5), 3, 7) == pytest.approx(11.62)
    # Two GPUs: half of that, and 2 2 reductions of 2 2 3 4 / 2 bytes at 50.
    assert token_step(TOY, DEVICE, EXACT, 3, 7, 2) == pytest.approx(5.56 + 4 * (24 / 50 + 1e-5))


def test_generation_by_hand():
    """8 responses of 10 tokens on 2 engines, room for 2 at once each: 20 steps; of the last 10 half the places are empty."""
    kv_bytes = 2 * 16 * 16.0
    made = generation(TOY, DEVICE, EXACT, WORK, 2, 1, kv_bytes)
    full, half = (token_step(TOY, DEVICE, EXACT, running, 11) for running in (2, 1))
    prefill = TOY.forward_flops(6, 3, 1) / 1000
    assert made.concurrency == 2 and made.token_step_s == full
    assert made.steady_s == pytest.approx(prefill + 20 * full)
    assert made.batch_s == pytest.approx(prefill + 15 * full + 10 * half)


def test_a_step_trains_what_it_computes():
    assert (WORK.sequences, WORK.response_tokens, WORK.trained_tokens, WORK.seen) == (8, 80, 128, 8)
    shared = replace(WORK, shared_prompts=True)
    assert shared.trained_tokens == 2 * 6 + 80 and shared.line == 6 + 4 * 10
    assert shared.seen == pytest.approx((12 * 3 + 80 * 11) / 92)
    assert replace(WORK, computed=50.0).trained_tokens == 50
    assert (WORK.line, WORK.micro_batch(1), WORK.micro_batch(2), WORK.micro_batch(8)) == (26, 40, 32, 26)


def test_training_by_hand():
    one = TrainerSetup(ranks=1, zero_stage=1)
    body, head = 128 * (576 + 4 * 2 * 4 * 8), 80 * 80
    assert training_flops(TOY, one, WORK) == 3 * (body + head)
    assert training_flops(TOY, replace(one, checkpointing=True), WORK) == 4 * body + 3 * head
    adam = 2 * 30 * 388 / 100
    assert training(TOY, DEVICE, EXACT, WORK, one) == pytest.approx(3 * (body + head) / 1000 + adam)
    # Two ranks, two micro-batches each: stage 3 moves 3 2 times half of 776 bytes, stage 2 2 + 2 times, stage 1 2 2 times.
    slow = replace(DEVICE, link=1.0)
    times = [training(TOY, slow, EXACT, WORK, TrainerSetup(ranks=2, zero_stage=stage)) for stage in (3, 2, 1)]
    assert times == [pytest.approx(number * 388 + adam / 2) for number in (6, 4, 4)]
    far = training(TOY, replace(DEVICE, per_node=1), EXACT, WORK, TrainerSetup(ranks=2, zero_stage=3))
    assert far == pytest.approx(max(6 * 388 / 10, 1.5 * (body + head) / 1000) + adam / 2)


def test_what_is_on_the_host_takes_its_way_by_hand():
    """Two ranks, two micro-batches and updates: 4 + 2 bytes a parameter swapped, 30 of Adam, 2 2 times the weights."""
    fast = replace(DEVICE, flops=1e30, link=1e30, node_link=1e30)
    rates = replace(EXACT, swap_gb_s=1e-9, host_gb_s=1e-9, stream_gb_s=1e-9)

    def seconds(rates=rates, device=fast, **keys):
        return training(TOY, device, rates, WORK, TrainerSetup(ranks=2, zero_stage=3, **keys))

    swapped, adam, streamed = 2 * 6 * 388 / 2, 2 * 30 * 388 / 2, 2 * 2 * 2 * 388 / 2
    host = {"offload": True}
    assert seconds(**host) == pytest.approx(swapped + 2 * adam), "both ranks' Adam is in one host's memory"
    assert seconds(device=replace(fast, per_node=1), **host) == pytest.approx(swapped + adam), "or in one each"
    assert seconds(replace(rates, host_gb_s=1e30), **host) == pytest.approx(swapped)
    both = {**host, "offload_weights": True}
    assert seconds(**both) == pytest.approx(swapped + 2 * adam + streamed)
    assert seconds(replace(rates, swap_gb_s=1e30, host_gb_s=1e30), **both) == pytest.approx(streamed)
    # An adapter swaps and steps its own, and streams all; a critic does both.
    adapter = seconds(adapter=3, **both)
    assert adapter == pytest.approx((swapped + 2 * adam) * 384 / 388 + streamed * 772 / 388)
    critic = seconds(beside=(Beside("critic", trained=True),), **both)
    assert critic == pytest.approx((swapped + 2 * adam + streamed) * (388 + 353) / 388)


def test_publication_and_the_step():
    assert publication(776, DEVICE, EXACT, "shm", 2) == pytest.approx(776 / 1e3)
    assert publication(776, DEVICE, EXACT, "nccl", 2) == pytest.approx(776 / 50)
    assert publication(776, DEVICE, EXACT, "auto", 4) == pytest.approx(776 / 1e3)
    assert publication(776, DEVICE, EXACT, "auto", 5) == pytest.approx(776 / 10)
    times = StepTimes(generate_s=9.0, steady_s=6.0, train_s=5.0, publish_s=1.0)
    assert (times.sync_s, times.async_s) == (15.0, 7.0)


def layout(times, colocated=False, swap_s=0.0):
    return Layout(1, 1, TrainerSetup(), colocated, times, {"loss": 0.0}, {}, 1.0, swap_s)


@pytest.mark.parametrize(
    ("split", "colocated", "said"),
    [
        ((9, 6, 5, 1), (3, 2, 3, 1), "2.14 x as fast as one side after the other, 1.14 x as fast as all GPUs"),
        ((9, 6, 5, 1), (2, 2, 3, 1), "0.14 x"),
        ((20, 20, 2, 1), (11, 10, 1, 0.5), "generation takes 10.0 x the other side: little can be hidden"),
        ((2, 2, 20, 1), (1, 1, 10, 0.5), "training takes 10.0 x the other side: little can be hidden"),
        ((9, 6, 5, 4), (20, 20, 2, 1), "Publication takes 40% of the step: see rollout.transport."),
    ],
)
def test_what_is_said_of_asynchrony(split, colocated, said):
    plan = Plan(TOY, 8, layout(StepTimes(*split)), layout(StepTimes(*colocated), True, 1.0))
    verdict = judge(plan)
    if said == "0.14 x":  # in turn: 2 + 3 + 1 and 1 for the change; on the split 6 + 1
        assert "only 1.00 x as fast as all GPUs for both in turn: asynchrony does not help here" in verdict
    else:
        assert said in verdict


def test_asynchrony_that_does_not_help_is_said():
    plan = Plan(TOY, 8, layout(StepTimes(9, 6, 5, 1)), layout(StepTimes(2, 2, 2, 0), True))
    assert "all GPUs for both in turn are 1.75 x as fast as that: asynchrony does not help here" in judge(plan)
    assert plan.best is plan.colocated
    assert "with one, generation and training take turns" in judge(Plan(TOY, 1, None, plan.colocated))
    assert "neither does colocated" in judge(Plan(TOY, 8, None, None))


def test_a_trainer_that_does_not_fit_takes_what_saves_memory_in_turn():
    shape, work = SHAPES["qwen2.5-7b"], replace(WORK, micro_batch_tokens=8192, longest=8000, response=4000, samples=64)
    wanted = TrainerSetup(ranks=8, zero_stage=1)

    def setup(gb):
        return fitting_setup(shape, replace(DEVICE, memory=gb * 1e9), Rates(), work, wanted)

    assert setup(200) == wanted
    assert setup(80) == replace(wanted, zero_stage=3)
    assert setup(45) == replace(wanted, zero_stage=3, checkpointing=True)
    assert setup(1) is None


def test_the_split_and_the_degree():
    h100, work = named_device("H100"), replace(WORK, prompts=128, samples=8, prompt=500, response=1500, longest=3000)
    assert needed_tensor_parallel(named_shape("7b"), h100, Rates(), 1) == 1
    assert needed_tensor_parallel(named_shape("70b"), h100, Rates(), 1) == 4
    assert needed_tensor_parallel(named_shape("7b"), h100, Rates(), 2) == 2
    found = plan_gpus(named_shape("7b"), h100, Rates(), work, TrainerSetup(checkpointing=True), 8)
    every = [
        plan_gpus(named_shape("7b"), h100, Rates(), work, TrainerSetup(checkpointing=True), 8, tensor_parallel=degree)
        for degree in (2, 4)
    ]
    assert found.split.engine_gpus + found.split.setup.ranks == 8
    assert all(found.split.step_s <= other.split.step_s for other in every)
    assert plan_gpus(named_shape("1.5b"), h100, Rates(), work, TrainerSetup(), 1).split is None


def test_of_two_that_are_about_as_fast_the_smaller_is_taken():
    def of(engines, step_s):
        return replace(layout(StepTimes(step_s, step_s, 1.0, 0.0)), engines=engines)

    fast, near, slow = of(9, 10.0), of(5, 10.0 * SLACK), of(2, 10.1 * SLACK)
    assert fewest([fast, slow, near]) is near and fewest([slow, fast]) is fast and fewest([]) is None
    assert totals(20, 8) == [8, 16, 20] and totals(8, 8) == [8]
    assert "10 GPUs stay idle: with them a step is less than 2% faster" in judge(Plan(TOY, 16, near, None))
    assert "idle" not in judge(Plan(TOY, 6, near, None))


def test_colocated_engines_have_the_room_that_the_trainer_leaves_and_the_reverse():
    work = replace(WORK, micro_batch_tokens=30, updates=1)
    rates = replace(EXACT, sleep_s=1.5, asleep_gib=200 / GIB, memory_share=0.9, swap_gb_s=1e-9)
    wanted = TrainerSetup(ranks=1, zero_stage=2)
    resting = memory.resident_bytes(trainer_memory(TOY, wanted, 0, 0))
    # 388 parameters of 2 + 4 + 12 bytes; two buckets.
    assert resting == 388 * 18 + 2 * 2 * 1_000_000
    room = replace(DEVICE, memory=2 * (resting + 20_000))
    found = in_turn(TOY, room, rates, work, wanted, 1, 1, "shm")
    assert found.engine["kv cache"] == pytest.approx(0.9 * room.memory - resting - 2 * 388)
    assert found.swap_s == 3.0 and found.step_s == pytest.approx(found.times.sync_s + 3.0)
    assert found.times.publish_s == pytest.approx(776 / 1e3), "the way of the weights is the config's"

    def at(num_bytes):
        return in_turn(TOY, replace(room, memory=num_bytes), rates, work, wanted, 1, 1, "shm")

    kept = at(resting / 0.9)
    assert kept.setup.offload and kept.engine["kv cache"] == pytest.approx(388 * 16 - 2 * 388), (
        "else it has no KV cache"
    )
    least = (resting - 388 * 16 + 2 * 388) / 0.9
    assert at(least) is None and at(least + 2000) is not None
    peak = sum(kept.trainer.values())
    full = replace(rates, memory_share=1.0, asleep_gib=(least - peak) / GIB)
    assert in_turn(TOY, replace(room, memory=least + 1), full, work, wanted, 1, 1, "shm") is not None
    assert in_turn(TOY, replace(room, memory=least - 1), full, work, wanted, 1, 1, "shm") is None, (
        "it holds that asleep"
    )


SHARED = Placement("colocated", sleeps=True)


def shared_config(tmp_path, *overrides):
    """The one-GPU recipe with a model of its shape on this machine."""
    sizes = {"num_hidden_layers": 28, "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2}
    more = {"intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True, "model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(sizes | more))
    return load_config(ROOT / "configs" / "one_gpu.yaml", [f"model.path={tmp_path}", *overrides])


def test_the_recipe_of_one_gpu_has_room_on_80_gb_and_sleeps(tmp_path):
    config = shared_config(tmp_path)
    assert place(config, "cuda") == SHARED
    assert sharing.check_sharing(config, SHARED, 80e9) == []
    assert sharing.check_sharing(load_config(ROOT / "configs" / "one_gpu.yaml"), SHARED, 80e9) == [
        "memory on the shared GPU is not checked: the model's config.json is not on this machine."
    ]
    assert sharing.check_sharing(config, Placement("split"), 1.0) == []


def test_a_family_that_is_not_planned_for_may_share_a_gpu(tmp_path):
    config = shared_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_experts": 8}))
    (said,) = sharing.check_sharing(config, SHARED, 1.0)
    assert said.startswith("memory on the shared GPU is not checked: ") and "num_experts=8" in said


KL = ["algorithm.kl=k3", "algorithm.kl_coef=0.1"]


def write_shape(folder, **keys):
    """A config.json of `toy`'s widths."""
    folder.mkdir()
    sizes = {"num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    raw = {**sizes, "intermediate_size": 8, "vocab_size": 10, "tie_word_embeddings": False, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(raw | keys))
    return folder


@pytest.mark.parametrize(
    ("overrides", "beside"),
    [
        ([], {}),
        ([*KL, "rollout.transport=ipc"], {"reference": 2 * 1543714304, "published copy": 2 * 1543714304}),
        (["algorithm.kl=k3", "algorithm.kl_coef=0"], {"reference": 2 * 1543714304}),  # loaded for its figures
        ([*KL, "lora.rank=8"], {}),  # the model itself
        (["algorithm.name=iterative_dpo"], {"reference": 2 * 1543714304}),
        ([*KL, "algorithm.kl_target=teacher", "teacher.path=SMALL"], {"teacher": 2 * 388}),
        ([*KL, "algorithm.kl_target=teacher", "teacher.path=SMALL", "teacher.dtype=float32"], {"teacher": 4 * 388}),
        ([*KL, "algorithm.kl_target=teacher", "teacher.path=MODEL"], {"teacher": 2 * 1543714304}),
        ([*KL, "algorithm.kl_target=teacher", "teacher.path=/not/here"], {}),  # nobody knows how large
        (
            [
                *KL,
                "algorithm.kl_target=teacher",
                "teacher.where=server",
                "teacher.url=http://a:1",
                "teacher.path=SMALL",
            ],
            {},
        ),
        # 388 - 40 of the head + 5: weights and sums, masters and moments, backward's own below stage 2; buckets of a million.
        (["algorithm.name=ppo", "critic.path=SMALL"], {"critic": 353 * 18 + 4e6}),
        (["algorithm.name=ppo", "critic.path=SMALL", "train.zero_stage=1"], {"critic": 353 * 20 + 4e6}),
    ],
)
def test_the_models_beside_the_policy_count(tmp_path, overrides, beside):
    places = {"SMALL": write_shape(tmp_path / "small"), "MODEL": tmp_path}
    for name, place_of in places.items():
        overrides = [text.replace(name, str(place_of)) for text in overrides]
    plain = sharing.trainer_parts(shared_config(tmp_path, *[o for o in overrides if o.startswith(("lora", "train"))]))
    parts = sharing.trainer_parts(shared_config(tmp_path, *overrides))
    assert {part: size for part, size in parts.items() if part not in plain} == pytest.approx(beside)
    stays = memory.resident_bytes(parts) - memory.resident_bytes(plain)
    assert stays == pytest.approx(sum(beside.values())), "they stay while an engine generates"


def test_a_critic_on_the_policy_s_own_body_is_as_large_as_the_shape_that_is_asked_for(tmp_path):
    config = shared_config(tmp_path)
    assert (
        command.companion("critic", str(tmp_path), config)
        == command.companion("critic", None, config)
        == Beside("critic")
    )
    assert command.companion("critic", str(write_shape(tmp_path / "small")), config).shape.hidden == 4


def test_a_frozen_model_is_divided_where_stage_3_divides_it():
    def parts(*beside, **keys):
        found = trainer_memory(TOY, TrainerSetup(ranks=4, beside=beside, **keys), 10, 5)
        return [found[each.name] for each in beside]

    two = Beside("reference"), Beside("published copy", divided=False)
    assert parts(*two) == [776, 776] and parts(*two, zero_stage=3) == [194, 776]
    assert parts(*two, zero_stage=3, offload=True, offload_weights=True) == [194, 776], (
        "DeepSpeed is told of the policy's alone"
    )
    small, large = parts(Beside("critic", trained=True), zero_stage=3), parts(Beside("critic", trained=True))
    assert small == [353 * 18 / 4 + 4e6] and large == [353 * (2 + 16 / 4) + 4e6]
    tied = replace(TOY, tied=True)
    (its,) = parts(Beside("critic", tied, trained=True))
    assert its == pytest.approx((tied.num_parameters + 5) * 6 + 4e6), "its embedding stays"


def test_the_parts_of_an_adapter_run_by_hand():
    # Of a layer r times q 4 + 4, k and v 4 + 2, o 4 + 4, gate, up and down 4 + 8; of the head 4 + 10.
    assert TOY.adapter_parameters(3) == 3 * 2 * (8 + 6 + 6 + 8 + 36) == 384
    assert TOY.adapter_parameters(3, head=True) == 384 + 3 * 14
    adapter = TrainerSetup(ranks=4, zero_stage=2, adapter=3)
    parts = trainer_memory(TOY, adapter, 10, 5)
    whole = trainer_memory(TOY, replace(adapter, adapter=0), 10, 5)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (2 * (388 + 384), 384, 3 * 384)
    assert parts["buckets"] == whole["buckets"], "DeepSpeed's are whole"
    assert parts["activations"] == whole["activations"]
    assert parts["loss"] == whole["loss"] - 4 * 40, "no gradient of the head"
    three = trainer_memory(TOY, replace(adapter, zero_stage=3), 10, 5)
    assert (three["weights"], three["gathered"]) == (2 * 772 / 4, 2 * 772)
    assert trainer_memory(TOY, replace(adapter, zero_stage=1), 10, 5)["gradients"] == 6 * 384
    assert adapter.published_bytes(TOY) == 776
    assert replace(adapter, adapter_published=True).published_bytes(TOY) == 768


def test_an_adapter_has_as_many_parameters_as_peft_makes():
    from fastreason.config import LoraConfig
    from fastreason.lora import add_adapter

    for head in (False, True):
        model = tiny_llama()
        add_adapter(model, LoraConfig(rank=5, head=head))
        made = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert shape_of(model.config.to_dict(), "tiny").adapter_parameters(5, head) == made


def test_the_operations_of_an_adapter_are_those_that_torch_counts():
    from fastreason.config import LoraConfig
    from fastreason.lora import add_adapter

    model = tiny_llama()
    shape = shape_of(model.config.to_dict(), "tiny")
    add_adapter(model, LoraConfig(rank=5))
    work = Workload(prompts=2, samples=1, prompt=0, response=16, longest=16)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(32).view(2, 16)).logits.sum().backward()
    attention = 3 * 32 * 4 * shape.num_layers * shape.query_width * 8  # all 16 tokens in place of 8, as above
    # The first layer's input is an embedding that rests: torch makes no gradient of it, and none through q, k and v.
    first = 2 * 32 * shape.hidden * (shape.query_width + 2 * shape.kv_width) + 3 * 2 * 32 * 5 * shape.hidden
    assert counter.get_total_flops() == training_flops(shape, TrainerSetup(adapter=5), work) + attention - first


def test_what_is_beside_the_policy_takes_time_by_hand():
    one, tokens = TrainerSetup(ranks=1, zero_stage=1), 128
    products, attention, head = tokens * 576, tokens * 4 * 2 * 4 * 8, 80 * 80
    assert training_flops(TOY, one, WORK) == 3 * (products + attention + head)
    own = 6 * tokens * 384
    adapter = replace(one, adapter=3)
    assert training_flops(TOY, adapter, WORK) == 2 * (products + head) + 3 * attention + own
    again = replace(adapter, checkpointing=True)
    assert training_flops(TOY, again, WORK) == 3 * products + 2 * head + 4 * attention + own
    bare = training_flops(TOY, one, WORK)

    def more(each):
        return training_flops(TOY, replace(one, beside=(each,)), WORK) - bare

    assert more(Beside("reference")) == more(Beside("reference", copied=False)) == products + attention + head
    assert more(Beside("published copy", scores=False)) == 0
    assert more(Beside("critic", trained=True)) == 4 * (products + attention)
    assert more(Beside("teacher", replace(TOY, num_layers=4))) == 2 * (products + attention) + head
    # Adam of what is trained alone, and of a critic too.
    adam = [training(TOY, replace(DEVICE, flops=1e30), EXACT, WORK, setup) for setup in (one, adapter)]
    assert adam == [pytest.approx(2 * 30 * number / 100) for number in (388, 384)]
    critic = replace(one, beside=(Beside("critic", trained=True),))
    assert training(TOY, replace(DEVICE, flops=1e30), EXACT, WORK, critic) == pytest.approx(2 * 30 * (388 + 353) / 100)
    # Links of 1 byte a second, two ranks and micro-batches: stage 3 gathers all twice, a reference once, reduces the adapter.
    slow = replace(DEVICE, link=1.0, flops=1e30, bandwidth=1e30)
    for stage, beside, moved in (
        (3, (), 2 * (2 * 772 + 384)),
        (2, (), 4 * 384),
        (3, (Beside("reference"), Beside("published copy", scores=False, divided=False)), 2 * (2 * 772 + 384 + 388)),
        (3, (Beside("reference", copied=False),), 2 * (2 * 772 + 384)),
        (2, (Beside("reference"),), 4 * 384),
    ):
        setup = TrainerSetup(ranks=2, zero_stage=stage, adapter=3, beside=beside)
        assert training(TOY, slow, EXACT, WORK, setup) == pytest.approx(moved * 2 / 2)


def test_an_adapter_alone_is_published_in_less_time(tmp_path):
    machine, shape = command.Machine(DEVICES["h100"], Rates()), named_shape("1.5b")

    def seconds(*overrides):
        config = shared_config(tmp_path, "resources.sleep=off", *overrides)
        work = command.workload_of(config, None, None, on_cpu=False)
        return command.estimates(config, shape, machine, work)["publish_s"]

    merged, alone = seconds("lora.rank=16"), seconds("lora.rank=16", "lora.publish=adapter")
    assert merged == seconds() == pytest.approx(2 * shape.num_parameters / 2e9)
    assert alone == pytest.approx(2 * shape.adapter_parameters(16) / 2e9)


def test_the_command_says_what_is_beside_the_policy(capsys, tmp_path):
    small = write_shape(tmp_path / "small")

    def said(*overrides):
        config = ROOT / "configs" / "math_grpo_gpu.yaml"
        code, text = plan(capsys, config, *overrides, "--gpu", "h100", "--gpus", 8, "--model-shape", "7b")
        assert code == 0, text
        return text

    text = said("lora.rank=16", "lora.publish=adapter", *KL)
    assert "adapter  rank 16 on all linear layers (fewer with lora.targets), not on the head; a frozen weight" in text
    assert "it alone is published" in text and "ZeRO-2, adapter of rank 16" in text
    assert "beside   reference (scores each token, the model itself without its adapter)" in text
    assert not re.search(r"^reference +\d", text, re.M)
    text = said(*KL, "rollout.transport=nccl")
    assert "beside   reference (scores each token); published copy (on one rank)" in text
    # 7.6 B parameters of two bytes, on six ranks at stage 3; whole on the rank that sends.
    assert re.search(r"^reference +2\.4$", text, re.M) and re.search(r"^published copy +14\.2$", text, re.M)
    text = said(*KL, "algorithm.kl_target=teacher", "teacher.path=/not/here")
    assert "teacher (scores each token, assumed as large as the policy: its config.json is not on this machine)" in text
    text = said("algorithm.name=ppo", f"critic.path={small}")
    assert "beside   critic (trained on each token)" in text and re.search(r"^critic +0\.0$", text, re.M)
    text = said()
    assert "beside" not in text.split("lengths")[0] and "adapter" not in text and "beside   " not in text


def test_what_colocated_runs_are_told(tmp_path):
    for placement, words in ((SHARED, "in turn: the engine sleeps"), (Placement("colocated"), "a share of the memory")):
        (said,) = preflight.sharing_notes(shared_config(tmp_path), placement, "cpu")
        assert words in said
    assert preflight.sharing_notes(shared_config(tmp_path), Placement("split"), "cuda") == ()
    with pytest.raises(ConfigError, match=r"beside it the trainer holds 32.3 \(.*reference 2.9, published copy 2.9\)"):
        sharing.check_sharing(shared_config(tmp_path, *KL, "rollout.transport=ipc"), SHARED, 57e9)


@pytest.mark.parametrize(
    ("overrides", "memory", "words"),
    [
        (
            [],
            40e9,
            r"=0.45: the engine takes 16.8 of the GPU's 37.3 GiB, and beside it the trainer holds 26.6 .*optimizer 17.3",
        ),
        (
            ["rollout.gpu_memory_utilization=0.8"],
            80e9,
            r"=0.8: .* takes 59.6 .*holds 26.6 .*Use at most 0.59; train.offload=cpu",
        ),
        ([], 24e9, r"\. Train.offload=cpu keeps the optimizer on the host"),
    ],
)
def test_what_cannot_fit_on_one_gpu_is_an_error_with_figures(tmp_path, overrides, memory, words):
    with pytest.raises(ConfigError, match=words):
        sharing.check_sharing(shared_config(tmp_path, *overrides), SHARED, memory)


def test_what_is_on_the_host_or_on_other_machines_is_not_beside_the_engine(tmp_path):
    def held(*overrides, nodes=1):
        config = shared_config(tmp_path, "train.zero_stage=3", *overrides)
        return memory.resident_bytes(sharing.trainer_parts(config, nodes=nodes)) / GIB

    assert held() == pytest.approx(26.6, abs=0.1)
    buckets = 4 * 1543714304 // 8 / GIB
    assert held("train.offload=cpu") == pytest.approx(held() * 2 / 18 + buckets * 16 / 18, abs=0.1)
    assert held("train.offload=cpu_weights") == pytest.approx(buckets, abs=0.1)
    assert held(nodes=4) - buckets == pytest.approx((held() - buckets) / 4, rel=1e-6)
    tight = ["train.zero_stage=3", "rollout.gpu_memory_utilization=0.8"]
    with pytest.raises(ConfigError, match=r"beside it the trainer holds"):
        sharing.check_sharing(shared_config(tmp_path, *tight), SHARED, 40e9)
    assert sharing.check_sharing(shared_config(tmp_path, *tight, "train.offload=cpu_weights"), SHARED, 40e9) == []
    assert sharing.check_sharing(shared_config(tmp_path, *tight), SHARED, 40e9, nodes=16) == []


def test_what_may_not_fit_on_one_gpu_is_a_warning_with_figures(tmp_path):
    crowded = shared_config(tmp_path, "rollout.gpu_memory_utilization=0.6", "train.micro_batch_tokens=65536")
    assert sharing.check_sharing(crowded, SHARED, 80e9) == [], "asleep, the engine leaves the trainer its peak"
    (said,) = sharing.check_sharing(crowded, Placement("colocated"), 80e9)
    assert said.startswith("memory may not suffice: the trainer beside the engine's 44.7 take about 8")
    assert "activations 9." in said and "let the engine sleep" in said
    kept = shared_config(tmp_path, "model.gradient_checkpointing=false", "train.micro_batch_tokens=32768")
    (said,) = sharing.check_sharing(kept, SHARED, 80e9)
    assert "the trainer and the engine that sleeps take about" in said
    assert sharing.check_sharing(shared_config(tmp_path, "lora.rank=8"), Placement("colocated"), 30e9) == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_experts": 8}, "num_experts=8"),
        ({"layer_types": ["linear_attention"]}, "linear_attention"),
        ({"model_type": "minicpm3"}, "a minicpm3 model's parameters have not been compared .*: llama, .*persimmon"),
    ],
)
def test_shapes_that_are_not_covered_are_refused(keys, said):
    with pytest.raises(ModelError, match=said):
        shape_of({**tiny_llama().config.to_dict(), **keys}, "m")
    with pytest.raises(ModelError, match="has no 'num_attention_heads'"):
        shape_of({"model_type": "mamba"}, "m")


@pytest.mark.parametrize("change", ["mfu=1", "train_mfu=x", "train_mfu=-1"])
def test_a_rate_that_is_none_is_refused(change):
    with pytest.raises(ConfigError, match=f"--rate {change}: allowed: key=number"):
        changed_rates(Rates(), [change])


def test_every_device_says_where_its_figures_come_from():
    assert all(device.source and device.flops > 1e13 and device.memory > 1e10 for device in DEVICES.values())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A calibration of little work, and its file."""
    file = tmp_path_factory.mktemp("calibration") / "cpu.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = little_calibration(monkeypatch)
    calibration.write_calibration(found, file)
    return found, file


def little_calibration(monkeypatch):
    monkeypatch.setattr(calibration, "SECONDS_EACH", 0.0)
    for name, value in (("TRAIN_ROWS", 128), ("COPY_BYTES", 1 << 16)):
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setattr(calibration.layer_flops, "__defaults__", (64,))
    return calibration.calibrate(shape_of(tiny_llama().config.to_dict(), "tiny"), "float32", 1, 1, 8)


def test_a_calibration_measures_and_is_read_again(measured, tmp_path):
    found, file = measured
    assert calibration.read_calibration(file) == found
    assert found.device.is_cpu and found.device.itemsize == 4
    assert min(found.device.flops, found.device.decode_flops, found.device.bandwidth, found.rates.train_mfu) > 0
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ConfigError, match="not a file that fastreason plan --calibrate wrote"):
        calibration.read_calibration(other)


def plan(capsys, *arguments):
    code = main(["plan", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_command_plans_four_models_for_three_sizes(capsys):
    config = ROOT / "configs" / "math_grpo_gpu.yaml"
    sizes, gpus = ["1.5b", "7b", "32b", "70b"], [8, 64, 512]
    code, text = plan(capsys, config, "--gpu", "h100", "--gpus", *gpus, "--model-shape", *sizes)
    assert (
        code == 0
        and "train_mfu=0.4" in text
        and "stream_gb_s=10, host_gb_s=50" in text
        and "half of the longest allowed" in text
    )
    rows = [line for line in text.splitlines() if re.match(r"(qwen2.5|llama-3)-\S+ +\d+  ", line)]
    assert len(rows) == 12
    code, text = plan(capsys, config, "--gpu", "h100", "--model-shape", "7b", "--rate", "train_mfu=0.2")
    assert code == 0 and "train_mfu=0.2" in text
    for part in ("weights", "gradients", "optimizer", "activations", "loss", "kv cache", "whole logits would take"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a config file"),
        (["C", "--model-shape", "7b"], "for what"),
        (["C", "--model-shape", "7b", "--gpu", "abacus"], "no such device"),
        (["C", "--gpu", "h100"], "--model-shape"),
        (["C", "--gpu", "h100", "--model-shape", "9b"], "no such shape"),
        (["--against", "nowhere"], "no run there"),
        (["C", "--gpu", "h100", "offline.objective=sft", "offline.path=x"], "only runs that generate"),
    ],
)
def test_what_the_command_cannot_plan_it_says(capsys, arguments, said):
    config = str(ROOT / "configs" / "math_grpo_gpu.yaml")
    code, text = plan(capsys, *[config if argument == "C" else argument for argument in arguments])
    assert code == 2 and said in text


@pytest.mark.parametrize(
    ("engines", "cores", "threads"), [(None, "0-3", 4), (2, "0-3", 2), (4, "0-3", 1), (2, None, 1)]
)
def test_a_calibration_gives_an_engine_the_threads_of_its_share(tmp_path, monkeypatch, engines, cores, threads):
    asked = []
    found = SimpleNamespace(device=DEVICE, rates=EXACT)
    monkeypatch.setattr(calibration, "calibrate", lambda shape, dtype, *figures: asked.append(figures) or found)
    keys = [f"rollout.cores={cores or 'null'}", f"resources.engines={engines or 'null'}", "train.threads=3"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", keys)
    command.measured_machine(SimpleNamespace(calibrate=""), config, TOY)
    assert asked == [(3, threads, command.DECODE_ROWS)]


def test_the_estimate_of_a_run_has_its_engines_and_their_sleep(tmp_path):
    machine = command.Machine(DEVICES["h100"], Rates())
    shape = named_shape("1.5b")

    def estimate(*overrides):
        config = shared_config(tmp_path, *overrides)
        work = command.workload_of(config, None, None, on_cpu=False)
        return command.own_layout(config, shape, machine, work), command.estimates(config, shape, machine, work)

    apart, its = estimate("resources.sleep=off")
    asleep, slept = estimate()
    swap_s = 2 * machine.rates.sleep_s
    assert (apart.colocated, apart.swap_s, asleep.colocated, asleep.swap_s) == (False, 0, True, swap_s) and swap_s > 0
    assert slept["publish_s"] == pytest.approx(its["publish_s"] + swap_s / 2), (
        "measured with them: waking, not falling asleep"
    )
    assert slept["step_s"] == pytest.approx(its["step_s"] + swap_s)
    four, fast = estimate("resources.engines=4", "rollout.gpus=0-3", "train.gpus=0-3", "train.ranks=4")
    assert (four.engines, four.num_gpus) == (4, 4) and fast["generate_s"] < 0.7 * slept["generate_s"]


def test_a_plan_for_a_cpu_has_the_engines_of_its_config():
    device = replace(DEVICES["h100"], is_cpu=True, itemsize=4)
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["resources.engines=3"])
    work = command.workload_of(config, None, None, on_cpu=True)
    found = command.plan_of(config, TOY, command.Machine(device, EXACT), work, 1)
    assert (found.split.engines, found.gpus, found.colocated) == (3, 4, None)


def test_a_run_is_compared_with_its_own_estimate(tmp_path, capsys, measured):
    tiny_llama().config.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    run.mkdir()
    raw = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"task": "chain_sum"},
        "rollout": {"samples_per_prompt": 4, "max_new_tokens": 8},
        "train": {"steps": 3, "prompts_per_step": 2},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    row = {"rollout/response_tokens_mean": 5.0, "train/tokens": 8 * 12.0, "train/tokens_computed": 54.0}
    row |= {f"time/{name}_s": 1.0 for name in ("train", "generate", "publish", "step")} | {"memory/peak_gib": 2.0}
    lines = [{**row, "step": step, "time/train_s": 100.0 if step == 1 else 0.5} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, text = plan(capsys, "--against", run, "--gpu", measured[1])
    assert code == 0 and "prompt 7, response 5" in text and "2 steps of" in text
    found = re.search(r"train_s +(\S+) +0.5 +([+-]\d+) %", text)
    assert float(found[2]) == pytest.approx(100 * (float(found[1]) / 0.5 - 1), abs=1)
