"""Finds what a row's columns mean: each role's column by a table of names or the user's word, and its value, checked."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastreason.errors import DataError


class ColumnError(Exception):
    """A value is of a type that its role cannot have: the row is bad."""


@dataclass(frozen=True)
class Columns:
    """The column of each role; a dot goes into a struct (`correctness.llama_verification`)."""

    of: Mapping[str, str]

    @classmethod
    def resolve(
        cls,
        candidates: Mapping[str, Sequence[str]],
        names: Sequence[str],
        mapping: Mapping[str, str],
        optional: set[str],
    ) -> "Columns":
        """For each role `mapping`'s column, or the first of its `candidates` that is among `names`.

        A role mapped to "" has no column. Raises `DataError` for an unknown role, a column that is not there, and a role
        outside of `optional` for which there is none.
        """
        for role, column in mapping.items():
            if role not in candidates:
                raise DataError(f"--columns {role}={column}: no such role. The roles: {', '.join(candidates)}.")
            if column and column not in names:
                near = difflib.get_close_matches(column, names, n=1)
                guess = f"Did you mean {near[0]!r}? " if near else ""
                raise DataError(f"--columns {role}={column}: no such column. {guess}There are: {', '.join(names)}.")
        found = {}
        for role, known in candidates.items():
            column = mapping.get(role, next((name for name in known if name in names), ""))
            if column:
                found[role] = column
            elif role not in optional:
                raise DataError(
                    f"no column for {role!r}: none of {', '.join(known)}. There are: {', '.join(names)}. Name the one "
                    f"that is meant: --columns {role}=NAME"
                )
        return cls(found)

    @property
    def roots(self) -> list[str]:
        """The columns to read."""
        return sorted({column.partition(".")[0] for column in self.of.values()})

    def value(self, row: Mapping[str, Any], role: str) -> Any:
        """The value, or None where the role has no column or the row lacks it."""
        column = self.of.get(role)
        if column is None or column in row:
            return None if column is None else row[column]
        value: Any = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def name(self, role: str) -> str:
        return self.of.get(role, role)


def clean(value: str) -> str:
    """The text without lone surrogates (an escape in the JSON), which can be neither tokenized nor stored."""
    return value.encode("utf-8", "replace").decode()


def optional_text(columns: Columns, row: Mapping[str, Any], role: str) -> str | None:
    """Text, or a number written out, or None; raises `ColumnError` for anything else."""
    value = columns.value(row, role)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ColumnError(f"{columns.name(role)!r} is a {type(value).__name__}, not text")
    return clean(value)


def text(columns: Columns, row: Mapping[str, Any], role: str) -> str:
    """Text, "" for null; raises as `optional_text`."""
    return optional_text(columns, row, role) or ""


def texts(columns: Columns, row: Mapping[str, Any], role: str) -> list[str]:
    """A list of texts, empty for null, "" for a null in it; raises `ColumnError` for anything else."""
    values = columns.value(row, role)
    if values is None:
        return []
    if not isinstance(values, list) or not all(value is None or isinstance(value, str) for value in values):
        raise ColumnError(f"{columns.name(role)!r} is not a list of texts")
    return [clean(value or "") for value in values]


def flags(columns: Columns, row: Mapping[str, Any], role: str) -> list[bool] | None:
    """A list of true, false, 1, 0 or null (which is false), or None for null; raises `ColumnError` for anything else."""
    values = columns.value(row, role)
    if values is None:
        return None
    if not isinstance(values, list) or not all(value is None or value in (0, 1) for value in values):
        raise ColumnError(f"{columns.name(role)!r} is not a list of true and false")
    return [bool(value) for value in values]
