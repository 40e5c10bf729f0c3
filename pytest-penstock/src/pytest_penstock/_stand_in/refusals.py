"""What a stand-in says when it does not do what it was asked: the words, and nothing else.

One job: texts of errors, as messages. It must not know: sessions, dialogs, turns. It takes no lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_penstock._stand_in import messages as say

if TYPE_CHECKING:
    from pytest_penstock._stand_in.messages import Message

HINT: Final = (
    "This pool is inside pytest_penstock.undone(): everything is one transaction, "
    "which the test rolls back. See docs/testing.md."
)
_NOT_IN_HERE: Final = b"25001"  # "cannot run inside a transaction block"
_LONGEST: Final = 80


class Refused(Exception):  # noqa: N818  it says what happened
    """The client is answered with this error, and the rest of its request is not done."""

    def __init__(self, error: bytes) -> None:
        super().__init__()
        self.error = error


def not_in_time(seconds: float, holder: str, waiter: str, *, busy: bool) -> bytes:
    """The session was not free in time.

    Args:
        seconds: how long it was waited for.
        holder: who has it; empty: nobody knows.
        waiter: who waited.
        busy: the holder has a statement under way, not only a transaction open.
    """
    what = "a statement under way" if busy else "a transaction open"
    return say.report(
        "55P03",
        f"waited {seconds:g} s for the one session of this test: another borrower has {what}",
        detail=f"It is held by {holder or 'somebody who is gone by now'}. This one: {waiter}.",
        hint="In a test all threads share one session, and their transactions come one after the "
        "other: commit or roll back there before another thread needs the database.",
    )


def explained(error: Message) -> bytes:
    """The server's error, with a hint where it is the test's transaction that is in the way."""
    inside = say.fields_of(error.body).get("C") == _NOT_IN_HERE
    return say.with_hint(error, HINT) if inside else error.raw


def shown(sql: bytes) -> str:
    """A statement as errors quote it: one line, not too long."""
    line = " ".join(sql.decode(errors="replace").split())
    return repr(line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "...")
