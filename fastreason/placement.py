"""Who runs where: engine and trainer on GPUs of their own (split), on the same ones (colocated), or elsewhere (remote).

It owns the rules of section `resources` and of the keys that name GPUs. It starts nothing, and asks no GPU.
"""

from dataclasses import dataclass
from typing import Literal

from fastreason.config import Config
from fastreason.errors import ConfigError
from fastreason.resources import engine_gpus, trainer_gpus


@dataclass(frozen=True)
class Placement:
    """What `resources` comes to on a device. sleeps: the engine gives up its memory while the trainer has the GPUs."""

    mode: Literal["split", "colocated", "remote"]
    sleeps: bool = False


SPLIT = Placement("split")


def place(config: Config, device: str) -> Placement:
    """The placement of a run that generates; raises ConfigError for one that cannot work.

    auto is remote where there are `resources.urls`, colocated where engine and trainer share a GPU, else split; on a CPU there
    is nothing to share but cores.
    """
    wanted, on_gpu, urls = config.resources.mode, device == "cuda", config.resources.urls
    if urls and wanted in ("auto", "remote"):
        _refuse_sleep(config, "engines that run elsewhere have their GPUs for themselves")
        return Placement("remote")
    if urls:
        raise ConfigError(
            f"resources.mode={wanted}: resources.urls has engines that run elsewhere. Use auto, or leave the addresses out."
        )
    if wanted == "remote":
        raise ConfigError(
            "resources.mode=remote: resources.urls is empty. Give the engines' addresses, or use auto, split or colocated."
        )
    shared = sorted(set(engine_gpus(config)) & set(trainer_gpus(config))) if on_gpu else []
    if wanted == "split" and shared:
        raise ConfigError(
            f"resources.mode=split: engine and trainer would share GPU {', '.join(map(str, shared))}; {_who(config)}. "
            "Give each its own (rollout.gpus=7 train.gpus=0-6 train.ranks=7), or use resources.mode=colocated."
        )
    if wanted == "colocated" and on_gpu and not shared:
        raise ConfigError(
            f"resources.mode=colocated: engine and trainer have no GPU in common; {_who(config)}. Give both the same, or use "
            "resources.mode=split."
        )
    colocated = wanted == "colocated" or (wanted == "auto" and bool(shared))
    if not colocated:
        _refuse_sleep(config, "only a colocated engine sleeps: on GPUs of its own it has no memory to give up")
        return SPLIT
    return Placement("colocated", _sleeps(config, device))


def _sleeps(config: Config, device: str) -> bool:
    rollout, wanted = config.rollout, config.resources.sleep
    if wanted == "off":
        return False
    if rollout.engine == "hf":
        _refuse_sleep(config, "rollout.engine=hf cannot sleep, only vllm can")
    elif rollout.engine == "vllm" and device == "cpu":
        _refuse_sleep(config, "the CPU build of vLLM cannot sleep, it would only log a warning")
    elif rollout.max_staleness:
        _refuse_sleep(
            config,
            f"rollout.max_staleness={rollout.max_staleness} has the engine generate ahead while the trainer updates, and it "
            "cannot while it sleeps; set rollout.max_staleness=0, or share the memory by rollout.gpu_memory_utilization",
        )
    else:
        return wanted == "on" or rollout.engine == "vllm"
    return False


def _refuse_sleep(config: Config, reason: str) -> None:
    if config.resources.sleep == "on":
        raise ConfigError(f"resources.sleep=on: {reason}. Or set resources.sleep=off.")


def _who(config: Config) -> str:
    rollout, train = config.rollout, config.train
    engine, trainer = (",".join(map(str, gpus)) for gpus in (engine_gpus(config), trainer_gpus(config)))
    return (
        f"the engine has {engine} (rollout.gpus={rollout.gpus}, rollout.tensor_parallel={rollout.tensor_parallel}), the "
        f"trainer {trainer} (train.gpus={train.gpus}, train.ranks={train.ranks})"
    )
