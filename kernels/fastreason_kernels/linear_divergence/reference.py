"""The specification of linear_divergence: textbook sums over whole logits in plain torch, for tests; right in float64.

It owns no precision: in fp32 these sums cancel, which is why the operation does not compute them so (see rows.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastreason_kernels.head import HeadTensors
from fastreason_kernels.linear_divergence.topk import DivergenceSpec
from fastreason_kernels.transform import Transform


def head_logits(head: HeadTensors, transform: Transform) -> Tensor:
    """[N, V] logits of a head after transform and temperature: products in its dtype, the rest in fp32 (fp64 for fp64)."""
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    if head.lora_hidden is not None and head.lora_weight is not None:
        logits = logits + torch.nn.functional.linear(head.lora_hidden, head.lora_weight)
    z = transform.apply(logits.to(head.stat_dtype))
    return z if head.temperature is None else z / head.temperature[:, None]


def divergence_reference(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """[N] divergence in nats of softmax(student) = p and softmax(teacher) = q, logits [N, C] after temperature.

        reverse  KL(p||q) = sum_j p_j (log p_j - log q_j)         forward  KL(q||p)
        jsd      beta KL(q||m) + (1 - beta) KL(p||m),  m = beta q + (1 - beta) p

    A column removed (-inf) from both counts nothing; one that only the second argument of a KL lacks makes it infinite.
    """
    return _divergence(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), spec)


def topk_divergence_reference(student: Tensor, ids: Tensor, teacher_logp: Tensor, spec: DivergenceSpec) -> Tensor:
    """[N] divergence in nats from the teacher's log-probabilities teacher_logp [N, K] at ids [N, K], as spec.tail says.

    student [N, V] logits after temperature. An entry is absent where its id is -1 or its log-probability -inf.
    """
    present = (ids >= 0) & (teacher_logp > -math.inf)
    # The sum of rounded probabilities tells a tail from none only down to this.
    floor = torch.finfo(torch.promote_types(teacher_logp.dtype, torch.float32)).eps
    log_p = torch.log_softmax(student, -1).gather(1, ids.clamp(min=0)).masked_fill(~present, -math.inf)
    log_q = teacher_logp.to(log_p.dtype).masked_fill(~present, -math.inf)
    if spec.tail == "renormalise":
        # A row without entries becomes two uniform ones: no divergence, no gradient.
        empty = ~present.any(-1, keepdim=True)
        log_p, log_q = (torch.log_softmax(x.masked_fill(empty, 0.0), -1) for x in (log_p, log_q))
    if spec.tail == "bucket":
        whole = present.sum(-1, keepdim=True) == student.shape[1]
        log_p = torch.cat([log_p, _log_rest(log_p, torch.finfo(log_p.dtype).eps).masked_fill(whole, -math.inf)], -1)
        log_q = torch.cat([log_q, _log_rest(log_q, floor).masked_fill(whole, -math.inf)], -1)
    return _divergence(log_p, log_q, spec)


def _log_rest(log_probs: Tensor, floor: float) -> Tensor:
    return torch.log((1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=floor))


def _divergence(log_p: Tensor, log_q: Tensor, spec: DivergenceSpec) -> Tensor:
    gone = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = log_p.masked_fill(gone, 0.0), log_q.masked_fill(gone, 0.0)
    if spec.direction == "reverse":
        return _kl(log_p, log_q)
    if spec.direction == "forward":
        return _kl(log_q, log_p)
    beta = spec.beta
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    zero = log_a == -math.inf
    return (log_a.exp() * (log_a.masked_fill(zero, 0.0) - log_b.masked_fill(zero, 0.0))).sum(-1)
