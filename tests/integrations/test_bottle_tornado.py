"""examples/bottle_tornado as its README says to run it, with fewer workers, after its pool was used."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.docs.pages import ROOT, blocks
from tests.docs.test_examples import wait_until_it_listens
from tests.forks import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_penstock.postgres import Server

EXAMPLE = ROOT / "examples/bottle_tornado"
SESSIONS = (
    "select application_name, pid, backend_start from pg_stat_activity"
    " where datname = 'bottle_shop' and backend_type = 'client backend'"  # autovacuum is none of ours
)


@pytest.fixture
def shop(server: Server) -> Iterator[str]:
    server.execute("create database bottle_shop")
    (tables,) = (b.text for b in blocks(EXAMPLE / "README.md") if b.language == "sql")
    for statement in filter(str.strip, tables.split(";")):
        server.execute(statement, dbname="bottle_shop")
    yield server.conninfo(dbname="bottle_shop")
    server.execute("drop database bottle_shop with (force)")


def source(address: str) -> str:
    """The example, on a socket of the test's own, and with a master that uses the pool first."""
    text = (EXAMPLE / "shop.py").read_text()
    for old, new in (
        ('    app.run(host="localhost", port=8080', f"    app.run(host={address!r}"),
        ("workers=15", "workers=4"),
        (
            'if __name__ == "__main__":\n',
            'if __name__ == "__main__":\n    plugin.pool.execute("select 1")\n',
        ),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def test_it_works_with_many_tornado_workers_after_its_pool_was_used(
    shop: str, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(source(f"unix:{tmp_path}/socket"))
    with subprocess.Popen(
        [sys.executable, "shop.py"],
        cwd=tmp_path,
        env=os.environ | {"DATABASE_URL": shop},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_until_it_listens(f"{tmp_path}/socket", process)
            first = server.execute(SESSIONS)
            answers = ask_for_orders(f"{tmp_path}/socket")
            lines = ask(f"{tmp_path}/socket", "GET", "/orders.csv").text.splitlines()
            sent = ask(f"{tmp_path}/socket", "GET", "/files/shop.py").text
            paid = ask(f"{tmp_path}/socket", "POST", "/orders/7/pay").status_code
            missing = ask(f"{tmp_path}/socket", "GET", "/orders/1001").status_code
            state = ask(f"{tmp_path}/socket", "GET", "/orders/7").json()["state"]
            last = server.execute(SESSIONS)
        finally:
            process.terminate()
            _, complaints = process.communicate(timeout=60)
    assert all(content["number"] == number for number, content in answers)
    workers = {content["worker"] for _, content in answers}
    assert len(lines) == 1000
    assert lines[-1] == "1000,new"
    assert "import Penstock" in sent
    assert (paid, missing, state) == (204, 404, "paid")
    assert len(first) == 1  # the master's, which is the same afterwards, and nobody else's
    assert first[0] in last
    owners = [int(name.rpartition("/")[2]) for name, _, _ in last]
    assert workers < set(owners)
    assert len(owners) == len(set(owners)) <= 5  # one session each
    assert "Error" not in complaints
    until(lambda: server.execute(SESSIONS) == [], "no session is left")


def ask_for_orders(path: str) -> list[tuple[int, Any]]:
    """100 requests from 8 threads, each over a connection of its own."""
    with ThreadPoolExecutor(8) as threads:
        numbers = range(1, 101)
        answers = threads.map(lambda n: ask(path, "GET", f"/orders/{n}").json(), numbers)
        return list(zip(numbers, answers, strict=True))


def ask(path: str, method: str, url: str) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=path, verify=False), timeout=60) as client:
        return client.request(method, f"http://shop{url}")
