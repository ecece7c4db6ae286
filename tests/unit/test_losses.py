"""Every row of the losses against its formula in float64, written out anew, with autograd; and what equals what."""

from dataclasses import replace

import pytest
import torch
from fastreason_kernels import policy_loss

from fastreason.losses import LOSSES

LENGTHS = [3, 1, 5, 4]
SEQUENCE_N = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
ADVANTAGES_N = torch.tensor([1.3, -0.7, 0.4, -2.0], dtype=torch.float64)[SEQUENCE_N]


def smallest(rho, advantages, low, high):
    return -torch.minimum(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages)


def dual(rho, advantages):
    clipped = smallest(rho, advantages, 0.2, 0.2)
    return torch.where(advantages < 0, torch.minimum(clipped, -3.0 * advantages), clipped)


def sequence_ratio(log_ratio):
    means = [log_ratio[number == SEQUENCE_N].mean() for number in range(len(LENGTHS))]
    return torch.stack(means).exp()[SEQUENCE_N]


def sapo(rho, advantages):
    tau = torch.where(advantages > 0, 1.0, 1.05).double()
    return -4 / tau / (1 + torch.exp(-tau * (rho - 1))) * advantages


# Of the log-probabilities and log-ratios, both differentiated, and the advantages: the loss of each token.
FORMULAS = {
    "clip": lambda logp, d, a: smallest(d.exp(), a, 0.2, 0.2),
    "clip_higher": lambda logp, d, a: smallest(d.exp(), a, 0.2, 0.28),
    "dual_clip": lambda logp, d, a: dual(d.exp(), a),
    "ratio": lambda logp, d, a: -d.exp() * a,
    "log_prob": lambda logp, d, a: -a * logp,
    "gspo": lambda logp, d, a: smallest(sequence_ratio(d), a, 3e-4, 4e-4),
    "cispo": lambda logp, d, a: -d.exp().clamp(max=5.0).detach() * a * logp,
    "sapo": lambda logp, d, a: sapo(d.exp(), a),
}


def tokens(scale, seed=0):
    random = torch.Generator().manual_seed(seed)
    logp = (-3 * torch.rand(len(SEQUENCE_N), generator=random, dtype=torch.float64)).requires_grad_()
    behaviour = logp.detach() - scale * torch.randn(len(SEQUENCE_N), generator=random, dtype=torch.float64)
    return logp, behaviour


def ours(spec, logp, behaviour, weight=None):
    output = policy_loss(
        logp,
        None,
        ADVANTAGES_N,
        spec,
        behaviour_logp=behaviour,
        sequence_ids=SEQUENCE_N,
        token_weight=weight,
    )
    (gradient,) = torch.autograd.grad(output.loss_sum, logp)
    return output, gradient


def test_every_row_has_a_formula():
    assert set(FORMULAS) == set(LOSSES)


# Ratios near 1 as a sequence's are, and far off: on both sides of every bound.
@pytest.mark.parametrize("scale", [3e-4, 0.3, 2.0])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_row_is_its_formula(name, scale):
    for seed in range(5):
        logp, behaviour = tokens(scale, seed)
        output, gradient = ours(LOSSES[name], logp, behaviour)
        expected = FORMULAS[name](logp, logp - behaviour, ADVANTAGES_N).sum()
        (expected_gradient,) = torch.autograd.grad(expected, logp)
        torch.testing.assert_close(output.loss_sum, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"ratio", "log_prob", "sapo"}))
def test_the_ratios_reach_both_sides_of_every_bound(name):
    clipped = [ours(LOSSES[name], *tokens(scale))[0].clipped for scale in (3e-4, 0.3, 2.0)]
    shares = torch.cat(clipped).double().mean()
    assert 0 < float(shares) < 1


def test_higher_clip_and_dual_clip_differ_from_the_clip_where_they_should():
    logp = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    behaviour = logp.detach() - torch.tensor([1.25, 4.0], dtype=torch.float64).log()
    losses = {
        name: float(policy_loss(logp, None, advantages, LOSSES[name], behaviour_logp=behaviour).loss_sum.detach())
        for name in ("clip", "clip_higher", "dual_clip", "ratio")
    }
    assert losses == pytest.approx(
        {"clip": -1.2 + 4, "clip_higher": -1.25 + 4, "dual_clip": -1.2 + 3, "ratio": -1.25 + 4}
    )


def test_on_policy_gspo_is_its_token_form():
    """At a ratio of 1 the sequence's ratio has the gradient of the token's with every sequence averaged: 1 / |y| a token."""
    weight = (1 / torch.tensor(LENGTHS, dtype=torch.float64))[SEQUENCE_N]
    logp, _ = tokens(0.0)
    for behaviour in (None, logp.detach()):
        _, sequence = ours(LOSSES["gspo"], logp, behaviour, weight)
        _, token = ours(LOSSES["clip"], logp, behaviour, weight)
        torch.testing.assert_close(sequence, token, rtol=1e-12, atol=1e-15)
    logp, behaviour = tokens(0.3)
    sequence, token = (ours(LOSSES[name], logp, behaviour, weight)[1] for name in ("gspo", "clip"))
    assert not torch.allclose(sequence, token)


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"gspo"}))
def test_on_policy_every_token_loss_has_the_policy_gradient(name):
    logp, _ = tokens(0.0)
    _, gradient = ours(LOSSES[name], logp, None)
    # Sapo too: 4 / tau sigmoid(tau (rho - 1)) has slope 1 at rho = 1, whatever tau.
    torch.testing.assert_close(gradient, -ADVANTAGES_N, rtol=1e-12, atol=1e-15)


def test_dual_clip_is_an_option_of_every_clip():
    logp, behaviour = tokens(2.0)
    made, expected = (
        ours(spec, logp, behaviour)[1] for spec in (replace(LOSSES["clip"], dual_clip=3.0), LOSSES["dual_clip"])
    )
    assert torch.equal(made, expected)
