"""What `pool.execute()` answers: rows that hold no connection.

It must not know: pools, drivers. The rows are already here; nothing in this file can block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Result:
    """The answer to one statement, read to the end, the same over every driver.

    Iterating, `fetchone`, `fetchmany` and `fetchall` share one position, as in a DB-API cursor
    (PEP 249). Fetching from a statement that returns no rows raises `TypeError`.

    Attributes:
        rowcount: rows returned or changed, -1 if the server did not say.
        description: the columns as the driver describes them; None if there are no rows to fetch.
        statusmessage: the server's command tag ("UPDATE 3"), or None if the driver hides it.
    """

    __slots__ = ("_position", "_rows", "description", "rowcount", "statusmessage")

    def __init__(
        self,
        rows: Sequence[Any] | None,
        *,
        rowcount: int = -1,
        description: Any = None,
        statusmessage: str | None = None,
    ) -> None:
        self._rows = rows
        self._position = 0
        self.rowcount = rowcount
        self.description = description
        self.statusmessage = statusmessage

    def _all(self) -> Sequence[Any]:
        if self._rows is None:
            tag = self.statusmessage or "the statement"
            raise TypeError(f"{tag} returns no rows; look at rowcount instead")
        return self._rows

    def fetchone(self) -> Any | None:
        """Give the next row, or None after the last."""
        rows = self._all()
        if self._position >= len(rows):
            return None
        self._position += 1
        return rows[self._position - 1]

    def fetchmany(self, size: int = 1) -> list[Any]:
        """Give the next `size` rows, fewer at the end."""
        rows = self._all()[self._position : self._position + size]
        self._position += len(rows)
        return list(rows)

    def fetchall(self) -> list[Any]:
        """Give all rows from here on."""
        rows = self._all()[self._position :]
        self._position += len(rows)
        return list(rows)

    def __iter__(self) -> Iterator[Any]:
        self._all()
        return iter(self.fetchone, None)

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<Result {self.statusmessage or ''}: {len(self)} rows>"
