"""The specification of linear_policy_loss: the reference head, then the pure policy function, all by autograd."""

from __future__ import annotations

from torch import Tensor

from fastreason_kernels.linear_logprob.reference import linear_logprob_reference
from fastreason_kernels.lora import LoraHead
from fastreason_kernels.policy_math import PolicyLossOutput, policy_loss
from fastreason_kernels.policy_spec import PolicyLossSpec
from fastreason_kernels.transform import IDENTITY, Transform


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    spec: PolicyLossSpec,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    transform: Transform = IDENTITY,
    lora: LoraHead | None = None,
    **columns: Tensor | None,
) -> PolicyLossOutput:
    """`policy_loss` of the log-probabilities and entropies of `linear_logprob_reference`; `columns` as there.

    Masked tokens may hold any id: they are read as token 0.
    """
    safe_ids = ids if mask is None else ids.masked_fill(~mask, 0)
    logp, entropy, _ = linear_logprob_reference(hidden, weight, safe_ids, bias, temperature, transform, lora)
    return policy_loss(logp, entropy, advantages, spec, mask=mask, **columns)
