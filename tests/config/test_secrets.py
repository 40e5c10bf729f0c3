"""No text, no traceback and no local variable of ours shows a secret, at whatever stage it fails."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from penstock import ConnectionPool, PoolConfig, Pools
from penstock.config.loaders import many_from_file
from penstock.conninfo import parse, to_conninfo, to_url
from tests.config.seen import shown

S = "hunter2Hunter2"
URL = f"postgresql://app:{S}@db/shop"


def assert_fails_without_showing_it(call, *arguments: Any, **options: Any) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  which one, other tests say
        call(*arguments, **options)
    seen = shown(caught.value)
    assert "penstock" in seen
    assert S not in seen
    assert S not in repr(caught.value)
    # once more, as the standard library shows it; without the frames of this test
    told = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    for frame in told.stack:
        if "tests" not in Path(frame.filename).parts:
            assert S not in str(frame.locals)


@pytest.mark.parametrize(
    "options",
    [
        {"conninfo": URL, "maxsize": 3},
        {"conninfo": URL, "max_size": 0},
        {"conninfo": URL, "driver": "no such driver"},
        {"conninfo": URL.encode()},
        {"conninfo": [URL]},
        {"kwargs": {"password": S}, "max_size": 0},
        {"kwargs": {"pasword": S}, "max_size": 0},
        {"kwargs": {1: 2, "password": S}},
        {"kwargs": [("password", S)]},
        {"kwargs": {"server_settings": {"x": S}}, "timeout": -1},
        {"kwargs": {"password": S}, "name": ""},
    ],
)
def test_options_in_code(options: dict[str, Any]) -> None:
    assert_fails_without_showing_it(PoolConfig, **options) if "driver" not in options else None
    assert_fails_without_showing_it(ConnectionPool, **options)
    good = PoolConfig(conninfo=URL, kwargs={"password": S})
    changes = {"conninfo": URL, **options}
    assert_fails_without_showing_it(good.replace, **changes) if "driver" not in options else None


@pytest.mark.parametrize(
    "mapping",
    [
        {"url": URL, "maxsize": 3},
        {"url": URL, "max_size": S},
        {"url": URL, "max_size": 0},
        {"url": URL, "timeout": f"{S}s"},
        {"url": URL, "port": S},
        {"url": URL, "user": "other"},
        {"url": URL, "password": S + "2"},
        {"url": URL, "configure": S},
        {"url": URL, "reset": S},
        {"url": URL, "order": S},
        {"url": URL, "connection_class": "no_such_module:x"},
        {"url": URL, "driver": 3},
        {"url": URL, "conninfo": URL},
        {"url": f"mysql://app:{S}@db"},
        {"url": f"postgresql://app:{S} {S}@db"},
        {"url": f"postgresql://app:%{S}@db"},
        {"url": f"postgresql://[{S}"},
        {"url": f"postgresql://db?{S}"},
        {"url": f"postgresql://app@db:{S}"},
        {"url": f"host=db password={S} {S}"},
        {"url": f"host=db password='{S}"},
        {"url": f"host=db {S}=1"},
        {"url": f"{S}\0=1"},
        {"url": f"{S}:1"},
        {"url": URL.encode()},
        {"password": S, "port": 0},
        {"password": S, "host": "a,b", "port": "1,2,3"},
        {"password": f"{S}\0"},
        {"password": f"{S}\udc00"},
        {"password": [S]},
        {"password": {"x": S}},
        {"password": S.encode()},
        {"pw": S, "password": S},
        {"pwd": S},
        {"password": S, "password_file": "nowhere"},
        {"password_file": S},
        {"password_file": f"{S}\0"},
        {"kwargs": {"password": S}, "max_size": 0},
        {"kwargs": [S]},
        {"kwargs": S},
        {"password": S, 1: 2},
    ],
)
def test_mappings(mapping: dict[Any, Any]) -> None:
    assert_fails_without_showing_it(PoolConfig.from_mapping, mapping)
    assert_fails_without_showing_it(Pools.from_mapping, mapping)
    assert_fails_without_showing_it(Pools.from_mapping, {"good": {"url": URL}, "bad": mapping})


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_URL", URL)
    monkeypatch.setenv("PENSTOCK_MAX_SIZE", S)
    assert_fails_without_showing_it(PoolConfig.from_env)
    assert_fails_without_showing_it(Pools.from_env)
    monkeypatch.setenv("PENSTOCK_MAX_SIZE", "3")
    monkeypatch.setenv("PENSTOCK_PASSWORD", S + "x")
    assert_fails_without_showing_it(PoolConfig.from_env)


GOOD_INI = f"[a]\nurl = {URL}\n[b]\nhost = db\npw = {S}\n"
GOOD_TOML = f'[a]\nurl = "{URL}"\n[b]\nhost = "db"\npassword = "{S}"\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("db.ini", GOOD_INI + "pw = x\n"),
        ("db.ini", GOOD_INI + "[a]\n"),
        ("db.ini", GOOD_INI + f"{S}\n"),
        ("db.ini", GOOD_INI + f"{S} = 1\n"),
        ("db.ini", GOOD_INI + f" {S}\n"),
        ("db.ini", GOOD_INI + "max_size = 0\n"),
        ("db.ini", GOOD_INI + f"user = ${{{S}}}\n"),
        ("db.ini", GOOD_INI + f"user = ${{{S}\n"),
        ("db.ini", f"pw = {S}\n"),
        ("db.toml", GOOD_TOML + "password = 'x'\n"),
        ("db.toml", GOOD_TOML + f"password = {S}\n"),
        ("db.toml", GOOD_TOML + f"user = '{S}\n"),
        ("db.toml", GOOD_TOML + f'user = "\\{S}"\n'),
        ("db.toml", GOOD_TOML + "max_size = 0\n"),
        ("db.toml", GOOD_TOML + f"max_size = '{S}'\n"),
        ("db.toml", GOOD_TOML + f"kwargs.x = '${{{S}}}'\n"),
        ("db.toml", GOOD_TOML + f"port = ['{S}', 1.5]\n"),
    ],
)
def test_files(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert_fails_without_showing_it(Pools.from_file, path)
    assert_fails_without_showing_it(many_from_file, path, (), PoolConfig)
    path.write_bytes(b"\xff" + text.encode())
    assert_fails_without_showing_it(Pools.from_file, path)


@pytest.mark.parametrize("text", [f"password='{S}", f"{S}", f"postgresql://a:{S}%@db"])
def test_conninfo_strings(text: str) -> None:
    assert_fails_without_showing_it(parse, text)


@pytest.mark.parametrize("write", [to_conninfo, to_url])
def test_settings(write) -> None:
    assert_fails_without_showing_it(write, {"password": S, "pasword": S})
    assert_fails_without_showing_it(write, {"password": S, "sslpassword": f"{S}\0"})


def test_what_is_right_shows_nothing_either() -> None:
    pool = ConnectionPool.from_config(PoolConfig.from_mapping({"url": URL, "name": "shop"}))
    pools = Pools.from_mapping({"a": {"url": URL}, "b": {"pw": S, "host": "db"}})
    assert S not in repr((pool, pools, pools.stats(), pools.health(), vars(pool), vars(pools)))


@pytest.mark.parametrize("conninfo", [f"host=127.0.0.1 port=1 password={S}", f"password='{S}"])
def test_a_connection_that_cannot_be_opened(conninfo: str) -> None:
    with ConnectionPool(conninfo, timeout=0.5) as pool:
        assert_fails_without_showing_it(pool.open, wait=True)
        assert_fails_without_showing_it(pool.getconn)
    with Pools.from_mapping({"a": {"host": "127.0.0.1", "port": 1, "pw": S}}) as pools:
        assert_fails_without_showing_it(pools.open, wait=True, timeout=0.5)


def test_the_test_sees_a_secret_where_there_is_one() -> None:
    def fails(secret: str) -> None:
        raise ValueError

    code = compile(
        "def ours(call, secret):\n    inner = {'x': [secret]}\n    call()", "ours.py", "exec"
    )
    names: dict[str, Any] = {}
    exec(code, names)
    with pytest.raises(TypeError) as caught:
        names["ours"](fails, S)
    assert S in shown(caught.value)
