"""Learning rates by hand."""

import math

import pytest

from fastreason.update.schedule import SCHEDULES, learning_rate


def rates(schedule, num_updates, warmup):
    return [learning_rate(8.0, schedule, update, num_updates, warmup) for update in range(num_updates)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [8, 8, 8, 8]),
        ("constant", 1, [4, 8, 8, 8]),
        ("constant", 3, [2, 4, 6, 8]),
        ("linear", 0, [8, 6, 4, 2]),
        ("linear", 2, [8 / 3, 16 / 3, 8, 4]),
        ("cosine", 0, [8, 4 * (1 + math.sqrt(0.5)), 4, 4 * (1 - math.sqrt(0.5))]),
        ("cosine", 2, [8 / 3, 16 / 3, 8, 4]),
    ],
)
def test_rates(schedule, warmup, expected):
    assert rates(schedule, 4, warmup) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 5, 10])
def test_every_update_moves_and_none_more_than_the_peak(schedule, warmup):
    values = rates(schedule, 10, warmup)
    assert all(0 < value <= 8 for value in values)
    assert values == sorted(values[:warmup]) + sorted(values[warmup:], reverse=True)


@pytest.mark.parametrize(("schedule", "end"), [("constant", 8.0), ("linear", 0.0), ("cosine", 0.0)])
def test_a_run_that_goes_on_past_its_end_stays_there(schedule, end):
    assert [learning_rate(8.0, schedule, update, 4, 0) for update in (4, 9)] == pytest.approx([end, end])


def test_an_unknown_schedule_is_a_bug():
    with pytest.raises(KeyError):
        learning_rate(1.0, "step", 0, 4, 0)
