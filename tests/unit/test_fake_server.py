"""The fake engine's server, a real process: its door, its tokens, its pauses, its weights, through the client of a run."""

import asyncio
import json
import time
from pathlib import Path

import aiohttp
import psutil
import pytest
import torch

from fastreason.config import Config, RolloutConfig
from fastreason.errors import EngineError
from fastreason.exchange import write_weights
from fastreason.rollout import fake_server
from fastreason.rollout.fake import FakeEngine
from fastreason.rollout.server import new_key
from fastreason.rollout.vllm import VllmEngine
from fastreason.types import SamplingParams, WeightUpdate

pytestmark = pytest.mark.timeout(400)

KEY = new_key()
TOKENS, EOS = list(range(3, 200)), 1
TOKEN_S = 0.03
PROMPT = [10, 20, 30]


def make_config(**rollout):
    rollout = {"engine": "fake", "startup_timeout_s": 20, **rollout}
    return Config.model_validate(
        {"model": {"path": "/m"}, "data": {}, "train": {"steps": 1, "prompts_per_step": 1}, "rollout": rollout}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exchange")


@pytest.fixture(scope="module")
def server(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_server, "read_tokens", lambda model_dir: (TOKENS, EOS))
        made = fake_server.make_server(
            make_config(fake_token_s=TOKEN_S, cores="0"),
            "/m",
            folder / "log",
            max_model_len=64,
            device="cpu",
            exchange_dir=str(folder),
            key=KEY,
        )
    child = made.start()
    yield made
    child.stop(grace_s=2)
    assert not psutil.pid_exists(child.process.pid)


def use(server, body, **keys):
    """Run `body(engine)` with a started client."""

    async def run():
        engine = VllmEngine(server.url, KEY, RolloutConfig(startup_timeout_s=20, **keys), name="fake")
        await engine.start()
        try:
            return await body(engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(run(), 30))


def publish(folder, version, value=1.0):
    path = folder / f"w{version}.safetensors"
    digest = write_weights(path, {"a": torch.full((3,), value), "b": torch.ones(2, 2, dtype=torch.bfloat16)})
    return WeightUpdate(path=str(path), version=version, checksum=digest.hexdigest(), num_bytes=digest.num_bytes)


def test_its_tokens_are_those_of_the_engine_in_process(server):
    params = SamplingParams(n=8, max_new_tokens=3, seed=5)
    found = use(server, lambda engine: engine.generate("a", PROMPT, params))
    assert found == asyncio.run(FakeEngine(TOKENS, EOS).generate("a", PROMPT, params))
    assert {completion.finish_reason for completion in found} == {"stop", "length"}
    scores = use(server, lambda engine: engine.score(PROMPT))
    assert scores == asyncio.run(FakeEngine(TOKENS, EOS).score(PROMPT))


def test_tokens_come_one_by_one(server):
    long = next(seed for seed in range(999) if len(draw(seed).token_ids) == 20)
    started = time.monotonic()
    use(server, lambda engine: engine.generate("a", PROMPT, SamplingParams(max_new_tokens=20, seed=long)))
    assert time.monotonic() - started > 20 * TOKEN_S


def draw(seed, max_new_tokens=20):
    from fastreason.rollout.engine import sample_seed

    return FakeEngine(TOKENS, EOS).draw(PROMPT, sample_seed(seed, 0), max_new_tokens)


def long_seeds(count, num_tokens):
    """Seeds whose responses to PROMPT have at least so many tokens."""
    found = (seed for seed in range(100_000) if len(draw(seed, num_tokens).token_ids) == num_tokens)
    return [next(found) for _ in range(count)]


def test_nothing_answers_without_the_key_and_every_answer_names_the_server(server):
    paths = [
        "/health",
        "/pause",
        "/resume",
        "/collective_rpc",
        "/inference/v1/generate",
        "/reset_prefix_cache",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/none",
    ]

    async def ask():
        found = {}
        async with aiohttp.ClientSession() as session:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}"}):
                for path in paths:
                    async with session.get(server.url + path, headers=headers) as answer:
                        found[str(headers), path] = answer.status
                        assert answer.headers["x-fastreason-instance"] == "1"
        return found

    use(server, lambda engine: engine.score(PROMPT))  # it is up
    found = asyncio.run(ask())
    refused = [status for (headers, _), status in found.items() if KEY not in headers]
    assert refused == [401] * 20
    given = {path: found[str({"Authorization": f"Bearer {KEY}"}), path] for path in paths}
    assert given["/health"] == 200 and given["/none"] == 404 and given["/pause"] == 405


def test_a_prompt_that_is_too_long_is_refused(server):
    with pytest.raises(EngineError, match=r"answered 400 .*60 prompt tokens \+ max_tokens=8 .* longest sequence of 64"):
        use(server, lambda engine: engine.generate("a", [5] * 60, SamplingParams(max_new_tokens=8, seed=1)))


@pytest.mark.parametrize("mode", ["in_flight", "boundary"])
def test_an_update_reaches_requests_in_mid_response_or_waits_for_their_end(server, folder, mode):
    seeds = long_seeds(4, 24)

    async def body(engine):
        ask = [engine.generate(f"t{s}", PROMPT, SamplingParams(max_new_tokens=24, seed=s)) for s in seeds]
        running = [asyncio.create_task(one) for one in ask]
        await asyncio.sleep(5 * TOKEN_S)
        loading = asyncio.create_task(engine.load_weights(publish(folder, 1)))
        await asyncio.sleep(0.05)
        meanwhile = asyncio.create_task(
            engine.generate("late", PROMPT, SamplingParams(max_new_tokens=24, seed=seeds[0]))
        )
        report = await loading
        return [(await task)[0] for task in running], (await meanwhile)[0], report, engine.version

    completions, late, report, version = use(server, body, update_mode=mode)
    assert (version, report.version, report.num_tensors) == (1, 1, 2)
    assert report.pause_s <= report.total_s < 10
    for seed, completion in zip(seeds, completions, strict=True):
        assert completion.token_ids == draw(seed, 24).token_ids
        expected = {"in_flight": [{0, 1}], "boundary": [{0}]}[mode]
        assert set(completion.token_versions) in expected
        assert completion.token_versions == sorted(completion.token_versions)
    if mode == "boundary":
        assert set(late.token_versions) == {1}, "it was issued while the running ones ended, and begun after the update"


def tell(server, body):
    """Run `body(engine, post)`, in which post(route, ...) speaks to the server without a client of ours."""

    async def run(engine):
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:

            async def post(route, method=None, **arguments):
                rpc = {"method": method, "kwargs": arguments} if method else None
                async with session.post(server.url + route, json=rpc) as answer:
                    return (await answer.json()).get("results")

            return await body(engine, post)

    return use(server, run)


def test_a_pause_holds_tokens_and_counts_them(server, folder):
    (seed,) = long_seeds(1, 30)
    update = publish(folder, 7)
    weights = {"path": update.path, "checksum": update.checksum}

    async def body(engine, post):
        running = asyncio.create_task(engine.generate("t", PROMPT, SamplingParams(max_new_tokens=30, seed=seed)))
        await asyncio.sleep(5 * TOKEN_S)
        await post("/pause?mode=keep")
        counts = []
        for _ in range(2):
            (report,) = await post("/collective_rpc", "fastreason_load", **weights)
            counts.append(dict(report["tokens_before"]))
            await asyncio.sleep(5 * TOKEN_S)
        state = await post("/collective_rpc", "fastreason_beat")
        assert not running.done()
        await post("/resume")
        await running
        await post("/collective_rpc", "fastreason_restore")
        return counts, state, await post("/collective_rpc", "fastreason_beat")

    counts, state, restored = tell(server, body)
    ((name, count),) = counts[0].items()
    assert counts[1] == counts[0] and 0 < count < 30 and name.startswith("generate-tokens-t.0~1-")
    assert (state, restored) == ([{"checksum": update.checksum}], [{"checksum": None}])


def test_a_request_whose_client_is_gone_is_dropped(server, folder):
    (seed,) = long_seeds(1, 30)
    update = publish(folder, 3)

    async def body(engine, post):
        tasks = [
            asyncio.create_task(engine.generate(name, PROMPT, SamplingParams(max_new_tokens=30, seed=seed)))
            for name in ("gone", "stays")
        ]
        await asyncio.sleep(3 * TOKEN_S)
        tasks[0].cancel()
        await asyncio.sleep(3 * TOKEN_S)
        await post("/pause?mode=keep")
        (report,) = await post("/collective_rpc", "fastreason_load", path=update.path, checksum=update.checksum)
        await post("/resume")
        await tasks[1]
        return list(report["tokens_before"])

    (name,) = tell(server, body)
    assert "stays" in name


@pytest.mark.parametrize("fault", ["checksum", "outside", "torn"])
def test_a_faulty_update_is_refused_and_the_engine_goes_on(server, folder, tmp_path, fault):
    update = publish(folder, 4)
    if fault == "checksum":
        update = WeightUpdate(path=update.path, version=4, checksum="0" * 32, num_bytes=1)
    elif fault == "outside":
        update = publish(tmp_path, 4)
    else:
        Path(update.path).write_bytes(Path(update.path).read_bytes()[:-3])

    async def body(engine):
        with pytest.raises(EngineError, match=r"answered 500 to /collective_rpc: .*(sent was|outside|torn)"):
            await engine.load_weights(update)
        completions = await engine.generate("a", PROMPT, SamplingParams(max_new_tokens=3, seed=1))
        return engine.version, completions[0].token_versions, engine._lifeline.num_losses

    version, stamps, num_losses = use(server, body)
    assert (version, set(stamps), num_losses) == (0, {0}, 0)


def test_it_is_light_holds_no_secret_and_runs_on_its_cores(server):
    use(server, lambda engine: engine.score(PROMPT))
    process = psutil.Process(server.child.process.pid)
    assert KEY not in " ".join(process.cmdline())
    assert process.cpu_affinity() == [0]
    loaded = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in loaded and "msgspec" in loaded


def test_the_tokens_come_from_the_model_s_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "a": 1, "<end>": 2, "b": 3}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab=vocab, unk_token="a")), eos_token="<end>", pad_token="<pad>"
    )
    fast.save_pretrained(tmp_path)
    made = fake_server.make_server(
        make_config(fake_token_s=0.5), str(tmp_path), tmp_path / "log", max_model_len=9, device="cpu",
        exchange_dir=str(tmp_path), key=KEY,
    )  # fmt: skip
    assert made.name == "fake engine" and made.instance == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineError, match=r"rollout.engine=fake: .*empty has no tokenizer.json"):
        fake_server.read_tokens(str(tmp_path / "empty"))
    setup = json.loads((tmp_path / "fake-engine.json").read_text())
    assert setup == {
        "token_ids": [1, 3], "eos_token_id": 2, "max_model_len": 9, "token_s": 0.5, "tenant_file": None,
        "model_dir": str(tmp_path), "dtype": "auto",
    }  # fmt: skip
