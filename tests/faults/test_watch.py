"""The watcher on real sockets; no PostgreSQL needed, a server is whoever holds the other end."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import select
import socket
import sys
import threading
import types
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from penstock._process import fork, watch
from penstock._process.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not watch.available(), reason="no epoll here")

PATIENCE = 10  # seconds until a test gives up; never a pass mark


class Ends:
    """Socket pairs of one kind, closed at the end."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.all: list[socket.socket] = []

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair() if self.kind == "unix" else self._tcp()
        self.all += [ours, theirs]
        return ours, theirs

    def _tcp(self) -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
        return ours, theirs

    def close(self) -> None:
        for end in self.all:
            end.close()


@pytest.fixture(params=["unix", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    found = Ends(request.param)
    yield found
    found.close()


@pytest.fixture
def heard() -> queue.SimpleQueue[Any]:
    return queue.SimpleQueue()


@pytest.fixture
def watcher(heard: queue.SimpleQueue[Any]) -> Iterator[Watch]:
    made = Watch(lambda token, fd: heard.put((token, fd)))
    yield made
    made.close()


def watchers() -> set[threading.Thread]:
    """The watchers' threads of this process: a pool of another test may have one, too."""
    return {thread for thread in threading.enumerate() if thread.name == "penstock-watch"}


def fence(watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]) -> list[Any]:
    """Wait until the watcher has dealt with everything before this: one hang-up of our own."""
    ours, theirs = ends.pair()
    watcher.add(ours.fileno(), "fence")
    theirs.close()
    before: list[Any] = []
    while (item := heard.get(timeout=PATIENCE))[0] != "fence":
        before.append(item)
    watcher.remove(ours.fileno())
    return before


def test_a_hang_up_is_heard_once(watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]) -> None:
    ours, theirs = ends.pair()
    watcher.add(ours.fileno(), "slot 1")
    theirs.close()
    assert heard.get(timeout=PATIENCE) == ("slot 1", ours.fileno())
    assert fence(watcher, ends, heard) == []


def test_a_half_closed_end_and_unread_data_are_a_hang_up_too(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    ours, theirs = ends.pair()
    watcher.add(ours.fileno(), "slot 1")
    theirs.sendall(b"FATAL: terminating connection due to administrator command")
    theirs.shutdown(socket.SHUT_WR)
    assert heard.get(timeout=PATIENCE) == ("slot 1", ours.fileno())


def test_one_that_hung_up_before_it_was_added_is_heard(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    ours, theirs = ends.pair()
    theirs.close()
    watcher.add(ours.fileno(), "slot 1")
    assert heard.get(timeout=PATIENCE)[0] == "slot 1"


def test_ordinary_traffic_never_wakes_the_watcher(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    ours, theirs = ends.pair()
    watcher.add(ours.fileno(), "busy")
    fence(watcher, ends, heard)
    before = watcher.wakeups
    for _ in range(2000):
        ours.sendall(b"select 1")
        theirs.recv(100)
        theirs.sendall(b"1")
        ours.recv(100)
    theirs.sendall(b"a NOTIFY that nobody reads")
    assert fence(watcher, ends, heard) == []
    assert watcher.wakeups == before + 1


def test_what_is_removed_is_not_heard(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    ours, theirs = ends.pair()
    watcher.add(ours.fileno(), "gone")
    watcher.remove(ours.fileno())
    theirs.close()
    assert fence(watcher, ends, heard) == []


def test_removing_tolerates_unknown_removed_and_closed_descriptors(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    ours, _ = ends.pair()
    number = ours.fileno()
    watcher.remove(number)
    watcher.add(number, "one")
    fence(watcher, ends, heard)  # at rest: it would rightly tell of one closed behind its back
    ours.close()
    watcher.remove(number)
    watcher.remove(number)
    assert fence(watcher, ends, heard) == []


def test_a_number_that_is_used_again_belongs_to_the_new_one(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    first, first_end = ends.pair()
    number = first.fileno()
    serial = watcher.add(number, "old")
    watcher.remove(number)
    second, second_end = ends.pair()
    os.dup2(second.fileno(), number)  # closes the old one; the number is the new one's now
    new_serial = watcher.add(number, "new")
    assert new_serial != serial
    watcher.remove(number, serial)  # a late word about the old one
    first_end.close()
    assert fence(watcher, ends, heard) == []
    second_end.close()
    assert heard.get(timeout=PATIENCE) == ("new", number)


def test_a_late_event_of_an_earlier_user_of_the_number_harms_nobody(
    ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    watcher = Watch(lambda token, fd: heard.put(token), threaded=False)
    try:
        ours, theirs = ends.pair()
        watcher.add(ours.fileno(), "alive")
        # What an event in flight looks like when its descriptor was closed and used again.
        watcher._dispatch([(ours.fileno(), select.EPOLLRDHUP)])
        assert heard.empty()
        theirs.close()
        watcher.collect()
        assert heard.get_nowait() == "alive"
    finally:
        watcher.close()


def test_a_descriptor_that_is_closed_is_refused_and_forgotten(watcher: Watch, ends: Ends) -> None:
    ours, _ = ends.pair()
    number = ours.fileno()
    ours.close()
    with pytest.raises(OSError):  # noqa: PT011  EBADF or EPERM
        watcher.add(number, "nobody")
    assert "0 watched" in repr(watcher)


def test_the_thread_starts_at_the_first_add_and_sleeps(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    assert "not running" in repr(watcher)
    ours, _ = ends.pair()
    watcher.add(ours.fileno(), "x")
    assert repr(watcher) == "<Watch running: 1 watched, 0 wake-ups>"


def test_what_happens_while_it_is_stopped_is_heard_after_the_start(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    ours, theirs = ends.pair()
    watcher.add(ours.fileno(), "slot 1")
    for _ in range(20):
        assert watcher.stop(PATIENCE)
        assert "not running" in repr(watcher)
        watcher.start()
    assert watcher.stop(PATIENCE)
    theirs.close()
    assert heard.empty()
    watcher.start()
    assert heard.get(timeout=PATIENCE) == ("slot 1", ours.fileno())


def test_a_thread_that_cannot_stop_in_time_goes_on_after_the_start(ends: Ends) -> None:
    inside, go_on = threading.Event(), threading.Event()
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def slow(token: Any, fd: int) -> None:
        if token == "slow":
            inside.set()
            go_on.wait(PATIENCE)
        heard.put((token, fd))

    others = watchers()
    watcher = Watch(slow)
    try:
        ours, theirs = ends.pair()
        watcher.add(ours.fileno(), "slow")
        theirs.close()
        assert inside.wait(PATIENCE)
        assert not watcher.stop(0)
        watcher.start()
        go_on.set()
        assert fence(watcher, ends, heard) == [("slow", ours.fileno())]
        assert len(watchers() - others) == 1
    finally:
        go_on.set()
        watcher.close()


def test_an_owner_that_raises_silences_nobody(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def owner(token: Any, fd: int) -> None:
        if token == "bad":
            raise RuntimeError("an owner's bug")
        heard.put((token, fd))

    watcher = Watch(owner)
    try:
        ours, theirs = ends.pair()
        watcher.add(ours.fileno(), "bad")
        with caplog.at_level(logging.CRITICAL + 1, logger="penstock"):
            theirs.close()
            assert fence(watcher, ends, heard) == []
    finally:
        watcher.close()


def test_an_interrupt_in_the_thread_loses_no_hang_up(ends: Ends) -> None:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    calls: list[int] = []

    def owner(token: Any, fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            heard.put("once")
            # strikes in this thread as soon as this call has returned
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(threading.get_ident()), ctypes.py_object(KeyboardInterrupt)
            )
        else:
            heard.put((token, fd))

    watcher = Watch(owner)
    logging.getLogger("penstock").disabled = True
    try:
        pairs = [ends.pair() for _ in range(5)]
        for ours, _ in pairs:
            watcher.add(ours.fileno(), "interrupted")
        watcher.stop(PATIENCE)
        for _, theirs in pairs:
            theirs.close()
        watcher.start()  # all five events come in one go
        assert heard.get(timeout=PATIENCE) == "once"
        rest = {heard.get(timeout=PATIENCE)[1] for _ in range(4)}
        assert rest <= {ours.fileno() for ours, _ in pairs}
        assert len(rest) == 4
    finally:
        logging.getLogger("penstock").disabled = False
        watcher.close()


def test_an_epoll_closed_by_somebody_else_ends_the_thread_instead_of_spinning(
    ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    watcher = Watch(lambda token, fd: heard.put(token))
    logging.getLogger("penstock").disabled = True
    try:
        ours, theirs = ends.pair()
        watcher.add(ours.fileno(), "x")
        assert watcher._run is not None
        thread = watcher._run.thread  # not another watcher's of this process
        watcher._ep.close()
        os.eventfd_write(watcher._wake, 1)  # a thread inside poll holds the epoll: get it out
        thread.join(PATIENCE)
        assert not thread.is_alive()
        theirs.close()
        watcher.sweep()
        assert heard.get(timeout=PATIENCE) == "x"
    finally:
        logging.getLogger("penstock").disabled = False
        watcher.after_fork_in_child()
        fork.forget(watcher.stop)
        fork.forget(watcher.start)
        fork.forget(watcher.after_fork_in_child)


def test_an_event_loop_can_drive_it_without_a_thread(ends: Ends) -> None:
    heard: list[Any] = []
    watcher = Watch(lambda token, fd: heard.append(token), threaded=False)
    try:
        ours, theirs = ends.pair()
        watcher.add(ours.fileno(), "x")
        assert "not running" in repr(watcher)
        theirs.close()
        assert select.select([watcher.fileno()], [], [], PATIENCE)[0]
        watcher.collect()
        watcher.collect()
        assert heard == ["x"]
    finally:
        watcher.close()


def test_it_finds_the_epoll_that_gevent_took_away(monkeypatch: pytest.MonkeyPatch) -> None:
    epoll = select.epoll
    fake = types.SimpleNamespace(
        is_module_patched=lambda name: name == "select",
        get_original=lambda _module, name: {"epoll": epoll}[name],
    )
    monkeypatch.setitem(sys.modules, "gevent.monkey", fake)
    monkeypatch.delattr(select, "epoll")
    assert watch.available()
    assert watch._select("epoll") is epoll


def test_without_epoll_it_does_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, ends: Ends
) -> None:
    monkeypatch.delattr(select, "epoll")
    watcher = Watch(lambda token, fd: None)
    ours, _ = ends.pair()
    assert not watch.available()
    assert watcher.add(ours.fileno(), "x") == 0
    watcher.remove(ours.fileno())
    watcher.collect()
    assert watcher.stop()
    with pytest.raises(OSError, match="no epoll"):
        watcher.fileno()


def in_child(fork_call: Callable[..., int], work: Callable[[], str]) -> tuple[str, int]:
    """Run `work` in a child and give what it reported; it never returns from the child."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # the test's own threads (pytest plugins) are not ours to park
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = fork_call()
    if pid == 0:
        status = 1
        try:
            os.write(writer, str(work()).encode())
            status = 0
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hooked_fork(_watcher: Watch) -> int:
    return os.fork()


def libc_fork(watcher: Watch) -> int:
    # A thread on its way to or from the GIL makes the child's GIL unusable when no hook repairs it;
    # what forks like this (uWSGI) has no threads either. The registrations stay.
    assert watcher.stop(PATIENCE)
    return int(ctypes.PyDLL(None).fork())


@pytest.mark.parametrize("fork_call", [hooked_fork, libc_fork], ids=["os.fork", "libc fork"])
def test_a_child_does_not_disturb_the_parents_registrations(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any], fork_call: Callable[..., int]
) -> None:
    ours, theirs = ends.pair()
    watcher.add(ours.fileno(), "parent's")

    def child() -> str:
        watcher.remove(ours.fileno())  # before anybody noticed the fork, or after
        own, own_end = ends.pair()
        watcher.add(own.fileno(), "child's")
        watcher.remove(ours.fileno())
        ours.close()
        own_end.close()
        said = heard.get(timeout=PATIENCE)
        assert said == ("child's", own.fileno())
        return str(said[0])

    assert in_child(lambda: fork_call(watcher), child) == ("child's", 0)
    watcher.start()
    assert fence(watcher, ends, heard) == []
    theirs.close()
    assert heard.get(timeout=PATIENCE) == ("parent's", ours.fileno())


def test_a_fork_restarts_the_parents_thread(
    watcher: Watch, ends: Ends, heard: queue.SimpleQueue[Any]
) -> None:
    ours, theirs = ends.pair()
    watcher.add(ours.fileno(), "parent's")
    assert in_child(os.fork, lambda: repr(watcher)) == (
        "<Watch not running: 0 watched, 1 wake-ups>",
        0,
    )
    assert "<Watch running: 1 watched" in repr(watcher)
    theirs.close()
    assert heard.get(timeout=PATIENCE)[0] == "parent's"


def test_a_thread_that_forks_inside_hung_up_does_not_wait_for_itself(ends: Ends) -> None:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    watcher = Watch(lambda token, fd: heard.put((token, in_child(os.fork, lambda: "hello"))))
    try:
        ours, theirs = ends.pair()
        watcher.add(ours.fileno(), "x")
        theirs.close()
        assert heard.get(timeout=PATIENCE) == ("x", ("hello", 0))
    finally:
        watcher.close()
