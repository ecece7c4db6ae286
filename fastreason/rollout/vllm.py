"""vLLM behind the Engine protocol: a supervised API server process on loopback, and the client that talks to it.

The only file that knows vLLM. The server is the stock `vllm.entrypoints.openai.api_server` with two additions of ours:
a middleware that asks for the run's key on every path, and a worker extension that loads published weights.
What was learned on vLLM 0.28:

- on a CPU a seeded request whose prompt is prefilled in two pieces kills the worker ("CPU Generator does not use
  offset"), so prompts are never split there;
- `/inference/v1/generate` with n > 1 returns only the last finished choice, so every sample is a request of its own.
"""

import asyncio
import math
import re
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from fastreason.config import RolloutConfig
from fastreason.cores import available_cores, parse_cores
from fastreason.errors import EngineError
from fastreason.processes import Child, spawn
from fastreason.rollout.engine import sample_seed
from fastreason.rollout.vllm_middleware import KEY_VARIABLE
from fastreason.rollout.vllm_worker import EXCHANGE_VARIABLE
from fastreason.types import Completion, LoadReport, SamplingParams, WeightUpdate

LOOPBACK = "127.0.0.1"
RESUME_ATTEMPTS = 5


def new_key() -> str:
    """A random key for one run's engines."""
    return secrets.token_urlsafe(32)


def hold_port(port: int) -> socket.socket:
    """A socket bound to a loopback port (0: any free one), never listening: nobody else is given the port meanwhile.

    Bound with SO_REUSEADDR like vLLM's own, which may then share it; with SO_REUSEPORT it could not.
    """
    hold = socket.socket()
    hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    hold.bind((LOOPBACK, port))
    return hold


def port_is_free(port: int) -> bool:
    """Whether no socket listens there, or holds it without sharing."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def server_command(
    config: RolloutConfig, model_dir: str, port: int, *, dtype: str, max_model_len: int, seed: int, device: str
) -> list[str]:
    """The command line of one server; holds no secret."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "--model": model_dir,
        "--served-model-name": "policy",
        "--host": LOOPBACK,
        "--port": port,
        "--dtype": dtype,
        "--max-model-len": max_model_len,
        "--seed": seed,
        "--generation-config": "vllm",
        "--logprobs-mode": "processed_logprobs",
        "--worker-extension-cls": "fastreason.rollout.vllm_worker.WeightWorker",
        "--middleware": "fastreason.rollout.vllm_middleware.RequireKey",
        "--tensor-parallel-size": config.tensor_parallel,
        "--uvicorn-log-level": "warning",
    }
    flags = ["--enable-prefix-caching", "--disable-uvicorn-access-log"]
    if device == "cpu":
        flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
        options["--max-num-batched-tokens"] = max(4096, max_model_len)
        options["--max-num-seqs"] = 128
    else:
        options["--gpu-memory-utilization"] = config.gpu_memory_utilization
    return command + [str(part) for pair in options.items() for part in pair] + flags


def server_environment(config: RolloutConfig, *, key: str, exchange_dir: str, device: str) -> dict[str, str]:
    """What the server gets through its environment: the key, the exchange folder, and vLLM's own settings."""
    environment = {
        KEY_VARIABLE: key,
        EXCHANGE_VARIABLE: exchange_dir,
        "TMPDIR": exchange_dir,  # its processes leave sockets and files there: private, and removed at the end
        "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, /pause, /resume: guarded by the middleware
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local folder by now
        # Longer than the client keeps idle connections: a server that closes one just as it is reused loses a request.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }
    if device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(config.kv_cache_gib))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = config.cores or ",".join(map(str, available_cores()))
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif config.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, parse_cores(config.gpus, "rollout.gpus")))
    return environment


class VllmServer:
    """One API server process: starts it, knows whether it lives, ends it with all that it started."""

    def __init__(
        self,
        config: RolloutConfig,
        model_dir: str,
        log_path: Path,
        *,
        dtype: str,
        max_model_len: int,
        seed: int,
        device: str,
        exchange_dir: str,
        key: str,
    ) -> None:
        self._config, self._log_path, self._key = config, log_path, key
        if config.port and not port_is_free(config.port):
            raise EngineError(
                f"rollout.port={config.port}: the port is in use on {LOOPBACK}. Choose another, or 0 for any free one."
            )
        self._hold = hold_port(config.port)
        self.port = self._hold.getsockname()[1]
        self._command = server_command(
            config, model_dir, self.port, dtype=dtype, max_model_len=max_model_len, seed=seed, device=device
        )
        self._environment = server_environment(config, key=key, exchange_dir=exchange_dir, device=device)
        self.child: Child | None = None

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def start(self) -> Child:
        self.child = spawn("vLLM server", self._command, self._log_path, self._environment)
        return self.child


def explain_log(log_path: Path, num_lines: int = 25) -> str:
    """The last error in a server's log, then its tail; the reasons known here come first, in words."""
    if not log_path.is_file():
        return "it wrote no log"
    lines = log_path.read_text(errors="replace").splitlines()
    text = "\n".join(lines)
    known = [
        (r"[Aa]ddress already in use", "the port is in use: set rollout.port to another, or to 0 for any free one"),
        (r"No available memory for the cache blocks|[Nn]ot enough memory|Available memory .* is less than", "the KV cache "
         "does not fit: "
         "lower rollout.kv_cache_gib, rollout.gpu_memory_utilization or rollout.max_new_tokens"),
        (r"out of memory|MemoryError|Cannot allocate memory|DefaultCPUAllocator", "out of memory: lower "
         "rollout.kv_cache_gib or use a smaller model"),
        (r"operator torchvision::nms does not exist", "a CUDA build of torchvision stands beside a CPU torch: "
         "pip uninstall torchvision torchaudio torchcodec"),
        (r"No module named 'vllm'", "vllm is not installed: run `make setup` (CPU) or pip install 'fastreason[vllm]'"),
    ]  # fmt: skip
    reasons = [reason for pattern, reason in known if re.search(pattern, text)]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    # What the outer processes say of an inner one's failure explains nothing, if there is more.
    errors = [line for line in errors if not re.search(r"See root cause|EngineDeadError", line)] or errors
    parts = [f"likely reason: {reasons[0]}"] if reasons else []
    if errors:
        parts.append(f"last error: {errors[-1].strip()}")
    parts.append("the end of its log:")
    parts += [f"  | {line[:300]}" for line in lines[-num_lines:]]
    return "\n".join(parts) + f"\nfull log: {log_path}"


class VllmEngine:
    """The client of one server; stamps every token with the version of the weights that sampled it."""

    name = "vllm"

    def __init__(self, url: str, key: str, config: RolloutConfig, *, startup_timeout_s: float | None = None) -> None:
        self._url, self._config = url.rstrip("/"), config
        self._headers = {"Authorization": f"Bearer {key}"}
        self._startup_timeout_s = startup_timeout_s or config.startup_timeout_s
        self._session: aiohttp.ClientSession | None = None
        # request id -> [(version, first token index sampled with it)], for the requests in flight
        self._marks: dict[str, list[tuple[int, int]]] = {}
        self.version = 0

    async def start(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._config.request_timeout_s)
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        )
        deadline = time.monotonic() + self._startup_timeout_s
        while True:
            try:
                async with self._session.get(f"{self._url}/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
                    if response.status == 200:
                        return
                    if response.status == 401:
                        raise EngineError(f"the engine at {self._url} refused the key of this run (401)")
            except (aiohttp.ClientError, TimeoutError):
                pass
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the vLLM server at {self._url} did not answer within rollout.startup_timeout_s="
                    f"{self._startup_timeout_s:g} s. Raise it if the model is large; see logs/engine.log in the run's folder."
                )
            await asyncio.sleep(0.3)

    async def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        if self._session is None:
            raise EngineError("the engine has not been started")
        try:
            async with self._session.post(f"{self._url}{path}", json=body) as response:
                if response.status != 200:
                    text = (await response.text())[:500]
                    raise EngineError(f"the vLLM server answered {response.status} to {path.split('?')[0]}: {text}")
                return await response.json()
        except TimeoutError as error:
            raise EngineError(
                f"the vLLM server did not answer {path.split('?')[0]} within rollout.request_timeout_s="
                f"{self._config.request_timeout_s:g} s: it hangs, or the limit is too short for the length asked for."
            ) from error
        except aiohttp.ClientError as error:
            raise EngineError(f"the connection to the vLLM server broke at {path.split('?')[0]}: {error}") from error

    async def generate(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> list[Completion]:
        requests = [
            self._generate_one(f"{request_id}.{index}", prompt_token_ids, params, sample_seed(params.seed, index))
            for index in range(params.n)
        ]
        return list(await asyncio.gather(*requests))

    async def _generate_one(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, seed: int | None
    ) -> Completion:
        sampling = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_new_tokens,
            "seed": seed,
            "logprobs": 0,
            "stop_token_ids": list(params.stop_token_ids),
        }
        body = {"request_id": request_id, "token_ids": prompt_token_ids, "sampling_params": sampling}
        self._marks[request_id] = [(self.version, 0)]
        try:
            answer = await self._post("/inference/v1/generate", body)
        finally:
            marks = self._marks.pop(request_id)
        choice = answer["choices"][0]
        token_ids = choice["token_ids"]
        logp = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        if len(logp) != len(token_ids):
            raise EngineError(f"the vLLM server returned {len(token_ids)} tokens with {len(logp)} log-probabilities")
        return Completion(
            token_ids=token_ids,
            logp=logp,
            finish_reason=choice["finish_reason"] or "stop",
            token_versions=stamp_versions(marks, len(token_ids)),
        )

    async def score(self, token_ids: list[int]) -> list[float]:
        sampling = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0, "logprobs": 0}
        answer = await self._post("/inference/v1/generate", {"token_ids": token_ids, "sampling_params": sampling})
        entries = answer["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for token, entry in zip(token_ids[1:], entries, strict=True)]

    async def load_weights(self, update: WeightUpdate) -> LoadReport:
        started = time.perf_counter()
        await self._post("/pause?mode=keep")
        paused = time.perf_counter()
        try:
            body = {"method": "fastreason_load", "kwargs": {"path": update.path, "checksum": update.checksum}}
            reports = (await self._post("/collective_rpc", body))["results"]
            if not reports or any(report["checksum"] != update.checksum for report in reports):
                raise EngineError(f"version {update.version}: the engine holds other weights than were sent: {reports}")
            self._mark_running(reports[0]["tokens_before"], update.version)
            self.version = update.version
            await self._post("/reset_prefix_cache")
        finally:
            await self._resume()
        ended = time.perf_counter()
        return LoadReport(
            version=update.version,
            checksum=reports[0]["checksum"],
            num_tensors=reports[0]["num_tensors"],
            held_bytes=reports[0]["held_bytes"],
            pause_s=ended - paused,
            load_s=max(report["load_s"] for report in reports),
            total_s=ended - started,
        )

    async def _resume(self) -> None:
        """Resume, whatever happened: the server closes the connections on which it answered with an error."""
        for attempt in range(RESUME_ATTEMPTS):
            try:
                await self._post("/resume")
                return
            except EngineError:
                if attempt == RESUME_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.1)

    def _mark_running(self, tokens_before: dict[str, int], version: int) -> None:
        """From here on the requests in flight sample with `version`.

        The engine names a request "generate-tokens-<ours>-<random>". One that the engine does not know any more has
        finished with the former weights, one that it does not know yet has sampled nothing: both keep the older stamp,
        which can only overstate their staleness.
        """
        for internal, num_tokens in tokens_before.items():
            ours = internal.removeprefix("generate-tokens-").rpartition("-")[0]
            if ours in self._marks:
                self._marks[ours].append((version, num_tokens))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


def stamp_versions(marks: list[tuple[int, int]], num_tokens: int) -> list[int]:
    """The version of each token, from [(version, index of the first token sampled with it)] in order."""
    versions = [marks[0][0]] * num_tokens
    for version, first in marks[1:]:
        versions[first:] = [version] * max(0, num_tokens - first)
    return versions
