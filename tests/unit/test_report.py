"""The reward curve: the numbers it draws, and that the picture really holds them."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from fastreason.config import LogConfig
from fastreason.errors import DataError
from fastreason.metrics import MetricsLog, write_summary
from fastreason.report.reward_curve import (
    ACCURACY,
    ENTROPY,
    REWARD,
    column,
    draw_reward_curve,
    evaluations,
    running_mean,
)


def log_run(run_dir, rewards, **extra):
    with MetricsLog(run_dir, LogConfig()) as log:
        for step, reward in enumerate(rewards, start=1):
            log.write({"step": step, "reward/mean": reward, **extra})


def rows_of(path, color):
    """The heights, as shares from the top, at which the picture has exactly this colour."""
    image = imread(path)[..., :3]
    found = np.abs(image - np.array(to_rgb(color), dtype=image.dtype)).max(axis=-1) < 0.01
    return np.nonzero(found.any(axis=1))[0] / image.shape[0]


def test_running_mean_looks_back_only():
    assert running_mean([3.0, 0.0, 6.0, 9.0], window=2) == [3.0, 1.5, 3.0, 7.5]


def test_column_skips_what_is_missing_or_was_not_finite():
    rows = [{"step": 1, "a/b": 1.0}, {"step": 2, "a/b": None}, {"step": 3}, {"step": 4, "a/b": 0.0}]
    assert column(rows, "a/b") == ([1, 4], [1.0, 0.0])


BEFORE = {"accuracy": 0.1, "standard_error": 0.02}
AFTER = {"accuracy": 0.4, "standard_error": 0.03}


def test_evaluations_join_the_log_with_the_summary():
    rows = [{"step": 5, "eval/accuracy": 0.3, "eval/standard_error": 0.05}, {"step": 9, "eval/accuracy": 0.4}]
    summary = {"evals": {"before": BEFORE, "step-000005": {}, "after": AFTER}}
    assert evaluations(rows, summary, last_step=9) == [(0, 0.1, 0.02), (5, 0.3, 0.05), (9, 0.4, 0.03)]
    assert evaluations(rows, {}, last_step=9) == [(5, 0.3, 0.05), (9, 0.4, 0.0)]
    assert evaluations([{"step": 9, "eval/accuracy": None}], {"evals": {}}, last_step=9) == []


def test_a_rising_reward_is_drawn_rising(tmp_path):
    log_run(tmp_path, [0.0] * 10 + [1.0] * 10, **{"loss/entropy": 0.5})
    image = imread(draw_reward_curve(tmp_path))[..., :3]
    blue = np.abs(image - np.array(to_rgb(REWARD), dtype=image.dtype)).max(axis=-1) < 0.01
    # The legend's line is above the axes, hence the cut.
    blue[: int(0.09 * len(blue))] = False
    columns = np.nonzero(blue.any(axis=0))[0]
    heights = [np.nonzero(blue[:, x])[0].mean() for x in (columns[5], columns[-5])]
    assert heights[0] - heights[1] > 0.3 * len(blue)


def test_accuracy_before_and_after_is_marked_only_where_it_is_known(tmp_path):
    log_run(tmp_path, [0.1, 0.4])
    assert len(rows_of(draw_reward_curve(tmp_path), ACCURACY)) == 0
    write_summary(tmp_path / "summary.json", {"evals": {"before": BEFORE, "after": AFTER}})
    heights = rows_of(draw_reward_curve(tmp_path), ACCURACY)
    assert heights.min() < 0.25 and heights[heights < 0.66].max() > 0.55


def test_entropy_is_drawn_in_the_lower_panel(tmp_path):
    log_run(tmp_path, [0.1, 0.4], **{"loss/entropy": 0.5})
    assert rows_of(draw_reward_curve(tmp_path), ENTROPY).min() > 0.6


def test_a_run_without_a_step_is_an_error_that_says_so(tmp_path):
    with pytest.raises(DataError, match="reward/mean"):
        draw_reward_curve(tmp_path)


def test_drawing_touches_no_global_pyplot_state(tmp_path):
    log_run(tmp_path, [0.1])
    program = (
        "import sys; from fastreason.report.reward_curve import draw_reward_curve; "
        "draw_reward_curve(sys.argv[1]); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == 0 and (tmp_path / "reward.png").stat().st_size > 10_000
