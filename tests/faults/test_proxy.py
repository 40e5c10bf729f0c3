"""The fault proxy does what it says, and says nothing else. Driven by plain sockets, an echo behind it."""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time
from contextlib import suppress

import pytest
from tests.faults.proxy import FaultProxy, ProxyProcess
from tests.forks import until

#: Long enough that something would have come, had it been on its way.
A_WHILE = 0.15
PATIENCE = 20.0

UNACKED_AT = 24  # of struct tcp_info: segments sent and not acknowledged


class Echo:
    """Says back what it hears, after its name."""

    def __init__(self, name=b""):
        self.name = name
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.heard = 0
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.heard += 1
            threading.Thread(target=self.talk, args=(client,), daemon=True).start()

    def talk(self, client):
        try:
            with client:
                while data := client.recv(100):
                    client.sendall(self.name + data)
        except OSError:
            pass

    def close(self):
        if self.listener.fileno() >= 0:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()


@pytest.fixture
def echo():
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture(params=[FaultProxy, ProxyProcess])
def broken(request, echo):
    with request.param("127.0.0.1", echo.port) as proxy:
        yield proxy


@pytest.fixture
def client(broken):
    clients = []

    def connect(timeout=PATIENCE):
        clients.append(socket.create_connection(("127.0.0.1", broken.port), timeout))
        clients[-1].settimeout(PATIENCE)
        return clients[-1]

    yield connect
    for each in clients:
        each.close()


def answer(sock, said=b"x"):
    sock.sendall(said)
    return sock.recv(100)


def says_nothing(sock):
    sock.settimeout(A_WHILE)
    try:
        sock.recv(100)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(PATIENCE)
    return False


def unacknowledged(sock):
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return struct.unpack_from("I", info, UNACKED_AT)[0]


def test_what_is_held_is_acknowledged_and_comes_later(broken, client):
    old = client()
    assert answer(old) == b"x"
    broken.hold()
    new = client()
    for sock in (old, new):
        sock.sendall(b"y")
        assert says_nothing(sock)
        assert unacknowledged(sock) == 0
    broken.release()
    assert old.recv(1) == new.recv(1) == b"y"


@pytest.mark.parametrize("verb", ["hold", "silence"])
def test_old_or_new_ones_can_be_spared(broken, client, verb):
    old = client()
    assert answer(old) == b"x"
    getattr(broken, verb)(old=False)
    assert answer(old) == b"x"
    broken.release()
    getattr(broken, verb)(new=False)
    new = client()
    assert answer(new) == b"x"
    old.sendall(b"x")
    assert says_nothing(old)


def test_silence_acknowledges_nothing_and_answers_no_syn(broken, client):
    old = client()
    assert answer(old) == b"x"
    broken.silence()
    old.sendall(b"y")
    assert says_nothing(old)
    assert unacknowledged(old) == 1
    with pytest.raises(TimeoutError):
        client(timeout=A_WHILE)
    broken.release()
    assert old.recv(1) == b"y"
    assert answer(client()) == b"x"


def test_a_mute_one_accepts_and_no_server_hears_of_it(broken, client, echo):
    broken.say_nothing()
    sock = client()
    sock.sendall(b"x")
    assert says_nothing(sock)
    assert echo.heard == 0
    broken.release()
    assert answer(client()) == b"x"
    with pytest.raises(ConnectionResetError):
        sock.recv(1)


def test_a_slow_connect_is_slow_once(broken, client):
    broken.slow_connect(A_WHILE)
    began = time.monotonic()
    sock = client()
    assert answer(sock) == b"x"
    assert time.monotonic() - began >= A_WHILE
    broken.slow_connect(60)
    assert answer(sock) == b"x"


@pytest.mark.parametrize("how", ["rst", "fin"])
def test_a_cut_says_how(broken, client, how):
    sock = client()
    assert answer(sock) == b"x"
    assert broken.cut(how) == 1
    if how == "fin":
        assert sock.recv(1) == b""
    else:
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_refused_accepted_again_and_led_elsewhere(broken, client):
    broken.refuse()
    with pytest.raises(ConnectionRefusedError):
        client()
    broken.accept()
    assert answer(client()) == b"x"
    other = Echo(b"other ")
    broken.upstream("127.0.0.1", other.port)
    assert answer(client()) == b"other x"
    other.close()


def test_arrivals_and_traffic_are_told(broken, client):
    before = time.monotonic()
    with broken.counting() as count:
        sock = client()
        answer(sock, b"12345678")
        answer(sock, b"87654321")
    assert (count.opened, count.round_trips, count.total.sent, count.total.received) == (
        1,
        2,
        16,
        16,
    )
    assert [before <= at <= time.monotonic() for at in broken.arrivals()] == [True]


def test_arrivals_of_a_server_that_is_down_are_counted_too(broken, client, echo):
    echo.close()
    with pytest.raises(ConnectionResetError):
        client().recv(1)
    assert len(broken.arrivals()) == 1


@pytest.mark.parametrize("kind", [FaultProxy, ProxyProcess])
def test_it_is_bounded_in_count_and_in_time(echo, kind):
    with kind("127.0.0.1", echo.port, connections=1) as proxy:
        address = ("127.0.0.1", proxy.port)
        with (
            socket.create_connection(address) as first,
            socket.create_connection(address) as second,
        ):
            assert answer(first) == b"x"
            with pytest.raises(ConnectionResetError):
                answer(second)
    with kind("127.0.0.1", echo.port, seconds=0.05) as proxy:
        until(lambda: _refused(proxy.port), "it refuses by itself")


def _refused(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


@pytest.mark.parametrize("kind", [FaultProxy, ProxyProcess])
def test_everything_is_closed_at_the_end_whatever_it_was_doing(echo, kind):
    with kind("127.0.0.1", echo.port) as proxy:
        socks = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(3)]
        for sock in socks:
            assert answer(sock) == b"x"
        proxy.silence()
    for sock in socks:
        assert sock.recv(1) == b""
        sock.close()
    assert _refused(proxy.port)


def test_who_connects_in_the_moment_of_a_refusal_is_not_left_unheard(echo):
    """asyncio forgets a socket that was accepted while its listener closes."""
    with FaultProxy("127.0.0.1", echo.port) as proxy:
        for _ in range(60):
            with socket.create_connection(("127.0.0.1", proxy.port), PATIENCE) as client:
                proxy.refuse()
                with suppress(ConnectionError):
                    client.sendall(b"!")
                    assert client.recv(1) in {b"!", b""}  # to hear nothing at all is an error
            proxy.accept()
