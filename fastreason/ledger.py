"""The life of every prompt of a run: `ledger.jsonl`, one line an event, written by the producer alone.

    issued    ticket, prompt_id, epoch, version      a prompt got its ticket and was sent to the engine
    reissued  ticket, prompt_id, reason              sent again: after a resume, or because a process had died
    finished  ticket, oldest, newest, tokens         generated and graded; versions that sampled its tokens
    dropped   ticket, reason                         will not be trained on, on purpose
    trained   ticket, step                           in the weights since that step
    collected ticket, step                           written to a file in place of training (`--only rollout`)
    skipped   prompt_id, epoch, reason               never issued: its prompt is too long

and events without a ticket (`resumed`, `producer_restarted`, `engine_lost`, `engine_back`). A checkpoint holds the length
of the file at its moment; a resumed run cuts the file there, so that it always tells one lineage. Owns the file and its
audit; decides nothing.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastreason.errors import CheckpointError, DataError

LEDGER_FILE = "ledger.jsonl"


class Ledger:
    """Appends to a ledger; `num_bytes` first cuts it to the length that a checkpoint remembers (0: a new run)."""

    def __init__(self, path: Path, num_bytes: int | None = None) -> None:
        """Raises CheckpointError where the file is shorter than the checkpoint says."""
        if num_bytes is not None:
            length = path.stat().st_size if path.exists() else 0
            if length < num_bytes:
                raise CheckpointError(
                    f"{path} has {length} bytes, the checkpoint was written at {num_bytes}: the file was cut or replaced. "
                    "Resume from another checkpoint (remove the newest folder under checkpoints/)."
                )
        self._file = open(path, "ab")  # noqa: SIM115 (held for as long as the run)
        # A killed writer tears at most its last line.
        self._file.truncate(_whole_lines(path) if num_bytes is None else num_bytes)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event."""
        self.write_all([(event, fields)])

    def write_all(self, events: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Append events of one moment with one write, so that a killed process leaves all or a first part of them."""
        now = round(time.time(), 3)
        lines = [
            json.dumps({"event": event, **fields, "time": now}, ensure_ascii=False) + "\n" for event, fields in events
        ]
        self._file.write("".join(lines).encode("utf-8", "replace"))
        self._file.flush()

    def sync(self) -> int:
        """Wait for the disk and return the file's length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class LedgerAudit:
    """What a ledger says in numbers; the lists name tickets (`lost`, `pending`) and (epoch, prompt id) pairs (`twice`).

    A finished run has nothing pending: what is, was lost. A missing ticket number is lost in any run.
    """

    num_issued: int
    num_trained: int
    num_dropped: int
    num_reissued: int
    pending: list[int]
    lost: list[int]
    twice: list[tuple[int, str]]


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """The events of a ledger (or of its run folder), oldest first, without a torn last line; a missing file is empty.

    Raises DataError when any other line is not an event.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LEDGER_FILE
    if not path.is_file():
        return []
    rows = []
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "event": str(row["event"])})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number} is not an event: {line[:80]!r}") from error
    return rows


def audit_ledger(rows: Iterable[dict[str, Any]], finished: bool = True) -> LedgerAudit:
    """Whether every prompt that was issued was trained once, or dropped on purpose."""
    prompts: dict[int, tuple[int, str]] = {}
    dropped: set[int] = set()
    trained: Counter[int] = Counter()
    num_reissued = 0
    for row in rows:
        match row["event"]:
            case "issued":
                prompts[row["ticket"]] = (row["epoch"], row["prompt_id"])
            case "reissued":
                num_reissued += 1
            case "dropped":
                dropped.add(row["ticket"])
            case "trained" | "collected":
                trained[row["ticket"]] += 1
    by_prompt: Counter[tuple[int, str]] = Counter()
    for ticket, count in trained.items():
        by_prompt[prompts.get(ticket, (-1, f"ticket {ticket}, never issued"))] += count
    pending = sorted(set(prompts) - set(trained) - dropped)
    missing = sorted(set(range(max(prompts, default=-1) + 1)) - set(prompts))
    return LedgerAudit(
        num_issued=len(prompts),
        num_trained=len(trained),
        num_dropped=len(dropped),
        num_reissued=num_reissued,
        pending=pending,
        lost=sorted({*missing, *(pending if finished else ())}),
        twice=sorted(prompt for prompt, count in by_prompt.items() if count > 1 or prompt[0] < 0),
    )


def _whole_lines(path: Path) -> int:
    raw = path.read_bytes()
    return raw.rfind(b"\n") + 1
