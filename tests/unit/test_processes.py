"""No process outlives the run: not a grandchild, not one that ignores SIGTERM, not after the parent is killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from fastreason.processes import remove_segments, spawn, tail

pytestmark = pytest.mark.timeout(400)


def wait_for(condition, what, limit_s=15.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_pids(path, count):
    """The pids that a script's processes wrote, one a line."""
    wait_for(lambda: path.exists() and len(path.read_text().split()) == count, "the processes did not start")
    return [int(pid) for pid in path.read_text().split()]


SLEEPER = "import os, time; open({path!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(300)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER


def family_script(path, sleeper=SLEEPER):
    """A process with a child in its group, a grandchild, and a child in a session of its own."""
    return textwrap.dedent(
        f"""
        import subprocess, sys, time
        sleeper = {sleeper.format(path=path)!r}
        nested = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', " + repr(sleeper) + "]);" + sleeper
        subprocess.Popen([sys.executable, "-c", nested])
        subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
        exec(sleeper)
        """
    )


@pytest.mark.parametrize("sleeper", [SLEEPER, STUBBORN], ids=["willing", "stubborn"])
def test_a_child_is_ended_with_all_that_it_started(tmp_path, sleeper):
    path = tmp_path / "pids"
    child = spawn("family", [sys.executable, "-c", family_script(str(path), sleeper)], tmp_path / "log", {})
    pids = read_pids(path, 4)
    assert child.exit_code is None and all(map(alive, pids))
    child.stop(grace_s=0.5)
    assert child.exit_code is not None
    wait_for(lambda: not any(map(alive, pids)), "a process of the family lives on")


def test_stopping_twice_or_after_the_end_is_fine(tmp_path):
    child = spawn("brief", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", {})
    child.process.wait(timeout=20)
    child.stop()
    child.stop()
    assert child.exit_code == 3


@pytest.mark.parametrize("stopped", [False, True])
def test_a_willing_child_is_given_the_time_to_end_by_itself(tmp_path, stopped):
    code = """
import signal, sys, time
def end(*_):
    time.sleep(0.3); print("saved", flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(300)
"""
    child = spawn("saver", [sys.executable, "-c", code], tmp_path / "log", {})
    wait_for(lambda: "ready" in child.log_path.read_text(), "it did not start")
    if stopped:
        os.kill(child.process.pid, signal.SIGSTOP)
    child.stop(grace_s=10.0)
    assert child.exit_code == 0 and "saved" in child.log_path.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked to end a process with its parent")
def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    """kill -9 leaves the parent no chance to clean up."""
    path = tmp_path / "pids"
    parent_code = f"""
import time
from pathlib import Path
from fastreason.processes import spawn
import sys
spawn("child", [sys.executable, "-c", {SLEEPER.format(path=str(path))!r}], Path({str(tmp_path)!r}) / "log", {{}})
time.sleep(300)
"""
    parent = subprocess.Popen([sys.executable, "-P", "-c", parent_code])
    try:
        (pid,) = read_pids(path, 1)
        assert psutil.Process(pid).ppid() == parent.pid and alive(pid)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(timeout=10)
        wait_for(lambda: not alive(pid), "the child lives on without its parent")
    finally:
        parent.kill()
        parent.wait()


def test_a_child_gets_our_environment_and_more_and_a_safe_path(tmp_path, monkeypatch):
    monkeypatch.setenv("FROM_THE_PARENT", "1")
    code = (
        "import os, sys; print(os.environ['FROM_THE_PARENT'], os.environ['ADDED'], "
        "sys.flags.safe_path, os.getsid(0) == os.getpid())"
    )
    child = spawn("child", [sys.executable, "-c", code], tmp_path / "logs" / "child.log", {"ADDED": "2"})
    child.process.wait(timeout=20)
    assert child.log_path.read_text().split() == ["1", "2", "True", "True"]


def test_a_log_is_appended_to_and_holds_both_streams(tmp_path):
    for number in range(2):
        code = f"import sys; print('out {number}', flush=True); print('err {number}', file=sys.stderr)"
        child = spawn("child", [sys.executable, "-c", code], tmp_path / "log", {})
        child.process.wait(timeout=20)
    assert (tmp_path / "log").read_text().split("\n") == ["out 0", "err 0", "out 1", "err 1", ""]


def test_the_tail_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert tail(log) == "  (no log)"
    log.touch()
    assert tail(log) == "  (the log is empty)"
    log.write_bytes(b"one\ntwo\n" + b"x" * 400 + b"\n\xff\n")
    assert tail(log, 3) == "  | two\n  | " + "x" * 300 + "\n  | \N{REPLACEMENT CHARACTER}"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory here")
@pytest.mark.parametrize("killed_before", [False, True])
def test_shared_memory_of_a_killed_process_is_removed(tmp_path, killed_before):
    code = (
        "import signal, time; from multiprocessing import resource_tracker, shared_memory as s; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "m = s.SharedMemory(create=True, size=64); resource_tracker.unregister(m._name, 'shared_memory'); "
        "print(m.name, flush=True); time.sleep(60)"
    )
    child = spawn("holder", [sys.executable, "-c", code], tmp_path / "log", {})
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "log").read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        segment = Path("/dev/shm") / (tmp_path / "log").read_text().strip()
        assert segment.exists()
        if killed_before:
            child.note_family()
            child.process.kill()
            child.process.wait()
            assert segment.exists()
    finally:
        child.stop(grace_s=0.2)
    assert not segment.exists()


def test_only_shared_memory_of_ours_is_removed(tmp_path):
    mine = tmp_path / "psm_1234"
    mine.touch()
    remove_segments([mine, Path("/dev/shm/../tmp/psm_1"), Path("/dev/shm/no-segment"), Path("/dev/shm/psm_not_there")])
    assert mine.exists()


def test_a_stopped_child_is_ended_at_once(tmp_path):
    path = tmp_path / "pids"
    child = spawn("family", [sys.executable, "-c", family_script(str(path), STUBBORN)], tmp_path / "log", {})
    pids = read_pids(path, 4)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    child.stop(grace_s=0.0)
    wait_for(lambda: not any(map(alive, pids)), "a stopped process lives on")


def test_what_a_killed_child_has_started_is_found(tmp_path):
    """Its descendants in sessions of their own are nobody's children by then."""
    path = tmp_path / "pids"
    child = spawn("family", [sys.executable, "-c", family_script(str(path))], tmp_path / "log", {})
    pids = read_pids(path, 4)
    child.note_family()
    child.process.kill()
    child.process.wait()
    assert sum(map(alive, pids)) == 3
    child.stop(grace_s=0.0)
    wait_for(lambda: not any(map(alive, pids)), "an orphan lives on")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be assigned here")
def test_a_child_runs_on_the_cores_that_it_is_given_and_so_do_its_own(tmp_path):
    core = max(os.sched_getaffinity(0))
    code = "import os, subprocess, sys; print(sorted(os.sched_getaffinity(0)), flush=True); "
    nested = code + "subprocess.run([sys.executable, '-c', " + repr(code) + "])"
    for cores, expected in (([core], [core]), (None, sorted(os.sched_getaffinity(0)))):
        log = tmp_path / f"log-{cores}"
        spawn("child", [sys.executable, "-c", nested], log, {}, cores).process.wait(timeout=20)
        assert log.read_text().splitlines() == [str(expected)] * 2
