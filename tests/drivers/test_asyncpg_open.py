"""The asyncpg driver on a real PostgreSQL: how connections are opened, and why not."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import traceback
from time import monotonic
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from tests.drivers.async_links import LOOPS, run
from tests.drivers.asyncpg_links import SECONDS, comes_true, one, opened, sockets

from penstock._drivers.asyncpg import connect, passfile
from penstock._drivers.asyncpg.driver import driver
from penstock.config.conninfo import parse, to_url
from penstock.drivers import Activity, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.wire import WireProxy

    from pytest_penstock.postgres import Server

on_each_loop = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture(params=["unix", "tcp", "tls"])
def dsn(request: pytest.FixtureRequest) -> str:
    kind = "tls_server" if request.param == "tls" else "server"
    running: Server = request.getfixturevalue(kind)
    return running.conninfo(over=request.param)


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port where somebody listens and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@on_each_loop
def test_opens_and_answers_over_every_transport(dsn: str, loop: str) -> None:
    async def main() -> None:
        async with opened(dsn) as link:
            assert await one(link, "select 1") == 1
            assert link.activity() is Activity.IDLE

    run(main(), loop)


def test_a_url_and_a_conninfo_string_lead_to_the_same_server(server: Server) -> None:
    for over in ("unix", "tcp"):
        text = server.conninfo(over=over)

        async def main(text: str = text) -> None:
            for each in (text, to_url(parse(text))):
                async with opened(each) as link:
                    assert await one(link, "show port") == str(server.port)

        run(main())


def test_a_given_connection_class_stays_what_it_is(unix_dsn: str) -> None:
    class Mine(asyncpg.Connection):  # type: ignore[misc]
        pass

    async def main() -> None:
        async with opened(unix_dsn, connection_class=Mine) as link:
            assert isinstance(link.conn, Mine)
            assert type(link.conn).__qualname__ == Mine.__qualname__
            assert type(link.conn).__module__ == Mine.__module__

    run(main())


def test_options_are_asyncpgs_own(unix_dsn: str) -> None:
    class Row(asyncpg.Record):  # type: ignore[misc]
        pass

    kwargs = {
        "record_class": Row,
        "statement_cache_size": 7,
        "command_timeout": 0.05,
        "server_settings": {"work_mem": "7MB"},
        "database": "template1",
    }

    async def main() -> None:
        async with opened(unix_dsn, kwargs=kwargs) as link:
            (row,) = await link.conn.fetch("select current_setting('work_mem') as m")
            assert isinstance(row, Row) and row["m"] == "7MB"
            assert link.conn._config.statement_cache_size == 7
            assert await one(link, "select current_database()") == "template1"
            with pytest.raises(TimeoutError):
                await link.conn.fetch("select pg_sleep(20)")

    run(main())


def test_libpqs_words_work_as_options_too(server: Server) -> None:
    async def main() -> None:
        words = {"host": "127.0.0.1", "port": server.port, "user": "postgres"}
        async with opened("", kwargs={**words, "dbname": "template1"}) as link:
            assert await one(link, "select current_database()") == "template1"
        async with opened("", kwargs={**words, "options": "-c work_mem=7MB"}) as link:
            assert await one(link, "show work_mem") == "7MB"

    run(main())


def test_application_name_is_ours_only_if_the_user_named_none(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def shown(conninfo: str | None = None, **options: Any) -> Any:
        async with opened(conninfo or server.conninfo(), **options) as link:
            return await one(link, "show application_name")

    async def main() -> None:
        assert await shown(application_name="app/main/7") == "app/main/7"
        theirs = server.conninfo(application_name="theirs")
        assert await shown(theirs, application_name="ours") == "theirs"
        kwargs: dict[str, Any] = {"application_name": "kw"}
        assert await shown(kwargs=kwargs, application_name="ours") == "kw"
        kwargs = {"server_settings": {"application_name": "settings"}}
        assert await shown(kwargs=kwargs, application_name="ours") == "settings"
        monkeypatch.setenv("PGAPPNAME", "from environment")
        assert await shown(application_name="ours") == "from environment"

    run(main())


@on_each_loop
def test_keepalives_are_ours_only_if_the_user_set_none(server: Server, loop: str) -> None:
    async def set_on(conninfo: str, option: int) -> int:
        ours = {"keepalives_idle": 31, "tcp_user_timeout": 60000}
        async with opened(conninfo, keepalive=ours) as link:
            with socket.socket(fileno=os.dup(link.fd)) as raw:
                return int(raw.getsockopt(socket.IPPROTO_TCP, option))

    async def main() -> None:
        assert await set_on(server.conninfo(), socket.TCP_KEEPIDLE) == 31
        assert await set_on(server.conninfo(keepalives_idle=47), socket.TCP_KEEPIDLE) == 47
        assert await set_on(server.conninfo(), socket.TCP_USER_TIMEOUT) == 60000

    run(main(), loop)


def test_the_server_is_told_to_notice_dead_clients_at_one_round_trip(
    server: Server, proxy: WireProxy
) -> None:
    def round_trips(**options: Any) -> int:
        async def main() -> None:
            async with opened(server.conninfo(port=proxy.port), **options):
                pass

        with proxy.counting() as count:
            run(main())
        return count.round_trips

    assert round_trips() - round_trips(server_check_interval=None) == 1


@pytest.mark.parametrize(("option", "shown"), [("", "500ms"), ("2s", "2s")])
def test_the_check_interval_of_the_user_is_left_alone(
    server: Server, option: str, shown: str
) -> None:
    extra: dict[str, Any] = (
        {"options": f"-c client_connection_check_interval={option}"} if option else {}
    )

    async def main() -> None:
        async with opened(server.conninfo(**extra)) as link:
            assert await one(link, "show client_connection_check_interval") == shown

    run(main())


# --- deadlines and what is left


@on_each_loop
@pytest.mark.parametrize("extra", [{}, {"connect_timeout": 1}, {"timeout": 0.2}])
def test_a_deaf_server_costs_what_the_deadline_says_and_no_descriptor(
    deaf: int, extra: dict[str, Any], loop: str
) -> None:
    recipe = Recipe(conninfo=f"host=127.0.0.1 port={deaf} user=me", kwargs=extra)

    async def main() -> None:
        before = sockets()
        started = monotonic()
        with pytest.raises(TimeoutError, match=f"127.0.0.1:{deaf} in time") as caught:
            await driver.open(recipe, None if extra else 0.2)
        least = 0.9 if "connect_timeout" in extra else 0.19
        assert least < monotonic() - started < 5
        diagnosis = await driver.diagnose(caught.value, recipe, SECONDS)
        assert diagnosis.heals and diagnosis.sqlstate is None
        await comes_true(lambda: sockets() <= before)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main(), loop)


def test_every_address_gets_its_share_of_the_time(server: Server, deaf: int) -> None:
    async def main() -> None:
        conninfo = f"host=127.0.0.1,127.0.0.1 port={deaf},{server.port} user=postgres"
        link = await driver.open(Recipe(conninfo=conninfo), 1.0)
        assert await one(link, "select 1") == 1
        await link.close()

    run(main())


def test_of_several_servers_the_one_that_may_be_written_to_is_taken(server: Server) -> None:
    conninfo = f"host=127.0.0.1,localhost port={server.port} user=postgres"

    async def main() -> None:
        async with opened(conninfo + " target_session_attrs=read-write") as link:
            assert await one(link, "select 1") == 1
        async with opened(conninfo + " target_session_attrs=prefer-standby") as link:
            assert await one(link, "select 1") == 1
        with pytest.raises(asyncpg.TargetServerAttributeNotMatched):
            await driver.open(Recipe(conninfo=conninfo + " target_session_attrs=standby"), SECONDS)

    run(main())


@on_each_loop
def test_a_name_is_looked_up_once_and_in_a_daemon_thread(
    server: Server, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    asked: list[tuple[str, bool]] = []
    real = socket.getaddrinfo

    def recorded(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((host, threading.current_thread().daemon))
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", recorded)

    async def main() -> None:
        async with opened(server.conninfo(host="localhost")) as link:
            assert await one(link, "select 1") == 1
            # requests to cancel go to the same address
            assert link.conn._addr[0] in ("127.0.0.1", "::1")

    run(main(), loop)
    assert asked == [("localhost", True)]


def test_a_resolver_that_does_not_answer_keeps_neither_open_nor_asyncio_run_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer.wait(SECONDS * 5) and [])
    recipe = Recipe(conninfo="host=nowhere user=me")

    async def main() -> None:
        with pytest.raises(TimeoutError, match="'nowhere'") as caught:
            await driver.open(recipe, 0.1)
        assert (await driver.diagnose(caught.value, recipe, SECONDS)).heals

    started = monotonic()
    try:
        run(main())
        assert monotonic() - started < SECONDS
    finally:
        answer.set()


def test_environment_names_the_server_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(server.port))
    monkeypatch.setenv("PGUSER", "postgres")
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=7MB")

    async def main() -> None:
        async with opened("dbname=postgres") as link:
            assert await one(link, "show work_mem") == "7MB"

    run(main())


# --- secrets

SECRET = "hunter-two-and-a-half"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(conninfo=f"host=h password={SECRET} and more"),
        Recipe(conninfo=f"postgresql://u:{SECRET}%zz@h/d"),
        Recipe(conninfo=f"postgresql://u@h:5432/d?pass={SECRET}"),
        Recipe(conninfo="host=h", kwargs={"password": SECRET, "no_such": SECRET}),
        Recipe(conninfo=f"host=h require_auth=none password={SECRET}"),
    ],
)
def test_a_wrong_connection_string_is_told_without_its_secrets(recipe: Recipe) -> None:
    async def main() -> None:
        with pytest.raises(asyncpg.ClientConfigurationError) as caught:
            await driver.open(recipe, SECONDS)
        shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        assert SECRET not in "".join(shown.format())
        diagnosis = await driver.diagnose(caught.value, recipe, SECONDS)
        assert not diagnosis.heals and "conninfo=" in str(diagnosis.next_step)

    run(main())


def test_the_password_is_in_no_frame_of_ours_after_a_failed_connect() -> None:
    recipe = Recipe(conninfo="host=127.0.0.1 port=1 user=me", kwargs={"password": SECRET})

    async def main() -> None:
        with pytest.raises(ConnectionRefusedError) as caught:
            await driver.open(recipe, SECONDS)
        shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        assert SECRET not in "".join(shown.format())

    run(main())


def test_the_password_file_goes_by_the_name_and_not_by_the_address(tmp_path: Path) -> None:
    path = tmp_path / "pgpass"
    path.write_text(
        "# a comment\n"
        "other:*:*:*:no\n"
        "db.example:5432:app:me:with\\:colon and \\\\\n"
        "localhost:*:*:*:by socket\n"
    )
    path.chmod(0o600)
    words = {"host": "db.example", "port": "5432", "passfile": str(path)}
    found = passfile.password_for
    assert found(words, "me", "app") == "with:colon and \\"
    assert found({**words, "port": "1"}, "me", "app") is None
    assert found({**words, "host": "/run/postgresql"}, "me", "app") == "by socket"
    path.chmod(0o644)
    assert found(words, "me", "app") is None
    assert found({**words, "passfile": str(tmp_path / "none")}, "me", "app") is None


# --- TLS


def test_sslmode_means_what_it_means_to_libpq(tls_server: Server) -> None:
    certificate = str(tls_server.certificate)

    async def uses_tls(**words: Any) -> Any:
        text = f"host=localhost port={tls_server.port} user=postgres dbname=postgres"
        async with opened(text, kwargs=words) as link:
            return await one(link, "select ssl from pg_stat_ssl where pid = pg_backend_pid()")

    async def main() -> None:
        assert not await uses_tls(sslmode="disable")
        assert not await uses_tls(sslmode="allow")
        assert await uses_tls(sslmode="prefer")
        assert await uses_tls()
        assert await uses_tls(sslmode="require")
        assert await uses_tls(sslmode="verify-ca", sslrootcert=certificate)
        assert await uses_tls(sslmode="verify-full", sslrootcert=certificate)
        assert await uses_tls(ssl="require")
        context = ssl.create_default_context(cafile=certificate)
        assert await uses_tls(ssl=context)
        assert not await uses_tls(ssl=False)

    run(main())


@on_each_loop
def test_a_certificate_is_held_to_the_name_though_an_address_is_connected_to(
    tls_server: Server, loop: str
) -> None:
    certificate = str(tls_server.certificate)
    text = f"port={tls_server.port} user=postgres sslmode=verify-full sslrootcert={certificate}"

    async def main() -> None:
        async with opened(f"{text} host=localhost hostaddr=127.0.0.1") as link:
            assert await one(link, "select 1") == 1
        recipe = Recipe(conninfo=f"{text} host=other.example hostaddr=127.0.0.1")
        with pytest.raises(ssl.SSLCertVerificationError) as caught:
            await driver.open(recipe, SECONDS)
        diagnosis = await driver.diagnose(caught.value, recipe, SECONDS)
        assert not diagnosis.heals and "certificate" in str(diagnosis.next_step)

    run(main(), loop)


def test_tls_that_cannot_work_is_told_at_once(server: Server) -> None:
    async def main() -> None:
        recipe = Recipe(conninfo=server.conninfo(sslmode="require"))
        with pytest.raises(ConnectionError) as caught:
            await driver.open(recipe, SECONDS)
        diagnosis = await driver.diagnose(caught.value, recipe, SECONDS)
        assert not diagnosis.heals and "offers no TLS" in str(diagnosis.next_step)
        recipe = Recipe(conninfo=server.conninfo(sslmode="verify-full", sslrootcert="/no/file"))
        with pytest.raises(asyncpg.ClientConfigurationError, match="sslrootcert"):
            await driver.open(recipe, SECONDS)

    run(main())


# --- why not


async def diagnosis_of(conninfo: str, **options: Any) -> Any:
    recipe = Recipe(conninfo=conninfo, **options)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await driver.open(recipe, SECONDS)
    return await driver.diagnose(caught.value, recipe, SECONDS)


def test_no_such_database_and_no_such_role_do_not_heal(server: Server) -> None:
    async def main() -> None:
        found = await diagnosis_of(server.conninfo(dbname="nowhere"))
        assert (found.sqlstate, found.heals) == ("3D000", False) and "nowhere" in found.text
        found = await diagnosis_of(server.conninfo(user="nobody"))
        assert (found.sqlstate, found.heals) == ("28000", False)

    run(main())


@pytest.fixture
def strict(fresh_server: Server) -> Server:
    """A server that asks for a password over TCP."""
    fresh_server.execute("create role app login password 'right'")
    hba = fresh_server.data_dir / "pg_hba.conf"
    kept = [line for line in hba.read_text().splitlines() if line.startswith("local")]
    hba.write_text("\n".join([*kept, "host all all all scram-sha-256", ""]))
    fresh_server.execute("select pg_reload_conf()")
    return fresh_server


def test_a_wrong_and_a_missing_password_do_not_heal(strict: Server) -> None:
    conninfo = strict.conninfo(user="app")

    async def main() -> None:
        async with opened(conninfo, kwargs={"password": "right"}) as link:
            assert await one(link, "select 1") == 1
        async with opened(conninfo, kwargs={"password": lambda: "right"}) as link:
            assert await one(link, "select 1") == 1
        recipe = Recipe(conninfo=conninfo, kwargs={"password": SECRET})
        with pytest.raises(asyncpg.InvalidPasswordError) as caught:
            await driver.open(recipe, SECONDS)
        shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        assert SECRET not in "".join(shown.format())
        found = await driver.diagnose(caught.value, recipe, SECONDS)
        assert (found.sqlstate, found.heals) == ("28P01", False)
        found = await diagnosis_of(conninfo)
        assert not found.heals, found

    run(main())


def test_too_many_connections_heals(server: Server) -> None:
    server.execute("create role alone login connection limit 1")

    async def main() -> None:
        async with opened(server.conninfo(user="alone")):
            found = await diagnosis_of(server.conninfo(user="alone"))
            assert (found.sqlstate, found.heals) == ("53300", True)

    run(main())
    server.execute("drop role alone")


def test_nobody_listening_heals_and_an_unknown_name_does_not() -> None:
    async def main() -> None:
        found = await diagnosis_of("host=127.0.0.1 port=1 user=me")
        assert (found.sqlstate, found.heals) == (None, True)
        found = await diagnosis_of("host=no-such-host.invalid user=me")
        assert found.sqlstate is None and "no-such-host.invalid" in found.text

    run(main())


def test_an_unknown_name_does_not_heal_but_a_silent_resolver_does() -> None:
    async def main() -> None:
        for code, heals in ((socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)):
            error = socket.gaierror(code, "could not resolve the host name 'x'")
            found = await driver.diagnose(error, Recipe(), SECONDS)
            assert found.heals is heals
            assert (found.next_step is None) is heals

    run(main())


def test_a_wrong_host_is_not_shown_where_it_may_be_a_password() -> None:
    assert connect.shown_host("db") == "'db'"
    assert "sesame" not in connect.shown_host("sesame@db")
    assert "sesame" not in connect.shown_host("Password=sesame")


def test_a_bad_value_of_an_option_does_not_heal(server: Server) -> None:
    async def main() -> None:
        assert not (await diagnosis_of("host=127.0.0.1 port=abc")).heals
        assert not (await diagnosis_of(server.conninfo(sslmode="sometimes"))).heals
        found = await diagnosis_of(server.conninfo(), kwargs={"server_settings": {"no": "x"}})
        assert (found.sqlstate, found.heals) == ("42704", False)

    run(main())
