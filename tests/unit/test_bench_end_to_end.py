"""bench/end_to_end.py: how steps become rows, and that both sides are given the same job. No trainer runs here."""

import importlib
import sys
from pathlib import Path

import pytest

from fastreason.config import load_config

FOLDER = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, found as the command finds them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("end_to_end")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def rows(bench):
    return importlib.import_module("end_to_end_rows")


def part(rows, name, seconds, tokens=4200.0, **values):
    steps = [rows.Step(s, tokens, 0.1, {"train_s": s / 2}) for s in seconds]
    return rows.Part(name, steps, values.pop("evals", []), values.pop("peak_mb", 1000.0), **values)


def test_a_row_takes_the_median_of_the_rounds_without_the_first_and_last_steps(rows):
    parts = [
        part(rows, "trl", [99, 30, 32]),
        part(rows, "ours", [99, 99, 6, 12, 1], peak_mb=3000.0),
        part(rows, "trl", [99, 34, 36], number=1),
        part(rows, "ours", [99, 99, 15, 1], peak_mb=2000.0, number=1),
    ]
    trl, ours = rows.rows_of(parts, {"trl": (1, 0), "ours": (2, 1)})
    assert (trl["trainer"], trl["step_s"], trl["num_steps"]) == ("trl", 33, 4)
    assert (ours["step_s"], ours["step_s_min"], ours["step_s_max"]) == (12, 6, 15)
    # Not the median of the steps' rates: two steps that take 18 s make 8,400 tokens in those.
    assert ours["trained_tok_per_s"] == pytest.approx((8400 / 18 + 4200 / 15) / 2)
    assert ours["peak_mb"] == 3000.0
    assert ours["phases"] == {"train_s": 6}


def test_the_ratio_is_of_tokens_a_second_not_of_steps(rows):
    parts = [part(rows, "trl", [32.0], tokens=4200.0), part(rows, "ours_exact", [8.0], tokens=2100.0)]
    skips = {"trl": (0, 0), "ours_exact": (0, 0)}
    trl, ours = rows.rows_of(parts, skips)
    assert trl["times_trl"] == 1.0
    assert ours["times_trl"] == pytest.approx(2.0)
    assert rows.rows_of(parts[1:], skips)[0]["times_trl"] is None


def test_too_few_steps_are_refused_by_name(rows):
    with pytest.raises(ValueError, match=r"ours: of 3 steps the first 2 and the last 1 .*--steps"):
        rows.rows_of([part(rows, "ours", [1, 2, 3])], {"ours": (2, 1)})


def test_the_step_after_an_evaluation_counts_for_no_less_than_the_median(rows):
    seconds = [20.0, 10.0, 4.0, 10.0]
    assert rows.curve(seconds, {0: 0.1, 2: 0.2, 4: 0.3}) == [(0, 0.1), (30.0, 0.2), (50.0, 0.3)]
    slow = [20.0, 10.0, 14.0, 10.0]
    assert rows.curve(slow, {0: 0.1, 2: 0.2, 4: 0.3})[-1] == (54.0, 0.3)


def test_the_rows_of_ours_differ_in_nothing_but_the_exact_savings(bench):
    options = bench.parse_options(["--device", "cpu", "--cores", "3,5", "train.lr=1e-5"])
    job = bench.load_job(options)
    assert (job.rollout.cores, job.train.cores, job.train.spare_cores, job.train.lr) == ("3", "5", "3", 1e-5)
    dense = bench.override(job, bench.TRAINERS["ours"].overrides)
    exact = bench.override(job, bench.TRAINERS["ours_exact"].overrides)
    assert (dense.train.share_prompts, dense.train.skip_zero_advantage) == ("off", False)
    same = {"share_prompts": "off", "skip_zero_advantage": False}
    assert exact.model_copy(update={"train": exact.train.model_copy(update=same)}) == dense


def test_trl_is_given_the_configs_job(bench):
    trl = importlib.import_module("end_to_end_trl") if importlib.util.find_spec("trl") else pytest.skip("no TRL")
    job = load_config(
        bench.JOB, ["train.lr=2e-5", "train.steps=3", "rollout.max_new_tokens=20", "model.dtype=bfloat16"]
    )
    config = trl.grpo_config(job, 16, "sdpa", False, "unused")
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
    assert config.steps_per_generation == config.gradient_accumulation_steps
    assert config.num_generations == job.rollout.samples_per_prompt
    assert (config.learning_rate, config.max_steps, config.max_completion_length) == (2e-5, 3, 20)
    assert (config.max_grad_norm, config.weight_decay) == (0.3, 0.0)
    assert (config.epsilon, config.epsilon_high, config.beta, config.num_iterations) == (0.2, 0.2, 0.0, 1)
    assert (config.loss_type, config.scale_rewards, config.temperature) == ("dapo", "none", 1.0)
    assert (config.bf16, config.use_cpu, config.gradient_checkpointing, config.shuffle_dataset) == (
        True,
        True,
        False,
        False,
    )
    plain = job.model_copy(update={"model": job.model.model_copy(update={"dtype": "float32"})})
    assert trl.grpo_config(plain, 16, "sdpa", False, "unused").bf16 is False
    with pytest.raises(SystemExit, match="24"):
        trl.grpo_config(job, 24, "sdpa", False, "unused")
