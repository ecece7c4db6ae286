"""What the producer asks of a generation engine, whichever it is."""

import hashlib
from typing import Protocol

from fastreason.types import Completion, LoadReport, SamplingParams, WeightUpdate


class Engine(Protocol):
    """Turns token ids into sampled token ids with their log-probabilities; its weights can be replaced while it runs.

    `version` numbers the weights that it samples from: 0 at the start, then the version of the last update loaded.
    """

    name: str
    version: int

    async def start(self) -> None:
        """Return when the engine answers; raises EngineError when it cannot start."""

    async def generate(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions of one prompt; each token is stamped with the version that sampled it."""
        ...

    async def score(self, token_ids: list[int]) -> list[float]:
        """Log-probabilities (natural, temperature 1) of `token_ids[1:]`, each given what stands before it."""
        ...

    async def load_weights(self, update: WeightUpdate) -> LoadReport:
        """Pause, load, verify, resume; requests in flight go on afterwards with the new weights. One that sleeps wakes."""
        ...

    async def sleep(self) -> float:
        """Give up the device's memory, weights and KV cache, until `wake` or `load_weights`; returns the seconds it took.

        No request may be in flight, and none may come meanwhile.
        """
        ...

    async def wake(self) -> float:
        """Take the memory back, with the weights of `version`; returns the seconds it took, 0 where it was awake."""
        ...

    async def adopt(self, update: WeightUpdate | None) -> None:
        """Take over from a producer that died: hold `update` (None: the weights of the start), whatever is held now."""

    async def close(self) -> None:
        """Release what the engine holds; may be called twice."""

    def figures(self) -> dict[str, float]:
        """What there is to log of the engine with each batch; counts are since the last call."""
        ...


def sample_seed(seed: int | None, index: int) -> int | None:
    """A seed for one sample of a request: distinct per sample, and the same on every machine."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest(), "big")
