"""An adapter published alone: the folders that are written, the place it takes in a worker, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_lora import load, made, save_model
from transformers import AutoModelForCausalLM

from fastreason.config import Config, LoraConfig, ModelConfig
from fastreason.errors import ConfigError
from fastreason.exchange import EXCHANGE_VARIABLE, digest_file
from fastreason.lora import adapter_weights, save_settings, write_first_adapter
from fastreason.preflight import check_adapter_file
from fastreason.rollout import vllm_adapter, vllm_worker
from fastreason.rollout.identity import differences
from fastreason.rollout.vllm_adapter import ADAPTER_VARIABLE, compare_factors, padded_rank
from fastreason.rollout.vllm_server import server_command, server_environment
from fastreason.sync import AdapterPublisher

pytestmark = pytest.mark.timeout(300)


class Source:
    """The updater, as far as a publisher asks."""

    rank = 0

    def __init__(self, model):
        self._model = model

    def adapter(self):
        yield from made(adapter_weights(self._model)).items()


@pytest.fixture
def publication(tmp_path):
    """(policy, publisher, source, exchange folder) of a tiny model with an adapter that is not 0."""
    policy = load(save_model(tmp_path / "m"), targets=["q_proj", "down_proj"])
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    publisher = AdapterPublisher(exchange, torch.float32, lambda folder: save_settings(policy.model, "base/of", folder))
    return policy, publisher, Source(policy.model), exchange


def test_each_version_is_a_folder_that_peft_loads_and_the_former_ones_go(publication, tmp_path):
    policy, publisher, source, exchange = publication
    for version in range(1, 5):
        with torch.no_grad():
            policy.model.base_model.layers[0].self_attn.q_proj.lora_B["default"].weight.fill_(float(version))
        update = publisher.write(source, version)
        assert update.path == str(exchange / f"adapter-{version:06d}" / "adapter_model.safetensors")
        assert update.checksum == digest_file(update.path).hexdigest() and update.version == version
        expected = made(adapter_weights(policy.model))
        found = load_file(update.path)
        assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)
    # The one that an engine may be reading, and the newest; nothing of the others.
    assert sorted(path.name for path in exchange.iterdir()) == ["adapter-000003", "adapter-000004"]
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), exchange / "adapter-000004")
    factor = whole.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert torch.equal(factor, torch.full_like(factor, 4.0))
    assert whole.peft_config["default"].base_model_name_or_path == "base/of"


def test_another_rank_gathers_and_writes_nothing(publication):
    _, publisher, source, exchange = publication
    source.rank = 1
    assert publisher.write(source, 1) is None and list(exchange.iterdir()) == []


def test_the_first_adapter_has_the_trainer_s_factors_and_does_nothing(publication, tmp_path):
    _, publisher, source, _ = publication
    config = LoraConfig(rank=4, alpha=6.0, targets=["q_proj", "down_proj"])
    folder, model = tmp_path / "m", ModelConfig(path="base/of")
    write_first_adapter(config, model, folder, torch.float32, tmp_path / "first")
    first, later = load_file(tmp_path / "first" / "adapter_model.safetensors"), publisher.write(source, 1)
    assert {name: tensor.shape for name, tensor in first.items()} == {
        name: tensor.shape for name, tensor in load_file(later.path).items()
    }
    assert not any(tensor.any() for tensor in first.values())
    folders = (tmp_path / "first", tmp_path / "exchange" / "adapter-000001")
    said = [json.loads((at / "adapter_config.json").read_text()) for at in folders]
    assert said[0] == said[1] and (said[0]["r"], said[0]["lora_alpha"]) == (4, 6.0)


# In the engine


def layer(parts):
    """A layer of vLLM's: `parts` of (A [r, in], scaled B [out, r]) in the second of two places of rank 8."""

    def stacks(index):
        made = []
        for part in parts:
            factor = part[index]
            shape = (2, 1, 8, factor.shape[1]) if index == 0 else (2, 1, factor.shape[0], 8)
            stack = torch.zeros(shape)
            if index == 0:
                stack[1, 0, : len(factor)] = factor
            else:
                stack[1, 0, :, : factor.shape[1]] = factor
            made.append(stack)
        return tuple(made)

    return SimpleNamespace(lora_a_stacked=stacks(0), lora_b_stacked=stacks(1), tp_size=1)


def arrived():
    torch.manual_seed(0)
    pairs = {name: (torch.randn(3, 5), torch.randn(4, 3)) for name in ("l.q", "l.k", "l.down")}
    layers = {
        "l.qk": layer([pairs["l.q"], pairs["l.k"]]),
        "l.down": layer([pairs["l.down"]]),
        "l.up": layer([pairs["l.q"]]),
    }
    factors = {(name, index == 0): pair[index].clone() for name, pair in pairs.items() for index in (0, 1)}
    return layers, {"l.qk": ["l.q", "l.k"]}, factors


def test_factors_that_lie_in_the_layers_are_found_equal():
    layers, packed, factors = arrived()
    assert compare_factors(layers, packed, 1, factors) == (3 * (15 + 12) * 4, [], [])


@pytest.mark.parametrize(("changed", "is_a"), [("l.k", True), ("l.k", False), ("l.down", False)])
def test_a_factor_that_differs_is_named(changed, is_a):
    layers, packed, factors = arrived()
    factors[changed, is_a][-1, -1] += 1
    num_bytes, different, _ = compare_factors(layers, packed, 1, factors)
    assert different == [f"{changed}.{'A' if is_a else 'B'}"] and num_bytes < 3 * 27 * 4


def test_another_place_and_a_layer_that_the_engine_passed_over_are_no_arrival():
    layers, packed, factors = arrived()
    assert len(compare_factors(layers, packed, 0, factors)[1]) == 6
    factors["l.gate", True] = torch.ones(3, 5)
    assert compare_factors(layers, packed, 1, factors)[1:] == ([], ["l.gate"])


def test_a_factor_that_is_divided_among_workers_is_left_out():
    layers, packed, factors = arrived()
    factors["l.down", False] = torch.ones(8, 3)
    assert compare_factors(layers, packed, 1, factors)[1] == ["l.down.B"], "alone, it holds another"
    layers["l.down"].tp_size = 2
    assert compare_factors(layers, packed, 1, factors) == ((3 * 27 - 12) * 4, [], [])


def test_a_worker_with_an_adapter_replaces_it_and_leaves_the_model_alone(publication, monkeypatch, tmp_path):
    _, publisher, source, exchange = publication
    monkeypatch.setenv(EXCHANGE_VARIABLE, str(exchange))
    monkeypatch.setenv(ADAPTER_VARIABLE, str(tmp_path / "first"))
    monkeypatch.setattr(vllm_adapter, "adapter_request", lambda name, number, folder: (name, number, folder))
    monkeypatch.setattr(vllm_adapter, "adapted_layer", lambda model: by_name)
    update, requests = publisher.write(source, 1), []
    factors = {by_name(name): tensor for name, tensor in load_file(update.path).items()}
    names = sorted({name for name, _ in factors})
    # alpha / r is 6 / 4, and vLLM multiplies B by it.
    layers = {name: layer([(factors[name, True], factors[name, False] * 1.5)]) for name in names}
    manager = SimpleNamespace(model=None, modules=layers, packed_modules={}, lora_index_to_id=[None, 7])
    worker = vllm_adapter.AdapterWorker()
    worker.list_loras, worker.add_lora = lambda: {7}, requests.append
    worker.model_runner = SimpleNamespace(  # without reload_weights
        requests={}, get_model=lambda: None, lora_manager=SimpleNamespace(_adapter_manager=manager)
    )
    report = worker.fastreason_load(update.path, update.checksum)
    assert requests == [("adapter", 7, exchange / "adapter-000001")]
    assert report["num_tensors"] == 8 and report["held_bytes"] == sum(t.numel() * 4 for t in factors.values())
    assert worker.fastreason_beat() == {"checksum": update.checksum}
    layers[names[0]].lora_b_stacked[0][1, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=rf"other values than were sent in: \['{names[0]}.B'\]"):
        worker.fastreason_load(update.path, update.checksum)
    assert worker.fastreason_beat() == {"checksum": "being loaded"}
    del layers[names[0]]
    with pytest.raises(
        ValueError, match=rf"applies no adapter to \['{names[0]}'\]: leave these layers out of lora.targets"
    ):
        worker.fastreason_load(update.path, update.checksum)
    worker.fastreason_restore()
    assert requests[-1] == ("adapter", 7, tmp_path / "first") and worker.fastreason_beat() == {"checksum": None}


def by_name(name):
    """As vLLM's own function divides a factor's name, where a model's names are the checkpoint's."""
    layer, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
    return layer, factor == "lora_A"


def test_the_server_is_told_of_the_adapter_that_it_starts_with():
    from fastreason.config import RolloutConfig

    keys = {"dtype": "bfloat16", "max_model_len": 64, "seed": 0, "device": "cpu"}
    plain = server_command(RolloutConfig(), "/m", 1, **keys)
    assert "--enable-lora" not in plain
    extension = plain.index("--worker-extension-cls") + 1
    assert plain[extension] == "fastreason.rollout.vllm_worker.WeightWorker"
    command = server_command(RolloutConfig(), "/m", 1, **keys, adapter=("/tmp/first", 20))
    assert "--enable-lora" in command
    assert command[extension] == "fastreason.rollout.vllm_adapter.AdapterWorker"
    assert command[command.index("--max-lora-rank") + 1] == "32"
    assert command[command.index("--max-num-batched-tokens") + 1] == "1024", "factors are copied for each of them"
    assert plain[plain.index("--max-num-batched-tokens") + 1] == "4096"
    assert json.loads(command[command.index("--lora-modules") + 1]) == {"name": "adapter", "path": "/tmp/first"}
    environment = server_environment(RolloutConfig(), exchange_dir="/e", device="cpu", adapter_dir="/tmp/first")
    assert environment[ADAPTER_VARIABLE] == "/tmp/first"
    assert ADAPTER_VARIABLE not in server_environment(RolloutConfig(), exchange_dir="/e", device="cpu")


@pytest.mark.parametrize(("lora", "rank"), [(None, None), (SimpleNamespace(max_lora_rank=32), 32)])
def test_a_server_says_which_adapters_it_takes(monkeypatch, lora, rank):
    monkeypatch.setattr(vllm_worker, "describe_server", lambda *described: described)
    worker = vllm_worker.WeightWorker()
    worker.model_config = SimpleNamespace(model="/m", tokenizer="/t", max_model_len=64, dtype=torch.float32)
    worker.vllm_config = SimpleNamespace(lora_config=lora)
    assert worker.fastreason_describe("/probe") == ("/m", "/t", 64, "float32", "/probe", rank)


def test_ranks_are_those_that_vllm_has_room_for():
    assert [padded_rank(rank) for rank in (1, 2, 8, 9, 65, 512)] == [1, 8, 8, 16, 128, 512]


# What is refused


@pytest.mark.parametrize(
    ("keys", "device", "sleeps", "words"),
    [
        ({"rollout": {"engine": "fake"}}, "cpu", False, "rollout.engine=fake applies none, only vllm does"),
        ({"rollout": {"transport": "nccl"}}, "cuda", False, "rollout.transport=nccl sends weights between GPUs"),
        ({}, "cuda", True, "an engine that sleeps gives up the model's own weights"),
        ({"lora": {"rank": 600, "publish": "adapter"}}, "cpu", False, "ranks up to 512, and lora.rank=600"),
        ({"lora": {"rank": 8, "publish": "adapter", "head": True}}, "cpu", False, "lora.head=true"),
        ({"model": {"path": "/m", "dtype": "float32"}}, "cuda", False, "on a GPU vLLM applies none in float32"),
        ({"offline": {"objective": "sft"}}, "cpu", False, "offline.objective=sft has no engine"),
    ],
)
def test_an_engine_that_cannot_apply_it_is_refused_with_the_key(keys, device, sleeps, words):
    raw = {
        "model": {"path": "/m"},
        "data": {},
        "train": {"steps": 1, "prompts_per_step": 1},
        "lora": {"rank": 8, "publish": "adapter"},
    }
    check_adapter_file(Config.model_validate(raw), device, False)
    with pytest.raises(ConfigError, match=f"lora.publish=adapter: .*{words}.*Use lora.publish=merged."):
        check_adapter_file(Config.model_validate({**raw, **keys}), device, sleeps)


def test_a_server_elsewhere_that_takes_other_weights_is_refused():
    mine = {"config": {}, "weights": None, "tokenizer": None, "max_model_len": 8, "dtype": "float32", "probe": "1"}
    same = {**mine, "adapter_rank": 16}
    assert differences(same, same) == []
    assert differences(same, {**mine, "adapter_rank": 64}) == []
    assert differences({**mine, "adapter_rank": 64}, same) != []
    (reason,) = differences(same, {**mine, "adapter_rank": None})
    assert reason.startswith("it takes whole weights, and the run publishes adapters of ranks up to 16")
    (reason,) = differences({**mine, "adapter_rank": None}, same)
    assert reason.startswith("it takes adapters of ranks up to 16, and the run publishes whole weights")
