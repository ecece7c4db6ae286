"""Iterative DPO computes the responses of its pairs alone, and its gradient is that of computing all of them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastreason.advantages import pair_members
from fastreason.algorithms import resolve_algorithm
from fastreason.config import parse_config
from fastreason.frozen import FrozenModel, FrozenScorer
from fastreason.policy import Policy, policy_spec, score_batch
from fastreason.training import TrainingStep
from fastreason.types import Grade, Group, Prompt, Sample
from fastreason.update.updater import UpdateResult

VOCABULARY = 61
# Four responses a prompt; the second prompt has no pair, the fourth has none but for the responses that were cut off.
REWARDS = [[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.25, -1.0, -1.0], [1.0, 0.0, 1.0, 1.0]]
LENGTHS = [[2, 5, 3, 7], [2, 3, 2, 2], [0, 4, 8, 3], [3, 8, 2, 5]]


def tiny_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def make_groups():
    generator = torch.Generator().manual_seed(3)

    def tokens(num):
        return torch.randint(1, VOCABULARY, (num,), generator=generator).tolist()

    groups = []
    for number, (rewards, lengths) in enumerate(zip(REWARDS, LENGTHS, strict=True)):
        samples = [
            Sample(
                token_ids=tokens(length),
                sampler_logp=[-4.0] * length,
                token_versions=[0] * length,
                text="",
                finish_reason="length" if length == 8 else "stop",
                grade=Grade(reward=reward, correct=reward > 0),
            )
            for reward, length in zip(rewards, lengths, strict=True)
        ]
        prompt = Prompt(id=str(number), text="")
        groups.append(
            Group(ticket=number, prompt=prompt, prompt_token_ids=tokens(4), samples=samples, version_issued=0)
        )
    return groups


class Updater:
    """Sums the gradient of every update, and never moves the weights."""

    def __init__(self):
        self.policy, self.num_skipped = Policy(tiny_model(1)).double(), 0

    def logprobs(self, batches, spec, temperature):
        with torch.no_grad():
            return [self.policy(score_batch(b), policy_spec(b, spec), temperature).logp for b in map(doubled, batches)]

    def update(self, batches, spec, temperature, denominator):
        outputs = [self.policy(doubled(batch), spec, temperature) for batch in batches]
        (sum(output.loss_sum for output in outputs) / denominator).backward()
        return UpdateResult(outputs, 0.0, 1.0, 1e-3, True)

    def skip(self):
        self.num_skipped += 1
        return UpdateResult([], 0.0, 0.0, 1e-3, True, empty=True)

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.policy.parameters() if p.grad is not None])


def doubled(batch):
    """Float64, so that sums in another order do not show."""
    floats = {k: v.double() for k, v in vars(batch).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return type(batch)(**{**vars(batch), **floats})


def train(layout, skip, truncated, prompts_per_update):
    raw = {
        "model": {"path": "none"},
        "data": {"task": "chain_sum"},
        "rollout": {"samples_per_prompt": 4, "max_new_tokens": 8},
        "algorithm": {"name": "iterative_dpo", "truncated": truncated},
        "train": {
            "steps": 1,
            "prompts_per_step": 4,
            "prompts_per_update": prompts_per_update,
            "skip_zero_advantage": skip,
            "micro_batch_tokens": 40,
        },
    }
    config, updater = parse_config(raw), Updater()
    target = FrozenModel(FrozenScorer(Policy(tiny_model(2)).double()), torch.device("cpu"))
    ranks = SimpleNamespace(rank=0, num=1, sum=lambda v: v, max=lambda v: v)
    step = TrainingStep(config, resolve_algorithm(config), updater, ranks, layout, 0, target)
    return updater, step(make_groups())


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize(("truncated", "num_pairs"), [("keep", 3), ("mask", 2), ("penalise", 3)])
@pytest.mark.parametrize("prompts_per_update", [4, 2])
def test_only_pairs_are_computed_and_the_gradient_stays(layout, truncated, num_pairs, prompts_per_update):
    (whole, all_figures), (alone, figures) = (
        train(layout, skip, truncated, prompts_per_update) for skip in (False, True)
    )
    gradient = whole.gradient()
    assert float(gradient.abs().max()) > 1e-3
    assert float((alone.gradient() - gradient).abs().max()) < 1e-6 * float(gradient.abs().max())
    assert figures["pairs/num"] == num_pairs
    for key in ("pairs/num", "pairs/loss", "pairs/accuracy", "pairs/margin", "train/tokens"):
        assert figures[key] == pytest.approx(all_figures[key], rel=1e-6), key
    assert figures["train/tokens_computed"] < 0.75 * all_figures["train/tokens_computed"]
    assert alone.num_skipped == whole.num_skipped


def test_members_by_hand():
    rewards = torch.tensor(REWARDS)
    assert pair_members(rewards).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]
