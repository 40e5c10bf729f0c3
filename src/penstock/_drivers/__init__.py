"""FLOOR 1: one file per driver; nothing here knows of pools.

This file only finds a driver by its name, at first use: `import penstock` imports none.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from penstock.errors import help_line

#: Name -> (module here, what must be installed, the extra that brings it).
_KNOWN: Final = {"psycopg": ("psycopg3", "psycopg", "psycopg-binary")}


class DriverNotFoundError(ImportError):
    """The driver's library is not installed, or there is no driver of that name."""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{help_line('docs/errors/driver-not-found-error.md')}"


def load(name: str) -> Any:
    """Import the driver of that name.

    Raises:
        DriverNotFoundError: with the names that exist, or the extra to install.
    """
    if name not in _KNOWN:
        known = ", ".join(sorted(_KNOWN))
        raise DriverNotFoundError(f"no driver {name!r}; there is: {known}")
    module, library, extra = _KNOWN[name]
    try:
        return importlib.import_module(f"penstock._drivers.{module}").driver
    except ImportError as error:
        raise DriverNotFoundError(
            f"driver {name!r} needs {library}, which cannot be imported ({error}); "
            f"next step: pip install 'penstock[{extra}]'"
        ) from error
