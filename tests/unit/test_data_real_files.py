"""The public data sets themselves, from the folder that FASTREASON_DATA names; skipped where it is not set."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from fastreason.config import DataConfig, RewardConfig
from fastreason.data import PromptCursor, check_data, load_problems, split_held_out
from fastreason.rewards import check_prompts, resolve_rewards
from fastreason.rewards.verification import math_reward
from fastreason.rollout.graders import GraderPool
from fastreason.types import Prompt

FOLDER = os.environ.get("FASTREASON_DATA", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="FASTREASON_DATA does not name the folder with the public data sets")


def config(name: str) -> DataConfig:
    path = Path(FOLDER) / name
    if not path.is_file():
        pytest.skip(f"FASTREASON_DATA has no {name}")
    return DataConfig(source="file", path=str(path), id_column="id")


@pytest.mark.parametrize(
    ("name", "num"),
    [("gsm8k_train.jsonl", 7473), ("math_train.jsonl", 7498), ("math500.jsonl", 500), ("aime24.jsonl", 30),
     ("amc23.jsonl", 40), ("amc_83.jsonl", 83), ("minerva_math.jsonl", 272), ("olympiadbench.jsonl", 675),
     ("deepscaler_level1.jsonl", 7961)],
)  # fmt: skip
def test_every_set_loads_and_can_be_judged(name: str, num: int) -> None:
    assert check_data(config(name)) == []
    problems = load_problems(config(name))
    assert len(problems) == num
    check_prompts(resolve_rewards(RewardConfig()), problems)
    json.dumps([problem.metadata for problem in problems])


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "math500.jsonl", "amc_83.jsonl", "olympiadbench.jsonl"])
def test_every_gold_answer_is_right_in_a_box(name: str) -> None:
    problems = load_problems(config(name))[:300]
    wrong = [p for p in problems if math_reward(f"so \\boxed{{{p.answer}}}.", p) != 1.0]
    assert not wrong, [(p.id, p.answer) for p in wrong[:5]]


def test_duplicates_of_a_held_out_problem_are_not_trained_on() -> None:
    problems = load_problems(config("deepscaler_level1.jsonl"))
    train, held_out = split_held_out(problems, 500, seed=0)
    assert len(held_out) == 500 and len(train) < len(problems) - 500
    cursor = PromptCursor(train, seed=0)
    assert len({cursor.next().id for _ in train}) == len(train)


def test_agreement_with_the_labels_of_real_generations() -> None:
    path = Path(str(config("rollouts_qwen25math_math100x8.jsonl").path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    async def run() -> float:
        async with GraderPool(RewardConfig(workers=2)) as pool:
            started = time.monotonic()
            prompts = [Prompt(id=row["id"], text=row["problem"], answer=row["answer"]) for row in rows]
            pairs = zip(prompts, rows, strict=True)
            groups = await asyncio.gather(*[pool.grade(prompt, row["generations"]) for prompt, row in pairs])
            took_s = time.monotonic() - started
            assert pool.num_timeouts == pool.num_deaths == 0
        labels = [label for row in rows for label in row["correct"]]
        verdicts = [grade.correct for group in groups for grade in group]
        disagreements = [n for n, (a, b) in enumerate(zip(labels, verdicts, strict=True)) if a != b]
        # The one label that differs calls 10000 wrong where the gold answer is 10{,}000.
        assert len(verdicts) == 800 and [rows[n // 8]["answer"] for n in disagreements] == ["10{,}000"]
        return len(verdicts) / took_s

    print(f"{asyncio.run(run()):.0f} responses per second with 2 graders")
