"""The producer over a real socket, with an engine, graders and prompts whose every move the test knows."""

import asyncio
import json
import math
import statistics
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import torch

from fastreason.config import parse_config
from fastreason.errors import EngineError, InterruptedWaitError, PeerLostError
from fastreason.exchange import write_weights
from fastreason.ledger import audit_ledger, read_ledger
from fastreason.rollout import wire
from fastreason.rollout.books import Books
from fastreason.rollout.client import ProducerClient
from fastreason.rollout.fake import FakeEngine
from fastreason.rollout.producer import Producer
from fastreason.rollout.sampling import group_seed
from fastreason.rollout.spool import decode_state
from fastreason.types import Grade, Prompt, WeightUpdate

pytestmark = pytest.mark.timeout(60)
EVAL_PROMPTS = [Prompt(id=f"e{i}", text="held out", answer=str(i)) for i in range(4)]


def make_config(batch_size=2, steps=10, staleness=1, **rollout):
    raw = {
        "model": {"path": "none"},
        "data": {"task": "chain_sum", "max_prompt_tokens": 5},
        "eval": {"num_prompts": 4, "samples_per_prompt": 3},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 4, "max_staleness": staleness, **rollout},
        "train": {"steps": steps, "prompts_per_step": batch_size},
    }
    return parse_config(raw)


class Engine(FakeEngine):
    """Writes down what it is asked; requests in `held` wait, those in `failing` fail."""

    def __init__(self):
        super().__init__([5, 6, 7], eos_token_id=1)
        self.asked, self.held, self.failing = [], set(), {}
        self.start_error = None
        self.closed = False

    async def start(self):
        if self.start_error is not None:
            raise self.start_error

    async def generate(self, request_id, prompt_token_ids, params):
        self.asked.append(request_id)
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


def test_it_says_what_it_has():
    with running(make_config()) as run:
        assert (run.client.ready.engine, run.client.ready.num_train_prompts) == ("fake", 8)
        assert run.client.ready.num_eval_prompts == 4


def test_strictly_on_policy_is_one_batch_at_a_time_from_the_newest_weights():
    with running(make_config(batch_size=3, staleness=0)) as run:
        run.client.start(0, 0, None)
        for version in range(4):
            batch = run.client.next_batch()
            assert tickets(batch) == [3 * version, 3 * version + 1, 3 * version + 2]
            assert ids(batch) == [f"p{ticket}" for ticket in tickets(batch)]
            assert {v for g in batch.groups for s in g.samples for v in s.token_versions} == {version}
            assert len(run.engine.asked) == 3 * version + 3
            run.publish(version + 1)


def test_groups_carry_what_was_sampled_and_how_it_was_graded():
    with running(make_config(staleness=0)) as run:
        run.client.start(0, 0, None)
        batch = run.client.next_batch()
    group = batch.groups[1]
    assert group.prompt == Prompt(id="p1", text="x", metadata={"position": 1})
    assert group.prompt_token_ids == render(group.prompt)
    assert group.version_issued == 0 and len(group.samples) == 2
    for sample in group.samples:
        num = len(sample.token_ids)
        assert sample.text == " ".join(map(str, sample.token_ids))
        assert len(sample.sampler_logp) == len(sample.token_versions) == num
        assert sample.grade == Grade(reward=float(num), correct=num % 2 == 0)
    assert batch.figures["reward/timeouts"] == 2 and batch.figures["rollout/long_prompts"] == 0


def test_a_greedy_response_more_gives_its_reward_alone():
    """Asked at temperature 0, graded, and not among the samples."""
    asked = []

    def watch(run):
        generate = run.engine.generate

        async def note(request_id, prompt_token_ids, params):
            asked.append((request_id, params.n, params.temperature))
            (first, *rest) = await generate(request_id, prompt_token_ids, params)
            if params.temperature:
                return [first, *rest]
            return [msgspec.structs.replace(first, token_ids=[5] * 4, logp=[0.0] * 4, token_versions=[0] * 4)]

        run.engine.generate = note

    with running(make_config(staleness=0), prepare=watch, greedy=True) as run:
        run.client.start(0, 0, None)
        batch = run.client.next_batch()
    assert sorted(asked) == [("t0", 2, 1.0), ("t0greedy", 1, 0.0), ("t1", 2, 1.0), ("t1greedy", 1, 0.0)]
    assert [group.greedy_reward for group in batch.groups] == [4.0, 4.0]
    assert [len(group.samples) for group in batch.groups] == [2, 2]


def test_no_greedy_response_is_asked_for_where_none_is_wanted():
    with running(make_config(staleness=0)) as run:
        run.client.start(0, 0, None)
        batch = run.client.next_batch()
    assert run.engine.asked == ["t0", "t1"]
    assert [group.greedy_reward for group in batch.groups] == [None, None]


class Teacher:
    """Says -(position in the sequence) of each response token; fails for the prompts that it is told."""

    def __init__(self, failing=()):
        self.failing, self.asked, self.open = failing, [], False

    async def start(self):
        self.open = True

    async def score(self, prompt_token_ids, token_ids):
        self.asked.append((list(prompt_token_ids), list(token_ids)))
        if prompt_token_ids in self.failing:
            raise EngineError("teacher at http://t: it is gone")
        return [-float(len(prompt_token_ids) + place) for place in range(len(token_ids))]

    async def close(self):
        self.open = False


def test_a_teacher_scores_what_is_trained_on_and_only_that():
    teacher = Teacher()

    def reject(group):
        return "constant" if group.ticket == 0 else None

    with running(make_config(staleness=0), teacher=teacher, reject=reject) as run:
        run.client.start(0, 0, None)
        batch = run.client.next_batch()
        assert teacher.open
    assert not teacher.open
    assert tickets(batch) == [1, 2]
    for group in batch.groups:
        for sample in group.samples:
            first = len(group.prompt_token_ids)
            assert sample.teacher_logp == [-float(first + place) for place in range(len(sample.token_ids))]
            assert (group.prompt_token_ids, sample.token_ids) in teacher.asked
    assert len(teacher.asked) == 4


def test_a_teacher_that_is_gone_is_the_reason_that_is_told():
    with (
        running(make_config(staleness=0), teacher=Teacher(failing=[render(Prompt(id="p1", text=""))])) as run,
        pytest.raises(EngineError, match="teacher at http://t: it is gone"),
    ):
        run.client.start(0, 0, None)
        run.client.next_batch()


def test_the_double_buffer_generates_the_next_batch_during_the_update():
    with running(make_config(batch_size=2, staleness=1)) as run:
        run.client.start(0, 0, None)
        run.wait_until(lambda: len(run.engine.asked) == 4)
        assert tickets(run.client.next_batch()) == [0, 1]
        time.sleep(0.05)
        assert len(run.engine.asked) == 4, "more than S + 1 batches before the first update"
        run.publish(1)
        run.wait_until(lambda: len(run.engine.asked) == 6)
        batch = run.client.next_batch()
        assert tickets(batch) == [2, 3]
        assert {group.oldest_version for group in batch.groups} == {0}
        run.publish(2)
        assert [group.version_issued for group in run.client.next_batch().groups] == [1, 1]


def test_a_batch_is_answered_when_its_last_group_comes():
    with running(make_config(batch_size=2, staleness=0), prepare=lambda run: run.engine.held.add("t1")) as run:
        run.client.start(0, 0, None)
        run.wait_until(lambda: len(run.engine.asked) == 2)
        threading.Timer(0.1, run.engine.held.clear).start()
        started = time.monotonic()
        assert tickets(run.client.next_batch()) == [0, 1]
        assert time.monotonic() - started > 0.05


def test_publishing_answers_with_what_the_engine_holds():
    with running(make_config()) as run:
        update = run.weights(7)
        report = run.client.publish(update, 0)
        assert (report.version, report.checksum, report.num_tensors) == (7, update.checksum, 1)
        assert run.engine.version == 7


def test_weights_that_arrive_changed_are_a_failure():
    with running(make_config()) as run:
        update = run.weights(1)
        write_weights(Path(update.path), {"w": torch.zeros(3)})
        with pytest.raises(EngineError, match="checksum"):
            run.client.publish(update, 0)


def test_no_more_groups_run_at_once_than_allowed():
    config = make_config(batch_size=4, staleness=1, max_running_groups=3)
    with running(config, prepare=lambda run: run.engine.held.update(f"t{i}" for i in range(8))) as run:
        run.client.start(0, 0, None)
        run.wait_until(lambda: len(run.engine.asked) == 3)
        run.engine.held.discard("t1")
        run.wait_until(lambda: len(run.engine.asked) == 4)
        time.sleep(0.03)
        assert run.engine.asked == ["t0", "t1", "t2", "t3"]
        run.engine.held.clear()
        assert len(run.client.next_batch().groups) == 4


def test_the_last_step_leaves_nothing_running():
    with running(make_config(batch_size=2, steps=3, staleness=3)) as run:
        run.client.start(0, 0, None)
        seen = []
        for version in range(3):
            seen += tickets(run.client.next_batch())
            run.publish(version + 1)
        assert sorted(seen) == list(range(6)) and len(run.engine.asked) == 6


# Evaluation


def test_an_evaluation_writes_every_response_and_counts_right():
    with running(make_config()) as run:
        result = run.client.evaluate("before")
        rows = [json.loads(line) for line in (run.run_dir / "eval-before.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [p.id for p in EVAL_PROMPTS for _ in range(3)]
    assert all(row["correct"] == (row["num_tokens"] % 2 == 0) for row in rows)
    assert [row["answer"] for row in rows[::3]] == ["0", "1", "2", "3"]
    shares = [statistics.fmean(row["correct"] for row in rows[i : i + 3]) for i in range(0, 12, 3)]
    assert 0 < statistics.fmean(shares) < 1, "the example shows nothing"
    assert result.accuracy == pytest.approx(statistics.fmean(shares))
    assert result.standard_error == pytest.approx(statistics.stdev(shares) / math.sqrt(4))
    assert result.reward_mean == pytest.approx(statistics.fmean(row["num_tokens"] for row in rows))
    assert (result.num_samples, result.num_prompts, result.version) == (12, 4, 0)
    assert result.num_tokens == sum(row["num_tokens"] for row in rows)
    assert result.truncated_share == pytest.approx(statistics.fmean(r["finish_reason"] == "length" for r in rows))


def test_an_evaluation_asks_the_same_before_and_after():
    with running(make_config()) as run:
        before = run.client.evaluate("before")
        run.client.start(0, 0, None)
        run.client.next_batch()
        run.publish(1)
        after = run.client.evaluate("after")
        files = [(run.run_dir / f"eval-{name}.jsonl").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]
    assert (before.accuracy, before.version, after.version) == (after.accuracy, 0, 1)


# State: no prompt lost, none trained twice


def test_state_before_the_first_batch_holds_all_that_was_issued():
    with running(make_config(batch_size=2, staleness=1)) as run:
        run.client.start(0, 0, None)
        state = run.client.save_state(0, settle=False)
    assert again(state) == ["p0", "p1", "p2", "p3"]
    books = decode_state(state)
    assert books.cursor == {"position": 4} and books.trained == 0


def test_state_holds_a_batch_that_was_handed_out_and_not_trained():
    with running(make_config(batch_size=2, staleness=1)) as run:
        run.client.start(0, 0, None)
        assert ids(run.client.next_batch()) == ["p0", "p1"]
        assert again(run.client.save_state(0, settle=False)) == ["p0", "p1", "p2", "p3"]


def test_state_after_a_step_holds_what_was_issued_since():
    with running(make_config(batch_size=2, staleness=1)) as run:
        run.client.start(0, 0, None)
        run.client.next_batch()
        run.publish(1)
        state = run.client.save_state(2, settle=False)
        assert again(state) == ["p2", "p3", "p4", "p5"]
        # And with the next batch handed out, but not trained.
        assert ids(run.client.next_batch()) == ["p2", "p3"]
        assert again(run.client.save_state(2, settle=False)) == ["p2", "p3", "p4", "p5"]
        run.publish(2)
        assert again(run.client.save_state(4, settle=False)) == ["p4", "p5", "p6", "p7"]


def test_a_batch_given_up_while_waiting_is_in_the_state():
    with running(make_config(batch_size=2, staleness=0), prepare=lambda run: run.engine.held.add("t1")) as run:
        run.client.start(0, 0, None)
        run.interrupted = True
        with pytest.raises(InterruptedWaitError, match="generating"):
            run.client.next_batch()
        run.engine.held.clear()
        run.wait_until(lambda: not run.producer._tasks)
        assert again(run.client.save_state(0, settle=False)) == ["p0", "p1"]


def test_a_batch_answered_after_the_trainer_gave_up_is_in_the_state():
    with running(make_config(batch_size=2, staleness=0)) as run:
        run.client.start(0, 0, None)
        run.client._connection.send(wire.NextBatch())
        run.wait_until(lambda: [g.ticket for g in run.books._handed_out] == [0, 1])
        # Its answer is passed over.
        assert again(run.client.save_state(0, settle=False)) == ["p0", "p1"]


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("stop_after", [0, 1, 3])
@pytest.mark.parametrize("handed_out", [False, True])
def test_a_resumed_run_trains_every_prompt_once(staleness, stop_after, handed_out, tmp_path):
    config = make_config(batch_size=2, steps=6, staleness=staleness)
    trained = []
    with running(config, run_dir=tmp_path) as run:
        run.client.start(0, 0, None)
        for version in range(stop_after):
            trained += ids(run.client.next_batch())
            run.publish(version + 1)
        if handed_out:
            run.client.next_batch()
        state = run.client.save_state(len(trained), settle=False)
    waiting = again(state)
    with running(config, run_dir=tmp_path) as run:
        run.publish(stop_after) if stop_after else None
        run.client.start(stop_after, len(trained), state)
        for version in range(stop_after, 6):
            batch = run.client.next_batch()
            assert all(version - group.oldest_version <= staleness for group in batch.groups)
            if version == stop_after:
                assert tickets(batch) == [2 * stop_after, 2 * stop_after + 1]
                assert ids(batch) == waiting[:2], "a prompt issued before goes first"
            trained += ids(batch)
            run.publish(version + 1)
    assert sorted(trained) == sorted(f"p{i}" for i in range(12))
    audit = audit_ledger(read_ledger(tmp_path))
    assert (audit.num_issued, audit.num_trained, audit.lost, audit.twice) == (12, 12, [], [])


def test_prompts_of_an_earlier_process_that_wait_still_are_in_the_next_state(tmp_path):
    with running(make_config(batch_size=2, staleness=2), run_dir=tmp_path) as run:
        run.client.start(0, 0, None)
        run.client.next_batch()
        run.publish(1)
        state = run.client.save_state(2, settle=False)
    assert again(state) == [f"p{i}" for i in range(2, 8)]
    with running(make_config(batch_size=2, staleness=0), run_dir=tmp_path) as run:
        run.client.start(1, 2, state)
        saved = run.client.save_state(2, settle=False)
        assert again(saved) == [f"p{i}" for i in range(2, 8)] and decode_state(saved).cursor == {"position": 8}


# A producer that dies and another that takes its place


class Succession:
    """Producers one after another on one socket, spool and run folder; `die` ends the one that serves, as SIGKILL would."""

    def __init__(self, folder, config):
        self.folder, self.config, self.runs, self.loops = Path(folder), config, [], []

    def begin(self, prepare=lambda run: None):
        run = Run(self.folder, self.config)
        run.engine.adopted = []

        async def adopt(update):
            run.engine.adopted.append(update)

        run.engine.adopt = adopt
        prepare(run)

        async def serve():
            self.loops.append(asyncio.get_running_loop())
            await run.producer.serve(run.socket_path)

        def body():
            with suppress(RuntimeError):  # the loop was stopped under it
                asyncio.run(serve())

        self.runs.append(run)
        threading.Thread(target=body, daemon=True).start()
        return run

    def die(self):
        self.loops[-1].call_soon_threadsafe(self.loops[-1].stop)


@pytest.mark.parametrize("moment", ["generating", "training", "publishing", "published"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_producer_that_dies_is_followed_by_one_that_goes_on(moment, staleness):
    config = make_config(batch_size=2, steps=4, staleness=staleness)
    with tempfile.TemporaryDirectory(prefix="fr-") as folder:
        line = Succession(folder, config)
        first = line.begin(lambda run: run.engine.held.add("t3") if moment == "generating" else None)
        client = ProducerClient(first.socket_path, 20.0, 20.0, may_rejoin=True)
        client.start(0, 0, None)
        trained = []

        def succeed():
            line.die()
            line.begin()

        for version in range(4):
            if version == 1 and moment == "generating":
                threading.Timer(0.2, succeed).start()
            batch = client.next_batch()
            assert all(version - g.oldest_version <= staleness for g in batch.groups)
            trained += ids(batch)
            if version == 1 and moment == "training":
                succeed()
            update = first.weights(version + 1)
            if version == 1 and moment in ("publishing", "published"):
                load = first.engine.load_weights

                async def load_and_die(update, load=load):
                    if moment == "published":
                        first.producer._books.publish(update.version)
                    succeed()
                    await asyncio.sleep(10)

                first.engine.load_weights = load_and_die
            report = client.publish(update, 2 * version + 2)
            assert report.version == version + 1
        client.stop()
        audit = audit_ledger(read_ledger(line.folder))
        assert len(line.runs) == 2
        assert line.runs[1].engine.adopted[0] == (first.weights(1))
        assert sorted(trained) == [f"p{i}" for i in range(8)]
        assert (audit.num_trained, audit.lost, audit.twice) == (8, [], [])


def test_without_restarts_a_producer_that_dies_is_a_lost_peer():
    with tempfile.TemporaryDirectory(prefix="fr-") as folder:
        line = Succession(folder, make_config())
        run = line.begin(lambda run: run.engine.held.update(["t0", "t1", "t2", "t3"]))
        client = run.connect()
        client.start(0, 0, None)
        threading.Timer(0.1, line.die).start()
        with pytest.raises(PeerLostError, match="generating"):
            client.next_batch()


def test_a_checkpoint_waits_for_what_older_weights_still_generate():
    with running(make_config(batch_size=2, staleness=1), prepare=lambda run: run.engine.held.add("t3")) as run:
        run.client.start(0, 0, None)
        run.client.next_batch()
        run.publish(1)
        threading.Timer(0.2, run.engine.held.clear).start()
        state = decode_state(run.client.save_state(2, settle=True))
        assert {group.ticket for group in state.finished} >= {2, 3}


def test_groups_without_signal_are_dropped_and_replaced():
    reject = {0: "all_right", 3: "all_wrong"}
    with running(make_config(batch_size=2, staleness=0), reject=lambda g: reject.get(g.ticket)) as run:
        run.client.start(0, 0, None)
        batch = run.client.next_batch()
        assert (tickets(batch), batch.figures["rollout/dropped"]) == ([1, 2], 1)
        run.publish(1)
        batch = run.client.next_batch()
        assert (tickets(batch), batch.figures["rollout/dropped"]) == ([4, 5], 2)
        assert {group.version_issued for group in batch.groups} == {1}
        dropped = [(r["ticket"], r["reason"]) for r in read_ledger(run.run_dir) if r["event"] == "dropped"]
    assert dropped == [(0, "all_right"), (3, "all_wrong")]


def test_dropping_without_end_is_an_error_that_names_the_key():
    config = make_config(batch_size=2, staleness=0)
    algorithm = config.algorithm.model_copy(update={"max_refills": 3})
    config = config.model_copy(update={"algorithm": algorithm})
    with (
        running(config, reject=lambda group: "all_wrong") as run,
        pytest.raises(EngineError, match=r"algorithm\.max_refills=3: more than 6 groups were dropped"),
    ):
        run.client.start(0, 0, None)
        run.client.next_batch()


# Failures


def test_an_engine_that_fails_at_a_group_fails_the_next_batch():
    def fail(run):
        run.engine.failing["t1"] = EngineError("the engine broke")

    with (
        running(make_config(), prepare=fail) as run,
        pytest.raises(EngineError, match=r"^the engine broke$"),
    ):
        run.client.start(0, 0, None)
        run.client.next_batch()


def test_a_bug_at_a_group_names_the_group():
    def fail(run):
        run.engine.failing["t1"] = KeyError("choices")

    with (
        running(make_config(), prepare=fail) as run,
        pytest.raises(EngineError, match=r"group 1 \(p1\) failed: KeyError: 'choices'"),
    ):
        run.client.start(0, 0, None)
        run.client.next_batch()


@pytest.mark.parametrize("error", [EngineError("no room for the KV cache"), OSError("no room for the KV cache")])
def test_an_engine_that_does_not_start_is_told_to_the_trainer(error):
    def fail(run):
        run.engine.start_error = error

    with pytest.raises(EngineError, match="no room for the KV cache"), running(make_config(), prepare=fail):
        pass


def test_a_failed_evaluation_leaves_the_connection_usable():
    def fail(run):
        run.engine.failing["before0"] = EngineError("once")

    with running(make_config(), prepare=fail) as run:
        with pytest.raises(EngineError, match="once"):
            run.client.evaluate("before")
        run.engine.failing.clear()
        assert run.client.evaluate("before").num_prompts == 4


def test_it_ends_when_the_trainer_is_gone():
    with running(make_config(), prepare=lambda run: run.engine.held.add("t0")) as run:
        run.client.start(0, 0, None)
        run.disconnect()
        run.wait_until(lambda: run.engine.closed)


# Prompts and seeds


def long_when(bad):
    return lambda prompt: [1] * (6 if int(prompt.id[1:]) in bad else 5)


def test_long_prompts_are_passed_over_and_counted():
    with running(make_config(batch_size=2, staleness=0), render=long_when({0, 2, 3})) as run:
        run.client.start(0, 0, None)
        batch = run.client.next_batch()
        assert (ids(batch), tickets(batch), batch.figures["rollout/long_prompts"]) == (["p1", "p4"], [0, 1], 3)


def test_only_long_prompts_are_an_error_that_names_the_key():
    with (
        running(make_config(), render=long_when(range(100))) as run,
        pytest.raises(EngineError, match=r"data\.max_prompt_tokens=5: every one of the 8 training prompts is longer"),
    ):
        run.client.start(0, 0, None)


def batches_of(config, num=3, prepare=lambda run: None):
    groups = []
    with running(config, prepare=prepare) as run:
        run.client.start(0, 0, None)
        for version in range(num):
            groups += run.client.next_batch().groups
            run.publish(version + 1)
    return {group.ticket: (group.prompt.id, [s.token_ids for s in group.samples]) for group in groups}


def test_the_same_seed_gives_the_same_responses_whoever_is_late():
    def slow(run):
        run.engine.held.add("t0")
        threading.Timer(0.1, run.engine.held.clear).start()

    config = make_config(batch_size=2, staleness=0)
    expected = batches_of(config)
    assert batches_of(config, prepare=slow) == expected
    reseeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    assert batches_of(reseeded) != expected


def test_group_seeds_are_the_same_on_every_machine_and_differ():
    assert group_seed(0, 0, "p0") == 789005485
    seeds = {group_seed(s, n, p) for s in range(3) for n in range(20) for p in ("a", "b")}
    assert len(seeds) == 120 and all(0 <= seed < 2**31 for seed in seeds)
