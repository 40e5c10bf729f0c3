"""A plugin for pytest in the copy: which tests ran, which failed, and that the copy was imported.

Its one job: write that to the file which PENSTOCK_PLANTED names, as JSON, after each test. It must not
know: which fault is planted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import penstock

_told: dict = {"penstock": penstock.__file__, "ran": [], "failed": {}}


def pytest_runtest_logreport(report):
    if report.when == "call" and not report.skipped:
        _told["ran"].append(report.nodeid)
    if report.failed:
        _told["failed"].setdefault(report.nodeid, _last_line(report))
    Path(os.environ["PENSTOCK_PLANTED"]).write_text(json.dumps(_told), encoding="utf-8")


def _last_line(report):
    """What the failure says: pytest's line for its summary."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr if crash is None else crash.message)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["it failed"])[0 if crash else -1]
