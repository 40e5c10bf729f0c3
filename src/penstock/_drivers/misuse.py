"""What somebody is told who uses a connection that is not his any more.

One job: the words, and the error that says them: `MisuseError`, which is the driver's own InterfaceError
as well, so that handlers for a closed connection go on working and retry decorators do not retry a bug.

It must not know: drivers, links, pools. No lock: there is nothing to share.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

from penstock.errors import MisuseError, flavoured

#: While it is idle, or lent to somebody else as an object of its own.
GIVEN_BACK: Final = "this connection was given back to its pool; borrow another"
#: In a forked child, of what was open at the fork.
INHERITED_SESSION: Final = (
    "this connection was opened before the fork, and its session is the parent process's; borrow "
    "another here"
)


def misuse_error(name: str, interface_error: type[Exception]) -> type[Any]:
    """The class to raise, with one of the texts above.

    Args:
        name: the driver's name.
        interface_error: what the class is besides.
    """
    source: Any = SimpleNamespace(
        name=name, interface_error=interface_error, operational_error=None
    )
    return flavoured(MisuseError, source)
