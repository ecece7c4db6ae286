"""A producer over a real socket, with an engine, graders and prompts whose every move the test knows."""

import asyncio
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from fastreason.config import parse_config
from fastreason.exchange import write_weights
from fastreason.rollout.books import Books
from fastreason.rollout.client import ProducerClient
from fastreason.rollout.fake import FakeEngine
from fastreason.rollout.producer import Producer
from fastreason.rollout.spool import decode_state
from fastreason.types import Grade, Prompt, WeightUpdate

EVAL_PROMPTS = [Prompt(id=f"e{i}", text="held out", answer=str(i)) for i in range(4)]


def make_config(batch_size=2, steps=10, staleness=1, max_running=256, **rollout):
    raw = {
        "model": {"path": "none"},
        "data": {"task": "chain_sum", "max_prompt_tokens": 5},
        "eval": {"num_prompts": 4, "samples_per_prompt": 3, "max_running": max_running},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 4, "max_staleness": staleness, **rollout},
        "train": {"steps": steps, "prompts_per_step": batch_size},
    }
    return parse_config(raw)


class Engine(FakeEngine):
    """Writes down what it is asked; requests in `held` wait, those in `failing` fail."""

    def __init__(self):
        super().__init__([5, 6, 7], eos_token_id=1)
        self.asked, self.held, self.failing = [], set(), {}
        self.versions = []
        self.start_error = None
        self.closed = False

    async def start(self):
        if self.start_error is not None:
            raise self.start_error

    async def generate(self, request_id, prompt_token_ids, params):
        self.asked.append(request_id)
        self.versions.append(self.version)
        while request_id in self.held:
            await asyncio.sleep(0.002)
        if request_id in self.failing:
            raise self.failing[request_id]
        return await super().generate(request_id, prompt_token_ids, params)

    async def close(self):
        self.closed = True


class Grader:
    """A response is right when it has an even number of tokens; every prompt adds a timeout."""

    num_timeouts = 0

    async def grade(self, prompt, texts, truncated):
        self.num_timeouts += 1
        return [Grade(reward=float(len(t.split())), correct=len(t.split()) % 2 == 0) for t in texts]


class Cursor:
    """p0, p1, p2, ... without end."""

    epoch = 0

    def __init__(self):
        self.position = 0

    def next(self):
        self.position += 1
        return Prompt(id=f"p{self.position - 1}", text="x", metadata={"position": self.position - 1})

    def state(self):
        return {"position": self.position}

    def load_state(self, state):
        self.position = state["position"]


class Tokenizer:
    def decode(self, token_ids, skip_special_tokens=False):
        return " ".join(map(str, token_ids))


def render(prompt):
    return [ord(char) for char in prompt.id][:4]


class Run:
    """A producer in a thread of its own, and the trainer's client in the test's."""

    def __init__(self, folder, config, render=render, run_dir=None, **options):
        self.engine, self.grader = Engine(), Grader()
        self.folder, self.run_dir = folder, run_dir or folder
        self.interrupted = False
        self.books = Books(config, Cursor(), render, 8, self.run_dir, self.folder / "spool")
        self.producer = Producer(
            config, self.engine, self.grader, self.books, EVAL_PROMPTS, Tokenizer(), render, 8, self.run_dir, **options
        )
        self.socket_path = f"{folder}/s"
        self.client = None

    def connect(self):
        return ProducerClient(self.socket_path, 20.0, 20.0, lambda: self.interrupted)

    def disconnect(self):
        """As a trainer that dies: no Stop."""
        if self.client is not None:
            self.client._connection.close()
        self.client = None

    def wait_until(self, condition):
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.002)

    def publish(self, version):
        """As a trainer that has trained one batch more."""
        return self.client.publish(self.weights(version), version * self.producer._config.train.prompts_per_step)

    def weights(self, version):
        path = self.folder / f"w{version}.safetensors"
        digest = write_weights(path, {"w": torch.full((3,), float(version))})
        return WeightUpdate(path=str(path), version=version, checksum=digest.hexdigest(), num_bytes=12)


@contextmanager
def running(config, render=render, prepare=lambda run: None, run_dir=None, **options):
    with tempfile.TemporaryDirectory(prefix="fr-") as folder:
        run = Run(Path(folder), config, render, run_dir, **options)
        prepare(run)
        thread = threading.Thread(target=lambda: asyncio.run(run.producer.serve(run.socket_path)), daemon=True)
        thread.start()
        try:
            run.client = run.connect()
            yield run
            if run.client is not None:
                run.client.stop()
        finally:
            run.engine.held.clear()
            run.disconnect()
            thread.join(timeout=10)
        assert not thread.is_alive(), "the producer did not end with its trainer"
        assert run.engine.closed


def tickets(batch):
    return [group.ticket for group in batch.groups]


def ids(batch):
    return [group.prompt.id for group in batch.groups]


def again(state):
    """The prompts that a state brings back, by ticket: finished or to be generated again."""
    books = decode_state(state)
    prompts = {entry.ticket: entry.prompt.id for entry in [*books.unfinished, *books.finished]}
    return [prompts[ticket] for ticket in sorted(prompts)]
