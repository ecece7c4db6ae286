"""linear_logprob: the public function, its two operators for torch.library, and the choice of strategy.

It owns the autograd of both strategies; strategies.py computes. It refuses to know what the log-probabilities are for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreason_kernels.dispatch import IMPLS, OPERATOR_TAGS
from fastreason_kernels.head import (
    STRATEGIES,
    HeadOptions,
    HeadTensors,
    check_values,
    head_arguments,
    needs_gradient,
)
from fastreason_kernels.linear_logprob import strategies
from fastreason_kernels.linear_logprob.reference import linear_logprob_reference
from fastreason_kernels.lora import LoraHead
from fastreason_kernels.rows import RowCoefficients, RowStatistics
from fastreason_kernels.shards import whole_vocab


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: LoraHead | None = None,
    ignore_index: int | None = None,
    entropy_grad: bool = True,
    strategy: str = "auto",
    logits: str = "auto",
    group: Any = None,
    impl: str = "auto",
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and logsumexp of tokens from hidden states, without `[N, V]` logits.

        z = cap(logit_scale * (hidden @ weight.T + bias + lora)) / temperature,  cap(x) = softcap * tanh(x / softcap)
        logp = log_softmax(z)[ids],  entropy = -sum(softmax(z) * log_softmax(z)),  lse = logsumexp(z)

    hidden [N, D], weight [V, D], bias [V] or None, lora (a [r, D], b [V, r]): one dtype, bf16, fp32 or fp64 (autocast
    casts them as it would for a linear layer), differentiated. ids [N] int64. temperature: float, or [N], not
    differentiated. ignore_index: tokens with this id are skipped exactly; their three results are 0 without a gradient.
    group: a process group; weight, bias and lora.b are then this rank's shard of V / ranks rows, in the order of ranks,
    all else is equal on all ranks, and so are the results and the gradient of hidden.

    Returns (logp, entropy, lse), each [N] fp32 in nats (fp64 for fp64 inputs); logp and entropy (with `entropy_grad`) are
    differentiable, lse is not.

    strategy: "B" recomputes in backward the logits of those rows only whose incoming gradient is not zero: 4 head
    products. "F", for a head that needs no gradient: dX is made in forward but for a factor, 2 products (3 with
    entropy_grad). "auto" is F for a frozen head without lora, group or entropy_grad, else B.
    logits: "fp32" never rounds bf16 products to bf16 before the softmax, "bf16" does, as a plain bf16 linear layer;
    "auto" is fp32 on a GPU and bf16 on a CPU. chunk_tokens, chunk_vocab: most rows and (B) columns of a tile of logits;
    None keeps a tile within 256 MiB (2.5 GB for whole rows on a GPU). impl: auto | triton | torch | reference.

    Raises ValueError for wrong shapes, dtypes, ids or options, NotImplementedError for impl="triton" where it cannot run.
    On a GPU the values of ids and temperature are not read: there an id outside of the vocabulary gives a logp of -inf.
    Left out: double backward; float16; shards of different sizes; lse's gradient.
    """
    _check_names(strategy, impl)
    head, options = head_arguments(
        hidden,
        weight,
        ids,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        lora=lora,
        logits=logits,
        group=group,
        impl=impl,
        chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab,
    )
    rows = None if ignore_index is None else ids != ignore_index
    if impl == "reference":
        logp, entropy, lse = _reference(head, options, lora, rows)
        return logp, entropy if entropy_grad else entropy.detach(), lse
    chosen = choose_strategy(strategy, head, options, entropy_grad)
    return logprob_of_rows(head, options, rows, None, chosen, entropy_grad)


def logprob_of_rows(
    head: HeadTensors,
    options: HeadOptions,
    rows: Tensor | None,
    grad_rows: Tensor | None,
    strategy: str,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_logprob of checked inputs for rows [N] bool; F prepares gradients for `grad_rows` only (None: rows)."""
    needs = needs_gradient(head)
    logp, entropy, lse, *_ = _forward(*head, rows, grad_rows, options.encode(), strategy, entropy_grad, needs)
    return logp, entropy if entropy_grad else entropy.detach(), lse


def choose_strategy(strategy: str, head: HeadTensors, options: HeadOptions, entropy_grad: bool) -> str:
    """B or F, by the rule in linear_logprob; raises ValueError where F was asked for and cannot be."""
    needs = needs_gradient(head)
    frozen = needs[0] and not any(needs[1:]) and head.lora_weight is None and not options.group
    if strategy == "auto":
        return "F" if frozen and not entropy_grad else "B"
    if strategy == "F" and any(needs) and not frozen:
        raise ValueError(
            "strategy: got 'F', allowed: 'B', as the head needs a gradient, or has lora or a group; freeze it, or 'auto'"
        )
    if strategy == "A":
        raise ValueError("strategy: got 'A', allowed: auto | B | F; A makes gradients in forward, when a loss is known")
    return strategy


def _check_names(strategy: str, impl: str) -> None:
    for key, value, allowed in (("strategy", strategy, STRATEGIES), ("impl", impl, IMPLS)):
        if value not in allowed:
            raise ValueError(f"{key}: got {value!r}, allowed: {' | '.join(allowed)}")


def _reference(
    head: HeadTensors, options: HeadOptions, lora: LoraHead | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if options.group:
        raise ValueError("impl: got 'reference', allowed with a group: auto | triton | torch")
    dtype = head.hidden.dtype
    lora = None if lora is None else LoraHead(lora.a.to(dtype), lora.b.to(dtype), lora.scale)
    check_values(head, rows, head.weight.shape[0])
    ids = head.ids if rows is None else head.ids.masked_fill(~rows, 0)
    scale = 1.0 if head.temperature is None else head.temperature
    with torch.autocast(head.hidden.device.type, enabled=False):
        result = linear_logprob_reference(head.hidden, head.weight, ids, head.bias, scale, options.transform, lora)
    logp, entropy, lse = (x if rows is None else x.masked_fill(~rows, 0.0) for x in result)
    return logp, entropy, lse


@torch.library.custom_op("fastreason::linear_logprob", mutates_args=(), tags=OPERATOR_TAGS)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    ids: Tensor,
    temperature: Tensor | None,
    rows: Tensor | None,
    grad_rows: Tensor | None,
    options: str,
    strategy: str,
    entropy_grad: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse, A, B): the last two for strategy F, [N, D] with zeros in rows without a gradient."""
    head = HeadTensors(hidden, weight, bias, lora_hidden, lora_weight, ids, temperature)
    settings = HeadOptions.decode(options)
    check_values(head, rows, whole_vocab(head, settings.group))
    everything = torch.arange(hidden.shape[0], device=hidden.device)
    chosen = everything if rows is None else rows.nonzero().squeeze(1)
    out = [torch.zeros(hidden.shape[0], dtype=head.stat_dtype, device=hidden.device) for _ in range(3)]
    slopes = [hidden.new_empty(0), hidden.new_empty(0)]
    with torch.autocast(hidden.device.type, enabled=False):
        if strategy == "F" and needs[0]:
            wanted = chosen if grad_rows is None else grad_rows.nonzero().squeeze(1)
            stats, *made = strategies.frozen_head(head, wanted, settings, entropy_grad)
            for i, slope in enumerate(made[: 2 if entropy_grad else 1]):
                slopes[i] = torch.zeros_like(hidden).index_copy_(0, wanted, slope)
            _write(out, wanted, stats)
            if grad_rows is not None:
                chosen = (~grad_rows if rows is None else rows & ~grad_rows).nonzero().squeeze(1)
            else:
                chosen = chosen[:0]
        _write(out, chosen, strategies.statistics(head, chosen, settings))
    return out[0], out[1], out[2], slopes[0], slopes[1]


def _write(out: list[Tensor], rows: Tensor, stats: RowStatistics) -> None:
    for whole, part in zip(out, stats, strict=True):
        whole.index_copy_(0, rows, part)


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    ids: Tensor,
    temperature: Tensor | None,
    rows: Tensor | None,
    grad_rows: Tensor | None,
    options: str,
    strategy: str,
    entropy_grad: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logp, entropy, lse = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
    frozen = strategy == "F" and needs[0]
    slope = torch.empty_like(hidden) if frozen else hidden.new_empty(0)
    entropy_slope = torch.empty_like(hidden) if frozen and entropy_grad else hidden.new_empty(0)
    return logp, entropy, lse, slope, entropy_slope


@torch.library.custom_op("fastreason::linear_logprob_backward", mutates_args=(), tags=OPERATOR_TAGS)
def _recompute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    ids: Tensor,
    temperature: Tensor | None,
    logp: Tensor,
    entropy: Tensor,
    lse: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    options: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five differentiable tensors; an empty tensor where none is needed."""
    head = HeadTensors(hidden, weight, bias, lora_hidden, lora_weight, ids, temperature)
    if g_entropy is not None and hidden.device.type == "cpu" and not bool(g_entropy.any()):
        g_entropy = None
    with torch.autocast(hidden.device.type, enabled=False):
        d_hidden, d_weight, d_bias, d_lora_hidden, d_lora_weight = strategies.recompute_gradients(
            head,
            RowStatistics(logp, entropy, lse),
            RowCoefficients(g_logp, g_entropy),
            HeadOptions.decode(options),
            needs,
        )
    return d_hidden, d_weight, d_bias, d_lora_hidden, d_lora_weight


@_recompute.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    ids: Tensor,
    temperature: Tensor | None,
    logp: Tensor,
    entropy: Tensor,
    lse: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    options: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (hidden, weight, bias, lora_hidden, lora_weight)
    a, b, c, d, e = (
        hidden.new_empty(tensor.shape) if need and tensor is not None else hidden.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    )
    return a, b, c, d, e


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *head, rows, _, options, strategy, _, needs = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.options, ctx.needs, ctx.strategy = options, needs, strategy
    if strategy == "F":
        ctx.save_for_backward(rows, *output[3:])
    else:
        ctx.save_for_backward(*head, rows, *output[:3])


def _backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 8
    if g_logp is None and g_entropy is None:
        return (None,) * 5 + rest
    saved = ctx.saved_tensors  # read once: a checkpoint gives them once
    rows = saved[0] if ctx.strategy == "F" else saved[-4]
    if rows is not None:
        g_logp, g_entropy = (None if g is None else g.masked_fill(~rows, 0.0) for g in (g_logp, g_entropy))
    if ctx.strategy == "F":
        slopes = saved[1:]
        terms = zip((g_logp, g_entropy), slopes, strict=True)
        scaled = [g[:, None] * slope for g, slope in terms if g is not None]
        d_hidden = sum(scaled[1:], scaled[0]).to(slopes[0].dtype)
        return (d_hidden, None, None, None, None, *rest)
    *head, _, logp, entropy, lse = saved
    g_logp = torch.zeros_like(logp) if g_logp is None else g_logp
    grads = _recompute(*head, logp, entropy, lse, g_logp, g_entropy, ctx.options, ctx.needs)
    return (*(grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)), *rest)


_forward.register_autograd(_backward, setup_context=_setup_context)
