"""vLLM's adapter without vLLM: what the server is told, who may talk to it, which file it loads, what its log means."""

import socket
import sys
from pathlib import Path

import pytest

from fastreason.config import Config, RolloutConfig
from fastreason.errors import EngineError
from fastreason.exchange import EXCHANGE_VARIABLE
from fastreason.rollout.server import EngineServer, hold_port, new_key
from fastreason.rollout.stamps import Mark, Stamps, stamp_versions
from fastreason.rollout.vllm_middleware import (
    INSTANCE_VARIABLE,
    KEY_VARIABLE,
)
from fastreason.rollout.vllm_server import explain_end, make_server, server_command, server_environment

KEY = "s3cret"


def options(device, config=None, max_model_len=128, **keys):
    keys = {"dtype": "bfloat16", "max_model_len": max_model_len, "seed": 5, "device": device, **keys}
    command = server_command(config or RolloutConfig(), "/m", 1234, **keys)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    pairs, flags, rest = {}, [], command[3:]
    while rest:
        if len(rest) > 1 and not rest[1].startswith("--"):
            pairs[rest[0]] = rest[1]
            rest = rest[2:]
        else:
            flags.append(rest[0])
            rest = rest[1:]
    return pairs, flags


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_server_listens_on_loopback_behind_our_middleware(device):
    pairs, _ = options(device)
    assert pairs["--host"] == "127.0.0.1" and pairs["--port"] == "1234"
    assert pairs["--middleware"] == "fastreason.rollout.vllm_middleware.RequireKey"
    assert pairs["--worker-extension-cls"] == "fastreason.rollout.vllm_worker.WeightWorker"
    # Log-probabilities after temperature, and no sampling defaults from the model's own files.
    assert (pairs["--logprobs-mode"], pairs["--generation-config"]) == ("processed_logprobs", "vllm")
    assert (pairs["--seed"], pairs["--max-model-len"], pairs["--dtype"]) == ("5", "128", "bfloat16")


def test_what_only_a_cpu_or_only_a_gpu_is_told():
    config = RolloutConfig(gpu_memory_utilization=0.4, tensor_parallel=2)
    pairs, flags = options("cpu", config)
    assert "--gpu-memory-utilization" not in pairs
    # A seeded prompt that is prefilled in two pieces kills the CPU worker: it must fit into one.
    assert "--no-enable-chunked-prefill" in flags and "--enforce-eager" in flags
    assert pairs["--max-num-batched-tokens"] == "4096"
    assert options("cpu", config, max_model_len=9000)[0]["--max-num-batched-tokens"] == "9000"
    pairs, flags = options("cuda", config)
    assert pairs["--gpu-memory-utilization"] == "0.4" and pairs["--tensor-parallel-size"] == "2"
    assert "--no-enable-chunked-prefill" not in flags and "--enforce-eager" not in flags


def test_one_that_shares_its_gpu_in_turn_can_sleep():
    assert "--enable-sleep-mode" in options("cuda", sleeps=True)[1]
    assert "--enable-sleep-mode" not in options("cuda")[1] + options("cpu", sleeps=True)[1]


@pytest.mark.parametrize(("cores", "number", "bound"), [("0-3", 1, "0-3"), ("0-3", 2, "0-1|2-3"), ("1,5", 2, "1|5")])
def test_each_process_of_a_tensor_parallel_engine_on_a_cpu_has_cores_of_its_own(cores, number, bound):
    config = RolloutConfig(cores=cores, tensor_parallel=number)
    environment = server_environment(config, exchange_dir="/e", device="cpu")
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == bound


def vllm_server(log_path, **rollout):
    config = Config.model_validate(
        {
            "model": {"path": "/m", "dtype": "float32"},
            "data": {},
            "train": {"steps": 1, "prompts_per_step": 1},
            "rollout": rollout,
        }
    )
    return make_server(config, "/m", log_path, max_model_len=9, device="cpu", exchange_dir="/dev/shm/e", key=KEY)


def test_the_key_goes_through_the_environment_only(tmp_path):
    server = vllm_server(tmp_path / "log")
    assert not any(KEY in part for part in server._command)
    assert server._environment[KEY_VARIABLE] == KEY and server._environment[EXCHANGE_VARIABLE] == "/dev/shm/e"
    assert KEY not in server.url and server.name == "vLLM server"
    assert server._command[server._command.index("--port") + 1] == str(server.port)


def test_keys_are_long_and_never_the_same():
    keys = {new_key() for _ in range(50)}
    assert len(keys) == 50 and all(len(key) >= 40 for key in keys)


def test_the_environment_of_each_device():
    config = RolloutConfig(cores="2-3", kv_cache_gib=1.2)
    cpu = server_environment(config, exchange_dir="/e", device="cpu")
    assert cpu["VLLM_CPU_OMP_THREADS_BIND"] == "2-3" and cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert cpu["VLLM_CPU_KVCACHE_SPACE"] == "2", "vLLM takes whole GiB: rounded up"
    cuda = server_environment(config, exchange_dir="/e", device="cuda")
    assert not any(name.startswith("VLLM_CPU") for name in cuda)
    assert cuda["VLLM_SERVER_DEV_MODE"] == "1" and cuda["HF_HUB_OFFLINE"] == "1"


# Ports


def test_a_held_port_is_nobody_elses_and_can_be_shared_by_the_server():
    hold = hold_port(0)
    port = hold.getsockname()[1]
    assert port > 0
    with socket.socket() as stranger, pytest.raises(OSError):
        stranger.bind(("127.0.0.1", port))
    with socket.socket() as server:
        # As vLLM binds.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        with pytest.raises(EngineError, match="in use"):
            hold_port(port)
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            server.accept()[0].close()
    hold.close()
    hold_port(port).close()


def test_a_port_in_use_is_refused_with_the_key():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=rf"rollout\.port={port}: the port is in use.*0 for any free one"):
            vllm_server(Path("log"), port=port)


@pytest.mark.parametrize(("port", "host"), [(0, "192.0.2.1"), (8123, "192.0.2.1"), (0, "no-such-host.invalid")])
def test_a_host_that_is_not_this_machine_is_refused_as_such(port, host, monkeypatch):
    if "invalid" in host:  # as the resolver says it, which is not asked
        monkeypatch.setattr(socket, "socket", UnknownHost)
    words = rf"^--port={port}, host {host}: .+\. The host must be an address of this machine"
    with pytest.raises(EngineError, match=words) as caught:
        EngineServer(
            "toy",
            said(""),
            {},
            Path("log"),
            RolloutConfig(port=port),
            key=KEY,
            explain=str,
            host=host,
            port_key="--port",
        )
    assert "in use" not in str(caught.value)


class UnknownHost(socket.socket):
    def bind(self, address):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


# A server that is started again


def said(text):
    """A server whose every start writes its instance, its key and the cores that it may use into the log."""
    program = f"import os; print({text}, flush=True)"
    return lambda port: [sys.executable, "-c", program]


def wait_for(child):
    child.process.wait(timeout=20)
    return child


def test_a_server_starts_again_at_its_address_and_counts(tmp_path):
    text = f"os.environ[{INSTANCE_VARIABLE!r}], os.environ[{KEY_VARIABLE!r}], sorted(os.sched_getaffinity(0))"
    log = tmp_path / "engine.log"
    cores = RolloutConfig(cores="0")
    server = EngineServer("toy", said(text), {}, log, cores, key=KEY, explain=lambda text: f"explained {text.split()}")
    assert server.instance == 0 and server.child is None
    first, url = wait_for(server.start()), server.url
    second = wait_for(server.start())
    assert (server.instance, server.url, server.child) == (2, url, second) and first is not second
    assert log.read_text().splitlines() == [f"1 {KEY} [0]", f"2 {KEY} [0]"]
    # Only what the last start wrote explains its end.
    assert server.explain_end() == f"explained ['2', '{KEY}', '[0]']\nfull log: {log}"


# Version stamps


@pytest.mark.parametrize(
    ("marks", "versions"),
    [
        ([(3, 0)], [3, 3, 3, 3]),
        ([(3, 0), (4, 2)], [3, 3, 4, 4]),
        ([(3, 0), (4, 0)], [4, 4, 4, 4]),
        ([(3, 0), (4, 4)], [3, 3, 3, 3]),
        ([(3, 0), (4, 9)], [3, 3, 3, 3]),
        ([(3, 0), (4, 1), (5, 3)], [3, 4, 4, 5]),
        ([(3, 0), (4, 1), (5, 1)], [3, 5, 5, 5]),
    ],
)
def test_each_token_has_the_version_that_sampled_it(marks, versions):
    assert stamp_versions([Mark(*mark) for mark in marks], 4, num_resumes=0) == versions


@pytest.mark.parametrize(
    ("num_resumes", "versions"),
    [
        (2, [3, 3]),  # it had ended before the first update, and its answer was on the way
        (3, [4, 4]),  # it waited in the queue during the first and ended before the second
        (4, [5, 5]),
        (7, [5, 5]),
    ],
)
def test_a_request_without_tokens_at_an_update_had_ended_or_not_begun(num_resumes, versions):
    assert stamp_versions([Mark(3, 0), Mark(4, None, 2), Mark(5, None, 3)], 2, num_resumes) == versions


def test_an_update_marks_the_requests_in_flight_by_their_own_names():
    stamps = Stamps()
    for name in ("t1.0~1", "t1-a.1~2", "t2.0~3"):
        stamps.begin(name, 0)
    theirs = {"generate-tokens-t1.0~1-8f3a": 5, "generate-tokens-t1-a.1~2-9b": 2, "generate-tokens-gone~4-1": 1}
    stamps.switch(theirs, 1, num_resumes=6)
    stamps.begin("t3.0~5", 1)
    assert stamps.end("t1.0~1") == [Mark(0, 0), Mark(1, 5, 6)]
    assert stamps.end("t1-a.1~2") == [Mark(0, 0), Mark(1, 2, 6)]
    assert stamps.end("t2.0~3") == [Mark(0, 0), Mark(1, None, 6)]
    assert stamps.end("t3.0~5") == [Mark(1, 0)]


def test_an_engine_that_cannot_tell_leaves_the_older_stamp():
    stamps = Stamps()
    stamps.begin("t1.0~1", 0)
    stamps.switch(None, 1, num_resumes=6)
    assert stamps.end("t1.0~1") == [Mark(0, 0)]


def test_a_request_that_was_preempted_at_an_update_is_stamped_too_old_rather_than_too_new():
    """Absent, it may have sampled tokens; present again at the next update, all before that count as of its issue."""
    stamps = Stamps()
    stamps.begin("t1.0~1", 3)
    stamps.begin("t2.0~2", 3)
    stamps.switch({"generate-tokens-t2.0~2-8f": 1}, 4, num_resumes=6, forgets_preempted=True)
    stamps.switch({"generate-tokens-t1.0~1-9a": 2}, 5, num_resumes=7, forgets_preempted=True)
    assert stamp_versions(stamps.end("t1.0~1"), 4, num_resumes=8) == [3, 3, 5, 5]
    assert stamp_versions(stamps.end("t2.0~2"), 3, num_resumes=8) == [3, 4, 4]


# Logs


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("OSError: [Errno 98] Address already in use", "set rollout.port"),
        ("ValueError: No available memory for the cache blocks", "lower rollout.kv_cache_gib"),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", "out of memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        ("RuntimeError: operator torchvision::nms does not exist", "pip uninstall torchvision"),
        ("ModuleNotFoundError: No module named 'vllm'", "make setup"),
    ],
)
def test_a_known_end_is_explained_in_words(line, advice):
    text = explain_end(f"INFO starting\nTraceback (most recent call last):\n{line}\nINFO bye\n")
    assert "likely reason: " in text and advice in text.splitlines()[0]
    assert f"last error: {line}" in text
    assert text.endswith("  | INFO bye")


def test_an_unknown_end_is_quoted_with_its_last_error():
    lines = [f"line {i}" for i in range(100)] + ["KeyError: 'a'", "engine.SomeError: second", "end"]
    text = explain_end("\n".join(lines), num_lines=3)
    assert "likely reason" not in text and "last error: engine.SomeError: second" in text
    assert "line 99" not in text and "  | KeyError: 'a'" in text


def test_a_server_that_wrote_nothing(tmp_path):
    assert vllm_server(tmp_path / "none").explain_end() == "it wrote no log"
    assert explain_end("") == "it wrote nothing into its log"
