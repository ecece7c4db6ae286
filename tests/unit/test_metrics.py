"""The run's files: what is written can be read back, survives a kill in mid-line, and keeps one lineage on resume."""

import json
import math
import sys
import types

import pytest

from fastreason.config import LogConfig
from fastreason.errors import ConfigError, DataError
from fastreason.metrics import (
    MetricsLog,
    Progress,
    SampleLog,
    read_metrics,
    read_progress,
    read_summary,
    write_summary,
)
from fastreason.types import Grade, Group, Prompt, Sample

LOG = LogConfig()


def write_steps(run_dir, steps, resume_step=None, value=0.5):
    with MetricsLog(run_dir, LOG, resume_step) as log:
        for step in steps:
            log.write({"step": step, "reward/mean": value})


def make_group(ticket, rewards, text="2"):
    samples = [
        Sample(
            token_ids=[1, 2, 3],
            sampler_logp=[-0.1] * 3,
            token_versions=[5, 4, 6],
            text=text,
            finish_reason="stop",
            grade=Grade(reward=reward, correct=reward > 0, parts={"math": reward}),
        )
        for reward in rewards
    ]
    prompt = Prompt(id=f"p{ticket}", text="1 + 1 = ?")
    return Group(ticket=ticket, prompt=prompt, prompt_token_ids=[9], samples=samples, version_issued=4)


def test_lines_read_back_and_non_finite_is_null(tmp_path):
    with MetricsLog(tmp_path, LOG) as log:
        log.write({"step": 1, "loss/policy": -0.25, "train/grad_norm": math.nan, "loss/ratio_max": math.inf})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss/policy": -0.25, "train/grad_norm": None, "loss/ratio_max": None}
    ]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_each_line_is_on_disk_before_the_next_step(tmp_path):
    log = MetricsLog(tmp_path, LOG)
    log.write({"step": 1, "reward/mean": 0.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    log.close()


@pytest.mark.parametrize("torn", ['{"step": 3, "rew', '{"step": 3, "reward/mean": 0.1}', '{"step": 3,\n'])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    write_steps(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_middle_line_is_an_error_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path)


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_resume_drops_later_steps_and_a_torn_line_then_continues(tmp_path):
    write_steps(tmp_path, range(1, 6), value=0.1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rewa')
    write_steps(tmp_path, [4, 5], resume_step=3, value=0.9)
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.9), (5, 0.9)]
    assert not list(tmp_path.glob(".*tmp"))


def test_resume_from_step_zero_keeps_the_first_evaluation_only(tmp_path):
    write_steps(tmp_path, [0, 1, 2])
    write_steps(tmp_path, [1], resume_step=0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_new_run_refuses_old_lines(tmp_path):
    write_steps(tmp_path, [1])
    with pytest.raises(ConfigError, match="--resume"):
        MetricsLog(tmp_path, LOG)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_key_without_area_is_our_bug(tmp_path):
    with MetricsLog(tmp_path, LOG) as log, pytest.raises(AssertionError, match="area/name"):
        log.write({"step": 1, "reward": 1.0})


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LogConfig(tensorboard=True)
    with MetricsLog(tmp_path, config) as log:
        for step in (1, 2):
            log.write({"step": step, "reward/mean": step / 4})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


def test_missing_wandb_names_the_extra_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"fastreason\[wandb\]"):
        MetricsLog(tmp_path, LogConfig(wandb=True))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"fastreason\[tensorboard\]"):
        MetricsLog(tmp_path, LogConfig(tensorboard=True))


def test_wandb_gets_the_numbers_under_its_step_and_is_finished(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    wandb = types.ModuleType("wandb")
    wandb.errors = types.SimpleNamespace(Error=RuntimeError)
    wandb.init = lambda **kwargs: calls.append(kwargs["name"]) or FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with MetricsLog(tmp_path / "mine", LogConfig(wandb=True), resume_step=7) as log:
        log.write({"step": 8, "reward/mean": 0.5})
    assert calls == ["mine-from-7", (8, {"reward/mean": 0.5}), "finished"]


def test_samples_are_limited_per_step_and_resume_with_the_run(tmp_path):
    config = LogConfig(samples_per_step=3)
    groups = [make_group(1, [0.0, 1.0]), make_group(2, [1.0, 0.0])]
    with SampleLog(tmp_path, config) as log:
        log.write(1, groups)
        log.write(2, groups)
    with SampleLog(tmp_path, config, resume_step=1) as log:
        log.write(2, groups[1:])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["ticket"], line["reward"]) for line in lines] == [
        (1, 1, 0.0),
        (1, 1, 1.0),
        (1, 2, 1.0),
        (2, 2, 1.0),
        (2, 2, 0.0),
    ]
    assert lines[0] == {
        "step": 1,
        "ticket": 1,
        "prompt_id": "p1",
        "prompt": "1 + 1 = ?",
        "completion": "2",
        "reward": 0.0,
        "parts": {"math": 0.0},
        "correct": False,
        "finish_reason": "stop",
        "num_tokens": 3,
        "version": 4,
    }


def test_no_limit_writes_all_samples_and_odd_text_survives(tmp_path):
    # A byte-level tokenizer can give both: U+2028, which ends no line, and a lone surrogate, which is no UTF-8.
    text = "a\u2028b\nc\ud83d é"
    with SampleLog(tmp_path, LOG) as log:
        log.write(1, [make_group(1, [0.0] * 5, text=text)])
    with SampleLog(tmp_path, LOG, resume_step=1):
        pass
    lines = (tmp_path / "samples.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["completion"] for line in lines[:-1]] == [text] * 5


def test_progress_reads_back_and_is_written_at_most_every_interval(tmp_path):
    progress = Progress(tmp_path, steps=10, interval_s=3600)
    progress.update("train", "micro-batches", done=1, total=4, step=2)
    progress.update("train", "micro-batches", done=2, total=4)
    state = read_progress(tmp_path)
    assert (state.phase, state.detail, state.done, state.total) == ("train", "micro-batches", 1, 4)
    assert (state.step, state.steps) == (2, 10)
    progress.update("train", "micro-batches", done=4, total=4)
    assert read_progress(tmp_path).done == 4
    progress.update("publish")
    assert (read_progress(tmp_path).phase, read_progress(tmp_path).step) == ("publish", 2)


def test_progress_that_is_missing_or_damaged_is_none(tmp_path):
    assert read_progress(tmp_path) is None
    (tmp_path / "progress.json").write_text('{"phase": "tr')
    assert read_progress(tmp_path) is None


def test_summary_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, {"after": {"accuracy": 0.5, "worst": math.inf}})
    with pytest.raises(TypeError):
        write_summary(path, {"after": object()})
    assert read_summary(tmp_path) == {"after": {"accuracy": 0.5, "worst": None}}
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]
