r"""Finds the final answer that a response marks, by `\boxed{...}` or `<answer>...</answer>`, or says. Parses no mathematics."""

import re

_BRACE = re.compile(r"\\boxed[ \t]*\{|\\.|[{}]", re.DOTALL)
_SAID = re.compile(r"(?:\banswer[ \t]*(?:is|:)|####)[ \t:*]*([^\n]{1,200})", re.IGNORECASE)
_FORMULA = re.compile(r"\$([^$\n]{1,200})\$")
_NUMBER = re.compile(r"(?<![\w.])[-\N{MINUS SIGN}]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<![\w.])-?\d+(?:\.\d+)?(?:/\d+)?")
SHORT = 40  # characters of a response that is nothing but an answer
_OPEN, _CLOSE = "<answer>", "</answer>"


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` (braces balanced, `\{` and `\}` not counted), or None."""
    found = _last_boxed(text)
    return found[1] if found else None


def last_answer_tag(text: str) -> str | None:
    """The stripped content of the last `<answer>...</answer>`, or None."""
    found = _last_answer_tag(text)
    return found[1] if found else None


def extract_answer(text: str) -> str:
    r"""The answer marked last, by `\boxed{}` or by `<answer></answer>`; the stripped text where none is."""
    found = [match for match in (_last_boxed(text), _last_answer_tag(text)) if match]
    return max(found)[1].strip() if found else text.strip()


def read_answer(text: str) -> str | None:
    r"""What a response answers, marked or not; None where that cannot be read. For votes and comparisons, not for verdicts.

    The answer marked last; else what follows the last "answer is", "answer:" or "####" (the formula in it, the first number in
    it, or all of it); else the last number; else the whole of a short response.
    """
    found = [match for match in (_last_boxed(text), _last_answer_tag(text)) if match]
    if found:
        return max(found)[1].strip() or None
    said = list(_SAID.finditer(text))
    if said:
        words = said[-1].group(1)
        formula = _FORMULA.search(words)
        number = _NUMBER.search(words)
        found_in_words = formula.group(1) if formula else number.group() if number else words.rstrip(". *")
        return found_in_words.strip() or None
    numbers = _NUMBER.findall(text)
    if numbers:
        return numbers[-1]
    stripped = text.strip()
    return stripped if stripped and len(stripped) <= SHORT else None


def _last_boxed(text: str) -> tuple[int, str] | None:
    """Start and content of the complete box that opens last; one pass, so that unclosed boxes cost nothing extra."""
    best: tuple[int, str] | None = None
    open_braces: list[re.Match[str]] = []
    for token in _BRACE.finditer(text):
        if token.group().endswith("{") and token.group() != "\\{":
            open_braces.append(token)
        elif token.group() == "}" and open_braces:
            opening = open_braces.pop()
            if len(opening.group()) > 1 and (best is None or opening.start() > best[0]):
                best = opening.start(), text[opening.end() : token.start()]
    return best


def _last_answer_tag(text: str) -> tuple[int, str] | None:
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, end) if end >= 0 else -1
    return (start, text[start + len(_OPEN) : end].strip()) if start >= 0 else None
