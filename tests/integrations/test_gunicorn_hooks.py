"""What gunicorn's hooks do and say, with gunicorn's own worker classes, in this process.

That they are called where gunicorn calls them is seen in test_gunicorn_classes.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import flask
import pytest
from gunicorn.config import Config
from gunicorn.util import get_arity, load_class
from tests.forks import Child, until

from penstock import ConnectionPool, pools
from penstock._pool.aio.pool import AsyncConnectionPool
from penstock._process import runtime
from penstock.integrations.gunicorn import hooks, limits
from penstock.integrations.gunicorn import traps as gunicorn_traps
from penstock.integrations.gunicorn.limits import Allowed
from penstock.integrations.gunicorn.traps import Share
from penstock.pools import close_all

if TYPE_CHECKING:
    from collections.abc import Iterator


class Log:
    """Gunicorn's logger, remembered."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __getattr__(self, level: str) -> Any:
        return lambda text, *args, **_: self.lines.append(f"{level}: {text % args}")

    def of(self, level: str) -> list[str]:
        return [line for line in self.lines if line.startswith(level)]


def worker_of(kind: str, app: Any = None, age: int = 1, **settings: Any) -> Any:
    """A worker of gunicorn's class, as it is when its application is loaded; it never runs."""
    cfg = Config()
    for name, value in {"worker_class": kind, **settings}.items():
        cfg.set(name, value)
    cls = load_class(kind)
    worker = cls.__new__(cls)  # its __init__ sets up files, and uvicorn's logging
    vars(worker).update(age=age, cfg=cfg, log=Log(), pid=os.getpid(), wsgi=app)
    return worker


@pytest.fixture
def pool(unix_dsn: str) -> Iterator[ConnectionPool[Any]]:
    with ConnectionPool(unix_dsn, max_size=8, name="shop") as pool:
        yield pool


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    raise NotImplementedError


def names(*words: str) -> Any:
    """Whether a line has all these words."""
    return lambda line: all(word in line for word in words)


# -- what a worker runs on ----------------------------------------------------------------------------


def test_a_worker_says_once_which_runtimes_and_drivers_it_runs_on(pool, unix_dsn):
    with ConnectionPool(unix_dsn, driver="psycopg2", name="log", max_size=4):
        beside: AsyncConnectionPool[Any] = AsyncConnectionPool(
            unix_dsn, driver="asyncpg", name="feed", max_size=2
        )
        worker = worker_of("gthread", flask.Flask("shop"), age=2, threads=4)
        hooks.post_worker_init(worker)
        (line,) = worker.log.of("info")
        del beside
    assert "on threads: " in line
    assert "pool 'shop' (psycopg, at most 8)" in line
    assert "pool 'log' (psycopg2, at most 4)" in line
    assert "on asyncio: pool 'feed' (asyncpg, at most 2)" in line
    assert worker.log.of("warning") == []


def test_a_pool_that_is_closed_is_none_of_a_workers(pool):
    assert gunicorn_traps.pools_of([pool, "something else that forks"]) == [pool]
    pool.close()
    assert gunicorn_traps.pools_of([pool]) == []


def test_a_worker_without_pools_says_so():
    assert gunicorn_traps.what_it_runs_on([]) == "no pool is made yet in this worker"


@pytest.mark.parametrize("kind", ["sync", "gthread", "tornado", "gevent"])
def test_an_asgi_application_under_a_wsgi_worker_is_a_trap(kind):
    worker = worker_of(kind, asgi)
    lines = list(gunicorn_traps.traps(worker, []))
    assert names("is an ASGI one", repr(kind), "--worker-class asgi")(lines[0])


@pytest.mark.parametrize("kind", ["asgi", "uvicorn_worker.UvicornWorker"])
def test_a_wsgi_application_under_an_asgi_worker_is_a_trap(kind):
    worker = worker_of(kind, flask.Flask("shop"))
    (line,) = gunicorn_traps.traps(worker, [])
    assert names("flask.app.Flask", "is a WSGI one", kind, "a2wsgi.WSGIMiddleware")(line)


def test_a_coroutine_function_is_asgi_whatever_it_takes():
    async def app(*args):
        raise NotImplementedError

    assert gunicorn_traps.interface_of(app) == "ASGI"


@pytest.mark.parametrize(
    ("kind", "app"), [("sync", flask.Flask("shop")), ("asgi", asgi), ("tornado", None)]
)
def test_what_fits_or_cannot_be_known_is_no_trap(kind, app):
    assert list(gunicorn_traps.traps(worker_of(kind, app), [])) == []


GREEN = """
import gevent.monkey
gevent.monkey.patch_all({patched})
import sys
sys.path[:0] = {path!r}
import {module}
from gunicorn.config import Config
from gunicorn.util import load_class
from penstock import ConnectionPool, pools
from penstock.integrations.gunicorn import traps as gunicorn_traps
cfg = Config()
cls = load_class("gevent")
worker = cls.__new__(cls)
worker.cfg, worker.wsgi = Config(), None
made = [ConnectionPool(driver={driver!r}, name="shop")]
print(gunicorn_traps.what_it_runs_on(made))
for line in gunicorn_traps.traps(worker, made):
    print(line)
"""


@pytest.mark.parametrize(
    ("module", "driver", "patched", "environment", "told"),
    [
        ("psycopg", "psycopg", "", {}, None),
        ("psycopg2", "psycopg2", "", {}, None),  # penstock sets a callback before it connects
        ("psycopg2", "psycopg", "", {}, 'driver="psycopg2"'),
        ("psycopg", "psycopg", "select=False", {}, "has not patched `select`"),
        ("psycopg", "psycopg", "", {"PSYCOPG_WAIT_FUNC": "wait_c"}, "unset it"),
    ],
)
def test_a_gevent_worker_whose_waits_stop_all_greenlets_is_a_trap(
    module, driver, patched, environment, told
):
    script = GREEN.format(module=module, driver=driver, patched=patched, path=[])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, *lines = done.stdout.splitlines()
    assert first == f"on gevent: pool 'shop' ({driver}, at most 10)"
    assert [told in line for line in lines] == [True] if told else lines == []


def test_a_worker_whose_pools_are_made_later_is_told_that_none_is_there_yet(monkeypatch):
    pytest.importorskip("psycopg2.extensions", reason="psycopg2 is not installed")
    monkeypatch.setattr(runtime, "has_green_waits", lambda: True)
    (told,) = gunicorn_traps.traps(worker_of("gevent"), [])
    assert "no wait callback yet (no pool is made" in told


# -- too many connections -------------------------------------------------------------------------------


def test_what_the_server_the_role_and_the_database_allow_is_asked_in_the_background(
    server, unix_dsn
):
    server.execute("create role narrow login connection limit 7")
    server.execute("create database narrow connection limit 9")
    dsn = server.conninfo(user="narrow", dbname="narrow")
    try:
        with ConnectionPool(dsn, max_size=60, name="shop") as pool:
            worker = worker_of("gthread", None, workers=5, threads=50)
            hooks.post_worker_init(worker)
            told = until(lambda: len(worker.log.of("warning")) >= 3 and worker.log.of("warning"))
            assert pool.stats().opened == 1
    finally:
        server.execute("drop database narrow with (force)")
        server.execute("drop role narrow")
    assert all(names("5 workers x 50 connections (50 of pool 'shop') may be 250")(t) for t in told)
    assert any(
        map(names("(max_connections 200, 3 of them reserved) allows 197", "at most 39"), told)
    )
    assert any(map(names("the role 'narrow'", "allows 7", "at most 1 for each worker"), told))
    assert any(map(names("the database 'narrow'", "allows 9"), told))


def test_pools_of_asyncio_are_asked_on_a_loop_of_the_askers_own(server):
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        server.conninfo(), driver="asyncpg", name="feed", max_size=50
    )
    (line,) = limits.exceeded(5, [Share(pool, 50)])
    assert names("250", "pool 'feed'", "allows 200")(line)  # a superuser's are not reserved
    assert not pool.opened
    until(lambda: not [n for (n,) in server.execute(NAMES) if "/feed/" in n], "its session is gone")


NAMES = "select application_name from pg_stat_activity where backend_type = 'client backend'"


@pytest.mark.parametrize(
    ("kind", "settings", "connections"),
    [
        ("sync", {}, 1),
        ("tornado", {}, 1),
        ("gthread", {"threads": 4}, 4),
        ("gthread", {"threads": 40}, 8),
        ("asgi", {}, 8),
        ("gevent", {}, 8),
    ],
)
def test_a_worker_has_no_more_connections_than_threads(kind, settings, connections, pool):
    share = gunicorn_traps.share(worker_of(kind, **settings), pool)
    assert share.connections == connections


def test_pools_on_one_server_are_added_and_those_on_others_are_not(unix_dsn):
    one, two = (ConnectionPool(unix_dsn, name=name) for name in ("one", "two"))
    here = Allowed("start 5432", "app", "shop", 100, 3, -1, -1)
    there = here._replace(server="other 5433")
    assert limits.found(8, [(Share(one, 10), here), (Share(two, 10), there)]) == []
    (line,) = limits.found(8, [(Share(one, 10), here), (Share(two, 3), here)])
    assert names("8 workers x 13", "10 of pool 'one', 3 of pool 'two'", "port 5432")(line)
    assert limits.found(97, [(Share(one, 1), here)]) == []
    assert names("at most 97 workers")(limits.found(98, [(Share(one, 1), here)])[0])


def test_only_the_first_worker_of_a_generation_asks(pool, monkeypatch):
    asked: list[Any] = []

    def exceeded(*given: Any) -> list[str]:
        asked.append(given)
        return []

    monkeypatch.setattr(limits, "exceeded", exceeded)
    for age in (2, 3, 4):
        hooks.post_worker_init(worker_of("sync", age=age, workers=3))
        for thread in threading.enumerate():
            if thread.name == "penstock-limits":
                thread.join()
        assert len(asked) == (age == 4)


def test_a_server_that_is_down_keeps_no_worker_from_starting_and_no_other_from_being_asked(pool):
    pool.resize(0, 300)
    worker = worker_of("asgi", workers=1)
    with ConnectionPool("host=127.0.0.1 port=1", name="gone", timeout=0.2) as gone:
        shares = [gunicorn_traps.share(worker, each) for each in (gone, pool)]
        (line,) = limits.exceeded(1, shares)
        hooks.post_worker_init(worker)  # says nothing about it
    assert names("1 workers x 300", "pool 'shop'")(line)


# -- the ends -------------------------------------------------------------------------------------------


def test_worker_exit_closes_the_pools_of_its_own_process_only(pool):
    worker = worker_of("sync")
    pool.execute("select 1")
    hooks.worker_exit(None, worker)
    assert pool.closed

    pool.open()
    worker.pid = os.getpid() + 1  # the master, and a worker that has gone
    hooks.worker_exit(None, worker)
    assert not pool.closed


def test_worker_exit_in_a_fork_leaves_the_parents_sessions_alone(pool):
    worker = worker_of("sync")
    before = pool.execute("select pg_backend_pid()").fetchall()

    def child():
        worker.pid = os.getpid()
        hooks.worker_exit(None, worker)
        return True

    assert Child(child).answer()
    assert pool.execute("select pg_backend_pid()").fetchall() == before


def test_worker_exit_waits_for_what_is_lent_no_longer_than_it_is_told(pool):
    worker = worker_of("sync")
    conn = pool.getconn()  # any thread might give it back
    began = time.monotonic()
    hooks.worker_exit(None, worker, timeout=0.1)
    assert 0.09 < time.monotonic() - began < 30
    assert pool.closed
    pool.putconn(conn)


def test_a_hook_of_the_users_own_says_how_long_it_waits(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(pools, "close_all", waits.append)
    hooks.worker_exit(None, worker_of("sync"), timeout=7.0)
    hooks.worker_exit(None, worker_of("sync"))
    assert waits == [7.0, 2.0]


def test_pools_that_nobody_opened_are_not_closed(unix_dsn):
    pool = ConnectionPool(unix_dsn)
    close_all()
    assert not pool.closed


def test_the_master_is_told_of_a_worker_that_ended_without_worker_exit():
    ends = []
    for closes in (True, False):
        worker = worker_of("sync", age=7)
        hooks.child_exit(None, worker)  # of an earlier one that nobody knew
        Child(partial(_work, worker, closes)).answer()
        hooks.child_exit(None, worker)
        hooks.child_exit(None, worker)
        ends.append(worker.log.of("info"))
    assert ends[0] == []
    assert [names("ended without closing its pools")(line) for line in ends[1]] == [True]


def _work(worker: Any, closes: bool) -> None:
    worker.pid = os.getpid()
    hooks.post_worker_init(worker)
    if closes:
        hooks.worker_exit(None, worker)


def test_gunicorn_takes_the_hooks():
    cfg = Config()
    for name in ("post_worker_init", "worker_exit", "child_exit"):
        cfg.set(name, getattr(hooks, name))
    assert get_arity(hooks.worker_exit) == 2


def test_the_hooks_import_no_framework():
    script = "import sys, penstock.integrations.gunicorn; print('gunicorn' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
