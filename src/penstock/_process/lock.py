"""The lock: the one class behind every lock of penstock's. No exception leaves it held.

One job: `with lock:` and `lock.take(seconds)`, both safe from exceptions that come from outside: a
signal handler's, one that is thrown into a thread.

A `with` protects what comes after `__enter__`. CPython 3.14 looks for signals in between
(python/cpython gh-148874), and so does every later version where a profiler or debugger watches calls:
a handler that raises there leaves a lock of C's held for ever. So `__enter__` is a Python function
here: the interpreter does not look for signals when such a function returns, and inside of it the look
after `acquire` stands in a `try`. `__exit__` stays C's: a Python one could be struck before it releases.

* A second exception can strike the handler, and a third: nothing is called there before `release`, since
  the interpreter looks for signals after calls. Unpacking a `map` calls in C, where it does not look.
* CPython 3.11 to 3.13 do not look there, and take the lock in C, which costs 100 ns less.

It is reentrant, since a signal handler may use what the code that it interrupted has locked, and native
where gevent has patched: our locks are held for one move and never while anything waits, so that no
greenlet is ever switched out with one.

It must not know: what it protects.
"""

from __future__ import annotations

import sys
from _thread import RLock


class Lock(RLock):  # type: ignore[misc]  # typeshed has it final; the interpreters do not
    """A reentrant lock, for ``with lock:``, or to be taken within a time.

    ::

        if not lock.take(seconds):
            raise ...
        try:
            ...
        finally:
            lock.release()

    Nothing may stand between `take` and the `try`.
    """

    __slots__ = ()

    if not hasattr(RLock, "_recursion_count"):  # before CPython 3.11.5

        def _recursion_count(self) -> int:
            if not self._is_owned():  # type: ignore[attr-defined]  # no name of typeshed's
                return 0
            return int(repr(self).partition(" count=")[2].split()[0])

    def owner(self) -> int:
        """Give the number of the thread that has it; 0: nobody has."""
        return int(str(self).partition(" owner=")[2].split()[0])

    def take(self, seconds: float) -> bool:
        """Take it; whether it was free, or became free, within so many seconds (at most 1e6)."""
        before = self._recursion_count()
        # Read when it is asked for. Where the caller has it already, only what is added here may go.
        count = map(Lock._recursion_count, (self,)) if before else (1,)
        try:
            # Mostly it is free, and an acquire with a time costs 90 ns more.
            return self.acquire(False) or self.acquire(True, seconds)
        except BaseException:
            (now,) = count
            if now > before:
                try:  # noqa: SIM105  contextlib.suppress would be a call
                    self.release()
                except RuntimeError:  # struck while it waited: it has nothing
                    pass
            raise

    if sys.version_info >= (3, 14):

        def __enter__(self) -> bool:
            # As `take`, and written out: at the start of a function the interpreter looks for signals,
            # so no other one can release what this one has. Without a time, since that costs 90 ns.
            before = self._recursion_count()
            count = map(Lock._recursion_count, (self,)) if before else (1,)
            try:
                return self.acquire()
            except BaseException:
                (now,) = count
                if now > before:
                    try:  # noqa: SIM105  as above
                        self.release()
                    except RuntimeError:
                        pass
                raise
