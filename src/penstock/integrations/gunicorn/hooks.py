"""Hooks for gunicorn.conf.py: closing pools with their worker, and saying what a worker runs on.

One job: be what gunicorn calls. Nothing of this is needed for correctness: a forked worker opens its
own connections, and a worker that is killed ends its sessions with its sockets. Import the names into
gunicorn.conf.py, or call them from hooks of your own::

    from penstock.integrations.gunicorn import child_exit, post_worker_init, worker_exit

It must not know: what is a trap (gunicorn_traps.py), what a server allows (gunicorn_limits.py).
gunicorn itself is not imported: its worker and its logger are what it calls with.

No lock. What a worker tells the master is one byte that only this worker writes.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from penstock import pools
from penstock._process import fork
from penstock.integrations.gunicorn import limits
from penstock.integrations.gunicorn import traps as gunicorn_traps

if TYPE_CHECKING:
    from collections.abc import Iterable

_UNKNOWN: Final = 0
_RUNS: Final = 1
_CLOSED: Final = 2

# One byte per worker, by its age. Made in the master, where gunicorn reads its configuration, and
# shared with all its workers (-1 without flags is shared memory); no worker outlives that many others.
_states = mmap.mmap(-1, mmap.PAGESIZE)


def post_worker_init(worker: Any) -> None:
    """Say in gunicorn's log what this worker's pools run on, and warn of what cannot go well.

    Whether all workers together may open more connections than the server allows is asked in the
    background, once per generation of workers, through one connection of each pool. Never raises,
    and waits for nothing.

    Args:
        worker: gunicorn's worker, whose application is loaded.
    """
    _tell(worker, _RUNS)
    try:
        made = gunicorn_traps.pools_of(fork.registered())
        worker.log.info("penstock: %s", gunicorn_traps.what_it_runs_on(made))
        _warn(worker, gunicorn_traps.traps(worker, made))
        if made and _is_first_of_generation(worker):
            threading.Thread(
                target=_check_limits, args=(worker, made), name="penstock-limits", daemon=True
            ).start()
    except Exception:
        worker.log.debug("penstock: post_worker_init failed", exc_info=True)


def worker_exit(_server: Any, worker: Any, *, timeout: float = 2.0) -> None:
    """Close this worker's pools: statements under way may end, sessions end with a goodbye.

    Does nothing in the master, which gunicorn calls it in, too, for a worker that was gone already.
    asyncio's pools are closed by their application's lifespan.

    Args:
        worker: gunicorn's worker.
        timeout: seconds to wait for lent connections, for all pools together. By keyword, from a
            hook of your own. gunicorn kills a worker after its `graceful_timeout` (30 s).
    """
    if worker.pid != os.getpid():
        return
    try:
        pools.close_all(timeout)
    except Exception:
        worker.log.debug("penstock: closing the pools failed", exc_info=True)
    _tell(worker, _CLOSED)


def child_exit(_server: Any, worker: Any) -> None:
    """Say in the master's log that a worker ended without `worker_exit`, so that pools were cut off.

    Needs `post_worker_init` and `worker_exit`, too.

    Args:
        worker: gunicorn's worker, which has ended.
    """
    place = _place(worker)
    state, _states[place] = _states[place], _UNKNOWN
    if state == _RUNS:
        worker.log.info(
            "penstock: worker %s ended without closing its pools: it was killed, or its class calls "
            "no worker_exit (uvicorn's on SIGTERM). The server ends its idle sessions now, and one "
            "in the middle of a statement after server_check_interval (0.5 s)",
            worker.pid,
        )


def _place(worker: Any) -> int:
    return int(worker.age) % len(_states)


def _tell(worker: Any, state: int) -> None:
    _states[_place(worker)] = state


def _is_first_of_generation(worker: Any) -> bool:
    """Whether it is the first worker after a start or a reload: one is enough to ask."""
    return (int(worker.age) - 1) % max(1, int(worker.cfg.workers)) == 0


def _check_limits(worker: Any, made: list[gunicorn_traps.Pool]) -> None:
    shares = [gunicorn_traps.share(worker, each) for each in made]
    _warn(worker, limits.exceeded(int(worker.cfg.workers), shares))


def _warn(worker: Any, warnings: Iterable[str]) -> None:
    for warning in warnings:
        worker.log.warning("penstock: %s", warning)
