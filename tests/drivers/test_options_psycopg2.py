"""Every option of psycopg2's `connect` and of its libpq, said to a pool as users say it."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.extras
import pytest
from tests.drivers.option_rows import Row, config_of, libpq_rows, ways_of

from penstock import ConfigError, ConnectionPool, PoolConfig, ServerUnavailable
from penstock.config.conninfo import KEYWORDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_penstock.postgres import Server


def is_known(key: str) -> bool:
    try:
        psycopg2.extensions.make_dsn(**{key: "x"})
    except psycopg2.ProgrammingError:
        return False
    return True


LIBPQ = set(filter(is_known, KEYWORDS))


class Mine(psycopg2.extensions.connection):
    pass


ROWS: dict[str, Row] = {
    **libpq_rows(
        lambda conn: conn.get_backend_pid(),
        lambda conn: conn.fileno(),
        lambda conn, name: conn.get_parameter_status(name),
    ),
    "connection_factory": Row(Mine, lambda conn, _: isinstance(conn, Mine), expected=True),
    "cursor_factory": Row(psycopg2.extras.DictCursor, lambda conn, _: conn.cursor_factory),
    "database": Row("template1", lambda conn, _: conn.info.dbname),
    "password": Row("hunter2", lambda conn, _: conn.info.password),
    # -- what a pool cannot, what it has another word for, and what nobody has
    "async": Row(value=True, refused="asynchronous"),
    "async_": Row(value=1, refused="asynchronous"),
    "dsn": Row("host=db", refused="give it to the pool as conninfo="),
    "connection_class": Row(Mine, refused="give it to the pool as connection_class="),
    "pasword": Row("hunter2", refused="did you mean 'password'"),
    "row_factory": Row(dict, refused="unknown to psycopg2"),
}
#: What libpq does not show.
HIDDEN = ("service", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret")
#: Words of a newer libpq than this one are refused.
ROWS |= {
    key: Row(row.value, refused="unknown to psycopg2 with libpq")
    for key, row in ROWS.items()
    if key in set(KEYWORDS) - LIBPQ
}


def test_the_table_has_every_option_that_there_is() -> None:
    own = inspect.signature(psycopg2.connect).parameters.keys() - {"kwargs"}
    own |= {"async", "async_"}  # which it takes out of its kwargs
    assert own | LIBPQ <= ROWS.keys(), (own | LIBPQ) - ROWS.keys()
    honoured = {key for key, row in ROWS.items() if row.refused is None}
    assert honoured == (own | LIBPQ | {"database"}) - {"dsn", "async", "async_"}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").write_text("[shop]\n", encoding="utf-8")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))


@pytest.fixture(scope="module", autouse=True)
def role(server: Server) -> Iterator[None]:
    server.execute("create role optional login superuser")
    yield
    server.execute("drop role optional")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What libpq was told last."""
    last: dict[str, str] = {}
    init = psycopg2.extensions.connection.__init__

    class Telling(psycopg2.extensions.connection):
        def __init__(self, dsn: str, *args: Any, **options: Any) -> None:
            last.update(psycopg2.extensions.parse_dsn(dsn))
            init(self, dsn, *args, **options)

    monkeypatch.setattr("penstock._drivers.psycopg2.connect.connection", Telling)
    return last


@pytest.mark.parametrize("key", ROWS)
def test_an_option_has_its_effect_or_is_refused_by_name(
    key: str, *, server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    row = ROWS[key]
    told = request.getfixturevalue("told") if key in HIDDEN else {}
    for way in ways_of(key, row):
        config = config_of(way, server, key, row, tmp_path, driver="psycopg2")
        if row.refused is not None:
            with pytest.raises(ConfigError, match=row.refused) as wrong:
                ConnectionPool.from_config(config)
            assert wrong.value.key == key
            assert f"option {key!r}" in str(wrong.value)
            assert "hunter2" not in str(wrong.value)
            continue
        # Of four: a smaller pool gives a connect less time than connect_timeout= here.
        with ConnectionPool.from_config(config.replace(timeout=20.0, max_size=4)) as pool:
            if row.fails is not None:
                with pytest.raises(ServerUnavailable) as caught:
                    pool.getconn(timeout=1.0)
                assert re.search(row.fails, str(caught.value)), caught.value
                continue
            with pool.connection() as conn:
                if row.seen is not None:
                    assert row.seen(conn, server) == row.wanted(), way
                elif key in HIDDEN:
                    assert told[key] == row.value
                else:
                    assert conn.info.dsn_parameters[key] == row.value, way


def test_synchronous_connections_may_be_asked_for(server: Server) -> None:
    options: Any = {"async_": 0, "async": False, "connection_factory": None, "cursor_factory": None}
    with ConnectionPool(server.conninfo(), driver="psycopg2", kwargs=options) as pool:
        assert pool.execute("select 1").fetchone() == (1,)


def test_a_class_that_is_said_twice_is_said_once() -> None:
    class Other(Mine):
        pass

    kwargs = {"connection_factory": Mine}
    ConnectionPool(driver="psycopg2", connection_class=Mine, kwargs=kwargs)
    with pytest.raises(ConfigError, match="contradicts the pool's connection_class=") as wrong:
        ConnectionPool(driver="psycopg2", connection_class=Other, kwargs=kwargs)
    assert wrong.value.key == "connection_factory"


def test_a_table_of_a_file_has_the_drivers_own_options(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "db.toml"
    text = f'[shop]\nconninfo = "{server.conninfo()}"\ndriver = "psycopg2"\n[shop.kwargs]\nasync_ = 1\n'
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="asynchronous"):
        ConnectionPool.from_config(PoolConfig.from_file(file, "shop"))
