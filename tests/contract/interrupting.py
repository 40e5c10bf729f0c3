"""Interrupting a pool's users, and finding out what that left behind.

One job: the tripwire (`tripwire.c`, built here), and the questions that are asked after an interrupt:
is every slot home, can `max_size` borrow at once and each get another session, is no lock held, has
the pool's next tick a timer? It must not know: which moments are tried.

Locks: none. Waiting is for a condition and bounded; its end is a fault that is told, not a hang.
"""

from __future__ import annotations

import gc
import importlib.util
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import types
from pathlib import Path
from typing import NamedTuple

import penstock
from penstock._pool.sync import executor
from penstock._process import keeper

SOURCES = f"{Path(penstock.__file__).parent}/"

#: Far beyond what anything here takes: whoever waits so long was forgotten.
PATIENCE = 15.0

_TOOL = 4  # a number of sys.monitoring that no tool of Python's own has


class NoTripwire(Exception):
    """The tripwire cannot be built; says what is missing."""


class Tripwire:
    """Pulls SIGINT, or raises KeyboardInterrupt, at the k-th instruction in some files.

    Args:
        folder: where it is built.
        files: beginnings of names of files besides `sources`.
        sources: those of penstock's own files that count.
    """

    def __init__(self, folder: Path, *files: str, sources: tuple[str, ...] = (SOURCES,)):
        self._module = _build(folder)
        self._files = (*sources, *files)
        if hasattr(sys, "monitoring"):
            _monitor(self._module.on_instruction, self._files)

    def run(self, act, k, *, hostile=False, again=0):
        """Run `act` with the wire at instruction k. Gives the interrupt's place, or None; and the count.

        `again`: so many instructions later a second signal comes; -1: one at each instruction from there on.

        The place is where KeyboardInterrupt was raised. Nothing of the exception is kept, as a program
        that goes on after Ctrl-C keeps nothing.
        """
        traceback = None
        try:
            self._module.arm(self._files, k, hostile, again)
            next(_by_itself(act))
            _look_for_signals()
        except KeyboardInterrupt as interrupt:
            traceback = interrupt.__traceback__  # no call here: a second signal may be pending
        except BaseException:
            self._module.disarm()
            raise
        count = None
        while count is None:
            try:  # noqa: SIM105  contextlib.suppress would be a call
                count = self._disarm()
            except KeyboardInterrupt:
                pass
        place = None if traceback is None else _place(traceback)
        del traceback
        return place, count

    def _disarm(self):
        count = self._module.disarm()
        _look_for_signals()
        return count


def _by_itself(act):
    """A generator has its own "exception being handled": a hostile one can leave it set for ever."""
    yield act()


def _look_for_signals():
    """The interpreter looks at the start of every function: whatever is pending is raised here."""


class Place(NamedTuple):
    """Where an exception was raised."""

    file: str
    function: str
    line: int
    instruction: int

    def __str__(self):
        return f"{Path(self.file).name}:{self.line} {self.function}() at {self.instruction}"


def _place(traceback):
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    return Place(code.co_filename, code.co_name, traceback.tb_lineno, traceback.tb_lasti)


def _build(folder: Path):
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    include = sysconfig.get_path("include")
    if shutil.which(compiler[0]) is None:
        raise NoTripwire(f"the C compiler {compiler[0]!r} that this Python was built with")
    if not Path(include, "Python.h").exists():
        raise NoTripwire(f"{include}/Python.h (the system's python3-dev or python3-devel)")
    library = folder / f"tripwire{sysconfig.get_config_var('EXT_SUFFIX')}"
    source = Path(__file__).with_name("tripwire.c")
    flags = [
        "-shared",
        "-fPIC",
        "-O1",
        *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []),
    ]
    subprocess.run([*compiler, *flags, f"-I{include}", source, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("tripwire", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _monitor(on_instruction, files):
    monitoring = sys.monitoring
    if monitoring.get_tool(_TOOL) is None:
        monitoring.use_tool_id(_TOOL, "tripwire")
    monitoring.register_callback(_TOOL, monitoring.events.INSTRUCTION, on_instruction)
    for code in _codes(files):
        monitoring.set_local_events(_TOOL, code, monitoring.events.INSTRUCTION)


def unmonitor(*files: str):
    """Take the tripwire's events out of all code again; it would run slowly for ever."""
    if hasattr(sys, "monitoring"):
        for code in _codes((SOURCES, *files)):
            sys.monitoring.set_local_events(_TOOL, code, 0)
        sys.monitoring.free_tool_id(_TOOL)


def _codes(files):
    found = set()
    queue = [thing.__code__ for thing in gc.get_objects() if isinstance(thing, types.FunctionType)]
    while queue:
        code = queue.pop()
        if code not in found and code.co_filename.startswith(files):
            found.add(code)
            queue += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return found


def end_keeper():
    """Let the next use start a keeper as the first one in a process does."""
    for old in tuple(keeper._keepers):
        old.park(PATIENCE)
    keeper._keepers.clear()


# -- afterwards -----------------------------------------------------------------------------------


def until(condition):
    """Wait until it holds; whether it does."""
    never = threading.Event()
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        never.wait(0.0002)
    return True


def faults_of(pool, sessions=None):
    """What is wrong with a pool that nobody uses now: one sentence each, none when all is well.

    Expects a pool whose min_size is its max_size. `sessions`: those that the server has, if known.
    """
    # First what any program could do: nothing here may help before it has failed.
    faults = _locks_held(pool)
    if faults:
        return faults  # nothing else would ever end
    faults = _cannot_borrow_all(pool) + _not_home(pool)
    if not until(_one_keeper):
        faults.append("there are several keepers")
    size = pool.stats().max_size
    if sessions is not None and not until(lambda: len(sessions) == size):
        faults.append(f"the server has {len(sessions)} sessions, not {size}")
    return faults


def _one_keeper():
    """Whether all keepers but one have ended; one too many ends when it gets something to do."""
    keeper.current().tell(bool)
    names = [thread.name for thread in threading.enumerate() if thread.is_alive()]
    return names.count("penstock-keeper") == 1


def _locks_held(pool):
    """Asked from another thread, since the locks are reentrant."""
    locks = {
        "the pool's": pool._lock,
        "the keeper's": keeper.current()._lock,
        "the watcher's": executor._watcher()._changing,
    }
    free = []

    def ask():
        for name, lock in locks.items():
            if lock.acquire(timeout=PATIENCE):
                lock.release()
                free.append(name)

    _in_thread(ask)
    return [f"{name} lock is held" for name in locks if name not in free]


def _in_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def _not_home(pool):
    def home():
        stats = pool.stats()
        return stats.idle == stats.size == stats.max_size and not stats.waiting

    faults = []
    if not until(home):
        stats = pool.stats()
        faults.append(f"not everything came home: {stats}")
    if not until(lambda: _will_tick(pool)):
        faults.append("the machine counts on a tick that nobody will bring")
    return faults


def _will_tick(pool):
    machine = pool._machine
    armed = machine.armed
    if armed == float("inf"):
        return True
    timer = keeper.current()._timers.get(machine.home)
    return timer is not None and timer <= armed


def _cannot_borrow_all(pool):
    size = pool.stats().max_size
    conns, faults = [], []
    try:
        while len(conns) < size:
            conns.append(pool.getconn(timeout=PATIENCE))
    except penstock.PenstockError as error:
        faults.append(f"only {len(conns)} of {size} can borrow: {type(error).__name__}")
    if len({id(conn) for conn in conns}) < len(conns):
        faults.append("one session was lent twice")
    for conn in {id(conn): conn for conn in conns}.values():
        pool.putconn(conn)
    return faults
