"""Many named asyncio pools from one configuration: as `Pools`, with awaits."""

from __future__ import annotations

import asyncio

import pytest

from penstock import AsyncPools, ConfigError, MisuseError, PoolConfig, ServerUnavailable
from penstock.testing import AsyncFakeDriver, FakeServer, Mode


def configs(*servers: FakeServer) -> dict[str, PoolConfig]:
    return {
        name: PoolConfig(driver=AsyncFakeDriver(server))
        for name, server in zip(("orders", "stock"), servers, strict=True)
    }


def test_several_databases_are_opened_used_and_closed_together():
    with FakeServer() as one, FakeServer() as two:

        async def scenario():
            async with AsyncPools(configs(one, two)) as pools:
                assert list(pools) == ["orders", "stock"]
                assert pools["stock"].name == "stock"
                async with pools["stock"].connection() as conn:
                    await conn.execute("select 1")
                assert {name: stats.borrows for name, stats in pools.stats().items()} == {
                    "orders": 0,
                    "stock": 1,
                }
                assert all(pools.health().values())
                assert repr(pools).startswith(
                    "<AsyncPools {'orders': <AsyncConnectionPool 'orders'"
                )
            assert pools["orders"].closed
            assert pools["stock"].closed

        asyncio.run(scenario())
        assert not one.sessions
        assert not two.sessions


def test_if_one_cannot_be_opened_the_others_are_closed_again():
    with FakeServer() as one, FakeServer() as two:
        two.mode = Mode.WRONG_PASSWORD

        async def scenario():
            pools = AsyncPools(configs(one, two))
            with pytest.raises(ServerUnavailable, match="password authentication failed"):
                await pools.open(wait=True)
            assert not pools["orders"].opened

        asyncio.run(scenario())
        assert not one.sessions


def test_all_are_closed_also_when_one_of_them_raises():
    with FakeServer() as one, FakeServer() as two:
        pools = AsyncPools(configs(one, two))

        async def open_one():
            await pools["orders"].open(wait=True)
            # Its loop goes on in this function's, so that closing it elsewhere is misuse.
            return asyncio.get_running_loop()

        async def close_all():
            await pools["stock"].open(wait=True)
            with pytest.raises(MisuseError, match="another event loop"):
                await pools.close()
            assert pools["stock"].closed

        first = asyncio.new_event_loop()
        try:
            first.run_until_complete(open_one())
            asyncio.run(close_all())
            first.run_until_complete(pools.close())
        finally:
            first.close()
        assert not one.sessions


def test_a_file_of_databases_is_read_as_for_pools(tmp_path):
    path = tmp_path / "db.ini"
    path.write_text(
        "[orders]\nurl = postgresql://app@db/orders\n[stock]\nurl = postgresql://db/s\n"
    )
    pytest.importorskip("psycopg", reason="needs psycopg")
    pools = AsyncPools.from_file(path)
    assert list(pools) == ["orders", "stock"]
    path.write_text("[orders]\nmax_sise = 3\n")
    with pytest.raises(ConfigError, match="max_sise"):
        AsyncPools.from_file(path)


def test_closing_without_waiting_warns_of_nothing_when_nothing_is_lent(caplog):
    with FakeServer() as server:

        async def scenario():
            pools = AsyncPools({"orders": PoolConfig(driver=AsyncFakeDriver(server))})
            await pools["orders"].execute("select 1")
            await pools.close(timeout=0)
            assert pools["orders"].closed

        asyncio.run(scenario())
        assert not caplog.records
        assert not server.sessions
