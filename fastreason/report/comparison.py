"""Evaluations side by side: which folders belong together, read and brought to the same problems and number of responses.

The first model is the base. It refuses to compare benchmarks whose problems differ; where templates or sampling differ it says
so in `notes`, because comparing two templates is a fair question.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastreason.errors import ConfigError, DataError
from fastreason.evaluation.benchmarks import KNOWN
from fastreason.evaluation.rows import (
    Classes,
    EvalSample,
    evaluation_folders,
    grouped,
    read_classes,
    read_samples,
    read_settings,
)
from fastreason.evaluation.scores import Scores, score
from fastreason.report.analysis import answer_entropy, bin_numbers, success_bins

NOTED = ("template", "sampling", "engine", "dtype")  # settings that may differ, and are told where they do


@dataclass(frozen=True)
class Evaluation:
    """The first n responses of one model to each problem of a benchmark."""

    label: str
    folder: Path
    settings: Mapping[str, Any]
    n: int
    by_problem: Mapping[str, list[EvalSample]]
    classes: Classes

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """How many of the n responses to each problem are right."""
        return {id: sum(row.correct for row in rows) for id, rows in self.by_problem.items()}

    @functools.cached_property
    def scores(self) -> Scores:
        return score(self.rows, self.classes, self.n)

    @functools.cached_property
    def entropies(self) -> dict[str, float]:
        """The entropy of the answers to each problem, nats."""
        return {id: answer_entropy(rows, self.classes) for id, rows in self.by_problem.items()}

    @property
    def rows(self) -> list[EvalSample]:
        return [row for rows in self.by_problem.values() for row in rows]


@dataclass(frozen=True)
class Comparison:
    """One benchmark: its evaluations, the base first, all of the same problems in the same order and of the same n."""

    name: str
    title: str
    n: int
    evaluations: list[Evaluation]
    notes: list[str] = field(default_factory=list)

    @property
    def base(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def others(self) -> list[Evaluation]:
        return self.evaluations[1:]

    @property
    def problems(self) -> list[str]:
        return list(self.base.by_problem)

    def counts(self, evaluation: Evaluation) -> list[int]:
        return [evaluation.counts[id] for id in self.problems]

    @functools.cached_property
    def difficulty(self) -> dict[str, int]:
        """Each problem's bin, by the base's success count."""
        numbers = bin_numbers(self.counts(self.base), success_bins(self.n))
        return dict(zip(self.problems, numbers, strict=True))

    @property
    def num_bins(self) -> int:
        return len(success_bins(self.n))


@dataclass(frozen=True)
class _Found:
    argument: Path
    folder: Path
    settings: dict[str, Any]

    @property
    def benchmark(self) -> str:
        return str(self.settings["benchmark"]["name"])

    @property
    def label(self) -> str:
        """The folder OUT/<label>/<benchmark>/<key> is named after its model."""
        return self.folder.resolve().parents[1].name


def read_comparisons(arguments: Sequence[Path], n: int | None = None) -> list[Comparison]:
    """Read the evaluations at and under each argument, by benchmark; only benchmarks that every argument has.

    n: use only so many responses to each problem; by default as many as all have. Raises ConfigError where an argument holds no
    evaluation, nothing is common, one argument has two evaluations of a benchmark, or n is more than there are; DataError where
    files cannot be read or problems differ.
    """
    found = [_find(argument) for argument in arguments]
    common = [name for name in found[0] if all(name in given for given in found)]
    if not common:
        has = "; ".join(f"{path}: {', '.join(given)}" for path, given in zip(arguments, found, strict=True))
        raise ConfigError(f"no benchmark is common to all. {has}. Run fastreason eval on the same --benchmarks.")
    # A folder with several models is several evaluations of each benchmark.
    comparisons = []
    for name in common:
        entries = [entry for given in found for entry in given[name]]
        comparisons.append(_compare(name, entries, n))
    return comparisons


def _find(argument: Path) -> dict[str, list[_Found]]:
    folders = evaluation_folders(argument) if argument.is_dir() else []
    if not folders:
        raise ConfigError(
            f"{argument}: no evaluation there. Give folders that fastreason eval wrote, e.g. evals/MODEL or "
            "evals/MODEL/BENCHMARK/KEY."
        )
    by_name: dict[str, list[_Found]] = {}
    for folder in folders:
        one = _Found(argument, folder, read_settings(folder))
        by_name.setdefault(one.benchmark, []).append(one)
    for name, given in by_name.items():
        twice = next((one for one in given if sum(other.label == one.label for other in given) > 1), None)
        if twice is not None:
            folders_of = ", ".join(str(one.folder) for one in given if one.label == twice.label)
            raise ConfigError(
                f"{argument}: {twice.label} was evaluated on {name} with several settings. Name one of: {folders_of}"
            )
    return by_name


def _compare(name: str, entries: Sequence[_Found], n: int | None) -> Comparison:
    checksums = {entry.settings["benchmark"]["checksum"] for entry in entries}
    if len(checksums) > 1:
        raise DataError(
            f"{name}: the evaluations are of different problems: " + ", ".join(str(entry.folder) for entry in entries)
        )
    rows = [grouped(read_samples(entry.folder)) for entry in entries]
    held = {str(entry.folder): _complete(given) for entry, given in zip(entries, rows, strict=True)}
    least = min(held.values())
    if n is not None and not 1 <= n <= least:
        raise ConfigError(
            f"--n {n}: {min(held, key=held.__getitem__)} has {least} responses to each problem of {name}."
        )
    n = n or least
    if n < 1:
        raise DataError(f"{min(held, key=held.__getitem__)}: it has no response yet. Let fastreason eval end first.")
    order = [id for id in rows[0] if all(id in given for given in rows)]
    if any(len(given) != len(order) for given in rows):
        raise DataError(f"{name}: not every problem has responses of every model. Let fastreason eval end first.")
    evaluations = [
        Evaluation(
            label, entry.folder, entry.settings, n, {id: given[id][:n] for id in order}, read_classes(entry.folder)
        )
        for label, entry, given in zip(_labels(entries), entries, rows, strict=True)
    ]
    notes = [f"{key} differs: {text}" for key in NOTED if (text := _differing(evaluations, key))]
    if max(held.values()) > n:
        notes.append(f"only the first {n} responses to each problem are used; some evaluations have more")
    return Comparison(name, KNOWN[name].title if name in KNOWN else name, n, evaluations, notes)


def _complete(by_problem: Mapping[str, Sequence[EvalSample]]) -> int:
    """How many first responses every problem has, without a gap."""

    gaps = (
        next((place for place, row in enumerate(rows) if row.sample != place), len(rows))
        for rows in by_problem.values()
    )
    return min(gaps, default=0)


def _labels(entries: Sequence[_Found]) -> list[str]:
    """Names that tell the evaluations apart: the model's, and the settings' key where one model comes twice."""
    labels = [entry.label for entry in entries]
    keyed = [
        f"{label} {entry.folder.name[:6]}" if labels.count(label) > 1 else label
        for label, entry in zip(labels, entries, strict=True)
    ]
    return [label if keyed.count(label) == 1 else f"{label} ({place})" for place, label in enumerate(keyed, start=1)]


def _differing(evaluations: Sequence[Evaluation], key: str) -> str:
    """The parts of a setting that are not the same for all, by model; empty where all are."""
    values: list[Any] = [evaluation.settings.get(key) for evaluation in evaluations]
    if all(value == values[0] for value in values):
        return ""
    if not all(isinstance(value, Mapping) for value in values):
        return ", ".join(f"{one.label} {value}" for one, value in zip(evaluations, values, strict=True))
    parts = [part for part in values[0] if any(value.get(part) != values[0][part] for value in values)]
    told = []
    for part in parts:
        given = [f"{one.label} {value.get(part)!r:.60}" for one, value in zip(evaluations, values, strict=True)]
        told.append(f"{part} {', '.join(given)}")
    return "; ".join(told)
