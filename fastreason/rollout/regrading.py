"""Verifies stored responses anew with the grader processes of training, for callers without an asyncio loop."""

import asyncio
from collections.abc import Sequence
from types import TracebackType

from fastreason.config import RewardConfig
from fastreason.errors import ConfigError
from fastreason.rollout.graders import GraderPool
from fastreason.types import Prompt


class Regrader:
    """`with Regrader(workers) as grader`: the reward `math`, as in training, with its deadline for each response."""

    def __init__(self, workers: int) -> None:
        """Starts nothing yet; raises `ConfigError` for fewer than one process."""
        if workers < 1:
            raise ConfigError(f"--workers {workers}: give at least 1.")
        self._pool = GraderPool(RewardConfig(workers=workers))
        self._runner = asyncio.Runner()
        self._started = False

    def __enter__(self) -> "Regrader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._runner.run(self._pool.close())
        self._runner.close()

    def labels(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        """For each prompt, whether each of its responses is right; None of one past the deadline.

        The first call starts the processes; raises `RewardError` where they cannot.
        """
        if not self._started:
            self._runner.run(self._pool.start())
            self._started = True
        return self._runner.run(self._labels(prompts, responses))

    @property
    def num_timeouts(self) -> int:
        return self._pool.num_timeouts

    async def _labels(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        pairs = zip(prompts, responses, strict=True)
        graded = await asyncio.gather(*[self._pool.grade(prompt, texts) for prompt, texts in pairs])
        return [[None if grade.timed_out else grade.correct for grade in grades] for grades in graded]
