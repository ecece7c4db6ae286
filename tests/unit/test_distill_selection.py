"""What is chosen of verified responses, counted by hand; and the figures of a job."""

from typing import NamedTuple

import pytest

from fastreason.distill.selection import Passage, accuracy_figures, select


class R(NamedTuple):
    sample: int
    correct: bool
    num_tokens: int | None = 5
    truncated: bool = False
    num_chars: int = 10
    empty: bool = False
    refused: bool = False
    timed_out: bool = False


JUDGED = {
    "mixed": [R(0, False, 9), R(1, True, 7), R(2, True, 3), R(3, True, 3), R(4, False, 2)],
    "right": [R(0, True), R(1, True)],
    "wrong": [R(0, False), R(1, False)],
    "cut": [R(0, True, 16, truncated=True), R(1, False, 16, truncated=True)],
    "silent": [],
}


def test_the_first_right_ones_are_kept_and_every_count_adds_up():
    chosen = select(JUDGED, keep=2)
    assert chosen.positives == [("mixed", 1), ("mixed", 2), ("right", 0), ("right", 1)]
    assert chosen.pairs == [("mixed", 1, 0)]
    assert chosen.responses.as_dict() == {
        "in": 11,
        "dropped": {"refused": 0, "cut_off": 2, "empty": 0, "timed_out": 0, "wrong": 4, "beyond_keep": 1},
        "out": 4,
    }
    assert chosen.questions.as_dict() == {"in": 5, "dropped": {"no_response": 1, "no_right_response": 2}, "out": 2}
    assert chosen.paired.as_dict() == {
        "in": 5,
        "dropped": {"no_right_response": 3, "no_wrong_response": 1},
        "out": 1,
    }
    assert chosen.responses.num_out == len(chosen.positives) and chosen.paired.num_out == len(chosen.pairs)


def test_the_order_of_finish_does_not_matter():
    shuffled = {id: list(reversed(given)) for id, given in JUDGED.items()}
    assert select(shuffled, keep=2) == select(JUDGED, keep=2)


def test_the_shortest_are_kept_by_tokens_the_earlier_of_two_alike():
    assert select(JUDGED, keep=1, order="shortest").positives == [("mixed", 2), ("right", 0)]
    assert select(JUDGED, keep=1, order="shortest").pairs == [("mixed", 1, 0)], "a pair is of the first ones"
    # Where not every length is known in tokens, all are compared in characters.
    told = {"q": [R(0, True, 1, num_chars=30), R(1, True, None, num_chars=20)]}
    assert select(told, keep=1, order="shortest").positives == [("q", 1)]


def test_responses_that_were_cut_off_are_used_only_where_asked_for():
    kept = select(JUDGED, keep=8, truncated="keep")
    assert ("cut", 0) in kept.positives and ("cut", 0, 1) in kept.pairs
    assert kept.responses.dropped["cut_off"] == 0


def test_a_response_without_text_is_neither_right_nor_wrong():
    judged = {"q": [R(0, False, empty=True), R(1, True, empty=True), R(2, True), R(3, False)]}
    chosen = select(judged, keep=8)
    assert chosen.positives == [("q", 2)] and chosen.pairs == [("q", 2, 3)]
    assert chosen.responses.as_dict() == {
        "in": 4,
        "dropped": {"refused": 0, "cut_off": 0, "empty": 2, "timed_out": 0, "wrong": 1, "beyond_keep": 0},
        "out": 1,
    }
    nothing_wrong = select({"q": [R(0, False, empty=True), R(1, True)]}, keep=8)
    assert nothing_wrong.pairs == [] and nothing_wrong.paired.dropped["no_wrong_response"] == 1


def test_a_response_that_nobody_finished_judging_is_neither_right_nor_wrong():
    judged = {
        "q": [R(0, False, timed_out=True), R(1, True), R(2, False)],
        "p": [R(0, True), R(1, False, timed_out=True)],
    }
    chosen = select(judged, keep=8)
    assert chosen.positives == [("q", 1), ("p", 0)] and chosen.pairs == [("q", 1, 2)]
    assert (chosen.responses.dropped["timed_out"], chosen.responses.dropped["wrong"]) == (2, 1)
    assert accuracy_figures(judged)["pass_at_1"] == pytest.approx((1 / 3 + 1 / 2) / 2), "as training counts them"


def test_accuracy_is_the_mean_over_questions_with_the_error_of_their_means():
    figures = accuracy_figures(JUDGED)
    shares = [3 / 5, 1.0, 0.0, 1 / 2]  # nothing is known of a question without a response
    mean = sum(shares) / 4
    error = (sum((share - mean) ** 2 for share in shares) / 3) ** 0.5 / 4**0.5
    assert figures["pass_at_1"] == pytest.approx(0.525) and figures["standard_error"] == pytest.approx(error)
    assert figures["solved_share"] == 3 / 4 and figures["truncated_share"] == 2 / 11
    assert (figures["num_questions"], figures["num_responses"]) == (4, 11)
    assert figures["num_tokens"] == 24 + 10 + 10 + 32
    assert figures["tokens_right_mean"] == pytest.approx((7 + 3 + 3 + 10 + 16) / 6)
    assert figures["tokens_wrong_mean"] == pytest.approx((9 + 2 + 10 + 16) / 5)


def test_figures_of_nothing_are_not_zero():
    figures = accuracy_figures({"one": [R(0, True, None)]})
    assert figures["pass_at_1"] == 1.0
    assert figures["standard_error"] is None and figures["tokens_right_mean"] is None
    assert accuracy_figures({})["pass_at_1"] is None


def test_a_passage_lists_filters_that_dropped_nothing():
    passage = Passage(3)
    passage.drop("held_out", 0)
    passage.drop("long_prompt", 2)
    assert passage.as_dict() == {"in": 3, "dropped": {"held_out": 0, "long_prompt": 2}, "out": 1}
