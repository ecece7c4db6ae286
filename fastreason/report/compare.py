r"""`fastreason report compare`: reads evaluations and runs, draws, prints tables, and writes one folder with a page in it.

OUT/index.html             everything, self-contained
OUT/tables.md, tables.tex  all tables
OUT/training.png,svg       the curves of training runs
OUT/<benchmark>/*.png,svg  all pictures
OUT/<benchmark>/disagreements.jsonl  every response on which the two graders differ
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fastreason.errors import ConfigError
from fastreason.evaluation.rows import SAMPLES_FILE, EvalSample
from fastreason.evaluation.tables import FORMATS, Grid, as_latex, as_markdown
from fastreason.report.analysis import disagreement_reason
from fastreason.report.compare_pictures import CAPTIONS, PICTURES
from fastreason.report.compare_tables import (
    DISAGREEMENTS_FILE,
    comparison_grids,
    disagreement_grid,
    problem_grid,
    problem_rows,
    score_grids,
)
from fastreason.report.comparison import Comparison, read_comparisons
from fastreason.report.page import Page, Picture, Section, Table, figure_bytes, render_page
from fastreason.report.training_curves import read_run_groups, training_grid, training_picture

PAGE_FILE = "index.html"
MOST_CHARS = 20_000  # of a response on the page


def report_compare(
    folders: Sequence[Path],
    out: Path,
    runs: Sequence[Path] = (),
    table_format: str = "table",
    num_samples: int = 4,
    n: int | None = None,
) -> Path:
    """Compare evaluations, the first as the base; prints the tables as `table_format` and returns the page's path.

    `runs` are training runs to draw; those whose models were evaluated are found by themselves. Without `folders` the page is
    of runs alone. `num_samples` responses of each model to each problem go onto the page. Raises ConfigError and DataError as
    `read_comparisons` and `read_run_groups` do, and ConfigError where there is nothing to compare.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: it is a file. Give a folder; it is made where it is missing.")
    if num_samples < 0:
        raise ConfigError(f"--samples {num_samples}: it must be 0 or more.")
    if not folders and not runs:
        raise ConfigError(
            "report compare: nothing to compare. Name folders that fastreason eval wrote, e.g. evals/MODEL, or training runs "
            "with --runs, e.g. --runs runs/one runs/other."
        )
    if not folders and n is not None:
        raise ConfigError(
            f"--n {n}: training runs alone have no responses to choose from. Name evaluations, or leave it out."
        )
    comparisons = read_comparisons(folders, n) if folders else []
    curves = training_section([*runs, *runs_of(comparisons)], out)
    grids, sections = [], []
    if comparisons:
        grids += score_grids(comparisons)
        sections.append(Section("Scores", notes=_notes(comparisons), tables=[Table(grid) for grid in grids]))
    for number, comparison in enumerate(comparisons):
        pictures = write_pictures(comparison, out / comparison.name)
        write_disagreements(comparison, out / comparison.name)
        found = comparison_grids(comparison)
        grids += found
        sections.append(_section(comparison, number, found, pictures))
    if curves is not None:
        grids += [table.grid for table in curves.tables]
        sections.append(curves)
    samples = [sample_set(comparison, num_samples) for comparison in comparisons]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(map(as_markdown, grids)), encoding="utf-8")
    (out / "tables.tex").write_text("\n".join(map(as_latex, grids)), encoding="utf-8")
    (out / PAGE_FILE).write_text(render_page(Page(_title(comparisons, runs), sections, samples)), encoding="utf-8")
    print("\n".join(FORMATS[table_format](grid) for grid in grids))
    return out / PAGE_FILE


def write_pictures(comparison: Comparison, folder: Path) -> list[Picture]:
    """Every picture of a comparison, written as PNG and SVG, and returned as SVG for the page."""
    drawn = []
    for name, draw in PICTURES.items():
        figure = draw(comparison)
        if figure is not None:
            drawn.append(_write(figure, folder, name, CAPTIONS[name]))
    return drawn


def write_disagreements(comparison: Comparison, folder: Path) -> None:
    """Every response on which the two graders differ, a line each, whole; an empty file where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / DISAGREEMENTS_FILE, "wb") as file:
        for evaluation in comparison.evaluations:
            for row in filter(lambda row: row.graders_differ, evaluation.rows):
                line = {
                    "model": evaluation.label,
                    "problem": row.problem,
                    "sample": row.sample,
                    "gold": row.gold,
                    "answer": row.answer,
                    "math_verify": row.correct,
                    "strict": row.strict,
                    "reason": disagreement_reason(row),
                    "response": row.response,
                }
                file.write(msgspec.json.encode(line) + b"\n")


def training_section(run_dirs: Sequence[Path], out: Path) -> Section | None:
    """The curves of training runs as a section; None without runs."""
    if not run_dirs:
        return None
    groups = read_run_groups(run_dirs)
    figure = training_picture(groups)
    caption = "training; bands are one standard deviation over seeds"
    pictures = [_write(figure, out, "training", caption)] if figure else []
    return Section("Training", tables=[Table(training_grid(groups))], pictures=pictures)


def sample_set(comparison: Comparison, num_samples: int) -> dict[str, Any]:
    """The problems with some responses of each model, right and wrong ones in turn, as the page's script reads them."""
    problems = []
    for id in comparison.problems:
        first = comparison.base.by_problem[id][0]
        problems.append(
            {
                **{"id": id, "question": first.question, "gold": first.gold, "level": first.level},
                "counts": [evaluation.counts[id] for evaluation in comparison.evaluations],
                "samples": [
                    [_shown(row) for row in chosen(evaluation.by_problem[id], num_samples)]
                    for evaluation in comparison.evaluations
                ],
            }
        )
    return {
        **{"title": comparison.title, "n": comparison.n, "problems": problems},
        "labels": [evaluation.label for evaluation in comparison.evaluations],
        "files": [str(evaluation.folder / SAMPLES_FILE) for evaluation in comparison.evaluations],
    }


def chosen(rows: Sequence[EvalSample], num: int) -> list[EvalSample]:
    """At most `num` responses: a right one, a wrong one, and so on in turn, in the order of their numbers."""
    right, wrong = ([row for row in rows if row.correct is verdict] for verdict in (True, False))
    turns = itertools.chain.from_iterable(itertools.zip_longest(right, wrong))
    return sorted([row for row in turns if row is not None][:num], key=lambda row: row.sample)


def _shown(row: EvalSample) -> dict[str, Any]:
    cut = len(row.response) - MOST_CHARS
    text = row.response if cut <= 0 else f"{row.response[:MOST_CHARS]}\n[{cut} more characters]"
    facts = {"sample": row.sample, "right": row.correct, "strict": row.strict, "tokens": row.num_tokens}
    return {**facts, "cut": row.truncated, "answer": row.answer, "error": row.error, "text": text}


def _section(comparison: Comparison, number: int, grids: Sequence[Grid], pictures: Sequence[Picture]) -> Section:
    places = {id: place for place, id in enumerate(comparison.problems)}
    everything = problem_grid(comparison, most=None)
    problems = Table(everything, number, [places[id] for _, id in problem_rows(comparison)])
    tables = [Table(grid) for grid in grids if grid.title != everything.title]
    differing = disagreement_grid(comparison)
    tables += [Table(differing)] if differing.rows else []
    return Section(comparison.title, tables=[*tables, problems], pictures=pictures)


def _title(comparisons: Sequence[Comparison], runs: Sequence[Path]) -> str:
    if comparisons:
        return f"Comparison: {', '.join(evaluation.label for evaluation in comparisons[0].evaluations)}"
    return f"Training: {', '.join(run.resolve().name for run in runs)}"


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    base = comparisons[0].base.label
    told = [f"The base is {base}: difficulty is the number of its right responses."]
    return told + [f"{comparison.title}: {note}" for comparison in comparisons for note in comparison.notes]


def runs_of(comparisons: Sequence[Comparison]) -> list[Path]:
    """Folders of the training runs that made the evaluated models, where they are still there: RUN/model."""
    paths = [Path(str(e.settings["model"]["path"])).parent for c in comparisons for e in c.evaluations]
    return [
        path for path in dict.fromkeys(paths) if (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file()
    ]


def _write(figure: Any, folder: Path, name: str, caption: str) -> Picture:
    folder.mkdir(parents=True, exist_ok=True)
    content = figure_bytes(figure, "svg")
    (folder / f"{name}.svg").write_bytes(content)
    (folder / f"{name}.png").write_bytes(figure_bytes(figure, "png"))
    return Picture(name, caption, content)
