"""What a run can be told: loads YAML, applies `section.key=value` overrides, checks arithmetic.

The keys themselves are in `sections.py`. Everything that can be found wrong without a model, a tokenizer or the network
is found here, and reported with the key, the value, what is allowed and what to do. Imports neither torch nor transformers.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from fastreason.errors import ConfigError
from fastreason.sections import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OfflineConfig,
    ResourcesConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TeacherConfig,
    TrainConfig,
)

S = TypeVar("S", bound=Section)

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OfflineConfig",
    "ResourcesConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
    "apply_override",
    "batch_derivation",
    "check_arithmetic",
    "check_sources",
    "dump_config",
    "load_config",
    "num_updates",
    "parse_config",
    "read_raw",
    "updates_prompts",
    "validate",
]


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML), check, and return the config.

    Raises `ConfigError` with the key, the value, what is allowed and what to do.
    """
    return parse_config(read_raw(path, overrides))


def read_raw(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A YAML file's mapping with `section.key=value` overrides, unchecked; raises `ConfigError` where it is none."""
    path = Path(path)
    if not path.is_file():
        shipped = sorted(str(p) for p in Path("configs").glob("**/*.yaml"))
        hint = f" Recipes here: {', '.join(shipped[:8])}." if shipped else ""
        raise ConfigError(f"config file {str(path)!r} does not exist.{hint} Give the path of a YAML file.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; a config is a mapping of sections, e.g. 'train:'.")
    for override in overrides or []:
        apply_override(raw, override)
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of a raw config in place, from `section.key=value`."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. train.lr=1e-6.")
    node = raw
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section.")
        node = child
    try:
        node[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def parse_config(raw: dict[str, Any]) -> Config:
    """Check a raw mapping and return the config; raises `ConfigError` that lists everything found wrong."""
    config = validate(Config, raw)
    check_arithmetic(config)
    return config


def validate(root: type[S], raw: dict[str, Any]) -> S:
    """A raw mapping as the sections of `root`; raises `ConfigError` that lists every key found wrong."""
    try:
        return root.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(item, root) for item in error.errors())) from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    raw = config.model_dump(mode="json")
    if not config.train.steps:  # left out, until the rows of offline.epochs are counted
        del raw["train"]["steps"]
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _section_of(annotation: Any) -> Any:
    """The section that a field holds, also where it may be null."""
    return next((each for each in get_args(annotation) if hasattr(each, "model_fields")), annotation)


def _section_fields(path: tuple[Any, ...], root: type[Section]) -> list[str]:
    """The keys allowed under a dotted path; empty where the path ends in a free mapping."""
    model: Any = root
    for part in path:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = _section_of(field.annotation)
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _describe(location: tuple[Any, ...], root: type[Section]) -> str:
    model: Any = root
    field = None
    for part in location:
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            break
        field = fields[part]
        model = _section_of(field.annotation)
    return f" ({field.description})" if field is not None and field.description else ""


def _explain(item: Any, root: type[Section]) -> str:
    location = tuple(item["loc"])
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        allowed = _section_fields(location[:-1], root)
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        where = ".".join(str(p) for p in location[:-1]) or "the top level"
        guess = f"did you mean {near[0]!r}? " if near else ""
        return f"{key}: unknown key; {guess}{where} has: {', '.join(allowed)}."
    if item["type"] == "missing":
        return (
            f"{key}: missing, and there is no default{_describe(location, root)}. Add it to the file or pass {key}=..."
        )
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{key}={item['input']!r}: {message}{_describe(location, root)}."


def check_arithmetic(config: Config) -> None:
    """Raise `ConfigError` where keys that are each valid cannot work together."""
    train, data = config.train, config.data
    if "{problem}" not in data.user_template:
        raise ConfigError(
            f"data.user_template={data.user_template!r} has no {{problem}} in it: the model would not see it."
        )
    if train.warmup_steps and train.warmup_share:
        raise ConfigError(
            f"train.warmup_share={train.warmup_share} beside train.warmup_steps={train.warmup_steps}: both say how long "
            "the warm-up is. Leave one out."
        )
    if not train.steps and config.offline.epochs is None:
        raise ConfigError(
            "train.steps: missing, and there is no default (batches to train on). Add it to the file or pass train.steps=..."
            + (", or offline.epochs=..." if config.offline.objective else "")
        )
    allowed = {"none": 0, "cpu": 1, "cpu_weights": 3}
    if train.zero_stage < allowed[train.offload]:
        raise ConfigError(
            f"train.offload={train.offload} with train.zero_stage={train.zero_stage}: ZeRO can keep that in the CPU's memory "
            f"from stage {allowed[train.offload]} on. Raise train.zero_stage, or use train.offload=none."
        )
    if config.offline.objective is None:
        _check_online(config)
    if train.steps and train.warmup_steps > num_updates(config):
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps} is more than the {num_updates(config)} updates of the run."
        )


def _check_online(config: Config) -> None:
    """What only concerns a run that generates."""
    train, rollout, data, reward = config.train, config.rollout, config.data, config.reward
    changed = {key: value for key, value in config.offline if value != type(config.offline).model_fields[key].default}
    for key, value in changed.items():
        raise ConfigError(
            f"offline.{key}={value}: has no effect without offline.objective. Set that too (sft, redi, ...), or leave the "
            "key out."
        )
    update = train.prompts_per_update
    if update is not None and train.prompts_per_step % update:
        raise ConfigError(
            f"train.prompts_per_update={update} does not divide train.prompts_per_step={train.prompts_per_step}: "
            "a batch is cut into equal updates. Choose a divisor."
        )
    sequences = (update or train.prompts_per_step) * rollout.samples_per_prompt
    if sequences < train.ranks:
        raise ConfigError(
            f"train.ranks={train.ranks}: one update has only {sequences} completions (prompts_per_update x "
            "rollout.samples_per_prompt), fewer than the ranks. Use fewer ranks or more prompts."
        )
    longest = rollout.max_new_tokens + 1
    if train.micro_batch_tokens < longest:
        raise ConfigError(
            f"train.micro_batch_tokens={train.micro_batch_tokens} is smaller than one response can be "
            f"(rollout.max_new_tokens={rollout.max_new_tokens} plus a prompt). Raise it."
        )
    if rollout.top_p < 1 or rollout.top_k > 0:
        raise ConfigError(
            f"rollout.top_p={rollout.top_p}, rollout.top_k={rollout.top_k}: both change the distribution that is "
            "sampled from, and the trainer's ratio would be wrong. Train with top_p=1 and top_k=0."
        )
    check_sources(data, reward)
    if train.warmup_steps > num_updates(config):
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps} is more than the {num_updates(config)} updates of the run."
        )


def check_sources(data: DataConfig, reward: RewardConfig) -> None:
    """Raise `ConfigError` where problems or rewards lack what they need."""
    if data.source == "reasoning_gym" and not data.task:
        raise ConfigError("data.task: missing; data.source=reasoning_gym needs the name of a task, e.g. chain_sum.")
    if data.source in ("file", "hub") and not data.path:
        raise ConfigError(f"data.path: missing; data.source={data.source} needs it.")
    if not reward.functions:
        raise ConfigError("reward.functions={} is empty: name at least one, e.g. {math: 1.0}.")
    if "reward_model" in reward.functions and not reward.reward_model_url:
        raise ConfigError("reward.reward_model_url: missing; reward.functions asks for reward_model.")


def num_updates(config: Config) -> int:
    """Optimizer updates of the whole run."""
    return config.train.steps * (config.train.prompts_per_step // updates_prompts(config))


def updates_prompts(config: Config) -> int:
    """Prompts per optimizer update."""
    return config.train.prompts_per_update or config.train.prompts_per_step


def batch_derivation(config: Config) -> list[str]:
    """The arithmetic of a step in words, printed at the start of a run."""
    train, rollout = config.train, config.rollout
    ranks = (
        f"ranks: {train.ranks} x micro-batches of at most {train.micro_batch_tokens} tokens, ZeRO-{train.zero_stage}"
    )
    if config.lora.rank is not None:
        layers = "all linear layers" if config.lora.targets is None else ", ".join(config.lora.targets)
        head = " and the head" if config.lora.head else ""
        scale = f"alpha {config.lora.alpha:g}"
        ranks += f"; the model is frozen, an adapter of rank {config.lora.rank}, {scale}, on {layers}{head} is trained"
    if config.offline.objective is not None:
        epochs = "" if config.offline.epochs is None else f" ({config.offline.epochs:g} epoch(s))"
        steps = train.steps or "as many as the rows make"
        return [
            f"step: {train.prompts_per_step} rows or pairs of {config.offline.path}, one update ({config.offline.objective})",
            f"steps: {steps}{epochs}",
            ranks,
        ]
    completions = train.prompts_per_step * rollout.samples_per_prompt
    return [
        f"step: {train.prompts_per_step} prompts x {rollout.samples_per_prompt} samples = {completions} completions, "
        f"at most {completions * rollout.max_new_tokens} new tokens",
        f"update: {updates_prompts(config)} prompts = "
        f"{updates_prompts(config) * rollout.samples_per_prompt} completions, "
        f"{train.prompts_per_step // updates_prompts(config)} update(s) a step, {num_updates(config)} in the run",
        f"staleness: at most {rollout.max_staleness} version(s); "
        f"{(rollout.max_staleness + 1) * train.prompts_per_step} prompts admitted before the first update",
        ranks,
    ]
