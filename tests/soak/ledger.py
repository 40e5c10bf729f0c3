"""What clients asked for and were told, against the rows that the server has.

Its one job: say what is lost, torn, there twice, there although it failed, or nobody's. A piece of work has a key
and a number of parts, one row each. There is no unique key in the table on purpose: it would hide a replay.

It must not know: pools, servers, who asks. No lock: each key is written by who made it, by single
operations on a dict.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: What somebody knows about his work. Until more is noted it is unknown: an interrupt can strike anywhere.
UNKNOWN, DONE, NEVER = "unknown", "done", "never"

#: Parts of a piece of work that is one statement, and of one that is a transaction.
ALONE: Final = ("alone",)
BOTH: Final = ("debit", "credit")


@dataclass
class Entry:
    """One piece of work: the rows that it writes, and what its borrower was told."""

    parts: tuple[str, ...]
    known: str = UNKNOWN


class Journal:
    """The clients' side, of one step."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.entries: dict[str, Entry] = {}
        self._numbers = itertools.count(1)

    def ask(self, parts: tuple[str, ...]) -> str:
        """A new piece of work, unknown until it is noted; its key says who asks, from which process."""
        key = f"{self.who}.{os.getpid()}.{next(self._numbers)}"
        self.entries[key] = Entry(parts)
        return key

    def note(self, key: str, known: str) -> None:
        self.entries[key].known = known

    def heard_of(self, keys: Iterable[str], known: str) -> None:
        """Work of a forked child, each in one statement."""
        self.entries.update({key: Entry(ALONE, known) for key in keys})

    def count(self, known: str) -> int:
        return sum(entry.known == known for entry in self.entries.values())


@dataclass
class Differences:
    """What does not agree, by key; empty when all does.

    Attributes:
        lost: acknowledged, and not (all of it) there.
        torn: some of the parts are there.
        twice: a part is there more than once.
        undead: it failed before its commit was sent, and is there.
        unasked: nobody asked for it.
        imbalance: the sum of all accounts, which transactions leave at 0.
    """

    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    undead: list[str] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)
    imbalance: int = 0

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        told = [
            f"{len(found)} {kind} ({', '.join(found[:5])})"
            for kind, found in vars(self).items()
            if isinstance(found, list) and found
        ]
        if self.imbalance:
            told.append(f"accounts are off by {self.imbalance}")
        return "; ".join(told) or "all agrees"


def compare(
    entries: Mapping[str, Entry], rows: Iterable[tuple[str, str]], imbalance: int = 0
) -> Differences:
    """The journal's entries against the table's rows (key, part)."""
    there: dict[str, Counter[str]] = {}
    for key, part in rows:
        there.setdefault(key, Counter())[part] += 1
    found = Differences(imbalance=imbalance, unasked=sorted(there.keys() - entries.keys()))
    for key, entry in entries.items():
        parts = there.get(key, Counter())
        whole = set(parts) == set(entry.parts)
        if entry.known == DONE and not whole:
            found.lost.append(key)
        if parts and not whole:
            found.torn.append(key)
        if any(times > 1 for times in parts.values()):
            found.twice.append(key)
        if entry.known == NEVER and parts:
            found.undead.append(key)
    return found
