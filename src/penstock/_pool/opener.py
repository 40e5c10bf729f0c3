"""Opening connections for a pool: from its options to a link that is ready to be lent.

One job: make a `Recipe` of a `PoolConfig` (calling the user's callables, once per connect), have the
driver open it, run `configure`, and find out why it failed if it did.

It must not know: slots, waiters, when to open and how many: the machine decides. It takes no lock;
each call belongs to the worker that makes it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from inspect import isawaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from penstock._drivers.adopting import ConnectRaised
from penstock._machine.progress import CONNECT_SECONDS, Progress
from penstock._process.clock import clock
from penstock._process.tracebacks import place_noted, without_frames
from penstock._process.watchdog import Alarm
from penstock.config.application_name import application_name
from penstock.config.conninfo import Wrong, read
from penstock.config.secret import Hidden, Secret, lifted
from penstock.drivers import Activity, Diagnosis, NotAdopted, Recipe
from penstock.errors import ConfigError
from penstock.errors.next_steps import STEP_HANGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    #: Name of the setting, path, time of the last change, size, inode.
    Files = tuple[tuple[str, str, int, int, int], ...]

    from penstock.config.pool_config import PoolConfig
    from penstock.drivers import StatementLimit

#: A silent network cut sends nothing. Each only where the user set nothing: 30 + 3 x 10 s find a
#: dead peer of an idle connection, 60 s one that does not acknowledge what we sent. Not less: 2 s
#: killed a live peer that was merely not reading (a COPY behind a lock).
KEEPALIVE: Final = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60000,
}

#: How long the attempt that diagnoses may take. A server that refuses does so in milliseconds.
DIAGNOSE_SECONDS: Final = 2.0

#: What a driver's deadline may be late by, in seconds: libpq counts in whole ones, and 2 at least per address.
DRIVER_GRACE: Final = 2.0

#: No part of a host's name or a port, and often of a password that was not escaped, or of settings.
_UNSHOWN: Final = set("@=; \"'")

#: Settings that name files which a connect reads, and the variables that do, too (libpq 32.1.2, 32.15).
_FILES: Final = {
    "passfile": "PGPASSFILE",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrl": "PGSSLCRL",
}

#: Errors of a program, whoever wrote it. Not RuntimeError: "can't start new thread" heals.
_BUGS: Final = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(NotImplementedError, RecursionError, SyntaxError, TypeError, ValueError),
)

#: How many failures' diagnoses are remembered.
REMEMBERED: Final = 4


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a connection could not be opened.

    Attributes:
        error: what was raised; its traceback is dropped, since it would keep frames alive.
        heals: whether trying again can help.
        sqlstate: the server's code, if it gave one.
        text: one line for people, without secrets.
        next_step: what to do, where it is not the server's or the network's fault.
    """

    error: BaseException
    heals: bool
    sqlstate: str | None
    text: str
    next_step: str | None = None


class Opener:
    """Opens the connections of one pool.

    Attributes:
        where: which server the last connect was for, without secrets; None: not known.
    """

    where: str | None = None

    def __init__(
        self,
        config: PoolConfig,
        driver: Any,
        pool_name: str,
        limit: StatementLimit | None = None,
    ) -> None:
        self._config = config
        self._driver = driver
        self._name = pool_name
        self._limit = limit
        _refuse_unfit(_said_in(config), driver, pool_name)
        # The last diagnoses and the failures that they explained: the same words again have the same
        # reason, and need no second attempt. Several, since one cause can come in two wordings by turns.
        self._known: dict[tuple[type, str], Diagnosis] = {}
        self._asking: set[tuple[type, str]] = set()
        # What the last attempt was made with, to be compared with the next, and to be diagnosed.
        self._tried: Hidden[tuple[Recipe, Files] | None] = Hidden(None)

    def recipe(self, progress: Progress | None = None) -> Recipe:
        """What the next connect is made from; `progress` says which callable is running."""
        config, given = self._config, {}
        for name in ("conninfo", "kwargs"):
            value = Hidden(getattr(config, name))
            if callable(value.value):
                if progress is not None:
                    progress.doing = callable_named(name, value.value)
                value = Hidden(value.value())
            given[name] = value
        return self.recipe_of(given["conninfo"], given["kwargs"])

    def recipe_of(self, conninfo: Hidden[str], kwargs: Hidden[Mapping[str, Any] | None]) -> Recipe:
        """The recipe for what the user's callables returned, or what stands in their place."""
        config = self._config
        _refuse_other_types(conninfo, kwargs)
        self.where = where_of(conninfo, kwargs)
        recipe = Recipe(
            conninfo=conninfo.value,
            kwargs=lifted(dict(kwargs.value or {})),
            connection_class=config.connection_class,
            application_name=application_name(self._name),
            autocommit=config.autocommit,
            server_check_interval=config.server_check_interval,
            keepalive=KEEPALIVE,
            reset=config.reset,
            statement_limit=self._limit,
        )
        if callable(config.conninfo) or callable(config.kwargs):
            _refuse_unfit(recipe, self._driver, self._name)
        return recipe

    def without_limit(self) -> Opener:
        """One for connections of which no statement is given up (`dedicated()`)."""
        found = copy(self)  # of its own class, too
        found._limit = None
        return found

    def open(
        self,
        seconds: float = CONNECT_SECONDS,
        *,
        if_changed: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Open and configure a link. It comes back parked, idle and remembered as it is.

        `progress` is told of each part, and how long it may take; it ends the work once nobody wants it.

        Raises:
            SameAgain: `if_changed`, and it would be made with what the last attempt was made with.
            NotWanted: what `progress` waits for was given up meanwhile.
            Exception: the driver's, or what a callable of the user raised. Nothing is left open.
        """
        began = clock()
        progress = progress or Progress(began, seconds)
        go_on(progress, None, seconds)
        recipe = self.begin(self._called_recipe(progress), if_changed=if_changed)
        go_on(progress, None, seconds + DRIVER_GRACE)
        link = self._driver.open(recipe, seconds)
        self.let_in()
        try:
            left = max(DIAGNOSE_SECONDS, began + seconds - clock())
            go_on(progress, self.configuring(), left)
            self._configure_within(link, left)
        except BaseException:
            link.close()
            raise
        progress.doing = None
        return link

    def configuring(self) -> str | None:
        """What the user's `configure` is called; None: there is none."""
        configure = self._config.configure
        return None if configure is None else callable_named("configure", configure)

    def begin(self, recipe: Recipe, *, if_changed: bool) -> Recipe:
        """Note what is going to be tried; gives it back.

        Raises:
            SameAgain: `if_changed`, and it is the same as the last time.
        """
        attempt = Hidden((recipe, stamps_of(recipe)))
        if if_changed and _is_same(self._tried, attempt):
            raise SameAgain
        self._tried = Hidden(attempt.value)
        return recipe

    def may_change(self) -> bool:
        """Whether the next attempt may be made with something else than the last one was."""
        config, tried = self._config, self._tried.value
        return callable(config.conninfo) or callable(config.kwargs) or bool(tried and tried[1])

    def tried(self) -> Recipe | None:
        """What the last attempt was made with."""
        found = self._tried.value
        return None if found is None else found[0]

    def _called_recipe(self, progress: Progress) -> Recipe:
        """The recipe; what a callable of the user raises is told from a server that is down."""
        try:
            return self.recipe(progress)
        except Exception as error:
            raise recipe_raised(progress) from error

    def _configure_within(self, link: Any, seconds: float) -> None:
        with Alarm(link, seconds) as alarm:
            self._configure(link)
        if alarm.rang:
            raise NotReturned(self.configuring(), seconds)

    def _configure(self, link: Any) -> None:
        configure = self._config.configure
        if configure is not None:
            _call_configure(configure, link.conn)
            refuse_unfinished(configure, link)
        link.prepare()
        park_new(link)

    def explain(self, error: BaseException) -> Failure:
        """Find out why `open` raised `error`; may make one more attempt, which diagnoses."""
        failure = self.known(error) or self.asked_already(error)
        if failure is not None:
            return failure
        with self.asking(error):
            return self.remember(error, self._diagnosis(error))

    def asked_already(self, error: BaseException) -> Failure | None:
        """What to say for now of a failure that another worker is having diagnosed: one attempt is enough for all."""
        return _failure(error, undiagnosed(error)) if _key(error) in self._asking else None

    @contextmanager
    def asking(self, error: BaseException) -> Iterator[None]:
        """While the driver is asked about `error`."""
        key = _key(error)
        self._asking.add(key)
        try:
            yield
        finally:
            self._asking.discard(key)

    def known(self, error: BaseException) -> Failure | None:
        """Why `open` raised `error`, where no driver need be asked."""
        bug = _is_bug(error, self._driver)
        place = place_noted(error) if bug else ""
        without_frames(error)  # they would keep the pool, and what it holds, alive
        if isinstance(error, ConfigureError):
            return self._explain_configure(error)
        if isinstance(error, NotReturned):
            return _not_returned(error)
        if isinstance(error, RecipeError):
            cause = error.__cause__ or error
            heals = isinstance(
                cause, OSError
            )  # a token service that is down, say: it may be up later
            step = _STEP_SOURCE if heals else _STEP_RECIPE
            return Failure(cause, heals, None, f"{error}: {one_line(cause)}", step)
        if isinstance(error, ConnectRaised):
            cause = error.__cause__ or error
            text = f"{error}: {one_line(cause)}"
            return Failure(cause, heals=False, sqlstate=None, text=text, next_step=error.next_step)
        if isinstance(error, NotAdopted):
            step = error.next_step
            return Failure(error, heals=False, sqlstate=None, text=str(error), next_step=step)
        if not isinstance(error, Exception):  # SystemExit in a callable, say
            return Failure(error, heals=False, sqlstate=None, text=one_line(error))
        if bug:
            text = f"{one_line(error)} ({place})" if place else one_line(error)
            return Failure(error, heals=False, sqlstate=None, text=text, next_step=_STEP_BUG)
        if lacks_descriptors():
            text = f"this process has no file descriptor left: {one_line(error)}"
            return Failure(error, heals=True, sqlstate=None, text=text, next_step=_STEP_DESCRIPTORS)
        remembered = self._known.get(_key(error))
        return None if remembered is None else _failure(error, remembered)

    def explain_at_once(self, error: BaseException) -> Failure:
        """What is known without asking anybody."""
        return self.known(error) or _failure(error, undiagnosed(error))

    def remember(self, error: BaseException, diagnosis: Diagnosis) -> Failure:
        """What the driver found out about `error`; the same words again need no second attempt."""
        known = {**self._known, _key(error): diagnosis}  # made aside: several workers may be here
        self._known = dict(list(known.items())[-REMEMBERED:])
        return _failure(error, diagnosis)

    def let_in(self) -> None:
        """A server took this pool in: what was refused for good is asked about anew, also by the same words."""
        if any(not each.heals for each in self._known.values()):
            self._known = {key: each for key, each in self._known.items() if each.heals}

    def _explain_configure(self, error: ConfigureError) -> Failure:
        """The session was there: what failed is the user's code, or what it asked of the server."""
        cause = error.__cause__
        if cause is None:
            return Failure(
                error, heals=False, sqlstate=None, text=str(error), next_step=_STEP_CONFIGURE
            )
        # A bug stays one however often it is tried; the server may be of another mind later. asyncpg's
        # errors of a server that goes have no class in common.
        heals = isinstance(
            cause, (self._driver.operational_error, OSError)
        ) or self._driver.ends_session(cause, read_write=False)
        text = f"{error}: {one_line(cause)}"
        return Failure(
            cause,
            heals,
            getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None),
            text,
            next_step=None if heals else _STEP_CONFIGURE,
        )

    def _diagnosis(self, error: BaseException) -> Diagnosis:
        try:
            # What was refused is diagnosed: a callable may say something else by now.
            recipe = self.tried() or self.recipe()
            diagnosis: Diagnosis = self._driver.diagnose(error, recipe, DIAGNOSE_SECONDS)
        except Exception:  # noqa: BLE001  a diagnosis that fails must not hide the failure
            diagnosis = undiagnosed(error)
        return diagnosis


class SameAgain(Exception):  # noqa: N818  it is what was found
    """What would be tried is what was tried, and refused."""


class NotWanted(Exception):  # noqa: N818  it is what was found
    """The right to this connection was taken back: it took too long."""


class NotReturned(Exception):  # noqa: N818  it is what happened
    """Something that was called has not come back: a callable of the user's, or the driver.

    Attributes:
        doing: which callable; None: the driver.
        seconds: for how long.
    """

    def __init__(self, doing: str | None, seconds: float) -> None:
        super().__init__(doing, seconds)
        self.doing, self.seconds = doing, seconds

    def __str__(self) -> str:
        return f"{self.doing or 'connecting'} has not returned for {self.seconds:.1f} s"


def go_on(progress: Progress, doing: str | None, seconds: float) -> None:
    """The next part begins, and may take `seconds`; raises NotWanted where the right was taken back."""
    if progress.taken_back:
        raise NotWanted
    progress.comes_to(doing, clock(), seconds)


def explain_hanging(progress: Progress) -> Failure:
    """Why an opening that has had all its time has not come to its end."""
    found = progress.found
    if isinstance(found, Failure):  # it failed, and finding out more hangs
        return found
    return _not_returned(NotReturned(progress.doing, clock() - progress.since))


def _not_returned(error: NotReturned) -> Failure:
    # It heals: what it waits for may answer the next call.
    step = STEP_HANGS if error.doing else _STEP_NAMES
    return Failure(error, heals=True, sqlstate=None, text=str(error), next_step=step)


def stamps_of(recipe: Recipe) -> Files:
    """Which files a connect reads that are named in its settings, and as what they are there now.

    Only those that the settings or the environment name. libpq's defaults in the home directory are not
    looked at: who has them need not have meant them, and would wait for nothing.
    """
    words = _words_of(Hidden(recipe.conninfo), Hidden(recipe.kwargs))
    named = {name: words.value.get(name) or os.environ.get(_FILES[name]) for name in _FILES}
    return tuple((name, *_stamp(str(path))) for name, path in named.items() if path)


def _stamp(path: str) -> tuple[str, int, int, int]:
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return path, 0, 0, 0
    return path, found.st_mtime_ns, found.st_size, found.st_ino


def _is_same(one: Hidden[tuple[Recipe, Files] | None], other: Hidden[tuple[Recipe, Files]]) -> bool:
    """Compared, and never shown. What cannot be compared is taken to be the same: no login is made for it."""
    if one.value is None:
        return False
    try:
        return bool(one.value == other.value)
    except Exception:  # noqa: BLE001  of a value of the user's
        return True


def _words_of(
    conninfo: Hidden[str], kwargs: Hidden[Mapping[str, Any] | None]
) -> Hidden[dict[str, Any]]:
    """The settings of one attempt; none where they do not parse: the driver says so better."""
    said = Hidden(read(Secret(conninfo.value)) if isinstance(conninfo.value, str) else {})
    if isinstance(said.value, Wrong):
        return Hidden({})
    return Hidden({**said.value, **(kwargs.value or {})})


def where_of(conninfo: Hidden[str], kwargs: Hidden[Mapping[str, Any] | None]) -> str | None:
    """Host and port as libpq would understand them, for people; None where only libpq knows.

    What is no host name and no address is not shown: it may be the end of a password.
    """
    words = _words_of(conninfo, kwargs)
    if conninfo.value and not words.value:
        return None

    def setting(name: str, variable: str) -> str:
        return str(words.value.get(name) or os.environ.get(variable) or "")

    host = setting("host", "PGHOST") or setting("hostaddr", "PGHOSTADDR")
    port = setting("port", "PGPORT") or "5432"
    if setting("service", "PGSERVICE") or _UNSHOWN & set(host + port):
        return None
    return f'"{host}" port {port}' if host else f"the local socket, port {port}"


def _said_in(config: PoolConfig) -> Recipe:
    """What a config says of a connect by itself, before any callable is asked."""
    conninfo, kwargs = Hidden(config.conninfo), Hidden(config.kwargs)
    return Recipe(
        conninfo=conninfo.value if isinstance(conninfo.value, str) else "",
        kwargs=lifted(dict(kwargs.value)) if isinstance(kwargs.value, Mapping) else {},
        connection_class=config.connection_class,
    )


def _refuse_unfit(recipe: Recipe, driver: Any, pool: str) -> None:
    """Raise ConfigError for an option that the driver cannot honour; a driver need not be able to tell."""
    look = getattr(driver, "unfit_option", None)
    unfit = None if look is None else look(recipe)
    if unfit is not None:
        place = "kwargs" if unfit.key in recipe.kwargs else "conninfo"
        what = f"option {unfit.key!r} in {place} {unfit.what}"
        raise ConfigError(unfit.key, pool=pool, what=what, hint=unfit.hint)


def _refuse_other_types(conninfo: Hidden[str], kwargs: Hidden[Mapping[str, Any] | None]) -> None:
    """Raise TypeError if a callable of the user returned something else than it must."""
    if not isinstance(conninfo.value, str):
        kind = type(conninfo.value).__name__
        raise TypeError(f"conninfo= returned a value of type {kind}, not a text")
    if not (kwargs.value is None or isinstance(kwargs.value, Mapping)):
        kind = type(kwargs.value).__name__
        raise TypeError(f"kwargs= returned a value of type {kind}, not a mapping")


def _is_bug(error: BaseException, driver: Any) -> bool:
    """Whether the program, or a library, raised `error` by mistake: the next attempt would raise it again.

    Not counted: errors that are the network's or the driver's own as well (a certificate that does not
    pass is a ValueError), and texts of a server that cannot be decoded.
    """
    return isinstance(error, _BUGS) and not isinstance(
        error, (OSError, UnicodeDecodeError, driver.operational_error, driver.interface_error)
    )


def lacks_descriptors() -> bool:
    """Whether this process has no file descriptor left: libpq tells that in words only."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            return True
    return False


def _key(error: BaseException) -> tuple[type, str]:
    return type(error), str(error)


def _failure(error: BaseException, diagnosis: Diagnosis) -> Failure:
    return Failure(error, diagnosis.heals, diagnosis.sqlstate, diagnosis.text, diagnosis.next_step)


def undiagnosed(error: BaseException) -> Diagnosis:
    """What is known without asking: unknown failures are taken to heal."""
    return Diagnosis(sqlstate=None, heals=True, text=one_line(error))


def refuse_unfinished(configure: Callable[[Any], object], link: Any) -> None:
    """Raise ConfigureError if the user's `configure` left the session in the middle of something."""
    if link.activity() is not Activity.IDLE:
        raise ConfigureError(
            f"configure={_name_of(configure)} left the connection "
            f"{link.activity().value}: end with commit(), or set autocommit"
        )


def park_new(link: Any) -> None:
    """Park a link for the first time."""
    if not link.park():
        raise ConfigureError("a new connection is not idle")


_STEP_CONFIGURE: Final = (
    "look at configure=: it is the program's own; it must end without error, idle"
)
_STEP_BUG: Final = (
    "it is a mistake in the program or in a library, not the server's: look at the place above, at kwargs= and at "
    "the classes given to the pool (connection_class=, cursor_factory=)"
)
_STEP_SOURCE: Final = (
    "look at what that callable asks; the pool goes on calling it, and has not asked the server"
)
_STEP_NAMES: Final = (
    "look whether the host's name can be looked up from here; the driver has no time limit for that; "
    "the pool goes on trying"
)
_STEP_RECIPE: Final = "look at the callable given as conninfo= or kwargs=: it must return them"


_STEP_DESCRIPTORS: Final = (
    "raise this process's limit of files (ulimit -n), or look for what keeps files and sockets open "
    "(/proc/self/fd)"
)


class RecipeError(Exception):
    """The user's callable for `conninfo` or `kwargs` raised (its cause)."""


class ConfigureError(Exception):
    """The user's `configure` raised (its cause), or left a connection that cannot be lent."""


def _call_configure(configure: Callable[[Any], object], conn: Any) -> None:
    try:
        _refuse_awaitable(configure(conn))
    except Exception as error:
        raise configure_raised(configure) from error


def _refuse_awaitable(answer: object) -> None:
    """Raise TypeError if a callable gave what somebody would have to await (a lambda's cannot be told before)."""
    if isawaitable(answer):
        getattr(answer, "close", lambda: None)()  # else Python warns of it, too
        kind = type(answer).__name__
        raise TypeError(f"it returned a {kind}, which a pool for threads does not await")


def configure_raised(configure: Callable[[Any], object]) -> ConfigureError:
    """What to raise from the error of the user's `configure`."""
    return ConfigureError(f"{callable_named('configure', configure)} raised")


def recipe_raised(progress: Progress) -> RecipeError:
    """What to raise from the error of the user's `conninfo` or `kwargs`."""
    return RecipeError(f"{progress.doing or 'conninfo= or kwargs='} raised")


def callable_named(option: str, call: Any) -> str:
    """How errors name a callable of the user's: the option, and the callable's own name."""
    return f"{option}={_name_of(call)}"


def _name_of(call: Any) -> str:
    return str(getattr(call, "__qualname__", None) or type(call).__qualname__)


def one_line(error: BaseException) -> str:
    """An error in one line, with its class."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
