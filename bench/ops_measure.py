"""Time, memory and errors of one call, for bench/ops.py.

It owns the clock, the peak-memory measure (on a CPU each in a fresh process, since freed memory that the allocator keeps
would hide what a later call needs), and the gradients' clean-up. It refuses to choose what is measured.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ops_cases import Case, Data, Exact
from ops_peers import REGISTRY, Call
from torch import Tensor

PASSES = ("fwd", "fwd_bwd")
CHILD_SECONDS = 900


@dataclass(frozen=True)
class Runner:
    """One implementation of one case, ready to be called again and again."""

    impl: str
    variant: str
    options: dict[str, Any]
    data: Data
    call: Call

    @property
    def label(self) -> str:
        return f"{self.impl} {self.variant}".strip()

    def run(self, name: str) -> dict[str, Tensor]:
        """One pass; "fwd" under no_grad, "fwd_bwd" leaves the gradients on the data's leaves."""
        if name == "fwd":
            with torch.no_grad():
                return self.call()
        values = self.call()
        values["loss"].backward()
        return values

    def clear(self) -> None:
        """Drops the gradients of the previous pass."""
        self.data.hidden.grad = None
        self.data.weight.grad = None

    def errors(self, name: str, exact: Exact) -> dict[str, float]:
        """One pass and its errors by name; the first call, so it compiles what is to be compiled."""
        self.clear()
        values = self.run(name)
        errors = exact.errors(values, self.data.hidden.grad, self.data.weight.grad)
        wanted = {"loss"} if name == "fwd" else {"loss", "d_hidden"} | ({"d_weight"} & self._wanted())
        if missing := wanted - errors.keys():
            raise RuntimeError(f"{self.label} returned no {', '.join(sorted(missing))}")
        self.clear()
        return errors

    def _wanted(self) -> set[str]:
        return {"d_weight"} if self.data.weight.requires_grad else set()

    def milliseconds(self, name: str) -> float:
        """Wall time of one pass, the device idle before and after."""
        self.clear()
        synchronize(self.data)
        started = time.perf_counter()
        self.run(name)
        synchronize(self.data)
        return 1000 * (time.perf_counter() - started)


def synchronize(data: Data) -> None:
    if data.ids.is_cuda:
        torch.cuda.synchronize()


def cuda_extra_mb(runner: Runner, name: str) -> float:
    """How far a warmed-up pass raises the allocated peak, its gradients included, in MB."""
    runner.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = runner.run(name)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    del result
    runner.clear()
    return extra / 1e6


def cpu_extra_mb(case: Case, runners: list[Runner], passes: list[str], threads: int) -> dict[tuple[str, str], float]:
    """{(label, pass): MB} for each runner, each in a process of its own on the same data."""
    found: dict[tuple[str, str], float] = {}
    program = str(Path(__file__).with_name("ops.py"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "case.pt")
        for runner in runners:
            tensors = {name: value for name, value in vars(runner.data).items() if value is not None}
            job = {"case": asdict(case), "impl": runner.impl, "options": runner.options, "passes": passes}
            torch.save({**job, "threads": threads, "data": {k: v.detach() for k, v in tensors.items()}}, path)
            answer = subprocess.run(
                [sys.executable, "-P", program, "--memory-of", str(path)],
                capture_output=True,
                text=True,
                timeout=CHILD_SECONDS,
            )
            line = next((line for line in answer.stdout.splitlines() if line.startswith("MEMORY ")), None)
            if line is None:
                print(f"  {runner.label}: memory not measured: {last_line(answer.stderr)}", flush=True)
                continue
            found |= {(runner.label, name): mb for name, mb in json.loads(line.removeprefix("MEMORY ")).items()}
    return found


def memory_child(path: Path) -> None:
    """The fresh process: warms up, returns freed memory to the system, resets the peak, calls, prints the growth."""
    job = torch.load(path, weights_only=True)
    torch.set_num_threads(job["threads"])
    case, data = Case(**job["case"]), Data(**job["data"])
    data.hidden.requires_grad_()
    data.weight.requires_grad_(not case.frozen)
    options = job["options"]
    runner = Runner(job["impl"], "", options, data, REGISTRY[job["impl"]][case.op](case, data, options))
    found = {}
    # The larger pass first: should the peak not be reset, the smaller would show it.
    for name in sorted(job["passes"], reverse=True):
        runner.run(name)
        runner.clear()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident_kb("VmRSS")
        result = runner.run(name)
        found[name] = (resident_kb("VmHWM") - before) * 1024 / 1e6
        del result
        runner.clear()
    print("MEMORY " + json.dumps(found), flush=True)


def resident_kb(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1])


def can_measure_cpu_memory() -> bool:
    """Whether this system has the peak counter that can be reset (Linux)."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def last_line(text: str) -> str:
    """The last line of a traceback, short enough for a table."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
