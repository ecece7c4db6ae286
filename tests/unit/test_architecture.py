"""Who may import whom, what stays light, and the traps of folders named like packages. Reads code, runs little."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "vllm", "deepspeed", "transformers"}

FOUNDATION = {"types", "errors", "config", "sections", "cores"}
PURE = {"advantages", "filtering", "gae", "kl", "losses", "packing", "rewards"}
PLUMBING = {"resources", "metrics", "ledger", "trace", "exchange", "transport", "ranks", "models"}
PLUMBING |= {"processes", "session", "patience", "beats", "tenancy"}
MEANING = FOUNDATION | PURE
PARTS = MEANING | PLUMBING | {"policy", "data", "algorithms", "figures"}
PARTS |= {"credit", "critic", "frozen", "lora"}
PROTOCOLS = {"rollout", "update", "sync", "checkpoint", "evaluation", "report", "training"}
EVERYTHING = {""}

# Which modules of fastreason one may import besides those of its own package. A new module needs a row.
ALLOWED = {
    "types": set(),
    "errors": set(),
    "config": {"types", "errors", "sections"},
    "sections": set(),
    "cores": {"errors"},
    "resources": FOUNDATION,
    "arguments": {"__version__"},
    "device": FOUNDATION | {"cores"},
    "metrics": FOUNDATION,
    "exchange": FOUNDATION,
    "transport": FOUNDATION,
    "ledger": FOUNDATION,
    "processes": FOUNDATION,
    "ranks": FOUNDATION,
    "models": FOUNDATION,
    "session": FOUNDATION,
    "patience": set(),
    "placement": FOUNDATION | {"resources"},
    "gpus": FOUNDATION | {"resources"},
    "tenancy": {"ranks"},
    "nodes": {"errors", "patience"},
    "beats": {"patience"},
    "figures": MEANING,
    "alerts": FOUNDATION,
    "display": FOUNDATION | {"alerts", "metrics"},
    "trace": set(),
    "replay": FOUNDATION | {"rollout"},
    "reference": FOUNDATION,
    "report": FOUNDATION | {"metrics", "trace", "ledger", "evaluation"},
    "probes": FOUNDATION | {"processes"},
    "machine": FOUNDATION | {"resources"},
    "doctor": FOUNDATION | {"machine", "probes"},
    **dict.fromkeys(PURE, {"types", "errors", "config", "sections"} | PURE),
    "algorithms": MEANING | {"algorithm_checks"},
    "algorithm_checks": MEANING | {"algorithms"},
    "data": MEANING | {"models"},
    "families": FOUNDATION,
    "lora": MEANING,
    "body": MEANING | {"families"},
    "policy": MEANING | {"families", "lora", "body"},
    "checkpoint": FOUNDATION | PLUMBING,
    "run_folder": FOUNDATION | {"metrics"},
    "run_summary": FOUNDATION | {"metrics"},
    "rollout": MEANING | PLUMBING | {"data"},
    "vocabulary": FOUNDATION,
    "plan": FOUNDATION | {"metrics", "models", "preflight", "placement", "resources", "gpus", "algorithms"},
    "credit": MEANING | PLUMBING,
    "frozen": MEANING | PLUMBING | {"policy", "lora", "body"},
    "critic": MEANING | PLUMBING | {"policy", "update", "body"},
    "update": MEANING | PLUMBING | {"policy", "critic", "lora"},
    "sync": MEANING | PLUMBING | {"policy", "lora"},
    "objectives": MEANING | {"policy"},
    **dict.fromkeys(("loop", "training"), PARTS | PROTOCOLS),
    "offline": PARTS | PROTOCOLS | {"objectives", "loop"},
    **dict.fromkeys(
        ("cli", "preflight", "launch", "supervise", "compose", "companions", "engines", "engine_clients", "serve"),
        EVERYTHING,
    ),
    **dict.fromkeys(
        ("serving", "distill", "evaluation", "compose_offline", "offline_data", "resume", "follow"), EVERYTHING
    ),
}
# Engines and updaters are chosen by the composition root; everybody else sees their Protocols.
CONCRETE = {"rollout.vllm", "rollout.vllm_worker", "rollout.hf", "rollout.fake", "update.deepspeed"}
CHOOSERS = {
    "cli",
    "preflight",
    "launch",
    "compose",
    "compose_offline",
    "companions",
    "serving",
    "engines",
    "engine_clients",
}
# Other people's packages: None where anything goes.
PURE_PACKAGES = {"torch", "numpy", "msgspec", "fastreason_kernels", "fastreason"}
REWARD_PACKAGES = PURE_PACKAGES | {"math_verify", "reasoning_gym", "sympy"}
KERNEL_PACKAGES = {"torch", "triton", "numpy", "fastreason_kernels"}
ADAPTED = {"trl", "verl", "liger_kernel", "transformers"}
ONLY = {"vllm": {"rollout.vllm_api"}, "deepspeed": {"update.deepspeed"}, "peft": {"lora"}}


def under(name: str, prefixes: set[str]) -> bool:
    return any(prefix == "" or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also those inside functions and those made by import_module("...")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides who imports whom"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def trainer_faults(module: str, source: str) -> list[str]:
    """What one module of fastreason (its name without `fastreason.`) imports against the rules."""
    package = module.split(".")[0]
    if package not in ALLOWED:
        return [f"{module}: has no row in ALLOWED; decide where it stands and add one"]
    faults = []
    for line, name in imports(source):
        where, target = f"{module}, line {line}: ", name.removeprefix("fastreason.")
        if name.startswith("fastreason."):
            if not under(target, ALLOWED[package] | {package}):
                faults.append(f"{where}{package} may not import {name}")
            if under(target, CONCRETE) and package not in CHOOSERS and not under(target, {package}):
                faults.append(f"{where}only {sorted(CHOOSERS)} choose {name}")
        top = name.split(".")[0]
        if top in ONLY and module not in ONLY[top]:
            faults.append(f"{where}only {ONLY[top]} may import {top}")
        if top == "triton":
            faults.append(f"{where}kernels belong into the loss library")
        allowed = REWARD_PACKAGES if package == "rewards" else PURE_PACKAGES
        if package in PURE and top not in allowed | sys.stdlib_module_names:
            faults.append(f"{where}a pure module may not import {top}")
    return faults


def kernel_faults(path: str, source: str) -> list[str]:
    """What one file of the loss library (its path inside fastreason_kernels) imports against the rules."""
    allowed = KERNEL_PACKAGES | sys.stdlib_module_names
    if path.startswith("integrations/"):
        allowed |= ADAPTED
    faults = []
    for line, name in imports(source):
        top = name.split(".")[0]
        if top not in allowed:
            faults.append(f"{path}, line {line}: the loss library may not import {top}")
        if top == "triton" and Path(path).name not in ("kernels.py", "tiles.py"):
            faults.append(f"{path}, line {line}: only kernels.py and tiles.py import triton")
    return faults


def modules(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")


def dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_the_trainer_keeps_its_layers():
    found = [(dotted(path), source) for path, source in modules(ROOT / "fastreason") if path != "__init__.py"]
    assert len(found) > 10, "no modules found: the test looks in the wrong place"
    assert [fault for module, source in found for fault in trainer_faults(module, source)] == []


def test_the_loss_library_stands_alone():
    found = list(modules(ROOT / "kernels" / "fastreason_kernels"))
    assert found, "no modules found: the test looks in the wrong place"
    assert [fault for path, source in found for fault in kernel_faults(path, source)] == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("rollout.producer", "from fastreason.update import updater", "rollout may not import"),
        ("rollout.producer", "def f():\n    import fastreason.sync", "line 2: rollout may not import"),
        ("update.deepspeed", "from fastreason.rollout.wire import send", "update may not import"),
        ("loop", "from fastreason.rollout import vllm", "only"),
        ("loop", "import importlib\nimportlib.import_module('fastreason.update.deepspeed')", "only"),
        ("losses.preference", "from fastreason.metrics import MetricsLog", "losses may not import"),
        ("advantages", "import psutil", "a pure module"),
        ("evaluation.scores", "import vllm", "may import vllm"),
        ("update.updater", "from deepspeed import zero", "may import deepspeed"),
        ("policy", "import triton.language as tl", "loss library"),
        ("utils", "import os", "no row"),
    ],
)
def test_the_rules_catch_a_breach_in_the_trainer(module, source, fault):
    assert [text for text in trainer_faults(module, source) if fault in text]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loop", "from fastreason.rollout.engine import Engine\nfrom fastreason.update.updater import Updater"),
        ("cli", "from fastreason.rollout import vllm\nfrom fastreason.update import deepspeed"),
        ("rollout.vllm_api", "import vllm\nfrom fastreason.rollout.vllm_worker import X"),
        ("rewards.verification", "def f():\n    from math_verify import parse"),
    ],
)
def test_the_rules_let_the_intended_through(module, source):
    assert trainer_faults(module, source) == []


def test_the_rules_catch_a_breach_in_the_loss_library():
    assert kernel_faults("head.py", "from fastreason.types import Group")
    assert kernel_faults("linear_logprob/function.py", "import triton")
    assert kernel_faults("head.py", "import trl")
    assert not kernel_faults("linear_logprob/kernels.py", "import triton")
    assert not kernel_faults("integrations/trl.py", "import trl")


def heavy_modules(importtime: str) -> set[str]:
    """Which of HEAVY a `python -X importtime` run loaded."""
    names = {line.rsplit("|", 1)[-1].strip() for line in importtime.splitlines() if line.startswith("import time:")}
    assert "fastreason" in names, "the run did not import fastreason: it shows nothing"
    return {name for name in names if name in HEAVY}


def run_timed(*arguments: str) -> str:
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0, "\n".join(said)
    return done.stderr


LIGHT = ["config", "metrics", "alerts", "cores", "display", "report.reward_curve", "doctor", "evaluation.section"]
LIGHT += ["plan.command"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module):
    assert heavy_modules(run_timed("-P", "-c", f"import fastreason.{module}")) == set()


def test_the_check_for_heavy_modules_can_fail():
    assert heavy_modules(run_timed("-P", "-c", "import fastreason, torch")) >= {"torch"}


def test_the_console_script_answers_help_without_anything_heavy():
    script = Path(sys.executable).with_name("fastreason")
    assert script.is_file(), "install the project: pip install -e ."
    assert heavy_modules(run_timed(str(script), "--help")) == set()


def test_the_console_script_does_not_see_the_repository_root():
    # The path of a console script is its own folder and the environment's; -P leaves the first entry out.
    program = "import sys, os; print(*map(os.path.realpath, filter(None, sys.path)), sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment, check=True)
    paths = done.stdout.splitlines()
    assert len(paths) > 1 and str(ROOT) not in paths


def folders(top: str) -> Iterator[Path]:
    yield from (path for path in (ROOT / top).rglob("*") if path.is_dir() and path.name != "__pycache__")


def test_no_folder_can_be_taken_for_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    trap = {"kernels", "fastreason", "fastreason_kernels"}
    assert [path for path in folders("tests") if path.name in trap] == []


def test_modules_are_named_after_what_they_own():
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    names = [path for top in ("fastreason", "kernels", "bench", "tests") for path in (ROOT / top).rglob("*.py")]
    assert [path for path in [*names, *folders("fastreason"), *folders("kernels")] if path.stem in vague] == []
