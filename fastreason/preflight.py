"""What is checked and decided before a run makes a folder, starts a process or loads a model."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastreason.config import Config, batch_derivation
from fastreason.cores import parse_cores
from fastreason.errors import ConfigError
from fastreason.gpus import check_gpus, idle_notes
from fastreason.machine import has_bf16_products
from fastreason.models import max_model_len, model_folder, read_model_config
from fastreason.placement import SPLIT, Placement, place

if TYPE_CHECKING:
    from fastreason.algorithms import ResolvedAlgorithm


@dataclass(frozen=True)
class Decisions:
    """What `auto` means on this machine."""

    device: str
    attention: str
    liger: bool
    placement: Placement = SPLIT
    notes: tuple[str, ...] = ()


def preflight(
    config: Config, prepared: bool = False, only: str | None = None, nodes: int = 1
) -> tuple[Decisions, list[str]]:
    """Every check that can fail before a model loads; returns the decisions and what stays unchecked offline.

    prepared: the responses of an offline run are tokenized already, and the file that they came from is not looked at.
    only: the one phase that runs; it shares no GPU, and a trainer alone needs no engine. nodes: machines of the run.
    Raises ConfigError, DataError or ModelError with the key, the value, what is allowed and what to do.
    """
    from fastreason.cores import require_cores
    from fastreason.policy import choose_layout, choose_liger

    device = choose_device(config.train.device)
    offline = config.offline.objective is not None
    unchecked = check_offline_run(config, prepared) if offline else check_online_run(config, device, only)
    train = config.train
    for key, cores in (
        ("rollout.cores", config.rollout.cores),
        ("train.cores", train.cores),
        ("train.spare_cores", train.spare_cores),
    ):
        if cores:
            require_cores(cores, key)
    if train.spare_cores and (device != "cpu" or not train.cores or not hasattr(os, "SCHED_IDLE")):
        raise ConfigError(
            f"train.spare_cores={train.spare_cores!r} needs a trainer on a CPU, Linux, and train.cores, which it has for "
            "itself. Set train.cores too, or train.spare_cores=null."
        )
    for key, gpus in (("rollout.gpus", config.rollout.gpus), ("train.gpus", config.train.gpus)):
        if gpus:
            parse_cores(gpus, key)
    on_gpu, trains = device == "cuda", only != "rollout"
    if on_gpu:
        check_gpus(config, generates=not offline and only != "train", trains=trains)
    liger = importlib.util.find_spec("liger_kernel") is not None
    placement = SPLIT if offline or only is not None else place(config, device)
    check_adapter(config, device, placement.sleeps)
    decisions = Decisions(
        device=device,
        attention=decide_attention(config, device, longest_line(config)),
        liger=choose_liger(config.model.liger, device, liger),
        placement=placement,
        notes=sharing_notes(config, placement, device, nodes) + (idle_notes(config) if on_gpu and trains else ()),
    )
    choose_layout(config.train.share_prompts, decisions.attention, device)
    return decisions, unchecked


def check_online_run(config: Config, device: str, only: str | None = None) -> list[str]:
    """What a run that generates and grades needs, or only trains on what another has; returns what stays unchecked."""
    from fastreason.algorithms import resolve_algorithm
    from fastreason.data import check_data
    from fastreason.models import check_model
    from fastreason.resources import check_resources
    from fastreason.rewards import resolve_rewards
    from fastreason.transport import check_transport

    check_reference(resolve_algorithm(config), config)
    check_transport(config, device)
    if only != "train":
        check_resources(config, device)
    resolve_rewards(config.reward)
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm: vllm is not installed. Run `make setup` (CPU), pip install 'fastreason[vllm]' (GPU), "
            "or use rollout.engine=hf."
        )
    unchecked = check_data(config.data) + check_model(config.model) + check_teacher(config) + check_critic(config)
    if Path(config.model.path).is_dir():
        max_model_len(config, read_model_config(config.model.path))
    return unchecked


def check_offline_run(config: Config, prepared: bool = False) -> list[str]:
    """What a run on written responses needs; returns what stays unchecked."""
    from fastreason.data.traces import check_traces
    from fastreason.models import check_model
    from fastreason.objectives import resolve_objective
    from fastreason.offline_data import longest_sequence

    objective = resolve_objective(config)
    if not prepared:
        check_traces(config, objective.pairs)
    unchecked = check_model(config.model)
    if Path(config.model.path).is_dir():
        longest_sequence(config, read_model_config(config.model.path))
    return unchecked


def sharing_notes(config: Config, placement: Placement, device: str, nodes: int = 1) -> tuple[str, ...]:
    """What is to be said of GPUs that engine and trainer share; raises ConfigError where their memory cannot suffice."""
    if placement.mode != "colocated":
        return ()
    asleep = "in turn: the engine sleeps while the trainer computes"
    said = f"colocated, {asleep if placement.sleeps else 'at the same time: each has a share of the memory'}"
    if device != "cuda":
        return (said,)
    from fastreason.plan.sharing import check_sharing

    return (said, *check_sharing(config, placement, nodes=nodes))


def check_adapter(config: Config, device: str, sleeps: bool = False) -> None:
    """Raise ConfigError where section lora cannot be met, as far as the model's folder is known."""
    from fastreason.lora import check_lora

    folder = Path(config.model.path)
    check_lora(config.lora, config.model, folder if folder.is_dir() else None)
    if config.lora.applied_by_engine:
        check_adapter_file(config, device, sleeps)


def check_adapter_file(config: Config, device: str, sleeps: bool) -> None:
    """Raise ConfigError where engines cannot be given the adapter alone."""
    from fastreason.rollout.vllm_adapter import RANKS

    rollout, reason = config.rollout, None
    if config.offline.objective is not None:
        reason = f"offline.objective={config.offline.objective} has no engine"
    elif rollout.engine != "vllm":
        reason = f"rollout.engine={rollout.engine} applies none, only vllm does"
    elif rollout.transport in ("ipc", "nccl"):
        reason = f"it is a file, and rollout.transport={rollout.transport} sends weights between GPUs"
    elif config.lora.head:
        reason = "vLLM takes a head's adapter from few families of models, and lora.head=true"
    elif device == "cuda" and config.model.dtype == "float32":
        reason = "on a GPU vLLM applies none in float32; model.dtype=bfloat16 would do"
    elif sleeps:
        reason = "an engine that sleeps gives up the model's own weights; resources.sleep=off would keep them"
    elif config.lora.rank is not None and config.lora.rank > RANKS[-1]:
        reason = f"vLLM takes ranks up to {RANKS[-1]}, and lora.rank={config.lora.rank}"
    if reason is not None:
        raise ConfigError(f"lora.publish=adapter: {reason}. Use lora.publish=merged.")


def check_reference(algorithm: "ResolvedAlgorithm", config: Config) -> None:
    """Raise ConfigError where a KL to the initial model would need it whole amid the forward of its adapter."""
    term = algorithm.kl
    whole = term.estimator in ("exact", "top_k") and term.target == "reference"
    if config.lora.rank is not None and whole and config.train.zero_stage == 3:
        raise ConfigError(
            f"algorithm.kl={term.estimator} with lora.rank={config.lora.rank} and train.zero_stage=3: the reference is the "
            "model itself, and its weights are gathered for one forward at a time. Use train.zero_stage=2, or algorithm.kl=k2."
        )


def decide_attention(config: Config, device: str, line_tokens: int) -> str:
    """The attention for lines of at most so many tokens."""
    from fastreason.policy import choose_attention

    flash = importlib.util.find_spec("flash_attn") is not None
    return choose_attention(config.model.attn_implementation, device, flash, line_tokens)


def start_lines(config: Config) -> list[str]:
    """What is printed before a run starts: the arithmetic of a step, and what a person should know of the algorithm."""
    from fastreason.algorithm_checks import algorithm_warnings
    from fastreason.algorithms import resolve_algorithm

    return [*batch_derivation(config), *algorithm_warnings(resolve_algorithm(config), config)]


def longest_line(config: Config) -> int:
    """Tokens of the longest line that a micro-batch on a CPU may have: a prompt and all of its responses."""
    if config.offline.objective is not None:
        return config.offline.max_tokens or 1 << 20  # the traces will say
    shared = config.train.share_prompts != "off"
    responses = config.rollout.samples_per_prompt if shared else 1
    return config.data.max_prompt_tokens + responses * config.rollout.max_new_tokens


def check_teacher(config: Config) -> list[str]:
    """Raise ConfigError where the teacher's tokenizer is not the model's, or its positions end before a response can.

    Returns what only the launcher can check, with a network or a conversion; it does so before anything starts.
    """
    from fastreason.companions import described_by, teacher_model
    from fastreason.models import check_model
    from fastreason.vocabulary import check_same_vocabulary

    teacher = config.teacher
    if teacher.path is None or teacher.path == config.model.path:
        return []
    with described_by("teacher.path"):
        unchecked = check_model(teacher_model(config), weights=teacher.where == "trainer")
        if Path(teacher.path).is_dir():
            max_model_len(config, read_model_config(teacher.path), "teacher.path")
    if Path(teacher.path).is_dir() and Path(config.model.path).is_dir():
        check_same_vocabulary(
            Path(config.model.path),
            Path(teacher.path),
            trust_code=config.model.trust_remote_code,
            trust_teacher_code=teacher.trust_remote_code,
        )
        return []
    unchecked = [line.replace("model.path", "teacher.path") for line in unchecked]
    return [*unchecked, f"teacher.path={teacher.path!r}: its tokenizer against that of model.path"]


def check_critic(config: Config) -> list[str]:
    """Raise ModelError where the critic's body cannot be there; returns what could not be checked without the network."""
    from fastreason.companions import described_by
    from fastreason.models import check_model

    if config.critic.path is None:
        return []
    with described_by("critic.path"):
        unchecked = check_model(config.model.model_copy(update={"path": config.critic.path}))
        if Path(config.critic.path).is_dir():
            max_model_len(config, read_model_config(config.critic.path), "critic.path")
    return [line.replace("model.path", "critic.path") for line in unchecked]


def check_prompts_offline(config: Config) -> None:
    """Load and split the problems, so that an empty or too small data set fails before a model loads."""
    from fastreason.data import load_problems, split_held_out
    from fastreason.rewards import check_prompts, resolve_rewards

    problems = load_problems(config.data)
    check_prompts(resolve_rewards(config.reward), problems)
    split_held_out(problems, config.eval.num_prompts, config.data.seed)


def choose_device(wanted: str) -> str:
    """auto: cuda where the driver shows a GPU; asked without torch, which would take seconds to import."""
    has_gpu = Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("train.device=cuda: no NVIDIA GPU is visible on this machine. Use auto or cpu.")
    return wanted if wanted != "auto" else ("cuda" if has_gpu else "cpu")


def choose_dtype(wanted: str, device: str) -> str:
    """auto: bfloat16 on a GPU and on a CPU that multiplies it; float32 on others, where bf16 is several times slower."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device == "cuda" or has_bf16_products() else "float32"


def settle_dtypes(config: Config) -> Config:
    """The config with a dtype in the place of every `auto`, so that a run is resumed in the one that it began with."""
    device = choose_device(config.train.device)
    sections: dict[str, Any] = {"model": config.model}
    if config.teacher.path is not None and config.teacher.where == "trainer":  # elsewhere its dtype is refused
        sections["teacher"] = config.teacher
    settled = {
        name: section.model_copy(update={"dtype": choose_dtype(section.dtype, device)})
        for name, section in sections.items()
    }
    return config.model_copy(update=settled)


def anchor_paths(config: Config) -> Config:
    """The config with its local paths made absolute, so that a run can be resumed from any folder.

    The folder of a run, as a model, is that of the model it has trained.
    """
    model, data, rollout, offline = config.model, config.data, config.rollout, config.offline
    if Path(model.path).is_dir():
        model = model.model_copy(update={"path": str(model_folder(model.path).resolve())})
    if offline.path is not None and Path(offline.path).exists():
        offline = offline.model_copy(update={"path": str(Path(offline.path).resolve())})
    if data.path is not None and Path(data.path).exists():
        data = data.model_copy(update={"path": str(Path(data.path).resolve())})
    if rollout.exchange_dir is not None:
        rollout = rollout.model_copy(update={"exchange_dir": str(Path(rollout.exchange_dir).resolve())})
    sections = {"model": model, "data": data, "rollout": rollout, "offline": offline}
    for name in ("teacher", "critic"):
        section = getattr(config, name)
        if section.path is not None and Path(section.path).is_dir():
            sections[name] = section.model_copy(update={"path": str(model_folder(section.path).resolve())})
    return config.model_copy(update=sections)
