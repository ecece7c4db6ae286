"""SFT and DPO on the same rows with TRL's trainers and with fastreason: seconds a step, tokens trained a second, memory.

    python bench/offline.py [--json FILE] [--steps 5] [--rounds 1] [--objectives sft,dpo] [--trainers a,b] [key=value ...]
    python bench/offline.py --long [19800] [--trainers ours] [--objectives sft]

The job is bench/offline.yaml, with `key=value` overrides for both sides. Rows come from --sft (problem and solution or
response) and --pairs (problem, generations and their labels `correct`, or chosen and rejected), by default gsm8k_train.jsonl
and rollouts_qwen25math_math100x8.jsonl of the folder that FASTREASON_DATA names; `fastreason data openr1` makes the pairs.

    trl_packed  SFTTrainer, packing=True, packing_strategy="bfd": as many packs an update as make about --trl-pack-tokens each,
                the shortest length that so many need; the run has the rows of ours, each update others
    trl_flat    SFTTrainer, padding_free=True: the rows of a micro-batch in one line
    trl_padded  SFTTrainer or DPOTrainer, rows side by side, the rows of an update sorted by length so that least is padded;
                DPOTrainer with precomputed log-probabilities of the reference (its padding_free does nothing in TRL 1.16)
    ours        `fastreason train` as it comes

Same: model, token ids, rows and their order, batch, number of updates, loss (SFT: mean over an update's response tokens; DPO:
beta 0.1), AdamW with the same rate, betas and clipping, fp32 master weights, model.dtype, cores. TRL runs with bf16=True where
that is bfloat16, without gradient checkpointing, with sdpa and AdamW fused. Tokens are those of each row's prompt and response,
a pair being two rows, and must come out equal; so must the first loss, where the first update has the same rows. peak_mb is the
memory of all processes of a trainer, shared pages counted once. Loading, and the reference's scores, are in "all s" and in no
step's time.

--long trains on one row of about that many tokens a step, with gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from children import cpu_name, run_child
from offline_rows import Part, Step, check_same_work, print_table, responses, rows_of, words_that_fit

from fastreason.config import Config, dump_config, load_config
from fastreason.cores import available_cores, parse_cores
from fastreason.metrics import read_metrics, write_atomically
from fastreason.preflight import settle_dtypes

HERE = Path(__file__).resolve().parent
JOB = HERE / "offline.yaml"
SFT_FILE, PAIRS_FILE = "gsm8k_train.jsonl", "rollouts_qwen25math_math100x8.jsonl"
NUM_RESPONSES = 1000  # rows of --sft that are tokenized
LABELS = ("llama=correct", "math_verify=correct", "valid=")  # the columns of PAIRS_FILE, for fastreason data openr1
TRAINERS = {"trl_packed": ("sft",), "trl_flat": ("sft",), "trl_padded": ("sft", "dpo"), "ours": ("sft", "dpo")}


@dataclass(frozen=True)
class Objective:
    """Overrides of the job, and what TRL takes at a time: rows, or pairs."""

    overrides: tuple[str, ...]
    micro_batch: int


OBJECTIVES = {
    "sft": Objective(("train.prompts_per_step=8", "offline.max_tokens=512"), 4),
    "dpo": Objective(("train.prompts_per_step=4", "offline.max_tokens=1024", "offline.beta=0.1"), 2),
}


def load_job(objective: str, rows: Path, options: argparse.Namespace) -> Config:
    """The job of an objective on a file of rows, with the overrides of the command line."""
    overrides = [f"offline.objective={objective}", f"offline.path={rows}", f"train.steps={options.steps}"]
    overrides += OBJECTIVES[objective].overrides
    if options.long:
        overrides += ["train.prompts_per_step=1", f"offline.max_tokens={options.long}"]
        overrides += ["model.gradient_checkpointing=true", f"model.max_position_embeddings={options.long}"]
    return settle_dtypes(load_config(JOB, overrides + options.overrides))


def write_rows(objective: str, folder: Path, options: argparse.Namespace) -> Path:
    """The file that an objective trains on."""
    path = folder / f"{objective}.jsonl"
    if options.long:
        rows = long_rows(options)
    elif objective == "sft":
        rows = responses(options.sft, NUM_RESPONSES)
    else:
        if '"chosen"' in options.pairs.open(encoding="utf-8").readline():
            return options.pairs.resolve()
        command = [sys.executable, "-P", "-m", "fastreason.cli", "data", "openr1", str(options.pairs.resolve())]
        run_child([*command, "--out", str(folder / "pairs"), "--columns", *LABELS], folder / "pairs.log")
        return folder / "pairs" / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def long_rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """One row as long as --long allows, for every objective: the words of the responses, for the rejected one backwards."""
    from fastreason.compose import load_tokenizer_of
    from fastreason.data.turns import TurnWriter
    from fastreason.models import resolve_model

    config, problem = load_config(JOB, options.overrides), "Go on."
    writer = TurnWriter(load_tokenizer_of(resolve_model(config.model), config), config.data)
    words = [word for row in responses(options.sft, NUM_RESPONSES) for word in row["response"].split()]
    room = options.long - len(writer.prompt(problem))
    texts = [words_that_fit(order, room, lambda text: len(writer.response(text))) for order in (words, words[::-1])]
    return [{"problem": problem, "response": texts[0], "chosen": texts[0], "rejected": texts[1]}]


def run_trl(name: str, objective: str, config: Config, folder: Path, options: argparse.Namespace) -> Part:
    """One run of TRL's trainer, in a process of its own."""
    job, out = folder / "job.yaml", folder / "trl.jsonl"
    job.write_text(dump_config(config), encoding="utf-8")
    micro_batch = options.trl_micro_batch or min(OBJECTIVES[objective].micro_batch, config.train.prompts_per_step)
    command = [sys.executable, str(HERE / "offline_trl.py"), str(job), str(out)]
    command += ["--setting", name.removeprefix("trl_"), "--micro-batch", str(micro_batch)]
    command += ["--pack-tokens", str(options.trl_pack_tokens), "--attention", options.trl_attention]
    started = time.perf_counter()
    peak_mb = run_child(command, folder / "trl.log")
    wall_s = time.perf_counter() - started
    steps = [Step(**json.loads(line)) for line in out.read_text().splitlines()]
    return Part(objective, name, steps, peak_mb, wall_s, same_rows=name != "trl_packed")


def run_ours(name: str, objective: str, config: Config, folder: Path, options: argparse.Namespace) -> Part:
    """One run of `fastreason train`."""
    job = folder / "job.yaml"
    job.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "fastreason.cli", "train", str(job), f"run.dir={folder / 'runs'}"]
    started = time.perf_counter()
    peak_mb = run_child(command, folder / "ours.log")
    wall_s = time.perf_counter() - started
    steps = [
        Step(m["time/step_s"], int(m["train/tokens"]), int(m["train/tokens_in_loss"]), m["loss/policy"])
        for m in read_metrics(next((folder / "runs").iterdir()))
    ]
    return Part(objective, name, steps, peak_mb, wall_s)


def write_json(parts: Sequence[Part], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of what is measured so far, also written to `--json`: an interruption loses one part at most."""
    rows = rows_of(parts)
    if options.json is not None:
        keys = (
            "cores",
            "dtype",
            "steps",
            "rounds",
            "overrides",
            "trl_micro_batch",
            "trl_pack_tokens",
            "trl_attention",
            "long",
        )
        settings = {key: getattr(options, key) for key in keys} | {"cpu": cpu_name()}
        write_atomically(options.json, json.dumps([{**row, "settings": settings} for row in rows], indent=1) + "\n")
    return rows


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("FASTREASON_DATA", "."))
    parser.add_argument("--sft", type=Path, default=data / SFT_FILE, metavar="FILE")
    parser.add_argument("--pairs", type=Path, default=data / PAIRS_FILE, metavar="FILE")
    parser.add_argument("--json", type=Path, help="file to write, after each part")
    parser.add_argument("--steps", type=int, help="updates of each run; default: 5, with --long 2")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each trainer, in alternation")
    parser.add_argument("--objectives", help=f"default: {','.join(OBJECTIVES)}, with --long sft")
    parser.add_argument("--trainers", help=f"default: {','.join(TRAINERS)}, with --long ours")
    parser.add_argument("--cores", help="cores of each trainer, e.g. 0-1; default: the first two")
    parser.add_argument("--long", type=int, nargs="?", const=19800, default=0, metavar="TOKENS")
    parser.add_argument("--trl-micro-batch", type=int, help="rows, or pairs; default: 4 rows, 2 pairs")
    parser.add_argument("--trl-pack-tokens", type=int, default=1024)
    parser.add_argument("--trl-attention", choices=["sdpa", "eager"], default="sdpa", help="attn_implementation")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the job, for all trainers")
    options = parser.parse_args(arguments)
    usual = ("sft", "ours", 2) if options.long else (",".join(OBJECTIVES), ",".join(TRAINERS), 5)
    options.objectives = (options.objectives or usual[0]).split(",")
    options.trainers = (options.trainers or usual[1]).split(",")
    options.steps = options.steps or usual[2]
    for key, given, known in (("objectives", options.objectives, OBJECTIVES), ("trainers", options.trainers, TRAINERS)):
        if unknown := set(given) - set(known):
            parser.error(f"--{key}: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    files = [options.sft] if options.long or options.objectives == ["sft"] else [options.sft, options.pairs]
    for path in files:
        if not path.is_file():
            parser.error(f"{path}: no such file. Name it with --sft or --pairs, or its folder with FASTREASON_DATA.")
    options.cores = parse_cores(options.cores, "--cores") if options.cores else available_cores()[:2]
    return options


def main() -> None:
    options = parse_options()
    # Ended from outside: the children's own ends are in `finally` clauses.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.sched_setaffinity(0, options.cores)
    parts: list[Part] = []
    with tempfile.TemporaryDirectory(prefix="offline-rows-") as folder:
        jobs = {name: load_job(name, write_rows(name, Path(folder), options), options) for name in options.objectives}
        options.dtype = next(iter(jobs.values())).model.dtype
        for number in range(options.rounds):
            for objective, config in jobs.items():
                for name in [name for name in options.trainers if objective in TRAINERS[name]]:
                    run = run_ours if name == "ours" else run_trl
                    with tempfile.TemporaryDirectory(prefix="offline-") as aside:
                        part = run(name, objective, config, Path(aside), options)
                    parts.append(replace(part, number=number))
                    print(f"round {number + 1}, {objective}, {name}: {part.wall_s:.0f} s in all", flush=True)
                    print_table(write_json(parts, options))
                    check_same_work(parts)


if __name__ == "__main__":
    main()
