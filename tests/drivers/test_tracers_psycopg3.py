"""psycopg's `connect` where it is not psycopg's own: a tracer's, or a connection class's."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pickle
import threading
from types import MethodType
from typing import Any

import psycopg
import pytest
import wrapt

from penstock import AsyncConnectionPool, ConnectionPool, MisuseError, ServerUnavailable
from penstock._drivers.psycopg3 import aio_driver
from penstock._drivers.psycopg3 import driver as psycopg3
from penstock.drivers import Adopts, AsyncAdopts, NotAdopted, Recipe
from pytest_penstock.postgres import HBA, Server

PATIENCE = 20.0
conforming: Adopts[psycopg.Connection[Any]] = psycopg3.driver
conforming_async: AsyncAdopts[psycopg.AsyncConnection[Any]] = aio_driver.driver
KINDS = ("threads", "asyncio")

seen: list[str] = []


class Recording(psycopg.Cursor):
    def execute(self, query, *args, **kwargs):
        seen.append(str(query))
        return super().execute(query, *args, **kwargs)


class AsyncRecording(psycopg.AsyncCursor):
    async def execute(self, query, *args, **kwargs):
        seen.append(str(query))
        return await super().execute(query, *args, **kwargs)


CURSORS = {psycopg.Connection: Recording, psycopg.AsyncConnection: AsyncRecording}


# -- how tracers replace a function -------------------------------------------------------------------


def as_a_class_method(cls):
    """Elastic's and many a project's own way."""
    plain = vars(cls)["connect"].__func__
    cursor = CURSORS[cls]

    def traced(cls, *args, **kwargs):
        return plain(cls, *args, **{**kwargs, "cursor_factory": cursor})

    return "connect", classmethod(traced)


def as_a_copy_that_pretends(cls):
    plain = vars(cls)["connect"].__func__
    cursor = CURSORS[cls]

    @functools.wraps(plain)
    def traced(cls, *args, **kwargs):
        return plain(cls, *args, **{**kwargs, "cursor_factory": cursor})

    return "connect", classmethod(traced)


def by_wrapt(cls):
    """OpenTelemetry's, Datadog's and New Relic's way."""

    def traced(wrapped, instance, args, kwargs):
        return wrapped(*args, **{**kwargs, "cursor_factory": CURSORS[cls]})

    return "connect", wrapt.FunctionWrapper(vars(cls)["connect"], traced)


class Proxy(wrapt.ObjectProxy):
    """What tracers put around a connection; it is none of psycopg's classes."""

    def cursor(self, *args, **kwargs):
        return CursorProxy(self.__wrapped__.cursor(*args, **kwargs))


class CursorProxy(wrapt.ObjectProxy):
    def execute(self, query, *args, **kwargs):
        seen.append(str(query))
        return self.__wrapped__.execute(query, *args, **kwargs)

    def __iter__(self):
        return iter(self.__wrapped__)


def by_a_proxy(cls):
    def traced(wrapped, instance, args, kwargs):
        if cls is psycopg.Connection:
            return Proxy(wrapped(*args, **kwargs))

        async def connected():
            return Proxy(await wrapped(*args, **kwargs))

        return connected()

    return "connect", wrapt.FunctionWrapper(vars(cls)["connect"], traced)


WAYS = {
    each.__name__: each
    for each in (as_a_class_method, as_a_copy_that_pretends, by_wrapt, by_a_proxy)
}


@contextlib.contextmanager
def instrumented(way, kind):
    cls = psycopg.Connection if kind == "threads" else psycopg.AsyncConnection
    before = vars(cls)["connect"]
    name, replaced = WAYS[way](cls)
    setattr(cls, name, replaced)
    try:
        yield
    finally:
        setattr(cls, name, before)


# -- one play on both runtimes ------------------------------------------------------------------------


class Play:
    """A pool's doors, on threads or on a loop: what they do is told by the same names."""

    def __init__(self, kind, conninfo, **options):
        self.kind = kind
        self.options = {"name": "traced", "max_size": 1, "timeout": PATIENCE, **options}
        self.conninfo = conninfo

    def run(self, act):
        """`act(pool, do)`, where `do` runs a statement on a connection through a cursor."""
        if self.kind == "threads":
            with ConnectionPool(self.conninfo, **self.options) as pool:
                return act(Doors(pool))
        return asyncio.run(self._run(act))

    async def _run(self, act):
        async with AsyncConnectionPool(self.conninfo, **self.options) as pool:
            loop = asyncio.get_running_loop()
            # The act is plain code, in a thread of its own; each door's call runs on the loop.
            return await asyncio.to_thread(act, Doors(pool, loop))


class Doors:
    def __init__(self, pool, loop=None):
        self.pool = pool
        self._loop = loop

    def _do(self, answer):
        if self._loop is None:
            return answer
        return asyncio.run_coroutine_threadsafe(answer, self._loop).result(PATIENCE)

    def execute(self, query):
        return self._do(self.pool.execute(query)).fetchall()

    def by_connection(self, *queries, call=None):
        async def play():
            async with self.pool.connection() as conn:
                for query in queries:
                    await conn.cursor().execute(query)
                return None if call is None else call(conn)

        if self._loop is not None:
            return self._do(play())
        with self.pool.connection() as conn:
            for query in queries:
                conn.cursor().execute(query)
            return None if call is None else call(conn)

    def drain(self):
        self._do(self.pool.drain())

    def getconn(self):
        return self._do(self.pool.getconn())

    def putconn(self, conn):
        return self._do(self.pool.putconn(conn))

    def run(self, conn, query):
        return self._do(conn.cursor().execute(query))

    def by_getconn(self, query):
        conn = self.getconn()
        self.run(conn, query)
        self.putconn(conn)

    def by_dedicated(self, query):
        async def play():
            async with self.pool.dedicated() as conn:
                await conn.cursor().execute(query)

        if self._loop is not None:
            self._do(play())
            return
        with self.pool.dedicated() as conn:
            conn.cursor().execute(query)


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.clear()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def asked(*queries):
    return [each for each in seen if each in queries]


def test_every_door_shows_a_tracer_its_statements(server, kind, way):
    queries = ("select 'execute'", "select 'connection'", "select 'getconn'", "select 'dedicated'")

    def act(doors):
        doors.execute(queries[0])
        doors.by_connection(queries[1])
        doors.by_getconn(queries[2])
        doors.by_dedicated(queries[3])

    with instrumented(way, kind):
        Play(kind, server.conninfo()).run(act)
    assert asked(*queries) == list(queries)


def test_a_tracer_that_comes_and_goes_is_heard_at_each_opening(server, kind, way):
    def act(doors):
        doors.execute("select 'before'")
        with instrumented(way, kind):
            doors.drain()
            doors.execute("select 'meanwhile'")
        doors.drain()
        doors.execute("select 'after'")

    Play(kind, server.conninfo()).run(act)
    assert asked("select 'before'", "select 'meanwhile'", "select 'after'") == [
        "select 'meanwhile'"
    ]


def test_a_connection_that_was_given_back_raises_and_is_lent_again(server, kind, way):
    def act(doors):
        first = doors.getconn()
        doors.putconn(first)
        with pytest.raises(MisuseError, match="given back"):
            doors.run(first, "select 1")
        again = doors.getconn()
        assert again is first
        doors.run(again, "select 1")
        doors.putconn(again)

    with instrumented(way, kind):
        Play(kind, server.conninfo()).run(act)


def test_changes_of_one_borrower_do_not_reach_the_next(server, kind, way):
    def change(conn):
        conn.row_factory = psycopg.rows.dict_row
        conn.prepare_threshold = None

    def act(doors):
        doors.by_connection("select 1", call=change)
        assert doors.by_connection(call=lambda conn: conn.row_factory) is psycopg.rows.tuple_row
        assert doors.by_connection(call=lambda conn: conn.prepare_threshold) == 5

    with instrumented(way, kind):
        Play(kind, server.conninfo()).run(act)


@pytest.mark.parametrize("options", [{"guard": True}, {"reset": "session"}, {"autocommit": True}])
def test_an_adopted_connection_takes_the_pools_options(server, kind, way, options):
    def act(doors):
        kept = doors.getconn()
        doors.run(kept, "set application_name to 'of one borrower'")
        pid = kept.info.backend_pid
        doors.putconn(kept)
        ((name,),) = doors.execute("show application_name")
        conn = doors.getconn()
        assert bool(conn.autocommit) is bool(options.get("autocommit"))
        if options.get("guard"):
            assert conn is not kept
            with pytest.raises(MisuseError):
                doors.run(kept, "select 1")
        if options.get("reset"):
            assert name != "of one borrower"
            assert conn.info.backend_pid == pid
        doors.run(conn, "select 'last'")
        doors.putconn(conn)

    with instrumented(way, kind):
        Play(kind, server.conninfo(), **options).run(act)
    assert asked("select 'last'")


def test_a_statement_of_an_adopted_connection_is_given_up_in_time(server, kind, way):
    def act(doors):
        with pytest.raises(psycopg.OperationalError, match="no answer within"):
            doors.execute("select pg_sleep(60)")
        assert doors.execute("select 1") == [(1,)]

    with instrumented(way, kind):
        Play(kind, server.conninfo(), statement_timeout_client=0.2).run(act)


def test_the_defaults_of_the_pool_reach_the_server(server, kind, way):
    for conninfo in (server.conninfo(), f"postgresql:///?{as_query(server)}"):
        with instrumented(way, kind):
            ((name,),) = Play(kind, conninfo).run(
                lambda doors: doors.execute("show application_name")
            )
        assert "/traced/" in name
        assert seen


def as_query(server):
    parsed = psycopg.conninfo.conninfo_to_dict(server.conninfo())
    return "&".join(f"{key}={value}" for key, value in parsed.items())


# -- psycopg.connect() alone --------------------------------------------------------------------------


def test_psycopg_connect_that_was_replaced_alone_is_called(server, monkeypatch):
    plain = psycopg.connect

    def traced(*args, **kwargs):
        return plain(*args, **{**kwargs, "cursor_factory": Recording})

    monkeypatch.setattr(psycopg, "connect", traced)
    Play("threads", server.conninfo()).run(lambda doors: doors.execute("select 'module'"))
    assert asked("select 'module'")


# -- a connection class's own connect() ---------------------------------------------------------------


def classes(body):
    """The same class for both runtimes."""

    class Own(psycopg.Connection):
        @classmethod
        def connect(cls, conninfo="", **kwargs):
            return body(super(), conninfo, kwargs)

    class AsyncOwn(psycopg.AsyncConnection):
        @classmethod
        async def connect(cls, conninfo="", **kwargs):
            answer = body(super(), conninfo, kwargs)
            return await answer if asyncio.iscoroutine(answer) else answer

    return {"threads": Own, "asyncio": AsyncOwn}


PASSWORD = "r1ght-w0rd"


@pytest.fixture(scope="module")
def server_with_passwords():
    with Server(hba=("host all clerk 127.0.0.1/32 scram-sha-256", *HBA)) as running:
        running.execute(f"create role clerk login password '{PASSWORD}' connection limit 1")
        yield running


@pytest.fixture
def as_clerk(server_with_passwords):
    return server_with_passwords.conninfo(user="clerk")


def test_a_class_that_fetches_its_password_in_connect_gets_in(as_clerk, kind):

    def body(parent, conninfo, kwargs):
        return parent.connect(conninfo, password=PASSWORD, **kwargs)

    cls = classes(body)[kind]
    play = Play(kind, as_clerk, connection_class=cls)
    assert play.run(lambda doors: doors.by_connection(call=lambda conn: isinstance(conn, cls)))


def test_options_of_the_classes_own_reach_its_connect(server, kind):
    got = []

    def body(parent, conninfo, kwargs):
        got.append(kwargs.pop("vault_role"))
        return parent.connect(conninfo, **kwargs)

    play = Play(
        kind,
        server.conninfo(),
        connection_class=classes(body)[kind],
        kwargs={"vault_role": "reader"},
    )
    assert play.run(lambda doors: doors.execute("select 1")) == [(1,)]
    assert got == ["reader"]


def failure_of(kind, conninfo, **options):
    with pytest.raises(ServerUnavailable) as caught:
        Play(kind, conninfo, **options).run(lambda doors: doors.execute("select 1"))
    return caught.value


def test_what_a_classes_connect_raises_is_told_as_itself_at_once(server, kind):
    def body(parent, conninfo, kwargs):
        raise KeyError("no vault")

    error = failure_of(kind, server.conninfo(), connection_class=classes(body)[kind])
    assert "Own.connect() raised: KeyError: 'no vault'" in str(error)
    assert "look at" in str(error)


def test_a_token_service_that_is_down_may_be_up_later(server, kind):
    tries = []

    def body(parent, conninfo, kwargs):
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionRefusedError("no token service")
        return parent.connect(conninfo, **kwargs)

    play = Play(kind, server.conninfo(), connection_class=classes(body)[kind])
    assert play.run(lambda doors: doors.execute("select 1")) == [(1,)]


def test_a_wrong_password_of_a_classes_own_refuses_at_once_and_is_not_shown(as_clerk, kind):

    def body(parent, conninfo, kwargs):
        return parent.connect(conninfo, password="wr0ng-w0rd", **kwargs)

    error = failure_of(kind, as_clerk, connection_class=classes(body)[kind])
    assert "password" in str(error)
    assert b"wr0ng-w0rd" not in pickle.dumps(error)


def test_a_server_that_is_full_is_no_missing_password_where_connect_adds_it(as_clerk, kind):
    """The attempt that diagnoses has the password that the class's connect() added."""
    holder = psycopg.connect(as_clerk, password=PASSWORD)

    def body(parent, conninfo, kwargs):
        return parent.connect(conninfo, password=PASSWORD, **kwargs)

    def act(doors):
        threading.Timer(0.5, holder.close).start()
        return doors.execute("select 1")

    assert Play(kind, as_clerk, connection_class=classes(body)[kind]).run(act) == [(1,)]


def closed(conn):
    conn.pgconn.finish()
    return conn


def in_a_transaction(conn):
    conn.pgconn.exec_(b"begin")
    return conn


def in_a_pipeline(conn):
    conn.pgconn.enter_pipeline_mode()
    return conn


def inside_a_block(conn):
    conn._num_transactions = 1
    return conn


def of_another_pool(conn):
    conn._pool = object()
    return conn


def nothing(conn):
    conn.pgconn.finish()


def of_another_library(conn):
    conn.pgconn.finish()
    return object()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (closed, "it is closed"),
        (in_a_transaction, "it is in a transaction"),
        (in_a_pipeline, "it is in a pipeline"),
        (inside_a_block, "it is in somebody's use"),
        (of_another_pool, "it is in a pool already"),
        (nothing, "it is a NoneType, and no psycopg."),
        (of_another_library, "it is a object, and no psycopg."),
    ],
)
def test_what_cannot_be_adopted_is_refused_at_once(server, kind, spoil, why):
    def body(parent, conninfo, kwargs):
        answer = parent.connect(conninfo, **kwargs)
        if kind == "threads":
            return spoil(answer)

        async def connected():
            return spoil(await answer)

        return connected()

    error = failure_of(kind, server.conninfo(), connection_class=classes(body)[kind])
    assert why in str(error)
    assert "Own.connect() gave a connection that cannot be used" in str(error)


def test_a_connection_that_another_pool_has_is_refused_and_stays_open(server, kind):
    kept: list[Any] = []

    def body(parent, conninfo, kwargs):
        if kind == "threads":
            kept[:] = kept or [parent.connect(conninfo, **kwargs)]
            return kept[0]

        async def connected():
            kept[:] = kept or [await parent.connect(conninfo, **kwargs)]
            return kept[0]

        return connected()

    def act(doors):
        conn = doors.getconn()
        error = None
        other = Doors(type(doors.pool)(server.conninfo(), **options), doors._loop)
        try:
            with pytest.raises(ServerUnavailable, match="it is in a pool already"):
                if doors._loop is None:
                    other.execute("select 1")
                else:
                    other.execute("select 1")
        finally:
            if doors._loop is None:
                other.pool.close(timeout=0)
            else:
                other._do(other.pool.close(timeout=0))
        doors.run(conn, "select 1")
        doors.putconn(conn)
        return error

    options = {"connection_class": classes(body)[kind], "max_size": 1, "timeout": PATIENCE}
    Play(kind, server.conninfo(), connection_class=options["connection_class"]).run(act)


# -- by the driver itself -----------------------------------------------------------------------------


def test_what_is_original_is_asked_of_the_function_itself(monkeypatch):
    from penstock._drivers.psycopg3.adopt import own_connect

    recipe = Recipe()
    for cls in (psycopg.Connection, psycopg.AsyncConnection):
        assert own_connect(recipe, cls) is None

        class Plain(cls):  # type: ignore[misc, valid-type]
            pass

        assert own_connect(Recipe(connection_class=Plain), cls) is None

        class Resolving(cls):  # type: ignore[misc, valid-type]
            @classmethod
            def _get_connection_params(cls, conninfo, **kwargs):
                return super()._get_connection_params(conninfo, **kwargs)

        assert own_connect(Recipe(connection_class=Resolving), cls) is not None
    monkeypatch.setattr(
        psycopg.Connection, "connect", MethodType(lambda cls, *a, **k: None, psycopg.Connection)
    )
    assert own_connect(recipe, psycopg.Connection) is not None


def test_an_open_connection_becomes_a_link(server):
    conn: Any = psycopg.connect(server.conninfo(), row_factory=psycopg.rows.dict_row)
    link: Any = psycopg3.driver.adopt(conn, Recipe(), PATIENCE)
    try:
        assert link.conn is conn
        assert link.fd == conn.fileno()
        with pytest.raises(NotAdopted, match="in a pool already"):
            psycopg3.driver.adopt(conn, Recipe(), PATIENCE)
        link.prepare()
        conn.row_factory = psycopg.rows.tuple_row
        assert link.park()
        with pytest.raises(NotAdopted, match="in a pool already"):
            psycopg3.driver.adopt(conn, Recipe(), PATIENCE)
        link.lend()
        assert vars(conn)["row_factory"] is psycopg.rows.dict_row, "as it was when it was adopted"
    finally:
        link.close()


def test_a_child_lets_go_of_an_adopted_connection(server, way):
    def act(doors):
        kept = doors.getconn()
        doors.putconn(kept)
        ((parent,),) = doors.execute("select pg_backend_pid()")
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                ((pid,),) = doors.execute("select pg_backend_pid()")
                try:
                    kept.cursor()
                except MisuseError:
                    os.write(writer, str(pid).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with os.fdopen(reader) as found:
            pid = int(found.read())
        assert pid != parent
        assert doors.execute("select pg_backend_pid()") == [(parent,)]

    with instrumented(way, "threads"):
        Play("threads", server.conninfo()).run(act)


def test_the_errors_can_be_pickled(server):
    error = pickle.loads(pickle.dumps(NotAdopted("it is closed", "open it")))
    assert (str(error), error.next_step, error.taken) == ("it is closed", "open it", False)
    assert aio_driver.driver.name == "psycopg"
