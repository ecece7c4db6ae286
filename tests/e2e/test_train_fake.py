"""`fastreason train` as a user runs it, with the fake engine and a tiny real model: what it leaves, and how it ends.

The engine is fake, everything else is not: launcher, producer, graders, DeepSpeed ranks, checkpoints, exchange files.
"""

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import secret_search

from fastreason.config import load_config
from fastreason.cores import available_cores
from fastreason.data import PromptCursor, load_problems, split_held_out
from fastreason.ledger import audit_ledger, read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]

# What depends on the clock or on the machine; everything else must repeat bit for bit.
CLOCKED = ("time/", "memory/", "rollout/tok_per_s", "train/tok_per_s")
METRICS = {
    "step", "loss/policy", "loss/logp", "loss/entropy", "loss/kl", "loss/ratio_mean", "loss/ratio_max",
    "loss/clip_share", "mismatch/logp_abs_mean", "mismatch/logp_abs_max", "mismatch/kl", "mismatch/ratio_mean",
    "mismatch/ratio_min", "mismatch/ratio_max", "mismatch/ess", "mismatch/sequence_ess", "mismatch/weight_mean",
    "mismatch/weight_capped_share", "train/grad_norm", "train/lr", "train/updates", "train/skipped_updates",
    "train/empty_updates", "train/masked_rows", "train/filtered_groups", "train/tokens", "train/tokens_computed",
    "train/imbalance", "time/rank_wait_s",
    "train/tok_per_s", "reward/mean", "reward/std", "reward/accuracy", "reward/timeouts", "rollout/tokens",
    "rollout/response_tokens_mean", "rollout/truncated_share", "rollout/signal_share", "rollout/staleness_mean",
    "rollout/staleness_max", "rollout/tok_per_s", "staleness/share_0", "staleness/tokens_mean",
    "rollout/long_prompts", "rollout/dropped", "rollout/engine_restarts", "rollout/producer_restarts", "time/step_s",
    "time/wait_s", "time/train_s", "time/publish_s", "time/pause_s", "time/generate_s", "time/grade_s", "time/wall_s",
    "memory/peak_gib",
}  # fmt: skip
SUMMARY = {
    "accuracy_before", "accuracy_after", "num_eval_samples", "eval_temperature", "steps", "wall_s", "engine", "updater",
    "seed", "tokens_generated", "tokens_trained", "versions",
}  # fmt: skip


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in rows]


def tickets_by_step(samples: list[dict[str, Any]]) -> dict[int, list[int]]:
    found: dict[int, set[int]] = {}
    for row in samples:
        found.setdefault(row["step"], set()).add(row["ticket"])
    return {step: sorted(tickets) for step, tickets in found.items()}


def assert_all_trained_once(run: Any, run_dir: Path, steps: int, prompts: int = 3, samples: int = 4) -> None:
    """Every step once, every ticket once, and no prompt lost or repeated."""
    assert [row["step"] for row in run.metrics(run_dir)] == list(range(1, steps + 1))
    rows = run.samples(run_dir)
    assert len(rows) == steps * prompts * samples
    tickets = [ticket for one in tickets_by_step(rows).values() for ticket in one]
    assert sorted(tickets) == list(range(steps * prompts))
    # Exactly the first problems of the shuffled order: one that was issued, not trained and then forgotten is missed.
    config = load_config(run_dir / "config.yaml")
    train, _ = split_held_out(load_problems(config.data), config.eval.num_prompts, config.data.seed)
    cursor = PromptCursor(train, config.run.seed)
    by_ticket = {row["ticket"]: row["prompt_id"] for row in rows}
    assert sorted(by_ticket.values()) == sorted(cursor.next().id for _ in range(steps * prompts))


def test_two_runs_at_once_leave_everything_and_agree_bit_for_bit(train_run, tiny_model):
    """The same name, folder and seed, at the same time: they share nothing, and what they compute is the same."""
    first = train_run(run={"on_exists": "number", "seed": 3}, eval={"num_prompts": 6, "samples_per_prompt": 2})
    first.start()
    second_config = first.config_path
    again = train_run()
    again.config_path = second_config
    again.folder = first.folder
    again.start()
    assert first.wait(150, beside=again) == 0, first.output + first.logs()
    assert again.wait(60) == 0, again.output + again.logs()
    runs = sorted((first.folder / "runs").iterdir(), key=lambda path: len(path.name))
    assert [path.name for path in runs] == [runs[0].name, f"{runs[0].name}-2"]

    for run, run_dir in ((first, runs[0]), (again, runs[1])):
        assert run.left_behind(2) == [] and run.files_left() == []
        assert load_config(run_dir / "config.yaml") == load_config(second_config)
        rows = run.metrics(run_dir)
        assert [set(row) - METRICS for row in rows] == [set(), set(), {"eval/accuracy", "eval/standard_error"}]
        assert all(set(row) >= METRICS for row in rows)
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert all(row["rollout/staleness_max"] == 0 and row["train/skipped_updates"] == 0 for row in rows)
        assert_all_trained_once(run, run_dir, 3)
        for row in run.samples(run_dir):
            assert row["reward"] == pytest.approx(
                sum(ord(c) % 2 == 0 for c in row["completion"]) / max(1, len(row["completion"]))
            )
            assert row["finish_reason"] in ("stop", "length") and 1 <= row["num_tokens"] <= 8
            assert row["version"] == row["step"] - 1
    assert steady(first.metrics(runs[0])) == steady(first.metrics(runs[1]))
    assert first.samples(runs[0]) == first.samples(runs[1])
    for name in ("eval-before.jsonl", "eval-after.jsonl"):
        assert (runs[0] / name).read_text() == (runs[1] / name).read_text()
        assert len((runs[0] / name).read_text().splitlines()) == 12

    summary = json.loads((runs[0] / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert (summary["engine"], summary["updater"], summary["steps"], summary["seed"]) == ("fake", "deepspeed", 3, 3)
    assert (summary["num_eval_samples"], summary["eval_temperature"], summary["finished"]) == (12, 1.0, True)
    assert {"torch", "vllm", "deepspeed", "transformers"} <= {k for k, v in summary["versions"].items() if v}
    assert summary["tokens_generated"] == sum(row["num_tokens"] for row in first.samples(runs[0]))
    assert 0 < summary["wall_s"] < 150
    assert (runs[0] / "reward.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for run in (first, again):
        assert "accuracy" in run.output and "trained model: " in run.output
    check_model(runs[0] / "model", tiny_model)
    refused = train_run()
    refused.config_path = second_config
    assert refused.run("run.on_exists=error", timeout_s=60) == 2
    assert "exists already" in refused.output and "--resume" in refused.output and "Traceback" not in refused.output
    assert len(list((first.folder / "runs").iterdir())) == 2


def check_model(folder: Path, start: Path) -> None:
    """transformers loads it with its tokenizer, and every matrix has moved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(folder)
    former = dict(AutoModelForCausalLM.from_pretrained(start).named_parameters())
    moved = {name: not torch.equal(tensor, former[name]) for name, tensor in trained.named_parameters()}
    assert all(moved.values()), moved
    assert trained.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).decode([20, 21]) == AutoTokenizer.from_pretrained(start).decode(
        [20, 21]
    )


def cores_by_side(run: Any) -> dict[str, set[tuple[int, ...]]]:
    """The cores that the processes of a running run may use: those of the trainer, and those of everybody else."""
    launcher, found = psutil.Process(run.process.pid), {"trainer": set(), "rollout": set()}
    for child in launcher.children():
        family = [child, *child.children(recursive=True)]
        side = "trainer" if "torch.distributed.run" in " ".join(child.cmdline()) else "rollout"
        found[side] |= {tuple(process.cpu_affinity()) for process in family}
    return found


def test_two_ranks_with_a_double_buffer_and_zero_3_on_cores_of_their_own_tell_no_key(train_run):
    first, last = available_cores()[0], available_cores()[-1]
    run = train_run(
        rollout={"max_staleness": 1, "cores": first},
        train={"ranks": 2, "zero_stage": 3, "steps": 4, "prompts_per_update": 3, "cores": last},
        checkpoint={"every": 4},
        log={"trace": True},
    )
    # Slow enough that all of its processes are seen at once on a busy machine.
    run.environment |= {**secret_search.USER_KEYS, "TEST_REWARD_SLEEP_S": "0.1"}
    run.start()
    words = ("fake_server",), ("_process", "producer"), ("run_grader",), ("-u", "_process", "trainer")
    run.until(
        lambda: [len(run.find(*one)) for one in words] == [1, 1, 1, 2], what="an engine, a producer, a grader, ranks"
    )
    assert cores_by_side(run) == {"rollout": {(first,)}, "trainer": {(last,)}}
    secrets = [secret_search.engine_key(run), *secret_search.USER_KEYS.values()]
    assert all(len(secret) > 20 for secret in secrets)
    assert secret_search.processes_that_tell(run, secrets) == []
    assert secret_search.files_that_tell([run.folder, run.tmp], secrets) == []
    assert secret_search.status_without_key(run) == [401, 401, 401]
    assert run.wait(150) == 0, run.output + run.logs()
    assert secret_search.files_that_tell([run.folder, run.tmp], secrets) == []
    assert {"config.yaml", "metrics.jsonl", "trace.json", "checkpoints", "logs"} <= {
        p.name for p in run.run_dir.iterdir()
    }
    assert_all_trained_once(run, run.run_dir, 4)
    staleness = [row["rollout/staleness_max"] for row in run.metrics()]
    assert max(staleness) == 1 and staleness[0] == 0
    assert all(row["train/tokens"] > 0 for row in run.metrics())
    assert run.left_behind(2) == [] and run.files_left() == []


def test_stopped_by_signals_and_resumed_to_the_end(train_run):
    """SIGTERM, resume, SIGINT, resume: exit codes, checkpoints, no process, and one clean history in the end."""
    run = train_run(train={"steps": 1000}, checkpoint={"every": 2}, rollout={"max_staleness": 1})
    run.environment["TEST_REWARD_SLEEP_S"] = "0.02"
    run.start()
    run.until(lambda: run.num_steps() >= 3, what="the third step")
    run.stop(signal.SIGTERM)
    assert run.wait(150) == 143, run.output + run.logs()
    assert run.left_behind(2) == [] and run.files_left() == []
    done = len(run.metrics())
    assert (run.run_dir / "checkpoints" / f"step-{done:06d}" / "trainer.json").is_file()
    assert f"stopped after step {done} of 1000" in run.output and "--resume" in run.output
    assert "Traceback" not in run.output and "error:" not in run.output

    run_dir = run.run_dir
    run.start(resume=run_dir)
    run.until(lambda: run.num_steps() >= done + 2, what="two steps more")
    run.stop(signal.SIGINT)
    assert run.wait(150) == 130, run.output + run.logs()
    assert run.left_behind(2) == [] and run.files_left() == []
    total = len(run.metrics()) + 2

    assert run.run(f"train.steps={total}", resume=run_dir) == 0, run.output + run.logs()
    assert_all_trained_once(run, run_dir, total)
    assert max(row["rollout/staleness_max"] for row in run.metrics()) == 1
    assert run.left_behind(2) == []
    assert (run_dir / "model" / "config.json").is_file()
    assert run.run(resume=run_dir) == 2
    assert "finished" in run.output and "train.steps" in run.output


def test_a_run_killed_before_its_first_checkpoint_and_after_its_last_step_is_resumed_both_times(train_run, tiny_model):
    """By default there is no checkpoint: it begins again. One that lacks only the model and the summary makes those."""
    run = train_run(train={"steps": 3}, rollout={"max_staleness": 1}, eval={"num_prompts": 6, "samples_per_prompt": 2})
    run.environment["TEST_REWARD_SLEEP_S"] = "0.02"
    run.start()
    run.until(lambda: run.num_steps() >= 1, what="the first step")
    run_dir = run.run_dir
    for process in sorted(run.processes(), key=lambda process: process.pid != run.process.pid):
        process.kill()
    run.wait(20)
    assert run.left_behind(2) == [] and not list(run_dir.glob("checkpoints/*"))

    assert run.run("checkpoint.every=3", resume=run_dir) == 0, run.output + run.logs()
    assert "resuming from the beginning: 0 of 3 steps done" in run.output
    assert_all_trained_once(run, run_dir, 3)
    audit = audit_ledger(read_ledger(run_dir))
    assert (audit.num_issued, audit.num_trained, audit.lost, audit.twice) == (9, 9, [], [])
    evaluated = (run_dir / "eval-after.jsonl").read_text()
    assert run.run(resume=run_dir) == 2 and "it is finished" in run.output

    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "model")
    assert run.run(resume=run_dir) == 0, run.output + run.logs()
    assert_all_trained_once(run, run_dir, 3)
    check_model(run_dir / "model", tiny_model)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["finished"], summary["steps"], set(summary["evals"])) == (True, 3, {"before", "after"})
    assert (run_dir / "eval-after.jsonl").read_text() == evaluated
    assert run.left_behind(2) == [] and run.files_left() == []


def test_a_signal_during_the_start_ends_it_too(train_run):
    run = train_run(train={"steps": 1000})
    run.start()
    run.until(lambda: bool(run.find("_process", "trainer")), what="the trainer")
    run.stop(signal.SIGINT)
    assert run.wait(150) == 130, run.output + run.logs()
    assert "Traceback" not in run.output and "nothing had been trained yet" in run.output
    assert run.left_behind(2) == [] and run.files_left() == []


def test_a_killed_launcher_leaves_no_process(train_run):
    run = train_run(train={"steps": 1000, "ranks": 2})
    run.environment["TEST_REWARD_SLEEP_S"] = "0.02"  # about four steps a second
    run.start()
    run.until(lambda: run.num_steps() >= 1, what="the first step")
    assert run.process is not None
    done = run.num_steps()
    run.process.send_signal(signal.SIGKILL)
    assert run.left_behind(12) == []
    assert run.num_steps() <= done + 3, "the run went on without its launcher"


def test_a_reward_that_raises_is_one_clear_message(train_run):
    run = train_run(reward={"functions": {"user_reward_of_the_test:crash": 1.0}})
    assert run.run() == 1, run.output + run.logs()
    assert run.output.count("\nerror:") == 1
    for word in ("user_reward_of_the_test:crash", "KeyError", "the judge is broken"):
        assert word in run.output
    assert "Traceback" not in run.output
    assert run.left_behind(2) == [] and run.files_left() == []


def test_without_restarts_a_producer_that_is_killed_ends_the_run_with_one_clear_message(train_run):
    run = train_run(run={"max_restarts": 0}, train={"steps": 1000})
    run.start()
    run.until(lambda: run.num_steps() >= 1, what="the first step")
    (producer,) = run.find("_process", "producer")
    producer.send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert run.wait(150) == 1, run.output + run.logs()
    assert time.monotonic() - started < 45
    assert run.output.count("\nerror:") == 1 and "the producer failed" in run.output.split("error:")[1]
    assert "killed" in run.output
    assert run.left_behind(2) == [] and run.files_left() == []


def test_the_hf_engine_trains_a_step(train_run):
    run = train_run(rollout={"engine": "hf", "max_new_tokens": 6}, train={"steps": 1})
    assert run.run() == 0, run.output + run.logs()
    (row,) = run.metrics()
    # The same model in the same dtype on both sides: what differs is the order of sums.
    assert row["mismatch/logp_abs_mean"] < 1e-5
    assert row["loss/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert run.left_behind(2) == [] and run.files_left() == []
