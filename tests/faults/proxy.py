"""A proxy that breaks what is behind it: what a network, a host or a balancer does to a pool.

Its one job: the verbs that `tests.wire.WireProxy` lacks, and a process of its own for the proxy, so that
what is measured beside it does not share an interpreter with it.

    with ProxyProcess("127.0.0.1", server.port) as proxy:
        pool = ConnectionPool(server.conninfo(port=proxy.port))
        proxy.silence()  # the network is cut, and nobody says so

What user space can do here, and what it cannot:

* `hold`: the kernel goes on acknowledging until its buffers and the proxy's are full (some hundred kB), then the
  window is closed. That is a frozen process, or a SIGSTOP.
* `silence`: a filter on the socket drops what arrives *before* TCP sees it: nothing is acknowledged, no
  keepalive is answered, a SYN gets no answer. That is a host without power, or a firewall that drops. It
  needs no privilege, but Linux. What the proxy's kernel has sent itself before, it goes on retransmitting, and the
  end of the proxy does send a FIN; a dead host does neither.
* It cannot lose single packets, reorder them, or answer with ICMP.

Bounded: more than `connections` in all are cut on arrival, and after `seconds` it cuts everything and
listens no more, so that a test that hangs cannot keep it.

It must not know: pools, drivers. No lock: as in `tests.wire`, one loop owns everything.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.wire import VERB_DEADLINE, Count, Traffic, WireProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from tests.wire import Relay

ROOT = Path(__file__).parents[2]
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # Linux's numbers; Python has no names for them
DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF: "return 0", so many bytes may pass


def _filter(sock: Any, *, drops: bool) -> None:
    """Drop whatever arrives at a socket, or no more."""
    if not drops:
        with suppress(OSError):  # it has none, or is closed
            sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        return
    program = ctypes.create_string_buffer(DROP_ALL)
    words = struct.pack("HL", 1, ctypes.addressof(program))
    with suppress(OSError):  # a connection that is closed just now
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, words)


class FaultProxy(WireProxy):
    """`WireProxy` with more faults. A context manager; `port` is where clients connect.

    Args:
        host, port: the server.
        connections: cut what comes after so many.
        seconds: the longest it lives.
    """

    def __init__(
        self, host: str, port: int, *, connections: int = 10_000, seconds: float = 900.0
    ) -> None:
        super().__init__(host, port)
        self._arrivals: list[float] = []
        self._most = connections
        self._seconds = seconds
        self._held: set[Relay] = set()
        self._holds_new = self._silences_new = self._mute = False
        self._slow = 0.0
        self._slow_until: dict[Relay, float] = {}

    # ------------------------------------------------------------------------ verbs

    def arrivals(self) -> list[float]:
        """When (`time.monotonic`) each connection arrived, whatever became of it."""

        async def copied() -> list[float]:
            return list(self._arrivals)

        return self._do(copied())

    def hold(self, *, old: bool = True, new: bool = True) -> None:
        """Pass nothing on, and let the kernel acknowledge: of those there are, of new ones, of both."""
        self._do(self._hold(old=old, new=new, silent=False))

    def silence(self, *, old: bool = True, new: bool = True) -> None:
        """Pass nothing on and acknowledge nothing, not even a SYN."""
        self._do(self._hold(old=old, new=new, silent=True))

    def say_nothing(self) -> None:
        """Accept new connections and never answer; no server hears of them."""
        self._do(self._set(lambda: setattr(self, "_mute", True)))

    def answer_new(self) -> None:
        """Pass new connections on again; those that `say_nothing` took stay unanswered."""
        self._do(self._set(lambda: setattr(self, "_mute", False)))

    def slow_connect(self, seconds: float) -> None:
        """Answer the first words of each new connection so much later; 0 ends it."""
        self._do(self._set(lambda: setattr(self, "_slow", seconds)))

    def release(self) -> None:
        """End `hold`, `silence` and `say_nothing`; what was held goes its way."""
        self._do(self._release())

    # ------------------------------------------------------------------------ in the loop

    async def admit(self, client: asyncio.StreamWriter) -> bool:
        self._arrivals.append(time.monotonic())
        if len(self._arrivals) > self._most:
            return False
        if self._mute:
            await self._released.wait()
            return False
        return True

    def begins(self, relay: Relay) -> None:
        if self._holds_new:
            self._held.add(relay)
        if self._silences_new:
            _filter(relay.writers[0].get_extra_info("socket"), drops=True)
        if self._slow:
            self._slow_until[relay] = time.monotonic() + self._slow

    async def may_pass(self, relay: Relay, *, from_client: bool) -> None:
        if from_client and (until := self._slow_until.pop(relay, None)):
            await asyncio.sleep(max(0.0, until - time.monotonic()))
        while relay in self._held:
            await self._released.wait()
        await super().may_pass(relay, from_client=from_client)

    async def _begin(self) -> None:
        self._released = asyncio.Event()
        await super()._begin()
        self._loop.call_later(self._seconds, self._expire)

    async def _listen(self) -> None:
        await super()._listen()
        self._filter_listener()

    async def _hold(self, *, old: bool, new: bool, silent: bool) -> None:
        self._released.clear()
        if old:
            self._held.update(self._relays)
            if silent:
                for relay in self._relays:
                    _filter(relay.writers[0].get_extra_info("socket"), drops=True)
        self._holds_new |= new
        self._silences_new |= new and silent
        self._filter_listener()

    async def _release(self) -> None:
        self._mute = self._holds_new = self._silences_new = False
        self._filter_listener()
        for relay in self._relays:
            _filter(relay.writers[0].get_extra_info("socket"), drops=False)
        self._held.clear()
        self._released.set()
        self._released = asyncio.Event()

    def _filter_listener(self) -> None:
        for listening in self._listener.sockets if self._listener else ():
            _filter(listening, drops=self._silences_new)

    def _expire(self) -> None:
        self._most = 0
        self._ending = asyncio.ensure_future(self._cut_and_refuse())

    async def _cut_and_refuse(self) -> None:
        await self._stop_listening()
        for relay in self._relays:
            await relay.cut("rst")

    async def _end(self) -> None:
        await self._release()  # so that the ends are heard
        await super()._end()


# ---------------------------------------------------------------------------- a process of its own


class ProxyProcess:
    """A `FaultProxy` in another process; it ends with this one."""

    def __init__(self, host: str, port: int, **bounds: float) -> None:
        self._words = [host, str(port), json.dumps(bounds)]
        self._unread = b""
        self.port = 0

    def __enter__(self) -> Self:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.proxy", *self._words],
                stdin=theirs.fileno(),
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            )
        self._socket.settimeout(VERB_DEADLINE)
        self.port = self._answer()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()
        try:
            self._process.wait(VERB_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @contextmanager
    def counting(self) -> Iterator[Count]:
        count = Count(self._traffic)
        try:
            yield count
        finally:
            count.stop()

    def _traffic(self) -> list[Traffic]:
        return [
            Traffic(**{**each, "messages": Counter(each["messages"])})
            for each in self._ask("_traffic")
        ]

    def arrivals(self) -> list[float]:
        return list(self._ask("arrivals"))

    def hold(self, **which: bool) -> None:
        self._ask("hold", **which)

    def silence(self, **which: bool) -> None:
        self._ask("silence", **which)

    def say_nothing(self) -> None:
        self._ask("say_nothing")

    def release(self) -> None:
        self._ask("release")

    def slow_connect(self, seconds: float) -> None:
        self._ask("slow_connect", seconds)

    def delay(self, seconds: float) -> None:
        self._ask("delay", seconds)

    def upstream(self, host: str, port: int) -> None:
        self._ask("upstream", host, port)

    def refuse(self) -> None:
        self._ask("refuse")

    def accept(self) -> None:
        self._ask("accept")

    def cut(self, how: Literal["rst", "fin"] = "rst") -> int:
        return int(self._ask("cut", how))

    def _ask(self, verb: str, *args: Any, **options: Any) -> Any:
        self._socket.sendall(json.dumps([verb, args, options]).encode() + b"\n")
        return self._answer()

    def _answer(self) -> Any:
        while b"\n" not in self._unread:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError("the proxy's process has ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


def serve(host: str, port: str, bounds: str) -> None:
    """The process: one line of JSON per verb on standard input, a socket; an answer for each."""
    with (
        socket.socket(fileno=os.dup(0)) as channel,
        channel.makefile("rw", encoding="utf-8") as lines,
        FaultProxy(host, int(port), **json.loads(bounds)) as proxy,
    ):
        print(json.dumps(proxy.port), file=lines, flush=True)
        for line in lines:
            verb, args, options = json.loads(line)
            answer = getattr(proxy, verb)(*args, **options)
            if verb == "_traffic":
                answer = [vars(each) for each in answer]
            print(json.dumps(answer), file=lines, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
