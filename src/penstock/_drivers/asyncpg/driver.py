"""The driver for asyncpg (0.30 and newer).

It must not know: pools, slots, leases, waiters, limits. How a connection is found and made is
asyncpg_connect's, what is done with one asyncpg_link's.

`operational_error` and `interface_error`: asyncpg has no OperationalError. What stands for a server
that cannot be used is `asyncpg.PostgresConnectionError` (SQLSTATE class 08), which is a
`PostgresError` as well, so that both ``except`` clauses of its users catch a pool's errors; misuse is
`asyncpg.InterfaceError`, as in asyncpg itself. Its own pool raises the built-in `TimeoutError` when
there is no connection in time, so `PoolTimeout` is one of those, too.
"""

# asyncpg is annotated, but not as a typed package: what is read off its code is not its promise.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from penstock._drivers.adopting import OwnConnect
from penstock._drivers.asyncpg import adopt as adoption
from penstock._drivers.asyncpg import connect as connecting
from penstock._drivers.asyncpg.diagnose import diagnose
from penstock._drivers.asyncpg.guard import watched
from penstock._drivers.asyncpg.link import AsyncpgLink
from penstock._process.sockets import deadline_in, seconds_to
from penstock.drivers import NotAdopted
from penstock.errors import PenstockError

if TYPE_CHECKING:
    from penstock.drivers import Diagnosis, Recipe, UnfitOption

# 57P01 admin shutdown, 57P02 crash shutdown, 57P03 cannot connect now.
_SERVER_GOES: Final = ("57P01", "57P02", "57P03")

# Linux's largest process id: a "server process" beyond it is a pooler's invention, and a pooler
# would hand our SET to other clients.
_PID_MAX: Final = 4_194_304

#: Who connects where nobody else does.
_ASYNCPGS: Final = OwnConnect(asyncpg.connect, "asyncpg.connect()")


class AcquireTimeout(asyncpg.PostgresConnectionError, TimeoutError):  # type: ignore[misc]  # noqa: N818
    """What a pool's `PoolTimeout` is besides: asyncpg's own pool raises `TimeoutError`."""


class AsyncpgDriver:
    """asyncpg, as penstock sees it."""

    name = "asyncpg"
    operational_error: type[Exception] = asyncpg.PostgresConnectionError
    interface_error: type[Exception] = asyncpg.InterfaceError
    timeout_error: type[Exception] = AcquireTimeout
    limits_statements = True
    #: Its links have `renew`, which opens no session.
    renews = renews_in_place = True

    async def open(self, recipe: Recipe, seconds: float | None) -> AsyncpgLink:
        """Connect within `seconds`, name look-up included; the link is lent.

        Cancelled, it leaves no socket and no task behind.

        Raises:
            asyncpg.PostgresError: the server refused.
            asyncpg.ClientConfigurationError: the connection string or an option is wrong.
            TimeoutError: not in time.
            OSError: no connection.
            ConnectRaised: a function that is in the place of `asyncpg.connect` raised something else.
            NotAdopted: what it gave cannot be lent.
        """
        deadline = deadline_in(seconds)
        cls = watched(_class_of(recipe))
        conn = await connecting.connect(recipe, cls, deadline)
        try:
            link = await self.adopt(conn, recipe, seconds_to(deadline))
        except NotAdopted as error:
            if not error.taken:
                adoption.end(conn)
            raise error.of((adoption.own_connect() or _ASYNCPGS).name) from None
        return link

    async def adopt(self, conn: Any, recipe: Recipe, seconds: float | None) -> AsyncpgLink:
        """Make a link of an open connection, or of a tracer's proxy of one; the link is lent.

        Its settings as they are now are those to go back to.

        Raises:
            NotAdopted: it is closed, in the middle of something, another loop's, or a pool's; it is left
                as it was.
            asyncpg.PostgresError, OSError: the session did not answer; it is closed.
        """
        deadline = deadline_in(seconds)
        loop = asyncio.get_running_loop()
        real = adoption.checked(conn, loop)
        adoption.watch(real)
        try:
            link = AsyncpgLink(
                real,
                loop,
                resets_session=recipe.reset == "session",
                limit=recipe.statement_limit,
            )
            link.conn = conn
            connecting.keep_alive(link.fd, recipe)
            await _set_check_interval(link, recipe.server_check_interval, deadline)
            link.lend()
        except BaseException:
            real.terminate()
            raise
        return link

    async def diagnose(
        self,
        error: BaseException,
        recipe: Recipe,  # noqa: ARG002  asyncpg's errors tell all
        seconds: float | None,  # noqa: ARG002
    ) -> Diagnosis:
        """Tell why `open` raised `error`; makes no further attempt."""
        return diagnose(error)

    def unfit_option(self, recipe: Recipe) -> UnfitOption | None:
        """The first option of a recipe that cannot be honoured."""
        return connecting.unfit_option(recipe)

    def ends_session(self, error: BaseException, *, read_write: bool) -> bool:
        """Whether `error`, raised in a lease, means that this and older sessions are not to be trusted.

        A connection that is lost raises `ConnectionDoesNotExistError`, SQLSTATE 08003. Not counted
        are OSError and TimeoutError, which may be the borrower's own, and `InterfaceError`, which
        says that he uses a connection that ended before; nor are other pools' errors.
        """
        if not isinstance(error, asyncpg.PostgresError) or isinstance(error, PenstockError):
            return False
        sqlstate = error.sqlstate or ""
        return (
            sqlstate in _SERVER_GOES
            or sqlstate.startswith("08")
            or (read_write and sqlstate == "25006")
        )


def _class_of(recipe: Recipe) -> type[Any]:
    """The class of the recipe's connections; what is put in front of it would hide a wrong one from asyncpg."""
    cls = recipe.connection_class or asyncpg.Connection
    if not issubclass(cls, asyncpg.Connection):
        raise asyncpg.ClientConfigurationError(
            f"connection_class={cls.__qualname__} is no subclass of asyncpg.Connection"
        )
    return cls


async def _set_check_interval(link: AsyncpgLink, seconds: float | None, deadline: float) -> None:
    """Let the server notice a client that died during a long statement; one round trip.

    Before PostgreSQL 14 the setting does not exist. Somebody who turned it on already (for the role,
    by `options`) is left alone. Errors do not matter: not every platform and pooler takes it.
    """
    conn = link.real
    pid = link.protocol.get_server_pid()
    if not seconds or conn.get_server_version() < (14, 0) or not 0 < pid <= _PID_MAX:
        return
    name = "'client_connection_check_interval'"
    query = (
        f"select pg_catalog.set_config({name}, '{max(1, round(seconds * 1000))}', false)"
        f" where pg_catalog.current_setting({name}) = '0'"
    )
    try:
        await link.protocol.query(query, seconds_to(deadline))
    except TimeoutError:
        raise TimeoutError("the new session did not answer in time") from None
    except asyncpg.PostgresConnectionError:
        raise
    except asyncpg.PostgresError:
        pass


driver: Final = AsyncpgDriver()
