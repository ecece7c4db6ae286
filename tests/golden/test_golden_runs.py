"""The loop's numbers, step by step: equal to those accepted before, and bit for bit the same from run to run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("golden_run.py")
ROWS = (
    "grpo",
    "grpo_trainer",
    "reinforce",
    "reinforce_rej",
    "grpo_kl",
    "raft_pp",
    "gspo",
    "dapo",
    "remax",
    "ppo",
    "iterative_dpo",
    "kdrl",
    "kd_rkl",
    "kdrl_exact",
)
RESUMED = ("grpo_kl", "ppo")
WITHOUT_CLIP = ("iterative_dpo", "kd_rkl")
COMPARED = {"grpo_kl": "reference", "kdrl": "teacher", "kd_rkl": "teacher", "kdrl_exact": "teacher"}
# Some numbers are differences of fp32 log-probabilities of some 5 nats, whose last bit is 5e-7: another CPU gives others, 1e-7
# apart between one with AVX512 and one with AVX2.
RTOL, ATOL = 1e-6, 2e-7
# A margin is beta = 0.1 times four sums of such log-probabilities over at most 9 tokens, each known to half its last bit.
ATOL_OF = {"pairs/margin": 0.1 * 4 * 9 * 2.4e-7}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of every row, in two processes."""
    results = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"golden{number}")
        command = [sys.executable, "-P", str(PROGRAM), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
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
            same = math.isclose(line[key], value, rel_tol=RTOL, abs_tol=ATOL_OF.get(key, ATOL))
            assert same, f"step {line['step']}, {key}: {line[key]} != {value}"


@pytest.mark.parametrize("row", RESUMED)
def test_a_resumed_run_ends_with_the_same_weights(runs, row):
    """Its adaptive coefficients and its critic too are those of before it was stopped."""
    assert runs[0][row]["resumed"] == runs[0][row]["checksum"]


def accepted(row):
    return json.loads(PROGRAM.with_name(f"{row}.json").read_text())["steps"]


@pytest.mark.parametrize("row", ROWS)
def test_the_accepted_numbers_show_something(row):
    steps = accepted(row)
    for key in ("loss/policy", "train/grad_norm", "loss/entropy"):
        assert len({line[key] for line in steps}) == len(steps) and all(abs(line[key]) > 1e-3 for line in steps), key
    assert all((line["loss/clip_share"] > 0) == (row not in WITHOUT_CLIP) for line in steps)


@pytest.mark.parametrize("row", COMPARED)
def test_the_accepted_distances_show_something(row):
    """The reference is the model of the start: the distance begins at next to nothing, and grows; a teacher is elsewhere."""
    distances = [line[f"kl/{COMPARED[row]}"] for line in accepted(row)]
    if row == "grpo_kl":
        assert 0 <= distances[0] < distances[1] < distances[2]
    else:
        assert all(distance > 0.01 for distance in distances) and len(set(distances)) == 3


def test_every_row_is_another_algorithm():
    assert len({accepted(row)[-1]["loss/entropy"] for row in ROWS}) == len(ROWS)
