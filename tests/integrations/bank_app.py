"""The example's bank under gunicorn, for tests: as its README says to run it, on a server of the tests'.

It must not know what it is run on, nor judge any answer.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from demo.bank_tables import create_bank

if TYPE_CHECKING:
    from collections.abc import Iterator
    from email.message import Message

    from pytest_penstock.postgres import Server

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "bank"
WORKERS = 4
ORIGIN = "http://app.example"


class Session(NamedTuple):
    """A row of pg_stat_activity; the same server process and start are the same session."""

    name: str
    pid: int
    begun: str


class Answer(NamedTuple):
    """What the bank said."""

    status: int
    content: Any
    headers: Message


class BankApp:
    """gunicorn with the bank in it, from entry to exit of the `with` block."""

    def __init__(self, server: Server, folder: Path, python: str, *arguments: str) -> None:
        self._server = server
        self._database = f"bank_{secrets.token_hex(4)}"
        conninfo = server.conninfo(dbname=self._database)
        create_bank(server.conninfo(), conninfo, self._database, 1, server.binaries.pgbench)
        ini = folder / "config.ini"
        values = {
            "URL": server.socket_dir,
            "PORT": server.port,
            "USER": "postgres",
            "PW": "",
            "DB": self._database,
        }
        ini.write_text(
            "[POSTGRES]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
        )
        self._log = folder / "gunicorn.log"
        with socket.create_server(("127.0.0.1", 0)) as listener, self._log.open("wb") as log:
            self.port = listener.getsockname()[1]
            self._process = subprocess.Popen(
                [
                    *(python, "-m", "gunicorn", f"--workers={WORKERS}", "--no-control-socket"),
                    *(f"--bind=fd://{listener.fileno()}", f"--pythonpath={FOLDER},{folder}"),
                    *arguments,
                ],
                cwd=folder,
                env=os.environ | {"BANK_CONFIG": str(ini)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(listener.fileno(),),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        finally:
            self._process.kill()
            self._process.wait()
            self._server.execute(f"drop database {self._database} with (force)")

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """One request, over a connection of its own: any worker may get it."""
        http = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {"Origin": ORIGIN}
            if body is not None:
                headers["Content-Type"] = "application/json"
            http.request(method, path, None if body is None else json.dumps(body), headers)
            answer = http.getresponse()
            content = answer.read()
            is_json = "json" in (answer.headers["Content-Type"] or "")
            return Answer(
                answer.status, json.loads(content) if is_json else content, answer.headers
            )
        finally:
            http.close()

    def ask_for_balances(self, count: int) -> Iterator[tuple[str, Answer]]:
        """So many questions, each with its nonce."""
        for number in range(count):
            nonce = secrets.token_urlsafe(8)
            yield nonce, self.ask("GET", f"/balance/{number % 1000 + 1}?nonce={nonce}")

    def sessions(self) -> set[Session]:
        """What the server says about the bank's database."""
        rows = self._server.execute(
            "select application_name, pid, backend_start from pg_stat_activity"
            f" where datname = '{self._database}' and backend_type = 'client backend'"  # no autovacuum
        )
        return {Session(name, int(pid), str(begun)) for name, pid, begun in rows}

    def sessions_of_all_workers(self) -> set[Session]:
        """Ask until every worker has been asked something."""
        deadline = time.monotonic() + 90
        while len(found := self.sessions()) < WORKERS:
            assert time.monotonic() < deadline, f"{found}\n{self._log.read_text()}"
            for _ in self.ask_for_balances(10):
                pass
        return found

    def log(self) -> str:
        """What gunicorn and its workers said."""
        return self._log.read_text(errors="replace")
