"""Every key that `fastreason eval` can be told, beside the models and benchmarks.

Sections as in a config of training, of which the keys that act here are allowed; `eval` is this command's own, and a key
without a section is one of it. No heavy import.
"""

from typing import Any

from pydantic import Field

from fastreason.config import Config, apply_override, read_raw, validate
from fastreason.distill.section import USED
from fastreason.errors import ConfigError
from fastreason.evaluation.scores import powers_of_two
from fastreason.preflight import choose_device, choose_dtype
from fastreason.sections import DataConfig, ModelConfig, RewardConfig, RolloutConfig, RunConfig, Section, TrainConfig

SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")
# Of the sections that are shared with training, the keys that act.
ACTING = {
    **USED,
    "model": {"dtype", "trust_remote_code", "allow_download"},
    "reward": {"functions", "workers", "deadline_s"},
    "data": set(DataConfig.model_fields) - {"source", "path", "task", "num_prompts"},
}


class EvaluationConfig(Section):
    n: int = Field(
        16, ge=1, description="responses to each problem; those that are there already are not sampled again"
    )
    k: list[int] | None = Field(None, description="k of pass@k and maj@k, at most n; null: 1, 2, 4, ... and n")
    num_problems: int | None = Field(
        None, ge=1, description="only the first so many problems of each benchmark; null: all, of a task 100"
    )
    template: str | None = Field(
        None,
        description="row of the table in fastreason/evaluation/templates.py; null: chat, and held_out: as in its run",
    )
    temperature: float = Field(0.6, ge=0, description="sampling temperature; 0: the likeliest token")
    top_p: float = Field(0.95, gt=0, le=1, description="sample from the likeliest tokens of so much probability")
    top_k: int = Field(0, ge=0, description="sample from so many likeliest tokens; 0: all")
    max_new_tokens: int = Field(1024, ge=1, description="longest response, tokens")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of sampling; each response has its own, made from it")
    concurrency: int = Field(64, ge=1, description="responses in generation or grading at once")


class EvaluationRun(Section):
    """What one `fastreason eval` is told beside models and benchmarks."""

    run: RunConfig = Field(default_factory=lambda: RunConfig())
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(path=""))
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    reward: RewardConfig = Field(default_factory=lambda: RewardConfig())
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig())
    eval: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig())

    @property
    def ks(self) -> list[int]:
        return powers_of_two(self.eval.n) if self.eval.k is None else sorted(set(self.eval.k))


def load_evaluation(overrides: list[str], path: str | None = None) -> EvaluationRun:
    """The config of `key=value`s over that of a file; raises ConfigError with the key, the value and what to do."""
    raw: dict[str, Any] = read_raw(path) if path is not None else {}
    for override in overrides:
        key = override.partition("=")[0]
        apply_override(raw, override if "." in key else f"eval.{override}")
    for name, keys in raw.items():
        _check_acting(name, keys)
    if isinstance(raw.get("model"), dict):
        raw["model"] = {"path": "", **raw["model"]}
    config = validate(EvaluationRun, raw)
    wrong = [k for k in config.ks if not 1 <= k <= config.eval.n]
    if wrong or not config.ks:
        raise ConfigError(
            f"eval.k={config.eval.k}: pass@k needs 1 <= k <= n, and eval.n={config.eval.n}. Ask for "
            f"n={max(config.ks, default=1)} responses, or for a smaller k."
        )
    if config.eval.temperature == 0 and config.eval.n > 1:
        raise ConfigError(
            f"eval.temperature=0 with eval.n={config.eval.n}: all responses to a problem would be the same. Set n=1."
        )
    return config


def with_dtype(config: EvaluationRun) -> EvaluationRun:
    """The config with its dtype said."""
    dtype = choose_dtype(config.model.dtype, choose_device("auto"))
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def engine_config(config: EvaluationRun, data: DataConfig, model_path: str) -> Config:
    """The same as engines read it: as a training run, of which nothing is trained."""
    sampling = {key: getattr(config.eval, key) for key in SAMPLING if key != "temperature"}
    return Config(
        run=config.run,
        model=config.model.model_copy(update={"path": model_path}),
        data=data,
        reward=config.reward,
        rollout=config.rollout.model_copy(update=sampling),
        train=TrainConfig(steps=1, prompts_per_step=1),
    )


def _check_acting(name: str, keys: Any) -> None:
    for key in keys if name in ACTING and isinstance(keys, dict) else []:
        known = (RunConfig, ModelConfig, DataConfig, RewardConfig, RolloutConfig)
        if key in ACTING[name] or not any(key in section.model_fields for section in known):
            continue  # it acts, or nobody knows it, which is said with the nearest key
        advice = {
            "model": "Models are named on the command line",
            "data": "Benchmarks are named by --benchmarks; of their problems, eval.num_problems takes the first",
        }.get(name, f"Use {key}=..." if key in EvaluationConfig.model_fields else "Leave it out")
        raise ConfigError(
            f"{name}.{key}: has no effect in fastreason eval. {advice}; of {name} it reads: {', '.join(sorted(ACTING[name]))}."
        )
