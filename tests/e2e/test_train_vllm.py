"""`fastreason train` with a real vLLM server on the CPU and the tiny model: a whole run, and the ways it can fail."""

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(700)]

VLLM = {"engine": "vllm", "max_new_tokens": 12, "samples_per_prompt": 4, "startup_timeout_s": 150}


def assert_nothing_left(run: Any) -> None:
    assert run.left_behind(3) == []
    assert run.files_left() == []


def assert_one_clear_message(run: Any, *words: str) -> None:
    message = re.split(r"^error:", run.output, flags=re.MULTILINE)
    assert len(message) == 2, run.output
    for word in words:
        assert word in message[1], run.output
    # A traceback may stand in the tail of the engine's log, which is marked; never in front of the message.
    assert "Traceback" not in message[0]


def test_two_steps_with_a_double_buffer(train_run):
    run = train_run(
        rollout={**VLLM, "max_staleness": 1},
        train={"steps": 2, "prompts_per_step": 4},
        eval={"num_prompts": 4},
    )
    assert run.run(timeout_s=600) == 0, run.output + run.logs()
    assert_nothing_left(run)
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert (summary["engine"], summary["updater"], summary["steps"]) == ("vllm", "deepspeed", 2)
    # fp32 on both sides, the same weights: about 1e-6. After an update that is stale by one version it may be larger.
    assert summary["first_batch_mismatch"]["mismatch/logp_abs_mean"] < 1e-5
    assert summary["first_batch_mismatch"]["mismatch/logp_abs_max"] < 1e-4
    assert [row["rollout/staleness_max"] for row in run.metrics()] == [0, 1]
    assert all(row["time/publish_s"] > 0 for row in run.metrics())
    assert {row["version"] for row in run.samples()} == {0}


@pytest.mark.faults  # its two workers and the trainer share two cores: a minute alone, more than two on a busy machine
def test_new_weights_arrive_in_both_shards_of_a_model_that_two_cores_share(train_run):
    """Strictly on-policy and in fp32: a shard with old weights, or with the other's half, would sample from another policy."""
    run = train_run(
        run={"timeout_s": 300},
        rollout={**VLLM, "tensor_parallel": 2, "cores": "0-1", "max_staleness": 0, "startup_timeout_s": 400},
        train={"steps": 3, "prompts_per_step": 4, "lr": 1e-2},
    )
    assert run.run(timeout_s=600) == 0, run.output + run.logs()
    assert_nothing_left(run)
    rows = run.metrics()
    assert "core 0-1" in run.output and "tensor parallel 2" in run.output
    assert [row["rollout/staleness_max"] for row in rows] == [0, 0, 0]
    assert all(row["mismatch/logp_abs_mean"] < 1e-5 for row in rows)
    assert all(row["mismatch/logp_abs_max"] < 1e-4 for row in rows)
    assert abs(rows[-1]["loss/logp"] - rows[0]["loss/logp"]) > 0.1, "the policy did not move far"


def test_a_port_in_use_fails_before_a_model_loads(train_run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = train_run(rollout={**VLLM, "port": port})
        assert run.run(timeout_s=150) in (1, 2), run.output + run.logs()
    assert_one_clear_message(run, f"rollout.port={port}", "in use", "0 for any free one")
    assert run.left_behind(1) == [] and list(run.tmp.iterdir()) == []
    assert not list((run.folder / "runs").glob("*/logs/*.log")), "a process was started"


def broken_model(start: Path, folder: Path) -> Path:
    """Reads as a config and as a tokenizer, and passes every check before the start; its weights have another shape."""
    shutil.copytree(start, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    return folder


def test_a_model_that_does_not_load_is_one_clear_message(train_run, tiny_model, tmp_path):
    run = train_run(rollout=VLLM, model={"path": str(broken_model(tiny_model, tmp_path / "broken"))})
    assert run.run(timeout_s=300) == 1, run.output + run.logs()
    assert_one_clear_message(run)
    assert_nothing_left(run)


@pytest.mark.faults  # the reason's words are tested on a recorded log; this takes half a minute for the log to be real
def test_too_large_a_cache_is_said_to_be_memory(train_run):
    run = train_run(rollout={**VLLM, "kv_cache_gib": 100_000})
    assert run.run(timeout_s=300) == 1, run.output + run.logs()
    assert_one_clear_message(run, "vLLM server", "rollout.kv_cache_gib", "engine.log", "  | ")
    assert_nothing_left(run)


def test_an_adapter_is_applied_by_the_engine_itself(train_run):
    """Strictly on-policy and in fp32: were the engine's adapter another version's than the trainer's, they would differ."""
    run = train_run(
        rollout={**VLLM, "max_staleness": 0},
        lora={"rank": 4, "alpha": 16, "targets": ["q_proj", "down_proj"], "publish": "adapter"},
        algorithm={"kl": "k3", "kl_coef": 0.1},
        train={"steps": 3, "prompts_per_step": 4, "lr": 1e-2},
    )
    assert run.run(timeout_s=600) == 0, run.output + run.logs()
    assert_nothing_left(run)
    rows = run.metrics()
    assert [row["rollout/staleness_max"] for row in rows] == [0, 0, 0]
    # The reference is the model without its adapter: what the engine samples from has left it.
    assert rows[0]["kl/reference"] == 0 and rows[2]["kl/reference"] > 1e-3
    assert all(row["mismatch/logp_abs_mean"] < 1e-5 for row in rows)
    assert all(row["mismatch/logp_abs_max"] < 1e-4 for row in rows)
