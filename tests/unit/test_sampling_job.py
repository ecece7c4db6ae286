"""A sampling job with the fake engine: what is asked, with which seeds, what an interruption leaves, and the line about it."""

import asyncio

import pytest

from fastreason.errors import EngineError
from fastreason.rollout.fake import FakeEngine
from fastreason.rollout.sample_store import SampleStore
from fastreason.rollout.sampling_job import Ask, EngineSampler, Reply, Tally, missing_asks, run_job
from fastreason.types import Completion, Grade, Prompt, SamplingParams

PROMPTS = [Prompt(id=f"p{number}", text=f"problem {number}", answer="7") for number in range(5)]


class Letters:
    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(chr(96 + token) for token in token_ids if token or not skip_special_tokens)


class Grader:
    """An even number of letters is right; knows who was graded."""

    num_timeouts = 0

    def __init__(self):
        self.seen = []

    async def grade(self, prompt, texts, truncated):
        self.seen.append((prompt.id, texts, truncated))
        await asyncio.sleep(0)
        return [Grade(reward=float(len(text) % 2 == 0), correct=len(text) % 2 == 0) for text in texts]


def sampler(seed=0):
    engine = FakeEngine(list(range(1, 27)), eos_token_id=0)
    params = SamplingParams(n=5, temperature=1.0, max_new_tokens=6)
    return EngineSampler(engine, Letters(), lambda prompt: [ord(c) for c in prompt.text], params, seed)


def sample(folder, num_samples, seed=0, concurrency=3, answer=None, on_response=lambda response: None):
    store = SampleStore(folder)
    try:
        asks = missing_asks(PROMPTS, num_samples, store)
        job = run_job(asks, answer or sampler(seed), Grader(), store, concurrency=concurrency, on_response=on_response)
        asyncio.run(job)
    finally:
        store.close()
        responses = sorted((store_line for store_line in read(folder)), key=lambda r: (r.id, r.sample))
    return responses


def read(folder):
    store = SampleStore(folder)
    found = [store.read(kept) for by_sample in store.kept.values() for kept in by_sample.values()]
    store.close()
    return found


class Words:
    """Token i is `vocabulary[i]`."""

    def __init__(self, *vocabulary):
        self.vocabulary = vocabulary

    def decode(self, token_ids, skip_special_tokens=False):
        special = ("<end>",) if skip_special_tokens else ()
        return "".join(self.vocabulary[token] for token in token_ids if self.vocabulary[token] not in special)


@pytest.mark.parametrize(
    ("prompt", "generated", "text"),
    [
        (["ask", "<think>", "\n"], ["so", "</think>", "7", "<end>"], "<think>\nso</think>7"),
        (["ask", "<th", "ink>"], ["so", "<end>"], "<think>so"),
        (["ask", "<think>", "\n", "</think>", "\n"], ["7", "<end>"], "7"),
        (["<think>", "\n", "ask"], ["7"], "7"),
        (["ask", "<think>", "\n"], ["<end>"], ""),
        (["ask", "<think>", "\n"], ["<think>", "so"], "<think>so"),
    ],
)
def test_a_thought_that_the_prompt_opened_is_opened_in_the_text(tmp_path, prompt, generated, text):
    vocabulary = sorted({*prompt, *generated})

    class Engine:
        async def generate(self, request_id, prompt_token_ids, params):
            assert prompt_token_ids == [vocabulary.index(word) for word in prompt]
            ids = [vocabulary.index(word) for word in generated]
            zeros = [0] * len(ids)
            return [Completion(token_ids=ids, logp=[0.0] * len(ids), finish_reason="stop", token_versions=zeros)]

    grader, store = Grader(), SampleStore(tmp_path)
    render = lambda _: [vocabulary.index(word) for word in prompt]  # noqa: E731
    answer = EngineSampler(Engine(), Words(*vocabulary), render, SamplingParams(n=1, max_new_tokens=8), 0)
    asks = [Ask(prompt=PROMPTS[0], sample=0)]
    asyncio.run(run_job(asks, answer, grader, store, concurrency=1, on_response=lambda response: None))
    found = store.read(store.kept["p0"][0])
    store.close()
    assert found.response == text and grader.seen == [("p0", [text], [False])]
    assert found.num_tokens == len(generated), "what was generated is counted"


def test_every_response_is_asked_once_and_graded_by_its_own_problem(tmp_path):
    heard = []
    responses = sample(tmp_path, 4, on_response=heard.append)
    assert [(r.id, r.sample) for r in responses] == [(f"p{i}", j) for i in range(5) for j in range(4)]
    assert sorted(heard, key=lambda r: (r.id, r.sample)) == responses
    assert len({r.response for r in responses}) >= 10, "each response has a seed of its own"
    for r in responses:
        assert r.problem == f"problem {r.id[1]}" and r.answer == "7"
        assert r.correct is (len(r.response) % 2 == 0) and r.reward == float(r.correct)
        assert r.truncated is (r.finish_reason == "length") and r.num_tokens == len(r.response) + (not r.truncated)
    assert {r.truncated for r in responses} == {True, False}


def test_a_response_depends_on_seed_problem_and_number_alone(tmp_path):
    whole = sample(tmp_path / "whole", 4)
    assert sample(tmp_path / "other-order", 4, concurrency=1) == whole
    sample(tmp_path / "grown", 1)
    assert sample(tmp_path / "grown", 4) == whole, "more samples later are the same ones"
    assert sample(tmp_path / "fewer", 2) == [r for r in whole if r.sample < 2]
    assert sample(tmp_path / "seed", 4, seed=1) != whole


def test_what_an_engine_gave_before_it_failed_is_kept_and_not_asked_again(tmp_path):
    class Failing:
        def __init__(self):
            self.inner, self.num = sampler(), 0

        async def reply(self, ask):
            self.num += 1
            if self.num > 7:
                raise EngineError("it is gone")
            return await self.inner.reply(ask)

    with pytest.raises(EngineError, match="it is gone"):
        sample(tmp_path / "a", 4, answer=Failing())
    there = read(tmp_path / "a")
    assert 4 <= len(there) <= 7
    asked = []

    class Counting:
        async def reply(self, ask):
            asked.append((ask.prompt.id, ask.sample))
            return await sampler().reply(ask)

    finished = sample(tmp_path / "a", 4, answer=Counting())
    assert finished == sample(tmp_path / "b", 4)
    assert sorted(asked) == sorted({(r.id, r.sample) for r in finished} - {(r.id, r.sample) for r in there})


def test_grading_knows_what_was_cut_off(tmp_path):
    grader, store = Grader(), SampleStore(tmp_path)

    class Fixed:
        async def reply(self, ask):
            return Reply(text=f"r{ask.sample}", finish_reason=["length", "stop", None][ask.sample])

    asks = [Ask(prompt=PROMPTS[0], sample=number) for number in range(3)]
    asyncio.run(run_job(asks, Fixed(), grader, store, concurrency=1, on_response=lambda response: None))
    assert grader.seen == [("p0", ["r0"], [True]), ("p0", ["r1"], [False]), ("p0", ["r2"], [False])]
    store.close()


def test_the_line_says_shares_speed_and_the_time_left(tmp_path):
    now, said = [0.0], []
    tally = Tally(100, said.append, interval_s=10.0, clock=lambda: now[0])
    now[0] = 50.0
    tally.begin()
    responses = sample(tmp_path, 4)
    for number, response in enumerate([*responses, *responses], start=1):
        now[0] = 50.0 + number
        tally.add(response)
    assert len(said) == 4, "one line in ten seconds"
    tokens = 2 * sum(r.num_tokens for r in responses)
    right = sum(r.correct for r in responses) / 20
    assert tally.line().startswith(f"40/100 responses  right {right:.3f}  cut off ")
    assert f"{tokens / 40:.0f} tok/s" in tally.line() and tally.line().endswith("1:00 left")
    assert "left" not in said[0] and "left" in said[1], "ten responses say nothing of the rest"
    assert tally.figures() == {"seconds": 40.0, "tok_per_s": round(tokens / 40, 1)}
