"""The producer: its own process without a GPU, which turns prompts into finished, graded groups for the trainer.

It owns the engine client and the graders, keeps the books (`books.py`: admission, cursor, ledger, spool), and answers the
trainer's requests one connection at a time. What it refuses to do: anything with gradients, and any decision about an
algorithm.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from fastreason.config import Config
from fastreason.errors import FastreasonError
from fastreason.rollout import wire
from fastreason.rollout.books import Books
from fastreason.rollout.engine import Engine
from fastreason.rollout.evaluation import evaluate
from fastreason.rollout.sampling import Grader, Sampling, Teacher, Tokenizer, group_seed
from fastreason.trace import Trace
from fastreason.types import Group, Prompt, Sample, SamplingParams

log = logging.getLogger(__name__)

# What the timeline calls the time from the arrival of a request to its answer.
SPANS: dict[type[wire.Request], str] = {
    wire.Start: "start",
    wire.Rejoin: "rejoin",
    wire.NextBatch: "wait for groups",
    wire.Publish: "engines load weights",
    wire.Collected: "collected",
    wire.Evaluate: "evaluate",
    wire.SaveState: "save state",
}
SAY_S = 5.0  # between two words to a trainer that waits
# Counted since the start of the run, over resumes and restarts.
CUMULATIVE = (
    "reward/timeouts",
    "rollout/long_prompts",
    "rollout/dropped",
    "rollout/engine_restarts",
    "rollout/producer_restarts",
)


class Producer:
    """Serves one trainer. `render` turns a prompt into token ids; `reject` names the reason why a group is not trained on.

    greedy: a prompt is answered once more, with the likeliest token at each place, for its reward and length. teacher: scores
    the tokens of every response that is trained on. sleeps: the engine sleeps from the end of a batch until the weights that it
    makes; starts_asleep: and from its start until it is needed.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        grader: Grader,
        books: Books,
        eval_prompts: list[Prompt],
        tokenizer: Tokenizer,
        render: Callable[[Prompt], list[int]],
        num_train_prompts: int,
        run_dir: Path,
        on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
        on_ready: Callable[[], None] = lambda: None,
        reject: Callable[[Group], str | None] = lambda group: None,
        trace: Trace | None = None,
        greedy: bool = False,
        teacher: Teacher | None = None,
        sleeps: bool = False,
        starts_asleep: bool = False,
    ) -> None:
        self._teacher = teacher
        self._sleeps, self._starts_asleep = sleeps, starts_asleep
        self._sleep_s, self._asleep_since = 0.0, 0.0
        self._config, self._engine, self._grader, self._books = config, engine, grader, books
        self._eval_prompts, self._render = eval_prompts, render
        self._num_train_prompts, self._run_dir, self._on_progress = num_train_prompts, run_dir, on_progress
        self._on_ready, self._reject, self._trace = on_ready, reject, trace or Trace(None, "producer")
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sampling = Sampling(engine, grader, tokenizer, self._trace, greedy, teacher)
        self._failure: str | None = None
        self._lost: dict[str, str] = {}  # why each engine that is away is so, by its address
        self._num_timeouts = 0

    async def serve(self, socket_path: str) -> None:
        """Start the engine, wait for the trainer, answer it until it says Stop or closes its connection."""
        ended = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await self._converse(reader, writer)
            finally:
                writer.close()
                ended.set()

        starting = asyncio.create_task(self._start())
        self._started = starting
        server = await asyncio.start_unix_server(handle, socket_path)
        async with server:
            await ended.wait()
        for task in [starting, *self._tasks]:
            task.cancel()
        await asyncio.gather(starting, *self._tasks, return_exceptions=True)
        await self._engine.close()
        if self._teacher is not None:
            await self._teacher.close()

    async def _start(self) -> None:
        if self._teacher is not None:
            await self._teacher.start()
        await self._engine.start()
        if self._starts_asleep:
            await self._sleep()

    async def _sleep(self) -> None:
        """Have the engine make room for the trainer, where they take turns."""
        if self._sleeps:
            self._asleep_since = time.time()
            self._sleep_s = await self._engine.sleep()

    async def _wake(self) -> None:
        """Have it back for what is about to be asked."""
        self._note_woken(await self._engine.wake())

    def _note_woken(self, wake_s: float) -> None:
        if self._asleep_since:
            seconds = {"sleep_s": round(self._sleep_s, 4), "wake_s": round(wake_s, 4)}
            self._trace.complete("engine", "asleep", self._asleep_since, time.time(), **seconds)
            self._asleep_since = 0.0

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._started
            ready = wire.Ready(
                engine=self._engine.name,
                num_train_prompts=self._num_train_prompts,
                num_eval_prompts=len(self._eval_prompts),
            )
            self._on_ready()
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
        saying = asyncio.create_task(self._say_what_is_awaited(writer))
        try:
            with self._trace.span("producer", SPANS[type(request)]):
                answer = await self._answer_to(request)
        except FastreasonError as error:
            log.error("%s failed: %s", type(request).__name__, error)
            answer = wire.Failure(str(error))
        except Exception as error:
            log.exception("%s failed", type(request).__name__)
            answer = wire.Failure(f"the producer failed at {type(request).__name__}: {type(error).__name__}: {error}")
        finally:
            saying.cancel()
        with contextlib.suppress(ConnectionError), self._trace.span("producer", "answer"):
            writer.write(wire.encode(answer))
            await writer.drain()

    async def _answer_to(self, request: wire.Request) -> wire.Answer:
        match request:
            case wire.Start():
                self._engine.version = request.version
                self._books.start(request.version, request.trained, request.state)
                await self._wake()
                self._fill()
            case wire.Rejoin():
                await self._rejoin(request)
            case wire.NextBatch():
                return await self._next_batch()
            case wire.Publish():
                return await self._publish(request)
            case wire.Collected():
                self._books.collected()
                self._fill()
            case wire.Evaluate():
                return wire.Evaluated(await self._evaluate(request.name))
            case wire.SaveState():
                return wire.State(await self._save(request))
            case _:
                raise AssertionError(f"unexpected request {request}")
        return wire.Done()

    async def _say_what_is_awaited(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(SAY_S)
            with contextlib.suppress(ConnectionError):
                writer.write(wire.encode(wire.Waiting(self._awaited())))

    def _awaited(self) -> str:
        """Who is at work on what the trainer asked for, so that a wait that is too long can name them."""
        generating, grading = self._sampling.generating.num_inside, self._sampling.grading.num_inside
        parts = [f"the {self._engine.name} engine, which is lost ({reason})" for reason in self._lost.values()]
        if generating:
            parts.append(f"the {self._engine.name} engine's responses to {generating} prompt(s)")
        if grading:
            parts.append(f"the graders, or a teacher, with the responses to {grading} prompt(s)")
        return " and ".join(parts) or "nobody"

    async def _rejoin(self, request: wire.Rejoin) -> None:
        """Take the place of a producer that died; weights first: the engine may have been left amid an update."""
        await self._engine.adopt(request.update)
        self._engine.version = request.update.version if request.update is not None else request.version
        if request.started and not self._books.restart(request.version, request.trained, request.holding):
            raise FastreasonError(
                "the producer was started again and found nothing of what it had done: its spool is gone"
            )
        self._fill()

    def _fill(self) -> None:
        """Issue groups for as long as admission allows."""
        if self._failure is not None:
            return
        started = time.time()
        issued = list(self._books.issue())
        if issued:
            self._trace.complete("producer", "issue", started, time.time(), groups=len(issued))
        for ticket, prompt, token_ids in issued:
            task = asyncio.create_task(self._make_group(ticket, prompt, token_ids))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if (admission := self._books.admission) is not None:
            self._trace.counter("groups", running=admission.num_running, finished=admission.num_finished)

    async def _make_group(self, ticket: int, prompt: Prompt, token_ids: list[int]) -> None:
        assert self._books.admission is not None
        rollout = self._config.rollout
        params = SamplingParams(
            n=rollout.samples_per_prompt,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            seed=group_seed(self._config.run.seed, ticket, prompt.id),
        )
        version = self._books.admission.issued_at(ticket)
        try:
            group = await self._sampling.group(ticket, prompt, token_ids, params, version)
            if (reason := self._reject(group)) is None:
                await self._sampling.score(group)
                with self._trace.span("producer", "keep", ticket=ticket):
                    self._books.finish(group)
            else:
                self._drop(ticket, reason)
            self._fill()
        except FastreasonError as error:
            self._failure = self._failure or str(error)
        except Exception as error:
            log.exception("group %d failed", ticket)
            self._failure = self._failure or f"group {ticket} ({prompt.id}) failed: {type(error).__name__}: {error}"
        async with self._changed:
            self._changed.notify_all()

    def _drop(self, ticket: int, reason: str) -> None:
        limit = self._config.algorithm.max_refills * self._config.train.prompts_per_step
        if self._books.drop(ticket, reason) > limit:
            raise FastreasonError(
                f"algorithm.max_refills={self._config.algorithm.max_refills}: more than {limit} groups were dropped for one "
                f"batch (the last one: {reason}). The prompts are too easy or too hard for this model: choose others, raise "
                "rollout.samples_per_prompt or rollout.temperature, or set algorithm.filtered=zero."
            )

    async def _next_batch(self) -> wire.Batch:
        async with self._changed:
            while True:
                if self._failure is not None:
                    raise FastreasonError(self._failure)
                groups = self._books.take_batch()
                if groups is not None:
                    break
                await self._changed.wait()
        books = self._books
        books.count("reward/timeouts", self._grader.num_timeouts - self._num_timeouts)
        self._num_timeouts = self._grader.num_timeouts
        figures = {name: books.counters.get(name, 0.0) for name in CUMULATIVE} | self._engine.figures()
        seconds = {"generate_s": self._sampling.generating.take(), "grade_s": self._sampling.grading.take()}
        if self._sleeps:
            assert books.admission is not None and not books.admission.num_running, "put to sleep amid a response"
            await self._sleep()
            figures["time/sleep_s"] = self._sleep_s
        return wire.Batch(groups=groups, figures=figures, **seconds)

    async def _publish(self, request: wire.Publish) -> wire.Published:
        report = await self._engine.load_weights(request.update)
        self._note_woken(report.wake_s)
        self._books.publish(request.update.version)
        self._fill()
        async with self._changed:
            self._changed.notify_all()
        return wire.Published(report)

    async def _save(self, request: wire.SaveState) -> bytes:
        admission = self._books.admission
        async with self._changed:
            while request.settle and self._failure is None and admission is not None and not admission.is_settled():
                await self._changed.wait()
        return self._books.checkpoint(request.trained)

    def note(self, event: str, detail: str, address: str = "") -> None:
        """An event of the engine, of the one at `address` where there are several, for the ledger and the timeline."""
        self._books.note(event, detail=detail)
        self._trace.instant("engine", event, detail=detail)
        self._lost.pop(address, None)
        if event == "engine_lost":
            self._lost[address] = detail
            self._books.count("rollout/engine_restarts")

    async def _evaluate(self, name: str) -> Any:
        config = self._config
        await self._wake()
        params = SamplingParams(
            n=config.eval.samples_per_prompt,
            temperature=config.eval.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
        )

        async def sample(prompt: Prompt, token_ids: list[int], index: int) -> list[Sample]:
            seeded = msgspec.structs.replace(params, seed=group_seed(config.eval.seed, index, prompt.id))
            return (await self._sampling.samples(f"{name}{index}", prompt, token_ids, seeded))[0]

        result = await evaluate(
            self._eval_prompts,
            render=self._render,
            sample=sample,
            version=self._engine.version,
            temperature=config.eval.temperature,
            path=self._run_dir / f"eval-{name}.jsonl",
            max_running=config.eval.max_running,
            on_progress=lambda done, total: self._on_progress(f"evaluate ({name})", done, total),
        )
        self._sampling.generating.take(), self._sampling.grading.take()  # an evaluation's seconds are not a step's
        return result
