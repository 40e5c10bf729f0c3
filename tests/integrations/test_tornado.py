"""Tornado's own handlers with the pool for asyncio: the example, on Tornado alone and under gunicorn."""

import asyncio
import contextlib
import secrets
from pathlib import Path

import pytest
from tests.forks import until
from tests.integrations.serving import Served, free_port

from penstock import AsyncConnectionPool

EXAMPLE = Path(__file__).parents[2] / "examples" / "tornado_handlers"
GUNICORN = ["-m", "gunicorn", "--bind=unix:{socket}", "--no-control-socket", "--workers=2"]
WAYS = {
    "tornado": ["shop.py"],
    "gunicorn": [*GUNICORN, "-k", "tornado", "--preload", "shop:app"],
}


@pytest.fixture
def database(server):
    """One of the test's own, to see sessions of nobody else in it."""
    name = f"tornado_{secrets.token_hex(4)}"
    server.execute(f"create database {name}")
    server.execute("create table orders (id serial primary key, item text not null)", dbname=name)
    yield server.conninfo(dbname=name, over="tcp")
    server.execute(f"drop database {name} with (force)")


def sessions(server, conninfo):
    name = dict(part.split("=", 1) for part in conninfo.split())["dbname"]
    of = f"datname = '{name}' and backend_type = 'client backend'"  # autovacuum is none of ours
    query = f"select count(*) from pg_stat_activity where {of}"
    return int(server.execute(query)[0][0])


@pytest.mark.parametrize("way", WAYS)
def test_the_example_gives_everybody_his_own_and_leaves_no_session(way, server, database):
    port = free_port() if way == "tornado" else None
    with Served(WAYS[way], EXAMPLE, port, DATABASE_URL=database, PORT=str(port)) as served:
        added = served.ask(*(("POST", f"/orders?item=item{n}") for n in range(100)))
        assert {answer.status_code for answer in added} == {201}, served.log()
        shown = served.ask(*(("GET", f"/orders/{each.json()['id']}") for each in added))
        assert [answer.json() for answer in shown] == [{"item": f"item{n}"} for n in range(100)]
        (missing, lines, health) = served.ask(
            ("GET", "/orders/0"), ("GET", "/orders.csv"), ("GET", "/healthz")
        )
        assert (missing.status_code, health.status_code) == (404, 200)
        assert len(lines.text.splitlines()) == 100
        if port is not None:
            assert served.talk("/feed", "tea", "coffee") == ["ordered"] * 2
            assert served.ask(("GET", "/orders.csv"))[0].text.endswith(",tea\n102,coffee\n")
        assert 1 <= sessions(server, database) <= 20
        served.stop()
        until(lambda: sessions(server, database) == 0, "no session is left")
        assert "Traceback" not in served.log(), served.log()


# -- in this process -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(conninfo, handlers, **options):
    """An app on a pool of one connection; gives a client and the pool."""
    pytest.importorskip("tornado")
    import httpx
    import tornado.web

    pool: AsyncConnectionPool = AsyncConnectionPool(conninfo, **{"max_size": 1, **options})
    made = [(path, type("Made", bases, {**body, "pool": pool})) for path, bases, body in handlers]
    server = tornado.web.Application(made).listen(0, "127.0.0.1")
    (socket,) = server._sockets.values()
    base = f"http://127.0.0.1:{socket.getsockname()[1]}"
    async with pool, httpx.AsyncClient(base_url=base, timeout=30) as client:
        yield client, pool
        server.stop()
        await server.close_all_connections()


def test_an_error_rolls_back_and_a_full_pool_is_waited_for(database):
    import tornado.web

    async def post(self):
        async with self.pool.connection() as conn:
            await conn.execute("insert into orders (item) values ('lost')")
            raise tornado.web.HTTPError(409)

    async def get(self):
        rows = await self.pool.execute("select count(*) from orders, pg_sleep(0.01)")
        self.write(str(rows.fetchone()[0]))

    async def main():
        handlers = [("/", (tornado.web.RequestHandler,), {"post": post, "get": get})]
        async with serving(database, handlers) as (client, pool):
            assert (await client.post("/")).status_code == 409
            answers = await asyncio.gather(*(client.get("/") for _ in range(20)))
            assert {answer.text for answer in answers} == {"0"}
            assert pool.stats().in_use == 0

    asyncio.run(main())


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_handler_that_is_cancelled_when_its_client_goes_gives_its_connection_back(
    driver, database
):
    """Tornado lets a handler run on when its client has gone, unless it is cancelled by hand."""
    import tornado.web

    begun: list = []

    async def get(self):
        begun.append(asyncio.current_task())
        async with self.pool.connection() as conn:
            await conn.execute("select pg_sleep(60)")

    def on_connection_close(self):
        begun[0].cancel()

    async def main():
        body = {"get": get, "on_connection_close": on_connection_close}
        handlers = [("/", (tornado.web.RequestHandler,), body)]
        async with serving(database, handlers, driver=driver) as (client, pool):
            asking = asyncio.create_task(client.get("/"))
            while not pool.stats().in_use:  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.01)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
            await pool.execute("select 1", timeout=30)

    asyncio.run(main())
