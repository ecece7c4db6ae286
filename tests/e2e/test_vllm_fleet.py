"""Two real vLLM servers, two ranks: one server is killed, the run goes on, and the sampler agrees with the trainer."""

import json
import signal

import pytest
from test_fleet import assert_nothing_lost

from fastreason.ledger import read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.faults, pytest.mark.timeout(900)]


def test_one_of_two_vllm_servers_is_killed_and_comes_back_with_the_weights_of_then(small_run):
    steps = 40
    run = small_run(
        run={"timeout_s": 500},
        resources={"engines": 2},
        rollout={"engine": "vllm", "max_staleness": 0, "max_new_tokens": 48, "startup_timeout_s": 400},
        train={"ranks": 2, "steps": steps, "lr": 1e-2},
        checkpoint={"save_model": False},
    )
    run.environment["TEST_REWARD_SLEEP_S"] = "0.3"  # a server takes as long as many steps to start
    run.start()
    run.until(lambda: run.num_steps() >= 2, timeout_s=400, what="the first steps")
    second = run.find("vllm.entrypoints.openai.api_server")[-1]
    second.send_signal(signal.SIGKILL)
    assert run.wait(600) == 0, run.output + run.logs()
    assert_nothing_lost(run, steps)
    rows = run.metrics()
    assert [row["event"] for row in read_ledger(run.run_dir) if "ticket" not in row] == ["engine_lost", "engine_back"]
    assert min(row["engine/alive"] for row in rows) == 1 and rows[-1]["engine/alive"] == 2
    assert rows[-1]["engine/requests_0"] > 0 and rows[-1]["engine/requests_1"] > 0
    assert json.loads((run.run_dir / "summary.json").read_text())["restarts"]["engine-1"] == 1
    # Every token is of the weights that it is stamped with, whoever sampled it.
    assert max(row["mismatch/logp_abs_mean"] for row in rows) < 1e-5
    assert max(abs(row["loss/logp"] - rows[0]["loss/logp"]) for row in rows) > 0.1, "the policy did not move far"
    assert run.left_behind(2) == [] and run.files_left() == []
