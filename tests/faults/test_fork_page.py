"""Every kind of fork is noticed, once; no PostgreSQL needed.

Children report through a pipe and leave by os._exit.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING

import pytest

from penstock._process import fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    # Other threads of this test process (an earlier test's, a plugin's) are not ours to park; the
    # test in a process of its own looks at the warning.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def libc_fork() -> int:
    """What uWSGI does without --py-call-osafterfork: no hook of Python's runs."""
    return int(ctypes.PyDLL(None).fork())


def report_from(fork_call: Callable[..., int], work: Callable[[], str]) -> str:
    reader, writer = os.pipe()
    pid = fork_call()
    if pid == 0:
        status = 1
        try:
            os.write(writer, work().encode())
            status = 0
        except BaseException as error:
            os.write(writer, f"raised {error!r}".encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    return said


class FakePool:
    def __init__(self) -> None:
        self.told: list[str] = []

    def before_fork(self) -> None:
        self.told.append("before")

    def after_fork_in_parent(self) -> None:
        self.told.append("parent")

    def after_fork_in_child(self) -> None:
        self.told.append("child")


class RaisingPool(FakePool):
    def before_fork(self) -> None:
        raise RuntimeError("before")

    after_fork_in_parent = after_fork_in_child = before_fork


@pytest.fixture
def pool() -> Iterator[FakePool]:
    made = FakePool()
    fork.register(made)
    yield made
    fork.unregister(made)


@pytest.fixture(params=["wiped page", "getpid"])
def page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> fork.Page:
    if request.param == "getpid":
        monkeypatch.setattr(fork, "page", fork.PidPage())
        fork.page[0] = 1
    return fork.page


@pytest.fixture(params=[os.fork, libc_fork], ids=["os.fork", "libc fork"])
def fork_call(request: pytest.FixtureRequest) -> Callable[[], int]:
    return request.param  # type: ignore[no-any-return]


def borrow() -> None:
    """What every borrower does first."""
    if not fork.page[0]:
        fork.noticed()


@pytest.mark.skipif(sys.platform != "linux", reason="MADV_WIPEONFORK is Linux's")
def test_this_system_has_the_page_and_it_is_armed() -> None:
    assert not isinstance(fork.page, fork.PidPage)
    assert fork.page[0]


def test_a_child_is_told_once_and_the_parent_stays_armed(
    pool: FakePool, page: fork.Page, fork_call: Callable[..., int]
) -> None:
    def child() -> str:
        borrow()
        borrow()
        return f"{pool.told[-1]} {pool.told.count('child')} {bool(fork.page[0])}"

    assert report_from(fork_call, child) == "child 1 True"
    assert fork.page[0]
    assert "child" not in pool.told


def test_the_page_reads_zero_in_a_child_that_no_hook_told_of(
    pool: FakePool, page: fork.Page
) -> None:
    def child() -> str:
        return f"{bool(fork.page[0])} {pool.told}"

    assert report_from(libc_fork, child) == "False []"
    assert pool.told == []


def test_the_parent_hears_before_and_after(pool: FakePool) -> None:
    report_from(os.fork, lambda: "")
    assert pool.told == ["before", "parent"]


def test_grandchildren_of_every_kind_are_told_once_each(pool: FakePool, page: fork.Page) -> None:
    def child(kinds: list[Callable[[], int]]) -> str:
        borrow()
        seen = str(pool.told.count("child"))
        if not kinds:
            return seen
        return seen + report_from(kinds[0], lambda: child(kinds[1:]))

    kinds = [libc_fork, os.fork, libc_fork, libc_fork]
    assert report_from(os.fork, lambda: child(kinds)) == "12345"


def test_several_threads_that_arrive_together_run_it_once_and_all_wait_for_it(
    pool: FakePool, page: fork.Page, fork_call: Callable[..., int]
) -> None:
    def child() -> str:
        together = threading.Barrier(8)
        early = []

        def borrower() -> None:
            together.wait()
            borrow()
            early.append(pool.told.count("child"))

        threads = [threading.Thread(target=borrower) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return f"{set(early)}"

    assert report_from(fork_call, child) == "{1}"


def test_a_handler_that_raises_stops_no_other_and_is_logged(
    pool: FakePool, page: fork.Page, fork_call: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    bad, last = RaisingPool(), FakePool()
    fork.register(bad)
    fork.register(last)
    with caplog.at_level(logging.ERROR, logger="penstock"):
        try:

            def child() -> str:
                caplog.clear()
                borrow()
                # by name: interrupt tests cut other threads' start in two, and those nobody can join
                for thread in threading.enumerate():
                    if thread.name == "penstock-fork-report":
                        thread.join(10)
                said = len(caplog.records) if fork_call is libc_fork else "hook"
                return f"{last.told[-1]} {bool(fork.page[0])} {said}"

            expected = "child True 1" if fork_call is libc_fork else "child True hook"
            assert report_from(fork_call, child) == expected
        finally:
            fork.unregister(bad)
            fork.unregister(last)
    if fork_call is os.fork:
        assert pool.told == ["before", "parent"]
        assert last.told == ["before", "parent"]
        assert [r.name for r in caplog.records] == ["penstock", "penstock"]


def test_an_interrupt_in_the_middle_means_all_again(pool: FakePool, page: fork.Page) -> None:
    calls = []

    def interrupted() -> None:
        calls.append("handler")
        if len(calls) == 1:
            raise KeyboardInterrupt

    fork.on_after_in_child(interrupted)
    try:

        def child() -> str:
            try:
                borrow()
            except KeyboardInterrupt:
                calls.append("interrupted")
            armed = bool(fork.page[0])
            borrow()
            return f"{calls} {armed} {pool.told} {bool(fork.page[0])}"

        assert report_from(libc_fork, child) == (
            "['handler', 'interrupted', 'handler'] False ['child'] True"
        )
    finally:
        fork.forget(interrupted)


def test_a_handler_that_borrows_does_not_wait_for_itself(
    page: fork.Page, fork_call: Callable[..., int]
) -> None:
    calls = []

    def handler() -> None:
        calls.append("handler")
        borrow()

    fork.on_after_in_child(handler)
    try:

        def child() -> str:
            borrow()
            return str(calls)

        assert report_from(fork_call, child) == "['handler']"
    finally:
        fork.forget(handler)


def test_a_fork_while_another_thread_runs_the_childs_side_does_not_hang(page: fork.Page) -> None:
    """A grandchild forked in that very moment finds the lock free, and does it all itself."""
    inside, go_on = threading.Event(), threading.Event()
    calls = []

    def handler() -> None:
        calls.append(os.getpid())
        if len(calls) == 1:
            inside.set()
            go_on.wait(10)

    fork.on_after_in_child(handler)
    try:

        def grandchild() -> str:
            borrow()
            return f"{len(set(calls))} {bool(fork.page[0])}"

        def child() -> str:
            thread = threading.Thread(target=borrow)
            thread.start()
            inside.wait(10)
            # not by libc: with two threads at work only CPython can put the child's GIL right
            said = report_from(os.fork, grandchild)
            go_on.set()
            thread.join(10)
            return f"{said} {len(calls)} {bool(fork.page[0])}"

        assert report_from(libc_fork, child) == "2 True 1 True"
    finally:
        fork.forget(handler)


def test_process_wide_parts_come_before_pools_in_the_child_and_after_them_in_the_parent() -> None:
    order = []

    class Pool(FakePool):
        def before_fork(self) -> None:
            order.append("pool")

        after_fork_in_parent = after_fork_in_child = before_fork

    pool = Pool()

    def park(seconds: float) -> None:
        assert 0 <= seconds <= fork.PARK_SECONDS
        order.append("keeper")

    def resume() -> None:
        order.append("keeper")

    fork.on_before(park)
    fork.on_after_in_parent(resume)
    fork.on_after_in_child(resume)
    fork.on_after_in_child(resume)  # twice is once
    fork.register(pool)
    fork.register(pool)  # twice is once
    try:
        assert report_from(os.fork, lambda: str(order[2:])) == "['keeper', 'pool']"
        assert order == ["keeper", "pool", "pool", "keeper"]
    finally:
        fork.forget(park)
        fork.forget(resume)
        fork.unregister(pool)


def test_a_pool_that_is_gone_leaves_the_registry() -> None:
    before = len(fork._pools)
    pool = FakePool()
    fork.register(pool)
    assert len(fork._pools) == before + 1
    del pool
    assert len(fork._pools) == before


def test_a_pool_made_in_a_child_that_noticed_nothing_is_not_taken_for_inherited(
    page: fork.Page,
) -> None:
    def child() -> str:
        pool = FakePool()
        fork.register(pool)
        borrow()
        return str(pool.told)

    assert report_from(libc_fork, child) == "[]"


def test_without_a_page_from_the_kernel_the_process_number_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refuses:
        PAGESIZE = MAP_PRIVATE = MAP_ANONYMOUS = 1

        def mmap(self, *args: object, **options: object) -> None:
            raise OSError("madvise: Invalid argument")

    monkeypatch.setattr(fork, "mmap", Refuses())
    page = fork._new_page()
    assert isinstance(page, fork.PidPage)
    assert not page[0]
    page[0] = 1
    assert page[0]
    assert report_from(os.fork, lambda: str(int(page[0]))) == "0"


@pytest.mark.skipif(
    sys.version_info >= (3, 13),
    reason="this CPython counts threads that start after a fork (python/cpython#137109)",
)
def test_a_fork_beside_our_threads_causes_no_warning() -> None:
    """3.12 and later warn of a fork with several threads; ours are parked before it."""
    script = """
        import os, socket, warnings
        # not "error": os.fork() swallows the exception that a warning is turned into
        warnings.simplefilter("always")
        from penstock._process import watch
        watcher = watch.Watch(lambda token, fd: None)
        ours, theirs = socket.socketpair()
        watcher.add(ours.fileno(), "x")
        for _ in range(50):
            assert "not running" not in repr(watcher) or not watch.available()
            pid = os.fork()
            if pid == 0:
                os._exit("not running" not in repr(watcher))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        ours.close(), theirs.close()
        print("fine")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("fine\n", "")
