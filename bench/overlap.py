"""How much of the shorter of generation and training disappears behind the longer: the same run with S = 0 and with S > 0.

    python bench/overlap.py --simulate [--steps 200] [--tails] [--json FILE]
    python bench/overlap.py --real [--runs 3] [--json FILE]

--simulate runs the production scheduler in virtual time (overlap_simulation.py) and fails where a step takes longer than
1.02 * (max(g, t) + s), or a group was staler than S. --tails adds rows that miss the bound, to see by how much:
batches that differ in length, on an engine whose token step takes as long as what runs is large.

--real runs `fastreason train` with SmolLM2-135M, vLLM on one core and the trainer on another (overlap_real.py).

g is the generation of a batch, t its training, s the publication of the weights, all as logged by the S = 0 run; T_async is
a step of the S > 0 run, and efficiency is (g + t - T_async) / min(g, t).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

Row = dict[str, Any]

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
STALENESS = (1, 2)
REAL_JSON = HERE / "results" / "overlap-cpu.json"


def simulated_cases(steps: int, tails: bool) -> list[Any]:
    from overlap_simulation import Case

    tailed = partial(Case, lengths="lognormal", steps=steps, prompts=12, samples=16)
    cases = [Case(ratio, staleness, "constant", steps=steps) for staleness in STALENESS for ratio in RATIOS]
    cases += [Case(ratio, staleness, "proportional", steps=steps) for staleness in STALENESS for ratio in RATIOS]
    cases += [tailed(ratio, staleness) for staleness in STALENESS for ratio in (0.5, 1.0, 2.0)]
    if tails:
        cases += [
            tailed(ratio, staleness, "proportional", max_running_groups=limit)
            for staleness in STALENESS
            for ratio in (1.0, 2.0)
            for limit in (0, 3)
        ]
    return cases


def run_simulation(options: argparse.Namespace) -> int:
    from overlap_simulation import measure

    head = (
        f"{'token step':12} {'lengths':9} {'batch':>7} {'g/t':>5} {'S':>2} {'g':>7} {'t':>7} {'s':>5} {'T_async':>8} "
    )
    print(head + f"{'/ bound':>8} {'eff.':>6} {'stale':>5}")
    rows = []
    for case in simulated_cases(options.steps, options.tails):
        row = measure(case)
        rows.append(row)
        limit = f", {row['max_running_groups']} groups at once" if row["max_running_groups"] else ""
        print(
            f"{row['cost']:12} {row['lengths']:9} {row['batch']:>7} {row['ratio']:5.2f} {row['S']:2} {row['g_s']:7.2f} "
            f"{row['t_s']:7.2f} {row['s_s']:5.2f} {row['T_async_s']:8.2f} {row['T_async_s'] / row['bound_s']:8.4f} "
            f"{row['efficiency']:6.3f} {row['staleness_max']:5}{'' if row['ok'] else '  FAILED'}{limit}",
            flush=True,
        )
        write_rows(options.json, rows)
    failed = [row for row in rows if not row["ok"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} rows keep their bound")
    return 1 if failed else 0


def write_rows(path: Path | None, rows: list[Row]) -> None:
    if path is not None:
        aside = path.with_name(path.name + ".writing")
        aside.write_text(json.dumps(rows, indent=2) + "\n")
        aside.replace(path)


def run_real(options: argparse.Namespace) -> int:
    from overlap_real import measure, summarise

    rows: list[Row] = []
    path = options.json or REAL_JSON
    for number in range(1, options.runs + 1):
        started = time.monotonic()
        row = measure(options.workdir, number, options.engine_core, options.trainer_core, options.sets)
        rows.append(row)
        write_rows(path, [*rows, summarise(rows)])
        print(f"run {number}: {text_of(row)}  ({time.monotonic() - started:.0f} s)", flush=True)
    total = summarise(rows)
    print(f"median: {text_of(total)}; efficiency from {total['efficiency_min']:.3f} to {total['efficiency_max']:.3f}")
    for fault in total["faults"]:
        print(f"NOT REACHED: {fault}")
    return 1 if total["faults"] else 0


def text_of(row: Row) -> str:
    return (
        f"g {row['g_s']:.2f} ({row['g_loaded_s']:.2f} loaded), t {row['t_s']:.2f} ({row['t_loaded_s']:.2f}), "
        f"s {row['s_s']:.2f}, T_async {row['T_async_s']:.2f} s, efficiency {row['efficiency']:.3f}, "
        f"staleness {row['staleness_max']}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--simulate", action="store_true")
    what.add_argument("--real", action="store_true")
    parser.add_argument(
        "--json", type=Path, help=f"rows; --real writes {REAL_JSON.relative_to(HERE.parent)} by default"
    )
    parser.add_argument("--steps", type=int, default=200, help="simulate: steps of a run")
    parser.add_argument("--tails", action="store_true", help="simulate: also the rows that miss the bound")
    parser.add_argument("--runs", type=int, default=3, help="real: pairs of runs")
    parser.add_argument("--workdir", type=Path, help="real: folder for the runs; default: a temporary one")
    parser.add_argument("--engine-core", type=int, default=0)
    parser.add_argument("--trainer-core", type=int, default=1)
    parser.add_argument("sets", nargs="*", metavar="key=value", help="real: further overrides of the run's config")
    options = parser.parse_args(arguments)
    if options.simulate:
        return run_simulation(options)
    # The run under way must end its processes too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return run_real(options)


if __name__ == "__main__":
    sys.exit(main())
