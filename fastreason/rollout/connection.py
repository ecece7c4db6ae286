"""The HTTP requests to one engine server for as long as it lives; what ends with the server and what is an error.

A broken connection, an answer of another process at the same address, and a server that was given up are all one thing to
the requests in flight: `ServerLostError`, after which they may be sent again to the next one. A server that lives and
answers with an error, or not in time, is an EngineError.
"""

import asyncio
import json
from typing import Any, NamedTuple

import aiohttp

from fastreason.errors import EngineError
from fastreason.patience import Patience
from fastreason.rollout.vllm_middleware import INSTANCE_HEADER, RESUMES_HEADER

LOOK_S = 1.0  # between two looks of a waiting request
HEALTH_TIMEOUT_S = 2.0
NO_ANSWER = (0, "")  # of a server that takes connections
SERVER_NAMES = {"vllm": "vLLM server", "fake": "fake engine"}


class ServerLostError(Exception):
    """The server ended, was replaced, or is taken for dead; never leaves the engine's client."""


class Answer(NamedTuple):
    """The body, and how many times the server had been told to resume when the answer began."""

    body: Any
    num_resumes: int


class Connection:
    """One server process; `name` is the engine's, `limit_s` the seconds that an answer may take."""

    def __init__(self, name: str, url: str, key: str, limit_s: float) -> None:
        self.server = f"{SERVER_NAMES.get(name, name)} at {url}"
        self.instance, self.hung = "", False
        self.allowance_s = 0.0  # that every answer may take longer: while weights are loaded
        self._url, self._limit_s = url, limit_s
        self._lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Limits are kept by Patience: time in which we ourselves were stopped does not count.
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"},
            timeout=aiohttp.ClientTimeout(),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        )

    @property
    def lost(self) -> str | None:
        """Why the server was given up, or None."""
        return self._lost.result() if self._lost.done() else None

    def give_up(self, reason: str, hung: bool = False) -> None:
        """End every request in flight, now and without waiting for the server; `hung`: it must not be trusted again."""
        self.hung = self.hung or hung
        if not self._lost.done():
            self._lost.set_result(reason)

    async def close(self) -> None:
        self.give_up("the client was closed")
        await self._session.close()

    async def look(self) -> tuple[int, str] | None:
        """The status of /health and the instance that answered; NO_ANSWER where that takes too long, None where nobody is."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._session.get(f"{self._url}/health", timeout=timeout) as response:
                return response.status, response.headers.get(INSTANCE_HEADER, "")
        except TimeoutError:
            return NO_ANSWER
        except (aiohttp.ClientError, OSError):
            return None

    async def ask(self, path: str, body: dict[str, Any] | None = None, limit_s: float | None = None) -> Answer:
        """The answer to a POST; raises ServerLostError, and EngineError when a living server refuses or takes too long."""
        if self._lost.done():
            raise ServerLostError(self._lost.result())
        limit_text = f"{limit_s:g} s" if limit_s else f"rollout.request_timeout_s={self._limit_s:g} s"
        limit_s = limit_s or self._limit_s
        task: asyncio.Future[Any] = asyncio.ensure_future(self._exchange(path, body))
        patience = Patience(limit_s)
        try:
            while not task.done():
                wait_s = min(LOOK_S, limit_s)
                await asyncio.wait({task, self._lost}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                if self._lost.done() and not task.done():
                    raise ServerLostError(self._lost.result())
                patience.look()
                if patience.spent_s >= limit_s + self.allowance_s and not task.done():
                    raise NoAnswerError(
                        f"the {self.server} did not answer {path.split('?')[0]} within {limit_text}: it hangs, or the limit "
                        "is too short for the length asked for."
                    )
            return task.result()
        finally:
            task.cancel()

    async def _exchange(self, path: str, body: dict[str, Any] | None) -> Answer:
        try:
            async with self._session.post(f"{self._url}{path}", json=body) as response:
                instance = response.headers.get(INSTANCE_HEADER, "")
                # What the framework itself says of an unhandled error does not pass the middleware that names the server.
                if instance != self.instance and (instance or response.status == 200):
                    raise ServerLostError(f"the {self.server} was replaced: start {instance} for {self.instance}")
                if response.status == 200:
                    content = await response.read()  # of /sleep and /wake_up there is none
                    try:
                        body = json.loads(content) if content else None
                        return Answer(body, int(response.headers.get(RESUMES_HEADER, 0)))
                    except ValueError as error:
                        raise EngineError(
                            f"the {self.server} answered {path.split('?')[0]} with what is no answer of an engine: {error}"
                        ) from error
                text = (await response.text())[:500]
                response.close()  # the server closes it too, and would meet the next request on it
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLostError(
                f"the connection to the {self.server} broke at {path.split('?')[0]}: {error}"
            ) from error
        # A server whose engine died answers with errors until it has ended itself.
        if response.status >= 500 and await self.look() != (200, self.instance):
            raise ServerLostError(
                f"the {self.server} answered {response.status} to {path.split('?')[0]} and ended: {text}"
            )
        raise EngineError(f"the {self.server} answered {response.status} to {path.split('?')[0]}: {text}")


class NoAnswerError(EngineError):
    """A server let a request wait for longer than it may."""
