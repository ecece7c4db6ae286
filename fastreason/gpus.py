"""The GPUs of this machine as its driver tells them, and which of a config's are not there. Each machine of a run asks its own.

The driver is asked without torch, which would make a context. Where it cannot be asked nothing is refused for its sake.
"""

import os
import subprocess

from fastreason.config import Config
from fastreason.cores import cores_text, parse_cores
from fastreason.errors import ConfigError
from fastreason.resources import engine_gpus, num_engines, trainer_gpus

VISIBLE = "CUDA_VISIBLE_DEVICES"


def ask_driver(*what: str) -> list[str] | None:
    """Lines of nvidia-smi's answer; None where it cannot be asked."""
    try:
        done = subprocess.run(["nvidia-smi", *what], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")


def device_memory(index: int) -> float | None:
    """Bytes of a GPU, as its driver says; None where that cannot be asked."""
    lines = ask_driver(f"--id={index}", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    try:
        return float(lines[0]) * 2**20 if lines else None
    except ValueError:
        return None


def num_gpus() -> int | None:
    """GPUs that the driver shows, whatever CUDA_VISIBLE_DEVICES says; None where it cannot be asked."""
    lines = ask_driver("--query-gpu=index", "--format=csv,noheader") or []
    return sum(line.strip().isdigit() for line in lines) or None


def num_visible(there: int | None) -> int | None:
    """Of `there` GPUs those that a process sees without a list of its own; as CUDA reads it, up to the first that is none."""
    listed = os.environ.get(VISIBLE)
    if listed is None:
        return there
    number = 0
    for name in (part.strip() for part in listed.split(",")):
        if not name or name.startswith("-") or (there is not None and name.isdigit() and int(name) >= there):
            break
        number += 1
    return number


def check_gpus(config: Config, generates: bool, trains: bool) -> None:
    """Raise ConfigError where engines or ranks, on cuda, would have fewer GPUs than they are, or some that are not there.

    A named list of GPUs counts the machine's; without one, engines and ranks take the first of those that are visible.
    generates, trains: whether engines, or ranks, start on this machine. More GPUs than ranks are no error: the first are taken.
    """
    rollout, train = config.rollout, config.train
    sides = []
    if trains:
        sides.append(("train.gpus", train.gpus, train.ranks, f"train.ranks={train.ranks}", "train.ranks"))
    if generates and rollout.engine == "vllm" and not config.resources.urls:
        number, parallel = num_engines(config), rollout.tensor_parallel
        said = f"rollout.tensor_parallel={parallel}" + (f" x resources.engines={number}" if number > 1 else "")
        sides.append(("rollout.gpus", rollout.gpus, number * parallel, said, "rollout.tensor_parallel"))
    there = num_gpus()
    for key, named, wanted, said, fewer in sides:
        given = parse_cores(named, key) if named else None
        if given is not None and len(given) < wanted:
            raise ConfigError(
                f"{key}={named!r}: {len(given)} GPU(s), and {said} want(s) {wanted}, one each. Name {wanted} of them, or lower "
                f"{fewer} to at most {len(given)}."
            )
        missing = [index for index in given or () if there is not None and index >= there]
        if missing:
            raise ConfigError(
                f"{key}={named!r}: GPU {cores_text(missing)} is not on this machine, whose driver shows {there}. Name GPUs of "
                f"0-{(there or 1) - 1}, and lower {fewer} where they are too few."
            )
        seen = num_visible(there) if given is None else None
        if seen is not None and seen < wanted:
            listed = os.environ.get(VISIBLE)
            why = f" by {VISIBLE}={listed}" if listed is not None else ""
            raise ConfigError(
                f"{key} is not set, and {said} want(s) {wanted} GPU(s): {seen} visible on this machine{why}. Lower {fewer} to "
                f"at most {seen}, or name GPUs by {key}."
            )


def idle_notes(config: Config) -> tuple[str, ...]:
    """What is to be said of GPUs that the trainer is given, and neither a rank nor an engine takes."""
    if not config.train.gpus:
        return ()
    taken = trainer_gpus(config)
    engines = engine_gpus(config) if config.rollout.gpus else []
    idle = [gpu for gpu in parse_cores(config.train.gpus, "train.gpus") if gpu not in (*taken, *engines)]
    if not idle:
        return ()
    used = sorted(taken + idle)
    return (
        f"train.gpus={config.train.gpus}: train.ranks={config.train.ranks} take GPU {cores_text(taken)}; "
        f"{cores_text(idle)} stay idle. Have train.gpus={cores_text(used)} and train.ranks={len(used)} to use them.",
    )
