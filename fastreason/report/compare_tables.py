"""The tables of a comparison as text cells: scores, accuracy against capability, bins, transitions, habits, graders, problems.

Numbers come from `analysis.py` and the scores; nothing is computed here but differences. Shares are percentages.
"""

import statistics
from collections import Counter
from collections.abc import Sequence

from fastreason.evaluation.rows import EvalSample
from fastreason.evaluation.tables import Grid, grids
from fastreason.report.analysis import (
    REFLECTION,
    agreement,
    bin_changes,
    by_bin,
    disagreement_reason,
    habits,
    habits_by_difficulty,
    reasons_in_turn,
    row_shares,
    success_bins,
    transitions,
)
from fastreason.report.comparison import Comparison, Evaluation

MOST_PROBLEMS = 10  # of a printed table, from each end; the page has all
MOST_DISAGREEMENTS = 50  # of each model in the page's table; DISAGREEMENTS_FILE has all
DISAGREEMENTS_FILE = "disagreements.jsonl"
CELL_CHARS = 160  # of an answer, or of a response's end, in a cell


def score_grids(comparisons: Sequence[Comparison]) -> list[Grid]:
    """The tables that `fastreason eval` prints, and accuracy against capability."""
    labels = [evaluation.label for evaluation in comparisons[0].evaluations]
    found: list[Grid] = []
    if all([e.label for e in c.evaluations] == labels and c.n == comparisons[0].n for c in comparisons):
        scores = {
            label: {c.name: c.evaluations[place].scores for c in comparisons} for place, label in enumerate(labels)
        }
        found += grids(scores, {c.name: c.title for c in comparisons})
    else:
        for c in comparisons:
            found += grids({e.label: {c.name: e.scores} for e in c.evaluations}, {c.name: c.title})
    return found + [capability_grid(comparison) for comparison in comparisons]


def capability_grid(comparison: Comparison) -> Grid:
    """accuracy = mean p; capability = mean 1 - (1 - p)^n; and each one's change from the base."""
    base, rows = comparison.base.scores, []
    n = comparison.n
    for place, evaluation in enumerate(comparison.evaluations):
        scores = evaluation.scores
        row = [evaluation.label]
        for value, before in (
            (scores.pass_at_1, base.pass_at_1),
            (scores.capability_at_k[n], base.capability_at_k[n]),
            (scores.pass_at_k[n], base.pass_at_k[n]),
            (scores.maj_at_k[n], base.maj_at_k[n]),
        ):
            row += [percent(value), "-" if place == 0 else signed(100 * (value - before))]
        solved = sum(count > 0 for count in evaluation.counts.values())
        entropy = statistics.fmean(evaluation.entropies.values())
        rows.append([*row, str(solved), f"{entropy:.3f}"])
    heads = [
        "model",
        "accuracy",
        "change",
        f"1-(1-p)^{n}",
        "change",
        f"pass@{n}",
        "change",
        f"maj@{n}",
        "change",
        "solved",
    ]
    return Grid(f"{comparison.title}: accuracy against capability", [*heads, "answer entropy, nats"], rows)


def bin_grid(comparison: Comparison) -> Grid:
    """Mean change of accuracy in each bin of the base's success counts, with its standard error over problems."""
    heads = [f"right of {comparison.n} (base)", "problems", "before"]
    columns = []
    for other in comparison.others:
        heads += [f"{other.label}", "change"]
        columns.append(bin_changes(comparison.counts(comparison.base), comparison.counts(other), comparison.n))
    rows = []
    for changes in zip(*columns, strict=True):
        first = changes[0]
        row = [first.bin.label, str(first.num_problems), percent(first.before)]
        for one in changes:
            error = "" if one.error is None else f" ± {100 * one.error:.1f}"
            row += [percent(one.after), "-" if one.change is None else signed(100 * one.change) + error]
        rows.append(row)
    return Grid(f"{comparison.title}: mean change of accuracy by difficulty, percentage points", heads, rows)


def transition_grid(comparison: Comparison, other: Evaluation) -> Grid:
    """Percent of the row's problems, and their count, that went to the column's bin."""
    labels = [one.label for one in success_bins(comparison.n)]
    counts_BB = transitions(comparison.counts(comparison.base), comparison.counts(other), comparison.n)
    shares_BB = row_shares(counts_BB)
    rows = []
    for label, shares, counts in zip(labels, shares_BB.tolist(), counts_BB.tolist(), strict=True):
        cells = [f"{100 * share:.0f}% ({count})" if count else "" for share, count in zip(shares, counts, strict=True)]
        rows.append([label, *cells, str(sum(counts))])
    title = f"{comparison.title}: from {comparison.base.label} (rows) to {other.label} (columns), right responses"
    return Grid(title, ["from", *labels, "problems"], rows)


def entropy_grid(comparison: Comparison) -> Grid:
    """Mean entropy of the answers to a problem, nats, by the base's bins."""
    labels = [one.label for one in success_bins(comparison.n)]
    rows = []
    for evaluation in comparison.evaluations:
        means = by_bin(evaluation.entropies, comparison.difficulty, len(labels))
        rows.append([evaluation.label, *("-" if mean is None else f"{mean:.3f}" for mean in means)])
    return Grid(
        f"{comparison.title}: entropy of the answers by right responses of the base, nats", ["model", *labels], rows
    )


def habits_grid(comparison: Comparison) -> Grid:
    """Length and reflection words by model, correctness and the base's bins."""
    labels = [one.label for one in success_bins(comparison.n)]
    rows = []
    for evaluation in comparison.evaluations:
        by_difficulty = habits_by_difficulty(evaluation.by_problem, comparison.difficulty, len(labels))
        for verdict, word in ((True, "right"), (False, "wrong")):
            everything = habits([row for row in evaluation.rows if row.correct is verdict])
            for label, one in [("all", everything), *zip(labels, (by[verdict] for by in by_difficulty), strict=True)]:
                if one.num:
                    figures = [
                        f"{one.tokens:.1f}",
                        f"{one.reflections:.2f}",
                        percent(one.reflecting),
                        percent(one.cut_off),
                    ]
                    rows.append([evaluation.label, word, label, str(one.num), *figures])
    heads = [
        "model",
        "responses",
        "right of the base",
        "number",
        "tokens",
        "reflection words",
        "with any, %",
        "cut off, %",
    ]
    return Grid(f"{comparison.title}: length and reflection ({len(REFLECTION)} words and phrases)", heads, rows)


def agreement_grid(comparison: Comparison) -> Grid:
    """How often the training grader and the strict one agree, and why they may not."""
    rows = []
    for evaluation in comparison.evaluations:
        found = agreement(evaluation.rows)
        if found.num:
            differing = [*found.math_only, *found.strict_only]
            reasons = Counter(disagreement_reason(row) for row in differing).most_common(4)
            told = ", ".join(f"{reason} {number}" for reason, number in reasons)
            counts = (found.both, found.neither, len(found.math_only), len(found.strict_only))
            rows.append([evaluation.label, *map(str, counts), percent(len(differing) / found.num), told])
    heads = ["model", "both right", "both wrong", "math-verify only", "strict only", "differ, %", "looks like"]
    return Grid(f"{comparison.title}: two graders", heads, rows)


def disagreement_grid(comparison: Comparison) -> Grid:
    """Responses on which the two graders differ, with what can be read of them; the title says how many are left out."""
    rows, num = [], 0
    for evaluation in comparison.evaluations:
        found = [row for row in evaluation.rows if row.graders_differ]
        num += len(found)
        for row in reasons_in_turn(found, MOST_DISAGREEMENTS):
            verdicts = ["right" if verdict else "wrong" for verdict in (row.correct, row.strict)]
            told = [_beginning(row.gold or "-"), _answered(row), *verdicts, disagreement_reason(row)]
            rows.append([evaluation.label, row.problem, str(row.sample), *told])
    left = num - len(rows)
    all_of_them = f"{left} more in" if left else "also in"
    title = f"{comparison.title}: {len(rows)} responses on which the graders differ"
    heads = ["model", "problem", "response", "gold", "answer, or … its end", "math-verify", "strict", "looks like"]
    return Grid(f"{title}; {all_of_them} {comparison.name}/{DISAGREEMENTS_FILE}", heads, rows)


def problem_rows(comparison: Comparison) -> list[tuple[float, str]]:
    """(change of accuracy of the last model, problem's id), best first, then in the benchmark's order."""
    last = comparison.evaluations[-1]
    changes = [((last.counts[id] - comparison.base.counts[id]) / comparison.n, id) for id in comparison.problems]
    return sorted(changes, key=lambda pair: -pair[0])


def problem_grid(comparison: Comparison, most: int | None = MOST_PROBLEMS) -> Grid:
    """Right responses of every model to each problem, sorted by the last model's change."""
    ordered = problem_rows(comparison)
    if most is not None and len(ordered) > 2 * most:
        ordered = [*ordered[:most], *ordered[-most:]]
    rows = []
    for change, id in ordered:
        counts = [str(evaluation.counts[id]) for evaluation in comparison.evaluations]
        rows.append([id, *counts, signed(100 * change), comparison.base.by_problem[id][0].gold or ""])
    heads = ["problem", *(e.label for e in comparison.evaluations), "change", "gold"]
    return Grid(f"{comparison.title}: right responses of {comparison.n} to each problem, by change", heads, rows)


def comparison_grids(comparison: Comparison) -> list[Grid]:
    """All tables of one benchmark but the scores; those that need a second model only where there is one."""
    between = [bin_grid(comparison), *(transition_grid(comparison, other) for other in comparison.others)]
    found = [
        *(between if comparison.others else []),
        entropy_grid(comparison),
        habits_grid(comparison),
        agreement_grid(comparison),
        *([problem_grid(comparison)] if comparison.others else []),
    ]
    return [grid for grid in found if grid.rows]


def _answered(row: EvalSample) -> str:
    """What a response answers; of one in which nothing could be read, its end."""
    return _beginning(row.answer) if row.answer else f"… {row.response[-CELL_CHARS:]}"


def _beginning(text: str) -> str:
    return text if len(text) <= CELL_CHARS else f"{text[:CELL_CHARS]} …"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def signed(value: float) -> str:
    return f"{value:+.1f}" if round(value, 1) else "0.0"
