"""The figures of a step by hand: from groups, and from the token statistics of micro-batches."""

import math
import statistics

import pytest
import torch
from fastreason_kernels import PolicyLossOutput

from fastreason.figures import TokenTotals, rollout_figures
from fastreason.packing import Row, collate
from fastreason.rollout.evaluation import summarise
from fastreason.training import update_figures
from fastreason.types import Grade, Group, Prompt, Sample
from fastreason.update.updater import UpdateResult


def sample(reward, versions, finish="stop"):
    return Sample(
        token_ids=[1] * len(versions),
        sampler_logp=[0.0] * len(versions),
        token_versions=versions,
        text="",
        finish_reason=finish,
        grade=Grade(reward=reward, correct=reward > 0.5),
    )


def group(samples, issued=0):
    prompt = Prompt(id="", text="")
    return Group(ticket=0, prompt=prompt, prompt_token_ids=[1], samples=samples, version_issued=issued)


def test_rollout_figures():
    groups = [
        group([sample(1.0, [4, 5]), sample(0.0, [5, 5, 5, 5], "length")], issued=4),
        group([sample(0.0, [5]), sample(0.0, [5])], issued=5),
        group([sample(1.0, [3, 4, 5]), sample(1.0, [5])], issued=3),
        group([sample(0.0, []), sample(0.0, [])], issued=5),
    ]
    figures = rollout_figures(groups, version=5)
    assert figures == {
        "reward/mean": 3 / 8,
        "reward/std": pytest.approx(math.sqrt(3 / 8 * 5 / 8)),
        "reward/accuracy": 3 / 8,
        "rollout/tokens": 12.0,
        "rollout/response_tokens_mean": 1.5,
        "rollout/truncated_share": 1 / 8,
        "rollout/signal_share": 1 / 4,
        # The oldest token counts: 1, 0, 2; a group without a token, from the version that it was issued at: 0.
        "rollout/staleness_mean": 3 / 4,
        "rollout/staleness_max": 2.0,
    }


def output(logp, entropy, kl, ratio, clipped, computed=None):
    return PolicyLossOutput(
        loss_sum=torch.zeros(()),
        logp=torch.tensor(logp),
        entropy=torch.tensor(entropy),
        kl=torch.tensor(kl),
        ratio=torch.tensor(ratio),
        clipped=torch.tensor(clipped),
        computed=torch.tensor(computed or [True] * len(logp)),
    )


def micro_batch(sampler_logp, weight=1.0):
    return collate([[Row([1], [2] * len(sampler_logp), sampler_logp, 1.0, weight)]], "padded")


NAN = math.nan


def totals_of(*additions):
    totals = TokenTotals()
    for addition in additions:
        totals.add(*addition)
    return TokenTotals.figures(*totals.packed())


def test_token_figures_over_two_micro_batches():
    figures = totals_of(
        (
            micro_batch([-1.0, -2.0]),
            output([-1.0, -2.5], [0.5, 1.5], [0.1, 0.3], [1.0, 0.6], [False, True]),
            True,
        ),
        (micro_batch([-3.0]), output([-2.0], [1.0], [0.2], [2.0], [True]), False),
    )
    assert figures == {
        "loss/logp": pytest.approx(-5.5 / 3),
        "loss/entropy": pytest.approx(1.0),
        "loss/kl": pytest.approx(0.2),
        "loss/ratio_mean": pytest.approx(3.6 / 3),
        "loss/ratio_max": 2.0,
        "loss/clip_share": pytest.approx(2 / 3),
        # The mismatch is that of first updates alone: differences 0 and -0.5.
        "mismatch/logp_abs_mean": pytest.approx(0.25),
        "mismatch/logp_abs_max": 0.5,
        "mismatch/kl": pytest.approx((math.exp(-0.5) - 1 + 0.5) / 2, rel=1e-5),
    }


def test_fillers_and_tokens_that_were_not_computed_count_nothing():
    counted = (micro_batch([-1.0]), output([-1.5], [0.5], [0.0], [1.25], [False]), True)
    filler = (micro_batch([-9.0], weight=0.0), output([-1.0], [9.0], [9.0], [9.0], [True]), True)
    partly = (
        micro_batch([-1.0, -1.0]),
        output([-1.5, NAN], [0.5, NAN], [0.0, NAN], [1.25, NAN], [False, False], [True, False]),
        True,
    )
    assert totals_of(counted, filler) == totals_of(counted)
    assert totals_of(partly) == totals_of(counted)


def test_a_step_without_a_token_is_all_zeros():
    assert set(totals_of().values()) == {0.0}


def test_ranks_add_up():
    """Figures from the sums over ranks are those of all tokens on one rank."""
    first = (micro_batch([-1.0, -2.0]), output([-1.2, -2.5], [0.5, 1.5], [0.0, 0.0], [0.8, 0.6], [False, True]), True)
    second = (micro_batch([-3.0]), output([-2.0], [1.0], [0.0], [2.0], [True]), True)
    ranks = []
    for addition in (first, second):
        totals = TokenTotals()
        totals.add(*addition)
        ranks.append(totals.packed())
    sums = [a + b for a, b in zip(ranks[0][0], ranks[1][0], strict=True)]
    maxima = [max(a, b) for a, b in zip(ranks[0][1], ranks[1][1], strict=True)]
    assert TokenTotals.figures(sums, maxima) == pytest.approx(totals_of(first, second))


def test_update_figures_are_means_and_count_what_was_skipped():
    results = [
        UpdateResult(outputs=[], loss=0.5, grad_norm=1.0, lr=1e-3, applied=True),
        UpdateResult(outputs=[], loss=-0.1, grad_norm=3.0, lr=2e-3, applied=False),
    ]
    assert update_figures(results) == {
        "loss/policy": pytest.approx(0.2),
        "train/grad_norm": 2.0,
        "train/lr": 2e-3,
        "train/updates": 2.0,
        "train/skipped_updates": 1.0,
    }


def test_the_error_of_an_accuracy_is_that_of_the_prompts_not_of_the_responses():
    answers = [
        [sample(1.0, [0]), sample(1.0, [0])],
        [sample(0.0, [0]), sample(1.0, [0, 0], "length")],
        [sample(0.0, [0])] * 2,
    ]
    result = summarise(answers, version=3, temperature=0.5, wall_s=2.0)
    assert result.accuracy == pytest.approx(0.5)
    assert result.standard_error == pytest.approx(statistics.stdev([1.0, 0.5, 0.0]) / math.sqrt(3))
    assert (result.num_samples, result.num_prompts, result.num_tokens, result.truncated_share) == (6, 3, 7, 1 / 6)
    assert summarise(answers[:1], version=0, temperature=1.0, wall_s=1.0).standard_error == 0.0
