"""The service of docs/from/pid-checking-proxy.md, as it is deployed: forked after its pool was used.

It must not know: how a fork is noticed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.docs.pages import ROOT, blocks
from tests.docs.test_examples import shop, tables, wait_until_it_listens, with_real_dsn

__all__ = ["shop", "tables"]  # fixtures

PAGE = ROOT / "docs/from/pid-checking-proxy.md"
STATES = {1: "new", 2: "sent", 42: "new"}


def source(tables, address: str, worker_class: str) -> str:
    """The page's file, on a socket of the test's own and with fewer workers."""
    (block,) = (b.text for b in blocks(PAGE) if b.text.startswith("# shop.py\n"))
    for old, new in (
        ('host="localhost",\n        port=8080', f"host={address!r}"),
        ("workers=15", "workers=4"),
        ('worker_class="gthread"', f"worker_class={worker_class!r}"),
    ):
        assert old in block
        block = block.replace(old, new)
    return with_real_dsn(block, tables)


@pytest.mark.parametrize("worker_class", ["gthread", "sync"])
def test_the_bottle_service_answers_right_after_the_fork(worker_class, tables):
    pytest.importorskip("bottle")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        file = Path(folder, "shop.py")
        file.write_text(source(tables, f"unix:{path}", worker_class), encoding="utf-8")
        with subprocess.Popen([sys.executable, file], stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_until_it_listens(path, process)
                answers = ask(path)
            finally:
                process.terminate()
                _, complaints = process.communicate(timeout=30)
    assert answers == [(number, 200, STATES[number]) for number, _, _ in answers]
    assert len(answers) == 180
    assert "Error" not in complaints


def ask(path: str) -> list[tuple[int, int, str]]:
    """180 requests from 16 threads, each on a connection of its own."""

    def one(number: int) -> tuple[int, int, str]:
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), timeout=30) as client:
            answer = client.get(f"http://shop/orders/{number}")
        return number, answer.status_code, answer.json()["state"]

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(one, [1, 2, 42] * 60))
