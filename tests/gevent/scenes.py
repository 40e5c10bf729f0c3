"""The scenes: each is given a `Bench` and a pool with the options that it names, and asserts.

gevent is imported inside: in most runs it must not be there before everything else is.
"""

import gc
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from penstock import MisuseError, PoolTimeout, ServerUnavailable
from tests.gevent.bench import PATIENCE


def with_options(**options):
    def mark(scene):
        scene.options = options
        return scene

    return mark


# -- everywhere ------------------------------------------------------------------------------------


@with_options(max_size=20)
def statements_of_many_greenlets_run_at_the_same_time(bench, pool):
    """All wait for one lock, which the observer holds until it has seen them all wait."""
    import gevent

    def wait_for_it():
        with pool.connection() as conn:
            bench.ask(conn, "select pg_advisory_lock_shared(4711)")
            bench.ask(conn, "select pg_advisory_unlock_shared(4711)")
            return True

    with bench.observer() as ask:
        ask("select pg_advisory_lock(4711)")
        greenlets = [gevent.spawn(wait_for_it) for _ in range(20)]
        waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
        bench.until(lambda: ask(waiting) == 20, lambda: pool)
        ask("select pg_advisory_unlock(4711)")
        gevent.joinall(greenlets)
    assert all(greenlet.value for greenlet in greenlets)
    assert pool.stats().in_use == 0


@with_options(max_size=1)
def a_statement_lets_other_greenlets_run(bench, pool):
    import gevent

    ticks: list[int] = []
    ticking = gevent.get_hub().loop.timer(0.01, 0.01)
    ticking.start(ticks.append, 1)
    with pool.connection() as conn:
        bench.ask(conn, "select pg_sleep(0.3)")
    ticking.stop()
    ticking.close()
    assert len(ticks) > 2
    assert pool.stats().opened == 1


@with_options(max_size=1)
def a_statement_cut_off_by_a_timeout_is_not_the_next_borrowers(bench, pool):
    import gevent

    with suppress(gevent.Timeout), pool.connection() as conn:
        first = bench.pid(conn)
        gevent.Timeout.start_new(0.05)
        bench.ask(conn, "select pg_sleep(30), 'late'")
    with pool.connection() as conn:
        assert bench.ask(conn, "select 'early'")[0] == "early"
        assert bench.pid(conn) != first
    bench.assert_whole(pool, 1)


@with_options(max_size=1)
def a_waiter_that_is_killed_takes_nothing_with_it(bench, pool):
    import gevent

    def borrow():
        with pool.connection():
            raise AssertionError("it was killed before")

    with pool.connection():
        killed, timed_out = gevent.spawn(borrow), gevent.spawn(borrow)
        bench.until(lambda: pool.stats().waiting == 2, lambda: pool)
        killed.kill()
        timed_out.kill(gevent.Timeout())
        assert isinstance(timed_out.exception, gevent.Timeout)
        assert pool.stats().waiting == 0
    bench.assert_whole(pool, 1)
    assert pool.stats().opened == 1


@with_options(max_size=2)
def the_end_of_an_idle_session_is_noticed_in_the_hub(bench, pool):
    with pool.connection() as conn:
        pid = bench.pid(conn)
    with bench.observer() as ask:
        ask("select pg_terminate_backend(%s)", pid)
    bench.until(lambda: pool.stats().closed.get("hung up"), pool.stats)
    with pool.connection() as conn:
        assert bench.pid(conn) != pid
    names = {each.name for each in threading.enumerate()}
    assert not names & {"penstock-watch", "penstock-keeper"}, "it is the hub that waits"


@with_options(max_size=1)
def a_greenlet_that_waits_for_itself_is_told_and_no_other(bench, pool):
    import gevent

    with pool.connection():
        pass  # from here on an idle one is found

    def borrow_twice():
        with pool.connection() as conn:
            try:
                with pool.connection():
                    raise AssertionError(f"there is only one: {conn}")
            except MisuseError:
                return "told"

    assert gevent.spawn(borrow_twice).get() == "told"
    with pool.connection():
        other = gevent.spawn(lambda: pool.connection(timeout=0.02).__enter__())
        other.join()
    assert isinstance(other.exception, PoolTimeout), other.exception


@with_options(max_size=1)
def a_report_names_the_greenlet_and_its_place(bench, pool):
    import gevent

    has, may_end = threading.Event(), threading.Event()
    with pool.connection():
        pass  # from here on an idle one is found

    def hold_it_for_long():
        with pool.connection():
            has.set()
            may_end.wait(PATIENCE)

    holder = gevent.spawn(hold_it_for_long)
    holder.name = "the-holder"
    has.wait(PATIENCE)
    try:
        pool.connection(timeout=0.01).__enter__()
    except PoolTimeout as error:
        [held] = error.holders
        assert held.thread == "the-holder"
        assert held.function is not None
        assert held.function.endswith("hold_it_for_long"), held
    else:
        raise AssertionError("it was held")
    may_end.set()
    holder.join()


@with_options(max_size=2, min_size=2)
def an_idle_pool_wakes_nothing(bench, pool):
    import gevent

    pool.open(wait=True)
    loop = gevent.get_hub().loop
    gevent.sleep(0.1)  # what the opening left to do
    before = loop.iteration
    gevent.sleep(0.5)
    # The sleep's own, and a spurious one.
    assert loop.iteration - before <= 2, loop.iteration - before


# -- once ------------------------------------------------------------------------------------------


@with_options(min_size=4, max_size=4)
def ten_thousand_requests_with_random_timeouts_lose_nothing(bench, pool):
    import gevent

    counts = dict.fromkeys(("done", "struck", "wrong"), 0)

    def request(number):
        # One in twenty is patient: where connects take longer than all the others wait, only it is served.
        seconds = PATIENCE if number % 20 == 0 else bench.rng.uniform(0.0005, 0.030)
        timeout = gevent.Timeout.start_new(seconds)
        try:
            with pool.connection() as conn:
                if bench.ask(conn, "select %s::int, pg_sleep(0.001)", number)[0] != number:
                    counts["wrong"] += 1
            counts["done"] += 1
        except gevent.Timeout as struck:
            counts["struck" if struck is timeout else "wrong"] += 1
        finally:
            timeout.close()

    def client(first):
        for number in range(first, 10_000, 50):
            request(number)

    # A timeout, its traceback and the frame that made it are a cycle: none may hold a connection.
    gc.disable()
    clients = [gevent.spawn(client, first) for first in range(50)]
    gevent.joinall(clients, raise_error=True)
    bench.until(lambda: pool.stats().idle == 4, lambda: pool)
    gc.enable()
    assert counts["wrong"] == 0
    assert counts["done"] + counts["struck"] == 10_000
    assert counts["done"] > 0
    assert counts["struck"] > 0
    bench.assert_whole(pool, 4)
    with bench.observer() as ask:
        # A server process whose client has gone is there until it notices.
        sessions = "select count(*) from pg_stat_activity where application_name like %s"
        bench.until(lambda: ask(sessions, f"%/{pool.name}/%") == 4, "four sessions")


@with_options(min_size=3, max_size=3)
def greenlets_killed_at_any_moment_lose_nothing(bench, pool):
    import gevent

    def work():
        while True:
            with pool.connection() as conn:
                bench.ask(conn, "select 1")

    for _ in range(100):
        victims = [gevent.spawn(work) for _ in range(6)]
        gevent.sleep(bench.rng.uniform(0, 0.006))
        gevent.killall(victims)
    bench.until(lambda: pool.stats().idle == 3, lambda: pool)
    bench.assert_whole(pool, 3)


@with_options(max_size=3)
def a_lease_that_is_dropped_comes_home_from_anywhere(bench, pool):
    import gevent

    hub = gevent.get_hub()

    def taken():
        lease = pool.connection()
        lease.__enter__()
        return [lease]

    places = [taken() for _ in range(3)]
    places[0].clear()
    hub.loop.run_callback(places[1].clear)
    hub.threadpool.apply(places[2].clear)
    bench.until(lambda: pool.stats().orphaned == 3, pool.stats)
    bench.assert_whole(pool, 3)


@with_options(max_size=4)
def several_hubs_share_a_pool(bench, pool):
    """Native threads, each with a hub of its own, beside the main thread's greenlets."""
    import gevent
    from gevent.threadpool import ThreadPool

    def work(number):
        for turn in range(30):
            with pool.connection() as conn:
                sent = number * 1000 + turn
                assert bench.ask(conn, "select %s::int", sent)[0] == sent
        return True

    def work_in_greenlets(number):
        greenlets = [gevent.spawn(work, number + each) for each in range(2)]
        return gevent.joinall(greenlets, raise_error=True) and True

    threads = ThreadPool(4)
    elsewhere = [threads.spawn(work_in_greenlets, number) for number in range(0, 40, 10)]
    here = [gevent.spawn(work, number) for number in range(100, 140, 10)]
    gevent.joinall(here, raise_error=True)
    assert all(each.get() for each in elsewhere)
    threads.kill()
    bench.until(lambda: pool.stats().in_use == 0, lambda: pool)
    bench.assert_whole(pool, 4)
    assert pool.stats().orphaned == 0


@with_options(max_size=1)
def another_thread_wakes_the_hub_of_this_one(bench, pool):
    """By giving back, and by dropping, what a greenlet here waits for while its hub sleeps."""
    import _queue

    import gevent
    from gevent.monkey import get_original

    def let_go_of(place, way):
        while not pool.stats().waiting:
            get_original("time", "sleep")(0.01)
        get_original("time", "sleep")(0.05)  # its hub sleeps by now
        way(place)
        # The end of this would wake that hub, too: not before it has woken.
        return woken.get(timeout=PATIENCE / 4)

    def give_back(place):
        place.pop().__exit__(None, None, None)

    def drop(place):
        place.clear()

    for way in (give_back, drop):
        woken: _queue.SimpleQueue[bool] = _queue.SimpleQueue()
        place = [pool.connection()]
        gevent.spawn(place[0].__enter__).join()  # another greenlet's: this one may wait for it
        ended = gevent.get_hub().threadpool.spawn(let_go_of, place, way)
        with pool.connection():
            woken.put(True)
        assert ended.get()
    assert pool.stats().orphaned == 1


@with_options(max_size=2)
def the_first_use_may_be_in_a_native_thread(bench, pool):
    import gevent

    def work():
        with pool.connection() as conn:
            return bench.pid(conn)

    # The thread rests after its job, and its hub with it; the pool must not rest.
    assert gevent.get_hub().threadpool.apply(work)
    gevent.joinall([gevent.spawn(work) for _ in range(10)], raise_error=True)
    bench.assert_whole(pool, 2)


@with_options(max_size=4)
def a_forked_child_has_its_own_sessions_and_disturbs_none(bench, pool):
    """At the fork greenlets use, wait for and open connections; they run on in the child, too."""
    import gevent

    stopped: list[bool] = []

    def work():
        while not stopped:
            with pool.connection() as conn:
                bench.ask(conn, "select pg_sleep(0.002)")

    with pool.connection() as conn:
        mine = bench.pid(conn)
        greenlets = [gevent.spawn(work) for _ in range(8)]
        for _ in range(10):
            gevent.sleep(bench.rng.uniform(0, 0.01))
            reader, writer = os.pipe()
            if not (child := os.fork()):
                code = 1
                try:
                    with pool.connection() as other:
                        code = 0 if bench.pid(other) != mine else 2
                    gevent.sleep(0.01)  # the parent's greenlets run here, too
                    pool.close(timeout=1)
                finally:
                    os._exit(code)
            os.close(writer)
            os.close(reader)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert bench.pid(conn) == mine
        stopped.append(True)
        gevent.joinall(greenlets, raise_error=True)
    stats = pool.stats()
    assert not stats.closed, f"a session was ended by a child: {stats}"
    bench.assert_whole(pool, 4)


def a_connect_that_is_under_way_at_a_fork_is_the_parents(bench, _pool):
    """The child's copy of the greenlet lets go of the socket when it is run there."""
    import gevent
    from gevent.monkey import get_original

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        dsn = f"host=127.0.0.1 port={port} user=x password=y sslmode=disable"
        pool = bench.make(conninfo=dsn, min_size=1)
        pool.open()
        server, _ = listening.accept()
        server.recv(1000)
        # AuthenticationCleartextPassword. From here to the child's end this hub must not run: it
        # would read that first.
        server.send(b"R" + (8).to_bytes(4) + (3).to_bytes(4))
        if not (child := os.fork()):
            code = 1
            try:
                listening.close()
                server.close()
                # Sooner than a connect is given up.
                bench.until(lambda: not connected_to(port), "it lets go of the socket", 5.0)
                code = 0
            finally:
                os._exit(code)
        status = get_original("os", "waitpid")(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0
        assert server.recv(1000).startswith(b"p"), "the parent goes on"
        server.close()
        gevent.sleep(0)


def connected_to(port):
    """Whether one of the process's descriptors is a socket whose other end has this port."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as found:
            if found.getpeername()[1] == port:
                return True
    return False


@with_options(max_size=1)
def borrowing_in_the_hub_is_refused_at_once(bench, pool):
    import gevent

    told = []

    def callback():
        try:
            pool.connection().__enter__()
        except MisuseError as error:
            told.append(str(error))

    gevent.get_hub().loop.run_callback(callback)
    bench.until(lambda: told, "an error")
    assert "hub" in told[0]


@with_options(
    max_size=1, timeout=0.2, on_borrow=lambda conn: conn.cursor().execute("select pg_sleep(30)")
)
def a_deadline_of_the_users_code_is_kept(bench, pool):
    began = time.monotonic()
    with suppress(Exception):  # whatever the library raises when its socket is shut down
        pool.connection().__enter__()
        raise SystemExit("it took 30 s")
    assert time.monotonic() - began < PATIENCE
    bench.until(lambda: pool.stats().in_use == 0, lambda: pool)


def a_server_that_says_nothing_stops_no_other_greenlet(bench, _pool):
    import gevent

    ticks = []

    def tick():
        while True:
            ticks.append(1)
            gevent.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        pool = bench.make(
            conninfo=f"host=127.0.0.1 port={port} user=x connect_timeout=2", timeout=0.3
        )
        ticking = gevent.spawn(tick)
        try:
            pool.connection().__enter__()
        except (PoolTimeout, ServerUnavailable):
            pass
        else:
            raise AssertionError("nobody answered")
        if bench.driver == "psycopg2":  # its own connect_timeout is of no effect on gevent
            bench.until(lambda: pool.stats().open_failures, pool.stats)
        ticking.kill()
    assert len(ticks) > 2


def a_connect_of_a_tracers_stops_no_other_greenlet(bench, pool):
    import importlib

    library = importlib.import_module(bench.driver)
    place: Any = library.Connection if bench.driver == "psycopg" else library
    plain, called = vars(place)["connect"], []

    def traced(*args, **options):
        called.append(1)
        return (plain.__func__ if bench.driver == "psycopg" else plain)(*args, **options)

    place.connect = classmethod(traced) if bench.driver == "psycopg" else traced
    try:
        a_server_that_says_nothing_stops_no_other_greenlet(bench, pool)
        assert called
        traced_pool = bench.make(max_size=2)
        with traced_pool.connection() as conn:
            bench.ask(conn, "select 1")
    finally:
        place.connect = plain


def a_slow_name_look_up_stops_no_other_greenlet(bench, _pool):
    import gevent

    began, may_go_on = threading.Event(), threading.Event()
    resolve = socket.getaddrinfo

    def slowly(*args, **kwargs):
        began.set()
        may_go_on.wait(PATIENCE)
        return resolve("127.0.0.1", *args[1:], **kwargs)

    socket.getaddrinfo = slowly
    try:
        pool = bench.make(conninfo=bench.dsn.replace("host=127.0.0.1", "host=slow.invalid"))
        borrower = gevent.spawn(lambda: bench.ask(pool.getconn(), "select 1"))
        assert began.wait(PATIENCE)
        may_go_on.set()
        assert borrower.get() == (1,)
    finally:
        socket.getaddrinfo = resolve


@with_options(max_size=1, autocommit=True)
def two_greenlets_that_share_a_connection_take_turns(bench, pool):
    import gevent

    with pool.connection() as conn:
        asks = [
            gevent.spawn(bench.ask, conn, "select %s::int, pg_sleep(0.01)", n) for n in range(4)
        ]
        gevent.joinall(asks, raise_error=True)
        assert [each.value[0] for each in asks] == [0, 1, 2, 3]


@with_options(max_size=1)
def a_wait_callback_that_is_set_stays(bench, pool):
    from psycopg2 import extensions

    calls = []

    def theirs(conn):
        calls.append(conn)
        while (state := conn.poll()) != extensions.POLL_OK:
            ready = {extensions.POLL_READ: 0, extensions.POLL_WRITE: 1}[state]
            import select

            select.select([conn] if not ready else [], [conn] if ready else [], [])

    extensions.set_wait_callback(theirs)
    with pool.connection() as conn:
        bench.ask(conn, "select 1")
    assert extensions.get_wait_callback() is theirs
    assert calls


@with_options(max_size=2)
def a_destroyed_hub_is_replaced(bench, pool):
    import gevent

    with pool.connection() as conn:
        first = bench.pid(conn)
    gevent.get_hub().destroy(destroy_loop=True)
    bench.assert_whole(pool, 2)
    with bench.observer() as ask:
        ask("select pg_terminate_backend(%s)", first)
    bench.until(lambda: pool.stats().closed.get("hung up"), pool.stats)


a_destroyed_hub_is_replaced.destroys_the_hub = True
