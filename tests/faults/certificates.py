"""Certificate authorities of the tests' own, for what rotates.

Its one job: make one, and have it sign for somebody. It needs the `openssl` command.

It must not know: servers, pools.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_KEY = ("-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """One that signs; its files are in `folder` and begin with `name`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.certificate, self._key = folder / f"{name}.crt", folder / f"{name}.key"
        self._folder, self._name = folder, name
        _openssl(
            *("req", "-x509", "-days", "2", "-subj", f"/CN={name}", *_KEY),
            *("-keyout", self._key, "-out", self.certificate),
        )

    def signs(self, whom: str, *, names: str = "DNS:localhost,IP:127.0.0.1") -> Signed:
        """A certificate for a common name."""
        stem = self._folder / f"{self._name}-{whom}"
        request, extensions = stem.with_suffix(".csr"), stem.with_suffix(".ext")
        signed = Signed(stem.with_suffix(".crt"), stem.with_suffix(".key"))
        extensions.write_text(f"subjectAltName={names}\n", encoding="utf-8")
        _openssl("req", "-subj", f"/CN={whom}", *_KEY, "-keyout", signed.key, "-out", request)
        _openssl(
            *("x509", "-req", "-days", "2", "-in", request, "-extfile", extensions),
            *("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial"),
            *("-out", signed.certificate),
        )
        return signed


def _openssl(*words: object) -> None:
    subprocess.run(
        ["openssl", *map(str, words)],
        executable=shutil.which("openssl"),
        capture_output=True,
        check=True,
    )
