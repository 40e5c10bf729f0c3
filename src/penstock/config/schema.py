"""From a section's entries to a PoolConfig: what the keys mean, and what their values become.

One job: tell connection settings from pool options, bring the settings into one conninfo, convert
texts to what the options want. The options are PoolConfig's own fields, and how a text is converted
follows from a field's annotation: a new option needs nothing here.

It must not know: where entries come from. Secrets: local variables of functions that raise are
entries, `Secret` texts or `Hidden` boxes. No lock: pure functions, but for `PasswordFile`, which
reads its file.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from penstock.config.conninfo import (
    KEYWORDS,
    Wrong,
    foreign,
    is_pairs,
    is_url,
    read,
    to_conninfo,
    unwritable,
)
from penstock.config.secret import Hidden, Secret
from penstock.config.sections import expanded
from penstock.config.spelling import resembling
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from penstock.config.sections import Entry, Section

ConfigT = TypeVar("ConfigT")

#: Keys for a whole URL or conninfo string. A mere host name does, too: some files have it as URL.
WHOLE: Final = ("url", "uri", "dsn", "conninfo", "database_url", "database_uri")
#: Other people's names for libpq's.
ALIASES: Final = {"pw": "password", "db": "dbname", "database": "dbname"}
PASSWORD_FILE: Final = "password_file"  # noqa: S105  a key's name
# What people write for keys that exist here under another name.
_FOREIGN: Final = {
    "username": "user", "login": "user", "role": "user", "passwd": "password", "pwd": "password",
    "pass": "password", "hostname": "host", "server": "host", "address": "host",
    "db_name": "dbname", "ssl": "sslmode", "ssl_mode": "sslmode", "ca": "sslrootcert",
}  # fmt: skip


def options_of(make: type[Any]) -> Mapping[str, str]:
    """The fields of PoolConfig and their annotations, but for conninfo, which is a setting here."""
    fields = dataclasses.fields(make)
    return {field.name: str(field.type) for field in fields if field.name != "conninfo"}


def keys_beside(options: Mapping[str, str]) -> tuple[str, ...]:
    """All that a section may have, these options among them."""
    return (*options, *KEYWORDS, *WHOLE, *ALIASES, PASSWORD_FILE)


def pool_config(section: Section, make: type[ConfigT]) -> ConfigT:
    """Make the PoolConfig of a section.

    Args:
        section: what was read.
        make: PoolConfig.

    Raises:
        ConfigError: naming the key, the file and the line.
    """
    kinds = options_of(make)
    entries = _by_meaning(section, kinds)
    conninfo = _conninfo(section, entries)
    options = {
        key: _option(section, kinds[key], entry) for key, entry in entries.items() if key in kinds
    }
    given = Hidden({"name": section.name, **options, "conninfo": conninfo.value})
    del options
    made = _made(given, make)
    if not isinstance(made, ConfigError):
        return made
    entry = entries.get(made.key) or entries.get("max_size")
    if entry is None:
        raise made
    # said again, with the place, and without the value: it may be a text from a broken file
    shown = "what is written there" if isinstance(entry.value, str) else made.given
    raise section.wrong(entry, made.allowed, shown, hint=made.hint)


def _made(options: Hidden[dict[str, Any]], make: type[ConfigT]) -> ConfigT | ConfigError:
    try:
        return make(**options.value)
    except ConfigError as error:
        return error.with_traceback(None)


# -- what a key means ---------------------------------------------------------------------------------


def _by_meaning(section: Section, options: Mapping[str, str]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    nearest: dict[str, int] = {}
    keys = keys_beside(options)
    for entry in section.entries:  # the nearest first
        meaning = _meaning(section, entry, keys)  # first of all: it refuses keys not to be shown
        if entry.outside > nearest.setdefault(meaning, entry.outside):
            continue
        if section.expands:
            entry = expanded(section, entry)  # noqa: PLW2901  the entry as it was meant
        if meaning not in options and _is_empty(entry.value):
            continue  # an empty setting is one that is not given: libpq finds it elsewhere
        if meaning in found:
            raise section.wrong(entry, what=_twice(found[meaning], entry), hint="keep one of them")
        found[meaning] = entry
    return found


def _meaning(section: Section, entry: Entry, keys: tuple[str, ...]) -> str:
    if entry.word in WHOLE:
        return "conninfo"
    if entry.word in keys:
        return ALIASES.get(entry.word, entry.word)
    raise _unknown(section, entry, keys)


def _unknown(section: Section, entry: Entry, keys: tuple[str, ...]) -> ConfigError:
    meant = _FOREIGN.get(entry.word) or resembling(entry.word, keys)
    hint = "see docs/configuration.md for the keys that there are"
    if entry.word == "engine":
        hint = "Django's own: leave it out; NAME is dbname here, and what is in OPTIONS stands beside it"
    if meant is not None:
        hint = f"did you mean {section.spelling(meant)!r}?"
    if not entry.doubtful or (meant is not None and _is_misspelt(entry.word, meant)):
        return section.wrong(entry, hint=hint)
    nameless = dataclasses.replace(entry, key="?")
    what = "unknown option (its name is not shown: it may be a piece of a secret)"
    return section.wrong(nameless, what=what, hint=hint)


def _is_misspelt(word: str, meant: str) -> bool:
    """Whether it is that name but for a letter or two, and no name with a value grown on to it."""
    letters = re.fullmatch(r"[a-z]+([_-]?[a-z]+)*", word) is not None
    return letters and abs(len(word) - len(meant)) <= 2


def _twice(first: Entry, second: Entry) -> str:
    if first.key == second.key:
        return f"option {second.key!r} is given twice"
    return f"options {first.key!r} and {second.key!r} say the same thing twice"


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


# -- connection settings --------------------------------------------------------------------------------


def _conninfo(section: Section, entries: dict[str, Entry]) -> Hidden[Any]:
    """What goes into PoolConfig.conninfo."""
    whole = entries.get("conninfo")
    separate = {key: entry for key, entry in entries.items() if key in KEYWORDS}
    file = entries.get(PASSWORD_FILE)
    if file is not None and "password" in separate:
        if file.outside > separate["password"].outside:
            file = None
        elif file.outside < separate["password"].outside:
            del separate["password"]
    if whole is not None and not isinstance(whole.value, str):
        return _not_a_text(section, whole, alone=not separate and file is None)
    settings = Hidden({} if whole is None else _read_whole(section, whole).value)
    if whole is not None:
        separate = _nearer(section, separate, whole, settings)
    settings.value.update({key: _text(section, key, each) for key, each in separate.items()})
    for key in ("port", *_ALLOWED, *_NUMBERS):
        if key in settings.value:
            _check(section, key, separate.get(key) or whole, settings)
    _check_places(section, separate.get("port") or whole, settings)
    if file is not None:
        return Hidden(_password_file(section, file, settings))
    if whole is not None and not separate and _is_whole(whole.value):
        return Hidden(Secret(whole.value.strip()))
    return Hidden(to_conninfo(settings.value))


def _not_a_text(section: Section, entry: Entry, *, alone: bool) -> Hidden[Any]:
    if not callable(entry.value):
        raise section.wrong(entry, "a URL or a conninfo string", _kind(entry))
    if not alone:
        raise section.wrong(entry, what=f"{entry.key!r} is a callable, and other settings are given",
                            hint="let the callable return all of them")  # fmt: skip
    return Hidden(entry.value)


def _is_whole(text: str) -> bool:
    return is_url(text.strip()) or is_pairs(text)


def _read_whole(section: Section, entry: Entry) -> Hidden[dict[str, str]]:
    found = _whole(entry)
    if isinstance(found, Wrong):
        place = "" if found.at is None else f" at character {found.at + 1}"
        what = f"option {entry.key!r} does not parse{place}: {found.what}"
        raise section.wrong(entry, what=what, hint=found.hint)
    return Hidden(found)


def _whole(entry: Entry) -> dict[str, str] | Wrong:
    text = entry.value.strip()
    if is_url(text):
        return read(text)
    if (wrong := foreign(text)) is not None:
        return wrong
    if is_pairs(text):
        return read(text)
    # a name, an address, or a socket's folder; user:password@host/dbname is none of them
    if entry.word == "conninfo" or not re.fullmatch(r"[\w.:%,\-]+|[/@][\w.:%@/,\-]*", text):
        what = "it is neither a URL, nor a conninfo string, nor a host name"
        return Wrong(what, hint="write postgresql://user@host/dbname, or host=... dbname=...")
    if re.fullmatch(r"[^:/]+:\d+", text):
        return Wrong("it is a host with a port", hint="give the port as a key of its own, port")
    return {"host": text}


def _nearer(
    section: Section, separate: dict[str, Entry], whole: Entry, settings: Hidden[dict[str, str]]
) -> dict[str, Entry]:
    """The separate settings that hold beside the URL; a contradiction in one place is an error."""
    found: dict[str, Entry] = {}
    for key, entry in separate.items():
        if key in settings.value and entry.outside > whole.outside:
            continue
        found[key] = entry
        if key not in settings.value or entry.outside < whole.outside:
            continue
        if settings.value[key] != _text(section, key, entry):
            what = f"option {entry.key!r} contradicts what the URL or conninfo says"
            raise section.wrong(entry, what=what, hint="say it in one place")
    return found


#: What may be a list: several hosts, in the order in which they are tried.
_LISTS: Final = frozenset(("host", "hostaddr", "port"))
#: What libpq has as 0 or 1.
_SWITCHES: Final = frozenset(("keepalives", "sslcompression", "sslsni", "gssdelegation"))


def _text(section: Section, key: str, entry: Entry) -> Secret:
    """A setting's value as libpq takes it."""
    found = _as_text(key, entry.value)
    if found is None:
        several = ", or a list of such" if key in _LISTS else ""
        raise section.wrong(entry, f"a text or a whole number{several}", _kind(entry))
    wrong = unwritable(key, found)
    if wrong is not None:
        raise section.wrong(entry, wrong.allowed, wrong.given)
    if "\n" in found and entry.line is not None and not callable(entry.line):
        what = f"option {entry.key!r} goes on in the next line, because that one is indented"
        raise section.wrong(entry, what=what, hint="begin all keys of a section in one column")
    return Secret(found)


def _as_text(key: str, value: object) -> Secret | None:
    if isinstance(value, bool):
        return Secret(int(value)) if key in _SWITCHES else None
    if isinstance(value, Path):  # of a certificate, or a socket's folder
        return Secret(value)
    if isinstance(value, (str, int)):
        return Secret(value)
    if key in _LISTS and isinstance(value, (list, tuple)):
        parts = [_as_text("", each) for each in value]
        return None if None in parts else Secret(",".join(str(part) for part in parts))
    return None


_NUMBERS: Final = (
    "connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count",
    "tcp_user_timeout", "sslsni", "sslcompression",
)  # fmt: skip
_SOME: Final = ("disable", "prefer", "require")
_ALLOWED: Final = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "gssencmode": _SOME,
    "channel_binding": _SOME,
    "target_session_attrs": (
        "any", "read-write", "read-only", "primary", "standby", "prefer-standby",
    ),
    "load_balance_hosts": ("disable", "random"),
}  # fmt: skip


def _check(
    section: Section, key: str, entry: Entry | None, settings: Hidden[dict[str, str]]
) -> None:
    """What libpq would say only when it connects, and where nobody sees the key."""
    allowed = _misfit(key, settings.value[key])
    if allowed is None or entry is None:
        return
    if entry.word in WHOLE:
        raise section.wrong(entry, what=f"in option {entry.key!r}, {key} is not {allowed}")
    raise section.wrong(entry, allowed)


def _misfit(key: str, value: str) -> str | None:
    """What would be allowed, if this is not."""
    if key == "port":
        fits = all(not p or (p.isdecimal() and 0 < int(p[:9]) < 65536) for p in value.split(","))
        return None if fits else "a port number, 1 to 65535"
    if key in _NUMBERS:
        return None if re.fullmatch(r"\s*-?\d{1,9}\s*", value, re.ASCII) else "a whole number"
    return None if value in _ALLOWED[key] else "one of " + ", ".join(_ALLOWED[key])


def _check_places(section: Section, entry: Entry | None, settings: Hidden[dict[str, str]]) -> None:
    places = settings.value.get("hostaddr") or settings.value.get("host", "")
    hosts, ports = places.count(",") + 1, settings.value.get("port", "").count(",") + 1
    del places
    if ports not in {1, hosts} and entry is not None:
        raise section.wrong(entry, f"one port, or as many as hosts ({hosts})", f"{ports} ports")


# -- a password in a file of its own ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class PasswordFile:
    """Gives a conninfo with the password that is in a file now: it may be replaced at any time.

    Attributes:
        conninfo: everything else.
        path: the file; one line break at its end is not part of the password.
    """

    conninfo: str
    path: str

    def __call__(self) -> str:
        """Read it; called per connect.

        Raises:
            OSError: it cannot be read.
            ConfigError: it is empty, or no text.
        """
        password = Hidden(Path(self.path).read_bytes())
        found = _password_in(password)
        if isinstance(found, ConfigError):
            raise found
        return Secret(f"{self.conninfo} {found}".strip())

    def __repr__(self) -> str:
        return f"PasswordFile({self.path!r})"


def _password_in(content: Hidden[bytes]) -> str | ConfigError:
    try:
        text = content.value.decode()
    except UnicodeDecodeError:
        return ConfigError(PASSWORD_FILE, "one that is not", "a file in UTF-8")
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        return ConfigError(PASSWORD_FILE, "an empty one", "a file that holds a password")
    wrong = unwritable("password", text)
    if wrong is not None:
        return ConfigError(PASSWORD_FILE, wrong.given, wrong.allowed)
    return to_conninfo({"password": text})


def _password_file(
    section: Section, entry: Entry, settings: Hidden[dict[str, str]]
) -> PasswordFile:
    if "password" in settings.value:
        what = f"option {entry.key!r} is given, and a password, too"
        raise section.wrong(entry, what=what, hint="keep one of them")
    if not isinstance(entry.value, (str, Path)):
        raise section.wrong(entry, "the path of a file", _kind(entry))
    folder = Path(section.file).parent if section.file else Path()
    path = Secret((folder / Path(entry.value).expanduser()).absolute())
    found = PasswordFile(to_conninfo(settings.value), path)
    problem = _try(found)
    if problem is not None:
        allowed, given = problem  # not the path: it may be the password, in the wrong place
        raise section.wrong(entry, allowed, given)
    return found


def _try(found: PasswordFile) -> tuple[str, str] | None:
    try:
        found()
    except OSError as error:
        return "the path of a file that can be read", f"one that gives: {error.strerror}"
    except ValueError as error:  # ConfigError is one; so is the NUL character in a path
        if isinstance(error, ConfigError):
            return error.allowed or "", error.given
        return "the path of a file", "what is written there"
    return None


# -- options -----------------------------------------------------------------------------------------------

_TRUE: Final = frozenset(("true", "yes", "on", "1"))
_FALSE: Final = frozenset(("false", "no", "off", "0"))
_OBJECT: Final = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)")


def _option(section: Section, kind: str, entry: Entry) -> Any:
    """An option's value; what is no text is PoolConfig's to check."""
    if not isinstance(entry.value, str):
        return entry.value
    found = _converted(kind, entry.value.strip())
    if found is not _NOT:
        return found
    if "Callable" in kind or "type[" in kind:
        return _object(section, entry, kind)
    raise section.wrong(entry, _ALLOWED_TEXT.get(kind) or "one of " + ", ".join(_words(kind)))


_NOT: Final = object()
_ALLOWED_TEXT: Final = {
    "int": "a whole number",
    "float | None": "a number of seconds, or none",
    "bool": "true or false",
}


def _converted(kind: str, text: str) -> Any:
    """What a text means by a field's annotation; `_NOT` if nothing."""
    small = text.lower()
    if small == "none" and kind.endswith("| None") and not kind.startswith("str"):
        return None
    if kind == "int":
        return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII) else _NOT
    if kind.startswith("float"):
        number = re.fullmatch(r"[+-]?(\d{1,18}(\.\d*)?|\.\d+)", text, re.ASCII)
        return float(text) if number else _NOT
    if kind == "bool":
        return True if small in _TRUE else False if small in _FALSE else _NOT
    if kind.startswith("str"):
        return str(text)
    return text if text in _words(kind) else _NOT


def _words(kind: str) -> list[str]:
    """The texts that an annotation lists: Literal['...', '...']."""
    literal = re.match(r"Literal\[(.*?)\]", kind)
    return re.findall(r"\w+", literal[1]) if literal else []


@dataclass(frozen=True, slots=True)
class Imported:
    """A callable that is named in a file, and imported when it is first called.

    Not sooner: the module that has it is often the one that reads the file.

    Attributes:
        target: "package.module:name".
        key: the option; `file` and `line`: where it stands.
    """

    target: str
    key: str
    file: str | None
    line: int | None

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        return self.load()(*arguments)

    def load(self) -> Any:
        """Import it.

        Raises:
            ConfigError: it is not there.
        """
        module, _, name = self.target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                self.key, repr(self.target), "something that can be imported",
                file=self.file, line=self.line,
                hint=f"{type(error).__name__}: {error}",
            ) from error  # fmt: skip
        return found


def _object(section: Section, entry: Entry, kind: str) -> Any:
    text = Secret(entry.value.strip())
    if not _OBJECT.fullmatch(text):
        words = _words(kind)
        others = "".join(f'"{word}", ' for word in words) + ("none, or " if words else "")
        raise section.wrong(entry, f'{others}"package.module:name"')
    found = Imported(str(text), entry.key, section.file, entry.number())
    return found.load() if "type[" in kind else found


def _kind(entry: Entry) -> str:
    return f"a value of type {type(entry.value).__name__}"
