"""The specification of linear_logprob: whole logits in plain torch, for tests, differentiable in every dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreason_kernels.lora import LoraHead
from fastreason_kernels.rows import LOG_ZERO
from fastreason_kernels.transform import IDENTITY, Transform


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    transform: Transform = IDENTITY,
    lora: LoraHead | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of ids, entropy and logsumexp of softmax(z), z = transform(hidden @ weight.T + bias) / temperature.

        logp_i = z[i, ids_i] - lse_i,   entropy_i = -sum_j p_ij log p_ij,   lse_i = log sum_j exp z_ij

    hidden [N, D], weight [V, D], bias [V], ids [N] int64, temperature float or [N]; lora adds its own product to the
    logits. The products are in the inputs' dtype, all else in fp32 (fp64 for fp64 inputs); the results are [N] in nats.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if lora is not None:
        logits = logits + torch.nn.functional.linear(torch.nn.functional.linear(hidden, lora.a) * lora.scale, lora.b)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = transform.apply(logits) / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    log_probs = torch.log_softmax(z, dim=-1)
    logp = log_probs.gather(1, ids[:, None]).squeeze(1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=LOG_ZERO)).sum(-1)
    return logp, entropy, torch.logsumexp(z.detach(), dim=-1)
