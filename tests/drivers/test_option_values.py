"""What a user puts into `kwargs` reaches the library as what it was: the same values of the same types."""

from __future__ import annotations

import asyncio
import enum
import gc
import pickle
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import psycopg2
import pytest
from tests.config.seen import shown
from tests.drivers.async_links import LOOPS, run

from penstock import AsyncConnectionPool, ConnectionPool, PoolConfig, ServerUnavailable
from penstock.config.secret import Secret
from penstock.testing import AsyncFakeDriver, FakeDriver, FakeServer

S = "hunter2Hunter2"


class Text(str):
    """A text of the user's own class."""

    __slots__ = ()


class Mode(str, enum.Enum):  # noqa: UP042  its str() is another text than it is
    OFF = "off"


class Plain(enum.StrEnum):
    OFF = "off"


class Settings(dict):
    """A mapping of the user's own class."""


VALUES: dict[str, Any] = {
    "text": S,
    "empty": "",
    "text of a class": Text(S),
    "enum": Mode.OFF,
    "plain enum": Plain.OFF,
    "number": 7,
    "flag": True,
    "nothing": None,
    "bytes": b"x",
    "path": Path("/tmp"),
    "list": [S, Text(S), 1],
    "tuple": (S, Mode.OFF, (S,)),
    "mapping": {"one": S, "two": {"three": [S, Text(S)]}},
    "mapping of a class": Settings(one=S),
    "class": dict,
    "function": len,
}


def types_of(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value), {types_of(key): types_of(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [types_of(each) for each in value]
    return type(value), value if isinstance(value, str) else None


def is_as_it_was(found: Any) -> bool:
    return {key: types_of(each) for key, each in found.items()} == {
        key: types_of(each) for key, each in VALUES.items()
    }


def as_given(how: str) -> Any:
    if how == "a callable":
        return lambda: VALUES
    config = PoolConfig(kwargs=VALUES)
    # What a config shows goes into another one: the same thing again.
    return {
        "a mapping": VALUES,
        "what a config has": config.kwargs,
        "what a copied config has": config.replace(max_size=3).kwargs,
    }[how]


HOWS = ("a mapping", "a callable", "what a config has", "what a copied config has")


@pytest.mark.parametrize("how", HOWS)
def test_a_driver_is_given_the_values_that_the_user_gave(how: str) -> None:
    seen: list[Any] = []

    class Driver(FakeDriver):
        def open(self, recipe: Any, seconds: float | None) -> Any:
            seen.append(recipe.kwargs)
            assert S not in repr(recipe)
            return super().open(recipe, seconds)

    class AsyncDriver(AsyncFakeDriver):
        async def open(self, recipe: Any, seconds: float | None) -> Any:
            seen.append(recipe.kwargs)
            return await super().open(recipe, seconds)

    with ConnectionPool(driver=Driver(FakeServer()), kwargs=as_given(how)) as pool:
        pool.execute("select 1")

    async def main() -> None:
        driver: Any = AsyncDriver(FakeServer())
        async with AsyncConnectionPool(driver=driver, kwargs=as_given(how)) as pool:
            await pool.execute("select 1")

    asyncio.run(main())
    assert len(seen) == 2
    assert all(map(is_as_it_was, seen))


def test_a_config_hides_them_and_still_equals_what_was_given() -> None:
    config = PoolConfig(kwargs={key: VALUES[key] for key in VALUES if "of a class" not in key})
    assert S not in repr(config) + repr(config.kwargs)
    assert config.kwargs == {key: VALUES[key] for key in VALUES if "of a class" not in key}
    again = pickle.loads(pickle.dumps(PoolConfig(kwargs={"text": S, "in": {"text": [S]}})))
    assert S not in repr(again.kwargs)
    assert again.kwargs == {"text": S, "in": {"text": [S]}}


def test_a_hidden_text_is_a_plain_one_for_the_library() -> None:
    seen: list[Any] = []

    class Driver(FakeDriver):
        def open(self, recipe: Any, seconds: float | None) -> Any:
            seen.append(recipe.kwargs)
            return super().open(recipe, seconds)

    given = {"password": Secret(S), "server_settings": {"app.token": Secret(S)}}
    with ConnectionPool(driver=Driver(FakeServer()), kwargs=given) as pool:
        pool.execute("select 1")
    assert type(seen[0]["password"]) is type(seen[0]["server_settings"]["app.token"]) is str


OF_ASYNCPG = {
    "server_settings": {"app.tenant": S},
    "ssl": False,
    "command_timeout": 3,
    "statement_cache_size": 0,
    "max_cached_statement_lifetime": 5.5,
    "record_class": asyncpg.Record,
}


def test_asyncpg_is_called_with_the_users_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    async def connect(**given: Any) -> None:
        calls.append(given)
        raise OSError("that is all")

    monkeypatch.setattr(asyncpg, "connect", connect)

    async def main() -> None:
        async with AsyncConnectionPool(
            "host=127.0.0.1 port=1", driver="asyncpg", kwargs=OF_ASYNCPG, timeout=0
        ) as pool:
            with pytest.raises(ServerUnavailable):
                await pool.open(wait=True, timeout=0.2)

    asyncio.run(main())
    settings = calls[0]["server_settings"]
    assert settings["app.tenant"] == S
    assert {type(each) for pair in settings.items() for each in pair} == {str}
    for name in OF_ASYNCPG.keys() - {"server_settings"}:
        assert calls[0][name] is OF_ASYNCPG[name]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", [dict, lambda settings: lambda: settings])
def test_settings_of_asyncpg_reach_the_server(server: Any, loop: str, how: Any) -> None:
    settings = {"jit": "off", "work_mem": "7MB", "application_name": "mine", "app.tenant": S}

    async def main() -> None:
        async with AsyncConnectionPool(
            server.conninfo(over="tcp"),
            driver="asyncpg",
            kwargs=how({"server_settings": settings}),
            max_size=1,
        ) as pool:
            for name, value in settings.items():
                found = await pool.execute("select current_setting($1)", [name])
                assert [tuple(row) for row in found] == [(value,)]
            assert pool.stats().open_failures == 0

    run(main(), loop)


@pytest.mark.parametrize("bad", [{"app.mode": Mode.OFF}, {Text("app.mode"): "off"}])
def test_a_setting_that_asyncpg_cannot_send_is_told_at_once(
    server: Any, bad: Any, caplog: Any
) -> None:
    async def main() -> None:
        async with AsyncConnectionPool(
            server.conninfo(over="tcp"), driver="asyncpg", kwargs={"server_settings": bad}
        ) as pool:
            with pytest.raises(
                ServerUnavailable, match="server_settings: asyncpg cannot"
            ) as caught:
                await pool.getconn()
        assert isinstance(caught.value.__cause__, TypeError)
        assert type(next(key for pair in bad.items() for key in pair if type(key) is not str)).__name__ in str(caught.value)  # fmt: skip
        assert "off" not in str(caught.value)
        assert not caught.value.heals
        assert pool.stats().open_failures == 1

    asyncio.run(main())


# -- and are still out of sight -----------------------------------------------------------------------


def bad(*_: Any, **__: Any) -> Any:
    raise TypeError("a bug")


class BadPsycopg(psycopg.Connection[Any]):
    __init__ = bad


class BadPsycopg2(psycopg2.extensions.connection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        bad()


OWN: dict[str, dict[str, Any]] = {
    "psycopg": {"connection_class": BadPsycopg},
    "psycopg2": {"connection_class": BadPsycopg2},
    "asyncpg": {"kwargs": {"password": bad, "server_settings": {"app.token": S}}},
}


@pytest.mark.parametrize("driver", OWN)
def test_no_frame_of_a_bug_in_a_connect_shows_a_secret(server: Any, driver: str) -> None:
    from penstock._drivers import load
    from penstock.drivers import Recipe

    recipe = Recipe(
        conninfo=server.conninfo(over="tcp", password=S),
        **{"kwargs": {"password": S}, **OWN[driver]},
    )
    with pytest.raises(TypeError) as caught:
        if driver == "asyncpg":
            asyncio.run(load(driver, asynchronous=True).open(recipe, 5.0))
        else:
            load(driver).open(recipe, 5.0)
    seen = shown(caught.value)
    assert "_drivers" in seen
    assert S not in seen


@pytest.mark.parametrize("driver", OWN)
def test_a_bug_in_what_the_user_gave_is_told_with_its_place(server: Any, driver: str) -> None:
    options: Any = {"driver": driver, "max_size": 2, **OWN[driver]}

    async def main() -> tuple[ServerUnavailable, int]:
        async with AsyncConnectionPool(server.conninfo(over="tcp"), **options) as pool:
            with pytest.raises(ServerUnavailable) as caught:
                await pool.execute("select 1")
            return caught.value, pool.stats().open_failures

    if driver == "asyncpg":
        error, failures = asyncio.run(main())
    else:
        with ConnectionPool(server.conninfo(over="tcp"), **options) as pool:
            with pytest.raises(ServerUnavailable) as caught:
                pool.execute("select 1")
            error, failures = caught.value, pool.stats().open_failures
    assert type(error.__cause__) is TypeError
    told = {  # a callable is named; a class's bug has its place
        "asyncpg": "password=bad raised: TypeError: a bug",
    }.get(driver, "TypeError: a bug (raised in bad, drivers/test_option_values.py:")
    assert told in str(error)
    assert failures == 1


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_class_of_another_library_is_refused_by_name(server: Any, driver: str) -> None:
    async def main() -> str:
        async with AsyncConnectionPool(
            server.conninfo(over="tcp"), driver=driver, connection_class=BadPsycopg2
        ) as pool:
            with pytest.raises(ServerUnavailable) as caught:
                await pool.execute("select 1")
            assert pool.stats().open_failures == 1
            return str(caught.value)

    assert "connection_class=BadPsycopg2 is no subclass of " in asyncio.run(main())


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"port": "x"}, "port"),
        ({"port": 5.5}, "port"),
        ({"port": 70000}, "port"),
        ({"application_name": "\udc80"}, "surrogates not allowed"),
    ],
)
@pytest.mark.parametrize("kind", ["threads", "asyncio"])
@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_a_value_that_psycopg_cannot_use_is_refused_at_once(
    server: Any, over: str, kind: str, kwargs: Any, told: str
) -> None:
    async def main() -> tuple[ServerUnavailable, int]:
        async with AsyncConnectionPool(server.conninfo(over=over), kwargs=kwargs) as pool:
            with pytest.raises(ServerUnavailable) as caught:
                await pool.execute("select 1")
            return caught.value, pool.stats().open_failures

    if kind == "asyncio":
        error, failures = asyncio.run(main())
    else:
        with ConnectionPool(server.conninfo(over=over), kwargs=kwargs) as pool:
            with pytest.raises(ServerUnavailable) as caught:
                pool.execute("select 1")
            error, failures = caught.value, pool.stats().open_failures
    assert failures == 1
    assert told in str(error) or "Servname not supported" in str(error)
    assert "check that the server runs" not in str(error)


def test_a_class_whose_init_fails_early_leaves_no_noise(
    server: Any, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    class Early(asyncpg.Connection):  # type: ignore[misc]
        def __init__(self, one: Any) -> None: ...

    async def main() -> None:
        async with AsyncConnectionPool(
            server.conninfo(over="tcp"), driver="asyncpg", connection_class=Early
        ) as pool:
            with pytest.raises(ServerUnavailable, match="positional argument"):
                await pool.execute("select 1")
        for each in gc.get_objects():  # asyncpg leaves its transport open
            if isinstance(each, asyncio.Transport):
                each.abort()
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()
    assert "AttributeError" not in capsys.readouterr().err
    assert [each for each in recwarn if "Unraisable" in each.category.__name__] == []
