"""From groups to tensors: index arithmetic by hand, and one loss whatever the layout, the budget and the rank count."""

import math
from types import SimpleNamespace

import pytest
import torch
from fastreason_kernels import PolicyLossSpec
from transformers import LlamaConfig, LlamaForCausalLM

from fastreason.kl import CoefficientState, KlTerm
from fastreason.loop import rank_wait_s
from fastreason.packing import (
    Row,
    collate,
    loss_denominator,
    micro_batches_of,
    plan_micro_batches,
    rows_of,
    split_balanced,
    unit_length,
    units_of,
)
from fastreason.policy import Policy
from fastreason.ranks import Ranks, imbalance
from fastreason.training import TrainingStep
from fastreason.types import Grade, Group, Prompt, Sample

CLIP = PolicyLossSpec(clip_low=0.2, clip_high=0.2)
TEMPERATURE = 0.7


def row(prompt, response, advantage=1.0, weight=1.0, logp=-1.0):
    return Row(list(prompt), list(response), [logp - 0.1 * i for i in range(len(response))], advantage, weight)


# Two prompts: one with responses of 2 and 3 tokens, one with a response of 1.
FIRST = [row([10, 11, 12], [20, 21], 0.5), row([10, 11, 12], [30, 31, 32], -0.5)]
SECOND = [row([40, 41], [50], 2.0)]


def group(prompt, responses):
    samples = [
        Sample(
            token_ids=response,
            sampler_logp=[-0.5] * len(response),
            token_versions=[0] * len(response),
            text="",
            finish_reason="stop",
            grade=Grade(reward=0.0, correct=False),
        )
        for response in responses
    ]
    return Group(ticket=0, prompt=Prompt(id="p", text="p"), prompt_token_ids=prompt, samples=samples, version_issued=0)


def test_rows_follow_the_groups_and_skip_what_has_no_token():
    groups = [group([1, 2], [[3], []]), group([4], [[5, 6], [7, 8, 9, 10]])]
    rows = rows_of(groups, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "token_mean")
    assert [(r.prompt, r.response, r.advantage, r.token_weight) for r in rows] == [
        ([1, 2], [3], 1.0, 1.0),
        ([4], [5, 6], 3.0, 1.0),
        ([4], [7, 8, 9, 10], 4.0, 1.0),
    ]
    assert [len(r) for r in rows] == [3, 3, 5]
    by_sequence = rows_of(groups, torch.ones(2, 2), "sequence_mean")
    assert [r.token_weight for r in by_sequence] == [1.0, 0.5, 0.25]
    halved = rows_of(groups, torch.ones(2, 2), "sequence_mean", weight=0.5)
    assert [r.token_weight for r in halved] == [0.5, 0.25, 0.125]


def test_rows_without_what_was_cut_off():
    groups = [group([4], [[5, 6], [7, 8, 9, 10]])]
    groups[0].samples[1].finish_reason = "length"
    advantages = torch.tensor([[3.0, 4.0]])
    assert [r.response for r in rows_of(groups, advantages, "token_mean")] == [[5, 6], [7, 8, 9, 10]]
    (row,) = rows_of(groups, advantages, "token_mean", with_truncated=False)
    assert (row.response, row.advantage) == ([5, 6], 3.0)


@pytest.mark.parametrize(("aggregation", "count"), [("token_mean", 12), ("sequence_mean", 3), ("constant", 48)])
def test_the_denominator_is_what_the_aggregation_says(aggregation, count):
    assert loss_denominator(12, 3, 16, aggregation) == count
    assert loss_denominator(0, 0, 16, aggregation) == 1.0


def test_only_the_shared_layout_puts_neighbours_of_one_prompt_together():
    rows = [*FIRST, *SECOND, FIRST[0]]
    assert units_of(rows, "shared") == [FIRST, SECOND, [FIRST[0]]]
    assert units_of(rows, "padded") == units_of(rows, "packed") == [[r] for r in rows]
    assert [unit_length(unit) for unit in units_of(rows, "shared")] == [8, 3, 5]


def test_padded_units_stand_in_lines_of_their_own():
    batch = collate(units_of([*FIRST, *SECOND], "padded"), "padded", pad_token_id=9)
    assert batch.input_ids_BL.tolist() == [[10, 11, 12, 20, 21, 9], [10, 11, 12, 30, 31, 32], [40, 41, 50, 9, 9, 9]]
    assert batch.position_ids_BL.tolist() == [list(range(6))] * 3
    assert batch.mask_B1LL is None
    assert batch.head_index_N.tolist() == [2, 3, 8, 9, 10, 13]
    check_columns(batch)
    assert batch.num_tokens == 14


def test_packed_units_stand_one_after_another_with_positions_from_zero():
    batch = collate(units_of([*FIRST, *SECOND], "packed"), "packed", pad_token_id=9)
    assert batch.input_ids_BL.tolist() == [[10, 11, 12, 20, 21, 10, 11, 12, 30, 31, 32, 40, 41, 50]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert batch.mask_B1LL is None
    assert batch.head_index_N.tolist() == [2, 3, 7, 8, 9, 12]
    check_columns(batch)
    assert batch.num_tokens == 14


def test_shared_units_hold_a_prompt_once_and_hide_responses_from_each_other():
    batch = collate(units_of([*FIRST, *SECOND], "shared"), "shared", pad_token_id=9)
    assert batch.input_ids_BL.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32], [40, 41, 50, 9, 9, 9, 9, 9]]
    assert batch.position_ids_BL[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert batch.position_ids_BL[1, :3].tolist() == [0, 1, 2]
    # Both responses begin from the prompt's last token, at 2 in the first line and at 8 + 1 in the second.
    assert batch.head_index_N.tolist() == [2, 3, 2, 5, 6, 9]
    check_columns(batch)
    assert batch.num_tokens == 11
    assert batch.mask_B1LL.shape == (2, 1, 8, 8)
    seen = [["".join("x" if look else "." for look in query) for query in line[0].tolist()] for line in batch.mask_B1LL]
    assert seen[0] == [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xxxxx...",
        "xxx..x..",
        "xxx..xx.",
        "xxx..xxx",
    ]
    assert seen[1][:3] == ["x.......", "xx......", "xxx....."]
    assert all("x" in query for query in seen[1]), "a query that sees nothing gives NaN"


def check_columns(batch):
    """What every layout has in common for FIRST and SECOND."""
    assert batch.ids_N.tolist() == [20, 21, 30, 31, 32, 50]
    assert batch.sequence_N.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.advantages_N.tolist() == [0.5, 0.5, -0.5, -0.5, -0.5, 2.0]
    assert batch.token_weight_N.tolist() == [1.0] * 6
    torch.testing.assert_close(batch.sampler_logp_N, torch.tensor([-1.0, -1.1, -1.0, -1.1, -1.2, -1.0]))
    assert batch.num_rows == 3


def test_shares_are_balanced_and_complete():
    lengths = [5, 9, 3, 7, 1, 5]
    shares = split_balanced(lengths, 2)
    # 9 | 7; 5 to the 7; 5 to the 9; 3 to the 12; 1 to the 14
    assert shares == [[1, 5, 4], [3, 0, 2]]
    assert split_balanced(lengths, 1) == [[1, 3, 0, 5, 2, 4]]
    assert split_balanced([4], 3) == [[0], [], []]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("budget", [1, 7, 16, 40, 1000])
def test_micro_batches_keep_to_the_budget_and_leave_nothing_out(layout, budget):
    lengths = [5, 9, 3, 7, 1, 5, 16, 2, 2]
    plans = plan_micro_batches(lengths, budget, layout)
    assert sorted(index for plan in plans for index in plan) == list(range(len(lengths)))
    for plan in plans:
        longest = max(lengths[index] for index in plan)
        cost = sum(lengths[i] for i in plan) if layout == "packed" else len(plan) * longest
        assert cost <= budget or len(plan) == 1


def test_the_budget_is_used():
    assert plan_micro_batches([8, 2, 2, 4], 8, "packed") == [[0], [3, 1, 2]]
    assert plan_micro_batches([8, 2, 2, 4], 8, "padded") == [[0], [3, 1], [2]]
    assert plan_micro_batches([3, 3, 3], 9, "shared") == [[0, 1, 2]]


# The same loss from every layout, budget and number of ranks, against whole logits in fp64.


def tiny_model(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).train()


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def any_policy(request):
    return Policy(tiny_model(request.param))


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model("sdpa"))


@pytest.fixture(scope="module")
def reference_model():
    return tiny_model("eager").double()


def batch_of_rows(num_prompts=3, num_samples=3, zero_every=0):
    """Rows with random tokens and advantages; every `zero_every`-th advantage is 0."""
    generator = torch.Generator().manual_seed(5)

    def tokens(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 97, (size,), generator=generator).tolist()

    rows = []
    for _ in range(num_prompts):
        prompt = tokens(3, 8)
        for _ in range(num_samples):
            response = tokens(1, 9)
            logp = (-3 - torch.rand(len(response), generator=generator)).tolist()
            advantage = float(torch.randn(1, generator=generator))
            if zero_every and len(rows) % zero_every == 0:
                advantage = 0.0
            rows.append(Row(prompt, response, logp, advantage, 1.0 / len(response)))
    return rows


def train(policy, batches, spec=CLIP):
    """(loss sum, gradients) of one update's micro-batches."""
    policy.zero_grad()
    total = 0.0
    for batch in batches:
        batch.behaviour_logp_N = batch.sampler_logp_N
        output = policy(batch, spec, TEMPERATURE)
        output.loss_sum.backward()
        total += float(output.loss_sum.detach())
    return total, {name: p.grad.clone() for name, p in policy.model.named_parameters()}


def micro_batches(rows, layout, budget):
    units = units_of(rows, layout)
    plans = plan_micro_batches([unit_length(unit) for unit in units], budget, layout)
    return [collate([units[i] for i in plan], layout) for plan in plans]


def reference(twin, rows):
    """The clipped loss row by row from whole logits: no packing, no fused head, no clipping shared with the code."""
    twin.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for r in rows:
        ids = torch.tensor([r.prompt + r.response])
        logp_TV = (twin(ids).logits[0] / TEMPERATURE).log_softmax(-1)
        for i, token in enumerate(r.response):
            ratio = (logp_TV[len(r.prompt) - 1 + i, token] - r.sampler_logp[i]).exp()
            gated = torch.minimum(ratio * r.advantage, ratio.clamp(0.8, 1.2) * r.advantage)
            total = total - r.token_weight * gated
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in twin.named_parameters()}


def assert_same(result, expected, rtol=2e-5):
    loss, gradients = result
    assert loss == pytest.approx(expected[0], rel=rtol)
    wanted = {k.removeprefix("model.") if k not in gradients else k: v for k, v in expected[1].items()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        error = (gradient.double() - wanted[name].double()).norm() / wanted[name].double().norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(any_policy, reference_model, layout, budget):
    rows = batch_of_rows()
    # Without a mask transformers reads from the position ids where a packed row begins, as flash-attn does.
    assert_same(train(any_policy, micro_batches(rows, layout, budget)), reference(reference_model, rows))


def test_the_reference_notices_a_leak_between_responses(policy, reference_model):
    rows = batch_of_rows()
    batches = micro_batches(rows, "shared", 1000)
    for batch in batches:
        batch.mask_B1LL |= torch.ones_like(batch.mask_B1LL).tril()
    with pytest.raises(AssertionError):
        assert_same(train(policy, batches), reference(reference_model, rows))


def step_for(layout, rank, num_ranks, budget=30, skip=True, zero_is_zero=True):
    """A TrainingStep with no more than `micro_batches` uses."""
    train_config = SimpleNamespace(skip_zero_advantage=skip, micro_batch_tokens=budget)
    return TrainingStep(
        config=SimpleNamespace(train=train_config),
        algorithm=SimpleNamespace(
            zero_advantage_is_zero_gradient=zero_is_zero,
            initial_state=CoefficientState,
            critic=False,
            pairs=False,
            kl=KlTerm(),
        ),
        updater=None,
        ranks=SimpleNamespace(rank=rank, num=num_ranks),
        layout=layout,
        pad_token_id=0,
    )


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_leaving_out_rows_without_gradient_changes_nothing(policy, layout):
    rows = batch_of_rows(num_prompts=4, num_samples=4, zero_every=2)
    whole = step_for(layout, 0, 1, skip=False).micro_batches(rows)
    fewer = step_for(layout, 0, 1, skip=True).micro_batches(rows)
    assert sum(batch.num_rows for batch in whole) == 16
    assert sum(batch.num_rows for batch in fewer) == 8
    assert_same(train(policy, fewer), train(policy, whole))


def test_rows_without_advantage_stay_where_another_term_moves_them():
    rows = batch_of_rows(zero_every=2)
    kept = step_for("padded", 0, 1, zero_is_zero=False).micro_batches(rows)
    assert sum(batch.num_rows for batch in kept) == len(rows)


def test_one_row_stays_where_no_row_has_a_gradient(policy):
    rows = batch_of_rows(zero_every=1)
    (batch,) = step_for("shared", 0, 1).micro_batches(rows)
    assert batch.num_rows == 1
    loss, gradients = train(policy, [batch])
    assert loss == 0.0
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_the_ranks_together_give_the_loss_of_one(policy, layout, num_ranks):
    rows = batch_of_rows()
    alone = train(policy, step_for(layout, 0, 1).micro_batches(rows))
    shares = [step_for(layout, rank, num_ranks).micro_batches(rows) for rank in range(num_ranks)]
    assert len({len(share) for share in shares}) == 1, "ZeRO's collectives need equally many micro-batches"
    results = [train(policy, share) for share in shares]
    together = {name: sum(gradients[name] for _, gradients in results) for name in alone[1]}
    assert_same((math.fsum(loss for loss, _ in results), together), alone)


def test_a_filler_contributes_exactly_nothing(policy):
    rows = batch_of_rows(num_prompts=1, num_samples=1)
    (filler,) = step_for("padded", 1, 2).micro_batches(rows)
    assert filler.num_rows == 1 and not filler.token_weight_N.any()
    for spec in (CLIP, PolicyLossSpec(entropy_coef=0.1)):
        loss, gradients = train(policy, [filler], spec)
        assert loss == 0.0
        assert all(not gradient.any() for gradient in gradients.values())


# Balance


def lone_rows(lengths):
    return [
        Row([1], [2] * (length - 1), [0.0] * (length - 1), 1.0, index=number) for number, length in enumerate(lengths)
    ]


def shares_of(lengths, attention_tokens, num_ranks=2):
    """For each rank: the rows' lengths, the cost, and the fillers' tokens."""
    found = []
    for rank in range(num_ranks):
        batches = micro_batches_of(lone_rows(lengths), "padded", 1, rank, num_ranks, attention_tokens=attention_tokens)
        real = [batch.num_tokens for batch in batches if not batch.is_filler]
        found.append((sorted(real), sum(b.cost for b in batches), [b.num_tokens for b in batches if b.is_filler]))
    return found


def test_ranks_are_balanced_by_what_attention_costs_too():
    """Lines of 40, 20, 20, 10, 10 tokens are halves of 50; where a line of 40 costs twice its tokens, it is alone."""
    by_tokens = shares_of([40, 20, 20, 10, 10], math.inf)
    assert by_tokens == [([10, 40], 50.0, [10]), ([10, 20, 20], 50.0, [])]
    # 40 -> 80, 20 -> 30, 10 -> 12.5
    assert shares_of([40, 20, 20, 10, 10], 40.0) == [([40], 80.0, [10, 10, 10]), ([10, 10, 20, 20], 85.0, [])]


class OneOf(Ranks):
    """A rank of several whose costs are known."""

    def __init__(self, costs):
        super().__init__()
        self.costs, self.num = costs, len(costs)

    def sum(self, values):
        return [sum(self.costs)]

    def max(self, values):
        return [max(self.costs)]


def test_imbalance_is_the_slowest_rank_s_cost_over_the_mean():
    assert imbalance(OneOf([80.0, 85.0]), 80.0) == pytest.approx(85 / 82.5)
    assert imbalance(OneOf([30.0, 0.0, 0.0]), 0.0) == 3
    assert imbalance(OneOf([0.0, 0.0]), 0.0) == 1
    assert imbalance(Ranks(), 7.0) == 1
    assert rank_wait_s(6.0, 1.5) == pytest.approx(2.0)
    assert rank_wait_s(6.0, 1.0) == 0
