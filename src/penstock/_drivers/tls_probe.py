"""Is TLS with a server refused for good? Told by a handshake that verifies, never by text.

libpq says in words only why a certificate did not pass. So the same handshake is made again by Python,
as libpq would make it: the request for TLS, then the certificate against the same authorities, and
under verify-full against the same name. Nothing is sent but the request and the handshake: no user, no
password, since the server may be anybody.

It must not know: libpq's handles, links. What it is not sure of it takes to heal.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING, Final, NamedTuple

from penstock._process.sockets import seconds_to

if TYPE_CHECKING:
    from collections.abc import Mapping

#: SSLRequest: length and code, https://www.postgresql.org/docs/current/protocol-message-formats.html
_REQUEST: Final = pack("!II", 8, 80877103)

NO_TLS: Final = (
    "the server offers no TLS and sslmode wants it: switch TLS on there (ssl = on), or "
    "sslmode=prefer if what is sent may be read on the way"
)
NO_AUTHORITIES: Final = (
    "sslrootcert must name a readable file with the certificate of the authority that signed the "
    "server's (or be `system`)"
)
NOT_VERIFIED: Final = (
    "the server's certificate did not pass: check that sslrootcert has the authority that signed it, "
    "that it has not expired and, with verify-full, that host= is a name in it"
)


class Tls(NamedTuple):
    """What a look at one address showed.

    Attributes:
        passed: there is TLS, and nothing was found wrong with it.
        next_step: what to do if it cannot work however often it is tried; else None.
    """

    passed: bool
    next_step: str | None = None


def is_wanted(effective: Mapping[str, str]) -> bool:
    """Whether a connect with these parameters must end in TLS that can be looked at from here."""
    host = _host(effective)
    return (
        effective.get("sslmode", "prefer") in {"require", "verify-ca", "verify-full"}
        and host[:1] not in {"", "/", "@"}
        and effective.get("sslnegotiation") != "direct"
    )


def _host(effective: Mapping[str, str]) -> str:
    return effective.get("hostaddr") or effective.get("host", "")


def look(effective: Mapping[str, str], deadline: float) -> Tls:
    """Connect to one address, once at most, and see whether TLS with it can work.

    Args:
        effective: libpq's parameters for one address, its defaults and the environment included; `is_wanted`.
        deadline: an instant of the monotonic clock.
    """
    mode, host = effective.get("sslmode", "prefer"), _host(effective)
    authorities = _authorities(effective)
    if authorities is None and mode != "require":
        return Tls(passed=False, next_step=NO_AUTHORITIES)
    try:
        with socket.create_connection(
            (host, int(effective.get("port") or 5432)), seconds_to(deadline)
        ) as plain:
            return _answer(plain, mode, authorities, effective)
    except (OSError, ValueError):
        return Tls(passed=False)


def _answer(
    plain: socket.socket, mode: str, authorities: str | None, effective: Mapping[str, str]
) -> Tls:
    plain.sendall(_REQUEST)
    answer = plain.recv(1)
    if answer == b"N":
        return Tls(passed=False, next_step=NO_TLS)
    if answer != b"S" or authorities is None:
        return Tls(passed=answer == b"S")
    try:
        context = _context(mode, authorities)
    except OSError:  # ssl.SSLError is one: no certificate in the file
        return Tls(passed=False, next_step=NO_AUTHORITIES)
    try:
        context.wrap_socket(plain, server_hostname=effective.get("host") or None).close()
    except ssl.SSLCertVerificationError:
        return Tls(passed=False, next_step=NOT_VERIFIED)
    return Tls(passed=True)


def _context(mode: str, authorities: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    # As libpq does where a certificate has no other names.
    context.hostname_checks_common_name = True
    if authorities == "system":
        context.set_default_verify_paths()
    else:
        context.load_verify_locations(cafile=authorities)
    return context


def _authorities(effective: Mapping[str, str]) -> str | None:
    """The file that libpq reads; with sslmode=require, too, if it is there (libpq 32.19.1)."""
    named = effective.get("sslrootcert")
    if named == "system":
        return named
    try:
        path = Path(named) if named else Path("~/.postgresql/root.crt").expanduser()
        return str(path) if path.is_file() else None
    except (OSError, RuntimeError):  # no home
        return None
