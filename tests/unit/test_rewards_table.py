"""How parts become one reward, which names are accepted, and what a user function may do."""

import math
from pathlib import Path

import pytest

from fastreason.config import RewardConfig
from fastreason.errors import ConfigError, RewardError
from fastreason.rewards import REWARDS, check_prompts, resolve_rewards
from fastreason.types import Prompt

SUM = Prompt(id="p1", text="What is 3 + 4?", answer="7")

USER = """
def length(text, prompt):
    return float(len(text))

def half(text, prompt):
    return 0.5

def raises(text, prompt):
    raise KeyError("no such thing")

def nan(text, prompt):
    return float("nan")

def words(text, prompt):
    return "good"

def one_argument(text):
    return 1.0

async def later(text, prompt):
    return 1.0

constant = 3
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rewards_of_a_user.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "rewards_of_a_user"


def spec(functions: dict[str, float], range: str = "zero_one"):  # type: ignore[no-untyped-def]
    return resolve_rewards(RewardConfig(functions=functions, range=range))  # type: ignore[arg-type]


@pytest.mark.parametrize(("range", "wrong", "right"), [("zero_one", 0.0, 1.0), ("plus_minus_one", -1.0, 1.0)])
def test_math_alone_gives_exactly_two_values(range: str, wrong: float, right: float) -> None:
    rewards = spec({"math": 1.0}, range)
    good, bad = rewards.grade("3 + 4 = 7", SUM), rewards.grade("3 + 4 = 8", SUM)
    assert (good.reward, good.correct, good.parts) == (right, True, {"math": 1.0})
    assert (bad.reward, bad.correct, bad.parts) == (wrong, False, {"math": 0.0})
    assert rewards.wrong(timed_out=True).reward == wrong and rewards.wrong(timed_out=True).timed_out


def test_parts_are_summed_by_weight() -> None:
    functions = {"math": 1.0, "format": 0.25}
    boxed, plain = r"\boxed{7}", "7"
    assert spec(functions).grade(boxed, SUM).reward == 1.25
    assert spec(functions).grade(plain, SUM).reward == 1.0
    # 1 * (2 * 1 - 1) + 0.25 * (2 * 0 - 1)
    assert spec(functions, "plus_minus_one").grade(plain, SUM).reward == 0.75
    assert spec(functions, "plus_minus_one").grade(r"\boxed{8}", SUM).reward == -0.75


def test_a_truncated_response_has_no_format() -> None:
    grade = spec({"math": 1.0, "format": 1.0}).grade(r"\boxed{7}", SUM, truncated=True)
    assert grade.parts == {"math": 1.0, "format": 0.0}


def test_the_first_part_that_judges_decides_correct(user: str) -> None:
    assert not spec({"format": 1.0}).grade(r"\boxed{7}", SUM).correct
    assert spec({"format": 1.0, "math": 1.0}).grade("7", SUM).correct
    assert spec({f"{user}:half": 1.0, "math": 1.0}).grade("8", SUM).correct
    assert not spec({"math": 1.0, f"{user}:half": 1.0}).grade("8", SUM).correct


def test_a_reward_models_score_joins_later_and_is_not_mapped() -> None:
    rewards = spec({"math": 1.0, "reward_model": 0.5}, "plus_minus_one")
    assert rewards.needs_reward_model and list(rewards.functions) == ["math"]
    grade = rewards.with_part(rewards.grade("8", SUM), "reward_model", 0.5)
    assert grade.reward == -0.75 and grade.parts == {"math": 0.0, "reward_model": 0.5} and not grade.correct
    assert rewards.with_part(rewards.wrong(timed_out=True), "reward_model", 0.5).timed_out


def test_user_functions(user: str) -> None:
    assert spec({f"{user}:length": 0.5}).grade("four", SUM).reward == 2.0
    with pytest.raises(RewardError, match=r"rewards_of_a_user:raises.*KeyError.*p1"):
        spec({f"{user}:raises": 1.0}).grade("7", SUM)
    with pytest.raises(RewardError, match=r"rewards_of_a_user:nan.*finite"):
        spec({f"{user}:nan": 1.0}).grade("7", SUM)
    with pytest.raises(RewardError, match=r"rewards_of_a_user:words.*'good'"):
        spec({f"{user}:words": 1.0}).grade("7", SUM)
    with pytest.raises(RewardError, match=r"rewards_of_a_user:length.*\[0, 1\].*zero_one"):
        spec({f"{user}:length": 1.0}, "plus_minus_one").grade("four", SUM)
    assert spec({f"{user}:half": 1.0}, "plus_minus_one").grade("7", SUM).reward == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "did you mean 'math'"),
        ("nothing_like_it", "There are: math, reasoning_gym, format, strict, reward_model"),
        ("no_such_module_here:f", "ModuleNotFoundError.*PYTHONPATH"),
        ("rewards_of_a_user:lenght", "did you mean 'length'"),
        ("rewards_of_a_user:constant", "is a int, not a function"),
        ("rewards_of_a_user:one_argument", "cannot be called as"),
        ("rewards_of_a_user:later", "is async"),
    ],
)
def test_names_are_checked_early(user: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec({name: 1.0})


def test_a_weight_must_be_finite() -> None:
    with pytest.raises(ConfigError, match=r"reward\.functions\.math=nan"):
        spec({"math": math.nan})


def test_rewards_that_cannot_judge_the_prompts_are_refused() -> None:
    check_prompts(spec({"math": 1.0}), [SUM])
    open_problem = Prompt(id="p2", text="Why?")
    with pytest.raises(ConfigError, match=r"1 of 2 problems have no gold answer.*'p2'.*data\.answer_column"):
        check_prompts(spec({"math": 1.0}), [SUM, open_problem])
    with pytest.raises(ConfigError, match=r"'p1'.*data\.source=reasoning_gym"):
        check_prompts(spec({"reasoning_gym": 1.0}), [SUM])
    check_prompts(spec({"format": 1.0}), [open_problem])


def test_the_table_has_the_names_that_the_config_documents() -> None:
    documented = RewardConfig.model_fields["functions"].description or ""
    assert all(name in documented for name in REWARDS)
