"""Orders on Tornado's own handlers: ``python shop.py``, or ``gunicorn -k tornado shop:app``."""  # noqa: INP001

import asyncio
import os
import signal
from typing import Any

import tornado.iostream
import tornado.web
import tornado.websocket

from penstock import AsyncConnectionPool, PoolTimeout, ServerUnavailable, TooManyRequests

pool = AsyncConnectionPool(os.environ.get("DATABASE_URL", ""), max_size=10)  # opens nothing

TABLE = "create table if not exists orders (id serial primary key, item text not null)"


class Handler(tornado.web.RequestHandler):
    """What all have in common: a full pool or an unreachable server is a 503."""

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer an error that no handler has handled."""
        error = kwargs.get("exc_info", (None, None))[1]
        if isinstance(error, (PoolTimeout, ServerUnavailable, TooManyRequests)):
            status_code = 503
            self.set_header("Retry-After", "2")
        self.set_status(status_code)
        self.finish({"error": self._reason})


class Orders(Handler):
    """POST /orders?item=tea."""

    async def post(self) -> None:
        """Committed at the block's end; Tornado answers when the method has returned."""
        async with pool.connection() as conn:
            rows = await conn.execute(
                "insert into orders (item) values (%s) returning id", (self.get_argument("item"),)
            )
            row = await rows.fetchone()
        self.set_status(201)
        self.write({"id": row and row[0]})


class Order(Handler):
    """GET /orders/1."""

    async def get(self, number: str) -> None:
        """One statement needs no block: one round trip, and the connection is back."""
        rows = await pool.execute("select item from orders where id = %s", (int(number),))
        found = rows.fetchone()
        if found is None:
            raise tornado.web.HTTPError(404)
        self.write({"item": found[0]})


class Export(Handler):
    """GET /orders.csv: a stream, sent while it is read."""

    async def get(self) -> None:
        """If the client goes away, `flush` raises: the block's end rolls back and gives back."""
        self.set_header("Content-Type", "text/csv")
        try:
            async with pool.connection() as conn, conn.cursor(name="export") as rows:
                await rows.execute("select id, item from orders order by id")
                async for number, item in rows:
                    self.write(f"{number},{item}\n")
                    await self.flush()
        except tornado.iostream.StreamClosedError:
            return


class Feed(tornado.websocket.WebSocketHandler):
    """A websocket: it borrows for each message, and has nothing in between."""

    async def on_message(self, message: str | bytes) -> None:
        """Order what is said."""
        async with pool.connection() as conn:
            await conn.execute("insert into orders (item) values (%s)", (message,))
        await self.write_message("ordered")


class Health(Handler):
    """GET /healthz: from the pool's state; nothing is borrowed."""

    def get(self) -> None:
        """Say whether the pool can serve, and why not."""
        health = pool.health()
        self.set_status(200 if health.ready else 503)
        self.write({"why": health.why})


app = tornado.web.Application(
    [
        (r"/orders", Orders),
        (r"/orders/(\d+)", Order),
        (r"/orders.csv", Export),
        (r"/feed", Feed),
        (r"/healthz", Health),
    ]
)


async def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with pool:
        await pool.execute(TABLE)
        server = app.listen(int(os.environ.get("PORT", "8888")), "127.0.0.1")
        await stop.wait()
        server.stop()
        await server.close_all_connections()


if __name__ == "__main__":
    asyncio.run(main())
