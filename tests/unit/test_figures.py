"""The figures of a step by hand: from groups, and from the token statistics of micro-batches."""

import math
import statistics

import pytest
import torch
from fastreason_kernels import PolicyLossOutput, PolicyLossSpec

from fastreason.advantages import Pairs
from fastreason.figures import TokenTotals, effective_share, pair_figures, rollout_figures
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
    figures = rollout_figures(groups, version=5, max_staleness=3)
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
        "staleness/share_0": 1 / 2,
        "staleness/share_1": 1 / 4,
        "staleness/share_2": 1 / 4,
        "staleness/share_3": 0.0,
        "staleness/tokens_mean": pytest.approx((1 + 2 + 1) / 12),
    }
    shares = {key for key in rollout_figures(groups, version=5) if "share_" in key}
    assert shares == {"staleness/share_0", "staleness/share_1", "staleness/share_2"}


def test_staleness_beyond_the_bound_counts_at_the_ends():
    """Groups replayed from a folder know no bound: the keys stay those of a run."""
    groups = [group([sample(0.0, [version])], issued=version) for version in (0, 4, 9)]
    figures = rollout_figures(groups, version=5, max_staleness=1)
    shares = {key: value for key, value in figures.items() if key.startswith("staleness/share")}
    assert shares == {"staleness/share_0": pytest.approx(1 / 3), "staleness/share_1": pytest.approx(2 / 3)}
    assert figures["rollout/staleness_max"] == 5.0


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


def totals_of(*additions, spec=PolicyLossSpec()):  # noqa: B008
    totals = TokenTotals(spec)
    for addition in additions:
        totals.add(*addition)
    return totals.figures(*totals.packed())


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
        "mismatch/ratio_mean": pytest.approx((1 + math.exp(-0.5)) / 2),
        "mismatch/ratio_min": pytest.approx(math.exp(-0.5)),
        "mismatch/ratio_max": 1.0,
        "mismatch/ess": pytest.approx((1 + math.exp(-0.5)) ** 2 / (2 * (1 + math.exp(-1)))),
        "mismatch/sequence_ess": 1.0,  # of a single one
        "mismatch/weight_mean": 1.0,
        "mismatch/weight_capped_share": 0.0,
    }


def test_effective_sample_size_of_tokens_and_of_sequences():
    """Three sequences in two micro-batches: log-ratios (0.2, 0.3), (-0.4), (30)."""
    units = [[Row([1], [2, 2], [-1.2, -1.3], 1.0)], [Row([1], [2], [-0.6], 1.0)]]
    first = collate(units, "padded")
    figures = totals_of(
        (first, output([-1.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3, [False] * 3), True),
        (micro_batch([-31.0]), output([-1.0], [0.0], [0.0], [1.0], [False]), True),
    )
    bound = math.exp(20)
    tokens = [math.exp(0.2), math.exp(0.3), math.exp(-0.4), bound]
    sequences = [math.exp(0.5), math.exp(-0.4), bound]
    for key, weights in (("ess", tokens), ("sequence_ess", sequences)):
        expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
        assert figures[f"mismatch/{key}"] == pytest.approx(expected, rel=1e-5)
    assert figures["mismatch/ratio_max"] == pytest.approx(bound, rel=1e-5)
    assert figures["mismatch/ratio_min"] == pytest.approx(math.exp(-0.4), rel=1e-5)
    assert figures["mismatch/logp_abs_max"] == 30.0


def test_ratios_beyond_the_bound_weigh_the_same():
    off = [(micro_batch([logp]), output([-1.0], [0.0], [0.0], [1.0], [False]), True) for logp in (-26.0, -31.0)]
    figures = totals_of(*off)
    assert figures["mismatch/ess"] == figures["mismatch/sequence_ess"] == 1.0


@pytest.mark.parametrize(
    ("weights", "share"), [([2.0, 2.0, 2.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([3.0, 1.0], 0.8), ([], 0.0)]
)
def test_effective_share_by_hand(weights, share):
    assert effective_share(len(weights), sum(weights), sum(w * w for w in weights)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("spec", "mean", "capped"),
    [
        ({"importance": "truncate", "importance_cap": 1.2}, (1.2 + 1.2 + math.exp(-0.4)) / 3, 2 / 3),
        ({"importance": "mask", "importance_cap": 1.3}, (math.exp(0.2) + math.exp(-0.4)) / 3, 1 / 3),
        ({"importance": "mask", "importance_floor": 0.9}, (math.exp(0.2) + math.exp(0.3)) / 3, 1 / 3),
        ({"importance": "truncate", "importance_level": "sequence"}, (2 * math.exp(0.5) + math.exp(-0.4)) / 3, 0.0),
        (
            {"importance": "mask", "importance_level": "geometric", "importance_cap": 1.28},
            math.exp(-0.4) / 3,
            2 / 3,
        ),
    ],
)
@pytest.mark.parametrize("first_update", [True, False])
def test_what_the_correction_did(spec, mean, capped, first_update):
    """At every update, by the log-probabilities that the loss takes: the recomputed ones where there are such."""
    batch = collate([[Row([1], [2, 2], [-1.2, -1.3], 1.0)], [Row([1], [2], [-0.6], 1.0)]], "padded")
    off = output([-1.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3, [False] * 3)
    if not first_update:
        batch.behaviour_logp_N = off.logp
        off = off._replace(logp=off.logp - 5)
    figures = totals_of((batch, off, first_update), spec=PolicyLossSpec(**spec))
    assert figures["mismatch/weight_mean"] == pytest.approx(mean, rel=1e-5)
    assert figures["mismatch/weight_capped_share"] == pytest.approx(capped)


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


def test_the_distance_to_another_model():
    """r = ref - logp is 0.5 and -0.5 in the first micro-batch, 1 in the second; a filler and tokens not computed are out."""
    first, second, filler = micro_batch([-1.0, -2.0]), micro_batch([-3.0]), micro_batch([-9.0], weight=0.0)
    first.ref_logp_N, second.ref_logp_N = torch.tensor([-0.5, -3.0]), torch.tensor([-1.0])
    filler.ref_logp_N = torch.tensor([0.0])
    totals = TokenTotals(PolicyLossSpec(), "teacher")
    totals.add(first, output([-1.0, -2.5], [0.0] * 2, [0.0] * 2, [1.0] * 2, [False] * 2), True)
    totals.add(second, output([-2.0], [0.0], [0.0], [1.0], [False]), False)
    totals.add(filler, output([-1.0], [0.0], [0.0], [1.0], [False]), False)
    figures = totals.figures(*totals.packed())
    r = [0.5, -0.5, 1.0]
    assert figures["kl/teacher"] == pytest.approx(sum(math.exp(x) - 1 - x for x in r) / 3, rel=1e-5)
    assert figures["kl/teacher_k1"] == pytest.approx(-sum(r) / 3, rel=1e-5)
    assert not any(key.startswith("kl/") for key in totals_of())


def test_the_distance_is_over_the_tokens_that_the_term_acts_on():
    """The second token is silent, a response end of the policy alone, that the teacher would never write; r is 0.5 and 1."""
    batch = micro_batch([-1.0, -1.0, -1.0])
    batch.ref_logp_N, batch.kl_weight_N = torch.tensor([-0.5, -60.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    made = output([-1.0] * 3, [0.0] * 3, [0.125, 0.0, 0.5], [1.0] * 3, [False] * 3)
    totals = TokenTotals(PolicyLossSpec(), "teacher")
    totals.add(batch, made, True)
    figures = totals.figures(*totals.packed())
    assert figures["kl/teacher"] == pytest.approx((math.exp(0.5) - 1.5 + math.e - 2) / 2, rel=1e-5)
    assert figures["kl/teacher_k1"] == pytest.approx(-0.75)
    # Where it acts on none there is no distance, rather than one of 0.
    batch.kl_weight_N = torch.zeros(3)
    totals = TokenTotals(PolicyLossSpec(), "teacher")
    totals.add(batch, made, True)
    assert not any(key.startswith("kl/") for key in totals.figures(*totals.packed()))


def test_an_exact_divergence_is_its_own_distance():
    """A mean over the tokens that the term acts on: here the first and the third."""
    batch = micro_batch([-1.0, -1.0, -1.0])
    batch.divergence, batch.kl_weight_N = object(), torch.tensor([1.0, 0.0, 1.0])
    totals = TokenTotals(PolicyLossSpec())
    totals.add(batch, output([-1.0] * 3, [0.0] * 3, [0.25, 0.0, 0.5], [1.0] * 3, [False] * 3), True)
    assert totals.figures(*totals.packed())["kl/reference"] == pytest.approx(0.375)


def test_pairs_are_averaged_over_all_of_a_step():
    none = torch.zeros(1, 2)
    figures = pair_figures(
        [Pairs(none, 3, 0.5, 1.0, 0.2), Pairs(none, 1, 0.9, 0.0, -0.2), Pairs(none, 0, 0.0, 0.0, 0.0)]
    )
    assert figures == pytest.approx({"pairs/num": 4.0, "pairs/loss": 0.6, "pairs/accuracy": 0.75, "pairs/margin": 0.1})


def test_a_step_without_a_token_is_all_zeros():
    assert set(totals_of().values()) == {0.0}


def test_ranks_add_up():
    """Figures from the sums over ranks are those of all tokens on one rank."""
    first = (micro_batch([-1.0, -2.0]), output([-1.2, -2.5], [0.5, 1.5], [0.0, 0.0], [0.8, 0.6], [False, True]), True)
    second = (micro_batch([-3.0]), output([-2.0], [1.0], [0.0], [2.0], [True]), True)
    ranks = []
    for addition in (first, second):
        totals = TokenTotals(PolicyLossSpec())
        totals.add(*addition)
        ranks.append(totals.packed())
    sums = [a + b for a, b in zip(ranks[0][0], ranks[1][0], strict=True)]
    maxima = [max(a, b) for a, b in zip(ranks[0][1], ranks[1][1], strict=True)]
    assert totals.figures(sums, maxima) == pytest.approx(totals_of(first, second))


def test_update_figures_are_means_and_count_what_was_skipped():
    results = [
        UpdateResult(outputs=[], loss=0.5, grad_norm=1.0, lr=1e-3, applied=True),
        UpdateResult(outputs=[], loss=-0.1, grad_norm=3.0, lr=2e-3, applied=False),
        UpdateResult(outputs=[], loss=0.0, grad_norm=0.0, lr=4e-3, applied=True, empty=True),
    ]
    assert update_figures(results) == {
        "loss/policy": pytest.approx(0.2),
        "train/grad_norm": 2.0,
        "train/lr": 4e-3,
        "train/updates": 3.0,
        "train/skipped_updates": 1.0,
        "train/empty_updates": 1.0,
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
