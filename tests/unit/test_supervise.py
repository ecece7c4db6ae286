"""What the supervisor does about a process that dies, hangs or asks to be started again. Small scripts play the parts."""

import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from fastreason import supervise
from fastreason.config import RunConfig
from fastreason.errors import EngineError, FastreasonError, NodeError, StuckError
from fastreason.metrics import Progress
from fastreason.processes import spawn
from fastreason.session import Outcome, Session, read_outcome, request_restart, take_restart_request, write_outcome
from fastreason.supervise import Part, StopRequest, Supervisor, killed_rank

pytestmark = pytest.mark.timeout(400)

LIVES = "import time; time.sleep(60)"
BEATS = """
from fastreason.beats import Beat
import sys, time
Beat(sys.argv[1], sys.argv[2], 0.05).in_thread()
print("beating", flush=True)
time.sleep(60)
"""


class Stage:
    """A session folder and a supervisor, whose parts are scripts; `main` lives until `end` is called."""

    def __init__(self, folder: Path, **run: float) -> None:
        self.folder = folder
        (folder / "run").mkdir()
        self.session = Session(
            folder=str(folder), run_dir=str(folder / "run"), model_dir="", exchange_dir="",
            device="cpu", attention="sdpa", liger=False, resume=False,
        )  # fmt: skip
        self.config = RunConfig(**{"hang_timeout_s": 0.8, "max_restarts": 2, **run})
        self.request = StopRequest()
        self.supervisor = Supervisor(self.config, self.session, self.request)
        self.started: dict[str, list[psutil.Process]] = {}
        self.session.ready_file.touch()
        self.progress = Progress(self.session.run_dir, interval_s=0)

    def add(self, name: str, *scripts: str, **keys) -> None:
        """A part that runs the scripts one after another, the last again and again."""
        started = self.started.setdefault(name, [])
        log = self.folder / f"{name}.log"

        def start():
            script = scripts[min(len(started), len(scripts) - 1)]
            member = next(iter(keys.get("members", ())), name)
            child = spawn(name, [sys.executable, "-c", textwrap.dedent(script), str(self.folder), member], log, {})
            started.append(psutil.Process(child.process.pid))
            return child

        self.supervisor.start(Part(name, start, **keys))

    def add_main(self, *members: str, **keys) -> None:
        script = "import sys, time, os\nwhile not os.path.exists(sys.argv[1] + '/end'): time.sleep(0.02)"
        self.add("trainer", script, members=members or ("trainer-0",), **keys)

    def end(self, **outcome) -> None:
        if read_outcome(self.session.folder, "trainer-0") is None:
            write_outcome(self.session, "trainer-0", Outcome(**{"finished": True, **outcome}))
        (self.folder / "end").touch()

    def watch(self, *events) -> Outcome:
        """Watch while a thread runs `events`, each once its condition holds: (condition, action), ...; then `end`."""
        failed = []

        def play():
            try:
                for condition, action in events:
                    wait_for(condition)
                    action()
                self.end()
            except BaseException as error:
                failed.append(error)
                raise

        thread = threading.Thread(target=play)
        thread.start()
        try:
            return self.supervisor.watch()
        finally:
            thread.join()
            assert not failed

    def has(self, name: str, count: int):
        """Whether so many processes of a part have been started and the newest says that it beats."""

        def check():
            log = self.folder / f"{name}.log"
            return len(self.started[name]) == count and log.exists() and log.read_text().count("beating") == count

        return check

    def send(self, name: str, number: int):
        return lambda: self.started[name][-1].send_signal(number)


def wait_for(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "LOOK_S", 0.2)
    monkeypatch.setattr(supervise, "AT_ITS_END_S", 0.5)
    stages = []

    def make(**run):
        stages.append(Stage(tmp_path, **run))
        return stages[-1]

    yield make
    for one in stages:
        one.supervisor.stop()
        left = [p for processes in one.started.values() for p in processes if p.is_running()]
        assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []


def test_one_of_several_that_may_not_be_started_again_is_given_up_and_the_last_of_them_ends_the_run(stage, capsys):
    s = stage(max_restarts=1)
    for index in range(2):
        s.add(f"engine {index}", BEATS, key=f"engine-{index}", kind="engine", explain_end=lambda: "its log")
    s.add_main()

    def kill(index, count):
        return s.has(f"engine {index}", count), s.send(f"engine {index}", signal.SIGKILL)

    def said():
        return "engine 0 is given up" in capsys.readouterr().err

    def gone():
        return len(s.started["engine 1"]) == 2 and not alive(s.started["engine 1"][-1])

    with pytest.raises(EngineError, match=r"the engine 1 failed, after 1 restart.*exit code -9.*its log"):
        s.watch(kill(0, 1), kill(0, 2), (said, lambda: None), kill(1, 1), kill(1, 2), (gone, lambda: time.sleep(2)))
    assert len(s.started["engine 0"]) == 2, "what is given up was started again"
    assert [s.session.given_up_file(f"engine-{index}").exists() for index in range(2)] == [True, False]


def test_what_dies_or_hangs_is_started_again_and_counted(stage, capsys):
    s = stage()
    s.add("engine server", BEATS, key="engine")
    s.add("producer", BEATS, key="producer", members=("producer",))
    s.add_main()
    began = time.monotonic()
    outcome = s.watch(
        (s.has("engine server", 1), s.send("engine server", signal.SIGKILL)),
        (s.has("engine server", 2), lambda: None),
        (s.has("producer", 1), s.send("producer", signal.SIGSTOP)),
        (s.has("producer", 2), s.send("producer", signal.SIGKILL)),
        (s.has("producer", 3), lambda: None),
    )
    assert outcome.finished
    assert s.supervisor.num_restarts == {"engine": 1, "producer": 2}
    assert not any(process.is_running() for process in s.started["producer"][:-1])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3, lines
    assert lines[0].startswith("starting the engine server again (1 of run.max_restarts=2): it ended with exit code -9")
    assert lines[1].startswith(
        "starting the producer again (1 of run.max_restarts=2): it has shown no sign of life for"
    )
    assert "run.hang_timeout_s=0.8" in lines[1]
    assert "(2 of run.max_restarts=2)" in lines[2]
    assert time.monotonic() - began < 15


def test_a_request_is_answered_once_and_one_about_the_former_process_is_not(stage, capsys):
    s = stage()
    s.add("engine server", BEATS, key="engine")
    s.add_main()

    def ask():
        request_restart(s.session.folder, "engine", "the engine server did not answer for 9 s")
        assert not list(s.folder.glob("restart-*.*")), "half a request could be read"

    def die_and_ask():
        # Both at once: the request is about the process that died.
        s.send("engine server", signal.SIGKILL)()
        ask()

    s.watch(
        (s.has("engine server", 1), ask),
        (s.has("engine server", 2), die_and_ask),
        (s.has("engine server", 3), lambda: time.sleep(0.5)),
    )
    assert len(s.started["engine server"]) == 3
    first = capsys.readouterr().err.splitlines()[0]
    assert first.endswith("(1 of run.max_restarts=2): the engine server did not answer for 9 s")
    assert take_restart_request(s.session.folder, "engine") is None


def test_a_step_between_starts_the_count_anew(stage):
    s = stage(max_restarts=1)
    s.add("engine server", BEATS, key="engine")
    s.add_main()

    def step_and_kill(step):
        def act():
            s.progress.update("train", step=step)
            time.sleep(0.8)  # longer than the supervisor's look takes to come
            s.send("engine server", signal.SIGKILL)()

        return act

    s.watch(
        *[(s.has("engine server", n), step_and_kill(n)) for n in (1, 2, 3)], (s.has("engine server", 4), lambda: None)
    )
    assert s.supervisor.num_restarts == {"engine": 3}


def test_past_the_limit_the_end_is_explained(stage):
    s = stage(max_restarts=2)
    s.add("engine server", BEATS, "raise SystemExit(7)", key="engine", explain_end=lambda: "its log says: no such card")
    s.add_main()
    with pytest.raises(EngineError) as caught:
        s.watch(
            (s.has("engine server", 1), s.send("engine server", signal.SIGKILL)), (died(s, 3), lambda: time.sleep(2))
        )
    for words in ("the engine server failed", "after 2 restart(s)", "exit code 7", "its log says: no such card"):
        assert words in str(caught.value)
    assert len(s.started["engine server"]) == 3


def died(s, count):
    return lambda: len(s.started["engine server"]) == count and not alive(s.started["engine server"][-1])


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("ready", [True, False])
def test_without_restarts_or_before_the_start_a_death_ends_the_run(stage, ready):
    s = stage(max_restarts=0 if ready else 3)
    if not ready:
        s.session.ready_file.unlink()
    s.add("producer", "print('cannot open the licence'); raise SystemExit(5)", key="producer", members=("producer",))
    s.add_main()
    with pytest.raises(
        FastreasonError, match=r"(?s)the producer failed: it ended with exit code 5; .*cannot open the licence"
    ):
        s.supervisor.watch()
    assert len(s.started["producer"]) == 1
    s.end()


def test_a_part_that_says_why_it_ended_is_not_started_again(stage):
    s = stage()
    s.add("producer", "raise SystemExit(1)", key="producer", members=("producer",))
    s.add_main()
    write_outcome(s.session, "producer", Outcome(finished=False, error="the reward math cannot be loaded"))
    with pytest.raises(FastreasonError, match="the reward math cannot be loaded"):
        s.supervisor.watch()
    assert len(s.started["producer"]) == 1
    s.end()


def test_a_part_that_is_done_is_left_in_peace(stage):
    s = stage()
    s.add("producer", "raise SystemExit(0)", key="producer", members=("producer",))
    s.add_main()
    write_outcome(s.session, "producer", Outcome(finished=True))
    assert s.watch((lambda: not alive(s.started["producer"][0]), lambda: time.sleep(0.5))).finished
    assert s.supervisor.num_restarts == {"producer": 0}


def test_a_rank_that_hangs_is_named(stage):
    s = stage()
    s.add("trainer", BEATS, members=("trainer-1", "trainer-0"))
    with pytest.raises(
        StuckError, match=r"(?s)trainer rank 1 hangs: it has shown no sign of life .*timeout_s=0\.8.*log"
    ):
        s.watch((s.has("trainer", 1), s.send("trainer", signal.SIGSTOP)))


def test_ranks_that_said_how_they_ended_are_not_waited_for(stage):
    s = stage()
    s.add("trainer", BEATS, members=("trainer-0",))

    def leave():
        write_outcome(s.session, "trainer-0", Outcome(finished=True, step=3))
        s.send("trainer", signal.SIGSTOP)()

    assert s.watch((s.has("trainer", 1), leave)).step == 3


def test_the_rank_that_was_killed_is_named_not_those_that_lost_it(stage):
    s = stage()
    log = "E0101 12:00:00.000000 7 torch/x.py:9] failed (exitcode: -9) local_rank: 1 (pid: 8) of binary: /bin/python"
    s.add("trainer", f"print({log!r}); raise SystemExit(1)", members=("trainer-0", "trainer-1"))
    write_outcome(s.session, "trainer-0", Outcome(finished=False, error="Connection closed by peer", expected=False))
    with pytest.raises(
        FastreasonError, match=r"trainer rank 1 was ended by signal 9 \(SIGKILL\) \(killed: most likely"
    ):
        s.supervisor.watch()
    # With an outcome of its own, that is what is told.
    write_outcome(s.session, "trainer-1", Outcome(finished=False, error="no space left", expected=True))
    with pytest.raises(FastreasonError, match="the trainer failed: Connection closed by peer"):
        s.supervisor.watch()


def test_another_machine_that_failed_ends_the_run_but_for_what_happened_here(stage, monkeypatch):
    monkeypatch.setattr(supervise, "LAST_WORDS_S", 1.0)
    s = stage()

    def lost():
        raise NodeError("node 1 has failed: no space left")

    s.supervisor.hear = lost
    s.add_main()
    with pytest.raises(NodeError, match="node 1 has failed: no space left"):
        s.supervisor.watch()
    # The ranks here end a moment later, and one of them was killed: that is the reason.
    log = "failed (exitcode: -9) local_rank: 1 (pid: 8) of binary: /bin/python"
    s.add(
        "trainer",
        f"import time; time.sleep(0.8); print({log!r}); raise SystemExit(1)",
        members=("trainer-2", "trainer-3"),
    )
    with pytest.raises(FastreasonError, match="trainer rank 3 was ended by signal 9"):
        s.supervisor.watch()


def test_the_first_rank_to_die_is_read_from_this_starts_log(tmp_path):
    log = tmp_path / "log"
    assert killed_rank(log) is None
    line = "failed (exitcode: -{}) local_rank: {} (pid: 8) of binary: /bin/python\n"
    log.write_text(line.format(15, 0))
    start = log.stat().st_size
    assert killed_rank(log, start) is None
    log.write_text(line.format(15, 0) + line.format(9, 2))
    assert killed_rank(log, start) == (2, 9) and killed_rank(log) == (0, 15)
    # One that lost it was seen first: both are listed behind.
    rows = "".join(
        f"[{rank}]:\n  time      : today\n  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: 8)\n"
        for rank, code in ((0, -15), (1, -9), (2, 1))
    )
    log.write_text(f"failed (exitcode: 1) local_rank: 2 (pid: 8) of binary: /bin/python\nFailures:\n{rows}")
    assert killed_rank(log) == (1, 9)
    log.write_text("failed (exitcode: 1) local_rank: 0 (pid: 8) of binary: /bin/python\n")
    assert killed_rank(log) is None


def test_a_trainer_that_only_lost_its_peer_is_not_to_blame(stage):
    s = stage(max_restarts=0)
    s.add("producer", "import time; time.sleep(0.6); print('bus error'); raise SystemExit(135)", key="producer",
          members=("producer",), lost_signs=("the producer ended while",))  # fmt: skip
    s.add("trainer", "raise SystemExit(1)", members=("trainer-0",))
    write_outcome(s.session, "trainer-0", Outcome(finished=False, error="the producer ended while generating"))
    with pytest.raises(FastreasonError, match=r"(?s)the producer failed: it ended with exit code 135; .*bus error"):
        s.supervisor.watch()


def test_asked_to_stop_it_waits_for_the_trainer_and_not_for_ever(stage, capsys):
    s = stage(timeout_s=0.5)
    s.add_main()
    s.request(signal.SIGTERM, None)

    def stop_in_time():
        assert s.session.stop_file.exists()
        s.end(finished=False, step=4)

    events = threading.Thread(target=lambda: (wait_for(s.session.stop_file.exists), stop_in_time()))
    events.start()
    assert s.supervisor.watch() == Outcome(finished=False, step=4)
    events.join()
    (s.folder / "end").unlink()
    s.add_main()
    with pytest.raises(StuckError, match=r"the trainer did not stop within run\.timeout_s=0\.5 s"):
        s.supervisor.watch()
    s.request(signal.SIGTERM, None)
    assert s.supervisor.watch() == Outcome(finished=False)
    assert "once more to stop now" in capsys.readouterr().err


def test_what_the_processes_share_is_listed_for_the_next_run(stage):
    s = stage()
    segment = "from multiprocessing import shared_memory as s; m = s.SharedMemory(create=True, size=64);"
    s.add("engine server", f"{segment} print('beating', flush=True); import time; time.sleep(60)", key="engine")
    s.add_main()

    def listed():
        return s.session.segments_file.exists() and "/dev/shm/psm_" in s.session.segments_file.read_text()

    s.watch((listed, s.send("engine server", signal.SIGKILL)), (s.has("engine server", 2), lambda: None))
    s.supervisor.stop()
    assert not [path for path in s.session.segments_file.read_text().split() if os.path.exists(path)]


def test_a_part_that_rests_is_seen_to_when_it_is_needed_again(tmp_path):
    """Dead, and asked to be started again: nothing is started, and nothing given up, while another has its memory."""
    stage = Stage(tmp_path)
    resting = tmp_path / "resting"
    resting.touch()
    stage.add("engine", LIVES, key="engine", resting=resting.exists)
    stage.add_main()
    stage.started["engine"][0].kill()
    waited, seen = time.monotonic() + 1.0, set()

    def still_one():
        seen.add(len(stage.started["engine"]))
        return time.monotonic() > waited

    stage.watch((still_one, resting.unlink), (lambda: len(stage.started["engine"]) == 2, lambda: None))
    assert seen == {1} and stage.supervisor.num_restarts == {"engine": 1}
    stage.supervisor.stop()
