"""gunicorn with the bank in it: started, waited for, ended with all its workers.

It must not know the acts or the pools; settings for the service pass through unread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Self

from demo.example import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

# Threads, so that several requests of one worker want a connection at the same time: under the
# sync worker class a process has one request at a time, and any pool is a pool of one. The asgi class
# has no such setting: Connexion brings ten threads of its own.
THREADS = 8
GRACE = 3.0


class ServiceDidNotStartError(Exception):
    """gunicorn ended, or its workers did not come up; the text is the end of its log."""


class GunicornProcess:
    """One gunicorn master and its workers, from entry to exit of the `with` block."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int,
        worker_class: str,
        preload: bool,
        environment: Mapping[str, str],
        inherit: tuple[int, ...] = (),
    ) -> None:
        self._log = folder / "gunicorn.log"
        self._folder = folder
        self._workers = workers
        self._worker_class = worker_class
        self._preload = preload
        self._environment = environment
        self._inherit = inherit
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        # We open the socket and hand it down: no free port is guessed, and none is waited for.
        with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
            self.port = listener.getsockname()[1]
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command(listener.fileno()),
                    cwd=self._folder,
                    env=self._child_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(listener.fileno(), *self._inherit),
                    # A session of its own: Ctrl-C at the terminal reaches the demo only, which
                    # then ends the whole group.
                    start_new_session=True,
                )
        return self

    def _command(self, descriptor: int) -> list[str]:
        return [
            sys.executable,
            "-m",
            "gunicorn",
            f"--bind=fd://{descriptor}",
            f"--workers={self._workers}",
            f"--worker-class={self._worker_class}",
            *([f"--threads={THREADS}"] if self._worker_class == "gthread" else []),
            # Longer than any act: only clients end connections, and the dead.
            "--keep-alive=120",
            "--graceful-timeout=2",
            # It would leave a socket in the user's home.
            "--no-control-socket",
            f"--worker-tmp-dir={self._folder}",
            *(["--preload"] if self._preload else []),
            "demo.bank_service:create_app()",
        ]

    def _child_environment(self) -> dict[str, str]:
        # What the user has set for gunicorn elsewhere is not meant for this one.
        ours = {"GUNICORN_CMD_ARGS", "WEB_CONCURRENCY"}
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return kept | {"PYTHONPATH": path} | dict(self._environment)

    def wait_until(self, ready: Callable[[], bool], pause: Callable[[float], None]) -> None:
        """Wait until `ready()`, for a minute at most; `pause` waits, and may raise to give up."""
        for _ in range(1200):  # a busy machine imports Connexion four times slowly
            if ready():
                return
            if not self.runs:
                break
            pause(0.05)
        raise ServiceDidNotStartError(self.last_words())

    @property
    def runs(self) -> bool:
        """Whether the master lives."""
        return self._process is not None and self._process.poll() is None

    def last_words(self) -> str:
        """The end of gunicorn's log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is None:
            return
        try:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        finally:
            self._kill_group(self._process)

    def _kill_group(self, process: subprocess.Popen[bytes]) -> None:
        # The group's number is the master's pid; the group lives on while any worker does.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
