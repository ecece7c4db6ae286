"""OpenR1-Math-Raw, or any data of its shape, to positives and pairs, as REDI (arXiv 2505.24850) prepares it.

Each row holds a problem, several generations, and for each generation the verdicts of two verifiers. The filters act in
the order of `ROW_DROPS` and `PAIR_DROPS`, after the rows were shuffled; positives have no limit of length,
pairs have. Departures from the authors' published preparation: a generation without text is never chosen or rejected,
and the length of a prompt is that of the rendered prompt up to where the answer begins.

The shuffle is the permutation of `datasets.Dataset.shuffle(seed)`, `numpy.random.default_rng(seed).permutation(rows)`,
over all rows, also those that turn out bad. No filter looks at other rows, so the rows are read in the order of the input,
each with its place in the permutation, and only what is kept is sorted by it: memory holds a batch, and about 80 bytes
a row (twice that where there is an id column, whose ids are made unique).
"""

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np

from fastreason.data.columns import ColumnError, Columns, flags, optional_text, text, texts
from fastreason.data.contamination import Contamination, too_close
from fastreason.data.lengths import LengthCounter, Lengths
from fastreason.data.preparation import (
    CONTAMINATED,
    PreparedFolder,
    Progress,
    ShuffledLines,
    check_sum,
    json_line,
    text_key,
)
from fastreason.data.raw_rows import BATCH_ROWS, MAX_SHOWN, BadRow, RawRow, RawRows
from fastreason.errors import DataError
from fastreason.types import Prompt

POSITIVES, PAIRS = "positives.jsonl", "pairs.jsonl"
EXCLUDED_SOURCE = "cn_k12"

# What each role is called in OpenR1-Math-Raw, in OpenR1-Math-220k, and in data of our own; the first that is there is taken.
COLUMNS = {
    "problem": ("problem", "question"),
    "answer": ("answer",),
    "generations": ("generations",),
    "llama": ("correctness.llama_verification", "correctness_llama"),
    "math_verify": ("correctness.math_verify_reparsed_answer", "correctness_math_verify"),
    "valid": ("problem_is_valid",),
    "source": ("source",),
    "id": ("id", "uuid"),
}
OPTIONAL = {"answer", "id"}
LABELS = {"llama", "math_verify"}
FILTERING = {"valid", "source"}


class Grader(Protocol):
    """Verifies responses anew."""

    def labels(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        """For each prompt, whether each of its responses is right; None where that could not be found out in time."""
        ...


@dataclass(frozen=True)
class Settings:
    """What the command line says; `verifiers`: both labels must be true, one is enough, or our grader says.

    `drop_share`: rows are dropped that hold this share of an evaluation problem's 8-grams; None: no row is.
    """

    verifiers: str = "both"
    seed: int = 42
    limit: int | None = None
    max_prompt: int | None = None
    max_response: int | None = None
    drop_share: float | None = None


@dataclass
class Traces:
    """The columns of one row; `llama` and `math_verify` are None where the row has no such list."""

    rank: int
    number: int
    id: str
    problem: str
    answer: str | None
    generations: list[str]
    llama: list[bool] | None
    math_verify: list[bool] | None
    valid: str | None
    source: str | None
    correct: list[bool | None] = field(default_factory=list)

    def first(self, correct: bool) -> int | None:
        """The first generation that is right, or the first that is not; those without text or verdict do not count."""
        found = enumerate(zip(self.correct, self.generations, strict=True))
        return next((index for index, (label, said) in found if label is correct and said.strip()), None)


def _labels_fit(row: Traces, settings: Settings) -> bool:
    """Both lists are as long as the generations. One that is absent (null: never judged) does where either is enough."""
    if settings.verifiers == "regrade":
        return True
    lists = [labels for labels in (row.llama, row.math_verify) if labels is not None]
    needed = 2 if settings.verifiers == "both" else 1
    return len(lists) >= needed and all(len(labels) == len(row.generations) for labels in lists)


RowFilter = Callable[[Traces, Settings], bool]
"""Whether a row stays."""

ROW_FILTERS: dict[str, RowFilter] = {
    "problem_not_valid": lambda row, _: row.valid is not None and row.valid.strip().lower() == "yes",
    "source_excluded": lambda row, _: row.source != EXCLUDED_SOURCE,
    "empty": lambda row, _: bool(row.problem.strip()) and any(said.strip() for said in row.generations),
    "label_lengths": _labels_fit,
}
LABELLINGS: dict[str, Callable[[bool, bool], bool]] = {
    "both": lambda llama, math_verify: llama and math_verify,
    "either": lambda llama, math_verify: llama or math_verify,
}
ROW_DROPS = ("bad_row", *ROW_FILTERS, "no_correct", "contaminated")
PAIR_DROPS = ("no_incorrect", "prompt_too_long", "response_too_long")


def check_columns(names: Sequence[str], mapping: Mapping[str, str], verifiers: str) -> Columns:
    """Where each role is found; raises `DataError` that lists the columns for a role that is needed and absent."""
    candidates = {role: known for role, known in COLUMNS.items() if verifiers != "regrade" or role not in LABELS}
    # A role mapped to nothing turns its filter off.
    off = {role for role, column in mapping.items() if not column}
    allowed = sorted(OPTIONAL | FILTERING)
    if needed := (off & candidates.keys()).difference(allowed):
        role = min(needed)
        raise DataError(f"--columns {role}=: it is needed. Only these can be left empty: {', '.join(allowed)}.")
    return Columns.resolve(candidates, names, mapping, OPTIONAL | off)


def shuffle_ranks(num_rows: int, seed: int) -> np.ndarray:
    """`ranks[i]`: the place of row i after `datasets.Dataset.shuffle(seed)`."""
    ranks = np.empty(num_rows, dtype=np.int64)
    ranks[np.random.default_rng(seed).permutation(num_rows)] = np.arange(num_rows)
    return ranks


class Preparation:
    """One pass over the rows: `run` writes positives, pairs, and what goes into the report."""

    def __init__(
        self,
        settings: Settings,
        columns: Columns,
        folder: PreparedFolder,
        counter: LengthCounter,
        contamination: Contamination,
        grader: Grader | None,
    ) -> None:
        self._settings, self._columns, self._folder = settings, columns, folder
        self._counter, self._contamination, self._grader = counter, contamination, grader
        self._ids: set[int] = set()
        self.dropped, self.pairs_dropped = dict.fromkeys(ROW_DROPS, 0), dict.fromkeys(PAIR_DROPS, 0)
        self.num_rows = self.num_positives = self.num_pairs = self.num_timed_out = 0
        self.lengths = Lengths(("prompt", "chosen", "rejected"), counter.unit)
        self.seconds = 0.0

    def run(self, rows: RawRows) -> None:
        """Read, filter and write all rows; raises `DataError` where the input changes meanwhile."""
        ranks = shuffle_ranks(rows.num_rows, self._settings.seed)
        wanted = ranks < (rows.num_rows if self._settings.limit is None else self._settings.limit)
        progress = Progress(int(wanted.sum()))
        with tempfile.TemporaryFile(dir=self._folder.folder) as a, tempfile.TemporaryFile(dir=self._folder.folder) as b:
            positives, pairs = ShuffledLines(a), ShuffledLines(b)
            stream = rows.read(wanted, self._columns.roots)
            while batch := list(itertools.islice(stream, BATCH_ROWS)):
                kept = self._labelled([row for item in batch if (row := self._screened(item, ranks)) is not None])
                self._write(kept, positives, pairs)
                progress.add(len(batch))
                self.num_rows += len(batch)
            positives.write_sorted(self._folder.file(POSITIVES))
            pairs.write_sorted(self._folder.file(PAIRS))
            self.num_positives, self.num_pairs = len(positives), len(pairs)
        self.seconds = progress.seconds
        check_sum(self.num_rows, self.dropped, self.num_positives)
        check_sum(self.num_positives, self.pairs_dropped, self.num_pairs)

    def _screened(self, item: RawRow, ranks: np.ndarray) -> Traces | None:
        """The row, unless it is bad or a filter that needs no verdict drops it."""
        if isinstance(item.columns, BadRow):
            self._refuse(item, item.columns.reason, item.columns.start)
            return None
        try:
            row = self._traces(item, int(ranks[item.number]))
        except ColumnError as error:
            self._refuse(item, str(error), repr(item.columns)[:MAX_SHOWN])
            return None
        for name, stays in ROW_FILTERS.items():
            if not stays(row, self._settings):
                self.dropped[name] += 1
                return None
        return row

    def _refuse(self, item: RawRow, reason: str, start: str) -> None:
        self.dropped["bad_row"] += 1
        self._folder.refuse(item, reason, start)

    def _traces(self, item: RawRow, rank: int) -> Traces:
        columns, row = self._columns, item.columns
        assert isinstance(row, dict)
        return Traces(
            rank=rank,
            number=item.number,
            id=optional_text(columns, row, "id") or str(item.number),
            problem=text(columns, row, "problem"),
            answer=optional_text(columns, row, "answer"),
            generations=texts(columns, row, "generations"),
            llama=flags(columns, row, "llama"),
            math_verify=flags(columns, row, "math_verify"),
            valid=optional_text(columns, row, "valid") if "valid" in columns.of else "yes",
            source=optional_text(columns, row, "source"),
        )

    def _labelled(self, rows: list[Traces]) -> list[Traces]:
        """The rows with `correct` set, those without a right response and, if asked for, the contaminated ones dropped."""
        if self._grader is not None:
            prompts = [Prompt(id=row.id, text=row.problem, answer=row.answer) for row in rows]
            labels = self._grader.labels(prompts, [row.generations for row in rows])
            for row, correct in zip(rows, labels, strict=True):
                row.correct = correct
                self.num_timed_out += correct.count(None)
        else:
            combine = LABELLINGS[self._settings.verifiers]
            for row in rows:
                absent = [False] * len(row.generations)
                row.correct = list(map(combine, row.llama or absent, row.math_verify or absent))
        kept = []
        for row in rows:
            if row.first(True) is None:
                self.dropped["no_correct"] += 1
                continue
            row.id = self._own_id(row)
            if self._contaminated(row):
                self.dropped["contaminated"] += 1
            else:
                kept.append(row)
        return kept

    def _contaminated(self, row: Traces) -> bool:
        matches = self._contamination.find(row.problem)
        for match in matches:
            self._folder.write(CONTAMINATED, {"id": row.id, "row": row.number, **asdict(match)})
        return too_close(matches, self._settings.drop_share)

    def _write(self, rows: list[Traces], positives: ShuffledLines, pairs: ShuffledLines) -> None:
        """Write each row's positive, and its pair where there is one within the limits."""
        rejected = [row.first(False) for row in rows]
        prompt_lengths = self._counter.prompts([row.problem for row in rows])
        chosen_lengths = self._counter.responses([row.generations[row.first(True) or 0] for row in rows])
        said = [row.generations[index] for row, index in zip(rows, rejected, strict=True) if index is not None]
        rejected_lengths = iter(self._counter.responses(said))
        for row, wrong, prompt, chosen in zip(rows, rejected, prompt_lengths, chosen_lengths, strict=True):
            right = row.first(True)
            assert right is not None
            shared = {"id": row.id, "problem": row.problem, "answer": row.answer}
            origin = {"source": row.source, "row": row.number}
            self.lengths.add("prompt", prompt)
            self.lengths.add("chosen", chosen)
            response = row.generations[right]
            line = {**shared, "response": response, **origin, "response_index": right}
            positives.add(row.rank, json_line(line))
            if wrong is None:
                self.pairs_dropped["no_incorrect"] += 1
                continue
            length = next(rejected_lengths)
            self.lengths.add("rejected", length)
            if drop := self._too_long(prompt, max(chosen, length)):
                self.pairs_dropped[drop] += 1
                continue
            both = {"chosen": response, "rejected": row.generations[wrong]}
            indices = {"chosen_index": right, "rejected_index": wrong}
            pairs.add(row.rank, json_line({**shared, **both, **origin, **indices}))

    def _too_long(self, prompt: int, response: int) -> str | None:
        if self._settings.max_prompt is not None and prompt > self._settings.max_prompt:
            return "prompt_too_long"
        if self._settings.max_response is not None and response > self._settings.max_response:
            return "response_too_long"
        return None

    def _own_id(self, row: Traces) -> str:
        """The row's id; one that another row has already gets the row's number behind it."""
        if "id" not in self._columns.of:
            return row.id
        id = row.id
        while (key := text_key(id)) in self._ids:
            id = f"{id}#{row.number}"
        self._ids.add(key)
        return id
