"""The same GRPO job with TRL's GRPOTrainer and with fastreason, side by side: seconds a step, tokens trained a second, memory.

    python bench/end_to_end.py [--json FILE] [--steps 9] [--rounds 2] [--trainers trl,ours,ours_exact] [key=value ...]

The job is bench/end_to_end.yaml, with `key=value` overrides for both sides. Rows:

    trl         GRPOTrainer, default settings but for those of the job and no gradient checkpointing; on a CPU transformers'
                generate, bf16 autocast over fp32 weights where model.dtype is bfloat16, on a GPU vLLM colocated
    ours        `fastreason train` with the same dense work: every sample with its own prompt, every sample trained
    ours_exact  `fastreason train` as it comes: a prompt shared by a group computed once, samples without gradient left out

Same: model, prompts in the same order, samples, lengths, temperature, reward, advantage, loss (clip 0.2, mean over the
step's tokens, no KL), one update a step, AdamW with the same rate, betas and clipping; fp32 master weights, model.dtype.
Different: the random numbers, so the responses; TRL trains on what the current weights sampled, fastreason with
rollout.max_staleness=1 on groups that lag by one version, its ratio taken against the sampler. Each runs in processes of
its own on the same cores. Tokens are counted as TRL counts them: prompt and response of every sample, whatever was
computed; a row's rate is all tokens over all seconds of the measured steps. Evaluations are in no step's time; peak_mb is
the memory of all processes of a trainer, shared pages counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from children import cpu_name, run_child
from end_to_end_rows import Part, Step, curve, print_table, rows_of

from fastreason.config import Config, dump_config, load_config
from fastreason.cores import available_cores, parse_cores
from fastreason.metrics import read_metrics, read_summary
from fastreason.preflight import settle_dtypes

HERE = Path(__file__).resolve().parent
JOB = HERE / "end_to_end.yaml"
ALLOCATOR_SHARE = 0.3  # of a GPU's memory for vLLM beside the trainer: TRL's default for its colocated engine


@dataclass(frozen=True)
class Trainer:
    """One row: which side runs, its overrides of the job, and how many steps at its start and end are not measured.

    Of ours the first three are not: the first waits for a whole batch, and while it compiles and warms up, batches are
    made ahead that the next two find ready. Nor is the last, during which nothing is generated.
    """

    overrides: tuple[str, ...] = ()
    skip_first: int = 3
    skip_last: int = 1


TRAINERS = {
    "trl": Trainer(skip_first=1, skip_last=0),
    "ours": Trainer(("train.share_prompts='off'", "train.skip_zero_advantage=false")),
    "ours_exact": Trainer(),
}


def run_trl(name: str, config: Config, folder: Path, options: argparse.Namespace) -> Part:
    """One run of GRPOTrainer, in a process of its own."""
    job, out = folder / "job.yaml", folder / "trl.jsonl"
    job.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, str(HERE / "end_to_end_trl.py"), str(job), str(out)]
    command += ["--micro-batch", str(options.trl_micro_batch), "--attention", options.trl_attention]
    peak_mb = run_child(command, folder / "trl.log")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    steps = [Step(**line["step"]) for line in lines if "step" in line]
    evals = [tuple(line["eval"]) for line in lines if "eval" in line]
    return Part(name, steps, evals, peak_mb)


def run_ours(name: str, config: Config, folder: Path, options: argparse.Namespace) -> Part:
    """One run of `fastreason train`."""
    job = folder / "job.yaml"
    job.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "fastreason.cli", "train", str(job), f"run.dir={folder / 'runs'}"]
    peak_mb = run_child(command, folder / "ours.log")
    run_dir = next((folder / "runs").iterdir())
    metrics = read_metrics(run_dir)
    phases = ("wait_s", "train_s", "publish_s", "generate_s")
    steps = [
        Step(m["time/step_s"], m["train/tokens"], m["reward/mean"], {key: m[f"time/{key}"] for key in phases})
        for m in metrics
    ]
    accuracy = {int(m["step"]): m["eval/accuracy"] for m in metrics if "eval/accuracy" in m}
    before = read_summary(run_dir).get("accuracy_before")
    if before is not None:
        accuracy[0] = before
    return Part(name, steps, curve([step.seconds for step in steps], accuracy), peak_mb)


def load_job(options: argparse.Namespace) -> Config:
    """The job, with the overrides that this machine and the command line ask for."""
    overrides = [f"train.steps={options.steps}", f"eval.every={options.eval_every}"]
    if options.device == "cuda":
        overrides += ["rollout.cores=null", "train.cores=null", "train.spare_cores=null"]
        overrides += ["rollout.max_running_groups=0", f"rollout.gpu_memory_utilization={ALLOCATOR_SHARE}"]
    elif len(options.cores) > 1:
        half = len(options.cores) // 2
        overrides += [f"{key}={number_list(options.cores[:half])}" for key in ("rollout.cores", "train.spare_cores")]
        overrides += [f"train.cores={number_list(options.cores[half:])}"]
    return settle_dtypes(load_config(JOB, overrides + options.overrides))


def number_list(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def write_json(parts: list[Part], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of what is measured so far, also written to `--json`: an interruption loses one part at most."""
    rows = rows_of(parts, {name: (row.skip_first, row.skip_last) for name, row in TRAINERS.items()})
    if options.json is not None:
        keys = ("device", "cores", "steps", "rounds", "overrides", "trl_micro_batch", "trl_attention")
        settings = {key: getattr(options, key) for key in keys} | {"cpu": cpu_name()}
        text = json.dumps([{**row, "settings": settings} for row in rows], indent=1)
        aside = options.json.with_name(f".{options.json.name}.tmp")
        aside.write_text(text + "\n")
        aside.replace(options.json)
    return rows


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write, after each part")
    parser.add_argument("--steps", type=int, default=9, help="steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each trainer, in alternation")
    parser.add_argument("--trainers", default=",".join(TRAINERS))
    parser.add_argument(
        "--eval-every", type=int, default=0, help="0: before and after only; a step after one finds more made ahead"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--cores", help="cores of each trainer, e.g. 0-1; default: the first two, on a GPU all")
    parser.add_argument("--trl-micro-batch", type=int, default=32, help="per_device_train_batch_size")
    parser.add_argument("--trl-attention", choices=["sdpa", "eager"], default="sdpa", help="attn_implementation")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the job, for all trainers")
    options = parser.parse_args(arguments)
    options.trainers = options.trainers.split(",")
    if unknown := set(options.trainers) - set(TRAINERS):
        parser.error(f"--trainers: no such trainer: {', '.join(sorted(unknown))}; there are {', '.join(TRAINERS)}")
    if options.device == "auto":
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    available = available_cores()
    usual = available[:2] if options.device == "cpu" else available
    options.cores = parse_cores(options.cores, "--cores") if options.cores else usual
    return options


def main() -> None:
    options = parse_options()
    # Ended from outside: the children's own ends are in `finally` clauses.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.sched_setaffinity(0, options.cores)
    job = load_job(options)
    parts: list[Part] = []
    for number in range(options.rounds):
        for name in options.trainers:
            config = override(job, TRAINERS[name].overrides)
            started = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="end-to-end-") as folder:
                run = run_trl if name == "trl" else run_ours
                part = replace(run(name, config, Path(folder), options), number=number)
            parts.append(part)
            rows = write_json(parts, options)
            print(f"round {number + 1}, {name}: {time.perf_counter() - started:.0f} s in all", flush=True)
            print_table(rows)


def override(job: Config, overrides: tuple[str, ...]) -> Config:
    """The job with a row's own overrides."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump_config(job))
        file.flush()
        return load_config(Path(file.name), list(overrides))


if __name__ == "__main__":
    main()
