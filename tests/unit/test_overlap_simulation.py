"""bench/overlap.py --simulate: the scheduler in virtual time keeps its bound, and where it is broken the rows say so."""

import asyncio
import importlib
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from fastreason.errors import EngineError, StuckError
from fastreason.rollout import books

FOLDER = Path(__file__).resolve().parents[2] / "bench"
STEPS = 50  # the first step, which nothing can overlap, is up to 2 % of that

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def simulation():
    """The bench's modules, found as the command finds them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("overlap_simulation")
    finally:
        sys.path[:] = [entry for entry in sys.path if entry != str(FOLDER)]


@pytest.fixture(scope="module")
def clock(simulation):
    return importlib.import_module("overlap_clock")


class OneBatchAtATime(books.Admission):
    """Admits as if S were 0."""

    def may_issue(self) -> bool:
        ahead = self.num_taken + self.num_finished + self.num_running - self.version * self._batch_size
        return super().may_issue() and ahead < self._batch_size


class OneBatchTooMany(books.Admission):
    """Admits as if S were one more."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.late = settings["max_staleness"]

    def may_issue(self) -> bool:
        self._max_staleness = self.late + 1
        try:
            return super().may_issue()
        finally:
            self._max_staleness = self.late


@pytest.mark.parametrize("cost", ["constant", "proportional"])
@pytest.mark.parametrize(("ratio", "staleness"), [(0.5, 1), (2.0, 1), (2.0, 2)])
def test_the_longer_of_the_two_is_all_that_a_step_takes(simulation, ratio, staleness, cost):
    row = simulation.measure(simulation.Case(ratio, staleness, cost, steps=STEPS))
    assert row["ok"] and row["T_async_s"] <= 1.02 * (max(row["g_s"], row["t_s"]) + row["s_s"]), row
    assert (row["g_s"], row["t_s"], row["s_s"]) == pytest.approx((10 * ratio, 10, 1.0))
    assert row["T_sync_s"] == pytest.approx(row["g_s"] + row["t_s"] + row["s_s"]), "S = 0 overlapped something"
    assert 1 <= row["staleness_max"] <= staleness
    assert row["efficiency"] == pytest.approx(
        (row["g_s"] + row["t_s"] - row["T_async_s"]) / min(row["g_s"], row["t_s"])
    )


def test_writing_the_weights_disappears_behind_generation(simulation):
    """Where generation is the longer, of a publication only the load is in its way."""
    case = simulation.Case(2.0, 1, steps=STEPS, write_s=4.0, load_s=0.5)
    lines = simulation.simulate(case)
    assert simulation.mean(lines[2:-1], "time/step_s") == pytest.approx(20.5, rel=0.02)


def test_long_tails(simulation):
    row = simulation.measure(simulation.Case(2.0, 1, lengths="lognormal", steps=30))
    assert row["ok"], row
    assert row["T_sync_s"] == pytest.approx(31.0)
    assert row["T_async_s"] < 0.9 * row["bound_s"], "the places of short responses were not filled"


def test_the_same_run_twice_is_the_same(simulation):
    case = simulation.Case(1.0, 2, lengths="lognormal", steps=12)

    def seconds():
        return [line["time/step_s"] for line in simulation.simulate(case)]

    assert seconds() == seconds()


def test_a_scheduler_that_does_not_overlap_fails(simulation):
    case = simulation.Case(1.0, 1, steps=STEPS)
    with patch.object(books, "Admission", OneBatchAtATime):
        row = simulation.measure(case)
    assert not row["ok"] and row["T_async_s"] == pytest.approx(21.0)


def test_a_scheduler_that_admits_too_much_fails(simulation):
    """The old groups do not fit into the batches any more: it waits too long, or trips over its own assertion."""
    with (
        patch.object(books, "Admission", OneBatchTooMany),
        pytest.raises((StuckError, EngineError)),
    ):
        simulation.simulate(simulation.Case(1.0, 1, steps=5))


def test_the_command_writes_its_rows_and_fails_with_them(simulation, tmp_path, capsys):
    overlap = importlib.import_module("overlap")
    file = tmp_path / "rows.json"
    cases = [simulation.Case(0.5, 1, steps=STEPS), simulation.Case(4.0, 1, steps=STEPS)]
    with patch.object(overlap, "simulated_cases", lambda steps, tails: cases):
        assert overlap.main(["--simulate", "--json", str(file)]) == 0
        with patch.object(books, "Admission", OneBatchAtATime):
            assert overlap.main(["--simulate", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())
    assert [(row["ratio"], row["S"], row["ok"]) for row in rows] == [(0.5, 1, False), (4.0, 1, False)]
    assert {"g_s", "t_s", "s_s", "T_async_s", "efficiency", "staleness_max"} <= set(rows[0])
    assert "0 of 2 rows" in capsys.readouterr().out


def test_every_ratio_and_staleness_of_the_claim_has_a_row(simulation):
    cases = importlib.import_module("overlap").simulated_cases(200, tails=False)
    for cost in ("constant", "proportional"):
        fixed = {(case.ratio, case.staleness) for case in cases if case.cost == cost and case.lengths == "fixed"}
        assert fixed == {(ratio, staleness) for ratio in (0.25, 0.5, 1, 2, 4) for staleness in (1, 2)}
    assert {case.staleness for case in cases if case.lengths == "lognormal"} == {1, 2}
    assert {case.steps for case in cases} == {200}


# The real runs: what is made of their lines


@pytest.fixture(scope="module")
def real(simulation):
    return importlib.import_module("overlap_real")


def lines(tokens=2000.0, staleness=0, **seconds):
    """Four or six steps, of which those that do not count are far off."""
    count = 6 if staleness else 4
    counted = range(count)[slice(2, -1) if staleness else slice(1, None)]
    return [
        {f"time/{name}_s": value + 0.1 * (number % 2) if number in counted else 99.0 for name, value in seconds.items()}
        | {"rollout/tokens": tokens, "rollout/staleness_max": float(staleness)}
        for number in range(count)
    ]


SYNC = {"generate": 13.0, "train": 11.0, "publish": 1.0, "step": 25.0}
AHEAD = {"generate": 14.0, "train": 11.5, "publish": 1.0, "step": 14.5, "pause": 0.5}


def test_a_row_is_made_of_the_medians_of_the_steps_that_count(real):
    row = real.row_of(lines(**SYNC), lines(staleness=1, **AHEAD))
    assert (row["g_s"], row["t_s"], row["s_s"]) == pytest.approx((13.1, 11.1, 1.1))
    assert (row["T_async_s"], row["g_loaded_s"], row["t_loaded_s"]) == pytest.approx((14.5, 14.0, 11.5))
    assert row["efficiency"] == pytest.approx((13.1 + 11.1 - 14.5) / 11.1)
    assert row["staleness_max"] == 1 and row["tokens"] == [2000, 2000]


def test_the_summary_is_the_median_and_the_spread(real):
    rows = [real.row_of(lines(**SYNC), lines(staleness=1, **{**AHEAD, "step": step})) for step in (14.0, 14.5, 20.0)]
    total = real.summarise(rows)
    assert total["efficiency"] == rows[1]["efficiency"] and total["faults"] == []
    assert (total["efficiency_min"], total["efficiency_max"]) == (rows[2]["efficiency"], rows[0]["efficiency"])


@pytest.mark.parametrize(
    ("sync", "ahead", "fault"),
    [
        (SYNC, {**AHEAD, "step": 16.0}, "efficiency 0.7"),
        ({**SYNC, "generate": 15.0}, AHEAD, "further apart than 1.3x"),
        ({**SYNC, "train": 9.5, "generate": 10.0}, {**AHEAD, "step": 11.0}, "9.6 s < 10 s"),
        (SYNC, {**AHEAD, "staleness": 2}, "staleness 2 > 1"),
        (SYNC, {**AHEAD, "tokens": 2100.0}, "tokens a step are not alike"),
    ],
)
def test_what_is_not_reached_is_said(real, sync, ahead, fault):
    total = real.summarise([real.row_of(lines(**sync), lines(**{"staleness": 1, **ahead}))])
    assert len(total["faults"]) == 1 and fault in total["faults"][0]


# Virtual time


def test_time_passes_only_where_both_sides_wait(clock):
    """A thread that sleeps 1 s and a loop that sleeps 0.4 s at a time, without either sleeping for real."""
    virtual, seen = clock.VirtualTime(), []

    async def serve():
        for _ in range(5):
            await asyncio.sleep(0.4)
            seen.append(("loop", round(time.perf_counter(), 9)))

    def body():
        for _ in range(2):
            virtual.sleep(1.0)
            seen.append(("thread", round(time.monotonic(), 9)))

    started = time.perf_counter()
    virtual.run(serve, body)
    assert time.perf_counter() - started < 5
    assert seen[:4] == [("loop", 0.4), ("loop", 0.8), ("thread", 1.0), ("loop", 1.2)]
    assert sorted(at for _, at in seen) == [0.4, 0.8, 1.0, 1.2, 1.6, 2.0, 2.0]


def test_waiting_for_each_other_is_an_error(clock):
    virtual = clock.VirtualTime()

    async def serve():
        await asyncio.Event().wait()

    with pytest.raises(clock.SimulationStuckError, match=r"1\.000 s"):
        virtual.run(serve, lambda: virtual.sleep(1.0))


def test_an_error_of_the_thread_comes_out(clock):
    virtual = clock.VirtualTime()

    async def serve():
        await asyncio.Event().wait()

    def body():
        virtual.sleep(1.0)
        raise ValueError("in the thread")

    with pytest.raises(ValueError, match="in the thread"):
        virtual.run(serve, body)
