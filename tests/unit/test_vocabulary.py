"""Whether two models speak the same tokens, by their tokenizers on disk."""

import json
from contextlib import nullcontext
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastreason.algorithms import resolve_algorithm
from fastreason.companions import ends_of_one_model, load_target
from fastreason.config import parse_config
from fastreason.errors import ConfigError, ModelError
from fastreason.preflight import anchor_paths, check_critic, check_teacher
from fastreason.vocabulary import check_same_vocabulary

WORDS = ["<pad>", "<s>", "</s>", "<end>", "one", "two", "three"]


def save(folder, words=WORDS, ends=None, **special):
    """A model's folder without a model: a tokenizer, and where a generation ends."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=None))
    tokens = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"} | special
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(words)}))
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model")


def test_the_same_vocabulary_passes_whatever_the_padding(tmp_path, model):
    teacher = save(tmp_path / "teacher", pad_token="three")
    (teacher / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128}))
    assert check_same_vocabulary(model, teacher) == frozenset()
    assert check_same_vocabulary(model, model) == frozenset()


def test_another_vocabulary_is_refused_by_its_first_differences(tmp_path, model):
    other = [*WORDS[:4], "two", "one", "three", "four"]
    with pytest.raises(
        ConfigError, match=r"teacher\.path: .*'one' is 4 here, 5 there; 'two' is 5 here, 4 there; 'four' is"
    ):
        check_same_vocabulary(model, save(tmp_path / "teacher", other))


def test_another_beginning_is_refused(tmp_path, model):
    with pytest.raises(ConfigError, match="bos_token_id is 1 here, 3 there"):
        check_same_vocabulary(model, save(tmp_path / "teacher", bos_token="<end>"))


@pytest.mark.parametrize(
    ("ours", "theirs", "differ"),
    [
        ({}, {"eos_token": "<end>"}, {2, 3}),
        ({"ends": [2, 3]}, {"eos_token": "<end>", "ends": [2, 3]}, set()),
        ({"ends": 2}, {"ends": [3, 2]}, {3}),
    ],
)
def test_ends_of_one_model_alone_are_named(tmp_path, ours, theirs, differ):
    assert check_same_vocabulary(save(tmp_path / "a", **ours), save(tmp_path / "b", **theirs)) == differ


def test_a_teacher_without_a_tokenizer_names_the_key(tmp_path, model):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"teacher\.path: the tokenizers cannot be compared"):
        check_same_vocabulary(model, tmp_path / "empty")


def config(model, teacher, **keys):
    return parse_config(
        {
            "model": {"path": str(model)},
            "data": {"task": "chain_sum"},
            "teacher": {"path": str(teacher), **keys},
            "algorithm": {"name": "kdrl"},
            "rollout": {"samples_per_prompt": 2},
            "train": {"steps": 1, "prompts_per_step": 1},
        }
    )


def test_preflight_compares_folders_before_anything_starts(tmp_path, model):
    teacher = save(tmp_path / "teacher")
    assert check_teacher(config(model, teacher)) == []
    assert check_teacher(config(model, model)) == []
    other = save(tmp_path / "other", [*WORDS[:4], "two", "one", "three"])
    with pytest.raises(ConfigError, match="has another tokenizer than model"):
        check_teacher(config(model, other))


def test_preflight_says_what_it_cannot_compare(model):
    unchecked = check_teacher(config(model, "nobody/teacher"))
    assert len(unchecked) == 2 and all("teacher.path='nobody/teacher'" in line for line in unchecked)
    with pytest.raises(ModelError, match=r"teacher\.path='/nowhere/teacher': there is no such folder"):
        check_teacher(config(model, "/nowhere/teacher"))


def test_preflight_looks_for_the_critic_too(tmp_path, model):
    def ppo(path):
        changes = {"critic": {"path": path}, "algorithm": {"name": "ppo"}, "teacher": {}}
        return parse_config({**config(model, model).model_dump(), **changes})

    assert check_critic(ppo(None)) == check_critic(ppo(str(model))) == []
    (line,) = check_critic(ppo("nobody/critic"))
    assert line.startswith("critic.path='nobody/critic'")
    with pytest.raises(ModelError, match=r"critic\.path='/nowhere/critic': there is no such folder"):
        check_critic(ppo("/nowhere/critic"))


def test_positions_that_end_before_a_response_can_are_refused(tmp_path, model):
    """1024 prompt tokens and 16 of a response by default: by preflight, and at the trainer's start."""
    teacher, session = save(tmp_path / "teacher"), SimpleNamespace(model_dir=str(model))
    taught, elsewhere = config(model, teacher), config("nobody/model", teacher)
    checks = [
        lambda: check_teacher(taught),
        lambda: check_teacher(elsewhere),
        lambda: ends_of_one_model(session, taught, resolve_algorithm(taught)),
    ]
    for limit in (1040, 1039):
        (teacher / "config.json").write_text(json.dumps({"max_position_embeddings": limit}))
        for check in checks:
            with (
                pytest.raises(ConfigError, match=r"= 1040 is more than max_position_embeddings=1039 .*teacher\.path")
                if limit < 1040
                else nullcontext()
            ):
                check()


def test_positions_of_a_critic_that_end_before_a_response_can_are_refused(tmp_path, model):
    short = save(tmp_path / "short")
    (short / "config.json").write_text(json.dumps({"max_position_embeddings": 1039}))
    raw = {
        **config(model, model).model_dump(),
        "critic": {"path": str(short)},
        "algorithm": {"name": "ppo"},
        "teacher": {},
    }
    with pytest.raises(ConfigError, match=r"max_position_embeddings=1039 of the model of critic\.path"):
        check_critic(parse_config(raw))


@pytest.mark.parametrize("where", ["server", "trainer"])
def test_tokenizers_are_compared_without_a_teachers_weights(tmp_path, model, monkeypatch, where):
    """Of a teacher on the hub nothing else is fetched before they are known to be equal; a server's weights never."""
    teacher, asked = save(tmp_path / "teacher"), []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        return str(teacher)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("fastreason.models._hub_snapshot", lambda name: None)
    served = {"where": "server", "url": "http://u"} if where == "server" else {}
    taught = config(model, "nobody/teacher", allow_download=True, **served)
    algorithm, session = resolve_algorithm(taught), SimpleNamespace(model_dir=str(model))
    assert ends_of_one_model(session, taught, algorithm) == frozenset()
    assert len(asked) == 1 and not [pattern for pattern in asked[0] if fnmatch("model.safetensors", pattern)]
    if where == "server":
        assert load_target(session, taught, algorithm, None, len(WORDS)) is None and len(asked) == 1


def test_each_tokenizer_may_run_the_code_that_its_own_key_trusts(tmp_path, model, monkeypatch):
    teacher, trusted = save(tmp_path / "teacher"), {}
    load = AutoTokenizer.from_pretrained

    def note(folder, trust_remote_code=False):
        trusted[folder.name] = trust_remote_code
        return load(folder)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", note)
    both = config(model, teacher)
    check_teacher(both.model_copy(update={"model": both.model.model_copy(update={"trust_remote_code": True})}))
    assert trusted == {"model": True, "teacher": False}


def test_paths_of_teacher_and_critic_do_not_depend_on_the_folder(tmp_path, model, monkeypatch):
    save(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    anchored = anchor_paths(config("model", "teacher"))
    assert anchored.teacher.path == str((tmp_path / "teacher").resolve())
    assert anchor_paths(config("model", "nobody/teacher")).teacher.path == "nobody/teacher"
