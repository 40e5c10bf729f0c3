"""`psycopg2.connect` where it is not psycopg2's own, and connections that somebody else has made."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
import wrapt
from tests.drivers.test_tracers_psycopg3 import PASSWORD, Proxy, as_clerk, server_with_passwords

from penstock import ConnectionPool, MisuseError, ServerUnavailable
from penstock._drivers.psycopg2 import driver as own
from penstock.drivers import Adopts, NotAdopted, Recipe

__all__ = ["as_clerk", "server_with_passwords"]

PATIENCE = 20.0
conforming: Adopts[Any] = own.driver
plain = psycopg2.connect
seen: list[str] = []


class Recording(psycopg2.extensions.cursor):
    def execute(self, query, *args):
        seen.append(str(query))
        return super().execute(query, *args)


class Traced(psycopg2.extensions.connection):
    """A tracer's own class of connections."""

    def cursor(self, *args, **kwargs):
        return super().cursor(*args, **{"cursor_factory": Recording, **kwargs})


def by_a_cursor(*args, **kwargs):
    return plain(*args, **{**kwargs, "cursor_factory": Recording})


def by_a_default(*args, **kwargs):
    kwargs.setdefault("cursor_factory", Recording)
    return plain(*args, **kwargs)


@functools.wraps(plain)
def by_a_copy_that_pretends(*args, **kwargs):
    return plain(*args, **{**kwargs, "cursor_factory": Recording})


def by_a_class(*args, **kwargs):
    return plain(*args, **{**kwargs, "connection_factory": Traced})


class CursorProxy(wrapt.ObjectProxy):
    def execute(self, query, *args, **kwargs):
        seen.append(str(query))
        return self.__wrapped__.execute(query, *args, **kwargs)

    def __enter__(self):
        self.__wrapped__.__enter__()
        return self


class ConnectionProxy(Proxy):
    def cursor(self, *args, **kwargs):
        return CursorProxy(self.__wrapped__.cursor(*args, **kwargs))


def by_a_proxy(*args, **kwargs):
    return ConnectionProxy(plain(*args, **kwargs))


def by_two_proxies(*args, **kwargs):
    return Proxy2(ConnectionProxy(plain(*args, **kwargs)))


class Proxy2(wrapt.ObjectProxy):
    pass


WAYS = {
    each.__name__: each
    for each in (
        by_a_cursor,
        by_a_default,
        by_a_copy_that_pretends,
        by_a_class,
        by_a_proxy,
        by_two_proxies,
    )
}
WAYS["by_wrapt"] = wrapt.FunctionWrapper(
    plain,
    lambda wrapped, _, args, kwargs: wrapped(*args, **{**kwargs, "cursor_factory": Recording}),
)


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.clear()


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(psycopg2, "connect", WAYS[request.param])
    return request.param


@pytest.fixture
def pool_of(server):
    made = []

    def make(conninfo=None, **options):
        options = {"name": "traced", "max_size": 1, "timeout": PATIENCE, **options}
        made.append(ConnectionPool(conninfo or server.conninfo(), driver="psycopg2", **options))
        return made[-1]

    yield make
    for pool in made:
        pool.close(timeout=0)


def asked(*queries):
    return [each for each in seen if each in queries]


def run(conn, query):
    cursor = conn.cursor()
    cursor.execute(query)
    return cursor.fetchone()


def test_every_door_shows_a_tracer_its_statements(pool_of, way):
    pool = pool_of()
    queries = ("select 'execute'", "select 'connection'", "select 'getconn'", "select 'dedicated'")
    pool.execute(queries[0])
    with pool.connection() as conn:
        run(conn, queries[1])
    conn = pool.getconn()
    run(conn, queries[2])
    pool.putconn(conn)
    with pool.dedicated() as conn:
        run(conn, queries[3])
    assert asked(*queries) == list(queries)


def test_a_tracer_that_comes_and_goes_is_heard_at_each_opening(pool_of, monkeypatch):
    pool = pool_of()
    pool.execute("select 'before'")
    with monkeypatch.context() as patch:
        patch.setattr(psycopg2, "connect", by_a_proxy)
        pool.drain()
        pool.execute("select 'meanwhile'")
    pool.drain()
    pool.execute("select 'after'")
    assert asked("select 'before'", "select 'meanwhile'", "select 'after'") == [
        "select 'meanwhile'"
    ]


def test_a_connection_that_was_given_back_raises_and_is_lent_again(pool_of, way):
    pool = pool_of()
    first = pool.getconn()
    pool.putconn(first)
    with pytest.raises(MisuseError, match="given back"):
        run(first, "select 1")
    with pool.connection() as again:
        assert again is first
        again.autocommit = False
        again.isolation_level = "SERIALIZABLE"
    with pool.connection() as again:
        assert again.isolation_level is None, "what one borrower changed does not reach the next"
        assert run(again, "select 1") == (1,)


@pytest.mark.parametrize("options", [{"guard": True}, {"reset": "session"}, {"autocommit": True}])
def test_an_adopted_connection_takes_the_pools_options(pool_of, way, options):
    pool = pool_of(**options)
    kept = pool.getconn()
    run(kept, "select set_config('application_name', 'of one borrower', false)")
    pid = kept.info.backend_pid
    pool.putconn(kept)
    ((name,),) = pool.execute("show application_name")
    with pool.connection() as conn:
        assert bool(conn.autocommit) is bool(options.get("autocommit"))
        assert run(conn, "select 'last'") == ("last",)
        if options.get("guard"):
            assert conn is not kept
            with pytest.raises(psycopg2.InterfaceError):
                run(kept, "select 1")
        if options.get("reset"):
            assert name != "of one borrower"
            assert conn.info.backend_pid == pid
    assert asked("select 'last'")


def test_guard_keeps_an_adopted_connection_that_nobody_holds(pool_of, way):
    pool = pool_of(guard=True)
    pids = set()
    for _ in range(3):
        with pool.connection() as conn:
            pids.add(conn.info.backend_pid)
        del conn
    assert len(pids) == 1


def test_a_statement_of_an_adopted_connection_is_given_up_in_time(pool_of, way):
    pool = pool_of(statement_timeout_client=0.2)
    with pytest.raises(psycopg2.OperationalError, match="no answer within"):
        pool.execute("select pg_sleep(60)")
    assert pool.execute("select 1").fetchall() == [(1,)]


def test_a_child_lets_go_of_an_adopted_connection(pool_of, way):
    pool = pool_of()
    kept = pool.getconn()
    pool.putconn(kept)
    ((parent,),) = pool.execute("select pg_backend_pid()")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            ((pid,),) = pool.execute("select pg_backend_pid()")
            try:
                kept.cursor()
            except MisuseError:
                os.write(writer, str(pid).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as found:
        assert int(found.read()) != parent
    assert pool.execute("select pg_backend_pid()").fetchall() == [(parent,)]


def refused(pool):
    with pytest.raises(ServerUnavailable) as caught:
        pool.execute("select 1")
    return str(caught.value)


def test_what_a_replaced_connect_raises_is_told_as_itself_at_once(pool_of, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("no vault")

    monkeypatch.setattr(psycopg2, "connect", broken)
    text = refused(pool_of())
    assert "psycopg2.connect() raised: KeyError: 'no vault'" in text
    assert "look at psycopg2.connect()" in text


def closed(conn):
    conn.close()
    return conn


def in_a_transaction(conn):
    conn.cursor().execute("select 1")
    return conn


def without_the_factory(conn):
    dsn = conn.dsn
    conn.close()
    return plain(dsn)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (closed, "it is closed"),
        (in_a_transaction, "it is in a transaction"),
        (without_the_factory, "it is of psycopg2's own class"),
        (lambda conn: conn.close(), "it is a NoneType, and no psycopg2.extensions.connection"),
    ],
)
def test_what_cannot_be_adopted_is_refused_at_once(pool_of, monkeypatch, spoil, why):
    monkeypatch.setattr(psycopg2, "connect", lambda *a, **k: spoil(plain(*a, **k)))
    text = refused(pool_of())
    assert f"psycopg2.connect() gave a connection that cannot be used: {why}" in text


def test_a_connection_that_another_pool_has_is_refused_and_stays_open(pool_of, monkeypatch):
    kept: list[Any] = []

    def once(*args, **kwargs):
        kept[:] = kept or [plain(*args, **kwargs)]
        return kept[0]

    monkeypatch.setattr(psycopg2, "connect", once)
    pool = pool_of()
    with pool.connection() as conn:
        assert "it is in a pool already" in refused(pool_of(name="second"))
        assert run(conn, "select 1") == (1,)


def test_a_server_that_is_full_is_no_missing_password_where_connect_adds_it(
    pool_of, monkeypatch, as_clerk
):
    def with_password(dsn, **options):
        return plain(dsn, password=PASSWORD, **options)

    holder = with_password(as_clerk)
    monkeypatch.setattr(psycopg2, "connect", with_password)
    pool = pool_of(as_clerk)
    threading.Timer(0.5, holder.close).start()
    assert pool.execute("select 1").fetchall() == [(1,)]


def test_an_open_connection_becomes_a_link(server):
    conn = plain(server.conninfo(), connection_factory=Traced)
    conn.autocommit = True
    link: Any = own.driver.adopt(conn, Recipe(), PATIENCE)
    try:
        assert link.conn is conn
        assert isinstance(conn, Traced)
        link.prepare()
        conn.autocommit = False
        assert link.park()
        with pytest.raises(NotAdopted, match="in a pool already"):
            own.driver.adopt(conn, Recipe(), PATIENCE)
        link.lend()
        assert conn.autocommit, "as it was when it was adopted"
    finally:
        link.close()
