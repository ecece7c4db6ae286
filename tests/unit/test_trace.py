"""The timeline: what a killed process leaves of it, and that the merged file is one a viewer can draw."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict

import pytest

from fastreason import trace
from fastreason.trace import MAX_ROWS, Rows, Trace, merge_trace, read_events

pytestmark = pytest.mark.timeout(400)


def lines_of(run_dir, process):
    return [json.loads(line) for line in (run_dir / "trace" / f"{process}.jsonl").read_text().splitlines()]


def merged(run_dir):
    """The merged events by kind, and the names of (pid, tid)."""
    written = json.loads(merge_trace(run_dir).read_text())
    assert written["displayTimeUnit"] == "ms"
    kinds, names = defaultdict(list), {}
    for event in written["traceEvents"]:
        kinds[event["ph"]].append(event)
        if event["name"] in ("process_name", "thread_name"):
            names[event["pid"], event["tid"]] = event["args"]["name"]
    return kinds, names


def assert_drawable(spans):
    """On one thread two complete events are apart or one holds the other."""
    threads = defaultdict(list)
    for span in spans:
        threads[span["tid"]].append((span["ts"], span["ts"] + span["dur"]))
    for rows in threads.values():
        for i, (start, end) in enumerate(rows):
            for other_start, other_end in rows[i + 1 :]:
                apart = end <= other_start or other_end <= start
                holds = start <= other_start and other_end <= end
                held = other_start <= start and end <= other_end
                assert apart or holds or held, ((start, end), (other_start, other_end))


def test_a_span_is_what_happened_between_two_looks_at_the_clock(tmp_path):
    timeline = Trace(tmp_path, "trainer")
    before = time.time()
    with pytest.raises(KeyError), timeline.span("trainer", "train", step=3):
        time.sleep(0.05)
        raise KeyError
    timeline.instant("engine", "restart", why="died")
    timeline.counter("admission", running=3, accepted=5)
    timeline.close()
    timeline.close()
    span, instant, counter = lines_of(tmp_path, "trainer")
    assert (span["ph"], span["cat"], span["name"], span["args"]) == ("X", "trainer", "train", {"step": 3})
    assert abs(span["ts"] / 1e6 - before) < 1 and 0.05e6 <= span["dur"] < 5e6
    assert (instant["ph"], instant["cat"], instant["args"]) == ("i", "engine", {"why": "died"})
    assert (counter["ph"], counter["name"], counter["args"]) == ("C", "admission", {"running": 3, "accepted": 5})


def test_without_a_run_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timeline = Trace(None, "trainer")
    with timeline.span("trainer", "train"):
        timeline.complete("engine", "t1", 1.0, 2.0)
        timeline.instant("engine", "restart")
        timeline.counter("admission", running=1)
    timeline.close()
    assert list(tmp_path.iterdir()) == [] and merge_trace(tmp_path) is None


def test_lines_go_out_at_most_once_a_second_and_whole(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(trace.time, "monotonic", lambda: now[0])
    timeline = Trace(tmp_path, "producer")
    sizes = []
    for number in range(40):
        now[0] += 0.1
        timeline.instant("engine", "x" * number)
        written = (tmp_path / "trace" / "producer.jsonl").read_bytes()
        assert written.endswith(b"\n")
        sizes.append(written.count(b"\n"))
    assert len(set(sizes)) <= 5 and sizes[-1] >= 30


def test_a_killed_process_loses_a_second_and_the_next_one_goes_on(tmp_path):
    program = (
        "import sys, time, pathlib; from fastreason.trace import Trace; t = Trace(pathlib.Path(sys.argv[1]), 'producer')\n"
        "for number in range(10**9):\n    t.complete('engine', f'g{number}', number, number + 1)\n"
        "    time.sleep(0.0002)\n"
        "    print(flush=True) if number == 100 else None\n"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(1.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    path = tmp_path / "trace" / "producer.jsonl"
    assert len(list(read_events(path))) > 200
    with open(path, "ab") as file:
        file.write(b'{"ph":"X","na')
    timeline = Trace(tmp_path, "producer")
    timeline.complete("engine", "after", 5.0, 6.0)
    timeline.close()
    events = [event for _, event in read_events(path)]
    assert events[-1].name == "after" and events[-1].dur == 1_000_000
    assert [event.name for event in events[:-1]] == [f"g{number}" for number in range(len(events) - 1)]


def test_offsets_lead_back_to_the_lines(tmp_path):
    timeline = Trace(tmp_path, "producer")
    for name in ("a", "Grüße", "c"):
        timeline.instant("engine", name)
    timeline.close()
    path = tmp_path / "trace" / "producer.jsonl"
    raw = path.read_bytes()
    for offset, event in read_events(path):
        assert json.loads(raw[offset:].split(b"\n")[0])["name"] == event.name


def test_rows_are_as_few_as_possible_and_hold_what_follows_or_is_nested():
    parallel = Rows(nesting=False)
    assert [parallel.place(*span) for span in ((0, 10), (2, 5), (5, 8), (9, 12), (10, 11))] == [0, 1, 1, 1, 0]
    nesting = Rows(nesting=True)
    assert [nesting.place(*span) for span in ((0, 10), (2, 5), (5, 8), (9, 12), (12, 13))] == [0, 0, 0, 1, 0]
    limited = Rows(nesting=False, limit=1)
    assert [limited.place(*span) for span in ((0, 10), (2, 5), (10, 11))] == [0, None, 0]


def test_the_merged_file_has_every_span_at_its_place(tmp_path):
    """Random overlapping spans of two processes, written at their ends: all are there, and those of a row nest."""
    rng = random.Random(4)
    start, sent = 1_700_000_000.0, []
    for process, lanes in (("producer", ("engine", "graders")), ("trainer", ("trainer", "publication"))):
        timeline = Trace(tmp_path, process)
        spans = []
        for number in range(150):
            begin = start + rng.uniform(0, 60)
            spans.append((begin, begin + rng.expovariate(1.0), rng.choice(lanes), f"{process}{number}"))
        for begin, end, lane, name in sorted(spans, key=lambda span: span[1]):
            timeline.complete(lane, name, begin, end, number=name)
        timeline.close()
        sent += spans
    kinds, names = merged(tmp_path)
    assert_drawable(kinds["X"])
    first = min(begin for begin, *_ in sent)
    found = {
        (span["name"], span["args"]["number"], names[span["pid"], span["tid"]].split()[0], span["ts"])
        for span in kinds["X"]
    }
    assert found == {(name, name, lane, round(begin * 1e6) - round(first * 1e6)) for begin, _, lane, name in sent}
    assert [span["ts"] for span in kinds["X"]] == sorted(span["ts"] for span in kinds["X"])
    assert names[1, 0] == "trainer" and names[2, 0] == "producer"
    engine = [name for name in names.values() if name.startswith("engine")]
    assert 2 <= len(engine) <= MAX_ROWS and sorted(engine) == sorted(f"engine {n + 1}" for n in range(len(engine)))


def test_lanes_are_sorted_from_the_trainer_to_the_producer(tmp_path):
    for process, lanes in (
        ("producer", ("producer", "graders", "engine", "publication")),
        ("trainer", ("publication", "trainer")),
    ):
        timeline = Trace(tmp_path, process)
        for lane in lanes:
            timeline.complete(lane, "one", 1.0, 2.0)
        timeline.counter("admission", running=2)
        timeline.close()
    kinds, names = merged(tmp_path)
    index = {
        (event["name"], event["pid"], event["tid"]): event["args"]["sort_index"]
        for event in kinds["M"]
        if "sort_index" in event["name"]
    }
    order = sorted(
        (index["process_sort_index", pid, 0], index["thread_sort_index", pid, tid], names[pid, tid])
        for pid, tid in names
        if tid
    )
    assert [name for *_, name in order] == ["trainer", "publication", "publication", "engine", "graders", "producer"]
    assert len({tid for _, tid in names if tid}) == 6, "a thread's number was given twice"
    assert [event["args"] for event in kinds["C"]] == [{"running": 2}] * 2


def test_more_spans_than_rows_become_times_at_which_there_were_more(tmp_path):
    timeline = Trace(tmp_path, "producer")
    for number in range(MAX_ROWS + 3):
        timeline.complete("engine", f"g{number}", 1.0 + number / 100, 3.0 + number)
    for number in range(MAX_ROWS + 2):
        timeline.complete("engine", f"h{number}", 100.0 + number / 100, 101.0 + number)
    timeline.close()
    kinds, names = merged(tmp_path)
    assert_drawable(kinds["X"])
    further = [span for span in kinds["X"] if names[span["pid"], span["tid"]] == "engine, further"]
    assert [(span["name"], span["args"]) for span in further] == [("3 more", {"num": 3}), ("2 more", {"num": 2})]
    assert (further[0]["ts"], further[0]["dur"]) == (160_000, 19_840_000)  # from the start of g16 to the end of g18
    assert len(kinds["X"]) == 2 * MAX_ROWS + 2


def test_nested_spans_of_the_trainer_stay_on_one_row(tmp_path):
    timeline = Trace(tmp_path, "trainer")
    with timeline.span("trainer", "step"), timeline.span("trainer", "train"), timeline.span("trainer", "update"):
        time.sleep(0.002)
    timeline.close()
    kinds, names = merged(tmp_path)
    assert len({span["tid"] for span in kinds["X"]}) == 1 and "trainer" in names.values()
    assert [span["name"] for span in kinds["X"]] == ["step", "train", "update"]


def test_nothing_traced_yet_is_no_file(tmp_path):
    Trace(tmp_path, "trainer").close()
    assert merge_trace(tmp_path) is None and not (tmp_path / "trace.json").exists()
