"""vLLM behind the Engine protocol: the client of an API server.

Beside the other files of this name, which start the server, run in it or say what it is asked, the only file that knows vLLM.
The client survives its server: a request that meets a dead or replaced one is sent again, with the same seed, after the
next server holds the weights that were wanted last. `/inference/v1/generate` with n > 1 returns only the last finished
choice (vLLM 0.28), so every sample is a request of its own, and finished ones are kept.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import msgspec

from fastreason.config import RolloutConfig
from fastreason.errors import EngineError
from fastreason.patience import Patience
from fastreason.rollout.connection import Connection, ServerLostError
from fastreason.rollout.engine import sample_seed
from fastreason.rollout.lifeline import Lifeline
from fastreason.rollout.stamps import Stamps, stamp_versions
from fastreason.rollout.transfer import call_workers, make_transfer
from fastreason.rollout.vllm_requests import GENERATE, SCORING, body_of, read_sample, read_scores, sampling_of
from fastreason.types import Completion, LoadReport, SamplingParams, WeightUpdate

# In flight: requests keep what they have, and their KV cache. At a boundary: those that run end first, later ones wait.
PAUSE = {"in_flight": "/pause?mode=keep&clear_cache=false", "boundary": "/pause?mode=wait&clear_cache=true"}
# Level 2 gives the weights up too, where level 1 copies them to the host and back: whenever it wakes it is handed others, or
# (before the first version) reads its own files again.
SLEEP, WAKE = "/sleep?level=2&mode=wait", "/wake_up?tags="
LOOK_S = 0.05  # between two looks for the next update
SLOWEST_LOAD = 100e6  # bytes/s, from shared storage: for so long an engine may be silent beyond its other limits


class OtherWeightsError(EngineError):
    """What an engine was handed is not the version that was asked for."""


class VllmEngine:
    """The client of one server's address; stamps every token with the version of the weights that sampled it.

    `on_hung` has a server that shows no sign of life for `hang_timeout_s` seconds killed and restarted; `on_event` hears of
    losses and recoveries; `takes_over` where the server is another client's, `spare` where it is one of several, `log` where to
    read about it (see Lifeline). `name` is the engine's: vllm, or fake where the fake engine's server answers. `verify` raises
    EngineError where a server is not one that this run can use; every server is shown to it first. `resting` is given where the
    engine sleeps at times, and says whether another has its GPU, so that none is started; `given_up` whether none ever will be.
    `adapter` names the one that requests are for, where weights arrive as such.
    """

    def __init__(
        self,
        url: str,
        key: str,
        config: RolloutConfig,
        *,
        hang_timeout_s: float = 60.0,
        on_hung: Callable[[str], None] | None = None,
        on_event: Callable[[str, str], None] | None = None,
        takes_over: bool = False,
        spare: bool = False,
        log: str = "see logs/engine.log in the run's folder",
        key_hint: str = "",
        name: str = "vllm",
        verify: Callable[[Connection], Awaitable[None]] | None = None,
        resting: Callable[[], bool] | None = None,
        given_up: Callable[[], bool] = lambda: False,
        adapter: str | None = None,
    ) -> None:
        self.name, self.version, self.url = name, 0, url.rstrip("/")
        self._spare, self._verify, self._told = spare, verify, asyncio.Event()
        self._told.set()
        self._config, self._stamps, self._given_up = config, Stamps(), given_up
        self._adapter = adapter
        self._transfer = make_transfer(config.transport, config.tensor_parallel)
        self._num_sent = 0
        self._wanted: WeightUpdate | None = None  # what the engine is to hold: None for the model that it started with
        self._loaded: tuple[Connection, WeightUpdate, LoadReport] | None = None
        # At times; and now, whatever the server may do at the moment.
        self._sleeps, self._asleep = resting is not None, False
        self._lifeline = Lifeline(
            lambda: Connection(name, self.url, key, config.request_timeout_s),
            self._revive,
            startup_timeout_s=config.startup_timeout_s,
            hang_timeout_s=hang_timeout_s,
            on_hung=on_hung,
            on_event=on_event,
            takes_over=takes_over,
            resting=resting or (lambda: False),
            spare=spare,
            log=log,
            key_hint=key_hint,
        )

    async def start(self) -> None:
        await self._lifeline.start()
        if self._verify is not None:
            # Another run may have left its weights there, or a pause.
            await self._lifeline.call(self._revive, "taking over an engine elsewhere")

    async def generate(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> list[Completion]:
        requests = [
            self._lifeline.call(
                partial(self._generate_one, request_id, prompt_token_ids, params, index),
                f"request {request_id}.{index}",
            )
            for index in range(params.n)
        ]
        return list(await asyncio.gather(*requests))

    async def _generate_one(
        self, request: str, prompt_token_ids: list[int], params: SamplingParams, index: int, connection: Connection
    ) -> Completion:
        request_id = f"{request}.{index}"
        assert not self._asleep, f"asked for {request_id} while the engine sleeps"
        sampling = sampling_of(params, sample_seed(params.seed, index))
        # A server may still be dropping this request from the last time: a name is used once.
        self._num_sent += 1
        name = f"{request_id}~{self._num_sent}"
        body = {"request_id": name, **body_of(prompt_token_ids, sampling, self.version, self._adapter)}
        self._stamps.begin(name, self.version)
        try:
            answer, num_resumes = await connection.ask(GENERATE, body)
        finally:
            marks = self._stamps.end(name)
        token_ids, logp, finish_reason = read_sample(answer, connection.server, request_id)
        return Completion(
            token_ids=token_ids,
            logp=logp,
            finish_reason=finish_reason,
            token_versions=stamp_versions(marks, len(token_ids), num_resumes),
        )

    async def score(self, token_ids: list[int]) -> list[float]:
        return await self._lifeline.call(partial(self._score, token_ids), "score")

    async def _score(self, token_ids: list[int], connection: Connection) -> list[float]:
        answer = await connection.ask(GENERATE, body_of(token_ids, SCORING, self.version, self._adapter))
        return read_scores(answer.body, token_ids)

    async def sleep(self) -> float:
        """As the protocol says; when the server dies, its successor falls asleep too."""
        started, self._asleep = time.perf_counter(), True
        await self._lifeline.call(self._lull, "putting the engine to sleep")
        return time.perf_counter() - started

    async def _lull(self, connection: Connection) -> None:
        self._loaded = None
        await call_workers(connection, "fastreason_give_up")
        await connection.ask(SLEEP)

    async def wake(self) -> float:
        if not self._asleep:
            return 0.0
        started, self._asleep = time.perf_counter(), False
        await self._lifeline.call(lambda connection: self._bring(connection, self._wanted), "waking the engine")
        return time.perf_counter() - started

    @contextlib.asynccontextmanager
    async def _woken(self, connection: Connection) -> AsyncIterator[Callable[[], float]]:
        """Where it sleeps at times: weights have memory inside, the KV cache from the end on; says the seconds of both.

        The weights come into an engine that is as small as it can be. One that is awake does nothing when told to wake.
        """
        seconds = 0.0

        async def wake(part: str) -> None:
            nonlocal seconds
            if self._sleeps:
                started = time.perf_counter()
                await connection.ask(WAKE + part)
                seconds += time.perf_counter() - started

        await wake("weights")
        yield lambda: seconds
        await wake("kv_cache")

    async def _resume(self, connection: Connection) -> None:
        if not self._sleeps:  # else its waking does that, once there is a KV cache
            await connection.ask("/resume")

    async def load_weights(self, update: WeightUpdate) -> LoadReport:
        """As the protocol says; when the server dies meanwhile, its successor starts with `update`.

        `pause_s` is the time from the answer to the pause until the answer to the resume; all of it, when the server died.
        """
        started, num_losses = time.perf_counter(), self._lifeline.num_losses
        former, self._wanted, self._asleep = self._wanted, update, False
        try:
            report = await self._lifeline.call(partial(self._load_wanted, update), f"loading version {update.version}")
        except EngineError:
            self._wanted = former
            raise
        total_s = time.perf_counter() - started
        pause_s = report.pause_s if self._lifeline.num_losses == num_losses else total_s
        return msgspec.structs.replace(report, pause_s=pause_s, total_s=total_s)

    async def _load_wanted(self, update: WeightUpdate, connection: Connection) -> LoadReport:
        if self._loaded is not None and self._loaded[:2] == (connection, update):
            return self._loaded[2]  # a recovery was faster
        async with self._woken(connection) as wake_s:
            report = await self._load(connection, update)
        return msgspec.structs.replace(report, wake_s=wake_s())

    async def adopt(self, update: WeightUpdate | None) -> None:
        """Take over a live engine from another client: have it hold `update` (None: what it started with), awake, and go on."""
        self._wanted = update
        await self._lifeline.call(lambda connection: self._bring(connection, update), "taking over the engine")

    async def _revive(self, connection: Connection) -> None:
        """Make a server hold what is wanted, whatever it holds, and run, whether it was paused or not.

        A transport with one copy of the weights cannot give an older version any more once the trainer writes the next one
        over it: then the server waits for that, which is about to be wanted.
        """
        if self._verify is not None:
            await self._verify(connection)
        await self._told.wait()
        while True:
            wanted, asleep = self._wanted, self._asleep
            try:
                await self._bring(connection, wanted)
            except OtherWeightsError:
                if not await self._is_superseded(connection, wanted):
                    raise
            if self._wanted is wanted and self._asleep == asleep:
                return

    async def _bring(self, connection: Connection, wanted: WeightUpdate | None) -> None:
        if self._asleep:
            return await self._lull(connection)
        held = {state["checksum"] for state in await call_workers(connection, "fastreason_beat")}
        async with self._woken(connection):
            if wanted is None and held != {None}:
                await self._restore(connection)
            elif wanted is not None and held != {wanted.checksum}:
                await self._load(connection, wanted)
            else:
                await self._resume(connection)
        if wanted is not None:
            self.version = wanted.version

    async def _is_superseded(self, connection: Connection, wanted: WeightUpdate | None) -> bool:
        """Wait for another update than `wanted`, for no longer than a server may take to start."""
        patience = Patience(self._config.startup_timeout_s)
        while self._wanted is wanted and not patience.exhausted:
            if connection.lost is not None:
                raise ServerLostError(connection.lost)
            await asyncio.sleep(LOOK_S)
            patience.look()
        return self._wanted is not wanted

    async def _restore(self, connection: Connection) -> None:
        await connection.ask("/pause?mode=keep&clear_cache=true")
        try:
            await call_workers(connection, "fastreason_restore")
        finally:
            await self._resume(connection)

    async def _load(self, connection: Connection, update: WeightUpdate) -> LoadReport:
        """Pause, load, verify, resume, and stamp what is in flight from there on.

        One of several that fails is not resumed: it may hold half of either version, and is left and revived.
        """
        resumes = True
        connection.allowance_s = update.num_bytes / SLOWEST_LOAD
        try:
            await self._transfer.prepare(connection, update)
            try:
                _, num_resumes = await connection.ask(PAUSE[self._config.update_mode])
                paused = time.perf_counter()
                reports = await self._transfer.load(connection, update)
                if not reports or any(report["checksum"] != update.checksum for report in reports):
                    raise OtherWeightsError(
                        f"version {update.version}: the engine holds other weights than were sent: {reports}"
                    )
                first = reports[0]
                forgets = first.get("forgets_preempted", False)
                self._stamps.switch(first["tokens_before"], update.version, num_resumes, forgets)
                self.version = update.version
            except EngineError:
                resumes = not self._spare
                raise
            finally:
                # Also when we were told to stop before the pause was answered: it may have been heard.
                if resumes:
                    await self._resume(connection)
        finally:
            connection.allowance_s = 0.0
        report = LoadReport(
            version=update.version,
            checksum=reports[0]["checksum"],
            num_tensors=reports[0]["num_tensors"],
            held_bytes=reports[0]["held_bytes"],
            pause_s=time.perf_counter() - paused,
            load_s=max(report["load_s"] for report in reports),
        )
        self._loaded = (connection, update, report)
        return report

    async def close(self) -> None:
        await self._lifeline.close()

    def figures(self) -> dict[str, float]:
        return {}

    # What a fleet asks of one of its engines: nothing here waits for a server that is away.

    @property
    def is_alive(self) -> bool:
        """Whether the server answers, and holds what was wanted when it was found."""
        return self._lifeline.is_alive

    @property
    def trouble(self) -> str | None:
        """Why it is away, or None."""
        return self._lifeline.trouble

    @property
    def is_given_up(self) -> bool:
        """Whether its server is gone for good."""
        return self._given_up()

    def begin(self) -> None:
        """In place of `start`, for a server that has had another client: look for it until it is found."""
        self._told.clear()
        self._lifeline.begin()

    def want(self, update: WeightUpdate | None) -> None:
        """What a server that is found from now on is to hold; one that is alive is given it by `try_load`."""
        self._wanted, self._asleep = update, False
        self._told.set()

    async def try_sleep(self) -> None:
        """As `sleep`; raises ServerLostError where the server is away, or lost: the next one falls asleep when it is found."""
        self._asleep = True
        await self._lifeline.once(self._lull)

    async def try_wake(self) -> None:
        """As `wake`; raises ServerLostError like `try_sleep`: the next one is awake."""
        self._asleep = False
        await self._lifeline.once(lambda connection: self._bring(connection, self._wanted))

    def leave(self, reason: str) -> None:
        """Take a server that answers for lost; its requests in flight end, and it comes back as others do."""
        self._lifeline.leave(reason)

    async def try_load(self, update: WeightUpdate) -> LoadReport:
        """As `load_weights`; raises ServerLostError where the server is lost meanwhile: the next one starts with `want`ed."""
        started = time.perf_counter()
        report = await self._lifeline.once(partial(self._load_wanted, update))
        return msgspec.structs.replace(report, total_s=time.perf_counter() - started)

    async def try_sample(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, index: int
    ) -> Completion:
        """Sample number `index` of a request; raises ServerLostError where the server is away, or lost meanwhile."""
        return await self._lifeline.once(partial(self._generate_one, request_id, prompt_token_ids, params, index))

    async def try_score(self, token_ids: list[int]) -> list[float]:
        """As `score`; raises ServerLostError like `try_sample`."""
        return await self._lifeline.once(partial(self._score, token_ids))
