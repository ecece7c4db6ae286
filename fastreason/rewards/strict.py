r"""The reward `strict`: a second opinion that shares nothing with math-verify, and gives the benefit of no doubt.

Right is a response whose answer, as `read_answer` finds it, is the gold answer's text, or reads as the same mathematical
object: the same exact number, an expression that agrees with it at three points to 25 digits, the same set, list, tuple,
interval, matrix, relation. Where it is stricter than `math`:

- the whole of a marked answer is the answer; nothing is searched for in a box;
- numbers are exact (0.333333 is not 1/3), 50% is 50 and not 0.5, and a unit that both sides name must be the same;
- brackets count: (0, 1) is not [0, 1), a set is no list and no tuple; a list in bare commas has any order;
- an equation answers an expression only as `x = ...`, with one letter on the left; an expression answers no equation;
- arithmetic left undone (3 + 4, 2/4, 3 \cdot 5) is no answer unless the gold leaves as much undone.

It misses right answers in forms that `fastreason.rewards.latex` does not read. So neither grader is the truth: where the two
differ is where to look; `fastreason eval` counts and keeps both verdicts, `fastreason report compare` sorts the differences.
Bounded in time by itself; pure.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from fastreason.rewards.extract import last_boxed, read_answer
from fastreason.rewards.latex import MAX_LENGTH, Reading, read_latex
from fastreason.rewards.latex_expression import UnreadableError
from fastreason.types import Prompt

DIGITS = 25
_POINTS = 3
_WORDS = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
_UNIT = re.compile(
    rf"(?P<body>.*[^\s\\])\s*(?P<unit>\\?%|\^\s*\{{?\s*\\circ\s*\}}?|{_WORDS}(?:\s*\^\s*\{{?\d\}}?)?"
    r"|(?<=[\d}])\s*\b[A-Za-z]{2,}(?:[ ./][A-Za-z]+)*(?:\s?\^\s?\{?\d\}?)?)",
    re.DOTALL,
)
_UNICODE = {
    **{"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty "},
    **{"∪": "\\cup ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "°": "^\\circ", "∈": "\\in "},
}
_SAME: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])"), ""),
    (re.compile(r"(?<!\\)\\[,;:!> ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:lbrace|rbrace)(?![A-Za-z])"), lambda m: "\\{" if m[0][1] == "l" else "\\}"),
    (re.compile(r"\\(?:emptyset|varnothing)(?![A-Za-z])|∅"), r"\\{\\}"),
    (re.compile(r"(?<=\d)\s+(\d+)/(\d+)"), r"\\frac{\1}{\2}"),
    (re.compile(r"√\s*(\d+|[a-z])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\("), r"\\sqrt("),
    (re.compile(r"(?<=\d)\{,\}(?=\d{3})"), ""),
    (re.compile(r"\\?\$"), ""),
]
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_VULGAR = re.compile("[¼-¾⅐⅑-⅞]")
_UNIT_NAMES = {"percent": "%", "circ": "degree"}
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\s?\d{3})+(?:\.\d+)?")
_AND = re.compile(r"\s*,?\s*(?:\\(?:text|mbox|textrm)\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))\s*")
_CHOICE = re.compile(r"\(?([A-Z])[).]?")
_LEFT_SIDE = re.compile(r"\s*[A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))?\s*(?:=|\\in)(?!=)")


def strict_reward(text: str, prompt: Prompt) -> float:
    """1.0 where the answer that `read_answer` finds is `prompt.answer` by `strict_equal`, else 0.0; never raises."""
    if prompt.answer is None:
        return 0.0
    answer = read_answer(text)
    return float(answer is not None and strict_equal(prompt.answer, answer))


def strict_equal(gold: str, answer: str) -> bool:
    """Whether an answer is the gold one, by the rules of this module; `gold` may be in a box. False for empty ones."""
    gold = gold if last_boxed(gold) is None else last_boxed(gold) or ""
    inner = last_boxed(answer)
    answer = answer if inner is None else inner
    if not gold.strip() or not answer.strip() or max(len(gold), len(answer)) > MAX_LENGTH:
        return False
    try:
        return _equal_texts(gold, answer)
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
        return False  # sympy's, of an odd expression


def _equal_texts(gold: str, answer: str) -> bool:
    (gold, gold_unit), (answer, unit) = (split_unit(clean_answer(text)) for text in (gold, answer))
    if gold_unit and unit and gold_unit != unit:
        return False
    if _as_words(gold) == _as_words(answer):
        return True
    try:
        wanted = read_latex(gold)
        got = read_latex(answer)
        if wanted.kind != "relation" and got.kind == "relation" and (left := _LEFT_SIDE.match(answer)):
            got = read_latex(answer[left.end() :])
    except UnreadableError:
        return False
    return got.undone <= wanted.undone and _same(wanted, got)


def clean_answer(text: str) -> str:
    """The text in one way of writing: LaTeX's spaces and sizes dropped, Unicode's signs as commands, no final stop."""
    for sign, command in _UNICODE.items():
        text = text.replace(sign, command)
    text = _plain_characters(text)
    for pattern, instead in _SAME:
        text = pattern.sub(instead, text)
    text = _AND.sub(",", text.strip()).strip().rstrip(".,; ")
    whole = re.fullmatch(_WORDS, text)
    if whole:
        text = whole[1].strip().rstrip(".")
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _plain_characters(text: str) -> str:
    """NFKC, but an exponent stays one and 2½ does not become 21/2; characters without width are dropped."""
    text = _RAISED.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}".replace("−", "-"), text)
    text = _VULGAR.sub(_as_fraction, text)
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")


def _as_fraction(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def split_unit(text: str) -> tuple[str, str]:
    """A cleaned answer without its unit, and the unit as plain lower-case letters; percent and degrees are units."""
    match = _UNIT.fullmatch(text)
    if match is None or not re.search(r"\d|\\pi", match["body"]):
        return text, ""
    unit = re.sub(_WORDS, r"\1", match["unit"])
    unit = re.sub(r"[^a-z0-9%/]", "", unit.lower())
    body = match["body"].strip()
    unit = unit.removesuffix("s")
    return body.replace(",", "") if _THOUSANDS.fullmatch(body) else body, _UNIT_NAMES.get(unit, unit)


def _as_words(text: str) -> str:
    choice = _CHOICE.fullmatch(text.strip())
    text = choice[1] if choice else re.sub(_WORDS, r"\1", text)
    return re.sub(r"\s+", "", text).casefold()


def _same(a: Reading, b: Reading) -> bool:
    if {a.kind, b.kind} <= {"number", "expression"}:
        return _same_value(a.items[0], b.items[0])
    if a.kind != b.kind or a.mark != b.mark or len(a.items) != len(b.items):
        return False
    if a.kind in ("list", "set", "union"):
        return _same_in_any_order(a.items, b.items)
    if a.kind == "relation" and a.mark in ("=", "!="):
        return _same_equation(a.items, b.items)
    return all(map(_same, a.items, b.items))


def _same_in_any_order(a: Sequence[Reading], b: Sequence[Reading]) -> bool:
    left = list(b)
    for item in a:
        found = next((place for place, other in enumerate(left) if _same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_equation(a: Sequence[Reading], b: Sequence[Reading]) -> bool:
    """Sides as they are or swapped, or the same difference up to its sign: `y = 2x + 1` is `2x - y + 1 = 0`."""
    if all(map(_same, a, b)) or all(map(_same, a, b[::-1])):
        return True
    if any(side.kind not in ("number", "expression") for side in (*a, *b)):
        return False
    ours, theirs = (sides[0].items[0] - sides[1].items[0] for sides in (a, b))
    return _same_value(ours, theirs) or _same_value(ours, -theirs)


def _same_value(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if (a.is_Rational and b.is_Rational) or a.free_symbols != b.free_symbols or a.is_infinite or b.is_infinite:
        return False
    symbols = sorted(a.free_symbols, key=str)
    for point in range(_POINTS if symbols else 1):
        # Between 0.5 and 1.4, where towers of powers stay small.
        values = {symbol: (17 + point * 5 + 7 * place % 19) / 32 for place, symbol in enumerate(symbols)}
        x, y = (value.evalf(DIGITS + 10, subs=values, maxn=200) for value in (a, b))
        if not (x.is_number and y.is_number) or not abs(x - y) <= 10**-DIGITS * (1 + abs(x)):
            return False
    return True
