"""Scenarios under gevent, in one child process whose standard library is patched.

One job: start the child, hand it the list of what to run, and read one line of JSON per scenario. A
child that crashes or hangs fails what is left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

#: Seconds for one scenario, and for the child to start: a failure's price.
PER_SCENARIO = 90.0

ROOT = Path(__file__).parent.parent.parent


class GeventRuns:
    """The child and what it has told so far."""

    def __init__(self):
        self._wanted: list[list[str]] = []
        self._told: dict[str, dict] = {}
        self._news = threading.Condition()
        self._ended = False
        self._child: subprocess.Popen | None = None
        self._reader: threading.Thread | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in __exit__

    def want(self, combination, scenario, seed):
        self._wanted.append([combination.name, scenario.name, seed])

    def start(self, conninfo):
        real = any(not name.endswith("-fake") for name, _, _ in self._wanted)
        request = {"wanted": self._wanted, "conninfo": conninfo() if real else None}
        self._child = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.contract.gevent_child"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request))
        self._child.stdin.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        assert self._child is not None and self._child.stdout is not None
        for line in self._child.stdout:
            told = json.loads(line)
            with self._news:
                self._told[told["pair"]] = told
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def expect_good(self, combination, scenario):
        """Wait for this one's result; raises what it was."""
        pair = f"{combination.name} {scenario.name}"
        with self._news:
            self._wait_for(pair)
            told = self._told.get(pair)
        if told is None:
            how = "has ended" if self._ended else "says nothing"
            raise AssertionError(f"the child {how} before {pair}\n{self._said()}")
        if told["failure"]:
            raise AssertionError(f"under gevent:\n{told['failure']}\n{self._said()}")

    def _wait_for(self, pair):
        seen = -1
        while pair not in self._told and not self._ended and len(self._told) != seen:
            seen = len(self._told)
            self._news.wait(PER_SCENARIO)  # for the next one

    def _said(self):
        self._errors.seek(0)
        return self._errors.read()[-4000:]

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        child = self._child
        if child is not None:
            try:
                child.wait(10 if self._ended else 0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            assert self._reader is not None
            self._reader.join()
            assert child.stdout is not None
            child.stdout.close()
        self._errors.close()
