"""The pools which the bank can use, each as its own people use it, behind the face of `bank.database.db`.

penstock's is the Flask extension itself. A peer is used as the well-known answers say: borrowed by the
first statement of a request, committed after the view, given back at the request's end.

It must not know what the bank does with a connection. It adds nothing to a pool: no retry, no check,
no closing.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from flask import g

from penstock.config.pool_config import PoolConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask import Flask, Response

# Per worker. Fewer connections than the worker has threads, so that requests have to wait for one;
# and longer patience than the database needs for a restart, shorter than the client's.
MIN_SIZE = 2
MAX_SIZE = 4
TIMEOUT = 5.0
# The section of the INI file, as in the post.
SECTION = "POSTGRES"


class Figures(NamedTuple):
    """A pool at this moment."""

    idle: int
    in_use: int
    waiting: int


class Source(Protocol):
    """Where the bank's connections come from."""

    def init_app(self, app: Any) -> None:
        """Make the pool, at import time of the service, as people do."""

    @property
    def conn(self) -> Any:
        """The connection of this request, borrowed now if it was not yet."""

    def figures(self) -> Figures:
        """The pool's own word about itself."""


class Extension:
    """penstock's Flask extension, as the example has it."""

    def __init__(self, db: Any) -> None:
        self._db = db
        self._pools: Any = {}

    def init_app(self, app: Any) -> None:
        """Do as the example does."""
        self._db.init_app(app)
        self._pools = flask_app(app).extensions["penstock"].pools

    @property
    def conn(self) -> Any:
        """The extension's."""
        return self._db.conn

    def figures(self) -> Figures:
        """The pool's own word about itself."""
        stats = self._pools["default"].stats()
        return Figures(stats.idle, stats.in_use, stats.waiting)


@dataclass(frozen=True, slots=True)
class Peer:
    """One kind of pool.

    Attributes:
        lend: borrow and give back, committing, as the pool's documentation shows it.
        figures: the pool's own word about itself.
    """

    lend: Callable[[], AbstractContextManager[Any]]
    figures: Callable[[], Figures]


class PerRequest:
    """A peer's connections, one for each request that wants any."""

    def __init__(self, make: Callable[[str], Peer]) -> None:
        self._make = make
        self._peer: Peer | None = None

    def init_app(self, app: Any) -> None:
        """Make the pool, and commit and give back where Flask lets us."""
        config = PoolConfig.from_file(os.environ["BANK_CONFIG"], section=SECTION)
        self._peer = self._make(str(config.conninfo))
        app = flask_app(app)
        app.after_request(self._answered)
        app.teardown_appcontext(self._ended)

    @property
    def conn(self) -> Any:
        """This request's."""
        if "borrowed" not in g:
            assert self._peer is not None
            block = self._peer.lend()
            g.borrowed = (block, block.__enter__())
        return g.borrowed[1]

    def figures(self) -> Figures:
        """The pool's own word about itself."""
        assert self._peer is not None
        return self._peer.figures()

    def _answered(self, response: Response) -> Response:
        if response.status_code < 400 and "borrowed" in g:
            block, _ = g.pop("borrowed")
            block.__exit__(None, None, None)
        return response

    def _ended(self, error: BaseException | None) -> None:
        if "borrowed" not in g:
            return
        block, _ = g.pop("borrowed")
        error = error or NotAnsweredError()
        try:
            block.__exit__(type(error), error, error.__traceback__)
        except Exception as raised:
            if raised is not error:
                raise


class NotAnsweredError(Exception):
    """What a peer is told when a request ended without a good answer: roll back."""


def flask_app(app: Any) -> Flask:
    """The app itself, or the one in a Connexion app."""
    found: Flask = getattr(app, "app", app)
    return found


def _psycopg_pool(conninfo: str) -> Peer:
    from psycopg_pool import ConnectionPool  # noqa: PLC0415  (only the pool in question is imported)

    pool = ConnectionPool(
        conninfo, min_size=MIN_SIZE, max_size=MAX_SIZE, timeout=TIMEOUT, name="bank", open=True
    )

    def figures() -> Figures:
        stats = pool.get_stats()
        idle = stats["pool_available"]
        return Figures(idle, stats["pool_size"] - idle, stats["requests_waiting"])

    return Peer(pool.connection, figures)


def _psycopg2(conninfo: str) -> Peer:
    from psycopg2.pool import ThreadedConnectionPool  # noqa: PLC0415  (as above)

    # (1, 20) is what the well-known answers say.
    pool = ThreadedConnectionPool(1, 20, conninfo)

    @contextmanager
    def lend() -> Iterator[Any]:
        conn = pool.getconn()
        try:
            with conn:
                yield conn
        finally:
            pool.putconn(conn)

    def figures() -> Figures:
        # The pool counts for itself only; and it never waits, it raises.
        return Figures(len(pool._pool), len(pool._used), 0)  # type: ignore[attr-defined]  # noqa: SLF001

    return Peer(lend, figures)


KINDS: dict[str, Callable[[Any], Source]] = {
    "penstock": Extension,
    "psycopg_pool": lambda _db: PerRequest(_psycopg_pool),
    "psycopg2": lambda _db: PerRequest(_psycopg2),
}
