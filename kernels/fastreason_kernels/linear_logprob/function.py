"""linear_logprob: statistics of the tokens in forward, logits recomputed in backward for the rows that need it.

It owns the public function and its autograd node (strategy B: 4 head GEMMs with both gradients, `[N]` saved). It
refuses to know what the log-probabilities are for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastreason_kernels.dispatch import resolve
from fastreason_kernels.head import HeadGradients, HeadInputs, LogitChunks, check_ids, head_inputs
from fastreason_kernels.linear_logprob.reference import linear_logprob_reference
from fastreason_kernels.rows import RowBlock


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    impl: str = "auto",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and logsumexp of tokens from hidden states, without `[N, V]` logits.

        z = (hidden @ weight.T + bias) / temperature
        logp = log_softmax(z)[ids],  entropy = -sum(softmax(z) * log_softmax(z)),  lse = logsumexp(z)

    hidden [N, D], weight [V, D], bias [V] or None: one dtype, bf16, fp32 or fp64 (autocast casts them as it would for a
    linear layer). ids [N] int64. temperature: float, or [N], not differentiated. chunk_tokens: most tokens of a
    logits chunk; None keeps it within 256 MiB. impl: auto | triton | torch | reference.

    Returns (logp, entropy, lse), each [N] fp32 in nats (fp64 for fp64 inputs); logp and entropy are differentiable in
    hidden, weight and bias, lse is not. Backward recomputes the logits of those rows only whose incoming gradient is
    not zero. bf16 logits are rounded to bf16 before the softmax, as the plain bf16 linear layer does.

    Raises ValueError for wrong shapes, dtypes, ids or temperature, NotImplementedError for impl="triton".
    Left out: softcap, logit scale, LoRA on the head, unrounded bf16 logits, double backward, torch.compile.
    """
    chosen = resolve("linear_logprob", impl, hidden.device.type)
    head = head_inputs(hidden, weight, ids, bias, temperature, chunk_tokens)
    check_ids(ids, weight.shape[0])
    if chosen == "reference":
        scale = 1.0 if head.temperature is None else head.temperature
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_logprob_reference(head.hidden, head.weight, head.ids, head.bias, scale)
    result: tuple[Tensor, Tensor, Tensor] = _LinearLogprob.apply(head.hidden, head.weight, head.bias, head)
    return result


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens = hidden.shape[0]
        logp, entropy, lse = (torch.empty(num_tokens, dtype=head.stat_dtype, device=hidden.device) for _ in range(3))
        rows = torch.arange(num_tokens, device=hidden.device)
        chunks = LogitChunks(head, rows)
        with torch.autocast(hidden.device.type, enabled=False):
            block = row_block(head, chunks)
            for chunk_rows, logits in chunks:
                for part, z in zip(chunk_rows.split(block.rows), logits.split(block.rows), strict=True):
                    stats = block.load(z, *select(part, head.ids, head.temperature))
                    logp[part], entropy[part], lse[part] = stats.logp, stats.entropy, stats.lse
        ctx.save_for_backward(hidden, weight, bias, head.ids, head.temperature)
        ctx.chunk_tokens, ctx.needs = head.chunk_tokens, head.needs
        ctx.mark_non_differentiable(lse)
        return logp, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor, g_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, temperature = ctx.saved_tensors
        head = HeadInputs(hidden, weight, bias, ids, temperature, ctx.chunk_tokens, ctx.needs)
        with torch.autocast(hidden.device.type, enabled=False):
            return *logprob_backward(head, g_logp, g_entropy), None


def logprob_backward(
    head: HeadInputs, g_logp: Tensor, g_entropy: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dW, db) from the gradients [N] of logp and entropy, with the logits computed again."""
    rows = ((g_logp != 0) | (g_entropy != 0)).nonzero().squeeze(1)
    has_entropy = bool((g_entropy != 0).any())
    chunks = LogitChunks(head, rows)
    grads = HeadGradients(head, head.needs, chunks.count)
    block = row_block(head, chunks)
    for chunk_rows, logits in chunks:
        for part, z in zip(chunk_rows.split(block.rows), logits.split(block.rows), strict=True):
            ids, temperature = select(part, head.ids, head.temperature)
            stats = block.load(z, ids, temperature)
            scale = 1.0 if temperature is None else temperature
            g_ent = g_entropy[part] / scale if has_entropy else None
            block.write_dlogits(z, None, ids, g_logp[part] / scale, g_ent, stats)
        grads.add(logits, chunk_rows)
    return grads.result()


def row_block(head: HeadInputs, chunks: LogitChunks) -> RowBlock:
    """The work buffers for one chunk of `chunks`."""
    return RowBlock(chunks.chunk, head.weight.shape[0], head.stat_dtype, head.hidden.device, head.bias is not None)


def select(rows: Tensor, ids: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """ids and temperature of the tokens `rows`."""
    return ids.index_select(0, rows), None if temperature is None else temperature.index_select(0, rows)
