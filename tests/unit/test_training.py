"""The training step with a stand-in for the updater: which rows an update has, what divides its loss, what is counted."""

import math
from types import SimpleNamespace

import pytest
import torch
from fastreason_kernels import PolicyLossOutput

from fastreason.algorithms import resolve_algorithm
from fastreason.config import parse_config
from fastreason.critic import Critic
from fastreason.errors import DataError
from fastreason.training import TrainingStep
from fastreason.types import Grade, Group, Prompt, Sample
from fastreason.update.updater import UpdateResult


class Updater:
    """Keeps what it was asked for; every log-probability is -1."""

    def __init__(self):
        self.updates, self.specs, self.num_skipped = [], [], 0

    def logprobs(self, batches, spec, temperature):
        return [torch.full_like(batch.sampler_logp_N, -7.0) for batch in batches]

    def update(self, batches, spec, temperature, denominator):
        self.updates.append((batches, denominator))
        self.specs.append(spec)
        return UpdateResult([output_of(batch) for batch in batches], 0.5, 1.0, 1e-3, True)

    def skip(self):
        self.num_skipped += 1
        return UpdateResult([], 0.0, 0.0, 2e-3, True, empty=True)


def output_of(batch):
    values = torch.zeros(len(batch.ids_N))
    flags = torch.ones(len(batch.ids_N), dtype=torch.bool)
    return PolicyLossOutput(torch.zeros(()), values - 1, values, values, values + 1, ~flags, flags)


def sample(reward, length, finish="stop"):
    return Sample(
        token_ids=list(range(1, length + 1)),
        sampler_logp=[-1.5] * length,
        token_versions=[0] * length,
        text="",
        finish_reason=finish,
        grade=Grade(reward=reward, correct=reward > 0),
    )


def group(ticket, *samples):
    prompt = Prompt(id=str(ticket), text="")
    return Group(ticket=ticket, prompt=prompt, prompt_token_ids=[50 + ticket], samples=list(samples), version_issued=0)


class Target:
    """A frozen model: the log-probability of token i is -i / 4, that of the policy -7 before an update."""

    def logprobs(self, batches, spec, temperature):
        return [-batch.ids_N / 4 for batch in batches]


def make_step(updater, *, rank=0, num_ranks=1, prompts=3, target=None, critic=None, silent=frozenset(), **sections):
    raw = {
        "model": {"path": "none"},
        "data": {"task": "chain_sum"},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 8},
        "algorithm": {"name": "reinforce"},
        "train": {"steps": 1, "prompts_per_step": prompts, "ranks": num_ranks},
    }
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys}
    config = parse_config(raw)
    ranks = SimpleNamespace(rank=rank, num=num_ranks, sum=lambda v: v, max=lambda v: v)
    return TrainingStep(config, resolve_algorithm(config), updater, ranks, "padded", 0, target, critic, silent)


def groups():
    """All right, mixed with a truncated response, all wrong: 5, 11 and 3 tokens."""
    return [
        group(0, sample(1.0, 2), sample(1.0, 3)),
        group(1, sample(1.0, 3), sample(-1.0, 8, "length")),
        group(2, sample(-1.0, 1), sample(-1.0, 2)),
    ]


def rows(updater):
    """Of each update: {(prompt, length of the response): (advantage, token weight)}, and the denominator."""
    found = []
    for batches, denominator in updater.updates:
        members = {}
        for batch in batches:
            for row in range(batch.num_rows):
                tokens = batch.sequence_N == row
                prompt = int(batch.input_ids_BL[row, 0]) - 50
                advantage = batch.advantages_N[tokens].tolist()
                advantage = advantage[0] if len(set(advantage)) == 1 else advantage
                (weight,) = set(batch.token_weight_N[tokens].tolist())
                members[prompt, int(tokens.sum())] = (advantage, weight)
        found.append((members, denominator))
    return found


def train(**sections):
    updater = Updater()
    figures = make_step(updater, **sections)(groups())
    return rows(updater), figures


ALL = {(0, 2): 1.0, (0, 3): 1.0, (1, 3): 1.0, (1, 8): -1.0, (2, 1): -1.0, (2, 2): -1.0}
# keys of the algorithm, the rows that are left of ALL, denominators of token_mean, sequence_mean and constant,
# rows masked, groups filtered
CASES = {
    "as they are": ({}, {0, 1, 2}, (19, 6, 48), 0, 0),
    "all right at zero": ({"filter": "all_right", "filtered": "zero"}, {1, 2}, (19, 6, 48), 0, 1),
    "at zero without saying so": ({"filter": "all_right"}, {1, 2}, (19, 6, 48), 0, 1),
    "all right removed": ({"filter": "all_right", "filtered": "remove"}, {1, 2}, (14, 4, 32), 0, 1),
    "all wrong removed": ({"filter": "all_wrong", "filtered": "remove"}, {0, 1}, (16, 4, 32), 0, 1),
    "both removed": ({"filter": "both", "filtered": "remove"}, {1}, (11, 2, 16), 0, 2),
    "both at zero": ({"filter": "both", "filtered": "zero"}, {1}, (19, 6, 48), 0, 2),
    "constant removed": ({"filter": "constant", "filtered": "remove"}, {1}, (11, 2, 16), 0, 2),
    "some arrive after a refill": ({"filter": "both", "filtered": "refill"}, {1}, (11, 2, 16), 0, 2),
    "masked": ({"truncated": "mask"}, {0, 1, 2}, (11, 5, 40), 1, 0),
    "masked and filtered": ({"truncated": "mask", "filter": "both", "filtered": "zero"}, {1}, (11, 5, 40), 1, 2),
}
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_and_what_divides(case, aggregation, skip):
    algorithm, prompts, denominators, masked, filtered = CASES[case]
    ((members, denominator),), figures = train(
        algorithm={**algorithm, "aggregation": aggregation}, train={"skip_zero_advantage": skip}
    )
    expected = {key: advantage for key, advantage in ALL.items() if key[0] in prompts}
    if algorithm.get("truncated") == "mask":
        del expected[1, 8]
    assert {key: advantage for key, (advantage, _) in members.items()} == expected
    for (_, length), (_, weight) in members.items():
        assert weight == pytest.approx(1 / length if aggregation == "sequence_mean" else 1.0)
    assert denominator == denominators[AGGREGATIONS.index(aggregation)]
    counts = {"train/masked_rows": masked, "train/filtered_groups": filtered, "train/empty_updates": 0}
    assert {key: figures[key] for key in counts} == counts


@pytest.mark.parametrize("term", [{"entropy_coef": 0.1}, {"kl": "k3", "kl_coef": 0.1}])
def test_filtered_groups_at_zero_keep_the_terms_beside_the_advantage(term):
    """Removed for good, or without an advantage: what moves those rows then is KL or entropy."""
    keys = {"filter": "both", "filtered": "zero", **term}
    ((members, denominator),), _ = train(algorithm=keys, target=Target())
    assert members == {key: (a if key[0] == 1 else 0.0, 1.0) for key, a in ALL.items()}
    assert denominator == 19


def test_a_masked_response_still_counts_in_the_mean_of_its_group():
    keys = {"name": "grpo", "advantage": {"std": False}, "truncated": "mask"}
    ((members, _),), _ = train(algorithm=keys, train={"skip_zero_advantage": False})
    # Rewards 1 and -1: the mean is 0 with the masked one, and would be 1 without.
    assert members[1, 3][0] == 1.0 and (1, 8) not in members


@pytest.mark.parametrize(
    ("penalty", "buffer", "expected"),
    [
        (0.5, 0, {(1, 8): -1.5}),
        # A buffer of 6 of 8 tokens: a response of 3 tokens is one sixth into it, the one of 2 tokens is not.
        (0.6, 6, {(0, 3): 1 - 0.1, (1, 3): 1 - 0.1, (1, 8): -1 - 0.6}),
    ],
)
def test_overlong_responses_are_penalised_in_the_advantage_alone(penalty, buffer, expected):
    keys = {"truncated": "penalise", "truncation_penalty": penalty, "truncation_buffer": buffer}
    ((members, denominator),), _ = train(algorithm=keys)
    assert {key: advantage for key, (advantage, _) in members.items()} == pytest.approx(ALL | expected)
    assert denominator == 19


def test_a_penalty_makes_a_signal_where_all_are_right():
    batch = [group(0, sample(1.0, 3), sample(1.0, 8, "length"))]
    keys = {"name": "grpo", "advantage": {"std": False}, "truncated": "penalise"}
    updater = Updater()
    make_step(updater, prompts=1, algorithm=keys)(batch)
    ((members, _),) = rows(updater)
    assert {key: advantage for key, (advantage, _) in members.items()} == {(0, 3): 0.5, (0, 8): -0.5}
    assert batch[0].rewards_G == [1.0, 1.0], "the reward that is logged stays as it was"


@pytest.mark.parametrize("filtered", ["zero", "remove", "refill"])
def test_an_update_without_a_row_is_skipped_and_counted(filtered):
    updater = Updater()
    keys = {"filter": "both", "filtered": filtered, "ratio_against": "trainer", "importance": "truncate"}
    step = make_step(updater, algorithm=keys, train={"prompts_per_update": 1})
    figures = step(groups())
    assert (len(updater.updates), updater.num_skipped) == (1, 2)
    assert (figures["train/empty_updates"], figures["train/updates"]) == (2.0, 3.0)
    # Means over the one update that was made; the rate is that of the last, skipped one.
    assert (figures["loss/policy"], figures["train/grad_norm"], figures["train/lr"]) == (0.5, 1.0, 2e-3)
    # It is also the first from the weights of this step: the mismatch is measured, and no recomputed logp is needed.
    assert figures["mismatch/logp_abs_mean"] == 0.5
    ((batches, _),) = updater.updates
    assert all(batch.behaviour_logp_N is None for batch in batches)


def test_a_step_without_any_row_is_all_skipped():
    updater = Updater()
    batch = [group(number, sample(1.0, 0), sample(-1.0, 8, "length")) for number in range(3)]
    figures = make_step(updater, algorithm={"truncated": "mask"})(batch)
    assert (updater.updates, updater.num_skipped) == ([], 1)
    assert figures["train/masked_rows"] == 3.0 and figures["train/tokens"] == 0.0
    assert figures["loss/policy"] == figures["mismatch/ess"] == figures["mismatch/ratio_min"] == 0.0


def test_every_rank_makes_as_many_micro_batches_or_skips():
    """One row is left for two ranks: one of them gets a filler, which counts nowhere."""
    keys = {"filter": "both", "filtered": "remove", "truncated": "mask"}
    found = []
    for rank in range(2):
        updater = Updater()
        step = make_step(updater, rank=rank, num_ranks=2, algorithm=keys, train={"prompts_per_update": 1})
        figures = step(groups())
        assert updater.num_skipped == 2
        found.append((rows(updater), figures["mismatch/weight_mean"]))
    assert found == [([({(1, 3): (1.0, 1.0)}, 3)], 1.0), ([({(1, 3): (0.0, 0.0)}, 3)], 0.0)]


def test_importance_weights_are_logged_as_the_loss_applies_them():
    """Trainer at -1 (or recomputed: -7), sampler at -1.5: e^0.5 = 1.65 a token, and a product over a sequence."""
    keys = {"ratio_against": "trainer", "importance": "truncate", "importance_cap": 4.0}
    _, figures = train(algorithm=keys)
    assert figures["mismatch/weight_mean"] == pytest.approx(1.6487, rel=1e-4)
    assert figures["mismatch/weight_capped_share"] == 0.0
    _, figures = train(algorithm={**keys, "importance_level": "sequence"})
    # e^0.5, e^1 in rows of 1 and 2 tokens; beyond are those of 3 and 8 tokens, 14 of 19.
    mean = (1 * 1.64872 + 4 * 2.71828 + 14 * 4.0) / 19
    assert figures["mismatch/weight_mean"] == pytest.approx(mean, rel=1e-4)
    assert figures["mismatch/weight_capped_share"] == pytest.approx(14 / 19)
    _, figures = train(algorithm=keys, train={"prompts_per_update": 1})
    # Several updates: the weights are of the log-probabilities from before the first.
    assert figures["mismatch/weight_mean"] == pytest.approx(0.0040868, rel=1e-4)
    # The ratio itself is measured at the first update, against what the trainer says there.
    assert figures["mismatch/ratio_mean"] == pytest.approx(1.6487, rel=1e-4)


K1 = {"kl": "k1", "kl_place": "advantage", "kl_coef": 0.1}


def token_advantages(updater):
    """{(prompt, length of the response): advantages of its tokens} of a single update."""
    ((members, _),) = rows(updater)
    return {k: a if isinstance(a, list) else [a] * k[1] for k, (a, _) in members.items()}


def gap(token):
    """log target - log policy of a token."""
    return -token / 4 + 7


def test_k1_goes_into_the_advantage_of_each_token():
    updater = Updater()
    make_step(updater, algorithm=K1, target=Target())(groups())
    for (prompt, length), found in token_advantages(updater).items():
        expected = [ALL[prompt, length] + 0.1 * gap(token) for token in range(1, length + 1)]
        assert found == pytest.approx(expected, rel=1e-5)


def test_rows_without_an_advantage_of_their_own_get_that_of_the_kl():
    updater = Updater()
    make_step(updater, algorithm={"name": "grpo", **K1}, target=Target())(groups())
    assert token_advantages(updater)[2, 2] == pytest.approx([0.1 * gap(1), 0.1 * gap(2)], rel=1e-5)


def test_a_kl_in_the_reward_is_there_before_advantages_are_made():
    updater = Updater()
    keys = {"name": "grpo", "advantage": {"std": False}, "kl": "k1", "kl_place": "reward", "kl_coef": 0.1}
    make_step(updater, algorithm=keys, target=Target())(groups())
    costs = [-0.1 * sum(gap(token) for token in range(1, length + 1)) for length in (2, 3)]
    found = token_advantages(updater)
    # Both right: without the term they would have no advantage, and no row.
    assert found[0, 2][0] == pytest.approx((costs[1] - costs[0]) / 2, rel=1e-4)
    assert found[0, 3][0] == pytest.approx((costs[0] - costs[1]) / 2, rel=1e-4)


def test_a_mask_of_right_responses_and_of_ends_that_differ():
    updater = Updater()
    keys = {**K1, "kl_mask": "wrong"}
    make_step(updater, algorithm=keys, target=Target(), silent=frozenset({2, 5}))(groups())
    found = token_advantages(updater)
    assert found[0, 3] == [1.0, 1.0, 1.0]
    expected = [-1 + (0.0 if token in (2, 5) else 0.1 * gap(token)) for token in range(1, 9)]
    assert found[1, 8] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "mean", "weight", "kept"),
    [
        ("wrong", "all", 1.0, {(1, 8), (2, 1), (2, 2)}),
        ("wrong", "kept", 19 / 11, {(1, 8), (2, 1), (2, 2)}),
        ("wrong_group", "kept", 19 / 3, {(2, 1), (2, 2)}),
    ],
)
def test_a_mask_of_a_kl_in_the_loss(mask, mean, weight, kept):
    """Which tokens it acts on, and what its coefficient becomes where it is a mean over those."""
    updater = Updater()
    keys = {"kl": "k2", "kl_coef": 0.5, "kl_mask": mask, "kl_mask_mean": mean}
    make_step(updater, algorithm=keys, target=Target())(groups())
    assert updater.specs[0].kl == "k2" and updater.specs[0].kl_coef == pytest.approx(0.5 * weight)
    acted = set()
    for batch in updater.updates[0][0]:
        for row in range(batch.num_rows):
            tokens = batch.sequence_N == row
            (weight,) = set(batch.kl_weight_N[tokens].tolist())
            if weight:
                acted.add((int(batch.input_ids_BL[row, 0]) - 50, int(tokens.sum())))
    assert acted == kept


def test_a_greedy_response_is_the_baseline():
    batch, updater = groups(), Updater()
    for group, reward in zip(batch, (1.0, -1.0, 0.5), strict=True):
        group.greedy_reward = reward
    make_step(updater, algorithm={"name": "remax"})(batch)
    assert {key: a[0] for key, a in token_advantages(updater).items()} == {
        (1, 3): 2.0,
        (2, 1): -1.5,
        (2, 2): -1.5,
    }


def test_a_greedy_response_pays_for_its_length_as_the_others_do():
    """A limit of 8 tokens with a buffer of 6: 1 for the one cut off, (5 - 2) / 6 for one of 5 tokens, nothing for 2."""
    batch, updater = groups(), Updater()
    for group, length, cut in zip(batch, (5, 8, 2), (False, True, False), strict=True):
        group.greedy_reward, group.greedy_num_tokens, group.greedy_truncated = 0.5, length, cut
    keys = {"name": "remax", "truncated": "penalise", "truncation_penalty": 0.6, "truncation_buffer": 6}
    make_step(updater, algorithm=keys)(batch)
    assert {key: a[0] for key, a in token_advantages(updater).items()} == pytest.approx(
        {
            (0, 2): 1.0 - (0.5 - 0.3),
            (0, 3): 1.0 - 0.1 - (0.5 - 0.3),
            (1, 3): 1.0 - 0.1 - (0.5 - 0.6),
            (1, 8): -1.0 - 0.6 - (0.5 - 0.6),
            (2, 1): -1.0 - 0.5,
            (2, 2): -1.0 - 0.5,
        }
    )
    batch[1].greedy_num_tokens = None
    with pytest.raises(DataError, match=r"groups \[1\] have no greedy response, or not its length"):
        make_step(updater, algorithm=keys)(batch)


def test_groups_without_what_the_algorithm_compares_with_are_refused():
    with pytest.raises(DataError, match=r"\[0, 1, 2\] have no greedy response, .*which algorithm\.name=remax"):
        make_step(Updater(), algorithm={"name": "remax"})(groups())
    teacher = {"path": "t", "where": "server", "url": "http://t"}
    with pytest.raises(DataError, match="hold no log-probabilities of a teacher"):
        make_step(Updater(), algorithm={"name": "kdrl"}, teacher=teacher)(groups())


@pytest.mark.parametrize("rank", [0, 1])
def test_one_group_without_a_teachers_scores_is_refused_on_every_rank(rank):
    batch = groups()
    for each in batch[:2]:
        for sample in each.samples:
            sample.teacher_logp = [-1.0] * len(sample.token_ids)
    teacher = {"path": "t", "where": "server", "url": "http://t"}
    step = make_step(Updater(), rank=rank, num_ranks=2, algorithm={"name": "kdrl"}, teacher=teacher)
    with pytest.raises(DataError, match=r"groups \[2\] hold no log-probabilities of a teacher"):
        step(batch)


def test_a_servers_log_probabilities_come_with_the_groups():
    batch, updater = groups(), Updater()
    for each in batch:
        for sample in each.samples:
            sample.teacher_logp = [-token / 4 for token in sample.token_ids]
    teacher = {"path": "t", "where": "server", "url": "http://t"}
    figures = make_step(updater, algorithm={"name": "kdrl"}, teacher=teacher)(batch)
    for each in updater.updates[0][0]:
        assert torch.equal(each.ref_logp_N, -each.ids_N / 4)
    # The policy's is -1 at an update: r = 1 - token / 4.
    tokens = [token for each in batch for sample in each.samples for token in sample.token_ids]
    assert figures["kl/teacher_k1"] == pytest.approx(-sum(1 - token / 4 for token in tokens) / 19)
    assert figures["kl/coef"] == 2e-3


def test_pairs_are_divided_by_their_number_at_the_weights_of_the_update():
    """Group 1 is the only one with a better and a worse response; the policy says -7 a token, the reference -i / 4."""
    updater = Updater()
    step = make_step(updater, algorithm={"name": "iterative_dpo"}, target=Target())
    figures = step(groups())
    margin = 0.1 * (sum(-gap(token) for token in (1, 2, 3)) - sum(-gap(token) for token in range(1, 9)))
    weight = 0.1 / (1 + math.exp(margin))
    ((members, denominator),) = rows(updater)
    assert denominator == 1.0
    assert {k: a for k, (a, _) in members.items() if a} == pytest.approx({(1, 3): weight, (1, 8): -weight}, rel=1e-4)
    assert figures["pairs/num"] == 1.0 and figures["pairs/margin"] == pytest.approx(margin, rel=1e-4)


def test_updates_without_a_pair_are_skipped():
    updater = Updater()
    train_keys = {"prompts_per_update": 1}
    step = make_step(updater, algorithm={"name": "iterative_dpo"}, target=Target(), train=train_keys)
    step(groups())
    assert (len(updater.updates), updater.num_skipped) == (1, 2)


def test_a_step_without_a_pair_still_says_so():
    updater, target = Updater(), Target()
    batch = [group(0, sample(1.0, 2), sample(1.0, 3)), group(1, sample(-1.0, 3), sample(1.0, 8, "length"))]
    keys = {"name": "iterative_dpo", "truncated": "mask"}
    figures = make_step(updater, prompts=2, algorithm=keys, target=target)(batch)
    assert (len(updater.updates), updater.num_skipped) == (0, 1)
    assert (figures["pairs/num"], figures["pairs/loss"], figures["train/tokens_computed"]) == (0.0, 0.0, 0.0)
    assert figures["train/tokens"] == 3 + 4 + 4


def test_knowledge_distillation_alone_has_no_advantage():
    updater = Updater()
    teacher = {"path": "t"}
    make_step(updater, algorithm={"name": "kd_rkl"}, teacher=teacher, target=Target())(groups())
    assert {a for row in token_advantages(updater).values() for a in row} == {0.0}
    assert len(token_advantages(updater)) == 6
    assert (updater.specs[0].kl_coef, updater.specs[0].kl_weight) == (1.0, "ratio")


def test_coefficients_adapt_to_what_was_measured():
    """The policy says -1, the target -i / 4; the entropy is 0. Both goals are missed."""
    keys = {"kl": "k3", "kl_coef": 0.5, "kl_schedule": "adaptive", "kl_goal": 0.01, "kl_horizon": 60}
    keys |= {"entropy_coef": 0.01, "entropy_goal": 0.3, "entropy_step": 0.004}
    updater = Updater()
    step = make_step(updater, algorithm=keys, target=Target())
    first, second = step(groups(), 0), step(groups(), 1)
    assert (first["kl/coef"], first["loss/entropy_coef"]) == (0.5, 0.01)
    # Far above the goal: an error of 0.2 over 6 of 60 responses.
    assert second["kl/coef"] == pytest.approx(0.5 * 1.02) and second["loss/entropy_coef"] == pytest.approx(0.014)
    assert [spec.kl_coef for spec in updater.specs] == pytest.approx([0.5, 0.51])
    assert [spec.entropy_coef for spec in updater.specs] == pytest.approx([0.01, 0.014])


def test_a_coefficient_rests_where_its_term_acted_on_nothing():
    """All responses are right, and the term acts on wrong ones: that is no KL of 0."""
    keys = {"kl": "exact", "kl_coef": 0.5, "kl_schedule": "adaptive", "kl_goal": 0.01, "kl_horizon": 60}
    batch = [group(0, sample(1.0, 2), sample(1.0, 3))]
    step = make_step(Updater(), prompts=1, algorithm={**keys, "kl_mask": "wrong"}, target=Target())
    assert [step(batch, number)["kl/coef"] for number in range(2)] == [0.5, 0.5]
    measured = make_step(Updater(), prompts=1, algorithm=keys, target=Target())
    assert [measured(batch, number)["kl/coef"] for number in range(2)] == pytest.approx([0.5, 0.5 * (1 - 0.2 * 2 / 60)])


@pytest.mark.parametrize(("silent", "error"), [(frozenset(), 0.2), (frozenset({1, 2, 3}), -0.2)])
def test_a_coefficient_adapts_to_the_tokens_that_its_term_acts_on(silent, error):
    """Policy and target agree on the fourth token alone: where the others are silent, the KL is 0, below its goal."""
    keys = {"kl": "k3", "kl_coef": 0.5, "kl_schedule": "adaptive", "kl_goal": 0.01, "kl_horizon": 60}
    batch = [group(0, sample(1.0, 4), sample(-1.0, 4))]
    step = make_step(Updater(), prompts=1, algorithm=keys, target=Target(), silent=silent)
    first, second = step(batch, 0), step(batch, 1)
    assert (first["kl/reference"] == 0.0) is bool(silent)
    assert second["kl/coef"] == pytest.approx(0.5 * (1 + error * 2 / 60))


class Values:
    """A critic that says 0.25 everywhere before the step, and keeps what it is to learn."""

    def __init__(self):
        self.fitted = []

    def values(self, batches):
        return [torch.full_like(batch.sampler_logp_N, 0.25) for batch in batches]

    def fit(self, batches, loss, denominator):
        self.fitted.append((batches, denominator))
        return UpdateResult([], 0.75, 2.0, 1e-5, True)


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_critic_gives_each_token_its_advantage(warmup):
    updater, values = Updater(), Values()
    critic = Critic(values, warmup_steps=warmup)
    step = make_step(updater, algorithm={"name": "ppo", "advantage": {"whiten": False}}, critic=critic)
    figures = [step(groups(), number) for number in range(2)]
    assert (len(updater.updates), updater.num_skipped) == (2 - warmup, warmup)
    assert len(values.fitted) == 2 and values.fitted[0][1] == 19.0
    found = [a for batches, _ in updater.updates for batch in batches for a in batch.advantages_N.tolist()]
    # gamma = lambda = 1: the reward less the value, at every token.
    assert sorted(set(found)) == [-1.25, 0.75]
    assert figures[1]["critic/loss"] == 0.75 and figures[1]["critic/value_mean"] == pytest.approx(0.25)
    assert figures[1]["critic/explained_variance"] == pytest.approx(0.0)


def test_advantages_of_a_critic_are_whitened_over_what_is_trained():
    """The group that is all right has no advantage and does not count: 3 tokens of 0.75 and 11 of -1.25 are left."""
    updater, values = Updater(), Values()
    keys = {"name": "ppo", "filter": "all_right", "filtered": "zero", "entropy_coef": 0.1}
    make_step(updater, algorithm=keys, critic=Critic(values))(groups())
    mean = (3 * 0.75 - 11 * 1.25) / 14
    deviation = math.sqrt((3 * (0.75 - mean) ** 2 + 11 * (-1.25 - mean) ** 2) / 13)
    found = {key: a[0] for key, a in token_advantages(updater).items()}
    good, bad = (0.75 - mean) / deviation, (-1.25 - mean) / deviation
    expected = {(0, 2): 0.0, (0, 3): 0.0, (1, 3): good, (1, 8): bad, (2, 1): bad, (2, 2): bad}
    assert found == pytest.approx(expected, rel=1e-5)
    returns = {value for batch in values.fitted[0][0] for value in batch.returns_N.tolist()}
    assert returns == {1.0, -1.0}, "what the critic learns is not whitened"
