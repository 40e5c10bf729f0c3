"""The name that pg_stat_activity shows for a connection.

It must not know: pools, connects. No lock: pure functions.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata

# PostgreSQL cuts names at NAMEDATALEN - 1 bytes, from the end: it would be the pid that is lost.
_NAME_BYTES = 63


def application_name(pool: str, *, app: str | None = None, pid: int | None = None) -> str:
    """Make the name that pg_stat_activity shows: ``<app>/<pool>/<pid>``, at most 63 bytes.

    Call it per connect: after a fork the pid is another. Everything but printable ASCII becomes
    "?" or its plain letter, because PostgreSQL would do so (before 16) or write it in hexadecimal,
    which makes it longer. The pid is kept whole, the longer of the other two is shortened first.

    Args:
        pool: the pool's name.
        app: the program's name; the default is the stem of ``sys.argv[0]``.
        pid: the process; the default is this one.
    """
    number = str(os.getpid() if pid is None else pid)
    first, second = _plain(app_stem() if app is None else app), _plain(pool)
    room = _NAME_BYTES - len(number) - 2
    half = room // 2
    if len(first) + len(second) > room:
        # what the shorter one leaves of its half goes to the longer one
        first_room = max(half, room - len(second))
        first = first[:first_room]
        second = second[: room - len(first)]
    return f"{first}/{second}/{number}"


def app_stem() -> str:
    """Name this program after ``sys.argv[0]``: the file's stem; for ``python -m name``, the package."""
    argv = getattr(sys, "argv", None) or [""]  # an embedding program may have none
    parts = [part for part in re.split(r"[/\\]", argv[0]) if part]
    stem = parts[-1].removesuffix(".py").removesuffix(".exe") if parts else ""
    if stem == "__main__" and len(parts) > 1:
        stem = parts[-2]
    return "python" if stem in {"", "-c", "-m", "-"} else stem


def _plain(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text)
    kept = "".join(c for c in letters if not unicodedata.combining(c))
    ascii_only = "".join(c if " " <= c <= "~" else "?" for c in kept)
    # a slash of their own would make the three parts impossible to tell apart
    return ascii_only.replace("/", "_") or "?"
