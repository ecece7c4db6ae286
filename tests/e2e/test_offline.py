"""Offline runs as a user makes them: real launcher, real DeepSpeed ranks, a tiny real model; killed, resumed, chained."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]

CLOCKED = ("time/", "memory/", "train/tok_per_s")
ONLINE = ("reward", "rollout", "data")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    rows = [
        {"id": f"{i}-{j}", "problem": f"{i} + {j} = ?", "response": f"It is {i + j}.", "chosen": f"It is {i + j}.",
         "rejected": f"I say {i - j}, or {i * j}!"}
        for i in range(5) for j in range(6)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def offline_run(train_run: Any, files: Path) -> Any:
    """Makes runs: `offline_run("dpo", train={...})`."""

    def make(objective: str, offline: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Any:
        run = train_run(**sections)
        import yaml

        config = yaml.safe_load(run.config_path.read_text())
        for name in ONLINE:
            if name not in sections:
                del config[name]
        config["offline"] = {"objective": objective, "path": str(files / "rows.jsonl"), **(offline or {})}
        config["train"] = {"prompts_per_step": 6, "lr": 1e-3, "zero_stage": 2, **sections.get("train", {})}
        run.config_path.write_text(yaml.safe_dump(config))
        return run

    return make


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in rows]


def weights(run_dir: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run_dir / "model" / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def strike(run: Any) -> None:
    """Kill all of it at once: of a launcher that is killed alone, the ranks would still save."""
    for process in reversed(run.processes()):
        with contextlib.suppress(psutil.Error):
            process.kill()
    run.wait(30)


def test_a_killed_dpo_run_goes_on_bit_for_bit(offline_run):
    # So many steps that the run is still under way when it is struck.
    keys = {"offline": {"epochs": 4, "beta": 0.1}, "checkpoint": {"every": 20}, "train": {"prompts_per_step": 3}}
    whole, killed = offline_run("dpo", **keys), offline_run("dpo", **keys)
    assert whole.run() == 0, whole.output + whole.logs()
    assert "traces: 30 rows, 30 kept" in whole.output and "step 40/40" in whole.output
    rows = steady(whole.metrics())
    assert len(rows) == 40 and abs(rows[0]["pairs/margin"]) < 1e-4, "the reference is the model of the start"
    assert rows[-1]["pairs/margin"] > 0.1 and rows[-1]["train/epoch"] == 4
    killed.start()
    killed.until(lambda: killed.num_steps() >= 5, what="step 5")
    strike(killed)
    scores = (killed.run_dir / "traces" / "reference.f64").stat().st_mtime_ns
    # Before its first checkpoint: again from the beginning, with what is prepared.
    killed.start(resume=killed.run_dir)
    killed.until(lambda: killed.num_steps() >= 22, what="step 22")
    strike(killed)
    assert "resuming from the beginning: 0 of 40 steps done" in killed.output
    assert killed.run("train.prompts_per_step=6", resume=killed.run_dir) == 2
    assert "train.prompts_per_step=6, but its traces" in killed.output
    assert killed.run(resume=killed.run_dir) == 0, killed.output + killed.logs()
    assert "resuming from step-000020" in killed.output and steady(killed.metrics()) == rows
    assert same_weights(whole.run_dir, killed.run_dir)
    assert (killed.run_dir / "traces" / "reference.f64").stat().st_mtime_ns == scores, "computed once"


def test_two_ranks_and_small_micro_batches_train_alike(offline_run):
    found = []
    for ranks, budget in ((1, 8192), (2, 40)):
        run = offline_run("redi", train={"steps": 4, "ranks": ranks, "micro_batch_tokens": budget})
        assert run.run() == 0, run.output + run.logs()
        found.append(run.metrics())
    for one, two in zip(*found, strict=True):
        for key in (
            "loss/policy",
            "train/grad_norm",
            "logp/chosen",
            "logp/rejected_sum",
            "pairs/margin",
            "train/tokens",
        ):
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=1e-5), key
    assert found[0][-1]["loss/policy"] < found[0][0]["loss/policy"] - 0.1


def test_a_chain_of_stages_keeps_the_edits_of_the_model(offline_run, tmp_path):
    edits = {"max_position_embeddings": 1024, "rope_theta": 50000.0}
    first = offline_run("sft", model=edits, train={"steps": 3}, log={"trace": True})
    assert first.run() == 0, first.output + first.logs()
    rows = first.metrics()
    assert rows[-1]["loss/policy"] < rows[0]["loss/policy"]
    assert not first.files_left()
    saved = json.loads((first.run_dir / "model" / "config.json").read_text())
    theta = saved.get("rope_theta") or saved["rope_parameters"]["rope_theta"]
    assert (saved["max_position_embeddings"], theta) == (1024, 50000.0)
    assert not [p for p in (first.run_dir / "model").iterdir() if p.is_symlink()]
    # As its model the next stage takes the run's folder, and its prompts need the longer positions.
    second = offline_run("simpo", {"max_tokens": 800}, model={"path": str(first.run_dir)}, train={"steps": 2})
    assert second.run() == 0, second.output + second.logs()
    assert f"path: {first.run_dir / 'model'}" in (second.run_dir / "config.yaml").read_text()
    shutil.rmtree(first.run_dir / "model")
    third = offline_run("sft", model={"path": str(first.run_dir)}, train={"steps": 2})
    assert third.run() == 2 and "a run's folder without a trained model" in third.output


def test_what_cannot_work_ends_before_a_run_begins(offline_run):
    run = offline_run("sft", {"response_column": "answers"}, train={"steps": 2})
    assert run.run() == 2
    assert "offline.response_column='answers'" in run.output and not (run.folder / "runs").exists()
    run = offline_run("sft", {"max_tokens": 5}, train={"steps": 2})
    assert run.run() == 2
    assert "none of 30 rows is short enough" in run.output and not list((run.folder / "runs").iterdir())
    run = offline_run("sft", {"max_tokens": 5000}, train={"steps": 2})
    assert run.run() == 2 and "max_position_embeddings=512" in run.output
