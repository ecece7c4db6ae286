r"""The reward `math`: is the response's final answer mathematically equal to the gold answer? math-verify decides.

The answer is the content of the last `\boxed{}` if there is one, else of the last `<answer></answer>` (whose brackets
math-verify would read as "less than"), else the whole response; both sides are parsed, and the gold comes first
(`verify(gold, answer)`: the order matters). This is the reward of Minimal-RL (arXiv 2504.11343) and RLvsDistillation
(arXiv 2505.14216).

What math-verify does with free text, and what is corrected here. It takes the last expression, the right-hand side
of a chain of equations ("3 + 4 = 7 = 9" answers 9), prefers what follows "answer is", ignores units and reads 7 as 7%
where that fits. But it also *evaluates* what it finds: the problem's own "3 + 4" would be a right answer to
"What is 3 + 4?", and "The answer to 3 + 4 is 9" too (of 288 replies of SmolLM2-135M to such sums it alone would have
called 32 right, 19 of which only repeat the sum). So where the gold is a plain number,

- in a response without a box, arithmetic between literal numbers is cut out before parsing ("The answer to is 9");
- a sum, difference or product of numbers left undone is no answer, boxed or not; `3 \times 10^8`, `2^{10}`, `6/2` and
  `\frac{6}{2}` are, unless the problem says exactly that.

Gold answers that are not plain numbers are compared by math-verify alone. There is no clock here: a hard answer takes
as long as it takes, so use it behind `GraderPool`, which kills it at a deadline.
"""

import logging
import re
from functools import lru_cache
from typing import Any

from fastreason.rewards.extract import last_answer_tag, last_boxed
from fastreason.types import Prompt

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_OPERATOR = r"(?:[-+*/·×÷]|\\times|\\cdot|\\div)"
_PLAIN_NUMBER = re.compile(rf"[-+]?{_NUMBER}")
# Bounded repeats keep the search linear on hostile text. The guards on both sides leave 2x + 3 and 3^4 + 5x alone.
_ARITHMETIC = re.compile(
    rf"(?<![\w.^{{\\])\({{0,9}}-?{_NUMBER}\){{0,9}}"
    rf"(?:[ \t]{{0,4}}{_OPERATOR}[ \t]{{0,4}}\({{0,9}}-?{_NUMBER}\){{0,9}})+(?![\w{{\\^])"
)
_LATEX_ARITHMETIC = re.compile(rf"\d\s*(?:{_OPERATOR}|\^)\s*[{{(-]*\d|\\[dt]?frac|\\sqrt|\\binom|!")
_DETACHED_MINUS = re.compile(r"(=|\bis)(\s*)-[ \t](?=\d)")


def math_reward(text: str, prompt: Prompt) -> float:
    """1.0 where the response's answer equals `prompt.answer`, else 0.0; never raises: an exception is a wrong answer.

    What is compared with what is in the docstring of this module.
    """
    try:
        return float(_is_right(text, prompt))
    except Exception:
        return 0.0


def _is_right(text: str, prompt: Prompt) -> bool:
    if prompt.answer is None or not prompt.answer.strip():
        return False
    parse, verify = _math_verify()
    gold_is_number = _PLAIN_NUMBER.fullmatch(prompt.answer.strip()) is not None
    boxed = last_boxed(text)
    if boxed is None:
        text = last_answer_tag(text) or text
    if boxed is not None:
        answer = parse(f"\\boxed{{{boxed}}}", parsing_timeout=None)
    elif gold_is_number:
        answer = parse(_without_arithmetic(text, prompt.text), parsing_timeout=None)
    else:
        answer = parse(text, parsing_timeout=None)
    if not answer or (gold_is_number and _is_unfinished(answer, prompt.text)):
        return False
    return bool(verify(_parsed_gold(prompt.answer), answer, timeout_seconds=None))


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any]:
    from math_verify import parse, verify

    # It warns once that its own timeouts are off; the grader pool's deadline replaces them.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse, verify


@lru_cache(maxsize=4096)
def _parsed_gold(gold: str) -> list[Any]:
    parse, _ = _math_verify()
    # A gold "(1, 2)" or "4a-2" is LaTeX without delimiters, which math-verify reads only inside a box.
    return parse(gold if last_boxed(gold) is not None else f"\\boxed{{{gold}}}", parsing_timeout=None)


def _without_arithmetic(text: str, problem: str) -> str:
    """The text without `3 + 4` and its like; a lone fraction `1/2` stays unless the problem holds it."""
    compact_problem = _compact(problem)

    def cut(match: re.Match[str]) -> str:
        found = _compact(match.group())
        lone_fraction = re.fullmatch(rf"-?{_NUMBER}/{_NUMBER}", found) is not None
        return match.group() if lone_fraction and found not in compact_problem else " "

    text = text.replace("\N{MINUS SIGN}", "-")
    return _DETACHED_MINUS.sub(r"\1\2-", _ARITHMETIC.sub(cut, text))


def _is_unfinished(answer: list[Any], problem: str) -> bool:
    """Whether the parsed answer is arithmetic left undone, or an expression copied from the problem."""
    expression, source = answer[0], answer[-1]
    if isinstance(expression, str):
        return False
    if getattr(expression, "is_Relational", False):
        return all(_holds_arithmetic(side) for side in expression.args)
    if _holds_arithmetic(expression):
        return True
    copied = isinstance(source, str) and _LATEX_ARITHMETIC.search(source) is not None
    return copied and _compact(source) in _compact(problem)


def _holds_arithmetic(expression: Any) -> bool:
    nodes = [expression]
    while nodes:
        node = nodes.pop()
        if getattr(node, "is_Add", False):
            return True
        arguments = getattr(node, "args", ())
        # One number times a power or a percent is a way to write a number; -1 is a sign.
        if getattr(node, "is_Mul", False) and sum(a.is_Number and abs(a) != 1 for a in arguments) > 1:
            return True
        nodes.extend(arguments)
    return False


def _compact(text: str) -> str:
    return re.sub(r"\s+|\\[,;:! ]", "", text)
