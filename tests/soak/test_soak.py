"""The command: a few seconds of it, what it says and leaves; and the list of faults."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import SEED
from tests.faults.stage import COMBINATIONS, ROOT
from tests.soak.faults import FAULTS, drawn, fit

#: Seconds until a test gives up.
PATIENCE = 120.0


def started(folder, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.soak", "--with", "threads-psycopg", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
    )


@pytest.fixture
def folder(tmp_path_factory):
    """A short path: a unix socket's has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="s-") as made:
        yield made


def test_a_few_seconds_of_it_find_nothing_and_leave_nothing(folder):
    process = started(folder, "--seconds", "2", "--seed", str(SEED))
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert f"seed {SEED}" in said
    assert "nothing lost, nothing wrong, nothing torn, nothing twice" in said
    assert not list(Path(folder).iterdir())


def test_ctrl_c_ends_all_of_it(folder):
    process = started(folder, "--seconds", "60")
    assert process.stdout is not None
    for line in process.stdout:
        if "borrowers" in line:  # the first step was told: servers and all are there
            break
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "failed" not in said.partition("┏")[0]
    assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_seed_draws_the_same_faults_and_each_fault_is_drawn(name):
    runtime = COMBINATIONS[name].runtime().name

    def steps():
        rng = random.Random(f"{SEED} {name}")
        return [drawn(rng, runtime) for _ in range(3000)]

    first = steps()
    assert first == steps()
    assert {fault.name for step in first for fault in step} == {each.name for each in fit(runtime)}


def test_faults_at_the_same_time_are_of_different_kinds():
    rng = random.Random(SEED)
    steps = [
        drawn(rng, runtime) for runtime in ("threads", "gevent", "asyncio") for _ in range(999)
    ]
    twos = [step for step in steps if len(step) == 2]
    assert twos
    assert all(len({fault.realm for fault in step}) == 2 for step in twos)
    assert not [step for step in twos if any(fault.quiet for fault in step)]
    assert len(FAULTS) >= 40
