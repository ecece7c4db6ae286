"""What a config file may say, and that every error names the key, the value, what is allowed and what to do."""

import re
from pathlib import Path

import pytest
import yaml

from fastreason.config import (
    Config,
    batch_derivation,
    dump_config,
    load_config,
    num_updates,
    parse_config,
    updates_prompts,
)
from fastreason.errors import ConfigError


def minimal(**sections):
    raw = {
        "model": {"path": "some/model"},
        "data": {"task": "chain_sum"},
        "train": {"steps": 4, "prompts_per_step": 6},
    }
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys}
    return raw


def refused(raw, *parts):
    """Parsing fails, with every part in the message."""
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"
    return message


def test_the_smallest_config_has_all_sections():
    config = parse_config(minimal())
    assert config.rollout.samples_per_prompt == 8 and config.train.lr == 1e-6
    assert config.reward.functions == {"math": 1.0}


@pytest.mark.parametrize(
    ("section", "key", "near"),
    [
        ("train", "learning_rates", None),
        ("train", "prompts_per_stp", "prompts_per_step"),
        ("rollout", "max_stalness", "max_staleness"),
        ("checkpoint", "keep_lasts", "keep_last"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest(section, key, near):
    message = refused(minimal(**{section: {key: 1}}), f"{section}.{key}: unknown key", f"{section} has: ")
    if near:
        assert f"did you mean {near!r}?" in message


def test_an_unknown_section_is_an_error_with_the_nearest():
    refused(
        {**minimal(), "rolout": {}}, "rolout: unknown key; did you mean 'rollout'?", "the top level has: run, model"
    )


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ("train", "steps", "many", "valid integer"),
        ("train", "steps", 2.5, "valid integer"),
        ("train", "steps", 0, "greater than or equal to 1"),
        ("train", "lr", "fast", "valid number"),
        ("train", "lr", 0.0, "greater than 0"),
        ("train", "zero_stage", 4, "0, 1, 2 or 3"),
        ("train", "adam_beta1", 1.0, "less than 1"),
        ("train", "lr_schedule", "step", "'constant', 'linear' or 'cosine'"),
        ("rollout", "engine", "sglang", "'vllm', 'hf' or 'fake'"),
        ("rollout", "temperature", 0, "greater than 0"),
        ("rollout", "top_p", 1.5, "less than or equal to 1"),
        ("rollout", "max_staleness", -1, "greater than or equal to 0"),
        ("rollout", "port", 70000, "65535"),
        ("rollout", "cores", True, "valid string"),
        ("algorithm", "aggregation", "mean", "'token_mean', 'sequence_mean' or 'constant'"),
        ("algorithm", "dual_clip", 1.0, "greater than 1"),
        ("run", "name", "../elsewhere", "match pattern"),
        ("run", "name", "", "match pattern"),
        ("run", "seed", -1, "greater than or equal to 0"),
        ("model", "dtype", "float16", "'bfloat16' or 'float32'"),
        ("reward", "functions", ["math"], "valid dictionary"),
    ],
)
def test_a_value_that_cannot_be_names_key_value_and_what_is_allowed(section, key, value, allowed):
    refused(minimal(**{section: {key: value}}), f"{section}.{key}={value!r}: ", allowed)


def test_the_description_of_a_key_is_part_of_its_error():
    refused(minimal(train={"steps": 0}), "batches to train on")


@pytest.mark.parametrize(("section", "key"), [("model", "path"), ("train", "steps"), ("train", "prompts_per_step")])
def test_a_missing_key_says_how_to_give_it(section, key):
    raw = minimal()
    del raw[section][key]
    refused(raw, f"{section}.{key}: missing", f"pass {section}.{key}=...")


def test_everything_wrong_is_told_at_once():
    message = refused(minimal(train={"steps": 0, "lrr": 1}, rollout={"top_p": 2}))
    assert [line.split(":")[0].split("=")[0] for line in message.splitlines()] == [
        "rollout.top_p",
        "train.steps",
        "train.lrr",
    ]


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        (
            {"train": {"prompts_per_update": 4}},
            ["train.prompts_per_update=4", "train.prompts_per_step=6", "Choose a divisor"],
        ),
        (
            {"train": {"ranks": 3, "prompts_per_update": 2}, "rollout": {"samples_per_prompt": 1}},
            ["train.ranks=3", "only 2 completions", "fewer ranks or more prompts"],
        ),
        (
            {"train": {"micro_batch_tokens": 16}, "rollout": {"max_new_tokens": 16}},
            ["train.micro_batch_tokens=16", "rollout.max_new_tokens=16", "Raise it"],
        ),
        ({"rollout": {"top_p": 0.9}}, ["rollout.top_p=0.9", "rollout.top_k=0", "Train with top_p=1 and top_k=0"]),
        ({"rollout": {"top_k": 50}}, ["rollout.top_p=1.0", "rollout.top_k=50"]),
        ({"data": {"task": None}}, ["data.task: missing", "data.source=reasoning_gym", "chain_sum"]),
        ({"data": {"source": "file"}}, ["data.path: missing", "data.source=file"]),
        ({"data": {"source": "hub"}}, ["data.path: missing", "data.source=hub"]),
        ({"data": {"user_template": "Solve this:"}}, ["data.user_template='Solve this:'", "{problem}"]),
        ({"reward": {"functions": {}}}, ["reward.functions={}", "{math: 1.0}"]),
        ({"reward": {"functions": {"reward_model": 1.0}}}, ["reward.reward_model_url: missing"]),
        ({"train": {"warmup_steps": 13, "prompts_per_update": 2}}, ["train.warmup_steps=13", "12 updates"]),
    ],
)
def test_keys_that_cannot_work_together_are_refused(sections, parts):
    refused(minimal(**sections), *parts)


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"prompts_per_update": 3}},
        {"train": {"ranks": 2, "prompts_per_update": 2}, "rollout": {"samples_per_prompt": 1}},
        {"train": {"micro_batch_tokens": 17}, "rollout": {"max_new_tokens": 16}},
        {"data": {"source": "file", "path": "x.jsonl", "task": None}},
        {"reward": {"functions": {"reward_model": 1.0}, "reward_model_url": "http://127.0.0.1:1"}},
        {"train": {"warmup_steps": 12, "prompts_per_update": 2}},
    ],
)
def test_keys_at_the_edge_of_what_works_are_taken(sections):
    assert isinstance(parse_config(minimal(**sections)), Config)


def test_updates_are_counted():
    assert (updates_prompts(parse_config(minimal())), num_updates(parse_config(minimal()))) == (6, 4)
    config = parse_config(minimal(train={"prompts_per_update": 2}, rollout={"max_new_tokens": 5}))
    assert (updates_prompts(config), num_updates(config)) == (2, 12)
    lines = batch_derivation(config)
    assert lines[0] == "step: 6 prompts x 8 samples = 48 completions, at most 240 new tokens"
    assert lines[1] == "update: 2 prompts = 16 completions, 3 update(s) a step, 12 in the run"
    assert lines[2] == "staleness: at most 1 version(s); 12 prompts admitted before the first update"


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(minimal()))
    return path


def test_overrides_reach_their_keys_and_are_yaml(file):
    config = load_config(
        file,
        [
            "train.lr=1e-5",
            "rollout.max_staleness=0",
            "data.task_args={min_terms: 2}",
            "data.task_args.max_terms=3",
            "train.prompts_per_update=null",
            "eval.num_prompts=7",
            "data.user_template='Q: {problem} = ?'",
            "reward.functions={math: 1.0, format: 0.1}",
        ],
    )
    assert config.train.lr == 1e-5 and config.rollout.max_staleness == 0 and config.eval.num_prompts == 7
    assert config.data.task_args == {"min_terms": 2, "max_terms": 3}
    assert config.train.prompts_per_update is None
    assert config.data.user_template == "Q: {problem} = ?"
    assert config.reward.functions == {"math": 1.0, "format": 0.1}


@pytest.mark.parametrize("override", ["train.lr", "=3", ".lr=3", "train.=3", "train..lr=3"])
def test_an_override_of_another_form_is_refused(file, override):
    with pytest.raises(ConfigError, match=re.escape(f"override {override!r} is not of the form section.key=value")):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.steps.more=1", "'steps' is a value, not a section"),
        ("train.steps=[1", "not valid YAML"),
        ("trian.steps=1", "trian: unknown key; did you mean 'train'"),
        ("train=5", "train=5: "),
    ],
)
def test_an_override_that_cannot_be_set_says_why(file, override, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        load_config(file, [override])


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001"])
def test_a_small_number_is_read_as_people_write_it(file, text):
    """YAML 1.1 takes 1e-6 for text."""
    file.write_text(file.read_text() + f"log: {{entropy_floor: {text}}}\n")
    assert load_config(file, [f"train.lr={text}"]).train.lr == 1e-6
    assert load_config(file).log.entropy_floor == 1e-6


@pytest.mark.parametrize(("text", "cores"), [("0", "0"), ("'0'", "0"), ("0-3", "0-3"), ("1,2", "1,2"), ("null", None)])
def test_cores_and_gpus_may_be_one_number(file, text, cores):
    config = load_config(file, [f"{s}.{key}={text}" for s in ("rollout", "train") for key in ("cores", "gpus")])
    assert config.rollout.cores == config.train.cores == config.rollout.gpus == config.train.gpus == cores


def test_a_dumped_config_loads_to_the_same(file, tmp_path):
    config = load_config(
        file,
        [
            "train.lr=1e-7",
            "rollout.cores=0",
            "data.system_prompt='é \"q\"'",
            "data.task_args={a: [1, 2.5]}",
            "run.seed=3",
        ],
    )
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config
    assert set(yaml.safe_load(dump_config(config))) == set(Config.model_fields)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml' does not exist"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: [", "is not valid YAML"),
        ("- train\n", "holds a list"),
        ("just text", "holds a str"),
        ("", "model: missing"),
    ],
)
def test_a_file_that_is_no_config_says_why(tmp_path, text, reason):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_config(path)


def fields(model, prefix=""):
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def test_every_key_says_what_it_means():
    obvious = {"train.adam_beta1", "train.adam_beta2", "train.adam_eps", "log.wandb_project"}
    undescribed = {name for name, field in fields(Config) if not field.description}
    assert undescribed <= obvious


def test_a_config_cannot_change_during_a_run():
    config = parse_config(minimal())
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0


@pytest.mark.parametrize(("text", "value"), [("off", "off"), ("on", "on"), ("auto", "auto")])
def test_a_switch_may_be_written_without_quotes(tmp_path, text, value):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: x}\ndata: {task: chain_sum}\ntrain: {steps: 1, prompts_per_step: 1}\n")
    assert load_config(path, [f"train.share_prompts={text}"]).train.share_prompts == value
    assert load_config(path, [f"model.liger={text}"]).model.liger == value


@pytest.mark.parametrize(
    ("stage", "offload", "least"),
    [(0, "cpu", 1), (0, "cpu_weights", 3), (2, "cpu_weights", 3), (1, "cpu", None), (3, "cpu_weights", None)],
)
def test_what_zero_cannot_keep_on_the_host_is_refused(stage, offload, least):
    raw = {"model": {"path": "m"}, "data": {"task": "chain_sum"}}
    raw["train"] = {"steps": 1, "prompts_per_step": 1, "zero_stage": stage, "offload": offload}
    if least is None:
        assert parse_config(raw).train.offload == offload
        return
    with pytest.raises(
        ConfigError, match=rf"train\.offload={offload} with train\.zero_stage={stage}.*stage {least} on"
    ):
        parse_config(raw)
