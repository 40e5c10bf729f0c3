"""The Bottle plugin: ``app.install(Penstock(...))``, and views that take ``db`` get a connection.

One job: say where a route's unit of work begins and ends, which keyword the connection has, and
which settings hold for a route. A generator's unit of work goes on until its body has ended.

It must not know: how connections are borrowed and given back (loans.py).

No lock: what belongs to a request is used by one thread at a time.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar

import bottle
from bottle import HTTPError, HTTPResponse, request, response

from penstock._pool.sync.pool import ConnectionPool
from penstock.errors import MisuseError, PoolTimeout, ServerUnavailable, TooManyRequests
from penstock.integrations._unit.loans import Loans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

HookT = TypeVar("HookT", bound="Callable[[Any], object]")

_log = logging.getLogger("penstock.bottle")

#: Where a route's options are in its configuration: ``@app.get("/", penstock={...})``.
SECTION: Final = "penstock"
MODES: Final = ("request", "explicit", "autocommit")
_OPTIONS: Final = ("keyword", "transactions")
_BY_KEYWORD: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_KEY: Final = "bottle"  # of the one database that a plugin's loans are about
# What `static_file` answers a Range header with is a generator; this is its code, where Bottle has it.
_PART_OF_FILE: Final = getattr(getattr(bottle, "_rangeiter", None), "__code__", None)


class RouteOptions(NamedTuple):
    """What holds for one route.

    Attributes:
        keyword: the argument that takes the connection; None: the view takes none.
        transactions: one of `MODES`.
    """

    keyword: str | None
    transactions: str


class Penstock:
    """A plugin that lends each request a connection, if its view has an argument for it.

    Several databases are several plugins with different keywords. It opens nothing: the first
    request in each process does.

    Args:
        pool: a pool, which stays its maker's to close; or what `ConnectionPool` takes, a conninfo
            or a callable that returns one, for a pool that `close` closes.
        keyword: the argument of views that takes the connection ("db"). A route may name another
            one: ``penstock={"keyword": "conn"}``; it is then passed unasked.
        transactions: "request" commits if the answer's status is below 400, and rolls back else;
            "explicit" leaves the commit to the view; in "autocommit" each statement is by itself.
            A route may differ: ``penstock={"transactions": "explicit"}``.
        retry_after: seconds. If given, a full pool and an unreachable server are answered with 503
            and this ``Retry-After``; if not, with Bottle's 500.
        **options: options of `ConnectionPool`, for a pool that is made here.

    Raises:
        MisuseError: a wrong value, or options for a pool that exists.
        ConfigError: as `ConnectionPool`.
        DriverNotFoundError: as `ConnectionPool`.
    """

    api = 2

    def __init__(
        self,
        pool: ConnectionPool[Any] | str | Callable[[], str],
        keyword: str = "db",
        *,
        transactions: str = "request",
        retry_after: int | None = None,
        **options: Any,
    ) -> None:
        _check_keyword(keyword)
        _check_mode(transactions)
        if isinstance(pool, ConnectionPool) and options:
            raise MisuseError(
                f"Penstock() got a pool, and options for one: {', '.join(sorted(options))}",
                pool=pool.name,
                next_step="give the options to the pool where it is made",
            )
        self._owns_pool = not isinstance(pool, ConnectionPool)
        if not isinstance(pool, ConnectionPool):
            options.setdefault("name", keyword)
            pool = ConnectionPool(pool, **options)
        self._pool: ConnectionPool[Any] = pool
        self._keyword = keyword
        self._transactions = transactions
        self._retry_after = retry_after
        self._hooks: list[Callable[[Any], object]] = []
        # Bottle applies one plugin of a name to a route.
        self.name = SECTION if keyword == "db" else f"{SECTION}_{keyword}"

    @property
    def pool(self) -> ConnectionPool[Any]:
        """The pool, for work outside of requests and for its `health()`."""
        return self._pool

    @property
    def keyword(self) -> str:
        """The argument of views that takes the connection."""
        return self._keyword

    def on_first_use(self, hook: HookT) -> HookT:
        """Register a function that gets the connection before the view does, as a decorator.

        It is called in the request's transaction. If it raises, the view does not run, and the
        connection is given back.

        Args:
            hook: called with the connection.
        """
        self._hooks.append(hook)
        return hook

    # -- what Bottle calls --------------------------------------------------------------------------

    def setup(self, app: Any) -> None:
        """Look whether two plugins of an app would pass the same argument.

        Raises:
            MisuseError: they would.
        """
        for other in app.plugins:
            if isinstance(other, Penstock) and other.keyword == self._keyword:
                raise MisuseError(
                    f"two plugins of an app pass the argument {self._keyword!r}",
                    pool=self._pool.name,
                    next_step='give each database its own: Penstock(..., keyword="orders")',
                )

    def apply(self, callback: Callable[..., Any], route: Any) -> Callable[..., Any]:
        """Wrap a route's view, if it takes the connection.

        Raises:
            MisuseError: an option of the route is wrong.
        """
        options = self._options_of(route)
        if options.keyword is None:
            return callback

        place = _place_of(callback)

        def lent(*args: Any, **kwargs: Any) -> Any:
            try:
                return self._serve(callback, route, options, args, kwargs, place=place)
            except (PoolTimeout, ServerUnavailable, TooManyRequests) as error:
                if self._retry_after is None:
                    raise
                raise self._unavailable(error) from None

        return lent

    def close(self) -> None:
        """Close the pool, if it was made here: at `app.close()` and `app.uninstall()`."""
        if self._owns_pool:
            self._pool.close()

    # -- one request --------------------------------------------------------------------------------

    def _serve(
        self,
        view: Callable[..., Any],
        route: Any,
        options: RouteOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        place: tuple[str, int] | None,
    ) -> Any:
        keyword = str(options.keyword)
        if keyword in kwargs:
            raise MisuseError(
                f"the route {route.rule!r} has an argument {keyword!r} already, of its path or of "
                "another plugin",
                pool=self._pool.name,
                next_step='give the plugin another one: Penstock(..., keyword="conn")',
            )
        work = _Work(f"{request.method} {route.rule}", options.transactions)
        try:
            kwargs[keyword] = work.borrow(self._pool, self._hooks, place)
            try:
                answer = view(*args, **kwargs)
            except HTTPResponse as raised:  # redirect(), abort(): an answer as any other
                work.answered(raised)
                raise
            return work.answered(answer)
        except BaseException as error:
            work.failed(error)
            raise

    def _unavailable(self, error: Exception) -> HTTPError:
        _log.error("%s", error, exc_info=error.__cause__)
        later = str(self._retry_after)
        return HTTPError(503, "The database is not available.", error, Retry_After=later)

    # -- a route's options --------------------------------------------------------------------------

    def _options_of(self, route: Any) -> RouteOptions:
        _refuse_unknown(route)
        keyword = self._option(route, "keyword", None)
        transactions = self._option(route, "transactions", self._transactions)
        where = f"route {route.rule!r}: "
        _check_mode(transactions, where)
        if keyword is not None:
            _check_keyword(keyword, where)
        elif _takes(route.callback, self._keyword):
            keyword = self._keyword
        return RouteOptions(keyword, transactions)

    def _option(self, route: Any, option: str, default: Any) -> Any:
        """The one for this plugin's database, else that for all, else the plugin's."""
        common = route.config.get(f"{SECTION}.{option}", default)
        return route.config.get(f"{SECTION}.{self._keyword}.{option}", common)


class _Work:
    """A request's unit of work on one database: from the borrow to the end of the answer's body."""

    def __init__(self, where: str, transactions: str) -> None:
        self._loans = Loans(where)
        self._transactions = transactions
        self._is_answered = False

    def borrow(
        self,
        pool: ConnectionPool[Any],
        hooks: list[Callable[[Any], object]],
        place: tuple[str, int] | None,
    ) -> Any:
        autocommit = self._transactions == "autocommit"
        return self._loans.borrow(_KEY, pool, hooks, autocommit=autocommit, place=place).conn

    def answered(self, answer: Any) -> Any:
        """The view has answered: commit and give back, or do it when the body has ended."""
        given: Any = answer if isinstance(answer, HTTPResponse) else None
        self.note_status((response if given is None else given).status_code)
        body = answer if given is None else given.body
        if not _goes_on(body):
            self.commit()
            self.end(None)
            self._is_answered = True
            return answer
        streamed = self._keep_for(body)
        self.commit()  # what was written so far: a commit that fails is still a 500
        self._is_answered = True
        if given is None:
            return streamed
        given.body = streamed
        return given

    def _keep_for(self, body: Iterable[Any]) -> Streamed:
        streamed = Streamed(body, self)
        loan = self._loans.get(_KEY)
        if loan is not None:
            loan.keep_for(streamed)  # a cursor that the body reads from survives `commit`
        return streamed

    def note_status(self, status: int) -> None:
        self._loans.answered = f" answered {status}"
        self._loans.refused = status >= 400

    def commit(self) -> None:
        if self._transactions == "request" and not self._loans.refused:
            self._loans.commit_all()

    def failed(self, error: BaseException) -> None:
        """The view, or the end of its work, has raised. An answer that is raised is none of this."""
        if not self._is_answered:
            self.end(error)

    def body_ended(self) -> None:
        """The body was read to its end."""
        try:
            self._loans.drop_streams()  # what they wanted is over: now everything is committed
            self.commit()
        except BaseException as error:
            self.end(error)
            raise
        self.end(None)

    def cut_off(self) -> None:
        """The body was closed before its end."""
        self._loans.answered = " was cut off in the middle of its body"
        self.end(None)

    def end(self, error: BaseException | None) -> None:
        """Roll back what is open, and give back. Does nothing the second time."""
        self._loans.drop_streams()
        self._loans.end(error)


class Streamed:
    """A body that comes piece by piece, and the unit of work that goes on until its end.

    However it ends, the connection comes back: read to its end, by its own exception, by `close()`
    (which servers call when the client has gone, too, and Bottle where nothing is sent), and, if it
    is merely dropped, by the pool's own net (see loans.py).
    """

    def __init__(self, body: Iterable[Any], work: _Work) -> None:
        self._body = body
        self._chunks: Iterator[Any] = iter(body)
        self._work: _Work | None = work
        self._begun = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            chunk = next(self._chunks)
        except StopIteration:
            self._finish()
            raise
        except BaseException as error:
            self._raised(error)
            raise
        if chunk and not self._begun:
            self._begin(chunk)
        return chunk

    def _raised(self, error: BaseException) -> None:
        if isinstance(error, HTTPResponse) and not self._begun:  # redirect(), abort(): an answer
            self._answer(error)
        else:
            self._fail(error)

    def _begin(self, chunk: Any) -> None:
        """The first chunk that is not empty: with it Bottle sends the status as it is now."""
        self._begun = True
        if isinstance(chunk, HTTPResponse):
            self._answer(chunk)
        elif not isinstance(chunk, (bytes, str)):  # Bottle answers with a 500
            self._fail(TypeError(f"a body gave a chunk of type {type(chunk).__name__}"))
        elif self._work is not None:
            self._work.note_status(response.status_code)

    def _answer(self, answer: HTTPResponse) -> None:
        """Bottle takes this answer instead, and asks for no further chunk."""
        if self._work is not None:
            self._work.note_status(answer.status_code)
        self._finish()

    def _finish(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.body_ended()

    def _fail(self, error: BaseException) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.end(error)

    def close(self) -> None:
        """End it, wherever it is. Does nothing the second time."""
        work, self._work = self._work, None
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()  # first: its `finally` may still use the connection
        finally:
            if work is not None:
                work.cut_off()


def _goes_on(body: Any) -> bool:
    """Whether Bottle will ask it for chunk after chunk. A file needs no connection for that."""
    if not body or isinstance(body, (str, bytes, dict, list, tuple, HTTPResponse)):
        return False
    if hasattr(body, "read") or _is_part_of_file(body):
        return False
    return hasattr(body, "__iter__")


def _is_part_of_file(body: Any) -> bool:
    code = getattr(getattr(body, "iterator", None), "gi_code", None)
    return code is not None and code is _PART_OF_FILE


def _place_of(view: Any) -> tuple[str, int] | None:
    """Where a view is written: its connection is borrowed before it runs."""
    code = getattr(inspect.unwrap(view), "__code__", None)
    return None if code is None else (code.co_filename, code.co_firstlineno)


def _takes(view: Any, keyword: str) -> bool:
    """Whether a view has an argument of this name, also below decorators that used `functools.wraps`.

    Not by Bottle's `get_callback_args`: up to 0.13 it never returns for some closures.
    """
    try:
        argument = inspect.signature(view).parameters.get(keyword)
    except (TypeError, ValueError):  # some callables written in C do not tell
        return False
    return argument is not None and argument.kind in _BY_KEYWORD


# -- what may be given --------------------------------------------------------------------------------


def _check_mode(mode: Any, where: str = "") -> None:
    if mode not in MODES:
        raise MisuseError(
            f"{where}transactions is {mode!r}", next_step=f"write one of {', '.join(MODES)}"
        )


def _check_keyword(keyword: Any, where: str = "") -> None:
    if not (isinstance(keyword, str) and keyword.isidentifier()):
        raise MisuseError(
            f"{where}keyword is {keyword!r}", next_step='name an argument of views, as "db"'
        )


def _refuse_unknown(route: Any) -> None:
    """Look at the options that the route itself was given; the app's may be anybody's.

    Raises:
        MisuseError: there is no such option.
    """
    known = {plugin.keyword for plugin in route.all_plugins() if isinstance(plugin, Penstock)}
    for key in route.config:
        section, _, rest = key.partition(".")
        if section != SECTION or key in route.app.config:
            continue
        keyword, _, option = rest.rpartition(".")
        if option not in _OPTIONS or (keyword and keyword not in known):
            raise MisuseError(
                f"route {route.rule!r} has no option {key!r}", next_step=_instead(option, known)
            )


def _instead(option: str, keywords: Iterable[str]) -> str:
    if option == "autocommit":
        return (
            'write penstock={"transactions": "autocommit"} (each statement by itself), or '
            '"explicit" (the view commits)'
        )
    names = ", ".join(sorted(keywords))
    return (
        f"the options are {' and '.join(_OPTIONS)}, for all databases or below the keyword of one "
        f"({names}); skip=[plugin] takes a plugin off the route"
    )
