"""What asyncpg is to be told about TLS, from libpq's words.

asyncpg connects to addresses here (see asyncpg_connect), but the certificate is the name's: so the
context that it gets puts the name back in at the handshake.

It must not know: connections, links, deadlines.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import asyncpg

from penstock.config.conninfo import to_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from penstock.config.secret import Hidden

_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_FILES: Final = ("sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl")
_VERSIONS: Final = ("ssl_min_protocol_version", "ssl_max_protocol_version")


def tls_options(words: Mapping[str, Any], options: Hidden[dict[str, Any]]) -> dict[str, Any]:
    """The arguments `dsn`, `ssl` and `direct_tls` of asyncpg.connect() for one host.

    Args:
        words: libpq's, for one host.
        options: asyncpg's own, of which `ssl` and `direct_tls` count here and win.

    Raises:
        asyncpg.ClientConfigurationError: a file is missing, or a word is wrong.
    """
    direct = {"direct_tls": True} if _is_direct(words, options) else {}
    given = options.value.get("ssl")
    if given is None or isinstance(given, str) or hasattr(given, "name"):
        mode = str(getattr(given, "name", given) or words.get("sslmode") or "prefer")
        mode = mode.replace("_", "-")
        if mode not in _MODES:
            raise asyncpg.ClientConfigurationError(
                f"`sslmode` parameter must be one of: {', '.join(_MODES)}"
            )
        if mode == "disable":
            return {"ssl": False}
        if mode in {"allow", "prefer"}:  # asyncpg's to try both ways
            kept = {key: words[key] for key in (*_FILES, *_VERSIONS) if words.get(key)}
            return {"dsn": str(to_url({"sslmode": mode, **kept})), "ssl": mode, **direct}
        return {"ssl": Named(_context(mode, words), _name(words)), **direct}
    if given is False:
        return {"ssl": False}
    if given is not True and not isinstance(given, ssl.SSLContext):
        kind = type(given).__name__
        raise asyncpg.ClientConfigurationError(
            f"ssl= must be a text, a bool or an SSLContext, not a value of type {kind}"
        )
    context = ssl.create_default_context() if given is True else given
    if given is True and ssl.HAS_ALPN:
        context.set_alpn_protocols(["postgresql"])
    return {"ssl": Named(context, _name(words)), **direct}


def _is_direct(words: Mapping[str, Any], options: Hidden[dict[str, Any]]) -> bool:
    given = options.value.get("direct_tls")
    return words.get("sslnegotiation") == "direct" if given is None else bool(given)


def _name(words: Mapping[str, Any]) -> str | None:
    if words.get("sslsni") == "0" and words.get("sslmode") != "verify-full":
        return None
    return str(words["host"] or words["address"])


class Named(ssl.SSLContext):
    """Another context, with the server's name for whoever knows its address only."""

    _context: ssl.SSLContext
    _name: str | None

    def __new__(cls, context: ssl.SSLContext, name: str | None) -> Self:
        """Take the name for all handshakes of this context."""
        made = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        made._context = context
        made._name = name
        return made

    def wrap_bio(self, incoming: Any, outgoing: Any, *_: Any, **__: Any) -> ssl.SSLObject:
        """As `ssl.SSLContext.wrap_bio`, which is all that event loops call."""
        return self._context.wrap_bio(incoming, outgoing, server_hostname=self._name)


def _context(mode: str, words: Mapping[str, Any]) -> ssl.SSLContext:
    """As libpq 34.19 has it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    context.hostname_checks_common_name = True
    _set_authorities(context, mode, words)
    _set_own_certificate(context, words)
    context.minimum_version = _version(words.get("ssl_min_protocol_version", "TLSv1.2"))
    if words.get("ssl_max_protocol_version"):
        context.maximum_version = _version(words["ssl_max_protocol_version"])
    if ssl.HAS_ALPN:
        context.set_alpn_protocols(["postgresql"])  # direct TLS needs it
    return context


def _set_authorities(context: ssl.SSLContext, mode: str, words: Mapping[str, Any]) -> None:
    named = words.get("sslrootcert")
    if named == "system":
        context.set_default_verify_paths()
        return
    path = Path(named) if named else _at_home("root.crt")
    if path is None or not (named or path.is_file()):
        if mode != "require":
            raise asyncpg.ClientConfigurationError(f"sslmode={mode} needs sslrootcert=")
        context.verify_mode = ssl.CERT_NONE
        return
    _load(context.load_verify_locations, "sslrootcert", str(path))
    revoked = words.get("sslcrl") or _at_home("root.crl")
    if revoked and (words.get("sslcrl") or Path(revoked).is_file()):
        _load(context.load_verify_locations, "sslcrl", str(revoked))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN


def _set_own_certificate(context: ssl.SSLContext, words: Mapping[str, Any]) -> None:
    cert = words.get("sslcert") or _at_home("postgresql.crt")
    if not cert or not (words.get("sslcert") or Path(cert).is_file()):
        return
    key = words.get("sslkey") or _at_home("postgresql.key")
    found = str(key) if key and (words.get("sslkey") or Path(key).is_file()) else None
    password = words.get("sslpassword", "")
    _load(context.load_cert_chain, "sslcert", str(cert), found, lambda: password)


def _load(load: Any, word: str, *args: Any) -> None:
    try:
        load(*args)
    except OSError as error:  # ssl.SSLError is one
        raise asyncpg.ClientConfigurationError(
            f"{word}= cannot be used: {error.strerror or error}"
        ) from error


def _version(text: str) -> ssl.TLSVersion:
    try:
        return ssl.TLSVersion[text.replace(".", "_")]
    except KeyError:
        raise asyncpg.ClientConfigurationError("there is no such TLS version") from None


def _at_home(name: str) -> Path | None:
    try:
        return Path.home() / ".postgresql" / name
    except RuntimeError:
        return None
