"""One response of an evaluation as a row of `samples.jsonl`, and the files that one evaluation leaves. No heavy import.

    OUT/<model>/<benchmark>/<key>/
        settings.json    all that the results depend on; <key> is a short hash of it
        samples.jsonl    a row a response, appended as it finishes
        answers.json     which answers to a problem are equal
        scores.json      what `scores.py` makes of the three

The number of responses to a problem, n, is not in the settings: it only grows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastreason.errors import DataError

SAMPLES_FILE, SETTINGS_FILE = "samples.jsonl", "settings.json"
ANSWERS_FILE, SCORES_FILE = "answers.json", "scores.json"
RIGHT = 0  # the class of every right answer

Classes = Mapping[str, Mapping[str, int]]
"""For each problem's id the class of each wrong answer to it: equal answers have equal numbers, from 1."""


class EvalSample(msgspec.Struct, frozen=True, kw_only=True):
    r"""Response number `sample` to the problem of id `problem`, and what is thought of it.

    `correct` is the verdict of the grader of training, `strict` that of a scorer that compares texts and numbers alone (None
    where there is none), `formatted` whether the response ends properly with a marked answer, `answer` what it answers (None
    where nothing can be read). `num_tokens` counts the generated tokens, the end token included. `error` is why there is no
    proper verdict or response: "timeout" (of the grader), "long_prompt" (not asked); such a response is wrong.
    `logp_sum` (nats, under the sampling distribution) is there where the engine gives it.
    """

    problem: str
    sample: int
    question: str
    gold: str | None
    response: str
    num_tokens: int
    truncated: bool
    correct: bool
    formatted: bool
    answer: str | None = None
    strict: bool | None = None
    error: str | None = None
    level: str | None = None
    subject: str | None = None
    logp_sum: float | None = None

    @property
    def graders_differ(self) -> bool:
        """Whether one of the two calls it right and the other wrong."""
        return self.strict is not None and self.strict is not self.correct


def answer_class(row: EvalSample, classes: Classes) -> int | str | None:
    """What a response votes for: RIGHT, the class of its wrong answer, or None where it answers nothing.

    An answer without a class is a class of its own: its text.
    """
    if row.correct:
        return RIGHT
    if row.answer is None:
        return None
    return classes.get(row.problem, {}).get(row.answer, row.answer)


def grouped(rows: Iterable[EvalSample], n: int | None = None) -> dict[str, list[EvalSample]]:
    """The rows of each problem, by the number of the sample; with `n`, only samples 0 to n - 1."""
    by_problem: dict[str, list[EvalSample]] = {}
    for row in rows:
        if n is None or row.sample < n:
            by_problem.setdefault(row.problem, []).append(row)
    return {problem: sorted(given, key=lambda row: row.sample) for problem, given in by_problem.items()}


def read_samples(folder: Path, texts: bool = True) -> Iterator[EvalSample]:
    """The rows of an evaluation's folder, but for a last one whose writer was killed amid it; raises DataError.

    texts: False leaves question and response empty: scores do not need them, and they fill the memory.
    """
    path, decoder = folder / SAMPLES_FILE, msgspec.json.Decoder(EvalSample)
    if not path.is_file():
        raise DataError(f"{folder} holds no {SAMPLES_FILE}: it is no folder of an evaluation. See fastreason eval.")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise DataError(
                    f"{path}, line {number} is no graded response: {error}. Repair or delete it."
                ) from error
            yield row if texts else msgspec.structs.replace(row, question="", response="")


def read_classes(folder: Path) -> dict[str, dict[str, int]]:
    """`answers.json` of an evaluation's folder; empty where it has none."""
    try:
        return msgspec.json.decode((folder / ANSWERS_FILE).read_bytes(), type=dict[str, dict[str, int]])
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError as error:
        raise DataError(
            f"{folder / ANSWERS_FILE} cannot be read: {error}. Make it anew: fastreason regrade."
        ) from error


def read_settings(folder: Path) -> dict[str, Any]:
    """`settings.json` of an evaluation's folder; raises DataError where it has none."""
    path = folder / SETTINGS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Give a folder that fastreason eval has written.") from error


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short name of settings: 12 hexadecimal digits, the same for equal settings whatever their order."""
    content = msgspec.json.encode(msgspec.to_builtins(dict(settings)), order="deterministic")
    return hashlib.blake2b(content, digest_size=6).hexdigest()


def evaluation_folders(root: Path) -> list[Path]:
    """The folders at and under `root` that hold an evaluation, in the order of their names."""
    return sorted(path.parent for path in root.rglob(SETTINGS_FILE) if (path.parent / SAMPLES_FILE).is_file())
