"""Engine and trainer in turn on one device, in real processes: the fake engine's server sleeps while the trainer computes.

Its device has room for one: a request, a start or a waking while the other is there is an error that ends the run, and so are
a response without weights and weights without memory.
"""

import json
import signal
from typing import Any

import pytest

from fastreason.ledger import audit_ledger, read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def spans(run: Any, name: str) -> list[tuple[int, int]]:
    """From and to of the timeline's spans of a name, microseconds."""
    events = json.loads((run.run_dir / "trace.json").read_text())["traceEvents"]
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["name"] == name)


def test_the_engines_sleep_whenever_the_trainer_computes(train_run):
    run = train_run(
        resources={"mode": "colocated", "sleep": "on", "engines": 2},
        eval={"num_prompts": 4},
        train={"ranks": 2, "steps": 2},
        checkpoint={"every": 1, "save_model": False},
        log={"trace": True},
    )
    assert run.run(timeout_s=150) == 0, run.output + run.logs()
    assert len(run.metrics()) == 2
    for row in run.metrics():
        assert row["time/sleep_s"] > 0 and row["time/wake_s"] > 0 and row["rollout/staleness_max"] == 0
        assert row["rollout/engine_restarts"] == row["rollout/producer_restarts"] == 0
    asleep, trained = spans(run, "asleep"), spans(run, "train")
    assert (len(asleep), len(trained)) == (3, 2), "from the start to the first evaluation, and in each step"
    for first, last in trained:
        assert any(start <= first and last <= end for start, end in asleep), (
            "it was trained beside engines that are awake"
        )
    generated = [span for ticket in range(6) for span in spans(run, f"t{ticket}")]  # by the engine and by the graders
    assert len(generated) == 12
    assert not any(start < last and first < end for first, last in generated for start, end in asleep)
    assert run.left_behind(2) == [] and run.files_left() == []


@pytest.mark.faults
def test_whatever_dies_while_the_engine_sleeps_costs_nothing_and_starts_nothing_beside_the_trainer(small_run):
    """The engine is killed and stopped, the producer killed, the run stopped and resumed; each amid training."""
    run = small_run(
        run={"hang_timeout_s": 2.0, "max_restarts": 1},
        resources={"mode": "colocated", "sleep": "on"},
        train={"steps": 7},
        checkpoint={"save_model": False},
    )
    run.start()
    strikes = [
        (2, signal.SIGKILL, "rollout.fake_server"),
        (3, signal.SIGKILL, "_process producer"),
        (4, signal.SIGSTOP, "rollout.fake_server"),
    ]
    for step, number, words in strikes:
        run.until(lambda step=step: run.phase() == ("train", step), what=f"training in step {step}")
        (victim,) = run.find(*words.split())
        victim.send_signal(number)
    run.until(lambda: run.phase() == ("train", 5), what="training in step 5")
    run.stop()
    assert run.wait(150) == 143, run.output + run.logs()
    assert run.left_behind(2) == [] and run.files_left() == []
    assert run.metrics()[-1]["rollout/engine_restarts"] == 2
    assert run.metrics()[-1]["rollout/producer_restarts"] == 1
    assert run.run(resume=run.run_dir) == 0, run.output + run.logs()
    audit = audit_ledger(read_ledger(run.run_dir))
    assert (audit.num_trained, audit.lost, audit.twice) == (21, [], [])
    assert run.left_behind(2) == [] and run.files_left() == []
