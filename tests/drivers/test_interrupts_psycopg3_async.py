"""A signal's exception leaves the block of an asyncio pool over psycopg 3: what psycopg holds is not lent on.

One job: psycopg's own lock of a connection, which an interrupt at the end of its `async with` leaves held.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from penstock import AsyncConnectionPool

#: Whoever waits so long, in seconds, was forgotten.
PATIENCE = 5.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_connection_whose_lock_a_signals_exception_left_held_is_not_lent_again(server, error):
    async def scenario():
        async with AsyncConnectionPool(server.conninfo(over="unix"), max_size=1) as pool:
            with contextlib.suppress(error):
                async with pool.connection() as conn:
                    # As psycopg's own `async with` does, before it is struck at its end.
                    await conn.lock.acquire()
                    raise error
            async with asyncio.timeout(PATIENCE):
                assert (await pool.execute("select 1")).fetchone() == (1,)
            assert pool.stats().closed == {"unclean": 1}

    asyncio.run(scenario())
