"""Opening one connection outside the pool's size, within a time, for `pool.dedicated()`.

One job: have a worker connect while the caller waits, and close what comes too late.

It must not know: slots, the machine. `_lock` guards who is late: the worker that brings the
connection, or the caller who has gone.
"""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

from penstock import hub
from penstock.opening import CONNECT_SECONDS, Failure
from penstock.upkeep import prepare_drivers

if TYPE_CHECKING:
    from penstock.opening import Opener
    from penstock.reports import Reporter


class Opening:
    """A connection outside the pool being opened in a worker; whoever wanted it may be gone."""

    def __init__(self, opener: Opener, seconds: float) -> None:
        self._opener = opener
        self._seconds = min(seconds, 1e9)
        self._answer = hub.gate()
        self._lock = hub.Lock()
        self._given_up = False

    def run(self) -> None:
        """In a worker."""
        prepare_drivers()
        try:
            answer = self._opener.open(min(self._seconds, CONNECT_SECONDS))
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            answer = self._opener.explain(error)
        with self._lock:
            late = self._given_up
            self._answer.put(answer)
        if late and not isinstance(answer, Failure):
            answer.close()

    def wait(self, reporter: Reporter) -> Any:
        """Give the link, or raise ServerUnavailable within the time."""
        try:
            answer = self._answer.get(timeout=self._seconds)
        except queue.Empty:
            answer = None
        except BaseException:
            self._give_up()
            raise
        if answer is None:
            answer = self._give_up()
        if answer is None or not hasattr(answer, "lend"):
            raise reporter.not_opened(answer, self._seconds)
        return answer

    def _give_up(self) -> Any:
        with self._lock:
            self._given_up = True
            try:
                return self._answer.get(False)
            except queue.Empty:
                return None
