"""A server elsewhere is looked at before it is used: another model, vocabulary, length, dtype, storage or key is refused."""

import asyncio
import json

import pytest
import torch
from engine_site import KEY, Site
from safetensors.torch import save_file

from fastreason.config import RolloutConfig
from fastreason.errors import EngineError
from fastreason.exchange import EXCHANGE_VARIABLE
from fastreason.rollout import fake_server
from fastreason.rollout.fleet import Fleet
from fastreason.rollout.identity import describe_model, make_verify, weights_digest
from fastreason.rollout.vllm import VllmEngine
from fastreason.rollout.vllm_middleware import KEY_VARIABLE

pytestmark = pytest.mark.timeout(120)


def make_model(folder, seed=0, words=("a", "b"), **config):
    from tokenizers import Tokenizer, models

    folder.mkdir()
    described = {
        "hidden_size": 8,
        "vocab_size": 2,
        "model_type": "llama",
        "transformers_version": folder.name,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(described))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(2, 300, generator=generator) for name in ("x.weight", "y.weight")}
    save_file(tensors, folder / "model.safetensors")
    vocabulary = {word: index for index, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=words[0])).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a fleet of one server elsewhere, which serves `there`, for a run with the model `mine`."""
    shared = tmp_path / "shared"
    (shared / "run").mkdir(parents=True)
    (shared / "run" / "probe").write_text("42")
    monkeypatch.setenv(EXCHANGE_VARIABLE, str(shared))
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    mine = make_model(tmp_path / "mine")

    def go(there=mine, key=KEY, probe=shared / "run" / "probe", then=None, **setup):
        async def run():
            site = Site(monkeypatch, model_dir=str(there), **{"dtype": "float32", **setup})
            await site.up()
            described = {
                **describe_model(str(mine), str(mine)),
                "max_model_len": 64,
                "dtype": "float32",
                "adapter_rank": None,
            }
            engine = VllmEngine(
                site.url, key, RolloutConfig(startup_timeout_s=5), name="fake", spare=True, hang_timeout_s=0.5,
                key_hint=": set THE_KEY", verify=make_verify(described, probe),
            )  # fmt: skip
            fleet = Fleet([engine], 5.0)
            try:
                await fleet.start()
                return await then(site, engine) if then else engine.is_alive
            finally:
                await fleet.close()
                await site.down()

        return asyncio.run(asyncio.wait_for(run(), 30))

    return go


def test_a_server_of_the_same_model_in_another_folder_is_taken(start, tmp_path):
    assert start(make_model(tmp_path / "copy")) and start(max_model_len=65)


@pytest.mark.parametrize(
    ("model", "setup", "message"),
    [
        ({"hidden_size": 9}, {}, r"another model than model\.path \(hidden_size is 9 there and 8 here\)"),
        ({"seed": 1}, {}, r"its model has other weights than model\.path"),
        ({"words": ("a", "c")}, {}, r"its tokenizer has another vocabulary"),
        ({}, {"max_model_len": 63}, r"longest sequence is 63 tokens, .* = 64: start it with --max-model-len 64"),
        ({}, {"dtype": "bfloat16"}, r"computes in bfloat16, and the run in float32: .* model\.dtype=float32"),
    ],
)
def test_a_server_that_serves_something_else_is_refused(start, tmp_path, model, setup, message):
    with pytest.raises(
        EngineError, match=r"the fake engine at http.* is of no use to this run: .*" + message
    ) as caught:
        start(make_model(tmp_path / "other", **model), **setup)
    assert str(caught.value).count(";") == 0, "one difference has one reason"


def test_a_server_without_the_storage_is_refused(start, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("42")
    with pytest.raises(
        EngineError, match=r"cannot read what this run writes into .*rollout\.exchange_dir .*--exchange-dir"
    ):
        start(probe=elsewhere)


def test_a_server_that_describes_itself_in_other_words_is_of_another_version(start, monkeypatch):
    monkeypatch.setattr(fake_server, "describe_server", lambda *described: {"config": {}})
    with pytest.raises(EngineError, match=r"the fake engine at http.* \(KeyError: .*of another version of fastreason"):
        start()


def test_a_server_with_another_key_is_refused(start):
    with pytest.raises(EngineError, match=r"refused the key of this run \(401\): set THE_KEY"):
        start(key="guess")


def test_a_server_that_comes_back_with_another_model_is_not_taken_back(start, tmp_path):
    other = make_model(tmp_path / "other", seed=1)

    async def replace(site, engine):
        async def until(condition):
            while not condition():
                await asyncio.sleep(0.02)

        await site.down()
        mine, site._setup["model_dir"] = site._setup["model_dir"], str(other)
        await site.up()
        await until(lambda: "other weights" in (engine.trouble or ""))
        assert not engine.is_alive
        await site.down()
        site._setup["model_dir"] = mine
        await site.up()
        await until(lambda: engine.is_alive)

    start(then=replace)


def test_weights_and_a_pause_that_another_run_has_left_are_taken_back_before_the_first_request(start):
    async def leave_and_start_again(site, engine):
        server = site.engines[0]
        server._held = "of another run"
        server._may_begin.clear()
        server._may_go_on.clear()
        await engine.close()
        heir = VllmEngine(site.url, KEY, RolloutConfig(), name="fake", spare=True, verify=engine._verify)
        await heir.start()
        assert server._held is None and server._may_begin.is_set() and server._may_go_on.is_set()
        await heir.close()

    start(then=leave_and_start_again)


def test_the_digest_of_weights_is_of_the_tensors_and_not_of_the_files(tmp_path):
    folder = make_model(tmp_path / "m")
    digest = weights_digest(folder)
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for index, name in enumerate(reversed(sorted(tensors))):
        save_file({name: tensors[name]}, folder / f"model-{index}.safetensors", metadata={"format": "pt"})
    assert weights_digest(folder) == digest
    tensors["x.weight"][-1, -1] += 1
    save_file({"x.weight": tensors["x.weight"]}, folder / "model-1.safetensors")
    assert weights_digest(folder) != digest
