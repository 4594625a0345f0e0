"""A headless Chromium, spoken to over its debugging pipe: no driver and no network."""

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

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)

# It reads commands from file descriptor 3 and answers on 4.
START = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(pipes[0], 3)
os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page. `heard` is what went wrong on it: console messages, exceptions, requests."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._last, self._rest = read, write, 0, b""
        self._session: dict[str, str] = {}
        self.heard: list[str] = []
        self.loaded = False
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; events on the way are heard."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params} | self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._last:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]

    def _next(self, patience: float = 30.0) -> dict[str, Any]:
        end = time.monotonic() + patience
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser says nothing"
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser has gone"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        said = json.loads(line)
        self._event(said.get("method", ""), said.get("params", {}))
        return said

    def _event(self, name: str, params: dict[str, Any]) -> None:
        if name == "Page.loadEventFired":
            self.loaded = True
        elif name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.heard.append(f"{name}: {json.dumps(params)[:400]}")
        elif name == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self.heard.append(f"asked for {url}")

    def open(self, page: Path, theme: str, width: int, height: int = 900) -> None:
        self("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": theme}
        ])  # fmt: skip
        self("Emulation.setDeviceMetricsOverride", width=width, height=height,
             deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        self.loaded = False
        self("Page.navigate", url=page.resolve().as_uri())
        while not self.loaded:
            self._next()

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        what = {"key": key, "code": key, "windowsVirtualKeyCode": {"Tab": 9, "Enter": 13}[key]}
        typed = {"text": "\r"} if key == "Enter" else {}
        self("Input.dispatchKeyEvent", type="keyDown", **what, **typed)
        self("Input.dispatchKeyEvent", type="keyUp", **what)

    def screenshot(self, file: Path) -> None:
        """The whole page, not only what fits the window."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        self("Emulation.setDeviceMetricsOverride", width=int(size["width"]),
             height=int(size["height"]), deviceScaleFactor=1, mobile=False)  # fmt: skip
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium(home: Path) -> Iterator[Browser]:
    """A browser of its own, whose profile lies in `home`."""
    assert PROGRAM is not None
    theirs, write = os.pipe()
    read, ours = os.pipe()
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
        "--disable-extensions --hide-scrollbars --disable-background-networking"
    ).split()
    pipes = [str(theirs), str(ours)]
    process = subprocess.Popen(
        [sys.executable, "-ISc", START, *pipes, PROGRAM, *flags, "--remote-debugging-pipe",
         f"--user-data-dir={home}"],
        pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(home)},
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    try:
        yield Browser(read, write)
    finally:
        os.close(write)
        os.close(read)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
