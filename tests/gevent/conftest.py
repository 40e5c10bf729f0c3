"""Runs scenes in processes of their own: patching must never happen in pytest's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SEED

ROOT = Path(__file__).parents[2]

#: Seconds for one process: a failure's price.
PATIENCE = 170.0


def run_child(*words, given="", patience=PATIENCE):
    """Run a module of ours; gives what it printed. It must end well and say nothing else."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-W", "error", *words],
        input=given,
        capture_output=True,
        text=True,
        timeout=patience,
        env=env,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done


class Stage:
    """Plays several scenes in one process, once, and remembers how each went."""

    def __init__(self, dsn):
        self._dsn = dsn
        self._played: dict[tuple, dict[str, str]] = {}

    def play(self, scene, *, mode, driver, together=()):
        """Assert that the scene goes well; those of `together` are played in the same process."""
        scenes = tuple(each.__name__ for each in together or (scene,))
        key = (mode, driver, scenes)
        if key not in self._played:
            self._played[key] = self._result(mode, driver, scenes)
        failure = self._played[key].get(scene.__name__, "it was not played")
        assert not failure, failure

    def _result(self, mode, driver, scenes):
        try:
            return self._run(mode, driver, scenes)
        except AssertionError as error:
            return dict.fromkeys(scenes, str(error))

    def _run(self, mode, driver, scenes):
        done = run_child(
            "-m", "tests.gevent.child", mode, driver, str(SEED), *scenes, given=self._dsn
        )
        assert "Exception ignored" not in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        told = [json.loads(line) for line in done.stdout.splitlines()]
        return {each["scene"]: each["failure"] for each in told}


@pytest.fixture(scope="session")
def stage(server):
    return Stage(server.conninfo(over="tcp"))
