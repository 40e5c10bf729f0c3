"""Orders: a FastAPI app with one connection per request. Run it by ``uvicorn shop:app``."""  # noqa: INP001

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import psycopg
from fastapi import Depends, FastAPI, HTTPException, Response, WebSocket
from fastapi.responses import StreamingResponse

from penstock import AsyncConnectionPool
from penstock.integrations.asgi import Penstock

pool = AsyncConnectionPool(os.environ.get("DATABASE_URL", ""), max_size=10)  # opens nothing
db = Penstock(pool, retry_after=2)

Connection = Annotated[psycopg.AsyncConnection[tuple[Any, ...]], Depends(db.connection)]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Make the table. The pool is open before this begins, and is closed after it has ended."""
    async with db.unit():
        await db.execute("select pg_advisory_xact_lock(1)")  # each worker does this
        await db.execute(
            "create table if not exists orders (id serial primary key, item text not null)"
        )
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(db.middleware)


@app.post("/orders", status_code=201)
async def add(item: str, conn: Connection) -> dict[str, int]:
    """Committed before the client hears of it: a commit that fails is a 500."""
    rows = await conn.execute("insert into orders (item) values (%s) returning id", (item,))
    row = await rows.fetchone()
    assert row is not None
    return {"id": row[0]}


@app.get("/orders/{number}")
async def show(number: int, conn: Connection) -> dict[str, str]:
    """What was ordered."""
    rows = await conn.execute("select item from orders where id = %s", (number,))
    row = await rows.fetchone()
    if row is None:
        raise HTTPException(404)  # an answer of 400 or more rolls back
    return {"item": row[0]}


@app.get("/orders.csv")
async def export(conn: Connection) -> StreamingResponse:
    """All orders, as the server sends them: the stream keeps the connection until its end."""

    async def lines() -> AsyncIterator[str]:
        async with conn.cursor(name="export") as rows:
            await rows.execute("select id, item from orders order by id")
            async for number, item in rows:
                yield f"{number},{item}\n"

    return StreamingResponse(lines(), media_type="text/csv")


@app.websocket("/feed")
async def feed(websocket: WebSocket) -> None:
    """A websocket has no connection of its own: each message has a unit of work."""
    await websocket.accept()
    async for item in websocket.iter_text():
        async with db.unit():
            await db.execute("insert into orders (item) values (%s)", (item,))
        await websocket.send_text("ordered")


@app.get("/healthz")
def healthz(response: Response) -> dict[str, str]:
    """Answers from the pool's state; borrows nothing, so it needs no loop."""
    health = db.health()
    response.status_code = 200 if health.ready else 503
    return {"why": health.why}
