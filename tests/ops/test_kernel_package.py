"""The package itself: what it imports, how an implementation is chosen, and the error rule."""

import ast
import logging
import re
import subprocess
import sys
from pathlib import Path

import fastreason_kernels
import pytest
import torch
from fastreason_kernels import PolicyLossSpec, linear_logprob, linear_policy_loss
from fastreason_kernels.dispatch import resolve
from fastreason_kernels.testing import assert_no_worse

PACKAGE = Path(fastreason_kernels.__file__).parent


def test_imports_without_triton_and_without_the_trainer():
    program = (
        "import sys; sys.modules['triton'] = None; sys.modules['fastreason'] = None; import fastreason_kernels; "
        "import fastreason_kernels.testing"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=400)


def test_import_rules():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert "fastreason" not in roots, path
            assert "triton" not in roots or path.name in ("kernels.py", "tiles.py"), path


def test_auto_is_torch_without_a_gpu_and_says_why(caplog):
    resolve.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [resolve("linear_logprob", "auto", "cpu") for _ in range(3)] == ["torch"] * 3
    assert [record.message for record in caplog.records if "linear_logprob" in record.message] == [
        f"linear_logprob on cpu: impl=torch (asked for auto, as the device is cpu, not a GPU, torch {torch.__version__})"
    ]


def test_triton_is_refused_not_replaced():
    hidden, weight, ids = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="'triton' does not run here: the device is cpu"):
        linear_logprob(hidden, weight, ids, impl="triton")
    with pytest.raises(NotImplementedError, match="use impl='auto' or impl='torch'"):
        linear_policy_loss(hidden, weight, ids, torch.ones(2), PolicyLossSpec(), impl="triton")
    with pytest.raises(NotImplementedError, match="float64"):
        resolve("linear_logprob", "triton", "cuda", torch.float64)


def test_auto_is_triton_on_a_gpu_unless_it_is_missing(monkeypatch, caplog):
    resolve.cache_clear()
    assert resolve("linear_policy_loss", "auto", "cuda") == "triton"
    assert resolve("linear_policy_loss", "auto", "cuda", torch.float64) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    resolve.cache_clear()
    with caplog.at_level(logging.INFO):
        assert resolve("linear_policy_loss", "auto", "cuda") == "torch"
    assert "the package triton is not installed" in caplog.text
    resolve.cache_clear()


def test_error_rule():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = torch.tensor([1.0, 2.001])
    assert_no_worse("close", torch.tensor([1.001, 2.0]), eager, exact, dtype=torch.float32)
    with pytest.raises(AssertionError, match="far: error"):
        assert_no_worse("far", torch.tensor([1.01, 2.0]), eager, exact, dtype=torch.float32)
    with pytest.raises(AssertionError, match="nan: error inf"):
        assert_no_worse("nan", torch.tensor([float("nan"), 2.0]), eager, exact, dtype=torch.float32)
    with pytest.raises(AssertionError, match="shape: shapes"):
        assert_no_worse("shape", torch.tensor([1.0]), eager, exact, dtype=torch.float32)


def test_readme_examples_run():
    # Not part of the installed package: the folder above it in the repository.
    blocks = re.findall(r"```python\n(.*?)```", (PACKAGE.parent / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(block, {})
