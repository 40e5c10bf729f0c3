"""Connecting through libpq on an event loop, with an exact deadline, and cancellable everywhere.

The steps are those of `psycopg3_connect`; here are the waits. Names are looked up in daemon threads,
because nothing can end a look-up from outside: the waiting for it ends at the deadline, or when it is
cancelled, and the thread goes on by itself.

It must not know: connections (it makes libpq handles), links, settings of sessions, why a server
refuses.
"""

from __future__ import annotations

import ipaddress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

import psycopg

from penstock._drivers.blocking_calls import call_aside
from penstock._drivers.loop_wait import wait
from penstock._drivers.psycopg3 import connect as connecting
from penstock._process import inflight
from penstock._process.tracebacks import without_frames

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

    from penstock._drivers.psycopg3.connect import Params


async def connect(params: Params, deadline: float) -> PGconn:
    """A connected, non-blocking libpq handle, as `psycopg3_connect.connect` makes it.

    Raises:
        psycopg.OperationalError: no address worked; the text has the server's or libpq's words.
        psycopg.errors.ConnectionTimeout: not in time, or a name was not resolved in time.
    """
    if connecting.is_for_libpq_to_resolve(params):
        return await _connected_aside(params, deadline)
    attempts, failures = await _attempts_of(params, deadline)
    for index, attempt in enumerate(attempts):
        until = connecting.share_of(params, deadline, len(attempts) - index)
        try:
            return await _connected(attempt, until)
        except psycopg.OperationalError as error:
            failures.append(without_frames(error))
        if monotonic() >= deadline:
            break
    try:
        raise connecting.merged(failures)
    finally:
        failures.clear()  # the error holds this frame, and this frame held it


async def _connected_aside(params: Params, deadline: float) -> PGconn:
    # A handle that nobody waits for any more is closed when it is freed.
    try:
        return await call_aside(None, partial(connecting.connect, params, deadline), deadline)
    except TimeoutError:
        raise connecting.too_late(params) from None


# --- names


async def _attempts_of(
    params: Params, deadline: float
) -> tuple[list[Params], list[psycopg.OperationalError]]:
    names = connecting.names_of(params)
    found = {
        # The last share is left for connecting, where other names may have addresses.
        pair: await _addresses(
            *pair, connecting.share_of(params, deadline, len(names) - index + (len(names) > 1))
        )
        for index, pair in enumerate(names)
    }

    def resolve(host: str, port: str) -> list[str]:
        outcome = found[host, port]
        if isinstance(outcome, psycopg.OperationalError):
            raise outcome
        return outcome

    return connecting.attempts_of(params, resolve)


async def _addresses(host: str, port: str, until: float) -> list[str] | psycopg.OperationalError:
    if _is_address(host):  # needs nobody's help
        return [host]
    try:
        look_up = partial(connecting.look_up, host, port)
        return await call_aside(("look up", host, port), look_up, until)
    except psycopg.OperationalError as error:
        return without_frames(error)
    except TimeoutError:
        return psycopg.errors.ConnectionTimeout("the host name was not resolved in time")
    except RuntimeError as error:  # can't start new thread
        return psycopg.OperationalError(f"could not look up the host name: {error}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# --- one address


async def _connected(attempt: Params, until: float) -> PGconn:
    handle = connecting.start(attempt)
    try:
        await _step_until_connected(handle, attempt, until)
    except BaseException:
        handle.finish()
        raise
    return handle


async def _step_until_connected(handle: PGconn, attempt: Params, until: float) -> None:
    wanted = connecting.first_step(handle)
    while wanted:
        # The descriptor can change between steps: ask each time.
        fd = handle.socket
        inflight.note(fd)
        if not await wait(fd, wanted, until):
            raise connecting.too_late(attempt)
        wanted = connecting.next_step(handle.connect_poll())
    connecting.check_connected(handle)
