"""Problems in rows: JSON Lines, JSON lists, parquet files, and data sets of the Hugging Face hub."""

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastreason.config import DataConfig
from fastreason.errors import DataError
from fastreason.types import Prompt

Row = tuple[str, dict[str, Any]]
"""Where a row stands, for messages ("line 3"), and its columns."""

ENDINGS = (".jsonl", ".json", ".parquet")
# Other columns travel with every prompt as its metadata; whole solutions do, stored generations do not.
MAX_METADATA_CHARS = 20_000


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .json (a list of objects) or .parquet file; raises `DataError` for anything else."""
    if not path.is_file():
        folder = path.parent
        names = [item.name for item in folder.iterdir() if item.suffix in ENDINGS] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        guess = f" Did you mean {str(folder / near[0])!r}?" if near else ""
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"data.path={str(path)!r} {kind}.{guess} Give the path of a {', '.join(ENDINGS)} file.")
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"data.path={str(path)!r}: the ending must be one of {', '.join(ENDINGS)}. Convert or rename it."
        )
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.path={str(path)!r} cannot be read: {error}.") from error


def hub_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of a hub data set, or of a local folder that the datasets library can read.

    Without `data.allow_download` only what is in the local cache is used. Raises `DataError` that says what to do.
    """
    import datasets
    import huggingface_hub

    name = str(config.path)
    offline = not (config.allow_download or Path(name).is_dir())
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if offline:
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        dataset = datasets.load_dataset(name, config.hub_config, split=config.split)
    except Exception as error:
        advice = (
            "It is not in the local cache: set data.allow_download=true to fetch it, or download it beforehand."
            if offline
            else "Check data.path, data.hub_config and data.split."
        )
        raise DataError(
            f"data.path={name!r} (data.hub_config={config.hub_config!r}, data.split={config.split!r}) cannot be "
            f"loaded: {type(error).__name__}: {str(error)[:500]} {advice}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
    for index, row in enumerate(dataset):
        yield f"row {index}", row


def map_rows(rows: Iterable[Row], config: DataConfig) -> tuple[list[Prompt], int]:
    """Problems from rows, and the number of rows dropped because `answer_missing` is true.

    Columns other than the problem, the answer and the id become the prompt's metadata, except values that JSON cannot
    hold or longer than `MAX_METADATA_CHARS`. Without `data.id_column` a problem's id is the number of its row, from 0.
    """
    problems: list[Prompt] = []
    places: dict[str, str] = {}
    num_without_answer = 0
    for index, (place, row) in enumerate(rows):
        if len(problems) == config.num_prompts:
            break
        if row.get("answer_missing") is True:
            num_without_answer += 1
            continue
        problem = _problem(index, place, row, config)
        if problem.id in places:
            raise DataError(
                f"data.id_column={config.id_column!r}: the id {problem.id!r} is in {places[problem.id]} and in {place} "
                f"of {config.path}; ids must be unique. Repair the data, or set data.id_column=null to number the rows."
            )
        places[problem.id] = place
        problems.append(problem)
    return problems, num_without_answer


def _problem(index: int, place: str, row: dict[str, Any], config: DataConfig) -> Prompt:
    text = _cell(row, config.problem_column, "data.problem_column", place, config)
    answer = None
    if config.answer_column is not None:
        answer = _cell(row, config.answer_column, "data.answer_column", place, config)
    number = str(index)
    id = number if config.id_column is None else _cell(row, config.id_column, "data.id_column", place, config)
    used = {config.problem_column, config.answer_column, config.id_column}
    metadata = {key: value for key, value in row.items() if key not in used and _can_travel(value)}
    return Prompt(id=id, text=text, answer=answer, metadata=metadata)


def _cell(row: dict[str, Any], column: str, key: str, place: str, config: DataConfig) -> str:
    """The text of a column; numbers are written out, and a list of one is that one.

    Raises `DataError` that names the key, the place and the value.
    """
    if column not in row:
        near = difflib.get_close_matches(column, row, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        none = " Where there are no answers: data.answer_column=null." if key == "data.answer_column" else ""
        raise DataError(
            f"{key}={column!r}: {place} of {config.path} has no such column; {guess}"
            f"it has: {', '.join(row) or 'none'}.{none}"
        )
    value = row[column]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        # A lone surrogate (an escape in the JSON) can be neither tokenized nor sent.
        return value.encode("utf-8", "replace").decode()
    shown = repr(value)
    what = "is empty" if value is None or value == "" or isinstance(value, str) else f"is a {type(value).__name__}"
    raise DataError(
        f"{key}={column!r}: in {place} of {config.path} it {what} ({shown[:80]}); text or a number is needed. Repair "
        "the row, or mark it answer_missing: true to have it dropped."
    )


def _can_travel(value: Any) -> bool:
    try:
        return len(json.dumps(value, allow_nan=False)) <= MAX_METADATA_CHARS
    except (TypeError, ValueError):
        return False


def _json_lines(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"data.path={str(path)!r}, line {number} is not JSON: {error}. Repair or delete it."
                ) from error
            yield f"line {number}", _object(row, f"line {number}", path)


def _json_list(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise DataError(f"data.path={str(path)!r} is not JSON: {error}. One object a line? Name it .jsonl.") from error
    if not isinstance(rows, list):
        raise DataError(
            f"data.path={str(path)!r} holds a {type(rows).__name__}; a .json file must hold a list of objects."
        )
    for index, row in enumerate(rows):
        yield f"row {index}", _object(row, f"row {index}", path)


def _object(row: Any, place: str, path: Path) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"data.path={str(path)!r}, {place} holds a {type(row).__name__}; each row must be an object.")
    return row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    counter = itertools.count()
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=512):
            for row in batch.to_pylist():
                yield f"row {next(counter)}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"data.path={str(path)!r} is not a readable parquet file: {error}.") from error
