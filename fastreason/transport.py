"""The ways of published weights to an engine: what each needs of the machine, where its files lie, what they say.

`shm` and `file` write a safetensors file that the engine reads, in shared memory or on storage that both see. `ipc` and
`nccl` keep one copy on the trainer's GPU and leave the way to vLLM's own weight transfer; their file is a manifest.
No heavy import.
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from fastreason.config import Config, RolloutConfig
from fastreason.cores import parse_cores
from fastreason.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an update by `ipc` or `nccl` consists of, tensor by tensor in the order of sending.

    `offer` is what vLLM's update request needs beside that: the handles of the memory (ipc).
    """

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offer: dict[str, Any] = {}

    def write(self, path: Path) -> None:
        aside = path.with_suffix(".writing")
        aside.write_bytes(msgspec.json.encode(self))
        os.replace(aside, path)


def read_manifest(path: str | Path) -> Manifest:
    return msgspec.json.decode(Path(path).read_bytes(), type=Manifest)


class TransferRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's client asks of the trainer (nccl): to join a new group at `port`, or to send all weights to it.

    `group` names the group: each start of an engine's server has one of its own, so that one that dies takes no other with it.
    """

    what: str  # "join" or "send"
    group: str = ""
    port: int = 0
    world_size: int = 0


FAILURE_FILE = "transfer-failed"


def write_failure(folder: Path, reason: str, group: str | None = None) -> None:
    """Say to the engines' clients why the trainer sends no more weights to `group`, or to any (nccl)."""
    path = folder / (FAILURE_FILE if group is None else f"{FAILURE_FILE}-{group}")
    aside = path.with_name(f"{path.name}.writing")
    aside.write_text(reason, encoding="utf-8")
    os.replace(aside, path)


def read_failure(folder: Path, group: str) -> str | None:
    """What `write_failure` said to all, or to `group`; None where it said nothing."""
    for name in (FAILURE_FILE, f"{FAILURE_FILE}-{group}"):
        try:
            return (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
    return None


def exchange_parents(config: RolloutConfig) -> tuple[Path, ...]:
    """The folders under which a run may make its own for exchange files, the best first."""
    temporary = Path(tempfile.gettempdir())
    if config.transport == "file":
        return (Path(config.exchange_dir) if config.exchange_dir else temporary,)
    return (SHARED_MEMORY, temporary)


def check_transport(config: Config, device: str) -> None:
    """Raise ConfigError where `rollout.transport` cannot work with this config on this machine."""
    rollout, transport = config.rollout, config.rollout.transport
    folder = rollout.exchange_dir
    if folder is not None and transport != "file":
        raise ConfigError(
            f"rollout.exchange_dir={folder!r}: only rollout.transport=file uses it, here it is {transport}. Remove it, or "
            "set rollout.transport=file."
        )
    if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        state = "cannot be written to" if Path(folder).is_dir() else "is no folder"
        raise ConfigError(
            f"rollout.exchange_dir={folder!r}: it {state}. Give a folder on storage that trainer and engine share."
        )
    if transport in ("ipc", "nccl"):
        _check_gpu_transport(config, device)


def _check_gpu_transport(config: Config, device: str) -> None:
    rollout, key = config.rollout, f"rollout.transport={config.rollout.transport}"
    if device != "cuda":
        raise ConfigError(f"{key}: it moves weights between GPUs, and the run is on {device}. Use auto, shm or file.")
    if rollout.engine != "vllm":
        raise ConfigError(
            f"{key}: only rollout.engine=vllm has it, here it is {rollout.engine}. Use auto, shm or file."
        )
    vllm = importlib.util.find_spec("vllm")
    folder = Path(vllm.origin).parent / "distributed" / "weight_transfer" if vllm and vllm.origin else None
    if folder is None or not (folder / f"{rollout.transport}_engine.py").is_file():
        raise ConfigError(f"{key}: the installed vllm has no such weight transfer (0.28 has). Use auto, shm or file.")
    engine = parse_cores(rollout.gpus, "rollout.gpus") if rollout.gpus else None
    trainer = parse_cores(config.train.gpus, "train.gpus") if config.train.gpus else None
    if rollout.transport == "ipc" and (rollout.tensor_parallel > 1 or (engine or [0])[0] != (trainer or [0])[0]):
        raise ConfigError(
            f"{key}: engine and first trainer rank must share one GPU; here the engine has rollout.gpus={rollout.gpus!r} "
            f"with rollout.tensor_parallel={rollout.tensor_parallel}, the trainer train.gpus={config.train.gpus!r}. Use nccl."
        )
    if rollout.transport == "nccl" and (engine is None or trainer is None or set(engine) & set(trainer)):
        raise ConfigError(
            f"{key}: engine and trainer must have GPUs of their own; here rollout.gpus={rollout.gpus!r} and "
            f"train.gpus={config.train.gpus!r}. Set both, without a common one, or use ipc."
        )
