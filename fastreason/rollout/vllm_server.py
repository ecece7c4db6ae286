"""What a vLLM API server is told on its command line and in its environment, and what the end of its log means.

The server is the stock `vllm.entrypoints.openai.api_server` with two additions of ours: a middleware that asks for the
run's key on every path, and a worker extension that loads published weights. What was learned on vLLM 0.28: on a CPU a
seeded request whose prompt is prefilled in two pieces kills the worker ("CPU Generator does not use offset"), so prompts
are never split there.
"""

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from fastreason.config import Config, RolloutConfig
from fastreason.cores import available_cores, cores_text, parse_cores
from fastreason.exchange import EXCHANGE_VARIABLE
from fastreason.rollout.server import LOOPBACK, EngineServer
from fastreason.rollout.vllm_adapter import ADAPTER_FOLDER, ADAPTER_NAME, ADAPTER_VARIABLE, padded_rank

KNOWN_ENDS = [
    (r"[Aa]ddress already in use", "the port is in use: set rollout.port to another, or to 0 for any free one"),
    (r"No available memory for the cache blocks|[Nn]ot enough memory|Available memory .* is less than",
     "the KV cache does not fit: lower rollout.kv_cache_gib, rollout.gpu_memory_utilization or rollout.max_new_tokens"),
    (r"out of memory|MemoryError|Cannot allocate memory|DefaultCPUAllocator",
     "out of memory: lower rollout.kv_cache_gib or use a smaller model"),
    (r"operator torchvision::nms does not exist",
     "a CUDA build of torchvision stands beside a CPU torch: pip uninstall torchvision torchaudio torchcodec"),
    (r"No module named 'vllm'", "vllm is not installed: run `make setup` (CPU) or pip install 'fastreason[vllm]'"),
]  # fmt: skip


def make_server(
    config: Config,
    model_dir: str,
    log_path: Path,
    *,
    max_model_len: int,
    device: str,
    exchange_dir: str,
    key: str,
    temporary_dir: str | None = None,
    tenant_file: Path | None = None,
    **where: str,
) -> EngineServer:
    """A vLLM server on this machine, not yet started; raises EngineError when `rollout.port` is in use.

    A server that is to get adapters starts with the one in `temporary_dir`. tenant_file: given where the server sleeps while
    another has its GPUs. where: `host` and `label` of EngineServer, for one that runs elsewhere talk to.
    """
    adapter_dir = os.path.join(temporary_dir or "", ADAPTER_FOLDER) if config.lora.applied_by_engine else None
    options: dict[str, Any] = {
        "dtype": config.model.dtype,
        "max_model_len": max_model_len,
        "seed": config.run.seed,
        "device": device,
        "sleeps": tenant_file is not None,
        "adapter": (adapter_dir, config.lora.rank) if adapter_dir else None,
        "host": where.get("host", LOOPBACK),
    }
    return EngineServer(
        "vLLM server",
        lambda port: server_command(config.rollout, model_dir, port, **options),
        server_environment(
            config.rollout,
            exchange_dir=exchange_dir,
            device=device,
            temporary_dir=temporary_dir,
            adapter_dir=adapter_dir,
        ),
        log_path,
        config.rollout,
        key=key,
        explain=explain_end,
        **where,
    )


def server_command(
    config: RolloutConfig,
    model_dir: str,
    port: int,
    *,
    dtype: str,
    max_model_len: int,
    seed: int,
    device: str,
    sleeps: bool = False,
    host: str = LOOPBACK,
    adapter: tuple[str, int] | None = None,
) -> list[str]:
    """The command line of one server; holds no secret.

    sleeps: it can give up its memory (on a GPU). adapter: (folder, rank) of the one that it starts with.
    """
    assert dtype != "auto", "vLLM's own auto is the dtype of the model's files, not the run's"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "--model": model_dir,
        "--served-model-name": "policy",
        "--host": host,
        "--port": port,
        "--dtype": dtype,
        "--max-model-len": max_model_len,
        "--seed": seed,
        "--generation-config": "vllm",
        "--logprobs-mode": "processed_logprobs",
        "--worker-extension-cls": "fastreason.rollout."
        + ("vllm_adapter.AdapterWorker" if adapter else "vllm_worker.WeightWorker"),
        "--middleware": "fastreason.rollout.vllm_middleware.RequireKey",
        "--tensor-parallel-size": config.tensor_parallel,
        "--uvicorn-log-level": "warning",
    }
    flags = ["--enable-prefix-caching", "--disable-uvicorn-access-log"]
    if device == "cpu":
        flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
        # With an adapter vLLM copies its factors for every token of a step.
        options["--max-num-batched-tokens"] = max(1024 if adapter else 4096, max_model_len)
        options["--max-num-seqs"] = 128
        options["--block-size"] = 32  # of 128, which it takes by itself, a group shares no prompt below 128 tokens
    else:
        flags += ["--enable-sleep-mode"] if sleeps else []
        options["--gpu-memory-utilization"] = config.gpu_memory_utilization
        if config.transport in ("ipc", "nccl"):
            options["--weight-transfer-config"] = json.dumps({"backend": config.transport})
    if adapter is not None:
        folder, rank = adapter
        flags += ["--enable-lora"]
        options["--lora-modules"] = json.dumps({"name": ADAPTER_NAME, "path": folder})
        options["--max-lora-rank"] = padded_rank(rank)
    return command + [str(part) for pair in options.items() for part in pair] + flags


def server_environment(
    config: RolloutConfig,
    *,
    exchange_dir: str,
    device: str,
    temporary_dir: str | None = None,
    adapter_dir: str | None = None,
) -> dict[str, str]:
    """What the server gets through its environment beside the key: the exchange folder, and vLLM's own settings."""
    environment = {
        EXCHANGE_VARIABLE: exchange_dir,
        # Its processes leave sockets and files there: private, and removed at the end.
        "TMPDIR": temporary_dir or exchange_dir,
        "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, /pause, /resume: guarded by the middleware
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local folder by now
        # Longer than the client keeps idle connections: a server that closes one just as it is reused loses a request.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }
    if adapter_dir is not None:
        environment[ADAPTER_VARIABLE] = adapter_dir
    if config.transport == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the handles come pickled, behind the middleware
    if device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(config.kv_cache_gib))
        cores = parse_cores(config.cores, "rollout.cores") if config.cores else available_cores()
        environment["VLLM_CPU_OMP_THREADS_BIND"] = thread_binding(cores, config.tensor_parallel)
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif config.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, parse_cores(config.gpus, "rollout.gpus")))
    return environment


def thread_binding(cores: list[int], number: int) -> str:
    """The cores of each of `number` processes that compute: `0-1` for one, `0|1` for two."""
    size = max(1, len(cores) // number)
    return "|".join(cores_text(cores[index * size : (index + 1) * size]) for index in range(number))


def explain_end(text: str, num_lines: int = 25) -> str:
    """The last error in a server's log, then its tail; the reasons known here come first, in words."""
    lines = text.splitlines()
    reasons = [reason for pattern, reason in KNOWN_ENDS if re.search(pattern, text)]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    # What the outer processes say of an inner one's failure explains nothing, if there is more.
    errors = [line for line in errors if not re.search(r"See root cause|EngineDeadError", line)] or errors
    parts = [f"likely reason: {reasons[0]}"] if reasons else []
    if errors:
        parts.append(f"last error: {errors[-1].strip()}")
    parts.append("the end of its log:" if lines else "it wrote nothing into its log")
    return "\n".join(parts + [f"  | {line[:300]}" for line in lines[-num_lines:]])
