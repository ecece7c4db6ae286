"""A server of the fake engine at a fixed address of the test's own process, put up and taken down at will."""

import asyncio

from aiohttp import web

from fastreason.config import RolloutConfig
from fastreason.rollout import fake_server
from fastreason.rollout.engine import sample_seed
from fastreason.rollout.fake import FakeEngine
from fastreason.rollout.fleet import Fleet
from fastreason.rollout.server import hold_port
from fastreason.rollout.vllm import VllmEngine
from fastreason.rollout.vllm_middleware import INSTANCE_VARIABLE, KEY_VARIABLE
from fastreason.types import SamplingParams

KEY = "s3cret"
TOKENS, EOS = list(range(3, 200)), 1
PROMPT = [10, 20, 30]
TOKEN_S = 0.02
PARAMS = SamplingParams(n=6, max_new_tokens=16, seed=4002)


def expected(params=PARAMS):
    draws = [FakeEngine(TOKENS, EOS).draw(PROMPT, sample_seed(params.seed, i), 16) for i in range(params.n)]
    return [draw.token_ids for draw in draws]


class Site:
    """A server at a fixed address of this process, which can be put up, taken down at once, and made deaf."""

    def __init__(self, monkeypatch, token_s=TOKEN_S, **setup):
        self._setup = {"token_ids": TOKENS, "eos_token_id": EOS, "max_model_len": 64, "token_s": token_s, **setup}
        self._hold = hold_port(0)
        self.port, self.url = self._hold.getsockname()[1], f"http://127.0.0.1:{self._hold.getsockname()[1]}"
        self._monkeypatch = monkeypatch
        self.instance, self.requests, self.engines = 0, [], []
        self._runner = None
        self.deaf = asyncio.Event()  # cleared: no answer begins
        self.deaf.set()
        self.broken = {}  # path -> how often it still answers 500

    async def up(self):
        self.instance += 1
        self._monkeypatch.setenv(INSTANCE_VARIABLE, str(self.instance))
        self.engines.append(fake_server.FakeServer(fake_server.Setup(**self._setup)))
        application = self.engines[-1].application()

        @web.middleware
        async def note(request, handler):
            body = await request.json() if request.can_read_body else {}
            self.requests.append((self.instance, request.path_qs, body))
            await self.deaf.wait()
            if self.broken.get(request.path, 0):
                self.broken[request.path] -= 1
                raise web.HTTPInternalServerError(text="EngineDeadError")
            return await handler(request)

        application.middlewares.append(note)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def down(self):
        """As SIGKILL leaves it: no answer, every connection broken."""
        if self._runner is not None:
            for connection in list(self._runner.server.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    def asked(self, path, instance=None):
        return [body for number, found, body in self.requests if found == path and instance in (None, number)]


def with_fleet(monkeypatch, body, number=2, takes_over=False, patience_s=10.0, token_s=TOKEN_S, **keys):
    """Run `body(sites, fleet, events)` with servers that are up and a started fleet; an event is (name, site, detail)."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    async def run():
        sites, events = [Site(monkeypatch, token_s) for _ in range(number)], []
        for site in sites:
            await site.up()

        def client(site):
            return VllmEngine(
                site.url, KEY, RolloutConfig(), name="fake", spare=True, takes_over=takes_over,
                on_event=lambda event, detail: events.append((event, site, detail)), **keys,
            )  # fmt: skip

        fleet = Fleet([client(site) for site in sites], patience_s, takes_over)
        try:
            await fleet.start()
            return await body(sites, fleet, events)
        finally:
            await fleet.close()
            for site in sites:
                await site.down()

    return asyncio.run(asyncio.wait_for(run(), 40))
