"""The models beside the policy in the trainer's processes: the frozen one that it is compared with, and a critic.

A part of the composition root: it chooses which of them a run has, where their files are, and how their weights lie on the
ranks. It refuses to decide what they are used for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastreason.algorithms import ResolvedAlgorithm
from fastreason.config import Config, ModelConfig, num_updates
from fastreason.critic import Critic, load_value_model
from fastreason.errors import ModelError
from fastreason.frozen import FrozenModel, load_frozen
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


def ends_of_one_model(session: Session, config: Config, algorithm: ResolvedAlgorithm) -> frozenset[int]:
    """Ends of a response that policy and teacher do not share.

    Raises ConfigError where their vocabularies differ, or the teacher's positions end before a response can. Of a teacher on
    the hub it fetches the tokenizer alone.
    """
    if algorithm.kl.estimator == "none" or algorithm.kl.target != "teacher":
        return frozenset()
    with described_by("teacher.path"):
        folder = resolve_model(teacher_model(config), weights=False)
        max_model_len(config, read_model_config(folder), "teacher.path")
    return check_same_vocabulary(
        Path(session.model_dir),
        folder,
        trust_code=config.model.trust_remote_code,
        trust_teacher_code=config.teacher.trust_remote_code,
    )


def load_target(
    session: Session, config: Config, algorithm: ResolvedAlgorithm, device: torch.device, num_columns: int
) -> FrozenModel | None:
    """The frozen model that KL terms and pairs compare with, or None; under ZeRO-3 divided among the ranks.

    A KL term whose coefficient is 0 has it loaded too: its figures are wanted then.
    """
    compares = algorithm.kl.estimator != "none"
    model, name, key = config.model, "reference", "model.path"
    if compares and algorithm.kl.target == "teacher":
        if config.teacher.where == "server":
            return None
        model, name, key = teacher_model(config), "teacher", "teacher.path"
    elif not (compares or algorithm.pairs):
        return None
    with described_by(key):
        folder = Path(session.model_dir) if name == "reference" else resolve_model(model)
        scorer = load_frozen(folder, model, device, session.attention, session.liger, num_columns)
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
        folder = resolve_model(model) if critic.path else Path(session.model_dir)
        if critic.path:
            max_model_len(config, read_model_config(folder), "critic.path")
        module = load_value_model(folder, model, str(device), session.attention, session.liger)
    keys = {"lr": critic.lr, "weight_decay": critic.weight_decay, "max_grad_norm": critic.max_grad_norm}
    train = config.train.model_copy(update={**keys, "lr_schedule": "constant", "warmup_steps": 0})
    engine = DeepSpeedCritic(module, train, config.model.dtype, num_updates(config))
    return Critic(engine, critic.value_clip, critic.warmup_steps)
