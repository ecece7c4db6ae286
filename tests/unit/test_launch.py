"""What the launcher checks before anything heavy starts, and how it names and keeps run folders."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from fastreason import follow, launch, supervise
from fastreason.config import load_config, parse_config
from fastreason.cores import available_cores
from fastreason.errors import ConfigError, DataError, FastreasonError, ModelError
from fastreason.exchange import ExchangeFolder
from fastreason.launch import StopRequest, sweep_segments, trainer_command
from fastreason.nodes import Node
from fastreason.placement import Placement
from fastreason.preflight import Decisions, anchor_paths, check_prompts_offline, choose_device, preflight
from fastreason.rollout import fake_server
from fastreason.run_folder import make_run_dir, write_config
from fastreason.session import SEGMENTS, Session


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def make(tmp_path):
    """A config that passes every check, with changes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))

    def make_config(**sections):
        raw = {
            "run": {"dir": str(tmp_path / "runs")},
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"task": "chain_sum", "num_prompts": 20},
            "rollout": {"engine": "fake"},
            "train": {"steps": 1, "prompts_per_step": 2, "device": "cpu"},
        }
        for name, keys in sections.items():
            raw[name] = {**raw.get(name, {}), **keys}
        return parse_config(raw)

    return make_config


def test_a_config_that_is_right_passes(make):
    decisions, unchecked = preflight(make())
    assert (decisions.device, decisions.attention, decisions.liger) == ("cpu", "sdpa", False)
    assert unchecked == []


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"data": {"task": "chain_sums"}}, ConfigError, r"data\.task='chain_sums'.*did you mean 'chain_sum"),
        ({"data": {"task_args": {"terms": 2}}}, ConfigError, r"data\.task_args\.terms.*min_terms"),
        ({"data": {"source": "file", "path": "/no/file.jsonl"}}, DataError, r"data\.path='/no/file\.jsonl'"),
        ({"model": {"path": "/no/model"}}, ModelError, r"model\.path='/no/model': there is no such folder"),
        ({"algorithm": {"name": "gropo"}}, ConfigError, r"algorithm\.name='gropo'.*Did you mean 'grpo'"),
        (
            {"reward": {"functions": {"maths": 1.0}}},
            ConfigError,
            r"'maths', which is not a reward; did you mean 'math'",
        ),
        ({"reward": {"functions": {"no.module:f": 1.0}}}, ConfigError, r"importing 'no\.module' failed"),
        (
            {"model": {"attn_implementation": "flash_attention_2"}},
            ConfigError,
            r"model\.attn_implementation=flash_attention_2: the device is not a GPU",
        ),
        ({"model": {"liger": "on"}}, ConfigError, r"model\.liger=on: the device is not a GPU"),
        ({"rollout": {"cores": "8000"}}, ConfigError, r"rollout\.cores='8000': core\(s\) \[8000\] are not available"),
        ({"train": {"cores": "8000"}}, ConfigError, r"train\.cores='8000'"),
        ({"train": {"cores": "one"}}, ConfigError, r"train\.cores='one'"),
        ({"train": {"cores": "0", "spare_cores": "8000"}}, ConfigError, r"train\.spare_cores='8000'"),
        ({"train": {"spare_cores": "0"}}, ConfigError, r"train\.spare_cores='0' needs .* train\.cores"),
        ({"train": {"device": "cuda"}}, ConfigError, r"train\.device=cuda: no NVIDIA GPU"),
        ({"rollout": {"max_new_tokens": 2000}}, ConfigError, r"max_position_embeddings=2048"),
    ],
)
def test_what_cannot_work_is_found_before_a_model_loads(make, sections, error, message):
    with pytest.raises(error, match=message):
        preflight(make(**sections))


def test_one_phase_alone_shares_no_gpu_and_a_trainer_alone_needs_no_engine(make, monkeypatch):
    """The model has no room beside a trainer, or its engines are elsewhere and their key is not here."""
    from fastreason.plan import sharing

    def refuse(*_, **__):
        raise ConfigError("no room")

    monkeypatch.setattr(sharing, "check_sharing", refuse)
    monkeypatch.setattr("fastreason.preflight.choose_device", lambda wanted: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    shared = make(train={"device": "auto"})
    with pytest.raises(ConfigError, match="no room"):
        preflight(shared)
    for only in ("rollout", "train"):
        decisions, _ = preflight(shared, only=only)
        assert (decisions.placement.mode, decisions.placement.sleeps, decisions.notes) == ("split", False, ())
    monkeypatch.undo()
    elsewhere = make(resources={"urls": ["http://node1:8000"]}, train={"device": "cpu"})
    for only in (None, "rollout"):
        with pytest.raises(ConfigError, match=r"resources\.urls with rollout\.transport=auto"):
            preflight(elsewhere, only=only)
    preflight(elsewhere, only="train")


def test_a_missing_column_is_found_before_a_model_loads(make, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "1 + 1", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"data\.problem_column='problem'.*question"):
        preflight(make(data={"source": "file", "path": str(path), "task": None}))
    preflight(make(data={"source": "file", "path": str(path), "task": None, "problem_column": "question"}))


def test_vllm_that_is_not_installed_says_what_to_do(make, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    with pytest.raises(ConfigError, match=r"rollout\.engine=vllm: vllm is not installed.*make setup.*engine=hf"):
        preflight(make(rollout={"engine": "vllm"}))


def test_what_may_need_the_network_is_listed_not_looked_up(make, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("looked on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = make(data={"source": "hub", "path": "some/data", "task": None}, model={"path": "some/model"})
    _, unchecked = preflight(config)
    assert len(unchecked) == 2 and "some/data" in unchecked[0] and "some/model" in unchecked[1]


def test_problems_that_the_reward_cannot_judge_are_found_offline(make, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1 + 1"}\n{"problem": "1 + 2"}\n')
    data = {"source": "file", "path": str(path), "task": None, "answer_column": None}
    with pytest.raises(ConfigError, match="no gold answer"):
        check_prompts_offline(make(data=data))
    with pytest.raises(ConfigError, match=r"eval\.num_prompts=20"):
        check_prompts_offline(make(eval={"num_prompts": 20}))
    check_prompts_offline(make(eval={"num_prompts": 5}))


# Devices


@pytest.mark.parametrize(
    ("driver", "visible", "gpu"),
    [(True, None, True), (True, "0,1", True), (True, "", False), (True, "-1", False), (False, None, False)],
)
def test_auto_is_a_gpu_where_the_driver_shows_one(monkeypatch, driver, visible, gpu):
    monkeypatch.setattr(Path, "exists", lambda self: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_device("auto") == ("cuda" if gpu else "cpu")
    assert choose_device("cpu") == "cpu"
    if gpu:
        assert choose_device("cuda") == "cuda"
    else:
        with pytest.raises(ConfigError, match=r"train\.device=cuda"):
            choose_device("cuda")


# Folders


def test_a_run_never_shares_a_folder(make):
    first = make_run_dir(make(run={"name": "a"}))
    assert first.is_dir() and first.name == "a" and first.is_absolute()
    (first / "metrics.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match=r"run\.name='a': .* exists already.*run\.on_exists=number.*--resume .*/a"):
        make_run_dir(make(run={"name": "a"}))
    assert (first / "metrics.jsonl").read_text() == "precious"


def test_runs_are_numbered_on_wish(make):
    config = make(run={"name": "a", "on_exists": "number"})
    assert [make_run_dir(config).name for _ in range(3)] == ["a", "a-2", "a-3"]


def test_a_file_of_that_name_is_in_the_way_too(make, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").touch()
    with pytest.raises(ConfigError, match="exists already"):
        make_run_dir(make(run={"name": "a"}))


def test_the_config_of_a_run_loads_again(make):
    config = make()
    folder = make_run_dir(config)
    write_config(config, folder)
    assert load_config(folder / "config.yaml") == config


def test_the_ranks_start_under_the_elastic_launcher_on_loopback(make):
    command = trainer_command(make(train={"ranks": 2}), Path("/session"))
    assert "--nproc-per-node=2" in command and "--rdzv-endpoint=127.0.0.1:0" in command
    assert command[-2:] == ["_process", "trainer"]


# Which processes a run has


@pytest.fixture
def parts_of(make, tmp_path, monkeypatch):
    """The parts of a run that nothing has been started of, with the session that they would read."""
    monkeypatch.setattr(fake_server, "read_tokens", lambda *_: ([5, 6], 1))  # the model has no tokenizer

    def parts(only=None, device="cpu", **sections):
        config = make(**sections)
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        session = Session(
            folder=str(folder), run_dir=str(folder), model_dir=config.model.path,
            exchange_dir=str(folder), device=device, attention="sdpa", liger=False, resume=False, only=only,
        )  # fmt: skip
        found = launch._parts(config, session)
        return found, msgspec.json.decode((folder / "session.json").read_bytes(), type=Session)

    return parts


@pytest.mark.parametrize(
    ("only", "engine", "expected"),
    [
        (None, "vllm", ["vLLM server", "producer", "trainer"]),
        (None, "fake", ["fake engine", "producer", "trainer"]),
        (None, "hf", ["producer", "trainer"]),
        ("rollout", "fake", ["fake engine", "producer", "collector"]),
        ("train", "fake", ["trainer"]),
    ],
)
def test_which_processes_a_run_has(parts_of, only, engine, expected):
    parts, session = parts_of(only, rollout={"engine": engine}, train={"ranks": 2})
    assert [part.name for part in parts] == expected
    assert len(session.engine_urls) == (len(expected) == 3)
    assert parts[-1].members == (("collector",) if only == "rollout" else ("trainer-0", "trainer-1"))
    assert [part.key for part in parts[:-1]] == [{"producer": "producer"}.get(name, "engine") for name in expected[:-1]]
    assert parts[-1].key is None, "a trainer is never started again"


def test_several_engines_have_their_share_their_port_and_their_log_each_and_one_key(parts_of, monkeypatch):
    spawned = []

    def fake_spawn(name, command, log_path, environment, cores=None):
        spawned.append((command[-3], log_path.name, environment["FASTREASON_ENGINE_KEY"], cores))

    monkeypatch.setattr("fastreason.rollout.server.spawn", fake_spawn)
    first, *_, last = available_cores()
    parts, session = parts_of(rollout={"cores": f"{first},{last}"}, resources={"engines": 2})
    assert [(part.name, part.key, part.kind) for part in parts[:2]] == [
        ("fake engine 0", "engine-0", "engine"),
        ("fake engine 1", "engine-1", "engine"),
    ]
    for part in parts[:2]:
        part.start()
    ports, logs, keys, cores = zip(*spawned, strict=True)
    assert session.engine_urls == tuple(f"http://127.0.0.1:{port}" for port in ports) and len(set(ports)) == 2
    assert logs == ("engine-0.log", "engine-1.log") and cores == ([first], [last]) and len(set(keys)) == 1
    assert parts[1].lost_signs == (f"fake engine at {session.engine_urls[1]}",)


def test_engines_elsewhere_are_no_part_of_a_run_and_their_key_goes_to_the_producer_alone(parts_of, monkeypatch):
    given = []
    monkeypatch.setattr(launch, "spawn", lambda name, command, log, environment, cores=None: given.append(environment))
    monkeypatch.setenv("FASTREASON_ENGINE_KEY", "theirs")
    parts, session = parts_of(resources={"urls": ["http://node1:8000/", "http://node2:8000"]})
    assert [part.name for part in parts] == ["producer", "trainer"]
    assert session.engine_urls == ("http://node1:8000", "http://node2:8000")
    assert "FASTREASON_ENGINE_KEY" not in os.environ, "the ranks would inherit it"
    parts[0].start()
    assert given[0]["FASTREASON_ENGINE_KEY"] == "theirs"


def test_the_ranks_get_no_key_and_everybody_the_cores_of_its_side(parts_of, monkeypatch):
    spawned = {}

    def fake_spawn(name, command, log_path, environment, cores=None):
        spawned[name] = (command, environment, cores)

    cores = available_cores()
    first, last = str(cores[0]), str(cores[-1])
    monkeypatch.setattr(launch, "spawn", fake_spawn)
    for section, expected in (({}, (None, None)), ({"cores": last}, ([cores[-1]], None))):
        parts, _ = parts_of(rollout={"cores": first} if section else {}, train=section)
        for part in parts[1:]:
            part.start()
        assert (spawned["producer"][2], spawned["trainer"][2]) == (([cores[0]] if section else None), expected[0])
        keys = [name for name in spawned["producer"][1] if name.endswith("_KEY")]
        assert len(keys) == 1 and not [name for name in spawned["trainer"][1] if name.endswith("_KEY")]
    parts, _ = parts_of(rollout={"cores": first})
    parts[1].start()
    assert spawned["producer"][2] is None, "the engine's cores alone are the engine's"


def test_ranks_of_another_machine_take_turns_with_the_engine_too_and_get_no_key(make, tmp_path, monkeypatch):
    """All ranks or none wait for each other when the trainer leaves: one that did not would be waited for."""
    config, said, started = make(), {}, []
    (tmp_path / "run").mkdir()
    write_config(config, tmp_path / "run")
    placement = Placement("colocated", sleeps=True)
    decisions = Decisions(device="cpu", attention="sdpa", liger=False, placement=placement)
    with launch.folders(config, tmp_path / "run", decisions, False, None, None) as first:
        launch.announce(SimpleNamespace(node=Node(0, 2, "n0", 1), announce=said.update), first)

    def start(config, session, environment, place):
        started.append((session, "FASTREASON_ENGINE_KEY" in {**os.environ, **environment}))
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "trainer_part", start)
    monkeypatch.setenv("FASTREASON_ENGINE_KEY", "theirs")
    with pytest.raises(KeyboardInterrupt):
        follow.run_ranks(SimpleNamespace(node=Node(1, 2, "n0", 1)), json.loads(json.dumps(said)), StopRequest())
    ((session, has_key),) = started
    assert (first.sleeps, session.sleeps) == (True, True)
    assert (first.colocated, session.colocated) == (True, False), "it has no engine whose start it could wait for"
    assert not has_key


def test_cores_of_the_engine_are_lent_to_a_trainer_that_waits_without_spinning(parts_of, monkeypatch):
    spawned = {}
    monkeypatch.setattr(
        launch,
        "spawn",
        lambda name, command, log, environment, cores=None: spawned.update({name: (environment, cores)}),
    )
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    cores = available_cores()
    first, last = cores[0], cores[-1]
    for lent, expected in ((None, [last]), (str(first), sorted({first, last}))):
        parts, _ = parts_of(rollout={"cores": str(first)}, train={"cores": str(last), "spare_cores": lent})
        for part in parts[1:]:
            part.start()
        assert spawned["producer"][1] == [first] and spawned["trainer"][1] == expected
        assert spawned["trainer"][0].get("OMP_WAIT_POLICY") == ("passive" if lent else None)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the scheduler's idle class is Linux's")
def test_a_trainer_on_lent_cores_runs_only_where_nobody_else_wants_to(make):
    """In a process of its own, since a class once left is not given back to everybody."""
    cores = available_cores()
    first, last = cores[0], cores[-1]
    script = (
        "import os, sys, torch\n"
        "from fastreason.device import prepare_device\nfrom fastreason.config import parse_config\n"
        "config = parse_config({'model': {'path': 'none'}, 'data': {'task': 'chain_sum'}, 'train': {'steps': 1, "
        "'prompts_per_step': 1, 'cores': sys.argv[1], 'spare_cores': sys.argv[2] or None}})\n"
        "prepare_device('cpu', config.train)\n"
        "print(sorted(os.sched_getaffinity(0)), torch.get_num_threads(), os.sched_getscheduler(0) == os.SCHED_IDLE)"
    )
    for lent, mine in (("", [last]), (str(first), sorted({first, last}))):
        command = [sys.executable, "-P", "-c", script, str(last), lent]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == f"{mine} {len(mine)} {bool(lent)}", done.stderr


def test_shared_memory_of_a_killed_run_is_swept_and_that_of_a_living_one_is_not(tmp_path):
    segments = [shared_memory.SharedMemory(create=True, size=64) for _ in range(2)]
    for segment in segments:
        resource_tracker.unregister(segment._name, "shared_memory")
    paths = [Path("/dev/shm") / segment.name for segment in segments]
    living = ExchangeFolder(0, parents=(tmp_path,))
    killed = ExchangeFolder(0, parents=(tmp_path,))
    try:
        for folder, path in zip((living, killed), paths, strict=True):
            (folder.path / SEGMENTS).write_text(f"{path}\n/dev/shm/psm_gone\n")
        fcntl.flock(killed._lock, fcntl.LOCK_UN)
        sweep_segments(tmp_path)
        assert [path.exists() for path in paths] == [True, False]
    finally:
        for segment, path in zip(segments, paths, strict=True):
            segment.close()
            path.unlink(missing_ok=True)
        living.remove()
        killed.remove()


# Stopping


def test_the_first_signal_asks_and_the_second_insists():
    request = StopRequest()
    assert request.number is None and not request.urgent
    request(signal.SIGTERM, None)
    assert not request.urgent and request.exit_code == 143
    request(signal.SIGINT, None)
    assert request.urgent and request.exit_code == 143, "the exit code is that of the first"


@pytest.mark.parametrize(("code", "hint"), [(-9, True), (137, True), (1, False), (-15, False), (None, False)])
def test_a_killed_process_most_likely_ran_out_of_memory(code, hint):
    assert ("out of memory" in supervise._memory_hint(code)) is hint


def test_the_errors_of_a_run_are_caught_by_their_base():
    for error in (ConfigError, DataError, ModelError):
        assert issubclass(error, FastreasonError) and issubclass(error, ValueError)


def test_local_paths_become_absolute_and_names_stay(make, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n')
    config = make(data={"source": "file", "path": "data.jsonl"}, model={"path": "model"})
    monkeypatch.chdir(tmp_path)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"exchange_dir": "shared"})})
    anchored = anchor_paths(config)
    assert (anchored.model.path, anchored.data.path) == (str(tmp_path / "model"), str(tmp_path / "data.jsonl"))
    assert anchored.rollout.exchange_dir == str(tmp_path / "shared")
    hub = make(data={"source": "hub", "path": "owner/data"}, model={"path": "owner/model"})
    assert anchor_paths(hub) == hub
