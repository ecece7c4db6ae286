r"""What changed between a base model and another one, from their graded responses. Pure: rows and counts in, figures out.

With c_i of n responses to problem i right: accuracy p_i = c_i / n; a problem's difficulty is the base model's c_i, in the bins
of arXiv 2505.14216. Everything that is told by difficulty uses the bins of the base, so that a row speaks of the same
problems for every model.
"""

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastreason.evaluation.rows import Classes, EvalSample, answer_class

PAPER_N = 256
PAPER_UPPER = (0, 4, 16, 32, 64, 128, 192, 256)
"""The last success count of each bin at 256 responses: 0, 1-4, 5-16, 17-32, 33-64, 65-128, 129-192, 193-256."""

# Signs that a response looks back at what it has written: stems at the start of a word, case folded.
REFLECTION = (
    *("wait", "however", "alternatively", "hmm", "actually", "on second thought", "let me check", "let's check"),
    *(
        "let me verify",
        "let's verify",
        "double-check",
        "double check",
        "recheck",
        "re-check",
        "reconsider",
        "re-examine",
    ),
    *("reevaluate", "re-evaluate", "go back", "try again", "mistake"),
)
_REFLECTION = re.compile(r"\b(?:" + "|".join(map(re.escape, REFLECTION)) + ")", re.IGNORECASE)


@dataclass(frozen=True)
class Bin:
    """Success counts `low` to `high` of n responses."""

    low: int
    high: int

    def __contains__(self, count: int) -> bool:
        return self.low <= count <= self.high

    @property
    def label(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def success_bins(n: int) -> list[Bin]:
    """The paper's bins, exact at n = 256; at another n its edges as shares of n, rounded down, without empty bins."""
    uppers = sorted({upper * n // PAPER_N for upper in PAPER_UPPER})
    return [Bin(below + 1, upper) for below, upper in zip([-1, *uppers], uppers, strict=False)]


def bin_numbers(counts: Sequence[int], bins: Sequence[Bin]) -> list[int]:
    """Which bin each success count is in."""
    return [next(number for number, one in enumerate(bins) if count in one) for count in counts]


@dataclass(frozen=True)
class Change:
    """Problems of one bin of the base: their mean accuracy before and after, the mean change and its standard error."""

    bin: Bin
    num_problems: int
    before: float | None
    after: float | None
    change: float | None
    error: float | None


def bin_changes(base: Sequence[int], other: Sequence[int], n: int) -> list[Change]:
    """For each bin of the base's success counts: mean_i (c_i' - c_i) / n with std / sqrt(problems); None in empty bins."""
    bins = success_bins(n)
    numbers = bin_numbers(base, bins)
    found = []
    for place, one in enumerate(bins):
        pairs = [(a / n, b / n) for a, b, number in zip(base, other, numbers, strict=True) if number == place]
        changes = [b - a for a, b in pairs]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
        before, after = _mean([a for a, _ in pairs]), _mean([b for _, b in pairs])
        found.append(Change(one, len(pairs), before, after, _mean(changes), error))
    return found


def transitions(base: Sequence[int], other: Sequence[int], n: int) -> NDArray[np.int64]:
    """[bins, bins]: how many problems went from the row's bin (base) to the column's (other)."""
    bins = success_bins(n)
    counts_BB = np.zeros((len(bins), len(bins)), dtype=np.int64)
    for row, column in zip(bin_numbers(base, bins), bin_numbers(other, bins), strict=True):
        counts_BB[row, column] += 1
    return counts_BB


def row_shares(counts_BB: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each row as shares of its sum; a row without problems is zero."""
    sums_B = counts_BB.sum(1, keepdims=True)
    return np.divide(counts_BB, sums_B, out=np.zeros(counts_BB.shape), where=sums_B > 0)


def answer_entropy(rows: Sequence[EvalSample], classes: Classes) -> float:
    r"""- sum_a q_a ln q_a in nats, over the answers of one problem's responses; equal answers count as one.

    All right answers are one answer, and all responses without any are one more. 0 where all agree, ln n where all differ.
    """
    votes: list[Hashable] = [answer_class(row, classes) for row in rows]
    shares = [count / len(votes) for count in Counter(votes).values()]
    return -sum(share * math.log(share) for share in shares) + 0.0


def count_reflection(text: str) -> int:
    """How many of the words and phrases of REFLECTION the text holds."""
    return sum(1 for _ in _REFLECTION.finditer(text))


@dataclass(frozen=True)
class Habits:
    """Responses of one kind: how many, their mean length in tokens, mean reflection words, share with any, and cut off."""

    num: int
    tokens: float | None
    reflections: float | None
    reflecting: float | None
    cut_off: float | None


def habits(rows: Sequence[EvalSample]) -> Habits:
    counts = [count_reflection(row.response) for row in rows]
    return Habits(
        num=len(rows),
        tokens=_mean([row.num_tokens for row in rows]),
        reflections=_mean(counts),
        reflecting=_mean([count > 0 for count in counts]),
        cut_off=_mean([row.truncated for row in rows]),
    )


def habits_by_difficulty(
    by_problem: Mapping[str, Sequence[EvalSample]], numbers: Mapping[str, int], num_bins: int
) -> list[dict[bool, Habits]]:
    """For each bin of the base's difficulty (`numbers`: problem id -> bin), the habits of right and of wrong responses."""
    found = []
    for place in range(num_bins):
        rows = [row for id, given in by_problem.items() if numbers[id] == place for row in given]
        found.append({verdict: habits([row for row in rows if row.correct is verdict]) for verdict in (True, False)})
    return found


def by_bin(values: Mapping[str, float], numbers: Mapping[str, int], num_bins: int) -> list[float | None]:
    """The mean of a figure of each problem over each bin."""
    return [_mean([value for id, value in values.items() if numbers[id] == place]) for place in range(num_bins)]


@dataclass(frozen=True)
class Agreement:
    """How two graders judged the same responses; `math_only` and `strict_only` are the ones that only that one calls right."""

    both: int
    neither: int
    math_only: list[EvalSample]
    strict_only: list[EvalSample]

    @property
    def num(self) -> int:
        return self.both + self.neither + len(self.math_only) + len(self.strict_only)


def agreement(rows: Sequence[EvalSample]) -> Agreement:
    """Compare the training grader with the strict one, on responses that both have judged."""
    judged = [row for row in rows if row.strict is not None]
    return Agreement(
        both=sum(row.correct and bool(row.strict) for row in judged),
        neither=sum(not row.correct and not row.strict for row in judged),
        math_only=[row for row in judged if row.correct and not row.strict],
        strict_only=[row for row in judged if row.strict and not row.correct],
    )


def reasons_in_turn(rows: Iterable[EvalSample], num: int) -> list[EvalSample]:
    """At most `num` of the disagreements, one of each reason in turn and of other problems first, sorted by reason."""
    by_reason: dict[str, list[EvalSample]] = {}
    for row in sorted(rows, key=lambda row: row.sample):
        by_reason.setdefault(disagreement_reason(row), []).append(row)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_reason.values()))
    return sorted([row for row in turns if row is not None][:num], key=disagreement_reason)


def disagreement_reason(row: EvalSample) -> str:
    """Why the graders may differ, told by what is visible: a label to sort a list by, not a verdict."""
    gold, answer = row.gold or "", row.answer or ""
    checks = (
        (row.error is not None, f"no verdict ({row.error})"),
        (not answer, "no answer found"),
        (r"\boxed" not in row.response and "<answer>" not in row.response, "free text"),
        (not answer.isascii(), "characters beyond ASCII"),
        (("%" in gold) != ("%" in answer), "percent"),
        (bool(re.search(r"\\(?:text|mathrm|circ)|\d\s*[a-z]{2,}", answer)), "words or units"),
        (("=" in gold) != ("=" in answer), "equation"),
        ("." in gold or "." in answer, "decimals"),
        (
            bool(re.search(r"[,\[({]", gold + answer)) and not re.search(r"frac|sqrt", gold + answer),
            "lists and brackets",
        ),
        (r"\frac" in gold + answer or "/" in gold + answer, "fractions"),
        (True, "other forms"),
    )
    return next(reason for holds, reason in checks if holds)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
