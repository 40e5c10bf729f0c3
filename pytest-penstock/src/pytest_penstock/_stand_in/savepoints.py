"""Transactions that are savepoints of one session: which are open, and what ending one takes.

One job: decide. The session is inside one transaction that is never committed; what a client takes
for a transaction of its own is a savepoint in it, and savepoints are a stack. This says which SQL
begins and ends one, also where they end in another order than they began.

It must not know: wires, clients, threads, time. It takes no lock: whoever has the session's turn
has the stack, too.

The rules:

* transactions of different owners are never open at the same time (`may_begin`);
* those of one owner are stacked. A lower one that commits is only marked: its savepoint goes when
  nothing is open above it;
* undoing one undoes what was done above it and inside it. Where that is somebody else's work, who
  is still there is `doomed` (his next statement says so), and who has committed is counted `lost`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Hashable

# What the server does at a commit of its own: it checks deferred constraints, has them deferred
# again as they were declared, and closes cursors. A check that fails rolls back.
_CHECK: Final = b"set constraints all immediate"
_SET_BACK: Final = b"""do $penstock$
declare name text;
begin
  if exists (select from pg_catalog.pg_constraint where condeferrable) then
    set constraints all deferred;
    foreach name in array array(
      select pg_catalog.format('%I.%I', nspname, conname) from pg_catalog.pg_constraint
        join pg_catalog.pg_namespace n on n.oid = connamespace
       where condeferrable and not condeferred)
    loop execute 'set constraints ' || name || ' immediate'; end loop;
  end if;
end $penstock$"""
_CLOSE_CURSORS: Final = b"""do $penstock$
declare name text;
begin
  foreach name in array array(select c.name from pg_catalog.pg_cursors c where not is_holdable)
  loop execute 'close ' || pg_catalog.quote_ident(name); end loop;
end $penstock$"""

#: Commands that change nothing which a rollback would have to undo.
_LOOKS: Final = frozenset((b"SELECT", b"SHOW", b"FETCH", b"MOVE", b"DECLARE", b"CLOSE", b"EXPLAIN"))

#: The savepoint that is made before a transaction becomes read-only. Inside of a transaction there
#: is no other way back to where others may write.
READ_ONLY: Final = b"penstock read only"


@dataclass(eq=False, slots=True)
class Transaction:
    """What one client takes for a transaction.

    Attributes:
        owner: whose it is; None: of somebody whom nobody knows, who has the session to himself.
        savepoint: the name of what it really is.
        implicit: it lasts for one query, as the server's own without BEGIN.
        names: the client's own savepoints in it, oldest first, and READ_ONLY among them.
        local: what settings were before it set them for itself: name and value.
        failed: a statement failed, and the client has not rolled back yet.
        wrote: it may have changed something.
        ended: it was committed while another one was open above it.
        doomed: why its work is gone, though nobody rolled it back.
        guests: transactions further down that changed something while this one was above them.
        inner: how many others were committed inside it.
    """

    owner: Hashable | None
    savepoint: bytes
    implicit: bool = False
    names: list[bytes] = field(default_factory=list)
    local: dict[bytes, bytes] = field(default_factory=dict)
    failed: bool = False
    wrote: bool = False
    ended: bool = False
    doomed: str = ""
    guests: set[Transaction] = field(default_factory=set)
    inner: int = 0

    @property
    def resort(self) -> bytes:
        """Where a failed statement is to be rolled back to: the client may go on from there."""
        return _quoted(self.names[-1]) if self.names else self.savepoint


class Stack:
    """The transactions that are open in a session, oldest first."""

    def __init__(self) -> None:
        self.open: list[Transaction] = []
        #: Commits that a rollback has undone since somebody asked last.
        self.lost = 0
        self._numbers = itertools.count(1)

    def may_begin(self, owner: Hashable | None) -> bool:
        """Whether a transaction of this owner may begin now; else it has to wait for `blocker`."""
        return owner is None or self.blocker(owner) is None

    def blocker(self, owner: Hashable | None) -> Transaction | None:
        """The latest transaction that keeps this owner from beginning one."""
        return next((one for one in reversed(self.open) if one.owner != owner), None)

    def begin(
        self, owner: Hashable | None, *, implicit: bool = False, read_only: bool = False
    ) -> tuple[Transaction, bytes]:
        """A new transaction, on top, and the SQL that makes it so."""
        writable = self._writable(self.open[-1]) if self.open else []
        made = Transaction(owner, b"penstock_%d" % next(self._numbers), implicit=implicit)
        self.open.append(made)
        if read_only:
            made.names.append(READ_ONLY)
        return made, b"; ".join([*writable, *_begin(made)])

    def make_read_only(self, one: Transaction) -> bytes:
        """The SQL that lets it look only, until it ends or rolls back to an earlier savepoint.

        Empty where it is so already, or where others have begun since, and would be as well.
        """
        if READ_ONLY in one.names or one is not self.open[-1]:
            return b""
        one.names.append(READ_ONLY)
        return _made(READ_ONLY)

    def _writable(self, one: Transaction) -> list[bytes]:
        """Have one that is read-only be so no more: what begins above it may write."""
        if READ_ONLY not in one.names:
            return []
        at = one.names.index(READ_ONLY)
        one.names.remove(READ_ONLY)
        quoted = _quoted(READ_ONLY)
        sql = [b"rollback to savepoint " + quoted, b"release savepoint " + quoted]
        return sql + [_made(name) for name in one.names[at:]]

    def heard(self, one: Transaction, tag: bytes) -> None:
        """A command of this transaction was done; `tag` is what the server calls it."""
        if tag.split(b" ")[0] in _LOOKS:
            return
        one.wrote = True
        for above in self.open[self.open.index(one) + 1 :]:
            above.guests.add(one)

    def check(self, one: Transaction) -> bytes:
        """The SQL that fails where a commit would fail, and ends what a commit ends."""
        restored = b"".join(
            b"; select pg_catalog.set_config(%b, %b, true)" % (_literal(name), _literal(value))
            for name, value in one.local.items()
        )
        # Of several, whose cursor is whose cannot be told: the last one closes all.
        closing = b"; " + _CLOSE_CURSORS if self.open == [one] else b""
        writable = [sql + b"; " for sql in self._writable(one)] if one is self.open[-1] else []
        return b"".join(writable) + _CHECK + b"; " + _SET_BACK + closing + restored

    def commit(self, one: Transaction) -> bytes:
        """The SQL that commits it after `check`; empty where there is nothing to do yet."""
        for below in self.open[: self.open.index(one)]:
            below.inner += one.wrote and not one.implicit
        one.ended = True
        return b"; ".join(self._let_go_of_ended())

    def roll_back(self, one: Transaction) -> bytes:
        """The SQL that rolls it back, and none of what is not its own where that is possible."""
        above = self.open[self.open.index(one) + 1 :]
        if not one.wrote and not above and one.guests:
            # It has only looked, and somebody further down has worked meanwhile.
            one.ended = True
            return b"; ".join(self._let_go_of_ended())
        return self._cut(one)

    def _cut(self, one: Transaction) -> bytes:
        index = self.open.index(one)
        above = self.open[index + 1 :]
        why = "a ROLLBACK on another connection of the same thread has undone what it did"
        self.lost += one.inner + sum(other.ended and other.wrote for other in above)
        for other in {*above, *one.guests}:
            if other.wrote and other in self.open:
                other.doomed, other.failed = why, True
        del self.open[index:]
        sql = [b"rollback to savepoint " + one.savepoint, b"release savepoint " + one.savepoint]
        sql += self._let_go_of_ended()
        for other in above:
            if not other.ended:
                self.open.append(other)
                sql += _begin(other)
        return b"; ".join(sql)

    def _let_go_of_ended(self) -> list[bytes]:
        sql: list[bytes] = []
        while self.open and self.open[-1].ended:
            one = self.open.pop()
            sql += [*self._writable(one), b"release savepoint " + one.savepoint]
        return sql

    def name(self, one: Transaction, name: bytes) -> None:
        """The client has made a savepoint."""
        one.names.append(name)

    def forget(self, one: Transaction, name: bytes, *, keep: bool) -> None:
        """The client has released a savepoint, or (`keep`) rolled back to it."""
        if name in one.names:
            last = len(one.names) - one.names[::-1].index(name)
            del one.names[last if keep else last - 1 :]


def _begin(one: Transaction) -> list[bytes]:
    return [b"savepoint " + one.savepoint, *map(_made, one.names)]


def _made(name: bytes) -> bytes:
    sql = b"savepoint " + _quoted(name)
    return sql + b"; set transaction read only" if name == READ_ONLY else sql


def _quoted(name: bytes) -> bytes:
    return b'"' + name.replace(b'"', b'""') + b'"'


def _literal(value: bytes) -> bytes:
    quoted = value.replace(b"'", b"''")
    return (
        b" E'" + quoted.replace(b"\\", b"\\\\") + b"'" if b"\\" in value else b"'" + quoted + b"'"
    )
