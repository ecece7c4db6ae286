"""Publication of weights: from the updater's parameters to what every engine loads and verifies.

`Publisher` writes an exchange file, `AdapterPublisher` an adapter's folder. The two ways between GPUs, `HandlePublisher` (CUDA
IPC) and `BroadcastPublisher` (NCCL), follow vLLM 0.28's weight transfer and have not run on a GPU yet; their plumbing is tested
with stand-ins.
"""

import base64
import json
import logging
import pickle
import queue
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec
import torch
from torch import Tensor

from fastreason.errors import EngineError
from fastreason.exchange import Digest, SumDigest, write_weights
from fastreason.lora import ADAPTER_FILE
from fastreason.transport import Manifest, TransferRequest, write_failure
from fastreason.types import WeightUpdate

log = logging.getLogger(__name__)

KEPT_FILES = 2  # the one that an engine may be reading, and the newest
LOOK_S = 0.05  # between two looks for a request of an engine's client


class WeightSource(Protocol):
    rank: int

    def weights(self) -> Iterator[tuple[str, Tensor]]: ...


class Publisher:
    """Writes version after version into one folder, in the dtype that the engines hold; old files are removed."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._written: list[Path] = []

    def write(self, source: WeightSource, version: int) -> WeightUpdate | None:
        """Gather (on all ranks) and write (on rank 0), piece by piece; returns the update on rank 0, None elsewhere."""
        tensors = ((name, tensor.to(self._dtype)) for name, tensor in self._take(source))
        if source.rank != 0:
            for _ in tensors:
                pass
            return None
        path = self._place(version)
        over = self._written.pop(0) if len(self._written) == KEPT_FILES else None
        digest = write_weights(path, tensors, over)
        self._written.append(path)
        self._forget(over)
        return WeightUpdate(path=str(path), version=version, checksum=digest.hexdigest(), num_bytes=digest.num_bytes)

    def _take(self, source: Any) -> Iterator[tuple[str, Tensor]]:
        return source.weights()

    def _place(self, version: int) -> Path:
        return self._folder / f"weights-{version:06d}.safetensors"

    def _forget(self, written_over: Path | None) -> None:
        """Remove what else there is of a version whose file is another's now."""


class AdapterPublisher(Publisher):
    """Writes an adapter alone, each version a folder as peft and vLLM read it; `save_settings` puts its other file there."""

    def __init__(self, folder: Path, dtype: torch.dtype, save_settings: Callable[[Path], None]) -> None:
        super().__init__(folder, dtype)
        self._save_settings = save_settings

    def _take(self, source: Any) -> Iterator[tuple[str, Tensor]]:
        return source.adapter()

    def _place(self, version: int) -> Path:
        folder = self._folder / f"adapter-{version:06d}"
        folder.mkdir()
        self._save_settings(folder)
        return folder / ADAPTER_FILE

    def _forget(self, written_over: Path | None) -> None:
        if written_over is not None:
            shutil.rmtree(written_over.parent, ignore_errors=True)


class StagedPublisher(ABC):
    """Keeps one copy of the weights on the trainer's GPU, from which engines take them as often as they are restarted.

    A subclass says in `_offer` what vLLM needs to take it. An engine that is restarted while the next version is being
    written over the last finds a wrong checksum, and its client waits for that next one.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._staged: dict[str, Tensor] = {}
        self._offered: dict[str, Any] | None = None

    def write(self, source: WeightSource, version: int) -> WeightUpdate | None:
        """Gather (on all ranks) into the staged copy (on rank 0); returns the update on rank 0, None elsewhere."""
        digest: Digest = SumDigest()
        for name, tensor in source.weights():
            if source.rank == 0:
                if name not in self._staged:
                    self._staged[name] = torch.empty(tensor.shape, dtype=self._dtype, device=self._device)
                self._staged[name].copy_(tensor)
                digest.add(name, self._staged[name])
        if source.rank != 0:
            return None
        if self._offered is None:
            self._offered = self._offer(self._staged)
        path = self._folder / f"weights-{version:06d}.manifest"
        tensors = self._staged.values()
        Manifest(
            names=list(self._staged),
            dtype_names=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            shapes=[list(tensor.shape) for tensor in tensors],
            offer=self._offered,
        ).write(path)
        return WeightUpdate(path=str(path), version=version, checksum=digest.hexdigest(), num_bytes=digest.num_bytes)

    @abstractmethod
    def _offer(self, staged: dict[str, Tensor]) -> dict[str, Any]: ...


class HandlePublisher(StagedPublisher):
    """CUDA IPC: the engine, on the same GPU, opens the staged copy by its handles."""

    def _offer(self, staged: dict[str, Tensor]) -> dict[str, Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        # Exported once: a second export of the same memory would be counted beside the first for ever.
        handles = [{uuid: reduce_tensor(tensor)[1]} for tensor in staged.values()]
        return {"ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode()}


class BroadcastPublisher(StagedPublisher):
    """NCCL: joins the groups that engines' clients ask for, and sends the staged copy whenever they ask.

    They ask by files in the exchange folder, and find there why they get nothing. Each group has a thread of its own: one whose
    engine has died blocks until its time is over, and ends alone. `open_group(port, world_size)` is vLLM's trainer side of the
    rendezvous.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, open_group: Callable[[int, int], Any]
    ) -> None:
        super().__init__(folder, dtype, device)
        self._open_group = open_group
        self._asked: dict[str, queue.SimpleQueue[TransferRequest]] = {}
        self._failure: str | None = None

    def write(self, source: WeightSource, version: int) -> WeightUpdate | None:
        """As every publisher's; raises EngineError where nobody hears the engines' clients any more."""
        if self._failure is not None:
            raise EngineError(f"rollout.transport=nccl: the trainer cannot send weights any more: {self._failure}")
        return super().write(source, version)

    def _offer(self, staged: dict[str, Tensor]) -> dict[str, Any]:
        self._start("weight broadcast", self._hear)
        return {}

    def _start(self, name: str, work: Callable[[], NoReturn], group: str | None = None) -> None:
        """Do `work` in a thread; what ends it is told to the clients, to those of one `group` or to all."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                log.exception("the %s failed", name)
                reason = f"{type(error).__name__}: {error}"
                if group is None:
                    self._failure = reason
                write_failure(self._folder, reason, group)

        threading.Thread(target=run, name=name, daemon=True).start()

    def _hear(self) -> NoReturn:
        while True:
            for file in sorted(self._folder.glob("transfer-*.json")):
                request = msgspec.json.decode(file.read_bytes(), type=TransferRequest)
                file.unlink()
                if request.what == "join":
                    self._asked[request.group] = queue.SimpleQueue()
                    self._start(f"weight broadcast to {request.group}", partial(self._serve, request), request.group)
                else:
                    assert request.group in self._asked, "an engine asked for weights before it had joined"
                    self._asked[request.group].put(request)
            time.sleep(LOOK_S)

    def _serve(self, join: TransferRequest) -> NoReturn:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        group, asked = self._open_group(join.port, join.world_size), self._asked[join.group]
        while True:
            asked.get()
            for tensor in self._staged.values():
                group.broadcast(tensor, src=0)


def make_publisher(
    transport: str,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    open_group: Callable[[int, int], Any] | None = None,
) -> "Publisher | StagedPublisher":
    """The publisher of `rollout.transport`; `open_group` is needed for nccl."""
    if transport == "ipc":
        return HandlePublisher(folder, dtype, device)
    if transport == "nccl":
        assert open_group is not None
        return BroadcastPublisher(folder, dtype, device, open_group)
    return Publisher(folder, dtype)


def save_model(
    source: WeightSource, model_dir: Path, target: Path, dtype: torch.dtype, end_token_id: int | None = None
) -> None:
    """Write a normal Hugging Face folder: the trained weights, and every other file of the model it started from.

    end_token_id: what the model was trained to end a response with, where it may have ended with another before; engines
    are told to stop there too. Called on all ranks; written aside and renamed on rank 0.
    """
    from huggingface_hub import save_torch_state_dict

    # Cloned: the weights of a ZeRO engine are views of one flat buffer, which safetensors would refuse to cut.
    tensors = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in source.weights()}
    if source.rank != 0:
        return
    aside = target.with_name(target.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for file in sorted(model_dir.iterdir()):
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model", ".py") and "index" not in file.name:
            shutil.copy(file, aside / file.name)
    if end_token_id is not None:
        add_end(aside, end_token_id)
    save_torch_state_dict(tensors, str(aside), metadata={"format": "pt"})
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def add_end(model_dir: Path, end_token_id: int) -> None:
    """Add an id to those at which generation ends.

    In generation_config.json, which is made where there is none: vLLM (under any --generation-config) and transformers read
    the ends there first, and some architectures refuse a list in config.json.
    """
    generation = model_dir / "generation_config.json"
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    inherited = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    found = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else inherited
    ends = found.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end_token_id in ends and generation.is_file():
        return
    found["eos_token_id"] = list(dict.fromkeys([*ends, end_token_id]))
    generation.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
