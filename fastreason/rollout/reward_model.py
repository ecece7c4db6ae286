"""Asks a learned reward model, served by vLLM elsewhere, for the score of each response.

The server is vLLM with a classification or reward model (`--runner pooling`). `POST {url}/classify` takes
`{"model", "messages"}`, renders the conversation with the reward model's own chat template, and answers
`{"data": [{"probs": [...]}]}`. How to serve such a model is not our business; neither is `/score`, which is for
cross-encoders that compare two texts.
"""

import asyncio
import difflib
import math
import os
from collections.abc import Sequence
from typing import Any

import aiohttp

from fastreason.config import RewardConfig
from fastreason.errors import ConfigError, EngineError

KEY_VARIABLE = "FASTREASON_REWARD_MODEL_KEY"
MAX_CONCURRENT = 64
NUM_TRIES = 3


class RewardModelClient:
    """Scores responses on a reward model's server: `async with RewardModelClient(config.reward) as client`.

    The environment variable FASTREASON_REWARD_MODEL_KEY, where it is set, is sent as the bearer key.
    """

    def __init__(self, config: RewardConfig, timeout_s: float = 60.0) -> None:
        """`timeout_s` limits one request. Raises `ConfigError` without a URL."""
        if not config.reward_model_url:
            raise ConfigError("reward.reward_model_url: missing; the reward reward_model needs the URL of its server.")
        url = config.reward_model_url.rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"reward.reward_model_url={config.reward_model_url!r}: write it as http://host:port.")
        self.url = url
        self.model = config.reward_model_name
        self.timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def __aenter__(self) -> "RewardModelClient":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Check that the server answers and serves the model; raises `EngineError`."""
        key = os.environ.get(KEY_VARIABLE)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        try:
            reply = await self._ask("GET", "/v1/models", None)
            served = [str(item["id"]) for item in reply["data"]]
        except (KeyError, TypeError) as error:
            await self.close()
            raise EngineError(
                f"reward model at {self.url}: /v1/models answered in a form that is not vLLM's."
            ) from error
        except BaseException:
            await self.close()
            raise
        if self.model is not None and self.model not in served:
            await self.close()
            near = difflib.get_close_matches(self.model, served, n=1)
            raise EngineError(
                f"reward.reward_model_name={self.model!r}: the server at {self.url} serves "
                f"{', '.join(served) or 'nothing'}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        self.model = self.model or (served[0] if served else None)

    async def score(self, messages: Sequence[dict[str, str]], texts: Sequence[str]) -> list[float]:
        """The score of each response to the conversation `messages`, in their order.

        With one class it is that class's value (a probability: vLLM applies the sigmoid unless told otherwise), with
        two the second's probability. Raises `EngineError` where the server does not answer, or with anything else.
        """
        return list(await asyncio.gather(*[self._score_one(messages, text) for text in texts]))

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _score_one(self, messages: Sequence[dict[str, str]], text: str) -> float:
        conversation = [*messages, {"role": "assistant", "content": text.encode("utf-8", "replace").decode()}]
        async with self._slots:
            reply = await self._ask("POST", "/classify", {"model": self.model, "messages": conversation})
        try:
            (item,) = reply["data"]
            probs = [float(value) for value in item["probs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"reward model at {self.url}: /classify answered {str(reply)[:300]!r}, without probs."
            ) from error
        if len(probs) not in (1, 2):
            raise EngineError(
                f"reward model at {self.url}: {self.model} has {len(probs)} classes; a reward model has one, or two of "
                "which the second is the good one. Serve another model."
            )
        if not math.isfinite(probs[-1]):
            raise EngineError(f"reward model at {self.url}: the score is {probs[-1]}, not a finite number.")
        return probs[-1]

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON answer; a server that cannot be reached or fails (5xx) is asked `NUM_TRIES` times."""
        if self._session is None:
            raise EngineError("the reward model's client is closed.")
        problem = ""
        for attempt in range(NUM_TRIES):
            if attempt:
                await asyncio.sleep(0.2 * 4 ** (attempt - 1))
            try:
                async with self._session.request(method, self.url + path, json=body) as response:
                    if response.status == 200:
                        return await response.json(content_type=None)
                    said = (await response.text())[:300]
                    problem = f"{path} answered {response.status}: {said}"
                    if response.status < 500 and response.status != 429:
                        raise EngineError(f"reward model at {self.url}: {problem} {_advice(response.status)}".rstrip())
            except TimeoutError:
                problem = f"{path} gave no answer within {self.timeout_s:g} s"
            except (aiohttp.ClientError, ValueError) as error:
                problem = f"{path}: {type(error).__name__}: {error}"
        raise EngineError(
            f"reward model at {self.url} (reward.reward_model_url): {problem}; tried {NUM_TRIES} times. "
            "Check that the server runs and can be reached from here."
        )


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"Set {KEY_VARIABLE} to the server's key."
    if status == 404:
        return "Is it a vLLM server with a classification model (--runner pooling) of that name?"
    return ""
