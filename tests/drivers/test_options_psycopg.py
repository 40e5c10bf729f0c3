"""Every option of psycopg 3's `connect` and of the installed libpq, said to a pool as users say it."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.rows import dict_row
from tests.drivers.async_links import run
from tests.drivers.option_rows import Row, config_of, libpq_rows, ways_of

from penstock import AsyncConnectionPool, ConfigError, ConnectionPool, PoolConfig, ServerUnavailable
from penstock.config.conninfo import parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_penstock.postgres import Server

LIBPQ = {each.keyword.decode() for each in psycopg.pq.Conninfo.get_defaults()}


class Context:
    """What `context=` takes: something with adapters and a connection."""

    def __init__(self) -> None:
        self.connection = None
        self.adapters = psycopg.adapt.AdaptersMap(psycopg.adapters)
        self.adapters.register_dumper(Context, psycopg.types.string.StrDumper)


def status_of(conn: Any, name: str) -> Any:
    return conn.info.parameter_status(name)


ROWS: dict[str, Row] = {
    **libpq_rows(lambda conn: conn.info.backend_pid, lambda conn: conn.fileno(), status_of),
    "autocommit": Row(value=True, seen=lambda conn, _: conn.autocommit),
    "prepare_threshold": Row(1, lambda conn, _: conn.prepare_threshold),
    "context": Row(
        Context(),
        lambda conn, _: conn.adapters.get_dumper(Context, psycopg.adapt.PyFormat.TEXT).__name__,
        "StrDumper",
    ),
    "row_factory": Row(dict_row, lambda conn, _: conn.row_factory),
    "cursor_factory": Row(psycopg.ClientCursor, lambda conn, _: conn.cursor_factory),
    # -- what a pool has another word for, and what nobody has
    "conninfo": Row("host=db", refused="give it to the pool as conninfo="),
    "connection_class": Row(psycopg.Connection, refused="give it to the pool as connection_class="),
    "database": Row("shop", refused="did you mean 'dbname'"),
    "pasword": Row("hunter2", refused="did you mean 'password'"),
    "connection_factory": Row(psycopg.Connection, refused="unknown to psycopg"),
    "min_size": Row(3, refused="unknown to psycopg"),
}
#: Words of a newer libpq than this one are refused.
ROWS |= {
    key: Row(row.value, refused="unknown to psycopg .* with libpq")
    for key, row in ROWS.items()
    if row.refused is None and key not in LIBPQ and isinstance(row.value, str)
}


def test_the_table_has_every_option_that_there_is() -> None:
    for connect in (psycopg.Connection.connect, psycopg.AsyncConnection.connect):
        own = inspect.signature(connect).parameters.keys() - {"kwargs"}
        assert own | LIBPQ <= ROWS.keys(), (own | LIBPQ) - ROWS.keys()
        assert {key for key, row in ROWS.items() if row.refused is None} == (own | LIBPQ) - {
            "conninfo"
        }


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").write_text("[shop]\n", encoding="utf-8")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))


@pytest.fixture(scope="module", autouse=True)
def role(server: Server) -> Iterator[None]:
    server.execute("create role optional login superuser")
    yield
    server.execute("drop role optional")


def told_to_libpq(key: str) -> Any:
    def look(conn: Any, _: Any) -> str | None:
        values = {each.keyword.decode(): each.val for each in conn.pgconn.info}
        found = values[key]
        return None if found is None else found.decode()

    return look


def sync_value(config: PoolConfig, row: Row, key: str, server: Server) -> Any:
    with ConnectionPool.from_config(config) as pool, pool.connection() as conn:
        return (row.seen or told_to_libpq(key))(conn, server)


def async_value(config: PoolConfig, row: Row, key: str, server: Server) -> Any:
    if row.value is psycopg.ClientCursor:
        config = config.replace(kwargs={**(config.kwargs or {}), key: psycopg.AsyncClientCursor})  # type: ignore[dict-item]

    async def main() -> Any:
        async with AsyncConnectionPool.from_config(config) as pool, pool.connection() as conn:
            found = (row.seen or told_to_libpq(key))(conn, server)
            return psycopg.ClientCursor if found is psycopg.AsyncClientCursor else found

    return run(main())


PATHS = {"threads": sync_value, "asyncio": async_value}


@pytest.mark.parametrize("runtime", PATHS)
@pytest.mark.parametrize("key", ROWS)
def test_an_option_has_its_effect_or_is_refused_by_name(
    key: str, runtime: str, *, server: Server, tmp_path: Path
) -> None:
    row = ROWS[key]
    for way in ways_of(key, row):
        config = config_of(way, server, key, row, tmp_path)
        if row.refused is not None:
            with pytest.raises(ConfigError, match=row.refused) as wrong:
                PATHS[runtime](config, row, key, server)
            assert wrong.value.key == key
            assert f"option {key!r}" in str(wrong.value)
            assert "hunter2" not in str(wrong.value)
        elif row.fails is not None:
            with pytest.raises(ServerUnavailable) as caught:
                PATHS[runtime](config.replace(timeout=1.0), row, key, server)
            assert re.search(row.fails, str(caught.value)), caught.value
        else:
            assert PATHS[runtime](config, row, key, server) == row.wanted(), way


def test_what_a_callable_says_is_refused_by_name_too(server: Server) -> None:
    given: Any = lambda: {"pasword": "hunter2"}  # noqa: E731
    with ConnectionPool(server.conninfo(), kwargs=given) as pool:
        with pytest.raises(ServerUnavailable, match="option 'pasword' in kwargs") as caught:
            pool.execute("select 1")
        assert isinstance(caught.value.__cause__, ConfigError)
        assert not caught.value.heals
        assert "hunter2" not in str(caught.value)
        assert pool.stats().open_failures == 1


def test_a_table_of_a_file_has_the_drivers_own_options(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "db.toml"
    text = f'[shop]\nconninfo = "{server.conninfo()}"\n[shop.kwargs]\nprepare_threshold = 3\n'
    file.write_text(text, encoding="utf-8")
    config = PoolConfig.from_file(file, "shop")
    with ConnectionPool.from_config(config) as pool, pool.connection() as conn:
        assert conn.prepare_threshold == 3
    file.write_text(text + "prepare_treshold = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'prepare_threshold'"):
        ConnectionPool.from_config(PoolConfig.from_file(file, "shop"))


def test_a_connect_of_a_class_of_the_users_may_take_options_of_its_own(server: Server) -> None:
    seen: list[dict[str, Any]] = []

    class Own(psycopg.Connection[Any]):
        @classmethod
        def connect(cls, conninfo: str = "", *, vault: str, **kwargs: Any) -> Any:  # type: ignore[override]
            seen.append({"vault": vault, **kwargs})
            return super().connect(conninfo, **kwargs)

    options: Any = {"kwargs": {"vault": "kv/shop", "user": parse(server.conninfo())["user"]}}
    with ConnectionPool(server.conninfo(), connection_class=Own, **options) as pool:
        assert pool.execute("select 1").fetchone() == (1,)
    assert seen[0]["vault"] == "kv/shop"
    assert {type(each) for each in (seen[0]["vault"], seen[0]["user"])} == {str}
    with pytest.raises(ConfigError, match="option 'vault' in kwargs is unknown"):
        ConnectionPool(server.conninfo(), **options)
