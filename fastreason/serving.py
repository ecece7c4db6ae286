"""One engine for a command that only samples: its server is started, watched, started again where it dies, and ended.

A part of the composition root: it chooses the engine that `rollout.engine` names. Training has a launcher and a process for
each part instead (`launch.py`, `supervise.py`); here the command itself is the engine's only client. Weights are never sent.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fastreason.config import Config
from fastreason.cores import require_cores
from fastreason.engines import make_server
from fastreason.errors import EngineError
from fastreason.exchange import ExchangeFolder
from fastreason.launch import sweep_segments
from fastreason.resources import SERVED
from fastreason.rollout.engine import Engine
from fastreason.rollout.server import EngineServer, new_key
from fastreason.session import SEGMENTS

T = TypeVar("T")
TICK_S, LOOK_S = 0.1, 1.0


class Keeper:
    """Keeps one server alive: at most `max_restarts` starts again without a response in between; `folder` is private.

    Before the engine has answered once, its death is final: a start that failed would fail again.
    """

    def __init__(self, server: EngineServer, max_restarts: int, folder: Path, say: Callable[[str], None]) -> None:
        self._server, self._max_restarts, self._folder, self._say = server, max_restarts, folder, say
        self._hung: str | None = None
        self._begun, self._num_without_response = False, 0
        self.num_restarts = 0

    def note_life(self) -> None:
        """The engine has answered, or given a response."""
        self._begun, self._num_without_response = True, 0

    def report_hung(self, reason: str) -> None:
        """Have the server killed and started again."""
        self._hung = reason

    def start(self) -> None:
        self._server.start()

    async def watch(self) -> NoReturn:
        """Start the server again whenever it ends or hangs; raises EngineError where that is not allowed."""
        looked = 0.0
        while True:
            await asyncio.sleep(TICK_S)
            looked += TICK_S
            if looked >= LOOK_S:
                looked = 0.0
                self._note_segments()
            if (reason := self._trouble()) is not None:
                await self._restart(reason)

    def stop(self) -> None:
        if self._server.child is not None:
            self._server.child.stop(grace_s=5.0)

    def _note_segments(self) -> None:
        """Write down the server's shared memory, for whoever cleans up after us if we are killed."""
        assert self._server.child is not None
        self._server.child.note_family()
        (self._folder / SEGMENTS).write_text("\n".join(sorted(map(str, self._server.child.segments))))

    def _trouble(self) -> str | None:
        assert self._server.child is not None
        code = self._server.child.exit_code
        return f"it ended with exit code {code}" if code is not None else self._hung

    async def _restart(self, reason: str) -> None:
        name = self._server.name
        if not self._begun or self._num_without_response >= self._max_restarts:
            again = (
                f", after {self._num_without_response} restart(s) without a response"
                if self._num_without_response
                else ""
            )
            raise EngineError(f"the {name} failed{again}: {reason}; {self._server.explain_end()}")
        self.num_restarts += 1
        self._num_without_response += 1
        self._say(
            f"starting the {name} again ({self._num_without_response} of run.max_restarts={self._max_restarts}): {reason}"
        )
        assert self._server.child is not None
        await asyncio.to_thread(self._server.child.stop, 0.0)
        self._hung = None
        self._server.start()


class Served:
    """An engine that answers, and what keeps it: await work on it through `beside`."""

    def __init__(self, engine: Engine, keeper: Keeper | None) -> None:
        self.engine, self._keeper = engine, keeper

    @property
    def num_restarts(self) -> int:
        return self._keeper.num_restarts if self._keeper is not None else 0

    def note_life(self) -> None:
        """A response came."""
        if self._keeper is not None:
            self._keeper.note_life()

    async def beside(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; raises EngineError as soon as the engine cannot be kept alive."""
        if self._keeper is None:
            return await work
        task, watch = asyncio.ensure_future(work), asyncio.ensure_future(self._keeper.watch())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()  # it ends by raising, and knows better why
            return task.result()
        finally:
            task.cancel()
            watch.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)


@contextlib.asynccontextmanager
async def served_engine(
    config: Config, model_dir: Path, log_path: Path, device: str, say: Callable[[str], None]
) -> AsyncIterator[Served]:
    """The engine of `config.rollout`, answering; nothing of it is left afterwards. `say` hears of deaths and restarts.

    Raises EngineError where it does not start, with the reason from its log.
    """
    if config.rollout.engine not in SERVED:
        from fastreason.rollout.hf import HfEngine

        if config.rollout.cores:
            os.sched_setaffinity(0, require_cores(config.rollout.cores, "rollout.cores"))
        served = Served(HfEngine(str(model_dir), config.model.dtype, device), None)
        await served.engine.start()
        try:
            yield served
        finally:
            await served.engine.close()
        return
    temporary = Path(tempfile.gettempdir())
    sweep_segments(temporary)
    folder = ExchangeFolder(0, parents=(temporary,))
    try:
        key = new_key()
        server = make_server(
            config,
            model_dir,
            log_path,
            device=device,
            exchange_dir=str(folder.path),
            temporary_dir=str(folder.path),
            key=key,
        )
        keeper = Keeper(server, config.run.max_restarts, folder.path, say)
        served = Served(_client(config, server, key, keeper, say), keeper)
        try:
            keeper.start()
            await served.beside(served.engine.start())
            keeper.note_life()
            yield served
        finally:
            await served.engine.close()
            keeper.stop()
    finally:
        folder.remove()


def _client(config: Config, server: EngineServer, key: str, keeper: Keeper, say: Callable[[str], None]) -> Engine:
    from fastreason.rollout.vllm import VllmEngine

    def on_event(event: str, detail: str) -> None:
        if event == "engine_lost":
            say(f"lost the {server.name}: {detail}")

    return VllmEngine(
        server.url,
        key,
        config.rollout,
        hang_timeout_s=config.run.hang_timeout_s,
        on_hung=keeper.report_hung,
        on_event=on_event,
        name=config.rollout.engine,
    )
