"""Pools in which nothing stays: after the block the database is as it was before.

One job: lead a pool's connections to a stand-in that shares one session, and back again. The pool
does not notice: it opens, lends, pings and closes connections as ever, so what a test sees of it is
what production does.

It must not know: messages, savepoints, queues. It takes no lock of its own.
"""

# ruff: noqa: SLF001  it looks at slots, as the pool does, and changes nothing but the opener

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from penstock._machine.progress import CONNECT_SECONDS
from penstock._machine.slot import Slot, SlotState
from penstock._pool.opener import Opener
from penstock._pool.sync.pool import ConnectionPool
from penstock._process.clock import clock
from pytest_penstock._stand_in.server import NUMBER, StandIn

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from penstock._machine.progress import Progress
    from penstock.drivers import Recipe

    Pool = ConnectionPool[Any]

# What a pool's connections say at start-up, and others do not: the keeper's may go between.
_OF_A_POOL: Final = "penstock.pool"

# A pool that waits for ever would have a mistaken test wait for ever.
_LONGEST_WAIT: Final = 60.0

_log = logging.getLogger("penstock")


class Undone:
    """What `undone` gives: the way to the shared session for others than the pools.

    Attributes:
        conninfo: a libpq connection string, for ``psycopg.connect``, psql, another process. What
            is done there is seen by the pools, and undone as well.
    """

    def __init__(self, conninfos: dict[int, str]) -> None:
        self._conninfos = conninfos
        self.conninfo = next(iter(conninfos.values()), "")

    def conninfo_of(self, pool: Pool) -> str:
        """As `conninfo`, where pools of several databases are undone."""
        return self._conninfos[id(pool)]


@contextmanager
def undone(*pools: object, timeout: float | None = None) -> Iterator[Undone]:
    """Have everything undone, after the block, that is done by these pools inside it.

    All their connections share one real session and see each other's work at once; a commit is the
    release of a savepoint. Pools with the same address, user and options share the same session.
    Connections that are open already are replaced when they are given back, which this waits for.
    Inside the block the pools have `guard=True`: what was given back raises when it is used.

    Args:
        *pools: `ConnectionPool` objects over psycopg, mappings of them (`Pools`), or whatever has
            an attribute `pools` that holds some (``app.extensions["penstock"]``).
        timeout: seconds that a statement waits for another thread's transaction; None: the
            pool's own timeout (at most 60).

    Raises:
        TypeError: something is no pool, or its driver is not psycopg.
        MisuseError: a connection is lent, by this thread or for longer than the timeout.
        psycopg.OperationalError: the server cannot be reached, or not without TLS.
    """
    found = list(_pools_in(pools))
    sessions: dict[frozenset[tuple[str, Any]], _Session] = {}
    conninfos: dict[int, str] = {}
    with ExitStack() as stack:
        for pool in found:
            recipe = pool._opener.recipe()
            address = _address(recipe)
            if address not in sessions:
                seconds = pool._timeout if timeout is None else timeout
                made = _Session(recipe, min(seconds, _LONGEST_WAIT))
                sessions[address] = made
                stack.callback(made.stand_in.close)
            stack.enter_context(_led_to(sessions[address], pool))
            conninfos[id(pool)] = sessions[address].stand_in.conninfo
        yield Undone(conninfos)


class _Session:
    """A stand-in, and the pools that are led to it."""

    def __init__(self, recipe: Recipe, seconds: float) -> None:
        self.pools: list[Pool] = []
        self.links: dict[int, Any] = {}
        self.seconds = seconds
        self.stand_in = StandIn(
            _connected(recipe), seconds=seconds, owner_of=self._owner_of, describe=self._describe
        )

    def _owner_of(self, number: int, asked: dict[bytes, bytes]) -> Hashable | None:
        """A thread, for what is lent to it; None for a pool's own work; else the client itself."""
        found = self._slot_of(number)
        if found is not None and found[1].holder:
            return found[1].holder
        link = self.links.get(number)
        dedicated = any(link in pool._dedicated.values() for pool in self.pools) if link else False
        if found is None and not dedicated and asked.get(b"options") == _OF_A_POOL.encode():
            return None
        return ("client", number)

    def _describe(self, number: int) -> str:
        found = self._slot_of(number)
        if found is None:
            return "a connection that no pool has lent (dedicated(), another process, psql)"
        pool, slot = found
        return f"pool {pool.name!r}, {pool._reporter.holder_of(slot)}"

    def _slot_of(self, number: int) -> tuple[Pool, Slot] | None:
        link = self.links.get(number)
        for pool in self.pools if link is not None else ():
            for slot in pool._machine.slots():
                if slot.link is link and slot.state is SlotState.IN_USE:
                    return pool, slot
        return None


class _OpenerAtStandIn(Opener):
    """Opens a pool's connections at the stand-in instead of the server."""

    def __init__(self, former: Opener, session: _Session) -> None:
        super().__init__(former._config, former._driver, former._name)
        self.former = former
        self.over = False  # its block has ended
        self._session = session

    def recipe(self, progress: Progress | None = None) -> Recipe:
        """The pool's own recipe, with another address."""
        from penstock._drivers.psycopg3.connect import driver_options  # noqa: PLC0415

        real = super().recipe(progress)
        return dataclasses.replace(
            real,
            conninfo=f"{self._session.stand_in.conninfo} options={_OF_A_POOL}",
            kwargs=driver_options(real),
            server_check_interval=None,
            keepalive={},
        )

    def open(
        self,
        seconds: float = CONNECT_SECONDS,
        *,
        if_changed: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Open a link, and remember which of the stand-in's clients it is."""
        link = super().open(seconds, if_changed=if_changed, progress=progress)
        number = int(link.handle.parameter_status(NUMBER.encode()))
        self._session.links[number] = link
        # psycopg's holds the global lock while it waits for the server, which here is a thread.
        link.attributes["cancel"] = partial(self._session.stand_in.cancel, number)
        return link


def _still_there(opener: Opener) -> Opener:
    """This one, or what it stands for, if its block has ended already."""
    while isinstance(opener, _OpenerAtStandIn) and opener.over:
        opener = opener.former
    return opener


@contextmanager
def _led_to(session: _Session, pool: Pool) -> Iterator[None]:
    session.pools.append(pool)
    guarded = pool._config.guard
    pool._set_guard(on=True)  # a test is where the use of a returned connection is to be found
    own = _OpenerAtStandIn(pool._opener, session)
    pool._open_by(own)
    try:
        if lent := _lent_after(pool, session.seconds):
            raise pool._reporter.misuse(
                f"undone() cannot undo what is done by connections that are lent already: {lent}",
                "give them back before the block begins",
            )
        yield
    finally:
        own.over = True
        overlapped = pool._opener is not own
        if not overlapped:
            pool._open_by(_still_there(own.former))
            pool._set_guard(on=guarded)
    if overlapped:
        # The pool stays with the other: what is done in its block must not stay.
        raise pool._reporter.misuse(
            "a block of undone() ends while another one that began later goes on",
            "nest them: two threads that undo one pool share one block around both",
        )
    if lent := _lent_after(pool, session.seconds):
        _log.warning(
            "pool %r: the block of undone() ends, and with it connections that are still lent: %s",
            pool.name,
            lent,
        )


def _lent_after(pool: Pool, seconds: float) -> str:
    """Wait for what was lent before the pool was drained; who has it still, for people."""
    me = get_ident()

    def lent() -> list[Slot]:
        return [
            slot
            for slot in pool._machine.slots()
            if slot.state is SlotState.IN_USE and slot.generation != pool._machine.generation
        ]

    # What this thread holds it does not give back while it waits.
    pool._wait_until(lambda: all(slot.holder == me for slot in lent()), clock() + seconds)
    return "; ".join(str(pool._reporter.holder_of(slot)) for slot in lent())


def _pools_in(given: object) -> Iterator[Pool]:
    """The pools among what was given, and inside of it, each once."""
    seen: set[int] = set()
    pending = list(given) if isinstance(given, tuple) else [given]
    while pending:
        one = pending.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, ConnectionPool):
            _refuse_others_than_psycopg(one)
            yield one
        elif isinstance(one, Mapping):
            pending += one.values()
        elif (inside := getattr(one, "pools", None)) is not None:
            pending += [inside] if isinstance(inside, Mapping) else inside
        else:
            raise TypeError(f"undone() takes pools, or what has an attribute pools, not {one!r}")


def _refuse_others_than_psycopg(pool: Pool) -> None:
    if pool._driver.name != "psycopg":
        raise TypeError(
            f"undone() can do this for psycopg 3 only; pool {pool.name!r} is over "
            f"{pool._driver.name!r}"
        )


def _address(recipe: Recipe) -> frozenset[tuple[str, Any]]:
    """What makes two pools' sessions the same session."""
    from penstock._drivers.psycopg3.connect import connection_params  # noqa: PLC0415

    params = connection_params(dataclasses.replace(recipe, keepalive={}))
    return frozenset(
        (name, value) for name, value in params.items() if "application_name" not in name
    )


def _connected(recipe: Recipe) -> Any:
    """A libpq handle to the real server, without encryption: its messages are read here."""
    import psycopg  # noqa: PLC0415

    from penstock._drivers.psycopg3 import connect as connecting  # noqa: PLC0415
    from penstock._process.sockets import deadline_in  # noqa: PLC0415

    params = connecting.connection_params(recipe)
    params |= {"sslmode": "disable", "gssencmode": "disable"}
    try:
        return connecting.connect(params, deadline_in(CONNECT_SECONDS))
    except psycopg.Error as error:
        error.add_note(
            "pytest_penstock.undone() connects without TLS and GSSAPI, since it reads the "
            "messages: the server must allow that for tests, or be reached by its Unix socket."
        )
        raise


__all__ = ["Undone", "undone"]
