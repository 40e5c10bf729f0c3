"""Connection settings as a mapping, as a URL and as a conninfo string, each from each, without loss.

One job: libpq's two notations (its documentation, 32.1.1), read and written without libpq, because
users of asyncpg have none. What it reads it reads as libpq 18 does; what it writes every libpq reads
back the same.

It must not know: pools, options, files, the environment. It fills nothing in: a setting that is
not given is libpq's to find (PG* variables, service file, password file).

Secrets: functions that hold pieces of a text return what is wrong (`Wrong`) and never raise, so that
no frame with a piece of a password is in a traceback. No lock: pure functions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote_to_bytes

from penstock.config.secret import Hidden, Secret, is_secret
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Every connection parameter of libpq, up to PostgreSQL 19.
KEYWORDS: Final = tuple(
    """
    host hostaddr port dbname user password passfile require_auth channel_binding connect_timeout
    client_encoding options application_name fallback_application_name keepalives keepalives_idle
    keepalives_interval keepalives_count tcp_user_timeout replication gssencmode sslmode
    sslnegotiation sslcompression sslcert sslkey sslkeylogfile sslpassword sslcertmode sslrootcert
    sslcrl sslcrldir sslsni requirepeer ssl_min_protocol_version ssl_max_protocol_version
    min_protocol_version max_protocol_version krbsrvname gsslib gssdelegation scram_client_key
    scram_server_key service servicefile target_session_attrs load_balance_hosts oauth_issuer
    oauth_client_id oauth_client_secret oauth_scope
    """.split()  # noqa: SIM905  fifty quotes would hide the names
)
_KNOWN: Final = frozenset(KEYWORDS)
PREFIXES: Final = ("postgresql://", "postgres://")
_BLANKS: Final = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class Wrong:
    """Why a text cannot be read; says no piece of it.

    Attributes:
        what: a clause that follows the text's place.
        at: how many characters of the text stand before, or None.
        hint: what to do, or None.
    """

    what: str
    at: int | None = None
    hint: str | None = None

    def error(self, key: str) -> ConfigError:
        """The error to raise."""
        place = "" if self.at is None else f" at character {self.at + 1}"
        return ConfigError(key, what=f"{key!r} does not parse{place}: {self.what}", hint=self.hint)


def parse(text: str) -> dict[str, str]:
    """Read a URL or a conninfo string, as libpq would.

    Args:
        text: "" gives no setting.

    Returns:
        libpq's names and their values; secret ones are blank in a repr.

    Raises:
        ConfigError: it does not parse. The text tells where, and quotes nothing.
    """
    text = Secret(text)
    found = read(text)
    if isinstance(found, Wrong):
        raise found.error("conninfo")
    return found


def is_url(text: str) -> bool:
    """Whether libpq takes it for a URL."""
    return text.startswith(PREFIXES)


def foreign(text: str) -> Wrong | None:
    """What is wrong with a URL that is none of libpq's: SQLAlchemy's, JDBC's, another database's."""
    if is_url(text) or "://" not in text.partition("=")[0]:
        return None
    hint = "write it without the driver's name and without jdbc:, and for PostgreSQL only"
    return Wrong("a URL begins with postgresql:// here", hint=hint)


def to_conninfo(settings: Mapping[str, str]) -> str:
    """Write settings as a conninfo string.

    Args:
        settings: libpq's names; values are texts, ints are taken, None is "not given".

    Raises:
        ConfigError: a name that libpq does not know, or a value that no conninfo can hold.
    """
    given = Hidden(settings)
    del settings  # no secret in a local variable of a frame that may raise
    pairs = _checked(given)
    return Secret(" ".join(f"{key}={_quoted(value)}" for key, value in pairs.value))


def to_url(settings: Mapping[str, str]) -> str:
    """Write settings as a URL. What has no place of its own in one goes behind the ``?``.

    Args:
        settings: as in `to_conninfo`.

    Raises:
        ConfigError: as in `to_conninfo`.
    """
    given = Hidden(settings)
    del settings
    pairs = _checked(given)
    return _url(dict(pairs.value))


def read(text: str) -> dict[str, str] | Wrong:
    """As `parse`, but what is wrong is returned, for callers who know a better place."""
    try:
        wrong = "\0" in text and Wrong("it holds a NUL character", text.index("\0"))
        text.encode()
    except UnicodeEncodeError as error:
        return Wrong("it holds half of a surrogate pair", error.start)
    return wrong or (_read_url(text) if is_url(text) else _read_pairs(text))


# -- settings that can be written -------------------------------------------------------------------


def _checked(settings: Hidden[Mapping[str, str]]) -> Hidden[list[tuple[str, str]]]:
    given = [(str(key), value) for key, value in settings.value.items() if value is not None]
    wrong = next(filter(None, map(_wrong_pair, given)), None)
    del given[:]  # a list with secrets, and this frame may raise
    if wrong is not None:
        raise wrong
    return Hidden([(str(k), str(v)) for k, v in settings.value.items() if v is not None])


def _wrong_pair(pair: tuple[str, object]) -> ConfigError | None:
    key, value = pair
    if key not in _KNOWN:
        return ConfigError(key, hint="libpq has no such connection parameter")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ConfigError(key, f"a value of type {type(value).__name__}", "a text")
    return unwritable(key, str(value))


def unwritable(key: str, value: str) -> ConfigError | None:
    """The error for a value that libpq cannot be given, if it is one."""
    if "\0" in value:
        return ConfigError(key, "one that holds it", "a text without a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        return ConfigError(key, "one with half of a surrogate pair", "a text that UTF-8 can hold")
    return None


def _quoted(value: str) -> str:
    if value and not re.search(r"[\s'\\]", value):
        return value
    return "'" + re.sub(r"(['\\])", r"\\\1", value) + "'"


def _url(settings: dict[str, str]) -> str:
    places = _places(settings)
    if places is None:
        places, behind = "", settings
    else:
        behind = {k: v for k, v in settings.items() if k not in {"host", "port"}}
    user, password, dbname = (behind.get(key) for key in ("user", "password", "dbname"))
    account = _encoded(user or "") + (f":{_encoded(password)}" if password else "")
    # an empty text has no place before the ?: there it means "not given"
    query = [
        f"{key}={_encoded(value)}"
        for key, value in behind.items()
        if not (key in {"user", "password", "dbname"} and value)
    ]
    return Secret(
        "postgresql://"
        + (f"{account}@" if account else "")
        + places
        + (f"/{_encoded(dbname)}" if dbname else "/" if query else "")
        + ("?" + "&".join(query) if query else "")
    )


def _places(settings: dict[str, str]) -> str | None:
    """``host:port,host:port``; None where that would be read back as something else."""
    host, port = settings.get("host"), settings.get("port")
    if host is None and port is None:
        return ""
    hosts = (host or "").split(",")
    ports = (port or "").split(",")
    if len(hosts) != len(ports):
        return None
    if len(hosts) == 1 and ("" in (host, port)):
        return None
    return ",".join(
        _encoded_host(each) + (f":{_encoded(number)}" if number else "")
        for each, number in zip(hosts, ports, strict=True)
    )


def _encoded_host(host: str) -> str:
    if ":" in host and re.fullmatch(r"[0-9A-Fa-f:.]+(%[\w.~-]+)?", host, re.ASCII):
        return f"[{quote(host, safe=':')}]"  # IPv6, with a zone perhaps
    return _encoded(host)


def _encoded(text: str) -> str:
    return quote(text, safe="")


# -- conninfo strings -----------------------------------------------------------------------------------

_NAME = re.compile(rf"[{_BLANKS}]*(?P<name>[^={_BLANKS}]*)[{_BLANKS}]*(?P<equals>=?)[{_BLANKS}]*")
_PLAIN = re.compile(rf"(?:[^\\{_BLANKS}]|\\.|\\\Z)*", re.DOTALL)
_QUOTED = re.compile(r"'(?P<text>(?:[^'\\]|\\.)*)'", re.DOTALL)


def _read_pairs(text: str) -> dict[str, str] | Wrong:
    found: dict[str, str] = {}
    at, end = 0, len(text.rstrip(_BLANKS))
    while at < end:
        name = _NAME.match(text, at)
        if name is None or not name["equals"]:
            what = (
                "'=' is missing after a name" if is_pairs(text) else "it is no URL and has no '='"
            )
            hint = "write postgresql://user@host/dbname, or host=... dbname=..."
            quote_it = "a value with blanks stands between single quotes"
            place = len(text) - len(text[at:].lstrip(_BLANKS))
            return Wrong(what, place if found else None, quote_it if found else hint)
        value = (_QUOTED if text.startswith("'", name.end()) else _PLAIN).match(text, name.end())
        if value is None:
            return Wrong("a closing single quote is missing", name.end())
        raw = value["text"] if value.re is _QUOTED else value[0]
        key, content = _translated(name["name"], re.sub(r"\\(.?)", r"\1", raw, flags=re.DOTALL))
        if key not in _KNOWN:
            return Wrong("libpq has no connection parameter of that name", name.start("name"))
        found[key] = Secret(content) if is_secret(key) else content
        at = value.end()
    return found


def is_pairs(text: str) -> bool:
    """Whether it looks like a conninfo string rather than a mere name."""
    return "=" in text


def _translated(key: str, value: str) -> tuple[str, str]:
    """An old name that libpq still takes."""
    if key == "requiressl":
        return "sslmode", "require" if value.startswith("1") else "prefer"
    return key, value


# -- URLs -----------------------------------------------------------------------------------------------


def _read_url(text: str) -> dict[str, str] | Wrong:
    rest = text.partition("://")[2]
    # The first @ ends the account, unless a / comes before: so libpq reads it.
    before, has_account, after = rest.partition("@")
    if not has_account or "/" in before:
        before, after = "", rest
    user, _, password = before.partition(":")
    split = _split_places(after)
    if isinstance(split, Wrong):
        return split
    hosts, ports, rest = split
    path, _, query = rest.partition("?")
    raw = [("user", user), ("password", password), ("host", hosts), ("port", ports)]
    raw += [("dbname", path.removeprefix("/"))]
    found: dict[str, str] = {}
    wrong = _store((pair for pair in raw if pair[1]), found) or _store_query(query, found)
    return wrong or found


def _split_places(text: str) -> tuple[str, str, str] | Wrong:
    """Hosts and ports, each with their commas, and what follows them."""
    hosts: list[str] = []
    ports: list[str] = []
    while True:
        host = re.match(
            r"\[(?P<inside>[^\]]*)\](?=[:/?,]|\Z)|[^:/?,\[][^:/?,]*|(?=[:/?,]|\Z)", text
        )
        if host is None or host["inside"] == "":
            return Wrong("the brackets around an IPv6 address are not right")
        text = text[host.end() :]
        port = re.match(r"(?::(?P<number>[^/?,]*))?(?P<comma>,?)", text)
        assert port is not None
        hosts.append(host[0] if host["inside"] is None else host["inside"])
        ports.append(port["number"] or "")
        text = text[port.end() :]
        if not port["comma"]:
            return ",".join(hosts), ",".join(ports), text


def _store_query(query: str, found: dict[str, str]) -> Wrong | None:
    pairs = [pair.split("=") for pair in query.split("&")] if query else []
    if pairs and pairs[-1] == [""]:
        pairs.pop()  # an & at the end
    if any(len(pair) != 2 for pair in pairs):
        return Wrong("behind the '?' each parameter has exactly one '='", hint=_ENCODE)
    return _store(((pair[0], pair[1]) for pair in pairs), found, names_encoded=True)


_ENCODE: Final = (
    "in a URL, '%', '/', ':', '@', '?', '&' and blanks of a value are percent-encoded ('@' is %40); "
    "or give the password as a key of its own"
)


def _store(
    pairs: Iterator[tuple[str, str]], found: dict[str, str], *, names_encoded: bool = False
) -> Wrong | None:
    for raw_key, raw_value in pairs:
        key = _decoded(raw_key) if names_encoded else raw_key
        value = _decoded(raw_value)
        if isinstance(key, Wrong) or isinstance(value, Wrong):
            return key if isinstance(key, Wrong) else value if isinstance(value, Wrong) else None
        if (key, value) == ("ssl", "true"):  # as JDBC has it
            key, value = "sslmode", "require"
        key, value = _translated(key, value)
        if key not in _KNOWN:
            return Wrong("behind the '?' is a parameter that libpq does not know")
        found[key] = Secret(value) if is_secret(key) else value
    return None


def _decoded(text: str) -> str | Wrong:
    text = text.strip(" ")
    if " " in text:  # and no other blank: libpq's rule
        return Wrong("it holds a blank", hint=_ENCODE)
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        return Wrong("a '%' is not followed by two hexadecimal digits", hint=_ENCODE)
    if "%00" in text:
        return Wrong("it holds %00")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        return Wrong("what is percent-encoded is not UTF-8")
