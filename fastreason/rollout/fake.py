"""A deterministic engine without a model, for tests and dry runs: its tokens depend only on seed and prompt.

It never stands in for a real engine in a claim. Tokens are drawn uniformly from a fixed set, so their log-probability is
known exactly; nothing is learned from it unless the reward function looks at the tokens.
"""

import asyncio
import hashlib
import math
import random

from fastreason.errors import EngineError
from fastreason.exchange import Digest, read_weights
from fastreason.rollout.engine import sample_seed
from fastreason.types import Completion, LoadReport, SamplingParams, WeightUpdate


class FakeEngine:
    """Samples uniformly from `token_ids`; ends a response with `eos_token_id` with probability 1/4 at each position."""

    name = "fake"

    def __init__(self, token_ids: list[int], eos_token_id: int, delay_s: float = 0.0) -> None:
        assert token_ids, "the fake engine needs tokens to draw from"
        self._token_ids, self._eos, self._delay_s = sorted(token_ids), eos_token_id, delay_s
        self.version = 0

    async def start(self) -> None:
        return None

    async def generate(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> list[Completion]:
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        prompt = hashlib.blake2b(repr(prompt_token_ids).encode(), digest_size=8).hexdigest()
        return [self._sample(f"{prompt}/{sample_seed(params.seed, i)}", params) for i in range(params.n)]

    def _sample(self, key: str, params: SamplingParams) -> Completion:
        rng = random.Random(key)
        token_ids: list[int] = []
        logp: list[float] = []
        finish_reason = "length"
        while len(token_ids) < params.max_new_tokens:
            if rng.random() < 0.25:
                token_ids.append(self._eos)
                logp.append(math.log(0.25))
                finish_reason = "stop"
                break
            token_ids.append(rng.choice(self._token_ids))
            logp.append(math.log(0.75 / len(self._token_ids)))
        return Completion(
            token_ids=token_ids, logp=logp, finish_reason=finish_reason, token_versions=[self.version] * len(token_ids)
        )

    async def score(self, token_ids: list[int]) -> list[float]:
        return [math.log(0.75 / len(self._token_ids))] * (len(token_ids) - 1)

    async def load_weights(self, update: WeightUpdate) -> LoadReport:
        digest = Digest()
        for _ in read_weights(update.path, digest):
            pass
        if digest.hexdigest() != update.checksum:
            raise EngineError(f"checksum of {update.path} is {digest.hexdigest()}, sent was {update.checksum}")
        self.version = update.version
        return LoadReport(
            version=update.version, checksum=digest.hexdigest(), num_tensors=digest.num_tensors, held_bytes=0
        )

    async def close(self) -> None:
        return None
