"""Servers that are programs of their own: user, free ports, programs, and a process group that is run."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.servers.account import DEADLINE, Identity


def server_user() -> pwd.struct_passwd:
    """Return the user that a server runs as: who runs the tests, and ``nobody`` if that is root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


def copy_programs(programs: Iterable[Path], unpacked: Path, to: Path) -> None:
    """Copy programs into the directory ``to``, with all libraries of the packages that are ``unpacked``."""
    for source in (*programs, *unpacked.rglob("lib*.so*")):
        copy = to / source.name
        shutil.copyfile(source, copy)
        copy.chmod(0o755)


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody uses at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


class Program:
    """A server that listens on ``port`` of 127.0.0.1; what it says goes into the file ``log``."""

    def __init__(
        self,
        command: Sequence[str | Path],
        port: int,
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.port = port
        self._command = [str(word) for word in command]
        self._log = log
        self._environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8"}
        self._environment |= environment or {}
        self._identity: Identity = identity or {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens. Raises RuntimeError with the end of its log."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                # So that Ctrl-C in the terminal does not reach it, and that stopping reaches all of it.
                start_new_session=True,
                **self._identity,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + DEADLINE
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                said = self._log.read_text(errors="replace").splitlines()[-15:]
                raise RuntimeError("\n".join([f"{self._command[0]} did not start", *said]))
            time.sleep(0.02)

    def stop(self) -> None:
        """End it with all its processes; does nothing where it does not run."""
        if self._process is None:
            return
        for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, DEADLINE)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self._process = None
