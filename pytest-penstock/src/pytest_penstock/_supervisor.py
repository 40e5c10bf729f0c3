"""The process that owns one PostgreSQL server of `pytest_penstock.postgres` and outlives whoever asked for it.

Its one job: nothing is left behind. It makes the server's folder, starts every program that works in
that folder, and ends them all and removes the folder when it is told to, when the launching process
is gone (even by `kill -9`, even with forked children of it alive), or when it gets SIGTERM.

It is run by path as a program (`python -I -S _supervisor.py`), never imported by the launcher.
It must not know: what the programs are for, ports, settings, readiness. It imports the standard library
only, and little of that, because every start of a server pays for it.

The channel is a socket on descriptor 0 with one JSON object a line each way:

    in   {"do": "start", "number": n, "argv": [...], "env": {...}, "log": path, "user": name or null}
    in   {"do": "signal", "number": n, "signal": n}    to every process here, a parent before its children
    out  {"folder": path}                    once, at the beginning
    out  {"started": pid} | {"refused": why} | {"signalled": count}   one answer per request,
                                             with the request's "number"; the folder's is 0
    out  {"ended": pid, "code": n}           at any time

One thread, no lock. Whether the launching process lives is asked of `getppid()`, not of the channel
alone: a forked child of the launching process holds the channel open without ever using it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

PARENT_LOOK_EVERY = 0.2  # seconds; how late a killed parent is noticed
QUIT_GRACE = 3.0  # seconds a server gets to end by itself before it is killed
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
IPC_RMID = 0  # sys/ipc.h, on Linux and macOS


class Supervisor:
    """All processes of one server, and their folder."""

    def __init__(self, channel: socket.socket, parent: int) -> None:
        self._channel = channel
        self._parent = parent
        self._folder = ""
        self._unread = b""
        self._told_to_end = False
        self._children: set[int] = set()

    def run(self) -> None:
        """Serve until the end, then clean up, whatever the end was."""
        wakeup = self._catch_signals()
        adopt_orphans()
        # The launcher knows no name until it is told one, so it cannot leave a folder behind.
        self._folder = tempfile.mkdtemp(prefix="penstock-", dir=short_temporary_folder())
        try:
            self._say({"folder": self._folder, "number": 0})
            poll = select.poll()
            poll.register(self._channel, select.POLLIN)
            poll.register(wakeup, select.POLLIN)
            while not self._told_to_end and os.getppid() == self._parent:
                for descriptor, _ in poll.poll(PARENT_LOOK_EVERY * 1000):
                    if descriptor == wakeup.fileno():
                        wakeup.recv(4096)
                    else:
                        self._read()
                self._reap()
        finally:
            self._end_all()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _catch_signals(self) -> socket.socket:
        """Wake up for the end of a child; end in order at SIGTERM; ignore the terminal.

        Handlers that do nothing, rather than SIG_IGN: programs started from here must not inherit that.
        """
        wakeup, written = socket.socketpair()
        written.setblocking(False)
        self._written = written  # kept: the interpreter holds its descriptor only
        signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        return wakeup

    def _on_sigterm(self, *_: object) -> None:
        self._told_to_end = True

    def _say(self, message: dict[str, Any]) -> None:
        # A parent that is gone is noticed by the loop; it needs no answer.
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        try:
            data = self._channel.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._told_to_end = True
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if request["do"] == "start":
                answer = self._start(request)
            else:
                answer = {"signalled": signal_descendants(request["signal"])}
            self._say({**answer, "number": request["number"]})

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            with open(request["log"], "ab") as log:  # noqa: PTH123  (pathlib costs start-up time)
                child = subprocess.Popen(  # noqa: S603  (absolute paths from the launcher)
                    request["argv"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._folder,
                    env=request["env"],
                    process_group=0,
                    umask=0o077,
                    **as_user(request["user"]),
                )
        except (OSError, subprocess.SubprocessError, LookupError) as why:
            return {"refused": f"{request['argv'][0]}: {why}"}
        self._children.add(child.pid)
        child.returncode = 0  # reaped below, with the orphans; the object's own wait would race
        return {"started": child.pid}

    def _reap(self) -> None:
        """Collect every ended child, adopted ones too, so that no zombie looks alive."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._children:
                self._children.discard(pid)
                self._say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})

    def _end_all(self) -> None:
        """End every process: a server by its own rules first (it frees semaphores), then by force."""
        for pid in list(self._children):
            send(pid, signal.SIGQUIT)
        signal_descendants(signal.SIGCONT)
        self._wait_for_none(QUIT_GRACE)
        signal_descendants(signal.SIGKILL)
        self._wait_for_none(QUIT_GRACE)
        remove_shared_memory(os.path.join(self._folder, "data", "postmaster.pid"))  # noqa: PTH118

    def _wait_for_none(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._reap()
        while descendants() and time.monotonic() < deadline:
            time.sleep(0.01)
            self._reap()


def short_temporary_folder() -> str:
    """Where socket paths stay below the limit of sun_path: 107 bytes on Linux, 103 on macOS."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= 60 else "/tmp"  # noqa: S108  (mkdtemp makes it private)


def as_user(name: str | None) -> dict[str, Any]:
    """Arguments for Popen that make a root process start a program as another user."""
    if name is None:
        return {}
    import pwd  # noqa: PLC0415  (rare; every start would pay)

    entry = pwd.getpwnam(name)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def adopt_orphans() -> None:
    """On Linux, become the parent of backends whose postmaster was killed: they are found and reaped."""
    if sys.platform == "linux":
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes  # noqa: PLC0415

            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def remove_shared_memory(pid_file: str) -> None:
    """Free the System V segment that a killed server leaves; line 7 of its pid file names it."""
    try:
        with open(pid_file, encoding="utf-8") as file:  # noqa: PTH123
            segment = int(file.read().splitlines()[6].split()[1])
        import ctypes  # noqa: PLC0415

        ctypes.CDLL(None).shmctl(segment, IPC_RMID, None)
    except (OSError, ValueError, IndexError, ImportError, AttributeError):
        return  # the server ended properly, or never came so far


def send(pid: int, number: int) -> bool:
    """Signal one process, which may be gone."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def signal_descendants(number: int) -> int:
    """Signal every process below this one and say how many; again until no new one appears.

    Parents come first: a stopped or killed postmaster starts no more backends behind our back.
    """
    signalled: set[int] = set()
    while fresh := [pid for pid in descendants() if pid not in signalled]:
        for pid in fresh:
            send(pid, number)
        signalled.update(fresh)
    return len(signalled)


def descendants() -> list[int]:
    """The living processes below this one, parents before children."""
    children: dict[int, list[int]] = {}
    for pid, parent in living():
        children.setdefault(parent, []).append(pid)
    found = list(children.get(os.getpid(), []))
    for pid in found:  # grows while it is walked: breadth first
        found.extend(children.get(pid, []))
    return found


def living() -> list[tuple[int, int]]:
    """(pid, parent) of every process that has not ended; zombies have."""
    if not os.path.isdir("/proc/self"):  # noqa: PTH112
        return living_by_ps()
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                # The program's name is in parentheses and may hold any byte, so cut after the last.
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if state not in (b"Z", b"X"):
                    found.append((int(name), int(parent)))
    return found


def living_by_ps() -> list[tuple[int, int]]:
    """The same where there is no /proc (macOS); `ps` itself is a descendant, and gone by then."""
    listing = subprocess.run(
        ["/bin/ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=False
    )
    rows = [line.split() for line in listing.stdout.splitlines()]
    known = [(int(row[0]), int(row[1])) for row in rows if len(row) >= 3 and "Z" not in row[2]]
    return [(pid, parent) for pid, parent in known if send(pid, 0)]


if __name__ == "__main__":
    Supervisor(socket.socket(fileno=0), int(sys.argv[1])).run()
