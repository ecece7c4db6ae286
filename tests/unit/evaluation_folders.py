"""Small evaluations for the tests of reports: two models, five problems, four responses each, hostile texts among them."""

import json
from pathlib import Path

from fastreason.evaluation.rows import ANSWERS_FILE, SAMPLES_FILE, SETTINGS_FILE

HOSTILE = "</script><script>window.hacked = 1; throw 'hacked'</script><img src=x onerror='window.hacked=1'> & \u2028 🙂"
N = 4
# Right responses of 4 to each problem, in order: these many of the first are right.
BASE = {"p1": 0, "p2": 1, "p3": 2, "p4": 4, "p10": 0}
TRAINED = {"p1": 2, "p2": 4, "p3": 1, "p4": 4, "p10": 0}


def write_evaluation(root: Path, label: str, right: dict[str, int], n: int = N, **changes) -> Path:
    """OUT/<label>/sums/<key>: wrong responses answer 5, 6, 5, 6, ...; of p1 every other one says nothing."""
    folder = root / label / "sums" / changes.pop("key", "0123456789ab")
    folder.mkdir(parents=True)
    settings = {
        "model": {"path": changes.pop("path", f"models/{label}"), "checksum": label},
        "benchmark": {
            "name": "sums",
            "checksum": changes.pop("checksum", "c"),
            "num_problems": len(right),
        },
        "template": {"name": changes.pop("template", "raw")},
        "sampling": {"temperature": 0.9},
        "engine": "hf",
        "dtype": "float32",
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    (folder / ANSWERS_FILE).write_text(json.dumps({id: {"5": 1, "6": 2, "5.0": 1} for id in right}))
    with open(folder / SAMPLES_FILE, "w", encoding="utf-8") as file:
        for id, count in right.items():
            for sample in range(n):
                file.write(json.dumps(row(id, sample, sample < count) | changes) + "\n")
    return folder


def row(id: str, sample: int, correct: bool) -> dict:
    answer = "7" if correct else ("5", "6")[sample % 2]
    text = f"Wait, so it is {answer}" if correct else f"{HOSTILE} hmm, wait: {answer}"
    silent = id == "p1" and not correct and sample % 2 == 1
    return {
        **{"problem": id, "sample": sample, "question": f"3 + 4? {HOSTILE}", "gold": "7", "response": text},
        **{"num_tokens": 10 + sample, "truncated": silent, "correct": correct, "formatted": correct},
        **{"answer": None if silent else answer, "strict": correct and id != "p4", "level": "Level 1"},
    }
