"""Scores of several models side by side: as a table for the terminal, in Markdown, and in LaTeX. Pure text.

The first table compares pass@1 with its standard error (REDI's SEM) on every benchmark and in the mean over them; one more a
benchmark has everything else.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastreason.evaluation.scores import Scores

ByModel = Mapping[str, Mapping[str, Scores]]
"""For each model's label and each benchmark's name, the scores."""


@dataclass(frozen=True)
class Grid:
    """A table as text: a title, the heads of the columns, and the rows; `±` stands between a score and its error."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def comparison(scores: ByModel, titles: Mapping[str, str]) -> Grid:
    """pass@1 in percent with its SEM: a row a model, a column a benchmark, and their mean where there are several."""
    names = list(titles)
    n = next(iter(scores.values()))[names[0]].n
    heads = ["model", *titles.values(), *(["mean"] if len(names) > 1 else [])]
    rows = []
    for label, of_model in scores.items():
        given = [of_model[name] for name in names]
        cells = [_with_error(each.pass_at_1, each.sem) for each in given]
        if len(given) > 1:
            sems = [each.sem for each in given if each.sem is not None]
            error = math.sqrt(sum(sem**2 for sem in sems)) / len(given) if len(sems) == len(given) else None
            cells.append(_with_error(sum(each.pass_at_1 for each in given) / len(given), error))
        rows.append([label, *cells])
    return Grid(f"pass@1, %, mean of {n} responses a problem", heads, rows)


def details(scores: ByModel, name: str, title: str) -> Grid:
    """Everything else about one benchmark: a row a model."""
    given = {label: of_model[name] for label, of_model in scores.items()}
    first = next(iter(given.values()))
    columns = _columns(sorted(first.pass_at_k))
    rows = [[label, *(cell(each) for cell in columns.values())] for label, each in given.items()]
    return Grid(f"{title}: {first.num_problems} problems, n = {first.n}", ["model", *columns], rows)


def _columns(ks: Sequence[int]) -> dict[str, Callable[[Scores], str]]:
    def at(figures: str, k: int) -> Callable[[Scores], str]:
        return lambda scores: _percent(getattr(scores, figures)[k])

    above = [k for k in ks if k > 1]
    return {
        "pass@1": lambda s: _with_error(s.pass_at_1, s.sem),
        "95 %": lambda s: f"{_percent(s.interval[0])} to {_percent(s.interval[1])}",
        **{f"pass@{k}": at("pass_at_k", k) for k in above},
        **({f"maj@{above[-1]}": at("maj_at_k", above[-1])} if above else {}),
        "formatted": lambda s: _percent(s.pass_at_1_formatted),
        "strict": lambda s: _percent(s.pass_at_1_strict),
        "cut off": lambda s: _percent(s.truncated_share),
        "tokens": lambda s: _whole(s.tokens_mean),
        "tokens/right": lambda s: _whole(s.tokens_per_right),
    }


def grids(scores: ByModel, titles: Mapping[str, str]) -> list[Grid]:
    return [comparison(scores, titles), *(details(scores, name, title) for name, title in titles.items())]


def as_markdown(grid: Grid) -> str:
    """A pipe table below its title."""
    lines = [grid.heads, ["---", *["---:"] * (len(grid.heads) - 1)], *grid.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    return f"**{grid.title}**\n\n{body}\n"


def as_latex(grid: Grid) -> str:
    """A table of the package booktabs."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(grid.title)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(grid.heads) - 1)}}}", r"\toprule", _latex_row(grid.heads), r"\midrule"]
    lines += [*map(_latex_row, grid.rows), r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def as_text(grid: Grid) -> str:
    """A table for the terminal, as wide as it needs to be."""
    table = Table(*grid.heads, box=SIMPLE_HEAD)
    for row in grid.rows:
        table.add_row(*row)
    console = Console(width=400, no_color=True)
    with console.capture() as captured:
        console.print(table, markup=False)
    lines = [grid.title, *(line.rstrip() for line in captured.get().splitlines())]
    return "\n".join(line for line in lines if line) + "\n"


FORMATS: dict[str, Callable[[Grid], str]] = {"table": as_text, "markdown": as_markdown, "latex": as_latex}


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(_latex(cell) for cell in cells) + r" \\"


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(char, f"\\{char}" if char in "&%$#_{}" else char) for char in text)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _with_error(share: float, error: float | None) -> str:
    return _percent(share) if error is None else f"{_percent(share)} ± {_percent(error)}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
