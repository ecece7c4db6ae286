"""The phases of a run alone: generation writes groups, training reads them, and together they are the plain run.

Real processes and the fake engine. The plain run is traced, and its report drawn.
"""

import json
from pathlib import Path

import pytest

from fastreason.cli import main
from fastreason.replay import count_batches, read_batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]

CLOCKED = ("time/", "memory/", "rollout/tok_per_s", "train/tok_per_s")
# What the producer counts: a trainer without one has none of it.
COUNTED = ("reward/timeouts", "rollout/long_prompts", "rollout/dropped", "rollout/engine_restarts", "rollout/producer_")


def steady(row):
    return {key: value for key, value in row.items() if not key.startswith(CLOCKED + COUNTED)}


def tickets(run, step):
    return sorted({row["ticket"] for row in run.samples() if row["step"] == step})


def test_generation_alone_and_then_training_alone_are_the_plain_run(train_run, capsys):
    same = {"run": {"seed": 5}, "rollout": {"max_staleness": 0}, "checkpoint": {"save_model": False}}
    plain = train_run(**same, log={"trace": True})
    assert plain.run("train.steps=1") == 0, plain.output + plain.logs()

    rollout = train_run(**same)
    assert rollout.run("--only", "rollout", "train.steps=2") == 0, rollout.output + rollout.logs()
    groups = rollout.run_dir / "groups"
    assert count_batches(groups) == 2 and not (rollout.run_dir / "logs" / "trainer.log").exists()
    assert [[group.ticket for group in read_batch(groups, number)] for number in (1, 2)] == [[0, 1, 2], [3, 4, 5]]
    assert rollout.left_behind(2) == [] and rollout.files_left() == []

    train = train_run(**same)
    assert train.run("--only", "train", "--groups", str(groups), "train.steps=2") == 0, train.output + train.logs()
    assert {path.stem for path in (train.run_dir / "logs").iterdir()} == {"trainer"}, (
        "more than the trainer was started"
    )
    assert [row for row in train.samples() if row["step"] == 1] == plain.samples()
    assert steady(train.metrics()[0]) == steady(plain.metrics()[0])
    assert train.metrics()[0]["train/grad_norm"] > 0
    assert [tickets(train, step) for step in (1, 2)] == [[0, 1, 2], [3, 4, 5]]
    assert [row["rollout/staleness_max"] for row in train.metrics()] == [0, 1]
    assert train.left_behind(2) == [] and train.files_left() == []
    check_timeline(plain.run_dir)
    assert main(["report", "run", str(plain.run_dir)]) == 0
    assert "3 issued, 3 trained, 0 dropped, 0 lost, 0 trained twice" in capsys.readouterr().out
    assert (plain.run_dir / "report.png").stat().st_size > 30_000


def test_the_timeline_shows_generation_beside_training(train_run):
    """S = 1: the groups that the first publication lets in are generated while the second batch is trained."""
    ahead = {"max_staleness": 1, "fake_token_s": 0.3}
    run = train_run(rollout=ahead, log={"trace": True}, checkpoint={"every": 3, "save_model": False})
    assert run.run("train.steps=3") == 0, run.output + run.logs()
    spans = check_timeline(run.run_dir, num_groups=9)
    assert "save state" in {name for name, *_ in spans["producer"]}
    trained = [(start, end) for name, start, end in spans["trainer"] if name == "train"]
    beside = [name for name, start, end in spans["engine"] if any(start < b and a < end for a, b in trained)]
    assert set(beside) & {"t6", "t7", "t8"}, spans


def check_timeline(run_dir: Path, num_groups: int = 3) -> dict[str, list[tuple[str, int, int]]]:
    """The merged timeline has every lane with its spans; returns (name, start, end) of each lane's, in microseconds."""
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = {}
    for event in events:
        if event["ph"] == "X":
            lane = names[event["pid"], event["tid"]].split()[0]
            spans.setdefault(lane, []).append((event["name"], event["ts"], event["ts"] + event["dur"]))
    lanes = {lane: {name for name, *_ in found} for lane, found in spans.items()}
    assert lanes["trainer"] >= {"pull", "train"} and lanes["publication"] >= {"gather and write", "load"}
    assert lanes["engine"] == lanes["graders"] == {f"t{ticket}" for ticket in range(num_groups)}
    assert lanes["producer"] >= {"start", "issue", "wait for groups", "keep", "answer", "engines load weights"}
    assert sum(name == "keep" for name, *_ in spans["producer"]) == num_groups
    assert set(lanes) == {"trainer", "publication", "engine", "graders", "producer"}
    return spans
