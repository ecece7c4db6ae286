r"""Reads one final answer, LaTeX or plain text, into numbers, expressions and collections: small, exact, and bounded.

It knows the forms that answers of mathematics problems have and nothing else: what it cannot read raises `UnreadableError`
at once, and nothing that it reads takes long. Powers, factorials and nesting have limits, expressions are built and not
simplified. It evaluates no text as code. It is independent of math-verify's parser on purpose: two graders that share a
parser share its mistakes.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MAX_LENGTH = 1000
MAX_DEPTH = 30
MAX_BITS = 10_000  # of a power of integers
MAX_EXPONENT = 10_000
MAX_TOWER = 2  # exponents in exponents
MAX_FACTORIAL = 200

_TOKEN = re.compile(
    r"\d+(?:\.\d+)?|\.\d+|\\(?:begin|end)\{[a-zA-Z]+\*?\}|\\[A-Za-z]+|\\.|<=|>=|!=|[A-Za-z]|\S", re.DOTALL
)
_PROPER = re.compile(r"\\frac(\d|\{\d+\})(\d|\{\d+\})")  # behind a whole number: a mixed number
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_RELATIONS = {"=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "\\neq": "!=", "\\ne": "!="}
_RELATIONS |= {"\\le": "<=", "\\leq": "<=", "\\ge": ">=", "\\geq": ">=", "\\lt": "<", "\\gt": ">", "\\in": "in"}
_FLIPPED = {"<": ">", "<=": ">="}
_OPEN, _CLOSE = {"(", "[", "{", "\\{"}, {")", "]", "}", "\\}"}
_GREEK = "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi omega Gamma Delta Theta Phi Omega".split()
_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp".split()
_SYMPY_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log"}


class UnreadableError(ValueError):
    """The text is not one of the forms that are known here, or is too big."""


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
        place = tokens.index("\\pm")
        both = [_read([*tokens[:place], sign, *tokens[place + 1 :]], depth + 1) for sign in "+-"]
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
    if tokens[0] == "\\{" and _closing(tokens, 0) == len(tokens) - 1:
        parts = _split(tokens[1:-1], {",", ";"}) if len(tokens) > 2 else []
        return _collection("set", [_read(part, depth + 1) for part in parts])
    if tokens[0] in "([" and _closing(tokens, 0) == len(tokens) - 1:
        parts = _split(tokens[1:-1], {",", ";"})
        if len(parts) > 1:
            return _collection("tuple", [_read(part, depth + 1) for part in parts], tokens[0] + tokens[-1])
    return _Expression(tokens, depth).read()


def _collection(kind: str, items: list[Reading], mark: str = "") -> Reading:
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
        if token in _OPEN or token.startswith("\\begin{"):
            level += 1
        elif token in _CLOSE or token.startswith("\\end{"):
            level -= 1
        elif level == 0 and token in wanted:
            found.append(token)
    return found


def _split(tokens: list[str], separators: set[str]) -> list[list[str]]:
    level, parts = 0, list[list[str]]([[]])
    for token in tokens:
        if token in _OPEN or token.startswith("\\begin{"):
            level += 1
        elif token in _CLOSE or token.startswith("\\end{"):
            level -= 1
        if level == 0 and token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _closing(tokens: list[str], start: int) -> int:
    """Where the bracket at `start` closes; an interval's brackets need not match."""
    level = 0
    for place in range(start, len(tokens)):
        level += (tokens[place] in _OPEN) - (tokens[place] in _CLOSE)
        if level == 0:
            return place
    raise UnreadableError("a bracket is not closed")


class _Expression:
    """A recursive descent over the tokens of one expression."""

    def __init__(self, tokens: list[str], depth: int) -> None:
        self.tokens, self.place, self.depth, self.tower, self.undone = list(tokens), 0, depth, 0, 0
        self._inside_bars = False
        self.sympy = _sympy()

    def read(self) -> Reading:
        value = self._sum()
        if self.place < len(self.tokens):
            raise UnreadableError(f"{self.tokens[self.place]!r} was not expected")
        if value.has(self.sympy.nan, self.sympy.zoo):
            raise UnreadableError("not a number")
        return Reading("number" if value.is_Rational else "expression", (value,), undone=self.undone)

    def _peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        self.place += 1
        return token

    def _expect(self, token: str) -> None:
        if self._next() != token:
            raise UnreadableError(f"{token!r} is missing")

    def _sum(self) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        value = self._product()
        while self._peek() in ("+", "-"):
            sign = self._next()
            other = self._product()
            self.undone += bool(value.is_Rational and other.is_Rational)
            value = value + other if sign == "+" else value - other
        self.depth -= 1
        return value

    def _product(self) -> Any:
        if self._peek() in ("+", "-"):
            sign = self._next()
            value = self._signed_product()
            return -value if sign == "-" else value
        return self._signed_product()

    def _signed_product(self) -> Any:
        value = self._power()
        while True:
            token = self._peek()
            if token in ("*", "\\cdot", "\\times"):
                self.place += 1
                other = self._factor()
                self.undone += bool(value.is_Rational and other.is_Rational)
                value = value * other
            elif token in ("/", "\\div"):
                self.place += 1
                value = self._divided(value, self._factor())
            elif self._starts_factor(token):
                other = self._power()
                self.undone += bool(value.is_Rational and other.is_Rational)
                value = value * other
            else:
                return value

    def _factor(self) -> Any:
        if self._peek() == "-":
            self.place += 1
            return -self._power()
        return self._power()

    def _starts_factor(self, token: str) -> bool:
        opens = token in ("(", "[", "{", "|") and not (token == "|" and self._inside_bars)
        named = token[1:] in _FUNCTIONS or token[1:] in _GREEK or token in ("\\frac", "\\sqrt", "\\pi", "\\binom")
        return opens or token.isalpha() or (token.startswith("\\") and named) or bool(_NUMBER.fullmatch(token))

    def _divided(self, above: Any, below: Any) -> Any:
        if below == 0:
            raise UnreadableError("division by zero")
        if above.is_Integer and below.is_Integer:
            self.undone += abs(below) == 1 or self.sympy.gcd(above, below) != 1
        return above / below

    def _power(self) -> Any:
        base = self._atom()
        while self._peek() == "!":
            self.place += 1
            if not base.is_Integer or not 0 <= base <= MAX_FACTORIAL:
                raise UnreadableError(f"the factorial of {base}")
            base = self.sympy.factorial(base)
        if self._peek() != "^":
            return base
        self.place += 1
        self.tower += 1
        if self.tower > MAX_TOWER:
            raise UnreadableError("a tower of powers")
        exponent = self._argument()
        self.tower -= 1
        return self._raised(base, exponent)

    def _raised(self, base: Any, exponent: Any) -> Any:
        if exponent.is_number and not abs(exponent.evalf(15)) <= MAX_EXPONENT:
            raise UnreadableError("a huge power")
        if base.is_Rational and exponent.is_Rational:
            bits = max(abs(base.p), base.q).bit_length() * abs(exponent)
            if bits > MAX_BITS or (base == 0 and exponent <= 0):
                raise UnreadableError("a huge power, or one of zero")
        return base**exponent

    def _argument(self, one_digit: bool = False) -> Any:
        r"""What follows `^`, `_`, `\sqrt` or `\frac`: braces, or one token. `\frac12` is a half, so digits come apart."""
        token = self._peek()
        if token == "{":
            self.place += 1
            value = self._sum()
            self._expect("}")
            return value
        if token == "-":
            self.place += 1
            return -self._argument(one_digit)
        if one_digit and token.isdigit() and len(token) > 1:
            self.tokens[self.place : self.place + 1] = [token[0], token[1:]]
        return self._atom()

    def _atom(self) -> Any:
        token = self._next()
        if _NUMBER.fullmatch(token):
            return self._number(token)
        if token in ("(", "[", "{"):
            value = self._sum()
            self._expect({"(": ")", "[": "]", "{": "}"}[token])
            return value
        if token == "|":
            outside, self._inside_bars = self._inside_bars, True
            value = self._sum()
            self._inside_bars = outside
            self._expect("|")
            return self.sympy.Abs(value)
        if token.isalpha() and token.isascii():
            return self._symbol(token)
        if token.startswith("\\"):
            return self._command(token[1:])
        raise UnreadableError(f"{token!r} was not expected")

    def _number(self, token: str) -> Any:
        value = self.sympy.Rational(token)
        if self._peek() == "_":
            return self._symbol(token)  # digits in a base: a name of its own
        if self._peek() == "\\frac" and value.is_Integer and _PROPER.match("".join(self.tokens[self.place :])):
            self.place += 1
            return value + self._divided(self._argument(one_digit=True), self._argument(one_digit=True))
        return value

    def _symbol(self, name: str) -> Any:
        if self._peek() == "_":
            self.place += 1
            token = self._next()
            end = _closing(self.tokens, self.place - 1) if token == "{" else self.place - 1
            name += "_" + "".join(self.tokens[self.place : end] if token == "{" else [token])
            self.place = end + 1
            return self.sympy.Symbol(name)
        constants = {"e": self.sympy.E, "i": self.sympy.I}
        return constants[name] if name in constants else self.sympy.Symbol(name)

    def _command(self, name: str) -> Any:
        if name == "frac":
            return self._divided(self._argument(one_digit=True), self._argument(one_digit=True))
        if name == "sqrt":
            root = 2
            if self._peek() == "[":
                self.place += 1
                root = self._sum()
                self._expect("]")
            return self._raised(self._argument(one_digit=True), self.sympy.Integer(1) / root)
        if name == "binom":
            above, below = self._argument(), self._argument()
            if not (above.is_Integer and below.is_Integer and 0 <= above <= MAX_FACTORIAL):
                raise UnreadableError("a binomial coefficient of no small integers")
            return self.sympy.binomial(above, below)
        if name in ("pi", "infty"):
            return self.sympy.pi if name == "pi" else self.sympy.oo
        if name in _GREEK:
            return self._symbol(name)
        if name in _FUNCTIONS:
            return self._function(name)
        raise UnreadableError(f"the command \\{name}")

    def _function(self, name: str) -> Any:
        base, exponent = None, None
        while self._peek() in ("_", "^"):
            if self._next() == "_":
                base = self._argument()
            else:
                exponent = self._argument()
        argument = self._atom() if self._peek() in ("(", "[", "{", "|") else self._power()
        if name == "exp":
            return self._raised(self.sympy.E, argument)
        if base is not None and (name != "log" or base in (0, 1)):
            raise UnreadableError(f"\\{name} with an index")
        function = getattr(self.sympy, _SYMPY_NAMES.get(name, name))
        value = function(argument) if base is None else function(argument) / function(base)
        return value if exponent is None else self._raised(value, exponent)


@lru_cache(maxsize=1)
def _sympy() -> Any:
    import sympy

    return sympy
