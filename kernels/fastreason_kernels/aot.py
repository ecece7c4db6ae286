"""Compiles every Triton kernel ahead of time, on a machine without a GPU, and reports what the compilers made of it.

It owns the list of variants, made by the launchers themselves with tensors on "meta", and the readings from the compiled
code. It refuses to run a kernel and to judge: the limits are the tests'.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastreason_kernels.row_kernels import launch
from fastreason_kernels.row_kernels.launch import Call
from fastreason_kernels.transform import Transform

# Name: backend, architecture, threads of a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Logits and what is written over them.
IN_OUT = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))
ROWS, ALIGNED, RAGGED = 4096, 128256, 5003


@dataclass(frozen=True)
class Variant:
    """A launch to compile, and its options in words."""

    options: str
    call: Call


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target: registers a thread; spills and shared memory in bytes (gfx942: spills in registers).

    wgmma: whether sm_90 code with a dot uses wgmma.mma_async; None for others. guarded: whether a barrier stands between
    the last load and the stores of a kernel that may write over its logits; None for others. wide_rows: whether the row's
    number has 64 bits before anything is done with it (rows times columns pass 2^31).
    """

    kernel: str
    options: str
    target: str
    registers: int
    spills: int
    shared: int
    wgmma: bool | None
    guarded: bool | None
    wide_rows: bool


def kernel_names() -> set[str]:
    """Names of all kernels of kernels.py that can be launched: those that the module itself ends in `_kernel`."""
    return {name for name in vars(launch.kernel_module()) if name.endswith("_kernel")}


def variants(every: bool = False) -> Iterator[Variant]:
    """The launches to compile: each kernel, kind and dtype with all options on and ragged columns, and most with all off.

    every: instead all combinations of the options, with aligned columns and with ragged ones.
    """
    switches = (False, True)
    for softcap, temperature, entropy in (
        product(switches, repeat=3) if every else zip(switches, switches, switches, strict=True)
    ):
        for columns in (ALIGNED, RAGGED) if every else (RAGGED if softcap else ALIGNED,):
            options = f"{columns}{_words(softcap=softcap, temperature=temperature)}"
            for logits, out in IN_OUT:
                words = f"{NAMES[logits]} to {NAMES[out]} {options}{_words(entropy=entropy)}"
                yield Variant(words, _dlogits(logits, out, columns, softcap, temperature, entropy))
                if every or not softcap:
                    without = _dlogits(logits, out, columns, softcap, temperature, entropy, logp=False)
                    yield Variant(f"{words} without logp", without)
            if entropy and every:
                continue  # only dlogits knows an entropy
            for logits in NAMES:
                words = f"{NAMES[logits]} {options}"
                yield Variant(words, _partials(logits, columns, softcap, temperature))
                if logits == torch.bfloat16 and not every and not softcap:
                    continue  # nearly the code of fp32
                for out, kind in product(
                    NAMES if every and logits == torch.float32 else (torch.bfloat16,), launch.KINDS
                ):
                    sums, gradient = _divergence(logits, out, columns, softcap, temperature, kind)
                    yield Variant(f"{NAMES[logits]} to {NAMES[out]} {options} {kind}", gradient)
                    if out == torch.bfloat16:
                        yield Variant(f"{words} {kind}", sums)


def _words(**options: bool) -> str:
    return "".join(f" {name}" for name, on in options.items() if on)


def _tile(dtype: torch.dtype, columns: int) -> Tensor:
    return torch.empty(ROWS, columns, dtype=dtype, device="meta")


def _row(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(ROWS, dtype=dtype, device="meta")


def _partials(dtype: torch.dtype, columns: int, softcap: bool, temperature: bool) -> Call:
    with launch.record() as calls:
        transform = Transform(softcap=30.0 if softcap else None)
        launch.partials(_tile(dtype, columns), _row(torch.int64), _row() if temperature else None, transform)
    return calls[0]


def _dlogits(
    dtype: torch.dtype,
    out: torch.dtype,
    columns: int,
    softcap: bool,
    temperature: bool,
    entropy: bool,
    logp: bool = True,
) -> Call:
    with launch.record() as calls:
        launch.dlogits(
            _tile(dtype, columns),
            _tile(out, columns),
            _row(torch.int64),
            _row() if temperature else None,
            Transform(softcap=30.0 if softcap else None),
            lse=_row(),
            entropy=_row(),
            g_logp=_row(),
            g_entropy=_row() if entropy else None,
            logp=_row() if logp else None,
        )
    return calls[0]


def _divergence(
    dtype: torch.dtype, out: torch.dtype, columns: int, softcap: bool, temperature: bool, kind: str
) -> Sequence[Call]:
    transform = Transform(softcap=30.0 if softcap else None)
    options: dict[str, Any] = {"kind": kind, "student_transform": transform, "teacher_transform": transform}
    if temperature:
        options |= {"student_temperature": _row(), "teacher_temperature": _row()}
    tile = _tile(dtype, columns)
    with launch.record() as calls:
        launch.divergence_partials(tile, tile, _row(), _row(), **options)
        launch.divergence_dlogits(tile, tile, _tile(out, columns), _row(), _row(), _row(), _row(), **options)
    return calls


def compile_variants(chosen: Iterable[Variant], targets: Sequence[str] = tuple(TARGETS)) -> Iterator[Compiled]:
    """Compiles each variant for each target, and yields the readings.

    Raises RuntimeError where triton runs its interpreter and whatever triton raises for code that it cannot compile.
    """
    for variant in chosen:
        for target in targets:
            yield _compile(variant, target)


def _compile(variant: Variant, target: str) -> Compiled:
    kernels = launch.kernel_module()
    kernel = getattr(kernels, variant.call.kernel)
    if not hasattr(kernel, "params"):
        raise RuntimeError(
            "TRITON_INTERPRET: set when triton was imported, allowed: unset; there is nothing to compile"
        )
    # The copy of triton that decorated the kernels.
    triton = kernels.triton
    gpu = triton.backends.compiler.GPUTarget(*TARGETS[target])
    source = triton.compiler.ASTSource(kernel, *_signature(kernel, variant.call))
    code = triton.compile(source, target=gpu, options=variant.call.options(gpu.warp_size))
    cuda = gpu.backend == "cuda"
    text = code.asm["ptx" if cuda else "amdgcn"]
    if cuda:
        ptxas = triton.backends.nvidia.compiler.get_ptxas(gpu.arch).path
        registers, spills = _ptxas_readings(ptxas, text)
    else:
        registers = _metadata(text, "vgpr_count")
        spills = _metadata(text, "vgpr_spill_count") + _metadata(text, "sgpr_spill_count")
    has_dot = "tt.dot" in code.asm["ttir"]
    return Compiled(
        kernel=variant.call.kernel,
        options=variant.options,
        target=target,
        registers=registers,
        spills=spills,
        shared=code.metadata.shared,
        wgmma="wgmma.mma_async" in text if has_dot and target == "sm_90" else None,
        guarded=is_guarded(code.asm["ttgir"]) if "out_stride" in variant.call.args else None,
        wide_rows=has_wide_rows(code.asm["ttir"]),
    )


def _signature(kernel: Any, call: Call) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and divisibility of the arguments, as a launch with aligned pointers would specialise them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, param in enumerate(kernel.params):
        value = call.args[param.name]
        if param.is_constexpr or value is None:
            types[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, float):
            types[param.name] = "fp32"
        else:
            types[param.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _ptxas_readings(ptxas: str, ptx: str) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads), for the architecture that the text itself names."""
    match = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert match, "PTX without a .target line"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={match[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.findall(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert len(registers) == 1 and len(spills) == 2, said
    return int(registers[0]), sum(map(int, spills))


def _metadata(assembly: str, key: str) -> int:
    found = re.findall(rf"^\s*\.{key}:\s+(\d+)", assembly, re.MULTILINE)
    assert len(found) == 1, f"{key}: {len(found)} entries in the assembly's metadata"
    return int(found[0])


def is_guarded(ttgir: str) -> bool:
    """Whether a barrier stands between the last load of a block and the stores after it, in Triton's GPU dialect.

    Its loops are structured, so the order of the text is that of the program, which PTX no longer shows.
    """
    events = re.findall(r"tt\.load|tt\.store|barrier", ttgir)
    after = events[len(events) - events[::-1].index("tt.load") :] if "tt.load" in events else []
    return "tt.store" in after and "barrier" in after[: after.index("tt.store")]


def has_wide_rows(ttir: str) -> bool:
    """Whether the program's number is only ever widened to 64 bits, in Triton's dialect."""
    names = re.findall(r"(%\w+) = tt\.get_program_id", ttir)
    uses = [line for name in names for line in re.findall(rf"^.*= .*{name}\b.*$", ttir, re.MULTILINE)]
    return len(uses) > 0 and all(re.search(r"extsi.* to i64", line) for line in uses)
