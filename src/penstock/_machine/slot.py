"""A slot: one of `max_size` rights to a server connection, and every move that it may make.

One job: say what a slot is, which states it has, and which move leads from which state to which
(`LEGAL_MOVES`; the diagram in docs/design.md is drawn from this table).

It must not know: drivers, threads, clocks. The link in a slot is an opaque object here.

Ownership. *A slot is in exactly one place — the idle deque, the aside deque, one waiter, one lease,
or one order in flight — and whoever took it out owns it.* Only the owner writes to a slot, without
any lock, with one exception: anybody may condemn one (see `Slot.condemn`).

These places hold the *only* strong references. The pool itself keeps a `SlotRef`, a weak reference
that carries the link: if an interrupt strikes between taking a slot out of one place and storing it
in another, nobody holds it, Python frees it, and the reference's callback tells the keeper, which
brings the right to a connection home (`Machine.bring_home`). The callback must be a C function:
a finalizer written in Python could itself be interrupted, and the slot would be lost for good
(research: 6 to 7 of 17 to 23 interrupt points).
"""

from __future__ import annotations

import weakref
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from .progress import Progress


class SlotState(Enum):
    """Where a slot is in its life."""

    OPENING = "opening"
    IDLE = "idle"
    IN_USE = "in use"
    PINGING = "pinging"
    CLOSING = "closing"
    GONE = "gone"


class Reason(Enum):
    """Why a connection is closed."""

    RETIRED = "retired"  # older than max_lifetime
    SHRUNK = "shrunk"  # unused for longer than max_idle
    DRAINED = "drained"  # of an older generation
    SURPLUS = "surplus"  # resize() left no room for it
    HUNG_UP = "hung up"  # the watcher was told of its end
    BROKEN = "broken"  # its borrower gave it back unusable, or closed it
    UNCLEAN = "unclean"  # could not be brought back to a clean state
    UNANSWERED = "ping unanswered"
    LATE = "late"  # it came after its right had been taken back
    ORPHANED = "orphaned"  # its lease was dropped, by an interrupt or without being given back
    POOL_CLOSED = "pool closed"


class Move(Enum):
    """What can happen to a slot."""

    OPENED = "opened"
    OPEN_FAILED = "open failed"
    TAKE = "take"
    PUT = "put"
    HAND_OVER = "hand over"
    DOUBT = "doubt"
    PINGED = "pinged"
    SPARE = "spare"
    END = "end"
    CLOSED = "closed"


#: Every legal move. A pair that is not here is a bug in penstock: `Slot.move` refuses it.
LEGAL_MOVES: Final[dict[tuple[SlotState, Move], SlotState]] = {
    (SlotState.OPENING, Move.OPENED): SlotState.IDLE,
    (SlotState.OPENING, Move.OPEN_FAILED): SlotState.GONE,
    (SlotState.IDLE, Move.TAKE): SlotState.IN_USE,
    (SlotState.IDLE, Move.DOUBT): SlotState.PINGING,
    (SlotState.IDLE, Move.END): SlotState.CLOSING,
    (SlotState.IN_USE, Move.PUT): SlotState.IDLE,
    (SlotState.IN_USE, Move.HAND_OVER): SlotState.IN_USE,
    (SlotState.IN_USE, Move.DOUBT): SlotState.PINGING,  # given back with a reset under way
    (SlotState.IN_USE, Move.END): SlotState.CLOSING,
    (SlotState.PINGING, Move.PINGED): SlotState.IN_USE,
    (SlotState.PINGING, Move.SPARE): SlotState.IDLE,  # its waiter left before the ping was sent
    (SlotState.PINGING, Move.END): SlotState.CLOSING,
    (SlotState.CLOSING, Move.CLOSED): SlotState.GONE,
}

#: An epoch that no machine ever has: a slot that carries it is never lent without a second look.
CONDEMNED_EPOCH: Final = -1


class Slot:
    """One right to a server connection; the connection in it is replaced with the slot.

    Attributes:
        state: where it is in its life.
        link: the driver's link; None while opening.
        epoch: the machine's epoch when the slot was last known to be good. One comparison with the
            machine's covers drain, fork, close, suspicion and condemnation on the hot path.
        generation: the machine's generation when the slot was made; an older one is never lent.
        condemned: why it must be closed as soon as somebody looks; None for nearly all.
        opened_at: when its connection was opened.
        retire_at: when it becomes too old to be lent.
        asked_at: when it was given to somebody who has to ping it first.
        borrowed_at: when it was last lent. A lower bound of when it was last used: reading the
            clock at the return as well would cost 15 % of borrow and return.
        holder: who has it (a thread's identity, a task), for reports and for self-deadlock.
        loose: lent by getconn(): whoever took it need not be who gives it back.
        place: where it was borrowed: `borrowed_at` (older: of an earlier borrow), file and line; None where
            the way in does not note it.
        told: its being overdue has been reported.
        reset_pending: a session reset was sent and its answer not read yet.
        outdated: what its driver has prepared may be of an older schema; whoever is given the slot has it
            forgotten first, as part of the ping.
        brief: it is being opened beside others that are not answered: with little time.
        progress: how far its opening has come; None once it is open.
        ref: the pool's weak reference to this slot; None once the pool has let go of it.
    """

    __slots__ = (
        "__weakref__",
        "asked_at",
        "borrowed_at",
        "brief",
        "condemned",
        "epoch",
        "generation",
        "holder",
        "link",
        "loose",
        "opened_at",
        "outdated",
        "place",
        "progress",
        "ref",
        "reset_pending",
        "retire_at",
        "state",
        "told",
    )

    def __init__(self, *, generation: int, epoch: int, now: float) -> None:
        self.state = SlotState.OPENING
        self.link: Any = None
        self.epoch = epoch
        self.generation = generation
        self.condemned: Reason | None = None
        self.opened_at = now
        self.asked_at = now
        self.retire_at = float("inf")
        self.borrowed_at = now
        self.holder: int = 0
        self.loose = False
        self.place: tuple[float, str, int] | None = None
        self.told = False
        self.reset_pending = False
        self.outdated = False
        self.brief = False
        self.progress: Progress | None = None
        self.ref: SlotRef | None = None

    def move(self, move: Move) -> None:
        """Make a move of the table; an illegal one raises and changes nothing."""
        target = LEGAL_MOVES.get((self.state, move))
        if target is None:
            message = f"bug in penstock: a slot that is {self.state.value} cannot {move.value}"
            raise AssertionError(message)
        self.state = target

    def condemn(self, reason: Reason) -> None:
        """Say that this slot must be closed. Anybody may, at any time, without a lock.

        The order counts: `condemned` first, the epoch second. The owner who declares a slot good
        (`vouch`) writes the epoch first and looks at `condemned` second, so one of the two sees
        the other, whoever comes first.
        """
        self.condemned = reason
        self.epoch = CONDEMNED_EPOCH

    def vouch(self, epoch: int) -> None:
        """Declare the slot good as of `epoch`; only its owner does."""
        self.epoch = epoch
        if self.condemned is not None:
            self.epoch = CONDEMNED_EPOCH

    def __repr__(self) -> str:
        return f"<Slot {self.state.value}>"


class SlotRef(weakref.ref[Slot]):
    """The pool's own, weak reference to a slot; it carries what outlives the slot.

    Attributes:
        serial: the key in the machine's table of slots.
        link: the driver's link, so that a freed slot's connection can be closed.
        borrows: how often the slot was lent and given back. Its owner writes, nobody locks.
        home: whatever the runtime needs to find the pool again.
        watched: the runtime's number for its watch over the link's descriptor; 0: not watched.
    """

    __slots__ = ("borrows", "home", "link", "serial", "watched")

    serial: int
    link: Any
    borrows: int
    home: Any
    watched: int


def refer_to(
    slot: Slot, serial: int, orphans: Callable[[SlotRef], object], home: object
) -> SlotRef:
    """Make the pool's reference to `slot`; `orphans` must be a C function (see the module)."""
    ref = SlotRef(slot, orphans)
    ref.serial = serial
    ref.link = slot.link
    ref.borrows = 0
    ref.home = home
    ref.watched = 0
    slot.ref = ref
    return ref
