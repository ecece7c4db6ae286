"""The folder of one evaluation while it is written: settings beside it, rows appended, scores at the end.

It refuses to hold rows that were made with other settings: the settings' hash is the folder's name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastreason.errors import DataError
from fastreason.evaluation.rows import SAMPLES_FILE, SETTINGS_FILE, EvalSample, read_settings, settings_key
from fastreason.rewards import read_answer
from fastreason.rollout.line_file import Line, LineFile, replace_file
from fastreason.rollout.sample_store import Reply
from fastreason.types import Grade, Prompt

LONG_PROMPT, TIMEOUT = "long_prompt", "timeout"


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that name a folder: all but where things are, and the grader, whose verdicts can be made anew."""
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    kept.pop("grader")
    kept["model"].pop("path")
    benchmark = kept["benchmark"]
    kept["benchmark"] = {key: benchmark[key] for key in ("name", "checksum", "num_problems")}
    return kept


def evaluation_folder(out: Path, label: str, settings: Mapping[str, Any]) -> Path:
    return out / label / settings["benchmark"]["name"] / settings_key(identity(settings))


class EvalStore:
    """The rows in one folder; `kept[id]` has the numbers of those to a problem. One process at a time may hold it.

    Raises ConfigError where another process holds it, DataError where a line in the middle cannot be read or comes twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: dict[str, set[int]] = {}
        self._decoder = msgspec.json.Decoder(EvalSample)
        self._file = LineFile(folder / SAMPLES_FILE)
        self._file.scan(self._index)

    def __len__(self) -> int:
        return sum(map(len, self.kept.values()))

    def record(self, prompt: Prompt, sample: int, reply: Reply, grade: Grade) -> EvalSample:
        """Append response number `sample` to a problem, as it was judged; returns the row."""
        row = make_row(prompt, sample, reply, grade)
        self.add(row)
        return row

    def add(self, row: EvalSample) -> None:
        self._file.append(msgspec.json.encode(row) + b"\n")
        self.kept.setdefault(row.problem, set()).add(row.sample)

    def replace(self, rows: list[EvalSample]) -> None:
        """Put other rows in the place of all; then the store is closed."""
        self._file.replace(msgspec.json.encode(row) + b"\n" for row in rows)

    def close(self) -> None:
        """Bring everything to the disk and let go of the lock. May be called twice."""
        self._file.close()

    def _index(self, line: Line) -> None:
        place = f"{self._file.path}, line {line.number}"
        try:
            row = self._decoder.decode(line.content)
        except msgspec.DecodeError as error:
            raise DataError(f"{place} is no graded response: {error}. Repair or delete the line.") from error
        held = self.kept.setdefault(row.problem, set())
        if row.sample in held:
            raise DataError(f"{place}: response {row.sample} to {row.problem!r} is there twice. Delete the line.")
        held.add(row.sample)


def make_row(prompt: Prompt, sample: int, reply: Reply, grade: Grade) -> EvalSample:
    """The row of a graded response."""
    row = EvalSample(
        problem=prompt.id,
        sample=sample,
        question=prompt.text,
        gold=prompt.answer,
        response=reply.text,
        num_tokens=reply.num_tokens or 0,
        truncated=reply.truncated,
        correct=False,
        formatted=False,
        level=_said(prompt, "level"),
        subject=_said(prompt, "subject"),
        logp_sum=reply.logp_sum,
    )
    return judged(row, grade)


def judged(row: EvalSample, grade: Grade) -> EvalSample:
    """The row with another verdict."""
    strict = grade.parts.get("strict")
    return msgspec.structs.replace(
        row,
        correct=grade.correct,
        formatted=grade.parts.get("format", 0.0) >= 0.5,
        strict=None if strict is None else strict >= 0.5,
        answer=read_answer(row.response),
        error=TIMEOUT if grade.timed_out else None,
    )


def unasked_row(prompt: Prompt, sample: int) -> EvalSample:
    """The row of a problem whose prompt is too long to be asked: wrong."""
    row = make_row(prompt, sample, Reply(text="", num_tokens=0), Grade(reward=0.0, correct=False))
    return msgspec.structs.replace(row, error=LONG_PROMPT)


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / SETTINGS_FILE, [msgspec.json.format(msgspec.json.encode(dict(settings))) + b"\n"])


def held_settings(folder: Path) -> dict[str, Any] | None:
    """What the rows of a folder were made with; None where there is none."""
    return read_settings(folder) if (folder / SETTINGS_FILE).is_file() else None


def _said(prompt: Prompt, key: str) -> str | None:
    value = prompt.metadata.get(key)
    return str(value) if isinstance(value, str | int) else None
