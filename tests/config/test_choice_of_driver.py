"""A driver, or a callable, that is for the other kind of pool is refused when the pool is made."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import (
    AsyncConnectionPool,
    ConfigError,
    ConnectionPool,
    DriverNotFoundError,
    ServerUnavailable,
)
from penstock.testing import AsyncFakeDriver, FakeDriver, FakeServer


async def later(_conn=None):
    """A coroutine function, as AsyncConnectionPool's options may be."""


def test_a_driver_of_the_other_kind_is_refused_and_the_right_pool_named():
    with FakeServer() as server:
        with pytest.raises(ConfigError, match="AsyncConnectionPool, not AsyncFakeDriver"):
            ConnectionPool(driver=AsyncFakeDriver(server))  # type: ignore[call-overload]
        with pytest.raises(ConfigError, match=r"an AsyncDriver.*not FakeDriver"):
            AsyncConnectionPool(driver=FakeDriver(server))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        (ConnectionPool, "asyncpg", "use AsyncConnectionPool"),
        (AsyncConnectionPool, "psycopg2", "use ConnectionPool"),
    ],
)
def test_the_name_of_a_driver_of_the_other_kind_says_which_pool_has_it(kind, name, other):
    with pytest.raises(DriverNotFoundError, match=other):
        kind(driver=name)


@pytest.mark.parametrize("key", ["configure", "check", "reset", "on_borrow", "reconnect_failed"])
def test_a_coroutine_function_for_a_pool_that_awaits_nothing_is_refused(key):
    option: Any = {key: later}
    with FakeServer() as server:
        with pytest.raises(ConfigError, match=f"'{key}'.*AsyncConnectionPool awaits"):
            ConnectionPool(driver=FakeDriver(server), **option)
        AsyncConnectionPool(driver=AsyncFakeDriver(server), **option)


class Later:
    async def __call__(self, *_: Any) -> None: ...


@pytest.mark.parametrize("key", ["configure", "check", "reset", "on_borrow", "reconnect_failed"])
def test_so_is_an_object_whose_call_is_a_coroutine_function(key):
    option: Any = {key: Later()}
    with FakeServer() as server:
        with pytest.raises(ConfigError, match=f"'{key}'.*AsyncConnectionPool awaits"):
            ConnectionPool(driver=FakeDriver(server), **option)
        AsyncConnectionPool(driver=AsyncFakeDriver(server), **option)


def generates(*_: Any) -> Any:
    yield


async def generates_later(*_: Any) -> Any:
    yield


@pytest.mark.parametrize("function", [generates, generates_later])
@pytest.mark.parametrize("key", ["configure", "check", "reset", "on_borrow", "reconnect_failed"])
def test_a_generator_function_of_which_nothing_would_run_is_refused(key, function):
    option: Any = {key: function}
    with FakeServer() as server:
        with pytest.raises(ConfigError, match=f"'{key}'.*yield"):
            ConnectionPool(driver=FakeDriver(server), **option)
        with pytest.raises(ConfigError, match=f"'{key}'.*yield"):
            AsyncConnectionPool(driver=AsyncFakeDriver(server), **option)


def test_a_coroutine_that_configure_returns_is_not_dropped_in_silence():
    with (
        FakeServer() as server,
        ConnectionPool(driver=FakeDriver(server), configure=lambda _: later()) as pool,
        pytest.raises(ServerUnavailable, match=r"configure=.*coroutine.*does not await"),
    ):
        pool.getconn()


def test_so_is_one_that_gives_the_conninfo_or_the_kwargs():
    with pytest.raises(ConfigError, match="'conninfo'"):
        ConnectionPool(later)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'kwargs'"):
        ConnectionPool(kwargs=later)  # type: ignore[arg-type]
