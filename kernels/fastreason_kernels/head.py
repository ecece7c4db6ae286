"""What every operation takes: a head's tensors and options, checked once, cast once, and passed through torch.library.

It owns the checks, autocast's cast, and the encoding of options as a string (a custom operator takes no dataclass). It
refuses to compute anything.
"""

from __future__ import annotations

import ast
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreason_kernels.lora import LoraHead
from fastreason_kernels.transform import IDENTITY, Transform

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
LOGITS = ("auto", "bf16", "fp32")
STRATEGIES = ("auto", "A", "B", "F")


class HeadTensors(NamedTuple):
    """The tensors of a head: z = softcap(scale * (hidden @ weight.T + bias + lora_hidden @ lora_weight.T)) / temperature.

    hidden [N, D], weight [V, D] (or this rank's shard of it), bias [V] or None, lora_hidden [N, r] and lora_weight
    [V, r] or None: one dtype. ids [N] int64. temperature [N] or None for 1. In this order they open each operator.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_hidden: Tensor | None
    lora_weight: Tensor | None
    ids: Tensor
    temperature: Tensor | None

    @property
    def stat_dtype(self) -> torch.dtype:
        """The dtype of statistics and row arithmetic: fp32, or fp64 for fp64 inputs."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The five tensors that can have a gradient, in order."""
        return tuple(self[:5])


@dataclass(frozen=True)
class HeadOptions:
    """The numbers and names that belong to a head. group: a process group's name where weight is a shard, else ""."""

    transform: Transform = IDENTITY
    chunk_tokens: int | None = None
    chunk_vocab: int | None = None
    logits: str = "auto"
    impl: str = "auto"
    group: str = ""

    def encode(self) -> str:
        """A string for a custom operator; `HeadOptions.decode` undoes it."""
        numbers = [self.transform.scale, self.transform.softcap, self.chunk_tokens, self.chunk_vocab]
        if torch.compiler.is_compiling():
            # A number that differed between two calls is symbolic by then, and must be a constant to be in a string.
            from torch.fx.experimental.symbolic_shapes import guard_scalar

            numbers = [None if number is None else guard_scalar(number) for number in numbers]
        return repr([*numbers, self.logits, self.impl, self.group])

    @staticmethod
    @functools.cache
    def decode(encoded: str) -> HeadOptions:
        """The options that `encode` made a string of."""
        scale, softcap, *rest = ast.literal_eval(encoded)
        return HeadOptions(Transform(scale, softcap), *rest)


def head_arguments(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: LoraHead | None = None,
    logits: str = "auto",
    group: Any = None,
    impl: str = "auto",
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> tuple[HeadTensors, HeadOptions]:
    """Checks what can be checked without reading values, casts under autocast; raises ValueError naming what is wrong."""
    _check_shapes(hidden, weight, ids, bias, lora)
    _require("chunk_tokens", chunk_tokens, chunk_tokens is None or chunk_tokens >= 1, "None or >= 1")
    _require("chunk_vocab", chunk_vocab, chunk_vocab is None or chunk_vocab >= 1, "None or >= 1")
    _require("softcap", softcap, softcap is None or 0 < softcap < math.inf, "None or > 0")
    _require("logit_scale", logit_scale, 0 < logit_scale < math.inf, "> 0")
    _require("logits", logits, logits in LOGITS, " | ".join(LOGITS))
    device = hidden.device.type
    tensors = [hidden, weight, bias, *((None, None, 1.0) if lora is None else lora)[:2]]
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        tensors = [None if x is None else x.to(dtype) for x in tensors]
    hidden, weight, bias, lora_a, lora_weight = tensors
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) > 1 or hidden.dtype not in DTYPES:
        names = sorted(str(dtype) for dtype in dtypes)
        raise ValueError(f"hidden, weight, bias, lora: dtypes {names}, allowed: one of {DTYPES} for all of them")
    lora_hidden = None
    if lora is not None:
        with torch.autocast(device, enabled=False):
            lora_hidden = torch.nn.functional.linear(hidden, lora_a) * lora.scale
    stat_dtype = torch.promote_types(hidden.dtype, torch.float32)
    scale = _temperature(temperature, hidden.shape[0], stat_dtype, hidden.device)
    head = HeadTensors(hidden, weight, bias, lora_hidden, lora_weight, ids, scale)
    name = "" if group is None else group.group_name
    return head, HeadOptions(
        Transform(float(logit_scale), None if softcap is None else float(softcap)),
        chunk_tokens,
        chunk_vocab,
        logits,
        impl,
        name,
    )


def needs_gradient(head: HeadTensors) -> list[bool]:
    """Which of the five differentiable tensors want a gradient in this call."""
    grad = torch.is_grad_enabled()
    return [grad and x is not None and x.requires_grad for x in head.differentiable()]


def check_values(head: HeadTensors, rows: Tensor | None, vocab: int) -> None:
    """Raises ValueError for an id outside [0, vocab) or a temperature <= 0 in `rows` [N] bool (None: all).

    On a CPU only: elsewhere it would wait for the device.
    """
    if head.ids.device.type != "cpu":
        return
    ids = head.ids if rows is None else head.ids.masked_fill(~rows, 0)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(
            f"ids: values {int(ids.min())} to {int(ids.max())}, allowed: 0 to {vocab - 1}; mask the others"
        )
    scale = head.temperature
    if scale is not None and not bool((scale > 0).all()):
        raise ValueError(f"temperature: smallest value {float(scale.min())}, allowed: > 0")


def _check_shapes(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, lora: LoraHead | None) -> None:
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            "weight: a ZeRO-3 shard that is not gathered; call the operation inside the forward of the module that owns "
            "it (FusedLMHead does), where DeepSpeed gathers it, for the backward too"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden, weight: shapes {tuple(hidden.shape)}, {tuple(weight.shape)}, allowed: [N, D], [V, D]; flatten "
            "batch and sequence into N"
        )
    num_tokens, vocab = hidden.shape[0], weight.shape[0]
    if ids.shape != (num_tokens,) or ids.dtype != torch.int64:
        raise ValueError(f"ids: shape {tuple(ids.shape)} {ids.dtype}, allowed: [N] = [{num_tokens}] int64")
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias: shape {tuple(bias.shape)}, allowed: [V] = [{vocab}]")
    if lora is None:
        return
    rank = lora.a.shape[0]
    if lora.a.shape != (rank, hidden.shape[1]) or lora.b.shape != (vocab, rank):
        raise ValueError(
            f"lora: shapes {tuple(lora.a.shape)}, {tuple(lora.b.shape)}, allowed: [r, D], [V, r] with D = "
            f"{hidden.shape[1]}, V = {vocab}"
        )


def _temperature(
    temperature: float | Tensor, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if isinstance(temperature, Tensor):
        if temperature.shape != (num_tokens,):
            raise ValueError(f"temperature: shape {tuple(temperature.shape)}, allowed: a float or [N] = [{num_tokens}]")
        return temperature.detach().to(dtype)
    _require("temperature", temperature, 0 < temperature < math.inf, "> 0")
    # Not torch.full: there torch.compile makes the number a constant, and each new temperature compiles anew.
    return None if temperature == 1 else torch.ones(num_tokens, dtype=dtype, device=device) * temperature


def _require(key: str, value: Any, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{key}: got {value!r}, allowed: {allowed}")
