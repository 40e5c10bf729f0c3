"""What penstock puts round an asyncpg connection: a dead protocol, and a watch over its settings.

Two things are wanted and neither may cost a query anything. A connection that was given back must
raise when it is used: `DEAD` takes the place of its protocol, which is asyncpg's way to the wire. And
no listener, logger or codec of one borrower may reach the next: a subclass, made once per
connection class, notes the change when it happens, and the return looks at one set.

It must not know: how links are opened or cleaned, deadlines, the server.
Private names of asyncpg that this relies on are each held by tests/drivers/test_asyncpg_assumptions.py.
No lock: everything happens on the connection's event loop.
"""

# asyncpg is annotated, but not as a typed package: what is read off its code is not its promise.
# pyright: reportOptionalMemberAccess=false, reportIncompatibleMethodOverride=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from types import new_class
from typing import TYPE_CHECKING, Any, Final, NoReturn
from weakref import WeakSet

import asyncpg

from penstock._drivers.asyncpg.cancel import Target, ask_to_cancel
from penstock._drivers.misuse import GIVEN_BACK, INHERITED_SESSION, misuse_error
from penstock._drivers.outdated import CODES, outdated_by
from penstock.drivers import Outdated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Misuse: Final = misuse_error("asyncpg", asyncpg.InterfaceError)


class DeadProtocol:
    """Stands where the protocol was while nobody has borrowed the connection.

    It is not connected, so that `conn.is_closed()` is true and closing does nothing. Whatever else is
    asked of it raises.

    Attributes:
        why: what it says then.
    """

    __slots__ = ("why",)

    def __init__(self, why: str) -> None:
        self.why = why

    def is_connected(self) -> bool:
        """Never."""
        return False

    def __getattr__(self, name: str) -> NoReturn:
        raise Misuse(self.why)


DEAD: Final = DeadProtocol(GIVEN_BACK)
#: In a forked child, for what was open at the fork.
INHERITED: Final = DeadProtocol(INHERITED_SESSION)

#: What is noted while a COPY is under way.
COPYING: Final = "copying"

#: What the names of asyncpg's prepared statements begin with.
_NAMES: Final = "__asyncpg_"

_FORGETTING: Final = frozenset(("DISCARD ALL", "DEALLOCATE ALL"))

# (schema, type) -> the method that set its codec, and with what.
Codecs = dict[tuple[str, str], tuple[str, dict[str, Any]]]


class Watch:
    """What is noted about one connection.

    Attributes:
        protocol: the real one.
        touched: what of the connection has been changed since it was new; empty nearly always.
        codecs: the codecs that were set on it.
        recoded: the types whose codecs changed since it was new.
        tell: whom to tell when the session has ended, or None.
        drop: how to let go of the session when nobody holds the returned connection, or None.
        pid: the process that opened it.
    """

    __slots__ = ("codecs", "drop", "pid", "protocol", "recoded", "tell", "touched")

    def __init__(self, protocol: Any) -> None:
        self.protocol = protocol
        self.touched: set[str] = set()
        self.codecs: Codecs = {}
        self.recoded: set[tuple[str, str]] = set()
        self.tell: Callable[[], object] | None = None
        self.drop: Callable[[], object] | None = None
        self.pid = os.getpid()

    def has_ended(self, _conn: object) -> None:
        """Asyncpg's termination listener: the session is over."""
        tell, self.tell = self.tell, None
        if tell is not None:
            tell()


class Watching(asyncpg.Connection):  # type: ignore[misc]  # asyncpg is untyped
    """What is put in front of a connection class: the connection notes changes of its settings.

    It costs a statement next to nothing: the methods that run one are asyncpg's own, but for `_check_open`,
    which is as dear as the one that it replaces, for `_do_execute` (0.3 us of 60), which sees errors that
    asyncpg does not know what to do with, and for `execute` (0.2 us), which looks for the two commands that
    pull the statement cache from under asyncpg's feet.
    """

    __slots__ = ()

    _penstock: Watch

    def __init__(self, protocol: Any, *args: Any, **kwargs: Any) -> None:
        self._penstock = Watch(protocol)  # type: ignore[misc]  # the slot is the made class's
        super().__init__(protocol, *args, **kwargs)
        siblings(self).add(self)

    def __del__(self) -> None:
        watch: Watch | None = getattr(self, "_penstock", None)
        if watch is None:  # the class's own `__init__` has not come as far
            return
        if not isinstance(getattr(self, "_protocol", None), DeadProtocol):
            super().__del__()
        elif watch.drop is not None and watch.pid == os.getpid():
            watch.drop()

    # --- changes

    def _touch(self, what: str) -> None:
        """Note a change; refuse it if the connection is nobody's."""
        if isinstance(protocol := self._protocol, DeadProtocol):
            raise Misuse(protocol.why)
        self._penstock.touched.add(what)

    async def add_listener(self, channel: Any, callback: Any) -> None:
        """Listen to a channel, as in asyncpg; until the connection is given back."""
        self._touch("listeners")
        await super().add_listener(channel, callback)

    async def remove_listener(self, channel: Any, callback: Any) -> None:
        """Stop listening, as in asyncpg."""
        if not self.is_closed():
            self._touch("listeners")
            await super().remove_listener(channel, callback)

    def add_log_listener(self, callback: Any) -> None:
        """Listen to log messages, as in asyncpg; until the connection is given back."""
        self._touch("log listeners")
        super().add_log_listener(callback)

    def remove_log_listener(self, callback: Any) -> None:
        """Stop listening to log messages, as in asyncpg."""
        self._touch("log listeners")
        super().remove_log_listener(callback)

    def add_termination_listener(self, callback: Any) -> None:
        """Be told of the session's end, as in asyncpg; until the connection is given back."""
        self._touch("termination listeners")
        super().add_termination_listener(callback)

    def remove_termination_listener(self, callback: Any) -> None:
        """Be told no more, as in asyncpg."""
        self._touch("termination listeners")
        super().remove_termination_listener(callback)

    def add_query_logger(self, callback: Any) -> None:
        """Log statements, as in asyncpg; until the connection is given back."""
        self._touch("query loggers")
        super().add_query_logger(callback)

    def remove_query_logger(self, callback: Any) -> None:
        """Log no more, as in asyncpg."""
        self._touch("query loggers")
        super().remove_query_logger(callback)

    async def set_type_codec(self, typename: Any, *, schema: Any = "public", **how: Any) -> None:
        """Set a type's codec, as in asyncpg; until the connection is given back."""
        self._recode(schema, typename)
        await super().set_type_codec(typename, schema=schema, **how)
        self._penstock.codecs[schema, typename] = ("set_type_codec", how)

    async def set_builtin_type_codec(
        self, typename: Any, *, schema: Any = "public", **how: Any
    ) -> None:
        """Give a type a codec of asyncpg's, as in asyncpg; until the connection is given back."""
        self._recode(schema, typename)
        await super().set_builtin_type_codec(typename, schema=schema, **how)
        self._penstock.codecs[schema, typename] = ("set_builtin_type_codec", how)

    async def reset_type_codec(self, typename: Any, *, schema: Any = "public") -> None:
        """Take a type's codec away, as in asyncpg; until the connection is given back."""
        self._recode(schema, typename)
        await super().reset_type_codec(typename, schema=schema)
        self._penstock.codecs.pop((schema, typename), None)

    def _recode(self, schema: str, typename: str) -> None:
        self._touch("codecs")
        self._penstock.recoded.add((schema, typename))

    async def execute(self, query: Any, *args: Any, timeout: Any = None) -> Any:
        """Run a statement, as in asyncpg."""
        status = await super().execute(query, *args, timeout=timeout)
        if status in _FORGETTING:
            # The server has forgotten what asyncpg prepared; asyncpg would count on it, and fail,
            # each time until the statement leaves its cache.
            self._mark_stmts_as_closed()
        return status

    async def _do_execute(self, *args: Any, **how: Any) -> Any:
        try:
            return await super()._do_execute(*args, **how)
        except asyncpg.PostgresError as error:
            if error.sqlstate in CODES:
                self._note_outdated(error)
            raise

    def _note_outdated(self, error: BaseException) -> None:
        """If this error says that what asyncpg remembers is outdated: forget it, on all connections.

        asyncpg does so by itself for "cached plan must not change result type" and for a composite type
        of other attributes, but not in a cursor.
        """
        if isinstance(
            error, asyncpg.OutdatedSchemaCacheError
        ):  # asyncpg's own: the session is well
            self._drop_global_type_cache()
            self._drop_global_statement_cache()
            return
        found = outdated(error)
        if found is None:
            return
        self._drop_global_statement_cache()
        if found is Outdated.TYPES:
            self._drop_global_type_cache()
        if found is not Outdated.STATEMENTS:
            self._penstock.touched.add(found)

    async def _copy_out(self, *args: Any) -> Any:
        with self._watched_copy():
            return await super()._copy_out(*args)

    async def _copy_in(self, *args: Any) -> Any:
        with self._watched_copy():
            return await super()._copy_in(*args)

    async def copy_records_to_table(self, table_name: Any, **how: Any) -> Any:
        """Copy rows into a table, as in asyncpg."""
        with self._watched_copy():
            return await super().copy_records_to_table(table_name, **how)

    @contextmanager
    def _watched_copy(self) -> Iterator[None]:
        # Cancelled when the server's answer has just come, asyncpg leaves the COPY where it is and
        # takes the session for idle.
        # And while the program's own code takes or gives the data, nothing of asyncpg's tells that it is in one.
        touched = self._penstock.touched
        touched.add(COPYING)
        try:
            yield
        except (asyncpg.PostgresError, asyncpg.InterfaceError):
            raise
        except BaseException:
            touched.add("copy")
            raise
        finally:
            touched.discard(COPYING)

    async def close(self, *, timeout: Any = None) -> None:
        """End the session, as in asyncpg."""
        self._wish_to_end()
        await super().close(timeout=timeout)

    def terminate(self) -> None:
        """Drop the session, as in asyncpg."""
        self._wish_to_end()
        super().terminate()

    def _wish_to_end(self) -> None:
        # asyncpg itself terminates, too, when a request to cancel has failed: that is no wish.
        watch = self._penstock
        if not self._is_parked() and not watch.protocol._is_cancelling():
            watch.touched.add("closed")

    async def _reset(self) -> None:
        # Of asyncpg's own reset(): it takes all listeners away.
        self._touch("listeners")
        await super()._reset()

    def _cancel_current_command(self, *args: Any) -> None:
        # A statement was cancelled or timed out: its reply is still to come.
        self._penstock.touched.add("cancelled")
        super()._cancel_current_command(*args)

    async def _cancel(self, sent: Any, answered: Any = None) -> None:
        """In the place of asyncpg's: the connection may have been given back by the time it begins.

        Args:
            sent: a future, to be done when the request to cancel is.
            answered: one that is done when the statement's reply has come; not before asyncpg 0.32.
        """
        try:
            async with asyncio.timeout(self._config.command_timeout):
                await ask_to_cancel(self._target())
                _finish(sent)
                if answered is not None and self._penstock.protocol.is_connected():
                    await asyncio.shield(answered)
        except asyncio.CancelledError:
            pass  # the session ends, or the loop; nobody waits for this task
        except Exception:  # noqa: BLE001  whatever it was: what the session does is not known any more
            self._penstock.protocol.abort()
            self._cleanup()
        finally:
            self._cancellations.discard(asyncio.current_task())
            _finish(sent)

    def _target(self) -> Target:
        params, protocol = self._params, self._penstock.protocol
        return Target(
            address=self._addr,
            tls=None if params.sslmode.name == "allow" else params.ssl or None,
            advisory=params.sslmode.name == "prefer",
            pid=protocol.backend_pid,
            secret=protocol.backend_secret,
        )

    # --- while it is nobody's

    def _check_open(self) -> None:
        protocol = self._protocol
        if self._aborted or not protocol.is_connected():
            if isinstance(protocol, DeadProtocol):
                raise Misuse(protocol.why)
            raise asyncpg.InterfaceError("connection is closed")

    def _drop_local_type_cache(self) -> None:
        self._penstock.protocol.get_settings().clear_type_cache()

    def _drop_global_statement_cache(self) -> None:
        # The schema has changed for all: in a transaction each would fail once by itself.
        for each in list(siblings(self)):
            each._drop_local_statement_cache()

    def _drop_global_type_cache(self) -> None:
        for each in list(siblings(self)):
            each._drop_local_type_cache()

    def _is_parked(self) -> bool:
        return isinstance(self._protocol, DeadProtocol) and self._penstock.protocol.is_connected()

    def _abort(self) -> None:
        if not self._is_parked():
            super()._abort()

    def _cleanup(self) -> None:
        # close() and terminate() of somebody who has given the connection back end up here; and so
        # does the end of the session, when the protocol is not connected any more.
        if not self._is_parked():
            self._penstock.touched.add("ended")
            super()._cleanup()


def outdated(error: BaseException) -> Outdated | None:
    """What an error of asyncpg's says to be outdated."""
    if not isinstance(error, asyncpg.PostgresError):
        return None
    text = str(error.args[0]) if error.args else ""
    return outdated_by(error.sqlstate, error.server_source_function, text, _NAMES)


def _finish(future: Any) -> None:
    if not future.done():
        future.set_result(None)


# The connections of one loop to one database, by the loop's id.
_families: dict[tuple[int, Any, Any], WeakSet[Any]] = {}


def siblings(conn: Any) -> WeakSet[Any]:
    """The connections of its loop to its database, itself among them."""
    key = (id(conn._loop), conn._addr, conn._params.database)
    return _families.setdefault(key, WeakSet())


# Made once per connection class.
_watched_classes: dict[type[Any], type[Any]] = {}
_adopted_classes: dict[type[Any], type[Any]] = {}


def watched(base: type[Any]) -> type[Any]:
    """The class to build connections of: a subclass of `base` that looks like it and watches."""
    if base not in _watched_classes:
        _watched_classes[base] = _made(base, __slots__=("_penstock",))
    return _watched_classes[base]


def adopted(base: type[Any]) -> type[Any]:
    """The class that a connection of the class `base` may change into: of the same shape, without a slot more."""
    if base not in _adopted_classes:
        shape = (WithDict,) if base.__dictoffset__ else ()
        place = property(_watch_of, _set_watch)
        _adopted_classes[base] = _made(base, *shape, __slots__=(), _penstock=place, __del__=_forget)
    return _adopted_classes[base]


class WithDict(asyncpg.Connection):  # type: ignore[misc]  # asyncpg is untyped
    """The shape of the classes that people make of asyncpg's: with a __dict__, where `Watching` has none."""


def _made(base: type[Any], *shape: type[Any], **body: Any) -> type[Any]:
    bases = (*shape, Watching, base)
    made = new_class(base.__name__, bases, {}, lambda space: space.update(body))
    made.__qualname__ = base.__qualname__
    made.__module__ = base.__module__
    made.__doc__ = base.__doc__
    return made


# The watches of connections that have no slot for one, by the connection's id; until its finalizer. Not by a
# weak reference: the garbage collector clears those before the finalizer, which needs the watch.
_watches: dict[int, Watch] = {}


def _watch_of(conn: Any) -> Watch:
    try:
        return _watches[id(conn)]
    except KeyError:
        raise AttributeError("_penstock") from None


def _set_watch(conn: Any, watch: Watch) -> None:
    _watches[id(conn)] = watch


def _forget(conn: Any) -> None:
    try:
        Watching.__del__(conn)
    finally:
        _watches.pop(id(conn), None)


class Settings:
    """The client-side settings of a connection as they were at one instant."""

    __slots__ = ("_codecs", "_listeners", "_log", "_loggers", "_termination")

    def __init__(self, conn: Any) -> None:
        watch: Watch = conn._penstock
        self._listeners = {channel: set(calls) for channel, calls in conn._listeners.items()}
        self._log = set(conn._log_listeners)
        self._loggers = set(conn._query_loggers)
        self._termination = set(conn._termination_listeners)
        self._codecs = dict(watch.codecs)
        watch.recoded.clear()
        watch.touched.clear()

    def restore(self, conn: Any) -> None:
        """Set back what needs no word to the server. Works on a returned connection."""
        conn._listeners = {channel: set(calls) for channel, calls in self._listeners.items()}
        conn._log_listeners = set(self._log)
        conn._query_loggers = set(self._loggers)
        conn._termination_listeners = set(self._termination)
        conn._penstock.touched.clear()

    def channels(self, conn: Any) -> tuple[list[str], list[str]]:
        """The channels that the server should not be listened to on any more, and those to hear again."""
        now, then = conn._listeners.keys(), self._listeners.keys()
        return sorted(now - then), sorted(then - now)

    async def restore_codecs(self, conn: Any) -> None:
        """Set the codecs back; round trips for each that changed. The connection must be lent.

        Raises:
            asyncpg.PostgresError, ValueError: a type is gone.
        """
        watch: Watch = conn._penstock
        for schema, typename in sorted(watch.recoded):
            if (schema, typename) in watch.codecs:
                await conn.reset_type_codec(typename, schema=schema)
            if (schema, typename) in self._codecs:
                method, how = self._codecs[schema, typename]
                await getattr(conn, method)(typename, schema=schema, **how)
        watch.recoded.clear()
