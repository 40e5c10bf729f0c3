"""Where configuration comes from: mappings, environment variables, TOML and INI files.

One job: read each of them into sections, and have `config/schema.py` make a PoolConfig of each. PoolConfig has
these ways from `Readable`; it is the class that they are called on, or `make`.

It must not know: what the keys mean, pools. libpq's own sources (PG* variables, service file,
password file) are not read here: what is not given is left to libpq.

Secrets: what was read is in a `Hidden` box or in an `Entry`. No lock: each call reads anew.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from penstock.config.conninfo import KEYWORDS
from penstock.config.ini import Broken, read_ini
from penstock.config.schema import (
    ALIASES,
    PASSWORD_FILE,
    WHOLE,
    pool_config,
)
from penstock.config.secret import Hidden
from penstock.config.sections import Entry, Section, as_secret
from penstock.config.toml import read_toml
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

READERS: Final = {".toml": read_toml, ".ini": read_ini, ".cfg": read_ini, ".conf": read_ini}
DEFAULT: Final = "default"
PREFIX: Final = "PENSTOCK_"
#: Variables of other parts of penstock: its launcher, its tests, its demo, its Flask extension.
_OTHERS: Final = (
    "PG_BIN",
    "SEED",
    "TEST_",
    "DEMO_",
    "BINDS",
    "POOL_OPTIONS",
    "RETRY_AFTER",
    "TRANSACTIONS",
)
_SETTINGS: Final = frozenset((*KEYWORDS, *WHOLE, *ALIASES, PASSWORD_FILE))

ConfigT = TypeVar("ConfigT", bound="Readable")


class Readable:
    """What PoolConfig is made from, apart from its own arguments."""

    __slots__ = ()

    if TYPE_CHECKING:
        name: str | None

        def replace(self, **changes: Any) -> Self: ...  # noqa: D102  PoolConfig's

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, name: str | None = None) -> Self:
        """Read a mapping: connection settings and pool options side by side.

        Args:
            mapping: see docs/configuration.md for its keys; case does not matter, and texts are
                converted to what the option wants.
            name: the pool's name, unless the mapping has one.

        Raises:
            ConfigError: naming the key.
        """
        given = Hidden(mapping)
        del mapping
        return pool_config(_section(given, name), cls)

    @classmethod
    def from_env(cls, prefix: str = "PENSTOCK_") -> Self:
        """Read environment variables: ``PENSTOCK_URL``, ``PENSTOCK_MAX_SIZE`` and so on.

        Where no variable of the prefix says where to connect, ``DATABASE_URL`` does (with the
        default prefix only); where that is not set either, libpq's own sources do.

        Args:
            prefix: what the variables' names begin with.

        Raises:
            ConfigError: naming the variable.
        """
        return pool_config(_env_section(prefix, None), cls)

    @classmethod
    def from_file(cls, path: str | Path, section: str | None = None) -> Self:
        """Read one database's section of a TOML or INI file.

        Args:
            path: the suffix decides: ``.toml``; ``.ini``, ``.cfg``, ``.conf``.
            section: its name; None: the only one, or the one named "default".

        Raises:
            ConfigError: naming key, file and line.
        """
        sections = _read(path)
        return _config(_chosen(sections, section, str(path)), cls)


# -- mappings ---------------------------------------------------------------------------------------------


def many_from_mapping(given: Hidden[Mapping[str, Any]], make: type[ConfigT]) -> dict[str, ConfigT]:
    """See `Pools.from_mapping`."""
    inner = _inner(given)
    if not inner.value:
        return {DEFAULT: pool_config(_section(given, None), make)}
    return {name: _one(name, given, each, make) for name, each in inner.value.items()}


def _inner(given: Hidden[Mapping[str, Any]]) -> Hidden[dict[str, Any]]:
    """The databases in a mapping: what is a mapping or a PoolConfig itself."""
    _refuse_other_types(given)
    return Hidden(
        {
            key: Hidden(value)
            for key, value in given.value.items()
            if isinstance(value, (Mapping, Readable)) and key.lower() != "kwargs"
        }
    )


def _one(
    name: str,
    given: Hidden[Mapping[str, Any]],
    own: Hidden[Mapping[str, Any] | ConfigT],
    make: type[ConfigT],
) -> ConfigT:
    if isinstance(own.value, make):
        return own.value if own.value.name else own.value.replace(name=name)
    around = _section(given, name, only_plain=True).entries
    section = _section(Hidden(cast("Mapping[str, Any]", own.value)), name)
    words = {entry.word for entry in section.entries}
    inherited = tuple(replace(each, outside=1) for each in around if each.word not in words)
    return pool_config(Section(name, section.entries + inherited), make)


def _section(
    given: Hidden[Mapping[str, Any]], name: str | None, *, only_plain: bool = False
) -> Section:
    _refuse_other_types(given)
    return Section(
        name,
        tuple(
            Entry(key, key.lower(), as_secret(value))
            for key, value in given.value.items()
            if not (only_plain and isinstance(value, (Mapping, Readable)))
        ),
    )


def _refuse_other_types(given: Hidden[Mapping[str, Any]]) -> None:
    if not isinstance(given.value, Mapping):
        kind = type(given.value).__name__
        raise ConfigError("mapping", f"a value of type {kind}", "a mapping")
    if not all(isinstance(key, str) for key in given.value):
        raise ConfigError("mapping", "one with keys of other types", "a mapping with text keys")


# -- the environment ----------------------------------------------------------------------------------------


def many_from_env(prefix: str, make: type[ConfigT]) -> dict[str, ConfigT]:
    """See `Pools.from_env`."""
    names = _names_in_env(prefix)
    found = {
        name.lower(): pool_config(_env_section(f"{prefix}{name}__", name.lower(), inner=True), make)
        for name in names
    }
    plain = _env_section(prefix, DEFAULT if found else None, fall_back=not found)
    if plain.entries and DEFAULT in found:
        raise plain.wrong(
            plain.entries[0],
            what=f"{plain.entries[0].key!r} is about the database {DEFAULT!r}, and so are "
            f"variables that begin with {prefix}{DEFAULT.upper()}__",
            hint="keep one of the two ways",
        )
    if plain.entries or not found:
        found[DEFAULT] = pool_config(plain, make)
    return found


def _names_in_env(prefix: str) -> list[str]:
    """The databases that variables name: ORDERS of PENSTOCK_ORDERS__URL."""
    words = (each.removeprefix(prefix) for each in sorted(os.environ) if each.startswith(prefix))
    names = (word.partition("__")[0] for word in words if _is_of_a_name(word))
    return list(dict.fromkeys(name for name in names if not _is_others(prefix, name)))


def _is_of_a_name(word: str) -> bool:
    return "__" in word.strip("_")


def _is_others(prefix: str, word: str) -> bool:
    return prefix == PREFIX and word.startswith(_OTHERS)


def _env_section(
    prefix: str, name: str | None, *, fall_back: bool = True, inner: bool = False
) -> Section:
    """The variables of a prefix; DATABASE_URL where none of PENSTOCK_'s says where to connect."""
    entries = [
        Entry(variable, word.lower(), as_secret(value))
        for variable, value in sorted(os.environ.items())
        if variable.startswith(prefix)
        and value.strip()  # empty is as good as not set, as in a compose file
        and (word := variable.removeprefix(prefix))
        and (inner or not _is_of_a_name(word))
        and not _is_others(prefix, word)
    ]
    url = fall_back and prefix == PREFIX and os.environ.get("DATABASE_URL", "").strip()
    if url and not any(entry.word in _SETTINGS for entry in entries):
        entries.append(Entry("DATABASE_URL", "url", as_secret(os.environ["DATABASE_URL"])))
    return Section(name, tuple(entries), spelling=lambda word: prefix + word.upper())


# -- files --------------------------------------------------------------------------------------------------


def many_from_file(
    path: str | Path, only: Iterable[str], make: type[ConfigT]
) -> dict[str, ConfigT]:
    """See `Pools.from_file`."""
    sections = _read(path)
    wanted = [_chosen(sections, name, str(path)) for name in only] or sections
    # hidden: where a broken file has its password as dbname, say, that is what a repr would show
    found: Hidden[dict[str, ConfigT]] = Hidden({})
    for each in wanted:
        name = each.name or DEFAULT
        if name in found.value:
            raise ConfigError(
                "section", repr(name), "one of its kind", file=str(path),
                hint="two databases would have this name",
            )  # fmt: skip
        found.value[name] = _config(each, make)
    return found.value


def _config(section: Section, make: type[ConfigT]) -> ConfigT:
    return pool_config(replace(section, expands=True), make)


def _chosen(sections: list[Section], wanted: str | None, file: str) -> Section:
    if wanted is None and len(sections) == 1:
        return sections[0]
    name = DEFAULT if wanted is None else wanted
    for same in (str, str.casefold):
        for each in sections:
            if same(name) in {same(each.path or ""), same(each.name or "")}:
                return each
    there = ", ".join(repr(each.path) for each in sections if each.path) or "none"
    what = f"there is no section {name!r}"
    if wanted is None:
        what = "there are several sections, and none is called 'default'"
    raise ConfigError("section", what=what, file=file, hint=f"there is {there}: name one")


def _read(path: str | Path) -> list[Section]:
    file = os.fspath(path)
    reader = READERS.get(Path(file).suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        raise ConfigError("file", f"{Path(file).suffix!r}", f"one of {known}", file=file)
    found = _content(file)
    sections = reader(found, file) if isinstance(found, Hidden) else found
    if not isinstance(sections, Broken) and not any(s.entries or s.name for s in sections):
        sections = Broken("there is no section and no key in it", None)
    if isinstance(sections, Broken):
        key, what = sections.key, sections.what
        if key != "file":
            what = f"option {key!r}: {what}"
        raise ConfigError(key, what=what, file=file, line=sections.line, hint=sections.hint)
    return sections


def _content(file: str) -> Hidden[str] | Broken:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        return Broken(f"the configuration file cannot be read: {error.strerror}", None)
    except ValueError:
        return Broken("this cannot be the path of a file", None)
    try:
        # a byte order mark is what some editors put in front
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Broken("the file is not in UTF-8", line, "save it as UTF-8")
    return Hidden(text.replace("\r\n", "\n"))
