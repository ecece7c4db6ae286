"""linear_policy_loss: any policy loss straight from hidden states; the public function, its operator, its strategies.

It owns the choice of strategy and the autograd of A; B and F are linear_logprob's, followed by policy_loss. It refuses to
hold loss arithmetic: that is policy_math.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastreason_kernels.dispatch import IMPLS, OPERATOR_TAGS
from fastreason_kernels.gemm import gradient_dtypes, scale_gradients
from fastreason_kernels.head import (
    STRATEGIES,
    HeadOptions,
    HeadTensors,
    check_values,
    head_arguments,
    needs_gradient,
)
from fastreason_kernels.linear_logprob.function import choose_strategy, logprob_of_rows
from fastreason_kernels.linear_policy_loss.gradient_in_forward import TokenReport, run, token_loss
from fastreason_kernels.linear_policy_loss.reference import linear_policy_loss_reference
from fastreason_kernels.lora import LoraHead
from fastreason_kernels.policy_math import (
    PolicyLossOutput,
    check_columns,
    evaluate,
    gradient_rows,
    known_log_weight,
    per_token,
)
from fastreason_kernels.policy_spec import PolicyLossSpec
from fastreason_kernels.workspace import Workspace

STATISTICS = ("all", "active")
COLUMNS = ("advantages", "behaviour_logp", "ref_logp", "sampler_logp", "token_weight", "sequence_ids")


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
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: LoraHead | None = None,
    statistics: Literal["all", "active"] = "all",
    strategy: str = "auto",
    logits: str = "auto",
    group: Any = None,
    impl: str = "auto",
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> PolicyLossOutput:
    """The summed policy loss of tokens from hidden states and the head, without `[N, V]` logits.

        logp, entropy, _ = linear_logprob(hidden, weight, ids, bias=bias, temperature=temperature, ...)
        return policy_loss(logp, entropy, advantages, spec, ...)        # see there for the formula and the columns

    hidden, weight, ids and all that belongs to the head (bias, temperature, softcap, logit_scale, lora, logits, group,
    impl, chunk_*): as in linear_logprob. advantages, behaviour_logp, ref_logp, sampler_logp, token_weight: [N] float, not
    differentiated (advantages also [S], one a sequence). mask: [N] bool; False rows are skipped whatever they hold.
    sequence_ids: [N] int64. These columns may stay on the CPU, all of them, when hidden is on a GPU: then A chooses rows
    without waiting for it. The result is a sum: fold the one division by the global count into token_weight.

    statistics: "all" computes logp, entropy, kl, ratio of every unmasked token (one head product for those without a
    gradient); "active" skips tokens known beforehand to have no gradient and reports NaN and computed = False for them.
    strategy: "A" makes the gradient in forward (3 head products, 2 for a frozen head), "B" recomputes the logits (4), "F"
    is for a frozen head under any loss (2; 3 with an entropy bonus). "auto": A, unless the loss couples tokens (a
    sequence's ratio against given behaviour_logp, a sequence's importance weight without it) or the head is sharded over a
    group; then F for a frozen head, else B.

    Raises ValueError for wrong or missing tensors or options, NotImplementedError for impl="triton" where it cannot run.
    Left out: double backward. Under torch.compile the spec is a constant: another one compiles anew.
    """
    for key, value, allowed in (
        ("statistics", statistics, STATISTICS),
        ("strategy", strategy, STRATEGIES),
        ("impl", impl, IMPLS),
    ):
        if value not in allowed:
            raise ValueError(f"{key}: got {value!r}, allowed: {' | '.join(allowed)}")
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
    given = (
        per_token(advantages, sequence_ids, hidden.shape[0]),
        behaviour_logp,
        ref_logp,
        sampler_logp,
        token_weight,
        sequence_ids,
    )
    columns: dict[str, Any] = {
        name: None if value is None else _column(value, head.stat_dtype)
        for name, value in zip(COLUMNS, given, strict=True)
    }
    check_columns(spec, hidden.shape[0], {**columns, "mask": mask})
    if impl == "reference":
        return _reference(head, options, spec, columns, mask, lora)
    chosen = _choose(strategy, head, options, spec, behaviour_logp is not None)
    if chosen == "A":
        needs = needs_gradient(head)
        return PolicyLossOutput(
            *_forward(*head, *columns.values(), mask, options.encode(), spec.encoded, statistics, needs)[:7]
        )
    return _composed(head, options, spec, columns, mask, statistics, chosen)


def _column(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A column without its graph; numbers in the dtype of the statistics."""
    return value.detach().to(dtype) if value.is_floating_point() else value.detach()


def _choose(strategy: str, head: HeadTensors, options: HeadOptions, spec: PolicyLossSpec, has_behaviour: bool) -> str:
    coupled = spec.couples_tokens(has_behaviour)
    if strategy == "A" and (coupled or options.group):
        why = "a group merges statistics of ranks" if options.group else _coupling(spec, has_behaviour)
        raise ValueError(f"strategy: got 'A', allowed: auto | B | F, as {why}")
    if strategy == "A" or (strategy == "auto" and not coupled and not options.group):
        return "A"
    chosen = choose_strategy(strategy, head, options, spec.entropy_coef != 0)
    # With an entropy bonus F costs as much as B without rows to skip, but keeps no products for the backward.
    frozen = needs_gradient(head) == [True, False, False, False, False]
    return "F" if strategy == "auto" and frozen and not options.group else chosen


def _coupling(spec: PolicyLossSpec, has_behaviour: bool) -> str:
    if spec.couples_weights(has_behaviour):
        return "a sequence's importance weight without behaviour_logp couples its tokens"
    return "a sequence's ratio couples its tokens"


def _reference(
    head: HeadTensors,
    options: HeadOptions,
    spec: PolicyLossSpec,
    columns: dict[str, Any],
    mask: Tensor | None,
    lora: LoraHead | None,
) -> PolicyLossOutput:
    if options.group:
        raise ValueError("impl: got 'reference', allowed with a group: auto | triton | torch")
    dtype = head.hidden.dtype
    check_values(head, mask, head.weight.shape[0])
    with torch.autocast(head.hidden.device.type, enabled=False):
        return linear_policy_loss_reference(
            head.hidden,
            head.weight,
            head.ids,
            spec=spec,
            mask=mask,
            bias=head.bias,
            temperature=1.0 if head.temperature is None else head.temperature,
            transform=options.transform,
            lora=None if lora is None else LoraHead(lora.a.to(dtype), lora.b.to(dtype), lora.scale),
            **columns,
        )


def _composed(
    head: HeadTensors,
    options: HeadOptions,
    spec: PolicyLossSpec,
    columns: dict[str, Any],
    mask: Tensor | None,
    statistics: str,
    strategy: str,
) -> PolicyLossOutput:
    """Strategies B and F: all log-probabilities first, then the loss, through whose graph the gradient comes back."""
    device = head.hidden.device
    columns = {name: None if value is None else value.to(device, non_blocking=True) for name, value in columns.items()}
    mask = None if mask is None else mask.to(device, non_blocking=True)
    active = gradient_rows(spec, columns, mask)
    rows = active if statistics == "active" else mask
    logp, entropy, _ = logprob_of_rows(head, options, rows, active, strategy, spec.entropy_coef != 0)
    with torch.autocast(head.hidden.device.type, enabled=False):
        # Of whole sequences, before rows without a gradient are left out of the mask.
        log_weight = known_log_weight(spec, columns, mask)
        return evaluate(logp, entropy, spec, mask=rows, log_weight=log_weight, **columns)


@torch.library.custom_op("fastreason::linear_policy_loss", mutates_args=(), tags=OPERATOR_TAGS)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    ids: Tensor,
    temperature: Tensor | None,
    advantages: Tensor,
    behaviour_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    token_weight: Tensor | None,
    sequence_ids: Tensor | None,
    mask: Tensor | None,
    options: str,
    spec: str,
    statistics: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The seven members of PolicyLossOutput, then the gradients of the five tensors of the head."""
    head = HeadTensors(hidden, weight, bias, lora_hidden, lora_weight, ids, temperature)
    given = (advantages, behaviour_logp, ref_logp, sampler_logp, token_weight, sequence_ids)
    columns = {name: value for name, value in zip(COLUMNS, given, strict=True) if value is not None}
    chosen, settings = PolicyLossSpec.decode(spec), HeadOptions.decode(options)
    check_values(head, mask, weight.shape[0])
    # Where the columns are on the CPU, choosing rows waits for no device.
    active = gradient_rows(chosen, columns, mask)
    idle = ~active if mask is None else mask & ~active
    active_rows, idle_rows = (x.nonzero().squeeze(1).to(hidden.device, non_blocking=True) for x in (active, idle))
    columns = {name: value.to(hidden.device, non_blocking=True) for name, value in columns.items()}
    mask = None if mask is None else mask.to(hidden.device, non_blocking=True)
    workspace = Workspace()
    report = TokenReport.empty(hidden.shape[0], head.stat_dtype, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        loss = token_loss(chosen, columns, mask, head.stat_dtype, with_slope=any(needs))
        total, grads = run(head, loss, active_rows, report, settings, needs, workspace)
        if loss.constant is not None:
            total = total + loss.constant
        if statistics == "all":
            rest, _ = run(head, loss, idle_rows, report, settings, [False] * 5, workspace)
            total = total + rest
    a, b, c, d, e = grads
    return total, report.logp, report.entropy, report.kl, report.ratio, report.clipped, report.computed, a, b, c, d, e


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    ids: Tensor,
    temperature: Tensor | None,
    advantages: Tensor,
    behaviour_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    token_weight: Tensor | None,
    sequence_ids: Tensor | None,
    mask: Tensor | None,
    options: str,
    spec: str,
    statistics: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, num_tokens = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    logp, entropy, kl, ratio = (hidden.new_empty(num_tokens, dtype=dtype) for _ in range(4))
    clipped, computed = (hidden.new_empty(num_tokens, dtype=torch.bool) for _ in range(2))
    head = HeadTensors(hidden, weight, bias, lora_hidden, lora_weight, ids, temperature)
    a, b, c, d, e = (
        hidden.new_empty(tensor.shape, dtype=dtype) if need and tensor is not None else hidden.new_empty(0)
        for tensor, need, dtype in zip(head.differentiable(), needs, gradient_dtypes(head), strict=True)
    )
    return hidden.new_empty((), dtype=dtype), logp, entropy, kl, ratio, clipped, computed, a, b, c, d, e


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[7:])
    ctx.needs, ctx.dtype = inputs[-1], inputs[0].dtype


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 13
    if g_loss is None:
        return (None,) * 5 + rest
    return (*scale_gradients(ctx.saved_tensors, ctx.needs, g_loss, ctx.dtype), *rest)


_forward.register_autograd(_backward, setup_context=_setup_context)
