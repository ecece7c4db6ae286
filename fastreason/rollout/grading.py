"""Verifiable rewards from the graders' processes and, where the config asks for one, a reward model's score, as one grade."""

from collections.abc import Callable, Sequence

from fastreason.rewards import REWARD_MODEL, RewardSpec
from fastreason.rollout.graders import GraderPool
from fastreason.rollout.reward_model import RewardModelClient
from fastreason.types import Grade, Prompt


class Grading:
    """Implements the producer's `Grader`; starts and closes what it is made of."""

    def __init__(
        self,
        spec: RewardSpec,
        pool: GraderPool,
        reward_model: RewardModelClient | None,
        messages: Callable[[Prompt], list[dict[str, str]]],
    ) -> None:
        self._spec, self._pool, self._reward_model, self._messages = spec, pool, reward_model, messages

    @property
    def num_timeouts(self) -> int:
        return self._pool.num_timeouts

    async def start(self) -> None:
        await self._pool.start()
        if self._reward_model is not None:
            await self._reward_model.start()

    async def grade(self, prompt: Prompt, texts: Sequence[str], truncated: Sequence[bool]) -> list[Grade]:
        grades = await self._pool.grade(prompt, texts, truncated)
        if self._reward_model is None:
            return grades
        scores = await self._reward_model.score(self._messages(prompt), texts)
        return [self._spec.with_part(g, REWARD_MODEL, score) for g, score in zip(grades, scores, strict=True)]

    async def close(self) -> None:
        await self._pool.close()
        if self._reward_model is not None:
            await self._reward_model.close()
