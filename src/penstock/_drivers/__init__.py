"""FLOOR 1: one file per driver; nothing here knows of pools.

This file only finds a driver by its name, at first use: `import penstock` imports none.
"""

from __future__ import annotations

import importlib
from inspect import iscoroutinefunction
from typing import Any, Final

from penstock._drivers.private import UnsupportedLibrary, refuse_unsupported
from penstock.errors import ConfigError, help_line

#: Library -> the module here that has its versions and its private names.
_PRIVATE: Final = {
    "psycopg": "psycopg3.private",
    "psycopg2": "psycopg2.private",
    "asyncpg": "asyncpg.private",
}
#: Name -> (module here, what must be installed, the extra that brings it).
_KNOWN: Final = {
    "psycopg": ("psycopg3.driver", "psycopg", "psycopg-binary"),
    "psycopg2": ("psycopg2.driver", "psycopg2", "psycopg2-binary"),
}
_KNOWN_ASYNC: Final = {
    "psycopg": ("psycopg3.aio_driver", "psycopg", "psycopg-binary"),
    "asyncpg": ("asyncpg.driver", "asyncpg", "asyncpg"),
}


class DriverNotFoundError(ImportError):
    """The driver's library is not installed, or not one that it can work with, or there is no such driver."""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{help_line('docs/errors/driver-not-found-error.md')}"


def chosen(driver: Any, *, asynchronous: bool) -> Any:
    """The driver that a pool was told: loaded by its name, or the object itself.

    Raises:
        DriverNotFoundError: as `load`.
        ConfigError: a driver for asyncio was given to a pool for threads, or the other way round.
    """
    if isinstance(driver, str):
        return load(driver, asynchronous=asynchronous)
    if iscoroutinefunction(driver.open) is not asynchronous:
        kind = type(driver).__name__
        if asynchronous:
            raise ConfigError("driver", kind, "an AsyncDriver: its open() is a coroutine function")
        raise ConfigError("driver", kind, "a Driver: one for asyncio goes to AsyncConnectionPool")
    return driver


def load(name: str, *, asynchronous: bool = False) -> Any:
    """Import the driver of that name: for threads and gevent, or for asyncio.

    Raises:
        DriverNotFoundError: with the names that exist, the extra to install, or the versions that are supported.
    """
    drivers, others = (_KNOWN_ASYNC, _KNOWN) if asynchronous else (_KNOWN, _KNOWN_ASYNC)
    if name not in drivers:
        raise DriverNotFoundError(_no_driver(name, sorted(drivers), other=name in others))
    module, library, extra = drivers[name]
    try:
        # First: a module that meets a library it does not know could fail in any way.
        private = importlib.import_module(f"penstock._drivers.{_PRIVATE[library]}")
        refuse_unsupported(private.LIBRARY)
        return importlib.import_module(f"penstock._drivers.{module}").driver
    except UnsupportedLibrary as error:
        raise DriverNotFoundError(f"driver {name!r} {error}") from None
    except ImportError as error:
        raise DriverNotFoundError(
            f"driver {name!r} needs {library}, which cannot be imported ({error}); "
            f"next step: pip install 'penstock[{extra}]'"
        ) from error


def _no_driver(name: str, known: list[str], *, other: bool) -> str:
    pool = "AsyncConnectionPool" if "asyncpg" in known else "ConnectionPool"
    text = f"no driver {name!r} for {pool}; there is: {', '.join(known)}"
    if other:
        right = "ConnectionPool" if pool == "AsyncConnectionPool" else "AsyncConnectionPool"
        text += f"; next step: use {right}, or another driver"
    return text
