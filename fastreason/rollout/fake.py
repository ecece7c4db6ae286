"""A deterministic engine without a model, for tests and dry runs: its tokens depend only on seed and prompt.

It never stands in for a real engine in a claim. Tokens are drawn uniformly from a fixed set, so their log-probability is
known exactly; nothing is learned from it unless the reward function looks at the tokens.
"""

import asyncio
import hashlib
import math
import random
from typing import NamedTuple

from fastreason.errors import EngineError
from fastreason.exchange import digest_file
from fastreason.rollout.engine import sample_seed
from fastreason.types import Completion, LoadReport, SamplingParams, WeightUpdate


class Draw(NamedTuple):
    """A whole response: its tokens, their log-probabilities (nats), and why it ends."""

    token_ids: list[int]
    logp: list[float]
    finish_reason: str


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
        seeds = [sample_seed(params.seed, i) for i in range(params.n)]
        draws = [self.draw(prompt_token_ids, seed, params.max_new_tokens) for seed in seeds]
        return [
            Completion(
                token_ids=token_ids,
                logp=logp,
                finish_reason=finish_reason,
                token_versions=[self.version] * len(token_ids),
            )
            for token_ids, logp, finish_reason in draws
        ]

    def draw(self, prompt_token_ids: list[int], seed: int | None, max_new_tokens: int) -> Draw:
        """The response to a prompt: always the same for the same seed."""
        prompt = hashlib.blake2b(repr(prompt_token_ids).encode(), digest_size=8).hexdigest()
        rng = random.Random(f"{prompt}/{seed}")
        token_ids: list[int] = []
        logp: list[float] = []
        while len(token_ids) < max_new_tokens:
            if rng.random() < 0.25:
                return Draw([*token_ids, self._eos], [*logp, math.log(0.25)], "stop")
            token_ids.append(rng.choice(self._token_ids))
            logp.append(self.token_logp)
        return Draw(token_ids, logp, "length")

    @property
    def token_logp(self) -> float:
        """The log-probability of each token of the set, nats."""
        return math.log(0.75 / len(self._token_ids))

    async def score(self, token_ids: list[int]) -> list[float]:
        return [self.token_logp] * (len(token_ids) - 1)

    async def load_weights(self, update: WeightUpdate) -> LoadReport:
        digest = digest_file(update.path)
        if digest.hexdigest() != update.checksum:
            raise EngineError(f"checksum of {update.path} is {digest.hexdigest()}, sent was {update.checksum}")
        self.version = update.version
        return LoadReport(
            version=update.version, checksum=digest.hexdigest(), num_tensors=digest.num_tensors, held_bytes=0
        )

    async def sleep(self) -> float:
        return 0.0

    async def wake(self) -> float:
        return 0.0

    async def adopt(self, update: WeightUpdate | None) -> None:
        if update is not None:
            await self.load_weights(update)

    async def close(self) -> None:
        return None

    def figures(self) -> dict[str, float]:
        return {}
