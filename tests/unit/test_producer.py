"""The producer over a real socket, with an engine, graders and prompts whose every move the test knows."""

import json
import math
import statistics
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
from producer_stage import EVAL_PROMPTS, ids, make_config, render, running, tickets

from fastreason.engine_clients import make_engine, say_of_one
from fastreason.errors import EngineError, StuckError
from fastreason.exchange import write_weights
from fastreason.rollout.sampling import group_seed
from fastreason.session import Session
from fastreason.trace import Rows, Trace, read_events
from fastreason.types import Grade, Prompt

pytestmark = pytest.mark.timeout(400)


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


def test_a_greedy_response_more_gives_its_reward_and_its_length():
    """Asked at temperature 0, graded, and not among the samples."""
    asked = []

    def watch(run):
        generate = run.engine.generate

        async def note(request_id, prompt_token_ids, params):
            asked.append((request_id, params.n, params.temperature))
            (first, *rest) = await generate(request_id, prompt_token_ids, params)
            if params.temperature:
                return [first, *rest]
            four = {"token_ids": [5] * 4, "logp": [0.0] * 4, "token_versions": [0] * 4}
            cut = "length" if request_id == "t1greedy" else "stop"
            return [msgspec.structs.replace(first, **four, finish_reason=cut)]

        run.engine.generate = note

    with running(make_config(staleness=0), prepare=watch, greedy=True) as run:
        run.client.start(0, 0, None)
        batch = run.client.next_batch()
    assert sorted(asked) == [("t0", 2, 1.0), ("t0greedy", 1, 0.0), ("t1", 2, 1.0), ("t1greedy", 1, 0.0)]
    assert [(g.greedy_reward, g.greedy_num_tokens) for g in batch.groups] == [(4.0, 4), (4.0, 4)]
    assert {g.ticket: g.greedy_truncated for g in batch.groups} == {0: False, 1: True}
    assert [len(group.samples) for group in batch.groups] == [2, 2]


def test_no_greedy_response_is_asked_for_where_none_is_wanted():
    with running(make_config(staleness=0)) as run:
        run.client.start(0, 0, None)
        batch = run.client.next_batch()
    assert run.engine.asked == ["t0", "t1"]
    assert [(g.greedy_reward, g.greedy_num_tokens) for g in batch.groups] == [(None, None), (None, None)]


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


def test_generation_goes_on_during_an_evaluation_which_has_a_limit_of_its_own():
    config = make_config(batch_size=2, staleness=1, max_running=3)
    held = {f"step-000001{i}" for i in range(4)} | {"t3"}
    with running(config, prepare=lambda run: run.engine.held.update(held)) as run:
        run.client.start(0, 0, None)
        run.wait_until(lambda: len(run.engine.asked) == 4)
        assert tickets(run.client.next_batch()) == [0, 1]
        run.publish(1)
        run.wait_until(lambda: len(run.engine.asked) == 6)
        answers = []
        evaluating = threading.Thread(target=lambda: answers.append(run.client.evaluate("step-000001")))
        evaluating.start()
        evaluated = lambda: [name for name in run.engine.asked if name.startswith("step")]  # noqa: E731
        run.wait_until(lambda: len(evaluated()) == 3)
        run.engine.held.discard("t3")
        run.wait_until(lambda: run.books.admission.num_finished == 4)
        time.sleep(0.03)
        assert len(evaluated()) == 3 and not answers, "three held-out prompts at a time, whatever the groups do"
        assert run.books.admission.num_running == 0, "held-out prompts take no group's place"
        run.engine.held.clear()
        evaluating.join(10)
        assert answers[0].num_prompts == 4 and answers[0].version == 1
        assert tickets(run.client.next_batch()) == [2, 3]


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


def test_a_wait_that_is_too_long_names_who_is_at_work(monkeypatch):
    monkeypatch.setattr("fastreason.rollout.producer.SAY_S", 0.1)
    with running(make_config(staleness=0), prepare=lambda run: run.engine.held.add("t1")) as run:
        run.client._timeout_s = 1.0
        run.client.start(0, 0, None)
        with pytest.raises(StuckError, match=r"It last said that it waits for the fake engine's responses to 1 prompt"):
            run.client.next_batch()
        run.producer.note("engine_lost", "its connection broke")
        assert run.producer._awaited().startswith("the fake engine, which is lost (its connection broke) and the fake")
        run.producer.note("engine_back", "1 s")
        assert "lost" not in run.producer._awaited()


def test_of_several_engines_those_are_named_that_are_away():
    def prepare(run):
        for url, event in (("http://a", "lost"), ("http://b", "lost"), ("http://c", "lost"), ("http://b", "back")):
            say_of_one(run.producer.note, url, f"engine_{event}", "its connection broke")

    with running(make_config(), prepare=prepare) as run:
        lost = [f"the fake engine, which is lost (http://{name}: its connection broke)" for name in "ac"]
        assert run.producer._awaited() == " and ".join(lost)


def test_one_that_the_launcher_has_given_up_is_known_to_its_client(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTREASON_ENGINE_KEY", "key")
    session = Session(
        folder=str(tmp_path), run_dir="", model_dir="", exchange_dir="", device="cpu", attention="", liger=False,
        resume=False, engine_urls=("http://127.0.0.1:1", "http://127.0.0.1:2"),
    )  # fmt: skip
    fleet = make_engine(session, make_config(), lambda *event: None)
    assert [engine.is_given_up for engine in fleet._engines] == [False, False]
    session.given_up_file("engine-1").touch()
    assert [engine.is_given_up for engine in fleet._engines] == [False, True]


def test_the_timeline_has_what_it_did_and_what_it_waited_for(tmp_path):
    trace = Trace(tmp_path, "producer")
    with running(make_config(staleness=0), trace=trace) as run:
        run.engine.held.add("t1")
        run.client.start(0, 0, None)
        threading.Timer(0.2, run.engine.held.clear).start()
        run.client.next_batch()
        run.publish(1)
        run.client.save_state(2, settle=False)
    trace.close()
    spans = [event for _, event in read_events(tmp_path / "trace" / "producer.jsonl") if event.cat == "producer"]
    asked = [span.name for span in spans if span.name not in ("issue", "keep", "answer")]
    assert asked == ["start", "wait for groups", "engines load weights", "save state"]
    assert sum(span.name == "answer" for span in spans) == len(asked)
    assert [span.args["groups"] for span in spans if span.name == "issue"] == [2, 2]
    assert [span.args["ticket"] for span in spans if span.name == "keep"][:2] == [0, 1]
    (waited,) = [span for span in spans if span.name == "wait for groups"]
    assert waited.dur >= 150_000, "until the last group came"
    rows = Rows(nesting=True)
    assert {rows.place(span.ts, span.end) for span in sorted(spans, key=lambda s: (s.ts, -s.dur))} == {0}


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
