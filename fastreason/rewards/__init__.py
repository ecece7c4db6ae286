"""Rewards: pure functions from a response's text to a number, and how they combine. No process, no clock, no I/O."""

from fastreason.rewards.extract import extract_answer, last_answer_tag, last_boxed, read_answer
from fastreason.rewards.normal_form import normalise_answer, read_number
from fastreason.rewards.table import (
    REWARD_MODEL,
    REWARDS,
    RewardFunction,
    RewardSpec,
    check_prompts,
    resolve_rewards,
)

__all__ = [
    "REWARDS",
    "REWARD_MODEL",
    "RewardFunction",
    "RewardSpec",
    "check_prompts",
    "extract_answer",
    "last_answer_tag",
    "last_boxed",
    "normalise_answer",
    "read_answer",
    "read_number",
    "resolve_rewards",
]
