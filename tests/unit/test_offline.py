"""An offline run's parts without its processes: the reference's scores that are kept, steps of epochs, memory of long rows."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from fastreason import offline, offline_data
from fastreason.compose_offline import bring_reference
from fastreason.config import parse_config
from fastreason.data.traces import Trace, TraceOrder, TraceReport
from fastreason.errors import CheckpointError, ConfigError
from fastreason.objectives import OBJECTIVES
from fastreason.offline_data import longest_sequence, prepare_offline, with_steps
from fastreason.preflight import Decisions
from fastreason.ranks import Ranks
from fastreason.reference import KEY_FILE, SCORES_FILE, KeptScores

# One row of 19,800 tokens over a vocabulary of 49,152: its logits alone would be 3.6 GiB in fp32.
LONG_ROW = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from fastreason.losses.preference import PairSpec
from fastreason.objectives import OBJECTIVES
from fastreason.packing import Row, micro_batches_of
from fastreason.policy import Policy

config = LlamaConfig(vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1, max_position_embeddings=32768, tie_word_embeddings=True)
config._attn_implementation = "sdpa"
policy = Policy(LlamaForCausalLM(config)).train()

def step(length, spec):
    rows = [Row([1] * 8, [2] * (length - 8), [0.0] * (length - 8), 1.0, 1e-4), Row([1] * 8, [3] * 8, [0.0] * 8, -0.8, 0.1)]
    for batch in micro_batches_of(rows, "padded", 1, pairs=isinstance(spec, PairSpec)):
        assert batch.mask_B1LL is None
        policy(batch, spec, 1.0).loss_sum.backward()
    # Not ru_maxrss: that of a child begins at its parent's.
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20

specs = [OBJECTIVES["redi"].spec, OBJECTIVES["simpo"].spec]
before = [step(64, spec) for spec in specs][-1]
print(*[step(19800, spec) - before for spec in specs])
"""


def test_a_row_of_19800_tokens_needs_far_less_memory_than_its_logits():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", LONG_ROW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    redi_gib, simpo_gib = map(float, done.stdout.split())
    assert 0 < redi_gib < 1.2 and simpo_gib < 1.2, done.stdout


KEY = {"traces": "a", "model": "b", "dtype": "float32"}


def test_scores_are_kept_chunk_by_chunk_and_a_torn_row_is_not_read(tmp_path):
    scores = np.arange(10.0).reshape(5, 2)
    kept = KeptScores(tmp_path, KEY)
    assert kept.read(0, 5).shape == (0, 2)
    kept.append(scores[:2])
    assert np.array_equal(KeptScores(tmp_path, KEY).read(0, 5), scores[:2])
    with open(tmp_path / SCORES_FILE, "ab") as file:
        file.write(b"torn")
    again = KeptScores(tmp_path, KEY)
    assert np.array_equal(again.read(0, 5), scores[:2])
    again.append(scores[2:])
    assert np.array_equal(KeptScores(tmp_path, KEY).read(7, 5), scores)


@pytest.mark.parametrize("name", KEY)
def test_scores_of_something_else_are_removed_before_the_first_step_and_refused_after_it(tmp_path, name):
    kept = KeptScores(tmp_path, KEY)
    kept.read(0, 1)
    kept.append(np.ones((1, 2)))
    other = KeptScores(tmp_path, {**KEY, name: "other"})
    with pytest.raises(ConfigError, match=rf"3 steps were trained against are of another {name}\. .*model\.path"):
        other.read(3, 1)
    assert len(KeptScores(tmp_path, KEY).read(3, 1)) == 1, "what was refused is still there"
    assert len(other.read(0, 1)) == 0
    other.append(np.zeros((1, 2)))
    assert np.array_equal(other.read(3, 1), np.zeros((1, 2)))


def test_scores_that_are_gone_after_the_first_step_end_the_run(tmp_path):
    kept = KeptScores(tmp_path, KEY)
    kept.read(0, 2)
    kept.append(np.ones((1, 2)))
    with pytest.raises(CheckpointError, match=r"1 of 2 pairs' scores are left, and 3 steps"):
        kept.read(3, 2)
    (tmp_path / KEY_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"0 of 2 pairs' scores are left"):
        kept.read(3, 2)


def test_a_run_that_is_stopped_while_it_scores_goes_on_where_it_was(tmp_path, monkeypatch):
    """The policy scores a response as the sum of its tokens."""
    monkeypatch.setattr(offline, "REFERENCE_ROWS", 2)
    (tmp_path / "config.json").write_text("{}")
    pairs = [Trace(str(i), [1], [[i + 2, 3], [i + 4]], None, 1.0) for i in range(5)]
    scored = []

    def logprobs(batches, spec, temperature):
        scored.extend(len(batch.index_B) for batch in batches)
        return [batch.ids_N.double() for batch in batches]

    def parts(stops_after):
        asked = iter(range(99))
        return offline.OfflineParts(
            config=config_of({"steps": 1}, objective="dpo"), objective=OBJECTIVES["dpo"], ranks=Ranks(), rows=pairs,
            updater=SimpleNamespace(logprobs=logprobs), order=None, checkpoints=None, layout="padded", pad_token_id=0,
            stop_requested=lambda: next(asked) >= stops_after,
        )  # fmt: skip

    first, second, third = parts(1), parts(99), parts(0)
    assert not bring_reference(first, tmp_path, tmp_path, "traces")
    assert first.reference is None and sum(scored) == 4
    assert bring_reference(second, tmp_path, tmp_path, "traces")
    assert sum(scored) == 10, "a pair was scored twice"
    assert second.reference.tolist() == [[i + 5.0, i + 4.0] for i in range(5)]
    assert bring_reference(third, tmp_path, tmp_path, "traces") and sum(scored) == 10
    assert np.array_equal(third.reference, second.reference)


def config_of(train, **offline):
    raw = {"model": {"path": "a/b"}, "train": {"prompts_per_step": 32, **train}}
    return parse_config(raw | {"offline": {"objective": "redi", "path": "x.jsonl", **offline}})


def test_epochs_say_how_many_steps_there_are():
    assert with_steps(config_of({}, epochs=1), 53175).train.steps == 1662  # 53,175 / 32, the last batch is smaller
    assert with_steps(config_of({}, epochs=0.5), 640).train.steps == 10
    assert with_steps(config_of({"steps": 7}, epochs=1), 640).train.steps == 7
    assert with_steps(config_of({"steps": 99}), 640).train.steps == 99, "without epochs it goes round"
    with pytest.raises(ConfigError, match=r"train\.steps=21: offline\.epochs=1 of 640 rows make only 20"):
        with_steps(config_of({"steps": 21}, epochs=1), 640)


def test_the_figures_of_a_step_have_one_name_and_one_meaning():
    """A conversation's prompt has 2 tokens and its turns 4, of which 3 are trained; changes count from the reference."""
    objective, written = OBJECTIVES["dpo"], []

    def update(batches, spec, temperature, denominator):
        outputs = [SimpleNamespace(logp=-batch.ids_N.double()) for batch in batches]
        return SimpleNamespace(outputs=outputs, loss=0.0, grad_norm=0.0, lr=0.0, applied=True)

    parts = offline.OfflineParts(
        config=config_of({"steps": 2}, objective="dpo"), objective=objective, updater=SimpleNamespace(update=update),
        ranks=Ranks(), rows=[Trace("0", [1, 2], [[3, 4, 5, 6], [7, 8, 9, 9]], [True, False, True, True], 1.0)],
        order=TraceOrder(1, 1, 0), checkpoints=None, layout="padded", pad_token_id=0, stop_requested=lambda: False,
        reference=np.array([[-20.0, -20.0]]), metrics=SimpleNamespace(write=written.append),
    )  # fmt: skip
    parts.config = parts.config.model_copy(
        update={"checkpoint": parts.config.checkpoint.model_copy(update={"every": 0})}
    )
    loop = offline.OfflineLoop(parts)
    assert loop.run()
    assert [line["train/tokens"] for line in written] == [12, 12] and loop.totals.tokens_trained == 24
    assert [line["train/tokens_in_loss"] for line in written] == [6, 6] and "train/tokens_trained" not in written[0]
    assert {key for key in written[1] if key.startswith("logp/")} == {
        f"logp/{which}{of}{change}"
        for which in ("chosen", "rejected")
        for of in ("", "_sum")
        for change in ("", "_change")
    }
    assert written[1]["logp/chosen_sum_change"] == -14 + 20


def finished_traces(num):
    def tokenize(config, folder):
        folder.mkdir()
        return TraceReport(rows=num, kept=num, longest=3, longest_line=3)

    return tokenize


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"steps": 99}, r"train\.steps=99: offline\.epochs=1 of 64 rows make only 2 steps"),
        ({"warmup_steps": 3}, r"train\.warmup_steps=3 is more than the 2 updates of the run"),
    ],
)
def test_keys_that_the_number_of_rows_contradicts_leave_no_run(tmp_path, monkeypatch, train, message):
    monkeypatch.setattr(offline_data, "in_own_process", lambda config, folder: finished_traces(64)(config, folder))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(ConfigError, match=message):
        prepare_offline(config_of(train, epochs=1), run_dir, Decisions(device="cpu", attention="sdpa", liger=False))
    assert not run_dir.exists()


def test_an_attention_that_cannot_be_leaves_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_data, "in_own_process", lambda config, folder: finished_traces(64)(config, folder))
    monkeypatch.setattr(offline_data, "decide_attention", refuse)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="no such attention"):
        prepare_offline(
            config_of({}, epochs=1), tmp_path / "run", Decisions(device="cpu", attention="sdpa", liger=False)
        )
    assert not (tmp_path / "run").exists()


def refuse(*_):
    raise ConfigError("no such attention")


SLOW = """
import os, time

def tokenize(config, folder):
    folder.mkdir()
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(90)
"""
LAUNCHER = """
import pathlib, slow
from fastreason import offline_data
if __name__ == "__main__":
    offline_data.tokenize = slow.tokenize
    offline_data.prepare_offline(None, pathlib.Path("run"), None)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_launcher_that_is_stopped_while_it_tokenizes_leaves_no_worker(tmp_path, number, code):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "start.py").write_text(LAUNCHER)
    (tmp_path / "run").mkdir()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "start.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    pid, worker = tmp_path / "run" / "traces" / "pid", None
    try:
        wait_for(lambda: (pid.is_file() and pid.read_text()) or process.poll() is not None)
        worker = psutil.Process(int(pid.read_text()))
        process.send_signal(number)
        assert process.wait(30) == code
        wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, within_s=10)
        assert (tmp_path / "run").exists() == (number == signal.SIGKILL)
    finally:
        for each in (process, worker):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if each is not None:
                    each.kill()
        process.wait()


def wait_for(condition, within_s=60.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.05)


def test_the_longest_row_is_what_the_model_can_take():
    assert longest_sequence(config_of({"steps": 1}), {"max_position_embeddings": 4096}) == 4096
    config = config_of({"steps": 1}, max_tokens=19800)
    with pytest.raises(ConfigError, match=r"offline\.max_tokens=19800 is more than .*=4096.*model\.rope_theta"):
        longest_sequence(config, {"max_position_embeddings": 4096})
    edited = config.model_copy(update={"model": config.model.model_copy(update={"max_position_embeddings": 32768})})
    assert longest_sequence(edited, {"max_position_embeddings": 4096}) == 19800
