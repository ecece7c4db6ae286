"""Time, memory and error of the loss operations against other implementations, on one machine, on the same data.

    python bench/ops.py --device cpu
    python bench/ops.py --device cuda --save
    python bench/ops.py --only policy_loss --shape 2048,576,49152 --impl fastreason,eager

Needs torch, triton on a GPU, and this repository; other packages are compared where they are installed and named as
skipped where not. Rounds alternate between the implementations, medians are printed. The error is the largest absolute
one against float64 over the largest exact entry, the worst of the values and gradients; an implementation that is
further off than 1.5 x eager plus the dtype's tolerance gets its error printed, and no speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
try:
    import fastreason_kernels  # noqa: F401
except ImportError:
    sys.path.insert(0, str(HERE.parent / "kernels"))

import torch  # noqa: E402
from ops_cases import DTYPES, OPS, Case, Data, Exact, broken_limits, exact_answer, for_case, make_data  # noqa: E402
from ops_measure import (  # noqa: E402
    PASSES,
    Runner,
    can_measure_cpu_memory,
    cpu_extra_mb,
    cuda_extra_mb,
    memory_child,
)
from ops_peers import REGISTRY, UnavailableError, variants  # noqa: E402
from ops_report import add_ratios, head_of, print_table  # noqa: E402

CPU_SHAPES = ((2048, 576, 49152), (8192, 576, 49152))  # SmolLM2-135M
CUDA_SHAPES = tuple(
    (n, h, v)
    for h, v in ((1536, 151936), (3584, 152064), (4096, 128256))  # Qwen2.5-1.5B, Qwen2.5-7B, Llama-3.1-8B
    for n in (8192, 16384, 32768)
)
DEFAULT_ROUNDS = {"cpu": 5, "cuda": 10}
CUDA_BUDGET = 420.0  # seconds; what does not fit is named as skipped
PATIENCE_MS = 20_000  # an implementation that took this long over its rounds of a pass, two at least, sits out the rest


def default_cases(device: str, dtype: str) -> Iterator[Case]:
    """Every operation at the smallest N of a head; at larger N what shows how time and memory grow."""
    shapes = CPU_SHAPES if device == "cpu" else CUDA_SHAPES
    smallest = {(h, v): min(m for m, g, w in shapes if (g, w) == (h, v)) for _, h, v in shapes}
    for n, h, v in shapes:
        case = Case("policy_loss", n, h, v, dtype, device)
        yield case
        if n == smallest[h, v]:
            yield from all_cases(case)
        elif device == "cuda":
            yield from (replace(case, half=True), replace(case, op="logprob"))


def all_cases(case: Case) -> Iterator[Case]:
    """What is measured beside `policy_loss` itself."""
    yield replace(case, half=True)
    yield replace(case, frozen=True)
    yield from (replace(case, op=op) for op in OPS if op != "policy_loss")


class Bench:
    """Runs cases and collects `rows` (one for each implementation, variant and pass) and `skipped` lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.failed = False
        self._started = time.perf_counter()
        self._shape: tuple[tuple[Any, ...], Data] | None = None
        # Where eager does not fit, the error that it had on the same head with fewer tokens is the yardstick.
        self._eager: dict[tuple[Any, ...], dict[str, float]] = {}

    def run(self, case: Case, impls: list[str]) -> None:
        """Measures one case and prints its table."""
        if self.options.budget and time.perf_counter() - self._started > self.options.budget:
            self._skip(case, "all", "", f"the time budget of {self.options.budget:.0f} s is spent")
            return
        data = for_case(self._data(case), case)
        exact = exact_answer(case, data)
        runners = list(self._runners(case, data, impls))
        for name in PASSES:
            self._pass(case, name, data, exact, runners)
        if case.device == "cpu" and self.options.memory:
            self._memory(case, runners)
        print_table(case, [row for row in self.rows if row["case"] == case.title()])

    def _data(self, case: Case) -> Data:
        shape = (case.n, case.h, case.v, case.dtype, case.device)
        if self._shape is None or self._shape[0] != shape:
            self._shape = None
            self._release()
            self._shape = (shape, make_data(*shape))
        return self._shape[1]

    def _runners(self, case: Case, data: Data, impls: list[str]) -> Iterator[Runner]:
        for impl in impls:
            if case.op not in REGISTRY[impl]:
                continue
            for variant, options in variants(impl, case):
                try:
                    yield Runner(impl, variant, options, data, REGISTRY[impl][case.op](case, data, options))
                except UnavailableError as reason:
                    self._skip(case, impl, variant, str(reason))

    def _pass(self, case: Case, name: str, data: Data, exact: Exact, runners: list[Runner]) -> None:
        rows: dict[str, dict[str, Any]] = {}
        # Eager first: its error is the others' measure.
        for runner in sorted(runners, key=lambda runner: runner.impl != "eager"):
            try:
                errors = runner.errors(name, exact)
            except Exception as error:  # whatever a peer raises is a line of the table, never the end of the run
                self._skip(case, runner.impl, runner.variant, f"{name}: {type(error).__name__}: {error}")
                self.failed |= runner.impl == "fastreason"
                self._release()
                continue
            rows[runner.label] = self._row(case, name, data, runner, errors)
        able = [runner for runner in runners if rows.get(runner.label, {}).get("error_ok")]
        times: dict[str, list[float]] = {runner.label: [] for runner in able}
        for _ in range(self.options.rounds):
            for runner in able:
                taken = times[runner.label]
                if len(taken) < 2 or sum(taken) < PATIENCE_MS:
                    taken.append(runner.milliseconds(name))
        for runner in able:
            found = times[runner.label]
            rows[runner.label] |= {
                "median_ms": statistics.median(found),
                "min_ms": min(found),
                "max_ms": max(found),
                "rounds": len(found),
            }
            if case.device == "cuda" and self.options.memory:
                rows[runner.label]["extra_mb"] = cuda_extra_mb(runner, name)
            runner.clear()
        add_ratios(list(rows.values()))
        self.rows += rows.values()

    def _row(self, case: Case, name: str, data: Data, runner: Runner, errors: dict[str, float]) -> dict[str, Any]:
        key = (case.op, case.h, case.v, case.dtype, case.half, case.frozen, name)
        if runner.impl == "eager":
            self._eager[key] = errors
        worst = max(errors, key=lambda part: errors[part])
        broken = broken_limits(errors, self._eager.get(key), case.dtype)
        return {
            "case": case.title(),
            "op": case.op,
            "impl": runner.impl,
            "variant": runner.variant,
            "options": runner.options,
            "n": case.n,
            "h": case.h,
            "v": case.v,
            "dtype": case.dtype,
            "pass": name,
            "active": data.active(),
            "frozen": case.frozen,
            "median_ms": None,
            "min_ms": None,
            "max_ms": None,
            "extra_mb": None,
            "error": errors[worst],
            "error_of": worst,
            "errors": errors,
            "error_ok": not broken,
            "broken": broken,
        }

    def _memory(self, case: Case, runners: list[Runner]) -> None:
        found = cpu_extra_mb(case, runners, list(PASSES), torch.get_num_threads())
        for row in self.rows:
            if row["case"] == case.title():
                row["extra_mb"] = found.get((f"{row['impl']} {row['variant']}".strip(), row["pass"]))

    def _skip(self, case: Case, impl: str, variant: str, reason: str) -> None:
        reason = " ".join(reason.split())[:300]
        self.skipped.append({"case": case.title(), "op": case.op, "impl": impl, "variant": variant, "reason": reason})
        print(f"{case.title()}  {impl} {variant}".rstrip() + f": skipped: {reason}", flush=True)

    def _release(self) -> None:
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=OPS, action="append", help="an operation; repeatable (default: all)")
    parser.add_argument("--shape", type=_shape, action="append", help="N,H,V; repeatable")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--impl", type=_names, help=f"comma-separated: {','.join(REGISTRY)} (default: all)")
    parser.add_argument("--rounds", type=int, help="timed rounds, in alternation (default: 5 on cpu, 10 on cuda)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--budget", type=float, help="seconds after which no case starts (default: 420 on cuda)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory out: much faster")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--save", action="store_true", help="write them to bench/results/<device>.json")
    parser.add_argument("--plot", type=Path, help="draw time and memory there (needs matplotlib)")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device; use --device cpu")
    options.rounds = options.rounds or DEFAULT_ROUNDS[options.device]
    if options.budget is None and options.device == "cuda":
        options.budget = CUDA_BUDGET
    if options.device == "cpu" and options.memory and not can_measure_cpu_memory():
        print("memory is not measured: this system has no /proc/self/clear_refs")
        options.memory = False
    return options


def _shape(text: str) -> tuple[int, int, int]:
    try:
        n, h, v = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, allowed: N,H,V such as 2048,576,49152") from None
    return n, h, v


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in REGISTRY]:
        raise argparse.ArgumentTypeError(f"{unknown}, allowed: {', '.join(REGISTRY)}")
    return names


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.memory_of:
        memory_child(options.memory_of)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    head = head_of(options.device, options.rounds, argv)
    print(
        f"{head['device_name']}, {head['threads']} CPU threads, torch {head['torch']}, {head['versions']}", flush=True
    )
    if options.shape:
        first = [Case("policy_loss", n, h, v, options.dtype, options.device) for n, h, v in options.shape]
        cases = [case for start in first for case in (start, *all_cases(start))]
    else:
        cases = list(default_cases(options.device, options.dtype))
    bench = Bench(options)
    paths = [options.json] * bool(options.json) + [HERE / "results" / f"{options.device}.json"] * options.save
    document = {"head": head, "rows": bench.rows, "skipped": bench.skipped}
    for case in cases:
        if options.only and case.op not in options.only:
            continue
        impls = options.impl or list(REGISTRY)
        if case.device == "cpu" and not options.shape and case.n > CPU_SHAPES[0][0]:
            impls = [impl for impl in impls if impl == "fastreason"]
        bench.run(case, impls)
        for path in paths:  # after each case: a run that is stopped keeps what it has
            path.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        from ops_plot import draw

        draw(document, options.plot)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
