"""Every key that `fastreason distill` can be told: a section of its own beside those it shares with training runs.

It owns what may be written there and which keys of the shared sections have an effect. What could have none is refused with a
message, never ignored. No heavy import.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from fastreason.config import Config, check_sources, read_raw, validate
from fastreason.errors import ConfigError
from fastreason.models import model_folder
from fastreason.preflight import choose_device, choose_dtype
from fastreason.sections import (
    DataConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TrainConfig,
)

SAMPLING = ("samples_per_prompt", "temperature", "top_p", "top_k", "max_new_tokens")
# Of the sections that are shared with training, the keys that act where an engine of ours answers.
USED = {
    "run": {"hang_timeout_s", "max_restarts"},
    "model": {"path", "dtype", "trust_remote_code", "allow_download"},
    "rollout": {
        "engine",
        "cores",
        "gpus",
        "kv_cache_gib",
        "gpu_memory_utilization",
        "tensor_parallel",
        "port",
        "startup_timeout_s",
        "request_timeout_s",
        "fake_token_s",
    },
}
# Where something else answers, what acts of the same sections; and of any section, what does not.
USED_WITHOUT_ENGINE = {
    "server": {"run": set[str](), "rollout": {"request_timeout_s"}},
    "recorded": {"run": set[str](), "rollout": set[str]()},
}
UNUSED_WITHOUT_ENGINE = {
    "server": {"data": {"max_prompt_tokens"}},
    "recorded": {"data": {"max_prompt_tokens"}, "distill": {*SAMPLING, "seed"}},
}


class DistillConfig(Section):
    samples_per_prompt: int = Field(8, ge=1, description="k, responses per question")
    temperature: float = Field(1.0, ge=0, description="sampling temperature; 0: the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of so much probability")
    top_k: int = Field(0, ge=0, description="sample from so many likeliest tokens; 0: all")
    max_new_tokens: int = Field(1024, ge=1, description="longest response, tokens")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of sampling; each response has its own, made from it")
    concurrency: int = Field(64, ge=1, description="responses in generation or grading at once")
    keep: int = Field(8, ge=1, description="right responses per question that become positives, at most")
    select: Literal["first", "shortest"] = Field(
        "first", description="which right responses become positives: in sample order, or the shortest"
    )
    truncated: Literal["drop", "keep"] = Field(
        "drop", description="responses cut off at max_new_tokens, in positives and pairs: they have no end to learn"
    )
    held_out: int = Field(
        0,
        ge=0,
        description="problems left out: those that a run with the same data section and eval.num_prompts holds out",
    )
    student: str | None = Field(
        None, description="folder of the student's own distill run: only questions that it has solved there are asked"
    )
    url: str | None = Field(None, description="a running server, OpenAI-compatible, in place of an engine of our own")
    responses_column: str | None = Field(
        None,
        description="column of the data with responses (a text or a list of them): verified and selected, none sampled",
    )


class DistillRun(Section):
    """What one `fastreason distill` is told; `model` is null where a server or the data has the responses."""

    run: RunConfig = Field(default_factory=lambda: RunConfig())
    model: ModelConfig | None = None
    data: DataConfig
    reward: RewardConfig = Field(default_factory=lambda: RewardConfig())
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig())
    distill: DistillConfig

    @property
    def source(self) -> str:
        """Who answers: "vllm" | "hf" | "fake" | "server" | "recorded"."""
        if self.distill.responses_column is not None:
            return "recorded"
        return "server" if self.distill.url is not None else self.rollout.engine


def load_distill_config(path: str | Path, overrides: list[str] | None = None) -> DistillRun:
    """Read a YAML file with overrides; raises `ConfigError` with the key, the value, what is allowed and what to do."""
    raw = read_raw(path, overrides)
    if "distill" not in raw:
        raise ConfigError(
            f"{path} has no section distill: is it a recipe of fastreason train? Give one such as configs/mini/distill.yaml."
        )
    raw["distill"] = {} if raw["distill"] is None else raw["distill"]
    config = validate(DistillRun, raw)
    _check_used(config)
    check_sources(config.data, config.reward)
    _check_source(config)
    return config


def dump_distill_config(config: DistillRun) -> str:
    """The resolved config as YAML that `load_distill_config` reads back to an equal config."""
    return yaml.safe_dump(dumped(config), sort_keys=False, allow_unicode=True)


def dumped(config: DistillRun) -> dict[str, Any]:
    """The keys that act, by section; a section without one is left out."""
    content, used = config.model_dump(mode="json"), used_keys(config)
    for name in content:
        if content[name] is not None:
            content[name] = {key: value for key, value in content[name].items() if key in used[name]}
    return {name: keys for name, keys in content.items() if keys != {}}


def used_keys(config: DistillRun) -> dict[str, set[str]]:
    """The keys that act, by section: they depend on who answers."""
    sections = {name: getattr(config, name) for name in type(config).model_fields}
    used = {name: set(type(section).model_fields) for name, section in sections.items() if section is not None} | USED
    if config.source in USED_WITHOUT_ENGINE:
        used |= USED_WITHOUT_ENGINE[config.source]
        for name, unused in UNUSED_WITHOUT_ENGINE[config.source].items():
            used[name] = used[name] - unused
    return used


def engine_config(config: DistillRun) -> Config:
    """The same as engines read it: as a training run, of which nothing is trained."""
    assert config.model is not None
    sampling = {key: getattr(config.distill, key) for key in SAMPLING}
    return Config(
        run=config.run,
        model=config.model,
        data=config.data,
        reward=config.reward,
        rollout=config.rollout.model_copy(update=sampling),
        train=TrainConfig(steps=1, prompts_per_step=1),
    )


def _check_used(config: DistillRun) -> None:
    all_used = used_keys(config)
    where = {"server": "with distill.url", "recorded": "with distill.responses_column"}
    for name, used in all_used.items():
        section = getattr(config, name)
        for key in sorted(section.model_fields_set - used) if section is not None else []:
            advice = f"Use distill.{key}" if name != "distill" and key in all_used["distill"] else "Remove it"
            raise ConfigError(
                f"{name}.{key}: has no effect {where.get(config.source, 'in fastreason distill')}. {advice}; of {name} it "
                f"reads: {', '.join(sorted(used)) or 'nothing'}."
            )


def _check_source(config: DistillRun) -> None:
    distill, source = config.distill, config.source
    if distill.url is not None and distill.responses_column is not None:
        raise ConfigError(
            f"distill.url={distill.url!r} and distill.responses_column={distill.responses_column!r}: responses come from one "
            "of the two. Remove the other."
        )
    if source in ("server", "recorded"):
        key = "distill.url" if source == "server" else "distill.responses_column"
        if config.model is not None:
            raise ConfigError(f"model.path={config.model.path!r}: with {key} no model is loaded. Pass model=null.")
    elif config.model is None:
        raise ConfigError("model.path: missing. Name the teacher, or set distill.url or distill.responses_column.")
    if source == "recorded" and config.data.source == "reasoning_gym":
        raise ConfigError(
            "data.source=reasoning_gym: with distill.responses_column the data holds responses. Use data.source=file or hub."
        )
    if source == "recorded" and distill.held_out:
        raise ConfigError(
            f"distill.held_out={distill.held_out}: which problems a training run holds out is not known of recorded "
            "responses. Set it to 0, and keep evaluation problems out of the file."
        )
    if set(config.reward.functions) <= {"format", "reward_model"}:
        raise ConfigError(
            f"reward.functions={config.reward.functions}: none of them says what is right. Add math, or another reward that "
            "judges the answer."
        )


@contextlib.contextmanager
def named(*names: tuple[str, str]) -> Iterator[None]:
    """Errors of what is shared with training speak of the keys of this command: (there, here)."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for there, here in names:
            text = text.replace(there, here)
        raise ConfigError(text) from error


def anchored(config: DistillRun) -> DistillRun:
    """The config with its local paths made absolute and its dtype said, so that it can be gone on with from anywhere.

    The folder of a training run, as a model, is that of the model it has trained.
    """
    model, data, distill = config.model, config.data, config.distill
    if model is not None:
        model = model.model_copy(update={"dtype": choose_dtype(model.dtype, choose_device("auto"))})
        if Path(model.path).is_dir():
            model = model.model_copy(update={"path": str(model_folder(model.path).resolve())})
    if data.path is not None and Path(data.path).exists():
        data = data.model_copy(update={"path": str(Path(data.path).resolve())})
    if distill.student is not None:
        distill = distill.model_copy(update={"student": str(Path(distill.student).resolve())})
    return config.model_copy(update={"model": model, "data": data, "distill": distill})
