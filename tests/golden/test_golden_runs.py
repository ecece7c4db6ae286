"""The loop's numbers, step by step: equal to those accepted before, and bit for bit the same from run to run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("golden_run.py")
ROWS = ("grpo", "reinforce")
RTOL = 1e-6

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of every row, in two processes."""
    results = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"golden{number}")
        command = [sys.executable, "-P", str(PROGRAM), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        results.append({row: json.loads((folder / f"{row}.json").read_text()) for row in ROWS})
    return results


@pytest.mark.parametrize("row", ROWS)
def test_two_runs_are_equal_to_the_last_bit(runs, row):
    first, second = (result[row] for result in runs)
    assert first["steps"] == second["steps"]
    assert first["checksum"] == second["checksum"], "the trained weights differ"


@pytest.mark.parametrize("row", ROWS)
def test_a_run_gives_the_accepted_numbers(runs, row):
    """To accept new ones: python tests/golden/golden_run.py --accept"""
    expected = json.loads(PROGRAM.with_name(f"{row}.json").read_text())["steps"]
    steps = runs[0][row]["steps"]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line, wanted in zip(steps, expected, strict=True):
        for key, value in wanted.items():
            assert math.isclose(line[key], value, rel_tol=RTOL), f"step {line['step']}, {key}: {line[key]} != {value}"


@pytest.mark.parametrize("row", ROWS)
def test_the_accepted_numbers_show_something(row):
    steps = json.loads(PROGRAM.with_name(f"{row}.json").read_text())["steps"]
    for key in ("loss/policy", "train/grad_norm", "loss/entropy"):
        assert len({line[key] for line in steps}) == len(steps) and all(abs(line[key]) > 0.01 for line in steps), key
    assert all(0 < line["loss/clip_share"] < 1 for line in steps)
