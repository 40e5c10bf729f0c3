"""The counting proxy is exact, and its verbs do what they say. Driven by plain psycopg and sockets."""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Literal

import psycopg
import pytest

from tests.wire import FrontendParser, WireProxy

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from pytest_penstock.postgres import Server

    Connection = psycopg.Connection[tuple[Any, ...]]
    Connect = Callable[..., Connection]


@pytest.fixture
def connect(server: Server, proxy: WireProxy) -> Connect:
    def connect(**extra: object) -> Connection:
        dsn = server.conninfo(port=proxy.port, connect_timeout=20)
        return psycopg.connect(dsn, prepare_threshold=None, **extra)  # type: ignore[arg-type]

    return connect


@pytest.fixture
def connection(connect: Connect) -> Iterator[Connection]:
    with connect(autocommit=True) as connection:
        yield connection


def test_one_autocommit_statement_is_one_round_trip(
    connection: Connection, proxy: WireProxy
) -> None:
    with proxy.counting() as count:
        connection.execute("select 1")
    assert count.round_trips == 1
    assert count.messages == {"Query": 1}


def test_a_transaction_around_one_statement_is_three_round_trips(
    connection: Connection, proxy: WireProxy
) -> None:
    connection.autocommit = False
    with proxy.counting() as count:
        connection.execute("select 1")
        connection.commit()
    assert count.round_trips == 3
    assert count.messages == {"Query": 3}


def test_nothing_said_is_nothing_counted(connection: Connection, proxy: WireProxy) -> None:
    with proxy.counting() as count:
        assert connection.info.server_version
    assert count.round_trips == 0
    assert (count.total.sent, count.total.received) == (0, 0)


def test_every_one_of_many_statements_is_counted_before_its_answer_is_seen(
    connection: Connection, proxy: WireProxy
) -> None:
    for n in range(200):
        with proxy.counting() as count:
            connection.execute("select 1")
            assert count.round_trips == 1, n


def test_a_big_answer_and_a_big_question_are_one_round_trip_each(
    connection: Connection, proxy: WireProxy
) -> None:
    with proxy.counting() as count:
        connection.execute("select repeat('x', 5000000)")
    assert count.round_trips == 1
    assert count.total.received > 5_000_000
    with proxy.counting() as count:
        connection.execute("select length(%s)", ["x" * 3_000_000])
    assert count.round_trips == 1
    assert count.messages == {"Parse": 1, "Bind": 1, "Describe": 1, "Execute": 1, "Sync": 1}


def test_opening_is_counted_per_connection(connect: Connect, proxy: WireProxy) -> None:
    with proxy.counting() as count, connect() as one, connect() as two:
        two.execute("select 1")
        assert one.info.status is psycopg.pq.ConnStatus.OK
    first, second = count.by_connection
    assert count.opened == 2
    assert first.messages["Startup"] == second.messages["Startup"] == 1
    assert first.round_trips == 1  # trust: the startup packet and its answer
    assert second.round_trips == 1 + 3


def test_what_the_server_says_unasked_is_no_round_trip(
    connection: Connection, proxy: WireProxy, server: Server
) -> None:
    connection.execute("listen gossip")
    with proxy.counting() as count:
        server.execute("notify gossip")
        assert [note.channel for note in connection.notifies(timeout=20, stop_after=1)] == [
            "gossip"
        ]
    assert count.round_trips == 0
    assert count.total.received > 0


def test_a_refused_request_for_tls_is_seen_and_reading_goes_on(
    server: Server, proxy: WireProxy
) -> None:
    dsn = server.conninfo(port=proxy.port, sslmode="prefer")
    with proxy.counting() as count, psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select 1")
    assert count.messages["TLSRequest"] == 1
    assert count.messages["Startup"] == count.messages["Query"] == 1
    assert count.round_trips == 3


def test_inside_tls_only_bytes_and_round_trips_are_known(tls_server: Server) -> None:
    with WireProxy("127.0.0.1", tls_server.port) as proxy:
        dsn = tls_server.conninfo(over="tls", port=proxy.port)
        with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection:
            with proxy.counting() as count:
                connection.execute("select 1")
            assert count.round_trips == 1
            assert not count.messages


TLS_REQUEST = struct.pack("!II", 8, 80877103)  # answered with one byte, "N" where there is no TLS


def test_frozen_nothing_passes_and_thawed_everything_does(proxy: WireProxy) -> None:
    proxy.freeze()
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.2) as client:
        with proxy.counting() as count:
            client.sendall(TLS_REQUEST)
            with pytest.raises(TimeoutError):
                client.recv(1)
        assert count.total.sent == 0
        proxy.thaw()
        client.settimeout(20)
        assert client.recv(1) == b"N"


@pytest.mark.parametrize(("how", "error"), [("rst", ConnectionResetError), ("fin", None)])
def test_cut_connections_end_as_asked(
    proxy: WireProxy, how: Literal["rst", "fin"], error: type[OSError] | None
) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        client.sendall(TLS_REQUEST)
        assert client.recv(1) == b"N"  # the relay stands
        assert proxy.cut(how) == 1
        if error is None:
            assert client.recv(1) == b""
        else:
            with pytest.raises(error):
                client.recv(1)
    assert proxy.cut() == 0


def test_cut_connections_are_errors_and_new_ones_work(
    connect: Connect, connection: Connection, proxy: WireProxy
) -> None:
    assert proxy.cut() == 1
    with pytest.raises(psycopg.OperationalError):
        connection.execute("select 1")
    with connect() as another:
        another.execute("select 1")


def test_refused_new_connections_fail_and_old_ones_go_on(
    connect: Connect, connection: Connection, proxy: WireProxy
) -> None:
    proxy.refuse()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        connect()
    connection.execute("select 1")
    proxy.accept()
    with connect() as another:
        another.execute("select 1")


def test_a_delay_makes_a_round_trip_longer(connection: Connection, proxy: WireProxy) -> None:
    proxy.delay(0.2)
    begin = time.monotonic()
    connection.execute("select 1")
    assert time.monotonic() - begin >= 0.2


def test_new_connections_go_to_the_new_upstream(
    connect: Connect, connection: Connection, proxy: WireProxy, server: Server, tls_server: Server
) -> None:
    proxy.upstream("127.0.0.1", tls_server.port)
    ask = "select setting::int from pg_settings where name = 'port'"
    with connect() as another:
        assert another.execute(ask).fetchone() == (tls_server.port,)
    assert connection.execute(ask).fetchone() == (server.port,)


def test_an_upstream_that_is_down_is_an_error_for_the_client(
    connect: Connect, proxy: WireProxy
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and never listening
        proxy.upstream(*nobody.getsockname())
        with pytest.raises(psycopg.OperationalError):
            connect()


def test_messages_are_named_however_the_bytes_are_cut(rng: random.Random) -> None:
    startup = struct.pack("!II", 8, 80877103) + struct.pack("!II", 17, 196608) + b"user\0x\0\0\0"
    said = b"Q" + struct.pack("!I", 13) + b"select 1\0" + b"X" + struct.pack("!I", 4)
    for _ in range(200):
        parser, names, rest = FrontendParser(), [], startup + said
        while rest:
            cut = rng.randint(1, len(rest))
            names += parser.feed(rest[:cut])
            parser.answered(b"N")
            rest = rest[cut:]
        assert names == ["TLSRequest", "Startup", "Query", "Terminate"]
