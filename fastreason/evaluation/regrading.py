"""`fastreason regrade`: the verdicts of stored responses made anew, without an engine.

It replaces `samples.jsonl` whole, or not at all. It refuses to grade by problems that are not those that were asked.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastreason.errors import ConfigError, DataError
from fastreason.evaluation.benchmarks import Benchmark, described, load_benchmark, problems_checksum
from fastreason.evaluation.rows import (
    ANSWERS_FILE,
    EvalSample,
    evaluation_folders,
    grouped,
    read_samples,
    read_settings,
)
from fastreason.evaluation.sampling import grader_settings
from fastreason.evaluation.scoring import score_again
from fastreason.evaluation.store import LONG_PROMPT, EvalStore, judged, write_settings
from fastreason.rollout.graders import GraderPool
from fastreason.sections import RewardConfig
from fastreason.types import Prompt

FROM_ROWS = {"math", "strict", "format"}  # judge by what a row holds


@dataclass(frozen=True)
class Regraded:
    """What changed in one folder: verdicts that became right, and those that became wrong, of how many."""

    folder: Path
    num_rows: int
    num_now_right: int
    num_now_wrong: int


def regrade_folder(folder: Path, workers: int, deadline_s: float, settings: dict[str, Any] | None = None) -> Regraded:
    """Grade all responses of an evaluation's folder anew, and score it; raises DataError where its problems have changed.

    settings: new ones of the same responses, with other judges; without them, those of the folder judge again.
    """
    settings = read_settings(folder) if settings is None else settings
    benchmark = described({**settings["benchmark"], "num_problems": settings["benchmark"]["first"]})
    store = EvalStore(folder)
    try:
        by_problem = grouped(read_samples(folder))
        prompts = _prompts(folder, settings, benchmark, by_problem)
        rows = asyncio.run(_grade(prompts, by_problem, benchmark, workers, deadline_s))
        store.replace(rows)
    finally:
        store.close()
    (folder / ANSWERS_FILE).unlink(missing_ok=True)
    write_settings(folder, {**settings, "grader": grader_settings(benchmark, deadline_s)})
    score_again(folder, benchmark.functions, _reward(benchmark, workers, deadline_s))
    before = {(row.problem, row.sample): row.correct for given in by_problem.values() for row in given}
    changed = [row.correct for row in rows if row.correct is not before[row.problem, row.sample]]
    return Regraded(folder, len(rows), sum(changed), len(changed) - sum(changed))


def _reward(benchmark: Benchmark, workers: int, deadline_s: float) -> RewardConfig:
    return benchmark.reward.model_copy(update={"workers": workers, "deadline_s": deadline_s})


def _prompts(
    folder: Path, settings: dict[str, Any], benchmark: Benchmark, rows: dict[str, list[EvalSample]]
) -> dict[str, Prompt]:
    if set(benchmark.functions) <= FROM_ROWS:
        return {id: Prompt(id=id, text=given[0].question, answer=given[0].gold) for id, given in rows.items()}
    problems = load_benchmark(benchmark)
    if problems_checksum(problems) != settings["benchmark"]["checksum"]:
        raise DataError(
            f"{folder}: the problems of {benchmark.name} are not those that were asked: their source has changed, and "
            "the responses cannot be graded anew without it."
        )
    return {problem.id: problem for problem in problems}


async def _grade(
    prompts: dict[str, Prompt],
    by_problem: dict[str, list[EvalSample]],
    benchmark: Benchmark,
    workers: int,
    deadline_s: float,
) -> list[EvalSample]:
    turn = asyncio.Semaphore(2 * workers)

    async with GraderPool(_reward(benchmark, workers, deadline_s)) as pool:

        async def one(id: str, given: Sequence[EvalSample]) -> list[EvalSample]:
            async with turn:
                texts, truncated = [row.response for row in given], [row.truncated for row in given]
                grades = await pool.grade(prompts[id], texts, truncated)
            return [
                row if row.error == LONG_PROMPT else judged(row, grade)
                for row, grade in zip(given, grades, strict=True)
            ]

        graded = await asyncio.gather(*(one(id, given) for id, given in by_problem.items()))
    return [row for rows in graded for row in rows]


def regrade_all(root: Path, workers: int, deadline_s: float) -> list[Regraded]:
    """Regrade every evaluation at and under a folder, and say what changed."""
    if workers < 1:
        raise ConfigError(f"--workers {workers}: give at least 1.")
    if deadline_s <= 0:
        raise ConfigError(f"--deadline {deadline_s:g}: give the seconds that a response may take, more than 0.")
    folders = evaluation_folders(root)
    if not folders:
        raise DataError(f"{root}: there is no evaluation at or under it. Give the --out folder of fastreason eval.")
    done = []
    for folder in folders:
        started = time.perf_counter()
        done.append(regrade_folder(folder, workers, deadline_s))
        seconds = time.perf_counter() - started
        print(
            f"{folder}: {done[-1].num_rows} responses in {seconds:.1f} s, {done[-1].num_now_right} now right, "
            f"{done[-1].num_now_wrong} now wrong",
            flush=True,
        )
    return done
