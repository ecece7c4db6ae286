"""Raw data sets, a row at a time: files, folders of files, and the hub; how many rows there are is known before reading.

Reads in the order of the input and holds one batch of rows. A row that cannot be used is handed on as a `BadRow`: what
becomes of it, the caller says. A file that cannot be read at all is an error. Interprets no column.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastreason.errors import DataError

# Of a folder, the files of the first ending that it holds: hub folders carry .json files that are no data.
ENDINGS = (".parquet", ".jsonl", ".json")
BATCH_ROWS = 64  # a row with several long traces has some hundred kB
MAX_SHOWN = 200
ROWS_FOR_NAMES = 20


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be used, and how it begins."""

    reason: str
    start: str


@dataclass(frozen=True)
class RawRow:
    """One row: its number in the input (from 0), where it stands, for messages ("a.jsonl, line 3"), and its columns."""

    number: int
    place: str
    columns: dict[str, Any] | BadRow


class RawTable(Protocol):
    """One file, or one hub data set."""

    num_rows: int

    def column_names(self) -> list[str]:
        """Its columns, or those of its first readable rows; a struct's fields also as `column.field`."""
        ...

    def read(self, wanted: np.ndarray, names: Sequence[str] | None) -> Iterator[tuple[int, str, Any]]:
        """(number in this table, place, columns or `BadRow`) of the rows where `wanted` (bool, [num_rows]) is true."""
        ...


class RawRows:
    """The rows of an input: of one file, of several, of the files in a folder, or of a hub data set."""

    def __init__(self, tables: Sequence[RawTable], shown: str) -> None:
        """`shown` names the input in messages; raises `DataError` where there is no row."""
        self._tables, self._shown = tables, shown
        self.num_rows = sum(table.num_rows for table in tables)
        if self.num_rows == 0:
            raise DataError(f"{shown} holds no row. Give data with at least one.")

    def column_names(self) -> list[str]:
        """The columns of the first table that tells them; raises `DataError` where none does."""
        for table in self._tables:
            if names := table.column_names():
                return names
        raise DataError(f"{self._shown} holds no readable row: each must be an object with named columns.")

    def read(self, wanted: np.ndarray | None = None, names: Sequence[str] | None = None) -> Iterator[RawRow]:
        """The rows in their order, those where `wanted` (bool, [num_rows]) is true; `names`: the columns needed.

        Columns that are not needed may be absent, which spares a parquet file their reading.
        """
        wanted = np.ones(self.num_rows, dtype=bool) if wanted is None else wanted
        start = 0
        for table in self._tables:
            part = wanted[start : start + table.num_rows]
            if part.any():
                for number, place, columns in table.read(part, names):
                    yield RawRow(start + number, place, columns)
            start += table.num_rows


def open_rows(
    inputs: Sequence[str], allow_download: bool = False, hub_config: str | None = None, split: str = "train"
) -> RawRows:
    """Open files, folders (all files of one ending in it, at any depth, sorted by path), or one hub data set.

    Raises `DataError` for what does not exist, cannot be read, has no known ending, or is a hub name that is not in
    the local cache without `allow_download`.
    """
    shown = ", ".join(inputs)
    if len(inputs) == 1 and _may_be_hub_name(inputs[0]):
        return RawRows([_HubTable(inputs[0], hub_config, split, allow_download)], shown)
    readers: dict[str, Callable[[Path], RawTable]] = {
        ".parquet": _ParquetFile,
        ".jsonl": _JsonLinesFile,
        ".json": _JsonFile,
    }
    tables: list[RawTable] = []
    for path in itertools.chain.from_iterable(_files(Path(item)) for item in inputs):
        if path.suffix.lower() not in readers:
            raise DataError(f"{path}: the ending must be one of {', '.join(ENDINGS)}. Convert or rename it.")
        try:
            tables.append(readers[path.suffix.lower()](path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
    return RawRows(tables, shown)


def _may_be_hub_name(name: str) -> bool:
    parts = name.split("/")
    return not Path(name).exists() and len(parts) == 2 and all(parts) and Path(name).suffix.lower() not in ENDINGS


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(
            f"{path} does not exist. Give files or folders of {', '.join(ENDINGS)}, or the name of a hub data set "
            "(owner/name)."
        )
    found = [item for item in sorted(path.rglob("*")) if item.is_file()]
    for ending in ENDINGS:
        if files := [item for item in found if item.suffix.lower() == ending]:
            return files
    raise DataError(f"{path}: no file in it ends in {', '.join(ENDINGS)}.")


def _as_columns(value: Any, text: str) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(f"a {type(value).__name__} where an object with named columns is needed", text[:MAX_SHOWN])


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            names[name] = None
            names.update(dict.fromkeys(f"{name}.{field}" for field in value) if isinstance(value, dict) else {})
    return list(names)


class _JsonLinesFile:
    """Blank lines are no rows. Reads the file once to count, and once more for its rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as lines:
            self.num_rows = sum(not line.isspace() for line in lines)

    def column_names(self) -> list[str]:
        with open(self._path, "rb") as lines:
            parsed = (_parsed(line) for line in lines if not line.isspace())
            return _names(list(itertools.islice((row for row in parsed if isinstance(row, dict)), ROWS_FOR_NAMES)))

    def read(self, wanted: np.ndarray, names: Sequence[str] | None) -> Iterator[tuple[int, str, Any]]:
        number = -1
        with open(self._path, "rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                number += 1
                if number >= self.num_rows:
                    break
                if wanted[number]:
                    yield number, f"{self._path.name}, line {line_number}", _parsed(line)
        if number + 1 != self.num_rows:
            raise DataError(f"{self._path} changed while it was read. Let nothing write to it, and start again.")


def _parsed(line: bytes) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON: {error}"[:MAX_SHOWN], line[:MAX_SHOWN].decode("utf-8", "replace"))
    return _as_columns(value, line[:MAX_SHOWN].decode("utf-8", "replace"))


class _JsonFile:
    """A .json file: a list of objects, or one object (the original MATH has one file a problem). Held while it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = self._rows()
        self.num_rows = len(rows)
        self._names = _names([row for row in rows[:ROWS_FOR_NAMES] if isinstance(row, dict)])

    def column_names(self) -> list[str]:
        return self._names

    def read(self, wanted: np.ndarray, names: Sequence[str] | None) -> Iterator[tuple[int, str, Any]]:
        for number, value in enumerate(self._rows()):
            if wanted[number]:
                yield number, f"{self._path.name}, row {number}", _as_columns(value, repr(value))

    def _rows(self) -> list[Any]:
        try:
            value = json.loads(self._path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._path} is not JSON: {error}. One object a line? Name it .jsonl.") from error
        return value if isinstance(value, list) else [value]


class _ParquetFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            file = self._open()
            self.num_rows, self._schema = file.metadata.num_rows, file.schema_arrow

    def column_names(self) -> list[str]:
        import pyarrow

        structs = [item for item in self._schema if pyarrow.types.is_struct(item.type)]
        return [*self._schema.names, *(f"{item.name}.{field.name}" for item in structs for field in item.type)]

    def read(self, wanted: np.ndarray, names: Sequence[str] | None) -> Iterator[tuple[int, str, Any]]:
        needed = None if names is None else [name for name in self._schema.names if name in names]
        start = 0
        with self._errors():
            for batch in self._open().iter_batches(batch_size=BATCH_ROWS, columns=needed, use_threads=False):
                part = np.flatnonzero(wanted[start : start + batch.num_rows])
                for index, row in zip(part, batch.take(part).to_pylist(), strict=True):
                    number = start + int(index)
                    yield number, f"{self._path.name}, row {number}", row
                start += batch.num_rows

    def _open(self) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self._path)

    def _errors(self) -> "_ParquetErrors":
        return _ParquetErrors(self._path)


class _ParquetErrors:
    """Makes a `DataError` of what pyarrow raises about a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import pyarrow

        if isinstance(error, pyarrow.ArrowException):
            raise DataError(f"{self._path} is not a readable parquet file: {error}.") from error


class _HubTable:
    """A hub data set: an Arrow memory map in the cache of the datasets library."""

    def __init__(self, name: str, hub_config: str | None, split: str, allow_download: bool) -> None:
        import datasets
        import huggingface_hub

        self._name = name
        before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
        try:
            if not allow_download:
                datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
            self._dataset = datasets.load_dataset(name, hub_config, split=split)
        except Exception as error:
            advice = (
                "Check the name, --hub-config and --split."
                if allow_download
                else "No such file or folder; as a hub data set it is not in the local cache: add --allow-download."
            )
            raise DataError(
                f"{name!r} (--hub-config {hub_config}, --split {split}) cannot be loaded: "
                f"{type(error).__name__}: {str(error)[:500]} {advice}"
            ) from error
        finally:
            datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
        self.num_rows = len(self._dataset)

    def column_names(self) -> list[str]:
        features = self._dataset.features
        structs = [(name, fields) for name, fields in features.items() if isinstance(fields, dict)]
        return [*features, *(f"{name}.{field}" for name, fields in structs for field in fields)]

    def read(self, wanted: np.ndarray, names: Sequence[str] | None) -> Iterator[tuple[int, str, Any]]:
        known = self._dataset.column_names
        dataset = self._dataset.select_columns([name for name in known if names is None or name in names])
        for start in range(0, self.num_rows, BATCH_ROWS):
            part = np.flatnonzero(wanted[start : start + BATCH_ROWS])
            if len(part):
                rows = dataset[start : start + BATCH_ROWS]
                for index in part:
                    row = {name: rows[name][index] for name in dataset.column_names}
                    yield start + int(index), f"{self._name}, row {start + int(index)}", row
