"""What penstock takes for granted of gevent, psycopg and psycopg2 where they meet: each, asked of them."""

from __future__ import annotations

from tests.gevent.conftest import run_child

PATCHED = "from gevent import monkey; monkey.patch_all(); import gevent, gevent.hub, gevent.queue\n"


def holds(code):
    run_child("-c", code, patience=60.0)


def test_psycopg_waits_by_a_name_of_its_module_that_poll_can_take():
    holds("""
from psycopg import waiting, connection
import inspect, threading
assert waiting.wait is waiting.wait_c or not hasattr(waiting, "wait_c")
assert callable(waiting.wait_poll)
assert "waiting.wait(" in inspect.getsource(connection.Connection.wait)
assert connection.Lock is threading.Lock
assert "self.lock = Lock()" in inspect.getsource(connection.Connection.__init__)
""")


def test_psycopg_chooses_poll_where_gevent_has_patched():
    holds(PATCHED + "from psycopg import waiting; assert waiting.wait is waiting.wait_poll")


def test_psycopg2_has_no_wait_callback_and_takes_one():
    holds("""
from psycopg2 import extensions
assert extensions.get_wait_callback() is None
extensions.set_wait_callback(print)
assert extensions.get_wait_callback() is print
""")


def test_native_locks_and_queues_have_names_that_gevent_does_not_patch():
    holds(
        "import _queue, _thread\nbefore = _queue.SimpleQueue, _thread.RLock\n"
        + PATCHED
        + "assert before == (_queue.SimpleQueue, _thread.RLock)"
    )


def test_a_threads_number_is_asked_of_a_name_that_gevent_patches():
    holds(
        "import threading\nbefore = threading.get_ident\n"
        + PATCHED
        + """
assert threading.get_ident is not before
assert threading.get_ident() == id(gevent.getcurrent())
"""
    )


def test_a_queues_put_is_right_when_the_loop_calls_it_for_another_thread():
    holds(
        PATCHED
        + """
hub = gevent.get_hub()
queue = gevent.queue.SimpleQueue()
hub.threadpool.apply(hub.loop.run_callback_threadsafe, (queue.put, "item"))
assert queue.get(timeout=30) == "item"
"""
    )


def test_a_callback_tells_whether_it_has_run():
    holds(
        PATCHED
        + """
callback = gevent.get_hub().loop.run_callback_threadsafe(int)
assert callback.pending
gevent.sleep(0)
assert not callback.pending
"""
    )


def test_the_hub_and_its_loop_have_what_we_ask_of_them():
    holds(
        PATCHED
        + """
import os
hub = gevent.get_hub()
assert hub.main_hub
assert hub.threadpool.apply(lambda: (gevent.get_hub().main_hub, gevent.get_hub() is hub)) == (False, False)
assert hub.loop.ptr and not hub.dead
before = hub.loop.activecnt if hasattr(hub.loop, "activecnt") else None
reader, writer = os.pipe()
heard = []
io = hub.loop.io(reader, 1, ref=False)
io.start(heard.append, 1)
timer = hub.loop.timer(1000, ref=False)
timer.start(int)
hub.join()  # neither keeps it
os.write(writer, b"x")
gevent.sleep(0.05)
assert heard
io.stop(); io.close(); timer.stop(); timer.close()
gevent.hub.set_hub(hub)
assert gevent.get_hub() is hub
hub.destroy(destroy_loop=True)
assert hub.dead or hub.loop is None or not hub.loop.ptr
"""
    )
