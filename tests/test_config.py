"""Options are checked once, errors name the key, and no text holds a password."""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any, cast

import pytest

from penstock.config.application_name import application_name
from penstock.config.pool_config import OPTIONS, PoolConfig
from penstock.config.redacted import redacted
from penstock.config.secret import Secret
from penstock.errors import ConfigError


def refuse() -> None:
    """A callable to give."""


def test_the_defaults_are_those_of_the_design() -> None:
    config = PoolConfig()
    assert (config.min_size, config.max_size, config.timeout) == (1, 10, 5.0)
    assert (config.max_lifetime, config.max_idle, config.ping_after) == (3600.0, 600.0, 30.0)
    assert (config.reconnect_timeout, config.overdue_after) == (300.0, 60.0)
    assert (config.order, config.reset, config.driver) == ("lifo", "rollback", "psycopg")
    assert (config.autocommit, config.read_write, config.open) == (False, False, True)
    assert config.guard is False
    assert config.server_check_interval == 0.5
    assert config.statement_timeout_client is None
    assert repr(config) == "PoolConfig()"


def test_values_are_frozen_and_of_one_form() -> None:
    config = PoolConfig(timeout=5, max_idle=60)
    assert isinstance(config.timeout, float)
    with pytest.raises(AttributeError):
        config.timeout = 6.0  # type: ignore[misc]
    assert config == PoolConfig(timeout=5.0, max_idle=60.0)
    assert hash(config) == hash(PoolConfig(timeout=5.0, max_idle=60.0))


def test_replace_gives_a_checked_copy() -> None:
    config = PoolConfig(name="shop", max_size=4)
    assert config.replace(max_size=8).max_size == 8
    assert config.max_size == 4
    with pytest.raises(ConfigError, match="option 'min_size' of pool 'shop' must be at most"):
        config.replace(min_size=5)
    with pytest.raises(ConfigError, match="unknown option 'maxsize' of pool 'shop': did you mean"):
        config.replace(maxsize=5)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"min_size": True}, "min_size"),
        ({"max_size": "10"}, "max_size"),
        ({"max_size": 10.0}, "max_size"),
        ({"max_size": 0}, "max_size"),
        ({"min_size": -1}, "min_size"),
        ({"min_size": 3, "max_size": 2}, "min_size"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"max_waiting": None}, "max_waiting"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": 1j}, "timeout"),
        ({"max_lifetime": 0}, "max_lifetime"),
        ({"max_idle": 0}, "max_idle"),
        ({"ping_after": -0.1}, "ping_after"),
        ({"reconnect_timeout": "300"}, "reconnect_timeout"),
        ({"overdue_after": 0}, "overdue_after"),
        ({"server_check_interval": 0}, "server_check_interval"),
        ({"statement_timeout_client": 0}, "statement_timeout_client"),
        ({"statement_timeout_client": -1}, "statement_timeout_client"),
        ({"statement_timeout_client": True}, "statement_timeout_client"),
        ({"statement_timeout_client": "1"}, "statement_timeout_client"),
        ({"statement_timeout_client": float("inf")}, "statement_timeout_client"),
        ({"order": "LIFO"}, "order"),
        ({"order": []}, "order"),
        ({"reset": "discard"}, "reset"),
        ({"reset": 1}, "reset"),
        ({"autocommit": 1}, "autocommit"),
        ({"read_write": "yes"}, "read_write"),
        ({"guard": "yes"}, "guard"),
        ({"open": None}, "open"),
        ({"configure": "SET x"}, "configure"),
        ({"check": True}, "check"),
        ({"on_borrow": 1}, "on_borrow"),
        ({"reconnect_failed": 1}, "reconnect_failed"),
        ({"conninfo": None}, "conninfo"),
        ({"conninfo": b"host=db"}, "conninfo"),
        ({"kwargs": [("user", "app")]}, "kwargs"),
        ({"kwargs": {1: 2}}, "kwargs"),
        ({"connection_class": "Connection"}, "connection_class"),
        ({"driver": ""}, "driver"),
        ({"driver": None}, "driver"),
        ({"name": ""}, "name"),
        ({"name": 7}, "name"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolConfig(**options)
    assert caught.value.key == key
    assert str(caught.value).startswith(f"option {key!r} must be ")
    assert caught.value.given in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": None},
        {"timeout": 0},
        {"ping_after": None},
        {"ping_after": 0},
        {"max_lifetime": None, "max_idle": None, "overdue_after": None},
        {"reconnect_timeout": 0},
        {"server_check_interval": None},
        {"statement_timeout_client": None},
        {"statement_timeout_client": 1},
        {"min_size": 0},
        {"min_size": 10},
        {"reset": None},
        {"reset": refuse},
        {"reset": "session"},
        {"order": "fifo"},
        {"conninfo": lambda: "host=db"},
        {"kwargs": lambda: {"password": "x"}},
        {"kwargs": {"user": "app"}},
        {"connection_class": dict},
        {"guard": True},
    ],
)
def test_what_fits_is_taken(options: dict[str, Any]) -> None:
    config = PoolConfig(**options)
    for key, value in options.items():
        assert getattr(config, key) == value


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("maxsize", "max_size"),
        ("max-size", "max_size"),
        ("time_out", "timeout"),
        ("pool_size", "max_size"),
        ("minconn", "min_size"),
        ("pool_recycle", "max_lifetime"),
        ("dsn", "conninfo"),
    ],
)
def test_an_unknown_name_gets_the_one_that_was_meant(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{right}'") as caught:
        PoolConfig(**cast("Any", {wrong: 1}))
    assert caught.value.key == wrong


def test_an_unknown_name_that_resembles_nothing_gets_the_list() -> None:
    with pytest.raises(ConfigError, match=", ".join(OPTIONS)):
        PoolConfig(qqq=1)  # type: ignore[call-arg]


def test_no_repr_and_no_error_holds_a_secret() -> None:
    config = PoolConfig(
        conninfo="postgresql://app:hunter2@db/shop",
        kwargs={"password": "hunter2", "sslpassword": "hunter2", "user": "app"},
        name="shop",
    )
    assert repr(config) == (
        "PoolConfig(conninfo='host=db dbname=shop user=app', "
        "kwargs={password: ..., sslpassword: ..., user: ...}, name='shop')"
    )
    assert "hunter2" not in repr(config.conninfo)  # what tracebacks with locals show
    assert "hunter2" not in repr(config.kwargs)
    assert config.conninfo == "postgresql://app:hunter2@db/shop"
    with pytest.raises(ConfigError) as caught:
        PoolConfig(kwargs=["hunter2"])  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


def test_a_value_from_outside_cannot_be_changed_later() -> None:
    kwargs = {"user": "app"}
    config = PoolConfig(kwargs=kwargs)
    kwargs["user"] = "root"
    assert config.kwargs == {"user": "app"}


def test_a_config_survives_pickling() -> None:
    config = PoolConfig(conninfo="password=x", kwargs={"password": "y"}, max_size=3)
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert isinstance(again.conninfo, Secret)
    assert repr(again.kwargs["password"]) == "'***'"


# -- conninfo without secrets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conninfo", "shown"),
    [
        ("", ""),
        ("postgresql://", "(no host, dbname or user)"),
        ("postgresql://app:S@db:5432/shop", "host=db port=5432 dbname=shop user=app"),
        ("postgres://app:a:S#,;S@db/shop?sslmode=require", "host=db dbname=shop user=app"),
        ("postgresql://app@a:1,b:2/shop", "host=a,b port=1,2 dbname=shop user=app"),
        ("postgresql://[::1]:5432/shop", "host=[::1] port=5432 dbname=shop"),
        ("postgresql://[::1]/shop", "host=[::1] dbname=shop"),
        ("postgresql://%2Frun%2Fpg/shop", "host=%2Frun%2Fpg dbname=shop"),
        ("postgresql:///shop?host=/run/pg&password=S", "host=/run/pg dbname=shop"),
        ("host=db password=S dbname=shop", "host=db dbname=shop"),
        ("host = db password = 'S S' user=app", "host=db user=app"),
        (r"password='S\' S' host=db", "host=db"),
        (r"password=S\ S host=db", "host=db"),
        ("password= S host=db", "host=db"),
        ("user=app@azure host=db", "host=db user=app@azure"),
        ("  host=db\n port=1 ", "host=db port=1"),
        ("sslkey=/S", "(no host, dbname or user)"),
    ],
)
def test_a_conninfo_is_shown_without_its_secrets(conninfo: str, shown: str) -> None:
    assert redacted(conninfo) == shown


@pytest.mark.parametrize(
    "conninfo",
    [
        "postgresql://app:S@S@db/shop",
        "postgresql://app:S/S@db/shop",
        "postgresql://app:1/S@db/shop",
        "postgresql://app:1?S@db/shop",
        "postgresql://app:1?x=S@db/shop",
        "postgresql://app:S S@db/shop",
        "postgresql://app:S@db/shop?password=a@S",
        "postgresql://db/shop?S",
        "mysql://app:S@db/shop",
        "host=db password=it's S",
        "host=db password=S S",
        "user= password=S",
        "dbname=postgresql://app:S@db/shop",
        "dbname='host=db password=S'",
        "host=db password='S",
        "S",
        "host=db user='a\nb'",
    ],
)
def test_a_conninfo_that_leaves_a_doubt_is_not_shown(conninfo: str) -> None:
    assert redacted(conninfo) == "(conninfo not shown: it does not parse)"


# -- application_name ----------------------------------------------------------------------------------


def test_the_name_says_program_pool_and_process() -> None:
    assert application_name("main", app="shop", pid=4242) == "shop/main/4242"
    assert application_name("main", app="shop") == f"shop/main/{os.getpid()}"


@pytest.mark.parametrize(
    ("pool", "app"),
    [("p" * 100, "a"), ("p", "a" * 100), ("p" * 100, "a" * 100), ("ß" * 60, "é" * 60)],
)
def test_the_name_fits_63_bytes_and_keeps_the_pid(pool: str, app: str) -> None:
    name = application_name(pool, app=app, pid=4194304)
    assert len(name.encode()) == 63
    assert name.endswith("/4194304")
    assert name.count("/") == 2
    assert all(name.split("/"))


def test_the_longer_part_gives_way_to_the_shorter() -> None:
    assert application_name("main", app="a" * 100, pid=1) == f"{'a' * 56}/main/1"
    assert application_name("p" * 100, app="shop", pid=1) == f"shop/{'p' * 56}/1"


def test_the_name_is_plain_ascii_of_three_parts() -> None:
    assert application_name("café/東京\n", app="Über", pid=1) == "Uber/cafe_???/1"


@pytest.mark.parametrize(
    ("argv", "app"),
    [
        (["/srv/shop/manage.py", "run"], "manage"),
        (["/usr/bin/gunicorn", "shop:app"], "gunicorn"),
        (["C:\\venv\\Scripts\\gunicorn.exe"], "gunicorn"),
        (["/srv/shop/__main__.py"], "shop"),
        (["-c"], "python"),
        ([""], "python"),
        ([], "python"),
    ],
)
def test_the_program_is_named_after_its_file(
    argv: list[str], app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert application_name("main", pid=1) == f"{app}/main/1"
