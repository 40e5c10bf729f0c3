"""How sessions of the asyncpg driver end: told of, frozen, closed, dropped, and inherited by a fork."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from tests.drivers.async_links import LOOPS, run
from tests.drivers.asyncpg_links import SECONDS, comes_true, one, opened, sockets
from tests.forks import Child, quiet_libc_fork, until

from penstock._drivers.asyncpg import link as asyncpg_link
from penstock._drivers.asyncpg.driver import driver
from penstock.drivers import Activity, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.wire import WireProxy

    from penstock._drivers.asyncpg.link import AsyncpgLink
    from pytest_penstock.postgres import Server

on_each_loop = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture(params=["unix", "tls"])
def running(request: pytest.FixtureRequest) -> tuple[Server, str]:
    found: Server = request.getfixturevalue("tls_server" if request.param == "tls" else "server")
    return found, found.conninfo(over=request.param)


def is_open(link: AsyncpgLink) -> bool:
    try:
        return os.fstat(link.fd).st_ino == link._inode
    except OSError:
        return False


# --- the server ends it


@on_each_loop
def test_an_end_is_told_once_and_without_a_round_trip(
    running: tuple[Server, str], loop: str
) -> None:
    server, conninfo = running

    async def main() -> None:
        told: list[str] = []
        async with opened(conninfo) as link:
            pid = link.conn.get_server_pid()
            await link.prepare()
            assert link.on_end(lambda: told.append("end"))
            assert link.park()
            link.lend()
            await link.conn.reset()  # asyncpg's own takes listeners away
            assert link.park()
            assert not link.hung_up() and not told
            server.execute(f"select pg_terminate_backend({pid})")
            await comes_true(lambda: told)
            assert link.hung_up() and link.activity() is Activity.BROKEN
            assert not link.park() and not await link.tidy(SECONDS)
            assert not await link.ping(SECONDS) and not link.start_reset()
            link.lend()
            with pytest.raises(asyncpg.InterfaceError, match="connection is closed"):
                await link.conn.fetch("select 1")
        assert told == ["end"]
        again: list[str] = []
        link.on_end(lambda: again.append("late"))
        await comes_true(lambda: again)

    run(main(), loop)


@on_each_loop
def test_a_notification_is_no_end(server: Server, loop: str) -> None:
    async def main() -> None:
        told: list[str] = []
        async with opened(server.conninfo()) as link:
            link.on_end(lambda: told.append("end"))
            await link.conn.execute("listen here")
            link.park()
            server.execute("notify here")
            assert await link.ping(SECONDS)
            assert not told and not link.hung_up()

    run(main(), loop)


@on_each_loop
def test_ends_of_ones_own_are_not_told(unix_dsn: str, loop: str) -> None:
    async def main() -> None:
        told: list[str] = []
        for end in ("close", "discard"):
            link = await driver.open(Recipe(conninfo=unix_dsn), SECONDS)
            link.on_end(lambda: told.append("end"))
            done = getattr(link, end)()
            if done is not None:
                await done
            await asyncio.sleep(0.01)
        assert not told
        async with opened(unix_dsn) as link:
            link.on_end(lambda: told.append("the borrower's"))
            await link.conn.close()
            await comes_true(lambda: told)

    run(main(), loop)


# --- the server does not answer


@on_each_loop
@pytest.mark.parametrize("over", ["tcp", "tls"])
def test_everything_bounded_ends_in_time_when_the_server_is_frozen(
    request: pytest.FixtureRequest, over: str, loop: str
) -> None:
    running: Server = request.getfixturevalue("tls_server" if over == "tls" else "server")
    conninfo = running.conninfo(over=over)  # type: ignore[arg-type]

    async def main() -> None:
        before = sockets()
        links = [
            await driver.open(Recipe(conninfo=conninfo, reset="session"), SECONDS) for _ in range(5)
        ]
        await links[1].begin()
        links[1].park()
        task = asyncio.ensure_future(links[2].conn.fetch("select pg_sleep(60)"))
        # Not before: a reply on its way when the server freezes would end what is cancelled.
        asleep = f"pid = {links[2].conn.get_server_pid()} and wait_event = 'PgSleep'"
        await comes_true(lambda: running.execute(f"select 1 from pg_stat_activity where {asleep}"))
        running.pause()
        try:
            task.cancel()
            await asyncio.wait({task})
            links[2].park()
            began = monotonic()
            assert not await links[0].ping(0.05)
            assert not await links[1].tidy(0.05)
            assert not await links[2].tidy(0.05)
            assert links[3].park() and links[3].start_reset()
            assert not await links[3].finish_reset(0.05)
            for link in links[:4]:
                link.discard()
                link.discard()
            await links[4].close()
            assert monotonic() - began < SECONDS / 2
            await comes_true(lambda: sockets() <= before)
            assert asyncio.all_tasks() == {asyncio.current_task()}
        finally:
            # Else a failure would hang: with warnings as errors, as here, uvloop's close() waits for
            # ever for a transport that it finds open (its own warning keeps it from closing it).
            for link in links:
                link.discard()
            running.resume()

    run(main(), loop)
    gc.collect()


@on_each_loop
def test_close_does_not_wait_for_a_peer_that_reads_nothing(
    server: Server, proxy: WireProxy, loop: str
) -> None:
    async def main() -> None:
        link = await driver.open(Recipe(conninfo=server.conninfo(port=proxy.port)), SECONDS)
        proxy.freeze()
        try:
            # More than kernels buffer: what is said at the end stands behind it.
            link._transport.write(b"\0" * 30_000_000)
            began = monotonic()
            await link.close()
            assert link.activity() is Activity.BROKEN
            await comes_true(lambda: not is_open(link))
            assert monotonic() - began < SECONDS / 2
        finally:
            proxy.thaw()

    run(main(), loop)


# --- we end it


@on_each_loop
@pytest.mark.parametrize("how", ["close", "discard"])
def test_a_session_that_ended_leaves_no_statements_to_the_loops_timers(
    running: tuple[Server, str], loop: str, how: str
) -> None:
    """asyncpg has a timer of five minutes for each statement that it caches."""
    _, conninfo = running

    async def main() -> None:
        async with opened(conninfo) as link:
            await one(link, "select 'cached'")
            assert list(link.conn._stmt_cache.iter_statements())
            await link.close() if how == "close" else link.discard()
            assert not list(link.conn._stmt_cache.iter_statements())

    run(main(), loop)


@on_each_loop
def test_close_is_polite_and_can_be_repeated(running: tuple[Server, str], loop: str) -> None:
    server, conninfo = running
    logged = server.log_path.stat().st_size

    async def main() -> None:
        before = sockets()
        link = await driver.open(Recipe(conninfo=conninfo), SECONDS)
        pid = link.conn.get_server_pid()
        link.park()
        await link.close()
        await link.close()
        link.discard()
        await comes_true(lambda: sockets() <= before)
        await asyncio.to_thread(until, lambda: pid not in server.backends())
        assert link.activity() is Activity.BROKEN

    run(main(), loop)
    log = server.log_path.read_bytes()[logged:].decode()
    assert "unexpected EOF" not in log and "could not receive data" not in log


@on_each_loop
def test_discard_wakes_whoever_waits_for_the_connection(unix_dsn: str, loop: str) -> None:
    async def main() -> None:
        link = await driver.open(Recipe(conninfo=unix_dsn), SECONDS)
        other = asyncio.ensure_future(link.conn.fetch("select pg_sleep(60)"))
        await comes_true(link._is_busy)
        link.discard()
        with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresConnectionError)):
            await other

    run(main(), loop)


@on_each_loop
def test_discard_under_a_coroutine_that_was_closed_makes_no_noise(
    unix_dsn: str, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        link = await driver.open(Recipe(conninfo=unix_dsn), SECONDS)
        query = link.conn.fetch("select pg_sleep(60)")
        query.send(None)
        query.close()
        link.discard()
        await asyncio.sleep(0.01)

    run(main(), loop)
    gc.collect()
    assert not caplog.records


@on_each_loop
def test_discard_works_from_another_thread(unix_dsn: str, loop: str) -> None:
    async def main() -> None:
        told: list[str] = []
        link = await driver.open(Recipe(conninfo=unix_dsn), SECONDS)
        other = asyncio.ensure_future(link.conn.fetch("select pg_sleep(60)"))
        await comes_true(link._is_busy)
        thread = threading.Thread(target=link.discard)
        thread.start()
        with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresConnectionError)):
            await other
        thread.join()
        assert not told

    run(main(), loop)


def test_discard_works_after_the_loop_and_complains_about_nothing(
    running: tuple[Server, str],
) -> None:
    _, conninfo = running
    before = sockets()

    async def main(lent: bool) -> AsyncpgLink:
        link = await driver.open(Recipe(conninfo=conninfo), SECONDS)
        if not lent:
            link.park()
        return link

    for lent in (False, True):
        link = run(main(lent))
        link.discard()
        link.discard()
        assert sockets() <= before
        del link
        gc.collect()


def test_discard_after_the_loop_leaves_alone_a_stranger_with_the_same_number(unix_dsn: str) -> None:
    async def main() -> AsyncpgLink:
        link = await driver.open(Recipe(conninfo=unix_dsn), SECONDS)
        await link.close()
        return link

    link = run(main())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if ours.fileno() != link.fd:
            os.dup2(ours.fileno(), link.fd)
        link.discard()
        ours.send(b"x")
        assert theirs.recv(1) == b"x"
        if ours.fileno() != link.fd:
            os.close(link.fd)


# --- forks


def answers_in_a_child(link: AsyncpgLink, conninfo: str, loop: str) -> Callable[[], Any]:
    def work() -> Any:
        # From 3.12 on asyncio forgets the parent's loop in a hook, which a fork by libc does not run.
        asyncio._set_running_loop(None)
        link.abandon(busy=False)
        refused = ""
        try:
            asyncio.new_event_loop().run_until_complete(link.conn.fetch("select 1"))
        except asyncpg.InterfaceError as error:
            refused = str(error)
        link.conn.terminate()
        null = os.path.samestat(os.fstat(link.fd), Path(os.devnull).stat())

        async def ask() -> int:
            async with opened(conninfo) as own:
                return int(await one(own, "select pg_backend_pid()"))

        asked = run(ask(), loop)
        gc.collect()
        return [refused, asked, null]

    return work


@on_each_loop
@pytest.mark.parametrize(
    ("fork", "busy"), [(os.fork, False), (os.fork, True), (quiet_libc_fork, False)]
)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_lets_go_without_disturbing_the_parent(
    running: tuple[Server, str], loop: str, fork: Callable[[], int], busy: bool
) -> None:
    _, conninfo = running

    async def main() -> None:
        told: list[str] = []
        async with opened(conninfo) as link:
            link.on_end(lambda: told.append("end"))
            mine = await one(link, "select pg_backend_pid()")
            query = None
            if busy:
                query = asyncio.ensure_future(link.conn.fetchval("select 7 from pg_sleep(0.05)"))
                await comes_true(link._is_busy)
            else:
                assert link.park()
            child = Child(answers_in_a_child(link, conninfo, loop), fork=fork)
            refused, theirs, null = await asyncio.to_thread(child.answer)
            assert "before the fork" in refused and theirs != mine and null
            if query is not None:
                assert await query == 7
            link.lend()
            assert await one(link, "select pg_backend_pid()") == mine
            assert link.park() and not told

    run(main(), loop)


def test_a_child_that_reused_the_number_keeps_its_own_file(
    unix_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(unix_dsn) as link:
            monkeypatch.setattr(asyncpg_link, "GRAVEYARD", [])
            kept = os.dup(link.fd)
            ours, theirs = socket.socketpair()
            protocol = link.conn._protocol
            os.dup2(ours.fileno(), link.fd)  # as a child that ran no at-fork hooks may have done
            link.abandon(busy=False)
            ours.send(b"x")
            assert theirs.recv(1) == b"x"
            assert os.fstat(link.fd).st_ino == os.fstat(ours.fileno()).st_ino
            os.dup2(kept, link.fd)
            link.conn._protocol = protocol
            for each in (ours, theirs):
                each.close()
            os.close(kept)

    run(main())
