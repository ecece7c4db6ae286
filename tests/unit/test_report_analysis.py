"""What a comparison says, against tables worked out by hand."""

import math

import numpy as np
import pytest
from evaluation_folders import BASE, TRAINED, row

from fastreason.evaluation.rows import EvalSample
from fastreason.report.analysis import (
    Bin,
    agreement,
    answer_entropy,
    bin_changes,
    by_bin,
    count_reflection,
    disagreement_reason,
    habits,
    habits_by_difficulty,
    row_shares,
    success_bins,
    transitions,
)

BASE_COUNTS, TRAINED_COUNTS = list(BASE.values()), list(TRAINED.values())


def samples(id: str, right: int, n: int = 4) -> list[EvalSample]:
    return [EvalSample(**row(id, sample, sample < right)) for sample in range(n)]


@pytest.mark.parametrize(
    ("n", "labels"),
    [
        (256, ["0", "1-4", "5-16", "17-32", "33-64", "65-128", "129-192", "193-256"]),
        (64, ["0", "1", "2-4", "5-8", "9-16", "17-32", "33-48", "49-64"]),
        (16, ["0", "1", "2", "3-4", "5-8", "9-12", "13-16"]),
        (4, ["0", "1", "2", "3", "4"]),
        (1, ["0", "1"]),
    ],
)
def test_bins_are_the_papers_and_cover_every_count_once(n: int, labels: list[str]) -> None:
    bins = success_bins(n)
    assert [one.label for one in bins] == labels
    for count in range(n + 1):
        assert sum(count in one for one in bins) == 1, count


def test_mean_change_in_each_bin_by_hand() -> None:
    # Bin 0 holds p1 (0 -> 2 of 4) and p10 (0 -> 0): mean +0.25, std of (0.5, 0) is 0.3536, over sqrt(2) 0.25.
    zero, one, two, three, four = bin_changes(BASE_COUNTS, TRAINED_COUNTS, 4)
    assert (zero.bin, zero.num_problems, zero.before, zero.after) == (Bin(0, 0), 2, 0.0, 0.25)
    assert (zero.change, zero.error) == (pytest.approx(0.25), pytest.approx(0.25))
    assert (one.num_problems, one.before, one.after, one.change, one.error) == (1, 0.25, 1.0, 0.75, None)
    assert (two.change, four.change) == (-0.25, 0.0)
    assert (three.num_problems, three.before, three.change) == (0, None, None)


def test_the_transition_matrix_by_hand() -> None:
    counts_BB = transitions(BASE_COUNTS, TRAINED_COUNTS, 4)
    expected = np.zeros((5, 5), dtype=int)
    expected[0, 0] = expected[0, 2] = expected[1, 4] = expected[2, 1] = expected[4, 4] = 1
    assert (counts_BB == expected).all()
    shares_BB = row_shares(counts_BB)
    assert shares_BB[0].tolist() == [0.5, 0, 0.5, 0, 0] and shares_BB[3].tolist() == [0] * 5


def test_answer_entropy_by_hand() -> None:
    classes = {"p2": {"5": 1, "5.0": 1, "6": 2}}
    # One right, then 6, 5, 6: shares 1/4, 1/2, 1/4.
    assert answer_entropy(samples("p2", 1), classes) == pytest.approx(1.5 * math.log(2))
    assert answer_entropy(samples("p2", 4), classes) == 0.0
    # p1: 5, nothing, 5, nothing.
    assert answer_entropy(samples("p1", 0), {}) == pytest.approx(math.log(2))
    # Equal answers are one: 5, 6, 5, 6 as one class.
    assert answer_entropy(samples("p2", 0), {"p2": {"5": 1, "6": 1}}) == 0.0
    assert by_bin({"a": 1.0, "b": 3.0, "c": 5.0}, {"a": 0, "b": 0, "c": 2}, 3) == [2.0, None, 5.0]


def test_reflection_words_are_counted_as_words() -> None:
    assert count_reflection("Wait, wait. However... Let me check; DOUBLE-CHECK") == 5
    assert count_reflection("The waiter awaits; a kuwait") == 1, "waiter begins with wait: stems count"
    assert count_reflection("") == 0


def test_habits_by_correctness_and_difficulty_by_hand() -> None:
    rows = samples("p2", 1)
    all_of_them = habits(rows)
    # Lengths 10, 11, 12, 13; the right one has "Wait", the wrong ones "hmm" and "wait".
    assert (all_of_them.num, all_of_them.tokens, all_of_them.reflections) == (4, 11.5, (1 + 2 * 3) / 4)
    assert (all_of_them.reflecting, all_of_them.cut_off) == (1.0, 0.0)
    found = habits_by_difficulty({"p2": rows, "p1": samples("p1", 0)}, {"p2": 1, "p1": 0}, 3)
    assert (found[1][True].num, found[1][True].tokens, found[1][False].tokens) == (1, 10.0, 12.0)
    assert found[0][False].cut_off == 0.5 and found[0][True].tokens is None and found[2][False].num == 0


def test_agreement_of_the_graders() -> None:
    rows = [*samples("p4", 4), *samples("p2", 1)]
    found = agreement(rows)
    assert (found.both, found.neither, len(found.math_only), found.strict_only, found.num) == (1, 3, 4, [], 8)


@pytest.mark.parametrize(
    ("gold", "answer", "response", "reason"),
    [
        ("7", None, "", "no answer found"),
        ("7", "7", "it is 7", "free text"),
        ("0.5", r"50\%", r"\boxed{50\%}", "percent"),
        ("5", r"5 \text{ cm}", r"\boxed{5 \text{ cm}}", "words or units"),
        ("5", "x = 5", r"\boxed{x = 5}", "equation"),
        (r"\sqrt{2}", "√2", r"\boxed{√2}", "characters beyond ASCII"),
        ("(1, 2)", "1, 2", r"\boxed{1, 2}", "lists and brackets"),
        (r"\frac{1}{2}", "2/4", r"\boxed{2/4}", "fractions"),
    ],
)
def test_a_disagreement_has_a_label(gold: str, answer: str | None, response: str, reason: str) -> None:
    sample = EvalSample(**(row("p2", 0, True) | {"gold": gold, "answer": answer, "response": response}))
    assert disagreement_reason(sample) == reason
