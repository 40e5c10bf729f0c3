"""What an act allows, and whether what came of it is within that.

A failure is allowed only by what was done to it: the request held a connection when the act ended that
connection's session; each ended session excuses one request. That is looked up for every single
failure (which server process, lent when, gone when), not estimated. It must not know pools: all are
judged alike.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from demo.load import Outcome, Tally, Trouble

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from demo.ledger import Findings

# A pool hears of a session's end as soon as one of its threads gets a core, which the load keeps busy,
# and then the interpreter, which another thread may keep for a switch interval (5 ms). Seen for penstock
# on two cores: before the end or up to 11 ms after it; 36 ms with five times as much to run as there were
# cores; 75 ms with four times, which is why workers say how long their own threads waited for a turn. A pool
# that does not listen is caught in the idle act, which leaves all workers time to hear.
NOTICE = 0.05


@dataclass(frozen=True, slots=True)
class Permit:
    """What an act did, as far as it excuses failures.

    Attributes:
        over_at: when the disturbance was over; from then on the service has to serve.
        gone: the sessions that were ended (server pid), and when they were seen to be gone.
        all_gone_at: when every session there was had gone; None if only those in `gone` ended.
        notice: how long after its end a session may still have been lent.
        killed_worker: the worker that was killed.
        note: the figures behind it, for people.
    """

    over_at: float
    gone: Mapping[int, float] = field(default_factory=dict)
    all_gone_at: float | None = None
    notice: float = NOTICE
    killed_worker: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class ActResult:
    """One act, done and judged."""

    title: str
    preload: bool
    seconds: float
    tally: Tally
    findings: Findings
    note: str
    silence: float
    latest_lend: float | None
    complaints: tuple[str, ...]
    unexcused: tuple[dict[str, Any], ...]

    @property
    def ok(self) -> bool:
        """Whether the act came out as promised."""
        return not self.complaints

    def count(self, outcome: Outcome) -> int:
        """How many requests ended so."""
        return self.tally.counts[outcome]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "act": self.title,
            "preload": self.preload,
            "seconds": round(self.seconds, 3),
            **{outcome.value: self.count(outcome) for outcome in Outcome},
            "lost": self.findings.lost,
            "repeated": len(self.findings.repeated),
            "money": self.findings.describe(),
            "adds_up": self.findings.adds_up,
            "longest_silence": round(self.silence, 3),
            # Below 0: whoever failed held the session already when it ended.
            "latest_lend_after_end": self.latest_lend and round(self.latest_lend, 4),
            "note": self.note,
            "ok": self.ok,
            "complaints": list(self.complaints),
            "unexcused": list(self.unexcused),
            "errors": dict(Counter(each.text for each in self.tally.troubles).most_common(20)),
        }


def unexcused(tally: Tally, permit: Permit) -> tuple[dict[str, Any], ...]:
    """The first twenty failures that nothing excuses, with all that is known of each."""
    found = (each for each in tally.troubles if _unexcused(each, permit))
    return tuple(
        {
            "reason": _unexcused(each, permit),
            "error": each.text,
            "status": each.status,
            "worker": each.worker,
            "backend": each.backend,
            "lent_after_end": _lent_after_end(each, permit),
            "lent_after_act_was_over": each.lent_at and each.lent_at - permit.over_at,
            "seen_to_go": each.backend in permit.gone,
        }
        for each in islice(found, 20)
    )


def complaints(tally: Tally, findings: Findings, permit: Permit) -> tuple[str, ...]:
    """Everything that the act does not excuse, one short line each."""
    return (
        *_about_answers(tally),
        *_about_money(findings),
        *_about_failures(tally, permit),
        *_about_recovery(tally, permit),
    )


def _about_answers(tally: Tally) -> Iterator[str]:
    wrong = tally.counts[Outcome.WRONG]
    if wrong:
        yield f"{wrong:,} wrong: answers to somebody else's question"


def _about_money(findings: Findings) -> Iterator[str]:
    if findings.lost:
        yield f"{findings.lost:,} lost: acknowledged, but not there exactly once"
    if not findings.adds_up:
        yield f"the money does not add up: {findings.describe()}"


def _about_failures(tally: Tally, permit: Permit) -> Iterator[str]:
    reasons = Counter(filter(None, (_unexcused(each, permit) for each in tally.troubles)))
    yield from (f"{count:,} {reason}" for reason, count in reasons.most_common())
    yield from _shared_excuses(tally, permit)


def _unexcused(trouble: Trouble, permit: Permit) -> str | None:
    """Why this one must not have failed, or None if it had to."""
    if trouble.outcome is Outcome.WRONG:
        return None  # complained about already
    if trouble.outcome is Outcome.CUT:
        return None if _cut_by_the_kill(trouble, permit) else "cut off by a worker nobody killed"
    if trouble.status is None:
        return "not answered in time"
    if trouble.backend is None or trouble.lent_at is None:
        return "failed: the pool gave no connection"
    late = _lent_after_end(trouble, permit)
    if late is None:
        return "failed though nobody had ended their session"
    return "failed: lent a session that had ended before" if late > permit.notice else None


def _lent_after_end(trouble: Trouble, permit: Permit) -> float | None:
    """How long after its session had gone the request was lent it; negative: it held it by then."""
    if trouble.backend is None or trouble.lent_at is None:
        return None
    gone_at = permit.gone.get(trouble.backend, permit.all_gone_at)
    return None if gone_at is None else trouble.lent_at - gone_at


def latest_lend(tally: Tally, permit: Permit) -> float | None:
    """The longest time after its end that a session was lent; None if none was and failed."""
    times = (_lent_after_end(each, permit) for each in tally.troubles)
    return max((each for each in times if each is not None), default=None)


def _cut_by_the_kill(trouble: Trouble, permit: Permit) -> bool:
    # A client on a new connection has not been told yet which worker it reached.
    return permit.killed_worker is not None and trouble.worker in (permit.killed_worker, None)


def _shared_excuses(tally: Tally, permit: Permit) -> Iterator[str]:
    held = Counter(
        each.backend
        for each in tally.troubles
        if each.outcome is Outcome.FAILED and each.backend and not _unexcused(each, permit)
    )
    extra = sum(count - 1 for count in held.values())
    if extra:
        yield f"{extra:,} failed on a session that had failed somebody else already"


def _about_recovery(tally: Tally, permit: Permit) -> Iterator[str]:
    if max(tally.served_at, default=0.0) <= permit.over_at:
        yield "nobody was served afterwards"
