"""Scores of an evaluation: every estimator against enumeration of all draws, hand-computed tables, and their limits."""

import itertools
import math
import statistics
from collections import Counter
from fractions import Fraction

import msgspec
import numpy as np
import pytest

from fastreason.evaluation.rows import RIGHT, EvalSample, answer_class, grouped, settings_key
from fastreason.evaluation.scores import (
    bootstrap,
    majority_at_k,
    pass_at_k,
    powers_of_two,
    sample_index_sem,
    score,
)


def row(problem="p", sample=0, correct=False, **more):
    told = {"question": "?", "gold": "7", "response": "", "num_tokens": 10, "truncated": False, "formatted": True}
    return EvalSample(problem=problem, sample=sample, correct=correct, **{**told, **more})


def table(right, **more):
    """Rows from a table of 0 and 1: a line a problem."""
    return [
        row(f"p{i}", j, bool(right), answer="7" if right else "8", **more)
        for i, line in enumerate(right)
        for j, right in enumerate(line)
    ]


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_unbiased():
    # E over c ~ Binomial(n, p) of the estimate is the chance 1 - (1 - p)^k; the plug-in estimate is not.
    n, k, p = 6, 3, 0.3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(1 - (1 - p) ** k)
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert plug_in < 1 - (1 - p) ** k - 0.02


def test_pass_at_k_of_many_samples_agrees_with_the_published_product():
    # arXiv 2107.03374 computes 1 - prod_{i=n-c+1}^{n} (1 - k / i).
    for n, c, k in [(256, 3, 128), (256, 200, 64), (1000, 1, 999)]:
        product = 1.0 if n - c < k else 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(float(product), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def enumerated_majority(votes, right, k):
    total, draws = Fraction(0), list(itertools.combinations(votes, k))
    for draw in draws:
        counts = Counter(vote for vote in draw if vote is not None)
        best = [vote for vote, count in counts.items() if count == max(counts.values())]
        total += Fraction(right in best, max(1, len(best)))
    return float(total / len(draws))


@pytest.mark.parametrize(
    "votes",
    [
        "aabbc",
        "aaaaaa",
        "bbbb",
        "abcdef",
        "aab-b-",
        "----",
        "a-----",
        "aaabbbccc",
        "aabbbbbb",
        "abbccdd-",
        "aaaabbc--d",
    ],
)
def test_majority_is_that_of_all_draws(votes):
    voted = [None if vote == "-" else vote for vote in votes]
    ks = list(range(1, len(votes) + 1))
    wanted = [enumerated_majority(voted, "a", k) for k in ks]
    assert majority_at_k(voted, "a", ks) == pytest.approx(wanted, abs=1e-12)


def test_majority_of_all_256_is_that_of_the_counts_and_stays_exact():
    votes = ["a"] * 90 + ["b"] * 91 + [None] * 75
    assert majority_at_k(votes, "a", [1, 256]) == pytest.approx([90 / 256, 0.0], abs=1e-12)
    assert majority_at_k(["a"] * 90 + ["b"] * 90 + ["c"] * 76, "a", [256]) == pytest.approx([0.5])
    many = majority_at_k(["a"] * 128 + [f"w{i}" for i in range(128)], "a", powers_of_two(256))
    assert many[0] == pytest.approx(0.5) and many[-1] == pytest.approx(1.0) and all(0 <= x <= 1 + 1e-12 for x in many)


def test_the_sem_is_that_of_the_per_index_scores():
    # Two problems, four samples: s = 1/2, 1, 1/2, 0; mean 1/2, squared deviations 0 + 1/4 + 0 + 1/4, over 3, root, over 2.
    right = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], bool)
    assert sample_index_sem(right) == pytest.approx(math.sqrt(0.5 / 3) / 2)
    assert sample_index_sem(right) == pytest.approx(statistics.stdev([0.5, 1, 0.5, 0]) / 2)
    assert sample_index_sem(right[:, :1]) is None


def test_scores_of_a_table_by_hand():
    # c = 4, 2, 0 of n = 4.
    rows = table([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])
    result = score(rows, {}, 4)
    assert (result.n, result.num_problems, result.num_samples, result.num_right) == (4, 3, 12, 6)
    assert result.pass_at_1 == result.pass_at_k[1] == result.maj_at_k[1] == pytest.approx(0.5)
    # pass@2 of the second: 1 - C(2,2)/C(4,2) = 5/6. maj@2: both right 1/6, one of each 4/6 shared in two: 1/2.
    assert result.pass_at_k == pytest.approx({1: 0.5, 2: (1 + 5 / 6) / 3, 4: 2 / 3})
    assert result.maj_at_k == pytest.approx({1: 0.5, 2: 0.5, 4: 0.5})
    assert result.capability_at_k == pytest.approx({1: 0.5, 2: (1 + 0.75) / 3, 4: (1 + 1 - 0.5**4) / 3})
    assert result.sem == pytest.approx(statistics.stdev([2 / 3, 1 / 3, 1 / 3, 2 / 3]) / 2)
    assert result.tokens_per_right == 120 / 6 and result.tokens_mean == 10


def test_formats_ends_lengths_and_disagreements_are_counted():
    rows = [
        row(sample=0, correct=True, num_tokens=4, strict=True),
        row(sample=1, correct=True, num_tokens=6, strict=False, formatted=False),
        row(sample=2, num_tokens=20, truncated=True, formatted=False, strict=False),
        row(sample=3, num_tokens=0, error="timeout", strict=True),
    ]
    result = score(rows, {}, 4)
    assert (result.pass_at_1, result.pass_at_1_formatted, result.pass_at_1_strict) == (0.5, 0.25, 0.5)
    assert (result.formatted_share, result.truncated_share, result.num_disagreements) == (0.5, 0.25, 2)
    assert (result.tokens_right_mean, result.tokens_wrong_mean, result.tokens_per_right) == (5, 10, 15)
    assert result.errors == {"timeout": 1}
    nothing = score([row()], {}, 1)
    assert nothing.sem is nothing.tokens_per_right is nothing.pass_at_1_strict is nothing.tokens_right_mean is None


def test_only_the_first_n_responses_count_and_all_of_them_must_be_there():
    rows = table([[1, 0, 1], [0, 0, 1]])
    assert score(rows, {}, 2).pass_at_1 == 0.25
    assert score(list(reversed(rows)), {}, 2) == score(rows, {}, 2), "the order of the lines says nothing"
    with pytest.raises(ValueError, match="n=4: problem 'p0'"):
        score(rows, {}, 4)
    with pytest.raises(ValueError, match="k of pass@k"):
        score(rows, {}, 2, [1, 3])
    with pytest.raises(ValueError, match="no problem"):
        score([], {}, 1)
    assert sorted(grouped(rows, 1)) == ["p0", "p1"]


def test_equal_answers_vote_together():
    rows = [row(sample=i, answer=a, correct=a == "7") for i, a in enumerate(["7", "7", "1/2", "0.5", r"\frac12"])]
    assert score(rows, {}, 5).maj_at_k[5] == 1.0, "as texts, the right answer is the most frequent"
    equal = {"p": {"1/2": 1, "0.5": 1, r"\frac12": 1}}
    assert score(rows, equal, 5).maj_at_k[5] == 0.0
    assert [answer_class(r, equal) for r in rows] == [RIGHT, RIGHT, 1, 1, 1]
    assert answer_class(row(answer=None), {}) is None and answer_class(row(answer="x"), {}) == "x"


def test_the_bootstrap_covers_and_is_the_same_each_time():
    values = np.array([[1.0], [0.0]] * 50)
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values)
    # The mean of 100 fair coins: 0.5 within 1.96 * 0.05.
    assert low[0] == pytest.approx(0.402, abs=0.021) and high[0] == pytest.approx(0.598, abs=0.021)
    assert bootstrap(np.ones((1, 1))) == (1.0, 1.0)


def test_powers_of_two_end_with_n():
    assert powers_of_two(16) == [1, 2, 4, 8, 16] and powers_of_two(10) == [1, 2, 4, 8, 10] and powers_of_two(1) == [1]


def test_scores_go_through_json_and_keys_do_not_depend_on_order():
    scores = score(table([[1, 0], [0, 0]]), {}, 2)
    assert msgspec.json.decode(msgspec.json.encode(scores), type=type(scores)) == scores
    assert settings_key({"a": 1, "b": {"c": 2, "d": 3}}) == settings_key({"b": {"d": 3, "c": 2}, "a": 1})
    assert settings_key({"a": 1}) != settings_key({"a": 2})
