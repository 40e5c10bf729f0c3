"""What is not given is libpq's to find: password file, service file, PG* variables; on a real server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock import ConnectionPool, PoolConfig, Pools, ServerUnavailable
from pytest_penstock.postgres import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWORD = r"it's: 50% of \ $this @/?#"
HBA = ["local all all trust", "host all clerk 127.0.0.1/32 scram-sha-256"]
WHO = "select current_user::text, current_database()::text, current_setting('application_name')"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """A server that wants a password over TCP."""
    with Server(hba=HBA) as running:
        quoted = PASSWORD.replace("'", "''")
        running.execute(f"create role clerk login password '{quoted}'")
        running.execute("create database shop owner clerk")
        yield running


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no file of this machine's user."""
    for name in ("HOST", "HOSTADDR", "PORT", "DATABASE", "USER", "PASSWORD", "SERVICE", "APPNAME"):
        monkeypatch.delenv(f"PG{name}", raising=False)
    for name in ("DATABASE_URL", "PENSTOCK_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "no pgpass"))
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "no services"))
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path))


@pytest.fixture
def pgpass(guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pgpass"
    escaped = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    path.write_text(f"127.0.0.1:{guarded.port}:shop:clerk:{escaped}\n", encoding="utf-8")
    path.chmod(0o600)  # libpq ignores one that others can read
    monkeypatch.setenv("PGPASSFILE", str(path))


def who(config: PoolConfig) -> tuple[str, ...]:
    """Who one is, through a ConnectionPool and through Pools alike."""
    with ConnectionPool.from_config(config) as pool, Pools({"one": config}) as pools:
        answers = [tuple(each.execute(WHO).fetchone() or ()) for each in (pool, pools.default)]
    assert answers[0][:2] == answers[1][:2]
    return answers[0]


def test_the_posts_file_connects(guarded: Server, tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    password = PASSWORD.replace("$", "$$")
    path.write_text(
        f"[POSTGRES]\nURL = 127.0.0.1\nPORT = {guarded.port}\nUSER = clerk\nPW = {password}\nDB = shop\n",
        encoding="utf-8",
    )
    assert who(PoolConfig.from_file(path))[:2] == ("clerk", "shop")
    with Pools.from_file(path) as pools:
        assert pools["POSTGRES"].execute("select 1").fetchone() == (1,)


def test_a_password_file_of_libpq(guarded: Server, pgpass: None) -> None:
    given = {"host": "127.0.0.1", "port": guarded.port, "user": "clerk", "dbname": "shop"}
    assert who(PoolConfig.from_mapping(given))[:2] == ("clerk", "shop")
    url = f"postgresql://clerk@127.0.0.1:{guarded.port}/shop"
    assert who(PoolConfig.from_mapping({"url": url}))[:2] == ("clerk", "shop")


def test_a_password_file_named_by_a_setting(
    guarded: Server, pgpass: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGPASSFILE")
    given = {"host": "127.0.0.1", "port": guarded.port, "user": "clerk", "dbname": "shop"}
    given["passfile"] = str(tmp_path / "pgpass")
    assert who(PoolConfig.from_mapping(given))[:2] == ("clerk", "shop")


def test_variables_of_libpq(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(guarded.port))
    monkeypatch.setenv("PGUSER", "clerk")
    monkeypatch.setenv("PGDATABASE", "shop")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    monkeypatch.setenv("PGAPPNAME", "from the environment")
    for config in (PoolConfig(), PoolConfig.from_mapping({}), PoolConfig.from_env()):
        assert who(config) == ("clerk", "shop", "from the environment")
    # an empty setting is none: what libpq knows better is not hidden by it
    assert who(PoolConfig.from_mapping({"user": "", "password": ""}))[:2] == ("clerk", "shop")


@pytest.mark.parametrize("how", ["setting", "conninfo", "variable"])
def test_a_service_file(
    how: str, guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "services"
    path.write_text(
        f"[shop]\nhost=127.0.0.1\nport={guarded.port}\nuser=clerk\ndbname=shop\npassword={PASSWORD}\n"
        "application_name=from the service\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PGSERVICEFILE", str(path))
    given = {"setting": {"service": "shop"}, "conninfo": {"dsn": "service=shop"}, "variable": {}}[
        how
    ]
    if how == "variable":
        monkeypatch.setenv("PGSERVICE", "shop")
    assert who(PoolConfig.from_mapping(given)) == ("clerk", "shop", "from the service")


def test_database_url_and_a_password_in_a_file(
    guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pw").write_text(PASSWORD + "\n", encoding="utf-8")
    url = f"postgresql://clerk@127.0.0.1:{guarded.port}/shop"
    config = PoolConfig.from_mapping({"url": url, "password_file": str(tmp_path / "pw")})
    assert who(config)[:2] == ("clerk", "shop")


def test_a_replaced_password_file_is_used_by_the_next_connection(
    guarded: Server, tmp_path: Path
) -> None:
    path = tmp_path / "pw"
    path.write_text("wrong", encoding="utf-8")
    url = f"postgresql://clerk@127.0.0.1:{guarded.port}/shop"
    with Pools.from_mapping({"url": url, "password_file": str(path)}) as pools:
        with pytest.raises(ServerUnavailable) as caught:
            pools.default.getconn()
        assert caught.value.sqlstate == "28P01"
        path.write_text(PASSWORD, encoding="utf-8")
        pools.close()
        pools.open(wait=True)
        assert pools.default.execute("select 1").fetchone() == (1,)
