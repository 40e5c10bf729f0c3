"""A conninfo without its secrets, for repr, logs and errors.

It reads more strictly than `config/conninfo.py`: a password with an unescaped ``@`` is read by libpq as
something, but by its user as something else, and what leaves such a doubt is not shown.

It must not know: pools, options, what settings mean. No lock: pure functions that never raise.
"""

from __future__ import annotations

import re

_SHOWN = ("host", "hostaddr", "port", "dbname", "user")
_NOTHING = "(no host, dbname or user)"
_DOUBT = "(conninfo not shown: it does not parse)"
# Strict on purpose: a password with an unescaped @, / or ? makes every other reading wrong, so what
# fits none of these is not shown at all.
_URL = re.compile(
    r"postgres(?:ql)?://"
    r"(?:(?P<user>[^:@/?\s]*)(?::[^@/?\s]*)?@)?"
    r"(?P<hosts>(?:\[[0-9A-Fa-f:.%]+\]|[\w.%\-]*)(?::\d*)?(?:,(?:\[[0-9A-Fa-f:.%]+\]|[\w.%\-]*)(?::\d*)?)*)"
    r"(?:/(?P<dbname>[^/?@:&=\s]*))?"
    r"(?:\?(?P<query>[^@?\s]*))?"
)
_PAIR = re.compile(r"\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s'\\]|\\.)*)(?=\s|$)", re.DOTALL)


def redacted(conninfo: str) -> str:
    """Write a conninfo without its secrets, for repr, logs and errors.

    Needs no driver. Shows host, hostaddr, port, dbname and user, as ``key=value``, and nothing else;
    a string that cannot be read without doubt is not shown at all.

    Args:
        conninfo: a libpq conninfo string or URL.

    Returns:
        One line; "" for "". Never raises.
    """
    text = str(conninfo)
    if not text.strip():
        return ""
    found = _from_url(text) if "://" in text.partition("=")[0] else _from_pairs(text)
    if found is None:
        return _DOUBT
    shown = {key: found[key] for key in _SHOWN if found.get(key)}
    if any(map(_doubtful, shown, shown.values())):
        return _DOUBT
    return " ".join(f"{key}={value}" for key, value in shown.items()) or _NOTHING


def _doubtful(key: str, value: str) -> bool:
    # `user= password=x` sets user to "password=x", as libpq reads it; dbname may hold a whole URL.
    # A user name may have an @ (Azure's do).
    return (
        "=" in value
        or "://" in value
        or not value.isprintable()
        or ("@" in value and key != "user")
    )


def _from_url(text: str) -> dict[str, str] | None:
    match = _URL.fullmatch(text)
    if match is None:
        return None
    found = _from_query(match["query"] or "")
    if found is None:
        return None
    # the last colon outside brackets: an IPv6 address has colons of its own
    places = [re.split(r":(?=\d*$)", place, maxsplit=1) for place in match["hosts"].split(",")]
    own = {
        "user": match["user"] or "",
        "dbname": match["dbname"] or "",
        "host": ",".join(place[0] for place in places).strip(","),
        "port": ",".join(place[1] for place in places if len(place) > 1),
    }
    return {**own, **found}


def _from_query(query: str) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        match = re.fullmatch(r"(\w+)=([^=&]*)", pair)
        if match is None:
            return None
        found[match[1]] = match[2]
    return found


def _from_pairs(text: str) -> dict[str, str] | None:
    found: dict[str, str] = {}
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _PAIR.match(text, at, end)
        if match is None:
            return None
        found[match[1]] = match[2]
        at = match.end()
    return found
