"""`fastreason train` with a model beside the policy, a critic or a teacher: the engine is fake, the models tiny and real."""

import json
import math
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def cached(hub: Path, name: str, folder: Path) -> None:
    """Let a model's folder be what the hub's cache holds of `name`."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(folder)


def test_ppo_trains_a_critic(train_run):
    """Its values are 0 at first, and then have learnt."""
    run = train_run(
        algorithm={"name": "ppo"},
        critic={"lr": 1e-3},
        rollout={"samples_per_prompt": 1},
        train={"steps": 2, "prompts_per_step": 8, "warmup_share": 0.5},
    )
    assert run.run() == 0, run.output + run.logs()
    first, second = run.metrics()
    assert all(math.isfinite(value) for row in (first, second) for value in row.values())
    assert first["critic/value_mean"] == 0.0 and second["critic/value_mean"] != 0.0
    assert 0 < second["critic/loss"] < first["critic/loss"]
    assert all(row["critic/grad_norm"] > 0 and row["train/grad_norm"] > 0 for row in (first, second))
    assert json.loads((run.run_dir / "summary.json").read_text())["finished"]
    assert run.left_behind(2) == [] and run.files_left() == []


def test_kdrl_learns_from_a_teacher_that_has_the_name_of_one_on_the_hub(train_run, small_model, tmp_path):
    """The launcher finds it; the ranks, which have no network, are told the folder. Two updates, one of them off-policy."""
    cached(tmp_path / "hub", "nobody/teacher", small_model)
    run = train_run(
        algorithm={"name": "kdrl", "kl_coef": 0.1, "ratio_against": "trainer"},
        teacher={"path": "nobody/teacher", "dtype": "float32"},
        train={"steps": 2, "prompts_per_step": 4, "prompts_per_update": 2},
    )
    run.environment["HF_HUB_CACHE"] = str(tmp_path / "hub")
    assert run.run() == 0, run.output + run.logs()
    assert "warning: algorithm.kl" not in run.output, "the weight of its KL term corrects for the first update"
    for row in run.metrics():
        assert all(math.isfinite(value) for value in row.values())
        assert row["kl/coef"] == 0.1 and row["kl/teacher"] > 0.01 and row["loss/kl"] > 0.01
        assert row["train/grad_norm"] > 0 and row["train/updates"] == 2
    assert run.left_behind(2) == [] and run.files_left() == []
