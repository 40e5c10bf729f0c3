"""PoolConfig: all options of a pool as one frozen, validated value.

Whoever has a PoolConfig need not check again: numbers are numbers, in range, and fit each other.

It must not know: how pools work, any driver, files and environment variables (`config/loaders.py` reads them). It
calls none of the user's callables.

No lock: values do not change.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict, get_origin

from penstock._machine.policy import Limits
from penstock.config.conninfo import foreign
from penstock.config.loaders import Readable
from penstock.config.redacted import redacted
from penstock.config.secret import Hidden, Unfit, veiled
from penstock.config.spelling import resembling
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from penstock.drivers import AsyncDriver, Driver


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PoolConfig(Readable):
    """All options of a pool. Times are seconds.

    Values are checked and brought into one form (``5`` becomes ``5.0``); a wrong one raises
    `ConfigError`, as does a name that is none of these.

    Attributes:
        conninfo: libpq conninfo string or URL, or a callable that returns one per connect;
            "" leaves all to the driver's environment (PGHOST ...).
        kwargs: keyword arguments for the driver's ``connect``, or a callable that returns them per
            connect; None for none.
        connection_class: the driver's connection class; None for its default.
        driver: a driver's name, or a driver object.
        min_size: connections kept open, also while nobody wants them. 0 or more.
        max_size: connections at most. 1 or more, not below `min_size`.
        name: the pool's name in errors, logs and `application_name`; None: the runtime picks one.
        timeout: how long a borrower waits; 0 takes only what is free at once; None waits for ever,
            which is unwise: a request that nobody waits for any more still takes its turn.
        max_waiting: borrowers in the queue at most, more are refused at once; 0 for no limit.
        max_lifetime: age at which a connection is retired, less up to 10 % at random; None: never.
        max_idle: how long a connection above `min_size` may lie unused; None: for ever.
        ping_after: a connection idle for longer is pinged before it is lent; 0 pings always,
            None never.
        reconnect_timeout: how long the server must be down for `reconnect_failed` to be called; the
            pool goes on trying all the same. None: never called.
        reconnect_failed: called with the pool, once per outage; None for nothing.
        overdue_after: a lease held longer is warned about, once; None: never.
        order: "lifo" lends the connection used last (warm; lets the pool shrink), "fifo" the
            one unused for longest.
        autocommit: whether connections are in autocommit while lent.
        configure: called with each new connection; None for nothing.
        check: called with a connection before it is lent, after the pool's own checks; it raises
            to refuse it. None for nothing.
        reset: what is done to a connection at return: "rollback", "session" (everything a session can
            hold), a callable that takes the connection, or None for nothing.
        on_borrow: called with a connection each time it is lent; None for nothing.
        server_check_interval: ``client_connection_check_interval`` set on each new connection, so
            that the server notices a killed worker; None leaves the server's setting alone.
        statement_timeout_client: how long a statement may take, its answer included, before the client
            gives it up: `StatementTimeout`, and the connection ends; None: no limit.
        read_write: the pool is for a server that takes writes: SQLSTATE 25006 (read-only, after a
            failover) ends the connection and makes older ones suspect. Off unless marked.
        guard: whether each borrow lends a connection object of its own, so that a returned one raises
            also after the session was lent to somebody else. For tests and debugging.
        open: whether the pool opens by itself at the first borrow; False: only by ``open()``.
    """

    conninfo: str | Callable[[], str] = ""
    # no hash: a mapping has none
    kwargs: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = dataclasses.field(
        default=None, hash=False
    )
    connection_class: type[Any] | None = None
    driver: str | Driver[Any] | AsyncDriver[Any] = "psycopg"
    min_size: int = 1
    max_size: int = 10
    name: str | None = None
    # 5 s: below gunicorn's 30 s, so that a request fails with a reason before its worker is killed
    timeout: float | None = 5.0
    max_waiting: int = 0
    max_lifetime: float | None = 3600.0
    max_idle: float | None = 600.0
    ping_after: float | None = 30.0
    reconnect_timeout: float | None = 300.0
    reconnect_failed: Callable[[Any], object] | None = None
    overdue_after: float | None = 60.0
    order: Literal["lifo", "fifo"] = "lifo"
    autocommit: bool = False
    configure: Callable[[Any], object] | None = None
    check: Callable[[Any], object] | None = None
    reset: Literal["rollback", "session"] | Callable[[Any], object] | None = "rollback"
    on_borrow: Callable[[Any], object] | None = None
    server_check_interval: float | None = 0.5
    statement_timeout_client: float | None = None
    read_write: bool = False
    guard: bool = False
    open: bool = True

    def __post_init__(self) -> None:
        if self.name is not None:  # first, because every other error names the pool
            self._check(isinstance(self.name, str) and self.name.strip(), "name", "a text or None")
        self._check_source()
        self._check_sizes()
        self._check_times()
        self._check_choices()
        self._check_callables()

    def replace(self, **changes: Any) -> PoolConfig:
        """Give a copy with some options changed.

        Args:
            **changes: option names and their new values.

        Raises:
            ConfigError: for an unknown name, or a value that does not fit.
        """
        given = Hidden(changes)
        del changes  # no secret in a local variable of a frame that may raise
        refuse_unknown(list(given.value), pool=self.name)
        return PoolConfig(**{**{key: getattr(self, key) for key in OPTIONS}, **given.value})

    def limits(self) -> Limits:
        """Give the part that the machine decides by; None becomes "for ever"."""
        return Limits(
            min_size=self.min_size,
            max_size=self.max_size,
            max_waiting=self.max_waiting,
            max_lifetime=_or_forever(self.max_lifetime),
            max_idle=_or_forever(self.max_idle),
            ping_after=_or_forever(self.ping_after),
            overdue_after=_or_forever(self.overdue_after),
            fifo=self.order == "fifo",
        )

    def __repr__(self) -> str:
        parts = [f"{key}={self._shown(key)}" for key, default in _DEFAULTS.items()
                 if getattr(self, key) != default]  # fmt: skip
        return f"PoolConfig({', '.join(parts)})"

    def without_coroutines(self) -> PoolConfig:
        """Give itself, for a pool that awaits nothing.

        Raises:
            ConfigError: a callable is a coroutine function: nobody would await what it returns.
        """
        for key in _CALLABLES:
            value = getattr(self, key)
            called = value.__call__ if callable(value) else None
            awaits = iscoroutinefunction(value) or iscoroutinefunction(called)
            self._check(not awaits, key,
                        "a plain function (AsyncConnectionPool awaits coroutine functions)")  # fmt: skip
        return self

    # -- checks ---------------------------------------------------------------------------------

    def _check_source(self) -> None:
        self._check(not isinstance(self.conninfo, Unfit), "conninfo",
                    "a conninfo string, a URL, or a callable that returns one")  # fmt: skip
        if isinstance(self.conninfo, str) and isinstance(self.driver, str):
            wrong = foreign(self.conninfo.strip())
            if wrong is not None:  # said at connect, it would be a server that cannot be reached
                raise wrong.error("conninfo")
        self._check(not isinstance(self.kwargs, Unfit), "kwargs",
                    "a mapping, a callable that returns one, or None")  # fmt: skip
        if isinstance(self.kwargs, Mapping):
            self._check(all(isinstance(key, str) for key in self.kwargs), "kwargs",
                        "a mapping with text keys")  # fmt: skip
        # Connection[DictRow] is a help for type checkers; the class behind it is what connects
        connection_class = get_origin(self.connection_class) or self.connection_class
        object.__setattr__(self, "connection_class", connection_class)
        self._check(connection_class is None or isinstance(connection_class, type),
                    "connection_class", "a class or None")  # fmt: skip
        if isinstance(self.driver, str):
            self._check(self.driver.strip(), "driver", "a driver's name")
        else:
            self._check(callable(getattr(self.driver, "open", None)), "driver",
                        "a driver's name or a driver object")  # fmt: skip

    def _check_sizes(self) -> None:
        for key, least in (("min_size", 0), ("max_size", 1), ("max_waiting", 0)):
            value = getattr(self, key)
            # bool is an int to Python; True connections are a mistake
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._check(whole and value >= least, key, f"a whole number, {least} or more")
        self._check(self.min_size <= self.max_size, "min_size", f"at most max_size={self.max_size}")

    def _check_times(self) -> None:
        for key in ("timeout", "ping_after", "reconnect_timeout"):
            self._check_time(key, "0 or more", lambda seconds: seconds >= 0)
        for key in (
            *("max_lifetime", "max_idle", "overdue_after"),
            *("server_check_interval", "statement_timeout_client"),
        ):
            self._check_time(key, "more than 0", lambda seconds: seconds > 0)

    def _check_time(self, key: str, allowed: str, fits: Callable[[float], bool]) -> None:
        value = getattr(self, key)
        if value is None:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fit = number and math.isfinite(value) and fits(value)
        self._check(fit, key, f"a number of seconds, {allowed}, or None")
        object.__setattr__(self, key, float(value))

    def _check_choices(self) -> None:
        for key in ("autocommit", "read_write", "guard", "open"):
            self._check(isinstance(getattr(self, key), bool), key, "True or False")
        order = isinstance(self.order, str) and self.order in {"lifo", "fifo"}
        self._check(order, "order", '"lifo" or "fifo"')
        reset = self.reset
        known = reset in {"rollback", "session"} if isinstance(reset, str) else callable(reset)
        self._check(reset is None or known, "reset", '"rollback", "session", a callable, or None')

    def _check_callables(self) -> None:
        for key in ("reconnect_failed", "configure", "check", "on_borrow"):
            value = getattr(self, key)
            self._check(value is None or callable(value), key, "a callable or None")
        for key in _CALLABLES:
            value = getattr(self, key)
            generates = isgeneratorfunction(value) or isasyncgenfunction(value)
            self._check(not generates, key, "a function without `yield`: nothing of it would run")

    def _check(self, fits: object, key: str, allowed: str) -> None:
        if not fits:
            pool = self.name if isinstance(self.name, str) and key != "name" else None
            raise ConfigError(key, self._shown(key), allowed, pool=pool)

    def _shown(self, key: str) -> str:
        value = getattr(self, key)
        if key == "conninfo":
            return repr(redacted(value)) if isinstance(value, str) else _kind(value)
        if key == "kwargs":  # names only: a value can be a secret
            if isinstance(value, Mapping):
                return "{" + ", ".join(f"{k!s}: ..." for k in value) + "}"
            return _kind(value)
        # an object's own repr could be long or tell secrets
        return (
            repr(value) if isinstance(value, (bool, int, float, str, type(None))) else _kind(value)
        )


def _init(self: PoolConfig, **options: Any) -> None:
    """Take the place of the generated ``__init__``, which would say TypeError, and show secrets."""
    given = Hidden(options)
    del options
    for name, default in _DEFAULTS.items():
        object.__setattr__(self, name, _taken(name, given.value.get(name, default)))
    refuse_unknown(list(given.value))
    self.__post_init__()


def _taken(name: str, value: Any) -> Any:
    """A value as it is kept: what may be secret is blank in tracebacks, or not kept at all."""
    if callable(value) or value is None or name not in {"conninfo", "kwargs"}:
        return Unfit(value) if value is None and name == "conninfo" else value
    if name == "conninfo":
        return veiled(value) if isinstance(value, str) else Unfit(value)
    # a copy, so that nobody changes a frozen value from outside
    return veiled(dict(value)) if isinstance(value, Mapping) else Unfit(value)


if not TYPE_CHECKING:  # type checkers read the generated one, and know the names
    PoolConfig.__init__ = functools.wraps(PoolConfig.__init__)(_init)


#: Options that are, or may be, callables of the user.
_CALLABLES = (
    "conninfo", "kwargs", "configure", "check", "reset", "on_borrow", "reconnect_failed",
)  # fmt: skip


class _CommonOptions(TypedDict, total=False):
    """The options that every pool takes by name, for type checkers; see `PoolConfig`.

    `conninfo`, `connection_class` and `driver` are parameters of its own. tests/typing holds that this
    is the same list as PoolConfig's.
    """

    min_size: int
    max_size: int
    name: str | None
    timeout: float | None
    max_waiting: int
    max_lifetime: float | None
    max_idle: float | None
    ping_after: float | None
    reconnect_timeout: float | None
    reconnect_failed: Callable[[Any], object] | None
    overdue_after: float | None
    order: Literal["lifo", "fifo"]
    autocommit: bool
    configure: Callable[[Any], object] | None
    check: Callable[[Any], object] | None
    reset: Literal["rollback", "session"] | Callable[[Any], object] | None
    on_borrow: Callable[[Any], object] | None
    server_check_interval: float | None
    statement_timeout_client: float | None
    read_write: bool
    guard: bool
    open: bool


class Options(_CommonOptions, total=False):
    """The options that `ConnectionPool` takes by name."""

    kwargs: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None


class AsyncOptions(_CommonOptions, total=False):
    """The options that `AsyncConnectionPool` takes by name."""

    kwargs: (
        Mapping[str, Any] | Callable[[], Mapping[str, Any] | Awaitable[Mapping[str, Any]]] | None
    )


OPTIONS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(PoolConfig))
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(PoolConfig)}


def _or_forever(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def refuse_unknown(options: Iterable[str], *, pool: str | None = None) -> None:
    """Raise for the first name that is no option; says which one was probably meant.

    Args:
        options: names given by a user.
        pool: the pool's name for the error.

    Raises:
        ConfigError: naming the key.
    """
    for key in options:
        if key not in _DEFAULTS:
            _refuse(str(key), pool)


def _refuse(key: str, pool: str | None) -> NoReturn:
    meant = resembling(key, OPTIONS)
    hint = f"did you mean {meant!r}?" if meant else f"options are {', '.join(OPTIONS)}"
    raise ConfigError(key, pool=pool, hint=hint)


def _kind(value: object) -> str:
    if isinstance(value, Unfit):
        return f"a value of type {value.kind}"
    return "a callable" if callable(value) else f"a value of type {type(value).__name__}"
