"""The fake engine as a server process: the part of vLLM's HTTP interface that our client uses, without a model.

So that a run on the deterministic engine takes the way of a real one: the same client, key, exchange files and pauses,
and a process that can be killed or stopped. Tokens appear one by one, every `rollout.fake_token_s` seconds; a request
whose client is gone is dropped. It has no batches and no memory limit; but where it sleeps at times, it has parts of memory
that are there or not, and a device that has room for one: what would be out of memory or nonsense on a GPU is an error.
"""

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from fastreason.config import Config
from fastreason.errors import EngineError
from fastreason.exchange import EXCHANGE_VARIABLE, digest_file, published_file
from fastreason.rollout.fake import FakeEngine
from fastreason.rollout.identity import describe_server
from fastreason.rollout.server import LOOPBACK, EngineServer
from fastreason.rollout.vllm_middleware import Door

SETUP_FILE = "fake-engine.json"
MEMORY = ("weights", "kv_cache")


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is started with: the tokens to draw from, the end token, the longest sequence, seconds a token.

    `model_dir` and `dtype` are what it says of itself to runs elsewhere. tenant_file: there while another has the device, None
    where it is not shared in turn.
    """

    token_ids: list[int]
    eos_token_id: int
    max_model_len: int
    token_s: float
    model_dir: str = ""
    dtype: str = ""
    tenant_file: str | None = None


def read_tokens(model_dir: str) -> tuple[list[int], int]:
    """The plain ones of a tokenizer's first 256 tokens, and its end token; read without transformers, for it takes seconds."""
    from tokenizers import Tokenizer

    file = Path(model_dir) / "tokenizer.json"
    if not file.is_file():
        raise EngineError(
            f"rollout.engine=fake: {model_dir} has no tokenizer.json to take tokens from. Use another model."
        )
    tokenizer = Tokenizer.from_file(str(file))
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    plain = [token for token in range(min(tokenizer.get_vocab_size(), 256)) if token not in special]
    named = json.loads((file.parent / "tokenizer_config.json").read_bytes()).get("eos_token")
    eos = tokenizer.token_to_id(named["content"] if isinstance(named, dict) else named) if named else None
    return plain, eos if eos is not None else tokenizer.get_vocab_size() - 1


def make_server(
    config: Config,
    model_dir: str,
    log_path: Path,
    *,
    max_model_len: int,
    device: str,
    exchange_dir: str,
    key: str,
    temporary_dir: str | None = None,
    tenant_file: Path | None = None,
    **where: str,
) -> EngineServer:
    """A server of the fake engine, not yet started; of the model only the tokenizer is read, and `device` not used.

    where: as for the server of vLLM.
    """
    host = where.get("host", LOOPBACK)
    token_ids, eos = read_tokens(model_dir)
    setup = Setup(
        token_ids=token_ids,
        eos_token_id=eos,
        max_model_len=max_model_len,
        token_s=config.rollout.fake_token_s,
        model_dir=model_dir,
        dtype=config.model.dtype,
        tenant_file=str(tenant_file) if tenant_file is not None else None,
    )
    path = Path(temporary_dir or exchange_dir) / SETUP_FILE
    path.write_bytes(msgspec.json.encode(setup))
    return EngineServer(
        "fake engine",
        lambda port: [sys.executable, "-m", "fastreason.rollout.fake_server", str(port), str(path), host],
        {EXCHANGE_VARIABLE: exchange_dir, "TMPDIR": temporary_dir or exchange_dir},
        log_path,
        config.rollout,
        key=key,
        **where,
        explain=lambda text: "the end of its log:\n" + "\n".join(f"  | {line}" for line in text.splitlines()[-25:]),
    )


class FakeServer:
    """Requests in flight, whether they may go on, and the weights that it was told to hold."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._engine = setup, FakeEngine(setup.token_ids, setup.eos_token_id)
        self._num_tokens: dict[str, int] = {}  # of each request that has begun
        self._may_begin, self._may_go_on, self._drained = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for event in (self._may_begin, self._may_go_on, self._drained):
            event.set()
        self._held: str | None = None  # checksum
        self._memory = dict.fromkeys(MEMORY, True)  # of which there is some; without weights they are lost too
        self._has_weights = True

    def application(self) -> web.Application:
        door = Door()

        @web.middleware
        async def guard(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            response: web.StreamResponse
            if door.opens(request.headers.get("Authorization", "").encode()):
                door.note(request.path)
                try:
                    response = await handler(request)
                except web.HTTPException as error:
                    response = error
                except (ValueError, OSError) as error:
                    response = web.json_response({"error": {"message": str(error)}}, status=500)
            else:
                response = web.Response(status=401, text="unauthorized: the key of this run is needed\n")
            response.headers.update(door.headers())
            return response

        application = web.Application(middlewares=[guard])
        application.router.add_get("/health", self._health)
        application.router.add_get("/is_sleeping", self._is_sleeping)
        for path, method in {
            "/inference/v1/generate": self._generate,
            "/pause": self._pause,
            "/resume": self._resume,
            "/reset_prefix_cache": self._health,
            "/collective_rpc": self._collective_rpc,
            "/sleep": self._sleep,
            "/wake_up": self._wake_up,
        }.items():
            application.router.add_post(path, method)
        return application

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompt, sampling = body["token_ids"], body["sampling_params"]
        if not (all(self._memory.values()) and self._has_weights):
            state = self._state()
            raise web.HTTPConflict(text=f"asked for a response while it sleeps, or has no weights: {state}")
        self._refuse_tenant("generate")
        limit = self._setup.max_model_len
        if len(prompt) + sampling["max_tokens"] > limit:
            wanted = f"{len(prompt)} prompt tokens + max_tokens={sampling['max_tokens']}"
            raise web.HTTPBadRequest(text=f"{wanted} is more than the longest sequence of {limit} tokens")
        if sampling.get("prompt_logprobs") is not None:
            entries = [{str(token): {"logprob": self._engine.token_logp}} for token in prompt[1:]]
            return web.json_response({"choices": [], "prompt_logprobs": [None, *entries]})
        draw = self._engine.draw(prompt, sampling["seed"], sampling["max_tokens"])
        await self._reveal(f"generate-tokens-{body['request_id']}-{secrets.token_hex(4)}", len(draw.token_ids))
        choice = {
            "token_ids": draw.token_ids,
            "logprobs": {"content": [{"logprob": logp} for logp in draw.logp]},
            "finish_reason": draw.finish_reason,
        }
        return web.json_response({"choices": [choice], "prompt_logprobs": None})

    async def _reveal(self, name: str, num_tokens: int) -> None:
        """Let the tokens of one request appear; a pause holds it before its next token, or before its first."""
        await self._may_begin.wait()
        self._num_tokens[name] = 0
        self._drained.clear()
        try:
            while self._num_tokens[name] < num_tokens:
                if self._setup.token_s:
                    await asyncio.sleep(self._setup.token_s)
                await self._may_go_on.wait()
                self._num_tokens[name] += 1
        finally:
            del self._num_tokens[name]
            if not self._num_tokens:
                self._drained.set()

    async def _pause(self, request: web.Request) -> web.Response:
        mode = request.query.get("mode", "abort")
        if mode not in ("keep", "wait"):
            raise web.HTTPBadRequest(text=f"pause mode {mode!r}: the fake engine knows keep and wait")
        self._may_begin.clear()
        if mode == "keep":
            self._may_go_on.clear()
        else:
            await self._drained.wait()
        return web.json_response({"status": "paused"})

    async def _resume(self, request: web.Request) -> web.Response:
        self._may_begin.set()
        self._may_go_on.set()
        return web.json_response({"status": "resumed"})

    async def _sleep(self, request: web.Request) -> web.Response:
        if request.query.get("level") != "2" or request.query.get("mode") != "wait":
            raise web.HTTPBadRequest(text=f"{request.path_qs}: the fake engine knows level=2&mode=wait")
        if self._num_tokens:
            raise web.HTTPConflict(text=f"put to sleep amid {len(self._num_tokens)} response(s)")
        if any(not there for there in self._memory.values()):
            return web.Response()  # as vLLM: what sleeps in part stays as it is
        self._may_begin.clear()
        self._memory, self._has_weights = dict.fromkeys(MEMORY, False), False
        return web.Response()

    async def _wake_up(self, request: web.Request) -> web.Response:
        parts = request.query.getall("tags", list(MEMORY))
        if not any(self._memory.get(part, True) for part in parts):
            self._refuse_tenant("wake")
            self._memory |= dict.fromkeys(parts, True)
        if all(self._memory.values()):
            await self._resume(request)
        return web.Response()

    async def _is_sleeping(self, request: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": not all(self._memory.values()), **self._state()})

    def _state(self) -> dict[str, Any]:
        return {"memory": [part for part, there in self._memory.items() if there], "has_weights": self._has_weights}

    def _refuse_tenant(self, what: str) -> None:
        if self._setup.tenant_file is not None and Path(self._setup.tenant_file).exists():
            raise web.HTTPConflict(text=f"out of memory: another has the device, and it was told to {what}")

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        methods: dict[str, Callable[..., dict[str, Any]]] = {
            "fastreason_beat": self._beat,
            "fastreason_describe": self._describe,
            "fastreason_prepare": lambda path, checksum: {},
            "fastreason_load": self._load,
            "fastreason_restore": self._restore,
            "fastreason_give_up": self._give_up,
        }
        if body.get("method") not in methods:
            raise web.HTTPBadRequest(text=f"method {body.get('method')!r}: the fake engine knows {sorted(methods)}")
        return web.json_response({"results": [methods[body["method"]](**body.get("kwargs", {}))]})

    def _beat(self) -> dict[str, Any]:
        return {"checksum": self._held}

    def _describe(self, probe: str) -> dict[str, Any]:
        setup = self._setup
        return describe_server(setup.model_dir, setup.model_dir, setup.max_model_len, setup.dtype, probe)

    def _give_up(self) -> dict[str, Any]:
        self._held = "given up"
        return {}

    def _restore(self) -> dict[str, Any]:
        self._take_weights(None)
        return {}

    def _take_weights(self, checksum: str | None) -> None:
        if not self._memory["weights"]:
            raise ValueError("there is no memory for weights: it sleeps")
        self._held, self._has_weights = checksum, True

    def _load(self, path: str, checksum: str) -> dict[str, Any]:
        started = time.perf_counter()
        digest = digest_file(published_file(path))
        if digest.hexdigest() != checksum:
            raise ValueError(f"checksum of {path} is {digest.hexdigest()}, sent was {checksum}: the file changed")
        self._take_weights(checksum)
        return {
            "checksum": checksum,
            "num_tensors": digest.num_tensors,
            "held_bytes": 0,
            "load_s": time.perf_counter() - started,
            "tokens_before": dict(self._num_tokens),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="the fake engine's server; started by the launcher")
    parser.add_argument("port", type=int)
    parser.add_argument("setup", type=Path)
    parser.add_argument("host", nargs="?", default=LOOPBACK)
    arguments = parser.parse_args()
    setup = msgspec.json.decode(arguments.setup.read_bytes(), type=Setup)
    if setup.tenant_file is not None and Path(setup.tenant_file).exists():
        sys.exit("out of memory: another has the device that it was started on")

    async def application() -> web.Application:
        return FakeServer(setup).application()

    # A client that closes its connection drops its request. Shares the port with the launcher's hold on it.
    web.run_app(
        application(),
        host=arguments.host,
        port=arguments.port,
        reuse_address=True,
        handler_cancellation=True,
        print=None,
    )


if __name__ == "__main__":
    main()
