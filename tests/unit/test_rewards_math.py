"""The reward `math`: marked answers, free text, what must not pass, and garbage."""

import random

import pytest

from fastreason.rewards import extract_answer, last_answer_tag, last_boxed, verification
from fastreason.rewards.form import format_reward
from fastreason.rewards.verification import math_reward
from fastreason.types import Prompt


def judge(gold: str, text: str, problem: str = "State the final answer: 3 + 4 =") -> float:
    return math_reward(text, Prompt(id="0", text=problem, answer=gold))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{2} and \boxed{3", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"a } b \boxed {4}", "4"),
        (r"\\\boxed{6}", "6"),
        ("no box", None),
        (r"\boxed7", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_complete_box_is_found(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_unclosed_boxes_cost_linear_time() -> None:
    assert last_boxed("\\boxed{" * 50_000) is None
    assert last_answer_tag("<answer>" * 50_000) is None


def test_the_answer_marked_last_wins() -> None:
    assert extract_answer(r"<answer> 3 </answer> no: \boxed{4}") == "4"
    assert extract_answer(r"\boxed{4} no: <answer> 3 </answer>") == "3"
    assert extract_answer("  plain text \n") == "plain text"


@pytest.mark.parametrize(
    "text",
    ["7", "7.", "3 + 4 = 7", "The answer is 7.", "3 + 4 = 7\n", "**7**", "$7$", "x = 7", "7 = 3 + 4", "= 7", r"\boxed{7}",
     "3 + 4 is 7", "The answer to 3 + 4 is 7", "$3 + 4 = 7$", r"\[ 7 \]", r"3 or 4? No: \boxed{7}", "7.0", r"\boxed{7 = 3 + 4}",
     "5 + 5 = 10 would be wrong, 3 + 4 = 7"],
)  # fmt: skip
def test_right_answers_to_a_sum(text: str) -> None:
    assert judge("7", text) == 1.0


@pytest.mark.parametrize(
    "text",
    ["8", "3 + 4 = 8", "The answer is 8.", "3 + 4 = 34", "3 + 4 = 7 = 9", "7 or 8", "", "seven", "-7", "= -7",
     # The problem's own expression is equal to 7, and no answer to it.
     "3 + 4", "3 + 4 =", "What is 3 + 4?", "The answer is 3 + 4.", r"\boxed{3 + 4}", "$3 + 4$", r"\boxed{4 + 3}", "(3 + 4)",
     "The answer to 3 + 4 is 9", "3 + 4 = 2 + 5", r"\boxed{3+4=8}", r"The answer \boxed{8} is not 7", "(3 + 4) * 1",
     "2 + 5", r"$3 \times 4 - 5$", "State the final answer: 3 + 4 ="],
)  # fmt: skip
def test_wrong_answers_to_a_sum(text: str) -> None:
    assert judge("7", text) == 0.0


def test_negative_numbers() -> None:
    problem = "State the final answer: 4 - 7 ="
    for right in ("-3", "4 - 7 = -3", "4 - 7 = - 3", "The answer is -3.", "4 - 7 = −3", r"\boxed{-3}", r"\boxed{- 3}"):
        assert judge("-3", right, problem) == 1.0, right
    for wrong in ("3", "4 - 7", "4 - 7 = 3", "4 - -3"):
        assert judge("-3", wrong, problem) == 0.0, wrong
    assert judge("3", "5 - 8 = - 3", "5 - 8 =") == 0.0


def test_other_ways_to_write_a_number_count_unless_the_problem_has_them() -> None:
    for text in (r"\boxed{2^{10}}", "1,024", r"\boxed{\frac{2048}{2}}", r"\boxed{1.024 \times 10^3}", "2048/2"):
        assert judge("1024", text, "How many subsets has a set of ten?") == 1.0, text
    assert judge("1024", r"\boxed{2^{10}}", "Compute $2^{10}$.") == 0.0
    assert judge("1024", "2048/2", "What is 2048 / 2?") == 0.0
    assert judge("1024", "2048 / 2 = 1024", "What is 2048 / 2?") == 1.0
    assert judge("0.5", "1/2", "Half of one?") == 1.0
    assert judge("70", r"\boxed{70^\circ}", r"One angle is $70^\circ$. The other?") == 1.0


def test_answers_that_are_no_plain_number() -> None:
    assert judge(r"\left( 3, \frac{\pi}{2} \right)", r"so \boxed{(3, \pi/2)}") == 1.0
    assert judge(r"\left( 3, \frac{\pi}{2} \right)", r"so \boxed{(3, \pi)}") == 0.0
    assert judge("4a-2", r"\boxed{-2 + 4a}") == 1.0
    assert judge("4a-2", r"\boxed{4a+2}") == 0.0
    assert judge(r"\frac{3}{4}", r"\boxed{0.75}") == 1.0
    assert judge(r"12\frac{3}{5}", r"\boxed{12 \frac{3}{5}}") == 1.0
    assert judge("A", r"\boxed{A}") == 1.0
    assert judge(r"\text{Evelyn}", r"\boxed{\text{Evelyn}}") == 1.0
    assert judge("2 + \\sqrt{3}", r"\boxed{\sqrt{3} + 2}", r"Simplify $2 + \sqrt{3}$") == 1.0


def test_gold_comes_first() -> None:
    # verify(gold, answer) is not symmetric: an answer may state an equation, a gold "x = 1" is more than its number.
    assert judge("9", r"\boxed{x + 1 = 9}") == 1.0
    assert judge("x + 1 = 9", r"\boxed{9}") == 0.0


def test_no_gold_is_never_right() -> None:
    assert math_reward("7", Prompt(id="0", text="", answer=None)) == 0.0
    assert judge("", "") == 0.0


@pytest.mark.parametrize("error", [RecursionError(), MemoryError(), ValueError("Exceeds the limit")])
def test_an_exception_is_a_wrong_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(text: str, parsing_timeout: None) -> list[str]:
        raise error

    monkeypatch.setattr(verification, "_math_verify", lambda: (parse, None))
    assert judge("7", "7") == 0.0


def test_garbage_never_raises() -> None:
    random.seed(0)
    pieces = ["\\boxed{", "}", "{", "\\frac", "1", "22", " + ", "=", "-", "^", "\\sqrt", "$", "\\[", "(", ")", ",", "%", "x",
              "\\text{", "and", "\n", "\\left(", "\\infty", "is", "answer", "\\begin{pmatrix}", "&", "\\\\", "\x00", "\ud800",
              "٣", "🙂", "<answer>", "</answer>", "_", "\\int", "\\cup", "[", "]", "/", "0"]  # fmt: skip
    for _ in range(300):
        text = "".join(random.choices(pieces, k=random.randint(0, 14)))
        gold = random.choice(["7", r"\frac{1}{2}", "x+1", "(1, 2)", r"\{1, 2\}"])
        assert judge(gold, text) in (0.0, 1.0)


def test_format_wants_a_marked_answer_after_the_thinking() -> None:
    prompt = Prompt(id="0", text="")
    for good in (r"\boxed{7}", "<answer>7</answer>", r"<think>a</think> \boxed{7}", r"a</think> \boxed{7}"):
        assert format_reward(good, prompt) == 1.0, good
    bad = ("7", r"\boxed{}", r"\boxed{7", "<answer> </answer>", r"<think>\boxed{7}</think> so 7", r"<think>a \boxed{7}",
           r"a <think>b</think> \boxed{7}", r"<think>a</think></think> \boxed{7}", "")  # fmt: skip
    for text in bad:
        assert format_reward(text, prompt) == 0.0, text
