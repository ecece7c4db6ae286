"""The held-out split and the cursor: disjoint, repeatable, resumable, and refused for other data."""

import pytest

from fastreason.data import PromptCursor, normalise_text, split_held_out
from fastreason.errors import ConfigError, DataError
from fastreason.types import Prompt


def prompts(num: int) -> list[Prompt]:
    return [Prompt(id=str(i), text=f"problem {i}") for i in range(num)]


def test_texts_are_the_same_up_to_case_and_space() -> None:
    assert normalise_text("  What IS\n3 +\t4? ") == "what is 3 + 4?"
    assert normalise_text("e\u0301") == normalise_text("é")
    assert normalise_text("x²") != normalise_text("x2")


def test_the_split_is_disjoint_complete_and_repeatable() -> None:
    problems = prompts(20)
    train, held_out = split_held_out(problems, 5, seed=1)
    assert len(held_out) == 5 and len(train) == 15
    assert sorted([*train, *held_out], key=lambda p: int(p.id)) == problems
    assert [p for p in problems if p in train] == train
    assert split_held_out(problems, 5, seed=1) == (train, held_out)
    assert split_held_out(problems, 5, seed=2)[1] != held_out
    assert split_held_out(problems, 0, seed=1) == (problems, [])


def test_the_choice_is_the_same_on_every_machine() -> None:
    assert [p.id for p in split_held_out(prompts(10), 3, seed=0)[1]] == ["0", "1", "6"]


def test_no_text_is_on_both_sides() -> None:
    problems = [Prompt(id=str(i), text=f"Problem  {i % 4}" if i % 2 else f"problem {i % 4}") for i in range(12)]
    for seed in range(5):
        train, held_out = split_held_out(problems, 2, seed)
        assert len(held_out) == 2 and len(train) == 6
        assert not {normalise_text(p.text) for p in train} & {normalise_text(p.text) for p in held_out}


def test_too_few_problems_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval\.num_prompts=5: of 5 problems, 0 would remain"):
        split_held_out(prompts(5), 5, seed=0)
    with pytest.raises(ConfigError, match="at least 4"):
        split_held_out(prompts(5), 2, seed=0, min_train=4)
    with pytest.raises(ConfigError, match=r"eval\.num_prompts=9"):
        split_held_out(prompts(5), 9, seed=0)


def test_every_epoch_has_every_prompt_in_another_order() -> None:
    cursor = PromptCursor(prompts(8), seed=0)
    epochs = []
    for epoch in range(3):
        assert cursor.epoch == epoch
        epochs.append([cursor.next().id for _ in range(8)])
    assert all(sorted(ids) == [str(i) for i in range(8)] for ids in epochs)
    assert len({tuple(ids) for ids in epochs}) == 3
    another = PromptCursor(prompts(8), seed=1)
    assert [another.next().id for _ in range(8)] != epochs[0]


def test_the_order_is_the_same_on_every_machine() -> None:
    cursor = PromptCursor(prompts(6), seed=7)
    assert "".join(cursor.next().id for _ in range(12)) == "014523201543"


@pytest.mark.parametrize("num_taken", [0, 3, 5, 6, 13])
def test_a_saved_cursor_continues_where_it_stood(num_taken: int) -> None:
    cursor = PromptCursor(prompts(5), seed=3)
    for _ in range(num_taken):
        cursor.next()
    other = PromptCursor(prompts(5), seed=3)
    other.load_state(cursor.state())
    assert other.epoch == cursor.epoch == num_taken // 5
    assert [other.next().id for _ in range(12)] == [cursor.next().id for _ in range(12)]


def test_a_state_of_other_data_is_refused() -> None:
    state = PromptCursor(prompts(5), seed=3).state()
    with pytest.raises(DataError, match="number of training prompts is 5, now it is 6"):
        PromptCursor(prompts(6), seed=3).load_state(state)
    changed = [*prompts(4), Prompt(id="4", text="another problem")]
    with pytest.raises(DataError, match="fingerprint"):
        PromptCursor(changed, seed=3).load_state(state)
    with pytest.raises(DataError, match="seed of their order is 3, now it is 4"):
        PromptCursor(prompts(5), seed=4).load_state(state)
    with pytest.raises(DataError, match="position=5"):
        PromptCursor(prompts(5), seed=3).load_state({**state, "position": 5})


def test_nothing_to_walk_over_is_refused() -> None:
    with pytest.raises(DataError, match="no training prompt"):
        PromptCursor([], seed=0)
