r"""Reads one final answer, LaTeX or plain text, into numbers, expressions and collections: small, exact, and bounded.

It knows the forms that answers of mathematics problems have and nothing else: what it cannot read raises `UnreadableError`
at once, and nothing that it reads takes long. Powers, factorials and nesting have limits, expressions are built and not
simplified. It evaluates no text as code. It is independent of math-verify's parser on purpose: two graders that share a
parser share its mistakes.
"""

import re
from dataclasses import dataclass
from typing import Any

from fastreason.rewards.latex_expression import CLOSE, MAX_DEPTH, OPEN, Expression, UnreadableError, closing

MAX_LENGTH = 1000
MAX_ITEMS = 32  # of a list, set or union: each is compared with each

_TOKEN = re.compile(
    r"\d+(?:\.\d+)?|\.\d+|\\(?:begin|end)\{[a-zA-Z]+\*?\}|\\[A-Za-z]+|\\.|<=|>=|!=|[A-Za-z]|\S", re.DOTALL
)
_RELATIONS = {"=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "\\neq": "!=", "\\ne": "!="}
_RELATIONS |= {"\\le": "<=", "\\leq": "<=", "\\ge": ">=", "\\geq": ">=", "\\lt": "<", "\\gt": ">", "\\in": "in"}
_FLIPPED = {"<": ">", "<=": ">="}


@dataclass(frozen=True)
class Reading:
    """One answer. `kind` says what `items` are:

    `number`, `expression`: one sympy expression; `list` (bare commas), `set`, `union`: readings in any order;
    `tuple`: readings in order, with `mark` the brackets ("(]" for a half-open interval); `relation`: the sides, with
    `mark` their signs (`>` and `>=` are turned round); `matrix`: rows of readings, with `mark` the kind of brackets.

    `undone` counts arithmetic left undone: sums, differences and products of rational numbers, fractions not in lowest
    terms.
    """

    kind: str
    items: tuple[Any, ...]
    mark: str = ""
    undone: int = 0


def read_latex(text: str) -> Reading:
    """Read a cleaned answer (see `fastreason.rewards.strict.clean_answer`); raises `UnreadableError`."""
    if len(text) > MAX_LENGTH:
        raise UnreadableError(f"an answer of {len(text)} characters")
    tokens = _TOKEN.findall(text)
    if not tokens:
        raise UnreadableError("nothing there")
    return _read(tokens, 0)


def _read(tokens: list[str], depth: int) -> Reading:
    if depth > MAX_DEPTH:
        raise UnreadableError("nested too deeply")
    if not tokens:
        raise UnreadableError("a part is missing")
    if "\\pm" in tokens:
        # All upper signs, or all lower ones: each on its own would be 2^n readings.
        both = [_read([sign if token == "\\pm" else token for token in tokens], depth + 1) for sign in "+-"]
        return _collection("list", both)
    for separators, kind in (({",", ";"}, "list"), ({"\\cup"}, "union")):
        parts = _split(tokens, separators)
        if len(parts) > 1:
            return _collection(kind, [_read(part, depth + 1) for part in parts])
    signs = [_RELATIONS[token] for token in _at_top(tokens, set(_RELATIONS))]
    if signs:
        sides = [_read(part, depth + 1) for part in _split(tokens, set(_RELATIONS))]
        if signs[0] in _FLIPPED and all(sign in _FLIPPED for sign in signs):
            signs, sides = [_FLIPPED[sign] for sign in signs[::-1]], sides[::-1]
        return _collection("relation", sides, " ".join(signs))
    if tokens[0].startswith("\\begin{"):
        return _read_matrix(tokens, depth)
    if tokens[0] == "\\{" and closing(tokens, 0) == len(tokens) - 1:
        parts = _split(tokens[1:-1], {",", ";"}) if len(tokens) > 2 else []
        return _collection("set", [_read(part, depth + 1) for part in parts])
    if tokens[0] in "([" and closing(tokens, 0) == len(tokens) - 1:
        parts = _split(tokens[1:-1], {",", ";"})
        if len(parts) > 1:
            return _collection("tuple", [_read(part, depth + 1) for part in parts], tokens[0] + tokens[-1])
    value, undone = Expression(tokens, depth).read()
    return Reading("number" if value.is_Rational else "expression", (value,), undone=undone)


def _collection(kind: str, items: list[Reading], mark: str = "") -> Reading:
    if len(items) > MAX_ITEMS:
        raise UnreadableError(f"{len(items)} parts")
    return Reading(kind, tuple(items), mark, sum(item.undone for item in items))


def _read_matrix(tokens: list[str], depth: int) -> Reading:
    kind = tokens[0][len("\\begin{") : -1]
    if tokens[-1] != f"\\end{{{kind}}}" or not kind.endswith("matrix"):
        raise UnreadableError(f"no matrix: {tokens[0]}")
    rows = [row for row in _split(tokens[1:-1], {"\\\\"}) if row]
    read = [_collection("row", [_read(cell, depth + 1) for cell in _split(row, {"&"})]) for row in rows]
    # Round and square brackets are a matter of taste; bars are a determinant.
    return _collection("matrix", read, kind if kind[0] in "vV" else "")


def _at_top(tokens: list[str], wanted: set[str]) -> list[str]:
    level, found = 0, []
    for token in tokens:
        if token in OPEN or token.startswith("\\begin{"):
            level += 1
        elif token in CLOSE or token.startswith("\\end{"):
            level -= 1
        elif level == 0 and token in wanted:
            found.append(token)
    return found


def _split(tokens: list[str], separators: set[str]) -> list[list[str]]:
    level, parts = 0, list[list[str]]([[]])
    for token in tokens:
        if token in OPEN or token.startswith("\\begin{"):
            level += 1
        elif token in CLOSE or token.startswith("\\end{"):
            level -= 1
        if level == 0 and token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
