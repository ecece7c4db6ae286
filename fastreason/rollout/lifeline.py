"""One engine server over its deaths: notices that it is lost, waits for the next, and has it made what the last one was.

It starts no process: the launcher restarts a server that died by itself, and one that is reported as hung. Whatever is done
on the engine goes through `call`, which does it again when the server is lost in the middle.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastreason.errors import EngineError
from fastreason.patience import Patience
from fastreason.rollout.connection import NO_ANSWER, Connection, NoAnswerError, ServerLostError

T = TypeVar("T")
BEAT = ("/collective_rpc", {"method": "fastreason_beat"})
LONGEST_BEAT_S = 5.0
POLL_S = 0.1
MOST_TRIES = 10  # a server is restarted fewer times than that without a step between
AGAIN_S = (
    1.0  # before what could not be made what the last server was is tried again, where others do its work meanwhile
)


class Doubt:
    """Finds out, and says once, that a server which is waited for hangs; until nobody is at its address any more.

    silence_counts: one that takes connections and does not answer hangs. is_known: that it hangs has been said before.
    """

    def __init__(self, hang_timeout_s: float, silence_counts: bool, is_known: bool) -> None:
        self._silent = Patience(hang_timeout_s if silence_counts else math.inf)
        self._sick = Patience(min(LONGEST_BEAT_S, hang_timeout_s))
        self._is_known = is_known

    def look(self, seen: tuple[int, str] | None) -> str | None:
        """Why it hangs, from what `Connection.look` has seen, to be called as often."""
        self._silent.look()
        self._sick.look()
        if seen != NO_ANSWER:
            self._silent.renew()
        if seen is None or seen == NO_ANSWER or seen[0] == 200:
            self._sick.renew()
        self._is_known = self._is_known and seen is not None
        if self._is_known or not (self._silent.exhausted or self._sick.exhausted):
            return None
        self._is_known = True
        if seen is None or seen == NO_ANSWER:
            return f"takes connections, and has not answered for run.hang_timeout_s={self._silent.limit_s:g} s"
        # Its engine died under it. It should have ended itself by now, and waits for something.
        return f"answers /health with {seen[0]}, and does not end"


class Lifeline:
    """The current connection to one address.

    `connect` makes a connection, `revive(connection)` gives a new server what the last one had (weights). `on_hung(reason)`
    has the server killed and restarted: called when no heartbeat came back for `hang_timeout_s` seconds; without it a hung
    server is an EngineError. `on_event(name, text)` hears of "engine_lost" (why) and "engine_back" (after how long).
    `takes_over`: the server has answered another client before, so that one which is silent at the start hangs. `spare`: nobody
    waits for it, for other servers do the work meanwhile, or whoever does has a limit; so a recovery never ends but with a
    server, and one that hangs and is nobody's to restart may be found alive again. `log` is where to read about
    the server, `key_hint` what to do where it refuses the key.
    While it is `resting` no server is started, and how long one is away does not count.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        revive: Callable[[Connection], Awaitable[None]],
        *,
        startup_timeout_s: float,
        hang_timeout_s: float,
        on_hung: Callable[[str], None] | None,
        on_event: Callable[[str, str], None] | None,
        takes_over: bool = False,
        spare: bool = False,
        log: str = "see logs/engine.log in the run's folder",
        key_hint: str = "",
        resting: Callable[[], bool] = lambda: False,
    ) -> None:
        self._spare, self._log, self._key_hint = spare, log, key_hint
        self._trouble: str | None = None
        self._connect, self._revive = connect, revive
        self._startup_timeout_s, self._hang_timeout_s = startup_timeout_s, hang_timeout_s
        self._on_hung, self._on_event = on_hung, on_event or (lambda name, text: None)
        self._begun, self._resting = takes_over, resting
        self._connection: Connection | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._heart: asyncio.Task[None] | None = None
        self.num_losses = 0

    async def start(self) -> None:
        """Return when the server answers; raises EngineError when it does not in time, or refuses the key."""
        self._connection = await self._reach(Patience(self._startup_timeout_s), other_than=None)
        self._begun = True
        self._listen(self._connection)

    def begin(self) -> None:
        """In place of `start`: look for the server in the background, and have it revived before it counts as alive."""
        self._recovery = asyncio.create_task(self._recover(None))

    @property
    def is_alive(self) -> bool:
        """Whether there is a server now, as far as is known."""
        return self._recovery is None and self._connection is not None and self._connection.lost is None

    @property
    def trouble(self) -> str | None:
        """Why there is no server, or None."""
        return None if self.is_alive else self._trouble or "it has not answered yet"

    async def once(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do `work` on the server that lives now; raises ServerLostError where it is away, or lost meanwhile."""
        if not self.is_alive:
            raise ServerLostError(self.trouble)
        assert self._connection is not None
        connection = self._connection
        try:
            return await work(connection)
        except ServerLostError as loss:
            self._lose(connection, str(loss))
            raise

    def leave(self, reason: str) -> None:
        """Take the server for lost although it answers; it is revived like any other."""
        if self._connection is not None:
            self._lose(self._connection, reason)

    async def call(self, work: Callable[[Connection], Awaitable[T]], what: str) -> T:
        """Do `work` on a living server, from the start again each time that the server is lost meanwhile.

        Raises EngineError when the server does not come back, or `what` was tried too often.
        """
        reason = ""
        for _ in range(MOST_TRIES):
            connection = await self._alive()
            try:
                return await work(connection)
            except ServerLostError as loss:
                reason = str(loss)
                self._lose(connection, reason)
        raise EngineError(
            f"{what} was tried {MOST_TRIES} times, and each time the server was lost; the last time: {reason}"
        )

    async def close(self) -> None:
        tasks = [task for task in (self._recovery, self._heart) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def _alive(self) -> Connection:
        if self._recovery is not None:
            await asyncio.shield(self._recovery)
        if self._connection is None:
            raise EngineError("the engine is not started, or closed")
        return self._connection

    def _lose(self, connection: Connection, reason: str, hung: bool = False) -> None:
        """Give up a connection and recover; what is lost already is no news."""
        if connection.lost is not None:
            return
        connection.give_up(reason, hung)
        if connection is not self._connection:
            return  # one that is being revived: the recovery that does so looks for the next
        self.num_losses += 1
        self._trouble = reason
        self._recovery = asyncio.create_task(self._recover(connection))
        self._recovery.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # also if nobody waits for it
        self._on_event("engine_lost", reason)  # last: who hears of it may fail

    async def _recover(self, lost: Connection | None) -> None:
        started, patience = time.monotonic(), Patience(math.inf if self._spare else self._startup_timeout_s)
        if lost is not None:
            await lost.close()
            if lost.hung and self._on_hung is None and not self._spare:
                raise EngineError(str(lost.lost))
        former = lost
        while True:
            # Nobody restarts a spare one elsewhere that is silent: what answers there again may be the same.
            shunned = former is not None and former.hung and (self._on_hung is not None or not self._spare)
            connection = await self._try_to_revive(patience, former.instance if former and shunned else None)
            if connection is None:
                continue
            if connection.lost is None:
                break
            former = connection
        self._begun, self._trouble = True, None
        self._connection, self._recovery = connection, None
        if lost is not None:
            self._on_event("engine_back", f"{time.monotonic() - started:.1f} s")

    async def _try_to_revive(self, patience: Patience, other_than: str | None) -> Connection | None:
        """The next server's connection, given up where it was lost again; None where a spare one cannot be revived yet."""
        connection: Connection | None = None
        try:
            connection = await self._reach(patience, other_than)
            self._listen(connection)
            await self._revive(connection)
            return connection
        except ServerLostError as loss:
            assert connection is not None
            connection.give_up(str(loss))
            await connection.close()
            await asyncio.sleep(POLL_S)
            return connection
        except Exception as error:  # also of our own making: nobody would see that the recovery has ended
            if not self._spare:
                raise
            self._trouble = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            if connection is not None:
                await connection.close()
            await asyncio.sleep(AGAIN_S)
            return None

    async def _reach(self, patience: Patience, other_than: str | None) -> Connection:
        """A connection to the server once it is healthy, and is not the start `other_than`, which hangs."""
        connection = self._connect()
        doubt = Doubt(self._hang_timeout_s, silence_counts=self._begun, is_known=other_than is not None)
        try:
            while True:
                seen = await connection.look()
                if seen is not None and seen[0] == 401:
                    raise EngineError(f"the {connection.server} refused the key of this run (401){self._key_hint}")
                if seen is not None and seen[0] == 200 and (other_than is None or seen[1] != other_than):
                    connection.instance = seen[1]
                    return connection
                reason = doubt.look(seen)
                if reason is not None and self._on_hung is not None:
                    self._on_hung(f"the {connection.server} {reason}")
                patience.look()
                if self._resting():
                    patience.renew()
                if patience.exhausted:
                    raise EngineError(
                        f"the {connection.server} did not answer within rollout.startup_timeout_s="
                        f"{self._startup_timeout_s:g} s. Raise it if the model is large; {self._log}."
                    )
                await asyncio.sleep(POLL_S)
        except BaseException:
            await connection.close()
            raise

    def _listen(self, connection: Connection) -> "asyncio.Task[None]":
        """Let a connection's heart beat, and that of the last one stop."""
        if self._heart is not None:
            self._heart.cancel()
        self._heart = asyncio.create_task(self._beat(connection))
        return self._heart

    async def _beat(self, connection: Connection) -> None:
        """Ask for a sign of life of the innermost process, through all that lie before it, until none comes."""
        while True:
            try:
                await connection.ask(*BEAT, limit_s=self._hang_timeout_s)
            except ServerLostError as loss:
                return self._lose(connection, str(loss))
            except NoAnswerError:
                return self._lose_hung(connection)
            except Exception:
                pass  # an error is a sign of life; those who ask for something else will meet it
            await asyncio.sleep(min(LONGEST_BEAT_S, self._hang_timeout_s / 3))

    def _lose_hung(self, connection: Connection) -> None:
        reason = f"the {connection.server} shows no sign of life since run.hang_timeout_s={self._hang_timeout_s:g} s"
        try:
            if self._on_hung is not None:
                self._on_hung(reason)
        finally:
            self._lose(connection, reason, hung=True)
