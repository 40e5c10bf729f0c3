"""Pools: many databases of one configuration, opened and closed together, none half opened."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest

from penstock import (
    ConfigError,
    ConnectionPool,
    DriverNotFoundError,
    MisuseError,
    PoolConfig,
    Pools,
    PoolTimeout,
    ServerUnavailable,
)
from penstock.testing import FakeDriver, FakeServer, Mode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def servers() -> dict[str, FakeServer]:
    return {"orders": FakeServer(), "users": FakeServer(), "logs": FakeServer()}


@pytest.fixture
def pools(servers: dict[str, FakeServer]) -> Iterator[Pools]:
    found = Pools(
        {name: PoolConfig(driver=FakeDriver(each), timeout=2) for name, each in servers.items()}
    )
    yield found
    found.close()


def states(pools: Pools) -> list[str]:
    return [repr(pool).split()[2].rstrip(":") for pool in pools.values()]


def test_pools_are_a_mapping_of_pools_with_those_names(pools: Pools) -> None:
    assert list(pools) == ["orders", "users", "logs"]
    assert len(pools) == 3 and "users" in pools and "nobody" not in pools
    assert isinstance(pools["users"], ConnectionPool)
    assert pools["users"].name == "users"
    assert [pool.name for pool in pools.values()] == list(pools)
    with pytest.raises(KeyError, match="no pool 'order': there are 'orders', 'users', 'logs'"):
        pools["order"]
    assert pools.get("order") is None
    assert hash(pools) and pools == pools and pools != Pools({})  # noqa: PLR0124


def test_a_pool_keeps_the_name_that_its_options_say() -> None:
    pools = Pools.from_mapping({"orders": {"host": "db", "name": "the orders"}})
    assert pools["orders"].name == "the orders"


def test_making_them_opens_nothing(pools: Pools, servers: dict[str, FakeServer]) -> None:
    assert states(pools) == ["new"] * 3
    assert not any(pool.opened for pool in pools.values())
    assert not any(server.sessions for server in servers.values())
    with pools["users"].connection():
        assert states(pools) == ["new", "open", "new"]


def test_open_and_close_are_of_all_of_them(pools: Pools) -> None:
    pools.open(wait=True)
    assert states(pools) == ["open"] * 3
    assert {stats.idle for stats in pools.stats().values()} == {1}
    assert all(health.ready for health in pools.health().values())
    pools.close()
    assert states(pools) == ["closed"] * 3
    assert not any(health.ready for health in pools.health().values())
    with pools:
        assert states(pools) == ["open"] * 3
    assert states(pools) == ["closed"] * 3


def test_one_that_cannot_be_opened_leaves_none_half_opened(
    pools: Pools, servers: dict[str, FakeServer]
) -> None:
    pools["logs"].open(wait=True)  # not by Pools.open: it stays
    servers["users"].mode = Mode.WRONG_PASSWORD
    with pytest.raises(ServerUnavailable, match="'users'"):
        pools.open(wait=True)
    assert states(pools) == ["closed", "closed", "open"]
    servers["users"].mode = Mode.UP
    pools.open(wait=True)
    assert states(pools) == ["open"] * 3


def test_close_closes_all_of_them_and_tells_the_first_failure(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools.open(wait=True)

    def fails(timeout: float | None = 5.0) -> None:
        raise OSError("first")

    monkeypatch.setattr(pools["orders"], "close", fails)
    with pytest.raises(OSError, match="first"):
        pools.close()
    assert states(pools) == ["open", "closed", "closed"]
    monkeypatch.undo()


def test_one_time_is_for_all_of_them_together(pools: Pools, servers: dict[str, FakeServer]) -> None:
    for server in servers.values():
        server.mode = Mode.DOWN
    with pytest.raises((ServerUnavailable, PoolTimeout)) as caught:
        pools.open(wait=True, timeout=0)
    assert caught.value.pool == "orders"


def test_the_default_one_is_the_only_one_or_the_one_of_that_name(pools: Pools) -> None:
    with pytest.raises(MisuseError, match="There are 'orders', 'users', 'logs'"):
        _ = pools.default
    with pytest.raises(MisuseError, match="There are none"):
        _ = Pools({}).default
    two = Pools.from_mapping({"default": {"host": "a"}, "orders": {"host": "b"}})
    assert two.default is two["default"]
    one = Pools.from_mapping({"url": "postgresql://db/shop"})
    assert one.default is one["default"]


def test_they_travel_to_another_process_as_their_options(pools: Pools) -> None:
    found = Pools.from_mapping({"a": {"host": "x", "max_size": 3}, "b": {"host": "y"}})
    found["a"].resize(2, 7)
    again = pickle.loads(pickle.dumps(found))
    assert states(again) == ["new", "new"]
    assert again["a"].stats().max_size == 7
    assert type(again) is Pools


@pytest.mark.parametrize(
    "mapping",
    [
        {"a": {"host": "x"}, "b": {"max_size": 4}},
        {"max_size": 4, "a": {"host": "x", "max_size": 10}, "b": {}},
        {"a": PoolConfig(conninfo="host=x"), "b": PoolConfig(max_size=4, name="own")},
        {"max_size": 4, "a": PoolConfig(conninfo="host=x"), "b": {}},
    ],
)
def test_a_mapping_of_mappings_or_options_is_many_databases(mapping: dict[str, Any]) -> None:
    pools = Pools.from_mapping(mapping)
    assert {name: pool.stats().max_size for name, pool in pools.items()} == {"a": 10, "b": 4}


def test_nothing_is_made_if_one_of_them_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "db.ini"
    path.write_text("[a]\nhost = x\n[b]\nmaxsize = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'maxsize' of pool 'b'.*db\.ini:4: did you mean"):
        Pools.from_file(path)
    assert list(Pools.from_file(path, "a")) == ["a"]
    with pytest.raises(ConfigError, match="no section 'c'"):
        Pools.from_file(path, "a", "c")
    with pytest.raises(DriverNotFoundError):
        Pools({"a": PoolConfig(), "b": PoolConfig(driver="none of them")})


def test_the_environment_may_have_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_ORDERS__HOST", "a")
    monkeypatch.setenv("SHOP_HOST", "b")
    pools = Pools.from_env("SHOP_")
    assert sorted(pools) == ["default", "orders"]
    assert pools.default is pools["default"]


def test_their_repr_says_how_each_is(pools: Pools) -> None:
    assert repr(pools).startswith("<Pools {'orders': <ConnectionPool 'orders' new: 0 idle")
