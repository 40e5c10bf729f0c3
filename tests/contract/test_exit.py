"""A pool that nobody closed lets the interpreter end at once and in silence, whatever it was doing.

Each program runs in a Python of its own, with every warning shown. How long its end took
is measured from its last line of Python to the end of the process, and printed; the deadline that
fails a test is far beyond it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import penstock

DEADLINE = 20.0  # seconds for a whole program; what is claimed of the end is 1 s, and printed

BEGIN = """
import os, sys, threading, time
from penstock import ConnectionPool
from penstock.testing import FakeDriver, FakeServer, Mode

def until(condition):
    never = threading.Event()
    while not condition():
        never.wait(0.001)

server = FakeServer()
pool = ConnectionPool(driver=FakeDriver(server), min_size=2, max_size=2, timeout=None, max_lifetime=60)
"""

#: Forks have tests of their own.
IGNORE = "-Wignore::DeprecationWarning"

END = """
print(time.time(), flush=True)
"""

PROGRAMS = {
    "idle connections": """
pool.open(wait=True)
""",
    "a lease held": """
lease = pool.connection()
conn = lease.__enter__()
conn.execute("select 1")
""",
    "a connection of getconn() held": """
conn = pool.getconn()
""",
    "a connect in flight to a server that never answers": """
server.mode = Mode.HANGING
pool.open()
until(lambda: server.connects > 0)
""",
    "a callable that does not come back": """
called = threading.Event()
def token():
    called.set()
    threading.Event().wait()
other = ConnectionPool(token, driver=FakeDriver(server))
other.open()
called.wait()
""",
    "waiters in daemon threads": """
leases = [pool.connection() for _ in range(2)]
for lease in leases:
    lease.__enter__()
def wait():
    with pool.connection():
        pass
for _ in range(3):
    threading.Thread(target=wait, daemon=True).start()
until(lambda: pool.stats().waiting == 3)
""",
    "waiters for a server that never answers": """
server.mode = Mode.HANGING
def wait():
    with pool.connection():
        pass
for _ in range(3):
    threading.Thread(target=wait, daemon=True).start()
until(lambda: pool.stats().waiting == 3)
""",
    "a pool that was closed": """
pool.open(wait=True)
pool.close()
""",
    "use after a fork, in the child": """
pool.open(wait=True)
pid = os.fork()
if pid:
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
else:
    lease = pool.connection()
    lease.__enter__().execute("select 1")
    sys.exit(0)
""",
    "a lease in the hands of a thread that runs": """
def use():
    with pool.connection() as conn:
        while True:
            conn.execute("select 1")
threading.Thread(target=use, daemon=True).start()
until(lambda: pool.stats().in_use == 1)
""",
}


def run(program, *options):
    """Run it in a new interpreter; gives what it wrote last and how long it took to end after that."""
    sources = str(Path(penstock.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, *options, "-c", BEGIN + program + END],
        env={"PYTHONPATH": sources, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    took = time.time() - float(done.stdout.split()[-1] if done.stdout else "nan")
    return done, took


@pytest.mark.parametrize("held", PROGRAMS)
def test_an_unclosed_pool_lets_the_interpreter_end_in_silence(held):
    done, took = run(PROGRAMS[held], *([IGNORE] if "fork" in held else []))
    print(f"{sys.version.split()[0]}: {held}: ended after {took * 1e3:.0f} ms")
    assert done.stderr == ""
    assert done.returncode == 0


# The workers that opened the connections have just ended, or are about to.
FORK = """
for _ in range(50):
    pool = ConnectionPool(driver=FakeDriver(FakeServer()), min_size=4, max_size=4)
    pool.open(wait=True)
    pid = os.fork()
    if not pid:
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
    with pool.connection() as conn:
        conn.execute("select 1")
    pool.close()
"""

THREAD_AFTER_FORK = """
over = threading.Event()
thread = threading.Thread(target=over.wait, daemon=True)
os.register_at_fork(after_in_parent=thread.start)
if not os.fork():
    os._exit(0)
over.set()
"""

# Not "error": os.fork() swallows the exception that a warning is turned into.
SHOW = "-Walways::DeprecationWarning"

warns_of_forks = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="CPython warns of forks with several threads from 3.12 on"
)


@warns_of_forks
def test_a_fork_right_after_open_is_no_fork_of_a_process_with_several_threads():
    control, _ = run(THREAD_AFTER_FORK, SHOW)
    if "multi-threaded" in control.stderr:
        pytest.skip("this CPython counts threads that start after a fork (python/cpython#137109)")
    done, _ = run(FORK, SHOW)
    assert done.stderr == ""
    assert done.returncode == 0


@warns_of_forks
def test_a_thread_of_the_programs_own_is_warned_of():
    own = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    done, _ = run(own + FORK, SHOW)
    assert "multi-threaded" in done.stderr
