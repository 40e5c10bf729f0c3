"""The arithmetic of the pool: backoff, jitter, limits. Pure functions and one frozen value.

It must not know: slots, queues, time as such (`now` comes in), randomness as such (a number from
0 to 1 comes in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Delays after the first failed connects, in seconds: quick, because most outages are restarts.
FIRST_DELAYS: Final = (0.05, 0.1)
#: Then this one, while the outage is younger than YOUNG_OUTAGE: a restart after a crash, a second down and then its
#: recovery, has its first success within 0.3 s of the server accepting.
SHORT_DELAY: Final = 0.2
YOUNG_OUTAGE: Final = 2.0
#: Then this, while somebody waits: with jitter 0.45 to 0.48 s, and a first success within 0.5 s of the server
#: accepting. 20 s of outage are 50 to 52 attempts; with the waiters' first ones and those that diagnose, at most 2.8 a
#: second.
WAITED_FOR_DELAY: Final = 0.45
WAITED_FOR_JITTER: Final = 0.03
#: Then this, while nobody waits and somebody asks for the pool's health: about one a second, so that a service is
#: ready a second after its server, and so far apart that its replicas do not come together.
ASKED_DELAY: Final = 0.75
ASKED_JITTER: Final = 0.5
#: While nobody waits and nobody asks, the delay doubles up to this.
LONGEST_DELAY: Final = 30.0
#: The server is full (53300): ask again at most once a second.
FULL_SERVER_DELAY: Final = 1.0
#: A failure that cannot heal (wrong password): refuse at once for this long, then try again once.
UNHEALABLE_DELAY: Final = 1.0
#: max_lifetime is shortened by up to this share, at random, so that a pool does not retire at once.
LIFETIME_JITTER: Final = 0.1

TOO_MANY_CONNECTIONS: Final = "53300"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user promised and demands, in seconds and counts; see docs/options.md."""

    min_size: int = 1
    max_size: int = 10
    max_waiting: int = 0
    max_lifetime: float = 3600.0
    max_idle: float = 600.0
    ping_after: float = 30.0
    overdue_after: float = 60.0
    fifo: bool = False


def retire_at(opened_at: float, max_lifetime: float, random: float) -> float:
    """When a connection opened at `opened_at` is too old; `random` spreads a pool's over 10 %."""
    return opened_at + max_lifetime * (1.0 - LIFETIME_JITTER * random)


def retry_delay(
    failures: int,
    down_for: float,
    *,
    waited_for: bool,
    sqlstate: str | None,
    random: float,
    asked: bool = False,
) -> float:
    """How long to wait before the next probing connect, after `failures` in a row.

    `waited_for`: by a borrower; `asked`: by somebody who wants to know whether the pool is ready.
    """
    if sqlstate == TOO_MANY_CONNECTIONS:
        return FULL_SERVER_DELAY * (1.0 + 0.1 * random)
    if failures <= len(FIRST_DELAYS):
        return FIRST_DELAYS[failures - 1]
    if down_for < YOUNG_OUTAGE:
        return SHORT_DELAY
    if waited_for:
        return WAITED_FOR_DELAY + WAITED_FOR_JITTER * random
    if asked:
        return ASKED_DELAY + ASKED_JITTER * random
    # 2 s of outage are about 12 failures: from there on the delay doubles.
    exponent = min(max(failures - 12, 0), 8)
    return float(min(LONGEST_DELAY, 0.4 * 2**exponent)) * (0.9 + 0.1 * random)
