"""One self-contained HTML page: pictures inside, tables that sort, samples that open; nothing is fetched, ever.

It knows sections, tables and pictures, not what they mean. All text is escaped here; what models wrote is in a block of JSON
that the page's script shows as text. The page's own policy (CSP) allows that one script, by its hash, and inlined images.
"""

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fastreason.evaluation.tables import Grid

WIDE = 40  # characters: a cell with more is wrapped
WORD = re.compile(r"[^\W\d_]{3}")  # where a cell has one, it is read and not compared: its column stands on the left
LEFT = ' class="text"'


@dataclass(frozen=True)
class Picture:
    """A picture as SVG or PNG bytes, with a caption that also stands for it where it cannot be seen."""

    name: str
    caption: str
    content: bytes
    kind: str = "svg+xml"


@dataclass(frozen=True)
class Table:
    """A grid; with `samples`, its first cells open that set's problems, by `places` in it, and rows can be searched."""

    grid: Grid
    samples: int | None = None
    places: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Page:
    """`samples` are sets of problems with responses, plain data; see `page.js` for what it reads of them."""

    title: str
    sections: Sequence[Section]
    samples: Sequence[dict[str, Any]] = field(default_factory=list)


def render_page(page: Page) -> str:
    """The page as one HTML document."""
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#s{n}">{_text(section.title)}</a>' for n, section in enumerate(page.sections))
    body = "\n".join(_section(section, number) for number, section in enumerate(page.sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(page.title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{_text(page.title)}</h1>
<nav>{links}</nav>
{body}
<dialog id="sample"></dialog>
<script type="application/json" id="samples">{_data(page.samples)}</script>
<script>{script}</script>
</body>
</html>
"""


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as `png` or `svg`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    if kind == "png":
        FigureCanvasAgg(figure).print_png(buffer)
    else:
        with matplotlib.rc_context({"svg.hashsalt": "fastreason", "svg.fonttype": "none"}):
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def _section(section: Section, number: int) -> str:
    notes = "".join(f"<li>{_text(note)}</li>" for note in section.notes)
    parts = [
        f'<section id="s{number}"><h2>{_text(section.title)}</h2>',
        f'<ul class="notes">{notes}</ul>' if notes else "",
    ]
    parts += [_picture(picture) for picture in section.pictures]
    parts += [_table(table, f"t{number}-{place}") for place, table in enumerate(section.tables)]
    return "\n".join([*parts, "</section>"])


def _picture(picture: Picture) -> str:
    source = f"data:image/{picture.kind};base64,{base64.b64encode(picture.content).decode()}"
    caption = _text(picture.caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _table(table: Table, id: str) -> str:
    grid = table.grid
    texts = {
        place for row in grid.rows for place, cell in enumerate(row) if WORD.search(cell)
    }  # columns of more than figures
    heads = "".join(
        f'<th scope="col"{LEFT if place in texts else ""}><button type="button">{_text(head)}</button></th>'
        for place, head in enumerate(grid.heads)
    )
    rows = "\n".join(f"<tr>{''.join(_cells(table, number, texts))}</tr>" for number in range(len(grid.rows)))
    search = ""
    if table.samples is not None:
        say = "Search these problems"
        search = f'<input type="search" data-table="{id}" placeholder="{say}" aria-label="{say}">'
    return (
        f"<h3>{_text(grid.title)}</h3>{search}"
        f'<div class="scroll"><table id="{id}"><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
    )


def _cells(table: Table, number: int, texts: set[int]) -> list[str]:
    cells = []
    for place, cell in enumerate(table.grid.rows[number]):
        look = ' class="wide"' if len(cell) > WIDE else LEFT if place in texts else ""
        text = _text(cell)
        if place == 0 and table.samples is not None:
            text = f'<button type="button" data-set="{table.samples}" data-problem="{table.places[number]}">{text}</button>'
        cells.append(f"<td{look}>{text}</td>")
    return cells


def _text(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode(), quote=True)


def _data(value: Any) -> str:
    r"""JSON that cannot end its script element: `<`, `>` and `&` are written as \u003c and so on."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
