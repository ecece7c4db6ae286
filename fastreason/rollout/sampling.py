"""One prompt's way to a graded group: generate, decode, grade, and what an algorithm wants beside that.

It owns the requests to engine, graders and teacher, and the clocks of both. It refuses to know which groups there are, and
what becomes of them.
"""

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from fastreason.rollout.busy import BusyClock
from fastreason.rollout.engine import Engine
from fastreason.trace import Trace
from fastreason.types import Grade, Group, Prompt, Sample, SamplingParams

T = TypeVar("T")


class Grader(Protocol):
    """What the producer asks of the graders."""

    @property
    def num_timeouts(self) -> int: ...

    async def grade(self, prompt: Prompt, texts: Sequence[str], truncated: Sequence[bool]) -> list[Grade]: ...


class Teacher(Protocol):
    """A model served elsewhere that scores responses."""

    async def start(self) -> None: ...

    async def score(self, prompt_token_ids: list[int], token_ids: list[int]) -> list[float]:
        """The log-probability of each of `token_ids`, given the prompt and those before it, at temperature 1."""
        ...

    async def close(self) -> None: ...


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str: ...


class Sampling:
    """Makes groups.

    greedy: a prompt is answered once more, with the likeliest token at each place, for its reward and length. teacher: scores
    the tokens of a response.
    """

    def __init__(
        self,
        engine: Engine,
        grader: Grader,
        tokenizer: Tokenizer,
        trace: Trace,
        greedy: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        self._engine, self._grader, self._tokenizer, self._trace = engine, grader, tokenizer, trace
        self._greedy, self._teacher = greedy, teacher
        self.generating, self.grading = BusyClock(), BusyClock()

    async def group(
        self,
        ticket: int,
        prompt: Prompt,
        token_ids: list[int],
        params: SamplingParams,
        version: int,
    ) -> Group:
        """A prompt's graded responses; `version` is that of its issue."""
        greedy = msgspec.structs.replace(params, n=1, temperature=0.0)
        (samples, generate_s, grade_s), *more = await together(
            self.samples(f"t{ticket}", prompt, token_ids, params),
            *([self.samples(f"t{ticket}greedy", prompt, token_ids, greedy)] if self._greedy else []),
        )
        baseline = more[0][0][0] if more else None
        return Group(
            ticket=ticket,
            prompt=prompt,
            prompt_token_ids=token_ids,
            samples=samples,
            version_issued=version,
            generate_s=generate_s,
            grade_s=grade_s,
            greedy_reward=None if baseline is None else baseline.reward,
            greedy_num_tokens=None if baseline is None else len(baseline.token_ids),
            greedy_truncated=baseline is not None and baseline.truncated,
        )

    async def samples(
        self, request_id: str, prompt: Prompt, token_ids: list[int], params: SamplingParams
    ) -> tuple[list[Sample], float, float]:
        """Generate and grade one prompt's completions; returns them with the seconds of each."""
        started = time.perf_counter()
        with self.generating, self._trace.span("engine", request_id):
            completions = await self._engine.generate(request_id, token_ids, params)
        generated = time.perf_counter()
        samples = [
            Sample(
                token_ids=completion.token_ids,
                sampler_logp=completion.logp,
                token_versions=completion.token_versions,
                text=self._tokenizer.decode(completion.token_ids, skip_special_tokens=True),
                finish_reason=completion.finish_reason,
            )
            for completion in completions
        ]
        with self.grading, self._trace.span("graders", request_id):
            grades = await self._grader.grade(prompt, [s.text for s in samples], [s.truncated for s in samples])
        for sample, grade in zip(samples, grades, strict=True):
            sample.grade = grade
        return samples, generated - started, time.perf_counter() - generated

    async def score(self, group: Group) -> None:
        """Have the teacher, where there is one, score a group's responses."""
        if self._teacher is None:
            return
        with self.grading, self._trace.span("teacher", f"t{group.ticket}"):
            scores = await together(*(self._teacher.score(group.prompt_token_ids, s.token_ids) for s in group.samples))
        for sample, teacher_logp in zip(group.samples, scores, strict=True):
            sample.teacher_logp = teacher_logp


async def together(*work: Coroutine[Any, Any, T]) -> list[T]:
    """The results in order; the first failure ends the rest and is raised."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def group_seed(seed: int, number: int, prompt_id: str) -> int:
    """The sampling seed of a group: the same for a run's seed, the group's number and its prompt on every machine."""
    digest = hashlib.blake2b(f"{seed}/{number}/{prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
