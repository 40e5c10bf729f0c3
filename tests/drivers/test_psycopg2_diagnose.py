"""Why psycopg2 could not connect: told without psycopg 3, and mistakes in settings are told at once.

And the end of a link where the process has no descriptor left.
"""

from __future__ import annotations

import errno
import os
import sys
import time

import pytest

pytest.importorskip("psycopg2")

import psycopg2
from tests.forks import PATIENCE

from penstock import ConnectionPool, ServerUnavailable
from penstock._drivers.psycopg2 import diagnose as psycopg2_diagnose
from penstock._drivers.psycopg2.driver import Psycopg2Driver
from penstock.drivers import Recipe
from pytest_penstock.postgres import HBA, Server


@pytest.fixture(scope="module")
def strict_server():
    with Server(hba=("host all rotates 127.0.0.1/32 scram-sha-256", *HBA)) as running:
        running.execute("create role rotates login password 'right'")
        running.execute("create role lonely login password 'right' connection limit 0")
        yield running


@pytest.fixture
def without_psycopg3(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)


def diagnosis_of(conninfo):
    driver, recipe = Psycopg2Driver(), Recipe(conninfo=conninfo)
    with pytest.raises(psycopg2.OperationalError) as caught:
        driver.open(recipe, 10.0)
    return psycopg2_diagnose.diagnose(caught.value, recipe, 5.0)


@pytest.mark.usefixtures("without_psycopg3")
def test_without_psycopg3_a_wrong_or_missing_password_is_known_to_last(strict_server):
    for words in ({"password": "wrong"}, {}):
        found = diagnosis_of(strict_server.conninfo(user="rotates", **words))
        assert not found.heals
        assert found.sqlstate == "28P01" or "password" in (found.next_step or "")


@pytest.mark.usefixtures("without_psycopg3")
def test_without_psycopg3_the_servers_code_is_heard(strict_server):
    found = diagnosis_of(strict_server.conninfo(dbname="nowhere"))
    assert (found.sqlstate, found.heals) == ("3D000", False)
    found = diagnosis_of(strict_server.conninfo(user="lonely"))
    assert (found.sqlstate, found.heals) == ("53300", True)


@pytest.mark.usefixtures("without_psycopg3")
def test_without_psycopg3_a_refused_connect_heals():
    found = diagnosis_of("host=127.0.0.1 port=9")
    assert (found.sqlstate, found.heals) == (None, True)


@pytest.mark.parametrize(
    "wrong",
    [
        "host=127.0.0.1 port=99999999",
        "host=127.0.0.1 port=70000",
        "host=127.0.0.1 connect_timeout=abc",
        "host=127.0.0.1,localhost port=1,2,3",
        "host=127.0.0.1 keepalives_idle=soon",
        "host=127.0.0.1 sslmode=sometimes",
    ],
)
def test_a_mistake_in_a_setting_is_told_at_once(wrong):
    began = time.monotonic()
    with (
        ConnectionPool(wrong, driver="psycopg2", timeout=PATIENCE, name="wrong") as pool,
        pytest.raises(ServerUnavailable) as caught,
    ):
        pool.getconn()
    assert not caught.value.heals
    assert "conninfo" in (caught.value.next_step or "")
    assert time.monotonic() - began < PATIENCE


def test_discard_ends_the_session_where_no_descriptor_is_left(server, monkeypatch):
    link = Psycopg2Driver().open(Recipe(conninfo=server.conninfo()), 10.0)
    pid = link.conn.info.backend_pid

    def no_more(_fd):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", no_more)
        link.discard()
    deadline = time.monotonic() + PATIENCE
    with psycopg2.connect(server.conninfo()) as other, other.cursor() as cursor:
        gone = False
        while not gone and time.monotonic() < deadline:
            cursor.execute("select not exists (select from pg_stat_activity where pid = %s)", [pid])
            gone = cursor.fetchone() == (True,)
            other.commit()
    other.close()
    assert gone
    assert os.fstat(link.fd), "the descriptor is still the connection's"
