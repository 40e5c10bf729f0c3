"""Forks of processes with open, busy pools: nothing shared, nobody disturbed, on a real PostgreSQL."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from tests.forks import PATIENCE, Bell, Child, quiet_libc_fork, until

from penstock import ConnectionPool, MisuseError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    # Threads of the test's own are there when it forks; that is the point.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

FORKS = 100
THREADS = 8
HOOKED = pytest.param(os.fork, id="hooks")
UNHOOKED = pytest.param(quiet_libc_fork, id="libc")

_numbers = itertools.count()


def ask(pool):
    """One statement with a nonce; gives the backend's pid, raises on somebody else's answer."""
    nonce = f"{os.getpid()}-{threading.get_ident()}-{next(_numbers)}"
    with pool.connection() as conn:
        said, backend = conn.execute("select %s::text, pg_backend_pid()", [nonce]).fetchone()
    assert said == nonce, f"asked {nonce}, got {said}"
    return backend


def ask_in_one(pool):
    nonce = f"{os.getpid()}-{threading.get_ident()}-{next(_numbers)}"
    said, backend = pool.execute("select %s::text, pg_backend_pid()", [nonce]).fetchone()
    assert said == nonce, f"asked {nonce}, got {said}"
    return backend


def sessions(server, pool):
    """The backend pids of this pool, of any process."""
    rows = server.execute(
        f"select pid from pg_stat_activity where application_name like '%/{pool.name}/%'"
    )
    return {int(pid) for (pid,) in rows}


def ask_and_fork(pool, fork=os.fork):
    """In a child: use the pool, and have a grandchild use it."""
    mine = [ask(pool), ask_in_one(pool)]
    grandchild = Child(lambda: [ask(pool), ask_in_one(pool)], fork=fork)
    mine.append(ask(pool))
    return {"child": sorted(set(mine)), "grandchild": sorted(set(grandchild.answer(PATIENCE / 2)))}


class Hammer:
    """Threads that use a pool without a pause, and count what goes wrong."""

    def __init__(self, pool, threads=THREADS):
        self.pool = pool
        self.asked = 0
        self.backends = set()
        self.errors = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self):
        for call in itertools.cycle([ask, ask_in_one]):
            if self._stop.is_set():
                return
            try:
                self.backends.add(call(self.pool))
                self.asked += 1
            except BaseException as error:
                self.errors.append(error)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads), "a borrower hangs"


@pytest.mark.parametrize("over", ["unix", "tls"])
def test_a_hundred_forks_under_load_disturb_nobody(over, request):
    server = request.getfixturevalue("tls_server" if over == "tls" else "server")
    with ConnectionPool(
        server.conninfo(over=over), min_size=0, max_size=6, timeout=PATIENCE, name=f"forks-{over}"
    ) as pool:
        inherited: set[int] = set()
        with Hammer(pool) as hammer:
            until(lambda: len(hammer.backends) == 6, "six sessions in use")
            before = sessions(server, pool)
            children = []
            for _ in range(FORKS):
                children.append(Child(functools.partial(ask_and_fork, pool)))
                if len(children) >= 4:
                    inherited.update(*children.pop(0).answer().values())
            for child in children:
                inherited.update(*child.answer().values())
            served = hammer.asked
            until(lambda: hammer.asked > served + 100, "the parent goes on")
        print(f"{hammer.asked} statements in the parent, {len(inherited)} sessions of children")
        assert hammer.errors == []
        assert hammer.backends == before
        assert inherited.isdisjoint(before)
        assert len(inherited) == 2 * FORKS
        until(lambda: sessions(server, pool) == before, "the children's sessions are gone")
        stats = pool.stats()
        assert (stats.opened, stats.closed, stats.orphaned) == (6, {}, 0)


@pytest.mark.parametrize("over", ["unix", "tls"])
def test_forks_without_hooks_are_noticed_at_the_next_borrow(over, request):
    server = request.getfixturevalue("tls_server" if over == "tls" else "server")
    with ConnectionPool(
        server.conninfo(over=over), min_size=3, max_size=3, name=f"libc-{over}"
    ) as pool:
        pool.open(wait=True)
        before = sessions(server, pool)
        theirs: set[int] = set()
        for _ in range(10):
            answer = Child(
                functools.partial(ask_and_fork, pool, quiet_libc_fork), fork=quiet_libc_fork
            ).answer()
            theirs.update(answer["child"], answer["grandchild"])
            assert ask(pool) in before
        assert theirs.isdisjoint(before)
        until(
            lambda: sessions(server, pool) == before, "the parent's sessions as before, no others"
        )
        assert pool.stats().closed == {}


@pytest.mark.parametrize("fork", [HOOKED, UNHOOKED])
@pytest.mark.parametrize("what", ["close", "drain", "resize", "stats", "repr", "drop"])
def test_what_a_child_does_to_its_pool_is_nothing_to_the_parent(what, fork, server):
    """Also as the very first thing that the child does with it."""
    pool = ConnectionPool(
        server.conninfo(over="unix"), min_size=2, max_size=2, name=f"child-{what}"
    )
    holder = [pool]
    acts = {
        "close": pool.close,
        "drain": pool.drain,
        "resize": lambda: pool.resize(1, 1),
        "stats": lambda: [pool.stats().size, pool.health().why],
        "repr": lambda: repr(pool),
        "drop": holder.clear,
    }
    with pool:
        pool.open(wait=True)
        before = sessions(server, pool)

        def act():
            found = acts[what]()
            if what in {"drain", "resize", "stats", "repr"}:
                assert ask(pool) not in before
            return found if what in {"stats", "repr"} else None

        found = Child(act, fork=fork).answer()
        assert {ask(pool) for _ in range(4)} <= before
        until(lambda: sessions(server, pool) == before, "the parent's sessions as before")
        if what == "stats":
            assert found[0] == 0
        if what == "repr":
            assert "0 idle" in found


def test_a_closed_pool_in_a_child_stays_open_in_the_parent(server):
    with ConnectionPool(server.conninfo(over="unix"), name="closed-in-child") as pool:
        first = ask(pool)

        def close_and_try():
            own = ask(pool)
            pool.close()
            with pytest.raises(psycopg.OperationalError, match="was closed"):
                ask(pool)
            return own

        assert Child(close_and_try).answer() != first
        assert ask(pool) == first


def test_an_inherited_lease_raises_in_the_child_and_goes_on_in_the_parent(server):
    with ConnectionPool(server.conninfo(over="unix"), name="lease", max_size=2) as pool:
        with pool.connection() as conn:
            conn.execute("create temp table here (n int)")
            conn.execute("insert into here values (1)")

            def use_it():
                with pytest.raises(psycopg.InterfaceError, match="opened before the fork"):
                    conn.execute("insert into here values (2)")
                with pytest.raises(psycopg.InterfaceError):
                    conn.rollback()
                conn.close()
                return ask(pool)

            backend = conn.info.backend_pid
            assert Child(use_it).answer() != backend
            conn.execute("insert into here values (3)")
        with pool.connection() as conn:
            assert conn.info.backend_pid == backend
            assert conn.execute("select n from here order by n").fetchall() == [(1,), (3,)]


BORROWS: dict[str, Callable[[ConnectionPool], Any]] = {
    "connection": lambda pool: pool.connection(),
    "careful": lambda pool: pool.connection(autocommit=False),
    "dedicated": lambda pool: pool.dedicated(),
}


@pytest.mark.parametrize("fork", [HOOKED, UNHOOKED])
@pytest.mark.parametrize("way", [*BORROWS, "getconn"])
@pytest.mark.parametrize("error", [None, KeyError()], ids=["end", "error"])
def test_leaving_an_inherited_block_in_the_child_ends_nothing_of_the_parents(
    error, way, fork, server
):
    """The child returns from within the parent's `with`: gunicorn's preload does such things."""
    with ConnectionPool(server.conninfo(over="unix"), name=f"leave-{way}", max_size=2) as pool:
        ask(pool)
        with contextlib.ExitStack() as parents:
            if way == "getconn":
                conn = pool.getconn()
                block: Any = contextlib.ExitStack()
                block.callback(pool.putconn, conn)
                parents.enter_context(block)
            else:
                block = BORROWS[way](pool)
                conn = parents.enter_context(block)
            backend = conn.info.backend_pid
            conn.execute("create temp table here (n int) on commit preserve rows")

            def leave():
                with contextlib.suppress(psycopg.Error, KeyError):
                    block.__exit__(error and KeyError, error, None)
                return ask(pool)

            assert Child(leave, fork=fork).answer() != backend
            conn.execute("insert into here values (1)")
            conn.rollback()  # were it committed by the child, the table would be there
            found = conn.execute("select to_regclass('pg_temp.here'), pg_backend_pid()").fetchone()
            assert found == (None, backend)


@pytest.mark.parametrize("fork", [HOOKED, UNHOOKED])
@pytest.mark.parametrize("way", BORROWS)
def test_a_kept_lease_that_was_entered_before_a_fork_may_be_entered_in_the_child(way, fork, server):
    with ConnectionPool(server.conninfo(over="unix"), name=f"kept-{way}", max_size=1) as pool:
        kept = BORROWS[way](pool)
        with kept as conn:
            backend = conn.info.backend_pid

            def enter():
                with kept as own:
                    pid = own.execute("select pg_backend_pid()").fetchone()[0]
                    with pytest.raises(MisuseError), kept:
                        pass
                kept.__exit__(None, None, None)  # the parent's block, which says nothing here
                with pytest.raises(MisuseError):
                    kept.__exit__(None, None, None)
                return pid

            assert Child(enter, fork=fork).answer() != backend
            assert conn.execute("select pg_backend_pid()").fetchone()[0] == backend


def test_a_kept_lease_that_was_waited_for_at_a_fork_may_be_entered_in_the_child(server):
    with ConnectionPool(server.conninfo(over="unix"), name="kept-waiting", max_size=1) as pool:
        kept = pool.connection()
        with pool.connection():
            waiter = threading.Thread(target=functools.partial(ask_by, kept))
            waiter.start()
            until(lambda: pool.stats().waiting == 1)
            assert Child(lambda: ask_by(kept)).answer()
        waiter.join(PATIENCE)
        assert ask_by(kept)


def ask_by(lease):
    with lease as conn:
        return conn.execute("select pg_backend_pid()").fetchone()[0]


def test_a_fork_within_a_dedicated_block_leaves_it_to_the_parent(server):
    with (
        ConnectionPool(server.conninfo(over="unix"), name="listener") as pool,
        pool.dedicated(autocommit=True) as conn,
    ):
        conn.execute("listen news")

        def use_it():
            with pytest.raises(psycopg.InterfaceError):
                conn.execute("select 1")
            return ask(pool)

        Child(use_it).answer()
        pool.execute("select pg_notify('news', 'still there')")
        heard = next(conn.notifies(timeout=PATIENCE))
        assert heard.payload == "still there"


def test_a_child_that_exits_through_the_interpreter_leaves_the_parents_sessions(server):
    with ConnectionPool(server.conninfo(over="unix"), name="exits", min_size=2, max_size=2) as pool:
        pool.open(wait=True)
        before = sessions(server, pool)

        def leave():
            # What Python does at an exit, without pytest's own: atexit, threads, garbage.
            import atexit
            import gc

            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            gc.collect()

        unused = Child(lambda: "nothing", leave=lambda: (leave(), os._exit(0)))
        used = Child(lambda: ask(pool), leave=lambda: (leave(), os._exit(0)))
        unused.answer()
        assert used.answer() not in before
        assert {ask(pool) for _ in range(4)} <= before
        until(lambda: sessions(server, pool) == before, "the parent's sessions as before")


EXITS = """
import os, sys, threading, atexit
from penstock import ConnectionPool
pool = ConnectionPool(sys.argv[1], min_size=2, max_size=2, name="sys-exit")
atexit.register(pool.close)  # runs in the child, too
pool.open(wait=True)
asked = "select %s::text, pg_backend_pid()"
before = {pool.execute(asked, ["x"]).fetchone()[1] for _ in range(4)}
for used in (False, True):
    pid = os.fork()
    if pid == 0:
        if used:
            assert pool.execute(asked, ["child"]).fetchone()[0] == "child"
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    for n in range(4):
        said, backend = pool.execute(asked, [str(n)]).fetchone()
        assert said == str(n) and backend in before, (said, backend, before)
print("fine", pool.stats().closed)
"""


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


def test_a_child_that_ends_by_sys_exit_leaves_the_parents_sessions(server):
    done = run_python(EXITS, server.conninfo(over="unix"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine {}\n", "")


def test_a_child_that_is_killed_leaves_the_parents_sessions(server):
    with ConnectionPool(server.conninfo(over="unix"), name="killed", max_size=2) as pool:
        first = ask(pool)
        before = sessions(server, pool)

        def use_and_hang():
            with pool.connection() as conn:
                conn.execute("select 1")
                in_use.ring()
                time.sleep(PATIENCE)  # until it is killed

        with Bell() as in_use:
            child = Child(use_and_hang)
            in_use.wait()
        assert len(sessions(server, pool)) == 2
        child.kill()
        until(lambda: sessions(server, pool) == before, "the killed child's session is gone")
        assert ask(pool) == first


@pytest.mark.parametrize("fork", [HOOKED, UNHOOKED])
def test_the_sessions_of_a_killed_parent_go_though_its_child_lives(fork, server):
    name = "parent-hooks" if fork is os.fork else "parent-libc"
    in_all = f"select pid from pg_stat_activity where application_name like '%/{name}/%'"

    def parent():
        pool = ConnectionPool(server.conninfo(over="unix"), min_size=2, max_size=3, name=name)
        pool.open(wait=True)
        with pool.connection() as held:  # one is in use at the fork
            held.execute("select 1")

            def child():
                ask(pool)  # without hooks it is the first use that notices
                in_use.ring()
                let_go.wait()

            Child(child, fork=fork)
            time.sleep(PATIENCE)  # until it is killed

    with Bell() as in_use, Bell() as let_go:
        first = Child(parent)
        in_child = f"{in_all} and application_name not like '%/{first.pid}' order by 1"
        try:
            in_use.wait()
            until(lambda: len(server.execute(in_child)) == 2, "the child's min_size")
            theirs = server.execute(in_child)
            assert len(server.execute(in_all)) == 4
            first.kill()
            until(lambda: len(server.execute(in_all)) == 2, "the killed parent's are gone")
            assert server.execute(in_child) == theirs
        finally:
            let_go.ring()
    until(lambda: not server.execute(in_all), "the child is gone, too")


def use_in_process(pool, results):
    """What a process of multiprocessing does with a pool that came by pickle or by fork."""
    results.put([pool.name, pool.stats().state, ask(pool), pool.stats().opened])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_pool_travels_to_a_process_of_multiprocessing(method, server):
    context = multiprocessing.get_context(method)
    with ConnectionPool(server.conninfo(over="unix"), name="travels", max_size=2) as pool:
        first = ask(pool)
        results = context.Queue()
        process = context.Process(target=use_in_process, args=(pool, results))
        process.start()
        name, state, backend, opened = results.get(timeout=PATIENCE)
        process.join(PATIENCE)
        results.close()
        results.join_thread()
        assert process.exitcode == 0
        assert (name, state, opened) == ("travels", "open" if method == "fork" else "new", 1)
        assert backend != first
        assert ask(pool) == first


def test_a_fork_while_another_thread_is_in_a_long_statement(server):
    with ConnectionPool(server.conninfo(over="unix"), name="long", max_size=2) as pool:
        first = ask(pool)
        found = []

        def hold():
            with pool.connection() as conn:
                conn.execute("select pg_advisory_lock_shared(4711)")
                found.append(conn.info.backend_pid)

        with pool.dedicated(autocommit=True) as locker:
            locker.execute("select pg_advisory_lock(4711)")
            thread = threading.Thread(target=hold)
            thread.start()
            until(
                lambda: pool.execute(
                    "select 1 from pg_locks where locktype = 'advisory' and not granted"
                ).fetchone(),
                "the statement waits",
            )
            for _ in range(5):
                assert Child(lambda: ask(pool)).answer() not in sessions(server, pool)
            locker.execute("select pg_advisory_unlock(4711)")
            thread.join(PATIENCE)
        assert found == [first]
