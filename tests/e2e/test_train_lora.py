"""`fastreason train` of an adapter, with the fake engine: what a run leaves, and what it goes on with."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastreason import cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


def test_an_adapter_is_trained_published_saved_and_resumed(train_run, tiny_model, capsys, monkeypatch):
    from peft import PeftModel

    run = train_run(
        lora={"rank": 4, "alpha": 16, "targets": ["q_proj", "down_proj"]},
        algorithm={"kl": "k3", "kl_coef": 0.1},
        train={"steps": 2, "lr": 1e-2},
        checkpoint={"every": 1},
    )
    assert run.run(timeout_s=150) == 0, run.output + run.logs()
    assert "adapter of rank 4, alpha 16, on q_proj, down_proj is trained" in run.output
    assert "its adapter: " in run.output
    first, second = run.metrics()
    # The reference is the model with the adapter off, and an adapter begins as nothing.
    assert first["kl/reference"] == 0 and second["kl/reference"] > 0
    assert first["train/grad_norm"] > 0 and first["train/skipped_updates"] == second["train/skipped_updates"] == 0

    def check_saved() -> None:
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        merged = PeftModel.from_pretrained(base, run.run_dir / "adapter").merge_and_unload().state_dict()
        trained = AutoModelForCausalLM.from_pretrained(run.run_dir / "model").state_dict()
        assert all(torch.equal(tensor, trained[name]) for name, tensor in merged.items())
        start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
        moved = {name.split(".")[-2] for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
        assert moved == {"q_proj", "down_proj"}

    check_saved()
    monkeypatch.syspath_prepend(str(run.folder))  # its reward
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(run.run_dir), "train.steps=3", "lora.rank=8"]) == 2
    assert "Leave section lora as it was" in capsys.readouterr().err
    assert run.run("train.steps=3", resume=run.run_dir, timeout_s=150) == 0, run.output + run.logs()
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert run.metrics()[2]["kl/reference"] > 0
    check_saved()
    assert run.left_behind(2) == [] and run.files_left() == []
