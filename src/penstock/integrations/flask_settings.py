"""The settings of the Flask extension: from an app's configuration to pools.

One job: read the `PENSTOCK_` keys, and say which of them is wrong.

It must not know: requests, contexts. What a mapping may hold is `PoolConfig.from_mapping`'s to say.
No lock: it runs in `init_app`, and opens nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from penstock.config import PoolConfig
from penstock.errors import ConfigError
from penstock.threads import ConnectionPool

URI: Final = "PENSTOCK_DATABASE_URI"
BINDS: Final = "PENSTOCK_BINDS"
OPTIONS: Final = "PENSTOCK_POOL_OPTIONS"
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


def read(config: Any, app_name: str, defaults: Mapping[str, Any]) -> Settings:
    """Read an app's configuration, and set what is missing to its default.

    Args:
        config: the app's; a mapping with `setdefault`.
        app_name: the pools are named after it.
        defaults: pool options that every setting overrides.

    Raises:
        ConfigError: naming the key of the app's configuration.
    """
    for key, default in _DEFAULTS.items():
        config.setdefault(key, default)
    return Settings(
        pools=_pools(config, app_name, defaults),
        transactions=_mode(config[TRANSACTIONS]),
        retry_after=_seconds(config[RETRY_AFTER]),
    )


def _mode(given: Any) -> str:
    if given not in _MODES:
        raise ConfigError(TRANSACTIONS, repr(given), '"request", "explicit" or "autocommit"')
    return str(given)


def _seconds(given: Any) -> int | None:
    whole = isinstance(given, int) and not isinstance(given, bool) and given >= 0
    if given is not None and not whole:
        raise ConfigError(RETRY_AFTER, repr(given), "a whole number of seconds, 0 or more, or None")
    return given  # type: ignore[no-any-return]  # just looked at


def _pools(config: Any, app_name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    options = {**defaults, **_mapping(config[OPTIONS], OPTIONS)}
    binds = _mapping(config[BINDS], BINDS)
    if MAIN in binds:
        raise ConfigError(_place(BINDS, MAIN), hint=f"the main database is {URI}")
    if config[URI] is None and not binds:
        raise ConfigError(
            URI, "None", "a URL, a conninfo string or a mapping", hint='"" means PGHOST and so on'
        )
    sources = {MAIN: (config[URI], URI)} if config[URI] is not None else {}
    sources |= {key: (source, _place(BINDS, key)) for key, source in binds.items()}
    return {
        key: _pool(source, place, options, app_name if key == MAIN else f"{app_name}.{key}")
        for key, (source, place) in sources.items()
    }


def _mapping(given: Any, place: str) -> Mapping[str, Any]:
    if isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
        return given
    raise ConfigError(place, f"a value of type {type(given).__name__}", "a mapping with text keys")


def _place(setting: str, key: str) -> str:
    return f'{setting}["{key}"]'


def _pool(source: Any, place: str, options: Mapping[str, Any], name: str) -> ConnectionPool[Any]:
    if isinstance(source, (str, Callable)):  # type: ignore[arg-type]
        own: Mapping[str, Any] = {"conninfo": source}
    else:
        own = _mapping(source, place)
    try:
        config = PoolConfig(**{"name": name, **options, **own})
    except ConfigError as error:
        setting = place if error.key in own else OPTIONS
        alone = setting == place and not isinstance(source, Mapping)
        key = setting if alone else _place(setting, error.key)
        raise ConfigError(key, error.given, error.allowed, hint=error.hint) from None
    return _from_config(config)


def _from_config(config: PoolConfig) -> ConnectionPool[Any]:
    pool: ConnectionPool[Any] = ConnectionPool.__new__(ConnectionPool)
    pool._set_up(config)  # noqa: SLF001
    return pool
