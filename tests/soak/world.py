"""One process's world: a server, a proxy before it, the pool of the moment, the journal, and who borrows.

Its one job: hold what steps, faults and checks need, whatever the runtime and the driver; most of it is
`tests.faults.stage.Stage`'s. A *borrower* is one thread, greenlet or task with a randomness and counters of
its own, so that nobody counts with somebody else. An *era* is the life of one pool; its options are drawn.

It must not know: which faults there are, what is checked. No lock: `findings` is appended to by anybody,
which is atomic; everything else is the step's own.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from penstock import PoolClosed, PoolTimeout, ServerUnavailable, TooManyRequests
from pytest_penstock.postgres import HBA, Server
from tests.faults.proxy import ProxyProcess
from tests.soak.ledger import Journal
from tests.soak.levels import descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.faults.stage import Stage

now = time.monotonic

#: Seconds until what has to happen has not happened: the price of a failure.
PATIENCE = 30.0

#: Errors after which no statement of the borrower has gone out.
NEVER_LENT = (PoolTimeout, ServerUnavailable, TooManyRequests, PoolClosed)

#: What drivers say when two use one connection, or one is used that is somebody else's.
TWO_AT_ONCE = ("already in progress", "another operation", "given back", "another command")

#: asyncpg, asked something between the server's last words (FATAL) and its hanging up.
ERROR_CONSUMED = "another operation (2) is in progress"

ACCOUNTS = 24
ROLE = "soaker"

#: Everything that a fault asks of the server: who soaks is no superuser, so that limits hold for him.
SCHEMA = f"""
create role {ROLE} login password 'first';
create table ledger (key text, part text);
create table account (id int primary key, balance bigint not null);
insert into account select n, 0 from generate_series(1, {ACCOUNTS}) n;
grant all on ledger, account to {ROLE};
grant temporary on database postgres to {ROLE};
"""

#: The same server at a second address, for a proxy that is led elsewhere.
ADDRESSES = ("127.0.0.1", "127.0.0.2")


class Deliberate(Exception):
    """A borrower's own error."""


class Copied(BaseException):
    """This greenlet runs on in a forked child: it must not do its work twice."""


class Borrower:
    """Who borrows: randomness and counters of its own.

    Attributes:
        attempts: borrows begun, `sure`: those that came to their end undisturbed.
        queries: statements that were answered.
        errors: by class name.
        last_good: when something was last done.
    """

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self.attempts = self.sure = self.queries = 0
        self.errors: Counter[str] = Counter()
        self.last_good = 0.0

    def add(self, other: Borrower) -> None:
        self.attempts += other.attempts
        self.sure += other.sure
        self.queries += other.queries
        self.errors += other.errors


class Lending:
    """`pool.connection()` whose borrower counts what becomes of it."""

    def __init__(self, world: World, borrower: Borrower, options: dict[str, Any]) -> None:
        self._world, self._borrower = world, borrower
        self._options = options

    async def __aenter__(self) -> Any:
        self._borrower.attempts += 1
        self._lease = self._world.pool.connection(**self._options)
        return await self._lease.__aenter__()

    async def __aexit__(self, *exc: object) -> Any:
        answer = await self._lease.__aexit__(*exc)
        if exc[0] is None:
            self._borrower.sure += 1
        return answer


class World:
    """What is passed to steps, faults and checks as `w`.

    Args:
        stage: of the runtime and driver; it ends what is made here.
        seed: of the run; each step and era derives its own.
        seconds: how long it is to live at most.
    """

    def __init__(self, stage: Stage, seed: str, seconds: float) -> None:
        self.stage = stage
        self.runtime, self.driver = stage.runtime, stage.driver
        self.seed = f"{seed} {stage.name}"
        self.rng = random.Random(self.seed)
        self.pid = os.getpid()
        self.findings: list[str] = []
        self.story: list[str] = []
        self.began = now()
        self.totals = Borrower(self.seed)
        self.server: Server = stage.owns(
            Server(
                settings={"max_connections": 120, "listen_addresses": ",".join(ADDRESSES)},
                hba=(f"host all {ROLE} 127.0.0.0/8 scram-sha-256", *HBA),
            )
        )
        self.server.execute(SCHEMA)
        bounds = {"connections": 10_000_000, "seconds": seconds + 300}
        self.proxy: ProxyProcess = stage.owns(
            ProxyProcess(ADDRESSES[0], self.server.port, **bounds)
        )
        self.password = "first"
        self.address = 0
        self.pool: Any = None
        self.options: dict[str, Any] = {}
        self.era_borrows = Borrower(self.seed)
        self.begin_step(0)
        sys.unraisablehook = lambda told: self.find(
            f"unraisable: {told.exc_value!r} {told.object!r}"
        )
        threading.excepthook = lambda told: self.find(
            "a thread ended with " + "".join(traceback.format_exception(told.exc_value))
        )

    # -- steps and eras ----------------------------------------------------------------------------

    def begin_step(self, number: int) -> None:
        self.rng = random.Random(f"{self.seed} step {number}")
        self.journal = Journal(f"{self.stage.name}.{number}")
        self.borrowers: list[Borrower] = []
        self.story.clear()
        self.began = now()
        self.harmless = False  # whether nobody else may notice this step's faults
        self.stop = self.runtime.event()

    def borrower(self) -> Borrower:
        """A new one, of this step."""
        made = Borrower(f"{self.journal.who} {len(self.borrowers)} {self.seed}")
        self.borrowers.append(made)
        return made

    def new_pool(self, era: int) -> None:
        """The pool of an era; nothing is opened."""
        self.options = drawn_options(random.Random(f"{self.seed} era {era}"))
        options = dict(self.options)
        if options.pop("checked"):
            options["check"] = self.runtime.callable(self._checks)
        conninfo = self.server.conninfo(user=ROLE, port=self.proxy.port)
        self.pool = self.runtime.pool(
            conninfo,
            driver=self.driver,
            kwargs=lambda: {"password": self.password},
            name=f"soak-{era}",
            **options,
        )
        self.era_borrows = Borrower(self.seed)

    async def _checks(self, conn: Any) -> None:
        await self.stage.ask(conn, "select 1")

    # -- what goes wrong ---------------------------------------------------------------------------

    def tell(self, text: str) -> None:
        """A line of the step's story."""
        self.story.append(f"{now() - self.began:7.3f} s  {text}")

    def find(self, text: str) -> None:
        """Something is wrong: the step fails."""
        self.findings.append(text)

    def heard(self, error: Exception, borrower: Borrower, allowed: tuple[type, ...] = ()) -> None:
        """Count a borrower's error; one that nobody may get is a finding."""
        if os.getpid() != self.pid:
            return  # a copy of a greenlet, in a forked child
        borrower.errors[type(error).__name__] += 1
        if isinstance(error, (Deliberate, *allowed)):
            return
        text = str(error)
        two = any(word in text for word in TWO_AT_ONCE) and ERROR_CONSUMED not in text
        two |= type(error).__name__ == "ProgrammingError"  # without a code of the server's
        if two or not isinstance(error, self.errors()):
            self.find("an error that nobody may get: " + "".join(traceback.format_exception(error)))

    def errors(self) -> tuple[type[Exception], ...]:
        """What a borrower may get while things break: the pool's errors, and the driver's."""
        if self.driver == "psycopg":
            import psycopg

            return (*NEVER_LENT, psycopg.Error)
        if self.driver == "psycopg2":
            import psycopg2

            return (*NEVER_LENT, psycopg2.Error)
        import asyncpg

        own = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
        return (*NEVER_LENT, *own, OSError)

    def spawn(self, coro: Any) -> Any:
        return self.runtime.spawn(coro)

    def are_ends(self, flights: Iterable[Any], *kinds: type[BaseException]) -> None:
        """Whoever is through has ended well, or by one of these."""
        for each in flights:
            if each.error is not None and not isinstance(each.error, kinds):
                self.find("ended with " + "".join(traceback.format_exception(each.error)))

    # -- borrowing ---------------------------------------------------------------------------------

    def lend(self, borrower: Borrower, *, transaction: bool = False, **options: Any) -> Lending:
        """`async with w.lend(borrower) as conn:`; with `transaction`, one is begun in any driver."""
        if transaction and self.driver == "asyncpg":
            options["transaction"] = True
        return Lending(self, borrower, options)

    async def ask(self, borrower: Borrower, conn: Any, query: str) -> list[tuple]:
        """A statement's rows."""
        if os.getpid() != self.pid:
            raise Copied
        rows = await self.stage.ask(conn, query)
        borrower.queries += 1
        return rows

    async def pause(self, seconds: float) -> None:
        await self.runtime.pause(seconds)

    async def execute(self, sql: str) -> list[tuple[str, ...]]:
        """As the superuser, past proxy and pool."""
        rows: list[tuple[str, ...]] = await self.stage.aside(lambda: self.server.execute(sql))
        return rows

    async def aside(self, call: Callable[[], Any]) -> Any:
        return await self.stage.aside(call)

    # -- all at rest -------------------------------------------------------------------------------

    async def sessions(self) -> set[int]:
        """The server's sessions of whoever soaks, by this pool or any before it."""
        query = f"select pid from pg_stat_activity where usename = '{ROLE}'"
        return {int(pid) for (pid,) in await self.execute(query)}

    async def all_at_rest(self) -> str:
        """Wait until pool, server and descriptors say the same; what they said if they never do."""
        deadline = now() + PATIENCE
        while True:
            before = self.pool.stats()
            there = len(await self.sessions())
            stats = self.pool.stats()
            connected = descriptors(self.proxy.port)["connections"]  # collects garbage, too
            busy = stats.waiting + stats.in_use + stats.opening + stats.pinging + stats.closing
            calm = (before.opened, before.closed) == (stats.opened, stats.closed)
            if calm and not busy and there == stats.size == connected:
                return ""
            if now() > deadline:
                told = await self.execute(
                    "select pid, client_port, now() - backend_start, now() - state_change, state, wait_event,"
                    f" query from pg_stat_activity where usename = '{ROLE}'"
                )
                return f"not at rest: {there} sessions, {connected} sockets, {stats}; {told}"
            await self.pause(0.02)

    def heal_network(self) -> None:
        """End whatever a fault has left behind: everything may pass again."""
        with suppress(OSError):  # it listens already
            self.proxy.accept()
        self.proxy.release()
        self.proxy.delay(0)
        self.proxy.slow_connect(0)

    async def heal_server(self) -> None:
        """It runs."""
        await self.aside(self.server.start)
        self.server.resume()


def drawn_options(rng: random.Random) -> dict[str, Any]:
    """A pool's options; `checked` stands for a `check=`."""
    most = rng.randint(2, 8)
    return {
        "max_size": most,
        "min_size": rng.randint(0, most),
        "timeout": rng.choice((1.0, 2.0, 4.0)),
        "max_waiting": rng.choice((0, 0, 6)),
        "order": rng.choice(("lifo", "fifo")),
        "reset": rng.choice(("rollback", "session")),
        "max_idle": rng.choice((None, 0.2, 600.0)),
        "max_lifetime": rng.choice((None, 5.0, 3600.0)),
        "ping_after": rng.choice((None, 0.0, 0.1, 30.0)),
        "server_check_interval": rng.choice((0.5, 0.5, None)),
        "overdue_after": rng.choice((0.2, 60.0)),
        "checked": rng.random() < 0.2,
    }
