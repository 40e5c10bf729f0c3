"""Connecting by a function that is not the library's own, and taking what it gives.

A tracer replaces the library's `connect` to have each connection made with a cursor that records, or
puts a proxy around it; a program's connection class overrides `connect` to fetch a token. Such a
function is called, and the open connection that it gives is adopted as a link.

One job: to tell the library's own function from another one, to call the other one, and to find the
library's connection behind a proxy. It must not know: any database library, links, pools. No lock.
"""

from __future__ import annotations

from inspect import isawaitable
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from penstock.drivers import NotAdopted

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock.config.secret import Hidden

#: How many proxies may be around each other.
_DEEPEST: Final = 20

_STEP: Final = "look at {}: it is the program's own, or a tracer has replaced it"


class ConnectRaised(Exception):  # noqa: N818  it says what happened
    """A `connect` that is not the library's raised what no library raises (the cause).

    Attributes:
        next_step: what to do.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.next_step = _STEP.format(name)

    def __str__(self) -> str:
        return f"{self.args[0]} raised"


class OwnConnect(NamedTuple):
    """A function that connects and is not the library's own.

    Attributes:
        call: the function.
        name: what to call it in an error.
    """

    call: Callable[..., Any]
    name: str


def is_original(found: Any, module: str) -> bool:
    """Whether a function, or a method of a class, is what the library's `module` defines.

    The function itself is asked, at each opening: a tracer may come before penstock is imported or after
    the pool is made, and may go again. A copy that pretends (`functools.wraps`) has attributes, and
    the globals of another module.
    """
    if type(found) is MethodType:
        found = found.__func__
    return (
        type(found) is FunctionType
        and found.__globals__.get("__name__") == module
        and not vars(found)
    )


def called(
    own: OwnConnect,
    arguments: tuple[Any, ...],
    options: Hidden[dict[str, Any]],
    is_librarys: Callable[[Exception], bool],
) -> Any:
    """What the function gives.

    Args:
        own: the function.
        arguments: positional.
        options: by keyword; a password may be among them.
        is_librarys: whether an error is one that the library's own function could raise.

    Raises:
        ConnectRaised: an error that is the function's own.
        Exception: the library's.
    """
    try:
        return own.call(*arguments, **options.value)
    except Exception as error:
        if is_librarys(error):
            raise
        raise ConnectRaised(own.name) from error


async def awaited(
    own: OwnConnect,
    arguments: tuple[Any, ...],
    options: Hidden[dict[str, Any]],
    is_librarys: Callable[[Exception], bool],
) -> Any:
    """What the function gives, be it a function or a coroutine function; as `called`."""
    try:
        answer = own.call(*arguments, **options.value)
        return await answer if isawaitable(answer) else answer
    except Exception as error:
        if is_librarys(error):
            raise
        raise ConnectRaised(own.name) from error


def unwrapped(given: Any, kind: type[Any]) -> Any:
    """The library's connection: `given` itself, or what is inside of the proxies around it.

    Raises:
        NotAdopted: there is none.
    """
    found = given
    for _ in range(_DEEPEST):
        # Not isinstance(): a proxy pretends to be of the class of what it holds.
        if issubclass(type(found), kind):
            return found
        found = getattr(found, "__wrapped__", None)
    raise NotAdopted(
        f"it is a {type(given).__qualname__}, and no {kind.__module__}.{kind.__qualname__}",
        f"give a {kind.__qualname__}, or a proxy that has one as __wrapped__",
    )


def taken() -> NotAdopted:
    """What to raise for a connection that a pool has."""
    return NotAdopted("it is in a pool already", "give each pool connections of its own", True)


def not_at_rest(what: str) -> NotAdopted:
    """What to raise for a connection in the middle of something."""
    return NotAdopted(f"it is {what}", "end with commit() or rollback(), and close no connection")
