"""The wheel of kernels/: complete, installable beside torch and triton alone, and working there."""

import importlib.metadata as metadata
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

USE = """
import importlib.util, sys

for absent in ("transformers", "fastreason", "numpy", "trl", "liger_kernel", "verl", *sys.argv[1:]):
    assert importlib.util.find_spec(absent) is None, f"{absent} is importable: this environment proves nothing"

import torch
import fastreason_kernels
from fastreason_kernels import PolicyLossSpec, linear_policy_loss

assert "site-packages" in fastreason_kernels.__file__, fastreason_kernels.__file__
torch.manual_seed(0)
start = torch.randn(40, 16), torch.randn(301, 16)
ids, advantages, old = torch.randint(0, 301, (40,)), torch.randn(40), torch.full((40,), -6.0)
spec = PolicyLossSpec(clip_low=0.2, clip_high=0.28, entropy_coef=0.01)
found = {}
for impl in ("auto", "reference"):
    hidden, weight = (x.clone().requires_grad_() for x in start)
    out = linear_policy_loss(hidden, weight, ids, advantages, spec, behaviour_logp=old, impl=impl)
    out.loss_sum.backward()
    found[impl] = (out.loss_sum.detach(), out.logp, hidden.grad, weight.grad)
for ours, reference in zip(found["auto"], found["reference"], strict=True):
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
assert all(float(x.abs().max()) > 0.01 for x in found["auto"])
print("works with", *sorted({"triton"} & set(sys.modules)) or ["torch alone"])
"""

IMPORT_ALL = """
import importlib, pkgutil
import fastreason_kernels

names = [module.name for module in pkgutil.walk_packages(fastreason_kernels.__path__, "fastreason_kernels.")]
for name in names:
    importlib.import_module(name)
print("\\n".join(["fastreason_kernels", *names]))
"""


def run(*command, **options):
    answer = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=560, **options)
    assert answer.returncode == 0, f"{command[:4]}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the source tree."""
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(KERNELS, folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-P", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source)
    (path,) = folder.glob("*.whl")
    return path


def closure(*names):
    """The installed distributions that `names` need, themselves included."""
    found, wanted = {}, list(names)
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name not in found:
            found[name] = metadata.distribution(name)
            requirements = map(Requirement, found[name].requires or [])
            wanted += [need.name for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(python, site-packages) of an environment with torch, triton and what they need."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in closure("torch", *(["triton"] if sys.platform == "linux" else [])):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    return folder / "bin" / "python", site


def pip_in(python, *arguments):
    return sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--python", python, *arguments


def complaints(python):
    """The lines of `pip check`."""
    answer = subprocess.run(
        [str(part) for part in pip_in(python, "check")], capture_output=True, text=True, timeout=400
    )
    lines = set(answer.stdout.splitlines())
    assert answer.returncode == 0 or lines, answer.stderr
    return lines - {"No broken requirements found."}


def test_wheel_holds_every_module_and_nothing_else(wheel):
    source = {str(path.relative_to(KERNELS)) for path in (KERNELS / "fastreason_kernels").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (meta,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(meta).decode().splitlines()
    assert {name for name in names if name.endswith(".py")} == source
    assert {name.split("/")[0] for name in names} == {"fastreason_kernels"}
    needs = {Requirement(line.split(": ", 1)[1]).name for line in lines if line.startswith("Requires-Dist: ")}
    assert needs == {"torch", "triton"}


def test_wheel_works_beside_torch_and_triton_alone(bare, wheel):
    python, site = bare
    # The tested environment may hold a setuptools older than torch asks for; that is not this wheel's doing.
    before = complaints(python)
    run(*pip_in(python, "install", "-q", "--no-index", "--no-deps", wheel))
    assert complaints(python) == before
    assert run(python, "-I", "-c", USE).startswith("works with")
    packages = {path.parent for path in (KERNELS / "fastreason_kernels").rglob("__init__.py")}
    expected = {".".join(path.relative_to(KERNELS).parts) for path in packages}
    if sys.platform == "linux":
        assert expected <= set(run(python, "-I", "-c", IMPORT_ALL).split())
    # Last, as it takes triton away.
    for entry in site.glob("triton*"):
        entry.unlink()
    assert run(python, "-I", "-c", USE, "triton").strip() == "works with torch alone"
