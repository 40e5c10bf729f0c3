"""What no other test noticed when it was planted (tests/planted), of drivers."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import pytest

wire: Any = pytest.importorskip("penstock._drivers.psycopg3_async_wire", reason="needs psycopg 3")


def test_a_server_that_had_not_begun_with_a_statement_is_asked_again_to_cancel_it(monkeypatch):
    asked = []
    heard = [False, False, True]

    async def ask(_handle, _noted, _deadline):
        asked.append(monotonic())
        return True

    async def read_on(_handle, _fd, _noted, _until):
        return heard.pop(0)

    monkeypatch.setattr(wire, "ask_to_cancel", ask)
    monkeypatch.setattr(wire, "_read_on", read_on)
    assert asyncio.run(wire.stop_statement(None, -1, set(), monotonic() + 60))
    assert len(asked) == 3
