"""One run on two machines, as two commands on this one: started by torchrun, or told apart by the environment that it gives."""

import os
import re
import shutil
import signal
import socket
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
from test_train_fake import assert_all_trained_once, steady

TORCHRUN = Path(__file__).resolve().parents[2] / "configs" / "launch" / "torchrun.sh"
TWO_STEPS = {"steps": 2, "zero_stage": 2, "threads": 1}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_nodes(runs: list[Any]) -> None:
    """Tell each command which machine it is, as torchrun does."""
    port = str(free_port())
    for number, run in enumerate(runs):
        run.environment |= {"RANK": str(number), "WORLD_SIZE": str(len(runs)), "LOCAL_RANK": "0"}
        run.environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        run.config_path, run.folder = runs[0].config_path, runs[0].folder


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_machines_of_a_rank_each_train_what_one_of_two_ranks_does(train_run):
    alone = train_run(train={**TWO_STEPS, "ranks": 2})
    assert alone.run(timeout_s=150) == 0, alone.output + alone.logs()
    first, second = runs = [train_run(train={**TWO_STEPS, "ranks": 1}) for _ in range(2)]
    port, paths = str(free_port()), os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    for number, run in enumerate(runs):
        run.command = ["bash", str(TORCHRUN)]
        run.environment |= {"NODE": str(number), "FIRST": "127.0.0.1", "NODES": "2", "PORT": port, "PATH": paths}
        run.config_path, run.folder = first.config_path, first.folder
    first.start()
    second.start()
    assert first.wait(150, beside=second) == 0, first.output + first.logs()
    assert second.wait(60) == 0, second.output + first.logs()
    assert steady(first.metrics()) == steady(alone.metrics())
    assert weights(first.run_dir) == weights(alone.run_dir)
    assert_all_trained_once(first, first.run_dir, 2)
    logs = {path.name for path in (first.run_dir / "logs").iterdir()}
    assert {"trainer.log", "trainer-node1.log"} <= logs
    for run in runs:
        assert run.left_behind(2) == []
        assert [name for name in run.files_left() if not name.startswith("torchelastic_")] == []  # torchrun's own logs


@pytest.mark.slow
@pytest.mark.faults
def test_a_machine_that_is_lost_ends_the_run_and_one_machine_goes_on_with_another_layout(train_run):
    first, second = runs = [
        train_run(train={**TWO_STEPS, "steps": 1000, "ranks": 1}, checkpoint={"every": 1}) for _ in range(2)
    ]
    for run in runs:
        run.environment["TEST_REWARD_SLEEP_S"] = "0.02"
    as_nodes(runs)
    first.start()
    second.start()
    first.until(lambda: first.num_steps() >= 2, what="the second step")
    assert second.process is not None
    second.process.send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert first.wait(90) == 1, first.output + first.logs()
    assert time.monotonic() - started < 60
    assert first.output.count("error:") == 1 and "Traceback" not in first.output
    assert "continue from step-" in first.output
    second.wait(20)
    for run in runs:
        assert run.left_behind(5) == []
    shutil.rmtree(second.tmp, ignore_errors=True)  # of a launcher that was killed
    done = int(re.findall(r"continue from step-(\d+)", first.output)[0])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del first.environment[name]
    code = first.run(f"train.steps={done + 1}", "train.zero_stage=3", resume=first.run_dir, timeout_s=150)
    assert code == 0, first.output + first.logs()
    assert "of 2 ranks, ZeRO 2, float32 into 1 rank, ZeRO 3, float32" in first.logs()
    assert_all_trained_once(first, first.run_dir, done + 1)
