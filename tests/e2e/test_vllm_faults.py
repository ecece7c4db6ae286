"""Three faults with the real vLLM in one run, and a trainer rank that is lost.

The whole matrix with the deterministic engine is in `test_faults.py`.
"""

import signal

import pytest
from striker import LIMIT_S, Striker

from fastreason.ledger import audit_ledger, read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.vllm
def test_vllm_that_dies_or_hangs_and_a_run_that_is_killed_lose_nothing(small_run, tmp_path):
    """Three cells with the real engine: a worker killed amid generation, its engine core stopped, everything killed.

    At a rate that moves the policy far, so that the sampler agrees with later batches only if it has their weights. Those go
    through a file in a folder that the config names, as they would to another machine.
    """
    shared = {"transport": "file", "exchange_dir": str(tmp_path)}
    striker = Striker(small_run, "vllm", staleness=0, hang_timeout_s=25.0, rollout=shared, steps=9, lr=1e-2)
    run = striker.run
    run.start()
    striker.strike("engine", signal.SIGKILL, "generate")
    striker.strike("engine", signal.SIGSTOP, "generate")
    striker.strike_all(signal.SIGKILL, phase="train")
    run.process.wait(timeout=20)
    restarts = striker.outputs().count("starting the vLLM server again")
    assert restarts == striker.num_strikes["engine"], striker.outputs()
    striker.assert_stopped_engines_are_noticed()
    assert run.run(resume=run.run_dir, timeout_s=LIMIT_S["vllm"]) == 0, run.output + run.logs()
    striker.assert_nothing_lost(9, None)
    rows = run.metrics()
    assert max(abs(row["loss/logp"] - rows[0]["loss/logp"]) for row in rows) > 0.1, "the policy did not move far"
    assert any(trace.startswith(str(tmp_path)) for trace in run._traces) and list(tmp_path.iterdir()) == []


def test_a_trainer_rank_that_dies_or_hangs_is_named_and_the_run_resumed(train_run):
    """Two ranks: one is killed, then one is stopped. Every end is one message, and the last start has it all."""
    run = train_run(
        run={"hang_timeout_s": 4}, train={"ranks": 2, "steps": 9}, rollout={"max_staleness": 1}, checkpoint={"every": 1}
    )
    run.environment["TEST_REWARD_SLEEP_S"] = "0.02"
    for number, step, words in (
        (signal.SIGKILL, 2, ("trainer rank 1 was ended by signal 9", "killed")),
        (signal.SIGSTOP, 5, ("trainer rank 1 hangs", "run.hang_timeout_s=4")),
    ):
        run.start(resume=run.run_dir if step > 2 else None)
        run.until(lambda step=step: run.num_steps() >= step, timeout_s=300, what=f"step {step}")
        (rank,) = [p for p in run.find("_process", "trainer") if p.environ().get("RANK") == "1"]
        rank.send_signal(number)
        assert run.wait(150) == 1, run.output + run.logs()
        assert run.output.count("\nerror:") == 1 and "Traceback" not in run.output.split("error:")[0]
        for word in (*words, f"--resume {run.run_dir}", "continue from step-"):
            assert word in run.output.split("error:")[1], run.output
        assert run.left_behind(2) == [] and run.files_left() == []
    assert run.run(resume=run.run_dir, timeout_s=300) == 0, run.output + run.logs()
    audit = audit_ledger(read_ledger(run.run_dir))
    assert (audit.lost, audit.twice, audit.num_trained) == ([], [], 27)
    assert [row["step"] for row in run.metrics()] == list(range(1, 10))
