r"""Finds the final answer that a response marks, by `\boxed{...}` or `<answer>...</answer>`. Parses no mathematics."""

import re

_BRACE = re.compile(r"\\boxed[ \t]*\{|\\.|[{}]", re.DOTALL)
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
