"""Configuration as people have it: other libraries' URLs and dicts, files that share settings, paths."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from penstock import ConfigError, ConnectionPool, PoolConfig, ServerUnavailable
from penstock.config.loaders import many_from_env, many_from_file, many_from_mapping
from penstock.config.secret import Hidden
from penstock.conninfo import parse

if TYPE_CHECKING:
    from pathlib import Path


def settings_of(config: PoolConfig) -> dict[str, str]:
    return parse(config.conninfo() if callable(config.conninfo) else config.conninfo)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PENSTOCK_") or name == "DATABASE_URL":
            monkeypatch.delenv(name)


# -- what is near wins over what is around it, also by another name -------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("db.ini", "[DEFAULT]\npw = a\nuser = app\n[shop]\nhost = db\npassword = b\n"),
        ("db.toml", "pw = 'a'\nuser = 'app'\n[shop]\nhost = 'db'\npassword = 'b'\n"),
    ],
)
def test_an_own_setting_wins_also_by_another_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    config = PoolConfig.from_file(tmp_path / name, "shop")
    assert settings_of(config) == {"host": "db", "user": "app", "password": "b"}


@pytest.mark.parametrize(
    ("around", "own", "settings"),
    [
        ({"user": "a"}, {"url": "postgresql://b@db"}, {"user": "b", "host": "db"}),
        ({"url": "postgresql://b@db/x"}, {"db": "y"}, {"user": "b", "host": "db", "dbname": "y"}),
        ({"url": "host=x"}, {"dsn": "host=db"}, {"host": "db"}),
        ({"password_file": "nowhere"}, {"host": "db", "pw": "x"}, {"host": "db", "password": "x"}),
        ({"pw": "x"}, {"host": "db", "password": ""}, {"host": "db"}),
    ],
)
def test_what_is_around_gives_way(
    around: dict[str, Any], own: dict[str, Any], settings: dict[str, str]
) -> None:
    assert (
        settings_of(many_from_mapping(Hidden({**around, "shop": own}), PoolConfig)["shop"])
        == settings
    )


def test_a_password_file_of_its_own_wins_over_a_password_around(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("b\n")
    given = {"pw": "a", "shop": {"host": "db", "password_file": tmp_path / "secret"}}
    found = many_from_mapping(Hidden(given), PoolConfig)
    assert settings_of(found["shop"]) == {"host": "db", "password": "b"}


def test_an_overridden_key_of_an_ini_file_has_its_own_line(tmp_path: Path) -> None:
    file = tmp_path / "db.ini"
    file.write_text("[DEFAULT]\nmax_size = 5\n[shop]\nhost = db\nmax_size = many\n")
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_file(file)
    assert caught.value.line == 5


def test_default_alone_in_an_ini_file_is_the_database(tmp_path: Path) -> None:
    file = tmp_path / "db.ini"
    file.write_text("[DEFAULT]\nhost = db\nmax_size = 3\n")
    found = many_from_file(file, [], PoolConfig)
    assert settings_of(found["default"]) == {"host": "db"}
    assert PoolConfig.from_file(file, "default").max_size == 3


# -- other libraries' -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg2://app:hunter2@db/shop",
        "POSTGRES://app:hunter2@db/shop",
        "jdbc:postgresql://db/shop?user=app&password=hunter2",
        '"postgresql://app:hunter2@db/shop"',
        "sqlite:///shop.db",
    ],
)
def test_another_kind_of_url_is_refused_before_anybody_connects(url: str) -> None:
    with pytest.raises(ConfigError, match="a URL begins with postgresql:// here") as caught:
        ConnectionPool(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["app:hunter2@db/shop", "db:5432/shop", "localhost/shop"])
def test_a_url_without_its_scheme_is_no_host(url: str) -> None:
    with pytest.raises(ConfigError, match="write postgresql://user@host/dbname") as caught:
        PoolConfig.from_mapping({"url": url})
    assert "hunter2" not in str(caught.value)


def test_djangos_dict_is_told_what_its_keys_are_here() -> None:
    with pytest.raises(ConfigError, match="'ENGINE': Django's own: leave it out; NAME is dbname"):
        PoolConfig.from_mapping({"ENGINE": "django.db.backends.postgresql", "NAME": "shop"})


def test_settings_with_semicolons_show_no_password() -> None:
    with (
        ConnectionPool("host=nowhere.invalid;user=app;password=hunter2", timeout=5) as pool,
        pytest.raises(ServerUnavailable, match="blanks are what stands between") as caught,
    ):
        pool.execute("select 1")
    assert "hunter2" not in str(caught.value) + str(caught.value.__cause__)


def test_a_path_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x\n")
    found = PoolConfig.from_mapping(
        {"host": tmp_path, "sslrootcert": tmp_path / "ca", "password_file": tmp_path / "secret"}
    )
    assert settings_of(found) == {
        "host": str(tmp_path),
        "sslrootcert": str(tmp_path / "ca"),
        "password": "x",
    }


def test_a_default_behind_a_variables_name_is_told_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "db.ini").write_text("[shop]\npassword = ${NO_SUCH:-hunter2}\n")
    with pytest.raises(ConfigError, match="names a variable with a default") as caught:
        PoolConfig.from_file(tmp_path / "db.ini")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("rest", ["ORDERS__EU__URL", "ORDERS__"])
def test_a_variable_with_a_name_too_many_is_an_error(
    monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    monkeypatch.setenv(f"PENSTOCK_{rest}", "postgresql://db")
    with pytest.raises(ConfigError, match=f"unknown option 'PENSTOCK_{rest}'"):
        many_from_env("PENSTOCK_", PoolConfig)
