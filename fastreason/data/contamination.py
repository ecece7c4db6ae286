"""Which problems of the evaluation sets are in the training data: by equal text, and by a shared word 8-gram.

Words are what white space separates in `normalise_text` (NFC, case folded): punctuation and LaTeX stay part of them, as
in Open-R1's decontamination, whose 8-grams REDI (arXiv 2505.24850) reports. A shared 8-gram is a suspicion: stock
phrases ("find the number of positive integers less than") share them too. Nothing is dropped here.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastreason.data.order import normalise_text
from fastreason.data.raw_rows import open_rows
from fastreason.errors import DataError

NGRAM_WORDS = 8
PROBLEM_COLUMNS = ("problem", "question", "prompt")
ID_COLUMNS = ("id", "unique_id", "uuid")


@dataclass(frozen=True)
class Match:
    """A problem of an evaluation set that a text matches: the set's file, the problem's id, equal text or the 8-gram."""

    against: str
    id: str
    same_text: bool
    ngram: str | None


@dataclass
class EvaluationSet:
    """One file of evaluation problems, and what was found of it in the training data so far."""

    path: Path
    num_problems: int = 0
    num_same_text: int = 0
    num_ngram: int = 0
    found: set[str] = field(default_factory=set)

    def report(self) -> dict[str, Any]:
        """Counts of training rows that match, and the ids of the evaluation problems that they match."""
        return {
            "file": str(self.path),
            "problems": self.num_problems,
            "rows_with_same_text": self.num_same_text,
            f"rows_with_shared_{NGRAM_WORDS}gram": self.num_ngram,
            "problems_found": sorted(self.found),
        }


class Contamination:
    """An index of the evaluation sets, small beside the training data, and the count of what `find` has found."""

    def __init__(self, files: Sequence[str]) -> None:
        """Read the sets; raises `DataError` for a file without a problem column, or one that cannot be read."""
        self.sets = [EvaluationSet(Path(file)) for file in files]
        self._texts: dict[str, dict[int, str]] = defaultdict(dict)
        self._ngrams: dict[str, dict[int, str]] = defaultdict(dict)
        for index, evaluation in enumerate(self.sets):
            self._add(index, evaluation)

    def find(self, text: str) -> list[Match]:
        """At most one match of a training problem with each set, equal text before a shared 8-gram; counts it.

        A problem shorter than 8 words can only match by its whole text.
        """
        words = normalise_text(text).split()
        same = self._texts.get(" ".join(words), {})
        shared: dict[int, tuple[str, str]] = {}
        for ngram in _ngrams(words):
            for index, id in self._ngrams.get(ngram, {}).items():
                shared.setdefault(index, (id, ngram))
        matches = []
        for index in sorted(same.keys() | shared.keys()):
            evaluation = self.sets[index]
            id, ngram = shared.get(index, (None, None))
            found = same.get(index) or str(id)
            matches.append(Match(str(evaluation.path), found, index in same, ngram))
            evaluation.num_same_text += index in same
            evaluation.num_ngram += index in shared
            evaluation.found.add(found)
        return matches

    def report(self) -> list[dict[str, Any]]:
        return [evaluation.report() for evaluation in self.sets]

    def _add(self, index: int, evaluation: EvaluationSet) -> None:
        rows = open_rows([str(evaluation.path)])
        columns = rows.column_names()
        column = next((name for name in PROBLEM_COLUMNS if name in columns), None)
        if column is None:
            raise DataError(
                f"--against {evaluation.path}: no column {' or '.join(PROBLEM_COLUMNS)}; it has: {', '.join(columns)}. "
                "Rename the one with the problems."
            )
        for row in rows.read():
            problem = row.columns.get(column) if isinstance(row.columns, dict) else None
            if not isinstance(problem, str) or not isinstance(row.columns, dict):
                raise DataError(f"--against {evaluation.path}: {row.place} has no text in {column!r}. Repair it.")
            id = next((str(row.columns[name]) for name in ID_COLUMNS if row.columns.get(name)), str(row.number))
            words = normalise_text(problem).split()
            self._texts[" ".join(words)].setdefault(index, id)
            for ngram in _ngrams(words):
                self._ngrams[ngram].setdefault(index, id)
            evaluation.num_problems += 1


def _ngrams(words: Sequence[str]) -> Iterator[str]:
    return map(" ".join, zip(*(words[start:] for start in range(NGRAM_WORDS)), strict=False))
