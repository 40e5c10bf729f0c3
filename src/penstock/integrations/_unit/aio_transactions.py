"""Begin, commit, roll back and ask, on either of the two shapes that asyncio's drivers have.

One job: to be the same for psycopg's shape, which begins by itself and has `commit()` and
`rollback()`, and for asyncpg's, whose transactions are objects and which is in autocommit without one.

It must not know: pools, units of work, when any of this is due. No lock: one connection, one loop.
"""

from __future__ import annotations

from typing import Any

from penstock.drivers import Activity


class PsycopgShape:
    """A connection that begins by itself, and has `commit()` and `rollback()`."""

    def __init__(self, conn: Any) -> None:
        self._conn = conn

    def loses_nothing(self) -> bool:
        """Whether nothing is lost with the session, which has ended."""
        closed_by_user = not getattr(self._conn, "broken", True)
        return closed_by_user or bool(self._conn.autocommit)

    def wants_begin(self, activity: Activity) -> bool:  # noqa: ARG002  the other shape's needs it
        """Whether `begin` is due: never, the first statement does it."""
        return False

    async def begin(self) -> None:
        """Nothing to do."""

    async def commit(self) -> bool:
        """Commit. Raises the driver's errors."""
        await self._conn.commit()
        return True

    async def roll_back(self) -> None:
        """Roll back. Raises the driver's errors."""
        await self._conn.rollback()

    async def count(self, query: str) -> int:
        """How many rows a query gives."""
        return int((await self._conn.execute(query, prepare=False)).rowcount)

    async def roll_back_asking(self, query: str) -> bool:
        """Whether a query gives a row, and roll back: in one message, as dear as the rollback alone."""
        return bool(await self.count(f"{query}; rollback"))


class AsyncpgShape:
    """A connection whose transactions are objects, and that is in autocommit without one."""

    def __init__(self, conn: Any, *, begins: bool) -> None:
        self._conn = conn
        self._begins = begins
        self._transaction: Any = None

    def loses_nothing(self) -> bool:
        """Whether nothing is lost with the session, which has ended."""
        return self._transaction is None

    def wants_begin(self, activity: Activity) -> bool:
        """Whether a transaction is due and none is open."""
        return self._begins and self._transaction is None and activity is Activity.IDLE

    async def begin(self) -> None:
        """Open a transaction. Raises the driver's errors."""
        transaction = self._conn.transaction()
        await transaction.start()
        self._transaction = transaction

    async def commit(self) -> bool:
        """Commit what `begin` opened; False: it had failed. Raises the driver's errors.

        By SQL, since the transaction's own method does not tell what the server answers.
        """
        if self._transaction is None:
            return True
        self._transaction = self._conn._top_xact = None  # noqa: SLF001  as the method does
        return bool(await self._conn.execute("COMMIT") != "ROLLBACK")

    async def roll_back(self) -> None:
        """Roll back what `begin` opened. Raises the driver's errors."""
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            await transaction.rollback()

    async def count(self, query: str) -> int:
        """How many rows a query gives."""
        return len(await self._conn.fetch(query))

    async def roll_back_asking(self, query: str) -> bool:
        """Whether a query gives a row, and roll back."""
        found = bool(await self.count(query))
        await self.roll_back()
        return found
