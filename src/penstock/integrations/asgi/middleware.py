"""The ASGI middleware: ``db = Penstock(pool)``, and ``await db.connection()`` in endpoints.

One job: users' verbs, and which unit of work they are about. For Starlette, FastAPI, Quart, Connexion's
AsyncApp, and whatever else is an ASGI app; it imports none of them.

It must not know: how connections are borrowed and given back (async_loans.py), what an answer
decides (asgi_requests.py), startup and shutdown (asgi_lifespan.py).

Whose is a connection? The current unit's: a request's, a websocket's handshake's, or one that
`unit()` began. A context variable says which; tasks and threads that a unit starts inherit it, and
share its connection while it lasts.

No lock: all of it runs on event loops.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from functools import wraps
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    Literal,
    ParamSpec,
    TypeVar,
    cast,
    overload,
)

from penstock.errors import ConfigError, MisuseError
from penstock.integrations.asgi.lifespan import Lifespan
from penstock.integrations.asgi.requests import (
    UNAVAILABLE,
    Exchange,
    Manner,
    OwnUnit,
    Unit,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from penstock._pool.aio.pool import AsyncConnectionPool
    from penstock._pool.reporter import Health
    from penstock.integrations._unit.aio_loans import AsyncLoan
    from penstock.integrations.asgi.requests import (
        App,
        Receive,
        Scope,
        Send,
    )

ConnT = TypeVar("ConnT")
HookT = TypeVar("HookT", bound="Callable[[Any], object]")
SelfT = TypeVar("SelfT")
P = ParamSpec("P")
R = TypeVar("R")

#: The main database's key.
MAIN: Final = "default"
Transactions = Literal["request", "explicit", "autocommit"]
_MODES: Final = ("request", "explicit", "autocommit")


def _on_a_loop(
    method: Callable[Concatenate[SelfT, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[SelfT, P], Coroutine[Any, Any, R]]:
    """Have a coroutine method say at its call, not at an `await` that never comes, that it cannot work.

    FastAPI sees through to the method by `__wrapped__`.
    """

    @wraps(method)
    def checked(self: SelfT, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            name = method.__name__
            raise MisuseError(
                f"db.{name}() was called where no event loop runs: in an endpoint that is not "
                "`async def`, or in a thread",
                next_step=f"make the endpoint `async def`, or say anyio.from_thread.run(db.{name}, "
                "...); a ConnectionPool serves threads",
            ) from None
        return method(self, *args, **kwargs)

    return cast("Callable[Concatenate[SelfT, P], Coroutine[Any, Any, R]]", checked)


class Database(Generic[ConnT]):
    """One database. Make it by ``db["key"]``; `Penstock` is the main one.

    Attributes:
        hooks: what `on_first_use` was given, in this order.
    """

    def __init__(self, extension: Penstock[Any], key: str) -> None:
        self._extension = extension
        self._key = key
        self.hooks: list[Callable[[Any], object]] = []

    @_on_a_loop
    async def connection(self) -> ConnT:
        """The connection of this request: the driver's own, borrowed now if it was not yet.

        The same one for the whole request, given back at its end whatever happens; after that its
        use raises. The tasks of a request share it. As a dependency of FastAPI's:
        ``Depends(db.connection)``.

        Raises:
            MisuseError: this is no request and no `unit`, or it is over, or there is no such
                database.
            PenstockError: as `AsyncConnectionPool.connection`.
        """
        return cast("ConnT", (await self._loan()).conn)

    @_on_a_loop
    async def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``execute`` of this request's connection, in the request's transaction.

        Args:
            query: as the driver takes it.
            *args: as the driver takes them: psycopg one sequence or mapping, asyncpg one by one.
            **kwargs: as the driver takes them.

        Returns:
            What the driver gives: psycopg a cursor, asyncpg a status.

        Raises:
            PenstockError: as `connection`.
            Exception: the driver's errors.
        """
        conn: Any = (await self._loan()).conn
        return await conn.execute(query, *args, **kwargs)

    @_on_a_loop
    async def commit(self) -> None:
        """Commit what is open on this request's connection. Does nothing if none was borrowed.

        Raises:
            MisuseError: a statement of the transaction has failed; or as `connection`.
            Exception: the driver's errors.
        """
        await self._extension.current_unit().loans.commit(self._key)

    @_on_a_loop
    async def rollback(self) -> None:
        """Roll back what is open. After it, a connection that was lost is replaced."""
        await self._extension.current_unit().loans.roll_back(self._key)

    @_on_a_loop
    async def give_back(self) -> None:
        """Give this request's connection back now, before something long that does without.

        What is not committed is rolled back. The next use borrows anew.
        """
        await self._extension.current_unit().loans.give_back(self._key)

    @property
    def pool(self) -> AsyncConnectionPool[ConnT]:
        """The pool, for work on a connection of its own.

        Raises:
            MisuseError: there is no such database.
        """
        pools = self._extension.pools
        found = pools.get(self._key)
        if found is None and self._key == MAIN and len(pools) == 1:
            (found,) = pools.values()
        if found is not None:
            return cast("AsyncConnectionPool[ConnT]", found)
        known = ", ".join(map(repr, pools)) or "none"
        raise MisuseError(
            f"there is no database {self._key!r}; there is {known}",
            next_step="give Penstock() a pool, or a mapping of pools, or set db.pools['default'] "
            "before the first request",
        )

    def health(self) -> Health:
        """Whether the pool can serve, from its state: nothing is borrowed.

        Raises:
            MisuseError: as `pool`.
        """
        return self.pool.health()

    def on_first_use(self, hook: HookT) -> HookT:
        """Register a function that gets the connection before its first user does, as a decorator.

        It is called in the request's transaction, once per request; again if that transaction has
        ended and the connection is asked for again. If it raises, the connection is given back.

        Args:
            hook: called with the connection; may be a coroutine function.
        """
        self.hooks.append(hook)
        return hook

    async def _loan(self) -> AsyncLoan:
        unit = self._extension.current_unit()
        try:
            return await unit.loans.borrow(
                self._key,
                self.pool,
                self._extension.hooks_of(self),
                autocommit=self._extension.transactions == "autocommit",
            )
        except UNAVAILABLE as error:
            unit.unavailable = error
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._key!r}>"


class Penstock(Database[ConnT]):
    """What an app's endpoints ask for connections, and the middleware that makes requests units.

    Args:
        pool: the database's pool; of several databases a mapping of pools, `AsyncPools` for
            example, in which "default" is the main one; None: put them into `pools` before the
            first request. They are opened at the app's startup without waiting for their servers,
            or by the first borrow where no server runs startups, and closed at shutdown.
        transactions: what commits. "request": an answer with a status below 400. "explicit":
            `commit`. "autocommit": each statement.
        retry_after: seconds. If set, a full pool or an unreachable server that the app answers with
            500 or not at all is answered with 503 and this ``Retry-After``.

    Attributes:
        pools: by key; the main database's is "default". Tests may put others in their place.
        transactions: as above.

    Raises:
        ConfigError: an argument is wrong.
        MisuseError: a pool is none for asyncio.
    """

    @overload
    def __init__(
        self,
        pool: AsyncConnectionPool[ConnT],
        *,
        transactions: Transactions = "request",
        retry_after: int | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self: Penstock[Any],
        pool: Mapping[str, AsyncConnectionPool[Any]] | None = None,
        *,
        transactions: Transactions = "request",
        retry_after: int | None = None,
    ) -> None: ...

    def __init__(
        self,
        pool: AsyncConnectionPool[Any] | Mapping[str, AsyncConnectionPool[Any]] | None = None,
        *,
        transactions: Transactions = "request",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(self, MAIN)
        if transactions not in _MODES:
            raise ConfigError(
                "transactions", repr(transactions), '"request", "explicit" or "autocommit"'
            )
        _check_seconds(retry_after)
        self.transactions: str = transactions
        pools = {} if pool is None else pool if isinstance(pool, Mapping) else {MAIN: pool}
        self.pools: dict[str, AsyncConnectionPool[Any]] = dict(pools)
        for each in self.pools.values():
            _check_pool(each)
        self._databases: dict[str, Database[Any]] = {}
        self._current: ContextVar[Unit | None] = ContextVar("penstock", default=None)
        self._manner = Manner(transactions, retry_after, self._current)

    def __getitem__(self, key: str) -> Database[Any]:
        return self._databases.setdefault(key, Database(self, key))

    def middleware(self, app: App) -> App:
        """Wrap an ASGI app: each request becomes a unit of work, startup opens the pools.

        ``app.add_middleware(db.middleware)`` (Starlette, FastAPI, Connexion), ``app.asgi_app =
        db.middleware(app.asgi_app)`` (Quart), ``app = db.middleware(app)`` (any).

        Args:
            app: the ASGI app, or the next middleware.
        """
        return _Middleware(self, self._manner, app)

    def unit(self) -> OwnUnit:
        """Begin a unit of work, for ``async with``: a message of a websocket, a task, a script.

        Inside, `connection` and all the rest are this unit's and not the request's. At its end
        everything is committed (with transactions="request"), or rolled back if an exception
        leaves the block, and given back.

        Raises:
            Exception: at the end, the driver's errors of the commit.
        """
        return OwnUnit(self._manner)

    @property
    def scope(self) -> Scope | None:
        """The ASGI scope of the current request, for `on_first_use`; None: there is no request."""
        unit = self._current.get()
        return None if unit is None else unit.scope

    async def open(self) -> None:
        """Open all pools, without waiting for their servers. A lifespan does it."""
        for pool in self.pools.values():
            await pool.open()

    async def close(self, timeout: float | None = 5.0) -> None:
        """Close all pools; see `AsyncConnectionPool.close`. A lifespan does it.

        Raises:
            Exception: the first that a pool raised; the others are closed all the same.
        """
        failures: list[BaseException] = []
        for pool in self.pools.values():
            await _collecting(failures, pool.close(timeout))
        if failures:
            raise failures[0]

    def current_unit(self) -> Unit:
        """What the running task works in.

        Raises:
            MisuseError: nothing.
        """
        unit = self._current.get()
        if unit is None:
            raise MisuseError(
                "a connection was asked for outside of a request",
                next_step="wrap the app by db.middleware; outside of requests work in "
                "`async with db.unit():`",
            )
        return unit

    def hooks_of(self, database: Database[Any]) -> list[Callable[[Any], object]]:
        """Those of all databases (registered on this), then its own."""
        return self.hooks if database is self else [*self.hooks, *database.hooks]


class _Middleware:
    """An ASGI app around another one."""

    def __init__(self, extension: Penstock[Any], manner: Manner, app: App) -> None:
        self.app = app  # where frameworks look for the next one
        self._extension = extension
        self._manner = manner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            lifespan = Lifespan(self._extension.open, self._extension.close, receive, send)
            await lifespan.run(self.app, scope)
        elif kind in {"http", "websocket"} and self._is_first(scope):
            await Exchange(self._manner, scope, send).run(self.app, scope, receive)
        else:
            await self.app(scope, receive, send)

    def _is_first(self, scope: Scope) -> bool:
        """Whether no other middleware of this extension has this request already."""
        marks = scope.setdefault("penstock", [])
        if any(mark is self._extension for mark in marks):
            return False
        marks.append(self._extension)
        return True


async def _collecting(failures: list[BaseException], closing: Coroutine[Any, Any, None]) -> None:
    try:
        await closing
    except BaseException as failure:  # noqa: BLE001  raised by the caller, after the others
        failures.append(failure)


def _check_seconds(given: object) -> None:
    whole = isinstance(given, int) and not isinstance(given, bool) and given >= 0
    if given is not None and not whole:
        raise ConfigError("retry_after", repr(given), "a whole number of seconds, or None")


def _check_pool(pool: Any) -> None:
    if not inspect.iscoroutinefunction(getattr(pool, "open", None)):
        raise MisuseError(
            f"Penstock() got a {type(pool).__name__}",
            next_step="give it an AsyncConnectionPool, or a mapping of them",
        )
