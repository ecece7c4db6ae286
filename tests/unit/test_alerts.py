"""Alerts: each fires when it should, once, again only after it has cleared, and not on a healthy run."""

import math

import pytest

from fastreason.alerts import Alerts
from fastreason.config import parse_config

HEALTHY = {
    "reward/mean": 0.4,
    "reward/std": 0.5,
    "reward/accuracy": 0.4,
    "reward/timeouts": 0.0,
    "rollout/truncated_share": 0.1,
    "rollout/signal_share": 0.8,
    "loss/entropy": 0.9,
    "kl/reference": 0.01,
    "logp/chosen_change": 0.1,
    "logp/rejected_change": -0.1,
    "train/grad_norm": 0.5,
    "mismatch/logp_abs_mean": 0.01,
    "mismatch/ess": 0.98,
    "rollout/staleness_max": 0.0,
}


def make_alerts(**log):
    return Alerts(
        parse_config(
            {
                "model": {"path": "m"},
                "data": {"task": "chain_sum"},
                "train": {"steps": 9, "prompts_per_step": 2},
                "log": {"warn_after": 3, **log},
            }
        )
    )


def feed(alerts, changes):
    """Feed one step per entry of `changes` and return, per step, the messages."""
    return [alerts.feed({"step": step, **HEALTHY, **change}) for step, change in enumerate(changes, start=1)]


def test_a_healthy_run_is_silent():
    assert feed(make_alerts(), [{}] * 20) == [[]] * 20


def test_the_movement_of_the_policy_is_no_mismatch():
    assert feed(make_alerts(), [{"mismatch/logp_abs_mean": 0.5, "rollout/staleness_max": 1.0}] * 5) == [[]] * 5


# metric changes, steps in a row until it fires, a piece of the advice
CASES = [
    ({"logp/chosen_change": -0.5, "logp/rejected_change": -0.3}, 3, "both plunge (-0.50 and -0.30"),
    ({"reward/mean": 0.0, "reward/std": 0.0, "reward/accuracy": 0.0, "rollout/signal_share": 0.0}, 3, "samples.jsonl"),
    ({"reward/mean": -1.0, "reward/std": 0.0, "reward/accuracy": 0.0}, 3, "every reward was -1"),
    ({"rollout/truncated_share": 1.0}, 3, "max_new_tokens"),
    ({"rollout/signal_share": 0.0}, 3, "samples_per_prompt"),
    ({"rollout/signal_share": 0.0, "reward/accuracy": 1.0, "reward/std": 0.0}, 3, "accuracy 1.000"),
    ({"reward/timeouts": 2.0}, 3, "deadline_s"),
    ({"loss/entropy": 0.01}, 1, "entropy_floor"),
    ({"mismatch/logp_abs_mean": 0.11}, 1, "mismatch_warning"),
    ({"mismatch/ess": 0.3}, 3, "max_staleness"),
    ({"train/grad_norm": math.nan}, 1, "not finite"),
    ({"train/grad_norm": math.inf}, 1, "not finite"),
    ({"train/grad_norm": None}, 1, "not finite"),
    ({"kl/reference": 1.5}, 1, "KL"),
]


@pytest.mark.parametrize(("bad", "after", "advice"), CASES)
def test_fires_once_and_again_only_after_it_has_cleared(bad, after, advice):
    messages = feed(make_alerts(), [bad] * (after + 4) + [{}] + [bad] * (after + 1))
    fired = [step for step, texts in enumerate(messages, start=1) for _ in texts]
    first, again = after, after + 4 + 1 + after
    assert fired == [first, again]
    assert advice in messages[first - 1][0] and f"step {first}:" in messages[first - 1][0]


@pytest.mark.parametrize("key", ["mismatch/ess", "loss/entropy"])
def test_a_step_without_an_update_has_no_tokens_to_warn_about(key):
    assert feed(make_alerts(), [{key: 0.0}] * 5) == [[]] * 5


def test_a_teacher_may_be_far_away():
    assert feed(make_alerts(), [{"kl/teacher": 5.0, "loss/kl": 5.0}]) == [[]]


def test_too_few_steps_in_a_row_do_not_fire():
    bad = {"rollout/truncated_share": 1.0}
    assert feed(make_alerts(), [bad, bad, {}, bad, bad, {}]) == [[]] * 6


def test_warn_after_comes_from_the_config():
    messages = feed(make_alerts(warn_after=1), [{"rollout/truncated_share": 1.0}])
    assert len(messages[0]) == 1


def test_a_line_without_the_key_neither_counts_nor_clears():
    alerts = make_alerts()
    bad = {**HEALTHY, "rollout/truncated_share": 1.0}
    assert alerts.feed({"step": 1, **bad}) == []
    assert alerts.feed({"step": 2, **bad}) == []
    assert alerts.feed({"step": 2, "eval/accuracy": 0.3}) == []
    assert len(alerts.feed({"step": 3, **bad})) == 1


def test_accuracy_that_falls_below_half_of_its_best_is_reported():
    messages = feed(make_alerts(), [{"reward/accuracy": value} for value in [0.5] * 6 + [0.1] * 6])
    texts = [text for step in messages for text in step]
    assert len(texts) == 1 and "best checkpoint" in texts[0]


def test_low_accuracy_that_was_never_better_is_no_collapse():
    assert feed(make_alerts(), [{"reward/accuracy": value} for value in [0.08] * 6 + [0.01] * 6]) == [[]] * 12


def test_rejected_responses_that_lose_probability_alone_are_what_training_wants():
    assert feed(make_alerts(), [{"logp/chosen_change": 0.1, "logp/rejected_change": -3.0}] * 9) == [[]] * 9
