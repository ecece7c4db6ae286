"""Strikes at the processes of a run, for the fault tests: which part, in which phase of a later step, and what must hold then.

A strike is aimed at a phase by `progress.json`, and counts only when the run still says that phase after it.

With FASTREASON_FAULT_TABLE=FILE in the environment each run that is checked appends one JSON line to FILE, before its
assertions: engine, run (the test), signal, S, steps, strikes (by part and phase, those that came too late too), restarts (by
part, of the last start), lost and trained_twice (numbers of prompts).
"""

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from fastreason.ledger import audit_ledger, read_ledger
from fastreason.rollout.lifeline import LONGEST_BEAT_S

WORDS = {"producer": ("_process", "producer"), "grader": ("run_grader",)}
# Which of its processes is struck, by the number of the strike.
ENGINE_WORDS = {"fake": ("rollout.fake_server",), "vllm": ("VLLM::Worker", "VLLM::EngineCore", "api_server")}
VICTIMS = ("engine", "producer", "grader")
PHASES = ("generate", "train", "publish")
# What depends on the clock, on the machine or on S, or counts the faults; everything else must repeat bit for bit. Staleness
# is of the clock even at a fixed S > 0: which tokens are sampled before an update and which after is decided by when it comes,
# and a prompt that is issued again after a fault is issued at a later version. Its bound is asserted on every batch instead.
VARYING = (
    "time/", "memory/", "rollout/tok_per_s", "train/tok_per_s", "staleness/", "rollout/staleness",
    "rollout/engine_restarts", "rollout/producer_restarts",
)  # fmt: skip
LIMIT_S = {"fake": 400.0, "vllm": 600.0}  # for a single event, on a machine that has other things to do as well
LATE_S = {"fake": 5.0, "vllm": 15.0}  # what a busy machine may add to the time in which a stop is noticed


@dataclass(frozen=True)
class Strike:
    """One signal to one part, or to "all"."""

    part: str
    phase: str
    number: int
    time_s: float  # since 1970, before it


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in rows]


class Striker:
    """One run, and strikes at its processes, each in the middle of a phase of a later step than the last."""

    def __init__(
        self,
        make: Callable[..., Any],
        engine: str,
        staleness: int,
        hang_timeout_s: float,
        rollout: dict[str, Any] | None = None,
        deadline_s: float = 2.0,
        ahead_token_s: float = 0.15,
        **train: Any,
    ) -> None:
        # Ahead of the trainer (S > 0), a batch has to take longer than training even on a slow machine: else it is there
        # before it is asked for, and no phase in which it is generated can be hit.
        token_s = (ahead_token_s if staleness else 0.05) if engine == "fake" else 0.0
        self.run = make(
            run={"hang_timeout_s": hang_timeout_s, "timeout_s": 500},
            rollout={
                "engine": engine, "max_staleness": staleness, "order": "issued", "fake_token_s": token_s,
                "max_new_tokens": 8 if engine == "fake" else 64, **(rollout or {}),
            },
            train={"prompts_per_step": 3, **train},
            reward={"functions": {"user_reward_of_the_test:even": 1.0}, "deadline_s": deadline_s},
            checkpoint={"save_model": False, "every": 2},
        )  # fmt: skip
        self.engine, self.step, self.staleness, self.hang_timeout_s = engine, 0, staleness, hang_timeout_s
        self.strikes: list[Strike] = []
        self.num_strikes = {"engine": 0, "producer": 0, "grader": 0}
        self._newest = dict.fromkeys(self.num_strikes, 0.0)  # start of the process that was struck last
        self._mark = self.run.folder / "mark"
        # Grading lasts long enough to be struck in: vLLM hands over several responses at once.
        sleep_s = "0.05" if engine == "fake" else "0.2"
        self.run.environment |= {"TEST_REWARD_SLEEP_S": sleep_s, "TEST_REWARD_MARK": str(self._mark)}

    def victim(self, name: str) -> psutil.Process:
        """A process of that part, started after the one that was struck last."""
        engine_words = ENGINE_WORDS[self.engine]
        words = WORDS.get(name) or (engine_words[self.num_strikes["engine"] % len(engine_words)],)
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = [p for p in self.run.find(*words) if started_at(p) > self._newest[name]]
            if name == "grader":  # they end with their producer
                found[:] = [p for p in found if started_at(p, parent=True) > self._newest["producer"]]
            return bool(found)

        self.run.until(look, timeout_s=LIMIT_S[self.engine], what=f"a {name} that was not struck yet")
        return found[-1]

    def strike(self, name: str, number: int, phase: str) -> None:
        """Send the signal; where the phase was over by then, strike again in a later step."""
        for _ in range(8):
            process = self.victim(name)
            self.await_phase(phase, grading=name == "grader" and phase == "generate")
            self._newest[name] = started_at(process)
            sent_at = time.time()
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:  # a grader goes with its producer
                continue
            self.num_strikes[name] += 1
            self.strikes.append(Strike(name, phase, number, sent_at))
            if self.run.phase() == (phase, self.step):
                return
        pytest.fail(f"the {name} could not be struck in the phase {phase}:\n{self.run.logs()}")

    def strike_all(self, *numbers: int, phase: str, pause_s: float = 0.0) -> None:
        """Send signals to every process of the run in the middle of a phase, the launcher first: it can do nothing."""
        # After a resume, not before all have been started.
        self.run.until(lambda: self.run.phase()[1] > self.step, LIMIT_S[self.engine], "a later step")
        self.step = self.run.phase()[1]
        processes = sorted(self.run.processes(), key=lambda process: process.pid != self.run.process.pid)
        self.await_phase(phase)
        self.strikes.append(Strike("all", phase, numbers[0], time.time()))
        for number in numbers:
            for process in processes:
                process.send_signal(number)
            time.sleep(pause_s)

    def await_phase(self, phase: str, grading: bool = False) -> None:
        """Return within milliseconds of the phase's beginning in a later step (and of that of grading)."""
        deadline = time.monotonic() + LIMIT_S[self.engine]

        def wait_until(condition: Callable[[], bool], what: str) -> None:
            while not condition():
                if self.run.process.poll() is not None or time.monotonic() > deadline:
                    self.run.until(lambda: False, timeout_s=0, what=what)  # fails with the run's output
                time.sleep(0.002)

        wait_until(lambda: self.run.phase()[0] == phase and self.run.phase()[1] > self.step, f"a later step's {phase}")
        self.step = self.run.phase()[1]
        if grading:
            begun = self._num_graded()
            wait_until(lambda: self._num_graded() > begun, f"grading in step {self.step}")

    def _num_graded(self) -> int:
        return self._mark.stat().st_size if self._mark.exists() else 0

    def outputs(self) -> str:
        """What all starts of the run have printed."""
        return "".join(path.read_text() for path in sorted(self.run.folder.glob("out-*.txt")))

    def assert_nothing_lost(self, steps: int, undisturbed: Future[list[dict[str, Any]]] | None) -> None:
        """Every prompt issued is trained once, every step is there once, and its figures are those of a quiet run."""
        run = self.run
        audit = audit_ledger(read_ledger(run.run_dir))
        if table := os.environ.get("FASTREASON_FAULT_TABLE"):
            with open(table, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.table_row(steps, len(audit.lost), len(audit.twice))) + "\n")
        assert run.left_behind(2) == [] and run.files_left() == []
        assert (audit.lost, audit.twice, audit.num_dropped) == ([], [], 0)
        assert audit.num_issued == audit.num_trained == 3 * steps
        rows = run.metrics()
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert all(row["reward/timeouts"] == 0 for row in rows)
        if undisturbed is not None:
            pairs = zip(steady(rows), steady(undisturbed.result()[:steps]), strict=True)
            moved = [(mine["step"], key, mine.get(key), its.get(key)) for mine, its in pairs for key in {*mine, *its}]
            assert [item for item in moved if item[2] != item[3]] == []
        else:
            # The sampler that was started again has the weights of its version: those of the trainer, where they are its own.
            fresh = [row["mismatch/logp_abs_mean"] for row in rows if row["rollout/staleness_max"] == 0]
            assert fresh and max(fresh) < 1e-5

    def table_row(self, steps: int, num_lost: int, num_twice: int) -> dict[str, Any]:
        """What FASTREASON_FAULT_TABLE is told of this run."""
        summary = self.run.run_dir / "summary.json"
        return {
            "engine": self.engine,
            "run": os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2].partition(" (")[0],
            "signal": "+".join(sorted({signal.Signals(strike.number).name for strike in self.strikes})),
            "S": self.staleness,
            "steps": steps,
            "strikes": dict(Counter(f"{strike.part} in {strike.phase}" for strike in self.strikes)),
            "restarts": json.loads(summary.read_text()).get("restarts") if summary.exists() else None,
            "lost": num_lost,
            "trained_twice": num_twice,
        }

    def assert_stopped_engines_are_noticed(self) -> None:
        """From each SIGSTOP of an engine to its `engine_lost`: at most run.hang_timeout_s, a heartbeat and `LATE_S`."""
        lost = [row["time"] for row in read_ledger(self.run.run_dir) if row["event"] == "engine_lost"]
        stops = [s for s in self.strikes if (s.part, s.number) == ("engine", signal.SIGSTOP)]
        assert stops and len(lost) >= len(stops)
        limit_s = self.hang_timeout_s + min(LONGEST_BEAT_S, self.hang_timeout_s / 3) + LATE_S[self.engine]
        waits = [min((at - s.time_s for at in lost if at >= s.time_s - 0.001), default=float("inf")) for s in stops]
        assert max(waits) < limit_s, f"{waits} s from the stops to the ledger, {limit_s:.1f} s are allowed"


def started_at(process: psutil.Process, parent: bool = False) -> float:
    """When it was started, or its parent was; 0 for one that is gone."""
    with contextlib.suppress(psutil.Error, AttributeError):
        return (process.parent() if parent else process).create_time()
    return 0.0
