"""KL estimators by exact enumeration of small categoricals, their coefficients over time, and their masks.

An expectation over what the policy samples is a sum over all outcomes weighted by their detached probabilities; its gradient
is what a training step has in the mean. In float64, so that only a wrong formula differs.
"""

import itertools
from dataclasses import asdict

import pytest
import torch
from fastreason_kernels import policy_loss

from fastreason.algorithms import ALGORITHMS, resolve_algorithm
from fastreason.config import parse_config
from fastreason.kl import (
    ESTIMATORS,
    CoefficientState,
    EntropyTerm,
    KlTerm,
    advantage_addend,
    estimate,
    guided_mask,
    kept_scale,
)


def distributions(seed=0, size=5):
    """(logits of the policy, to be differentiated, log q of the target)."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=random, dtype=torch.float64).requires_grad_()
    return logits, torch.randn(size, generator=random, dtype=torch.float64).log_softmax(0)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def reverse(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def forward(log_p, log_q):
    return (log_q.exp() * (log_q - log_p)).sum()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def in_the_loss(log_p, log_q, estimator):
    """The expected gradient's loss, through the loss library: no policy term, a coefficient of 1."""
    term = KlTerm(estimator=estimator, coef=1.0)
    spec = resolve({"name": "reinforce", "kl": estimator, "kl_coef": 1.0}).spec_at(0, CoefficientState())
    assert spec.kl == term.estimator
    zeros = torch.zeros_like(log_p.detach())
    return policy_loss(log_p, None, zeros, spec, ref_logp=log_q, token_weight=log_p.detach().exp()).loss_sum


def resolve(algorithm, **sections):
    return resolve_algorithm(
        parse_config(
            {
                "model": {"path": "none"},
                "data": {"task": "chain_sum"},
                "rollout": {"samples_per_prompt": 2},
                "train": {"steps": 1, "prompts_per_step": 2},
                "algorithm": algorithm,
                **sections,
            }
        )
    )


@pytest.mark.parametrize("seed", range(3))
class TestInTheLoss:
    def test_k2_has_the_gradient_of_the_reverse_kl(self, seed):
        logits, log_q = distributions(seed)
        log_p = logits.log_softmax(0)
        close(gradient(in_the_loss(log_p, log_q, "k2"), logits), gradient(reverse(log_p, log_q), logits))

    def test_k3_has_the_gradient_of_the_forward_kl(self, seed):
        logits, log_q = distributions(seed)
        log_p = logits.log_softmax(0)
        close(gradient(in_the_loss(log_p, log_q, "k3"), logits), gradient(forward(log_p, log_q), logits))
        assert not torch.allclose(gradient(forward(log_p, log_q), logits), gradient(reverse(log_p, log_q), logits))

    def test_k1_has_none(self, seed):
        """Whence its refusal: the target drops out, and what is left is the mean score."""
        logits, log_q = distributions(seed)
        log_p = logits.log_softmax(0)
        weighted = log_p.detach().exp() * estimate(log_p, log_q, "k1")
        close(gradient(weighted.sum(), logits), torch.zeros_like(log_q))
        close(weighted.sum(), reverse(log_p, log_q))  # its value is right all the same

    def test_the_loss_library_has_the_same_estimators(self, seed):
        logits, log_q = distributions(seed)
        log_p = logits.log_softmax(0)
        for name in ("k2", "k3"):
            weighted = (log_p.detach().exp() * estimate(log_p, log_q, name)).sum()
            close(in_the_loss(log_p, log_q, name), weighted)
            close(gradient(in_the_loss(log_p, log_q, name), logits), gradient(weighted, logits))


# The last column of the table in the module's docstring.
IN_THE_ADVANTAGE = {
    "k1": lambda log_p, log_q: reverse(log_p, log_q),
    "k3": lambda log_p, log_q: reverse(log_p, log_q) - forward(log_p, log_q),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", IN_THE_ADVANTAGE)
def test_in_the_advantage(name, seed):
    logits, log_q = distributions(seed)
    log_p, coef = logits.log_softmax(0), 0.3
    advantages = advantage_addend(log_p, log_q, KlTerm(estimator=name, place="advantage", coef=coef), coef)
    assert not advantages.requires_grad
    for row in ("reinforce", "raft"):  # with a ratio of 1, and without a ratio
        spec = resolve({"name": row}).spec
        loss = policy_loss(log_p, None, advantages, spec, token_weight=log_p.detach().exp()).loss_sum
        close(gradient(loss, logits), coef * gradient(IN_THE_ADVANTAGE[name](log_p, log_q), logits))


def test_k1_in_the_reward_is_the_reverse_kl_of_whole_responses():
    """Two tokens, the second after the first: r' = -coef (k_1 + k_2) for both; prefixes are not fixed here."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    log_q = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(1)
    log_p = logits.log_softmax(1)  # row 0: the first token; row 1 + a: the second after a

    def chosen(table, a, b):
        return torch.stack([table[0, a], table[1 + a, b]])

    loss, kl = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        logp, target = chosen(log_p, a, b), chosen(log_q, a, b)
        reward = -estimate(logp, target, "k1").sum().detach()
        loss = loss - logp.sum().detach().exp() * reward * logp.sum()
        kl = kl + logp.sum().exp() * (logp - target).sum()
    close(gradient(loss, logits), gradient(kl, logits))


def test_k2_is_exact_per_token_with_the_prefix_fixed():
    """Over all responses of two tokens: the sum over t of the reverse KL after each prefix, prefixes detached."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    log_q = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64).log_softmax(1)
    log_p = logits.log_softmax(1)
    spec = resolve({"name": "kdrl"}, teacher={"path": "t"}).spec_at(0, CoefficientState())
    pairs = list(itertools.product(range(3), repeat=2))
    logp_N = torch.stack([x for a, b in pairs for x in (log_p[0, a], log_p[1 + a, b])])
    target_N = torch.stack([x for a, b in pairs for x in (log_q[0, a], log_q[1 + a, b])])
    probability_N = torch.stack([(log_p[0, a] + log_p[1 + a, b]).exp() for a, b in pairs]).detach().repeat_interleave(2)
    loss = policy_loss(
        logp_N, None, torch.zeros(18, dtype=torch.float64), spec, ref_logp=target_N, token_weight=probability_N
    ).loss_sum
    per_prefix = reverse(log_p[0], log_q[0])
    for a in range(3):
        per_prefix = per_prefix + log_p[0, a].detach().exp() * reverse(log_p[1 + a], log_q[1 + a])
    close(gradient(loss, logits), 2e-3 * gradient(per_prefix, logits))


@pytest.mark.parametrize("row", ["kdrl", "kd_rkl"])
@pytest.mark.parametrize("seed", range(3))
def test_off_policy_the_weighted_k2_has_the_gradient_of_the_reverse_kl(row, seed):
    """Tokens of a sampler mu that is not the policy: E_mu[pi / mu grad k2]; unweighted it is another gradient."""
    logits, log_q = distributions(seed)
    _, log_mu = distributions(seed + 10)
    log_p = logits.log_softmax(0)

    def off_policy(**keys):
        spec = resolve({"name": row, "kl_coef": 1.0, **keys}, teacher={"path": "t"}).spec_at(0, CoefficientState())
        zeros = torch.zeros_like(log_q)
        return policy_loss(
            log_p, None, zeros, spec, behaviour_logp=log_mu, ref_logp=log_q, token_weight=log_mu.exp()
        ).loss_sum

    expected = gradient(reverse(log_p, log_q), logits)
    close(gradient(off_policy(), logits), expected)
    unweighted = gradient(off_policy(kl_weight="none"), logits)
    assert float((unweighted - expected).abs().max()) > 0.05


class TestKdrl:
    """The joint objective on one prompt whose answers are the outcomes of a categorical: right is outcome 0."""

    def loss(self, logits, log_q, coef=None, row="kdrl"):
        log_p = logits.log_softmax(0)
        algorithm = {"name": row} | ({} if coef is None else {"kl_coef": coef})
        resolved = resolve(algorithm, **({"teacher": {"path": "t"}} if row.startswith("kd") else {}))
        rewards = torch.tensor([[1.0] + [0.0] * (len(log_p) - 1)])
        advantages = resolved.advantage(rewards)[0].double() * resolved.use_rewards
        spec = resolved.spec_at(0, resolved.initial_state())
        weight = log_p.detach().exp()
        return policy_loss(log_p, None, advantages, spec, ref_logp=log_q, token_weight=weight).loss_sum

    def test_is_grpo_plus_beta_times_the_reverse_kl(self):
        logits, log_q = distributions()
        expected = gradient(self.loss(logits, log_q, row="grpo"), logits)
        for coef in (2e-3, 0.7):
            kl = gradient(reverse(logits.log_softmax(0), log_q), logits)
            close(gradient(self.loss(logits, log_q, coef), logits), expected + coef * kl)

    def test_a_coefficient_of_zero_is_grpo_to_the_last_bit(self):
        logits, log_q = distributions()
        zero, grpo = self.loss(logits, log_q, 0.0), self.loss(logits, log_q, row="grpo")
        assert torch.equal(zero, grpo) and torch.equal(gradient(zero, logits), gradient(grpo, logits))

    @pytest.mark.parametrize("seed", range(3))
    def test_the_kd_gradient_points_to_the_teacher(self, seed):
        logits, log_q = distributions(seed)
        before = reverse(logits.log_softmax(0), log_q).detach()
        step = -gradient(self.loss(logits, log_q, row="kd_rkl"), logits)
        # Along log q - log p, the way to the teacher in logits, and downhill in KL.
        assert float(step @ (log_q - logits.log_softmax(0)).detach()) > 0
        after = reverse((logits.detach() + 0.1 * step).log_softmax(0), log_q)
        assert float(after) < float(before)

    def test_following_it_arrives_at_the_teacher(self):
        logits, log_q = distributions()
        for _ in range(400):
            logits = (logits - gradient(self.loss(logits, log_q, row="kd_rkl"), logits)).detach().requires_grad_()
        torch.testing.assert_close(logits.log_softmax(0), log_q, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_a_teacher_that_is_the_student_has_no_gradient(self, estimator):
        logits, _ = distributions()
        log_p = logits.log_softmax(0)
        term = KlTerm(estimator=estimator, coef=1.0)
        assert not bool(advantage_addend(log_p, log_p, term, 1.0).any())
        if estimator != "k1":
            by_token = gradient(estimate(log_p, log_p.detach(), estimator).sum(), logits)
            assert not bool(by_token.any()), "rounding noise that would be trained on"
            assert not bool(gradient(in_the_loss(log_p, log_p.detach(), estimator), logits).any())


def test_estimates_by_hand():
    logp, target = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert estimate(logp, target, "k1").tolist() == [0.5, -1.0]
    assert estimate(logp, target, "k2").tolist() == [0.125, 0.5]
    assert estimate(logp, target, "k3").tolist() == pytest.approx([0.1065307, 0.7182818])
    far = estimate(torch.tensor([-200.0]), torch.tensor([0.0]), "k3")
    assert bool(far.isfinite().all())
    with pytest.raises(ValueError, match=r"estimator: got 'exact', allowed on sampled tokens: k1 \| k2 \| k3"):
        estimate(logp, target, "exact")


class TestSchedules:
    def test_fixed(self):
        term = KlTerm(estimator="k2", coef=0.1)
        assert [term.coefficient(step, CoefficientState()) for step in (0, 7)] == [0.1, 0.1]
        assert term.adapted(0.1, 5.0, 64) == 0.1

    def test_annealed_as_kdrl(self):
        term = KlTerm(estimator="k2", coef=5e-3, schedule="annealed", anneal=5e-5, floor=1e-3)
        made = [term.coefficient(step, CoefficientState()) for step in (0, 1, 40, 80, 81, 500)]
        assert made == pytest.approx([5e-3, 4.95e-3, 3e-3, 1e-3, 1e-3, 1e-3])

    def test_adaptive_by_hand(self):
        term = KlTerm(estimator="k2", coef=0.2, schedule="adaptive", goal=0.1, horizon=1000.0)
        assert term.adapted(0.2, 0.11, 500) == pytest.approx(0.2 * (1 + 0.1 * 0.5))
        assert term.adapted(0.2, 5.0, 500) == pytest.approx(0.2 * (1 + 0.2 * 0.5))  # the error is held to 0.2
        assert term.adapted(0.2, 0.0, 500) == pytest.approx(0.2 * (1 - 0.2 * 0.5))
        assert term.adapted(0.2, 0.1, 500) == 0.2
        assert term.adapted(0.2, 0.0, 10_000) == 0.0  # never negative

    def test_an_adaptive_coefficient_finds_the_kl_that_is_wanted(self):
        """Against a policy whose KL falls with the coefficient, as 0.01 / coef."""
        resolved = resolve(
            {"name": "grpo", "kl": "k3", "kl_coef": 1.0, "kl_schedule": "adaptive", "kl_goal": 0.05, "kl_horizon": 100}
        )
        state = resolved.initial_state()
        assert resolved.spec_at(0, state).kl_coef == 1.0
        for _ in range(200):
            state = resolved.next_state(state, kl=0.01 / state.kl, entropy=1.0, num_responses=50)
        assert 0.01 / state.kl == pytest.approx(0.05, rel=0.05)
        assert resolved.spec_at(9, state).kl_coef == state.kl

    def test_entropy_moves_by_steps_towards_its_goal(self):
        resolved = resolve({"name": "grpo", "entropy_goal": 0.2, "entropy_step": 0.01, "entropy_coef": 0.005})
        state, seen = resolved.initial_state(), []
        for measured in (0.1, 0.15, 0.2, 0.3, 0.3, 0.3):
            state = resolved.next_state(state, kl=0.0, entropy=measured, num_responses=8)
            seen.append((state.entropy, resolved.spec_at(0, state).entropy_coef))
        # At the goal it stays; above it falls, not below 0, and does not act.
        expected = [(0.015, 0.015), (0.025, 0.025), (0.025, 0.025), (0.015, 0.0), (0.005, 0.0), (0.0, 0.0)]
        assert [x for pair in seen for x in pair] == pytest.approx([x for pair in expected for x in pair])

    def test_without_a_goal_the_entropy_bonus_stays(self):
        resolved = resolve({"name": "grpo", "entropy_coef": 0.003})
        state = resolved.next_state(resolved.initial_state(), kl=1.0, entropy=9.0, num_responses=8)
        assert resolved.spec_at(5, state).entropy_coef == 0.003
        assert EntropyTerm().active is False and EntropyTerm(goal=0.1).active is True

    def test_states_are_plain_numbers(self):
        state = CoefficientState(kl=0.1, entropy=0.2, entropy_acts=False)
        assert CoefficientState(**asdict(state)) == state
        assert asdict(state) == {"kl": 0.1, "entropy": 0.2, "entropy_acts": False}


CORRECT = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ("none", [[True] * 3] * 3),
        ("wrong", [[False, True, True], [True] * 3, [False] * 3]),
        ("wrong_group", [[False] * 3, [True] * 3, [False] * 3]),
    ],
)
def test_masks(mask, kept):
    assert guided_mask(CORRECT, mask).tolist() == kept


def test_the_mean_over_what_is_kept():
    tokens = torch.tensor([[5, 2, 3], [4, 4, 2], [1, 1, 8]])
    kept = guided_mask(CORRECT, "wrong")
    # 30 tokens in all, 2 + 3 + 10 of them kept.
    assert kept_scale(kept, tokens, "kept") == 2.0 and kept_scale(kept, tokens, "all") == 1.0
    assert kept_scale(kept, torch.ones(3, 3), "kept") == 9 / 5
    assert kept_scale(guided_mask(CORRECT[2:], "wrong"), tokens[2:], "kept") == 0.0


def test_a_term_asks_for_a_model_and_with_a_coefficient_of_0_for_its_figures():
    assert (
        not KlTerm().active and not KlTerm(estimator="k2", coef=0.0).active and KlTerm(estimator="k2", coef=0.1).active
    )
    for name in ALGORITHMS:
        taught = {"teacher": {"path": "t"}} if name.startswith("kd") else {}
        resolved = resolve({"name": name}, **taught)
        assert resolved.compares_with_teacher is name.startswith("kd")
        assert resolved.compares_with_reference is (name == "iterative_dpo")
    assert resolve({"kl": "k3", "kl_coef": 0.1}).compares_with_reference
    assert resolve({"kl": "k3", "kl_coef": 0.0}).compares_with_reference
    assert not resolve({"kl": "none"}).compares_with_reference


def test_a_divergence_of_whole_distributions_stays_out_of_the_spec():
    for estimator in ("exact", "top_k"):
        resolved = resolve({"kl": estimator, "kl_coef": 0.1})
        assert resolved.spec_at(0, resolved.initial_state()).kl == "none"
        assert resolved.kl.coefficient(0, resolved.initial_state()) == 0.1
    advantage = resolve({"kl": "k1", "kl_place": "advantage", "kl_coef": 0.1})
    assert advantage.spec_at(0, advantage.initial_state()).kl == "none"
