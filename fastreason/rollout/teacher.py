"""Asks a teacher, served by vLLM elsewhere, for the log-probabilities of responses that the policy sampled.

The server is vLLM with a causal LM of the policy's tokenizer. `POST {url}/v1/completions` takes token ids as the prompt and,
with `prompt_logprobs`, answers with the log-probability of each: of the raw distribution, so at temperature 1, whatever the
request says: `algorithm_checks.py` refuses a run with another temperature. Text never goes there, only token ids.
"""

import math
from typing import Any

from fastreason.errors import EngineError
from fastreason.rollout.served_model import ServedModel

KEY_VARIABLE = "FASTREASON_TEACHER_KEY"
ADVICE = {
    404: "Is it a vLLM server with a causal LM?",
    400: "Was it started with a --max-model-len above data.max_prompt_tokens + rollout.max_new_tokens?",
}


class TeacherClient:
    """Scores responses on a teacher's server; `timeout_s` limits one request.

    The environment variable FASTREASON_TEACHER_KEY, where it is set, is sent as the bearer key.
    """

    def __init__(self, url: str, timeout_s: float = 300.0) -> None:
        self._server = ServedModel("teacher", "teacher.url", url, KEY_VARIABLE, ADVICE, timeout_s)
        self.model = ""

    async def start(self) -> None:
        """Check that the server answers, and learn its model's name; raises EngineError."""
        self.model = (await self._server.start())[0]

    async def score(self, prompt_token_ids: list[int], token_ids: list[int]) -> list[float]:
        """log q of each of `token_ids`, given the prompt and those before it: nats, at temperature 1.

        Raises EngineError where the server does not answer, or not with a finite number for each.
        """
        if not token_ids:
            return []
        # One token must be generated; it is thrown away.
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": [*prompt_token_ids, *token_ids],
            "max_tokens": 1,
            "prompt_logprobs": 0,
        }
        reply = await self._server.ask("POST", "/v1/completions", body)
        try:
            entries = reply["choices"][0]["prompt_logprobs"][len(prompt_token_ids) :]
            scores = [float(entry[str(token)]["logprob"]) for token, entry in zip(token_ids, entries, strict=True)]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise EngineError(
                f"teacher at {self._server.url}: /v1/completions answered {str(reply)[:300]!r}, without a log-probability "
                f"of each of {len(token_ids)} tokens."
            ) from error
        if not all(map(math.isfinite, scores)):
            raise EngineError(
                f"teacher at {self._server.url}: a log-probability is not a finite number. Does it hold the model?"
            )
        return scores

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        await self._server.close()
