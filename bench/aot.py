"""What the compilers make of every Triton kernel, ahead of time and without a GPU: registers, spills, shared memory.

python bench/aot.py --all --target sm_90 --json report.json
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from fastreason_kernels import aot


def table(rows: list[aot.Compiled]) -> str:
    """The readings as aligned text, one line a kernel, variant and target."""
    fields = [field.name for field in dataclasses.fields(aot.Compiled)]
    cells = [fields, *([str(value) for value in dataclasses.astuple(row)] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(fields))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--all", action="store_true", help="all combinations of the options, not only all off and all on"
    )
    parser.add_argument("--target", nargs="+", choices=list(aot.TARGETS), default=list(aot.TARGETS))
    parser.add_argument("--json", type=Path, help="also write the readings to this file")
    options = parser.parse_args()
    started = time.perf_counter()
    rows = list(aot.compile_variants(aot.variants(every=options.all), options.target))
    print(table(rows))
    print(f"{len(rows)} compiled in {time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
