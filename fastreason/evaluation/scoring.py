"""From the rows in a folder to its `answers.json` and `scores.json`.

It owns when equal answers are looked for: only among answers that have no class yet.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from fastreason.evaluation.answers import answer_classes, wrong_answers
from fastreason.evaluation.rows import ANSWERS_FILE, SCORES_FILE, grouped, read_classes, read_samples
from fastreason.evaluation.scores import Scores, score
from fastreason.rollout.graders import GraderPool
from fastreason.rollout.line_file import replace_file
from fastreason.sections import RewardConfig


def score_folder(
    folder: Path, functions: Mapping[str, float], reward: RewardConfig, n: int, ks: Sequence[int] | None = None
) -> Scores:
    """Score the first n responses to each problem, and write both files.

    Where `math` judges, it also says which wrong answers are equal, in the processes of section `reward`.
    """
    rows = [row for given in grouped(read_samples(folder, texts=False), n).values() for row in given]
    answers, classes = wrong_answers(rows), read_classes(folder)
    missing = {id: counts for id, counts in answers.items() if not set(counts) <= set(classes.get(id, {}))}
    if missing:
        classes |= asyncio.run(_classes(missing, "math" in functions, reward))
        replace_file(folder / ANSWERS_FILE, [msgspec.json.encode(classes) + b"\n"])
    scores = score(rows, classes, n, ks)
    replace_file(folder / SCORES_FILE, [msgspec.json.format(msgspec.json.encode(scores)) + b"\n"])
    return scores


def score_again(folder: Path, functions: Mapping[str, float], reward: RewardConfig) -> Scores | None:
    """Score as the last time; None where nothing was scored yet: the evaluation was stopped before its end."""
    try:
        last = msgspec.json.decode((folder / SCORES_FILE).read_bytes(), type=Scores)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return score_folder(folder, functions, reward, last.n, list(last.pass_at_k))


async def _classes(
    missing: Mapping[str, Mapping[str, int]], with_grader: bool, reward: RewardConfig
) -> dict[str, dict[str, int]]:
    if not with_grader:
        return await answer_classes(missing, None)
    async with GraderPool(reward.model_copy(update={"functions": {"math": 1.0}})) as pool:
        return await answer_classes(missing, pool)
