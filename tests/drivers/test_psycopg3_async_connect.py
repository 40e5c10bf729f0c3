"""The psycopg 3 driver for asyncio: opening, within an exact time, and given up at any moment without a trace."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import traceback
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.json import set_json_loads
from tests.drivers.async_links import (
    LOOPS,
    SECONDS,
    CancelledAt,
    async_test,
    descriptors,
    one,
    opened,
    registered,
    run,
    suspensions_of,
    until,
)

from penstock._drivers import blocking_calls
from penstock._drivers.psycopg3.aio_driver import driver
from penstock._drivers.psycopg3.driver import driver as driver_for_threads
from penstock._drivers.psycopg3.link import check_interval_query
from penstock.drivers import Activity, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.wire import WireProxy

    from pytest_penstock.postgres import Server

on_both_loops = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port where somebody listens and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


class Resolver:
    """Stands in for getaddrinfo: names that end in .dead get no answer until the test is over."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.asked: list[str] = []
        self._real: Any = socket.getaddrinfo

    def __call__(self, host: str, *args: Any, **kwargs: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        self.asked.append(host)
        if host.endswith(".dead"):
            self.over.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        if host.endswith(".unknown"):
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return self._real("127.0.0.1", *args, **kwargs)


def threads_aside() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "penstock-aside"]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    standing_in = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", standing_in)
    yield standing_in
    standing_in.over.set()
    for thread in threads_aside():
        thread.join(SECONDS)
        assert not thread.is_alive()


# --- what comes of it


@async_test
async def test_a_given_connection_class_stays_what_it_is(unix_dsn: str) -> None:
    class Mine(psycopg.AsyncConnection[Any]):
        pass

    async with opened(unix_dsn, connection_class=Mine) as link:
        assert isinstance(link.conn, Mine)
        assert type(link.conn).__qualname__ == Mine.__qualname__
        assert type(link.conn).__module__ == Mine.__module__
        assert "Mine" in repr(link.conn)


@async_test
async def test_a_class_of_the_other_kind_is_refused_and_leaves_nothing_open(unix_dsn: str) -> None:
    before = descriptors()
    recipe = Recipe(conninfo=unix_dsn, connection_class=psycopg.Connection)
    with pytest.raises(psycopg.ProgrammingError, match=r"no subclass of psycopg\.AsyncConnection"):
        await driver.open(recipe, SECONDS)
    recipe = Recipe(conninfo=unix_dsn, connection_class=psycopg.AsyncConnection)
    with pytest.raises(psycopg.ProgrammingError, match=r"no subclass of psycopg\.Connection"):
        driver_for_threads.open(recipe, SECONDS)
    assert descriptors() == before


@async_test
async def test_settings_are_those_that_connect_would_make(unix_dsn: str) -> None:
    class Cursor(psycopg.AsyncCursor[Any]):
        pass

    context = psycopg.adapt.AdaptersMap(psycopg.adapters)
    set_json_loads(lambda text: "mine", context)
    kwargs = {
        "row_factory": dict_row,
        "cursor_factory": Cursor,
        "prepare_threshold": None,
        "context": context,
        "connect_timeout": 5,
    }
    async with opened(unix_dsn, kwargs=kwargs, autocommit=True, application_name="a/b/7") as link:
        conn = link.conn
        assert conn.autocommit and conn.prepare_threshold is None
        assert isinstance(conn.cursor(), Cursor)
        cursor = await conn.execute("select '1'::json as j, current_setting('application_name') n")
        assert await cursor.fetchone() == {"j": "mine", "n": "a/b/7"}


def test_the_server_is_told_to_notice_dead_clients_at_one_round_trip(
    server: Server, proxy: WireProxy
) -> None:
    @async_test
    async def main(**options: Any) -> None:
        async with opened(server.conninfo(port=proxy.port), **options):
            pass

    with proxy.counting() as told:
        main()
    with proxy.counting() as untold:
        main(server_check_interval=None)
    assert told.round_trips - untold.round_trips == 1


# --- in time


@pytest.mark.parametrize(
    ("loop", "extra"), [("asyncio", {}), ("uvloop", {}), ("asyncio", {"connect_timeout": 1})]
)
@async_test
async def test_a_deaf_server_costs_what_the_deadline_says_and_no_descriptor(
    deaf: int, extra: dict[str, Any], loop: str
) -> None:
    recipe = Recipe(conninfo=f"host=127.0.0.1 port={deaf}", kwargs=extra)
    before = descriptors()
    waiting = registered()
    started = monotonic()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        await driver.open(recipe, None if extra else 0.2)
    assert (0.9 if extra else 0.19) < monotonic() - started < 5
    assert descriptors() == before
    assert registered() == waiting


@async_test
async def test_every_address_gets_its_share_of_the_time(server: Server, deaf: int) -> None:
    conninfo = f"host=127.0.0.1,127.0.0.1 port={deaf},{server.port} user=postgres"
    link = await driver.open(Recipe(conninfo=conninfo), 0.5)
    assert await one(link, "select 1") == 1
    await link.close()


@async_test
async def test_a_new_session_that_says_nothing_more_is_given_up(
    server: Server, proxy: WireProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen_from_here_on(*args: Any) -> bytes | None:
        proxy.freeze()
        return check_interval_query(*args)

    monkeypatch.setattr(
        "penstock._drivers.psycopg3.aio_driver.check_interval_query", frozen_from_here_on
    )
    before = descriptors()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        await driver.open(Recipe(conninfo=server.conninfo(port=proxy.port)), 0.2)
    proxy.cut()
    proxy.thaw()
    await until(lambda: descriptors() <= before)  # the proxy closes its own when it comes to it


# --- names


@on_both_loops
@async_test
async def test_a_host_name_is_resolved_aside_and_stays_the_name(
    server: Server, resolver: Resolver, loop: str
) -> None:
    async with opened(server.conninfo(host="db.example")) as link:
        assert resolver.asked == ["db.example"]
        assert (link.conn.info.host, link.conn.info.hostaddr) == ("db.example", "127.0.0.1")


@async_test
async def test_an_address_in_figures_and_a_socket_need_no_thread(
    server: Server, tcp_dsn: str, unix_dsn: str, resolver: Resolver
) -> None:
    for dsn in (tcp_dsn, unix_dsn, server.conninfo(hostaddr="127.0.0.1", host="x.dead")):
        async with opened(dsn):
            pass
    assert resolver.asked == []


@on_both_loops
@async_test
async def test_a_dead_resolver_costs_what_the_deadline_says(resolver: Resolver, loop: str) -> None:
    recipe = Recipe(conninfo="host=db.dead")
    started = monotonic()
    with pytest.raises(psycopg.errors.ConnectionTimeout, match="not resolved in time") as caught:
        await driver.open(recipe, 0.2)
    assert 0.19 < monotonic() - started < 5
    assert (await driver.diagnose(caught.value, recipe, 0.2)).heals


def test_a_dead_resolver_keeps_no_loop_from_ending(resolver: Resolver) -> None:
    async def main() -> None:
        asyncio.ensure_future(driver.open(Recipe(conninfo="host=db.dead"), None))  # noqa: RUF006
        await until(lambda: bool(resolver.asked))

    started = monotonic()
    for loop in LOOPS:
        resolver.asked.clear()
        run(main(), loop)
        blocking_calls._process._pid = 0  # as after a fork: no call of the last loop's is shared
    assert monotonic() - started < SECONDS


@async_test
async def test_a_dead_resolver_holds_few_threads_and_one_per_name(resolver: Resolver) -> None:
    async def attempt(name: str) -> None:
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            await driver.open(Recipe(conninfo=f"host={name}.dead"), 0.2)

    await asyncio.gather(*(attempt("same") for _ in range(20)))
    assert len(threads_aside()) == 1
    await asyncio.gather(*(attempt(f"name{number}") for number in range(20)))
    assert len(threads_aside()) == blocking_calls.LIMIT
    assert len(resolver.asked) == blocking_calls.LIMIT
    resolver.over.set()
    for thread in threads_aside():
        thread.join(SECONDS)
    # Those whose turn never came were dropped, and others are served again.
    assert len(resolver.asked) == blocking_calls.LIMIT


@async_test
async def test_a_name_without_an_answer_leaves_time_for_the_others(
    server: Server, resolver: Resolver
) -> None:
    conninfo = f"host=first.dead,second.example port={server.port} user=postgres"
    link = await driver.open(Recipe(conninfo=conninfo), 0.6)
    assert link.conn.info.host == "second.example"
    await link.close()


@async_test
async def test_an_unknown_name_does_not_heal(resolver: Resolver) -> None:
    recipe = Recipe(conninfo="host=db.unknown")
    with pytest.raises(psycopg.OperationalError, match=r"db\.unknown") as caught:
        await driver.open(recipe, SECONDS)
    assert not (await driver.diagnose(caught.value, recipe, SECONDS)).heals


@async_test
async def test_a_name_in_a_service_file_does_not_stop_the_loop(
    server: Server, deaf: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "services"
    file.write_text(
        f"[here]\nhost=localhost\nport={server.port}\nuser=postgres\n"
        f"[deaf]\nhost=localhost\nport={deaf}\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    async with opened("service=here dbname=postgres") as link:
        assert await one(link, "select 1") == 1
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        await driver.open(Recipe(conninfo="service=deaf"), 0.2)
    for thread in threads_aside():
        await asyncio.to_thread(thread.join, SECONDS)


# --- given up


@on_both_loops
@pytest.mark.parametrize("over", ["unix", "name", "tls"])
def test_cancelled_anywhere_it_leaves_no_socket_no_task_and_nothing_registered(
    request: pytest.FixtureRequest, over: str, loop: str, resolver: Resolver
) -> None:
    running: Server = request.getfixturevalue("tls_server" if over == "tls" else "server")
    conninfo = (
        running.conninfo(host="db.example") if over == "name" else running.conninfo(over=over)  # type: ignore[arg-type]
    )
    recipe = Recipe(conninfo=conninfo)

    async def main() -> None:
        links: list[Any] = []

        async def opening() -> None:
            links.append(await driver.open(recipe, SECONDS))

        points = await suspensions_of(opening())
        assert points >= 3
        await links.pop().close()
        before, waiting = descriptors(), registered()
        for late in (False, True):
            for nth in range(1, points + 1):
                task = asyncio.ensure_future(as_coroutine(CancelledAt(opening(), nth, late=late)))
                await asyncio.wait({task})
                if not task.cancelled():  # it took fewer steps this time
                    await links.pop().close()
                assert not links
                assert descriptors(collect=False) == before
                assert registered() == waiting
                assert len(asyncio.all_tasks()) == 1

    run(main(), loop)


async def as_coroutine(awaitable: Any) -> Any:
    return await awaitable


# --- why not


def failure(recipe: Recipe) -> Callable[[], Any]:
    async def attempt() -> psycopg.Error:
        with pytest.raises(psycopg.Error) as caught:
            await driver.open(recipe, SECONDS)
        return caught.value

    return attempt


@on_both_loops
@async_test
async def test_a_diagnosis_finds_the_code_and_does_not_stop_the_loop(
    server: Server, loop: str
) -> None:
    recipe = Recipe(conninfo=server.conninfo(dbname="nowhere"))
    error = await failure(recipe)()
    before = descriptors()
    diagnosing = asyncio.ensure_future(driver.diagnose(error, recipe, SECONDS))
    turns = 0
    while not diagnosing.done():
        turns += 1
        await asyncio.sleep(0)
    found = await diagnosing
    assert (found.sqlstate, found.heals) == ("3D000", False)
    assert "nowhere" in found.text
    assert turns > 2
    assert descriptors() == before


@async_test
async def test_a_diagnosis_that_needs_no_attempt_needs_no_thread() -> None:
    recipe = Recipe(conninfo="host=h password=x and more")
    error = await failure(recipe)()
    found = driver.diagnose(error, recipe, SECONDS)
    with pytest.raises(StopIteration):
        found.send(None)


@async_test
async def test_a_diagnosis_is_bounded_and_can_be_cancelled(resolver: Resolver) -> None:
    recipe = Recipe(conninfo="host=db.dead")
    started = monotonic()
    found = await driver.diagnose(psycopg.OperationalError("down"), recipe, 0.2)
    assert (found.sqlstate, found.heals, found.text) == (None, True, "down")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await driver.diagnose(psycopg.OperationalError("down"), recipe, SECONDS)
    assert monotonic() - started < 5


SECRET = "hunter-two-and-a-half"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(conninfo="host=127.0.0.1 port=1", kwargs={"password": SECRET}),
        Recipe(conninfo=f"host=db.unknown password={SECRET}"),
        Recipe(conninfo=f"service=none password={SECRET}"),
        Recipe(conninfo=f"host=h password={SECRET} and more"),
    ],
)
@async_test
async def test_the_password_is_in_no_traceback(recipe: Recipe, resolver: Resolver) -> None:
    error = await failure(recipe)()
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    assert SECRET not in "".join(shown.format())


class NoDescriptors(asyncio.SelectorEventLoop):
    """As asyncio's own loop on Windows: it knows no descriptors."""

    def _unknown(self, *_: Any) -> Any:
        raise NotImplementedError

    add_reader = add_writer = _unknown  # type: ignore[assignment]


def test_a_loop_that_knows_no_descriptors_is_told_so(
    unix_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with pytest.raises(psycopg.ProgrammingError, match="SelectorEventLoop") as caught:
            await driver.open(Recipe(conninfo=unix_dsn), SECONDS)
        assert not (await driver.diagnose(caught.value, Recipe(), 1.0)).heals

    before = descriptors()
    monkeypatch.setitem(LOOPS, "without", NoDescriptors)
    run(main(), "without")
    assert descriptors() == before


@async_test
async def test_a_number_that_the_loop_still_knows_is_no_hindrance(tcp_dsn: str) -> None:
    """Somebody closed a descriptor that he waited for; the next socket gets its number."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    number = ours.fileno()
    loop.add_reader(number, print)
    ours.close()
    link = await driver.open(Recipe(conninfo=tcp_dsn), SECONDS)
    assert link.fd == number
    assert await one(link, "select 1") == 1
    assert link.activity() is Activity.IDLE
    await link.close()
    theirs.close()


def test_its_own_process_sees_a_host_from_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(server.port))
    monkeypatch.setenv("PGUSER", "postgres")

    @async_test
    async def main() -> None:
        async with opened("dbname=postgres") as link:
            assert link.conn.info.port == server.port

    main()
    assert os.environ["PGPORT"] == str(server.port)
