# ruff: noqa: INP001  a script, to be run where it is
"""Orders from a database, and large files, on Bottle under gunicorn's tornado workers: `python shop.py`.

Bottle's gunicorn server loads this module in the master and forks the workers from it, so the pool
below is in all 15. Each opens a connection of its own when it needs one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bottle import Bottle, HTTPError, HTTPResponse, response, static_file

from penstock.integrations.bottle import Penstock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

FILES = Path(__file__).parent

app = Bottle()
# A worker of this class does one thing at a time, and so does its connection.
plugin = app.install(Penstock(os.environ.get("DATABASE_URL", "dbname=shop"), max_size=1))


@app.get("/orders/<number:int>")
def order(number: int, db: Connection) -> dict[str, Any]:
    """Answer in which state an order is."""
    row = db.execute("select state from orders where id = %s", (number,)).fetchone()
    if row is None:
        raise HTTPError(404, "no such order")
    return {"number": number, "state": row[0], "worker": os.getpid()}


@app.post("/orders/<number:int>/pay")
def pay(number: int, db: Connection) -> HTTPResponse:
    """Mark an order as paid; the answer commits."""
    done = db.execute("update orders set state = 'paid' where id = %s", (number,))
    return HTTPResponse(status=204 if done.rowcount else 404)


@app.get("/orders.csv")
def export(db: Connection) -> Iterator[str]:
    """Stream all orders; the connection comes back with the last line, or when the client goes."""
    response.content_type = "text/csv"
    with db.cursor(name="export") as rows:
        rows.execute("select id, state from orders order by id")
        for number, state in rows:
            yield f"{number},{state}\n"


@app.get("/files/<name:path>")
def file(name: str) -> HTTPResponse:
    """Send a file. This view takes no connection, and gets none."""
    return static_file(name, root=str(FILES))


if __name__ == "__main__":
    app.run(host="localhost", port=8080, server="gunicorn", workers=15, worker_class="tornado")
