"""A password or a file that is replaced counts at once, where the pool can know of it."""

from __future__ import annotations

import threading

import pytest
from tests.wire import WireProxy

from penstock import ConnectionPool, ServerUnavailable
from pytest_penstock.postgres import HBA, Server


@pytest.fixture(scope="module")
def strict_server():
    with Server(hba=("host all rotates 127.0.0.1/32 scram-sha-256", *HBA)) as running:
        running.execute("create role rotates login password 'right'")
        yield running


def test_a_callable_that_says_something_new_is_heeded_by_the_very_next_borrower(strict_server):
    said, asked = ["wrong"], []

    def words():
        asked.append(said[0])
        return {"password": said[0]}

    conninfo = strict_server.conninfo(user="rotates")
    with ConnectionPool(conninfo, kwargs=words, timeout=20, name="rotates") as pool:
        for _ in range(3):
            with pytest.raises(ServerUnavailable) as caught:
                pool.getconn()
        said[0] = "right"
        with pool.connection() as conn:
            assert conn.execute("select 1").fetchone() == (1,)
    assert not caught.value.heals
    assert caught.value.sqlstate in {"28P01", None}
    assert asked.count("right") == 1
    assert "wrong" not in str(caught.value)


def test_many_who_ask_at_once_cause_one_question_and_no_login(strict_server):
    asked = []

    def words():
        asked.append(1)
        return {"password": "wrong"}

    conninfo = strict_server.conninfo(user="rotates")
    with ConnectionPool(conninfo, kwargs=words, max_size=16, timeout=20, name="many") as pool:
        with pytest.raises(ServerUnavailable):
            pool.getconn()
        before, failed, refused = len(asked), pool.stats().open_failures, []

        def borrow():
            with pytest.raises(ServerUnavailable):
                pool.getconn()
            refused.append(1)

        threads = [threading.Thread(target=borrow) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 30
        # A machine that is slow enough sees the next second's attempt, too.
        assert pool.stats().open_failures - failed <= 1
        assert len(asked) - before <= 8


def test_a_password_file_that_is_replaced_is_heeded_too(strict_server, tmp_path):
    file = tmp_path / "pgpass"

    def write(password):
        fresh = tmp_path / "fresh"
        fresh.write_text(f"*:*:*:rotates:{password}\n")
        fresh.chmod(0o600)
        fresh.replace(file)

    write("wrong")
    conninfo = strict_server.conninfo(user="rotates", passfile=file)
    with ConnectionPool(conninfo, timeout=20, name="passfile") as pool:
        with pytest.raises(ServerUnavailable) as caught:
            pool.getconn()
        assert not caught.value.heals
        write("right")
        with pool.connection() as conn:
            assert conn.execute("select 1").fetchone() == (1,)


def test_many_first_attempts_that_are_refused_together_are_diagnosed_once(strict_server):
    with WireProxy("127.0.0.1", strict_server.port) as proxy, proxy.counting() as count:
        conninfo = strict_server.conninfo(user="rotates", password="wrong", port=proxy.port)
        with ConnectionPool(conninfo, max_size=8, timeout=20, name="together") as pool:
            refused = []

            def borrow():
                with pytest.raises(ServerUnavailable) as caught:
                    pool.getconn()
                refused.append(caught.value.heals)

            threads = [threading.Thread(target=borrow) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            failed = pool.stats().open_failures
    assert refused == [False] * 8
    assert count.opened - failed <= 2
