"""A piece of a run's timeline as a picture: about three steps, with engine, graders, producer, trainer and publication at
work.

Reads the files that the run's processes wrote (see `trace.py`), so a run that is still going has one too. The whole
timeline is for Perfetto; this is the piece that shows whether things overlap.
"""

import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fastreason.report.panels import PHASES
from fastreason.report.reward_curve import INK, quiet
from fastreason.trace import LANES, MAX_ROWS, PARALLEL, Event, Rows, read_events, trace_files

NUM_STEPS = 3
GAP = 2.0  # a piece that lasts longer than so many times the usual one has a restart in it
DRAWN = ("engine", "graders", "producer", "trainer", "publication")  # from top to bottom
THIN = 0.35  # height of a row of the lanes whose spans are side by side

# Colour and meaning of the spans of a name; of all others of a lane, under the lane's name.
LOOKS = {
    "engine": (PHASES["generate"], "generate a group"),
    "asleep": ("#cbd2d9", "asleep: the trainer has its memory"),
    "graders": (PHASES["grade"], "grade a group"),
    "wait for groups": (PHASES["wait"], "wait for groups"),
    "producer": ("#5f8a8b", "issue, keep, answer, save"),
    "pull": (PHASES["wait"], "wait for groups"),
    "train": (PHASES["train"], "train"),
    "trainer": ("#7b8794", "evaluate, save"),
    "gather and write": (PHASES["publish"], "gather and write weights"),
    "load": (PHASES["pause"], "load them: generation pauses"),
    "publication": ("#8d6e63", "other publication"),
}


@dataclass(frozen=True)
class Piece:
    """What happened from `first` to `last` (microseconds since 1970): spans and instants in the order of their starts."""

    first: int
    last: int
    spans: list[Event]
    instants: list[Event]

    def position(self, time: int) -> float:
        """Seconds from the start of the piece, inside it."""
        return (min(max(time, self.first), self.last) - self.first) / 1e6


def read_piece(run_dir: Path, num_steps: int = NUM_STEPS) -> Piece | None:
    """About `num_steps` steps in the middle of a run's timeline; None where no training was traced."""
    files = trace_files(run_dir)
    starts, first, last = [], sys.maxsize, 0
    for path in files:
        for _, event in read_events(path):
            first, last = min(first, event.ts), max(last, event.end)
            if (event.cat, event.name) == ("trainer", "train"):
                starts.append(event.ts)
    if not starts:
        return None
    first, last = choose_window(sorted(starts), num_steps) or (first, last)
    inside = [e for path in files for _, e in read_events(path) if e.end >= first and e.ts < last and e.cat in LANES]
    inside.sort(key=lambda event: (event.ts, -event.dur))
    spans = [event for event in inside if event.ph == "X" and event.end > first]
    return Piece(first, last, spans, instants=[event for event in inside if event.ph == "i"])


def choose_window(starts: Sequence[int], num_steps: int) -> tuple[int, int] | None:
    """The middle `num_steps` steps, each from the start of its training to that of the next; None where there are too few.

    Where they lasted much longer than others, because the run was stopped and resumed in between, the nearest that did not.
    """
    windows = [(starts[i], starts[i + num_steps]) for i in range(len(starts) - num_steps)]
    if not windows:
        return None
    usual = num_steps * statistics.median(end - start for start, end in itertools.pairwise(starts))
    middle = (len(windows) - 1) / 2
    whole = [(abs(i - middle), window) for i, window in enumerate(windows) if window[1] - window[0] <= GAP * usual]
    return min(whole)[1]


def draw_timeline(axes: Axes, piece: Piece) -> None:
    """Draw a piece, a lane under the other; time in seconds from its start."""
    top, ticks, named = 0.0, [], set[str]()
    for lane in DRAWN:
        height = _draw_lane(axes, piece, lane, top, named)
        ticks.append((top + height / 2, lane))
        top += height + 0.3
    for instant in piece.instants:
        x = piece.position(instant.ts)
        axes.axvline(x, color=PHASES["pause"], linewidth=1.2, linestyle=(0, (3, 2)))
        note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": PHASES["pause"], "va": "center"}
        axes.annotate(instant.name, (x, -0.4), xytext=(3, 0), **note)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(top, -0.7 if piece.instants else -0.2)
    axes.set_xlim(0, piece.position(piece.last))
    axes.set_xlabel("seconds")
    quiet(axes, grid="x")
    axes.spines["left"].set_visible(False)


def _draw_lane(axes: Axes, piece: Piece, lane: str, top: float, named: set[str]) -> float:
    """Draw one lane and return its height; where more spans run at once than there are rows, the last row has them all."""
    parallel = lane in PARALLEL
    rows, row_height = Rows(nesting=not parallel), THIN if parallel else 1.0
    for span in piece.spans:
        if span.cat != lane:
            continue
        row = rows.place(span.ts, span.end)
        y = top + row_height * (MAX_ROWS - 1 if row is None else row)
        start, end = piece.position(span.ts), piece.position(span.end)
        color, meaning = LOOKS.get(span.name, LOOKS[lane])
        style: dict[str, Any] = {"facecolors": color, "edgecolor": "white", "linewidth": 0.4}
        label = "" if meaning in named else meaning
        named.add(meaning)
        axes.broken_barh([(start, end - start)], (y, row_height * 0.92), label=label, **style)
        if not parallel and end - start > 0.011 * len(span.name) * piece.position(piece.last):
            ink = INK if color in (PHASES["wait"], PHASES["publish"]) else "white"
            text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "color": ink}
            axes.text((start + end) / 2, y + row_height / 2, _label(span), **text)
    return max(1.0, len(rows) * row_height)


def _label(span: Event) -> str:
    number = span.args.get("step", span.args.get("version"))
    return span.name if number is None else f"{span.name} {number}"
