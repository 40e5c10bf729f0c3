"""A KeyboardInterrupt or SystemExit in the middle of an asyncio pool's connect ends the loop, as in any task."""

from __future__ import annotations

import asyncio

import pytest

from penstock import AsyncConnectionPool


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_it_is_not_swallowed_by_the_pools_own_task(ends):
    def words():
        raise ends

    async def main():
        async with AsyncConnectionPool(kwargs=words, min_size=0, timeout=30, name="ends") as pool:
            await pool.getconn()

    with pytest.raises(ends):
        asyncio.run(main())
