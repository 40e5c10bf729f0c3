"""The driver for psycopg2 (2.9.5 and newer): it opens links, and knows what an error means.

It must not know: pools, slots, leases, waiters, limits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import psycopg2

from penstock._drivers.adopting import OwnConnect
from penstock._drivers.psycopg2 import adopt as adoption
from penstock._drivers.psycopg2 import connect as connecting
from penstock._drivers.psycopg2.diagnose import diagnose
from penstock._drivers.psycopg2.guard import RAW, set_autocommit
from penstock._drivers.psycopg2.link import UNKNOWN, Psycopg2Link
from penstock._process.sockets import deadline_in, seconds_to
from penstock.drivers import NotAdopted

if TYPE_CHECKING:
    from psycopg2.extensions import connection

    from penstock.drivers import Diagnosis, Recipe, UnfitOption

#: What a connect leaves for setting the session up, at least: one round trip.
SET_UP_SECONDS: Final = 1.0

# 57P01 admin shutdown, 57P02 crash shutdown, 57P03 cannot connect now.
_SERVER_GOES: Final = ("57P01", "57P02", "57P03")

# Linux's largest process id: a "server process" beyond it is a pooler's invention, and a pooler
# would hand our SET to other clients.
_PID_MAX: Final = 4_194_304


class Psycopg2Driver:
    """psycopg2, as penstock sees it."""

    name = "psycopg2"
    #: Its links have `live`, `dead`, `status` and so on: a lease may change classes by itself.
    class_shaped = True
    limits_statements = True
    #: Its links have `renew`, but it costs a session.
    renews = True
    operational_error: type[Exception] = psycopg2.OperationalError
    interface_error: type[Exception] = psycopg2.InterfaceError

    def open(self, recipe: Recipe, seconds: float | None) -> Psycopg2Link:
        """Connect within `seconds`, name look-up included; the link is lent.

        The time is rounded up to whole seconds, 2 at least, since libpq counts so. A resolver cannot
        be bounded: a dead one holds the caller for its own time-outs.

        Raises:
            psycopg2.OperationalError: no connection; the text has the server's or libpq's words.
            psycopg2.ProgrammingError: the connection string or an option is wrong.
            ConnectRaised: a function that is in the place of `psycopg2.connect` raised something else.
            NotAdopted: what it, or a connection_factory, gave cannot be lent.
        """
        deadline = deadline_in(seconds)
        conn = connecting.connect(recipe, deadline)
        own = adoption.own_connect()
        # libpq counts in whole seconds, so that the time may be over by now.
        deadline = max(deadline, deadline_in(SET_UP_SECONDS))
        try:
            link = self.adopt(conn, recipe, seconds_to(deadline))
        except NotAdopted as error:
            if not error.taken:
                adoption.end(conn)
            called = own or OwnConnect(psycopg2.connect, "connection_factory=")
            raise error.of(called.name) from None
        if own is None:
            set_autocommit(link.real, recipe.autocommit)
        return link

    def adopt(self, conn: connection, recipe: Recipe, seconds: float | None) -> Psycopg2Link:
        """Make a link of an open connection, or of a tracer's proxy of one; the link is lent.

        Its settings as they are now are those to go back to. It must be of a subclass of
        `psycopg2.extensions.connection`: that class itself is written in C, and cannot be watched.

        Raises:
            NotAdopted: it is closed, in the middle of something, or a pool's; it is left as it was.
            psycopg2.OperationalError: the session did not answer; it is closed.
        """
        real = adoption.checked(conn)
        classes = adoption.watch(real, recipe)
        try:
            link = Psycopg2Link(real, classes, resets_session=recipe.reset == "session")
            link.conn = conn
            _set_check_interval(link, recipe.server_check_interval, deadline_in(seconds))
            if recipe.autocommit:
                set_autocommit(real, True)
            return link
        except BaseException:
            RAW["close"](real)
            raise

    def diagnose(self, error: BaseException, recipe: Recipe, seconds: float | None) -> Diagnosis:
        """Tell why `open` raised `error`; may make one more attempt to learn the server's code.

        Where psycopg 3 is not installed, what the server says has no code and counts as healing.
        """
        return diagnose(error, recipe, seconds)

    def unfit_option(self, recipe: Recipe) -> UnfitOption | None:
        """The first option of a recipe that cannot be honoured."""
        return connecting.unfit_option(recipe)

    def ends_session(self, error: BaseException, *, read_write: bool) -> bool:
        """Whether `error`, raised in a lease, means that this and older sessions are not to be trusted.

        Besides the server's own words these are the failures without a code, which libpq raises
        when the network gave up (keepalives, tcp_user_timeout, a reset).
        """
        if not isinstance(error, psycopg2.Error):
            return False
        sqlstate = error.pgcode
        if sqlstate is None:
            # Exactly this class: subclasses are penstock's own time-outs.
            return type(error) is psycopg2.OperationalError
        return (
            sqlstate in _SERVER_GOES
            or sqlstate.startswith("08")
            or (read_write and sqlstate == "25006")
        )


def _set_check_interval(link: Psycopg2Link, seconds: float | None, deadline: float) -> None:
    """Let the server notice a client that died during a long statement; one round trip.

    Before PostgreSQL 14 the setting does not exist. Somebody who turned it on already (for the role,
    by `options`) is left alone. Errors do not matter: not every platform and pooler takes it.
    """
    conn = link.real
    if not seconds or conn.server_version < 140000 or not 0 < conn.get_backend_pid() <= _PID_MAX:
        return
    query = (
        "select pg_catalog.set_config('client_connection_check_interval', "
        f"'{max(1, round(seconds * 1000))}', false)"
        " where pg_catalog.current_setting('client_connection_check_interval') = '0'"
    )
    try:
        link._ask(query, deadline)  # noqa: SLF001  a part of it
    except psycopg2.Error:
        if link.status() == UNKNOWN:
            raise


driver: Final = Psycopg2Driver()
