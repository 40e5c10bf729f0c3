"""Where the INI file is: beside the package, or where `BANK_CONFIG` says."""

from __future__ import annotations

import os
from pathlib import Path

PATH = Path(os.environ.get("BANK_CONFIG") or Path(__file__).parents[1] / "config.ini")
