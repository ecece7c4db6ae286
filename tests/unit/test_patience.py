"""Waiting counts only while the waiting process runs, and a beat grows old only then."""

import asyncio
import time

import pytest

from fastreason import beats
from fastreason.beats import Beat, BeatWatch, age_s, forget_beat
from fastreason.patience import LONGEST_LOOK_S, Patience


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_patience_counts_what_passes_between_looks():
    clock = Clock()
    patience = Patience(3.0, clock)
    for _ in range(5):
        clock.now += 0.5
        assert patience.look() == 0.5
    assert patience.spent_s == 2.5 and not patience.exhausted
    clock.now += 0.5
    patience.look()
    assert patience.exhausted
    patience.renew()
    assert patience.spent_s == 0 and not patience.exhausted


def test_patience_does_not_count_the_time_in_which_we_were_stopped():
    clock = Clock()
    patience = Patience(3.0, clock)
    clock.now += 3600
    assert patience.look() == LONGEST_LOOK_S
    assert patience.spent_s == LONGEST_LOOK_S and not patience.exhausted


@pytest.fixture
def clock(monkeypatch):
    """Time as `fastreason.beats` and what it uses see it."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(Patience.__init__, "__defaults__", (clock,))
    return clock


def test_a_beat_has_an_age(tmp_path, clock):
    assert age_s(tmp_path, "producer") is None
    beat = Beat(tmp_path, "producer")
    assert age_s(tmp_path, "producer") is None, "it has not beaten yet"
    beat._write()
    clock.now += 4
    assert age_s(tmp_path, "producer") == 4
    beat._write()
    assert age_s(tmp_path, "producer") == 0
    forget_beat(tmp_path, "producer")
    forget_beat(tmp_path, "producer")
    assert age_s(tmp_path, "producer") is None


def test_a_watch_sees_silence_but_not_before_the_first_beat(tmp_path, clock):
    watch = BeatWatch(tmp_path, "trainer-0", 3.0)
    for _ in range(20):
        clock.now += 1
        assert not watch.look()
    beat = Beat(tmp_path, "trainer-0")
    for _ in range(5):
        beat._write()
        clock.now += 2
        assert not watch.look()
    clock.now += 1
    assert not watch.look(), "the last beat was seen 1 s ago"
    clock.now += 2
    assert watch.look() and watch.silent_s == 3
    beat._write()
    assert not watch.look(), "it lives again"


def test_a_watcher_that_was_stopped_finds_nobody_silent(tmp_path, clock):
    watch = BeatWatch(tmp_path, "trainer-0", 3.0)
    Beat(tmp_path, "trainer-0")._write()
    assert not watch.look()
    clock.now += 3600
    assert not watch.look()


def test_a_thread_and_a_loop_beat(tmp_path):
    def value(name):
        return beats._read(tmp_path, name)

    def changes(name):
        before, deadline = value(name), time.monotonic() + 10
        while value(name) == before:
            assert time.monotonic() < deadline, f"{name} does not beat"
            time.sleep(0.01)

    Beat(tmp_path, "thread", interval_s=0.02).in_thread()
    changes("thread")
    changes("thread")

    async def run() -> None:
        task = asyncio.create_task(Beat(tmp_path, "loop", interval_s=0.02).in_loop())
        for _ in range(2):
            before = value("loop")
            async with asyncio.timeout(10):
                while value("loop") == before:
                    await asyncio.sleep(0.01)
        before = value("loop")
        time.sleep(0.2)
        assert value("loop") == before, "a loop that does not turn must not beat"
        task.cancel()

    asyncio.run(run())
