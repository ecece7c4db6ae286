"""Launches the Triton row kernels on tiles of logits: checks, block sizes and grids, in plain torch.

It owns the launch of every kernel in kernels.py, as a `Call` that can be run or compiled ahead of time. It refuses GEMMs,
losses, and autotuning: a kernel that works in place must not run twice on the same data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastreason_kernels.transform import IDENTITY, Transform

KINDS = ("reverse", "forward", "jsd")

# 32 logits a thread in flight, in loads of 16 bytes. Reasoned for an H200, not measured: 4.3 TB/s at 700 ns needs 3 MB
# in flight, 23 KB an SM. A program of 128 threads has 16 KB of fp32 in flight (8 KB of bf16), and at 48 to 72 registers
# seven or more share an SM and hide each other's arithmetic and barriers. At that speed an SM has three exp and 27
# instructions for each fp32 logit, half of it for bf16; one exp and 15 are used. More threads would only wait longer for
# each other; num_stages > 1 would send a stream that is read once through shared memory. A soft cap or a jsd holds so
# many intermediates of each logit that it takes fewer at a time, rather than registers that other programs need.
THREADS = 128
LOGITS_PER_THREAD = 32
VECTOR_BYTES = 16


@dataclass(frozen=True)
class Call:
    """One kernel launch: the kernel's name, rows (one program each), and every argument by name."""

    kernel: str
    rows: int
    args: dict[str, Any]

    @staticmethod
    def options(warp_size: int) -> dict[str, Any]:
        """How to compile it for a device whose warps have `warp_size` threads."""
        return {"num_warps": THREADS // warp_size, "num_stages": 1, "enable_fp_fusion": True}


def partials(logits: Tensor, ids: Tensor, temperature: Tensor | None, transform: Transform = IDENTITY) -> Tensor:
    """Softmax statistics of each row of a tile; `fastreason_kernels.partials` merges tiles and finishes.

        z = transform.apply(logits) / temperature
        out[r] = (m, s, z_id, ez),  m = max_j z_j,  s = sum_j exp(z_j - m),  ez = sum_j exp(z_j - m) (z_j - m)

    logits [R, C] fp32 or bf16, unit stride along columns, any row stride (a multiple of 16 is fastest). ids [R] int64:
    the target's column within this tile; outside [0, C) it is in another tile and z_id = -inf. temperature [R] fp32 > 0,
    or None for 1. Returns [R, 4] fp32. A logit of -inf is a removed column and adds 0; a row of them alone gives
    (-inf, 0, -inf, 0). NaN stays NaN. Raises ValueError for other shapes, strides, dtypes or devices.
    """
    _check_tile("logits", logits, logits)
    _check_rows(logits, torch.int64, ids=ids)
    _check_rows(logits, torch.float32, temperature=temperature)
    out = torch.empty(logits.shape[0], 4, dtype=torch.float32, device=logits.device)
    lanes = THREADS * VECTOR_BYTES // logits.element_size()
    args = {
        **{"logits": logits, "ids": ids, "temperature": temperature, "out": out},
        **{"row_stride": logits.stride(0), "num_columns": logits.shape[1]},
        **_transform_args("", transform),
        **{"DEPTH": _block(2 if transform.softcap else 1) // lanes, "LANES": lanes},
    }
    _launch(Call("partials_kernel", logits.shape[0], args))
    return out


def dlogits(
    logits: Tensor,
    out: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    transform: Transform,
    lse: Tensor,
    entropy: Tensor | None,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    *,
    logp: Tensor | None = None,
) -> None:
    """Writes d/d raw of g_logp * logp + g_entropy * entropy of each row, for the columns of a tile.

        dz_j = g_logp (1[j = id] - p_j) - g_entropy p_j (log p_j + entropy),  p_j = exp(z_j - lse)
        out_j = dz_j * scale / temperature * (1 - tanh(scale * raw_j / softcap)^2, with a softcap)

    logits, ids, temperature, transform: as in `partials`. lse, entropy, g_logp, g_entropy [R] fp32 of the whole rows;
    without g_entropy the entropy may be None. logp [R] fp32 as `finish` returned it keeps 1 - p exact at a target of p
    near 1, which z_id - lse loses to the rounding of lse; None takes that difference. out [R, C] fp32 or bf16: memory of
    its own, the logits themselves, or bf16 in the first half of each fp32 row (`gradient_view`); any other overlap is a
    ValueError. A row with both coefficients 0 becomes exact zeros and its logits are not read.
    """
    _check_tile("logits", logits, logits)
    _check_out("logits", logits, out)
    _check_rows(logits, torch.int64, ids=ids)
    coefficients = {"g_logp": g_logp, "g_entropy": g_entropy}
    _check_rows(logits, torch.float32, temperature=temperature, lse=lse, entropy=entropy, logp=logp, **coefficients)
    if g_entropy is not None and entropy is None:
        raise ValueError("entropy: got None, allowed: [R] fp32 where g_entropy is given; pass what `finish` returned")
    args = {
        **{"logits": logits, "out": out, "ids": ids, "temperature": temperature, "lse": lse},
        **{"entropy": None if g_entropy is None else entropy, "logp": logp, **coefficients},
        **{"row_stride": logits.stride(0), "out_stride": out.stride(0), "num_columns": logits.shape[1]},
        **_transform_args("", transform),
        **{"scale": transform.scale, "BLOCK": _block(4 if transform.softcap else _ragged(logits))},
    }
    _launch(Call("dlogits_kernel", logits.shape[0], args))


def gradient_view(logits: Tensor) -> Tensor:
    """[R, C] bf16 over the memory of logits [R, C]: each row begins where its logit row does (fp32: twice the stride)."""
    return logits if logits.dtype == torch.bfloat16 else logits.view(torch.bfloat16)[:, : logits.shape[1]]


def divergence_partials(
    student: Tensor,
    teacher: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    student_temperature: Tensor | None = None,
    teacher_temperature: Tensor | None = None,
    student_transform: Transform = IDENTITY,
    teacher_transform: Transform = IDENTITY,
) -> Tensor:
    """Divergence of two rows of logits over a tile, and the centre of its gradient; both add up over tiles.

        log p = z_student - student_lse,  log q = z_teacher - teacher_lse,  r = log q - log p
        reverse  value = p (expm1(r) - r)                                   direction = p (log p - log q)
        forward  value = q (expm1(-r) + r)                                  direction = p - q
        jsd      value = beta q log(q / m) + (1 - beta) p log(p / m)        direction = (1 - beta) p log(p / m)
                 m = beta q + (1 - beta) p  (generalised JSD, arXiv 2306.13649)
        out[r] = (sum_j value_j, sum_j direction_j)

    student, teacher [R, C] fp32 or bf16 each, as the logits of `partials`, in the common columns only; each lse [R] fp32
    of the whole row over the common columns. 0 < beta < 1, for jsd only. Returns [R, 2] fp32. Every value is >= 0: jsd's
    with the terms of q - m and p - m, which cancel. Since p expm1(r) = q - p counts too (it sums to 0 over whole rows), a
    column removed (-inf) from p adds q to the reverse KL and one removed from q adds p to the forward KL; removed from
    the other side alone it makes them +inf. Raises ValueError as `partials` does, and for kind or beta.
    """
    out = torch.empty(student.shape[0], 2, dtype=torch.float32, device=student.device)
    softcap = student_transform.softcap is not None or teacher_transform.softcap is not None
    args = _divergence_args(student, teacher, student_lse, teacher_lse, kind, beta, softcap)
    args |= _side_args(student, "student", student_temperature, student_transform)
    args |= _side_args(student, "teacher", teacher_temperature, teacher_transform)
    _launch(Call("divergence_partials_kernel", student.shape[0], args | {"out": out}))
    return out


def divergence_dlogits(
    student: Tensor,
    teacher: Tensor,
    out: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    weight: Tensor,
    centre: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    student_temperature: Tensor | None = None,
    teacher_temperature: Tensor | None = None,
    student_transform: Transform = IDENTITY,
    teacher_transform: Transform = IDENTITY,
) -> None:
    """Writes weight * d value / d raw of the student's logits, for the columns of a tile.

        out_j = weight (direction_j - p_j centre) * scale / temperature * (1 - tanh(scale * raw_j / softcap)^2)

    centre [R] fp32: the second column of `divergence_partials`, summed over tiles. weight [R] fp32; where it is 0 the row
    becomes exact zeros without reading logits. out [R, C]: as in `dlogits`, over the student's memory, never the teacher's.
    The rest as in `divergence_partials`. Where the divergence is +inf the gradient is not defined.
    """
    _check_out("student", student, out)
    if _overlap(teacher, out):
        raise ValueError("out: overlaps teacher, allowed: memory of its own or the student's; give out other memory")
    _check_rows(student, torch.float32, weight=weight, centre=centre)
    softcap = student_transform.softcap is not None or teacher_transform.softcap is not None
    args = _divergence_args(student, teacher, student_lse, teacher_lse, kind, beta, softcap)
    args |= _side_args(student, "student", student_temperature, student_transform)
    args |= _side_args(student, "teacher", teacher_temperature, teacher_transform)
    args |= {"out": out, "out_stride": out.stride(0), "weight": weight, "centre": centre}
    args |= {"student_scale": student_transform.scale}
    _launch(Call("divergence_dlogits_kernel", student.shape[0], args))


def _divergence_args(
    student: Tensor, teacher: Tensor, student_lse: Tensor, teacher_lse: Tensor, kind: str, beta: float, softcap: bool
) -> dict[str, Any]:
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, allowed: {' | '.join(KINDS)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta: got {beta}, allowed: 0 < beta < 1; its limits are kind='reverse' and 'forward'")
    _check_tile("student", student, student)
    _check_tile("teacher", teacher, student)
    _check_rows(student, torch.float32, student_lse=student_lse, teacher_lse=teacher_lse)
    return {
        **{"student": student, "teacher": teacher, "student_lse": student_lse, "teacher_lse": teacher_lse},
        **{"student_stride": student.stride(0), "teacher_stride": teacher.stride(0), "num_columns": student.shape[1]},
        # Two tiles a program: half the columns keep as many bytes in flight.
        **{"KIND": kind, "beta": beta, "BLOCK": _block(4 if softcap or kind == "jsd" else 2 * _ragged(student))},
    }


def _side_args(student: Tensor, side: str, temperature: Tensor | None, transform: Transform) -> dict[str, Any]:
    _check_rows(student, torch.float32, **{f"{side}_temperature": temperature})
    return {f"{side}_temperature": temperature, **_transform_args(f"{side}_", transform)}


def _block(shrink: int) -> int:
    """Logits of a tile that a program holds at a time."""
    return THREADS * LOGITS_PER_THREAD // shrink


def _ragged(tile: Tensor) -> int:
    """2 where each logit needs a mask of its own, which takes registers as well; else 1."""
    return 1 if tile.shape[1] % VECTOR_BYTES == 0 else 2


def _transform_args(side: str, transform: Transform) -> dict[str, Any]:
    """z = gain * tanh(squeeze * raw), or gain * raw without a softcap."""
    softcap = transform.softcap
    squeeze, gain = (0.0, transform.scale) if softcap is None else (transform.scale / softcap, softcap)
    return {f"{side}squeeze": squeeze, f"{side}gain": gain, f"{side}SOFTCAP".upper(): softcap is not None}


def _check_tile(name: str, tile: Tensor, like: Tensor) -> None:
    if tile.dim() != 2 or tile.shape != like.shape or tile.device != like.device:
        raise ValueError(
            f"{name}: {tuple(tile.shape)} on {tile.device}, allowed: [R, C] = {tuple(like.shape)} on {like.device}"
        )
    if tile.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name}: {tile.dtype}, allowed: float32 or bfloat16; convert it, or use impl='torch'")
    if tile.shape[1] > 1 and tile.stride(1) != 1:
        raise ValueError(f"{name}: strides {tile.stride()}, allowed: 1 along columns; call contiguous()")


def _check_rows(tile: Tensor, dtype: torch.dtype, **rows: Tensor | None) -> None:
    for name, x in rows.items():
        if x is None:
            continue
        if x.shape != tile.shape[:1] or x.dtype != dtype or x.device != tile.device or not x.is_contiguous():
            raise ValueError(
                f"{name}: {tuple(x.shape)} {x.dtype} on {x.device}, strides {x.stride()}, allowed: [R] = "
                f"[{tile.shape[0]}] {dtype} on {tile.device}, contiguous; convert it"
            )


def _check_out(name: str, tile: Tensor, out: Tensor) -> None:
    _check_tile("out", out, tile)
    if not _overlap(tile, out):
        return
    wider = tile.element_size() // out.element_size()
    same_rows = tile.shape[0] < 2 or out.stride(0) == wider * tile.stride(0)
    if wider < 1 or tile.data_ptr() != out.data_ptr() or not same_rows:
        raise ValueError(
            f"out: {out.dtype}, strides {out.stride()}, overlaps {name} ({tile.dtype}, strides {tile.stride()}), allowed: "
            f"other memory, {name} itself, or gradient_view({name})"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "meta" or a.numel() == 0 or b.numel() == 0:
        return False
    (first, last), (other_first, other_last) = _extent(a), _extent(b)
    return first < other_last and other_first < last


def _extent(x: Tensor) -> tuple[int, int]:
    elements = (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    return x.data_ptr(), x.data_ptr() + elements * x.element_size()


_recorded: ContextVar[list[Call] | None] = ContextVar("_recorded", default=None)


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Within it the launchers append to the list that it yields, and run nothing: tensors may be on "meta"."""
    calls: list[Call] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def kernel_module() -> ModuleType:
    """kernels.py; imported here, because it needs triton."""
    return import_module("fastreason_kernels.row_kernels.kernels")


def _launch(call: Call) -> None:
    calls = _recorded.get()
    if calls is not None:
        calls.append(call)
        return
    if call.rows == 0:
        return
    kernel = getattr(kernel_module(), call.kernel)
    device = call.args["out"].device
    interpreted = type(kernel).__name__ == "InterpretedFunction"
    if not interpreted and device.type != "cuda":
        raise ValueError(
            f"{call.kernel}: tensors on {device}, allowed: cuda; or set TRITON_INTERPRET=1 before triton is imported"
        )
    options = call.options(64 if torch.version.hip else 32)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(call.rows,)](**call.args, **options)
