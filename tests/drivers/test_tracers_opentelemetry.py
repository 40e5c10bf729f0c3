"""OpenTelemetry's own instrumentations: the spans of each door, switched on before the pool is made and after."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import psycopg
import psycopg2
import pytest
from flask import Flask
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.instrumentation.psycopg2 import Psycopg2Instrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from penstock import AsyncConnectionPool, ConnectionPool
from penstock.integrations.flask import Penstock

PATIENCE = 20.0
INSTRUMENTORS: dict[str, Any] = {
    "psycopg": PsycopgInstrumentor,
    "psycopg2": Psycopg2Instrumentor,
    "asyncpg": AsyncPGInstrumentor,
}
DOORS = ("execute", "connection", "getconn", "dedicated")
QUERIES = [f"select '{door}'" for door in DOORS]


class Traces:
    """OpenTelemetry in one test: what is switched on is switched off at its end."""

    def __init__(self):
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.on = []

    def switch_on(self, driver, **options):
        instrumentor = INSTRUMENTORS[driver]()
        instrumentor.instrument(tracer_provider=self.provider, skip_dep_check=True, **options)
        self.on.append(instrumentor)

    def switch_off(self):
        while self.on:
            self.on.pop().uninstrument()

    def statements(self):
        found = [
            (span.attributes or {}).get("db.statement")
            for span in self.exporter.get_finished_spans()
        ]
        return [each for each in found if each in QUERIES]


@pytest.fixture
def traces(monkeypatch):
    # It puts bound methods back, and not what it found.
    for cls in (psycopg.Connection, psycopg.AsyncConnection):
        monkeypatch.setattr(cls, "connect", vars(cls)["connect"])
    for library in (psycopg, psycopg2, asyncpg):
        monkeypatch.setattr(library, "connect", library.connect)
    made = Traces()
    yield made
    made.switch_off()


@pytest.fixture(params=["before", "after"])
def when(request):
    return request.param


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_each_door_of_a_pool_for_threads_makes_spans(server, traces, driver, when):
    if when == "before":
        traces.switch_on(driver)
    with ConnectionPool(server.conninfo(), driver=driver, max_size=1, timeout=PATIENCE) as pool:
        if when == "after":
            pool.execute("select 1")
            traces.switch_on(driver)
            pool.drain()
        pool.execute(QUERIES[0])
        with pool.connection() as conn:
            conn.cursor().execute(QUERIES[1])
        conn = pool.getconn()
        conn.cursor().execute(QUERIES[2])
        pool.putconn(conn)
        with pool.dedicated() as conn:
            conn.cursor().execute(QUERIES[3])
        assert traces.statements() == QUERIES
        traces.switch_off()
        pool.drain()
        pool.execute(QUERIES[0])
        assert traces.statements() == QUERIES, "switched off"


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_each_door_of_a_pool_for_asyncio_makes_spans(server, traces, driver, when):
    async def run(conn, query):
        await (conn.fetch(query) if driver == "asyncpg" else conn.execute(query))

    async def play():
        if when == "before":
            traces.switch_on(driver)
        async with AsyncConnectionPool(
            server.conninfo(), driver=driver, max_size=1, timeout=PATIENCE
        ) as pool:
            if when == "after":
                await pool.execute("select 1")
                traces.switch_on(driver)
                await pool.drain()
            await pool.execute(QUERIES[0])
            async with pool.connection() as conn:
                await run(conn, QUERIES[1])
            conn = await pool.getconn()
            await run(conn, QUERIES[2])
            await pool.putconn(conn)
            async with pool.dedicated() as conn:
                await run(conn, QUERIES[3])
            assert traces.statements() == QUERIES
            traces.switch_off()
            await pool.drain()
            await pool.execute(QUERIES[0])
            assert traces.statements() == QUERIES, "switched off"

    asyncio.run(play())


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_request_of_flasks_has_its_statements_as_children(server, traces, driver):
    traces.switch_on(driver)
    app = Flask(__name__)
    app.config["PENSTOCK_DATABASE_URI"] = server.conninfo()
    app.config["PENSTOCK_POOL_OPTIONS"] = {"driver": driver}
    db = Penstock(app)
    FlaskInstrumentor().instrument_app(app, tracer_provider=traces.provider)

    @app.get("/")
    def view():
        db.conn.cursor().execute(QUERIES[1])
        return "done"

    try:
        assert app.test_client().get("/").text == "done"
    finally:
        app.extensions["penstock"].close()
    spans = traces.exporter.get_finished_spans()
    statement = next(s for s in spans if (s.attributes or {}).get("db.statement") == QUERIES[1])
    request = next(s for s in spans if s.name == "GET /")
    assert statement.parent is not None
    assert statement.parent.span_id == request.context.span_id


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_sqlcommenter_reaches_the_server(server, traces, driver):
    traces.switch_on(driver, enable_commenter=True)
    with ConnectionPool(server.conninfo(), driver=driver, max_size=1, timeout=PATIENCE) as pool:
        ((text,),) = pool.execute(
            "select query from pg_stat_activity where pid = pg_backend_pid()"
        ).fetchall()
    assert "traceparent=" in text


@pytest.mark.parametrize("options", [{"guard": True}, {"reset": "session"}])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_spans_go_on_when_a_connection_is_lent_again(server, traces, driver, options):
    traces.switch_on(driver)
    with ConnectionPool(
        server.conninfo(), driver=driver, max_size=1, timeout=PATIENCE, **options
    ) as pool:
        kept = []
        for query in QUERIES:
            with pool.connection() as conn:
                conn.cursor().execute(query)
                kept.append(conn)
    assert traces.statements() == QUERIES
