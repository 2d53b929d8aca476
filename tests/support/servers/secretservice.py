"""A private Secret Service: GNOME's keyring on a session bus of its own, both gone when it is closed."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.support.servers.account import DEADLINE


class SecretService:
    """Running, and unlocked, while the ``with`` block lasts.

    ``environment`` leads other processes to it. Raises RuntimeError where it does not start.
    """

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment: dict[str, str] = {}

    def __enter__(self) -> "SecretService":
        # Not TMPDIR: a socket path has at most 107 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="imapfs-keyring-", dir="/tmp"))
        runtime = self._directory / "runtime"
        runtime.mkdir(mode=0o700)
        self.environment = {
            "XDG_RUNTIME_DIR": str(runtime),
            "XDG_DATA_HOME": str(self._directory / "data"),
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
            "PYTHON_KEYRING_BACKEND": "keyring.backends.SecretService.Keyring",
        }
        try:
            self._start("dbus-daemon", "--session", "--nofork", f"--address=unix:path={runtime}/bus")
            self._wait_until(lambda: (runtime / "bus").exists())
            # It makes a new keyring with the password that it is told.
            options = ("--foreground", "--unlock", "--components=secrets")
            self._start("gnome-keyring-daemon", *options, said=b"unlock")
            self._wait_until(lambda: self.keyring("get", "nobody", "nobody").stderr == "")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop()

    def keyring(self, *arguments: str, secret: str = "") -> subprocess.CompletedProcess[str]:
        """Run the command of the keyring library, as a person does."""
        return self._run("-m", "keyring", *arguments, secret=secret)

    def lock(self) -> None:
        """Lock it, as a screen saver does; there is nobody to unlock it."""
        self._run(
            "-c",
            "import contextlib, secretstorage\n"
            "with contextlib.closing(secretstorage.dbus_init()) as bus:\n"
            "    secretstorage.get_default_collection(bus).lock()\n",
        ).check_returncode()

    def _run(self, *arguments: str, secret: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **self.environment},
            input=secret,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )

    def _start(self, *command: str, said: bytes = b"") -> None:
        heard = self._directory / "stdin"
        heard.write_bytes(said)
        with (self._directory / "log").open("ab") as log, heard.open("rb") as stdin:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self.environment, "HOME": str(self._directory)},
                stdin=stdin,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            log = (self._directory / "log").read_text(errors="replace")
            if self._processes[-1].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Secret Service did not start\n{log}")
            time.sleep(0.01)

    def _stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        shutil.rmtree(self._directory)
