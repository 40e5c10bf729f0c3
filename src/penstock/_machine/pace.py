"""How many connections are worth opening at once while borrowers wait: the arithmetic of a stampede.

One job: say how many openings may be under way, and when to look again if that is less than one for
each who waits. A connect costs both sides some milliseconds of processor, so those that come too late to
serve anybody slow down everybody who is being served.

*An episode* begins when somebody waits where nobody did. In it:

1. Nothing is heard yet: FIRST_WAVE openings, and as many again every WAVE_EVERY while none has come
   back, up to AT_ONCE. A connect of a few milliseconds is processor time, and more at a time do not come
   sooner; one of 200 ms is the network's, and 16 of them are under way after 37 ms. A server that cuts
   every connect answers the first wave at once: four attempts, not one per waiter.
2. Once the first is lent, returns tell how fast the queue is served. As many waiters as returns will have
   served within two connects' time (WORTH_WAITING) need no connection; the others have one opened. Silence
   counts like slowness, after a quarter of a connect's time (GRACE): borrowers who keep what they have for
   long have the rest opened at once.
3. This holds for the time of one connect since then, and no longer: a queue that has not emptied by then is
   no burst, and each who waits counts. So nobody waits for more than one connect's time in vain.

It must not know: slots, the queue, limits. The machine calls it under the runtime's lock, when somebody
waits, and never on the hot path.
"""

from __future__ import annotations

from typing import Final

#: Openings at the start of an episode. 200 borrowers at once, on 2 processors: 3, 4, 8 and 16 at a time
#: serve them equally fast (p99 0.29, 0.28, 0.29, 0.27 s with a connect of 0.2 s).
FIRST_WAVE: Final = 4
#: And as many again so often, in seconds: about what four local handshakes take.
WAVE_EVERY: Final = 0.0125
#: At most so many; the keeper's bound for all pools of a process is as high, and has room for a few probes.
AT_ONCE: Final = 16
#: The share of a connect's time for which what was heard, or not, says nothing: when 200 threads wake up,
#: the first return takes 10 ms, and the next thirty as long together.
GRACE: Final = 1 / 4
#: Who will be served within so many connects' times has no connection opened: it comes too late for him if
#: the machine is slower in the next moment than it was in the last, which is what a handshake makes it.
WORTH_WAITING: Final = 2
#: Later than an instant by so much is certainly after it: above a clock's rounding, below a wake-up's.
AFTER: Final = 1e-4


class Pace:
    """What one episode of waiting has shown so far.

    Attributes:
        began: when it began.
        served: when somebody in it was served first; None: nobody yet.
        heard: when a connection last came back; at first the same as `served`.
        returns: how many came back since `served`.
    """

    __slots__ = ("began", "heard", "returns", "served")

    def __init__(self) -> None:
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Somebody waits where nobody did."""
        self.began = now
        self.served: float | None = None
        self.heard = now
        self.returns = 0

    def opened(self, now: float) -> None:
        """A connection was opened; it serves whoever waits."""
        if self.served is None:
            self.served = self.heard = now

    def returned(self, now: float) -> None:
        """A connection came back while somebody waited."""
        if self.served is None:
            self.served = now
        else:
            self.returns += 1
        self.heard = now

    def wanted(self, now: float, waiting: int, connect: float) -> int:
        """How many openings should be under way for `waiting` borrowers.

        Args:
            now: the time.
            waiting: how many borrowers wait.
            connect: seconds that opening one takes; 0.0: none was opened yet.
        """
        if self.served is None:
            waves = 1 + int((now - self.began + AFTER) / WAVE_EVERY)
            return min(waiting, AT_ONCE, FIRST_WAVE * waves)
        grace = GRACE * connect
        if now >= self.served + connect:
            return min(waiting, AT_ONCE)
        if now <= self.served + grace:
            return 0
        # From one return to the next: in the mean, or since the last one if that is longer.
        mean = (self.heard - self.served) / self.returns if self.returns else 0.0
        gap = max(mean, now - self.heard - grace)
        worth = WORTH_WAITING * connect
        # Compared without a division: the gap may be 0.
        return 0 if waiting * gap <= worth else min(waiting - int(worth / gap), AT_ONCE)

    def look_at(self, now: float, waiting: int, opening: int, connect: float) -> float:
        """When `wanted` becomes more than `opening` if nothing is heard until then; infinite: never.

        It may be early: then it is asked again.
        """
        if opening >= min(waiting, AT_ONCE):
            return float("inf")
        if self.served is None:
            waves = 1 + int((now - self.began + AFTER) / WAVE_EVERY)
            return self.began + waves * WAVE_EVERY
        grace = GRACE * connect
        if now <= self.served + grace:
            return self.served + grace + AFTER
        silent = self.heard + grace + WORTH_WAITING * connect / (waiting - opening)
        return max(now, min(self.served + connect, silent)) + AFTER
