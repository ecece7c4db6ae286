"""An ASGI middleware that lets nothing through without the run's key, on any path, and says which server answered.

vLLM's own `--api-key` guards only some paths; the control paths (collective_rpc, pause, update) would answer anyone who
can reach the port. The key comes from the environment, never from the arguments. Imported by the server process; the
fake engine's server asks for the key by the same rule and sets the same headers.
"""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

from fastreason.resources import KEY_VARIABLE

INSTANCE_VARIABLE = "FASTREASON_ENGINE_INSTANCE"
# How many times the server at this address has been started, and how many times this one was told to resume: an answer
# that was under way before a resume is told from one that came after it.
INSTANCE_HEADER, RESUMES_HEADER = "x-fastreason-instance", "x-fastreason-resumes"
RESUME_PATH = "/resume"

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Door:
    """Knows the run's key, and what to write on the answers of this server; raises RuntimeError without a key."""

    def __init__(self) -> None:
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set: the engine would answer anyone. It is set by the launcher.")
        self._expected = f"Bearer {key}".encode()
        self._instance = os.environ.get(INSTANCE_VARIABLE, "")
        self._num_resumes = 0

    def opens(self, authorization: bytes) -> bool:
        """Whether the first Authorization header of a request is `Bearer KEY`."""
        return hmac.compare_digest(authorization, self._expected)

    def note(self, path: str) -> None:
        """Count a request that was let through."""
        self._num_resumes += path == RESUME_PATH

    def headers(self) -> dict[str, str]:
        return {INSTANCE_HEADER: self._instance, RESUMES_HEADER: str(self._num_resumes)}


class RequireKey:
    """Answers 401 to every HTTP request without `Authorization: Bearer KEY`, and closes such a websocket."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app, self._door = app, Door()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)

        async def send_named(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                named = [(name.encode(), value.encode()) for name, value in self._door.headers().items()]
                message = {**message, "headers": [*message.get("headers", []), *named]}
            await send(message)

        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        if self._door.opens(given):
            self._door.note(scope["path"])
            return await self._app(scope, receive, send_named)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
        await send_named({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b"unauthorized: the key of this run is needed\n"})
