"""An app under a real server, in a process of its own, and clients that have a connection per request.

It must not know: what the app answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterable


class Served:
    """A server from entry to exit of the `with` block.

    Args:
        command: how Python starts it: "-m", "uvicorn", ...; "{socket}" is replaced by what to listen on.
        folder: to run in.
        port: what it listens on, where that is no socket file.
        environment: more variables.
    """

    def __init__(
        self, command: Iterable[str], folder: Path, port: int | None = None, **environment: str
    ) -> None:
        self.port = port
        self._folder = tempfile.TemporaryDirectory()
        self.socket = str(Path(self._folder.name, "socket"))
        self._log = Path(self._folder.name, "log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *(part.replace("{socket}", self.socket) for part in command)],
                cwd=folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 60
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"the server does not listen:\n{self.log()}")
            time.sleep(0.02)  # nobody says when it listens
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def stop(self) -> int:
        """End it as a supervisor does, by SIGTERM; gives its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        """What the server and the app said."""
        return self._log.read_text(errors="replace")

    def ask(self, *requests: tuple[str, str], at_once: int = 16) -> list[httpx.Response]:
        """Send (method, path) pairs, some at a time, each over a connection of its own."""
        return asyncio.run(self._ask(requests, at_once))

    async def _ask(self, requests: Iterable[tuple[str, str]], at_once: int) -> list[Any]:
        turn = asyncio.Semaphore(at_once)
        base = "http://shop" if self.port is None else f"http://127.0.0.1:{self.port}"
        transport = httpx.AsyncHTTPTransport(
            uds=self.socket if self.port is None else None,
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        async with httpx.AsyncClient(transport=transport, base_url=base, timeout=60) as client:

            async def one(method: str, path: str) -> httpx.Response:
                async with turn:
                    return await client.request(method, path)

            return await asyncio.gather(*(one(*request) for request in requests))

    def talk(self, path: str, *messages: str) -> list[str | bytes | None]:
        """Open a websocket, say one thing after the other, and give the answers. Needs a port."""
        return asyncio.run(self._talk(path, messages))

    async def _talk(self, path: str, messages: Iterable[str]) -> list[str | bytes | None]:
        from tornado.websocket import websocket_connect

        websocket = await websocket_connect(f"ws://127.0.0.1:{self.port}{path}")
        answers = []
        for message in messages:
            await websocket.write_message(message)
            answers.append(await websocket.read_message())
        websocket.close()
        return answers

    def connect(self) -> socket.socket:
        """A client's socket, for what httpx would not do."""
        kind = socket.AF_UNIX if self.port is None else socket.AF_INET
        client = socket.socket(kind)
        try:
            client.connect(self.socket if self.port is None else ("127.0.0.1", self.port))
        except BaseException:
            client.close()
            raise
        return client

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), self.connect():
            return True
        return False


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number: int = listener.getsockname()[1]
        return number
