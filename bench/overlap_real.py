"""The real run twice, S = 0 and S = 1: SmolLM2-135M, vLLM on one core, the trainer on another, the same prompts and seeds.

The learning rate is too small to move a bf16 weight, so that both runs sample the same lengths, and every response is trained
on, so that each step's update is as long as the next.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
SETTINGS = {
    "eval.num_prompts": 0,
    "checkpoint.save_model": "false",
    "train.lr": 1e-12,
    "train.lr_schedule": "constant",
    "train.skip_zero_advantage": "false",
    "train.micro_batch_tokens": 2048,
    "train.prompts_per_step": 56,
    "rollout.samples_per_prompt": 4,
    "rollout.max_new_tokens": 14,
    "rollout.max_running_groups": 0,  # unlike the quickstart: admission alone bounds what runs
    "log.warn_after": 1000,
}
# Steps of a run, and those that count. Left out: the first (caches, memory), for S = 1 the second too (two batches were
# generated at once before), and for S = 1 the last (nothing is left to generate beside it).
PLAN = {0: (4, slice(1, None)), 1: (6, slice(2, -1))}
RUN_TIMEOUT_S = 600.0
WANTED_EFFICIENCY, LARGEST_RATIO, SHORTEST_S = 0.85, 1.3, 10.0
LARGEST_TOKEN_DIFFERENCE = 0.03

Line = dict[str, float]


def measure(workdir: Path | None, number: int, engine_core: int, trainer_core: int, sets: list[str]) -> dict[str, Any]:
    """A row: both runs on the same two cores, one after the other."""
    cores = [f"rollout.cores={engine_core}", f"train.cores={trainer_core}"]
    with tempfile.TemporaryDirectory(prefix="fr-overlap-") as temporary:
        folder = Path(tempfile.mkdtemp(prefix="overlap-", dir=workdir)) if workdir else Path(temporary)
        runs = {
            staleness: run(folder, f"run-{number}-s{staleness}", staleness, PLAN[staleness][0], [*cores, *sets])
            for staleness in PLAN
        }
    return {"run": number, **row_of(runs[0], runs[1])}


def row_of(sync: list[Line], ahead: list[Line]) -> dict[str, Any]:
    """Medians over the steps that count, of the lines of metrics.jsonl of both runs."""
    sync_lines, lines = sync[PLAN[0][1]], ahead[PLAN[1][1]]

    def median(of: list[Line], key: str) -> float:
        return statistics.median(line[key] for line in of)

    g_s, t_s, s_s = (median(sync_lines, f"time/{name}_s") for name in ("generate", "train", "publish"))
    step_s = median(lines, "time/step_s")
    return {
        "S": 1,
        "g_s": g_s,
        "t_s": t_s,
        "s_s": s_s,
        "T_sync_s": median(sync_lines, "time/step_s"),
        "T_async_s": step_s,
        "efficiency": (g_s + t_s - step_s) / min(g_s, t_s),
        "staleness_max": int(max(line["rollout/staleness_max"] for line in ahead)),
        "g_loaded_s": median(lines, "time/generate_s"),
        "t_loaded_s": median(lines, "time/train_s"),
        "pause_s": median(lines, "time/pause_s"),
        "tokens": [median(sync_lines, "rollout/tokens"), median(lines, "rollout/tokens")],
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians over the runs, the spread of the efficiency, and `faults`: what was not reached."""
    keys = [key for key, value in rows[0].items() if isinstance(value, float)]
    total: dict[str, Any] = {"run": "median", "S": 1, "num_runs": len(rows)}
    total |= {key: statistics.median(row[key] for row in rows) for key in keys}
    total["staleness_max"] = max(row["staleness_max"] for row in rows)
    efficiencies = [row["efficiency"] for row in rows]
    total["efficiency_min"], total["efficiency_max"] = min(efficiencies), max(efficiencies)
    total["tokens"] = [statistics.median(row["tokens"][i] for row in rows) for i in range(2)]
    g_s, t_s, (sync_tokens, tokens) = total["g_s"], total["t_s"], total["tokens"]
    checks = {
        f"efficiency {total['efficiency']:.3f} < {WANTED_EFFICIENCY}": total["efficiency"] < WANTED_EFFICIENCY,
        f"g {g_s:.1f} s and t {t_s:.1f} s are further apart than {LARGEST_RATIO}x": max(g_s, t_s)
        > LARGEST_RATIO * min(g_s, t_s),
        f"min(g, t) {min(g_s, t_s):.1f} s < {SHORTEST_S:g} s": min(g_s, t_s) < SHORTEST_S,
        f"staleness {total['staleness_max']} > 1": total["staleness_max"] > 1,
        f"{sync_tokens:.0f} and {tokens:.0f} tokens a step are not alike": abs(tokens - sync_tokens)
        > LARGEST_TOKEN_DIFFERENCE * sync_tokens,
    }
    total["faults"] = [text for text, failed in checks.items() if failed]
    return total


def run(folder: Path, name: str, staleness: int, steps: int, sets: list[str]) -> list[Line]:
    """The lines of metrics.jsonl of one `fastreason train`; each is shown as it comes."""
    own = {"run.dir": folder, "run.name": name, "rollout.max_staleness": staleness, "train.steps": steps}
    overrides = [f"{key}={value}" for key, value in {**SETTINGS, **own}.items()]
    command = [sys.executable, "-P", "-m", "fastreason.cli", "train", str(CONFIG), *overrides, *sets]
    output = folder / f"{name}.out"
    lines: list[Line] = []
    started = time.monotonic()
    with open(output, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while True:
                ended = process.poll() is not None
                for line in new_lines(folder / name / "metrics.jsonl", len(lines)):
                    lines.append(line)
                    print(f"  {name} after {time.monotonic() - started:.0f} s: {text_of(line)}", flush=True)
                if ended:
                    break
                if time.monotonic() - started > RUN_TIMEOUT_S:
                    raise SystemExit(f"{name} took longer than {RUN_TIMEOUT_S:g} s; see {output}")
                time.sleep(0.5)
        finally:
            end(process)
    if process.returncode or len(lines) < steps:
        raise SystemExit(
            f"{name} ended with {process.returncode} after {len(lines)} steps:\n{output.read_text()[-2000:]}"
        )
    return lines


def new_lines(path: Path, num_seen: int) -> Iterator[Line]:
    if path.is_file():
        whole, _, _ = path.read_text().rpartition("\n")
        yield from (json.loads(line) for line in whole.splitlines()[num_seen:])


def end(process: subprocess.Popen[bytes]) -> None:
    """Have a run that is interrupted end its own processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # the second one does not wait for a checkpoint
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def text_of(line: Line) -> str:
    seconds = ", ".join(
        f"{name} {line[f'time/{name}_s']:.2f}" for name in ("step", "wait", "generate", "train", "publish")
    )
    return f"step {int(line['step'])}: {seconds} s, {line['rollout/tokens']:.0f} tokens"
