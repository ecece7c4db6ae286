"""Which wrong answers to a problem are equal, so that they vote together: as texts, as numbers, else as the grader says.

It owns the classes of `answers.json`. It refuses to judge what is right: all right answers are one class already.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from fastreason.evaluation.rows import EvalSample
from fastreason.rewards import normalise_answer, read_number
from fastreason.rollout.sampling import Grader
from fastreason.types import Prompt

# An answer is compared with the most frequent ones only, and a longer one with none: n = 256 can bring hundreds of texts.
MAX_COMPARED, MAX_CHARS = 16, 200


def wrong_answers(rows: Iterable[EvalSample]) -> dict[str, Counter[str]]:
    """For each problem, how often each text was a wrong answer to it."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        if not row.correct and row.answer is not None:
            found.setdefault(row.problem, Counter())[row.answer] += 1
    return found


async def answer_classes(
    answers: Mapping[str, Mapping[str, int]], grader: Grader | None, concurrency: int = 8
) -> dict[str, dict[str, int]]:
    """The class of each wrong answer, from 1, the most frequent text's first; without a grader by text and number alone.

    A class holds all texts with its normal form or value, and those that the grader calls equal to its most frequent one. Two
    plain numbers are not asked about.
    """
    turn = asyncio.Semaphore(concurrency)

    async def one(problem: str, counts: Mapping[str, int]) -> tuple[str, dict[str, int]]:
        async with turn:
            return problem, await _classes(problem, counts, grader)

    return dict(await asyncio.gather(*(one(problem, counts) for problem, counts in answers.items())))


async def _classes(problem: str, counts: Mapping[str, int], grader: Grader | None) -> dict[str, int]:
    forms: dict[str | Fraction, list[str]] = {}
    for text in sorted(counts, key=lambda text: (-counts[text], text)):
        normal = normalise_answer(text)
        value = read_number(normal)
        forms.setdefault(normal if value is None else value, []).append(text)
    waiting, classes, number = list(forms), dict[str, int](), 0
    while waiting:
        number += 1
        first, *others = waiting
        asked = _asked(first, others) if grader is not None and number <= MAX_COMPARED else []
        equal = await _equal(problem, forms[first][0], [forms[form][0] for form in asked], grader)
        together = {first, *(form for form, same in zip(asked, equal, strict=True) if same)}
        classes.update({text: number for form in together for text in forms[form]})
        waiting = [form for form in waiting if form not in together]
    return classes


def _asked(first: str | Fraction, others: Sequence[str | Fraction]) -> list[str | Fraction]:
    """Those of the other answers that may equal the first in a way that only the grader sees."""
    if isinstance(first, str) and len(first) > MAX_CHARS:
        return []
    short = [form for form in others if isinstance(form, Fraction) or len(form) <= MAX_CHARS]
    return [form for form in short if isinstance(form, str) or isinstance(first, str)]


async def _equal(problem: str, text: str, others: Sequence[str], grader: Grader | None) -> list[bool]:
    if not others or grader is None:
        return [False] * len(others)
    prompt = Prompt(id=problem, text="", answer=text)
    grades = await grader.grade(prompt, [f"\\boxed{{{other}}}" for other in others], [False] * len(others))
    return [grade.correct for grade in grades]
