"""Several engines as one: requests go to the least loaded, weights to all; one that is lost is done without until it is back.

It starts no process and opens no connection: those are the members' (`vllm.py`, `lifeline.py`) and the launcher's. What holds
at any time: a request is sent only to an engine that has answered and holds the fleet's version, or the next one where that is
being loaded; so a token is never older than its group's issue. An engine that is away gets the weights that are wanted when it
is found, before it counts as alive.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from fastreason.errors import EngineError
from fastreason.patience import Patience
from fastreason.rollout.connection import ServerLostError
from fastreason.rollout.sampling import together
from fastreason.types import Completion, LoadReport, SamplingParams, WeightUpdate

T = TypeVar("T")
POLL_S = 0.05  # between two looks whether an engine is back, while there is none
MOST_TRIES = 10  # of one request, each on an engine that was lost meanwhile


class Member(Protocol):
    """One engine of a fleet: the part of `VllmEngine` that never waits for a server which is away."""

    name: str
    version: int

    @property
    def is_alive(self) -> bool: ...

    @property
    def trouble(self) -> str | None: ...

    @property
    def is_given_up(self) -> bool: ...

    async def start(self) -> None: ...

    def begin(self) -> None: ...

    def want(self, update: WeightUpdate | None) -> None: ...

    def leave(self, reason: str) -> None: ...

    async def try_load(self, update: WeightUpdate) -> LoadReport: ...

    async def try_sleep(self) -> None: ...

    async def try_wake(self) -> None: ...

    async def try_sample(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, index: int
    ) -> Completion: ...

    async def try_score(self, token_ids: list[int]) -> list[float]: ...

    async def close(self) -> None: ...


@dataclass
class _Load:
    """What an engine has to do: samples in flight now, and those answered since the last batch."""

    engine: Member
    running: int = 0
    answered: int = 0


class Fleet:
    """Implements the Engine protocol over `engines`; waits at most `patience_s` for one of them while all are away.

    `takes_over`: they have had another client; then those that are away already are looked for while the others work.
    """

    def __init__(self, engines: list[Member], patience_s: float, takes_over: bool = False) -> None:
        self.name, self._version = engines[0].name, 0
        self._loads = [_Load(engine) for engine in engines]
        self._patience_s, self._takes_over = patience_s, takes_over
        self._wanted: WeightUpdate | None = None
        self._asleep = False

    @property
    def version(self) -> int:
        """That of the weights which every engine holds that gets requests, until the next one is being loaded."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        if self._wanted is None:
            for engine in self._engines:
                engine.version = version

    @property
    def _engines(self) -> list[Member]:
        return [load.engine for load in self._loads]

    async def start(self) -> None:
        """Return when all engines answer; raises EngineError where one does not, or is not what the run needs."""
        if self._takes_over:
            for engine in self._engines:
                engine.begin()
        else:
            await together(*(engine.start() for engine in self._engines))

    async def generate(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> list[Completion]:
        """All samples of a request on one engine, so that they share its prefix; what a lost engine owed goes to another."""
        done: dict[int, Completion] = {}

        async def ask(load: _Load) -> None:
            missing = [index for index in range(params.n) if index not in done]
            load.running += len(missing)
            try:
                samples = [load.engine.try_sample(request_id, prompt_token_ids, params, index) for index in missing]
                results = await asyncio.gather(*samples, return_exceptions=True)
            finally:
                load.running -= len(missing)
            failures = []
            for index, result in zip(missing, results, strict=True):
                if isinstance(result, BaseException):
                    failures.append(result)
                else:
                    done[index] = result
            load.answered += len(missing) - len(failures)
            # An error of an engine that lives is one; that others were lost with it explains nothing.
            for failure in sorted(failures, key=lambda failure: isinstance(failure, ServerLostError)):
                raise failure

        await self._on_one(ask, f"request {request_id}")
        return [done[index] for index in range(params.n)]

    async def score(self, token_ids: list[int]) -> list[float]:
        return await self._on_one(lambda load: load.engine.try_score(token_ids), "score")

    async def load_weights(self, update: WeightUpdate) -> LoadReport:
        """All engines that live load at once; one that cannot is done without, as long as another can.

        The report is of the slowest: its pause, its load. Raises EngineError where none is left that holds `update`.
        """
        started, self._wanted, self._asleep = time.perf_counter(), update, False
        alive = [engine for engine in self._engines if engine.is_alive]
        for engine in self._engines:
            engine.want(update)
        results = await asyncio.gather(*(self._load(engine, update) for engine in alive), return_exceptions=True)
        reports = [result for result in results if isinstance(result, LoadReport)]
        errors = [result for result in results if isinstance(result, EngineError)]
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, EngineError | ServerLostError):
                raise result
        if errors and len(errors) == len(alive):
            raise errors[0]
        if not reports:
            # Whoever is found first is found with these weights.
            await self._await_one(f"loading version {update.version}")
        self.version = update.version
        total_s = time.perf_counter() - started
        if not reports:
            checksum = update.checksum
            reports = [
                LoadReport(version=update.version, checksum=checksum, num_tensors=0, held_bytes=0, pause_s=total_s)
            ]
        return msgspec.structs.replace(
            max(reports, key=lambda report: report.load_s),
            pause_s=max(report.pause_s for report in reports),
            wake_s=max(report.wake_s for report in reports),
            total_s=total_s,
        )

    async def _load(self, engine: Member, update: WeightUpdate) -> LoadReport:
        try:
            return await engine.try_load(update)
        except EngineError as error:
            # Now, and not when the slowest has loaded: what it holds may be neither version.
            engine.leave(f"it could not load version {update.version}: {error}")
            raise

    async def sleep(self) -> float:
        """As the protocol says, once every engine sleeps: one that is just being started would do so beside the trainer.

        Those that are given up are not waited for; raises EngineError where another is away for too long.
        """
        started, patience = time.perf_counter(), Patience(self._patience_s)
        await self._all("try_sleep")
        while away := [i for i, e in enumerate(self._engines) if not (e.is_alive or e.is_given_up)]:
            patience.look()
            if patience.exhausted:
                raise self._not_back("putting the engines to sleep", "not all engines came back", away)
            await asyncio.sleep(POLL_S)
        return time.perf_counter() - started

    async def wake(self) -> float:
        if not self._asleep:
            return 0.0
        seconds = await self._all("try_wake")
        await self._await_one("waking the engines")
        return seconds

    async def _all(self, method: str) -> float:
        """Have all engines fall asleep or wake, those that are away when they are found; the seconds of the slowest."""
        started, self._asleep = time.perf_counter(), method == "try_sleep"
        calls = [getattr(engine, method)() for engine in self._engines]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, ServerLostError):
                raise result
        return time.perf_counter() - started

    async def adopt(self, update: WeightUpdate | None) -> None:
        self._wanted = update
        for engine in self._engines:
            engine.want(update)
        await self._await_one("taking over the engines")

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def figures(self) -> dict[str, float]:
        """Engines that live, and the samples that each has answered since the last call."""
        figures = {"engine/alive": float(sum(engine.is_alive for engine in self._engines))}
        for index, load in enumerate(self._loads):
            figures[f"engine/requests_{index}"], load.answered = float(load.answered), 0
        return figures

    async def _on_one(self, work: Callable[[_Load], Awaitable[T]], what: str) -> T:
        """Do `work` on the least loaded engine, and again on another for as long as the one that had it is lost."""
        reason = ""
        for _ in range(MOST_TRIES):
            load = await self._await_one(what)
            try:
                return await work(load)
            except ServerLostError as loss:
                reason = str(loss)
        raise EngineError(
            f"{what} was tried {MOST_TRIES} times, and each time the engine was lost; the last time: {reason}"
        )

    async def _await_one(self, what: str) -> _Load:
        """The least loaded engine that may have a request; raises EngineError where all are away for too long."""
        patience = Patience(self._patience_s)
        while True:
            serving = [load for load in self._loads if load.engine.is_alive and load.engine.version >= self._version]
            if serving:
                return min(serving, key=lambda load: load.running)
            patience.look()
            if patience.exhausted:
                raise self._not_back(what, "no engine came back", range(len(self._loads)))
            await asyncio.sleep(POLL_S)

    def _not_back(self, what: str, who: str, away: Iterable[int]) -> EngineError:
        reasons = "; ".join(f"engine {i}: {self._engines[i].trouble}" for i in away)
        return EngineError(f"{what}: {who} within rollout.startup_timeout_s={self._patience_s:g} s. {reasons}")
