"""Who may talk to the server, without vLLM."""

import asyncio

import pytest

from fastreason.rollout.vllm_middleware import (
    INSTANCE_HEADER,
    INSTANCE_VARIABLE,
    KEY_VARIABLE,
    RESUMES_HEADER,
    RequireKey,
)

KEY = "s3cret"


def ask(scope):
    """What is sent back for a request, and whether the application behind was reached."""
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    asyncio.run(RequireKey(app)(scope, receive, send))
    return reached, sent


def request(path, *headers, kind="http"):
    return {"type": kind, "path": path, "headers": list(headers)}


PATHS = [
    "/v1/completions",
    "/collective_rpc",
    "/pause",
    "/resume",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/health",
    "/metrics",
    "/inference/v1/generate",
    "/",
]
WRONG = [
    [],
    [(b"authorization", b"Bearer wrong")],
    [(b"authorization", b"")],
    [(b"authorization", KEY.encode())],
    [(b"authorization", b"Bearer " + KEY.encode() + b"x")],
    [(b"authorization", b"Bearer " + KEY[:-1].encode())],
    [(b"x-api-key", b"Bearer " + KEY.encode())],
    [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer " + KEY.encode())],
]


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.mark.parametrize("headers", WRONG)
@pytest.mark.parametrize("path", PATHS)
def test_without_the_key_every_path_answers_401(key, path, headers):
    reached, sent = ask(request(path, *headers))
    assert reached == []
    assert sent[0]["type"] == "http.response.start" and sent[0]["status"] == 401
    assert KEY.encode() not in sent[1]["body"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [b"authorization", b"Authorization"])
def test_with_the_key_every_path_is_reached(key, path, name):
    assert ask(request(path, (name, b"Bearer " + KEY.encode()))) == ([path], [])


def test_a_websocket_without_the_key_is_closed(key):
    reached, sent = ask(request("/v1/realtime", kind="websocket"))
    assert (reached, sent) == ([], [{"type": "websocket.close", "code": 1008}])
    header = (b"authorization", b"Bearer " + KEY.encode())
    assert ask(request("/v1/realtime", header, kind="websocket"))[0] == ["/v1/realtime"]


def test_every_answer_says_which_server_gave_it_and_how_often_that_was_resumed(key, monkeypatch):
    monkeypatch.setenv(INSTANCE_VARIABLE, "3")

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    async def talk():
        door, sent = RequireKey(app), []

        async def send(message):
            sent.append(message)

        good = (b"authorization", b"Bearer " + KEY.encode())
        for path, *headers in (("/pause", good), ("/resume", good), ("/resume",), ("/health", good)):
            await door(request(path, *headers), None, send)
        return [dict(message["headers"]) for message in sent if message["type"] == "http.response.start"]

    answers = asyncio.run(talk())
    assert [answer[INSTANCE_HEADER.encode()] for answer in answers] == [b"3"] * 4
    # What was refused did not resume anything.
    assert [answer[RESUMES_HEADER.encode()] for answer in answers] == [b"0", b"1", b"1", b"1"]
    assert answers[0][b"a"] == b"b"


def test_starting_up_needs_no_key(key):
    assert ask({"type": "lifespan", "path": ""})[0] == [""]


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_key_the_server_does_not_start(monkeypatch, value):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(RuntimeError, match=f"{KEY_VARIABLE} is not set"):
        RequireKey(lambda *_: None)
