"""Real mounts: the command line in a process of its own, the kernel, and a directory to look at.

A daemon that hangs would hang the test, and no signal ends a system call on its mount. So every mount has a
watchdog that kills the daemon after `PATIENCE`, upon which such calls fail with ENOTCONN.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

from imapfs import mountinfo
from imapfs.daemon import control
from imapfs.errors import ImapfsError
from tests.support.requirements import demand_fuse
from tests.support.servers.account import Dependents
from tests.support.servers.tls import CertificateAuthority

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0
"""Seconds after which a mount is taken for hung."""
DEADLINE = 60.0
"""Seconds that anything else may take before it counts as broken."""
_ABORT_AFTER: Final = 10.0
"""Seconds after SIGKILL before the connection of a daemon that has not ended is aborted."""

_LOGGED = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) ")


class Server(Protocol):
    """What a mount must know of a server; `tests.support.servers.dovecot.Dovecot` is one."""

    host: str
    port: int
    authority: CertificateAuthority
    dependents: Dependents


class MailAccount(Protocol):
    """What a mount must know of an account; `tests.support.servers.dovecot.Account` is one."""

    @property
    def server(self) -> Server: ...

    @property
    def name(self) -> str: ...

    @property
    def password(self) -> str: ...


class MountFailed(Exception):
    """``imapfs mount`` did not exit with 0: ``code`` is its exit code, ``stderr`` what it said."""

    def __init__(self, code: int, stderr: str) -> None:
        super().__init__(f"exit code {code}: {stderr}")
        self.code = code
        self.stderr = stderr


class Mount:
    """``imapfs mount`` of an account while the ``with`` block lasts, in the background as a person has it.

    It ends before its server does, so that its log has no word of that end.

    ``directory`` is for everything that belongs to the mount; ``arguments`` are further ones of the command
    line. ``mailbox`` mounts that subtree only. ``cache`` is another mount's `cache`, to go on with what it
    cached; else it begins empty. ``source`` is what to mount in place of the account's URL, which has a
    password file and a CA file with it; ``environment`` is for the command. Each of ``expected_log``, regular
    expressions, allows and demands a warning or an error in the log; any other there fails the test when the
    block ends.

    Raises MountFailed where there is no mount; its log is not looked at then. Raises Missing where this
    machine cannot mount.
    """

    patience = PATIENCE

    def __init__(
        self,
        account: MailAccount,
        directory: Path,
        *arguments: str,
        mailbox: str | None = None,
        cache: Path | None = None,
        source: str | None = None,
        environment: Mapping[str, str] | None = None,
        expected_log: Sequence[str] = (),
    ) -> None:
        self.path = directory / "mnt"
        self.cache = cache or directory / "cache"
        """The value of --cache-dir."""
        self.log = directory / "log"
        self.path.mkdir(parents=True)
        self._server = server = account.server
        usual: list[str] = []
        if source is None:
            password_file = directory / "password"
            password_file.touch(mode=0o600)
            password_file.write_text(account.password)
            source = f"imaps://{account.name}@{server.host}:{server.port}"
            source += f"/{mailbox}" if mailbox else ""
            usual = ["--ca-file", str(server.authority.certificate), "--password-file", str(password_file)]
        self.command = [
            sys.executable, "-m", "imapfs", "mount", source, str(self.path), *usual,
            "--cache-dir", str(self.cache), "--log-file", str(self.log), *arguments,
        ]  # fmt: skip
        """What the ``with`` block runs; a test of the foreground mode may run it by itself."""
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HOME": str(directory),
            "XDG_CONFIG_HOME": str(directory / "config"),
            **(environment or {}),
        }
        self.pid = 0
        """The daemon's process id."""
        self._expected = list(expected_log)
        self._pidfd = -1
        self._hung = False
        self._is_over = False
        self._watchdog = threading.Timer(self.patience, self._end_hung)
        self._watchdog.daemon = True

    def __enter__(self) -> "Mount":
        demand_fuse()
        try:
            done = subprocess.run(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            if done.returncode != 0:
                raise MountFailed(done.returncode, done.stderr)
            self.pid = self.status()["pid"]
            self._pidfd = os.pidfd_open(self.pid)
            self._watchdog.start()
            self._server.dependents.add(self)
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._server.dependents.remove(self)
        try:
            if kind is None and mountinfo.mount_at(self.path) is not None and not self._has_ended(0):
                self.unmount()
        finally:
            self._clean_up()
        assert not self._hung, f"hung for {self.patience:.0f} s\n{self.log_text()}"
        if kind is None:
            self._check_log()

    def log_text(self) -> str:
        """Return what was logged so far."""
        return self.log.read_text() if self.log.exists() else ""

    def expect_log(self, pattern: str) -> None:
        """Add to the ``expected_log`` of the constructor."""
        self._expected.append(pattern)

    def status(self) -> dict[str, Any]:
        """Return what ``imapfs status --json`` shows."""
        return control.read_status(self.path, DEADLINE)

    def unmount(self) -> None:
        """Unmount as ``imapfs umount`` does; the daemon has ended, and its log is complete, afterwards."""
        try:
            control.unmount(self.path)
        except ImapfsError as error:
            error.add_note(f"{self._threads()}\n{self.log_text()[-3000:]}")
            raise

    def _threads(self) -> str:
        """Return the state of each thread of the daemon, and where it is in the kernel."""
        found = []
        for thread in Path(f"/proc/{self.pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
                found.append(f"thread {thread.name}: {state} {(thread / 'wchan').read_text()}")
        return "\n".join(found)

    def wait_ended(self) -> None:
        """Wait until the daemon has ended, after something else has unmounted."""
        assert self._has_ended(DEADLINE), "the daemon has not ended"

    def kill(self) -> None:
        """SIGKILL the daemon and take away the mount that it leaves behind."""
        os.kill(self.pid, signal.SIGKILL)
        if not self._has_ended(_ABORT_AFTER):
            # A thread of the daemon tells the kernel of a change in a directory that a program has locked.
            # That program waits for the daemon. Both wait until the connection is aborted, by root.
            subprocess.run(["umount", "-f", self.path], check=False, capture_output=True)
        assert self._has_ended(DEADLINE), "the daemon was killed and has not ended"
        self._watchdog.cancel()
        self._detach()

    def _check_log(self) -> None:
        lines = [line for line in self.log_text().splitlines() if _LOGGED.match(line)]
        stray = [line for line in lines if not any(re.search(wanted, line) for wanted in self._expected)]
        unmet = [wanted for wanted in self._expected if not any(re.search(wanted, line) for line in lines)]
        complaints = [f"logged unexpectedly: {line}" for line in stray]
        complaints += [f"never logged: {wanted}" for wanted in unmet]
        assert not complaints, "\n".join(complaints)

    def _has_ended(self, patience: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(patience * 1000))

    def _end_hung(self) -> None:
        # A daemon that was killed has ended, and another process may have its number.
        if not self._has_ended(0):
            self._hung = True
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _detach(self) -> None:
        while mountinfo.mount_at(self.path) is not None:
            subprocess.run(["fusermount3", "-uz", self.path], check=True, capture_output=True)

    def _clean_up(self) -> None:
        self._watchdog.cancel()
        try:
            self._detach()
            if self._pidfd >= 0 and not self._has_ended(DEADLINE):
                os.kill(self.pid, signal.SIGKILL)
                self._has_ended(DEADLINE)
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1


class RobustMount(Mount):
    """A mount whose log may say what it likes about connections, but not that something is broken.

    Nothing is broken where the disk is full, or where after fusermount3 -u there is no kernel any more that
    wants to know how a request ended.
    """

    harmless = ("is the disk full?", "No space left", "fuse_reply_")

    def _check_log(self) -> None:
        lines = self.log_text().splitlines()
        errors = [line for line in lines if " ERROR " in line or line.startswith("Traceback")]
        broken = [line for line in errors if not any(word in line for word in self.harmless)]
        assert not broken, "\n".join(lines)


class Mounter:
    """Makes the mounts of one test, each in a directory of its own below ``directory``; see `Mount`."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._made = 0

    def __call__(
        self,
        account: MailAccount,
        *arguments: str,
        mailbox: str | None = None,
        cache: Path | None = None,
        source: str | None = None,
        environment: Mapping[str, str] | None = None,
        expected_log: Sequence[str] = (),
    ) -> Mount:
        """Mount; unmounted at the end of the test, if not before. Raises MountFailed."""
        made = self.prepare(
            account,
            *arguments,
            mailbox=mailbox,
            cache=cache,
            source=source,
            environment=environment,
            expected_log=expected_log,
        )
        return self._stack.enter_context(made)

    def prepare(
        self,
        account: MailAccount,
        *arguments: str,
        mailbox: str | None = None,
        cache: Path | None = None,
        source: str | None = None,
        environment: Mapping[str, str] | None = None,
        expected_log: Sequence[str] = (),
    ) -> Mount:
        """Return a mount that has not begun."""
        self._made += 1
        return Mount(
            account,
            self._directory / f"mount-{self._made}",
            *arguments,
            mailbox=mailbox,
            cache=cache,
            source=source,
            environment=environment,
            expected_log=expected_log,
        )


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for ``condition`` to be true; fails after `DEADLINE` saying ``what`` never was."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def wait_for_another_second() -> None:
    """Wait for servers that tell two things apart by the second.

    Of two changes within one, Dovecot may tell one only, or list for good what is not there. Courier names
    the second of an EXAMINE as UIDVALIDITY.
    """
    over = time.monotonic() + 1.2
    wait_until(lambda: time.monotonic() > over, "another second")


@contextlib.contextmanager
def mounter(directory: Path) -> Iterator[Mounter]:
    """Unmount all that was mounted when the block ends, the last first."""
    with contextlib.ExitStack() as stack:
        yield Mounter(directory, stack)
