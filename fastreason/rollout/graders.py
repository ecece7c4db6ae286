"""Grades responses in processes that can be killed: a hanging or crashing answer costs its deadline, never the run.

A grader is a fresh Python process (started by command, not forked: no CUDA, no threads, no re-import of the caller's
main module) that speaks MessagePack over a socket pair. It takes one message at a time, the texts of one prompt, and
answers each text as it is done, so the deadline holds for each response. The pool's side is one thread per grader,
which kills and replaces it at the deadline. The deadline counts time in which the grader could work: one that was stopped,
or got no core, is replaced and its response graded again. Nothing is judged here: what a text is worth is in
`fastreason.rewards`.
"""

import asyncio
import contextlib
import json
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import TypeVar

import msgspec

from fastreason.config import RewardConfig
from fastreason.errors import RewardError
from fastreason.rewards import REWARDS, resolve_rewards
from fastreason.rollout.deadline import Deadline, FrozenError, LateError
from fastreason.rollout.grader_process import GraderReply, GraderRequest
from fastreason.types import Grade, Prompt

log = logging.getLogger(__name__)
_T = TypeVar("_T")

START_TIMEOUT_S = 120.0
_SOURCE = (
    "import sys, json, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[1]); "
    "from fastreason.rollout.grader_process import run_grader; run_grader(int(sys.argv[2]), int(sys.argv[3]))"
)


class _DiedError(Exception):
    """The grader's end of the socket closed."""


# How often a response is tried: a crash is most likely its own doing, a stopped grader is not.
TRIES: dict[type[Exception], int] = {_DiedError: 2, FrozenError: 4}


class _Grader:
    """The pool's handle on one grader process: used by one thread at a time, except for `abandon`."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._unwanted = False

    def start(self) -> None:
        """Start the process and wait until it has loaded the rewards; raises `RewardError` when it cannot."""
        ours, theirs = socket.socketpair()
        # A frozen grader must not block us in the middle of a message either.
        limit = struct.pack("ll", int(self.config.deadline_s) + 1, 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        arguments = [json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
        # Graders read hostile text: they get no key of ours. One thread each: there are as many as the config says.
        keys = {name for name in os.environ if name.startswith("FASTREASON_") and name.endswith("_KEY")}
        environment = {name: value for name, value in os.environ.items() if name not in keys}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SOURCE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,
            )
        if self._unwanted:
            self._kill()
        self._channel = Connection(ours.detach())
        try:
            self._send(self.config.model_dump_json().encode())
            reply = self.receive(START_TIMEOUT_S)
        except (_DiedError, LateError, FrozenError) as error:
            self.stop()
            what = "ended" if isinstance(error, _DiedError) else f"was not ready after {START_TIMEOUT_S:g} s"
            raise RewardError(
                f"a grader process {what} while it loaded reward.functions={list(self.config.functions)}; its own "
                "message, if any, is on stderr. Import the reward's module in a Python shell to see why."
            ) from error
        if reply.error is not None:
            self.stop()
            raise RewardError(f"a grader process could not load the rewards: {reply.error}")

    def send(self, request: GraderRequest) -> None:
        self._send(msgspec.msgpack.encode(request))

    def receive(self, timeout_s: float) -> GraderReply:
        """The next reply; raises as its `Deadline` says where none comes, and `_DiedError` when the process is gone."""
        if self._channel is None or self.process is None:
            raise _DiedError
        deadline = Deadline(self.process.pid, timeout_s)
        try:
            while not self._channel.poll(deadline.next_look_s):
                late = deadline.look()
                if late is not None and not self._channel.poll(0):
                    raise late
            return msgspec.msgpack.decode(self._channel.recv_bytes(), type=GraderReply)
        except (EOFError, OSError, msgspec.DecodeError) as error:
            raise _DiedError from error

    def stop(self) -> None:
        """Kill the process and what a user function started in it; when this returns it is gone."""
        self._kill()
        if self.process is not None:
            self.process.wait()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def abandon(self) -> None:
        """Kill the process now and any that would follow; the thread that uses it finds it dead."""
        self._unwanted = True
        self._kill()

    @property
    def alive(self) -> bool:
        return self.process is not None and self._channel is not None and self.process.poll() is None

    def _kill(self) -> None:
        # Until it has been waited for, its number names no other group.
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _send(self, message: bytes) -> None:
        if self._channel is None:
            raise _DiedError
        try:
            self._channel.send_bytes(message)
        except OSError as error:
            raise _DiedError from error


class GraderPool:
    """Grader processes shared by all tasks of an asyncio loop: `async with GraderPool(config.reward) as pool`.

    `num_graded`, `num_timeouts` (responses killed at the deadline) and `num_deaths` (grader processes that died by
    themselves, or were stopped by somebody) count since the start. The reward model is not asked here; see
    `fastreason.rollout.reward_model`.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Look up the reward functions; raises `ConfigError` as `resolve_rewards` does. Starts nothing yet."""
        self.config = config
        self.spec = resolve_rewards(config)
        self.num_graded = 0
        self.num_timeouts = 0
        self.num_deaths = 0
        self._graders = [_Grader(config) for _ in range(config.workers if self.spec.functions else 0)]
        self._idle: queue.SimpleQueue[_Grader] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._roll_call = threading.Lock()
        self._started = False
        self._closed = False
        # These threads also start the graders: a child that is to die with its parent dies with its parent *thread*.
        self._threads = ThreadPoolExecutor(max(1, len(self._graders)), thread_name_prefix="grader")

    async def __aenter__(self) -> "GraderPool":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start all graders and wait until they have loaded the rewards; raises `RewardError` when one cannot."""
        try:
            await self._in_threads([partial(self._start, grader) for grader in self._graders])
        except BaseException:
            await self.close()
            raise
        self._started = True

    async def grade(self, prompt: Prompt, texts: Sequence[str], truncated: Sequence[bool] | None = None) -> list[Grade]:
        """Grade the responses to one prompt, in their order; `truncated` marks those cut off at the token limit.

        A response past `reward.deadline_s` is wrong and marked `timed_out`. One whose grader died or was stopped is tried
        again, at most TRIES times, then wrong. Raises `RewardError` where a user function raises or returns something that
        is not finite.
        """
        cut_off = list(truncated) if truncated is not None else [False] * len(texts)
        if len(cut_off) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(cut_off)} truncated flags")
        assert self._started or self._closed, "start the pool first: async with GraderPool(config) as pool"
        if not texts or not self.spec.functions:
            return [self.spec.combine({}) for _ in texts]
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        size = -(-len(clean) // len(self._graders))
        pieces = [
            GraderRequest(prompt, clean[start : start + size], cut_off[start : start + size])
            for start in range(0, len(clean), size)
        ]
        graded = await self._in_threads([partial(self._grade, piece) for piece in pieces])
        return [grade for piece in graded for grade in piece]

    async def self_test(self) -> str:
        """Grade a known sum on every grader and return a sentence with the time it took; raises `RewardError`.

        Where `math` is not among the rewards it only checks that every grader answers.
        """
        started = time.perf_counter()
        modules = {name for names in await self.loaded_modules() for name in names}
        took_ms = (time.perf_counter() - started) * 1e3
        if "torch" in modules and all(name in REWARDS for name in self.spec.functions):
            raise RewardError("a grader loaded torch, which no built-in reward imports: reinstall math-verify.")
        num_graders = len(self._graders)
        if set(self.spec.functions) != {"math"}:
            return f"{num_graders} grader(s) answer within {took_ms:.0f} ms"
        prompt = Prompt(id="self-test", text="What is 3 + 4?", answer="7")
        started = time.perf_counter()
        grades = await self.grade(prompt, ["3 + 4 = 7", "3 + 4 = 8"] * num_graders)
        took_ms = (time.perf_counter() - started) * 1e3
        if [grade.correct for grade in grades] != [True, False] * num_graders:
            raise RewardError(f"the graders misjudge 3 + 4: {grades}. Reinstall math-verify.")
        return f"{num_graders} grader(s) judge 3 + 4 = 7 right and 3 + 4 = 8 wrong within {took_ms:.0f} ms"

    async def loaded_modules(self) -> list[list[str]]:
        """The names of the modules that each grader has loaded."""
        (modules,) = await self._in_threads([self._loaded_modules])
        return modules

    @property
    def num_alive(self) -> int:
        """Grader processes that run."""
        return sum(grader.alive for grader in self._graders)

    @property
    def pids(self) -> list[int]:
        """Process ids of the graders that run."""
        return [grader.process.pid for grader in self._graders if grader.process is not None and grader.alive]

    async def close(self) -> None:
        """Kill the graders; afterwards none of their processes is left. May be called twice."""
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        self._closed = True
        for grader in self._graders:
            grader.abandon()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for grader in self._graders:
            grader.stop()

    async def _in_threads(self, calls: Sequence[Callable[[], _T]]) -> list[_T]:
        if self._closed:
            raise RewardError("the grader pool is closed")
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.gather(*[loop.run_in_executor(self._threads, call) for call in calls])
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise RewardError("the grader pool was closed while it graded") from None
            raise

    def _start(self, grader: _Grader) -> None:
        grader.start()
        self._idle.put(grader)

    def _grade(self, request: GraderRequest) -> list[Grade]:
        grader = self._idle.get()
        try:
            return self._grade_on(grader, request)
        except BaseException:
            # Its answers to what was left of this request must not be taken for answers to the next.
            grader.stop()
            raise
        finally:
            self._idle.put(grader)
            if not grader.alive and not self._closed:
                with contextlib.suppress(RuntimeError):
                    self._threads.submit(self._revive)

    def _grade_on(self, grader: _Grader, request: GraderRequest) -> list[Grade]:
        """Grade in order on one grader, replacing it as often as needed; runs in a thread."""
        assert request.prompt is not None
        grades: list[Grade] = []
        lost: Counter[tuple[int, type[Exception]]] = Counter()
        while len(grades) < len(request.texts):
            done = len(grades)
            try:
                if not grader.alive:
                    grader.start()
                grader.send(GraderRequest(request.prompt, request.texts[done:], request.truncated[done:]))
                while len(grades) < len(request.texts):
                    reply = grader.receive(self.config.deadline_s)
                    if reply.error is not None:
                        raise RewardError(reply.error)
                    grades.append(self.spec.combine(reply.parts))
            except LateError:
                grader.stop()
                self._count("num_timeouts")
                log.warning(
                    "grading a response to %r took longer than reward.deadline_s=%g: wrong (%d so far); it ends %r",
                    *(request.prompt.id, self.config.deadline_s, self.num_timeouts, request.texts[len(grades)][-80:]),
                )
                grades.append(self.spec.wrong(timed_out=True))
            except (_DiedError, FrozenError) as error:
                grader.stop()
                if self._closed:
                    raise RewardError("the grader pool was closed while it graded") from None
                self._count("num_deaths")
                kind = type(error)
                lost[len(grades), kind] += 1
                if lost[len(grades), kind] == TRIES[kind]:
                    log.warning(
                        "a response to %r %s its grader %d times: wrong; it ends %r",
                        *(request.prompt.id, "killed" if kind is _DiedError else "froze", TRIES[kind]),
                        request.texts[len(grades)][-80:],
                    )
                    grades.append(self.spec.wrong())
        self._count("num_graded", len(grades))
        return grades

    def _revive(self) -> None:
        """Replace a dead grader ahead of the next request; whoever takes it first would do the same."""
        for _ in self._graders:
            try:
                grader = self._idle.get_nowait()
            except queue.Empty:
                return
            try:
                if not grader.alive and not self._closed:
                    grader.start()
            except RewardError as error:
                log.warning("a grader could not be replaced: %s", error)
            finally:
                self._idle.put(grader)

    def _loaded_modules(self) -> list[list[str]]:
        with self._roll_call:
            graders = [self._idle.get() for _ in self._graders]
            try:
                return [self._modules_of(grader) for grader in graders]
            finally:
                for grader in graders:
                    self._idle.put(grader)

    def _modules_of(self, grader: _Grader) -> list[str]:
        try:
            if not grader.alive:
                grader.start()
            grader.send(GraderRequest())
            return grader.receive(START_TIMEOUT_S).modules
        except (_DiedError, LateError, FrozenError):
            grader.stop()
            raise RewardError("a grader process does not answer; see stderr for its own message") from None

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            setattr(self, name, getattr(self, name) + by)
