"""A web server on loopback for the length of one test."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web


def with_web_server(routes: Sequence[web.RouteDef], use: Callable[[str], Awaitable[None]]) -> None:
    """Run `use(url)` while the routes are served; at most 30 s."""

    async def run() -> None:
        app = web.Application()
        app.add_routes(routes)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            await use(f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    asyncio.run(asyncio.wait_for(run(), 30))
