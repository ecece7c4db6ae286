"""linear_policy_loss: any policy loss straight from hidden states, its gradient made while the logits are in hand.

It owns the public function, the choice of strategy and the autograd node of strategy A (3 head GEMMs with both
gradients). It refuses to hold loss arithmetic: that is policy_math, called on each block of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastreason_kernels.dispatch import resolve
from fastreason_kernels.head import HeadGradients, HeadInputs, LogitChunks, check_ids, head_inputs
from fastreason_kernels.linear_logprob.function import linear_logprob, row_block, select
from fastreason_kernels.linear_policy_loss.reference import linear_policy_loss_reference
from fastreason_kernels.policy_math import PolicyLossOutput, PolicyLossSpec, check_columns, evaluate, policy_loss

STATISTICS = ("all", "active")


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    spec: PolicyLossSpec,
    *,
    behaviour_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    statistics: Literal["all", "active"] = "all",
    impl: str = "auto",
    chunk_tokens: int | None = None,
) -> PolicyLossOutput:
    """The summed policy loss of tokens from hidden states and the head, without `[N, V]` logits.

        logp, entropy, _ = linear_logprob(hidden, weight, ids, bias=bias, temperature=temperature)
        return policy_loss(logp, entropy, advantages, spec, ...)        # see there for the formula and the columns

    hidden [N, D], weight [V, D], bias [V] or None: bf16, fp32 or fp64, differentiated. ids [N] int64. advantages,
    behaviour_logp, ref_logp, sampler_logp, token_weight: [N] float, not differentiated. mask: [N] bool; False rows are
    skipped whatever they hold. sequence_ids: [N] int64. temperature: float or [N]. The result is a sum: fold the one
    division by the global count into token_weight, or divide loss_sum.

    statistics: "all" computes logp, entropy, kl, ratio of every unmasked token (one head GEMM for those without a
    gradient); "active" skips tokens known beforehand to have no gradient (zero weight; zero advantage without KL and
    entropy terms) and reports NaN and computed = False for them. chunk_tokens, impl: as in linear_logprob. With
    ratio="sequence" every unmasked token is computed, and linear_logprob and policy_loss are composed: four head GEMMs
    instead of three, as that ratio couples tokens of different chunks.

    Raises ValueError for wrong or missing tensors, NotImplementedError for impl="triton".
    Left out: strategy F for frozen heads, softcap, LoRA on the head, double backward, torch.compile.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics: got {statistics!r}, allowed: {' | '.join(STATISTICS)}")
    chosen = resolve("linear_policy_loss", impl, hidden.device.type)
    head = head_inputs(hidden, weight, ids, bias, temperature, chunk_tokens)
    columns = {
        "advantages": advantages,
        "behaviour_logp": behaviour_logp,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
        "token_weight": token_weight,
        "sequence_ids": sequence_ids,
    }
    check_columns(spec, hidden.shape[0], {**columns, "mask": mask})
    check_ids(ids if mask is None else ids.masked_fill(~mask, 0), weight.shape[0])
    given = {name: value.detach() for name, value in columns.items() if value is not None}
    if chosen == "reference":
        return _reference(head, spec, given, mask)
    if spec.ratio == "sequence":
        return _composed(head, spec, given, mask, impl)
    active, idle = _partition(spec, given, mask, hidden.shape[0], hidden.device)
    job = _Job(head, spec, given, active, idle if statistics == "all" else idle[:0])
    return PolicyLossOutput(*_LinearPolicyLoss.apply(head.hidden, head.weight, head.bias, job))


def _partition(
    spec: PolicyLossSpec, columns: dict[str, Tensor], mask: Tensor | None, num_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row indices of the unmasked tokens that may have a gradient, and of those that certainly have none."""
    unmasked = torch.ones(num_tokens, dtype=torch.bool, device=device) if mask is None else mask
    active = unmasked
    if not spec.acts_at_zero_advantage:
        active = active & (columns["advantages"] != 0)
    if "token_weight" in columns:
        active = active & (columns["token_weight"] != 0)
    return active.nonzero().squeeze(1), (unmasked & ~active).nonzero().squeeze(1)


def _reference(
    head: HeadInputs, spec: PolicyLossSpec, columns: dict[str, Tensor], mask: Tensor | None
) -> PolicyLossOutput:
    scale = 1.0 if head.temperature is None else head.temperature
    with torch.autocast(head.hidden.device.type, enabled=False):
        return linear_policy_loss_reference(
            head.hidden, head.weight, head.ids, spec=spec, mask=mask, bias=head.bias, temperature=scale, **columns
        )


def _composed(
    head: HeadInputs, spec: PolicyLossSpec, columns: dict[str, Tensor], mask: Tensor | None, impl: str
) -> PolicyLossOutput:
    """Strategy B: all log-probabilities first, then the loss, whose gradient recomputes the logits."""
    num_tokens, device = head.hidden.shape[0], head.hidden.device
    rows = torch.arange(num_tokens, device=device) if mask is None else mask.nonzero().squeeze(1)
    ids, temperature = select(rows, head.ids, head.temperature)
    with torch.autocast(device.type, enabled=False):
        logp, entropy, _ = linear_logprob(
            head.hidden.index_select(0, rows),
            head.weight,
            ids,
            bias=head.bias,
            temperature=1.0 if temperature is None else temperature,
            impl=impl,
            chunk_tokens=head.chunk_tokens,
        )
    chosen = {name: value.index_select(0, rows) for name, value in columns.items()}
    out = policy_loss(logp, entropy, spec=spec, **chosen)
    whole = _TokenReport.empty(num_tokens, logp.dtype, device)
    whole.write(rows, out)
    return PolicyLossOutput(out.loss_sum, *whole.tensors())


@dataclass(frozen=True)
class _Job:
    """What one call of strategy A works on: the tokens `active` with gradients, `idle` for their statistics only."""

    head: HeadInputs
    spec: PolicyLossSpec
    columns: dict[str, Tensor]
    active: Tensor
    idle: Tensor


@dataclass(frozen=True)
class _TokenReport:
    """The [N] members of PolicyLossOutput, in its order, filled a block of rows at a time."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor
    ratio: Tensor
    clipped: Tensor
    computed: Tensor

    @classmethod
    def empty(cls, num_tokens: int, dtype: torch.dtype, device: torch.device) -> _TokenReport:
        numbers = (torch.full((num_tokens,), torch.nan, dtype=dtype, device=device) for _ in range(4))
        flags = (torch.zeros(num_tokens, dtype=torch.bool, device=device) for _ in range(2))
        return cls(*numbers, *flags)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def write(self, rows: Tensor, out: PolicyLossOutput) -> None:
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, rows, getattr(out, field.name))


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        report = _TokenReport.empty(hidden.shape[0], job.head.stat_dtype, hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            loss, grads = _run(job, job.active, report, job.head.needs)
            idle_loss, _ = _run(job, job.idle, report, (False, False, False))
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*report.tensors())
        return loss + idle_loss, *report.tensors()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        # On a CPU the usual factor of 1 is seen without a wait, and spares a pass over dW.
        if g_loss.device.type != "cpu" or float(g_loss) != 1:
            grads = tuple(None if grad is None else grad * g_loss.to(grad.dtype) for grad in grads)
        return *grads, None


def _run(
    job: _Job, rows: Tensor, report: _TokenReport, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Loss sum and (dX, dW, db) of the tokens `rows`; their statistics go into `report`."""
    head = job.head
    chunks = LogitChunks(head, rows)
    grads = HeadGradients(head, needs, chunks.count)
    block = row_block(head, chunks)
    loss = torch.zeros((), dtype=head.stat_dtype, device=head.hidden.device)
    for chunk_rows, logits in chunks:
        kept: list[Tensor] = []
        num_kept = 0
        for part, z in zip(chunk_rows.split(block.rows), logits.split(block.rows), strict=True):
            ids, temperature = select(part, head.ids, head.temperature)
            stats = block.load(z, ids, temperature)
            out, g_logp, g_entropy = _coefficients(job, part, stats.logp, stats.entropy)
            report.write(part, out)
            loss += out.loss_sum.detach()
            if not any(needs):
                continue
            if temperature is not None:
                g_logp = g_logp / temperature
                g_entropy = None if g_entropy is None else g_entropy / temperature
            keep = (g_logp != 0 if g_entropy is None else (g_logp != 0) | (g_entropy != 0)).nonzero().squeeze(1)
            # Rows with a gradient close up at the front of the chunk, never past the block that is already read.
            target = logits[num_kept : num_kept + keep.shape[0]]
            block.write_dlogits(target, keep, ids, g_logp, g_entropy, stats)
            kept.append(part.index_select(0, keep))
            num_kept += keep.shape[0]
        if kept:
            grads.add(logits[:num_kept], torch.cat(kept))
    return loss, grads.result()


def _coefficients(
    job: _Job, rows: Tensor, logp: Tensor, entropy: Tensor
) -> tuple[PolicyLossOutput, Tensor, Tensor | None]:
    """The loss of a block, and its derivatives [R] with respect to logp and entropy (None: no entropy term)."""
    columns = {name: value.index_select(0, rows) for name, value in job.columns.items() if name != "sequence_ids"}
    with torch.enable_grad():
        logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        out = evaluate(logp, entropy, job.spec, **columns)
        if job.spec.entropy_coef == 0:
            (g_logp,) = torch.autograd.grad(out.loss_sum, logp)
            return out, g_logp, None
        g_logp, g_entropy = torch.autograd.grad(out.loss_sum, (logp, entropy), allow_unused=False)
    return out, g_logp, g_entropy
