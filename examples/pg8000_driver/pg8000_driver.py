"""A driver that penstock does not bring: pg8000, a PostgreSQL library in pure Python.

Complete enough to pass `penstock.testing.conformance`. It shows what a driver has to know of its
library, and where each of those things may be found in one that was not written for pools::

    pool = ConnectionPool("postgresql://app@db/shop", driver=Pg8000Driver())

It must not know: pools. No lock: whoever calls owns the link.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import ssl
from typing import TYPE_CHECKING, Any, NoReturn

import pg8000.dbapi
from pg8000.exceptions import DatabaseError, InterfaceError

from penstock.conninfo import parse
from penstock.drivers import Activity, Diagnosis, Recipe, Reply

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

GIVEN_BACK = "this connection was given back to its pool; borrow another"

# pg8000's name for what the server said in its last ReadyForQuery message.
ACTIVITY = {
    b"I": Activity.IDLE,
    b"T": Activity.IN_TRANSACTION,
    b"E": Activity.IN_FAILED_TRANSACTION,
}

# What a session can hold. pg8000 prepares nothing that it counts on later.
CLEAR = """close all; set session authorization default; reset all; unlisten *;
select pg_advisory_unlock_all(); discard plans; discard temp; discard sequences; deallocate all"""

CONFIGURED = """select name, setting from pg_settings
where source = 'session' and context <> 'internal' and name not like 'transaction%'"""


class Dead:
    """Stands where the socket's file was while nobody has borrowed the connection."""

    def __getattr__(self, name: str) -> NoReturn:
        raise InterfaceError(GIVEN_BACK)


DEAD = Dead()


class Pg8000Link:
    """One pg8000 connection, and what leads to its wire."""

    def __init__(self, conn: Any, *, autocommit: bool) -> None:
        self.conn = conn
        self._socket: socket.socket = conn._usock
        self._file = conn._sock
        self.fd = self._socket.fileno()
        self._autocommit = conn.autocommit = autocommit
        self._configured: list[tuple[str, str]] = []
        self._over = False

    # -- hot --------------------------------------------------------------------------------------

    def lend(self) -> None:
        """Make the connection usable."""
        self.conn._sock = self._file

    def park(self) -> bool:
        """Take the wire away; tell if the session is idle and the settings are as they were."""
        self.conn._sock = DEAD
        clean = self.conn.autocommit is self._autocommit
        return clean and self.conn._transaction_status == b"I" and not self._over

    # -- without a word to the server -------------------------------------------------------------

    def activity(self) -> Activity:
        """What the session is doing."""
        if self._over or self.hung_up():
            return Activity.BROKEN
        # None: pg8000 is in the middle of something, or was interrupted there.
        return ACTIVITY.get(self.conn._transaction_status, Activity.ACTIVE)

    def hung_up(self) -> bool:
        """Whether the server has closed its end: an end of file behind all that it said."""
        try:
            self._socket.setblocking(False)
            # Nothing is expected while nobody asks, so what is there is the server's goodbye.
            return bool(self._socket.recv(8192, socket.MSG_PEEK)) or True
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            return True
        finally:
            with contextlib.suppress(OSError):
                self._socket.setblocking(True)

    def set_autocommit(self, value: bool) -> None:
        """Set autocommit until the connection is given back."""
        self.conn.autocommit = value

    # -- with the server --------------------------------------------------------------------------

    def prepare(self) -> None:
        """Remember the settings as they are now as those to go back to."""
        self._autocommit = self.conn.autocommit
        self._configured = [(name, value) for name, value in self.execute(CONFIGURED).rows or ()]

    def execute(self, query: Any, params: Any = None) -> Reply:
        """One statement in autocommit."""
        autocommit, self.conn.autocommit = self.conn.autocommit, True
        try:
            cursor = self.conn.cursor()
            cursor.execute(query, params or ())
            rows = None if cursor.description is None else list(cursor.fetchall())
            return Reply(
                rows=rows,
                rowcount=cursor.rowcount,
                description=cursor.description,
                statusmessage=None,
            )
        finally:
            self.conn.autocommit = autocommit

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Set run-time parameters for the transaction."""
        cursor = self.conn.cursor()
        for name, value in settings.items():
            cursor.execute("select set_config(%s, %s, true)", (name, str(value)))

    def commit(self) -> None:
        """Commit if a transaction is open."""
        if self.activity() is not Activity.IDLE:
            self.conn.commit()

    def tidy(self, seconds: float | None) -> bool:
        """Roll back, and set autocommit back."""
        self.conn.autocommit = self._autocommit
        if self.activity() in {Activity.BROKEN, Activity.ACTIVE}:
            return False
        return self.activity() is Activity.IDLE or self._asked("rollback", seconds)

    def ping(self, seconds: float | None) -> bool:
        """One round trip."""
        return self._asked("", seconds)

    def start_reset(self) -> bool:
        """Nothing is sent yet: pg8000 can only ask and wait."""
        return not self._over

    def finish_reset(self, seconds: float | None) -> bool:
        """Reset the session, and set back what was configured."""
        message = CLEAR
        for name, value in self._configured:
            message += f"; select set_config({_literal(name)}, {_literal(value)}, false)"
        # Each in its own message: DISCARD refuses to run in a transaction, which several are.
        with self._within(seconds):
            return all(self._asked(statement, None) for statement in message.split(";"))

    def _asked(self, statement: str, seconds: float | None) -> bool:
        self.lend()
        try:
            with self._within(seconds):
                self.conn.execute_simple(statement)
        except (DatabaseError, InterfaceError, OSError):
            return False
        finally:
            self.conn._sock = DEAD
        return True

    @contextlib.contextmanager
    def _within(self, seconds: float | None) -> Iterator[None]:
        if seconds is not None:
            self._socket.settimeout(seconds)
        try:
            yield
        except BaseException:
            self._over = True  # the answer is still to come: good for `discard` only
            raise
        finally:
            with contextlib.suppress(OSError):
                if seconds is not None:
                    self._socket.settimeout(None)

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """End the session politely."""
        if self._over and self._socket.fileno() < 0:
            return
        self._over = True
        with contextlib.suppress(OSError):
            self._socket.setblocking(False)  # a goodbye is not worth waiting for
            self._socket.send(b"X\x00\x00\x00\x04")
        # Not by closing the objects: pg8000's file would flush, and wait.
        os.close(self._socket.detach())

    def discard(self) -> None:
        """Shut our end down: whoever waits for the server hears of it."""
        self._over = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        # What was discarded is closed when nobody can be using it any more.
        if "_socket" in vars(self) and self._socket.fileno() >= 0:
            os.close(self._socket.detach())

    def abandon(self, *, busy: bool) -> None:
        """In a forked child: point the descriptor at the null device, and keep the rest."""
        del busy
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.dup2(null, self.fd, inheritable=False)
        finally:
            os.close(null)
        self._over = True
        self.conn._sock = DEAD


class Pg8000Driver:
    """pg8000, as penstock sees it."""

    name = "pg8000"
    operational_error: type[Exception] = pg8000.dbapi.OperationalError
    interface_error: type[Exception] = InterfaceError

    def open(self, recipe: Recipe, seconds: float | None) -> Pg8000Link:
        """Connect within `seconds`."""
        options = {**_options(parse(recipe.conninfo)), **recipe.kwargs}
        options.setdefault("application_name", recipe.application_name)
        autocommit = bool(options.pop("autocommit", recipe.autocommit))
        wire = _connected(options, seconds)
        try:
            conn = pg8000.dbapi.connect(sock=wire, **options)
            wire.settimeout(None)
            link = Pg8000Link(conn, autocommit=autocommit)
            link.ping(seconds)  # pg8000 knows the transaction's state from the first answer on
            link.lend()
        except BaseException:
            wire.close()
            raise
        return link

    def diagnose(self, error: BaseException, recipe: Recipe, seconds: float | None) -> Diagnosis:
        """Tell why `open` raised `error`: pg8000 keeps the server's own fields."""
        del recipe, seconds
        # pg8000 says goodbye to a server that has gone, and then raises what it met there: what the
        # server said is behind it, one step or two.
        fields, behind = _fields(error), error.__context__
        while not fields and behind is not None:
            fields, behind = _fields(behind), behind.__context__
        code = fields.get("C")
        text = " ".join(str(fields.get("M") or error).split())
        # 28: authentication; 3D: no such database.
        heals = not (code or "").startswith(("28", "3D"))
        return Diagnosis(sqlstate=code, heals=heals, text=text or type(error).__name__)

    def ends_session(self, error: BaseException, *, read_write: bool) -> bool:
        """Whether `error` means that this session, and older ones, are not to be trusted."""
        if isinstance(error, OSError):
            return True
        if isinstance(error, InterfaceError):
            return "network error" in str(error) or "closed" in str(error)
        fields = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
        code = fields.get("C") or ""
        return code.startswith(("57P0", "08")) or (read_write and code == "25006")


def _options(settings: dict[str, str]) -> dict[str, Any]:
    """What pg8000 calls libpq's settings."""
    host, port = settings.get("host", "localhost"), settings.get("port", "5432")
    options: dict[str, Any] = {"user": settings.get("user") or getpass.getuser()}
    if host.startswith("/"):
        options["unix_sock"] = f"{host}/.s.PGSQL.{port}"
    else:
        options |= {"host": host, "port": int(port)}
    for theirs, ours in (
        ("database", "dbname"),
        ("password", "password"),
        ("application_name", "application_name"),
    ):
        if settings.get(ours):
            options[theirs] = settings[ours]
    if settings.get("sslmode") in {"require", "verify-ca", "verify-full"}:
        options["ssl_context"] = ssl.create_default_context()
    return options


def _fields(error: BaseException) -> dict[str, str]:
    """What the server said, by its one-letter names (Error and Notice Message Fields)."""
    return error.args[0] if error.args and isinstance(error.args[0], dict) else {}


def _connected(options: dict[str, Any], seconds: float | None) -> socket.socket:
    """A socket to the server, on which each wait lasts `seconds` at most."""
    path, host, port = (options.pop(key, None) for key in ("unix_sock", "host", "port"))
    if path is None:
        return socket.create_connection((host, port), seconds)
    wire = socket.socket(socket.AF_UNIX)
    try:
        wire.settimeout(seconds)
        wire.connect(path)
    except BaseException:
        wire.close()
        raise
    return wire


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
