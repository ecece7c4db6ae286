"""The connection to a model that somebody else serves with vLLM: a judge or a teacher.

It owns the session, its key, the number of requests at once, and what is said of a server that does not answer. It refuses
to know what is asked of the model.
"""

import asyncio
import os
import random
from asyncio import sleep
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from fastreason.errors import EngineError

MAX_CONCURRENT = 64
NUM_TRIES = 3
PATIENCE_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S, SPREAD = 0.2, 15.0, 1.25
# The request's own fault, where others may be answered: its length, its content.
REFUSALS = {400, 413, 422}


class RequestRefusedError(EngineError):
    """The server answers, but not this request."""


class ServedModel:
    """A vLLM server at `url`; `name` and `config_key` are those of messages, `timeout_s` limits one request.

    key_variable: the environment variable whose value, where it is set, is sent as the bearer key. advice: what to do, by the
    status of an answer. patience_s: how long a request waits in all for a server that is busy or fails; a trainer that waits
    for the answer has little.
    """

    def __init__(
        self,
        name: str,
        config_key: str,
        url: str,
        key_variable: str,
        advice: Mapping[int, str],
        timeout_s: float,
        *,
        max_concurrent: int = MAX_CONCURRENT,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.name, self.url, self.timeout_s = name, url.rstrip("/").removesuffix("/v1"), timeout_s
        self._config_key, self._key_variable = config_key, key_variable
        says_key = f"Set {key_variable} to the server's key."
        self._advice = {401: says_key, 403: says_key, **advice}
        self._session: aiohttp.ClientSession | None = None
        self._max_concurrent, self._patience_s = max_concurrent, patience_s
        self._slots = asyncio.Semaphore(max_concurrent)

    async def start(self) -> list[str]:
        """Check that the server answers; returns the names of its models, at least one. Raises EngineError."""
        key = os.environ.get(self._key_variable)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_concurrent),
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        try:
            reply = await self.ask("GET", "/v1/models")
            names = [str(item["id"]) for item in reply["data"]]
            if not names:
                raise EngineError(f"{self.name} at {self.url}: it serves no model.")
        except (KeyError, TypeError) as error:
            await self.close()
            raise EngineError(
                f"{self.name} at {self.url}: /v1/models answered in a form that is not vLLM's."
            ) from error
        except BaseException:
            await self.close()
            raise
        return names

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer; raises EngineError, and where the server refuses this request, RequestRefusedError.

        A server that is busy or fails (429, 5xx) is asked again after pauses that grow, or as long as its Retry-After says,
        `patience_s` in all; one that cannot be reached, or does not answer in time, `NUM_TRIES` times.
        """
        if self._session is None:
            raise EngineError(f"the {self.name}'s client is closed.")
        problem, num_busy, num_lost, left_s = "", 0, 0, self._patience_s
        while True:
            pause_s = None
            try:
                async with self._slots, self._session.request(method, self.url + path, json=body) as response:
                    if response.status == 200:
                        return await response.json(content_type=None)
                    problem = f"{path} answered {response.status}: {(await response.text())[:300]}"
                    if response.status < 500 and response.status != 429:
                        kind = RequestRefusedError if response.status in REFUSALS else EngineError
                        advice = self._advice.get(response.status, "")
                        raise kind(f"{self.name} at {self.url}: {problem} {advice}".rstrip())
                    num_busy += 1
                    if left_s > 0.01:
                        asked_s = _retry_after_s(response.headers.get("Retry-After"))
                        pause_s = min(max(asked_s, _pause_s(num_busy) * random.uniform(1.0, SPREAD)), left_s)
                        left_s -= pause_s
            except TimeoutError:
                problem, num_lost = f"{path} gave no answer within {self.timeout_s:g} s", num_lost + 1
                pause_s = _pause_s(num_lost) if num_lost < NUM_TRIES else None
            except (aiohttp.ClientError, ValueError) as error:
                problem, num_lost = f"{path}: {type(error).__name__}: {error}", num_lost + 1
                pause_s = _pause_s(num_lost) if num_lost < NUM_TRIES else None
            if pause_s is None:
                raise EngineError(
                    f"{self.name} at {self.url} ({self._config_key}): {problem}; tried {num_busy + num_lost} times. Check that "
                    "the server runs and can be reached from here."
                )
            await sleep(pause_s)


def _pause_s(num_failures: int) -> float:
    return min(FIRST_PAUSE_S * 4.0 ** (num_failures - 1), LONGEST_PAUSE_S)


def _retry_after_s(header: str | None) -> float:
    """Seconds, or a date, as RFC 9110 has them; 0 where it says neither."""
    if header is None:
        return 0.0
    try:
        return float(header) if header.strip().isdigit() else (_date(header) - datetime.now(UTC)).total_seconds()
    except ValueError:
        return 0.0


def _date(text: str) -> datetime:
    date = parsedate_to_datetime(text)
    return date if date.tzinfo else date.replace(tzinfo=UTC)
