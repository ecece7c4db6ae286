"""The ways of the weights: what is refused up front, and the plumbing of those between GPUs with stand-ins for GPU and vLLM."""

import asyncio
import base64
import json
import os
import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastreason.config import Config
from fastreason.errors import ConfigError, EngineError
from fastreason.exchange import SumDigest, digest_file
from fastreason.rollout import vllm_server
from fastreason.rollout.connection import Answer
from fastreason.rollout.transfer import BroadcastTransfer, FileTransfer, HandleTransfer, make_transfer
from fastreason.rollout.vllm_worker import WeightWorker
from fastreason.sync import BroadcastPublisher, HandlePublisher, Publisher, make_publisher
from fastreason.transport import check_transport, exchange_parents, read_manifest
from fastreason.types import WeightUpdate

pytestmark = pytest.mark.timeout(400)


def config(train_gpus=None, **rollout):
    return Config.model_validate(
        {
            "model": {"path": "/m"},
            "data": {},
            "train": {"steps": 1, "prompts_per_step": 1, "gpus": train_gpus},
            "rollout": rollout,
        }
    )


# What is refused


@pytest.mark.parametrize(
    ("keys", "device", "words"),
    [
        ({"transport": "shm", "exchange_dir": "/tmp"}, "cpu", r"rollout.exchange_dir='/tmp': only .*=file uses it"),
        ({"exchange_dir": "/tmp"}, "cpu", r"here it is auto"),
        ({"transport": "file", "exchange_dir": "/no/such"}, "cpu", r"exchange_dir='/no/such': it is no folder"),
        ({"transport": "ipc"}, "cpu", r"transport=ipc: .* the run is on cpu. Use auto, shm or file"),
        ({"transport": "nccl"}, "cpu", r"transport=nccl: .* the run is on cpu"),
        ({"transport": "ipc", "engine": "hf"}, "cuda", r"only rollout.engine=vllm has it, here it is hf"),
        ({"transport": "ipc", "tensor_parallel": 2}, "cuda", r"must share one GPU; .*tensor_parallel=2.* Use nccl"),
        ({"transport": "ipc", "gpus": "1", "train_gpus": "0"}, "cuda", r"must share one GPU; .*gpus='1'.*gpus='0'"),
        ({"transport": "nccl"}, "cuda", r"GPUs of their own; here rollout.gpus=None and train.gpus=None"),
        ({"transport": "nccl", "gpus": "1-2", "train_gpus": "2"}, "cuda", r"without a common one"),
    ],
)
def test_a_way_that_cannot_work_is_refused_with_the_key(keys, device, words):
    with pytest.raises(ConfigError, match=words):
        check_transport(config(**keys), device)


def test_a_vllm_without_weight_transfer_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "vllm" / "__init__.py"))
    )
    with pytest.raises(
        ConfigError, match=r"transport=ipc: the installed vllm has no such weight transfer \(0.28 has\)"
    ):
        check_transport(config(transport="ipc"), "cuda")


def test_a_way_that_can_work_passes(tmp_path):
    for keys, device in (
        ({}, "cpu"),
        ({"transport": "file", "exchange_dir": str(tmp_path)}, "cpu"),
        ({"transport": "file"}, "cuda"),
        ({"transport": "ipc"}, "cuda"),
        ({"transport": "ipc", "gpus": "1", "train_gpus": "1-3"}, "cuda"),
        ({"transport": "nccl", "gpus": "7", "train_gpus": "0-6"}, "cuda"),
    ):
        check_transport(config(**keys), device)


def test_files_go_where_the_way_says(tmp_path):
    assert exchange_parents(config().rollout)[0] == Path("/dev/shm")
    assert exchange_parents(config(transport="file", exchange_dir=str(tmp_path)).rollout) == (tmp_path,)
    (temporary,) = exchange_parents(config(transport="file").rollout)
    assert temporary != Path("/dev/shm") and temporary.is_dir()


def test_the_server_is_told_of_the_way():
    def command(**keys):
        rollout = config(**keys).rollout
        options = {"dtype": "bfloat16", "max_model_len": 9, "seed": 0, "device": "cuda"}
        return vllm_server.server_command(rollout, "/m", 1, **options)

    def environment(**keys):
        return vllm_server.server_environment(config(**keys).rollout, exchange_dir="/e", device="cuda")

    assert "--weight-transfer-config" not in command()
    for transport in ("ipc", "nccl"):
        given = command(transport=transport)
        assert json.loads(given[given.index("--weight-transfer-config") + 1]) == {"backend": transport}
    # Pickled handles are accepted only where they are used.
    assert environment(transport="ipc")["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment(transport="nccl")


def test_each_way_has_its_two_ends():
    cpu, folder = torch.device("cpu"), Path("/e")
    ends = {
        "auto": (Publisher, FileTransfer),
        "shm": (Publisher, FileTransfer),
        "file": (Publisher, FileTransfer),
        "ipc": (HandlePublisher, HandleTransfer),
        "nccl": (BroadcastPublisher, BroadcastTransfer),
    }
    for transport, (publisher, transfer) in ends.items():
        assert type(make_publisher(transport, folder, torch.float32, cpu, lambda port, size: None)) is publisher
        assert type(make_transfer(transport, 1)) is transfer


# The digest of sums


def sums(*named):
    digest = SumDigest()
    for name, tensor in named:
        digest.add(name, tensor)
    return digest.hexdigest()


def test_the_digest_of_sums_sees_every_changed_word():
    tensor = torch.arange(37, dtype=torch.bfloat16)
    whole = sums(("w", tensor))
    for index in range(37):
        changed = tensor.clone()
        changed[index] += 1
        assert sums(("w", changed)) != whole
    assert sums(("w", tensor.flip(0))) != whole, "the same words in another order"
    assert sums(("w", torch.cat([tensor, torch.zeros(1, dtype=torch.bfloat16)]))) != whole
    assert sums(("v", tensor)) != whole
    assert sums(("w", tensor.clone())) == sums(("w", torch.stack([tensor, tensor]).T[:, 0])) == whole


def test_the_digest_of_sums_is_the_same_on_every_machine_and_counts_bytes():
    digest = SumDigest()
    digest.add("w", torch.tensor([1, 2, -3], dtype=torch.int64))
    digest.add("b", torch.ones(3, dtype=torch.uint8))
    assert (digest.num_tensors, digest.num_bytes) == (2, 27)
    # 1 * 1 + 3 * 2 + 5 * -3 = -8, and 0x010101.
    by_hand = SumDigest()
    by_hand.add_bytes("w", "torch.int64", (3,), memoryview((2**64 - 8).to_bytes(8, "little")))
    by_hand.add_bytes("b", "torch.uint8", (3,), memoryview(0x010101.to_bytes(8, "little")))
    assert digest.hexdigest() == by_hand.hexdigest()


# Both ends together, on the CPU: vLLM's part and the GPU's are stand-ins


class Source:
    def __init__(self, rank=0):
        self.rank, self.value, self.passed = rank, 1.0, 0

    def weights(self):
        for name, shape in (("a", (2, 3)), ("b", (4,))):
            self.passed += 1
            yield name, torch.full(shape, self.value, dtype=torch.float64)


class Model:
    def __init__(self):
        self.held = {}

    def load_weights(self, weights):
        for name, tensor in weights:
            self.held[name] = tensor.clone()


class Engine:
    """vLLM's HTTP interface as far as transfers use it; `receive(update_info)` yields what a backend would."""

    def __init__(self, receive):
        self.asked, self._receive, self.inits = [], receive, []
        self.worker, self.model = WeightWorker(), Model()
        requests = {"generate-tokens-t1.0~1-ab": SimpleNamespace(output_token_ids=[1, 2])}
        self.worker.model_runner = SimpleNamespace(requests=requests, get_model=lambda: self.model)

    async def ask(self, path, body=None, limit_s=None):
        self.asked.append(body["method"] if path == "/collective_rpc" else path)
        if path == "/collective_rpc":
            return Answer({"results": [getattr(self.worker, body["method"])(**body["kwargs"])]}, 0)
        if path == "/init_weight_transfer_engine":
            self.inits.append(body["init_info"])
        if path == "/update_weights":
            info = json.loads(json.dumps(body["update_info"]))  # it goes over HTTP
            weights = await asyncio.to_thread(lambda: list(self._receive(info)))
            self.model.load_weights(weights)
        return Answer({}, 0)


LIFE = ["fastreason_watch", "/start_weight_update", "/update_weights", "/finish_weight_update", "fastreason_watched"]


def open_handles(info):
    """As vLLM's ipc engine reads the request, with the tensors themselves in place of handles."""
    handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))
    for name, dtype, shape, handle in zip(info["names"], info["dtype_names"], info["shapes"], handles, strict=True):
        (tensor,) = handle.values()
        assert tensor.dtype == getattr(torch, dtype) and list(tensor.shape) == shape
        yield name, tensor


@pytest.fixture
def gpu(monkeypatch):
    """Handles that are the tensors."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid="gpu-0"))
    monkeypatch.setattr("torch.multiprocessing.reductions.reduce_tensor", lambda tensor: (None, tensor))


def test_handles_reach_the_engine_and_what_it_was_handed_is_proved(tmp_path, gpu):
    publisher, source = HandlePublisher(tmp_path, torch.bfloat16, torch.device("cpu")), Source()
    transfer, engine = HandleTransfer(), Engine(open_handles)
    update = publisher.write(source, 1)
    assert (update.version, update.num_bytes) == (1, 20)

    async def take(update):
        await transfer.prepare(engine, update)
        before = list(engine.asked)
        return before, await transfer.load(engine, update)

    before, reports = asyncio.run(take(update))
    assert before == ["/init_weight_transfer_engine"] and engine.asked[1:] == LIFE
    assert engine.inits == [{"packed": False}]
    assert reports[0]["checksum"] == update.checksum and reports[0]["num_tensors"] == 2
    assert reports[0]["tokens_before"] == {"generate-tokens-t1.0~1-ab": 2}
    assert engine.model.held["a"].dtype == torch.bfloat16 and bool((engine.model.held["b"] == 1).all())
    assert engine.worker.fastreason_beat() == {"checksum": update.checksum}
    assert "load_weights" not in vars(engine.model), "the model is as it was"


def test_a_wrong_byte_on_the_way_shows_in_the_checksum(tmp_path, gpu):
    def spoil(info):
        for name, tensor in open_handles(info):
            if name == "b":
                tensor[3] += 1
            yield name, tensor

    update = HandlePublisher(tmp_path, torch.float32, torch.device("cpu")).write(Source(), 1)
    (report,) = asyncio.run(HandleTransfer().load(Engine(spoil), update))
    assert report["checksum"] != update.checksum


def test_one_copy_is_kept_exported_once_and_joined_once_a_server(tmp_path, gpu):
    publisher, source = HandlePublisher(tmp_path, torch.float32, torch.device("cpu")), Source()
    first = publisher.write(source, 1)
    source.value = 2.0
    second = publisher.write(source, 2)
    assert first.checksum != second.checksum and first.path != second.path
    assert read_manifest(first.path).offer == read_manifest(second.path).offer
    transfer, servers = HandleTransfer(), [Engine(open_handles), Engine(open_handles)]

    async def take():
        for server in (servers[0], servers[0], servers[1]):
            await transfer.prepare(server, second)

    asyncio.run(take())
    assert [len(server.inits) for server in servers] == [1, 1]


def test_other_ranks_take_part_in_the_gathering_and_keep_nothing(tmp_path, gpu):
    for publisher in (
        HandlePublisher(tmp_path, torch.float32, torch.device("cpu")),
        Publisher(tmp_path, torch.float32),
    ):
        source = Source(rank=1)
        assert publisher.write(source, 1) is None and source.passed == 2
    assert list(tmp_path.iterdir()) == []


class Group:
    """A communicator of two: what rank 0 broadcasts, the other receives in order."""

    def __init__(self):
        self._sent, self._changed = [], threading.Condition()

    def broadcast(self, tensor, src):
        assert src == 0
        with self._changed:
            self._sent.append(tensor.clone())
            self._changed.notify_all()

    def receive(self):
        with self._changed:
            assert self._changed.wait_for(lambda: self._sent, timeout=20)
            return self._sent.pop(0)


def test_a_broadcast_is_asked_for_joined_and_proved_also_by_the_next_server(tmp_path):
    groups = {}

    def open_group(port, world_size):
        assert world_size == 3
        groups[port] = Group()
        return groups[port]

    publisher = BroadcastPublisher(tmp_path, torch.float32, torch.device("cpu"), open_group)
    update = publisher.write(Source(), 1)
    transfer = BroadcastTransfer(num_workers=2)

    def receive(info):
        deadline = time.monotonic() + 20
        while port not in groups and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "ipc_handles_pickled" not in info
        return [(name, groups[port].receive()) for name in info["names"]]

    for number in range(2):
        engine = Engine(receive)

        async def take(engine=engine):
            await transfer.prepare(engine, update)
            return engine.inits[0]["master_port"]

        port = asyncio.run(take())
        (init,) = engine.inits
        assert (init["rank_offset"], init["world_size"], init["packed"]) == (1, 3, False)
        for _ in range(2):
            (report,) = asyncio.run(transfer.load(engine, update))
            assert report["checksum"] == update.checksum
        assert len(groups) == number + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights-000001.manifest"]


def test_several_engines_have_a_group_each_and_all_get_one_publication(tmp_path):
    groups = {}

    def open_group(port, world_size):
        groups[port] = Group()
        return groups[port]

    publisher = BroadcastPublisher(tmp_path, torch.float32, torch.device("cpu"), open_group)
    update = publisher.write(Source(), 1)
    ports = {}

    def receive_at(name):
        return lambda info: [(each, groups[ports[name]].receive()) for each in info["names"]]

    async def load(name):
        transfer, engine = BroadcastTransfer(num_workers=1), Engine(receive_at(name))
        await transfer.prepare(engine, update)
        ports[name] = engine.inits[0]["master_port"]
        deadline = time.monotonic() + 20
        while len(groups) < 2 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return [report["checksum"] for report in await transfer.load(engine, update)]

    async def load_all():
        # One after another: the stand-in's wait for its group blocks the loop.
        prepared = [asyncio.create_task(load(name)) for name in "ab"]
        return [await task for task in prepared]

    assert asyncio.run(load_all()) == [[update.checksum]] * 2
    assert len(groups) == 2 and not any(group._sent for group in groups.values()), (
        "a group got more than its engine took"
    )


class Waiting(Engine):
    """One that waits for the trainer at its init."""

    async def ask(self, path, body=None, limit_s=None):
        if path == "/init_weight_transfer_engine":
            await asyncio.sleep(50)
        return await super().ask(path, body, limit_s)


@pytest.mark.parametrize("ends", ["blocks", "fails"])
def test_a_group_that_does_not_come_about_takes_no_other_with_it(tmp_path, ends):
    """As where an engine is killed between its join and its init; what fails is said to its own client."""
    blocked, group = threading.Event(), Group()

    def open_group(port, world_size):
        if world_size == 2:
            return group
        if ends == "fails":
            raise RuntimeError("no route to the engine")
        blocked.wait(30)

    publisher = BroadcastPublisher(tmp_path, torch.float32, torch.device("cpu"), open_group)
    update = publisher.write(Source(), 1)

    async def die():
        joining = BroadcastTransfer(num_workers=8).prepare(Waiting(lambda info: []), update)
        if ends == "fails":
            with pytest.raises(EngineError, match=r"could not send its weights: RuntimeError: no route to the engine"):
                await joining
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(joining, 0.3)

    async def take():
        transfer = BroadcastTransfer(num_workers=1)
        engine = Engine(lambda info: [(name, group.receive()) for name in info["names"]])
        await transfer.prepare(engine, update)
        return await transfer.load(engine, update)

    async def run():
        await die()
        return await asyncio.wait_for(take(), 15)

    try:
        (report,) = asyncio.run(run())
    finally:
        blocked.set()
    assert report["checksum"] == update.checksum
    assert publisher.write(Source(), 2).version == 2


def test_a_trainer_that_hears_no_request_any_more_says_so_at_both_ends(tmp_path):
    """In place of an engine that is waited for until it is taken for a hanging one."""
    publisher = BroadcastPublisher(tmp_path, torch.float32, torch.device("cpu"), lambda port, world_size: Group())
    update, source = publisher.write(Source(), 1), Source()
    (tmp_path / "transfer-0.json").write_text("no request")
    with pytest.raises(EngineError, match=r"could not send its weights: DecodeError: "):
        asyncio.run(BroadcastTransfer(num_workers=1).prepare(Waiting(lambda info: []), update))
    with pytest.raises(EngineError, match=r"cannot send weights any more: DecodeError: "):
        publisher.write(source, 2)
    assert source.passed == 0


def test_a_new_file_is_written_into_the_pages_of_the_oldest(tmp_path):
    """Two files are kept; the third version takes the first one's place, also where it is shorter."""
    publisher, source = Publisher(tmp_path, torch.float32), Source()
    first = publisher.write(source, 1)
    with open(first.path, "ab") as file:
        file.write(b"longer than the next")
    inode = os.stat(first.path).st_ino
    second, third = (publisher.write(source, version) for version in (2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [Path(u.path).name for u in (second, third)]
    assert os.stat(third.path).st_ino == inode
    assert os.stat(third.path).st_size == os.stat(second.path).st_size
    assert digest_file(third.path).hexdigest() == third.checksum == digest_file(second.path).hexdigest()


def test_a_file_update_is_one_call(tmp_path):
    engine = SimpleNamespace(asked=[])

    async def ask(path, body):
        engine.asked.append((path, body))
        return Answer({"results": []}, 0)

    engine.ask = ask
    update = WeightUpdate(path="/e/w", version=1, checksum="c", num_bytes=5)

    async def take():
        await FileTransfer().prepare(engine, update)
        await FileTransfer().load(engine, update)

    asyncio.run(take())
    assert engine.asked == [
        ("/collective_rpc", {"method": "fastreason_load", "kwargs": {"path": "/e/w", "checksum": "c"}})
    ]
