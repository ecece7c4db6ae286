"""Evaluations with a fake engine and the graders' code in this process: what goes on, what is never mixed, what is printed."""

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from fastreason import cli
from fastreason.errors import DataError, EngineError
from fastreason.evaluation import command, regrading, scoring
from fastreason.evaluation.rows import evaluation_folders, read_samples
from fastreason.evaluation.scores import Scores
from fastreason.evaluation.tables import as_latex, as_markdown, as_text, comparison
from fastreason.rewards import resolve_rewards
from fastreason.rollout.fake import FakeEngine
from fastreason.serving import Served

NUM_PROBLEMS = 6


class Digits:
    """Token i < 10 is the digit i, token 10 the end; prompts are characters."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(str(token) for token in token_ids if token < 10)


class Pool:
    """The graders without their processes."""

    num_graded = 0

    def __init__(self, config):
        self.spec = resolve_rewards(config)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def grade(self, prompt, texts, truncated=None):
        Pool.num_graded += len(texts)
        await asyncio.sleep(0)
        cut_off = truncated or [False] * len(texts)
        return [self.spec.grade(text, prompt, cut) for text, cut in zip(texts, cut_off, strict=True)]


class World:
    """What the engines were asked, and what happens after so many requests."""

    def __init__(self):
        self.asked, self.num_starts, self.after = [], 0, {}

    @contextlib.asynccontextmanager
    async def engine(self, parts, config):
        self.num_starts += 1
        inner, world = FakeEngine(list(range(10)), eos_token_id=10), self

        class Engine:
            async def generate(self, request_id, prompt_token_ids, params):
                world.asked.append((parts[0].model.label, "".join(map(chr, prompt_token_ids)), params.seed))
                if (happen := world.after.pop(len(world.asked), None)) is not None:
                    happen()
                await asyncio.sleep(0)
                return await inner.generate(request_id, prompt_token_ids, params)

        yield Served(Engine(), None)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"q{i}", "problem": f"which? {i}", "answer": str(i), "level": i % 2} for i in range(NUM_PROBLEMS)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("base", "tuned"):
        Path(name).mkdir()
        Path(name, "config.json").write_text('{"max_position_embeddings": 4096}')
        Path(name, "model.safetensors").write_text(name)
    world = World()
    monkeypatch.setattr(command, "_engine", world.engine)
    monkeypatch.setattr(command, "_tokenizer", lambda model, config: Digits())
    for module in ("fastreason.rollout.graders", "fastreason.evaluation.scoring", "fastreason.evaluation.regrading"):
        monkeypatch.setattr(f"{module}.GraderPool", Pool)
    return world


def run(*arguments, models=("base",), n=2, benchmarks="p.jsonl"):
    told = ["data.id_column=id", "template=raw", "max_new_tokens=4", "rollout.engine=hf", "model.dtype=float32"]
    return cli.main(["eval", *models, "--benchmarks", benchmarks, "--n", str(n), *told, *arguments])


def folders():
    return evaluation_folders(Path("evals"))


def rows(folder):
    return sorted(read_samples(folder), key=lambda row: (row.problem, row.sample))


def test_a_row_says_everything_of_a_response(world):
    assert run() == 0
    (folder,) = folders()
    assert folder.parent == Path("evals/base/p") and len(folder.name) == 12
    found = rows(folder)
    assert [(row.problem, row.sample) for row in found] == [(f"q{i}", j) for i in range(NUM_PROBLEMS) for j in range(2)]
    for row in found:
        assert (
            row.question == f"which? {row.problem[1]}"
            and row.gold == row.problem[1]
            and row.level == str(int(row.gold) % 2)
        )
        assert row.answer == (row.response or None) and row.correct is row.strict is (
            row.response.lstrip("0") == row.gold
        )
        assert row.formatted is False and row.error is None and row.subject is None
        assert row.num_tokens == len(row.response) + (not row.truncated) and row.logp_sum < 0
    assert {row.truncated for row in found} == {True, False}
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["model"]["path"] == str(Path("base").resolve()) and settings["sampling"]["temperature"] == 0.6
    assert settings["grader"]["versions"]["math-verify"]
    scores = msgspec.json.decode((folder / "scores.json").read_bytes(), type=Scores)
    assert scores.n == 2 and scores.pass_at_1 == sum(row.correct for row in found) / len(found)


def test_more_responses_ask_only_for_those_that_are_missing(world):
    assert run(n=4) == 0
    first, (folder,) = list(world.asked), folders()
    whole = rows(folder)
    assert len(first) == 4 * NUM_PROBLEMS
    world.asked.clear()
    assert run(n=4) == 0 and not world.asked and world.num_starts == 1, "no engine where nothing is missing"
    assert run(n=16) == 0
    assert len(world.asked) == 12 * NUM_PROBLEMS and not set(world.asked) & set(first)
    assert folders() == [folder] and [row for row in rows(folder) if row.sample < 4] == whole
    world.asked.clear()
    assert run(n=3) == 0 and not world.asked
    assert json.loads((folder / "scores.json").read_text())["n"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_evaluation_goes_on_and_comes_out_the_same(world, number, capsys):
    world.after[7] = lambda: os.kill(os.getpid(), number)
    assert run("concurrency=3", n=4) == 128 + number
    assert "responses are kept. Give the same command again" in capsys.readouterr().err
    (folder,) = folders()
    there = rows(folder)
    assert 0 < len(there) < 4 * NUM_PROBLEMS and not (folder / "scores.json").exists()
    world.asked.clear()
    assert run(n=4) == 0
    assert len(world.asked) == 4 * NUM_PROBLEMS - len(there)
    assert run("--out", "whole", n=4) == 0
    (whole,) = evaluation_folders(Path("whole"))
    assert rows(whole) == rows(folder)
    assert (whole / "scores.json").read_bytes() == (folder / "scores.json").read_bytes()


def test_a_kill_in_the_middle_of_a_line_costs_that_line(world):
    assert run(n=4) == 0
    (folder,) = folders()
    whole, file = rows(folder), folder / "samples.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    world.asked.clear()
    assert run(n=4) == 0 and len(world.asked) == 1
    assert rows(folder) == whole


def test_an_engine_that_fails_is_told_and_what_came_is_kept(world, capsys):
    def fail():
        raise EngineError("it is gone")

    world.after[9] = fail
    assert run("concurrency=2", n=2) == 1
    error = capsys.readouterr().err
    assert "it is gone" in error and "responses are kept" in error
    assert run(n=2) == 0


@pytest.mark.parametrize(
    "other",
    [
        ["temperature=1"],
        ["top_p=1"],
        ["top_k=5"],
        ["seed=1"],
        ["max_new_tokens=5"],
        ["template=r1"],
        ["data.max_prompt_tokens=900"],
        ["data.user_template=Say {problem}"],
        ["num_problems=5"],
        ["model.dtype=bfloat16"],
    ],
)
def test_other_settings_are_another_folder(world, other):
    assert run(n=1) == 0
    assert run(*other, n=1) == 0
    assert len(folders()) == 2
    assert all(sum(1 for _ in read_samples(folder)) in (NUM_PROBLEMS, 5) for folder in folders())


def test_other_weights_or_problems_are_another_folder_and_a_moved_model_is_not(world):
    assert run(n=1) == 0
    (folder,) = folders()
    Path("elsewhere").mkdir()
    os.rename("base", "elsewhere/base")
    assert run(n=1, models=["elsewhere/base"]) == 0 and folders() == [folder]
    assert json.loads((folder / "settings.json").read_text())["model"]["path"].endswith("elsewhere/base")
    Path("elsewhere/base/model.safetensors").write_text("trained on")
    assert run(n=1, models=["elsewhere/base"]) == 0 and len(folders()) == 2
    Path("p.jsonl").write_text(Path("p.jsonl").read_text().replace("which? 3", "what? 3"))
    assert run(n=1, models=["elsewhere/base"]) == 0 and len(folders()) == 3


def test_what_has_no_effect_on_responses_does_not_ask_again(world):
    assert run(n=1) == 0
    world.asked.clear()
    assert run("concurrency=2", "reward.workers=2", "k=[1]", n=1) == 0
    assert not world.asked and len(folders()) == 1


def test_another_grader_judges_the_old_responses_anew(world, monkeypatch, capsys):
    assert run(n=2) == 0
    (folder,) = folders()
    before = rows(folder)
    settings = json.loads((folder / "settings.json").read_text())
    settings["grader"]["versions"]["math-verify"] = "0.0"
    (folder / "settings.json").write_text(json.dumps(settings))
    torn = [msgspec.structs.replace(row, correct=True, strict=None) for row in before]
    (folder / "samples.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in torn))
    world.asked.clear()
    Pool.num_graded = 0
    assert run(n=2) == 0 and not world.asked and Pool.num_graded >= 2 * NUM_PROBLEMS
    assert "graded otherwise" in capsys.readouterr().err
    assert rows(folder) == before
    assert json.loads((folder / "settings.json").read_text())["grader"]["versions"]["math-verify"] != "0.0"


def test_regrade_replaces_verdicts_and_says_what_changed(world, capsys):
    assert run(n=2, models=["base", "tuned"]) == 0
    whole = {folder: rows(folder) for folder in folders()}
    assert len(whole) == 2
    folder = folders()[0]
    wrong = [msgspec.structs.replace(row, correct=not row.correct, answer="?") for row in whole[folder]]
    (folder / "samples.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in wrong))
    scores = {each: (each / "scores.json").read_bytes() for each in whole}
    world.asked.clear()
    capsys.readouterr()
    assert cli.main(["regrade", "evals"]) == 0
    assert {each: rows(each) for each in whole} == whole and not world.asked
    assert {each: (each / "scores.json").read_bytes() for each in whole} == scores
    num_right = sum(row.correct for row in whole[folder])
    out = capsys.readouterr().out
    assert (
        f"{num_right} now right, {2 * NUM_PROBLEMS - num_right} now wrong" in out and "0 now right, 0 now wrong" in out
    )
    assert cli.main(["regrade", "nothing-here"]) == 2
    assert "no evaluation" in capsys.readouterr().err
    assert cli.main(["regrade", "evals", "--workers", "0"]) == 2


def test_regrade_of_an_evaluation_that_was_stopped_scores_nothing(world, capsys):
    world.after[5] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert run("concurrency=1", n=2) == 128 + signal.SIGTERM
    (folder,) = folders()
    before = rows(folder)
    assert cli.main(["regrade", str(folder)]) == 0
    assert rows(folder) == before and not (folder / "scores.json").exists()
    (folder / "samples.jsonl").write_bytes(b"")
    assert cli.main(["regrade", str(folder)]) == 0 and run(n=2) == 0


def test_regrade_that_fails_leaves_the_verdicts(world, monkeypatch):
    assert run(n=2) == 0
    (folder,) = folders()
    before = (folder / "samples.jsonl").read_bytes()

    class Broken(Pool):
        async def grade(self, *_):
            raise RuntimeError("no grader")

    monkeypatch.setattr(regrading, "GraderPool", Broken)
    with pytest.raises(RuntimeError, match="no grader"):
        regrading.regrade_folder(folder, 1, 1.0)
    assert (folder / "samples.jsonl").read_bytes() == before


def test_a_task_is_judged_by_its_own_scorer_also_when_graded_anew(world):
    arguments = ["data.task_args.min_digits=1", "data.task_args.max_digits=1", "num_problems=5"]
    assert run(*arguments, benchmarks="task:chain_sum", n=1) == 0
    (folder,) = folders()
    before = rows(folder)
    assert len(before) == 5 and all(row.strict is None for row in before)
    regrading.regrade_folder(folder, 1, 1.0)
    assert rows(folder) == before
    settings = json.loads((folder / "settings.json").read_text())
    settings["benchmark"]["data"]["seed"] = 9
    (folder / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="their source has changed"):
        regrading.regrade_folder(folder, 1, 1.0)


def test_other_judges_judge_the_same_responses(world):
    arguments = ["data.task_args.min_digits=1", "data.task_args.max_digits=1", "num_problems=5"]
    assert run(*arguments, benchmarks="task:chain_sum", n=2) == 0
    (folder,) = folders()
    world.asked.clear()
    judged = [*arguments, "reward.functions={format: 1.0, math: 0.5}"]
    assert run(*judged, benchmarks="task:chain_sum", n=2) == 0
    assert folders() == [folder] and not world.asked
    assert all(row.strict is not None for row in rows(folder)), "math has its second opinion"
    told = json.loads((folder / "settings.json").read_text())
    assert told["grader"]["functions"] == told["benchmark"]["functions"] == {"format": 1.0, "math": 0.5, "strict": 0.0}
    assert run(*arguments, benchmarks="task:chain_sum", n=2) == 0
    assert all(row.strict is None for row in rows(folder))


def test_a_problem_too_long_to_be_asked_is_wrong_and_counted(world, capsys):
    Path("p.jsonl").write_text(Path("p.jsonl").read_text().replace("which? 2", "which? " + "2" * 40))
    assert run("data.max_prompt_tokens=20", n=2) == 0
    (folder,) = folders()
    long = [row for row in rows(folder) if row.error == "long_prompt"]
    assert [(row.problem, row.sample, row.correct) for row in long] == [("q2", 0, False), ("q2", 1, False)]
    assert len(world.asked) == 2 * (NUM_PROBLEMS - 1) and len(rows(folder)) == 2 * NUM_PROBLEMS
    assert json.loads((folder / "scores.json").read_text())["errors"] == {"long_prompt": 2}
    assert "1 too long" in capsys.readouterr().err
    regrading.regrade_folder(folder, 1, 1.0)
    assert [row for row in rows(folder) if row.error == "long_prompt"] == long


def test_several_models_and_benchmarks_stand_side_by_side(world, capsys):
    Path("second.jsonl").write_text(Path("p.jsonl").read_text())
    assert run(models=["base", "tuned"], n=2, benchmarks="p.jsonl,second.jsonl") == 0
    assert world.num_starts == 2, "one start of the engine a model"
    out = capsys.readouterr().out.splitlines()
    heads = next(line for line in out if "model" in line)
    assert heads.split() == ["model", "p", "second", "mean"]
    assert [line.split()[0] for line in out[out.index(heads) + 2 :][:2]] == ["base", "tuned"]
    assert any(line.startswith("second: 6 problems, n = 2") for line in out)


def test_two_models_of_one_name_are_told_apart(world, capsys):
    Path("deep").mkdir()
    Path("deep/base").mkdir()
    Path("deep/base/config.json").write_text('{"max_position_embeddings": 4096}')
    assert run(models=["base", "deep/base"], n=1) == 0
    labels = {folder.parts[1] for folder in folders()}
    assert len(labels) == 2 and all(label.startswith("base-") for label in labels)


def test_the_folder_of_a_run_is_the_model_that_it_has_trained(world, capsys):
    Path("runs/mine/model").mkdir(parents=True)
    Path("runs/mine/config.yaml").write_text("model: {}")
    assert run(models=["runs/mine"], n=1) == 2
    assert "without a trained model" in capsys.readouterr().err
    Path("runs/mine/model/config.json").write_text('{"max_position_embeddings": 4096}')
    Path("runs/mine/model/model.safetensors").write_text("x")
    assert run(models=["runs/mine"], n=1) == 0
    assert [folder.parts[1] for folder in folders()] == ["mine"]


def test_one_process_writes_at_a_time(world, capsys):
    assert run(n=1) == 0
    (folder,) = folders()
    store = command.EvalStore(folder)
    try:
        assert run(n=1) == 2
    finally:
        store.close()
    assert "another process is writing" in capsys.readouterr().err


def test_tables_in_every_format(world):
    assert run(models=["base"], n=2) == 0
    (folder,) = folders()
    scores = scoring.score_again(folder, {"math": 1.0}, command.EvaluationRun().reward)
    grid = comparison({"my_model": {"p": scores}}, {"p": "MATH & 500"})
    cell = f"{100 * scores.pass_at_1:.1f} ± {100 * scores.sem:.1f}"
    assert grid.rows == [["my_model", cell]]
    assert as_markdown(grid) == (
        f"**pass@1, %, mean of 2 responses a problem**\n\n| model | MATH & 500 |\n| --- | ---: |\n| my_model | {cell} |\n"
    )
    latex = as_latex(grid)
    assert r"my\_model & " + cell.replace("±", r"$\pm$") + r" \\" in latex and r"MATH \& 500" in latex
    assert r"\caption{pass@1, \%, mean of 2 responses a problem}" in latex and latex.count(r"\end{tabular}") == 1
    assert cell in as_text(grid)
