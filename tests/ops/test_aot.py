"""Every Triton kernel compiles ahead of time for every target: no spills, little shared memory, stores behind barriers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastreason_kernels import aot
from fastreason_kernels.row_kernels import launch

ROOT = Path(__file__).resolve().parents[2]
# Shared memory of one program: 227 KB on sm_90 and sm_100, 64 KB of LDS on gfx942.
SHARED = {"sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The readings, from the command that users run: a process of its own, without the interpreter and without a cache."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-P", str(ROOT / "bench" / "aot.py"), "--json", str(folder / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((folder / "report.json").read_text())
    assert all(row["kernel"] in done.stdout for row in rows)
    return rows


def test_every_kernel_is_compiled_for_every_target(report):
    kernels = (ROOT / "kernels" / "fastreason_kernels" / "row_kernels" / "kernels.py").read_text()
    expected = {line.removeprefix("def ").split("(")[0] for line in kernels.splitlines() if line.startswith("def ")}
    launched = {name for name in expected if name.endswith("_kernel")}
    assert len(launched) >= 4
    assert {(row["kernel"], row["target"]) for row in report} == {(k, t) for k in launched for t in aot.TARGETS}
    # What is not launched is called by something that is.
    assert all(kernels.count(f"{name}(") > 1 for name in expected - launched)


def test_the_options_that_make_different_code_are_all_there(report):
    for words in ("softcap", "temperature", "entropy", "fp32 to fp32", "fp32 to bf16", "bf16 to bf16", *launch.KINDS):
        with_it = {row["options"] for row in report if words in row["options"]}
        assert with_it and with_it != {row["options"] for row in report}, words


def test_nothing_spills(report):
    assert [row for row in report if row["spills"]] == []
    # Eight programs of 128 threads share an SM up to 64 registers, five up to 96.
    assert max(row["registers"] for row in report if row["target"].startswith("sm_")) <= 96


def test_shared_memory_fits(report):
    assert [row for row in report if row["shared"] > SHARED[row["target"]]] == []


def test_stores_over_logits_come_after_a_barrier(report):
    writers = {row["kernel"] for row in report if row["guarded"] is not None}
    assert writers == {"dlogits_kernel", "divergence_dlogits_kernel"}
    assert [row for row in report if row["guarded"] is False] == []


def test_row_offsets_have_64_bits(report):
    assert [row for row in report if not row["wide_rows"]] == []


def test_a_dot_uses_the_tensor_cores(report):
    assert [row for row in report if row["wgmma"] is False] == []


@pytest.mark.parametrize(
    ("ttgir", "guarded"),
    [
        ("tt.store\ntt.load\nttg.barrier\ntt.store", True),
        ("tt.load\nttg.barrier\ntt.load\ntt.store", False),
        ("tt.load\ntt.store\nttg.barrier", False),
        ("tt.load\nttg.barrier", False),
    ],
)
def test_what_counts_as_guarded(ttgir, guarded):
    assert aot.is_guarded(ttgir) == guarded


@pytest.mark.parametrize(
    ("use", "wide"),
    [
        ("%r = arith.extsi %row : i32 to i64", True),
        ("%r = arith.extsi %row : i32 to i64\n%o = arith.muli %row, %stride : i32", False),
        ("", False),
    ],
)
def test_what_counts_as_wide(use, wide):
    assert aot.has_wide_rows(f"%row = tt.get_program_id x : i32\n{use}\n%rows = arith.constant 1 : i32") == wide


def test_recording_runs_nothing():
    rows = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    with launch.record() as calls:
        out = launch.partials(*rows, None)
    assert [(call.kernel, call.rows) for call in calls] == [("partials_kernel", 2)]
    assert calls[0].args["out"] is out


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="with the interpreter tensors on a CPU are right")
def test_compiled_kernels_refuse_a_cpu():
    with pytest.raises(ValueError, match="partials_kernel: tensors on cpu, allowed: cuda; or set TRITON_INTERPRET=1"):
        launch.partials(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), None)
