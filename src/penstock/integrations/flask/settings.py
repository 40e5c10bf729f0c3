"""The settings of the Flask extension: from an app's configuration to pools.

One job: read the `PENSTOCK_` keys, and have every error name the key that is wrong.

It must not know: requests, contexts; what a database's keys mean, which is config/schema.py's to say.
Secrets: what may hold one is in a `Hidden` box or an `Entry`. No lock: it runs in `init_app`, and
opens nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Final

from penstock import _drivers
from penstock._pool.sync.pool import ConnectionPool
from penstock.config.pool_config import PoolConfig
from penstock.config.schema import keys_beside, options_of, pool_config
from penstock.config.secret import Hidden
from penstock.config.sections import Entry, Section, as_secret
from penstock.errors import ConfigError

PREFIX: Final = "PENSTOCK_"
URI: Final = "PENSTOCK_DATABASE_URI"
BINDS: Final = "PENSTOCK_BINDS"
OPTIONS: Final = "PENSTOCK_POOL_OPTIONS"
_POOL_OPTIONS: Final = options_of(PoolConfig)
_KEYS: Final = keys_beside(_POOL_OPTIONS)
TRANSACTIONS: Final = "PENSTOCK_TRANSACTIONS"
RETRY_AFTER: Final = "PENSTOCK_RETRY_AFTER"

#: The main database's key.
MAIN: Final = "default"

_DEFAULTS: Final[dict[str, Any]] = {
    URI: None,
    BINDS: {},
    OPTIONS: {},
    TRANSACTIONS: "request",
    RETRY_AFTER: None,
}
_MODES: Final = ("request", "explicit", "autocommit")


@dataclass(frozen=True, slots=True)
class Settings:
    """What an app says about its databases.

    Attributes:
        pools: one for each database, by key; none is open.
        transactions: "request", "explicit" or "autocommit".
        retry_after: seconds for a 503's Retry-After, or None for no 503.
    """

    pools: dict[str, ConnectionPool[Any]]
    transactions: str
    retry_after: int | None


def read(
    config: Hidden[Any], app_name: str, defaults: Mapping[str, Any], *, debug: bool = False
) -> Settings:
    """Read an app's configuration, and set what is missing to its default.

    Args:
        config: the app's; a mapping with `setdefault`.
        app_name: the pools are named after it.
        defaults: pool options that every setting overrides.
        debug: the app is in debug mode: pools have `guard=True` where that costs no session, and
            nothing says otherwise.

    Raises:
        ConfigError: naming the key of the app's configuration.
    """
    _refuse_misspelt(config)
    for key, default in _DEFAULTS.items():
        # a copy: an app may add to its own later, and must not add to every other app's
        config.value.setdefault(key, copy(default))
    return Settings(
        pools=_pools(config, app_name, defaults, debug=debug),
        transactions=_mode(config.value[TRANSACTIONS]),
        retry_after=_seconds(config.value[RETRY_AFTER]),
    )


def _refuse_misspelt(config: Hidden[Any]) -> None:
    """Other keys that begin with PENSTOCK_ are the app's own, unless they were meant for us."""
    for key in config.value:
        if not isinstance(key, str) or not key.startswith(PREFIX) or key in _DEFAULTS:
            continue
        meant = get_close_matches(key, _DEFAULTS, n=1, cutoff=0.8)
        word = key.removeprefix(PREFIX).lower()
        if word in _POOL_OPTIONS:
            meant = [_within(OPTIONS, word)]
        elif word in _KEYS:
            meant = [URI]
        if meant:
            raise ConfigError(key, hint=f"did you mean {meant[0]}?")


def _mode(given: Any) -> str:
    if given not in _MODES:
        raise ConfigError(TRANSACTIONS, repr(given), '"request", "explicit" or "autocommit"')
    return str(given)


def _seconds(given: Any) -> int | None:
    whole = isinstance(given, int) and not isinstance(given, bool) and given >= 0
    if given is not None and not whole:
        raise ConfigError(RETRY_AFTER, repr(given), "a whole number of seconds, 0 or more, or None")
    return given  # type: ignore[no-any-return]  # just looked at


def _pools(
    config: Hidden[Any], app_name: str, defaults: Mapping[str, Any], *, debug: bool
) -> dict[str, Any]:
    sections = {}
    if config.value[URI] is not None:
        sections[MAIN] = _database(Hidden(config.value[URI]), URI, app_name)
    for key in _checked(Hidden(config.value[BINDS]), BINDS).value:
        if key == MAIN:
            raise ConfigError(_within(BINDS, MAIN), what=f"the main database is {URI}")
        source = Hidden(config.value[BINDS][key])
        sections[key] = _database(source, _within(BINDS, key), f"{app_name}.{key}")
    if not sections:
        raise ConfigError(
            URI, "None", "a URL, a conninfo string or a mapping", hint='"" means PGHOST and so on'
        )
    shared = _entries(Hidden(config.value[OPTIONS]), OPTIONS)
    shared = _with(shared, tuple(Entry(key, key, value) for key, value in defaults.items()))
    return {key: _pool(section, shared, debug=debug) for key, section in sections.items()}


def _database(source: Hidden[Any], place: str, name: str) -> Section:
    if isinstance(source.value, str) or callable(source.value):
        own: tuple[Entry, ...] = (Entry(place, "conninfo", as_secret(source.value)),)
    else:
        own = _entries(source, place)
    return Section(name, own, spelling=lambda word: _within(place, word))


def _entries(source: Hidden[Any], place: str) -> tuple[Entry, ...]:
    return tuple(
        Entry(_within(place, key), key.lower(), as_secret(value))
        for key, value in _checked(source, place).value.items()
    )


def _checked(source: Hidden[Any], place: str) -> Hidden[Mapping[str, Any]]:
    if not isinstance(source.value, Mapping):
        kind = f"a value of type {type(source.value).__name__}"
        raise ConfigError(place, kind, "a mapping")
    if not all(isinstance(key, str) for key in source.value):
        raise ConfigError(place, "one with keys of other types", "a mapping with text keys")
    return source


def _within(place: str, key: str) -> str:
    return f'{place}["{key}"]'


def _with(entries: tuple[Entry, ...], others: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The entries, and what only the others say."""
    words = {entry.word for entry in entries}
    added = (replace(each, outside=each.outside + 1) for each in others if each.word not in words)
    return entries + tuple(added)


def _pool(section: Section, shared: tuple[Entry, ...], *, debug: bool) -> ConnectionPool[Any]:
    entries = _with(section.entries, shared)
    # what is wrong is told first of a database's own: if they are right, it is one that all share
    own = any(entry.word not in _KEYS for entry in section.entries)
    spelling = section.spelling if own else lambda word: _within(OPTIONS, word)
    made = Section(section.name, entries, spelling=spelling)
    read = pool_config(made, PoolConfig)
    if debug and all(entry.word != "guard" for entry in entries):
        driver = _drivers.chosen(read.driver, asynchronous=False)
        read = read.replace(guard=getattr(driver, "renews_in_place", False))
    return ConnectionPool.from_config(read)
