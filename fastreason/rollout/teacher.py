"""Asks a teacher, served by vLLM elsewhere, for the log-probabilities of responses that the policy sampled.

The server is vLLM with a causal LM of the policy's tokenizer. `POST {url}/v1/completions` takes token ids as the prompt and,
with `prompt_logprobs`, answers with the log-probability of each: of the raw distribution, so at temperature 1, whatever the
request says: `algorithm_checks.py` refuses a run with another temperature. Text never goes there, only token ids.
"""

import asyncio
import math
import os
from typing import Any

import aiohttp

from fastreason.errors import EngineError

KEY_VARIABLE = "FASTREASON_TEACHER_KEY"
MAX_CONCURRENT = 64
NUM_TRIES = 3
ADVICE = {
    401: f"Set {KEY_VARIABLE} to the server's key.",
    403: f"Set {KEY_VARIABLE} to the server's key.",
    404: "Is it a vLLM server with a causal LM?",
    400: "Was it started with a --max-model-len above data.max_prompt_tokens + rollout.max_new_tokens?",
}


class TeacherClient:
    """Scores responses on a teacher's server; `timeout_s` limits one request.

    The environment variable FASTREASON_TEACHER_KEY, where it is set, is sent as the bearer key.
    """

    def __init__(self, url: str, timeout_s: float = 300.0) -> None:
        self.url, self.timeout_s, self.model = url.rstrip("/").removesuffix("/v1"), timeout_s, ""
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def start(self) -> None:
        """Check that the server answers, and learn its model's name; raises EngineError."""
        key = os.environ.get(KEY_VARIABLE)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        try:
            reply = await self._ask("GET", "/v1/models", None)
            self.model = str(reply["data"][0]["id"])
        except (KeyError, TypeError, IndexError) as error:
            await self.close()
            raise EngineError(f"teacher at {self.url}: /v1/models answered in a form that is not vLLM's.") from error
        except BaseException:
            await self.close()
            raise

    async def score(self, prompt_token_ids: list[int], token_ids: list[int]) -> list[float]:
        """log q of each of `token_ids`, given the prompt and those before it: nats, at temperature 1.

        Raises EngineError where the server does not answer, or not with a finite number for each.
        """
        if not token_ids:
            return []
        # One token must be generated; it is thrown away.
        body = {"model": self.model, "prompt": [*prompt_token_ids, *token_ids], "max_tokens": 1, "prompt_logprobs": 0}
        async with self._slots:
            reply = await self._ask("POST", "/v1/completions", body)
        try:
            entries = reply["choices"][0]["prompt_logprobs"][len(prompt_token_ids) :]
            scores = [float(entry[str(token)]["logprob"]) for token, entry in zip(token_ids, entries, strict=True)]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise EngineError(
                f"teacher at {self.url}: /v1/completions answered {str(reply)[:300]!r}, without a log-probability of each "
                f"of {len(token_ids)} tokens."
            ) from error
        if not all(map(math.isfinite, scores)):
            raise EngineError(
                f"teacher at {self.url}: a log-probability is not a finite number. Does it hold the model?"
            )
        return scores

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON answer; a server that cannot be reached or fails (5xx) is asked `NUM_TRIES` times."""
        if self._session is None:
            raise EngineError("the teacher's client is closed.")
        problem = ""
        for attempt in range(NUM_TRIES):
            if attempt:
                await asyncio.sleep(0.2 * 4 ** (attempt - 1))
            try:
                async with self._session.request(method, self.url + path, json=body) as response:
                    if response.status == 200:
                        return await response.json(content_type=None)
                    problem = f"{path} answered {response.status}: {(await response.text())[:300]}"
                    if response.status < 500 and response.status != 429:
                        advice = ADVICE.get(response.status, "")
                        raise EngineError(f"teacher at {self.url}: {problem} {advice}".rstrip())
            except TimeoutError:
                problem = f"{path} gave no answer within {self.timeout_s:g} s"
            except (aiohttp.ClientError, ValueError) as error:
                problem = f"{path}: {type(error).__name__}: {error}"
        raise EngineError(
            f"teacher at {self.url} (teacher.url): {problem}; tried {NUM_TRIES} times. Check that the server runs and can be "
            "reached from here."
        )
