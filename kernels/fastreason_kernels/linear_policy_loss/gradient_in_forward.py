"""Strategy A: a token's loss gradient is made while its logits are in hand; 3 head products with both gradients.

It owns the walk over chunks and the per-token report. It refuses autograd and loss arithmetic: the latter is
policy_math.evaluate, called on each block of rows and differentiated there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastreason_kernels.gemm import HeadGradients, Tiles, gradient_dtypes
from fastreason_kernels.head import HeadOptions, HeadTensors
from fastreason_kernels.linear_logprob.strategies import select
from fastreason_kernels.partials import finish
from fastreason_kernels.policy_math import PolicyLossOutput, evaluate, known_log_weight
from fastreason_kernels.policy_spec import PolicyLossSpec
from fastreason_kernels.rows import RowCoefficients, RowOps, RowStatistics, row_ops
from fastreason_kernels.workspace import Workspace

OP = "linear_policy_loss"


@dataclass(frozen=True)
class TokenLoss:
    """A loss whose gradient on a token depends on that token only: `spec` of `columns` [N], plus what is known already.

    slope: [N] a part of d loss / d logp that needs no log-probability, or None; constant: [] its value.
    """

    spec: PolicyLossSpec
    columns: dict[str, Tensor]
    slope: Tensor | None = None
    constant: Tensor | None = None


def token_loss(
    spec: PolicyLossSpec, columns: dict[str, Tensor], mask: Tensor | None, dtype: torch.dtype, *, with_slope: bool
) -> TokenLoss:
    """The TokenLoss that equals `spec`; for ratios and weights of sequences only where spec.couples_tokens says no."""
    token_columns = {name: value for name, value in columns.items() if name != "sequence_ids"}
    log_weight = known_log_weight(spec, columns, mask)
    if log_weight is not None:
        token_columns["log_weight"] = log_weight
    if spec.ratio != "sequence":
        return TokenLoss(spec, token_columns)
    plain = replace(spec, ratio="none", gate="clip", dual_clip=None)
    if spec.gate == "cispo":
        return TokenLoss(plain, token_columns)  # a detached ratio of 1
    # The ratio is 1 whatever the log-probabilities are, so that its gate and their derivative are known beforehand.
    policy_only = replace(spec, kl="none", kl_coef=0.0, kl_weight="none", entropy_coef=0.0)

    logp = torch.zeros_like(columns["advantages"], dtype=dtype)
    slope = None
    with autograd_inside() if with_slope else contextlib.nullcontext():
        constant = evaluate(logp.requires_grad_(with_slope), None, policy_only, mask=mask, **columns).loss_sum
        if with_slope:
            (slope,) = torch.autograd.grad(constant, logp)
    token_columns["advantages"] = torch.zeros_like(logp)
    return TokenLoss(replace(plain, importance="none"), token_columns, slope, constant.detach())


@dataclass(frozen=True)
class TokenReport:
    """The [N] members of PolicyLossOutput, in its order, filled a block of rows at a time."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor
    ratio: Tensor
    clipped: Tensor
    computed: Tensor

    @classmethod
    def empty(cls, num_tokens: int, dtype: torch.dtype, device: torch.device) -> TokenReport:
        numbers = (torch.full((num_tokens,), torch.nan, dtype=dtype, device=device) for _ in range(4))
        flags = (torch.zeros(num_tokens, dtype=torch.bool, device=device) for _ in range(2))
        return cls(*numbers, *flags)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def write(self, rows: Tensor, out: PolicyLossOutput) -> None:
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, rows, getattr(out, field.name))


def run(
    head: HeadTensors,
    loss: TokenLoss,
    rows: Tensor,
    report: TokenReport,
    options: HeadOptions,
    needs: list[bool],
    workspace: Workspace,
) -> tuple[Tensor, list[Tensor]]:
    """Loss sum and the gradients of the five tensors of the tokens `rows`; their statistics go into `report`."""
    tiles = Tiles(head, rows, options, workspace=workspace)
    grads = HeadGradients(head, needs, tiles, gradient_dtypes(head))
    ops = row_ops(OP, head, tiles, options, workspace)
    total = torch.zeros((), dtype=head.stat_dtype, device=head.hidden.device)
    for chunk in tiles.row_chunks():
        total += _walk_chunk(head, loss, chunk, tiles, ops, report, grads if any(needs) else None)
    return total, grads.result()


def _walk_chunk(
    head: HeadTensors,
    loss: TokenLoss,
    chunk: Tensor,
    tiles: Tiles,
    ops: RowOps,
    report: TokenReport,
    grads: HeadGradients | None,
) -> Tensor:
    """Loss sum of the tokens `chunk`, whose gradients go into `grads`."""
    columns = slice(0, tiles.columns)
    logits = tiles.logits(chunk, columns)
    gradient = tiles.gradient_view(logits)
    total = torch.zeros((), dtype=head.stat_dtype, device=head.hidden.device)
    # Rows without a gradient (clipped ones) leave the products where that is known without waiting for a device.
    compact = head.hidden.device.type == "cpu" and ops.compacts
    kept: list[Tensor] = []
    num_kept = 0
    for part, z in zip(chunk.split(ops.rows), logits.split(ops.rows), strict=True):
        ids, temperature = select(part, head.ids, head.temperature)
        stats = RowStatistics(*finish(ops.partials(z, ids, temperature)))
        out, coefficients = _coefficients(loss, part, stats, grads is not None)
        report.write(part, out)
        total += out.loss_sum.detach()
        if coefficients is None:
            continue
        keep = coefficients.nonzero.nonzero().squeeze(1) if compact else None
        count = part.shape[0] if keep is None else keep.shape[0]
        # They close up at the front of the chunk, never past the block that is already read.
        target = gradient[num_kept : num_kept + count]
        ops.write_dlogits(z, target, ids, temperature, coefficients, stats, keep)
        kept.append(part if keep is None else part.index_select(0, keep))
        num_kept += count
    if grads is not None and kept:
        grads.add(gradient[:num_kept], torch.cat(kept), columns)
    return total


@contextlib.contextmanager
def autograd_inside() -> Iterator[None]:
    """Autograd in the body of an operator, which torch.library runs below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    # A checkpoint around the operator would otherwise run its whole region again to give these small graphs their tensors.
    hooks: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    # torch.func would be the public way, but fails under a TorchDispatchMode (a FLOP counter, selective checkpointing).
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad(), hooks:
        yield


def _coefficients(
    loss: TokenLoss, rows: Tensor, stats: RowStatistics, with_gradient: bool
) -> tuple[PolicyLossOutput, RowCoefficients | None]:
    """The loss of a block of rows, and its derivatives with respect to their logp and entropy."""
    columns = {name: value.index_select(0, rows) for name, value in loss.columns.items()}
    if not with_gradient:
        return evaluate(stats.logp, stats.entropy, loss.spec, **columns), None
    with autograd_inside():
        logp, entropy = stats.logp.detach().requires_grad_(), stats.entropy.detach().requires_grad_()
        out = evaluate(logp, entropy, loss.spec, **columns)
        g_logp, g_entropy = torch.autograd.grad(out.loss_sum, (logp, entropy), allow_unused=True)
    if loss.slope is not None:
        g_logp = g_logp + loss.slope.index_select(0, rows)
    return out, RowCoefficients(g_logp, g_entropy)
