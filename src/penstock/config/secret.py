"""Texts that may be passwords, and how they stay out of tracebacks that show local variables.

One job: `Secret`, a text with a blank repr; `Hidden`, a box that shows nothing of its content; `veiled`
and `lifted`, which put texts out of sight and bring them back; and `is_secret`, which tells by a
setting's name whether its value is one.

The rule for every frame of penstock that may raise: a local variable that can hold a password is
a `Secret` or a `Hidden`. A mapping with secrets is never a variable: some tools walk through
mappings and ignore their repr.

It must not know: settings, URLs, files, drivers. No lock: values do not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Secret(str):
    """A text whose repr is blank, so that tracebacks with locals do not show it.

    Attributes:
        original: what it stands for, where that is of a subclass of str; else not set.
    """

    __slots__ = ("original",)
    original: str

    def __repr__(self) -> str:
        return "'***'"

    def __getitem__(self, key: SupportsIndex | slice) -> Secret:
        # rich shows the beginning of a long text, by slicing it
        return Secret(super().__getitem__(key))


class Hidden(Generic[T]):
    """A box whose repr says nothing of its content."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "<hidden>"


class Unfit:
    """What stands for a value of a type that is never right: the type's name, not the value."""

    __slots__ = ("kind",)

    def __init__(self, value: object) -> None:
        self.kind = type(value).__name__


# Words that occur in the names of secret settings; URLs and conninfo strings may hold a password.
_WORDS = ("password", "passwd", "secret", "token", "url", "uri", "dsn", "conninfo")
_NAMES = frozenset(("pw", "pwd", "pass", "scram_client_key", "scram_server_key"))


def is_secret(key: str) -> bool:
    """Whether the value of a setting of that name may be, or hold, a secret."""
    name = key.lower()
    return name in _NAMES or any(word in name for word in _WORDS)


def veiled(value: Any) -> Any:
    """The same value, blank in tracebacks where it is a text, or a container of texts.

    Subclasses of containers stay as they are: nobody but their class can make another one.
    """
    if isinstance(value, str) and value:
        return value if isinstance(value, Secret) else _veiled_text(value)
    return _each(value, veiled)


def lifted(value: Any) -> Any:
    """What was veiled, as it was: libraries in C take exact types only."""
    if isinstance(value, Secret):
        return getattr(value, "original", None) or str(value)
    return _each(value, lifted)


def _veiled_text(text: str) -> Secret:
    found = Secret(str.__str__(text))  # not what an enum's own __str__ makes of it
    if type(text) is not str:
        found.original = text
    return found


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) is dict:
        return {key: change(each) for key, each in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(map(change, value))
    return value
