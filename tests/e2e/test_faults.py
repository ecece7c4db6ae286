"""Any part of a run is killed or stopped, at any phase: nothing is lost, nothing trained twice, and the figures stay the same.

Launcher, engine server, producer, graders and trainer are real processes. `make test` does this with the deterministic
engine, and three cells with vLLM (`test_vllm_faults.py`); `make test-faults` does all of it with vLLM too. Where the
environment has FASTREASON_FAULT_TABLE=FILE, each of these runs appends a line of JSON to FILE: what was struck, and what was
lost (`striker.py`).
"""

import json
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from striker import LIMIT_S, PHASES, VICTIMS, Striker

from fastreason.ledger import read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

VLLM = [pytest.mark.faults, pytest.mark.vllm, pytest.mark.timeout(1800)]
ENGINES = [pytest.param("fake", id="fake"), pytest.param("vllm", id="vllm", marks=VLLM)]


@pytest.fixture(scope="module")
def undisturbed(small_run: Callable[..., Any]) -> Future[list[dict[str, Any]]]:
    """The metrics of a quiet run at S = 0 on the deterministic engine, which is under way while the first test is."""

    def rows() -> list[dict[str, Any]]:
        # Nobody hangs there, and a reward that came late on a busy machine would be another reward.
        quiet = Striker(small_run, "fake", staleness=0, hang_timeout_s=60, deadline_s=60.0, steps=40)
        quiet.run.environment.clear()
        assert quiet.run.run(timeout_s=700) == 0, quiet.run.output + quiet.run.logs()
        return quiet.run.metrics()

    pool = ThreadPoolExecutor(1)
    future = pool.submit(rows)
    pool.shutdown(wait=False)
    return future


def struck_in_every_phase(striker: Striker, number: int) -> Striker:
    """A whole run in which engine, producer and grader each get the signal in each phase."""
    run = striker.run
    run.start()
    for index in range(9):
        # A Latin square, so that no part is struck twice in a row.
        striker.strike(VICTIMS[index % 3], number, PHASES[(index + index // 3) % 3])
    assert run.wait(LIMIT_S[striker.engine]) == 0, run.output + run.logs()
    return striker


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_that_die_or_hang_at_any_phase_cost_nothing(small_run, engine, request):
    """SIGKILL at S = 0 and SIGSTOP at S = 1: engine, producer, grader x generate, train, publish."""
    undisturbed = request.getfixturevalue("undisturbed") if engine == "fake" else None
    steps = (18, 22) if engine == "fake" else (24, 30)  # a strike that came too late is repeated in a later step
    killed = Striker(small_run, engine, staleness=0, hang_timeout_s=30.0, steps=steps[0])
    # A grader is struck while the trainer waits for what it grades: a batch takes 2.4 s.
    ahead = {"hang_timeout_s": 4.0 if engine == "fake" else 25.0, "ahead_token_s": 0.3}
    stopped = Striker(small_run, engine, staleness=1, **ahead, steps=steps[1])
    with ThreadPoolExecutor(2 if engine == "fake" else 1) as pool:  # one vLLM is as much as two cores start in time
        runs = [
            pool.submit(struck_in_every_phase, killed, signal.SIGKILL),
            pool.submit(struck_in_every_phase, stopped, signal.SIGSTOP),
        ]
    for future, num_steps, staleness in zip(runs, steps, (0, 1), strict=True):
        striker = future.result()
        run = striker.run
        striker.assert_nothing_lost(num_steps, undisturbed)
        assert max(row["rollout/staleness_max"] for row in run.metrics()) == staleness
        restarts = json.loads((run.run_dir / "summary.json").read_text())["restarts"]
        assert restarts == {name: striker.num_strikes[name] for name in ("engine", "producer")}
        events = [row["event"] for row in read_ledger(run.run_dir)]
        assert events.count("producer_restarted") == striker.num_strikes["producer"]
        assert run.output.count("starting the") == sum(restarts.values())
    stopped.assert_stopped_engines_are_noticed()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_whole_run_is_stopped_or_killed_at_any_phase(small_run, engine, request):
    """SIGSTOP of all processes for longer than anybody may be silent, then SIGCONT; SIGKILL of all, then --resume."""
    undisturbed = request.getfixturevalue("undisturbed") if engine == "fake" else None
    phases, steps, hang_timeout_s = ("generate", "train", "checkpoint"), 40, 4.0 if engine == "fake" else 20.0
    striker = Striker(small_run, engine, staleness=1, hang_timeout_s=hang_timeout_s, steps=steps)
    run = striker.run
    run.start()
    for phase in phases:
        striker.strike_all(signal.SIGSTOP, signal.SIGCONT, phase=phase, pause_s=hang_timeout_s + 2)
    for phase in phases:
        striker.strike_all(signal.SIGKILL, phase=phase)
        run.process.wait(timeout=20)
        assert run.left_behind(2) == []
        run.start(resume=run.run_dir)
    assert run.wait(LIMIT_S[engine]) == 0, run.output + run.logs()
    striker.assert_nothing_lost(steps, undisturbed)
    assert "starting the" not in striker.outputs(), "a process was taken for a hanging one"
    assert [row["event"] for row in read_ledger(run.run_dir)].count("resumed") >= 1
