"""The client of a teacher's server against a small server that speaks vLLM's JSON."""

import asyncio

import pytest
from aiohttp import web
from web_server import with_web_server

from fastreason.errors import EngineError
from fastreason.rollout.teacher import TeacherClient


class Server:
    """Serves the model `oracle`: a token's log-probability is -(id + its position) / 100; the first has none."""

    def __init__(self):
        self.requests, self.key, self.failures = [], None, 0
        self.change = lambda reply: reply

    async def models(self, request):
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"object": "list", "data": [{"id": "oracle", "object": "model"}]})

    async def completions(self, request):
        if self.failures:
            self.failures -= 1
            return web.Response(status=503, text="overloaded")
        body = await request.json()
        self.requests.append(body)
        entries = [
            {str(token): {"logprob": -(token + place) / 100, "rank": 1}, "999": {"logprob": -0.5, "rank": 1}}
            for place, token in enumerate(body["prompt"])
        ]
        choice = {"index": 0, "text": "x", "prompt_logprobs": [None, *entries[1:]]}
        return web.json_response(self.change({"model": "oracle", "choices": [choice]}))


def with_server(use):
    server = Server()
    routes = [web.get("/v1/models", server.models), web.post("/v1/completions", server.completions)]
    with_web_server(routes, lambda url: use(server, url))


async def scored(url, *responses, prompt=(1, 2, 3)):
    client = TeacherClient(url)
    await client.start()
    try:
        return await asyncio.gather(*(client.score(list(prompt), list(each)) for each in responses))
    finally:
        await client.close()


def test_the_response_is_scored_token_by_token_behind_its_prompt(monkeypatch):
    monkeypatch.setenv("FASTREASON_TEACHER_KEY", "hush")

    async def use(server, url):
        server.key = "hush"
        first, second, none = await scored(url + "/v1/", [10, 20], [7], [])
        assert first == pytest.approx([-0.13, -0.24]) and second == pytest.approx([-0.10]) and none == []
        assert sorted(body["prompt"] for body in server.requests) == [[1, 2, 3, 7], [1, 2, 3, 10, 20]]
        (settings,) = {(b["model"], b["max_tokens"], b["prompt_logprobs"]) for b in server.requests}
        assert settings == ("oracle", 1, 0)

    with_server(use)


def test_a_server_that_is_busy_is_asked_again():
    async def use(server, url):
        server.failures = 2
        assert await scored(url, [10]) == [[pytest.approx(-0.13)]]
        server.failures = 3
        with pytest.raises(
            EngineError, match=r"teacher\.url\): /v1/completions answered 503: overloaded; tried 3 times"
        ):
            await scored(url, [10])

    with_server(use)


def test_the_wrong_key_says_what_to_do(monkeypatch):
    monkeypatch.delenv("FASTREASON_TEACHER_KEY", raising=False)

    async def use(server, url):
        server.key = "hush"
        with pytest.raises(EngineError, match=r"answered 401: .*Set FASTREASON_TEACHER_KEY"):
            await scored(url, [10])

    with_server(use)


def without_the_last(reply):
    reply["choices"][0]["prompt_logprobs"].pop()
    return reply


def of_other_tokens(reply):
    for entry in reply["choices"][0]["prompt_logprobs"][1:]:
        for token in [key for key in entry if key != "999"]:
            del entry[token]
    return reply


def infinite(reply):
    reply["choices"][0]["prompt_logprobs"][-1] = {"10": {"logprob": float("-inf")}}
    return reply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_the_last, "without a log-probability of each of 1 tokens"),
        (of_other_tokens, "without a log-probability of each of 1 tokens"),
        (lambda reply: {"choices": []}, "without a log-probability"),
        (infinite, "not a finite number"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(change, message):
    async def use(server, url):
        server.change = change
        with pytest.raises(EngineError, match=message):
            await scored(url, [10])

    with_server(use)


def test_what_is_not_a_vllm_server_is_refused():
    async def use(server, url):
        with pytest.raises(EngineError, match=r"/v1/models answered 404: .*Is it a vLLM server"):
            await scored(url + "/elsewhere", [10])

    with_server(use)
