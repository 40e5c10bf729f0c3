"""What no other test noticed when it was planted (tests/planted), of drivers."""

from __future__ import annotations

import asyncio
import os
import threading
from time import monotonic
from typing import Any

import pytest

from penstock import _drivers
from penstock._process import inflight
from penstock.drivers import Recipe

wire: Any = pytest.importorskip("penstock._drivers.psycopg3.aio_exchange", reason="needs psycopg 3")


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", ["psycopg", "psycopg2"])
def test_a_forked_child_lets_go_also_where_nobody_has_noted_the_connect(name, unix_dsn):
    """The net below (`under_way`) catches what a link lets fall; but pools come first."""
    pytest.importorskip(name)
    link = _drivers.chosen(name, asynchronous=False).open(Recipe(conninfo=unix_dsn), 20)
    link.lend()
    cursor = link.conn.cursor()
    cursor.execute("create temp table mine (a int)")
    inflight._noted.clear()
    child = os.fork()
    if child == 0:
        try:
            link.abandon(busy=False)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    cursor.execute("select count(*) from mine")
    assert cursor.fetchone() == (0,)
    link.close()


def test_psycopg_is_made_to_wait_and_lock_as_gevent_does(monkeypatch):
    green: Any = pytest.importorskip("penstock._drivers.psycopg3.gevent_waits")
    monkeypatch.setattr(green._waiting, "wait_c", green._waiting.wait, raising=False)
    monkeypatch.setattr(green._waiting, "wait", green._waiting.wait)
    monkeypatch.setattr(green._connection, "Lock", object)
    monkeypatch.delenv("PSYCOPG_WAIT_FUNC", raising=False)
    green.put_right()
    assert green._waiting.wait is green._waiting.wait_poll
    assert green._connection.Lock is threading.Lock


def test_psycopg2_is_given_a_wait_callback():
    green: Any = pytest.importorskip("penstock._drivers.psycopg2.gevent_waits")
    before = green.extensions.get_wait_callback()
    green.extensions.set_wait_callback(None)
    try:
        green.put_right()
        assert green.extensions.get_wait_callback() is green.wait_for
    finally:
        green.extensions.set_wait_callback(before)
