"""A run's folder is held by one start at a time, and its config is the old one or the new one."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from fastreason.config import parse_config
from fastreason.errors import ConfigError
from fastreason.run_folder import held, write_config

pytestmark = pytest.mark.timeout(400)

SHARE = "import sys; from fastreason.run_folder import share; share(sys.argv[1]); print('shared', flush=True); input()"


def test_a_second_start_is_told_who_has_the_folder(tmp_path):
    with held(tmp_path):
        for _ in range(2):
            with (
                pytest.raises(ConfigError, match=rf"under way \(process {os.getpid()}\).*Wait for its end"),
                held(tmp_path),
            ):
                pass
    with held(tmp_path):
        pass


def test_a_start_that_was_killed_leaves_the_folder_free(tmp_path):
    code = """
import os, pathlib, sys
from fastreason.run_folder import held
with held(pathlib.Path(sys.argv[1])):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=False).returncode == -9
    with held(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_processes_of_a_launcher_that_was_killed_are_waited_for(tmp_path):
    """They may still be saving what was trained."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", SHARE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"shared\n"
        with (
            pytest.raises(ConfigError, match=r"processes of its last start are still there after 0.2 s"),
            held(tmp_path, 0.2),
        ):
            pass
        process.stdin.write(b"\n")
        process.stdin.flush()
        with held(tmp_path):
            pass


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path):
        pass
    assert "cannot be locked" in capsys.readouterr().err


def test_a_config_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    def config(steps):
        train = {"steps": steps, "prompts_per_step": 1}
        return parse_config({"model": {"path": "m"}, "data": {"task": "chain_sum"}, "train": train})

    write_config(config(3), tmp_path)
    before = (tmp_path / "config.yaml").read_text()

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", die)
        write_config(config(4), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before
    write_config(config(4), tmp_path)
    assert "steps: 4" in (tmp_path / "config.yaml").read_text()
