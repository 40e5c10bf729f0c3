"""PostgreSQL's messages: framing, reading, and the few that a stand-in says by itself.

One job: bytes of the wire protocol (version 3) to messages and back.

It must not know: what a message is good for, sessions, savepoints. It takes no lock: a `Wire` is
read by one thread and written by one at a time, which is its users' care.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

# Codes that stand where a start-up message has its protocol version.
CANCEL: Final = 80877102
WANTS_ENCRYPTION: Final = frozenset((80877103, 80877104))  # TLS, GSSAPI
PROTOCOL_3_0: Final = 196608

IDLE: Final = b"I"
IN_TRANSACTION: Final = b"T"
FAILED: Final = b"E"

_READ_AT_ONCE: Final = 65536
_HEAD: Final = 5  # one byte of kind, four of length


class Hangup(Exception):  # noqa: N818  it says what happened
    """The other side of the wire is gone."""


class Message(NamedTuple):
    """One message: its kind (one byte), and all its bytes, head included."""

    kind: bytes
    raw: bytes

    @property
    def body(self) -> bytes:
        """What follows the head."""
        return self.raw[_HEAD:]


class Wire:
    """A socket that speaks in messages."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._read = bytearray()
        self._at = 0

    def send(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            Hangup: nobody reads it.
        """
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise Hangup(str(error)) from None

    def receive(self) -> Message:
        """The next message.

        Raises:
            Hangup: there is none, and never will be.
        """
        self._have(_HEAD)
        length = int.from_bytes(self._read[self._at + 1 : self._at + _HEAD], "big") + 1
        raw = self._take(length)
        return Message(raw[:1], raw)

    def receive_startup(self) -> tuple[int, bytes]:
        """The first message of a client, which has no kind: its code and what follows."""
        self._have(8)
        length = int.from_bytes(self._read[self._at : self._at + 4], "big")
        raw = self._take(length)
        return int.from_bytes(raw[4:8], "big"), raw[8:]

    def _take(self, length: int) -> bytes:
        self._have(length)
        raw = bytes(self._read[self._at : self._at + length])
        self._at += length
        return raw

    def _have(self, length: int) -> None:
        while len(self._read) - self._at < length:
            try:
                data = self.socket.recv(_READ_AT_ONCE)
            except OSError as error:
                raise Hangup(str(error)) from None
            if not data:
                raise Hangup("the other side closed the connection")
            # What was taken is forgotten here and not at once: that would move the rest each time.
            del self._read[: self._at]
            self._at = 0
            self._read += data


def message(kind: bytes, body: bytes = b"") -> bytes:
    """The bytes of a message."""
    return kind + struct.pack("!I", len(body) + 4) + body


def text(*values: bytes) -> bytes:
    """Strings as messages hold them."""
    return b"".join(value + b"\0" for value in values)


def first_text(body: bytes) -> tuple[bytes, bytes]:
    """The string that `body` begins with, and what follows it."""
    value, _, rest = body.partition(b"\0")
    return value, rest


def query(sql: bytes) -> bytes:
    """Simple query."""
    return message(b"Q", text(sql))


def ready(status: bytes) -> bytes:
    """Ready for the next query, in this transaction status."""
    return message(b"Z", status)


def done(tag: bytes) -> bytes:
    """A command is complete."""
    return message(b"C", text(tag))


def report(
    sqlstate: str,
    words: str,
    *,
    detail: str = "",
    hint: str = "",
    severity: str = "ERROR",
) -> bytes:
    """An error, or with severity WARNING a notice, as a server would say it."""
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": words, "D": detail, "H": hint}
    body = b"".join(key.encode() + text(value.encode()) for key, value in fields.items() if value)
    return message(b"N" if severity == "WARNING" else b"E", body + b"\0")


def fields_of(body: bytes) -> dict[str, bytes]:
    """The fields of an error or a notice, by their one-letter names."""
    parts = body.rstrip(b"\0").split(b"\0")
    return {part[:1].decode(): part[1:] for part in parts if part}


def with_hint(error: Message, hint: str) -> bytes:
    """The same error with this hint, unless it has one."""
    if "H" in fields_of(error.body):
        return error.raw
    return message(error.kind, error.body[:-1] + b"H" + text(hint.encode()) + b"\0")


def parameter(name: bytes, value: bytes) -> bytes:
    """A setting that the server reports."""
    return message(b"S", text(name, value))


def welcome(parameters: Mapping[bytes, bytes], pid: int, secret: int) -> bytes:
    """All that a server says to a client that it lets in."""
    told = b"".join(parameter(name, value) for name, value in parameters.items())
    key = message(b"K", struct.pack("!II", pid, secret))
    return message(b"R", struct.pack("!I", 0)) + told + key + ready(IDLE)
