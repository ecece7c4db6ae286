"""The producer: its own process without a GPU, which turns prompts into finished, graded groups for the trainer.

It owns admission, the prompt cursor, the engine client and the graders, and answers the trainer's requests one
connection at a time. What it refuses to do: anything with gradients, and any decision about an algorithm.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from fastreason.config import Config
from fastreason.errors import DataError, FastreasonError
from fastreason.rollout import wire
from fastreason.rollout.admission import Admission
from fastreason.rollout.busy import BusyClock
from fastreason.rollout.engine import Engine
from fastreason.rollout.evaluation import evaluate
from fastreason.types import Grade, Group, Prompt, Sample, SamplingParams

log = logging.getLogger(__name__)


class Grader(Protocol):
    """What the producer asks of the graders."""

    @property
    def num_timeouts(self) -> int: ...

    async def grade(self, prompt: Prompt, texts: Sequence[str], truncated: Sequence[bool]) -> list[Grade]: ...


class Cursor(Protocol):
    """An endless, seeded, resumable order of the training prompts."""

    def next(self) -> Prompt: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str: ...


class Producer:
    """Serves one trainer. `render` turns a prompt into token ids."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        grader: Grader,
        cursor: Cursor,
        eval_prompts: list[Prompt],
        tokenizer: Tokenizer,
        render: Callable[[Prompt], list[int]],
        num_train_prompts: int,
        run_dir: Path,
        on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    ) -> None:
        self._config, self._engine, self._grader, self._cursor = config, engine, grader, cursor
        self._eval_prompts, self._tokenizer, self._render = eval_prompts, tokenizer, render
        self._num_train_prompts, self._run_dir, self._on_progress = num_train_prompts, run_dir, on_progress
        self._admission: Admission | None = None
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._untrained: dict[int, Prompt] = {}  # every prompt issued and not yet known to be trained
        self._handed_out: list[int] = []  # tickets of the batch that the trainer works on
        self._again: deque[Prompt] = deque()  # prompts of an earlier process, to be issued first
        self._generating, self._grading = BusyClock(), BusyClock()
        self._failure: str | None = None
        self._num_long_prompts = 0

    async def serve(self, socket_path: str) -> None:
        """Start the engine, wait for the trainer, answer it until it says Stop or closes its connection."""
        ended = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await self._converse(reader, writer)
            finally:
                writer.close()
                ended.set()

        starting = asyncio.create_task(self._engine.start())
        self._started = starting
        server = await asyncio.start_unix_server(handle, socket_path)
        async with server:
            await ended.wait()
        for task in [starting, *self._tasks]:
            task.cancel()
        await asyncio.gather(starting, *self._tasks, return_exceptions=True)
        await self._engine.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._started
            ready = wire.Ready(
                engine=self._engine.name,
                num_train_prompts=self._num_train_prompts,
                num_eval_prompts=len(self._eval_prompts),
            )
            writer.write(wire.encode(ready))
        except Exception as error:
            known = isinstance(error, FastreasonError)
            if not known:
                log.exception("the %s engine did not start", self._engine.name)
            message = str(error) if known else f"the engine did not start: {type(error).__name__}: {error}"
            writer.write(wire.encode(wire.Failure(message)))
            await writer.drain()
            return
        await writer.drain()
        waiting: asyncio.Task[None] | None = None
        while (request := await wire.read_request(reader)) is not None and not isinstance(request, wire.Stop):
            # The trainer sends a new request before the answer to the last only when it was told to stop.
            if waiting is not None and not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            waiting = asyncio.create_task(self._answer(request, writer))
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def _answer(self, request: wire.Request, writer: asyncio.StreamWriter) -> None:
        answer: wire.Answer
        try:
            match request:
                case wire.Start():
                    self._start(request)
                    answer = wire.Done()
                case wire.NextBatch():
                    answer = await self._next_batch()
                case wire.Publish():
                    answer = await self._publish(request)
                case wire.Evaluate():
                    answer = wire.Evaluated(await self._evaluate(request.name))
                case wire.SaveState():
                    answer = wire.State(self._state(request.trained))
                case _:
                    raise AssertionError(f"unexpected request {request}")
        except FastreasonError as error:
            log.error("%s failed: %s", type(request).__name__, error)
            answer = wire.Failure(str(error))
        except Exception as error:
            log.exception("%s failed", type(request).__name__)
            answer = wire.Failure(f"the producer failed at {type(request).__name__}: {type(error).__name__}: {error}")
        with contextlib.suppress(ConnectionError):
            writer.write(wire.encode(answer))
            await writer.drain()

    def _start(self, request: wire.Start) -> None:
        if request.state is not None:
            self._cursor.load_state(request.state["cursor"])
            self._again.extend(msgspec.convert(request.state["again"], list[Prompt]))
        train = self._config.train
        self._engine.version = request.version
        self._admission = Admission(
            batch_size=train.prompts_per_step,
            max_staleness=self._config.rollout.max_staleness,
            total_groups=request.trained + (train.steps - request.version) * train.prompts_per_step,
            version=request.version,
            trained=request.trained,
        )
        self._fill()

    def _fill(self) -> None:
        """Issue groups for as long as admission allows."""
        admission = self._admission
        limit = self._config.rollout.max_running_groups
        while admission is not None and self._failure is None and admission.may_issue():
            if limit and admission.num_running >= limit:
                return
            prompt, token_ids = self._next_prompt()
            ticket = admission.issue()
            self._untrained[ticket] = prompt
            task = asyncio.create_task(self._make_group(ticket, prompt, token_ids))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next_prompt(self) -> tuple[Prompt, list[int]]:
        """The next prompt that is short enough; longer ones are passed over and counted."""
        limit = self._config.data.max_prompt_tokens
        for _ in range(self._num_train_prompts + len(self._again)):
            prompt = self._again.popleft() if self._again else self._cursor.next()
            token_ids = self._render(prompt)
            if len(token_ids) <= limit:
                return prompt, token_ids
            self._num_long_prompts += 1
        raise DataError(
            f"data.max_prompt_tokens={limit}: every one of the {self._num_train_prompts} training prompts is longer. "
            "Raise it, or shorten data.system_prompt and data.user_template."
        )

    async def _make_group(self, ticket: int, prompt: Prompt, token_ids: list[int]) -> None:
        assert self._admission is not None
        rollout = self._config.rollout
        params = SamplingParams(
            n=rollout.samples_per_prompt,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            seed=group_seed(self._config.run.seed, ticket, prompt.id),
        )
        try:
            samples, generate_s, grade_s = await self._sample(f"t{ticket}", prompt, token_ids, params)
            group = Group(
                ticket=ticket,
                prompt=prompt,
                prompt_token_ids=token_ids,
                samples=samples,
                version_issued=self._admission.issued_at(ticket),
                generate_s=generate_s,
                grade_s=grade_s,
            )
            self._admission.finish(group)
            self._fill()
        except FastreasonError as error:
            self._failure = self._failure or str(error)
        except Exception as error:
            log.exception("group %d failed", ticket)
            self._failure = self._failure or f"group {ticket} ({prompt.id}) failed: {type(error).__name__}: {error}"
        async with self._changed:
            self._changed.notify_all()

    async def _sample(
        self, request_id: str, prompt: Prompt, token_ids: list[int], params: SamplingParams
    ) -> tuple[list[Sample], float, float]:
        """Generate and grade one prompt's completions; returns them with the seconds of each."""
        started = time.perf_counter()
        with self._generating:
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
        with self._grading:
            grades = await self._grader.grade(prompt, [s.text for s in samples], [s.truncated for s in samples])
        for sample, grade in zip(samples, grades, strict=True):
            sample.grade = grade
        return samples, generated - started, time.perf_counter() - generated

    async def _next_batch(self) -> wire.Batch:
        assert self._admission is not None, "NextBatch before Start"
        self._forget_handed_out()
        async with self._changed:
            while True:
                if self._failure is not None:
                    raise FastreasonError(self._failure)
                groups = self._admission.take_batch()
                if groups is not None:
                    break
                await self._changed.wait()
        self._handed_out = [group.ticket for group in groups]
        return wire.Batch(
            groups=groups,
            generate_s=self._generating.take(),
            grade_s=self._grading.take(),
            num_grader_timeouts=self._grader.num_timeouts,
            num_long_prompts=self._num_long_prompts,
        )

    async def _publish(self, request: wire.Publish) -> wire.Published:
        report = await self._engine.load_weights(request.update)
        self._forget_handed_out()
        # A trainer that resumes publishes once before Start, which brings the version.
        if self._admission is not None:
            self._admission.publish(request.update.version)
            self._fill()
        async with self._changed:
            self._changed.notify_all()
        return wire.Published(report)

    async def _evaluate(self, name: str) -> Any:
        config = self._config
        params = SamplingParams(
            n=config.eval.samples_per_prompt,
            temperature=config.eval.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
        )

        async def sample(prompt: Prompt, token_ids: list[int], index: int) -> list[Sample]:
            seeded = msgspec.structs.replace(params, seed=group_seed(config.eval.seed, index, prompt.id))
            return (await self._sample(f"{name}{index}", prompt, token_ids, seeded))[0]

        result = await evaluate(
            self._eval_prompts,
            render=self._render,
            sample=sample,
            version=self._engine.version,
            temperature=config.eval.temperature,
            path=self._run_dir / f"eval-{name}.jsonl",
            on_progress=lambda done, total: self._on_progress(f"evaluate ({name})", done, total),
        )
        self._generating.take(), self._grading.take()  # an evaluation's seconds are not a step's
        return result

    def _state(self, trained: int) -> dict[str, Any]:
        """What a later process needs so that no issued prompt is lost: those not among the `trained` groups go again."""
        assert self._admission is not None, "SaveState before Start"
        if trained >= self._admission.num_taken:
            self._forget_handed_out()
        return {
            "cursor": self._cursor.state(),
            "again": msgspec.to_builtins([*self._untrained.values(), *self._again]),
            "trained": trained,
        }

    def _forget_handed_out(self) -> None:
        """The batch handed out last is trained: a trainer asks for the next one, or publishes, only then."""
        for ticket in self._handed_out:
            del self._untrained[ticket]
        self._handed_out = []


def group_seed(seed: int, number: int, prompt_id: str) -> int:
    """The sampling seed of a group: the same for a run's seed, the group's number and its prompt on every machine."""
    digest = hashlib.blake2b(f"{seed}/{number}/{prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
