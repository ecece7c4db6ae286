"""A headless Chromium driven over its debugging socket, for the tests of pages: what it logged, threw and fetched is kept."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_S = 60


def find_browser() -> str | None:
    """The browser's command: CHROMIUM of the environment, or the first that is installed."""
    return os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """One open page. `complaints` is everything in its console, `fetched` the address of every request that it made."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self.fetched: list[str] = []
        self._socket, self._session = socket, ""
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def open(self, path: Path) -> None:
        target = await self.send("Target.createTarget", url="about:blank")
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")
        await self.send("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        await self.send("Page.navigate", url=path.resolve().as_uri())
        await asyncio.wait_for(self._loaded.wait(), WAIT_S)

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        reply = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def click(self, selector: str) -> None:
        """A real click with the mouse in the middle of the first element that matches."""
        place = await self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    async def screenshot(self, path: Path) -> None:
        reply = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(reply["data"]))

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = len(self._replies) + 1
        self._replies[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        return await asyncio.wait_for(self._replies[number], WAIT_S)

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                waiting = self._replies[event["id"]]
                if "error" in event:
                    waiting.set_exception(RuntimeError(str(event["error"])))
                else:
                    waiting.set_result(event["result"])
            elif event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(event["params"])[:1000])
            elif event["method"] == "Network.requestWillBeSent":
                self.fetched.append(event["params"]["request"]["url"])
            elif event["method"] == "Page.loadEventFired":
                self._loaded.set()


@contextlib.asynccontextmanager
async def browser_tab(command: str, profile: Path) -> AsyncIterator[Tab]:
    """Start a browser with a profile of its own, give one tab, and end the browser."""
    # As root, in a container, Chromium's sandbox cannot start; the pages are ours.
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [command, *flags, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        for _ in range(10 * WAIT_S):
            if port_file.is_file() and port_file.read_text().count("\n"):
                break
            assert process.poll() is None, f"{command} ended with {process.returncode} before it listened"
            await asyncio.sleep(0.1)
        port, path = port_file.read_text().split("\n")[:2]
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=0) as socket,
        ):
            tab = Tab(socket)
            try:
                yield tab
            finally:
                await tab.close()
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
