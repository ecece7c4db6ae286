r"""One mathematical expression from LaTeX tokens: a recursive descent that builds it exactly, in sympy, and within limits.

It owns what a name, an operator and a power mean. What it cannot read raises `UnreadableError`. Nothing is simplified, and no
text is evaluated as code.
"""

import re
from functools import lru_cache
from typing import Any

MAX_DEPTH = 30
MAX_BITS = 10_000  # of a power of integers
MAX_EXPONENT = 10_000
MAX_TOWER = 2  # exponents in exponents
MAX_FACTORIAL = 200

OPEN, CLOSE = {"(", "[", "{", "\\{"}, {")", "]", "}", "\\}"}
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_PROPER = re.compile(r"\\frac(\d|\{\d+\})(\d|\{\d+\})")  # behind a whole number: a mixed number
_GREEK = {
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "theta",
    "lambda",
    "mu",
    "nu",
    "rho",
    "sigma",
    "tau",
    "phi",
    "omega",
}
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"}
_FUNCTIONS |= {"ln", "log", "exp"}
_SYMPY_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log"}


class UnreadableError(ValueError):
    """The text is not one of the forms that are known here, or is too big."""


def closing(tokens: list[str], start: int) -> int:
    """Where the bracket at `start` closes; an interval's brackets need not match."""
    level = 0
    for place in range(start, len(tokens)):
        level += (tokens[place] in OPEN) - (tokens[place] in CLOSE)
        if level == 0:
            return place
    raise UnreadableError("a bracket is not closed")


class Expression:
    """A recursive descent over the tokens of one expression."""

    def __init__(self, tokens: list[str], depth: int) -> None:
        self.tokens, self.place, self.depth, self.tower, self.undone = list(tokens), 0, depth, 0, 0
        self._inside_bars = False
        self.sympy = _sympy()

    def read(self) -> tuple[Any, int]:
        """The expression, and how much arithmetic between rational numbers it leaves undone."""
        value = self._sum()
        if self.place < len(self.tokens):
            raise UnreadableError(f"{self.tokens[self.place]!r} was not expected")
        if value.has(self.sympy.nan, self.sympy.zoo):
            raise UnreadableError("not a number")
        return value, self.undone

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
            end = closing(self.tokens, self.place - 1) if token == "{" else self.place - 1
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
