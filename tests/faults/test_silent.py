"""A server that takes connections and says nothing: borrowers are told so, and not that the pool is full."""

from __future__ import annotations

import pytest
from tests.faults.proxy import FaultProxy
from tests.wire import WireProxy

from penstock import ConnectionPool, PoolTimeout, ServerUnavailable

SECRET = "hunter2-and-more"


def test_who_waits_for_a_mute_server_is_told_which_it_is_and_since_when(server):
    with FaultProxy("127.0.0.1", server.port) as proxy:
        proxy.say_nothing()
        conninfo = server.conninfo(port=proxy.port, password=SECRET)
        with ConnectionPool(conninfo, timeout=0.6, name="mute") as pool:
            with pytest.raises(ServerUnavailable) as caught:
                pool.getconn()
            health = pool.health()
            proxy.release()  # and cuts: what was under way has failed, and is tried again
            with pool.connection(timeout=30) as conn:
                assert conn.execute("select 1").fetchone() == (1,)
    error = caught.value
    assert f'"127.0.0.1" port {proxy.port} neither answers nor refuses (1 being opened' in str(
        error
    )
    assert "no answer for 0." in str(error)
    assert (error.heals, error.attempts, error.__cause__) == (True, 0, None)
    assert error.down_seconds is not None
    assert error.down_seconds >= 0.5
    assert SECRET not in str(error)
    assert not health.ready
    assert "has not answered for 0." in health.why


def test_a_full_pool_with_a_connect_that_hangs_beside_says_that_it_is_full(server):
    with WireProxy("127.0.0.1", server.port) as proxy:
        conninfo = server.conninfo(port=proxy.port)
        with ConnectionPool(conninfo, max_size=2, timeout=0.7, name="full") as pool:
            conn = pool.getconn()
            proxy.freeze()
            with pytest.raises(PoolTimeout, match="1 of 2 in use, 0 waiting, 1 being opened"):
                pool.getconn()
            proxy.thaw()
            pool.putconn(conn)
