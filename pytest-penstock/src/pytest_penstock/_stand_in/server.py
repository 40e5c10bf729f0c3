"""A stand-in for the server: it listens as PostgreSQL does, and has one session for all who come.

One job: let clients in, each with a dialog and a thread of its own, and end all of them.

It must not know: pools, how transactions become savepoints. `_lock` protects the table of dialogs.
It listens on a Unix socket in a folder that only this user may enter, so it asks for no password.
A forked child lets go of everything: the session stays the parent's, whose stand-in the child's
pool may connect to as anybody else.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from penstock._process.sockets import point_at_null
from penstock.errors import MisuseError
from pytest_penstock._stand_in import messages as say
from pytest_penstock._stand_in.client import Dialog
from pytest_penstock._stand_in.messages import Hangup, Wire
from pytest_penstock._stand_in.session import (
    NotYourTurn,
    SessionLost,
    SharedSession,
    reported,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

#: The name under which a client is told its number; see `StandIn`.
NUMBER: Final = "penstock.client"

_PORT: Final = 5432  # a part of the socket's file name, no more
_OVER: Final = "the test is over: pytest_penstock.undone() has rolled back and gone"
_CLOSE_SECONDS: Final = 5.0


class StandIn:
    """Listens for clients of one shared session.

    Args:
        handle: a libpq handle (psycopg's ``PGconn``) that is connected without encryption. It is
            the stand-in's from now on.
        seconds: how long a statement waits for the session at most.
        owner_of: whose transactions those of a client are: by its number and its start-up
            parameters. See `SharedSession`.
        describe: who has a client, for people; by its number.
    """

    def __init__(
        self,
        handle: Any,
        *,
        seconds: float,
        owner_of: Callable[[int, dict[bytes, bytes]], Hashable | None],
        describe: Callable[[int], str],
    ) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise MisuseError(
                "pytest_penstock.undone() needs Unix sockets, and this system has none",
                next_step="run these tests on Linux or macOS",
            )
        self._handle = handle
        self._pid: int = handle.backend_pid  # a client may begin while this is closed
        self._seconds = seconds
        self._owner_of = owner_of
        self._describe = describe
        self._parameters = reported(handle.parameter_status)
        self._session = SharedSession(Wire(_own_socket(handle)), self._tell_all)
        self._lock = threading.Lock()
        self._dialogs: dict[int, Dialog] = {}
        self._secrets: dict[int, int] = {}
        self._numbers = 0
        self._threads: list[threading.Thread] = []
        self._session.begin()
        self._folder = tempfile.mkdtemp(prefix="penstock-")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(Path(self._folder, f".s.PGSQL.{_PORT}")))
        self._listener.listen(128)
        _alive.add(self)
        self._start(self._listen, "penstock-stand-in")

    @property
    def conninfo(self) -> str:
        """How to connect: a libpq connection string."""
        user, dbname = self._handle.user.decode(), self._handle.db.decode()
        words = {"host": self._folder, "port": _PORT, "user": user, "dbname": dbname}
        words |= {"sslmode": "disable", "gssencmode": "disable"}
        return " ".join(f"{word}={_quoted(str(value))}" for word, value in words.items())

    def close(self) -> None:
        """Roll everything back, and end every connection. Does nothing the second time."""
        if self not in _alive:
            return
        _alive.discard(self)
        self._stop_listening()
        self._roll_back()
        self._session.lose(_OVER)
        for dialog in list(self._dialogs.values()):
            dialog.hang_up(_OVER)
        self._handle.finish()
        for thread in list(self._threads):
            thread.join(_CLOSE_SECONDS)
        self._session.close()

    def _stop_listening(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _roll_back(self) -> None:
        """Now and not by hanging up, which the server notices later than the next test begins."""
        if not self._ended_within(0.0):  # a statement is under way
            self._handle.get_cancel().cancel()
            self._ended_within(_CLOSE_SECONDS)

    def _ended_within(self, seconds: float) -> bool:
        try:
            with self._session.turn(self, self, seconds, last=True):
                self._session.end()
        except NotYourTurn:
            return False
        except SessionLost:
            pass
        return True

    # -- clients ----------------------------------------------------------------------------------

    def _start(self, run: Callable[[], object], name: str) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(lambda sock=client: self._serve(sock), "penstock-stand-in-client")  # type: ignore[misc]

    def _serve(self, sock: socket.socket) -> None:
        wire = Wire(sock)
        try:
            code, body = self._greet(wire)
        except Hangup:
            sock.close()
            return
        if code == say.CANCEL:
            self.cancel(self._secrets.get(int.from_bytes(body[4:8], "big"), 0))
            sock.close()
            return
        words = body.rstrip(b"\0").split(b"\0")
        self._talk(wire, dict(zip(words[::2], words[1::2], strict=False)))

    def _greet(self, wire: Wire) -> tuple[int, bytes]:
        code, body = wire.receive_startup()
        while code in say.WANTS_ENCRYPTION:
            wire.send(b"N")
            code, body = wire.receive_startup()
        return code, body

    def _talk(self, wire: Wire, asked: dict[bytes, bytes]) -> None:
        with self._lock:
            self._numbers += 1
            number = self._numbers
        dialog = Dialog(
            wire,
            self._session,
            number,
            owner=lambda: self._owner_of(number, asked),
            describe=lambda other: self._describe(other.number),
            seconds=self._seconds,
        )
        secret = secrets.randbits(31)
        told = {**self._parameters, NUMBER.encode(): b"%d" % number}
        self._dialogs[number], self._secrets[secret] = dialog, number
        try:
            dialog.send(say.welcome(told, self._pid, secret))
            dialog.run()
        except Hangup:
            dialog.close()
        finally:
            del self._dialogs[number], self._secrets[secret]

    def cancel(self, number: int) -> None:
        """Cancel what the server is doing for this client, if it does anything."""
        dialog = self._dialogs.get(number)
        if dialog is not None and self._session.holds_turn(dialog):
            self._handle.get_cancel().cancel()

    def _tell_all(self, report: bytes) -> None:
        """A setting has changed, and the session is everybody's."""
        name, rest = say.first_text(report[5:])
        self._parameters[name] = rest.rstrip(b"\0")
        for dialog in list(self._dialogs.values()):
            # The one who asked hears it in its place, with the answer.
            if not self._session.holds_turn(dialog):
                with contextlib.suppress(Hangup):
                    dialog.send(report)

    # -- forks ------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """In a forked child: not a byte to the parent's server or clients."""
        _buried.append(self._handle)
        point_at_null(self._handle.socket)
        self._session.close()
        self._listener.close()
        for dialog in self._dialogs.values():
            dialog.let_go()


_alive: Final[weakref.WeakSet[StandIn]] = weakref.WeakSet()
# In a forked child: handles of the parent's, which must not say goodbye when they are freed.
_buried: Final[list[Any]] = []


def _let_go_in_child() -> None:
    for each in list(_alive):
        each.let_go()
    _alive.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _own_socket(handle: Any) -> socket.socket:
    own = socket.socket(fileno=os.dup(handle.socket))
    own.settimeout(None)
    return own


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
