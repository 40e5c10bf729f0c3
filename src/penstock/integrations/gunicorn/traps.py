"""What a gunicorn worker's pools run on, and which configurations cannot go well.

One job: look at a worker, its application and its pools, and put what is found into words.

It must not know: gunicorn's hooks, any server. It imports neither gunicorn nor a driver, and looks at
those that are there. No lock: it runs once, before a worker serves.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from penstock._pool.aio.pool import AsyncConnectionPool
from penstock._pool.sync.pool import ConnectionPool
from penstock._process import runtime

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Pool = ConnectionPool[Any] | AsyncConnectionPool[Any]

#: Modules of worker classes -> what kind they are. A class is of the kind of its nearest ancestor.
_KINDS: Final = {
    "gunicorn.workers.sync": "sync",
    "gunicorn.workers.gthread": "gthread",
    "gunicorn.workers.ggevent": "gevent",
    "gunicorn.workers.gtornado": "tornado",
    "gunicorn.workers.gasgi": "asgi",
    "uvicorn.workers": "asgi",
    "uvicorn_worker": "asgi",
}
_WSGI: Final = ("sync", "gthread", "gevent", "tornado")


class Share(NamedTuple):
    """A pool, and how many connections one worker will have of it at most."""

    pool: Pool
    connections: int


def pools_of(found: Iterable[object]) -> list[Pool]:
    """The pools among what is registered, but for those that are closed."""
    return [
        one
        for one in found
        if isinstance(one, (ConnectionPool, AsyncConnectionPool)) and not one.closed
    ]


def what_it_runs_on(made: list[Pool]) -> str:
    """One line: each runtime, and its pools with their drivers."""
    if not made:
        return "no pool is made yet in this worker"
    by_runtime: dict[str, list[str]] = {}
    for pool in made:
        by_runtime.setdefault(_runtime(pool), []).append(
            f"pool {pool.name!r} ({_driver(pool)}, at most {pool.stats().max_size})"
        )
    return "; ".join(f"on {name}: {', '.join(each)}" for name, each in by_runtime.items())


def _runtime(pool: Pool) -> str:
    if isinstance(pool, AsyncConnectionPool):
        return "asyncio"
    return "gevent" if runtime.is_green() else "threads"


def _driver(pool: Pool) -> str:
    return str(getattr(pool._driver, "name", "unknown"))  # noqa: SLF001  a pool tells nobody else


def share(worker: Any, pool: Pool) -> Share:
    """How many connections of a pool one worker will have: no more than it has threads."""
    stats = pool.stats()
    threads = {"sync": 1, "tornado": 1, "gthread": int(worker.cfg.threads)}.get(kind_of(worker))
    most = stats.max_size if threads is None else min(stats.max_size, threads)
    return Share(pool, max(most, stats.min_size))


def traps(worker: Any, made: list[Pool]) -> Iterator[str]:
    """What cannot go well, as sentences with a next step."""
    kind = kind_of(worker)
    yield from _wrong_interface(worker, kind)
    if kind == "gevent":
        yield from _blocks_the_hub(made)


def kind_of(worker: Any) -> str:
    """One of `_KINDS`' values, or "other"."""
    for ancestor in type(worker).__mro__:
        for module, kind in _KINDS.items():
            if (ancestor.__module__ + ".").startswith(module + "."):
                return kind
    return "other"


# -- WSGI or ASGI ---------------------------------------------------------------------------------------


def _wrong_interface(worker: Any, kind: str) -> Iterator[str]:
    app = getattr(worker, "asgi", None) or getattr(worker, "wsgi", None)
    name = worker.cfg.worker_class_str
    speaks = interface_of(app)
    what = f"{type(app).__module__}.{type(app).__qualname__}"
    if speaks == "ASGI" and kind in _WSGI:
        yield (
            f"the application ({what}) is an ASGI one, and the worker class {name!r} calls it as WSGI: "
            "each request will be answered with 500. Next step: --worker-class asgi, or serve "
            "a2wsgi.ASGIMiddleware(application)"
        )
    if speaks == "WSGI" and kind == "asgi":
        yield (
            f"the application ({what}) is a WSGI one, and the worker class {name!r} calls it as ASGI: "
            "each request will be answered with 500. Next step: --worker-class gthread, or serve "
            "a2wsgi.WSGIMiddleware(application)"
        )


def interface_of(app: Any) -> str | None:
    """Tell "ASGI" or "WSGI" by what the application's call takes; None where that does not tell."""
    call = app if inspect.isroutine(app) else type(app).__call__
    if inspect.iscoroutinefunction(call):
        return "ASGI"
    try:
        takes = [
            one.kind
            for one in inspect.signature(app).parameters.values()
            if one.default is one.empty
        ]
    except (TypeError, ValueError):  # no callable, or one in C
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(one not in kinds for one in takes):
        return None
    return {2: "WSGI", 3: "ASGI"}.get(len(takes))


# -- gevent ---------------------------------------------------------------------------------------------


def _blocks_the_hub(made: list[Pool]) -> Iterator[str]:
    """Waits that stop all greenlets of the worker. Our drivers put theirs right by themselves."""
    drivers = {_driver(pool) for pool in made}
    if not runtime.has_green_waits():
        yield (
            "this gevent worker has not patched `select`: each statement will stop all its "
            "greenlets. Next step: gevent.monkey.patch_all() without exceptions"
        )
        return
    if "psycopg" in drivers and os.environ.get("PSYCOPG_WAIT_FUNC") == "wait_c":
        yield (
            "PSYCOPG_WAIT_FUNC=wait_c has psycopg wait in C: each statement will stop all greenlets "
            "of this gevent worker. Next step: unset it"
        )
    if "psycopg2" in sys.modules and "psycopg2" not in drivers:
        extensions: Any = sys.modules.get("psycopg2.extensions")
        if extensions is not None and extensions.get_wait_callback() is None:
            yet = "" if made else " yet (no pool is made that would set one)"
            yield (
                f"psycopg2 was imported and has no wait callback{yet}: each of its statements will stop "
                'all greenlets of this gevent worker. Next step: ConnectionPool(..., driver="psycopg2"), '
                "which sets one, or psycogreen's patch_psycopg()"
            )
