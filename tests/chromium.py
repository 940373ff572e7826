"""A headless Chromium, driven by its DevTools protocol, for tests that look at pages as people do."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """A page of the browser; `said` collects what it complains of."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.said: list[str] = []

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        mine = self._number
        await self._socket.send(json.dumps({"id": mine, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self._socket.recv())
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.said.append(json.dumps(message["params"]))
            if message.get("id") == mine:
                assert "error" not in message, message
                return dict(message["result"])

    async def run(self, script: str) -> Any:
        found = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return found["result"].get("value")

    async def until(self, script: str, patience_s: float = 120.0) -> None:
        """Wait until a script gives true."""
        ends = time.monotonic() + patience_s
        while not await self.run(script):
            assert time.monotonic() < ends, f"never true: {script}"
            await asyncio.sleep(0.1)

    async def go(self, url: str) -> None:
        await self.run("window.left = true")
        await self.send("Page.navigate", url=url)
        await self.until("!window.left && document.readyState === 'complete'")

    async def look(self, width: int, scheme: str) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def shoot(self, path: Path) -> None:
        found = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


def in_a_tab(work: Callable[[Tab], Coroutine[Any, Any, None]]) -> None:
    """Do something in a browser of its own."""
    with _browser() as address:
        asyncio.run(_with_tab(address, work))


async def _with_tab(address: str, work: Callable[[Tab], Coroutine[Any, Any, None]]) -> None:
    async with connect(address, max_size=None) as socket:
        tab = Tab(socket)
        for domain in ("Page", "Log", "Runtime"):
            await tab.send(f"{domain}.enable")
        await work(tab)


@contextmanager
def _browser() -> Iterator[str]:
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        command = [PROGRAM, *options, "--ignore-certificate-errors", "--remote-debugging-port=0"]
        program = subprocess.Popen([*command, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.DEVNULL)
        try:
            yield _address(Path(folder) / "DevToolsActivePort")
        finally:
            program.terminate()
            program.wait(30)


def _address(file: Path) -> str:
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        if file.exists() and (port := file.read_text().split()[:1]):
            with urllib.request.urlopen(f"http://127.0.0.1:{port[0]}/json") as answer:
                for page in json.load(answer):
                    if page["type"] == "page":
                        return str(page["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError("Chromium did not start")
