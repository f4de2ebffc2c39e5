"""Headless Chromium through its debugging pipe: open a page, evaluate, click, take a picture."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque

import pytest

TIMEOUT_S = 60
# Chromium reads commands from descriptor 3 and writes to 4.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 50) for fd in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    def __init__(self, folder):
        binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if binary is None:
            pytest.skip("needs Chromium: apt install chromium")
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}",
                   "--no-first-run", "--window-size=1200,2400", "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip
        command, quiet = [sys.executable, "-c", START, str(theirs_in), str(theirs_out), binary, *options], subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=quiet, stderr=quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self._in, False)
        self._number, self._rest, self._queue, self.events, self._session = 0, b"", deque(), [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _next(self):
        """The next message."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self._queue:
            assert time.monotonic() < deadline, "Chromium does not answer"
            assert self._process.poll() is None, "Chromium ended"
            try:
                self._rest += os.read(self._in, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
            *whole, self._rest = self._rest.split(b"\0")
            self._queue.extend(map(json.loads, whole))
        return self._queue.popleft()

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while (got := self._next()).get("id") != self._number:
            self.events.append(got)
        assert "error" not in got, got
        return got["result"]

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + TIMEOUT_S
        while self.evaluate("document.readyState") != "complete":
            assert time.monotonic() < deadline

    def evaluate(self, expression):
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def click(self, element):
        """Click in the middle of what the expression `element` gives, as a mouse does."""
        x, y = self.evaluate(f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
                             f" return [r.x + r.width / 2, r.y + r.height / 2]; }})({element})")  # fmt: skip
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="none" if kind == "mouseMoved" else "left", clickCount=1)

    def picture(self):
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self):
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._in)
        os.close(self._out)
