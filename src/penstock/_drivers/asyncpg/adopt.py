"""asyncpg connections that somebody else has opened, and statements that somebody else wants to see.

One job: to tell whether `asyncpg.connect` or `Connection.fetch` is asyncpg's own, to make an open connection one
that is watched, and to run a statement by the public `fetch` without losing what it answers.

It must not know: links, pools. No lock: everything happens on the connection's event loop.
Private names of asyncpg that it relies on are each held by tests/drivers/test_asyncpg_assumptions.py.
"""

# asyncpg is annotated, but not as a typed package: what is read off its code is not its promise.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import asyncpg.connection

from penstock._drivers.adopting import (
    OwnConnect,
    is_original,
    not_at_rest,
    taken,
    unwrapped,
)
from penstock._drivers.asyncpg.guard import (
    DeadProtocol,
    Watch,
    Watching,
    adopted,
    siblings,
)
from penstock.drivers import NotAdopted

if TYPE_CHECKING:
    import asyncio

_MODULE: Final = "asyncpg.connection"

#: The parameters of the protocol's `bind_execute`.
_BIND_EXECUTE: Final = ("state", "args", "portal_name", "limit", "return_extra", "timeout")


def own_connect() -> OwnConnect | None:
    """What is in the place of asyncpg's `connect`; None: it is asyncpg's own."""
    if not is_original(asyncpg.connect, _MODULE):
        return OwnConnect(asyncpg.connect, "asyncpg.connect()")
    if not is_original(asyncpg.connection.connect, _MODULE):  # by which asyncpg's pool connects
        return OwnConnect(asyncpg.connection.connect, "asyncpg.connection.connect()")
    return None


def is_librarys(error: BaseException) -> bool:
    """Whether asyncpg's own connect, or the server, could have raised it; OSError: a token service is down."""
    return not isinstance(error, Exception) or isinstance(
        error, (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
    )


def shows_statements(conn: Any) -> bool:
    """Whether a statement is to go through the public `fetch`: a tracer or a class has replaced it."""
    fetch = type(conn).fetch
    if fetch is _known[0]:  # asked for each statement
        return False
    if not is_original(fetch, _MODULE):
        return True
    _known[0] = fetch
    return False


#: asyncpg's own `fetch`, once it was seen; None: it was replaced before penstock was imported.
_known: list[Any] = [None]


class Overhearing:
    """Stands in the place of the protocol for one call of `fetch`, which gives rows only.

    Attributes:
        answer: the rows, the command tag and whether that was all; None: nothing was executed.
        statement: what was executed.
    """

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self.answer: Any = None
        self.statement: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol, name)

    async def bind_execute(self, *arguments: Any, **named: Any) -> Any:
        """Execute, as asyncpg's protocol does."""
        asked = {**dict(zip(_BIND_EXECUTE, arguments, strict=False)), **named}
        answer = await self._protocol.bind_execute(**{**asked, "return_extra": True})
        self.answer, self.statement = answer, asked["state"]
        return answer if asked["return_extra"] else answer[0]


async def fetched(conn: Any, real: Any, lent: Any, query: Any, args: tuple[Any, ...]) -> Any:
    """What the public `fetch` of a lent connection gets: the answer with its tag, and the statement.

    Args:
        conn: the connection or a tracer's proxy, whose `fetch` is called.
        real: the connection.
        lent: the protocol that it has while it is lent.
        query: the statement.
        args: its parameters.
    """
    heard = Overhearing(lent)
    real._protocol = heard
    try:
        rows = await conn.fetch(query, *args)
    finally:
        if real._protocol is heard:  # else the session has ended meanwhile
            real._protocol = lent
    if heard.answer is None:  # an answer of its own, of a cache say
        return (rows, b"", True), None
    _, tag, whole = heard.answer
    return (rows, tag, whole), heard.statement


# --- adopting


def checked(conn: Any, loop: asyncio.AbstractEventLoop) -> Any:
    """The asyncpg connection that `conn` is, or is a proxy of.

    Raises:
        NotAdopted: it is none, it is closed, in the middle of something, another loop's, or a pool's.
    """
    real = unwrapped(conn, asyncpg.Connection)
    protocol = real._protocol
    if isinstance(protocol, DeadProtocol):
        raise taken()
    if real._aborted or not protocol.is_connected() or real._transport.is_closing():
        raise NotAdopted("it is closed", "give a connection that is open")
    if real._loop is not loop:
        raise NotAdopted("it is another event loop's", "connect on the loop that uses it")
    watch: Watch | None = real._penstock if is_watching(real) else None
    # asyncpg 0.30 knows of a pool only while a connection is lent.
    if getattr(real, "_pool_holder", real._proxy) is not None or (
        watch is not None and watch.drop is not None
    ):
        raise taken()
    if protocol.is_in_transaction() or real._top_xact is not None:
        raise not_at_rest("in a transaction")
    if real._stmt_exclusive_section._acquired or protocol._is_cancelling():
        raise not_at_rest("in the middle of a statement")
    return real


def is_watching(real: Any) -> bool:
    """Whether a connection is of a watched class; asyncpg's isinstance() takes all for any subclass."""
    return issubclass(type(real), Watching)


def watch(real: Any) -> None:
    """Make a connection one that notes changes of its settings.

    Raises:
        NotAdopted: its class is of a shape that no other one can take the place of.
    """
    if is_watching(real):
        return
    made = type(real)
    try:
        real.__class__ = adopted(made)
    except TypeError as error:
        raise NotAdopted(
            f"its class {made.__qualname__} cannot be watched ({error})",
            "let the class have no metaclass of its own",
        ) from error
    real._penstock = Watch(real._protocol)
    siblings(real).add(real)


def end(conn: Any) -> None:
    """Close what was opened and cannot be used, if it is a connection at all."""
    with suppress(NotAdopted):
        unwrapped(conn, asyncpg.Connection).terminate()
