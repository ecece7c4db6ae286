"""The connection to a model that somebody else serves with vLLM: a judge or a teacher.

It owns the session, its key, the number of requests at once, and what is said of a server that does not answer. It refuses
to know what is asked of the model.
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import aiohttp

from fastreason.errors import EngineError

MAX_CONCURRENT = 64
NUM_TRIES = 3


class ServedModel:
    """A vLLM server at `url`; `name` and `config_key` are those of messages, `timeout_s` limits one request.

    key_variable: the environment variable whose value, where it is set, is sent as the bearer key. advice: what to do, by the
    status of an answer.
    """

    def __init__(
        self, name: str, config_key: str, url: str, key_variable: str, advice: Mapping[int, str], timeout_s: float
    ) -> None:
        self.name, self.url, self.timeout_s = name, url.rstrip("/").removesuffix("/v1"), timeout_s
        self._config_key, self._key_variable = config_key, key_variable
        says_key = f"Set {key_variable} to the server's key."
        self._advice = {401: says_key, 403: says_key, **advice}
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def start(self) -> list[str]:
        """Check that the server answers; returns the names of its models, at least one. Raises EngineError."""
        key = os.environ.get(self._key_variable)
        self._session = aiohttp.ClientSession(
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
        """The JSON answer; a server that cannot be reached or fails (5xx, 429) is asked `NUM_TRIES` times."""
        if self._session is None:
            raise EngineError(f"the {self.name}'s client is closed.")
        problem = ""
        for attempt in range(NUM_TRIES):
            if attempt:
                await asyncio.sleep(0.2 * 4 ** (attempt - 1))
            try:
                async with self._slots, self._session.request(method, self.url + path, json=body) as response:
                    if response.status == 200:
                        return await response.json(content_type=None)
                    problem = f"{path} answered {response.status}: {(await response.text())[:300]}"
                    if response.status < 500 and response.status != 429:
                        advice = self._advice.get(response.status, "")
                        raise EngineError(f"{self.name} at {self.url}: {problem} {advice}".rstrip())
            except TimeoutError:
                problem = f"{path} gave no answer within {self.timeout_s:g} s"
            except (aiohttp.ClientError, ValueError) as error:
                problem = f"{path}: {type(error).__name__}: {error}"
        raise EngineError(
            f"{self.name} at {self.url} ({self._config_key}): {problem}; tried {NUM_TRIES} times. Check that the server runs "
            "and can be reached from here."
        )
