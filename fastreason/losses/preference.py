"""Losses of a pair of responses that go through a sigmoid of their margin: DPO and SimPO. Pure, sums over pairs.

Pairs whose responses enter one by one with known weights (REDI, the symmetric loss) need no sigmoid and are not here: they are
`-A log pi` like any policy loss, see `objectives.py`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class PairSpec:
    """The loss -log sigmoid(beta * h - gamma) of a pair.

    margin: "reference" is h = (log pi_w - log ref_w) - (log pi_l - log ref_l), logs of whole responses: DPO (arXiv
    2305.18290). "mean" is h = log pi_w / |y_w| - log pi_l / |y_l|: SimPO (arXiv 2405.14734), which has no reference and a
    wanted margin gamma.
    """

    margin: Literal["reference", "mean"]
    beta: float
    gamma: float = 0.0


class PairLoss(NamedTuple):
    """loss_sum [], differentiable; margin_P [P], beta * h in nats, detached."""

    loss_sum: Tensor
    margin_P: Tensor


def pair_loss(
    logp_B: Tensor, num_tokens_B: Tensor, weight_B: Tensor, spec: PairSpec, ref_logp_B: Tensor | None = None
) -> PairLoss:
    """The summed loss of pairs: sum_p weight_p * -log sigmoid(beta * h_p - gamma), h as in `PairSpec`.

    logp_B [2P] float, nats: log-probabilities of whole responses, summed over their tokens; the chosen of pair p at 2p, the
    rejected at 2p + 1. num_tokens_B [2P]: those tokens. weight_B [2P]: a pair's weight is that of its chosen response.
    ref_logp_B [2P]: of the reference, for margin="reference". Raises ValueError for rows that make no pairs or a missing
    reference. Left out: label smoothing, other links than the sigmoid, a term on the chosen response alone.
    """
    if len(logp_B) % 2:
        raise ValueError(f"logp_B: got {len(logp_B)} rows, allowed: chosen and rejected in turn, an even number")
    if spec.margin == "reference":
        if ref_logp_B is None:
            raise ValueError(
                "ref_logp_B: got None, allowed: log-probabilities of the reference, for margin='reference'"
            )
        score_B = logp_B - ref_logp_B
    else:
        score_B = logp_B / num_tokens_B
    margin_P = spec.beta * (score_B[0::2] - score_B[1::2])
    loss_sum = (weight_B[0::2] * softplus(spec.gamma - margin_P)).sum()
    return PairLoss(loss_sum, margin_P.detach())
