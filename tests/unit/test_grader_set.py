"""Both graders on a labelled set, through the pool; what they disagree about is explained row by row.

A row of graded_answers.jsonl: `kind`, `gold`, `response`, and `verdict`, what a person would say. `math` and `strict` stand
where that grader says otherwise, `timed_out` where math-verify meets the deadline, `why` wherever not all three agree.
"""

import asyncio
import importlib
import json
import os
import random
import resource
import time
from pathlib import Path

import pytest

from fastreason.config import RewardConfig
from fastreason.rewards.latex import read_latex
from fastreason.rewards.latex_expression import UnreadableError
from fastreason.rewards.strict import clean_answer, split_unit, strict_equal, strict_reward
from fastreason.rollout.graders import GraderPool
from fastreason.types import Prompt

ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "data" / "graded_answers.jsonl").open()]
KINDS = {"integer", "fraction", "decimal", "percentage", "units", "set", "interval", "tuple", "matrix", "equation"}
KINDS |= {"expression", "text", "boxes", "unfinished", "huge", "unicode", "empty"}


def test_the_set_covers_all_kinds_and_explains_every_disagreement() -> None:
    assert len(ROWS) >= 150 and {row["kind"] for row in ROWS} == KINDS
    assert len({(row["gold"], row["response"]) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        differing = [name for name in ("math", "strict") if row.get(name, row["verdict"]) != row["verdict"]]
        assert bool(row.get("why")) == bool(differing), f"{row}: explained and different must go together"
    for kind in KINDS - {"empty", "huge"}:
        assert {row["verdict"] for row in ROWS if row["kind"] == kind} == {True, False}, kind


def test_the_training_grader_on_the_labelled_set() -> None:
    async def run(rows: list, deadline_s: float) -> list:
        async with GraderPool(RewardConfig(functions={"math": 1.0}, workers=2, deadline_s=deadline_s)) as pool:
            prompts = [Prompt(id=str(n), text="What is it?", answer=row["gold"]) for n, row in enumerate(rows)]
            tasks = [pool.grade(prompt, [row["response"]]) for prompt, row in zip(prompts, rows, strict=True)]
            return [grade for group in await asyncio.gather(*tasks) for grade in group]

    huge = [row for row in ROWS if row["kind"] == "huge"]
    others = [row for row in ROWS if row["kind"] != "huge"]
    # Those that nothing makes hang have time also on a machine that has other things to do.
    grades = asyncio.run(asyncio.wait_for(run(huge, DEADLINE_S), 120))
    grades += asyncio.run(asyncio.wait_for(run(others, 60.0), 120))
    for row, grade in zip([*huge, *others], grades, strict=True):
        assert grade.correct == row.get("math", row["verdict"]), row
        # A faster machine may get through some of them.
        assert not grade.timed_out or row["kind"] == "huge", row
    assert any(grade.timed_out for grade in grades), "none hangs any more: find harder ones"


def test_the_strict_grader_on_the_labelled_set_without_a_deadline() -> None:
    started = time.process_time()
    for row in ROWS:
        text = row["response"].encode("utf-8", "replace").decode()
        given = strict_reward(text, Prompt(id="0", text="", answer=row["gold"]))
        assert given == row.get("strict", row["verdict"]), row
    assert time.process_time() - started < 10, "it reads hostile answers in bounded time by itself"


@pytest.mark.parametrize(
    ("text", "cleaned", "unit"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}", ""),
        (r"\$1,234.50", "1234.50", ""),
        (r"12\text{ cm}^2", "12", "cm2"),
        ("30 degrees", "30", "degree"),
        (r"5\%.", "5", "%"),
        ("x² + ½", r"x^{2} + \frac{1}{2}", ""),
        (r"\text{(A)}", "(A)", ""),
        (r"1 \text{ and } 2", "1,2", ""),
        (r"x\cdot y", r"x\cdot y", ""),
        ("x⁻²", "x^{-2}", ""),
    ],
)
def test_answers_are_brought_to_one_way_of_writing(text: str, cleaned: str, unit: str) -> None:
    assert split_unit(clean_answer(text)) == (cleaned, unit)


HOSTILE = ["9^{9^{9^{9}}}", "2^{10001}", "201!", "(" * 99 + ")" * 99, "1/0", r"\foo", "1" * 1001, "", "x^{x^{x^{x}}}"]
HOSTILE += [",".join("1" * 33), r"\exp(\exp(\exp(9)))", "[1", "a b)", "__import__('os')", r"\sqrt{"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_hostile_or_unknown_is_not_read(text: str) -> None:
    with pytest.raises(UnreadableError):
        read_latex(text)


def test_many_signs_are_two_readings() -> None:
    assert read_latex("x" + r"\pm 1" * 60).kind == "list" and strict_equal(
        r"1 \pm \sqrt{2}", r"1 - \sqrt{2}, 1 + \sqrt{2}"
    )


def test_points_tell_expressions_apart() -> None:
    assert strict_equal(r"(x+y)^2", "x^2 + 2xy + y^2") and not strict_equal(r"(x+y)^2", "x^2 + y^2")
    assert (
        not strict_equal("x", "y") and not strict_equal("x + 10^{-20}", "x") and not strict_equal("x", "x + 10^{-20}")
    )
    assert strict_equal(r"\frac{1}{\sqrt{x}}", r"\frac{\sqrt{x}}{x}")


PIECES = [
    "\\boxed{",
    "}",
    "{",
    "\\frac{1}{",
    "\\frac",
    "12",
    "7",
    "+",
    "=",
    "-",
    "^",
    "\\sqrt{",
    "$",
    "\\[",
    "(",
    ")",
    ",",
    "%",
]
PIECES += [
    "\\text{",
    " and ",
    "\n",
    "!",
    "\\infty",
    " is ",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "&",
    "\\\\",
    "\x00",
    "\ud800",
]
PIECES += [
    "٣",
    "/",
    "0",
    "x",
    "y",
    "\\int_0^1 ",
    "\\cup",
    "[",
    "]",
    "e",
    "\\pi",
    "9^{9",
    "\\log",
    "\\binom{9}{",
    "<",
    "\\le",
    ".",
]
PIECES += ["\\pm", "_", "|", "½", "√", "²", "\\text{ cm}", "<answer>", "</answer>", "\\{", "\\}", "i", "\\cdot"]
GOLDS = [
    "7",
    r"\frac{1}{2}",
    "x^2+1",
    "(1, 2)",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    "[0, 1)",
    r"\text{even}",
    r"\{1, 2\}",
]
NUM_FUZZED, DEADLINE_S, PER_PROMPT = 10_000, 1.0, 20
TOWER = r"\boxed{9^{9^{9^{9}}}}"  # hangs sympy


def test_10000_fuzzed_answers_cost_no_crash_and_no_grader() -> None:
    source = random.Random(20240607)

    def fuzzed() -> str:
        text = "".join(source.choices(PIECES, k=source.randint(0, 14)))
        return f"\\boxed{{{text}}}" if source.random() < 0.6 else text

    async def run() -> GraderPool:
        config = RewardConfig(functions={"math": 1.0, "strict": 0.0}, workers=2, deadline_s=DEADLINE_S)
        async with GraderPool(config) as pool:
            prompts = [
                Prompt(id=str(n), text="What?", answer=GOLDS[n % len(GOLDS)]) for n in range(NUM_FUZZED // PER_PROMPT)
            ]
            texts = [[fuzzed() for _ in range(PER_PROMPT)] for _ in prompts]
            texts[96][7] = texts[400][3] = TOWER  # to golds that are 7
            groups = await asyncio.gather(*[pool.grade(p, t) for p, t in zip(prompts, texts, strict=True)])
            grades = [grade for group in groups for grade in group]
            assert len(grades) == NUM_FUZZED and {grade.reward for grade in grades} <= {0.0, 1.0}
            assert sum(grade.timed_out for grade in grades) == pool.num_timeouts >= 2
            assert groups[96][7].timed_out and groups[400][3].timed_out
            for _ in range(100):
                if pool.num_alive == 2:
                    break
                await asyncio.sleep(0.1)
            assert pool.num_alive == 2 and pool.num_deaths == 0
            (good, bad) = await pool.grade(Prompt(id="sum", text="What is 3 + 4?", answer="7"), ["7", "8"])
            assert good.correct and not bad.correct
            return pool

    started, before = time.monotonic(), cpu_of_children_s()
    pool = asyncio.run(asyncio.wait_for(run(), 400))
    wall_s, cpu_s = time.monotonic() - started, cpu_of_children_s() - before
    print(f"{NUM_FUZZED} fuzzed answers: {wall_s:.1f} s, {cpu_s:.1f} s of CPU, {pool.num_timeouts} past the deadline")


def cpu_of_children_s() -> float:
    """Processor time of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.skipif(
    not os.environ.get("FASTREASON_DATA"), reason="FASTREASON_DATA does not name the folder with real responses"
)
def test_810_real_responses_are_graded_in_10_s_on_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    grading = importlib.import_module("grading")
    names = ("rollouts_qwen25math_math100x8.jsonl", "rollouts_r1_style_samples.jsonl")
    paths = [Path(os.environ["FASTREASON_DATA"]) / name for name in names]
    if not all(path.is_file() for path in paths):
        pytest.skip(f"FASTREASON_DATA has not both of {names}")
    responses = grading.read_responses(paths)
    assert len(responses) == 810
    before = cpu_of_children_s()
    found = asyncio.run(asyncio.wait_for(grading.grade_all(responses, {"math": 1.0}, workers=2), 300))
    # The graders' own time, their start included: on a machine that is busy with other work the clock says nothing.
    cpu_s = cpu_of_children_s() - before
    print(
        f"810 real responses: {found['s']:.1f} s, {cpu_s:.1f} s of CPU with the start of two graders, {found['right']} right"
    )
    assert found["timeouts"] == 0 and cpu_s < 2 * 10
