"""`fastreason eval` as a user runs it: the fake engine's server and the graders in real processes, killed and stopped."""

import os
import signal
import subprocess
import sys
import uuid

import pytest
from conftest import TrainRun, read_lines

from fastreason import cli
from fastreason.evaluation.rows import evaluation_folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


class Evaluation(TrainRun):
    """One `fastreason eval` in a process, a temporary folder and a folder `out` of its own."""

    def __init__(self, folder, model, problems):
        super().__init__(folder, {})
        keys = ["num_problems=20", "data.max_prompt_tokens=64", "max_new_tokens=8", "concurrency=4", "seed=3"]
        self.out = folder / "out"
        self.arguments = ["eval", str(model), "--benchmarks", str(problems), "--out", str(self.out)]
        self.arguments += [*keys, "rollout.engine=fake", "model.dtype=float32"]

    def start(self, *arguments):
        self._log = open(self.folder / f"out-{uuid.uuid4().hex[:6]}.txt", "w+")  # noqa: SIM115
        tag = {"FASTREASON_TEST_TAG": self.tag, "TMPDIR": str(self.tmp), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastreason.cli", *self.arguments, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            start_new_session=True,
            env={**os.environ, **tag},
        )

    def until_lines(self, num):
        files = self.out.rglob
        self.until(lambda: sum(f.read_bytes().count(b"\n") for f in files("samples.jsonl")) >= num, what=f"{num} lines")

    def logs(self):
        return "\n".join(path.read_text(errors="replace")[-2500:] for path in sorted(self.out.rglob("*.log")))


@pytest.fixture
def evaluation(tmp_path, tiny_model, problems):
    run = Evaluation(tmp_path, tiny_model, problems)
    yield run
    run.close()


def test_stopped_killed_and_gone_on_with_nothing_is_lost_or_comes_twice(evaluation, capsys):
    evaluation.start("rollout.fake_token_s=0.05", "--n", "2")
    evaluation.until_lines(4)
    evaluation.stop(signal.SIGTERM)
    assert evaluation.wait(30) == 128 + signal.SIGTERM, evaluation.output + evaluation.logs()
    assert "Give the same command again to go on" in evaluation.output and "Traceback" not in evaluation.output
    assert evaluation.left_behind(5) == [] and not list(evaluation.tmp.glob("fastreason-*"))

    (folder,) = evaluation_folders(evaluation.out)
    num = len(read_lines(folder / "samples.jsonl"))
    evaluation.start("rollout.fake_token_s=0.05", "--n", "2")
    evaluation.until_lines(num + 4)
    evaluation.process.kill()
    evaluation.process.wait()
    assert evaluation.left_behind(10) == [], "engine and graders end with the command"
    there = (folder / "samples.jsonl").read_bytes()
    assert there.count(b"\n") < 40, "it was too late to kill it"

    assert cli.main([*evaluation.arguments, "--n", "2", "--format", "markdown"]) == 0
    assert "| model | problems |" in capsys.readouterr().out
    rows = read_lines(folder / "samples.jsonl")
    assert (folder / "samples.jsonl").read_bytes().startswith(there[: there.rindex(b"\n") + 1])
    assert len(rows) == 40 and len({(row["problem"], row["sample"]) for row in rows}) == 40
    assert evaluation_folders(evaluation.out) == [folder]

    before = sorted((folder / "samples.jsonl").read_bytes().splitlines())
    assert cli.main(["regrade", str(evaluation.out), "--workers", "1"]) == 0
    assert "40 responses" in capsys.readouterr().out
    assert sorted((folder / "samples.jsonl").read_bytes().splitlines()) == before
