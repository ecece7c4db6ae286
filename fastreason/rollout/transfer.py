"""How a paused engine is made to take an update: from an exchange file by our worker extension, or by vLLM's own transfer.

Each way has what may be done while generation goes on (`prepare`) and what may not (`load`), and proves by a checksum of
what the model was handed that it is what was sent. The ways between GPUs follow vLLM 0.28's HTTP interface
(/init_weight_transfer_engine, /start_weight_update, /update_weights, /finish_weight_update) and have not run on a GPU yet.
"""

import asyncio
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

import msgspec

from fastreason.errors import EngineError
from fastreason.processes import free_port
from fastreason.rollout.connection import Connection
from fastreason.rollout.server import LOOPBACK
from fastreason.transport import TransferRequest, read_failure, read_manifest
from fastreason.types import WeightUpdate

READ_AHEAD_BYTES = 1 << 30  # from here on reading takes longer than the decoding step for which asking for it waits
READ_SPEED = 2e9  # bytes/s, from shared memory
LOOK_S = 0.1  # between two looks whether the trainer has failed

Reports = list[dict[str, Any]]


class Transfer(Protocol):
    async def prepare(self, connection: Connection, update: WeightUpdate) -> None:
        """What can be done before the pause."""

    async def load(self, connection: Connection, update: WeightUpdate) -> Reports:
        """Hand the weights to the paused engine; a report of each worker, as `WeightWorker.fastreason_load` makes it."""
        ...


async def call_workers(connection: Connection, method: str, **arguments: Any) -> Reports:
    """What each worker of the engine answers to one of `WeightWorker`'s methods."""
    answer = await connection.ask("/collective_rpc", {"method": method, "kwargs": arguments})
    return answer.body["results"]


class FileTransfer:
    """A safetensors file in the exchange folder."""

    async def prepare(self, connection: Connection, update: WeightUpdate) -> None:
        if update.num_bytes >= READ_AHEAD_BYTES:
            await call_workers(connection, "fastreason_prepare", path=update.path, checksum=update.checksum)
            await asyncio.sleep(update.num_bytes / READ_SPEED)

    async def load(self, connection: Connection, update: WeightUpdate) -> Reports:
        return await call_workers(connection, "fastreason_load", path=update.path, checksum=update.checksum)


class HandleTransfer:
    """CUDA IPC: the update request carries the handles of the trainer's copy."""

    def __init__(self) -> None:
        self._joined: Connection | None = None

    async def prepare(self, connection: Connection, update: WeightUpdate) -> None:
        if self._joined is not connection:
            await self._join(connection, update)
            self._joined = connection

    async def _join(self, connection: Connection, update: WeightUpdate) -> None:
        await self._ask(connection, update, "/init_weight_transfer_engine", {"init_info": {"packed": False}})

    async def load(self, connection: Connection, update: WeightUpdate) -> Reports:
        manifest = read_manifest(update.path)
        described = {"names": manifest.names, "dtype_names": manifest.dtype_names, "shapes": manifest.shapes}
        await call_workers(connection, "fastreason_watch")
        await connection.ask("/start_weight_update")
        await self._begin(update)
        await self._ask(connection, update, "/update_weights", {"update_info": {**described, **manifest.offer}})
        await connection.ask("/finish_weight_update")
        return await call_workers(connection, "fastreason_watched")

    async def _begin(self, update: WeightUpdate) -> None:
        """Have the trainer do its part."""

    async def _ask(self, connection: Connection, update: WeightUpdate, path: str, body: dict[str, Any]) -> None:
        """Ask the engine for something that the trainer has a part in."""
        await connection.ask(path, body)


class BroadcastTransfer(HandleTransfer):
    """NCCL: trainer and workers form a group once per server; then the trainer broadcasts when it is asked to.

    Every start of every engine's server has a group of its own.
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self._world_size, self._group = 1 + num_workers, ""

    async def _join(self, connection: Connection, update: WeightUpdate) -> None:
        port, self._group = free_port(LOOPBACK), secrets.token_hex(8)
        self._request(update, TransferRequest(what="join", group=self._group, port=port, world_size=self._world_size))
        init_info = {
            "master_address": LOOPBACK,
            "master_port": port,
            "rank_offset": 1,
            "world_size": self._world_size,
            "packed": False,
        }
        await self._ask(connection, update, "/init_weight_transfer_engine", {"init_info": init_info})

    async def _begin(self, update: WeightUpdate) -> None:
        self._request(update, TransferRequest(what="send", group=self._group))

    async def _ask(self, connection: Connection, update: WeightUpdate, path: str, body: dict[str, Any]) -> None:
        """Raises EngineError as soon as the trainer says that it failed: the engine would wait for it in vain."""
        asked = asyncio.ensure_future(connection.ask(path, body))
        try:
            while not asked.done():
                if (reason := read_failure(Path(update.path).parent, self._group)) is not None:
                    raise EngineError(f"rollout.transport=nccl: the trainer could not send its weights: {reason}")
                await asyncio.wait({asked}, timeout=LOOK_S)
            await asked
        finally:
            asked.cancel()

    def _request(self, update: WeightUpdate, request: TransferRequest) -> None:
        """Leave a request for the trainer beside the update; whole at once."""
        path = Path(update.path).parent / f"transfer-{time.time_ns()}.json"
        aside = path.with_suffix(".writing")
        aside.write_bytes(msgspec.json.encode(request))
        aside.rename(path)


def make_transfer(transport: str, num_workers: int) -> Transfer:
    """The engine's side of `rollout.transport`; `num_workers` take the weights."""
    if transport == "ipc":
        return HandleTransfer()
    return BroadcastTransfer(num_workers) if transport == "nccl" else FileTransfer()
