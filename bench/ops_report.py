"""The table of bench/ops.py, its ratios, and the head that says what the figures were taken with.

It owns text and arithmetic on finished rows. It refuses to measure.
"""

from __future__ import annotations

import datetime
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ops_cases import Case

HERE = Path(__file__).resolve().parent


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds, to the rows of one pass, how many times faster each is than eager and than the fastest other package."""
    timed = {id(row): row["median_ms"] for row in rows if row["median_ms"] is not None}
    eager = next((row for row in rows if row["impl"] == "eager" and id(row) in timed), None)
    peers = [row for row in rows if row["impl"] != "fastreason" and id(row) in timed]
    fastest = min(peers, key=lambda row: row["median_ms"], default=None)
    for row in rows:
        row["x_eager"] = eager["median_ms"] / row["median_ms"] if eager and id(row) in timed else None
        row["x_peer"] = fastest["median_ms"] / row["median_ms"] if fastest and id(row) in timed else None
        row["fastest_peer"] = fastest["impl"] if fastest else None


def print_table(case: Case, rows: list[dict[str, Any]]) -> None:
    def cell(value: float | None, pattern: str) -> str:
        return "-" if value is None else pattern.format(value)

    print(f"\n{case.title()}")
    header = ("implementation", "pass", "median ms", "spread", "x eager", "x peer", "extra MB", "error", "of")
    layout = "{:24} {:8} {:>10} {:>15} {:>8} {:>18} {:>9} {:>9}  {}"
    print(layout.format(*header))
    for row in sorted(rows, key=lambda row: row["pass"]):
        peer = cell(row["x_peer"], "{:.2f}") + (f" ({row['fastest_peer']})" if row["x_peer"] else "")
        spread = "-" if row["median_ms"] is None else f"{row['min_ms']:.1f} to {row['max_ms']:.1f}"
        cells = (
            f"{row['impl']} {row['variant']}".strip(),
            row["pass"],
            cell(row["median_ms"], "{:.1f}"),
            spread,
            cell(row["x_eager"], "{:.2f}"),
            peer,
            cell(row["extra_mb"], "{:.0f}"),
            f"{row['error']:.1e}",
            row["error_of"] + _refusal(row),
        )
        print(layout.format(*cells), flush=True)


def _refusal(row: dict[str, Any]) -> str:
    broken = [f"{part} {error:.1e} > {limit:.1e}" for part, (error, limit) in row["broken"].items()]
    return f"   no speed, out of tolerance: {', '.join(broken)}" if broken else ""


def head_of(device: str, rounds: int, argv: list[str]) -> dict[str, Any]:
    """What the figures were taken with."""
    versions = {}
    for package in ("triton", "liger_kernel", "trl", "verl", "cut_cross_entropy"):
        versions[package] = _version(package)
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "versions": versions,
        "commit": _commit(),
        "command": " ".join(["python bench/ops.py", *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rounds": rounds,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + (
            "+" if git("status", "--porcelain", "-uno").strip() else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
