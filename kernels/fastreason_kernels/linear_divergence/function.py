"""linear_divergence: the divergence from a teacher over the whole vocabulary; the public function and its operator.

It owns the checks of the teacher and the autograd. It refuses to compute: gradient_in_forward.py walks, rows.py and
topk.py hold the arithmetic.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastreason_kernels.dispatch import IMPLS, OPERATOR_TAGS
from fastreason_kernels.gemm import gradient_dtypes, scale_gradients
from fastreason_kernels.head import HeadOptions, HeadTensors, check_values, head_arguments, needs_gradient
from fastreason_kernels.linear_divergence.gradient_in_forward import against_teacher, against_top_k
from fastreason_kernels.linear_divergence.reference import (
    divergence_reference,
    head_logits,
    topk_divergence_reference,
)
from fastreason_kernels.linear_divergence.topk import DivergenceSpec, check_top_k
from fastreason_kernels.lora import LoraHead


class DivergenceOutput(NamedTuple):
    """What a divergence returns: the differentiable sum, and detached values of each token.

    loss_sum: [] fp32 (fp64 for fp64 inputs), a sum over tokens, connected to the graph even when nothing is active.
    divergence: [N] nats, unweighted, NaN where not computed. computed: [N] bool, False for masked and weightless tokens.
    """

    loss_sum: Tensor
    divergence: Tensor
    computed: Tensor


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_logp: Tensor | None = None,
    direction: Literal["reverse", "forward", "jsd"] = "reverse",
    beta: float = 0.5,
    tail: Literal["bucket", "drop", "renormalise"] = "bucket",
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    lora: LoraHead | None = None,
    logits: str = "auto",
    impl: str = "auto",
    chunk_tokens: int | None = None,
) -> DivergenceOutput:
    """The summed divergence of a student head from a teacher, exact over the vocabulary, without `[N, V]` logits.

        p = softmax(student's logits), q = softmax(teacher's)          loss_sum = sum_t token_weight_t * D_t
        reverse  D = KL(p||q) = sum_j p_j log(p_j / q_j)               forward  D = KL(q||p)
        jsd      D = beta KL(q||m) + (1 - beta) KL(p||m),  m = beta q + (1 - beta) p  (GKD, arXiv 2306.13649)

    hidden [N, D], weight [V, D], bias, lora, temperature, softcap, logit_scale, logits, impl: the student's head, as in
    linear_logprob; differentiated. The teacher is not, and its head may be the student's own tensors; it is either

    teacher_hidden [N, E], teacher_weight [W, E], teacher_bias [W]: a head of its own width and dtype. teacher_temperature
    None: that of the student. Where W and V differ (a padded vocabulary), both sides are restricted to the first min(V, W)
    columns, and normalised over those. A column that a bias of -inf removes counts nothing where both lack it; the KL is
    infinite, and its gradient NaN or undefined, where only its second argument does. Or it is

    teacher_topk_ids [N, K] int64, teacher_topk_logp [N, K] nats: the teacher's most probable tokens, distinct in a row, and
    their log-probabilities over its whole vocabulary (at its own temperature; they are taken as they are). An entry is
    absent where the id is -1 or the log-probability -inf. tail (used here only): "bucket" makes the rest of both one
    token, with q_rest = 1 - sum q, at least 2^-23; "drop" sums the k terms alone, which may be negative; "renormalise"
    divides both by their sum over the k tokens (so unnormalised teacher_topk_logp is right too).

    token_weight [N] float, mask [N] bool, not differentiated. Masked and weightless tokens are skipped exactly, whatever
    they hold. chunk_tokens: most rows of a chunk of logits; None keeps both sides' chunks together within 256 MiB (2.5 GB
    on a GPU). The gradient is made in forward: 3 head products and the teacher's 1; with a frozen head one less.

    Raises ValueError for wrong, missing or contradicting tensors and options, NotImplementedError for impl="triton" where
    it cannot run. Left out: shards over a process group, gradients of the teacher, double backward.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: got {impl!r}, allowed: {' | '.join(IMPLS)}")
    spec = DivergenceSpec(direction, float(beta), tail)
    head, options = head_arguments(
        hidden,
        weight,
        _no_ids(hidden),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        lora=lora,
        logits=logits,
        impl=impl,
        chunk_tokens=chunk_tokens,
    )
    token_weight = _check_columns(hidden.shape[0], token_weight, mask)
    known = (teacher_topk_ids, teacher_topk_logp)
    others = (teacher_bias, teacher_temperature, teacher_softcap)
    _check_one_teacher((teacher_hidden, teacher_weight), known, (*others, None if teacher_logit_scale == 1 else 1))
    teacher: HeadTensors | None = None
    ids: Tensor | None = None
    logp: Tensor | None = None
    teacher_options = options
    if teacher_hidden is None or teacher_weight is None:
        ids, logp = _check_known(hidden.shape[0], *known)
    else:
        teacher, teacher_options = _teacher_head(
            head,
            (teacher_hidden, teacher_weight, teacher_bias),
            temperature=temperature if teacher_temperature is None else teacher_temperature,
            softcap=teacher_softcap,
            logit_scale=teacher_logit_scale,
            logits=logits,
        )
        head, teacher = _common_columns(head, teacher)
    if impl == "reference":
        return _reference(head, teacher, options, teacher_options, spec, ids, logp, token_weight, mask)
    side = (None,) * 4 if teacher is None else (teacher.hidden, teacher.weight, teacher.bias, teacher.temperature)
    encoded = (options.encode(), teacher_options.encode(), spec.direction, spec.beta, spec.tail)
    needs = needs_gradient(head)
    return DivergenceOutput(*_forward(*head, *side, ids, logp, token_weight, mask, *encoded, needs)[:3])


def _no_ids(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(hidden.shape[:1], dtype=torch.int64)


def _check_columns(num_tokens: int, token_weight: Tensor | None, mask: Tensor | None) -> Tensor | None:
    for name, value, kind in (("token_weight", token_weight, "float"), ("mask", mask, "bool")):
        if value is None:
            continue
        if value.shape != (num_tokens,):
            raise ValueError(f"{name}: shape {tuple(value.shape)}, allowed: [N] = [{num_tokens}]")
        if (value.dtype == torch.bool) != (kind == "bool") or not (kind == "bool" or value.is_floating_point()):
            raise ValueError(f"{name}: dtype {value.dtype}, allowed: a {kind} tensor")
    return None if token_weight is None else token_weight.detach()


def _check_one_teacher(
    head: tuple[Tensor | None, ...], known: tuple[Tensor | None, ...], head_only: tuple[object, ...]
) -> None:
    has_head, has_known = ([x is not None for x in given] for given in (head, known))
    if any(has_head) == any(has_known) or any(has_head) != all(has_head) or any(has_known) != all(has_known):
        names = ("teacher_hidden", "teacher_weight", "teacher_topk_ids", "teacher_topk_logp")
        given = [name for name, there in zip(names, has_head + has_known, strict=True) if there]
        raise ValueError(f"teacher: got {given}, allowed: the two of a head, or the two of its top k; pass one pair")
    if any(has_known) and any(x is not None for x in head_only):
        raise ValueError(
            "teacher_bias, teacher_temperature, teacher_softcap, teacher_logit_scale: given, allowed with a teacher's head "
            "only; teacher_topk_logp holds final log-probabilities"
        )


def _check_known(num_tokens: int, ids: Tensor | None, logp: Tensor | None) -> tuple[Tensor, Tensor]:
    assert ids is not None and logp is not None
    if ids.dim() != 2 or ids.shape[0] != num_tokens or ids.shape[1] < 1 or ids.dtype != torch.int64:
        raise ValueError(
            f"teacher_topk_ids: {tuple(ids.shape)} {ids.dtype}, allowed: [N, K] = [{num_tokens}, >= 1] int64"
        )
    if logp.shape != ids.shape or not logp.is_floating_point():
        raise ValueError(f"teacher_topk_logp: {tuple(logp.shape)} {logp.dtype}, allowed: {tuple(ids.shape)} float")
    return ids, logp.detach()


def _teacher_head(
    head: HeadTensors, tensors: tuple[Tensor, Tensor, Tensor | None], **options: Any
) -> tuple[HeadTensors, HeadOptions]:
    hidden, weight, bias = (None if x is None else x.detach() for x in tensors)
    assert hidden is not None and weight is not None
    try:
        teacher, teacher_options = head_arguments(hidden, weight, _no_ids(hidden), bias=bias, **options)
    except ValueError as error:
        raise ValueError(f"teacher's {error}") from None
    if hidden.shape[0] != head.hidden.shape[0]:
        raise ValueError(f"teacher_hidden: {hidden.shape[0]} tokens, allowed: N = {head.hidden.shape[0]}, as in hidden")
    return teacher, teacher_options


def _common_columns(student: HeadTensors, teacher: HeadTensors) -> tuple[HeadTensors, HeadTensors]:
    count = min(student.weight.shape[0], teacher.weight.shape[0])

    def first(head: HeadTensors) -> HeadTensors:
        if head.weight.shape[0] == count:
            return head
        bias, lora = (None if x is None else x[:count] for x in (head.bias, head.lora_weight))
        return head._replace(weight=head.weight[:count], bias=bias, lora_weight=lora)

    return first(student), first(teacher)


def _active(num_tokens: int, token_weight: Tensor | None, mask: Tensor | None, device: torch.device) -> Tensor:
    """[N] bool: the tokens that count."""
    active = torch.ones(num_tokens, dtype=torch.bool, device=device) if mask is None else mask.to(device)
    return active if token_weight is None else active & (token_weight.to(device) != 0)


def _weigh(
    values: Tensor, weights: Tensor, active: Tensor, rows: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The members of DivergenceOutput from values [K] of the tokens rows [K]."""
    report = torch.full((num_tokens,), torch.nan, dtype=values.dtype, device=values.device)
    report.index_copy_(0, rows, values.detach())
    return (values * weights.index_select(0, rows)).sum(), report, active.clone()


def _reference(
    head: HeadTensors,
    teacher: HeadTensors | None,
    options: HeadOptions,
    teacher_options: HeadOptions,
    spec: DivergenceSpec,
    ids: Tensor | None,
    logp: Tensor | None,
    token_weight: Tensor | None,
    mask: Tensor | None,
) -> DivergenceOutput:
    num_tokens, device = head.hidden.shape[0], head.hidden.device
    active = _active(num_tokens, token_weight, mask, device)
    rows = active.nonzero().squeeze(1)
    with torch.autocast(device.type, enabled=False):
        student = head_logits(_select(head, rows), options.transform)
        if teacher is not None:
            values = divergence_reference(student, head_logits(_select(teacher, rows), teacher_options.transform), spec)
        else:
            assert ids is not None and logp is not None
            values = topk_divergence_reference(student, ids[rows], logp[rows], spec)
        weights = _weights(head, token_weight)
        return DivergenceOutput(*_weigh(values.to(head.stat_dtype), weights, active, rows, num_tokens))


def _select(head: HeadTensors, rows: Tensor) -> HeadTensors:
    lora_hidden, temperature = (None if x is None else x[rows] for x in (head.lora_hidden, head.temperature))
    return head._replace(hidden=head.hidden[rows], lora_hidden=lora_hidden, temperature=temperature)


def _weights(head: HeadTensors, token_weight: Tensor | None) -> Tensor:
    if token_weight is None:
        return torch.ones(head.hidden.shape[0], dtype=head.stat_dtype, device=head.hidden.device)
    return token_weight.to(head.stat_dtype)


@torch.library.custom_op("fastreason::linear_divergence", mutates_args=(), tags=OPERATOR_TAGS)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    no_ids: Tensor,
    temperature: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_temperature: Tensor | None,
    topk_ids: Tensor | None,
    topk_logp: Tensor | None,
    token_weight: Tensor | None,
    mask: Tensor | None,
    options: str,
    teacher_options: str,
    direction: str,
    beta: float,
    tail: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The three members of DivergenceOutput, then the gradients of the five tensors of the student's head."""
    head = HeadTensors(hidden, weight, bias, lora_hidden, lora_weight, no_ids, temperature)
    active = _active(hidden.shape[0], token_weight, mask, hidden.device)
    rows, weights, chosen = (
        active.nonzero().squeeze(1),
        _weights(head, token_weight),
        DivergenceSpec(direction, beta, tail),
    )
    check_values(head, active, weight.shape[0])
    settings = HeadOptions.decode(options)
    with torch.autocast(hidden.device.type, enabled=False):
        if teacher_hidden is not None and teacher_weight is not None:
            teacher = HeadTensors(teacher_hidden, teacher_weight, teacher_bias, None, None, no_ids, teacher_temperature)
            check_values(teacher, active, teacher_weight.shape[0])
            both = (settings, HeadOptions.decode(teacher_options))
            values, grads = against_teacher((head, teacher), both, chosen, rows, weights, needs)
        else:
            assert topk_ids is not None and topk_logp is not None
            check_top_k(topk_ids[rows], topk_logp[rows], weight.shape[0], chosen)
            values, grads = against_top_k(head, settings, chosen, topk_ids, topk_logp, rows, weights, needs)
    loss_sum, report, computed = _weigh(values, weights, active, rows, hidden.shape[0])
    a, b, c, d, e = grads
    return loss_sum, report, computed, a, b, c, d, e


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    no_ids: Tensor,
    temperature: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_temperature: Tensor | None,
    topk_ids: Tensor | None,
    topk_logp: Tensor | None,
    token_weight: Tensor | None,
    mask: Tensor | None,
    options: str,
    teacher_options: str,
    direction: str,
    beta: float,
    tail: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, num_tokens = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    head = HeadTensors(hidden, weight, bias, lora_hidden, lora_weight, no_ids, temperature)
    a, b, c, d, e = (
        hidden.new_empty(tensor.shape, dtype=dtype) if need and tensor is not None else hidden.new_empty(0)
        for tensor, need, dtype in zip(head.differentiable(), needs, gradient_dtypes(head), strict=True)
    )
    report = hidden.new_empty(num_tokens, dtype=dtype)
    return hidden.new_empty((), dtype=dtype), report, hidden.new_empty(num_tokens, dtype=torch.bool), a, b, c, d, e


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.needs, ctx.dtype = inputs[-1], inputs[0].dtype


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 16
    if g_loss is None:
        return (None,) * 5 + rest
    return (*scale_gradients(ctx.saved_tensors, ctx.needs, g_loss, ctx.dtype), *rest)


_forward.register_autograd(_backward, setup_context=_setup_context)
