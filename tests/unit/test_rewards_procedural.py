"""The reward `reasoning_gym` and the JSON form of its entries."""

import json

import pytest

from fastreason.config import DataConfig
from fastreason.data import load_problems
from fastreason.errors import RewardError
from fastreason.rewards.procedural import pack, reasoning_gym_reward, unpack
from fastreason.types import Prompt


def one(task: str) -> Prompt:
    return load_problems(DataConfig(task=task, num_prompts=1, seed=3))[0]


def test_entries_survive_json() -> None:
    entry = {"a": (1, (2, "x")), "b": {1: "one", (2, 3): [None, True]}, "c": [], "d": {}, "e": 1.5}
    assert unpack(json.loads(json.dumps(pack(entry)))) == entry
    with pytest.raises(TypeError, match="object"):
        pack({"a": object()})


# arc_agi and rearc compare tuples, which plain JSON would bring back as lists; the others are an answer of several lines,
# a number, and text.
@pytest.mark.parametrize("task", ["arc_agi", "rearc", "mini_sudoku", "chain_sum", "spell_backward"])
def test_the_tasks_own_answer_scores_one_after_a_journey_as_json(task: str) -> None:
    prompt = one(task)
    travelled = Prompt(
        id=prompt.id, text=prompt.text, answer=prompt.answer, metadata=json.loads(json.dumps(prompt.metadata))
    )
    assert reasoning_gym_reward(f"<answer>\n{prompt.answer}\n</answer>", travelled) == 1.0
    assert reasoning_gym_reward("<answer>certainly not</answer>", travelled) < 0.5


def test_a_task_without_one_answer_is_judged_by_its_scorer() -> None:
    prompt = one("graph_color")
    assert prompt.answer is None
    entry = unpack(prompt.metadata["entry"])
    puzzle = entry["metadata"]["puzzle"]
    colors: dict[int, int] = {}
    for vertex in puzzle["vertices"]:
        taken = {colors[w] for edge in puzzle["edges"] for w in edge if vertex in edge and w != vertex and w in colors}
        colors[vertex] = next((c for c in puzzle["color_options"] if c not in taken), puzzle["color_options"][0])
    same = dict.fromkeys(puzzle["vertices"], puzzle["color_options"][0])
    right = reasoning_gym_reward(json.dumps(colors), prompt)
    assert right > reasoning_gym_reward(json.dumps(same), prompt)


def test_the_answer_is_taken_from_its_mark() -> None:
    prompt = one("chain_sum")
    assert reasoning_gym_reward(str(prompt.answer), prompt) == 1.0
    assert reasoning_gym_reward(rf"it is \boxed{{{prompt.answer}}}.", prompt) == 1.0
    assert 0.0 < reasoning_gym_reward(f"I believe that the answer is {prompt.answer}", prompt) < 0.5


def test_a_prompt_from_elsewhere_is_refused() -> None:
    with pytest.raises(RewardError, match=r"'p'.*data\.source=reasoning_gym"):
        reasoning_gym_reward("7", Prompt(id="p", text="3 + 4", answer="7"))
