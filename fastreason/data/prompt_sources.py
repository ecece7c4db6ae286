r"""Problems of MATH, GSM8K, NuminaMath and DeepScaleR shaped sources to `prompts.jsonl`: answer found, doubles dropped.

The shape is told by the columns (`SHAPES`, the first that fits). Where a row has no answer of its own, it is the content
of the last `\boxed{}` of the solution. Rows keep the order of the input; of several with the same `normalise_text` the first
is kept. Holds a batch of rows, and about 100 bytes for every problem that is kept.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastreason.data.columns import ColumnError, Columns, optional_text, text
from fastreason.data.contamination import Contamination, too_close
from fastreason.data.lengths import LengthCounter, Lengths
from fastreason.data.order import normalise_text
from fastreason.data.preparation import CONTAMINATED, PreparedFolder, Progress, check_sum, text_key
from fastreason.data.raw_rows import BATCH_ROWS, MAX_SHOWN, BadRow, RawRow, RawRows
from fastreason.errors import DataError
from fastreason.rewards.extract import last_boxed

PROMPTS = "prompts.jsonl"
# What NuminaMath-1.5 has where there is no final answer.
NO_ANSWER = {"", "proof", "notfound"}
DROPS = ("bad_row", "problem_not_valid", "no_problem", "no_answer", "prompt_too_long", "repeated", "contaminated")

Problem = tuple[str, str | None]
"""The text of a problem and its answer, None where there is none."""


def _answered(columns: Columns, row: Mapping[str, Any]) -> Problem:
    answer = optional_text(columns, row, "answer") or last_boxed(text(columns, row, "solution"))
    return text(columns, row, "problem"), answer


def _gsm8k(columns: Columns, row: Mapping[str, Any]) -> Problem:
    """What follows the last `####`, thousands commas removed."""
    _, mark, answer = text(columns, row, "answer").rpartition("####")
    return text(columns, row, "problem"), answer.replace(",", "") if mark else None


@dataclass(frozen=True)
class Shape:
    """A kind of source: the column of each role, and how a row becomes a problem and its answer."""

    columns: Mapping[str, str]
    read: Callable[[Columns, Mapping[str, Any]], Problem]


SHAPES = {
    "gsm8k": Shape({"problem": "question", "answer": "answer"}, _gsm8k),
    "deepscaler": Shape({"problem": "problem", "answer": "answer"}, _answered),
    "numina": Shape({"problem": "problem", "solution": "solution", "source": "source"}, _answered),
    "math": Shape({"problem": "problem", "solution": "solution"}, _answered),
}
KEPT = ("source", "level", "subject", "type")
# Columns that a source may have; the first that is there is taken.
OPTIONAL = {
    "id": ("id", "unique_id", "uuid"),
    "answer": ("answer",),
    "solution": ("solution",),
    "valid": ("problem_is_valid",),
    "answer_missing": ("answer_missing",),
    **{name: (name,) for name in KEPT},
}


def find_shape(names: Sequence[str], asked: str | None = None) -> tuple[str, Columns]:
    """The first shape whose columns are among `names`, or `asked`; raises `DataError` that lists what is there."""
    shapes = {asked: SHAPES[asked]} if asked else SHAPES
    for name, shape in shapes.items():
        if set(shape.columns.values()) <= set(names):
            found = {role: next((c for c in known if c in names), "") for role, known in OPTIONAL.items()}
            return name, Columns({role: column for role, column in {**found, **shape.columns}.items() if column})
    known = "; ".join(f"{name}: {' and '.join(shape.columns.values())}" for name, shape in shapes.items())
    raise DataError(f"the columns fit no known source ({known}). There are: {', '.join(names)}. Rename them.")


class PromptPreparation:
    """One pass over the rows: `run` writes `prompts.jsonl`, and what goes into the report."""

    def __init__(
        self,
        shape: str,
        columns: Columns,
        folder: PreparedFolder,
        counter: LengthCounter,
        contamination: Contamination,
        max_prompt: int | None,
        drop_share: float | None,
    ) -> None:
        self._shape, self._columns, self._folder = SHAPES[shape], columns, folder
        self._counter, self._contamination = counter, contamination
        self._max_prompt, self._drop_share = max_prompt, drop_share
        self._texts: set[int] = set()
        self._ids: set[int] = set()
        self.dropped = dict.fromkeys(DROPS, 0)
        self.num_rows = self.num_prompts = 0
        self.lengths = Lengths(("prompt",), counter.unit)
        self.seconds = 0.0

    def run(self, rows: RawRows, limit: int | None) -> None:
        """Read, filter and write all rows, or the first `limit`."""
        wanted = np.arange(rows.num_rows) < (rows.num_rows if limit is None else limit)
        progress = Progress(int(wanted.sum()))
        self._folder.file(PROMPTS)
        stream = rows.read(wanted, self._columns.roots)
        while batch := list(itertools.islice(stream, BATCH_ROWS)):
            found = [line for item in batch if (line := self._read(item)) is not None]
            lengths = self._counter.prompts([line["problem"] for line in found])
            for line, length in zip(found, lengths, strict=True):
                if drop := self._drop(line, length):
                    self.dropped[drop] += 1
                    continue
                self.lengths.add("prompt", length)
                self.num_prompts += 1
                self._folder.write(PROMPTS, {key: value for key, value in line.items() if value is not None})
            progress.add(len(batch))
            self.num_rows += len(batch)
        self.seconds = progress.seconds
        check_sum(self.num_rows, self.dropped, self.num_prompts)

    def _read(self, item: RawRow) -> dict[str, Any] | None:
        """The line to write, unless the row is bad or lacks what is needed."""
        columns, row = self._columns, item.columns
        if isinstance(row, BadRow):
            self._refuse(item, row.reason, row.start)
            return None
        try:
            problem, answer = self._shape.read(columns, row)
            id = optional_text(columns, row, "id") or str(item.number)
            kept = {role: optional_text(columns, row, role) for role in KEPT}
            valid = optional_text(columns, row, "valid") or ""
        except ColumnError as error:
            self._refuse(item, str(error), repr(row)[:MAX_SHOWN])
            return None
        drop = None
        if "valid" in columns.of and valid.strip().lower() != "yes":
            drop = "problem_not_valid"
        elif not problem.strip():
            drop = "no_problem"
        elif answer is None or answer.strip().lower() in NO_ANSWER or columns.value(row, "answer_missing") is True:
            drop = "no_answer"
        if drop:
            self.dropped[drop] += 1
            return None
        return {"id": id, "problem": problem, "answer": (answer or "").strip(), **kept, "row": item.number}

    def _refuse(self, item: RawRow, reason: str, start: str) -> None:
        self.dropped["bad_row"] += 1
        self._folder.refuse(item, reason, start)

    def _drop(self, line: dict[str, Any], length: int) -> str | None:
        """The filter that drops a problem, after those that need its text alone."""
        if self._max_prompt is not None and length > self._max_prompt:
            return "prompt_too_long"
        key = text_key(normalise_text(line["problem"]))
        if key in self._texts:
            return "repeated"
        self._texts.add(key)
        while (number := text_key(line["id"])) in self._ids:
            line["id"] = f"{line['id']}#{line['row']}"
        self._ids.add(number)
        matches = self._contamination.find(line["problem"])
        for match in matches:
            self._folder.write(CONTAMINATED, {"id": line["id"], "row": line["row"], **asdict(match)})
        return "contaminated" if too_close(matches, self._drop_share) else None
