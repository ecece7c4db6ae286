"""Which problems of the evaluation sets are in the training data: by equal text, and by shared word 8-grams.

Words are runs of letters and digits in `normalise_text` (NFC, case folded): punctuation, braces and the spacing of LaTeX do
not count, for the same problem is often set differently. 8-grams are what REDI (arXiv 2505.24850) reports. One shared
8-gram is only a suspicion, since stock phrases ("what is the probability that the product of") share it too; so a match
also has its `share`, the part of the evaluation problem's 8-grams that the row holds. Nothing is dropped here.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastreason.data.order import normalise_text
from fastreason.data.raw_rows import RawRow, open_rows
from fastreason.errors import DataError

NGRAM_WORDS = 8
HALF = 0.5
PROBLEM_COLUMNS = ("problem", "question", "prompt")
ID_COLUMNS = ("id", "unique_id", "uuid")
_WORD = re.compile(r"[^\W_]+")

Place = tuple[int, int]
"""An evaluation problem: the number of its set, and its own number in it."""


@dataclass(frozen=True)
class Match:
    """The evaluation problem of a set that a row holds most of: `share` of its 8-grams, 1 where the text is the same."""

    against: str
    problem_id: str
    same_text: bool
    share: float


@dataclass
class EvaluationSet:
    """One file of evaluation problems, and what was found of it in the training data so far."""

    path: Path
    ids: list[str] = field(default_factory=list)
    num_ngrams: list[int] = field(default_factory=list)
    num_same_text: int = 0
    num_ngram: int = 0
    num_half: int = 0
    found: set[str] = field(default_factory=set)

    def count(self, match: Match) -> None:
        self.num_same_text += match.same_text
        self.num_ngram += 1
        self.num_half += match.share >= HALF
        if match.share >= HALF:
            self.found.add(match.problem_id)

    def report(self) -> dict[str, Any]:
        """How many training rows match, and the ids of the problems of which a row holds half the 8-grams or more."""
        return {
            "file": str(self.path),
            "problems": len(self.ids),
            "rows_with_same_text": self.num_same_text,
            "rows_with_shared_8gram": self.num_ngram,
            "rows_with_half_of_8grams": self.num_half,
            "problems_found": sorted(self.found),
        }


class Contamination:
    """An index of the evaluation sets, small beside the training data, and the count of what `find` has found."""

    def __init__(self, files: Sequence[str]) -> None:
        """Read the sets; raises `DataError` for a file without a problem column, or one that cannot be read."""
        self.sets = [EvaluationSet(Path(file)) for file in files]
        self._texts: dict[str, dict[int, int]] = defaultdict(dict)
        self._ngrams: dict[str, list[Place]] = defaultdict(list)
        for index, evaluation in enumerate(self.sets):
            self._add(index, evaluation)

    def find(self, text: str) -> list[Match]:
        """At most one match of a training problem with each set, the closest; counts it.

        A problem shorter than 8 words can only match by its whole text.
        """
        if not self.sets:
            return []
        words = _words(text)
        same = self._texts.get(" ".join(words), {})
        held = Counter(place for ngram in _ngrams(words) for place in self._ngrams.get(ngram, ()))
        best = {index: (1.0, number) for index, number in same.items()}
        for (index, number), count in sorted(held.items()):
            share = count / self.sets[index].num_ngrams[number]
            if index not in same and share > best.get(index, (0.0, 0))[0]:
                best[index] = share, number
        matches = []
        for index, (share, number) in sorted(best.items()):
            evaluation = self.sets[index]
            match = Match(str(evaluation.path), evaluation.ids[number], index in same, round(share, 3))
            evaluation.count(match)
            matches.append(match)
        return matches

    def report(self) -> list[dict[str, Any]]:
        return [evaluation.report() for evaluation in self.sets]

    def _add(self, index: int, evaluation: EvaluationSet) -> None:
        rows = open_rows([str(evaluation.path)])
        columns = rows.column_names()
        column = next((name for name in PROBLEM_COLUMNS if name in columns), None)
        if column is None:
            raise DataError(
                f"--against {evaluation.path}: no column {' or '.join(PROBLEM_COLUMNS)}. There are: "
                f"{', '.join(columns)}. Rename the one with the problems."
            )
        for number, row in enumerate(rows.read()):
            id, problem = _problem(row, column, evaluation.path)
            words = _words(problem)
            ngrams = _ngrams(words)
            evaluation.ids.append(id)
            evaluation.num_ngrams.append(len(ngrams))
            self._texts[" ".join(words)].setdefault(index, number)
            for ngram in ngrams:
                self._ngrams[ngram].append((index, number))


def too_close(matches: Sequence[Match], share: float | None) -> bool:
    """Whether a row is to be dropped: it holds at least `share` of an evaluation problem (None: never dropped)."""
    return share is not None and any(match.share >= share for match in matches)


def _problem(row: RawRow, column: str, path: Path) -> tuple[str, str]:
    """The id and the text of an evaluation problem."""
    columns = row.columns if isinstance(row.columns, dict) else {}
    problem = columns.get(column)
    if not isinstance(problem, str):
        raise DataError(f"--against {path}: {row.place} has no text in {column!r}. Repair it.")
    return next((str(columns[name]) for name in ID_COLUMNS if columns.get(name)), str(row.number)), problem


def _words(text: str) -> list[str]:
    return _WORD.findall(normalise_text(text))


def _ngrams(words: Sequence[str]) -> set[str]:
    return set(map(" ".join, zip(*(words[start:] for start in range(NGRAM_WORDS)), strict=False)))
