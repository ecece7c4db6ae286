r"""The normal form of an answer as a text, and its value where it is a plain number: what makes answers vote together.

No algebra, and so no hang. `fastreason.rewards.strict` reads more forms, but makes no form of them that could be counted.
"""

import re
from fractions import Fraction

_COMMANDS = re.compile(r"\\(?:left|right|displaystyle|,|;|!|:|quad|qquad)(?![a-zA-Z])|\\ |[$~\s]")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac")
_BARE_FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}|(\d))(?:\{([^{}]*)\}|(\d))")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_NUMBER = re.compile(r"[-+]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})")
_QUOTIENT = re.compile(r"([-+]?)(?:\\frac\{([^{}]+)\}\{([^{}]+)\}|([^/\\{}]+)/([^/\\{}]+))")


def normalise_answer(text: str) -> str:
    r"""The text without spaces, math delimiters and what only shapes LaTeX; `\frac12` is `\frac{1}{2}`, 1,000 is 1000."""
    text = text.strip().removesuffix(".").replace("\N{MINUS SIGN}", "-").replace(r"\$", "")
    text = _TEXT.sub(lambda match: match.group(1).lower(), text)
    text = _COMMANDS.sub("", text).replace(r"^\circ", "").replace(r"^{\circ}", "")
    text = _FRACTION.sub(r"\\frac", text)
    text = _BARE_FRACTION.sub(
        lambda m: rf"\frac{{{m[1] if m[2] is None else m[2]}}}{{{m[3] if m[4] is None else m[4]}}}", text
    )
    return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)


def read_number(normal: str) -> Fraction | None:
    """The value of a normal form that is a number or a quotient of two, exactly; None for everything else."""
    if _NUMBER.fullmatch(normal):
        return Fraction(normal)
    quotient = _QUOTIENT.fullmatch(normal)
    if quotient is None:
        return None
    sign, *parts = quotient.groups()
    numbers = [part for part in parts if part is not None]
    if not all(_NUMBER.fullmatch(number) for number in numbers) or not Fraction(numbers[1]):
        return None
    value = Fraction(numbers[0]) / Fraction(numbers[1])
    return -value if sign == "-" else value
