"""The models beside the policy in the trainer's processes: the frozen one that it is compared with, and a critic.

A part of the composition root: it chooses which of them a run has, where their files are (the launcher asks, the ranks are
told), and how their weights lie on the ranks. It refuses to decide what they are used for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastreason.algorithms import ResolvedAlgorithm, resolve_algorithm
from fastreason.config import Config, ModelConfig, num_updates
from fastreason.critic import Critic, load_value_model
from fastreason.errors import ModelError
from fastreason.frozen import AdapterOff, FrozenModel, load_frozen
from fastreason.models import max_model_len, read_model_config, resolve_model
from fastreason.session import Session
from fastreason.vocabulary import check_same_vocabulary


@contextmanager
def described_by(key: str) -> Iterator[None]:
    """Errors of a model's folder name the key that it came from."""
    try:
        yield
    except ModelError as error:
        text = str(error).replace("model.path", key)
        if key == "teacher.path":  # a critic is downloaded where the model is
            text = text.replace("model.allow_download", "teacher.allow_download")
        raise ModelError(text) from error


def teacher_model(config: Config) -> ModelConfig:
    """The teacher as a model section: what `models.py` and `policy.py` read."""
    teacher = config.teacher
    keys = ("path", "dtype", "allow_download", "trust_remote_code")
    return config.model.model_copy(update={key: getattr(teacher, key) for key in keys})


class Resolved(NamedTuple):
    """What a session knows of the models beside the policy: local folders, and ends of a response that are not shared."""

    teacher_dir: str | None = None
    critic_dir: str | None = None
    silent_ids: tuple[int, ...] = ()


def resolve_companions(config: Config, model_dir: Path, only: str | None = None) -> Resolved:
    """Find, convert or download what an online run needs beside the policy in `model_dir`; for the launcher, once.

    The processes of a run have no network. The teacher's tokenizer comes first, alone, so that nothing large is fetched for
    one that cannot be compared; the weights of one that is served never. only: as in `Session`. Raises ModelError where a
    model is not there, ConfigError where vocabularies differ or positions end before a response can.
    """
    algorithm, trains = resolve_algorithm(config), only != "rollout"
    served = config.teacher.where == "server"
    teacher = critic = None
    silent: frozenset[int] = frozenset()
    if algorithm.compares_with_teacher and (trains or served):
        silent = check_teacher_tokens(config, model_dir)
        if not served:
            with described_by("teacher.path"):
                teacher = str(resolve_model(teacher_model(config)))
    if algorithm.critic and config.critic.path is not None and trains:
        with described_by("critic.path"):
            folder = resolve_model(config.model.model_copy(update={"path": config.critic.path}))
            max_model_len(config, read_model_config(folder), "critic.path")
        critic = str(folder)
    return Resolved(teacher, critic, tuple(sorted(silent)))


def check_teacher_tokens(config: Config, model_dir: Path) -> frozenset[int]:
    """Ends of a response that policy and teacher do not share, from the teacher's tokenizer and config alone."""
    with described_by("teacher.path"):
        folder = resolve_model(teacher_model(config), weights=False)
        max_model_len(config, read_model_config(folder), "teacher.path")
    return check_same_vocabulary(
        model_dir,
        folder,
        trust_code=config.model.trust_remote_code,
        trust_teacher_code=config.teacher.trust_remote_code,
    )


def load_target(
    session: Session,
    config: Config,
    algorithm: ResolvedAlgorithm,
    device: torch.device,
    num_columns: int,
    updater: Any = None,
) -> FrozenModel | None:
    """The frozen model that KL terms and pairs compare with, or None; under ZeRO-3 divided among the ranks.

    Where `updater`, a DeepSpeedUpdater, trains an adapter, the initial model is its own without it. A KL term whose coefficient
    is 0 has it loaded too: its figures are wanted then.
    """
    model, name, key, folder = config.model, "reference", "model.path", session.model_dir
    if algorithm.compares_with_teacher:
        if config.teacher.where == "server":
            return None
        assert session.teacher_dir is not None
        model, name, key, folder = teacher_model(config), "teacher", "teacher.path", session.teacher_dir
    elif not algorithm.compares_with_reference:
        return None
    elif config.lora.rank is not None:
        return FrozenModel(AdapterOff(updater.engine.module, updater.engine), device, name)
    with described_by(key):
        scorer = load_frozen(Path(folder), model, device, session.attention, session.liger, num_columns)
    if config.train.zero_stage < 3:
        return FrozenModel(scorer, device, name)
    from fastreason.update.deepspeed import divided_scorer

    run, gather = divided_scorer(scorer, model.dtype)
    return FrozenModel(scorer, device, name, run, gather)


def load_critic(session: Session, config: Config, device: torch.device) -> Critic:
    """The critic with its own optimizer, on the body of critic.path or else of the policy's start."""
    from fastreason.update.deepspeed import DeepSpeedCritic

    critic = config.critic
    model = config.model.model_copy(update={"path": critic.path or config.model.path})
    with described_by("critic.path" if critic.path else "model.path"):
        folder = Path(session.critic_dir or session.model_dir)
        module = load_value_model(folder, model, str(device), session.attention, session.liger)
    keys = {"lr": critic.lr, "weight_decay": critic.weight_decay, "max_grad_norm": critic.max_grad_norm}
    constant = {"lr_schedule": "constant", "warmup_steps": 0, "warmup_share": 0.0}
    train = config.train.model_copy(update={**keys, **constant})
    engine = DeepSpeedCritic(module, train, config.model.dtype, num_updates(config))
    return Critic(engine, critic.value_clip, critic.warmup_steps)
