"""Looks for the keys of a run where they must not be: in files, in the arguments of processes, in output."""

import contextlib
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

ENGINE_KEY = "FASTREASON_ENGINE_KEY"
USER_KEYS = {
    "FASTREASON_TEACHER_KEY": "hush-of-the-teacher-417",
    "FASTREASON_REWARD_MODEL_KEY": "hush-of-the-judge-417",
}


def engine_key(run: Any) -> str:
    """The key that a running run has given to its engine, from the engine's environment."""
    (engine,) = run.find("fake_server")
    return engine.environ()[ENGINE_KEY]


def processes_that_tell(run: Any, secrets: list[str]) -> list[str]:
    """Command lines of the running run's processes that hold a secret; the ranks must not have the engine's key at all."""
    lines = []
    for process in run.processes():
        with contextlib.suppress(psutil.Error):
            line, variables = " ".join(process.cmdline()), process.environ()
            knows = "trainer" in line and ENGINE_KEY in variables
            lines += [line] if knows or any(secret in line for secret in secrets) else []
    return lines


def files_that_tell(folders: list[Path], secrets: list[str]) -> list[str]:
    """Files below the folders that hold a secret."""
    found = []
    for file in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(OSError):
            content = file.read_bytes()
            found += [str(file)] if any(secret.encode() in content for secret in secrets) else []
    return found


def status_without_key(run: Any) -> list[int]:
    """What the running run's engine answers to whoever has no key, or another one."""
    (session,) = run.tmp.glob("*/session.json")
    url, codes = json.loads(session.read_text())["engine_urls"][0], []
    for path, headers in (("/health", {}), ("/collective_rpc", {}), ("/pause", {"Authorization": "Bearer guess"})):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}{path}", headers=headers), timeout=10)
            codes.append(200)
        except urllib.error.HTTPError as error:
            codes.append(error.code)
    return codes
