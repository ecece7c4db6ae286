"""How long the graders need for real responses, without memoisation: `python bench/grading.py FILE... [--workers 2]`.

FILE is JSON Lines with `problem`, `answer` and `generations` (a list of responses). The pool is started and warm before the
clock runs; every response is graded anew, and every gold answer parsed anew.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

from fastreason.config import RewardConfig
from fastreason.rollout.graders import GraderPool
from fastreason.types import Prompt


def read_responses(paths: Sequence[Path]) -> list[tuple[Prompt, str]]:
    """Each response with a prompt of its own; the gold's blanks differ, so that no cache of parsed answers helps."""
    rows = [json.loads(line) for path in paths for line in path.open(encoding="utf-8")]
    return [
        (Prompt(id=row["id"], text=row["problem"], answer=row["answer"] + " " * place), text)
        for row in rows
        for place, text in enumerate(row.get("generations") or [])
    ]


async def grade_all(
    responses: Sequence[tuple[Prompt, str]], functions: dict[str, float], workers: int
) -> dict[str, float]:
    """Grade every response once; seconds, the number, how many are right, and how many met the deadline."""
    async with GraderPool(RewardConfig(functions=functions, workers=workers)) as pool:
        started = time.perf_counter()
        groups = await asyncio.gather(*[pool.grade(prompt, [text]) for prompt, text in responses])
        took = time.perf_counter() - started
        grades = [grade for group in groups for grade in group]
        right = sum(grade.correct for grade in grades)
        return {"s": took, "num": len(grades), "right": right, "timeouts": pool.num_timeouts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    responses = read_responses(options.files)
    for functions in ({"math": 1.0}, {"strict": 1.0}, {"math": 1.0, "format": 0.0, "strict": 0.0}):
        found = asyncio.run(grade_all(responses, functions, options.workers))
        facts = f"{found['right']} right, {found['timeouts']} past the deadline"
        print(f"{' + '.join(functions):24} {found['num']} responses in {found['s']:.2f} s, {facts}")


if __name__ == "__main__":
    main()
