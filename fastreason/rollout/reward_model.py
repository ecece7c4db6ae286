"""Asks a learned reward model, served by vLLM elsewhere, for the score of each response.

The server is vLLM with a classification or reward model (`--runner pooling`). `POST {url}/classify` takes
`{"model", "messages"}`, renders the conversation with the reward model's own chat template, and answers
`{"data": [{"probs": [...]}]}`. How to serve such a model is not our business; neither is `/score`, which is for
cross-encoders that compare two texts.
"""

import asyncio
import difflib
import math
from collections.abc import Sequence

from fastreason.config import RewardConfig
from fastreason.errors import ConfigError, EngineError
from fastreason.rollout.served_model import ServedModel

KEY_VARIABLE = "FASTREASON_REWARD_MODEL_KEY"
ADVICE = {404: "Is it a vLLM server with a classification model (--runner pooling) of that name?"}


class RewardModelClient:
    """Scores responses on a reward model's server: `async with RewardModelClient(config.reward) as client`.

    The environment variable FASTREASON_REWARD_MODEL_KEY, where it is set, is sent as the bearer key.
    """

    def __init__(self, config: RewardConfig, timeout_s: float = 60.0) -> None:
        """`timeout_s` limits one request. Raises `ConfigError` without a URL."""
        if not config.reward_model_url:
            raise ConfigError("reward.reward_model_url: missing; the reward reward_model needs the URL of its server.")
        url = config.reward_model_url
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"reward.reward_model_url={url!r}: write it as http://host:port.")
        self.model = config.reward_model_name
        self._server = ServedModel("reward model", "reward.reward_model_url", url, KEY_VARIABLE, ADVICE, timeout_s)

    async def __aenter__(self) -> "RewardModelClient":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Check that the server answers and serves the model; raises `EngineError`."""
        served = await self._server.start()
        if self.model is not None and self.model not in served:
            await self.close()
            near = difflib.get_close_matches(self.model, served, n=1)
            raise EngineError(
                f"reward.reward_model_name={self.model!r}: the server at {self._server.url} serves "
                f"{', '.join(served)}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        self.model = self.model or served[0]

    async def score(self, messages: Sequence[dict[str, str]], texts: Sequence[str]) -> list[float]:
        """The score of each response to the conversation `messages`, in their order.

        With one class it is that class's value (a probability: vLLM applies the sigmoid unless told otherwise), with
        two the second's probability. Raises `EngineError` where the server does not answer, or with anything else.
        """
        return list(await asyncio.gather(*[self._score_one(messages, text) for text in texts]))

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        await self._server.close()

    async def _score_one(self, messages: Sequence[dict[str, str]], text: str) -> float:
        conversation = [*messages, {"role": "assistant", "content": text.encode("utf-8", "replace").decode()}]
        reply = await self._server.ask("POST", "/classify", {"model": self.model, "messages": conversation})
        try:
            (item,) = reply["data"]
            probs = [float(value) for value in item["probs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"reward model at {self._server.url}: /classify answered {str(reply)[:300]!r}, without probs."
            ) from error
        if len(probs) not in (1, 2):
            raise EngineError(
                f"reward model at {self._server.url}: {self.model} has {len(probs)} classes; a reward model has one, or two of "
                "which the second is the good one. Serve another model."
            )
        if not math.isfinite(probs[-1]):
            raise EngineError(f"reward model at {self._server.url}: the score is {probs[-1]}, not a finite number.")
        return probs[-1]
