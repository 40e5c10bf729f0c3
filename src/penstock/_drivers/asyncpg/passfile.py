"""The password file, by host name: asyncpg is given addresses, and would look for those.

libpq 34.16. It must not know: connections, sockets. Pure but for reading the file.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.config.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

_FIELD = re.compile(r"((?:[^:\\]|\\.)*)(?::|\Z)")


def password_for(words: Mapping[str, Any], user: str, database: str) -> str | None:
    """The password that the file has for this server, database and user; None if it has none.

    Args:
        words: `host`, `port` and perhaps `passfile`, as libpq takes them.
        user: who logs in.
        database: where to.
    """
    host = words["host"]
    wanted = ("localhost" if host[:1] in {"/", "@"} else host, words["port"], database, user)
    try:
        path = Path(words.get("passfile") or Path.home() / ".pgpass")
        status = path.stat()
        # Others could read it: libpq warns and takes no notice of it; so does asyncpg, after this.
        if not stat.S_ISREG(status.st_mode) or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return None
        lines = Secret(path.read_text(encoding="utf-8"))
    except (OSError, RuntimeError, UnicodeError):  # RuntimeError: no home
        return None
    return _found(lines, wanted)


def _found(lines: str, wanted: tuple[str, ...]) -> str | None:
    for line in str.splitlines(lines):
        fields = _FIELD.findall(line)
        if line[:1] == "#" or len(fields) < len(wanted) + 1:
            continue
        *pattern, password = (re.sub(r"\\(.)", r"\1", field) for field in fields[:5])
        if all(
            mask == "*" or text == each
            for mask, text, each in zip(fields, pattern, wanted, strict=False)
        ):
            return Secret(password)
    return None
