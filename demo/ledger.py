"""Does the money add up? What was asked and acknowledged, against what the tables say.

The four sums of TPC-B (accounts, tellers, branches, history) must be equal, each acknowledged transfer
must be in the history exactly once, and one that was not acknowledged at most once. The history has
no unique key on purpose: a key would hide a replay instead of showing it.

It must not know who asked, over which pool, or what was done to the server meanwhile.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Transfer(NamedTuple):
    """One TPC-B transfer; its id (22 characters) goes into the history's filler."""

    id: str
    aid: int
    tid: int
    bid: int
    delta: int


class Ledger:
    """What the clients asked for and what they were told; safe to write from many threads."""

    def __init__(self) -> None:
        # Single dict and set operations are atomic; a lock would only slow the load down.
        self.asked: dict[str, Transfer] = {}
        self.acknowledged: set[str] = set()

    def ask(self, transfer: Transfer) -> None:
        """Note a transfer that is about to be sent."""
        self.asked[transfer.id] = transfer

    def acknowledge(self, transfer: Transfer) -> None:
        """Note that the service said it was done."""
        self.acknowledged.add(transfer.id)


@dataclass(frozen=True, slots=True)
class Books:
    """The tables at one moment: the four sums, and each line of the history."""

    accounts: int
    tellers: int
    branches: int
    history: int
    lines: tuple[Transfer, ...]


SUMS = """
select (select coalesce(sum(abalance), 0) from pgbench_accounts),
       (select coalesce(sum(tbalance), 0) from pgbench_tellers),
       (select coalesce(sum(bbalance), 0) from pgbench_branches),
       (select coalesce(sum(delta), 0) from pgbench_history)
"""


def read_books(conninfo: str) -> Books:
    """Read the tables in one snapshot, so that transfers still under way cannot tear the sums."""
    with psycopg.connect(conninfo) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        sums = conn.execute(SUMS).fetchone()
        assert sums is not None
        lines = conn.execute("select filler, aid, tid, bid, delta from pgbench_history").fetchall()
    accounts, tellers, branches, history = (int(each) for each in sums)
    return Books(accounts, tellers, branches, history, tuple(_transfers(lines)))


def _transfers(lines: Iterable[tuple[str | None, int, int, int, int]]) -> Iterable[Transfer]:
    for filler, aid, tid, bid, delta in lines:
        yield Transfer(filler or "", aid, tid, bid, delta)


@dataclass(frozen=True, slots=True)
class Findings:
    """What does not agree; empty sets and zeros when all does.

    Attributes:
        missing: acknowledged, but not in the history.
        repeated: in the history more than once, acknowledged or not.
        altered: in the history with other figures than were asked.
        unknown: in the history, but nobody asked for it.
        imbalance: accounts, tellers and branches, each less the history's sum.
        acknowledged: of those looked at, the ids that were acknowledged.
    """

    missing: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()
    altered: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    imbalance: tuple[int, int, int] = (0, 0, 0)
    acknowledged: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def lost(self) -> int:
        """How many transfers were acknowledged, but are not there exactly once as asked."""
        return len(self.missing | ((self.repeated | self.altered) & self.acknowledged))

    @property
    def adds_up(self) -> bool:
        """Whether the four sums agree and nothing is there that was not asked for, once."""
        return self.imbalance == (0, 0, 0) and not (self.repeated | self.altered | self.unknown)

    def since(self, earlier: Findings) -> Findings:
        """What has come to light after `earlier`: an act answers for its own faults only."""
        accounts, tellers, branches = self.imbalance
        before = earlier.imbalance
        return Findings(
            missing=self.missing - earlier.missing,
            repeated=self.repeated - earlier.repeated,
            altered=self.altered - earlier.altered,
            unknown=self.unknown - earlier.unknown,
            imbalance=(accounts - before[0], tellers - before[1], branches - before[2]),
            acknowledged=self.acknowledged,
        )

    def describe(self) -> str:
        """One short line for people."""
        faults = {
            "missing": self.missing,
            "repeated": self.repeated,
            "altered": self.altered,
            "unknown": self.unknown,
        }
        said = [f"{len(ids)} {word}" for word, ids in faults.items() if ids]
        for table, gap in zip(("accounts", "tellers", "branches"), self.imbalance, strict=True):
            if gap:
                said.append(f"{table} off by {gap:+,}")
        return ", ".join(said) or "adds up"


def audit(asked: Mapping[str, Transfer], acknowledged: Iterable[str], books: Books) -> Findings:
    """Compare everything asked and acknowledged so far with the books."""
    times = Counter(line.id for line in books.lines)
    told = frozenset(acknowledged)
    return Findings(
        missing=frozenset(told - times.keys()),
        repeated=frozenset(each for each, count in times.items() if count > 1),
        altered=frozenset(line.id for line in books.lines if asked.get(line.id, line) != line),
        unknown=frozenset(times.keys() - asked.keys()),
        imbalance=(
            books.accounts - books.history,
            books.tellers - books.history,
            books.branches - books.history,
        ),
        acknowledged=told,
    )
