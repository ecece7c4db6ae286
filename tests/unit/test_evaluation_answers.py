"""What a response answers, which answers have the same normal form or value, and which wrong answers vote together."""

import asyncio

import pytest

from fastreason.evaluation.answers import MAX_CHARS, MAX_COMPARED, answer_classes, wrong_answers
from fastreason.evaluation.rows import EvalSample
from fastreason.rewards import normalise_answer, read_answer, read_number
from fastreason.types import Grade


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}. No: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<think>8</think><answer> 9 </answer>", "9"),
        (r"\boxed{ }", None),
        ("The answer is 12 apples. There are 3 pears.", "12"),
        ("The answer is $x + 1$ for all x.", "x + 1"),
        ("Answer: yes.", "yes"),
        ("steps\n#### 1,234", "1,234"),
        ("answers are 4 and 5", "5"),
        ("3 + 4 = 7", "7"),
        ("it is 3/4 of x2", "3/4"),
        ("it was -3.5.", "-3.5"),
        ("blue", "blue"),
        ("no number in a text that is too long to be nothing but an answer", None),
        ("", None),
        ("  \n", None),
    ],
)
def test_an_answer_is_read(text, answer):
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("7", "7", True),
        ("7", "7.0", True),
        ("1/2", r"\frac{1}{2}", True),
        (r"\dfrac12", "0.5", True),
        (r"-\frac{1}{2}", "-0.50", True),
        (r"\frac{-1}{2}", "-1/2", True),
        ("1,234", "1234", True),
        ("1,23", "123", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"\text{Evelyn}", "evelyn", True),
        ("90^\\circ", "90", True),
        (r"\$5", "5", True),
        ("5.", "5", True),
        ("50%", "0.5", False),
        ("x+1", "1+x", False),
        (r"\sqrt{4}", "2", False),
        ("1/0", "1/0", True),
        ("1/0", "2/0", False),
        ("9" * 5000, "9" * 5000 + ".0", False),
        ("\N{MINUS SIGN}3", "-3", True),
    ],
)
def test_the_normal_form_and_the_value_of_an_answer(a, b, same):
    first, second = normalise_answer(a), normalise_answer(b)
    value = read_number(first)
    assert (first == second or (value is not None and value == read_number(second))) is same


class Halves:
    """Calls two answers equal where they have the same number of letters; knows what it was asked."""

    num_timeouts = 0

    def __init__(self):
        self.asked = []

    async def grade(self, prompt, texts, truncated):
        self.asked.append((prompt.answer, [text.removeprefix(r"\boxed{").removesuffix("}") for text in texts]))
        length = len(rf"\boxed{{{prompt.answer}}}")
        return [Grade(reward=0.0, correct=len(text) == length) for text in texts]


def classes(answers, grader):
    return asyncio.run(answer_classes({"p": answers}, grader))["p"]


def test_equal_answers_have_one_class_and_numbers_are_not_asked_about():
    grader = Halves()
    found = classes({"0.5": 3, "1/2": 1, "7": 2, "aa": 2, "bb": 1, "ccc": 1, " aa ": 1}, grader)
    assert found == {"0.5": 1, "1/2": 1, "ccc": 1, "7": 2, "aa": 3, " aa ": 3, "bb": 3}
    assert grader.asked == [("0.5", ["aa", "bb", "ccc"]), ("7", ["aa", "bb"]), ("aa", ["bb"])]
    assert classes({"0.5": 3, "1/2": 1, "aa": 2, "bb": 1}, None) == {"0.5": 1, "1/2": 1, "aa": 2, "bb": 3}


def test_what_is_compared_is_bounded():
    grader = Halves()
    found = classes({"x" * length: 1 for length in range(1, 60)} | {"y" * (MAX_CHARS + 1): 1}, grader)
    assert len(set(found.values())) == 60 and len(grader.asked) == MAX_COMPARED
    assert all(len(text) <= MAX_CHARS for _, texts in grader.asked for text in texts)


def test_only_wrong_answers_that_can_be_read_are_counted():
    told = {"question": "?", "gold": "7", "response": "", "num_tokens": 1, "truncated": False, "formatted": True}
    rows = [
        EvalSample(problem=problem, sample=0, correct=correct, answer=answer, **told)
        for problem, correct, answer in [("p", True, "7"), ("p", False, "8"), ("q", False, None), ("p", False, "8")]
    ]
    assert wrong_answers(rows) == {"p": {"8": 2}}
