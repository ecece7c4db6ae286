"""The reward model's client against a small server that speaks vLLM's JSON."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web
from web_server import with_web_server

from fastreason.config import RewardConfig
from fastreason.errors import ConfigError, EngineError
from fastreason.rollout import served_model
from fastreason.rollout.reward_model import RewardModelClient

QUESTION = [{"role": "system", "content": "S"}, {"role": "user", "content": "What is 3 + 4?"}]


class Server:
    """Serves the model `judge`: a response's probability is its length / 100, in as many classes as it is told."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer: Callable[[str], Awaitable[web.Response]] = self.probs
        self.num_classes = 1
        self.key: str | None = None

    async def probs(self, text: str) -> web.Response:
        good = len(text) / 100
        probs = [good] if self.num_classes == 1 else [1 - good, good, *[0.0] * (self.num_classes - 2)]
        item = {"index": 0, "label": "LABEL_0", "probs": probs, "num_classes": self.num_classes}
        return web.json_response({"id": "classify-1", "object": "list", "model": "judge", "data": [item]})

    async def classify(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization"))
        body = await request.json()
        self.requests.append(body)
        return await self.answer(body["messages"][-1]["content"])

    async def models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"object": "list", "data": [{"id": "judge", "object": "model"}]})


def with_server(use: Callable[[Server, str], Awaitable[None]]) -> None:
    server = Server()
    routes = [web.get("/v1/models", server.models), web.post("/classify", server.classify)]
    with_web_server(routes, lambda url: use(server, url))


def config(url: str | None, name: str | None = "judge") -> RewardConfig:
    return RewardConfig(functions={"reward_model": 1.0}, reward_model_url=url, reward_model_name=name)


def test_scores_keep_their_order_and_the_conversation_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREASON_REWARD_MODEL_KEY", "hush")

    async def use(server: Server, url: str) -> None:
        server.key = "hush"

        async def slow_when_short(text: str) -> web.Response:
            await asyncio.sleep(0.2 / (1 + len(text)))
            return await server.probs(text)

        server.answer = slow_when_short
        async with RewardModelClient(config(url + "/v1/")) as client:
            assert await client.score(QUESTION, ["", "7", "seven", "\ud800"]) == [0.0, 0.01, 0.05, 0.01]
            assert await client.score(QUESTION, []) == []
        by_text = {body["messages"][-1]["content"]: body for body in server.requests}
        assert by_text["7"] == {"model": "judge", "messages": [*QUESTION, {"role": "assistant", "content": "7"}]}
        assert server.keys == ["Bearer hush"] * 4

    with_server(use)


def test_of_two_classes_the_second_counts_and_more_are_refused() -> None:
    async def use(server: Server, url: str) -> None:
        async with RewardModelClient(config(url, name=None)) as client:
            assert client.model == "judge"
            server.num_classes = 2
            assert await client.score(QUESTION, ["seven"]) == [0.05]
            server.num_classes = 3
            with pytest.raises(EngineError, match="judge has 3 classes"):
                await client.score(QUESTION, ["seven"])

    with_server(use)


def test_a_failing_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(server: Server, url: str) -> None:
        async def fail_once(text: str) -> web.Response:
            if len(server.requests) == 1:
                return web.json_response({"error": "overloaded"}, status=503)
            return await server.probs(text)

        async def always(text: str) -> web.Response:
            return web.json_response({"error": "out of memory"}, status=500)

        async with RewardModelClient(config(url)) as client:
            server.answer = fail_once
            assert await client.score(QUESTION, ["seven"]) == [0.05]
            assert len(server.requests) == 2
            server.answer = always
            with pytest.raises(EngineError, match=r"/classify answered 500.*out of memory.*tried 3 times"):
                await client.score(QUESTION, ["seven"])
            assert len(server.requests) == 5

    with_server(use)


def waits_of(
    monkeypatch: pytest.MonkeyPatch, patience_s: float, headers: list[dict[str, str]]
) -> tuple[list[float], bool]:
    """How long is waited between tries by a server that is busy so many times; and whether it was answered in the end."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(served_model, "sleep", sleep)
    monkeypatch.setattr(served_model.random, "uniform", lambda low, high: high)

    async def use(url: str) -> None:
        model = served_model.ServedModel("teacher", "distill.url", url, "NO_KEY", {}, 5.0, patience_s=patience_s)
        await model.start()
        try:
            done.append(await model.ask("POST", "/x", {}) == {"fine": True})
        except EngineError as error:
            assert "answered 429" in str(error) and f"tried {len(waited) + 1} times" in str(error)
        finally:
            await model.close()

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def busy(request: web.Request) -> web.Response:
        return web.json_response({}, status=429, headers=left.pop(0)) if left else web.json_response({"fine": True})

    left, done = list(headers), list[bool]()
    with_web_server([web.get("/v1/models", models), web.post("/x", busy)], use)
    return waited, bool(done)


def test_a_busy_server_is_waited_for_as_long_as_patience_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    waited, done = waits_of(monkeypatch, 60.0, [{}] * 50)
    assert not done and sum(waited) == pytest.approx(60) and waited[:-1] == sorted(waited[:-1]) and waited[0] <= 1
    assert len(waited) < 10
    assert waits_of(monkeypatch, 60.0, [{}] * 5)[1]
    # One that says when: not before, and not for ever.
    soon = {"Retry-After": "20"}
    waited, done = waits_of(monkeypatch, 60.0, [soon, soon])
    assert done and waited == [20, 20]
    date = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)}
    waited, done = waits_of(monkeypatch, 60.0, [date, {"Retry-After": "in a while"}])
    assert done and 25 < waited[0] <= 30 and waited[1] < 2
    waited, done = waits_of(monkeypatch, 60.0, [{"Retry-After": "3600"}])
    assert done and waited == [60], "and a last try"
    # A judge of a running trainer is waited for a second, whatever it says.
    waited, done = waits_of(monkeypatch, served_model.PATIENCE_S, [soon] * 9)
    assert not done and waited == [1]


def test_as_many_are_asked_at_once_as_it_is_told() -> None:
    running = most = 0

    async def use(url: str) -> None:
        model = served_model.ServedModel("teacher", "distill.url", url, "NO_KEY", {}, 5.0, max_concurrent=130)
        await model.start()
        await asyncio.gather(*[model.ask("POST", "/x", {}) for _ in range(200)])
        await model.close()

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def slow(request: web.Request) -> web.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.5)
        running -= 1
        return web.json_response({})

    with_web_server([web.get("/v1/models", models), web.post("/x", slow)], use)
    assert most == 130


@pytest.mark.parametrize(
    ("status", "message"),
    [(400, "answered 400"), (401, "FASTREASON_REWARD_MODEL_KEY"), (404, "--runner pooling")],
)
def test_a_refused_request_is_not_repeated(status: int, message: str) -> None:
    async def use(server: Server, url: str) -> None:
        async def refuse(text: str) -> web.Response:
            return web.json_response({"error": "no"}, status=status)

        server.answer = refuse
        async with RewardModelClient(config(url)) as client:
            with pytest.raises(EngineError, match=message):
                await client.score(QUESTION, ["7"])
        assert len(server.requests) == 1

    with_server(use)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"data": []}', "without probs"),
        ('{"data": [{"probs": "x"}]}', "without probs"),
        ('["data"]', "without probs"),
        ('{"data": [{"probs": []}]}', "0 classes"),
        ('{"data": [{"probs": [NaN]}]}', "not a finite number"),
        ("no json", "tried 3 times"),
    ],
)
def test_unusable_answers(body: str, message: str) -> None:
    async def use(server: Server, url: str) -> None:
        async def answer(text: str) -> web.Response:
            return web.Response(text=body, content_type="application/json")

        server.answer = answer
        async with RewardModelClient(config(url)) as client:
            with pytest.raises(EngineError, match=message):
                await client.score(QUESTION, ["7"])

    with_server(use)


def test_a_silent_server_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model, "NUM_TRIES", 1)

    async def use(server: Server, url: str) -> None:
        async def sleep(text: str) -> web.Response:
            await asyncio.sleep(20)
            raise AssertionError

        server.answer = sleep
        async with RewardModelClient(config(url), timeout_s=0.3) as client:
            with pytest.raises(EngineError, match=r"no answer within 0\.3 s"):
                await client.score(QUESTION, ["7"])

    with_server(use)


def test_a_wrong_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model, "NUM_TRIES", 1)
    with pytest.raises(ConfigError, match=r"reward\.reward_model_url: missing"):
        RewardModelClient(RewardConfig())
    with pytest.raises(ConfigError, match="http://host:port"):
        RewardModelClient(config("localhost:8000"))

    async def use(server: Server, url: str) -> None:
        with pytest.raises(EngineError, match="did you mean 'judge'"):
            await RewardModelClient(config(url, "juge")).start()
        server.key = "another"
        with pytest.raises(EngineError, match=r"401.*FASTREASON_REWARD_MODEL_KEY"):
            await RewardModelClient(config(url)).start()

    with_server(use)

    async def nobody() -> None:
        with pytest.raises(EngineError, match=r"reward\.reward_model_url.*Check that the server runs"):
            await RewardModelClient(config("http://127.0.0.1:9")).start()

    asyncio.run(nobody())
