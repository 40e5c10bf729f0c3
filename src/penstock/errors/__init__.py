"""The error tree: each error says whose fault it is, with what figures, and what to do next.

An error carries figures, not text: `__str__` writes the text when somebody reads it, so that an
error that is caught and retried costs nothing more. So does `args`, by which wrappers and loggers
copy errors; an error that is made of such a text shows it as it is. No text holds a password, a conninfo or a
statement.

It must not know: pools, runtimes, the machine. It looks at nothing but what it was given, except
`called_at`, which reads where its caller stands.

No lock: errors belong to whoever raises them; `_flavours` is a dict used by single atomic operations.
"""

from __future__ import annotations

import importlib
import types
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from penstock.errors.figures import Counts, Holder, OwnHold, written
from penstock.errors.next_steps import (
    STEP_OWN,
    step_on_a_loop,
    step_when_down,
    step_when_full,
    step_when_locked,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class ErrorSource(Protocol):
    """The part of a driver that gives errors their second base class."""

    name: str
    operational_error: type[Exception]
    interface_error: type[Exception]


#: Where `BaseException` keeps its arguments; empty for an error that writes its own text.
_ARGS: Any = BaseException.__dict__["args"]


class PenstockError(Exception):
    """What every error of penstock is.

    Args:
        text: the whole text, for what copies errors by ``type(error)(*error.args)``; else it is written.
        pool: name of the pool, or None where there is none.

    Attributes:
        pool: name of the pool, or None.
        sqlstate: the server's code, where it gave one (`ServerUnavailable`); else None.
    """

    pool: str | None
    sqlstate: str | None = None
    _fields: ClassVar[tuple[str, ...]] = ("pool",)
    #: Where the documentation explains this class; tests/docs holds that the page exists.
    _page: ClassVar[str] = "docs/errors.md"

    def __init__(self, text: str | None = None, /, *, pool: str | None = None) -> None:
        _start_bases(self)
        self.pool = pool
        if text is not None:
            self.args = (text,)

    if not TYPE_CHECKING:  # where it is a variable of `BaseException`

        @property
        def args(self) -> tuple[Any, ...]:
            """The text, as other exceptions have it, for what copies errors by it."""
            return _ARGS.__get__(self) or (str(self),)

        @args.setter
        def args(self, given: Any) -> None:
            _ARGS.__set__(self, given)

    def __str__(self) -> str:
        if _ARGS.__get__(self):
            return Exception.__str__(self)
        return f"{self._text()}\n{help_line(self._page)}"

    def _text(self) -> str:
        return f"something is wrong with {_pool(self.pool)}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).partition(chr(10))[0]}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (*_origin(type(self)), self._kept())

    def _kept(self) -> dict[str, Any]:
        """What travels: the figures, and the text where it was given as such."""
        kept = {*self._fields, "__notes__"}
        state = {key: value for key, value in vars(self).items() if key in kept}
        if given := _ARGS.__get__(self):
            state["args"] = given
        return state


class PoolTimeout(PenstockError):  # noqa: N818  a word users know
    """The borrower waited as long as it wanted to, and every connection was in use.

    The pool is full or slow. Where it could have more, and they cannot be opened, it is `ServerUnavailable`.
    The borrower got nothing; no connection was touched.

    Args:
        pool: name of the pool.
        timeout: seconds the borrower was ready to wait; 0 means "only what is free at once".
        waited: seconds it did wait.
        counts: what the slots were doing when it gave up.
        holders: who had the connections, longest first; may be cut short.
        own: those that the borrower itself had, longest first.
        loop: "asyncio" or "trio" if the borrower's thread runs its event loop, which stood still; else "".
        locked_by: who kept the pool's own lock all the time; None: nobody did.
        sqlstate: the server's code, where connections cannot be opened besides, and it gave one.
        reason: why they cannot, in one line, free of secrets; None: that is not known.
        next_step: what to do about that, where the code does not say it.
    """

    timeout: float
    waited: float
    counts: Counts
    holders: tuple[Holder, ...]
    own: tuple[OwnHold, ...]
    loop: str
    locked_by: Holder | None
    reason: str | None
    next_step: str | None
    _fields = (
        *("pool", "timeout", "waited", "counts", "holders", "own", "loop", "locked_by"),
        *("sqlstate", "reason", "next_step"),
    )
    _page = "docs/errors/pool-timeout.md"

    def __init__(
        self,
        text: str | None = None,
        /,
        *,
        pool: str | None = None,
        timeout: float = 0.0,
        waited: float = 0.0,
        counts: Counts | None = None,
        holders: Sequence[Holder] = (),
        own: Sequence[OwnHold] = (),
        loop: str = "",
        locked_by: Holder | None = None,
        sqlstate: str | None = None,
        reason: str | None = None,
        next_step: str | None = None,
    ) -> None:
        super().__init__(text, pool=pool)
        self.timeout = timeout
        self.waited = waited
        self.counts = counts or Counts()
        self.holders = tuple(holders)
        self.own = tuple(own)
        self.loop = loop
        self.locked_by = locked_by
        self.sqlstate = sqlstate
        self.reason = reason
        self.next_step = next_step

    def _text(self) -> str:
        patience = f"within {self.timeout:.1f} s" if self.timeout else "free at once"
        lines = [f"no connection {patience} from {_pool(self.pool)}: {written(self.counts)}."]
        if self.own:
            count = "one" if len(self.own) == 1 else str(len(self.own))
            lines.append(f"  this {self.own[0].kind} itself holds {count} of them, {self.own[0]}")
        if self.loop:
            lines.append(
                f"  this thread runs an event loop ({self.loop}), which stood still meanwhile"
            )
        if self.locked_by is not None:
            lines.append(f"  the pool's own lock was not free: {self.locked_by}")
        if self.holders:
            lines.append("  held longest: " + "; ".join(map(str, self.holders)))
        if self.reason is not None:
            code = f" (SQLSTATE {self.sqlstate})" if self.sqlstate else ""
            step = self.next_step or step_when_down(self.sqlstate)
            lines.append(f"  no connection can be opened: {self.reason}{code}; {step}")
        lines.append(f"  next step: {self._step()}")
        return "\n".join(lines)

    def _step(self) -> str:
        if self.locked_by is not None:
            return step_when_locked(self.locked_by)
        full = self.counts.in_use >= self.counts.max_size
        if full and self.loop:
            return step_on_a_loop(self.loop)
        if full and self.own:
            return STEP_OWN
        return step_when_full(self.counts, self.holders)


class ServerUnavailable(PenstockError):  # noqa: N818  a word users know
    """No connection could be opened; raise it ``from`` the last error, which becomes `__cause__`.

    Args:
        pool: name of the pool.
        attempts: how often opening was tried since it last worked; 0: no attempt has ended, since the
            server says nothing.
        down_seconds: seconds since the first of those attempts failed, or since the server has said
            nothing; None if unknown.
        waited: seconds the borrower waited.
        sqlstate: the server's code, or None if it did not get that far or did not tell.
        reason: the driver's diagnosis in one line, free of secrets; None shows the cause's class only.
        heals: whether trying again later can help.
        counts: what the slots were doing, or None.
        next_step: what to do, where it is not the server's or the network's fault; else None.
        holders: who had connections meanwhile, longest first; may be cut short.
    """

    attempts: int
    down_seconds: float | None
    waited: float | None
    reason: str | None
    heals: bool
    counts: Counts | None
    next_step: str | None
    holders: tuple[Holder, ...]
    _fields = (
        "pool",
        "attempts",
        "down_seconds",
        "waited",
        "sqlstate",
        "reason",
        "heals",
        "counts",
        "next_step",
        "holders",
    )
    _page = "docs/errors/server-unavailable.md"

    def __init__(
        self,
        text: str | None = None,
        /,
        *,
        pool: str | None = None,
        attempts: int = 1,
        down_seconds: float | None = None,
        waited: float | None = None,
        sqlstate: str | None = None,
        reason: str | None = None,
        heals: bool = True,
        counts: Counts | None = None,
        next_step: str | None = None,
        holders: Sequence[Holder] = (),
    ) -> None:
        super().__init__(text, pool=pool)
        self.attempts = attempts
        self.down_seconds = down_seconds
        self.waited = waited
        self.sqlstate = sqlstate
        self.reason = reason
        self.heals = heals
        self.counts = counts
        self.next_step = next_step
        self.holders = tuple(holders)

    def _text(self) -> str:
        since = "" if self.down_seconds is None else f", down for {self.down_seconds:.1f} s"
        tries = _number(self.attempts, "attempt", "attempts")
        if self.attempts == 0:
            since = "" if self.down_seconds is None else f" for {self.down_seconds:.1f} s"
            tries = "no answer"
        first = f"{_pool(self.pool)} cannot open a connection: {tries}{since}"
        first += "." if self.waited is None else f"; this borrower waited {self.waited:.1f} s."
        lines = [first, f"  {'last error' if self.attempts else 'no error'}: {self._last()}"]
        if self.counts is not None and self.counts.in_use:
            held = f"; held longest: {'; '.join(map(str, self.holders))}" if self.holders else ""
            lines.append(f"  those that are open: {written(self.counts)}{held}")
        lines.append(f"  next step: {self.next_step or step_when_down(self.sqlstate)}")
        return "\n".join(lines)

    def _kept(self) -> dict[str, Any]:
        # The cause stays behind, and the text names its class.
        return {**super()._kept(), "reason": self._why()}

    def _last(self) -> str:
        text = self._why()
        return f"{text} (SQLSTATE {self.sqlstate})" if self.sqlstate else text

    def _why(self) -> str:
        # A driver's own text can quote pieces of a password (libpq does, for a conninfo that it
        # cannot parse): without a diagnosis only the class is named; the cause has the rest.
        text = self.reason
        if text is None:
            text = "unknown" if self.__cause__ is None else type(self.__cause__).__name__
        return text


class StatementTimeout(PenstockError):  # noqa: N818  as its siblings
    """A statement had no complete answer within `statement_timeout_client`, and was given up.

    Its connection has ended, its transaction with it; whether the server carried the statement out is
    unknown. It is not sent again. Connections that are idle are pinged before they are lent.

    Args:
        pool: name of the pool.
        seconds: the option's value.
    """

    seconds: float
    _fields = ("pool", "seconds")
    _page = "docs/errors/statement-timeout.md"

    def __init__(
        self, text: str | None = None, /, *, pool: str | None = None, seconds: float = 0.0
    ) -> None:
        super().__init__(text, pool=pool)
        self.seconds = seconds

    def _text(self) -> str:
        return (
            f"no answer within {self.seconds:g} s (statement_timeout_client) to a statement on a "
            f"connection of {_pool(self.pool)}; the connection has ended, and whether the statement "
            "was carried out is unknown.\n"
            "  next step: if the server's host or the network is not frozen, find out why it is "
            "slow (pg_stat_activity, locks), or raise statement_timeout_client; before you repeat "
            "what writes, look whether it was done"
        )


class TooManyRequests(PenstockError):  # noqa: N818  a word users know
    """Refused at once: the queue was at `max_waiting` already. No connection was touched.

    Args:
        pool: name of the pool.
        max_waiting: the limit that was reached.
        counts: what the slots were doing.
    """

    max_waiting: int
    counts: Counts
    _fields = ("pool", "max_waiting", "counts")
    _page = "docs/errors/too-many-requests.md"

    def __init__(
        self,
        text: str | None = None,
        /,
        *,
        pool: str | None = None,
        max_waiting: int = 0,
        counts: Counts | None = None,
    ) -> None:
        super().__init__(text, pool=pool)
        self.max_waiting = max_waiting
        self.counts = counts or Counts()

    def _text(self) -> str:
        return (
            f"{_pool(self.pool)} refused a borrower: {self.max_waiting} are waiting already "
            f"(max_waiting={self.max_waiting}); {written(self.counts)}.\n"
            "  next step: answer this request with 503 and let the client come again; if it is "
            "constant, shorten what holds the connections, or raise max_size or max_waiting"
        )


class PoolClosed(PenstockError):  # noqa: N818  a word users know
    """The pool is closed, or was not opened yet. No connection was touched.

    Args:
        pool: name of the pool.
        closed_seconds: seconds since it was closed; None: it was never opened.
    """

    closed_seconds: float | None
    _fields = ("pool", "closed_seconds")
    _page = "docs/errors/pool-closed.md"

    def __init__(
        self,
        text: str | None = None,
        /,
        *,
        pool: str | None = None,
        closed_seconds: float | None = None,
    ) -> None:
        super().__init__(text, pool=pool)
        self.closed_seconds = closed_seconds

    def _text(self) -> str:
        if self.closed_seconds is None:
            return f"{_pool(self.pool)} is not open.\n  next step: call open() before borrowing"
        return (
            f"{_pool(self.pool)} was closed {self.closed_seconds:.1f} s ago.\n"
            "  next step: look for who calls close() while there is work (an exit hook, a test's "
            "end, a `with` block); open() opens it again"
        )


class MisuseError(PenstockError):
    """The program did something that cannot be right; trying again will not help.

    Args:
        what: what was done, as a sentence without full stop.
        pool: name of the pool, or None.
        where: where it was done ("app/views.py:42"), or None: the traceback tells.
        next_step: what to do instead, or None.
    """

    what: str
    where: str | None
    next_step: str | None
    _fields = ("pool", "what", "where", "next_step")
    _page = "docs/errors/misuse-error.md"

    def __init__(
        self,
        what: str = "misuse",
        *,
        pool: str | None = None,
        where: str | None = None,
        next_step: str | None = None,
    ) -> None:
        super().__init__(_whole(what), pool=pool)
        self.what = what
        self.where = where
        self.next_step = next_step

    def _text(self) -> str:
        text = self.what if self.pool is None else f"{_pool(self.pool)}: {self.what}"
        text += "." if self.where is None else f", at {self.where}."
        return text if self.next_step is None else f"{text}\n  next step: {self.next_step}"


class ConfigError(PenstockError, ValueError):
    """An option is wrong; raised when the pool is made, so nothing was opened.

    Args:
        key: the option's name.
        given: what was given, as it may be shown: a text without secrets.
        allowed: what is allowed, as a phrase that follows "must be"; None: there is no such option.
        pool: name of the pool, or None.
        hint: a further sentence ("did you mean ...?"), or None.
        what: what is wrong, where it is not the value of one option; replaces the other texts.
        file: the configuration file, as it was named, or None.
        line: the line in it, from 1, or None.
    """

    key: str
    given: str
    allowed: str | None
    hint: str | None
    what: str | None
    file: str | None
    line: int | None
    _fields = ("pool", "key", "given", "allowed", "hint", "what", "file", "line")
    _page = "docs/errors/config-error.md"

    def __init__(
        self,
        key: str = "?",
        given: str = "?",
        allowed: str | None = None,
        *,
        pool: str | None = None,
        hint: str | None = None,
        what: str | None = None,
        file: str | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(_whole(key), pool=pool)
        self.key = key
        self.given = given
        self.allowed = allowed
        self.hint = hint
        self.what = what
        self.file = file
        self.line = line

    def _text(self) -> str:
        of = "" if self.pool is None else f" of {_pool(self.pool)}"
        text = f"unknown option {self.key!r}{of}"
        if self.what is not None:
            text = f"{self.what}{of and ','}{of}"
        elif self.allowed is not None:
            text = f"option {self.key!r}{of} must be {self.allowed}, not {self.given}"
        if self.file is not None:
            text += f", at {self.file}" + (f":{self.line}" if self.line else "")
        return text if self.hint is None else f"{text}: {self.hint}"


_OURS: dict[str, type[PenstockError]] = {
    c.__name__: c
    for c in (
        PenstockError,
        PoolTimeout,
        ServerUnavailable,
        StatementTimeout,
        TooManyRequests,
        PoolClosed,
        MisuseError,
        ConfigError,
    )
}


def _show_as_public() -> None:
    """Let tracebacks name the place that users import from."""
    for ours in _OURS.values():
        ours.__module__ = "penstock"


_show_as_public()


# -- with a driver's error as second base -------------------------------------------------------

_flavours: dict[tuple[type, str, type], type[Any]] = {}


def flavoured(base: type[PenstockError], driver: ErrorSource) -> type[Any]:
    """Give the class that is both `base` and the driver's own error.

    `MisuseError` becomes also the driver's `InterfaceError` (retry decorators must not retry a
    bug), all others its `OperationalError` (`PoolTimeout` its `timeout_error`, if it has one), but
    for `ConfigError`, which no connection is part of and no retry can heal: it stays as it is. Both ``except penstock.PoolTimeout`` and ``except
    psycopg.OperationalError`` catch it. Cached; typed loosely because the constructor is `base`'s.

    Args:
        base: one of the classes of this module.
        driver: where the second base comes from.

    Returns:
        The class to raise; `base` itself where the two cannot be combined. Never raises.
    """
    if issubclass(base, ConfigError):
        return base
    parent = driver.operational_error
    if issubclass(base, MisuseError):
        parent = driver.interface_error
    elif issubclass(base, PoolTimeout):
        parent = getattr(driver, "timeout_error", parent)
    return _flavour(base, driver.name, parent)


def _flavour(base: type[PenstockError], driver: str, parent: type[Exception]) -> type[Any]:
    key = (base, driver, parent)
    found = _flavours.get(key)
    if found is None:
        # setdefault is atomic: of two threads that get here together, both use one class
        found = _flavours.setdefault(key, _combine(base, driver, parent))
    return found


def _combine(base: type[PenstockError], driver: str, parent: type[Exception]) -> type[Any]:
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_flavour_of": (base, driver, parent),
    }
    if issubclass(base, parent):
        return base
    try:
        # new_class finds the metaclass: asyncpg's errors have one
        return types.new_class(base.__name__, (base, parent), {}, lambda names: names.update(body))
    except TypeError:  # layouts or orders of bases that cannot be combined
        return base


def _start_bases(error: PenstockError) -> None:
    """Run the other bases' `__init__`: a driver's error needs its own attributes."""
    try:
        super(PenstockError, error).__init__()
    except TypeError:
        _start_bases_with_text(error)
    _ARGS.__set__(error, ())


def _start_bases_with_text(error: PenstockError) -> None:
    try:
        super(PenstockError, error).__init__("")  # asyncpg's InterfaceError wants a message
    except TypeError:
        Exception.__init__(error)


def _origin(cls: type[PenstockError]) -> tuple[str | type, str, str, str]:
    """Tell how to find the class again: (ours, driver's name, module, name of its error)."""
    flavour: tuple[type, str, type | None] = cls.__dict__.get("_flavour_of", (cls, "", None))
    base, driver, parent = flavour
    # Ours go by name, so that unpickling does not depend on what `penstock` exports.
    name: str | type = base.__name__ if _OURS.get(base.__name__) is base else base
    if parent is None:
        return name, "", "", ""
    return name, driver, parent.__module__, parent.__qualname__


def _revive(
    name: str | type[PenstockError], driver: str, module: str, parent: str, state: dict[str, Any]
) -> PenstockError:
    """Unpickle an error; where the driver is missing it is ours only."""
    base = _OURS[name] if isinstance(name, str) else name
    cls = base
    if driver:
        cls = _flavour_again(base, driver, module, parent)
    error = cls.__new__(cls)
    _start_bases(error)
    error.args = state.pop("args", ())
    vars(error).update(state)
    return error


def _flavour_again(
    base: type[PenstockError], driver: str, module: str, parent: str
) -> type[PenstockError]:
    try:
        found = getattr(importlib.import_module(module), parent)
    except Exception:  # noqa: BLE001  a missing or broken driver must not hide the error
        return base
    if not (isinstance(found, type) and issubclass(found, Exception)):
        return base
    return _flavour(base, driver, found)


# -- phrases ------------------------------------------------------------------------------------


def help_line(page: str) -> str:
    """The last line of an error's text: which page of the documentation explains it."""
    return f"  help: penstock's {page}"


def _whole(text: str) -> str | None:
    """A text that was an error's already, since its last line says so; else None."""
    return text if f"\n{help_line('docs/')}" in text else None


def _pool(name: str | None) -> str:
    return "a pool" if name is None else f"pool {name!r}"


def _number(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
