"""The Flask extension: ``db = Penstock(app)``, and ``db.conn`` in views.

One job: tell loans.py where requests and contexts begin and end, and give users its verbs.

It must not know: how connections are borrowed and given back (loans.py), what settings mean
(flask_settings.py).

Whose is a connection? In a request: the request's, whatever app contexts are nested in it. Elsewhere
(a command, a script): the app context's. A context made by `copy_current_request_context` is a unit
of its own, since it is meant for another thread.

Three methods of the app, all of them called once per request or context, are extended:
`process_response` (commit when everybody's `after_request` is through, so that none of them can turn
committed work into an error), `do_teardown_request` and `do_teardown_appcontext` (give back after
everybody's teardown, also when one of them raises: Flask up to 3.1 calls no further one then).
Hooks of ours would be in the middle of other people's.

No lock of its own: a fork could leave one locked. Finding a unit's `Loans` is one atomic step.
"""

from __future__ import annotations

import logging
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast, overload
from weakref import WeakKeyDictionary

from flask import Flask, Response, current_app, has_request_context, request
from flask import globals as flask_globals
from werkzeug.exceptions import ServiceUnavailable
from werkzeug.wrappers import Response as AnyResponse

from penstock.config.secret import Hidden
from penstock.errors import MisuseError, PoolTimeout, TooManyRequests
from penstock.errors import ServerUnavailable as DatabaseUnavailable
from penstock.integrations._unit.loans import Loan, Loans, execute
from penstock.integrations.flask import settings as flask_settings
from penstock.integrations.flask.settings import MAIN
from penstock.integrations.flask.streams import Streamed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import psycopg
    from flask import Request
    from psycopg.rows import TupleRow

    from penstock._pool.reporter import Health
    from penstock._pool.sync.pool import ConnectionPool

ConnT = TypeVar("ConnT")
HookT = TypeVar("HookT", bound="Callable[[Any], object]")

_log = logging.getLogger("penstock.flask")
EXTENSION = "penstock"


class Rows(Protocol):
    """What `execute` gives: the driver's cursor, of which every driver's has this."""

    rowcount: int
    description: Any

    def fetchone(self) -> Any:
        """Give the next row, or None after the last."""

    def fetchmany(self, size: int = ...) -> list[Any]:
        """Give the next rows, fewer at the end."""

    def fetchall(self) -> list[Any]:
        """Give all rows from here on."""

    def __iter__(self) -> Iterator[Any]: ...


class Database(Generic[ConnT]):
    """One database of the current app. Make it by ``db["key"]``; `Penstock` is the main one.

    It may be made before any app is: nothing is looked up until it is used.

    Attributes:
        hooks: what `on_first_use` was given, in this order.
    """

    def __init__(self, extension: Penstock[Any], key: str) -> None:
        self._extension = extension
        self._key = key
        self.hooks: list[Callable[[Any], object]] = []

    @property
    def conn(self) -> ConnT:
        """The connection of this request: the driver's own, borrowed now if it was not yet.

        The same one for the whole request, given back at its end whatever happens; after that its
        use raises. Outside of requests it belongs to the app context.

        Raises:
            MisuseError: there is no app context, or the app has no such database.
            PenstockError: as `ConnectionPool.connection`.
        """
        return cast("ConnT", self._loan().conn)

    def execute(self, query: Any, params: Any = None) -> Rows:
        """Run a statement on `conn`, in the transaction of the request.

        Args:
            query: as the driver takes it.
            params: as the driver takes them.

        Raises:
            PenstockError: as `conn`.
            Exception: the driver's errors.
        """
        return cast("Rows", execute(self.conn, query, params))

    def stream(self, body: Iterable[Any] | AnyResponse, **options: Any) -> Response:
        """Make a response that keeps `conn` until it has been sent, or is given up.

        The body runs in the request's context: `conn`, `request` and `g` are what they were in the
        view.  What the view has written is committed before the first chunk; what it only began to
        read (a server-side cursor) goes on. What the body itself writes must be committed by it.

        Args:
            body: an iterable of texts or bytes (a generator), or a response that has one.
            **options: for the app's response class: ``status=``, ``mimetype=``, ``headers=``.

        Returns:
            The response, for the view to return.

        Raises:
            MisuseError: this is no request.
            PenstockError: as `conn`, which is borrowed now: later it would be too late for a 503.
        """
        app_pools = self._app_pools()
        if not has_request_context():
            raise MisuseError(
                "db.stream() was called outside of a request",
                next_step="iterate here, over a cursor of db.conn",
            )
        if isinstance(body, AnyResponse):
            response = cast("Response", body)
        else:
            response = current_app.response_class(cast("Any", body), **options)
        response.response = Streamed(
            response.response, _contexts(), app_pools.loans(), self._key, self._loan()
        )
        return response

    def commit(self) -> None:
        """Commit what is open on this request's connection. Does nothing if none was borrowed.

        Raises:
            MisuseError: a statement of the transaction has failed.
            Exception: the driver's errors.
        """
        loan = self._app_pools().loans().get(self._key)
        if loan is not None:
            loan.commit()

    def rollback(self) -> None:
        """Roll back what is open. After it, a connection that was lost is replaced."""
        loan = self._app_pools().loans().get(self._key)
        if loan is not None:
            loan.roll_back()

    @property
    def pool(self) -> ConnectionPool[ConnT]:
        """The pool of the current app, for work on a connection of its own.

        Raises:
            MisuseError: as `conn`.
        """
        return cast("ConnectionPool[ConnT]", self._app_pools().pool(self._key))

    def health(self) -> Health:
        """Whether the pool can serve, from its state: nothing is borrowed.

        Raises:
            MisuseError: as `conn`.
        """
        return self.pool.health()

    def on_first_use(self, hook: HookT) -> HookT:
        """Register a function that gets the connection before its first user does, as a decorator.

        It is called in the request's transaction, once per request; again if that transaction has
        ended and `conn` is asked for again. If it raises, the connection is given back.

        Args:
            hook: called with the connection.
        """
        self.hooks.append(hook)
        return hook

    def _loan(self) -> Loan:
        app_pools = self._app_pools()
        return app_pools.loans().borrow(
            self._key,
            app_pools.pool(self._key),
            self._extension.hooks_of(self),
            autocommit=app_pools.transactions == "autocommit",
        )

    def _app_pools(self) -> AppPools:
        try:
            app = _behind(flask_globals.app_ctx).app
        except RuntimeError:  # werkzeug's word for it
            raise MisuseError(
                "a database was asked for outside of a Flask app context",
                next_step="work in a view or a command, or inside `with app.app_context():`; a "
                "thread of its own borrows from app.extensions['penstock'].pools['default']",
            ) from None
        found = app.extensions.get(EXTENSION)
        if not isinstance(found, AppPools) or found.extension is not self._extension:
            why = "was initialised by another Penstock object" if found else "was not initialised"
            raise MisuseError(
                f"the app {app.name!r} {why}",
                next_step="call init_app(app) of the Penstock object that you use, once",
            )
        return found

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._key!r}>"


class Penstock(Database[ConnT]):
    """The extension, and its main database. One object serves any number of apps.

    Args:
        app: a Flask app, or a Connexion app that holds one; None: call `init_app` later.
        connection_class: the driver's connection class, for every database that names no other.
    """

    @overload
    def __init__(
        self: Penstock[psycopg.Connection[TupleRow]],
        app: Any = None,
        *,
        connection_class: None = None,
    ) -> None: ...

    @overload
    def __init__(self, app: Any = None, *, connection_class: type[ConnT]) -> None: ...

    def __init__(self, app: Any = None, *, connection_class: type[Any] | None = None) -> None:
        super().__init__(self, MAIN)
        self._connection_class = connection_class
        self._databases: dict[str, Database[ConnT]] = {}
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Any) -> None:
        """Read an app's settings and make its pools. Opens nothing: the first use does.

        Args:
            app: a Flask app, or a Connexion app that holds one.

        Raises:
            ConfigError: naming the key of the app's configuration.
            MisuseError: the app was initialised before, or is none.
        """
        app = _flask_app(app)
        if EXTENSION in app.extensions:
            raise MisuseError(
                f"the app {app.name!r} was initialised twice",
                next_step="either Penstock(app) or init_app(app), once per app",
            )
        defaults = {"connection_class": self._connection_class} if self._connection_class else {}
        settings = flask_settings.read(
            Hidden(app.config), app.name, defaults, debug=bool(app.debug)
        )
        if settings.retry_after is not None:  # first: Flask refuses it once it has served
            _answer_with_503(app, settings.retry_after)
        app_pools = AppPools(self, app, settings)
        app.extensions[EXTENSION] = app_pools
        _extend(app, app_pools)

    def __getitem__(self, key: str) -> Database[ConnT]:
        return self._databases.setdefault(key, Database(self, key))

    def hooks_of(self, database: Database[Any]) -> list[Callable[[Any], object]]:
        """Those of all databases (registered on the extension), then its own."""
        return self.hooks if database is self else [*self.hooks, *database.hooks]


class AppPools:
    """What ``app.extensions["penstock"]`` is: an app's pools.

    Attributes:
        pools: by key; the main database's is "default". Tests may put others in their place.
        transactions: as the app's settings say.
        extension: whose they are.
    """

    def __init__(
        self, extension: Penstock[Any], app: Flask, settings: flask_settings.Settings
    ) -> None:
        self.extension = extension
        self.pools = settings.pools
        self.transactions = settings.transactions
        self._app_name = app.name
        # A context that is dropped without an end drops what it has borrowed, too.
        self._loans: WeakKeyDictionary[Any, Loans] = WeakKeyDictionary()

    def pool(self, key: str) -> ConnectionPool[Any]:
        """Give a database's pool.

        Raises:
            MisuseError: there is no such database.
        """
        if key in self.pools:
            return self.pools[key]
        known = ", ".join(map(repr, self.pools))
        raise MisuseError(
            f"the app {self._app_name!r} has no database {key!r}; it has {known}",
            next_step="name it in PENSTOCK_DATABASE_URI (the main one) or PENSTOCK_BINDS",
        )

    def close(self, timeout: float | None = 5.0) -> None:
        """Close all pools; see `ConnectionPool.close`. For tests that make many apps."""
        for pool in self.pools.values():
            pool.close(timeout)

    def loans(self) -> Loans:
        """What the current request has borrowed, or the current app context."""
        unit = _current_unit()
        found = self._loans.get(unit)
        if found is None:  # of two threads that get here together, both use the first one's
            found = self._loans.setdefault(unit, Loans(_name_of_unit(self._app_name)))
        return found

    def answered(self, response: AnyResponse) -> None:
        """The current request has its response: commit, if that is what the app wants."""
        loans = self._loans.get(_current_unit())
        if loans is None:
            return
        loans.answered = f" answered {response.status_code}"
        loans.refused = response.status_code >= 400
        if _is_without_body(response):
            loans.close_streams()
        elif response.is_sequence:
            loans.drop_streams()
        if self.transactions == "request" and not loans.refused:
            loans.commit_all()

    def ended(self, unit: Any, error: BaseException | None) -> None:
        """A request or an app context has ended."""
        loans = self._loans.get(unit)
        if loans is not None:
            loans.end(error)


# -- where units of work begin and end ----------------------------------------------------------------


def _current_unit() -> Any:
    """The request's context if it is of the current app, else the app's."""
    app_context = _behind(flask_globals.app_ctx)
    if has_request_context():
        # Where there is no such name (Flask to come), the app's context is the request's, too.
        request_context = _behind(vars(flask_globals).get("request_ctx", flask_globals.app_ctx))
        if request_context.app is app_context.app:
            return request_context
    return app_context


def _contexts() -> list[Any]:
    """Those that a body of the current request runs in."""
    contexts = [_behind(flask_globals.app_ctx), _current_unit()]
    return contexts[: 1 + (contexts[0] is not contexts[1])]


def _is_without_body(response: AnyResponse) -> bool:
    """Whether werkzeug sends the headers alone: then it neither iterates nor closes the body."""
    status = response.status_code
    return request.method == "HEAD" or status < 200 or status in {204, 304}


def _behind(proxy: Any) -> Any:
    return proxy._get_current_object()  # noqa: SLF001  werkzeug's documented name


def _name_of_unit(app_name: str) -> str | Callable[[], str]:
    import click  # noqa: PLC0415  it comes with Flask

    if has_request_context():  # written when it is wanted, which is seldom
        return partial(_name_of_request, _behind(request))
    command = click.get_current_context(silent=True)
    if command is not None and command.info_name:
        return f"command {command.info_name!r}"
    return f"an app context of {app_name!r}"


def _name_of_request(asked: Request) -> str:
    route = "no route" if asked.url_rule is None else asked.url_rule.rule
    return f"{asked.method} {route} (endpoint {asked.endpoint!r})"


def _extend(app: Flask, app_pools: AppPools) -> None:
    answer = app.process_response

    @wraps(answer)
    def process_response(*args: Any) -> Any:
        response = answer(*args)
        app_pools.answered(response)
        return response

    vars(app)["process_response"] = process_response
    for name, context in (
        ("do_teardown_request", vars(flask_globals).get("request_ctx", flask_globals.app_ctx)),
        ("do_teardown_appcontext", flask_globals.app_ctx),
    ):
        vars(app)[name] = _then_end(getattr(app, name), app_pools, context)


def _then_end(teardown: Callable[..., Any], app_pools: AppPools, context: Any) -> Any:
    @wraps(teardown)
    def extended(*args: Any) -> Any:
        error = next((each for each in args if isinstance(each, BaseException)), None)
        try:
            return teardown(*args)
        finally:
            app_pools.ended(_behind(context), error)

    return extended


def _flask_app(app: Any) -> Flask:
    """The app itself, or the one in a Connexion app."""
    for found in (app, getattr(app, "app", None)):
        if isinstance(found, Flask):
            return found
    raise MisuseError(
        f"init_app() got a value of type {type(app).__name__}",
        next_step="give it a Flask app, or a Connexion app that holds one",
    )


# -- errors as answers ----------------------------------------------------------------------------------


def _answer_with_503(app: Flask, seconds: int) -> None:
    def unavailable(error: Exception) -> Any:
        _log.error("%s", error, exc_info=error.__cause__)
        return app.handle_http_exception(ServiceUnavailable(retry_after=seconds))

    handlers = app.error_handler_spec.get(None, {}).get(None, {})
    for error in (PoolTimeout, DatabaseUnavailable, TooManyRequests):
        if error not in handlers:  # the app's own is kept, on whichever side of init_app it stands
            app.register_error_handler(error, unavailable)
