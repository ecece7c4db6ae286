"""Whether two models speak the same tokens, by their tokenizers on disk."""

import json
from contextlib import nullcontext
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastreason import companions, launch
from fastreason.algorithms import resolve_algorithm
from fastreason.companions import load_critic, load_target, resolve_companions
from fastreason.config import parse_config
from fastreason.errors import ConfigError, ModelError
from fastreason.preflight import Decisions, anchor_paths, check_critic, check_teacher
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
    """1024 prompt tokens and 16 of a response by default: by preflight, and by the launcher."""
    teacher = save(tmp_path / "teacher")
    taught, elsewhere = config(model, teacher), config("nobody/model", teacher)
    checks = [
        lambda: check_teacher(taught),
        lambda: check_teacher(elsewhere),
        lambda: resolve_companions(taught, model),
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


# What the launcher finds, and the ranks are told


@pytest.fixture
def hub(monkeypatch):
    """A hub with nothing in its cache: {name: folder}, and what was asked of it, (name, whether with weights)."""
    folders, asked = {}, []

    def download(name, allow_patterns):
        asked.append((name, any(fnmatch("model.safetensors", pattern) for pattern in allow_patterns)))
        return str(folders[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("fastreason.models._hub_snapshot", lambda name: None)
    return SimpleNamespace(folders=folders, asked=asked)


def session_of(config, tmp_path, only=None):
    """The session of a run of which nothing is started."""
    decisions = Decisions(device="cpu", attention="sdpa", liger=False)
    with launch.folders(config, tmp_path, decisions, resume=False, only=only, groups_dir=None) as session:
        return session


def test_a_teacher_on_the_hub_is_fetched_by_the_launcher_and_looked_for_by_no_rank(tmp_path, model, hub, monkeypatch):
    """Its tokenizer first. The ranks run without a network, and load the folder that the session names."""
    hub.folders["nobody/teacher"] = save(tmp_path / "teacher", eos_token="<end>")
    taught = config(model, "nobody/teacher", allow_download=True)
    session = session_of(taught, tmp_path)
    assert hub.asked == [("nobody/teacher", False), ("nobody/teacher", True)]
    assert (session.teacher_dir, session.critic_dir) == (str(tmp_path / "teacher"), None)
    assert session.silent_ids == (2, 3)

    def refuse(*arguments, **keys):
        raise AssertionError("a rank looked for a model")

    loaded = []
    monkeypatch.setattr(companions, "resolve_model", refuse)
    monkeypatch.setattr(companions, "load_frozen", lambda folder, *rest: loaded.append(folder))
    load_target(session, taught, resolve_algorithm(taught), None, len(WORDS))
    assert loaded == [tmp_path / "teacher"]


def test_of_a_teacher_that_cannot_be_compared_no_weights_are_fetched(tmp_path, model, hub):
    hub.folders["nobody/teacher"] = save(tmp_path / "other", [*WORDS[:4], "two", "one", "three"])
    with pytest.raises(ConfigError, match="has another tokenizer than model"):
        session_of(config(model, "nobody/teacher", allow_download=True), tmp_path)
    assert hub.asked == [("nobody/teacher", False)]
    with pytest.raises(ModelError, match=r"teacher\.path='nobody/teacher'.*Pass teacher\.allow_download=true"):
        session_of(config(model, "nobody/teacher"), tmp_path)


@pytest.mark.parametrize("only", [None, "rollout"])
def test_the_weights_of_a_served_teacher_are_never_fetched(tmp_path, model, hub, only):
    hub.folders["nobody/teacher"] = save(tmp_path / "teacher")
    served = config(model, "nobody/teacher", allow_download=True, where="server", url="http://u")
    session = session_of(served, tmp_path, only)
    assert hub.asked == [("nobody/teacher", False)] and session.teacher_dir is None
    assert load_target(session, served, resolve_algorithm(served), None, len(WORDS)) is None


def test_a_run_that_only_generates_fetches_neither_teacher_nor_critic(tmp_path, model, hub):
    for made in (config(model, "nobody/teacher", allow_download=True), with_critic(model, "nobody/critic")):
        session = session_of(made, tmp_path, only="rollout")
        assert hub.asked == [] and session.teacher_dir is session.critic_dir is None


def with_critic(model, path, **critic):
    changes = {"critic": {"path": str(path), **critic}, "algorithm": {"name": "ppo"}, "teacher": {}}
    raw = {**config(model, model).model_dump(), **changes}
    raw["model"]["allow_download"] = True
    return parse_config(raw)


def test_a_critic_on_the_hub_is_fetched_by_the_launcher_too(tmp_path, model, hub, monkeypatch):
    hub.folders["nobody/critic"] = critic = save(tmp_path / "critic")
    session = session_of(with_critic(model, "nobody/critic"), tmp_path)
    assert hub.asked == [("nobody/critic", True)] and session.critic_dir == str(critic)
    (critic / "config.json").write_text(json.dumps({"max_position_embeddings": 1039}))
    with pytest.raises(ConfigError, match=r"max_position_embeddings=1039 of the model of critic\.path"):
        session_of(with_critic(model, "nobody/critic"), tmp_path)


def test_the_rate_of_a_critic_is_its_own_and_constant(tmp_path, model, monkeypatch):
    """Whatever the policy's does."""
    made = with_critic(model, model, lr=3e-5)
    raw = made.model_dump()
    raw["train"] |= {"lr": 1e-6, "lr_schedule": "linear", "warmup_share": 0.25}
    given = []
    monkeypatch.setattr(companions, "load_value_model", lambda *arguments: None)
    monkeypatch.setattr("fastreason.update.deepspeed.DeepSpeedCritic", lambda module, train, *rest: given.append(train))
    load_critic(session_of(made, tmp_path), parse_config(raw), None)
    (train,) = given
    assert (train.lr, train.lr_schedule, train.warmup_steps, train.warmup_share) == (3e-5, "constant", 0, 0.0)


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
