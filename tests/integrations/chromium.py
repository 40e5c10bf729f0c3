"""A real browser for tests: headless Chromium, told what to do over a pipe.

Its one job: open pages, ask them questions in JavaScript, take pictures, and collect what the console
complains about. The protocol is Chromium's own for tools, one JSON object per message; over a pipe it
needs no package and no port. It must not know what the pages are.

Everything is done by one thread: there is no lock. What Chromium stores is in a temporary folder.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60.0


def find_chromium() -> str | None:
    """The program, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class BrowserError(Exception):
    """Chromium refused, or said nothing in time."""


class Chromium:
    """A browser with one page, from entry to exit of the `with` block.

    Attributes:
        complaints: what the console and the log said that is worse than information.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._folder = tempfile.TemporaryDirectory(prefix="pst", ignore_cleanup_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._reading = self._writing = -1
        self._received = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []

    def __enter__(self) -> Self:
        theirs_in, self._writing = os.pipe()
        self._reading, theirs_out = os.pipe()
        # It reads from descriptor 3 and writes to 4; the shell puts ours there.
        wiring = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        options = [
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._folder.name}",
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            # root's processes are refused a sandbox; the pages are our own
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", wiring, self._program, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        attached = self.tell("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        with contextlib.suppress(BrowserError, OSError):
            self._session = None
            self.tell("Browser.close")
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._reading)
        os.close(self._writing)
        self._folder.cleanup()

    def open(self, address: str) -> None:
        """Go to a page."""
        self.tell("Page.navigate", url=address)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.tell("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Ask until the answer is true, and give it."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.ask(expression)):
            if time.monotonic() > deadline:
                raise BrowserError(
                    f"never true: {expression}; {self.ask('document.body.innerText')}"
                )
            time.sleep(0.05)  # a page does not say when it has changed
        return value

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Be a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """Be the browser of somebody who likes "dark" or "light" screens."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.tell("Emulation.setEmulatedMedia", features=features)

    def shoot(self, path: Path) -> None:
        """Take a picture of the whole page."""
        shot = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def tell(self, method: str, **parameters: Any) -> Any:
        """Send one command and wait for its answer; what is reported meanwhile is looked at."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            reply = self._receive(deadline)
            if reply.get("id") == self._number:
                break
            self._hear(reply)
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error']}")
        return reply["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            patience = max(0.0, deadline - time.monotonic())
            if not select.select([self._reading], [], [], patience)[0]:
                raise BrowserError("no answer in time")
            piece = os.read(self._reading, 1 << 16)
            if not piece:
                raise BrowserError("it has ended")
            self._received += piece
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _hear(self, report: dict[str, Any]) -> None:
        what, details = report.get("method"), report.get("params", {})
        if what == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(details["exceptionDetails"]))
        elif what == "Runtime.consoleAPICalled" and details["type"] in {"error", "warning"}:
            self.complaints.append(json.dumps(details["args"]))
        elif what == "Log.entryAdded" and details["entry"]["level"] in {"error", "warning"}:
            self.complaints.append(json.dumps(details["entry"]))
