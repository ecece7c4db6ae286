"""The production scheduler in virtual time: the real loop, client, producer, books and admission; scripted durations.

Only three things take time: a token step of the engine, the updater's update, and a publication's two halves (writing,
while the engine generates, and loading, in a pause of it). Everything else, messages and packing too, takes none: what
is measured is the order in which things happen.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
import statistics
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from fastreason_kernels import PolicyLossOutput
from overlap_clock import VirtualTime

from fastreason.algorithms import resolve_algorithm
from fastreason.checkpoint import CheckpointStore
from fastreason.config import Config, parse_config
from fastreason.data import PromptCursor
from fastreason.loop import Loop, Parts
from fastreason.packing import MicroBatch
from fastreason.ranks import Ranks
from fastreason.rollout.books import Books
from fastreason.rollout.client import ProducerClient
from fastreason.rollout.producer import Producer
from fastreason.types import Completion, Grade, LoadReport, Prompt, SamplingParams, WeightUpdate
from fastreason.update.updater import UpdateResult

ALLOWED = 1.02  # T_async over its bound
MEAN_TOKENS, MAX_TOKENS, SIGMA = 64, 512, 1.0  # of a lognormal length, cut off
NUM_PROMPTS = 100
PATIENCE_S = 1000.0  # many times the longest batch; the producer's word of what it waits for never ends

Line = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A run in which an update takes `train_s` and, with S = 0, a batch's generation `ratio` times that.

    `cost` says how long a token step takes. "constant": as where memory bandwidth rules (a GPU's decoding), with places for
    one batch and a queue behind them, so that generation ahead takes from what is needed first as much as it can.
    "proportional" to the responses that run: as where arithmetic rules (a CPU), with places for everything admitted, so that
    responses slow each other down.
    """

    ratio: float
    staleness: int
    cost: Literal["constant", "proportional"] = "constant"
    lengths: Literal["fixed", "lognormal"] = "fixed"
    steps: int = 200
    prompts: int = 8
    samples: int = 4
    max_running_groups: int = 0
    train_s: float = 10.0
    write_s: float = 0.5
    load_s: float = 0.5
    token_s: float = 0.0  # a token step with a whole batch running; 0: from `ratio` and the mean length

    @property
    def batch(self) -> int:
        """Responses of a batch."""
        return self.prompts * self.samples

    def config(self) -> Config:
        raw = {
            "model": {"path": "none"},
            "data": {"task": "chain_sum"},
            "rollout": {
                "samples_per_prompt": self.samples,
                "max_new_tokens": MAX_TOKENS,
                "max_staleness": self.staleness,
                "max_running_groups": self.max_running_groups,
                "update_mode": "in_flight",
            },
            "algorithm": {"name": "grpo"},
            "train": {"steps": self.steps, "prompts_per_step": self.prompts},
        }
        return parse_config(raw)


@dataclass
class Request:
    """A group in the engine: `num_left` of its responses are unfinished."""

    num_left: int
    done: asyncio.Future[None]


@dataclass
class Response:
    """One sample of `length` tokens; `versions` has an entry for each token so far."""

    length: int
    request: Request
    versions: list[int] = field(default_factory=list)


class ScriptedEngine:
    """Continuous batching: first come, first served into a fixed number of places, a token a step for all that run."""

    name = "scripted"

    def __init__(self, case: Case) -> None:
        self._case = case
        self._places = case.batch if case.cost == "constant" else case.batch * (case.staleness + 1)
        self._token_s = case.token_s or case.ratio * case.train_s / MEAN_TOKENS
        self._waiting: deque[Response] = deque()
        self._running: list[Response] = []
        self._paused = False
        self._changed, self._between_steps = asyncio.Event(), asyncio.Event()
        self.version = 0

    async def start(self) -> None:
        self._stepping = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._stepping.cancel()

    async def adopt(self, update: WeightUpdate | None) -> None:
        raise NotImplementedError("nothing dies here")

    async def score(self, token_ids: list[int]) -> list[float]:
        raise NotImplementedError("nothing is scored here")

    async def sleep(self) -> float:
        raise NotImplementedError("it shares no device")

    async def wake(self) -> float:
        return 0.0  # it never sleeps

    def figures(self) -> dict[str, float]:
        return {}

    async def generate(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> list[Completion]:
        request = Request(params.n, asyncio.get_running_loop().create_future())
        responses = [Response(self._length(params, index), request) for index in range(params.n)]
        self._waiting.extend(responses)
        self._changed.set()
        await request.done
        return [
            Completion(
                token_ids=[7] * response.length,
                logp=[-1.0] * response.length,
                finish_reason="stop",
                token_versions=response.versions,
            )
            for response in responses
        ]

    async def load_weights(self, update: WeightUpdate) -> LoadReport:
        """Pause after the token step under way, keep what runs, load, go on."""
        self._paused = True
        self._changed.set()
        await self._between_steps.wait()
        await asyncio.sleep(self._case.load_s)
        self.version = update.version
        self._paused = False
        self._changed.set()
        seconds = {"pause_s": self._case.load_s, "load_s": self._case.load_s}
        return LoadReport(version=update.version, checksum="", num_tensors=1, held_bytes=0, **seconds)

    def _length(self, params: SamplingParams, index: int) -> int:
        if self._case.lengths == "fixed":
            return MEAN_TOKENS
        rng = random.Random(f"{params.seed}/{index}")
        drawn = rng.lognormvariate(math.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA)
        return max(1, min(round(drawn), params.max_new_tokens))

    async def _run(self) -> None:
        while True:
            while self._waiting and len(self._running) < self._places:
                self._running.append(self._waiting.popleft())
            if self._paused or not self._running:
                self._changed.clear()
                self._between_steps.set()
                await self._changed.wait()
                continue
            self._between_steps.clear()
            share = len(self._running) / self._case.batch if self._case.cost == "proportional" else 1.0
            await asyncio.sleep(self._token_s * share)
            for response in self._running:
                response.versions.append(self.version)
                if len(response.versions) == response.length:
                    response.request.num_left -= 1
                    if not response.request.num_left:
                        response.request.done.set_result(None)
            self._running = [response for response in self._running if len(response.versions) < response.length]


class ScriptedTrainer:
    """Stands for the updater and the publisher: their work is time that passes."""

    name, rank, num_ranks = "scripted", 0, 1

    def __init__(self, case: Case, time: VirtualTime) -> None:
        self._case, self._time = case, time

    def update(self, batches: list[MicroBatch], spec: Any, temperature: float, denominator: float) -> UpdateResult:
        self._time.sleep(self._case.train_s)
        return UpdateResult([output_of(batch) for batch in batches], loss=0.0, grad_norm=1.0, lr=1e-6, applied=True)

    def logprobs(self, batches: list[MicroBatch], spec: Any, temperature: float) -> list[torch.Tensor]:
        return [torch.zeros(len(batch.ids_N)) for batch in batches]

    def skip(self) -> UpdateResult:
        return UpdateResult([], loss=0.0, grad_norm=0.0, lr=1e-6, applied=True, empty=True)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())

    def write(self, source: Any, version: int) -> WeightUpdate:
        self._time.sleep(self._case.write_s)
        return WeightUpdate(path="", version=version, checksum="", num_bytes=0)

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def output_of(batch: MicroBatch) -> PolicyLossOutput:
    """Figures of the right shape, without a meaning."""
    values = torch.zeros(len(batch.ids_N))
    flags = torch.ones(len(batch.ids_N), dtype=torch.bool)
    columns = {"logp": values - 1, "entropy": values, "kl": values, "ratio": values + 1}
    return PolicyLossOutput(loss_sum=torch.zeros(()), **columns, clipped=~flags, computed=flags)


class EqualGrades:
    """Every response is worth the same, which leaves packing next to nothing to do."""

    num_timeouts = 0

    async def grade(self, prompt: Prompt, texts: Sequence[str], truncated: Sequence[bool]) -> list[Grade]:
        return [Grade(reward=1.0, correct=True) for _ in texts]


class NoText:
    """A tokenizer."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return ""


class Lines:
    """A metrics log in memory."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def write(self, line: Line) -> None:
        self.lines.append(line)


def simulate(case: Case) -> list[Line]:
    """Run the case; returns the lines that the loop logs, a step each, whose seconds are virtual."""
    time, metrics = VirtualTime(), Lines()
    with tempfile.TemporaryDirectory(prefix="fr-sim-") as folder:
        config, run_dir = case.config(), Path(folder)

        async def serve() -> None:
            prompts = [Prompt(id=f"p{number}", text="") for number in range(NUM_PROMPTS)]
            books = Books(config, PromptCursor(prompts, 0), render, NUM_PROMPTS, run_dir, spool_dir=None)
            engine = ScriptedEngine(case)
            producer = Producer(config, engine, EqualGrades(), books, [], NoText(), render, NUM_PROMPTS, run_dir)
            await producer.serve("virtual")

        def train() -> None:
            with patch("fastreason.rollout.client._connect", lambda *_: time.loop.connect()):
                client = ProducerClient("virtual", timeout_s=PATIENCE_S, startup_timeout_s=PATIENCE_S)
            try:
                Loop(make_parts(config, case, time, client, metrics, run_dir)).run()
            finally:
                client.stop()

        time.run(serve, train)
    return metrics.lines


def render(prompt: Prompt) -> list[int]:
    return [5]


def make_parts(
    config: Config, case: Case, time: VirtualTime, client: ProducerClient, metrics: Any, run_dir: Path
) -> Parts:
    trainer: Any = ScriptedTrainer(case, time)
    return Parts(
        config=config,
        algorithm=resolve_algorithm(config),
        updater=trainer,
        ranks=Ranks(),
        publisher=trainer,
        checkpoints=CheckpointStore(run_dir, 1, keep_best=False),
        run_dir=run_dir,
        layout="padded",
        pad_token_id=0,
        stop_requested=lambda: False,
        rollouts=client,
        metrics=metrics,
    )


def mean(lines: list[Line], key: str) -> float:
    return statistics.fmean(line[key] for line in lines)


@functools.cache
def on_policy(case: Case) -> tuple[Case, tuple[Line, ...]]:
    """The case with S = 0 and its lines; token steps are such that a mean batch takes `ratio * train_s`."""
    case = replace(case, staleness=0, max_running_groups=0)
    lines = simulate(case)
    wanted_s, took_s = case.ratio * case.train_s, mean(lines, "time/generate_s")
    if not math.isclose(took_s, wanted_s, rel_tol=1e-6):
        # A batch lasts as long as its longest response, or as all its tokens; known only after a run.
        case = replace(case, token_s=wanted_s / took_s * wanted_s / MEAN_TOKENS)
        lines = simulate(case)
    return case, tuple(lines)


def measure(case: Case) -> dict[str, Any]:
    """A row: g, t, s of the S = 0 run, the case's mean step from its very first on, and whether it keeps max(g, t) + s."""
    sync_case, sync = on_policy(replace(case, staleness=0, max_running_groups=0))
    lines = simulate(replace(case, token_s=sync_case.token_s))
    g_s, t_s, s_s = (mean(list(sync), f"time/{name}_s") for name in ("generate", "train", "publish"))
    took_s = mean(lines, "time/step_s")
    bound_s = max(g_s, t_s) + s_s
    staleness = max(line["rollout/staleness_max"] for line in lines)
    return {
        **{key: value for key, value in asdict(case).items() if key in ("ratio", "cost", "lengths", "steps")},
        "max_running_groups": case.max_running_groups,
        "batch": f"{case.prompts} x {case.samples}",
        "S": case.staleness,
        "g_s": g_s,
        "t_s": t_s,
        "s_s": s_s,
        "T_sync_s": mean(list(sync), "time/step_s"),
        "T_async_s": took_s,
        "bound_s": bound_s,
        "efficiency": (g_s + t_s - took_s) / min(g_s, t_s),
        "staleness_max": int(staleness),
        "ok": took_s <= ALLOWED * bound_s and staleness <= case.staleness,
    }
