"""Whether engine and trainer have room on one GPU, before either is loaded: by what plan reckons of the trainer's memory.

What is certain (weights, gradients, optimizer beside the engine's share) is an error; what depends on lengths and kernels
(activations, the loss) is a warning. It refuses to judge a model whose config.json is not on this machine.
"""

from dataclasses import replace
from pathlib import Path

from fastreason.config import Config
from fastreason.errors import ConfigError, ModelError
from fastreason.gpus import device_memory
from fastreason.models import read_model_config
from fastreason.placement import Placement
from fastreason.plan.command import setup_of, workload_of
from fastreason.plan.hardware import Device, Rates
from fastreason.plan.memory import GIB, Parts, resident_bytes, resident_parts
from fastreason.plan.shapes import shape_of
from fastreason.plan.split import rank_memory
from fastreason.resources import engine_gpus, trainer_gpus

RATES = Rates()
CONTEXTS_GIB = 1.0  # two CUDA contexts, at the least


def trainer_parts(config: Config, nodes: int = 1) -> Parts | None:
    """`trainer_memory` of one rank on a GPU at the step's mean lengths; None where the model's shape is not here.

    A teacher or critic whose shape is not here is left out. nodes: machines with `train.ranks` ranks each.
    """
    if not Path(config.model.path).is_dir():
        return None
    shape = shape_of(read_model_config(config.model.path), config.model.path)
    itemsize = 4 if config.model.dtype == "float32" else 2
    work = workload_of(config, None, None, on_cpu=False)
    device = Device("gpu", 0.0, 1.0, 1.0, 1.0, 1.0, "", itemsize=itemsize)
    setup = setup_of(config, device, nodes * config.train.ranks, work)
    return rank_memory(shape, work, replace(setup, beside=tuple(each for each in setup.beside if not each.assumed)))


def check_sharing(config: Config, placement: Placement, memory: float | None = None, nodes: int = 1) -> list[str]:
    """What a person should know of a colocated run's memory; raises ConfigError where it cannot fit.

    The engine takes `rollout.gpu_memory_utilization` of the GPU. Where it sleeps, the trainer's resident parts are beside
    that; else the trainer's peak is. memory: bytes of the GPU that both have, asked of the driver unless given. nodes: as in
    `trainer_parts`.
    """
    shared = sorted(set(engine_gpus(config)) & set(trainer_gpus(config)))
    memory = memory or (device_memory(shared[0]) if shared else None)
    if placement.mode != "colocated" or memory is None:
        return []
    try:
        parts = trainer_parts(config, nodes)
    except ModelError as error:  # a family that is not planned for may train
        return [f"memory on the shared GPU is not checked: {error}"]
    if parts is None:
        return ["memory on the shared GPU is not checked: the model's config.json is not on this machine."]
    share = config.rollout.gpu_memory_utilization
    engine, at_rest, peak = share * memory, resident_bytes(parts), sum(parts.values())
    if engine + at_rest + CONTEXTS_GIB * GIB > memory:
        most = max(0.0, 1 - (at_rest + RATES.reserve_gib * GIB) / memory)
        held = _listed(resident_parts(parts))
        raise ConfigError(
            f"rollout.gpu_memory_utilization={share:g}: the engine takes {engine / GIB:.1f} of the GPU's {memory / GIB:.1f} "
            f"GiB, and beside it the trainer holds {at_rest / GIB:.1f} ({held}). {_advice(most)}"
        )
    taken, what = (
        (peak + RATES.asleep_gib * GIB, "and the engine that sleeps") if placement.sleeps else (peak + engine, "")
    )
    taken += RATES.reserve_gib * GIB
    if taken <= memory:
        return []
    beside = what or f"beside the engine's {engine / GIB:.1f}"
    return [
        f"memory may not suffice: the trainer {beside} take about {taken / GIB:.1f} of {memory / GIB:.1f} GiB at its peak "
        f"({_listed(parts)}; estimated). Lower train.micro_batch_tokens or rollout.gpu_memory_utilization, set "
        "model.gradient_checkpointing=true or train.offload=cpu, or let the engine sleep (rollout.max_staleness=0)."
    ]


def _listed(parts: Parts) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= 0.05 * GIB)


def _advice(most: float) -> str:
    advice = "train.offload=cpu keeps the optimizer on the host, train.zero_stage=3 divides it among more ranks."
    return f"Use at most {most:.2f}; {advice}" if most >= 0.1 else advice.capitalize()
