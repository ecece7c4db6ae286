"""Small folders of training runs for the tests of their report and its page."""

import json

import yaml

from fastreason.config import LogConfig
from fastreason.metrics import MetricsLog, write_summary


def row(step, generate=10.0, train=8.0, total=None, **extra):
    seconds = {"generate": generate, "grade": 0.5, "train": train, "publish": 1.0, "pause": 0.4}
    total = train + 1 if total is None else total
    seconds |= {"step": total, "wait": total - train - 1.0}
    figures = {f"time/{name}_s": value for name, value in seconds.items()}
    return {
        "step": step,
        "reward/mean": step / 10,
        "train/tokens": 600.0,
        "rollout/staleness_mean": 0.5,
        "rollout/staleness_max": 1.0,
        "staleness/share_0": 0.5,
        "staleness/share_1": 0.5,
        **figures,
        **extra,
    }


def write_run(folder, rows, steps=4, **summary):
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "model": {"path": "none"},
        "data": {"task": "chain_sum"},
        "train": {"steps": steps, "prompts_per_step": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    with MetricsLog(folder, LogConfig()) as log:
        for one in rows:
            log.write(one)
    if summary:
        write_summary(folder / "summary.json", summary)
    return folder


def sample_lines(*steps, text="<b>{step}</b>"):
    """Lines of samples.jsonl: a right response for each of the steps, to the one prompt `a`."""
    facts = {"reward": 1.0, "finish_reason": "stop", "num_tokens": 3, "correct": True, "prompt": "3 + 4?"}
    lines = [facts | {"step": step, "ticket": step, "prompt_id": "a"} for step in steps]
    return "".join(json.dumps(line | {"completion": text.format(step=line["step"])}) + "\n" for line in lines)
