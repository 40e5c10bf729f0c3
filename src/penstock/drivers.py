"""The driver protocol: what a pool needs of a database library, and nothing about pools.

A *driver* is one object per database library. It opens *links*: a link is the library's own
connection together with what penstock has to remember about it (the real handle to the wire, the
descriptor, what its settings were when it was new). The machine and the runtimes move links about;
only a driver looks inside. A driver for threads and gevent has a `Driver` and `Link`s, one for asyncio an
`AsyncDriver` and `AsyncLink`s: what may have to wait is a coroutine there, all else the same plain call.
Hand an object that has these methods to a pool::

    pool = ConnectionPool("postgresql://app@db/shop", driver=MyDriver())

`penstock.testing.conformance` holds the tests that a driver has to pass; docs/drivers.md explains both.

It must not know: slots, leases, waiters, limits, generations, any library. A link keeps no state between
calls but its own. A driver takes no lock: its caller owns the link (docs/design.md).

Times are seconds left, as floats; a driver turns them into deadlines of its own. `None` is "no limit".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "Activity",
    "Adopts",
    "AsyncAdopts",
    "AsyncDriver",
    "AsyncLink",
    "Diagnosis",
    "Driver",
    "Link",
    "NotAdopted",
    "Outdated",
    "Recipe",
    "Remembering",
    "Renewable",
    "Reply",
    "StatementLimit",
    "UnfitOption",
]

ConnT = TypeVar("ConnT")


class Activity(Enum):
    """What a link's session is doing, from client-side state alone: no round trip."""

    IDLE = "idle"
    ACTIVE = "active"  # a statement is under way, or its reply was not fetched
    IN_TRANSACTION = "idle in transaction"
    IN_FAILED_TRANSACTION = "idle in failed transaction"
    BROKEN = "broken"


class Outdated(StrEnum):
    """What of a session has turned out to be of an older schema."""

    STATEMENTS = "outdated statements"  # what the driver prepared: it has forgotten that already
    TYPES = "outdated types"  # what it, or `configure`, knows of types: a new session is needed, and not here only
    SESSION = "outdated session"  # what the server remembers for this session


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementLimit:
    """How long a borrower's statement may go unanswered (`statement_timeout_client`).

    A driver whose `limits_statements` is true keeps to it: whenever a call of a borrower's, or a link's
    `execute`, `commit` and `apply_settings`, waits for the server and has no complete answer after
    `seconds`, the link is discarded and the waiting call raises what `given_up` makes. The time is that
    of one call: what the borrower does between two does not count, nor does waiting for
    notifications.

    Attributes:
        seconds: more than 0.
        given_up: makes the error to raise, and tells the pool, whose other connections are in doubt
            from then on. Called once per statement given up, in the thread or task that waited.
    """

    seconds: float
    given_up: Callable[[], Exception]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything needed to open one more link; callables were called by whoever made the recipe.

    Attributes:
        conninfo: libpq conninfo string or URL; may hold a password, so it is not in the repr.
        kwargs: keyword arguments as the driver's own ``connect`` takes them; not in the repr.
        connection_class: the driver's connection class, or None for its default.
        application_name: set unless the user's conninfo, kwargs or environment name one.
        autocommit: the pool's autocommit.
        server_check_interval: seconds for ``client_connection_check_interval``; None leaves it alone.
        keepalive: connection parameters set only where the user set nothing.
        reset: "rollback", "session", None, or a callable that takes the connection.
        statement_limit: how long a statement may go unanswered, or None. Only a driver whose
            `limits_statements` is true is ever given one.
    """

    conninfo: str = field(default="", repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    connection_class: type[Any] | None = None
    application_name: str = "penstock"
    autocommit: bool = False
    server_check_interval: float | None = 0.5
    keepalive: Mapping[str, Any] = field(default_factory=dict)
    reset: object = "rollback"
    statement_limit: StatementLimit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why a link could not be opened, as far as the server or the library told.

    Attributes:
        sqlstate: the server's code, or None if it did not get that far (refused, name look-up).
        heals: whether trying again later can help. Unknown failures are taken to heal.
        text: one line for people, without secrets.
        next_step: what to do, where the code does not say it; else None.
    """

    sqlstate: str | None
    heals: bool
    text: str
    next_step: str | None = None


@dataclass(frozen=True, slots=True)
class UnfitOption:
    """An option for ``connect`` that a driver cannot honour.

    Attributes:
        key: its name, as the user wrote it.
        what: why, as a clause that follows its name, without secrets.
        hint: what to do.
    """

    key: str
    what: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one statement answered, read to the end and detached from its connection."""

    rows: Sequence[Any] | None  # None: the statement returns no rows
    rowcount: int
    description: Any
    statusmessage: str | None


class Link(Protocol[ConnT]):
    """One open connection. `lend` and `park` are hot: no lock, no allocation, no clock."""

    conn: ConnT
    fd: int

    def lend(self) -> None:
        """Make the connection usable: put the real handle back in its place."""

    def park(self) -> bool:
        """Take the handle away, so that using the returned connection raises; tell if it is clean.

        Clean: idle, no transaction, the client-side settings as they were when the link was new.

        A driver whose library has a lock in each connection, which an interrupt may leave locked, has an
        attribute, ``held``, that tells: after an error a connection that is held is not lent again.
        """

    def activity(self) -> Activity:
        """What the session is doing, also while parked."""

    def prepare(self) -> None:
        """Remember the settings as they are now (after `configure`) as those to go back to.

        With ``reset="session"`` this takes one round trip, to learn what `configure` set on the server.
        """

    def set_autocommit(self, value: bool) -> None:
        """Client-side; no round trip; only while idle."""

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Set run-time parameters for the transaction, which this begins if none is open.

        One round trip (two with BEGIN); they end with the transaction. The connection is lent.
        """

    def execute(self, query: Any, params: Any = None) -> Reply:
        """One statement in autocommit: one round trip. Raises the driver's errors."""

    def commit(self) -> None:
        """Commit if a transaction is open. Raises the driver's errors.

        Raises, too, if the session broke and may have taken a transaction with it; not if the
        borrower closed it.
        """

    def tidy(self, seconds: float | None) -> bool:
        """Bring a link that `park` called unclean back: roll back, restore client-side settings.

        Returns False where that is impossible (broken, a statement still active, not in time);
        the link is then good for `discard` only.
        """

    def ping(self, seconds: float | None) -> bool:
        """One round trip. False if dead or not answered in time; then good for `discard` only."""

    def start_reset(self) -> bool:
        """Send the session reset without waiting. False: could not; discard.

        A driver whose library can only wait says so by an attribute, ``reset_waits = True``: a worker
        calls this then, and nothing is pending afterwards.
        """

    def finish_reset(self, seconds: float | None) -> bool:
        """Read the answer to `start_reset`. False: not clean, or not in time; discard."""

    def hung_up(self) -> bool:
        """Whether the server ended the session, by a look at the socket: for systems without epoll."""

    def close(self) -> None:
        """End the session politely. Never raises, never blocks on a peer that does not read."""

    def discard(self) -> None:
        """Drop the connection without a word, though somebody else may still hold the object.

        Shuts our end of the socket down; frees nothing that another thread could be using.
        """

    def abandon(self, *, busy: bool) -> None:
        """In a forked child: let go of the parent's session without a byte on the wire.

        Points the descriptor at the null device first. `busy`: another thread was using it at the
        fork, so its locks may be held for ever: keep the object, do not close it.
        """


class Remembering(Protocol):
    """What a link may have, besides, whose library prepares statements or remembers types by itself.

    A migration makes that outdated, and a statement that is executed by its old name fails each time. An
    asyncio driver's `forget` is a coroutine.
    """

    def outdated(self, error: BaseException | None) -> Outdated | None:
        """What the server's errors of this borrow said to be outdated; tells it once.

        Called at each return that is not simply clean, before anything else is brought back. `error` is what
        leaves the block, and need not be of this session; those that the borrower swallowed count as well.
        Until this was called `park` and `tidy` say False.
        """

    def forget(self, seconds: float | None) -> bool:
        """A `ping` after which neither the library nor the server knows any prepared statement of the library's."""


class Renewable(Protocol):
    """What a link has, besides, whose driver says `renews = True`: the pool's `guard` can be on."""

    def renew(self) -> bool:
        """See to it that nobody but the next borrower has the connection object.

        Called before each `lend` of a pool with `guard=True`, while parked and clean. Where somebody
        still holds `conn` (`sys.getrefcount` tells), put another object over the same session in its
        place, with everything that the old one had; the old one raises from then on, for ever. Where
        the library cannot do that, end the session and return False: the pool takes another link.
        """


class Adopts(Protocol[ConnT]):
    """What a driver has, besides, that can make a link of an open connection which somebody else made.

    Such a driver also calls a connection class's own `connect`, and one that a tracer has put in the place of
    the library's, and adopts what comes.
    """

    def adopt(self, conn: ConnT, recipe: Recipe, seconds: float | None) -> Link[ConnT]:
        """Make a link, lent, of a connection or of a tracer's proxy of one (its ``__wrapped__``).

        `Link.conn` is what was given: the object keeps its identity. Its settings as they are now are
        those to go back to. Of the recipe all counts but what connects. `seconds` bound what is asked of
        the server.

        Raises:
            NotAdopted: it is no open connection of the library, in the middle of something, or another
                link's. It is left as it was.
            Exception: the driver's errors, where the server does not answer. It is closed.
        """


class AsyncAdopts(Protocol[ConnT]):
    """What an asyncio driver has, besides, that can adopt an open connection of the running loop's."""

    async def adopt(self, conn: ConnT, recipe: Recipe, seconds: float | None) -> AsyncLink[ConnT]:
        """Make a link, as `Adopts.adopt`."""


class Driver(Protocol[ConnT]):
    """A database library.

    Beside what is below it may have `limits_statements`: True if it heeds a recipe's
    `statement_limit`. Without it, a pool that is told a `statement_timeout_client` refuses the driver.
    And `renews`: True if its links are `Renewable`; without it, a pool with `guard=True` refuses the driver.
    And `adopt`, of `Adopts`.
    And `unfit_option(recipe)`: the first that it cannot honour of what a recipe says (`UnfitOption`), or None; without connecting.
    The pool raises `ConfigError` then, when it is made, or at the connect whose callables gave the option.
    """

    name: str
    operational_error: type[Exception]
    interface_error: type[Exception]

    def open(self, recipe: Recipe, seconds: float | None) -> Link[ConnT]:
        """Connect within `seconds`, name look-up included. Raises the driver's errors."""

    def diagnose(self, error: BaseException, recipe: Recipe, seconds: float | None) -> Diagnosis:
        """Tell why `open` raised `error`; may make one more attempt to learn the server's code."""

    def ends_session(self, error: BaseException, *, read_write: bool) -> bool:
        """Whether `error`, raised in a lease, means that this and older sessions are not to be trusted.

        SQLSTATE 57P01 to 57P03, 08xxx and, for a pool marked read-write, 25006.
        """


class AsyncLink(Protocol[ConnT]):
    """One open connection of an asyncio driver, used on one event loop only.

    A coroutine here may be cancelled at any of its suspension points. What it leaves then need not
    be clean, but must be told truly by `activity`: a session with a reply pending is ACTIVE, never
    IDLE, and `tidy` either reads that reply or says False.
    """

    conn: ConnT
    fd: int

    def lend(self) -> None:
        """Make the connection usable, as `Link.lend`."""

    def park(self) -> bool:
        """Take the handle away and tell if it is clean, as `Link.park`."""

    def activity(self) -> Activity:
        """What the session is doing, also while parked."""

    async def prepare(self) -> None:
        """Remember the settings as they are now (after `configure`) as those to go back to."""

    def set_autocommit(self, value: bool) -> None:
        """Client-side; no round trip; only while idle."""

    async def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Set run-time parameters for the transaction, which this begins if none is open."""

    async def begin(self) -> None:
        """Open a transaction that `commit` ends, where the driver opens none by itself.

        A driver that does (psycopg) only sees to it that this borrow is not in autocommit.
        """

    async def execute(self, query: Any, params: Any = None) -> Reply:
        """One statement in autocommit: one round trip. Raises the driver's errors."""

    async def commit(self) -> None:
        """Commit what the driver or `begin` opened; what the borrower opened by himself is his.

        Raises the driver's errors, and if the session broke and may have taken a transaction with
        it. Cancelled, the commit that was sent goes on, and `tidy` waits for its answer.
        """

    async def tidy(self, seconds: float | None) -> bool:
        """Bring a link that `park` called unclean back, as `Link.tidy`.

        Also reads, or cancels on the server and reads, what is pending. False where that is
        impossible, or not in time; the link is then good for `discard` only.
        """

    async def ping(self, seconds: float | None) -> bool:
        """One round trip. False if dead or not answered in time; then good for `discard` only."""

    def start_reset(self) -> bool:
        """Send the session reset without waiting. False: could not; discard."""

    async def finish_reset(self, seconds: float | None) -> bool:
        """Read the answer to `start_reset`. False: not clean, or not in time; discard."""

    def hung_up(self) -> bool:
        """Whether the session is known to have ended, without a round trip."""

    def on_end(self, tell: Callable[[], object]) -> bool:
        """Have `tell` called (on the loop) when the driver learns that the session has ended.

        Returns whether the driver does: where it does not, the pool watches `fd` by epoll.
        """

    async def close(self) -> None:
        """End the session politely. Never raises, never waits for a peer that does not read."""

    def discard(self) -> None:
        """Drop the connection without a word; repeatable, and works when its loop is closed."""

    def abandon(self, *, busy: bool) -> None:
        """In a forked child: let go of the parent's session without a byte on the wire."""


class AsyncDriver(Protocol[ConnT]):
    """A database library for asyncio.

    Beside what is below it may have `limits_statements`: True if it heeds a recipe's
    `statement_limit`. Without it, a pool that is told a `statement_timeout_client` refuses the driver.
    And `renews`: True if its links are `Renewable`; without it, a pool with `guard=True` refuses the driver.
    And `adopt`, of `AsyncAdopts`.
    And `unfit_option(recipe)`, as a `Driver`'s; a plain function.
    """

    name: str
    operational_error: type[Exception]
    interface_error: type[Exception]

    async def open(self, recipe: Recipe, seconds: float | None) -> AsyncLink[ConnT]:
        """Connect within `seconds`, name look-up included. Raises the driver's errors.

        Cancelled, it leaves no socket and no task behind, and nothing that `asyncio.run` waits for:
        names are looked up in a daemon thread, never in the loop's default executor.
        """

    async def diagnose(
        self, error: BaseException, recipe: Recipe, seconds: float | None
    ) -> Diagnosis:
        """Tell why `open` raised `error`; may make one more attempt to learn the server's code."""

    def ends_session(self, error: BaseException, *, read_write: bool) -> bool:
        """Whether `error`, raised in a lease, means that this and older sessions are not to be trusted."""


class NotAdopted(Exception):  # noqa: N818  it says what happened
    """An open connection that cannot become a link. Trying again does not help.

    Attributes:
        next_step: what to do.
        taken: whether the connection is in somebody else's use, and must not be closed.
    """

    def __init__(self, why: str, next_step: str, taken: bool = False) -> None:
        super().__init__(why, next_step, taken)
        self.next_step = next_step
        self.taken = taken

    def __str__(self) -> str:
        return str(self.args[0])

    def of(self, name: str) -> NotAdopted:
        """The same, with the name of the function that gave the connection."""
        return NotAdopted(
            f"{name} gave a connection that cannot be used: {self}",
            self.next_step,
            self.taken,
        )
