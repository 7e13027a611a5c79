"""Chromium that is not there to be seen, spoken to in its own protocol over a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOUND = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
LAUNCH = (
    "import fcntl, os, sys; at = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]; os.dup2(at[0], 3); "
    "os.dup2(at[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""The browser reads from its descriptor 3 and writes to 4."""
PATIENCE_S = 60.0
DRAWN = """document.readyState === "complete" &&
    (!document.getElementById("figures") || Boolean(document.documentElement.dataset.drawn))"""
"""A report is ready when its charts are drawn."""
PAPER_PX = 8.27 * 96 - 2 * 0.4 * 96
"""The width of A4 between the margins that Chromium prints with."""


class Browser:
    """One tab. ``said`` is what its pages have told the console, errors that nobody caught included."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._rest = send, receive, b""
        self._number, self._session = 0, ""
        self.said: list[str] = []
        (target,) = (t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Until it is loaded; a report, until its charts are drawn."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.media(dark=dark)
        for url in ("about:blank", page.as_uri()):  # else the page before would answer for a moment
            self._call("Page.navigate", url=url)
        deadline = time.monotonic() + PATIENCE_S
        while not self.ask(DRAWN):
            assert time.monotonic() < deadline, f"{page} is not drawn after {PATIENCE_S:.0f} s; it said {self.said}"
            time.sleep(0.05)

    def media(self, *, dark: bool = False) -> None:
        preferred = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in preferred.items()]
        self._call("Emulation.setEmulatedMedia", media="screen", features=features)

    def paper(self) -> None:
        """Lays the page out as for print, on the screen."""
        self._call("Emulation.setEmulatedMedia", media="print")

    def ask(self, expression: str) -> Any:
        """What the page's script makes of it, as JSON has it."""
        told = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def picture(self, target: Path, **clip: float) -> None:
        """PNG or WebP of the whole page, or of ``x``, ``y``, ``width`` and ``height`` in its pixels."""
        area: dict[str, Any] = {"clip": {**clip, "scale": 1}} if clip else {}
        area |= {"format": "webp", "quality": 80} if target.suffix == ".webp" else {}
        # To show more than the window, the page is laid out again, after which the site never looks quite the same.
        beyond = not clip or clip["height"] > self.ask("innerHeight")
        told = self._call("Page.captureScreenshot", captureBeyondViewport=beyond, **area)
        target.write_bytes(base64.b64decode(told["data"]))

    def pdf(self, target: Path) -> None:
        """As it is printed on A4."""
        self._call("Emulation.setEmulatedMedia", media="")  # an emulated screen would stay one on paper
        told = self._call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        target.write_bytes(base64.b64decode(told["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "result" in answer, f"{method}: {answer.get('error')}"
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], PATIENCE_S)
            data = os.read(self._receive, 1 << 20) if ready else b""
            assert data, "the browser has nothing more to say"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        if event.get("method") == "Runtime.consoleAPICalled":
            self.said.append(str([argument.get("value") for argument in told["args"]]))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.said.append(str(told["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.said.append(str(told["entry"]["text"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Its profile lies in ``folder``."""
    assert FOUND is not None
    there, back = os.pipe(), os.pipe()
    launch = [sys.executable, "-S", "-c", LAUNCH, str(there[0]), str(back[1])]
    process = subprocess.Popen(
        [*launch, FOUND, *QUIET, f"--user-data-dir={folder}", "about:blank"],
        pass_fds=(there[0], back[1]),
        env={**os.environ, "HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(there[0])
    os.close(back[1])
    try:
        yield Browser(there[1], back[0])
    finally:
        os.close(there[1])  # with that it ends, and all its processes
        os.close(back[0])
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
