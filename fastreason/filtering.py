"""What is left out of training: groups without a signal, and responses that were cut off. Pure.

It owns the verdicts on a group (dynamic sampling, DAPO, arXiv 2503.14476) and how far a response ran over its length. It
refuses to say what becomes of a group with a verdict: the producer replaces it, or the training step leaves it out.
"""

from collections.abc import Callable

from fastreason.types import Group, Sample

CONDITIONS: dict[str, Callable[[Group], bool]] = {
    "constant": lambda group: len(set(group.rewards_G)) <= 1,
    "all_right": lambda group: all(is_right(sample) for sample in group.samples),
    "all_wrong": lambda group: not any(is_right(sample) for sample in group.samples),
}

# The values of algorithm.filter, and the conditions that each looks for, in order.
FILTERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "constant": ("constant",),
    "all_right": ("all_right",),
    "all_wrong": ("all_wrong",),
    "both": ("all_right", "all_wrong"),
}


def verdict(group: Group, filter: str) -> str | None:
    """The condition for which `filter` takes a graded group out, by raw rewards and grades; None where it keeps it.

    constant: all rewards are equal. all_right: every response is correct. all_wrong: none is. Raises ValueError for a
    filter that is not in the table.
    """
    if filter not in FILTERS:
        raise ValueError(f"filter: got {filter!r}, allowed: {' | '.join(FILTERS)}")
    return next((name for name in FILTERS[filter] if CONDITIONS[name](group)), None)


def is_right(sample: Sample) -> bool:
    """Whether a graded response counts as correct."""
    assert sample.grade is not None, "the sample has not been graded"
    return sample.grade.correct


def overshoot(num_tokens: int, truncated: bool, max_new_tokens: int, buffer: int) -> float:
    """How far a response of `num_tokens` ran over its length, 0 to 1: the share of truncation_penalty that it pays.

    1 where it was cut off; else, with `buffer` tokens L and n tokens in the response, n - (max_new_tokens - L) over L,
    within 0 and 1 (DAPO's soft overlong punishment); 0 without a buffer.
    """
    if truncated:
        return 1.0
    if not buffer:
        return 0.0
    return min(1.0, max(0.0, (num_tokens - (max_new_tokens - buffer)) / buffer))
