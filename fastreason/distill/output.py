"""What a distillation leaves beside its responses: positives, pairs, and a report, as files and as a table.

Every file is written aside, brought to the disk and renamed, so that no reader meets half of one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from fastreason.distill.section import DistillRun, dumped
from fastreason.distill.selection import Passage, Selection
from fastreason.rollout.line_file import replace_file
from fastreason.rollout.sample_store import SAMPLES_FILE, SampleStore

REPORT_FILE, POSITIVES_FILE, PAIRS_FILE = "report.json", "positives.jsonl", "pairs.jsonl"
SHOWN = (
    ("pass@1", "pass_at_1", "{:.3f}"),
    ("error", "standard_error", "{:.3f}"),
    ("solved", "solved_share", "{:.1%}"),
    ("cut off", "truncated_share", "{:.0%}"),
    ("questions", "num_questions", "{}"),
    ("responses", "num_responses", "{}"),
    ("tokens", "num_tokens", "{}"),
)


def write_selection(out: Path, store: SampleStore, selection: Selection) -> None:
    """positives.jsonl, an id being the question's and the response's number, and pairs.jsonl, one a question."""

    def positives() -> Iterator[dict[str, Any]]:
        for id, sample in selection.positives:
            chosen = store.read(store.kept[id][sample])
            yield {
                "id": f"{id}#{sample}",
                "problem": chosen.problem,
                "answer": chosen.answer,
                "response": chosen.response,
                "problem_id": id,
                "sample": sample,
                "num_tokens": chosen.num_tokens,
            }

    def pairs() -> Iterator[dict[str, Any]]:
        for id, right, wrong in selection.pairs:
            chosen, rejected = store.read(store.kept[id][right]), store.read(store.kept[id][wrong])
            yield {
                "id": id,
                "problem": chosen.problem,
                "answer": chosen.answer,
                "chosen": chosen.response,
                "rejected": rejected.response,
                "chosen_sample": right,
                "rejected_sample": wrong,
            }

    for name, rows in ((POSITIVES_FILE, positives()), (PAIRS_FILE, pairs())):
        replace_file(out / name, (msgspec.json.encode(row) + b"\n" for row in rows))


def make_report(
    config: DistillRun, asked: Passage, selection: Selection, figures: dict[str, Any], time: dict[str, Any]
) -> dict[str, Any]:
    """What came in, what each filter dropped in its order, what came out; counts add up to what came in."""
    questions = Passage(asked.num_in, {**asked.dropped, **selection.questions.dropped})
    return {
        "command": "distill",
        "questions": questions.as_dict(),
        "responses": selection.responses.as_dict(),
        "pairs": selection.paired.as_dict(),
        "accuracy": figures,
        "time": time,
        "arguments": dumped(config),
    }


def write_report(out: Path, report: dict[str, Any]) -> None:
    replace_file(out / REPORT_FILE, [msgspec.json.format(msgspec.json.encode(report)) + b"\n"])


def print_report(report: dict[str, Any], out: Path, console: Console | None = None) -> None:
    """The report in short: how well was answered, what each filter dropped, where the files are."""
    console = console or Console()
    figures, time = report["accuracy"], report["time"]
    table = Table(*(title for title, _, _ in SHOWN))
    table.add_row(*("-" if figures[key] is None else form.format(figures[key]) for _, key, form in SHOWN))
    console.print(table)
    passages = Table("", "in", "dropped", "out")
    for name in ("questions", "responses", "pairs"):
        passage = report[name]
        dropped = ", ".join(f"{key} {num}" for key, num in passage["dropped"].items() if num)
        passages.add_row(name, str(passage["in"]), dropped or "none", str(passage["out"]))
    console.print(passages)
    earlier = f"; {time['earlier_responses']} were there" if time["earlier_responses"] else ""
    speed = f", {time['tok_per_s']:.0f} tok/s" if time["tok_per_s"] else ""
    console.print(f"{time['new_responses']} responses in {time['seconds']:.0f} s{speed}{earlier}", highlight=False)
    for label, file in (("positives", POSITIVES_FILE), ("pairs", PAIRS_FILE), ("all responses", SAMPLES_FILE)):
        console.print(f"{label}: {out / file}", markup=False, highlight=False, soft_wrap=True)
