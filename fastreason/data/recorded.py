"""Responses that somebody has sampled already, from the rows of a data set: one a row, or a list of them in each row.

It owns which column they are in and how rows of one problem come together. It refuses to judge them; rows are read one after
another and not kept.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fastreason.config import DataConfig
from fastreason.data import tables
from fastreason.errors import DataError
from fastreason.types import Prompt


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """Response number `sample` to a problem; None where the row does not say."""

    prompt: Prompt
    sample: int
    text: str
    num_tokens: int | None = None
    finish_reason: str | None = None


def recorded_responses(config: DataConfig, column: str) -> Iterator[Recorded]:
    """Every response in `column`, in the order of the rows: a text, or a list of texts, of which null ones are left out.

    Rows with the same id (`data.id_column`) are of one problem, and their responses are numbered on. Where a row holds one
    text, its columns `sample`, `num_tokens` and `finish_reason` are used, as `fastreason distill` writes them.
    `data.num_prompts` counts rows here. Raises `DataError` that names the row for what is missing or malformed.
    """
    rows = tables.file_rows(Path(str(config.path))) if config.source == "file" else tables.hub_rows(config)
    numbers: dict[str, set[int]] = {}
    for index, (place, row) in enumerate(rows):
        if index == config.num_prompts:
            return
        problems, _ = tables.map_rows([(place, row)], config)
        if not problems:
            continue
        prompt = problems[0]
        if config.id_column is None:
            prompt = msgspec.structs.replace(prompt, id=str(index))
        texts, taken = _texts(row, column, place, config), numbers.setdefault(prompt.id, set())
        first, told = max(taken, default=-1) + 1, dict[str, Any]()
        if isinstance(row[column], str):
            first = row["sample"] if isinstance(row.get("sample"), int) else first
            told = {key: row.get(key) for key in ("num_tokens", "finish_reason")}
        for number, text in enumerate(texts, start=first):
            if number in taken:
                raise DataError(
                    f"{place} of {config.path}: response {number} to {prompt.id!r} is there twice. Delete the row, or its "
                    "column sample to have responses numbered in their order."
                )
            taken.add(number)
            if text is not None:
                yield Recorded(prompt=prompt, sample=number, text=text.encode("utf-8", "replace").decode(), **told)


def _texts(row: dict[str, Any], column: str, place: str, config: DataConfig) -> list[str | None]:
    key = f"distill.responses_column={column!r}"
    if column not in row:
        near = difflib.get_close_matches(column, row, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"{key}: {place} of {config.path} has no such column; {guess}it has: {', '.join(row) or 'none'}."
        )
    texts = [row[column]] if isinstance(row[column], str) else row[column]
    if not isinstance(texts, list) or any(not isinstance(text, str | None) for text in texts):
        raise DataError(
            f"{key}: {place} of {config.path} holds {str(row[column])[:80]!r} there; a text or a list of texts is needed."
        )
    return texts
