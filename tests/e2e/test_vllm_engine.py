"""A real vLLM server on the CPU with the tiny model: its door, its tokens and log-probabilities, its weight updates.

fp32 throughout: against transformers on the same machine, log-probabilities agree to a few 1e-6; the bound is 2e-5.
"""

import asyncio
import contextlib
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastreason.config import Config, RolloutConfig
from fastreason.errors import EngineError
from fastreason.rollout.server import LOOPBACK, EngineServer, new_key
from fastreason.rollout.vllm import VllmEngine
from fastreason.rollout.vllm_server import make_server
from fastreason.types import Completion, SamplingParams, WeightUpdate

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

CLOSE = 2e-5  # nats
EOS = 1  # of the tiny tokenizer
PROMPT = [10, 20, 30, 40, 50]


@dataclass
class Server:
    """A running server, the folder that it takes weights from, and the model that it started with."""

    server: EngineServer
    key: str
    exchange: Path
    model: Path

    def use(self, body: Callable[[VllmEngine], Awaitable[Any]], timeout_s: float = 120, **rollout: Any) -> Any:
        """Run `body(engine)` with a connected client; the client's version is 0 unless it loads."""

        async def run() -> Any:
            engine = VllmEngine(self.server.url, self.key, RolloutConfig(**rollout))
            await engine.start()
            try:
                return await body(engine)
            finally:
                await engine.close()

        return asyncio.run(asyncio.wait_for(run(), timeout_s))

    def processes(self) -> list[psutil.Process]:
        assert self.server.child is not None
        top = psutil.Process(self.server.child.process.pid)
        return [top, *top.children(recursive=True)]


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
        return True
    return False


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    exchange = Path(tempfile.mkdtemp(prefix="fastreason-test-", dir="/dev/shm"))
    key = new_key()
    config = Config.model_validate(
        {
            "model": {"path": str(tiny_model), "dtype": "float32"},
            "data": {},
            "train": {"steps": 1, "prompts_per_step": 1},
            "rollout": {"kv_cache_gib": 1.0},
        }
    )
    started = make_server(
        config,
        str(tiny_model),
        folder / "engine.log",
        max_model_len=256,
        device="cpu",
        exchange_dir=str(exchange),
        key=key,
    )
    child = started.start()
    try:
        ready = Server(started, key, exchange, tiny_model)
        deadline = time.monotonic() + 150
        while not answers(started.port):
            assert child.exit_code is None and time.monotonic() < deadline, started.explain_end()
            time.sleep(0.2)
        yield ready
    finally:
        child = started.child  # the last test starts another
        pids = [child.process.pid, *(p.pid for p in psutil.Process(child.process.pid).children(recursive=True))]
        child.stop(grace_s=10)
        shutil.rmtree(exchange, ignore_errors=True)
        assert not [pid for pid in pids if psutil.pid_exists(pid)], "the server left processes behind"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def true_logp(model: Any, token_ids: list[int], temperature: float = 1.0) -> list[float]:
    """transformers' log-probabilities of token_ids[1:]."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([token_ids])
        logp_TV = (model(ids).logits[0, :-1].float() / temperature).log_softmax(-1)
    return logp_TV.gather(-1, ids[0, 1:, None])[:, 0].tolist()


def assert_logp_of(model: Any, prompt: list[int], completion: Completion, temperature: float = 1.0) -> None:
    expected = true_logp(model, prompt + completion.token_ids, temperature)[len(prompt) - 1 :]
    assert completion.logp == pytest.approx(expected, abs=CLOSE)


def publish(server: Server, model: Any, version: int, checksum: str | None = None) -> WeightUpdate:
    """Write a model's weights into the exchange folder, as the trainer does."""
    from fastreason.exchange import write_weights

    weights = {n: t.detach().clone() for n, t in model.named_parameters() if n != "lm_head.weight"}
    path = server.exchange / f"weights-{version:06d}.safetensors"
    digest = write_weights(path, weights)
    return WeightUpdate(
        path=str(path), version=version, checksum=checksum or digest.hexdigest(), num_bytes=digest.num_bytes
    )


def moved_model(folder: Path, seed: int) -> Any:
    """The tiny model with every weight moved at random."""
    import torch
    from transformers import AutoModelForCausalLM

    moved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return moved


async def begun(server: Server, num_requests: int) -> None:
    """Return when so many requests are being sampled; AssertionError where they ended before they were seen."""
    import aiohttp

    deadline = time.monotonic() + 20
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {server.key}"}) as session:
        while True:
            assert time.monotonic() < deadline, f"{num_requests} requests were never seen running at once"
            async with session.get(f"{server.server.url}/metrics") as response:
                found = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", await response.text(), re.MULTILINE)
            if sum(map(float, found)) >= num_requests:
                return
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# The door


async def statuses(server: Server, headers: dict[str, str], paths: list[tuple[str, str]]) -> dict[tuple[str, str], int]:
    import aiohttp

    found = {}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=20)) as session:
        for method, path in paths:
            async with session.request(method, server.server.url + path) as response:
                found[method, path] = response.status
    return found


def all_paths(server: Server) -> list[tuple[str, str]]:
    """Every operation in the server's own description, and what such descriptions leave out."""

    async def fetch() -> Any:
        import aiohttp

        headers, url = {"Authorization": f"Bearer {server.key}"}, f"{server.server.url}/openapi.json"
        async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
            return await response.json()

    described = asyncio.run(asyncio.wait_for(fetch(), 20))["paths"]
    paths = [
        (method.upper(), path.replace("{", "").replace("}", "")) for path in described for method in described[path]
    ]
    extra = ["/collective_rpc", "/pause", "/resume", "/reset_prefix_cache", "/update_weights", "/inference/v1/generate"]
    paths += [("POST", path) for path in extra]
    paths += [
        ("GET", path) for path in ("/", "/health", "/metrics", "/docs", "/openapi.json", "/redoc", "/no-such-path")
    ]
    return sorted(set(paths))


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}])
def test_nothing_answers_without_the_key(server, headers):
    paths = all_paths(server)
    assert len(paths) > 20
    found = asyncio.run(statuses(server, headers, paths))
    assert {path: status for path, status in found.items() if status != 401} == {}
    # A request of HEAD or OPTIONS, and an upgrade to a websocket, are requests too.
    others = asyncio.run(statuses(server, headers, [("OPTIONS", "/collective_rpc"), ("HEAD", "/health")]))
    assert set(others.values()) == {401}


def test_the_key_opens_and_a_refused_call_did_nothing(server):
    good = {"Authorization": f"Bearer {server.key}"}
    assert set(asyncio.run(statuses(server, good, [("GET", "/health"), ("GET", "/metrics")])).values()) == {200}
    asyncio.run(statuses(server, {}, [("POST", "/pause")]))

    async def generate(engine: VllmEngine) -> Any:
        return await engine.generate("open", PROMPT, SamplingParams(max_new_tokens=2, seed=1))

    assert len(server.use(generate, timeout_s=30)) == 1


def test_a_websocket_without_the_key_is_refused(server):
    import aiohttp

    async def connect() -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.server.url}/v1/realtime"):
            pass

    with pytest.raises(aiohttp.WSServerHandshakeError) as error:
        asyncio.run(asyncio.wait_for(connect(), 20))
    assert error.value.status in (401, 403)


def test_it_listens_on_loopback_only_and_hides_its_key(server):
    server.use(lambda engine: engine.score([5, 6]))
    listening = [c for p in server.processes() for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert server.server.port in [c.laddr.port for c in listening]
    # vLLM's ranks hold a port among themselves (gloo's and torch's store), which speaks no HTTP.
    ours = [c.laddr.ip for c in listening if c.laddr.port == server.server.port]
    assert ours == [LOOPBACK]
    assert {c.laddr.ip for c in listening} <= {LOOPBACK, "::1"}, listening
    for process in server.processes():
        assert server.key not in " ".join(process.cmdline())
    assert server.key not in server.server._log_path.read_text(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def test_log_probabilities_are_those_of_transformers(server, model):
    async def body(engine: VllmEngine) -> Any:
        plain = await engine.generate("a", PROMPT, SamplingParams(n=3, max_new_tokens=20, seed=3))
        warm = await engine.generate("b", PROMPT, SamplingParams(n=2, max_new_tokens=20, seed=4, temperature=0.7))
        scores = [await engine.score(PROMPT + c.token_ids) for c in plain]
        return plain, warm, scores

    plain, warm, scores = server.use(body)
    assert len(plain) == 3 and len({tuple(c.token_ids) for c in plain}) == 3
    for completion, score in zip(plain, scores, strict=True):
        assert_logp_of(model, PROMPT, completion)
        assert score == pytest.approx(true_logp(model, PROMPT + completion.token_ids), abs=CLOSE)
        assert score[len(PROMPT) - 1 :] == pytest.approx(completion.logp, abs=CLOSE)
    for completion in warm:
        assert_logp_of(model, PROMPT, completion, temperature=0.7)


def test_a_seed_gives_the_same_tokens_whatever_else_runs(server):
    async def body(engine: VllmEngine) -> Any:
        params = SamplingParams(n=4, max_new_tokens=24, seed=99)
        alone = await engine.generate("a", PROMPT, params)
        others = [engine.generate(f"o{i}", [i + 3] * 9, SamplingParams(max_new_tokens=24, seed=i)) for i in range(20)]
        together, *_ = await asyncio.gather(engine.generate("b", PROMPT, params), *others)
        other_seed = await engine.generate("c", PROMPT, SamplingParams(n=4, max_new_tokens=24, seed=100))
        return alone, together, other_seed

    alone, together, other_seed = server.use(body)
    assert [c.token_ids for c in alone] == [c.token_ids for c in together]
    assert [c.token_ids for c in alone] != [c.token_ids for c in other_seed]


def test_the_end_token_belongs_to_the_response_and_a_cut_one_says_length(server, model):
    async def body(engine: VllmEngine) -> list[Completion]:
        return await engine.generate("e", PROMPT, SamplingParams(n=48, max_new_tokens=60, seed=5))

    completions = server.use(body)
    ended = [c for c in completions if c.finish_reason == "stop"]
    cut = [c for c in completions if c.finish_reason == "length"]
    assert len(ended) + len(cut) == 48 and ended and cut
    for completion in ended:
        assert completion.token_ids[-1] == EOS and EOS not in completion.token_ids[:-1]
        assert len(completion.logp) == len(completion.token_ids) == len(completion.token_versions) <= 60
        assert_logp_of(model, PROMPT, completion)
    for completion in cut:
        assert len(completion.token_ids) == 60 and EOS not in completion.token_ids


def test_many_seeded_prompts_at_once_do_not_kill_the_worker(server, model):
    """A prompt that is prefilled in two pieces kills vLLM's CPU worker: 200 x 60 tokens do not fit one batch."""

    async def body(engine: VllmEngine) -> Any:
        prompts = [[(7 * i + 11 * j) % 250 + 3 for j in range(60)] for i in range(200)]
        params = [SamplingParams(max_new_tokens=4, seed=i) for i in range(200)]
        answers = await asyncio.gather(*(engine.generate(f"p{i}", p, params[i]) for i, p in enumerate(prompts)))
        return prompts, answers

    prompts, answers = server.use(body)
    assert len(answers) == 200
    for index in (0, 99, 199):
        assert_logp_of(model, prompts[index], answers[index][0])


def test_connections_are_reusable_after_more_than_six_idle_seconds(server):
    async def body(engine: VllmEngine) -> None:
        params = SamplingParams(n=8, max_new_tokens=1, seed=1)
        await engine.generate("w", PROMPT, params)
        await asyncio.sleep(6.5)
        await engine.generate("x", PROMPT, params)

    server.use(body)


def test_a_bad_request_is_a_clear_error(server):
    with pytest.raises(EngineError, match=r"answered 400.*(256|maximum|max_model_len|length)"):
        server.use(lambda engine: engine.generate("long", [5] * 300, SamplingParams(max_new_tokens=4, seed=1)))


# ---------------------------------------------------------------------------------------------------------------------
# Weights; each test leaves the model's own weights behind


@pytest.fixture
def restored(server: Server, model: Any) -> Iterator[None]:
    yield
    server.use(lambda engine: engine.load_weights(publish(server, model, 900)))


def test_new_weights_arrive_and_are_the_ones_sent(server, model, restored):
    moved = moved_model(server.model, 1)
    update = publish(server, moved, 1)

    async def body(engine: VllmEngine) -> Any:
        before = await engine.score(PROMPT * 4)
        report = await engine.load_weights(update)
        after = await engine.score(PROMPT * 4)
        sampled = await engine.generate("n", PROMPT, SamplingParams(n=2, max_new_tokens=12, seed=1))
        return before, report, after, sampled, engine.version

    before, report, after, sampled, version = server.use(body)
    assert before == pytest.approx(true_logp(model, PROMPT * 4), abs=CLOSE)
    assert after == pytest.approx(true_logp(moved, PROMPT * 4), abs=CLOSE)
    assert max(abs(x - y) for x, y in zip(before, after, strict=True)) > 0.1
    assert (report.version, version, report.checksum) == (1, 1, update.checksum)
    assert report.num_tensors == len(list(moved.named_parameters()))
    assert 0 < report.held_bytes <= update.num_bytes
    assert 0 <= report.load_s <= report.total_s and 0 <= report.pause_s <= report.total_s
    for completion in sampled:
        assert set(completion.token_versions) == {1}
        assert_logp_of(moved, PROMPT, completion)


def test_requests_in_flight_finish_with_both_versions(server, model, restored):
    moved = moved_model(server.model, 2)
    update = publish(server, moved, 1)

    async def body(engine: VllmEngine) -> Any:
        params = SamplingParams(max_new_tokens=200, seed=3)
        running = [asyncio.create_task(engine.generate(f"f{i}", [i + 3, 9, 9], params)) for i in range(24)]
        await begun(server, 12)
        await engine.load_weights(update)
        return [(await task)[0] for task in running]

    completions = server.use(body)
    both = [(i, c) for i, c in enumerate(completions) if set(c.token_versions) == {0, 1}]
    assert both, [set(c.token_versions) for c in completions]
    for index, completion in both:
        prompt = [index + 3, 9, 9]
        assert completion.token_versions == sorted(completion.token_versions)
        switch = completion.token_versions.index(1)
        # Up to the switch the former weights sampled, and their log-probabilities say so.
        former = true_logp(model, prompt + completion.token_ids)[len(prompt) - 1 :]
        assert completion.logp[:switch] == pytest.approx(former[:switch], abs=CLOSE)
        assert completion.logp[switch:] != pytest.approx(former[switch:], abs=CLOSE)


def test_at_a_boundary_requests_have_one_version_and_later_ones_wait(server, model, restored):
    moved = moved_model(server.model, 2)
    update = publish(server, moved, 1)

    async def body(engine: VllmEngine) -> Any:
        params = SamplingParams(max_new_tokens=240, seed=3)
        # Many: on a busy machine the engine is done with a few before its server answers how many there are.
        running = [asyncio.create_task(engine.generate(f"f{i}", [i + 3, 9, 9], params)) for i in range(96)]
        await begun(server, 6)
        loading = asyncio.create_task(engine.load_weights(update))
        await asyncio.sleep(0.1)  # the pause is on its way first
        late = asyncio.create_task(engine.generate("late", PROMPT, SamplingParams(max_new_tokens=8, seed=1)))
        await loading
        return [(await task)[0] for task in running], (await late)[0]

    running, late = server.use(body, update_mode="boundary")
    by_version = {0: model, 1: moved}
    stamps = []
    for prompt, completion in [*(([i + 3, 9, 9], c) for i, c in enumerate(running)), (PROMPT, late)]:
        (version,) = set(completion.token_versions)
        assert_logp_of(by_version[version], prompt, completion)
        stamps.append(version)
    assert stamps.count(0) >= 6 and stamps[-1] == 1


def test_no_request_begins_with_keys_and_values_of_former_weights(server, model, restored):
    """Two with the same long prompt, one from before an update and kept in flight over it: its cached prompt is not used."""
    moved = moved_model(server.model, 5)
    update = publish(server, moved, 1)
    prompt = [(7 * i) % 250 + 3 for i in range(150)]

    async def body(engine: VllmEngine) -> Any:
        long = SamplingParams(n=64, max_new_tokens=100, seed=3)
        running = asyncio.create_task(engine.generate("before", prompt, long))
        await begun(server, 4)
        await engine.load_weights(update)
        after = await engine.generate("after", prompt, SamplingParams(max_new_tokens=8, seed=4))
        return await running, after[0]

    running, after = server.use(body)
    assert {0, 1} in [set(completion.token_versions) for completion in running]
    assert_logp_of(moved, prompt, after)


def test_a_new_client_finds_the_weights_that_it_wants(server, model, restored):
    moved = moved_model(server.model, 6)
    update = publish(server, moved, 1)

    async def leave_paused(engine: VllmEngine) -> None:
        await engine.load_weights(update)
        await engine._lifeline.call(lambda connection: connection.ask("/pause?mode=keep"), "pause")

    async def adopt(engine: VllmEngine, wanted: WeightUpdate | None) -> Any:
        await engine.adopt(wanted)
        return await engine.score(PROMPT * 4), engine.version

    server.use(leave_paused)
    score, version = server.use(lambda engine: adopt(engine, update))
    assert version == 1 and score == pytest.approx(true_logp(moved, PROMPT * 4), abs=CLOSE)
    server.use(leave_paused)
    score, version = server.use(lambda engine: adopt(engine, None))
    assert version == 0 and score == pytest.approx(true_logp(model, PROMPT * 4), abs=CLOSE)


@pytest.mark.parametrize("fault", ["checksum", "outside", "missing"])
def test_a_faulty_update_is_refused_and_the_engine_goes_on_with_the_old_weights(server, model, tmp_path, fault):
    update = publish(server, moved_model(server.model, 3), 1)
    if fault == "checksum":
        update = publish(server, moved_model(server.model, 3), 1, checksum="0" * 32)
    elif fault == "outside":
        outside = tmp_path / "weights.safetensors"
        shutil.copy(update.path, outside)
        update = WeightUpdate(path=str(outside), version=1, checksum=update.checksum, num_bytes=update.num_bytes)
    else:
        update = WeightUpdate(path=update.path + ".gone", version=1, checksum=update.checksum, num_bytes=1)

    async def body(engine: VllmEngine) -> Any:
        with pytest.raises(EngineError):
            await engine.load_weights(update)
        # Not paused, not dead, and not changed.
        completions = await engine.generate("g", PROMPT, SamplingParams(n=2, max_new_tokens=8, seed=1))
        return completions, await engine.score(PROMPT * 4), engine.version

    completions, score, version = server.use(body, timeout_s=60)
    assert version == 0
    assert score == pytest.approx(true_logp(model, PROMPT * 4), abs=CLOSE)
    for completion in completions:
        assert_logp_of(model, PROMPT, completion)


def test_a_link_out_of_the_exchange_folder_is_refused(server, tmp_path):
    update = publish(server, moved_model(server.model, 4), 1)
    outside = tmp_path / "weights.safetensors"
    shutil.copy(update.path, outside)
    link = server.exchange / "link.safetensors"
    link.symlink_to(outside)
    linked = WeightUpdate(path=str(link), version=1, checksum=update.checksum, num_bytes=update.num_bytes)

    async def body(engine: VllmEngine) -> None:
        with pytest.raises(EngineError):
            await engine.load_weights(linked)

    server.use(body)


def test_a_client_with_another_key_says_so(server):
    async def run() -> None:
        engine = VllmEngine(server.server.url, "another", RolloutConfig(startup_timeout_s=5))
        try:
            await engine.start()
        finally:
            await engine.close()

    started = time.monotonic()
    with pytest.raises(EngineError, match="refused the key"), contextlib.suppress(TimeoutError):
        asyncio.run(asyncio.wait_for(run(), 20))
    assert time.monotonic() - started < 10


# ---------------------------------------------------------------------------------------------------------------------
# Death; the last test, for the next server is a new one


def test_a_killed_engine_core_loses_no_request_and_comes_back_with_the_weights(server):
    moved = moved_model(server.model, 7)
    update = publish(server, moved, 1)
    params = SamplingParams(n=24, max_new_tokens=200, seed=3)
    events: list[tuple[str, str]] = []

    def engine_core() -> psutil.Process:
        return next(process for process in server.processes() if "EngineCore" in " ".join(process.cmdline()))

    async def run() -> Any:
        engine = VllmEngine(
            server.server.url, server.key, RolloutConfig(), on_event=lambda *event: events.append(event)
        )
        await engine.start()
        try:
            await engine.load_weights(update)
            undisturbed = await engine.generate("u", PROMPT, params)
            tasks = [asyncio.create_task(engine.generate(f"f{i}", PROMPT, params)) for i in range(3)]
            await begun(server, 6)
            engine_core().kill()
            # The API server ends itself; the launcher starts the next.
            child = server.server.child
            assert child is not None
            await asyncio.to_thread(child.process.wait, 60)
            await asyncio.to_thread(child.stop, 0.0)
            server.server.start()
            answers, instance = [await task for task in tasks], engine._lifeline._connection.instance
            return undisturbed, answers, await engine.score(PROMPT * 4), instance
        finally:
            await engine.close()

    undisturbed, answers, score, instance = asyncio.run(asyncio.wait_for(run(), 200))
    assert (instance, [name for name, _ in events]) == (str(server.server.instance), ["engine_lost", "engine_back"])
    assert score == pytest.approx(true_logp(moved, PROMPT * 4), abs=CLOSE)
    for completions in answers:
        # The same seeds, and so the same tokens, from the same weights.
        assert [c.token_ids for c in completions] == [c.token_ids for c in undisturbed]
        for completion in completions:
            assert set(completion.token_versions) == {1}
            assert_logp_of(moved, PROMPT, completion)
