"""`statement_timeout_client` in all runtimes and drivers: `statement_scenes`, each combination in its own process.

They run beside each other, since nearly all of their time is waiting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.faults.stage import COMBINATIONS, ROOT
from tests.faults.statement_scenes import SCENES

from penstock import AsyncConnectionPool, ConfigError, ConnectionPool, StatementTimeout
from penstock.testing import AsyncFakeDriver, FakeDriver, FakeServer, Mode

#: Seconds for one process: a failure's price.
PATIENCE = 170.0


@pytest.fixture(scope="module")
def played(server):
    words = [sys.executable, "-W", "error", "-m", "tests.faults.statement_scenes"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    running = {
        name: subprocess.Popen(
            [*words, name, server.conninfo(over="tcp")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
        )
        for name in COMBINATIONS
    }
    yield {name: process.communicate(timeout=PATIENCE) for name, process in running.items()}
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_with_a_limit_of_statements(scene, name, played):
    out, err = played[name]
    assert out, err
    told = json.loads(out.splitlines()[-1])
    assert not told[scene.__name__], told[scene.__name__] + err


class WithoutLimits(FakeDriver):
    name = "old"
    limits_statements = False


class AsyncWithoutLimits(AsyncFakeDriver):
    name = "old"
    limits_statements = False


@pytest.mark.parametrize(
    ("pool", "driver"), [(ConnectionPool, WithoutLimits), (AsyncConnectionPool, AsyncWithoutLimits)]
)
def test_a_driver_that_cannot_do_it_is_refused_by_the_options_name(pool, driver):
    with pytest.raises(ConfigError) as caught:
        pool(driver=driver(FakeServer()), statement_timeout_client=1, name="shop")
    assert str(caught.value).startswith(
        "option 'statement_timeout_client' of pool 'shop' must be None with driver 'old', which "
        "cannot give a statement up, not 1"
    )
    pool(driver=driver(FakeServer()), statement_timeout_client=None)


def test_a_fake_server_that_hangs_shows_it_to_a_users_test():
    server = FakeServer()
    pool = ConnectionPool(driver=FakeDriver(server), statement_timeout_client=0.01)
    with pool, pytest.raises(StatementTimeout), pool.connection() as conn:
        server.mode = Mode.HANGING
        conn.execute("select 1")
