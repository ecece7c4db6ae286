"""A run's timeline: what each process was doing when, as Chrome trace events that Perfetto and chrome://tracing open.

Every process appends to a file of its own under `trace/`, one event a line, so that nobody waits for anybody and a
killed process tears at most its last line; `merge_trace` makes one `trace.json` of them. Refuses to know what the
spans mean, and does nothing at all where no run folder is given.
"""

import contextlib
import os
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

TRACE_FOLDER = "trace"
TRACE_FILE = "trace.json"
FLUSH_S = 1.0
MAX_ROWS = 16

PROCESSES = ("trainer", "producer")
LANES = ("trainer", "publication", "engine", "graders", "producer")  # from top to bottom
PARALLEL = {
    "engine",
    "graders",
}  # spans that overlap there are side by side; elsewhere the shorter is a part of the longer

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()
_STRIDE = 32  # thread numbers that a lane takes
_encode = msgspec.json.Encoder().encode


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of a process's file: a span (X), an instant (i) or a counter (C) of the lane `cat`.

    `ts` and `dur` are microseconds, `ts` since 1970.
    """

    ph: Literal["X", "i", "C"]
    name: str
    ts: int
    cat: str = ""
    dur: int = 0
    args: dict[str, Any] = {}

    @property
    def end(self) -> int:
        return self.ts + self.dur


class Trace:
    """Appends the events of one process to `run_dir/trace/<process>.jsonl`; with `run_dir` None it does nothing.

    A span is two looks at the clock and a line in memory; the lines go out whole, together, at most once a second.
    `close` writes the rest: a process that ends by `os._exit` has to call it.
    """

    def __init__(self, run_dir: Path | None, process: str) -> None:
        self._lines: list[bytes] = []
        self._lock = threading.Lock()
        self._written_at = 0.0
        self._file: BinaryIO | None = None
        if run_dir is not None:
            folder = run_dir / TRACE_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _open_whole_lines(folder / f"{process}.jsonl")

    def span(self, lane: str, name: str, **args: Any) -> AbstractContextManager[None]:
        """A context whose time in between is one span, also where it is left by an exception."""
        return _NOTHING if self._file is None else self._spanning(lane, name, args)

    @contextlib.contextmanager
    def _spanning(self, lane: str, name: str, args: dict[str, Any]) -> Iterator[None]:
        start_s = time.time()
        try:
            yield
        finally:
            self.complete(lane, name, start_s, time.time(), **args)

    def complete(self, lane: str, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """A span that is over, from and to a `time.time()`."""
        if self._file is not None:
            start, end = _microseconds(start_s), _microseconds(end_s)
            self._append(Event(ph="X", name=name, cat=lane, ts=start, dur=max(0, end - start), args=args))

    def instant(self, lane: str, name: str, **args: Any) -> None:
        if self._file is not None:
            self._append(Event(ph="i", name=name, cat=lane, ts=_microseconds(time.time()), args=args))

    def counter(self, name: str, **values: float) -> None:
        """The values that `name` has from now on; those of one name are drawn in one chart."""
        if self._file is not None:
            self._append(Event(ph="C", name=name, ts=_microseconds(time.time()), args=values))

    def close(self) -> None:
        """Write what is still in memory; harmless when called twice."""
        with self._lock:
            if self._file is not None:
                self._write()
                self._file.close()
                self._file = None

    def _append(self, event: Event) -> None:
        with self._lock:
            self._lines.append(_encode(event))
            if time.monotonic() - self._written_at >= FLUSH_S:
                self._write()

    def _write(self) -> None:
        if self._file is not None and self._lines:
            self._file.write(b"\n".join(self._lines) + b"\n")
        self._lines.clear()
        self._written_at = time.monotonic()


class Rows:
    """Spreads the spans of a lane over rows, so that on each row they follow one another or, if `nesting`, are nested.

    Spans come in the order of their starts (of two that start together the longer first). As few rows are used as
    possible, and at most `limit`.
    """

    def __init__(self, nesting: bool, limit: int = MAX_ROWS) -> None:
        self._nesting, self._limit = nesting, limit
        self._open: list[list[int]] = []  # of each row the ends of the spans that last, outermost first

    def __len__(self) -> int:
        return len(self._open)

    def place(self, start: int, end: int) -> int | None:
        """The row of a span, or None where all rows are taken."""
        for row, ends in enumerate(self._open):
            while ends and ends[-1] <= start:
                ends.pop()
            if not ends or (self._nesting and end <= ends[-1]):
                ends.append(end)
                return row
        if len(self._open) == self._limit:
            return None
        self._open.append([end])
        return len(self._open) - 1


def trace_files(run_dir: Path) -> list[Path]:
    """The files that the processes of a run wrote."""
    return sorted((run_dir / TRACE_FOLDER).glob("*.jsonl"))


def read_events(path: Path) -> Iterator[tuple[int, Event]]:
    """Each event of one process with the offset of its line; a line that a killed process tore is passed over."""
    decoder = msgspec.json.Decoder(Event)
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(msgspec.DecodeError):
                yield offset, decoder.decode(line)
            offset += len(line)


def merge_trace(run_dir: Path) -> Path | None:
    """Write `trace.json` from the files of all processes and return its path; None where nothing was traced.

    Times are microseconds since the first event. Spans of a lane that overlap are spread over rows, "engine 1",
    "engine 2", ..., because on one row they would have to be nested; where more than `MAX_ROWS` run at once, the others
    are one row of the times at which there were any. In memory are four numbers an event, not the events.
    """
    files = trace_files(run_dir)
    columns = starts, durations, sources, offsets = array("q"), array("q"), array("q"), array("q")
    for number, path in enumerate(files):
        for offset, event in read_events(path):
            for column, value in zip(columns, (event.ts, event.dur, number, offset), strict=True):
                column.append(value)
    if not starts:
        return None
    order = sorted(range(len(starts)), key=lambda i: (starts[i], -durations[i]))
    merging = _Merging(first=starts[order[0]])
    target = run_dir / TRACE_FILE
    aside = target.with_name(f".{TRACE_FILE}.{os.getpid()}.tmp")
    decoder = msgspec.json.Decoder(Event)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(path, "rb")) for path in files]
        out = stack.enter_context(open(aside, "wb"))
        out.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        for i in order:
            opened[sources[i]].seek(offsets[i])
            event = decoder.decode(opened[sources[i]].readline())
            for record in merging.place(files[sources[i]].stem, event):
                out.write(_encode(record) + b",\n")
        records = [*merging.rest(), *merging.names()]
        out.write(b",\n".join(map(_encode, records)) + b"\n]}\n")
    os.replace(aside, target)
    return target


class _Lane:
    """One lane of one process while it is merged."""

    def __init__(self, name: str, pid: int, tid: int) -> None:
        self.name, self.pid, self.tid = name, pid, tid
        self.rows = Rows(nesting=name not in PARALLEL)
        self.further = 0  # rows of the spans for which there was none: 0 or 1
        self._busy: list[int] | None = None  # start, end and number of those that overlap now

    def place(self, event: Event) -> Iterator[tuple[int, Event]]:
        """(row, span) for what can be written now."""
        row = self.rows.place(event.ts, event.end)
        if row is not None:
            yield row, event
        elif self._busy is not None and event.ts <= self._busy[1]:
            self._busy = [self._busy[0], max(self._busy[1], event.end), self._busy[2] + 1]
        else:
            yield from self.rest()
            self._busy, self.further = [event.ts, event.end, 1], 1

    def rest(self) -> Iterator[tuple[int, Event]]:
        """The last times at which there were more spans than rows."""
        if self._busy is not None:
            start, end, num = self._busy
            yield MAX_ROWS, Event(ph="X", name=f"{num} more", ts=start, dur=end - start, args={"num": num})

    def names(self) -> Iterator[tuple[int, str]]:
        """(row, name) of every row that has something on it."""
        for row in range(max(1, len(self.rows))):
            yield row, f"{self.name} {row + 1}" if len(self.rows) > 1 else self.name
        if self.further:
            yield MAX_ROWS, f"{self.name}, further"


class _Merging:
    """Gives events their process and thread numbers; `first` is where time begins, microseconds since 1970."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self._processes: list[str] = list(PROCESSES)
        self._names: list[str] = list(LANES)

    def place(self, process: str, event: Event) -> Iterator[dict[str, Any]]:
        """The records to write for an event."""
        common = {"ph": event.ph, "name": event.name, "ts": event.ts - self._first, "args": event.args}
        if event.ph == "C":
            yield {**common, "pid": _number(process, self._processes)}
            return
        lane = self._lane(process, event.cat)
        if event.ph == "i":
            yield {**common, "s": "p", "pid": lane.pid, "tid": lane.tid}
            return
        for row, span in lane.place(event):
            yield self._record(lane, row, span)

    def rest(self) -> Iterator[dict[str, Any]]:
        for lane in self._lanes.values():
            for row, span in lane.rest():
                yield self._record(lane, row, span)

    def names(self) -> Iterator[dict[str, Any]]:
        """The records that name and sort the processes and the rows."""
        for number, process in enumerate(self._processes, start=1):
            yield _metadata("process_name", number, 0, name=process)
            yield _metadata("process_sort_index", number, 0, sort_index=number)
        for lane in self._lanes.values():
            for row, name in lane.names():
                yield _metadata("thread_name", lane.pid, lane.tid + row, name=name)
                yield _metadata("thread_sort_index", lane.pid, lane.tid + row, sort_index=lane.tid + row)

    def _lane(self, process: str, name: str) -> _Lane:
        if (process, name) not in self._lanes:
            pid = _number(process, self._processes)
            # Unlike in different processes too: some viewers take a thread's number as its only name.
            tid = pid * 10_000 + _number(name, self._names) * _STRIDE
            self._lanes[process, name] = _Lane(name, pid, tid)
        return self._lanes[process, name]

    def _record(self, lane: _Lane, row: int, span: Event) -> dict[str, Any]:
        times = {"ts": span.ts - self._first, "dur": span.dur}
        return {"ph": "X", "name": span.name, **times, "pid": lane.pid, "tid": lane.tid + row, "args": span.args}


def _metadata(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _number(name: str, known: list[str]) -> int:
    """The place of a name, from 1; a new one comes last."""
    if name not in known:
        known.append(name)
    return known.index(name) + 1


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _open_whole_lines(path: Path) -> BinaryIO:
    """Open for appending, unbuffered; a line that an earlier process tore is ended first."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    if file.tell():
        with open(path, "rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                file.write(b"\n")
    return file
