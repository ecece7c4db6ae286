"""vLLM's adapter without vLLM: what the server is told, who may talk to it, which file it loads, what its log means."""

import asyncio
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastreason.config import RolloutConfig
from fastreason.errors import EngineError
from fastreason.exchange import write_weights
from fastreason.rollout.vllm import (
    VllmEngine,
    VllmServer,
    explain_log,
    hold_port,
    new_key,
    port_is_free,
    server_command,
    server_environment,
    stamp_versions,
)
from fastreason.rollout.vllm_middleware import KEY_VARIABLE, RequireKey
from fastreason.rollout.vllm_worker import EXCHANGE_VARIABLE, WeightWorker

KEY = "s3cret"


def options(device, config=None, max_model_len=128):
    command = server_command(
        config or RolloutConfig(), "/m", 1234, dtype="bfloat16", max_model_len=max_model_len, seed=5, device=device
    )
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


def test_the_key_goes_through_the_environment_only(tmp_path):
    server = VllmServer(
        RolloutConfig(),
        "/m",
        tmp_path / "log",
        dtype="bfloat16",
        max_model_len=9,
        seed=0,
        device="cpu",
        exchange_dir="/dev/shm/e",
        key=KEY,
    )
    assert not any(KEY in part for part in server._command)
    assert server._environment[KEY_VARIABLE] == KEY and server._environment[EXCHANGE_VARIABLE] == "/dev/shm/e"
    assert KEY not in server.url


def test_keys_are_long_and_never_the_same():
    keys = {new_key() for _ in range(50)}
    assert len(keys) == 50 and all(len(key) >= 40 for key in keys)


def test_the_environment_of_each_device():
    config = RolloutConfig(cores="2-3", kv_cache_gib=1.2)
    cpu = server_environment(config, key=KEY, exchange_dir="/e", device="cpu")
    assert cpu["VLLM_CPU_OMP_THREADS_BIND"] == "2-3" and cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert cpu["VLLM_CPU_KVCACHE_SPACE"] == "2", "vLLM takes whole GiB: rounded up"
    cuda = server_environment(config, key=KEY, exchange_dir="/e", device="cuda")
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
        assert not port_is_free(port)
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            server.accept()[0].close()
    hold.close()
    assert port_is_free(port)


def test_a_port_in_use_is_refused_with_the_key():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=rf"rollout\.port={port}: the port is in use.*0 for any free one"):
            VllmServer(
                RolloutConfig(port=port),
                "/m",
                Path("log"),
                dtype="bfloat16",
                max_model_len=9,
                seed=0,
                device="cpu",
                exchange_dir="/e",
                key=KEY,
            )


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
    assert stamp_versions(marks, 4) == versions


def test_an_update_marks_the_requests_in_flight_by_their_own_names():
    engine = VllmEngine("http://127.0.0.1:1", KEY, RolloutConfig())
    engine._marks = {"t1.0": [(0, 0)], "t1-a.1": [(0, 0)], "t2.0": [(0, 0)]}
    engine._mark_running(
        {"generate-tokens-t1.0-8f3a": 5, "generate-tokens-t1-a.1-9b": 2, "generate-tokens-gone-1": 1}, 1
    )
    assert engine._marks == {"t1.0": [(0, 0), (1, 5)], "t1-a.1": [(0, 0), (1, 2)], "t2.0": [(0, 0)]}


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
def test_a_known_end_is_explained_in_words(tmp_path, line, advice):
    log = tmp_path / "engine.log"
    log.write_text(f"INFO starting\nTraceback (most recent call last):\n{line}\nINFO bye\n")
    text = explain_log(log)
    assert "likely reason: " in text and advice in text.splitlines()[0]
    assert f"last error: {line}" in text
    assert "  | INFO bye" in text and text.endswith(f"full log: {log}")


def test_an_unknown_end_is_quoted_with_its_last_error(tmp_path):
    log = tmp_path / "engine.log"
    log.write_text("\n".join([f"line {i}" for i in range(100)] + ["KeyError: 'a'", "engine.SomeError: second", "end"]))
    text = explain_log(log, num_lines=3)
    assert "likely reason" not in text and "last error: engine.SomeError: second" in text
    assert "line 99" not in text and "  | KeyError: 'a'" in text


def test_a_server_that_wrote_nothing(tmp_path):
    assert explain_log(tmp_path / "none") == "it wrote no log"


# The middleware


def ask(scope):
    """What is sent back for a request, and whether the application behind was reached."""
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    asyncio.run(RequireKey(app)(scope, receive, send))
    return reached, sent


def request(path, *headers, kind="http"):
    return {"type": kind, "path": path, "headers": list(headers)}


PATHS = [
    "/v1/completions",
    "/collective_rpc",
    "/pause",
    "/resume",
    "/health",
    "/metrics",
    "/inference/v1/generate",
    "/",
]
WRONG = [
    [],
    [(b"authorization", b"Bearer wrong")],
    [(b"authorization", b"")],
    [(b"authorization", KEY.encode())],
    [(b"authorization", b"Bearer " + KEY.encode() + b"x")],
    [(b"authorization", b"Bearer " + KEY[:-1].encode())],
    [(b"x-api-key", b"Bearer " + KEY.encode())],
    [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer " + KEY.encode())],
]


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.mark.parametrize("headers", WRONG)
@pytest.mark.parametrize("path", PATHS)
def test_without_the_key_every_path_answers_401(key, path, headers):
    reached, sent = ask(request(path, *headers))
    assert reached == []
    assert sent[0]["type"] == "http.response.start" and sent[0]["status"] == 401
    assert KEY.encode() not in sent[1]["body"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [b"authorization", b"Authorization"])
def test_with_the_key_every_path_is_reached(key, path, name):
    assert ask(request(path, (name, b"Bearer " + KEY.encode()))) == ([path], [])


def test_a_websocket_without_the_key_is_closed(key):
    reached, sent = ask(request("/v1/realtime", kind="websocket"))
    assert (reached, sent) == ([], [{"type": "websocket.close", "code": 1008}])
    header = (b"authorization", b"Bearer " + KEY.encode())
    assert ask(request("/v1/realtime", header, kind="websocket"))[0] == ["/v1/realtime"]


def test_starting_up_needs_no_key(key):
    assert ask({"type": "lifespan", "path": ""})[0] == [""]


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_key_the_server_does_not_start(monkeypatch, value):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(RuntimeError, match=f"{KEY_VARIABLE} is not set"):
        RequireKey(lambda *_: None)


# Loading weights


class PackedHead:
    """A tied head on a CPU: multiplies by a copy packed at start-up, which only its quant_method makes anew."""

    def __init__(self):
        self.weight = torch.ones(2, 2)
        self.cpu_linear = object()
        self.num_packed = 0
        self.quant_method = SimpleNamespace(process_weights_after_loading=self.pack)

    def pack(self, module):
        assert module is self
        self.num_packed += 1


class Runner:
    """vLLM's model runner as far as it is used: it fuses q and k on loading; `spoil` changes what arrived."""

    def __init__(self, spoil=False):
        self.requests = {"generate-tokens-t1.0-ab": SimpleNamespace(output_token_ids=[1, 2, 3])}
        self._held, self._spoil = {}, spoil
        self.head = PackedHead()

    def reload_weights(self, weights_iterator):
        named = dict(weights_iterator)
        self._held = {"qk.weight": torch.cat([named["q.weight"], named["k.weight"]]), "norm": named["norm"].clone()}
        if self._spoil:
            self._held["qk.weight"][0] += 1

    def get_model(self):
        return SimpleNamespace(
            packed_modules_mapping={"qk": ["q", "k"]},
            named_parameters=lambda: iter(self._held.items()),
            modules=lambda: [self.head],
        )


@pytest.fixture
def exchange(tmp_path, monkeypatch):
    folder = tmp_path / "exchange"
    folder.mkdir()
    monkeypatch.setenv(EXCHANGE_VARIABLE, str(folder))
    return folder


def worker(**keys):
    made = WeightWorker()
    made.model_runner = Runner(**keys)
    return made


def publish(path):
    named = {"q.weight": torch.ones(2, 2), "k.weight": torch.zeros(1, 2), "norm": torch.arange(2.0)}
    return write_weights(path, named).hexdigest()


def test_weights_are_loaded_proved_and_reported(exchange):
    path = exchange / "w.safetensors"
    checksum = publish(path)
    report = worker().fastreason_load(str(path), checksum)
    assert report.pop("load_s") >= 0
    assert report == {
        "checksum": checksum,
        "num_tensors": 3,
        "held_bytes": 8 * 4,
        "tokens_before": {"generate-tokens-t1.0-ab": 3},
    }


def test_a_packed_tied_head_is_packed_again(exchange):
    path = exchange / "w.safetensors"
    loading = worker()
    loading.fastreason_load(str(path), publish(path))
    assert loading.model_runner.head.num_packed == 1


def test_a_file_outside_the_exchange_folder_is_refused(exchange, tmp_path, monkeypatch):
    outside = tmp_path / "w.safetensors"
    checksum = publish(outside)
    (exchange / "link.safetensors").symlink_to(outside)
    near = Path(f"{exchange}-other")
    near.mkdir()
    publish(near / "w.safetensors")
    for path in (outside, exchange / ".." / "w.safetensors", exchange / "link.safetensors", near / "w.safetensors"):
        with pytest.raises(ValueError, match="outside the exchange folder"):
            worker().fastreason_load(str(path), checksum)
    monkeypatch.delenv(EXCHANGE_VARIABLE)
    inside = exchange / "w.safetensors"
    checksum = publish(inside)
    with pytest.raises(ValueError, match="outside the exchange folder"):
        worker().fastreason_load(str(inside), checksum)


def test_a_file_that_changed_is_refused_before_it_is_loaded(exchange):
    path = exchange / "w.safetensors"
    checksum = publish(path)
    made = worker()
    with pytest.raises(ValueError, match=f"checksum of .* is {checksum}, sent was {'0' * 32}: the file changed"):
        made.fastreason_load(str(path), "0" * 32)
    assert made.model_runner._held == {}


def test_weights_that_did_not_arrive_as_sent_are_an_error(exchange):
    path = exchange / "w.safetensors"
    checksum = publish(path)
    with pytest.raises(ValueError, match=r"holds other values than were sent in: \['qk.weight'\]"):
        worker(spoil=True).fastreason_load(str(path), checksum)
