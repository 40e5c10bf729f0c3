"""TLS that cannot work is told at once, with its own next step; what may heal is waited for.

Real servers with and without TLS. Told by a handshake, never by libpq's words.
"""

from __future__ import annotations

import socket
import threading

import pytest
from tests.docs.test_security import another_authority
from tests.wire import WireProxy

from penstock import ConnectionPool, ServerUnavailable

PATIENCE = 30.0


@pytest.fixture(name="another_authority")
def make_another_authority(tmp_path):
    return another_authority(tmp_path)


def told(conninfo: str, timeout: float = PATIENCE) -> ServerUnavailable:
    pool = ConnectionPool(conninfo, name="tls", min_size=0)
    with pool, pytest.raises(ServerUnavailable) as caught:
        pool.execute("select 1", timeout=timeout)
    return caught.value


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_a_certificate_of_another_authority_is_told_at_once(tls_server, another_authority, mode):
    with WireProxy("127.0.0.1", tls_server.port) as proxy, proxy.counting() as count:
        error = told(
            tls_server.conninfo(
                over="tls", port=proxy.port, sslmode=mode, sslrootcert=another_authority
            )
        )
    assert (error.heals, error.attempts) == (False, 1)
    assert "certificate did not pass" in str(error)
    assert count.opened == 2  # the attempt, and the handshake that diagnoses


def test_a_name_that_is_not_in_the_certificate_is_told_at_once(tls_server):
    conninfo = tls_server.conninfo(over="tls", host="127.0.0.2", hostaddr="127.0.0.1")
    error = told(conninfo)
    assert (error.heals, error.attempts) == (False, 1)
    assert "host= is a name in it" in str(error)
    # verify-ca asks for no name
    with ConnectionPool(conninfo.replace("verify-full", "verify-ca")) as pool:
        assert pool.execute("select 1").fetchone() == (1,)


def test_a_file_of_authorities_that_is_not_there_or_holds_none_is_told_at_once(
    tls_server, tmp_path
):
    empty = tmp_path / "empty.crt"
    empty.write_text("no certificate\n")
    for path in (tmp_path / "missing.crt", empty):
        error = told(tls_server.conninfo(over="tls", sslrootcert=path))
        assert (error.heals, error.attempts) == (False, 1)
        assert "sslrootcert must name a readable file" in str(error)


def test_a_server_without_tls_is_told_at_once(server):
    error = told(server.conninfo(over="tcp", sslmode="require"))
    assert (error.heals, error.attempts) == (False, 1)
    assert "the server offers no TLS" in str(error)


def test_a_server_that_is_down_may_come_back_whatever_the_authorities_are(
    tls_server, another_authority
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = told(tls_server.conninfo(over="tls", port=port, sslrootcert=another_authority), 0.5)
    assert error.heals
    assert "check that the server runs" in str(error)


def test_a_server_that_hangs_up_at_the_request_may_come_back(tls_server):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        error = told(tls_server.conninfo(over="tls", port=listener.getsockname()[1]), 0.5)
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE)
    assert error.heals


def test_what_asks_sends_neither_user_nor_password(tls_server, another_authority):
    """Whoever is at the other end has not shown who he is."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.settimeout(PATIENCE)
                    heard.append(client.recv(4096))
                    client.sendall(b"N")

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        error = told(tls_server.conninfo(over="tls", port=port, user="app", password="of-the-app"))
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE)
    assert not error.heals
    assert set(heard) == {b"\0\0\0\x08\x04\xd2\x16/"}
