"""What is expected of one option of a library's `connect` when a pool is told it, and the ways to tell a pool.

It must not know: drivers.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock import PoolConfig
from penstock.config.conninfo import (
    KEYWORDS,
    parse,
    to_conninfo,
    to_url,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One option.

    Attributes:
        value: what the user says.
        seen: what a borrower's connection, or the server, shows of it; None: the driver's own default look.
        expected: what that is to be; None: the value.
        refused: a ConfigError is to name it, and to say this.
        fails: no connection can be opened, and the error is to say this: so the option has arrived.
        only: the way to say it, where there is only one.
    """

    value: Any = None
    seen: Callable[[Any, Any], Any] | None = None
    expected: Any = None
    refused: str | None = None
    fails: str | None = None
    only: str | None = None
    over: str = "tcp"

    def wanted(self) -> Any:
        return self.value if self.expected is None else self.expected


WAYS = ("kwargs", "conninfo", "url", "file")


def ways_of(key: str, row: Row) -> tuple[str, ...]:
    """In which ways an option can be said: only libpq's own words stand in a conninfo or a file."""
    if row.only is not None:
        return (row.only,)
    return WAYS if key in KEYWORDS and isinstance(row.value, str) else ("kwargs",)


def config_of(
    way: str, server: Any, key: str, row: Row, folder: Path, **options: Any
) -> PoolConfig:
    """A pool's options that say `key` in that way, and where the server is in the same one."""
    words = parse(server.conninfo(over=row.over))
    options = {"min_size": 1, "max_size": 1, "timeout": 20.0, **options}
    if way == "kwargs":
        return PoolConfig(kwargs={**words, key: row.value}, **options)
    words[key] = row.value
    if way == "conninfo":
        return PoolConfig(conninfo=to_conninfo(words), **options)
    if way == "url":
        return PoolConfig(conninfo=to_url(words), **options)
    file = folder / "db.toml"
    lines = [f"{name} = {str(value)!r}" for name, value in words.items()]
    file.write_text("\n".join(["[shop]", *lines]), encoding="utf-8")
    return PoolConfig.from_file(file, "shop").replace(**options)


# -- looks ------------------------------------------------------------------------------------------------


def activity(column: str, pid_of: Callable[[Any], int]) -> Callable[[Any, Any], Any]:
    """What the server shows of the session in pg_stat_activity."""

    def look(conn: Any, server: Any) -> Any:
        query = f"select {column} from pg_stat_activity where pid = {pid_of(conn)}"
        return server.execute(query)[0][0]

    return look


def socket_option(level: int, name: int, fd_of: Callable[[Any], int]) -> Callable[[Any, Any], str]:
    """What the kernel knows of the connection's socket."""

    def look(conn: Any, _: Any) -> str:
        with socket.socket(fileno=socket.dup(fd_of(conn))) as twin:
            return str(twin.getsockopt(level, name))

    return look


TCP = {
    "keepalives_idle": socket.TCP_KEEPIDLE,
    "keepalives_interval": socket.TCP_KEEPINTVL,
    "keepalives_count": socket.TCP_KEEPCNT,
    "tcp_user_timeout": socket.TCP_USER_TIMEOUT,
}


def libpq_rows(
    pid_of: Callable[[Any], int], fd_of: Callable[[Any], int], status_of: Callable[[Any, str], Any]
) -> dict[str, Row]:
    """Every word of libpq, for the drivers that stand on it.

    Where nothing can be seen from outside (a trusted role needs no password) the word is looked for in what
    libpq was told.
    """
    key = "A" * 43 + "="
    rows = {
        "service": Row("shop"),
        "servicefile": Row("/nowhere", fails="nowhere"),
        "user": Row("optional", activity("usename", pid_of)),
        "password": Row("hunter2"),
        "passfile": Row("/nowhere"),
        "channel_binding": Row("disable"),
        "connect_timeout": Row("7"),
        "dbname": Row("template1", activity("datname", pid_of)),
        "host": Row("localhost"),
        "hostaddr": Row("127.0.0.1"),
        "port": Row("1", fails="refused|Connect call failed"),
        "client_encoding": Row("LATIN1", lambda conn, _: status_of(conn, "client_encoding")),
        "options": Row(
            "-c IntervalStyle=iso_8601",
            lambda conn, _: status_of(conn, "IntervalStyle"),
            "iso_8601",
        ),
        "application_name": Row("mine", activity("application_name", pid_of)),
        "fallback_application_name": Row("mine", activity("application_name", pid_of)),
        "keepalives": Row("0", socket_option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, fd_of)),
        "sslmode": Row("require", fails="SSL"),
        "sslnegotiation": Row("postgres"),
        "sslcompression": Row("0"),
        "sslcert": Row("/nowhere/app.crt"),
        "sslkey": Row("/nowhere/app.key"),
        "sslcertmode": Row("require", fails="SSL certificate"),
        "sslpassword": Row("hunter2"),
        "sslrootcert": Row("/nowhere/root.crt"),
        "sslcrl": Row("/nowhere/root.crl"),
        "sslcrldir": Row("/nowhere"),
        "sslsni": Row("0"),
        "sslkeylogfile": Row("/nowhere/log"),
        "requirepeer": Row("nobody", fails="requirepeer", over="unix"),
        "require_auth": Row("scram-sha-256", fails="scram-sha-256|authentication"),
        "min_protocol_version": Row("3.0"),
        "max_protocol_version": Row("latest"),
        "ssl_min_protocol_version": Row("TLSv1.2"),
        "ssl_max_protocol_version": Row("TLSv1.3"),
        "gssencmode": Row("disable"),
        "krbsrvname": Row("pg"),
        "gsslib": Row("gssapi"),
        "gssdelegation": Row("0"),
        "replication": Row("database", activity("backend_type", pid_of), "walsender"),
        "target_session_attrs": Row("standby", fails="standby"),
        "load_balance_hosts": Row("random"),
        "scram_client_key": Row(key),
        "scram_server_key": Row(key),
        "oauth_issuer": Row("https://login.example.com"),
        "oauth_client_id": Row("app"),
        "oauth_client_secret": Row("hunter2"),
        "oauth_scope": Row("openid"),
    }
    for name, option in TCP.items():
        rows[name] = Row("11000", socket_option(socket.IPPROTO_TCP, option, fd_of))
    rows["keepalives_count"] = Row("7", rows["keepalives_count"].seen)
    return rows
