"""GPUs that are too few or not there: refused by the config and by what the driver and the environment say, without any GPU."""

import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastreason import follow, gpus, preflight
from fastreason.config import parse_config
from fastreason.errors import ConfigError
from fastreason.nodes import Node
from fastreason.resources import resource_table


@pytest.fixture(autouse=True)
def eight_gpus(monkeypatch):
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(gpus, "num_gpus", lambda: 8)


def config(train_gpus=None, ranks=1, **rollout):
    resources = {"engines": rollout.pop("engines", None), "urls": rollout.pop("urls", [])}
    return parse_config(
        {
            "model": {"path": "/m"},
            "data": {"task": "chain_sum"},
            "rollout": rollout,
            "resources": resources,
            "train": {"steps": 1, "prompts_per_step": 8, "gpus": train_gpus, "ranks": ranks},
        }
    )


def check(keys, generates=True, trains=True):
    gpus.check_gpus(config(**keys), generates, trains)


@pytest.mark.parametrize(
    ("keys", "there", "visible", "words"),
    [
        (
            {"train_gpus": "0-5", "ranks": 7},
            8,
            None,
            r"^train\.gpus='0-5': 6 GPU\(s\), and train\.ranks=7 .*Name 7 of them, or lower train\.ranks to at most 6",
        ),
        ({"train_gpus": "0-5", "ranks": 7}, None, None, r"^train\.gpus='0-5': 6 GPU\(s\)"),  # needs no driver
        (
            {"train_gpus": "4-9", "ranks": 6},
            8,
            None,
            r"^train\.gpus='4-9': GPU 8-9 is not on this machine, whose driver shows 8\. Name GPUs of 0-7",
        ),
        ({"train_gpus": "0,8", "ranks": 1}, 8, None, r"GPU 8 is not"),  # named, though no rank takes it
        (
            {"ranks": 9},
            8,
            None,
            r"^train\.gpus is not set, and train\.ranks=9 .*: 8 visible on this machine\. Lower train\.ranks to at most 8",
        ),
        ({"ranks": 4}, 8, "2,3", r"2 visible on this machine by CUDA_VISIBLE_DEVICES=2,3"),
        ({"ranks": 4}, None, "GPU-a,GPU-b,-1,GPU-c,GPU-d", r"2 visible"),
        ({"ranks": 4}, 8, "0,1,9,2,3", r"2 visible"),
        ({"gpus": "8"}, 8, None, r"^rollout\.gpus='8': GPU 8 is not on this machine"),
        (
            {"tensor_parallel": 4},
            2,
            None,
            r"^rollout\.gpus is not set, and rollout\.tensor_parallel=4 .*: 2 visible.*Lower rollout\.tensor_parallel",
        ),
        ({"gpus": "0-6", "tensor_parallel": 4, "engines": 2}, 8, None, r"4 x resources\.engines=2 want\(s\) 8"),
    ],
)
def test_gpus_that_are_not_there_are_refused_with_the_key(monkeypatch, keys, there, visible, words):
    monkeypatch.setattr(gpus, "num_gpus", lambda: there)
    if visible is not None:
        monkeypatch.setenv(gpus.VISIBLE, visible)
    with pytest.raises(ConfigError, match=words):
        check(keys)


@pytest.mark.parametrize(
    ("keys", "there", "visible"),
    [
        ({"gpus": "7", "train_gpus": "0-6", "ranks": 7}, 8, None),
        ({"gpus": "7", "ranks": 7}, 8, None),
        ({"train_gpus": "0-7", "ranks": 4}, 8, None),  # the first four are taken
        ({"gpus": "7", "train_gpus": "0-6", "ranks": 7}, None, None),
        ({"ranks": 16}, None, None),  # nobody can say
        ({"gpus": "7", "train_gpus": "0-6", "ranks": 7}, 8, "0"),  # a list of its own stands above what is visible
        ({"ranks": 2}, 8, "GPU-a,GPU-b"),
        ({"engine": "fake", "tensor_parallel": 16}, 8, None),
        ({"urls": ["http://a:1"], "tensor_parallel": 16}, 8, None),
    ],
)
def test_gpus_that_are_there_or_that_nobody_knows_of_pass(monkeypatch, keys, there, visible):
    monkeypatch.setattr(gpus, "num_gpus", lambda: there)
    if visible is not None:
        monkeypatch.setenv(gpus.VISIBLE, visible)
    check(keys)


def test_who_starts_nothing_here_needs_no_gpu():
    check({"ranks": 9}, trains=False)
    check({"gpus": "8"}, generates=False)


@pytest.mark.parametrize(
    ("device", "only", "message"),
    [
        ("cuda", None, r"train\.gpus='0'"),
        ("cuda", "train", r"train\.gpus='0'"),
        ("cuda", "rollout", ""),
        ("cpu", None, ""),
    ],
)
def test_a_run_asks_before_anything_starts_and_one_on_a_cpu_does_not(monkeypatch, device, only, message):
    monkeypatch.setattr(preflight, "choose_device", lambda wanted: device)
    monkeypatch.setattr(preflight, "check_online_run", lambda *_: [])
    run = config(train_gpus="0", ranks=2, engine="hf")
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        preflight.preflight(run, only=only)


def test_gpus_without_a_rank_are_told_of(monkeypatch):
    monkeypatch.setattr(preflight, "choose_device", lambda wanted: "cuda")
    monkeypatch.setattr(preflight, "check_online_run", lambda *_: [])
    run = config(train_gpus="1-4,6", ranks=3, gpus="7")
    decisions, _ = preflight.preflight(run)
    assert decisions.notes == (
        "train.gpus=1-4,6: train.ranks=3 take GPU 1-3; 4,6 stay idle. Have train.gpus=1-4,6 and train.ranks=5 to use them.",
    )
    shared = config(train_gpus="0-7", ranks=4, gpus="6-7", tensor_parallel=2)
    (note,) = gpus.idle_notes(shared)
    assert "4-5 stay idle. Have train.gpus=0-5 and train.ranks=6" in note, "the engines have 6 and 7"
    assert resource_table(run, "cuda")[-1].split()[:4] == ["trainer", "3", "GPU", "1-3"]
    assert preflight.preflight(run, only="rollout")[0].notes == ()
    assert preflight.preflight(config(train_gpus="0-6", ranks=7, gpus="7"))[0].notes == ()


def test_another_machine_of_a_run_looks_at_its_own(monkeypatch, tmp_path):
    """Engines are the first machine's: their GPUs are not looked for here."""
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setattr(gpus, "num_gpus", lambda: 4)
    link = SimpleNamespace(node=Node(1, 2, "n0", 1))
    names = ("attention", "liger", "resume", "only", "groups_dir", "sleeps", "port")
    run = {"run_dir": str(tmp_path), "device": "cuda", **dict.fromkeys(names)}
    monkeypatch.setattr(follow, "load_config", lambda path: config(train_gpus="0-5", ranks=6, gpus="7"))
    with pytest.raises(ConfigError, match=r"^node 1 of 2: train\.gpus='0-5': GPU 4-5 is not on this machine"):
        follow.run_ranks(link, run, None)

    class StartedError(Exception):
        pass

    def start(*_):
        raise StartedError

    monkeypatch.setattr(follow, "folders", start)
    monkeypatch.setattr(follow, "load_config", lambda path: config(train_gpus="0-3", ranks=4, gpus="7"))
    with pytest.raises(StartedError):
        follow.run_ranks(link, run, None)


def answers(monkeypatch, folder, program):
    path = Path(folder) / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_driver_is_asked_and_may_not_answer(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    assert (gpus.num_gpus(), gpus.device_memory(0)) == (None, None)
    answers(monkeypatch, tmp_path, 'case "$1" in --query-gpu=index) printf "0\\n1\\n2\\n";; --id=2) echo 81559;; esac')
    assert (gpus.num_gpus(), gpus.device_memory(2)) == (3, 81559 * 2**20)
    for program in ("exit 9", 'echo "No devices were found"'):
        answers(monkeypatch, tmp_path, program)
        assert (gpus.num_gpus(), gpus.device_memory(0)) == (None, None)

    def hang(*_, **keys):
        raise subprocess.TimeoutExpired("nvidia-smi", keys["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert gpus.num_gpus() is None
