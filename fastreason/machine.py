"""What this machine offers against what a run wants: compiler, shared memory, disk, port, cores, memory.

Each check looks, changes nothing, and returns a `Check`; `doctor.py` collects them. Of the network only the engine servers
that a config names are asked whether they answer.
"""

import functools
import os
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from fastreason.config import Config
from fastreason.cores import available_cores, require_cores
from fastreason.errors import ConfigError
from fastreason.resources import KEY_VARIABLE, check_address, num_engines

GIB = 2**30
# bf16 weights and gradients with fp32 master weights and two Adam moments, in units of the bf16 weights.
TRAINER_MEMORY = 8
# The same without gradients, on disk.
CHECKPOINT_DISK = 7

BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # x86's two, Arm's one

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was `seen`, and the `advice` where the status is not ok."""

    name: str
    status: Status
    seen: str
    advice: str = ""


def check_compiler(has_gpu: bool) -> Check:
    """A C and a C++ compiler and ninja: Triton needs the first, DeepSpeed's offload all of them."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    tools = {"cc": ("cc", "gcc", "clang"), "c++": ("c++", "g++", "clang++"), "ninja": ("ninja",)}
    found = {tool: any(shutil.which(name, path=beside) for name in names) for tool, names in tools.items()}
    missing = [tool for tool, there in found.items() if not there]
    if not missing:
        return Check("compiler", "ok", "cc, c++ and ninja found")
    advice = "Install them (Debian: apt install build-essential ninja-build). "
    if has_gpu and "cc" in missing:
        return Check("compiler", "fail", f"missing: {', '.join(missing)}", advice + "Triton compiles with cc.")
    advice += "Only train.offload=cpu and other compiled DeepSpeed ops need them here."
    return Check("compiler", "warn", f"missing: {', '.join(missing)}", advice)


def check_shared_memory(config: Config | None, folder: Path = Path("/dev/shm")) -> Check:
    """Room in shared memory, through which weights travel from trainer to engine on one machine."""
    if not folder.is_dir():
        return Check(
            "shared memory", "warn", f"no {folder}", "Weights will travel through the temporary folder: slower."
        )
    usage = shutil.disk_usage(folder)
    seen = f"{folder}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    need = 2 * model_bytes(config) or GIB
    if usage.free < need:
        advice = f"{need / GIB:.1f} GiB are wanted, else weights travel through the temporary folder: slower. "
        return Check("shared memory", "warn", seen, advice + "In Docker: --shm-size or --ipc=host.")
    return Check("shared memory", "ok", seen)


def check_disk(config: Config | None) -> Check:
    """Whether the folder of the runs can be written, with room for its checkpoints."""
    folder = Path(config.run.dir if config else "runs").absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    seen = f"{folder}: {free / GIB:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder} is not writable", "Choose another run.dir.")
    need = float(GIB)
    if config is not None:
        kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
        need += (kept * CHECKPOINT_DISK + 1) * model_bytes(config)
    if free < GIB:
        return Check("disk", "fail", seen, "Free some space or choose another run.dir.")
    if free < need:
        advice = (
            f"The checkpoints may take {need / GIB:.0f} GiB: lower checkpoint.keep_last, or choose another run.dir."
        )
        return Check("disk", "warn", seen, advice)
    return Check("disk", "ok", seen)


def check_port(config: Config | None) -> Check:
    """Whether the servers of the engines could listen on loopback."""
    port = config.rollout.port if config else 0
    for number in range(port, port + num_engines(config)) if config and port else [port]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", number))
            except (OSError, OverflowError) as error:
                of = f" (port {number})" if number != port else ""
                seen = f"rollout.port={port}{of} on 127.0.0.1: {getattr(error, 'strerror', error)}"
                return Check("port", "fail", seen, "Set rollout.port=0 (any free one), or end what listens there.")
    return Check("port", "ok", f"127.0.0.1:{port} is free" if port else "loopback has free ports")


def check_engines(config: Config | None, timeout_s: float = 5.0) -> list[Check]:
    """Whether the servers of `resources.urls` answer, and to the key in the environment."""
    checks, key = [], os.environ.get(KEY_VARIABLE, "")
    for index, url in enumerate(config.resources.urls if config is not None else ()):
        try:
            check_address(index, url)
        except ConfigError as error:
            checks.append(Check(f"engine {index}", "fail", "no address", str(error)))
            continue
        seen, advice = "answers", ""
        try:
            request = urllib.request.Request(f"{url.rstrip('/')}/health", headers={"Authorization": f"Bearer {key}"})
            urllib.request.urlopen(request, timeout=timeout_s).close()
        except urllib.error.HTTPError as error:
            seen = f"answers with {error.code}"
            advice = "Look at its log there."
            if error.code == 401:
                advice = f"Set {KEY_VARIABLE} to the key that `fastreason serve` asks for there." if key else ""
                advice = (
                    advice or f"{KEY_VARIABLE} is not set: it holds the key that `fastreason serve` asks for there."
                )
        except (OSError, ValueError) as error:
            seen = f"does not answer: {getattr(error, 'reason', error)}"
            advice = "Start it there: fastreason serve MODEL --host HOST --exchange-dir DIR; see that its port is open to here."
        checks.append(Check(f"engine {url}", "fail" if advice else "ok", seen, advice))
    return checks


def check_cores(config: Config | None) -> Check:
    """The cores that the config names against those that this process may use."""
    available = available_cores()
    seen = f"{len(available)} core(s) for this process, {os.cpu_count()} in the machine"
    if config is None:
        return Check("cores", "ok", seen)
    chosen: dict[str, set[int]] = {}
    for key, text in (("rollout.cores", config.rollout.cores), ("train.cores", config.train.cores)):
        if text is None:
            continue
        try:
            chosen[key] = set(require_cores(text, key))
        except ConfigError as error:
            return Check("cores", "fail", seen, str(error))
    if len(chosen) == 2 and (shared := chosen["rollout.cores"] & chosen["train.cores"]):
        advice = f"rollout.cores and train.cores share {sorted(shared)}: generation and training slow each other down."
        return Check("cores", "warn", seen, advice)
    usable = len(chosen.get("train.cores", available))
    threads = config.train.ranks * max(1, config.train.threads)
    if threads > usable:
        advice = f"train.ranks x train.threads = {threads} threads on {usable} core(s): lower one of them."
        return Check("cores", "warn", seen, advice)
    return Check("cores", "ok", seen)


def has_bf16_products(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for products of bf16 matrices; where Linux does not list them, it counts as without."""
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not BF16_FLAGS.isdisjoint(flags.partition(":")[2].split())


def check_precision(config: Config | None, on_gpu: bool, has_products: Callable[[], bool] = has_bf16_products) -> Check:
    """Whether the config asks a CPU for bf16 that it has no instructions for."""
    if on_gpu or has_products():
        return Check("precision", "ok", "bf16 products: model.dtype=auto is bfloat16")
    seen = "a CPU without bf16 products: model.dtype=auto is float32"
    asked = [f"{name}.dtype" for name in ("model", "teacher") if config and getattr(config, name).dtype == "bfloat16"]
    if asked:
        return Check("precision", "warn", seen, f"{' and '.join(asked)}=bfloat16 is several times slower: use auto.")
    return Check("precision", "ok", seen)


def available_memory() -> int:
    """Bytes that this process could still use: the machine's, or fewer where a container limits it."""
    available = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return available


def check_memory(config: Config | None, on_gpu: bool, read_available: Callable[[], int] = available_memory) -> Check:
    """Memory against the engines' KV caches and, where the model is a local folder, its weights and optimizer."""
    available = read_available()
    seen = f"{available / GIB:.1f} GiB available"
    if config is None or on_gpu:
        return Check("memory", "ok", seen)
    weights = model_bytes(config)
    engines = 0 if config.resources.urls else num_engines(config)
    caches = engines * config.rollout.kv_cache_gib * GIB
    need = caches + (TRAINER_MEMORY + engines) * weights
    what = "without activations" if weights else "for the KV cache; the model's size is not known here"
    seen += f", about {need / GIB:.1f} GiB wanted {what}"
    if need > available:
        advice = f"Lower rollout.kv_cache_gib (now {config.rollout.kv_cache_gib:g}), or use a smaller model."
        return Check("memory", "fail" if caches > available else "warn", seen, advice)
    return Check("memory", "ok", seen)


@functools.cache
def _folder_bytes(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def model_bytes(config: Config | None) -> int:
    """Size of the model's weights where it is a local folder, else 0 (unknown)."""
    return _folder_bytes(config.model.path) if config is not None else 0
