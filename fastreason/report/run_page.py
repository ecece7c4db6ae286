"""The page of one training run: its table, its picture, every step's figures to sort, and its newest responses to read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastreason.evaluation.tables import Grid
from fastreason.metrics import SAMPLES_FILE
from fastreason.report.page import Page, Picture, Section, Table, render_page

# Heads of the table of steps, and the keys of metrics.jsonl; a key that no step has is left out.
COLUMNS = {
    "reward": "reward/mean",
    "length": "rollout/response_tokens_mean",
    "entropy": "loss/entropy",
    "KL to reference": "kl/reference",
    "KL to teacher": "kl/teacher",
    "loss": "loss/policy",
    "gradient norm": "train/grad_norm",
    "staleness": "rollout/staleness_mean",
    "accuracy": "eval/accuracy",
    "chosen": "logp/chosen",
    "rejected": "logp/rejected",
    "seconds": "time/step_s",
}
TAIL_BYTES = 1_000_000  # of samples.jsonl: the newest responses


def write_run_page(
    run_dir: Path, lines: Sequence[tuple[str, str]], rows: Sequence[dict[str, Any]], picture: Path
) -> Path:
    """Write a page beside the picture, under its name with .html, and return its path."""
    path = picture.with_suffix(".html")
    summary = Grid("In short", ["what", "figures"], [list(line) for line in lines])
    shown = Picture("run", f"The run {run_dir.name}", picture.read_bytes(), kind="png")
    sections = [
        Section("The run", tables=[Table(summary)], pictures=[shown]),
        Section("Steps", tables=[Table(step_grid(rows))]),
    ]
    samples = newest_samples(run_dir)
    if samples["problems"]:
        sections.append(Section("Newest responses", tables=[_prompts(samples)]))
    path.write_text(render_page(Page(f"Run {run_dir.resolve().name}", sections, [samples])), encoding="utf-8")
    return path


def step_grid(rows: Sequence[dict[str, Any]]) -> Grid:
    heads = [head for head, key in COLUMNS.items() if any(row.get(key) is not None for row in rows)]
    cells = [[str(int(row["step"])), *(_figure(row.get(COLUMNS[head])) for head in heads)] for row in rows]
    return Grid("Every step", ["step", *heads], cells)


def newest_samples(run_dir: Path, tail_bytes: int = TAIL_BYTES) -> dict[str, Any]:
    """The responses at the end of samples.jsonl, by step and prompt, as the page's script reads them; newest step first."""
    groups: dict[tuple[int, Any], list[dict[str, Any]]] = {}
    for line in _last_lines(run_dir / SAMPLES_FILE, tail_bytes):
        groups.setdefault((line["step"], line.get("ticket", line["prompt_id"])), []).append(line)
    problems = [
        {
            **{"id": f"{step}: {lines[0]['prompt_id']}", "question": lines[0]["prompt"], "gold": None, "level": None},
            "counts": [sum(bool(line["correct"]) for line in lines)],
            "samples": [[_sample(number, line) for number, line in enumerate(lines)]],
        }
        for (step, _), lines in sorted(groups.items(), key=lambda item: -item[0][0])
    ]
    n = max((len(problem["samples"][0]) for problem in problems), default=0)
    facts = {"title": "Step", "labels": [run_dir.resolve().name], "files": [str(run_dir / SAMPLES_FILE)]}
    return {**facts, "n": n, "problems": problems}


def _prompts(samples: dict[str, Any]) -> Table:
    rows = [
        [problem["id"], str(problem["counts"][0]), str(len(problem["samples"][0])), problem["question"][-200:]]
        for problem in samples["problems"]
    ]
    grid = Grid("Prompts of the last steps", ["step: prompt", "right", "responses", "the prompt's end"], rows)
    return Table(grid, samples=0, places=range(len(rows)))


def _sample(number: int, line: dict[str, Any]) -> dict[str, Any]:
    facts = {"sample": number, "right": bool(line["correct"]), "strict": None, "tokens": line["num_tokens"]}
    reward = f"reward {line['reward']:g}"
    return {
        **facts,
        "cut": line["finish_reason"] == "length",
        "answer": None,
        "error": reward,
        "text": line["completion"],
    }


def _last_lines(path: Path, num_bytes: int) -> list[dict[str, Any]]:
    """The whole lines in the last bytes of a file; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - num_bytes)
        file.seek(start)
        lines = file.read().split(b"\n")
    # The first may be cut by our start, the last by a writer that is amid it.
    return [json.loads(line) for line in lines[bool(start) : -1]]


def _figure(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
