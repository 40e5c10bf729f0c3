"""A proxy that lets a server say a login up to a message, and cuts the connection there.

Its one job: an end at a known place of the login. It must not know: pools, drivers. No lock: each connection has
a thread of its own, and `last` is read once per connection.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading

#: Seconds that an end may take: the price of a failure.
PATIENCE = 10.0

#: Authentication messages by their number, https://www.postgresql.org/docs/current/protocol-message-formats.html
ASKS = {0: "ok", 3: "password", 5: "md5", 10: "sasl", 11: "sasl continue", 12: "sasl final"}
NAMES = {b"S": "parameter", b"K": "key", b"Z": "ready", b"E": "error"}
#: What the server says in a login of each method, in order; "nothing": not a word.
STEPS = {
    "trust": ("nothing", "ok", "parameter", "key"),
    "password": ("nothing", "password", "ok", "parameter", "key"),
    "md5": ("nothing", "md5", "ok", "parameter", "key"),
    "scram-sha-256": (
        *("nothing", "sasl", "sasl continue", "sasl final"),
        *("ok", "parameter", "key"),
    ),
}


class LoginCutter:
    """In front of a server on this machine; TLS and GSS must not be asked for.

    Attributes:
        last: the message after which a connection is cut; None: all is passed on.
        how: "fin" or "rst".
        cuts: how many were cut.
    """

    def __init__(self, port: int, last: str | None = None, how: str = "fin") -> None:
        self.last, self.how, self.cuts = last, how, 0
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_exc):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._listener.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client):
        last = self.last
        with (
            contextlib.suppress(OSError),
            client,
            socket.create_connection(("127.0.0.1", self._upstream)) as server,
        ):
            if self._passed(client, server, last):
                return
            self.cuts += 1
            if self.how == "rst":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            client.shutdown(socket.SHUT_WR)
            client.settimeout(PATIENCE)
            while client.recv(4096):  # else what is unread would make it an RST
                pass

    def _passed(self, client, server, last):
        """Pass all on; False as soon as `last` was said."""
        unread = b""
        while True:
            for speaker in select.select([client, server], [], [])[0]:
                data = speaker.recv(1 << 16)
                if not data:
                    return True
                if speaker is client:
                    if last == "nothing":
                        return False
                    server.sendall(data)
                    continue
                said, unread, is_last = _up_to(last, unread + data)
                client.sendall(said)
                if is_last:
                    return False


def _up_to(last, data):
    """What may be said of this, what is left, and whether `last` was reached."""
    end = 0
    while last is not None and len(data) - end >= 5:
        kind, length = struct.unpack_from("!cI", data, end)
        if len(data) < end + 1 + length:
            break
        name = NAMES.get(kind)
        if kind == b"R":
            name = ASKS.get(struct.unpack_from("!I", data, end + 5)[0])
        end += 1 + length
        if last == name:
            return data[:end], b"", True
    end = len(data) if last is None else end
    return data[:end], data[end:], False
