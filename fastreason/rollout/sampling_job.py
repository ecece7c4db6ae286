"""Many responses to many problems: each is asked for once, graded, and written down as it finishes.

It owns what is asked, in which order and with which seed, and the count of what came back; `fastreason distill` and `fastreason
eval` sample with it. It refuses to know who answers, and what the responses are for.
"""

import asyncio
import re
import signal
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from fastreason.rollout.engine import Engine
from fastreason.rollout.sample_store import Reply
from fastreason.rollout.sampling import Grader, Tokenizer, group_seed, together
from fastreason.types import Grade, Prompt, SamplingParams

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
ENOUGH = 20  # responses after which their speed says something
THINK = "<think>"
OPENED = re.compile(rf"{THINK}\s*\Z")
PROMPT_END = 16  # tokens in which OPENED fits, also of a tokenizer that spells it out


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Response number `sample` to a prompt, wanted; `recorded` is the response where it exists already."""

    prompt: Prompt
    sample: int
    recorded: Reply | None = None


class Store(Protocol[R_co]):
    """Where responses go; `kept` has the numbers of those to each problem's id that are there."""

    @property
    def kept(self) -> Mapping[str, Container[int]]: ...

    def record(self, prompt: Prompt, sample: int, reply: Reply, grade: Grade) -> R_co: ...


class Counted(Protocol):
    """What the count of a job needs to know of a response."""

    @property
    def correct(self) -> bool: ...
    @property
    def truncated(self) -> bool: ...
    @property
    def num_tokens(self) -> int | None: ...


class Sampler(Protocol):
    """Whoever answers: an engine of ours, a server, or a file."""

    async def reply(self, ask: Ask) -> Reply: ...


class EngineSampler:
    """Answers with an engine: one request a response, each with a seed made of the job's, the problem's id and its number.

    So a response does not depend on what else was asked, and a job that was interrupted gets the same ones. Where the prompt
    ends in `<think>`, as the templates of some reasoning models do, the text begins with it: a text that ends a thought has
    its beginning too, whatever template it is trained on with.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        render: Callable[[Prompt], list[int]],
        params: SamplingParams,
        seed: int,
    ) -> None:
        self._engine, self._tokenizer, self._render = engine, tokenizer, render
        self._params, self._seed, self._num_asked = params, seed, 0

    async def reply(self, ask: Ask) -> Reply:
        self._num_asked += 1
        seed = group_seed(self._seed, ask.sample, ask.prompt.id)
        params = msgspec.structs.replace(self._params, n=1, seed=seed)
        prompt_token_ids = self._render(ask.prompt)
        (completion,) = await self._engine.generate(f"s{self._num_asked}", prompt_token_ids, params)
        text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return Reply(
            text=self._opening(prompt_token_ids, text) + text,
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            logp_sum=sum(completion.logp),
        )

    def _opening(self, prompt_token_ids: list[int], text: str) -> str:
        if not text.strip() or text.lstrip().startswith(THINK):
            return ""
        opened = OPENED.search(self._tokenizer.decode(prompt_token_ids[-PROMPT_END:]))
        return opened.group() if opened else ""


class RecordedSampler:
    """Answers with what the data holds."""

    async def reply(self, ask: Ask) -> Reply:
        assert ask.recorded is not None
        return ask.recorded


def missing_asks(prompts: Iterable[Prompt], num_samples: int, store: Store[Any]) -> Iterator[Ask]:
    """Responses 0 to `num_samples - 1` of each prompt that the store does not hold, one prompt after the other."""
    for prompt in prompts:
        held = store.kept.get(prompt.id, ())
        yield from (Ask(prompt=prompt, sample=number) for number in range(num_samples) if number not in held)


async def run_job(
    asks: Iterable[Ask],
    sampler: Sampler,
    grader: Grader,
    store: Store[R],
    *,
    concurrency: int,
    on_response: Callable[[R], None],
) -> None:
    """Have every ask answered, graded and stored, `concurrency` at a time; the first failure ends the job and is raised."""
    waiting = iter(asks)

    async def work() -> None:
        for ask in waiting:
            reply = await sampler.reply(ask)
            if reply.refusal is None:
                (grade,) = await grader.grade(ask.prompt, [reply.text], [reply.truncated])
            else:
                grade = Grade(reward=0.0, correct=False)
            on_response(store.record(ask.prompt, ask.sample, reply, grade))

    await together(*(work() for _ in range(concurrency)))


def cancel_on_signals(stopped_by: list[int]) -> None:
    """Have the first SIGINT or SIGTERM cancel the running task, after which everything is ended in order."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        if not stopped_by:
            print("stopping; what has been sampled is kept", file=sys.stderr, flush=True)
            task.cancel()
        stopped_by.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)


class Tally:
    """What a job has done since its start, and a line about it every `interval_s` seconds."""

    def __init__(
        self,
        total: int,
        say: Callable[[str], None],
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.num_done, self.num_right, self.num_truncated, self.num_tokens = total, 0, 0, 0, 0
        self.num_refused = 0
        self._say, self._interval_s, self._clock = say, interval_s, clock
        self._started = self._said = clock()

    @property
    def seconds(self) -> float:
        """Since the job began to wait for its first response."""
        return self._clock() - self._started

    def begin(self) -> None:
        """Count the time from here: whoever answers is ready."""
        self._started = self._said = self._clock()

    def add(self, response: Counted, refusal: str | None = None) -> None:
        """Count a response, or the `refusal` of whoever was asked; the first of those is said."""
        self.num_done += 1
        self.num_right += response.correct
        self.num_truncated += response.truncated
        self.num_tokens += response.num_tokens or 0
        self.num_refused += refusal is not None
        if refusal is not None and self.num_refused == 1:
            self._say(refusal)
        if self.num_done == self.total or self._clock() - self._said >= self._interval_s:
            self._said = self._clock()
            self._say(self.line())

    def line(self) -> str:
        """Counts, shares and speed of this start, and the time left at that speed."""
        seconds, num = max(self.seconds, 1e-9), max(self.num_done, 1)
        parts = [
            f"{self.num_done}/{self.total} responses",
            f"right {self.num_right / num:.3f}",
            f"cut off {self.num_truncated / num:.0%}",
        ]
        if self.num_refused:
            parts.append(f"refused {self.num_refused}")
        if self.num_tokens:
            parts.append(f"{self.num_tokens / seconds:.0f} tok/s")
        if self.num_done >= min(self.total, ENOUGH):
            parts.append(f"{_duration(seconds * (self.total - self.num_done) / num)} left")
        return "  ".join(parts)

    def figures(self) -> dict[str, Any]:
        """For a report: `seconds` and the tokens per second of this start."""
        rate = self.num_tokens / self.seconds if self.num_done and self.seconds else None
        return {"seconds": round(self.seconds, 3), "tok_per_s": round(rate, 1) if rate else None}


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
