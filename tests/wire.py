"""A TCP proxy in front of a server that counts what goes over the wire, and breaks it on demand.

Its one job: let a test say "borrow and return: no round trip" and have that be exact.

    with WireProxy("127.0.0.1", server.port) as proxy:
        with psycopg.connect(server.conninfo(port=proxy.port), autocommit=True) as connection:
            with proxy.counting() as count:
                connection.execute("select 1")
            assert count.round_trips == 1

A *round trip* is the server answering after the client spoke: counted when the answer arrives here, before
it is passed on. So whoever has an answer finds it counted. What nobody answers (Terminate) is no
round trip, nor is what the server says unasked. Exact for clients that wait for their answers; a client
that sends on while answers come in (pipeline mode) is counted by the turns that happened.

It must not know: pools, drivers. No lock: one thread runs an event loop that owns everything; every verb
runs in that loop and has taken effect when it returns.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from types import TracebackType
    from typing import Self

T = TypeVar("T")

CANCEL, TLS, GSS = 80877102, 80877103, 80877104  # codes that stand where a version would
MESSAGES = {
    "B": "Bind",
    "C": "Close",
    "D": "Describe",
    "E": "Execute",
    "F": "FunctionCall",
    "H": "Flush",
    "P": "Parse",
    "Q": "Query",
    "S": "Sync",
    "X": "Terminate",
    "c": "CopyDone",
    "d": "CopyData",
    "f": "CopyFail",
    "p": "Password",
}
# Below the kernel's own choices: a client that keeps trying a refused port must not find itself there.
PORTS = (12_000, 20_000)
VERB_DEADLINE = 30.0  # a verb that hangs is a bug here, and must not hang the tests


@dataclass
class Traffic:
    """What went over the wire, of one connection or of all.

    Attributes:
        opened: connections.
        round_trips: answers to the client, see above; opening a connection takes some, too.
        sent: bytes from the client.
        received: bytes from the server.
        messages: what the client sent, by name: Startup, TLSRequest, Query, Parse, Terminate...
            Inside TLS nothing is known but bytes and round trips.
    """

    opened: int = 0
    round_trips: int = 0
    sent: int = 0
    received: int = 0
    messages: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Traffic) -> Traffic:
        return self._each(other, 1)

    def __sub__(self, other: Traffic) -> Traffic:
        return self._each(other, -1)

    def _each(self, other: Traffic, sign: int) -> Traffic:
        messages = Counter(self.messages)
        for name, number in other.messages.items():
            messages[name] += sign * number
        return Traffic(
            self.opened + sign * other.opened,
            self.round_trips + sign * other.round_trips,
            self.sent + sign * other.sent,
            self.received + sign * other.received,
            +messages,
        )


class Count:
    """Traffic since a moment; it stands still when its `counting()` block ends."""

    def __init__(self, now: Callable[[], list[Traffic]]) -> None:
        self._now = now
        self._before = now()
        self._final: list[Traffic] | None = None

    def stop(self) -> None:
        self._final = self.by_connection

    @property
    def by_connection(self) -> list[Traffic]:
        """One for each connection the proxy ever had, oldest first."""
        if self._final is not None:
            return self._final
        now = self._now()
        before = self._before + [Traffic()] * (len(now) - len(self._before))
        return [later - earlier for later, earlier in zip(now, before, strict=True)]

    @property
    def total(self) -> Traffic:
        return sum(self.by_connection, Traffic())

    @property
    def round_trips(self) -> int:
        return self.total.round_trips

    @property
    def opened(self) -> int:
        return self.total.opened

    @property
    def messages(self) -> Counter[str]:
        return self.total.messages

    def __repr__(self) -> str:
        return f"<Count {self.total}>"


class FrontendParser:
    """Names the messages in a client's bytes, however they are cut into pieces."""

    def __init__(self) -> None:
        self._unread = b""
        self._to_skip = 0  # of a message whose head was seen
        self._started = False
        self._asked_encryption = False
        self._opaque = False

    def answered(self, data: bytes) -> None:
        """See what the server says: after "S" or "G" to a request for encryption all is ciphertext."""
        if self._asked_encryption and data[:1] in (b"S", b"G"):
            self._opaque = True
        self._asked_encryption = False

    def feed(self, data: bytes) -> list[str]:
        """The names of the messages that begin in these bytes."""
        if self._opaque:
            return []
        self._unread += data
        names = []
        while (name := self._next()) is not None:
            names.append(name)
        return names

    def _next(self) -> str | None:
        skipped = min(self._to_skip, len(self._unread))
        self._unread = self._unread[skipped:]
        self._to_skip -= skipped
        if len(self._unread) < (5 if self._started else 8):
            return None
        if self._started:
            kind, length = struct.unpack("!cI", self._unread[:5])
            self._to_skip = length + 1  # the length counts itself, not the kind
            return MESSAGES.get(kind.decode("latin-1"), repr(kind))
        self._to_skip, code = struct.unpack("!II", self._unread[:8])
        if code == CANCEL:
            return "CancelRequest"
        if code in (TLS, GSS):
            self._asked_encryption = True
            return "TLSRequest" if code == TLS else "GSSRequest"
        self._started = True
        return "Startup"


class Relay:
    """One client's connection and its connection to the server."""

    def __init__(
        self, proxy: WireProxy, client: asyncio.StreamWriter, server: asyncio.StreamWriter
    ) -> None:
        self.traffic = Traffic(opened=1)
        self.writers = (client, server)
        self._proxy = proxy
        self._parser = FrontendParser()
        self._client_spoke_last = False

    async def run(self, client: asyncio.StreamReader, server: asyncio.StreamReader) -> None:
        to_client, to_server = self.writers
        directions = [
            asyncio.ensure_future(self._pass_on(client, to_server, self._client_says)),
            asyncio.ensure_future(self._pass_on(server, to_client, self._server_says)),
        ]
        try:
            # Whichever side hangs up, the other is hung up on, after it got all that was said.
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            for writer in self.writers:
                writer.close()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        count: Callable[[bytes], None],
    ) -> None:
        # A connection that breaks is what this proxy is for.
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._proxy.may_pass(self, from_client=count == self._client_says)
                count(data)
                writer.write(data)
                await writer.drain()

    def _client_says(self, data: bytes) -> None:
        self._client_spoke_last = True
        self.traffic.sent += len(data)
        self.traffic.messages.update(self._parser.feed(data))

    def _server_says(self, data: bytes) -> None:
        self._parser.answered(data)
        self.traffic.round_trips += self._client_spoke_last
        self._client_spoke_last = False
        self.traffic.received += len(data)

    async def cut(self, how: Literal["rst", "fin"]) -> None:
        for writer in self.writers:
            reset(writer) if how == "rst" else writer.transport.abort()
        for writer in self.writers:
            with suppress(OSError):
                await writer.wait_closed()


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST."""
    # Not to linger, for no time, is what makes the kernel send it.
    linger = struct.pack("ii", 1, 0)
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


class WireProxy:
    """A proxy on 127.0.0.1 in front of a server. A context manager; `port` is where clients connect."""

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self.latency = 0.0
        self._upstream = (host, port)
        self._relays: list[Relay] = []  # all that ever were: they are counted
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="wire proxy", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._begin())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(VERB_DEADLINE)
        self._loop.close()

    # ------------------------------------------------------------------------ counting

    @contextmanager
    def counting(self) -> Iterator[Count]:
        """Count what is said inside the block."""
        count = Count(self._traffic)
        try:
            yield count
        finally:
            count.stop()

    def _traffic(self) -> list[Traffic]:
        async def copied() -> list[Traffic]:
            return [relay.traffic + Traffic() for relay in self._relays]

        return self._do(copied())

    # ------------------------------------------------------------------------ verbs

    def freeze(self) -> None:
        """Pass nothing on; connections stay, and connecting works."""
        self._do(self._set(self.thawed.clear))

    def thaw(self) -> None:
        """Pass on again, first what was held."""
        self._do(self._set(self.thawed.set))

    def delay(self, seconds: float) -> None:
        """Make every round trip longer by so much: the client's bytes are held for that time."""
        self._do(self._set(lambda: setattr(self, "latency", seconds)))

    def upstream(self, host: str, port: int) -> None:
        """Lead new connections to another server; those there are stay."""
        self._do(self._set(lambda: setattr(self, "_upstream", (host, port))))

    def refuse(self) -> None:
        """Refuse new connections; those there are stay."""
        self._do(self._stop_listening())

    def accept(self) -> None:
        """Accept new connections again, on the same port."""
        self._do(self._listen())

    def cut(self, how: Literal["rst", "fin"] = "rst") -> int:
        """Cut every connection on both sides; answers how many."""

        async def cut_all() -> int:
            open_ones = [relay for relay in self._relays if not relay.writers[0].is_closing()]
            await asyncio.gather(*(relay.cut(how) for relay in open_ones))
            return len(open_ones)

        return self._do(cut_all())

    # ------------------------------------------------------------------------ for those who break more

    async def admit(self, _client: asyncio.StreamWriter) -> bool:
        """Asked in the loop about each new connection, before the server is; False cuts it with RST."""
        return True

    def begins(self, relay: Relay) -> None:
        """Told in the loop that a new connection has reached the server."""

    async def may_pass(self, relay: Relay, *, from_client: bool) -> None:
        """Waits, in the loop, for as long as what was just read is to be held."""
        if from_client:
            await asyncio.sleep(self.latency)
        await self.thawed.wait()

    # ------------------------------------------------------------------------ in the loop

    def _do(self, verb: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(verb, self._loop).result(VERB_DEADLINE)

    async def _set(self, change: Callable[[], None]) -> None:
        change()

    async def _begin(self) -> None:
        self.thawed = asyncio.Event()
        self.thawed.set()
        await self._listen()

    async def _listen(self) -> None:
        while self._listener is None:
            port = self.port or random.randrange(*PORTS)
            try:
                self._listener = await asyncio.start_server(
                    self._serve, "127.0.0.1", port, reuse_address=True, backlog=1024
                )
            except OSError:
                if self.port:
                    raise
            else:
                self.port = port

    async def _stop_listening(self) -> None:
        if self._listener is None:
            return
        # asyncio leaves a connection open, and unheard, whose listener is closed between its accept()
        # and the first step of its task: accept no more, let those take it, then close.
        for each in self._listener.sockets:
            self._loop.remove_reader(each.fileno())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._listener.close()
        self._listener = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(asyncio.CancelledError):  # the proxy ends
            await self._relay(reader, writer)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not await self.admit(writer):
                reset(writer)
                return
            server_reader, server_writer = await asyncio.open_connection(*self._upstream)
        except (OSError, asyncio.CancelledError):
            reset(writer)
            return
        relay = Relay(self, writer, server_writer)
        self._relays.append(relay)
        self.begins(relay)
        await relay.run(reader, server_reader)

    async def _end(self) -> None:
        await self._stop_listening()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for relay in self._relays:
            await relay.cut("fin")
