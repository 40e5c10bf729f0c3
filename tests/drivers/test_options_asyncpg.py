"""Every option of asyncpg's `connect`, and every word of libpq's, said to a pool as users say it."""

from __future__ import annotations

import inspect
import re
import ssl
import time
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from tests.drivers.async_links import run
from tests.drivers.option_rows import Row, config_of, libpq_rows, ways_of

from penstock import AsyncConnectionPool, ConfigError, PoolConfig, ServerUnavailable
from penstock.config.conninfo import KEYWORDS, parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_penstock.postgres import Server

PARAMETERS = inspect.signature(asyncpg.connect).parameters.keys()


class Mine(asyncpg.Record):  # type: ignore[misc]
    pass


def config_value(name: str) -> Any:
    return lambda conn, _: getattr(conn._config, name)


def status_of(conn: Any, name: str) -> Any:
    return getattr(conn.get_settings(), name)


def fd_of(conn: Any) -> int:
    return int(conn._transport.get_extra_info("socket").fileno())


CANNOT = "asks for what asyncpg .* cannot do"
ROWS: dict[str, Row] = {
    **libpq_rows(lambda conn: conn.get_server_pid(), fd_of, status_of),
    # -- libpq's words that mean another thing here, or nothing
    "client_encoding": Row("LATIN1", lambda conn, _: status_of(conn, "client_encoding"), "UTF8"),
    "sslcertmode": Row("require", refused=CANNOT),
    "sslcrldir": Row("/nowhere", refused=CANNOT),
    "sslkeylogfile": Row("/nowhere", refused=CANNOT),
    "requirepeer": Row("nobody", refused=CANNOT),
    "require_auth": Row("scram-sha-256", refused=CANNOT),
    "channel_binding": Row("require", refused=CANNOT),
    "gssencmode": Row("require", refused=CANNOT),
    "gssdelegation": Row("1", refused=CANNOT),
    "sslcompression": Row("1", refused=CANNOT),
    "min_protocol_version": Row("3.0", refused=CANNOT),
    "max_protocol_version": Row("latest", refused=CANNOT),
    "service": Row("shop", lambda *_: None),
    "servicefile": Row("/nowhere", lambda *_: None),
    "sslmode": Row("require", fails="SSL|TLS"),
    "target_session_attrs": Row("standby", fails="target|standby"),
    # -- asyncpg's own
    "database": Row("template1", lambda conn, _: conn._params.database),
    "timeout": Row(7, lambda *_: None),
    "ssl": Row(value=True, fails="SSL|TLS"),
    "direct_tls": Row(value=True, seen=lambda *_: None),
    "server_settings": Row(
        {"IntervalStyle": "iso_8601"}, lambda conn, _: status_of(conn, "IntervalStyle"), "iso_8601"
    ),
    "command_timeout": Row(7.5, config_value("command_timeout")),
    "statement_cache_size": Row(0, config_value("statement_cache_size"), expected=0),
    "max_cached_statement_lifetime": Row(7, config_value("max_cached_statement_lifetime")),
    "max_cacheable_statement_size": Row(7, config_value("max_cacheable_statement_size")),
    "record_class": Row(Mine, lambda conn, _: conn._protocol.get_record_class()),
    # -- what a pool has another word for, and what nobody has
    "dsn": Row("postgresql://db", refused="give it to the pool as conninfo="),
    "connection_class": Row(asyncpg.Connection, refused="give it to the pool as connection_class="),
    "loop": Row(None, refused="a pool belongs to the loop"),
    "pasword": Row("hunter2", refused="did you mean 'password'"),
    "min_size": Row(3, refused="unknown to asyncpg"),
    "cursor_factory": Row(dict, refused="unknown to asyncpg"),
}
# Where nothing can be seen of a word of libpq's (a trusted role needs no password, a server without TLS no
# certificate), it leads to a connection.
_UNSEEN = (
    *("password", "passfile", "host", "hostaddr", "connect_timeout", "sslnegotiation", "sslkey", "sslpassword"),
    *("sslcrl", "sslsni", "ssl_min_protocol_version", "ssl_max_protocol_version", "krbsrvname", "gsslib"),
    *("load_balance_hosts", "sslcert", "sslrootcert"),
)  # fmt: skip
ROWS |= {key: Row(ROWS[key].value, lambda *_: None) for key in _UNSEEN}
ROWS |= {
    key: Row(row.value, refused=CANNOT)
    for key, row in ROWS.items()
    if key.startswith(("oauth_", "scram_"))
}
if "service" not in PARAMETERS:  # asyncpg 0.30
    ROWS |= {"service": Row("shop", refused="0.31"), "servicefile": Row("x", refused="0.31")}


def test_the_table_has_every_option_that_there_is() -> None:
    assert PARAMETERS | set(KEYWORDS) <= ROWS.keys(), (PARAMETERS | set(KEYWORDS)) - ROWS.keys()
    honoured = {key for key, row in ROWS.items() if row.refused is None}
    assert PARAMETERS - honoured == {"dsn", "loop", "connection_class"}


@pytest.fixture(scope="module", autouse=True)
def role(server: Server) -> Iterator[None]:
    server.execute("create role optional login superuser")
    yield
    server.execute("drop role optional")


@pytest.mark.parametrize("key", ROWS)
def test_an_option_has_its_effect_or_is_refused_by_name(
    key: str, *, server: Server, tmp_path: Path
) -> None:
    row = ROWS[key]

    async def play(config: PoolConfig, way: str) -> None:
        async with AsyncConnectionPool.from_config(config) as pool:
            if row.fails is not None:
                with pytest.raises(ServerUnavailable) as caught:
                    await pool.getconn(timeout=1.0)
                assert re.search(row.fails, str(caught.value)), caught.value
                return
            async with pool.connection() as conn:
                assert row.seen is not None
                expected = row.value if row.expected is None else row.expected
                assert row.seen(conn, server) in {expected, None}, way
                if key != "replication":  # such a session takes no extended protocol
                    assert await conn.fetchval("select 1") == 1

    for way in ways_of(key, row):
        config = config_of(way, server, key, row, tmp_path, driver="asyncpg")
        if row.refused is not None:
            with pytest.raises(ConfigError, match=row.refused) as wrong:
                AsyncConnectionPool.from_config(config)
            assert wrong.value.key == key
            assert f"option {key!r}" in str(wrong.value)
            assert "hunter2" not in str(wrong.value)
        else:
            run(play(config, way))


@pytest.mark.parametrize(
    "words",
    [
        {"client_encoding": "utf8"},
        {"gssencmode": "disable"},
        {"channel_binding": "prefer"},
        {"sslcompression": "0"},
        {"sslcertmode": "allow"},
        {"gssdelegation": "0"},
        {"require_auth": None},
    ],
)
def test_a_word_of_libpqs_that_asks_for_nothing_may_be_said(server: Server, words: Any) -> None:
    async def main() -> None:
        async with AsyncConnectionPool(
            server.conninfo(), driver="asyncpg", kwargs=words, max_size=1
        ) as pool:
            await pool.execute("select 1")

    run(main())


def answers(server: Server, **kwargs: Any) -> Any:
    """What a pool's connection says of itself."""

    async def main() -> Any:
        conninfo = kwargs.pop("conninfo", None) or server.conninfo(over="tcp")
        async with AsyncConnectionPool(
            conninfo, driver="asyncpg", kwargs=kwargs, max_size=1, timeout=20
        ) as pool:
            result = await pool.execute(
                "select current_user::text, (select ssl from pg_stat_ssl where pid = pg_backend_pid())"
            )
            found = result.fetchone()
            assert found is not None
            return tuple(found)

    return run(main())


def test_hosts_and_ports_may_be_lists(server: Server) -> None:
    words = parse(server.conninfo(over="tcp"))
    port = int(words["port"])
    for host, ports in (
        (["127.0.0.1", "127.0.0.1"], [1, port]),
        (("127.0.0.1", "127.0.0.1"), (port, port)),
        (["127.0.0.1"], port),
        ("127.0.0.1,127.0.0.1", f"1,{port}"),
    ):
        found = answers(
            server, conninfo="sslmode=disable", host=host, port=ports, user=words["user"],
            database=words["dbname"],
        )  # fmt: skip
        assert found[0] == words["user"]


def test_a_password_may_be_a_text_a_function_a_coroutine_function_or_in_a_file(
    tmp_path: Path,
) -> None:
    from pytest_penstock.postgres import Server

    async def later() -> str:
        return "hunter2"

    with Server(hba=["host all all 127.0.0.1/32 scram-sha-256"]) as strict:
        strict.execute("create role app login password 'hunter2'")
        strict.execute("grant connect on database postgres to app")
        conninfo = strict.conninfo(user="app", over="tcp")
        file = tmp_path / "pgpass"
        file.write_text("*:*:*:app:hunter2\n", encoding="utf-8")
        file.chmod(0o600)
        for kwargs in (
            {"password": "hunter2"},
            {"password": lambda: "hunter2"},
            {"password": later},
            {"passfile": str(file)},
            {"passfile": file},
        ):
            assert answers(strict, conninfo=conninfo, **kwargs)[0] == "app"


@pytest.mark.skipif("service" not in PARAMETERS, reason="asyncpg 0.30 has no service files")
def test_a_service_file_says_where(server: Server, tmp_path: Path) -> None:
    words = parse(server.conninfo(over="tcp"))
    file = tmp_path / "services"
    lines = [f"{key}={words[key]}" for key in ("host", "port", "user", "dbname")]
    file.write_text("\n".join(["[shop]", *lines]), encoding="utf-8")
    said = {
        "service": "shop",
        "servicefile": str(file),
        "sslmode": "disable",
        "gssencmode": "disable",
    }
    assert answers(server, conninfo="user=" + words["user"], **said)[0] == words["user"]
    in_conninfo = " ".join(f"{key}={value}" for key, value in said.items())
    assert answers(server, conninfo=in_conninfo, client_encoding="utf8")[0] == words["user"]
    with pytest.raises(ConfigError, match="cannot do with service=") as wrong:
        AsyncConnectionPool(in_conninfo, driver="asyncpg", kwargs={"hostaddr": "127.0.0.1"})
    assert wrong.value.key == "hostaddr"


@pytest.mark.parametrize("how", ["text", "flag", "enum", "context", "direct"])
def test_ssl_may_be_a_text_a_flag_or_a_context(tls_server: Server, how: str) -> None:
    from asyncpg.connect_utils import SSLMode

    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE
    words = parse(tls_server.conninfo(over="tls"))
    conninfo = (
        f"host={words['host']} port={words['port']} user={words['user']} dbname={words['dbname']}"
    )
    given: Any = {
        "text": {"ssl": "require"},
        "enum": {"ssl": SSLMode.require},
        "context": {"ssl": trusting},
        "flag": {"ssl": False},
        "direct": {"ssl": trusting, "direct_tls": True},
    }[how]
    if how == "direct" and int(str(tls_server.execute("show server_version_num")[0][0])) < 170000:
        pytest.skip("direct TLS needs PostgreSQL 17")
    assert answers(tls_server, conninfo=conninfo, **given)[1] is (how != "flag")


def test_timeout_bounds_a_connect(server: Server) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]

        async def main() -> float:
            began = time.monotonic()
            async with AsyncConnectionPool(
                f"host=127.0.0.1 port={port} user=app sslmode=disable", driver="asyncpg",
                kwargs={"timeout": 0.2},
            ) as pool:  # fmt: skip
                with pytest.raises(ServerUnavailable, match="in time"):
                    await pool.getconn(timeout=4)
                assert pool.stats().open_failures > 1
            return time.monotonic() - began

        run(main())


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"statement_cache_size": -1}, "statement_cache_size"),
        ({"statement_cache_size": "x"}, "TypeError|ValueError|statement_cache_size"),
        ({"server_settings": {"jit": 0}}, "server_settings"),
        ({"server_settings": ["jit"]}, "TypeError"),
        ({"record_class": dict}, "record_class"),
        ({"target_session_attrs": "sometimes"}, "target_session_attrs"),
        ({"ssl": 3}, "ssl="),
    ],
)
def test_a_wrong_value_is_told_at_once(server: Server, kwargs: Any, text: str) -> None:
    async def main() -> None:
        async with AsyncConnectionPool(
            server.conninfo(over="tcp"), driver="asyncpg", kwargs=kwargs
        ) as pool:
            with pytest.raises(ServerUnavailable) as caught:
                await pool.getconn()
            assert re.search(text, str(caught.value)), caught.value
            assert not caught.value.heals
            assert "kwargs=" in str(caught.value)
            assert pool.stats().open_failures == 1

    run(main())
