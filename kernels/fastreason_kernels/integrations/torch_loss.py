"""torch's `linear_cross_entropy` with the same arguments, on the library's heads.

It owns the translation of reduction, class weights, label smoothing and chunking options. It refuses what it would have to
emulate with whole logits: targets that are probabilities, and K-dimensional losses.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastreason_kernels.linear_logprob.function import linear_logprob
from fastreason_kernels.linear_policy_loss.function import linear_policy_loss
from fastreason_kernels.policy_spec import PolicyLossSpec

REDUCTIONS = ("none", "mean", "sum")
LIKELIHOOD = PolicyLossSpec(ratio="none")

# Vocabulary rows that are widened to fp32 at a time when a weighted sum over the head's rows is taken.
ROW_BLOCK = 8192


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Cross-entropy of a linear layer's outputs, with the arguments of torch 2.13's function of that name.

        logits = linear(input, linear_weight, linear_bias)
        loss = cross_entropy(logits, target, weight=weight, reduction=reduction, ignore_index=ignore_index,
                             label_smoothing=label_smoothing)

    input [N, D] or [D], linear_weight [V, D], linear_bias [V]: bf16, fp32 or fp64, differentiated. target [N] or []
    int64, ignore_index (None: -100) is left out. weight [V] float, not differentiated. reduction: none gives [N] or [],
    mean and sum give []. options (torch.nn.LinearCrossEntropyOptions or None): chunk sizes are respected, None leaves
    them to the library; acc_policy and allow_retain_graph change nothing, as sums are always in fp32 and a graph may
    always be kept. "mean" and "sum" take three head GEMMs with both gradients, "none" four.

    Differences: with bf16 inputs, label_smoothing adds a second rounding to the gradients, small as long as most of the
    weight is on the target; the loss is fp32 for bf16 inputs (torch rounds it to bf16); and the mean over nothing is a
    zero that is connected to the graph (torch: NaN).

    Raises ValueError for wrong values, NotImplementedError for targets that are probabilities, for linear_weight with
    more than two dimensions and for an acc_dtype narrower than fp32. Left out: those, and higher-order gradients.
    """
    _check(input, linear_weight, target, reduction, ignore_index, label_smoothing)
    hidden, ids = (input, target) if input.dim() == 2 else (input[None], target[None])
    ignored = -100 if ignore_index is None else ignore_index
    chunk_tokens = _chunk_tokens(options, hidden.shape, linear_weight.shape[0], hidden.dtype)
    keep = ids != ignored
    known = ids.masked_fill(~keep, 0)
    _check_targets(known, linear_weight.shape[0], ignored)
    class_weight = None if weight is None else _class_weight(weight, linear_weight.shape[0])
    target_weight = keep.float() if class_weight is None else class_weight[known] * keep
    share = label_smoothing / linear_weight.shape[0]
    # -sum_c share w_c log p_c = share (W lse - z_w), W = sum_c w_c, z_w = sum_c w_c z_c, and lse = z_target - logp: so
    # smoothing adds to the factor of -logp, and the rest is linear in the head.
    total = linear_weight.shape[0] if class_weight is None else class_weight.sum()
    factor = (1 - label_smoothing) * target_weight + share * total * keep
    head: dict[str, Any] = {"bias": linear_bias, "chunk_tokens": chunk_tokens}
    if reduction == "none":
        logp, _, _ = linear_logprob(hidden, linear_weight, ids, ignore_index=ignored, entropy_grad=False, **head)
        loss = -logp * factor
        if share:
            loss = loss + share * keep * _linear_part(hidden, linear_weight, linear_bias, known, class_weight, total)
        return loss if input.dim() == 2 else loss[0]
    scale = _reciprocal(target_weight.sum()) if reduction == "mean" else torch.ones_like(factor[:1]).sum()
    out = linear_policy_loss(
        hidden,
        linear_weight,
        ids,
        torch.ones_like(factor),
        LIKELIHOOD,
        token_weight=factor * scale,
        mask=keep,
        statistics="active",
        **head,
    )
    loss = out.loss_sum
    if share:
        rest = _linear_part(hidden, linear_weight, linear_bias, known, class_weight, total)
        loss = loss + (share * scale * keep * rest).sum()
    return loss


def _check(
    hidden: Tensor, head: Tensor, target: Tensor, reduction: str, ignore_index: int | None, label_smoothing: float
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, allowed: {' | '.join(REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, allowed: 0 to 1")
    if head.dim() > 2:
        raise NotImplementedError(
            f"linear_weight: shape {tuple(head.shape)} asks for a K-dimensional loss, allowed: [V, D]; use "
            "torch.nn.functional.linear_cross_entropy, or call this for each dimension"
        )
    if hidden.dim() not in (1, 2) or head.dim() != 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"input, linear_weight: shapes {tuple(hidden.shape)}, {tuple(head.shape)}, allowed: [N, D] or [D], [V, D]"
        )
    if target.is_floating_point():
        raise NotImplementedError(
            f"target: dtype {target.dtype} (class probabilities), allowed: int64 class indices; use "
            "torch.nn.functional.linear_cross_entropy with options=None"
        )
    if target.shape != hidden.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"target: shape {tuple(target.shape)} {target.dtype}, allowed: {tuple(hidden.shape[:-1])} int64"
        )


def _check_targets(ids: Tensor, vocab: int, ignored: int) -> None:
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(
            f"target: values {int(ids.min())} to {int(ids.max())}, allowed: 0 to {vocab - 1}, or ignore_index {ignored}"
        )


def _class_weight(weight: Tensor, vocab: int) -> Tensor:
    if weight.shape != (vocab,):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, allowed: [V] = [{vocab}]")
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _reciprocal(total: Tensor) -> Tensor:
    """1 / total, and 0 for the mean over nothing."""
    return torch.where(total == 0, torch.zeros_like(total), 1 / total)


def _linear_part(
    hidden: Tensor, head: Tensor, bias: Tensor | None, ids: Tensor, class_weight: Tensor | None, total: float | Tensor
) -> Tensor:
    """[N] total * z_target - sum_c w_c z_c of logits z, from rows of the head alone, in fp32."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    wide = hidden.to(dtype)
    # Each row is gathered once, so that the gradients of a frequent token are summed in fp32 and rounded once.
    unique, index = ids.unique(return_inverse=True)
    at_target = (wide * head.index_select(0, unique).to(dtype)[index]).sum(-1)
    at_all = wide @ _weighted_rows(head, class_weight, dtype)
    if bias is not None:
        at_target = at_target + bias.index_select(0, unique).to(dtype)[index]
        at_all = at_all + _weighted_rows(bias[:, None], class_weight, dtype)
    return total * at_target - at_all


def _weighted_rows(rows: Tensor, class_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[D] sum over c of class_weight[c] * rows[c], without a wide copy of rows [V, D]."""
    if class_weight is None:
        return rows.sum(0, dtype=dtype)
    blocks = zip(rows.split(ROW_BLOCK), class_weight.split(ROW_BLOCK), strict=True)
    return torch.stack([(block * scale[:, None]).sum(0, dtype=dtype) for block, scale in blocks]).sum(0)


def _chunk_tokens(options: Any, shape: torch.Size, vocab: int, dtype: torch.dtype) -> int | None:
    """The chunk that `options` ask for, None for the library's own choice."""
    if options is None:
        return None
    if options.acc_dtype not in (None, torch.float32, dtype) or options.acc_dtype in (torch.float16, torch.bfloat16):
        raise NotImplementedError(
            f"options.acc_dtype: got {options.acc_dtype}, allowed: None or torch.float32; sums are always in fp32 "
            "(fp64 for fp64 inputs)"
        )
    method, size = options.chunking_method, options.batch_chunk_size
    if method in (None, "auto"):
        return size
    num_tokens, width = shape
    by_ratio = math.ceil(num_tokens / math.ceil(vocab / width))
    factor = int(method.partition(":")[2] or 1)
    asked = max(1, min((1 << max(0, by_ratio - 1).bit_length()) // factor, num_tokens))
    if size is not None and min(size, num_tokens) != asked:
        raise ValueError(
            f"options.batch_chunk_size, options.chunking_method: got {size} and {method!r}, which means {asked}; pass one"
        )
    return asked
