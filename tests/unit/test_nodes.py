"""Several machines of a run: what outer launchers say of them, and how they hear of each other."""

import os
import signal
import subprocess
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fastreason import follow, nodes
from fastreason.arguments import build_parser
from fastreason.errors import ConfigError, FastreasonError, NodeError
from fastreason.nodes import Link, Node, Place, forget_launcher, heed, lead, node_of, open_store
from fastreason.processes import free_port
from fastreason.session import Outcome
from fastreason.supervise import StopRequest

ROOT = Path(__file__).resolve().parents[2]
STORE = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
TORCHRUN = {**STORE, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
SLURM = {**STORE, "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}
SLURM["SLURM_STEP_NUM_TASKS"] = "2"


@pytest.mark.parametrize(
    ("environment", "node"),
    [
        ({}, None),
        (STORE, None),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, None),
        (TORCHRUN, Node(1, 2, "n0", 29500)),
        ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, Node(1, 2, "n0", 29500, has_store=True)),
        (SLURM, Node(1, 2, "n0", 29500)),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, None),  # sbatch's own shell
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell in an allocation of several
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}, None),
    ],
)
def test_which_machine_this_is(environment, node):
    assert node_of(environment) == node


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": "1"}, "several processes on one machine.*train.ranks"),
        ({"LOCAL_WORLD_SIZE": "8"}, "several processes on one machine.*train.ranks"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=2, RANK=1, MASTER_ADDR=''.*must name the first"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"RANK": "2"}, "RANK=2"),
        ({"RANK": "one"}, "RANK, WORLD_SIZE of the environment are not numbers"),
    ],
)
def test_what_an_outer_launcher_may_not_say(changes, message):
    with pytest.raises(ConfigError, match=message):
        node_of({**TORCHRUN, **changes})


def test_processes_of_the_run_do_not_take_themselves_for_the_outer_launcher_s():
    environment = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "x", "PATH": "/bin", "SLURM_PROCID": "1"}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "900"
    forget_launcher(environment)
    assert environment == {"PATH": "/bin", "SLURM_PROCID": "1"}


class Shared:
    """A store in memory."""

    def __init__(self):
        self.values, self.gone, self.stuck = {}, False, False

    def set(self, key, value):
        self._reach()
        self.values[key] = value.encode()

    def get(self, key):
        self._reach()
        return self.values[key]

    def check(self, keys):
        self._reach()
        return all(key in self.values for key in keys)

    def _reach(self):
        if self.gone:
            raise RuntimeError("Broken pipe")
        end = time.monotonic() + 20.0
        while self.stuck and time.monotonic() < end:
            time.sleep(0.05)


@pytest.fixture
def pair(monkeypatch):
    """Two links to one store."""
    monkeypatch.setattr(nodes, "BEAT_S", 0.05)
    monkeypatch.setattr(nodes, "CONNECT_S", 0.5)
    monkeypatch.setattr(nodes, "LAST_WORDS_S", 0.5)
    store = Shared()
    links = [Link(Node(index, 2, "n0", 1), store, silence_s=0.5) for index in (0, 1)]
    yield links
    store.stuck = False
    for link in links:
        link._ended.set()


def looks(link, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        link.look()
        time.sleep(0.02)


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.02)


def test_what_the_first_machine_announces_arrives(pair):
    first, second = pair
    threading.Timer(0.1, first.announce, [{"run_dir": "/runs/a", "port": 7}]).start()
    assert second.await_run(second.look) == {"run_dir": "/runs/a", "port": 7}


def test_a_first_machine_that_ends_before_its_run_is_not_waited_for(pair):
    first, second = pair
    first.store.set("end/0", '{"code": 2, "error": null}')
    with pytest.raises(NodeError, match="node 0 has ended with exit code 2"):
        second.await_run(second.look)
    first.store.set("end/0", '{"code": 2, "error": "train.lr=-1"}')
    until(lambda: second.end_of(0)["error"])
    with pytest.raises(NodeError, match=r"node 0 has failed: train\.lr=-1"):
        second.await_run(second.look)


def test_a_machine_that_beats_is_not_lost_and_one_that_stops_is(pair):
    first, second = pair
    looks(first, 1.0)
    second._ended.set()
    with pytest.raises(NodeError, match="node 1 of 2 has shown no sign of life"):
        looks(first, 5.0)


def test_a_machine_that_never_comes_is_named(pair):
    alone = Link(Node(0, 2, "n0", 1), Shared(), silence_s=0.5)
    with pytest.raises(NodeError, match="node 1 of 2 has not come"):
        looks(alone, 5.0)
    alone._ended.set()


def test_a_store_that_is_gone_is_the_first_machine_s_end(pair):
    first, second = pair
    first.store.gone = True
    with pytest.raises(NodeError, match=r"node 0 of 2.*is gone.*Broken pipe"):
        looks(second, 5.0)
    second.close(1)  # and is no second error
    assert second.await_code(60.0) is None, "waited for what cannot come"


def test_a_first_machine_that_vanishes_without_a_word_is_not_waited_for(pair):
    """Its store neither answers nor breaks off: a call of it has no limit."""
    first, second = pair
    looks(second, 0.3)
    first.store.stuck = True
    began = time.monotonic()
    with pytest.raises(NodeError, match=r"node 0 of 2.*has not answered for"):
        looks(second, 5.0)
    second.close(1)
    assert time.monotonic() - began < 5.0


def test_a_machine_that_ends_before_the_first_is_missed(pair):
    first, second = pair
    looks(first, 0.3)
    second.close(143)
    with pytest.raises(NodeError, match="node 1 has ended with exit code 143 before the run has"):
        looks(first, 5.0)
    first.close(143)
    assert second.end_of(0) is None and not second.others_said()


def test_a_first_machine_that_was_stopped_at_once_has_the_others_stop(pair):
    """Its ranks are missed, and it has no error to tell."""
    asked = []
    pair[1].on_stop = lambda: asked.append("stop")
    pair[0].close(130)
    until(lambda: pair[1].end_of(0) is not None)
    pair[1].look()
    assert asked == ["stop"]


def test_of_two_that_ended_the_one_that_failed_is_named(monkeypatch):
    """The one that ended for it is read at the very moment at which both have come: between two readings of ends."""
    monkeypatch.setattr(nodes, "BEAT_S", 0.05)

    class Late(Shared):
        def check(self, keys):
            here = super().check(keys)
            if keys == ["end/1"]:
                self.values["end/1"] = b'{"code": 1, "error": "no space left"}'
                self.values["end/2"] = b'{"code": 1, "error": null}'
            return here

    link = Link(Node(0, 3, "n0", 1), Late())
    until(lambda: link._num_read)
    with pytest.raises(NodeError, match="node 1 has failed: no space left"):
        link.look()
    link._ended.set()


def test_who_is_to_leave_waits_for_no_run_and_no_code(pair):
    second = pair[1]
    began = time.monotonic()

    def hear():
        assert time.monotonic() - began < 5

    assert second.await_run(hear, lambda: time.monotonic() - began > 0.2) is None
    assert second.await_code(10.0, lambda: time.monotonic() - began > 0.4) is None
    assert time.monotonic() - began < 8


def test_a_follower_that_is_to_stop_now_asks_the_others_and_waits_for_nobody(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    request, asked = StopRequest(), []

    class Hasty:
        def __init__(self, *parts): ...
        def start(self, part): ...
        def stop(self): ...
        def watch(self):
            request(signal.SIGTERM, None)
            request(signal.SIGTERM, None)
            return Outcome(finished=False)

    class Told:
        node = Node(1, 2, "n0", 1)

        def request_stop(self):
            asked.append("stop")

        def await_code(self, *limits):
            raise AssertionError("it waits for the first machine")

    session = SimpleNamespace(write=lambda: tmp_path / "session")
    monkeypatch.setattr(follow, "Supervisor", Hasty)
    monkeypatch.setattr(follow, "folders", lambda *parts: nullcontext(session))
    monkeypatch.setattr(follow, "trainer_part", lambda *parts: None)
    config = SimpleNamespace(run=None, train=SimpleNamespace(ranks=1))
    monkeypatch.setattr(follow, "load_config", lambda path: config)
    names = ("device", "attention", "liger", "groups_dir", "resume", "only", "port", "sleeps")
    run = {"run_dir": str(tmp_path), **dict.fromkeys(names)}
    assert follow.run_ranks(Told(), run, request) == 143
    assert asked == ["stop"]


def test_a_signal_to_one_machine_stops_all(pair):
    requests = [StopRequest(), StopRequest()]
    hears = [heed(link, request) for link, request in zip(pair, requests, strict=True)]
    hears[0]()
    assert requests[0].number is None
    requests[1](signal.SIGTERM, None)
    hears[1]()
    until(lambda: (hears[0](), requests[0].number is not None)[1])
    until(lambda: "stop" in pair[1]._read)
    hears[0]()
    hears[1]()
    assert requests[0].number == signal.SIGTERM
    assert not any(request.urgent for request in requests), "heard twice, it must not become urgent"
    heed(None, requests[0])()


def test_a_signal_of_one_s_own_after_another_machine_s_is_the_first(pair):
    """Slurm sends all nodes the same signal, and that of another may be heard before it."""
    request = StopRequest()
    hear = heed(pair[0], request)
    pair[1].request_stop()
    until(lambda: (hear(), request.number is not None)[1])
    request(signal.SIGTERM, None)
    assert request.number == signal.SIGTERM and not request.urgent
    hear()
    request(signal.SIGTERM, None)
    assert request.urgent


def test_the_first_machine_s_error_has_what_went_wrong_on_others(monkeypatch):
    monkeypatch.setattr(nodes, "BEAT_S", 0.05)
    monkeypatch.setattr(nodes, "LAST_WORDS_S", 1.0)
    store = Shared()
    monkeypatch.setattr(nodes, "open_store", lambda node: store)

    def run(link):
        threading.Timer(0.2, store.set, ["end/1", '{"code": 1, "error": "rank 1 was killed"}']).start()
        raise FastreasonError("rank 0 lost a peer")

    with pytest.raises(FastreasonError, match=r"rank 0 lost a peer\nnode 1: rank 1 was killed"):
        lead(Node(0, 2, "n0", 1), run)
    assert store.values["end/0"] == b'{"code": 1, "error": "rank 0 lost a peer"}'
    store.values = {"end/1": b'{"code": 0, "error": null}'}
    assert lead(Node(0, 2, "n0", 1), lambda link: 0) == 0
    assert store.values["end/0"] == b'{"code": 0, "error": null}'


def test_another_machine_that_says_nothing_is_waited_for_once(monkeypatch):
    monkeypatch.setattr(nodes, "BEAT_S", 0.05)
    monkeypatch.setattr(nodes, "LAST_WORDS_S", 1.0)
    link = Link(Node(0, 2, "n0", 1), Shared())
    link.close(1, "rank 0 lost a peer")
    began = time.monotonic(), time.process_time()
    assert link.others_said() == []
    assert time.monotonic() - began[0] < 0.5 and time.process_time() - began[1] < 0.5


def test_machines_meet_at_torch_s_own_store():
    port = free_port()
    first = open_store(Node(0, 2, "127.0.0.1", port))
    second = open_store(Node(1, 2, "127.0.0.1", port))
    first.set("run", "{}")
    # The store does not acknowledge what is set: `get` waits for it, `check` sees it afterwards.
    assert second.get("run") == b"{}" and second.check(["run"]) and not second.check(["what nobody has told"])
    # torchrun's store is there before us.
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    open_store(Node(0, 2, "127.0.0.1", agent.port, has_store=True)).set("run", "{}")
    with pytest.raises(
        FastreasonError, match=r"node 1 of 2: MASTER_ADDR=127\.0\.0\.1, MASTER_PORT=\d+: it does not answer"
    ):
        open_store(Node(1, 2, "127.0.0.1", free_port()), connect_s=0.5)


# The scripts

# What an outer launcher must find in its environment: srun takes the cores of a task from nothing else, and torchrun ends what
# it was told to stop after 30 s, in which no checkpoint of a large model is written.
GIVEN = {
    "torchrun.sh": {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"},
    "slurm.sbatch": {"SRUN_CPUS_PER_TASK": "64", "MASTER_ADDR": "n0", "MASTER_PORT": "20007"},
}


@pytest.mark.parametrize("name", ["torchrun.sh", "deepspeed.sh", "slurm.sbatch"])
def test_a_launch_script_is_right(name, tmp_path):
    """bash reads it, and what it starts on a node is a command of ours, which a stand-in for the outer launcher writes down."""
    script = ROOT / "configs" / "launch" / name
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    said = tmp_path / "said"
    for outer in ("torchrun", "deepspeed", "srun", "scontrol"):
        stand_in = tmp_path / outer
        stand_in.write_text(
            f'#!/bin/bash\n[ {outer} = scontrol ] && echo n0 && exit\necho {outer} "$@" >> {said}\n'
            f"env > {said}.environment\n"
        )
        stand_in.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NODE": "1",
        "FIRST": "n0",
        "SLURM_NNODES": "2",
    }
    environment |= {"SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}
    config = "configs/math_grpo_gpu.yaml"
    command = ["bash", str(script), config, "run.dir=/shared/runs"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    words = said.read_text().split()
    command = words[words.index("fastreason") + 1 :]
    options = build_parser().parse_args([*command, "--dry-run"])
    assert (options.command, options.config, options.overrides[-1]) == ("train", config, "run.dir=/shared/runs")
    outer = words[: words.index("fastreason")]
    check_outer(outer[0], outer[1:])
    given = dict(line.split("=", 1) for line in Path(f"{said}.environment").read_text().splitlines() if "=" in line)
    for key, value in GIVEN.get(name, {}).items():
        assert given.get(key) == value


def check_outer(outer: str, flags: list[str]) -> None:
    """The outer launchers' own parsers, where they are installed, take the flags, and start one process a node."""
    if outer == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args([*flags, "fastreason"])
        assert (options.nproc_per_node, options.no_python, options.node_rank) == ("1", True, 1)
    elif outer == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        options = parse_args([*flags, "fastreason"])
        assert (options.num_gpus, options.no_python, options.no_local_rank) == (1, True, True)
    else:
        assert outer == "srun" and "--ntasks-per-node=1" in flags


def test_a_place_says_where_ranks_meet():
    from fastreason.config import parse_config
    from fastreason.launch import trainer_command

    raw = {"model": {"path": "none"}, "data": {"task": "chain_sum"}}
    config = parse_config({**raw, "train": {"steps": 1, "prompts_per_step": 4, "ranks": 2}})
    command = trainer_command(config, Path("/session"), Place(1, 3, "n0", 4711))
    for word in ("--nnodes=3", "--node-rank=1", "--nproc-per-node=2", "--master-addr=n0", "--master-port=4711"):
        assert word in command
    assert not [word for word in command if "rdzv" in word or "127.0.0.1" in word]
