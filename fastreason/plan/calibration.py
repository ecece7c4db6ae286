"""What this machine's CPU can do: its products, copies, and a whole layer, timed for a model's shape.

It owns the measurement and its file. It refuses to run a model: a layer of random weights is enough. Imports torch.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from fastreason.errors import ConfigError
from fastreason.plan.hardware import CPU_RATES, Device, Rates, device_from_json, device_to_json
from fastreason.plan.shapes import Shape

TRAIN_ROWS, COPY_BYTES, LINE = 2048, 256 << 20, 64
SECONDS_EACH = 0.5


@dataclass(frozen=True)
class Calibration:
    """A CPU as a device, with the rates that belong to it."""

    device: Device
    rates: Rates


def seconds_of(call: Callable[[], Any], at_least_s: float = SECONDS_EACH) -> float:
    """The median of calls for about `at_least_s` seconds, three at the least, after one that is not counted."""
    call()
    found: list[float] = []
    started = time.perf_counter()
    while len(found) < 3 or time.perf_counter() - started < at_least_s:
        before = time.perf_counter()
        call()
        found.append(time.perf_counter() - before)
    return statistics.median(found)


def product_flops(rows: int, width: int, columns: int, dtype: torch.dtype) -> float:
    """Operations a second of [rows, width] @ [width, columns]."""
    a, weight = torch.randn(rows, width).to(dtype), torch.randn(columns, width).to(dtype)
    return 2.0 * rows * width * columns / seconds_of(lambda: torch.nn.functional.linear(a, weight))


class Layer(torch.nn.Module):
    """One decoder layer of a shape: norms in fp32, causal attention over lines of LINE tokens, its MLP."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        widths = {"q": shape.query_width, "k": shape.kv_width, "v": shape.kv_width, "up": shape.mlp}
        widths |= {"gate": shape.mlp} if shape.gated else {}
        made = {name: (shape.hidden, width) for name, width in widths.items()}
        made |= {"o": (shape.query_width, shape.hidden), "down": (shape.mlp, shape.hidden)}
        self.parts = torch.nn.ModuleDict(
            {name: torch.nn.Linear(*sizes, bias=False, dtype=dtype) for name, sizes in made.items()}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lines, parts = (len(x) // LINE, LINE, -1, self.shape.head_dim), self.parts
        y = _normed(x)
        q, k, v = (parts[name](y).view(lines).transpose(1, 2) for name in ("q", "k", "v"))
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + parts["o"](seen.transpose(1, 2).reshape(len(x), -1))
        y = _normed(x)
        up, silu = parts["up"](y), torch.nn.functional.silu
        return x + parts["down"](silu(parts["gate"](y)) * up if self.shape.gated else silu(up))


def _normed(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer_flops(shape: Shape, dtype: torch.dtype, rows: int = TRAIN_ROWS // 2) -> float:
    """Operations a second of a layer's forward and backward, counted as `times.training_flops` counts them."""
    layer = Layer(shape, dtype)
    x = torch.randn(rows, shape.hidden).to(dtype).requires_grad_()
    alone = replace(shape, num_layers=1)
    return 3 * alone.forward_flops(rows, LINE / 2, 0) / seconds_of(lambda: layer(x).sum().backward())


def copy_bytes_per_s() -> float:
    """Bytes read and written a second by a copy of 256 MiB."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds_of(lambda: target.copy_(source))


def calibrate(shape: Shape, dtype: str, train_threads: int, engine_threads: int, decode_rows: int) -> Calibration:
    """Measure this machine for a model's shape; takes some seconds. dtype: bfloat16 or float32, of the run."""
    kind = getattr(torch, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(engine_threads)
        decode = product_flops(decode_rows, shape.hidden, shape.mlp, kind)
        torch.set_num_threads(train_threads)
        flops = product_flops(TRAIN_ROWS, shape.hidden, shape.mlp, kind)
        layer, bandwidth = layer_flops(shape, kind), copy_bytes_per_s()
    finally:
        torch.set_num_threads(before)
    device = Device(
        name="cpu",
        memory=float(psutil.virtual_memory().total),
        flops=flops,
        bandwidth=bandwidth,
        link=bandwidth / 2,
        node_link=bandwidth / 2,
        source=f"measured: {dtype} products of {shape.name}, {train_threads} thread(s) training, {engine_threads} generating",
        is_cpu=True,
        itemsize=kind.itemsize,
        decode_flops=decode,
    )
    return Calibration(device, replace(CPU_RATES, train_mfu=layer / flops))


def write_calibration(found: Calibration, file: Path) -> None:
    raw = {"device": device_to_json(found.device), "rates": vars(found.rates)}
    file.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def read_calibration(file: Path) -> Calibration:
    """What `write_calibration` wrote; raises ConfigError for anything else."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return Calibration(device_from_json(raw["device"], str(file)), Rates(**raw["rates"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--gpu {file}: not a file that fastreason plan --calibrate wrote: {error!r}") from error
