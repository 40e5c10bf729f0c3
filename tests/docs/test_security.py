"""What docs/security.md says about TLS, with a server that has it.

It must not know: how the certificate is made (the launcher's fixture does that).
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from penstock import ConnectionPool, ServerUnavailable
from tests.docs.pages import ROOT, blocks
from tests.docs.test_examples import same_but_for_figures

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_penstock.postgres import Server

PAGE = ROOT / "docs/security.md"
CONNINFO = "host=db.example.com dbname=shop user=app sslmode=verify-full sslrootcert=db-ca.pem"


def of_the_page(conninfo: str) -> dict[str, Any]:
    """The names that the page's first block defines, with another server."""
    (block,) = (b for b in blocks(PAGE) if "sslmode=verify-full" in b.text)
    assert CONNINFO in block.text
    names: dict[str, Any] = {}
    exec(compile(block.text.replace(CONNINFO, conninfo), "docs/security.md", "exec"), names)
    return names


def shown(after: str) -> str:
    """The page's first text block that stands behind these words."""
    return PAGE.read_text(encoding="utf-8").partition(after)[2].split("```")[1].removeprefix("text")


def test_with_verify_full_the_session_is_encrypted(tls_server: Server) -> None:
    names = of_the_page(tls_server.conninfo(over="tls"))
    with names["encrypted"] as pool:
        found = names["what_is_on_the_wire"](pool)
    assert found[0] is True
    assert found[1].startswith("TLSv1.")
    assert shown("`what_is_on_the_wire(encrypted)` is").strip().startswith("(True, 'TLSv1.")


def test_another_authority_and_another_name_are_refused(tls_server: Server, tmp_path: Path) -> None:
    other = another_authority(tmp_path)
    wrong = tls_server.conninfo(over="tls", sslrootcert=other)
    pool: ConnectionPool[Any] = of_the_page(wrong)["encrypted"]
    with pool, pytest.raises(ServerUnavailable) as caught:
        pool.open(wait=True, timeout=0.5)
    said = str(caught.value).replace("127.0.0.1", "db.example.com")
    assert same_but_for_figures(said) == same_but_for_figures(shown("`sslrootcert` you see"))
    by_address = tls_server.conninfo(over="tls", host="127.0.0.2", hostaddr="127.0.0.1")
    pool = of_the_page(by_address)["encrypted"]
    with pool, pytest.raises(ServerUnavailable, match="does not match host name"):
        pool.open(wait=True, timeout=0.5)


def another_authority(folder: Path) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl, to make a second certificate")
    certificate = folder / "other.crt"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-keyout", folder / "other.key", "-out", certificate, "-subj", "/CN=other", "-days", "9"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate
