"""The display: what it prints from a run's files, without a terminal and on one, and that bad files do not stop it."""

import io
import time

import pytest
from rich.console import Console

from fastreason.config import parse_config
from fastreason.display import Display, RunView, final_table, format_duration, render_panel, sparkline
from fastreason.metrics import MetricsLog, Progress
from fastreason.types import EvalResult

CONFIG = parse_config(
    {
        "model": {"path": "models/tiny-model"},
        "data": {"task": "chain_sum"},
        "train": {"steps": 10, "prompts_per_step": 2},
    }
)


def metrics_of(step, **extra):
    return {
        "step": step,
        "time/step_s": 10.0,
        "time/generate_s": 6.0,
        "reward/mean": step / 10,
        "reward/accuracy": step / 20,
        "rollout/tok_per_s": 180.0,
        **extra,
    }


def console_to(text, terminal=False):
    return Console(file=text, force_terminal=terminal, width=100, color_system=None, legacy_windows=False)


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the display did not show it in time"
        time.sleep(0.02)


def panel_text(view):
    text = io.StringIO()
    console_to(text).print(render_panel(view, console_to(text)))
    return text.getvalue()


def test_a_pipe_gets_one_line_per_step_and_each_only_once(tmp_path):
    text = io.StringIO()
    with Display(tmp_path, CONFIG, console_to(text)), MetricsLog(tmp_path, CONFIG.log) as log:
        log.write(metrics_of(1))
        wait_until(lambda: "step 1/10" in text.getvalue())
        log.write(metrics_of(2, **{"eval/accuracy": 0.25}))
        log.write(metrics_of(3))
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "2/10", "3/10"]
    assert "reward 0.300" in lines[2] and "accuracy 0.150" in lines[2] and "10.0 s (generate 6.0)" in lines[2]
    assert "180 tok/s" in lines[2] and "1:10 left" in lines[2]
    assert "held-out accuracy 0.250" in lines[1] and "held-out" not in lines[2]


def test_what_is_written_just_before_stop_is_still_printed(tmp_path):
    text = io.StringIO()
    display = Display(tmp_path, CONFIG, console_to(text))
    display.start()
    with MetricsLog(tmp_path, CONFIG.log) as log:
        log.write(metrics_of(1))
    display.stop()
    display.stop()
    assert "step 1/10" in text.getvalue()


def test_phases_are_printed_until_the_first_step_and_then_only_after_a_quiet_time(tmp_path):
    text = io.StringIO()
    progress = Progress(tmp_path, steps=10)
    with Display(tmp_path, CONFIG, console_to(text)), MetricsLog(tmp_path, CONFIG.log) as log:
        progress.update("start engine", "vLLM")
        wait_until(lambda: "start engine  vLLM" in text.getvalue())
        progress.update("evaluate", done=3, total=8)
        wait_until(lambda: "evaluate  3/8" in text.getvalue())
        time.sleep(0.6)  # two more polls: a phase that goes on is not printed again
        log.write(metrics_of(1))
        wait_until(lambda: "step 1/10" in text.getvalue())
        progress.update("train")
        time.sleep(0.6)
    assert "train" not in text.getvalue()
    assert text.getvalue().count("evaluate") == 1


def test_a_resumed_run_does_not_print_its_past(tmp_path):
    with MetricsLog(tmp_path, CONFIG.log) as log:
        for step in range(1, 6):
            log.write(metrics_of(step))
    text = io.StringIO()
    with Display(tmp_path, CONFIG, console_to(text)), MetricsLog(tmp_path, CONFIG.log, resume_step=3) as log:
        log.write(metrics_of(4, **{"loss/entropy": 0.5}))
    lines = text.getvalue().splitlines()
    assert lines[0] == "continuing after step 5"
    assert [line.split()[1] for line in lines[1:]] == ["4/10"]


def test_alerts_are_judged_again_along_the_lineage_of_a_resume(tmp_path):
    cut_off = {"rollout/truncated_share": 1.0}
    view = RunView(tmp_path, CONFIG)
    with MetricsLog(tmp_path, CONFIG.log) as log:
        for step in (1, 2):
            log.write(metrics_of(step, **cut_off))
    view.poll()
    with MetricsLog(tmp_path, CONFIG.log, resume_step=1) as log:
        log.write(metrics_of(2, **cut_off, **{"loss/entropy": 0.5}))
        assert view.poll()[1] == [], "steps 1, 2 and 2 again are not three in a row"
        log.write(metrics_of(3, **cut_off))
    assert "3 step(s) in a row" in view.poll()[1][0]


def test_an_alert_becomes_a_warning_line(tmp_path):
    text = io.StringIO()
    with Display(tmp_path, CONFIG, console_to(text)), MetricsLog(tmp_path, CONFIG.log) as log:
        log.write(metrics_of(1, **{"train/grad_norm": float("nan")}))
    assert "warning: step 1: the gradient is not finite" in text.getvalue()


def test_the_panel_shows_the_run(tmp_path):
    with MetricsLog(tmp_path, CONFIG.log) as log:
        log.write({"step": 0, "eval/accuracy": 0.125})
        for step in (1, 2, 3, 4):
            log.write(metrics_of(step, **{"loss/entropy": 0.001, "loss/kl": float("nan")}))
    Progress(tmp_path, steps=10).update("train", "micro-batches", done=2, total=6, step=5)
    view = RunView(tmp_path, CONFIG)
    view.poll()
    text = panel_text(view)
    for piece in (
        "run  tiny-model  grpo",
        "step 4/10",
        "1:00 left",
        "train  2/6  micro-batches",
        "reward 0.400",
        "entropy 0.001",
        "KL not finite",
        "seconds 10.0   generate 6.0",
        "generated 180 tok/s",
        "▁▃▆█",
        "held-out accuracy 0.125 (step 0)",
        "step 1: token entropy",
    ):
        assert piece in text, piece


def test_staleness_is_always_said_and_restarts_and_dropped_groups_once_there_are_any(tmp_path):
    quiet = {"rollout/engine_restarts": 0.0, "rollout/producer_restarts": 0.0, "rollout/dropped": 0.0}
    text = io.StringIO()
    view = RunView(tmp_path, CONFIG)
    with Display(tmp_path, CONFIG, console_to(text)), MetricsLog(tmp_path, CONFIG.log) as log:
        log.write(metrics_of(1, **quiet, **{"rollout/staleness_mean": 0.0}))
        view.poll()
        assert "staleness 0.00" in panel_text(view) and "restarts" not in panel_text(view)
        faults = {"rollout/engine_restarts": 2.0, "rollout/dropped": 5.0}
        log.write(metrics_of(2, **{**quiet, **faults, "rollout/staleness_mean": 0.75}))
    view.poll()
    for shown in (text.getvalue().splitlines()[1], panel_text(view)):
        assert all(piece in shown for piece in ("staleness 0.75", "engine restarts 2", "dropped 5 groups")), shown
    first = text.getvalue().splitlines()[0]
    assert "staleness 0.00" in first and "restarts" not in first and "dropped" not in first
    assert "producer" not in text.getvalue() + panel_text(view)


def test_a_terminal_gets_the_panel_and_its_cursor_back(tmp_path):
    text = io.StringIO()
    with Display(tmp_path, CONFIG, console_to(text, terminal=True)), MetricsLog(tmp_path, CONFIG.log) as log:
        log.write(metrics_of(7))
    assert "step 7/10" in text.getvalue()
    assert text.getvalue().rindex("\x1b[?25h") > text.getvalue().rindex("\x1b[?25l")


def test_a_phase_that_says_nothing_for_long_shows_for_how_long(tmp_path, monkeypatch):
    Progress(tmp_path).update("wait")
    view = RunView(tmp_path, CONFIG)
    view.poll()
    assert "(for" not in panel_text(view)
    now = time.time()
    monkeypatch.setattr("fastreason.display.time.time", lambda: now + 95)
    assert "wait  (for 1:35)" in panel_text(view)


def test_missing_torn_and_damaged_files_do_not_stop_it(tmp_path):
    view = RunView(tmp_path / "not-there-yet", CONFIG)
    assert view.poll() == ([], [])
    assert "step 0/10" in panel_text(view) and "starting" in panel_text(view)
    view = RunView(tmp_path, CONFIG)
    file = tmp_path / "metrics.jsonl"
    (tmp_path / "progress.json").write_text("{")
    file.write_text('{"step": 1, "time/step_s": 1.0}\n{"step": 2, "ti')
    assert [row["step"] for row in view.poll()[0]] == [1]
    file.write_text('{"step": 1, "time/step_s": 1.0}\nrubbish\n{"step": 2}\n')
    rows, messages = view.poll()
    assert rows == [] and "line 2" in messages[0]
    assert view.poll() == ([], [])


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0.0, 1.0], 10, "▁█"),
        ([2.0, 2.0, 2.0], 10, "▁▁▁"),
        ([0.0, 0.0, 3.5, 3.5, 7.0, 7.0], 3, "▁▅█"),
        ([7.0, 0.0], 1, "▁"),
    ],
)
def test_sparkline(values, width, expected):
    assert sparkline(values, width) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(45.2, "45 s"), (187, "3:07"), (7387, "2:03:07"), (59.7, "1:00")])
def test_format_duration(seconds, expected):
    assert format_duration(seconds) == expected


def make_result(accuracy, standard_error):
    return EvalResult(
        accuracy=accuracy,
        standard_error=standard_error,
        reward_mean=accuracy,
        num_samples=128,
        num_prompts=32,
        num_tokens=900,
        truncated_share=0.25,
        temperature=0.6,
        wall_s=3.0,
        version=0,
    )


@pytest.mark.parametrize(
    ("after", "verdict"), [(0.40, "more than two standard errors"), (0.20, "not more than two standard errors")]
)
def test_final_table_says_whether_the_change_is_beyond_noise(after, verdict):
    text = io.StringIO()
    files = {"model": "runs/run/[model]"}
    final_table(make_result(0.1, 0.04), make_result(after, 0.03), files, console_to(text))
    shown = text.getvalue()
    assert f"change {after - 0.1:+.3f} ± 0.050 (one standard error): {verdict}" in shown
    assert "0.040" in shown and "0.030" in shown and "128 (32 prompts)" in shown and "25%" in shown
    assert "model: runs/run/[model]" in shown


def test_final_table_without_evaluation_only_lists_the_files():
    text = io.StringIO()
    final_table(None, None, {"metrics": "m.jsonl"}, console_to(text))
    assert text.getvalue() == "metrics: m.jsonl\n"
