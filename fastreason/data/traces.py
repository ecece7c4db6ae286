"""Tokenized traces: written responses, conversations or pairs as token ids in one memory-mapped file.

`write_traces` streams the rows of a file through a `TurnWriter` into Arrow, dropping what is too long and counting it;
`Traces` reads single rows back without loading the file; `TraceOrder` says which rows a step takes, as a function of the
step. Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from fastreason.config import Config
from fastreason.data import tables
from fastreason.data.order import permutation
from fastreason.data.turns import Tokens, TurnWriter
from fastreason.errors import DataError

TRACES_FILE = "traces.arrow"
REPORT_FILE = "report.json"
BATCH = 256  # rows written, and found again, at a time
NUM_CHECKED = 1000  # rows whose rendering is compared with the template's of the whole conversation
LONG_PROMPT, LONG_ROW = "prompt longer than data.max_prompt_tokens", "prompt + response longer than offline.max_tokens"


@dataclass
class TraceReport:
    """What came in, what was dropped and what is left; `fingerprint` names the token ids. Lengths in tokens.

    longest: of one prompt with one response; longest_line: of one prompt with all of the row's responses.
    differing: of `NUM_CHECKED` rows, those that the chat template writes otherwise. end_token_id: the last token of every
    response.
    """

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: {LONG_PROMPT: 0, LONG_ROW: 0})
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    longest_line: int = 0
    differing: int = 0
    end_token_id: int | None = None
    fingerprint: str = ""

    def lines(self) -> list[str]:
        """The report as printed."""
        dropped = "".join(f", {number} dropped ({why})" for why, number in self.dropped.items() if number)
        lines = [
            f"traces: {self.rows} rows{dropped}, {self.kept} kept; {self.tokens} tokens, {self.trained_tokens} of them "
            f"trained, the longest row {self.longest}"
        ]
        if self.differing:
            lines.append(
                f"warning: the chat template writes {self.differing} of the first {min(self.rows, NUM_CHECKED)} rows otherwise "
                "when it sees the response too (some drop or move parts of it). They are trained as generation would make "
                "them: the prompt of a rollout, then the response and the end of the turn."
            )
        return lines


class Trace(NamedTuple):
    """One row: a prompt and one or two (chosen, rejected) responses to it; `trained` as in `Tokens`."""

    id: str
    prompt: list[int]
    responses: list[list[int]]
    trained: list[bool] | None
    weight: float


def check_traces(config: Config, pairs: bool, num: int = 8) -> None:
    """Look at the first rows of offline.path; raises DataError for a missing file or column, or an empty file."""
    found = False
    for _, (place, row) in zip(range(num), _rows(config), strict=False):
        found = True
        for column, key in _columns(config, pairs):
            _cell(row, column, key, place, config)
        _weight(row, place, config)
    if not found:
        raise DataError(f"offline.path={config.offline.path!r} holds no row. Point it at data with at least one.")


def write_traces(config: Config, tokenizer: Any, folder: Path, limit: int | None, pairs: bool) -> TraceReport:
    """Tokenize the rows of offline.path into `folder`; `limit` is the longest sequence, tokens.

    Raises DataError for a row that cannot be used, naming it, and where none is left.
    """
    writer = TurnWriter(tokenizer, config.data)
    report = TraceReport(end_token_id=writer.end[-1])
    digest = hashlib.sha256()
    columns = {"id": pa.string(), "weight": pa.float32(), "prompt": pa.list_(pa.int32())}
    columns |= {name: pa.list_(pa.int32()) for name in (("chosen", "rejected") if pairs else ("chosen",))}
    if config.offline.messages_column is not None:
        columns["trained"] = pa.list_(pa.bool_())
    schema = pa.schema(list(columns.items()))
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{TRACES_FILE}.writing"
    shortest = None
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        waiting: list[dict[str, Any]] = []
        for place, row in _rows(config):
            found = _tokenize(row, place, config, writer, pairs, checked=report.rows < NUM_CHECKED)
            report.rows += 1
            length = max(len(tokens.prompt) + len(tokens.response) for tokens in found)
            shortest = min(shortest or length, length)
            if len(found[0].prompt) > config.data.max_prompt_tokens:
                report.dropped[LONG_PROMPT] += 1
                continue
            if limit is not None and length > limit:
                report.dropped[LONG_ROW] += 1
                continue
            record = _record(row, str(report.rows - 1), found, _weight(row, place, config))
            _count(report, found, length)
            digest.update(json.dumps(record).encode())
            waiting.append(record)
            if len(waiting) == BATCH:
                file.write_batch(pa.RecordBatch.from_pylist(waiting, schema=schema))
                waiting.clear()
        if waiting:
            file.write_batch(pa.RecordBatch.from_pylist(waiting, schema=schema))
    if not report.kept:
        aside.unlink()
        raise DataError(_nothing_left(config, report, shortest, limit))
    report.fingerprint = digest.hexdigest()[:32]
    _settle(aside, folder / TRACES_FILE)
    path = folder / f"{REPORT_FILE}.writing"
    path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    _settle(path, folder / REPORT_FILE)
    return report


class Traces:
    """The rows that `write_traces` has written, read one by one from the mapped file."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError where they are missing or damaged."""
        try:
            self.report = TraceReport(**json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
            self._file = pa.ipc.open_file(pa.memory_map(str(folder / TRACES_FILE)))
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"{folder}: the tokenized traces cannot be read: {error}. Start a new run.") from error

    def __len__(self) -> int:
        return self.report.kept

    def __getitem__(self, index: int) -> Trace:
        batch, row = self._file.get_batch(index // BATCH), index % BATCH

        def values(name: str) -> list[Any] | None:
            return batch.column(name)[row].as_py() if name in batch.schema.names else None

        responses = [values("chosen"), values("rejected")]
        return Trace(
            id=str(values("id")),
            prompt=values("prompt") or [],
            responses=[response for response in responses if response is not None],
            trained=values("trained"),
            weight=float(batch.column("weight")[row].as_py()),
        )


@dataclass
class TraceOrder:
    """Which rows a step takes: every epoch all of them in another order, a function of `seed` and the epoch alone.

    total: examples of the whole run (None: without end); the last batch is what remains.
    """

    num_rows: int
    batch_size: int
    seed: int
    total: int | None = None
    _epoch: int = field(default=-1, init=False, repr=False)
    _order: list[int] = field(default_factory=list, init=False, repr=False)

    def batch(self, step: int) -> list[int]:
        """The rows of a step, from 0 on."""
        first = step * self.batch_size
        last = first + self.batch_size if self.total is None else min(first + self.batch_size, self.total)
        return [self._at(position) for position in range(first, last)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.num_rows, f"order/{self.seed}/{epoch}")
        return self._order[place]


def num_examples(num_rows: int, epochs: float) -> int:
    """Rows that so many epochs take."""
    return max(1, round(epochs * num_rows))


def _tokenize(
    row: dict[str, Any], place: str, config: Config, writer: TurnWriter, pairs: bool, checked: bool
) -> list[Tokens]:
    columns = [_cell(row, column, key, place, config) for column, key in _columns(config, pairs)]
    try:
        if config.offline.messages_column is not None:
            return [writer.conversation(columns[0])]
        problem, *responses = columns
        prompt = writer.prompt(problem)
        return [
            Tokens(
                prompt,
                writer.response(response),
                as_rendered=not checked or writer.as_rendered(problem, response),
            )
            for response in responses
        ]
    except DataError as error:
        raise DataError(f"offline.path={config.offline.path!r}, {place}: {error}.") from error


def _record(row: dict[str, Any], number: str, found: list[Tokens], weight: float) -> dict[str, Any]:
    record: dict[str, Any] = {"id": str(row.get("id", number)), "weight": weight, "prompt": found[0].prompt}
    record |= {name: tokens.response for name, tokens in zip(("chosen", "rejected"), found, strict=False)}
    return record if found[0].trained is None else record | {"trained": found[0].trained}


def _count(report: TraceReport, found: list[Tokens], length: int) -> None:
    report.kept += 1
    line = len(found[0].prompt) + sum(len(tokens.response) for tokens in found)
    report.tokens += line + (len(found) - 1) * len(found[0].prompt)
    report.trained_tokens += sum(len(t.response) if t.trained is None else sum(t.trained) for t in found)
    report.longest, report.longest_line = max(report.longest, length), max(report.longest_line, line)
    report.differing += any(not tokens.as_rendered for tokens in found)


def _rows(config: Config) -> Iterator[tables.Row]:
    try:
        yield from tables.file_rows(Path(str(config.offline.path)))
    except DataError as error:
        text = str(error).replace("data.path", "offline.path")
        hint = (
            ""
            if Path(str(config.offline.path)).is_file()
            else " fastreason data and fastreason distill write such files."
        )
        raise DataError(text + hint) from error


def _columns(config: Config, pairs: bool) -> list[tuple[str, str]]:
    """The columns that a row must have, and the key that names each."""
    offline = config.offline
    if offline.messages_column is not None:
        return [(offline.messages_column, "offline.messages_column")]
    names = ["chosen_column", "rejected_column"] if pairs else ["response_column"]
    return [(config.data.problem_column, "data.problem_column")] + [
        (getattr(offline, name), f"offline.{name}") for name in names
    ]


def _cell(row: dict[str, Any], column: str, key: str, place: str, config: Config) -> Any:
    where = f"{key}={column!r}: {place} of {config.offline.path}"
    if column not in row:
        raise DataError(f"{where} has no such column; it has: {', '.join(row) or 'none'}.")
    value = row[column]
    if key == "offline.messages_column":
        fits = isinstance(value, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
        if not fits or not value:
            raise DataError(f"{where}: got {str(value)[:80]!r}; a list of {{role, content}} texts is needed.")
        return [{**m, "content": _clean(m["content"])} for m in value]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: got {str(value)[:80]!r}; a text that is not empty is needed. Repair or delete it.")
    return _clean(value)


def _clean(text: str) -> str:
    # A lone surrogate (an escape in the JSON) cannot be tokenized.
    return text.encode("utf-8", "replace").decode()


def _weight(row: dict[str, Any], place: str, config: Config) -> float:
    column = config.offline.weight_column
    if column is None:
        return 1.0
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise DataError(
            f"offline.weight_column={column!r}: {place} of {config.offline.path}: got {value!r}; a number from 0 on is needed."
        )
    return float(value)


def _nothing_left(config: Config, report: TraceReport, shortest: int | None, limit: int | None) -> str:
    if not report.rows:
        return f"offline.path={config.offline.path!r} holds no row. Point it at data with at least one."
    return (
        f"offline.path={config.offline.path!r}: none of {report.rows} rows is short enough; the shortest has {shortest} "
        f"tokens, allowed are {limit} (offline.max_tokens={config.offline.max_tokens}), and "
        f"{config.data.max_prompt_tokens} for the prompt (data.max_prompt_tokens). Raise them."
    )


def _settle(aside: Path, target: Path) -> None:
    with open(aside, "rb+") as file:
        os.fsync(file.fileno())
    aside.replace(target)
