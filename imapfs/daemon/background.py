"""The process that serves a mount: the checks before it, the fork into the background, the log, its end.

In the background, the starting process waits on a pipe for exactly one report: the mount is live, or one line
why not. If the pipe ends without a report, the child has died.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final, NoReturn

from imapfs import mountinfo
from imapfs.daemon import control, desktop, systemd
from imapfs.daemon.preflight import check_device, check_fusermount, check_options
from imapfs.errors import AuthenticationFailed, ImapfsError, UsageError
from imapfs.log import one_line
from imapfs.model import CredentialProvider, MountConfig

_MAX_LOG_BYTES = 5 * 2**20
_LOG_BACKUPS = 2
_LIVE = b"+"
_FAILED = b"-"
_REFUSED = b"!"
"""The login was refused."""

_log = logging.getLogger(__name__)

_PR_SET_DUMPABLE: Final = 4
"""Of prctl(2), in linux/prctl.h."""


def run(
    config: MountConfig,
    credentials: CredentialProvider,
    *,
    foreground: bool,
    log_file: Path | None,
    verbosity: int,
) -> None:
    """Serve the mount: in the foreground until it is unmounted; otherwise return once it is live.

    The log goes to ``log_file``; by default to stderr in the foreground, otherwise to the account's file in
    the XDG log directory. ``verbosity`` above 0 logs details, above 1 the protocol. In the foreground, the
    service manager that started the process, if any, is informed of the mount's state. Raises ImapfsError if
    mounting fails, or if a mount in the foreground ends with a failure.

    Must be called while the process has only one thread, since it forks.
    """
    preflight(config, log_file)
    if foreground:
        os.umask(0o077)
        _start_log(log_file, verbosity)
        # A person at a terminal sees an error there; under a service manager nobody does.
        observer = _MountObserver(config, systemd.Manager.take(), person_waits=sys.stderr.isatty())
        _serve(config, credentials, observer, log_file)
        return
    log_file = log_file or default_log_file(config)
    sys.stdout.flush()
    sys.stderr.flush()
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(config, credentials, sender, log_file, verbosity)
    os.close(sender)
    _wait_for_report(child, receiver, log_file)


def default_log_file(config: MountConfig) -> Path:
    """Return a path for each account and mountpoint, because two processes cannot rotate the same file."""
    import platformdirs

    account = config.account
    name = re.sub(r"[^\w.@+-]", "_", f"{account.user}@{account.host}")[:100]
    mountpoint = hashlib.sha256(os.fsencode(config.mountpoint)).hexdigest()[:8]
    return platformdirs.user_log_path("imapfs") / f"{name}-{mountpoint}.log"


# ---- Checks


def preflight(config: MountConfig, log_file: Path | None) -> None:
    """Raise ImapfsError for what cannot work, before a person is asked anything or a process started."""
    _check_mountpoint(config.mountpoint)
    places = (
        ("cache directory", config.cache_dir),
        ("spool directory", config.spool_dir),
        ("log file", log_file),
    )
    for what, path in places:
        # The daemon would wait for itself.
        if path is not None and Path(os.path.realpath(path)).is_relative_to(config.mountpoint):
            raise UsageError(
                f"the {what} {path} is inside the mountpoint: choose another place for one of them"
            )
    ca_file = config.account.ca_file
    if ca_file is not None and not (ca_file.is_file() and os.access(ca_file, os.R_OK)):
        raise UsageError(f"CA file {ca_file}: does not exist or cannot be read: check --ca-file")
    check_device()
    check_fusermount()
    check_options(config.fuse_options)


def _check_mountpoint(path: Path) -> None:
    mount = mountinfo.mount_at(path)
    if mount is not None and mount.fstype == mountinfo.FSTYPE:
        try:
            control.read_status(path)
        except control.DaemonDead:
            control.unmount(path)
            mount = mountinfo.mount_at(path)
        else:
            raise UsageError(
                f"{path} is in use: {mount.source} is mounted there: run 'imapfs umount {path}' first"
            )
    if mount is not None:
        raise UsageError(
            f"{path} is in use: it is the mountpoint of a {mount.fstype} file system: choose another"
        )
    try:
        with os.scandir(path) as entries:
            empty = next(entries, None) is None
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: create it with 'mkdir -p {path}'") from None
    except NotADirectoryError:
        raise UsageError(f"{path} is not a directory: choose an empty directory") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be used as mountpoint: {error.strerror}") from None
    if not empty:
        raise UsageError(
            f"{path} is not empty, and the mount would hide its contents: choose an empty directory"
        )
    if not os.access(path, os.W_OK):
        raise UsageError(
            f"{path} is not writable by you, which mounting requires: choose a directory of your own"
        )


# ---- Serving


class _MountObserver:
    """Passes on the mount's state: to the starting process, the service manager and the person's desktop.

    ``on_live`` is called when the mount is live. Until then, no notification is shown if ``person_waits``:
    that person sees the error.
    """

    def __init__(
        self,
        config: MountConfig,
        manager: systemd.Manager,
        *,
        person_waits: bool,
        on_live: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._manager = manager
        self._person_waits = person_waits
        self._on_live = on_live
        self._reason: str | None = None
        self._notified = False

    def live(self) -> None:
        self._person_waits = False
        self._on_live()
        self._manager.tell(READY="1", STATUS=self._status())

    def state(self, reason: str | None, needs_person: bool) -> None:
        if reason != self._reason:
            self._reason = reason
            self._manager.tell(STATUS=self._status())
        if needs_person and not self._notified and not self._person_waits:
            self._notified = True
            # Without the server's words, which may repeat a secret.
            desktop.notify(
                f"{self._config.account.host} refuses the login",
                f"The mail of {self._config.account.user} in {self._config.mountpoint} is offline: correct "
                "the password or renew the consent, and mount it again.",
            )

    def ending(self) -> None:
        self._manager.tell(STOPPING="1", STATUS="unmounted, uploading what is waiting")

    def _status(self) -> str:
        where = f"{self._config.account.url} on {self._config.mountpoint}"
        return f"{where}: offline: {self._reason}" if self._reason else f"{where}: online"


def _serve(
    config: MountConfig, credentials: CredentialProvider, observer: _MountObserver, log_file: Path | None
) -> None:
    """Serve until the unmount. Any failure is raised as ImapfsError; unexpected ones are logged in full."""
    try:
        # Imports pyfuse3 and trio, which must not be loaded when the process forks.
        from imapfs.daemon.mount import serve

        # Each open file needs a file descriptor in the daemon as well.
        _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))
        _keep_memory_private()
        serve(config, credentials, observer)
    except ImapfsError:
        raise
    except ImportError as error:
        # pyfuse3 was built for this machine's libfuse and Python, which may have been removed since.
        raise ImapfsError(
            f"a part of imapfs cannot be loaded ({error}): install the packages fuse3 and libfuse3-dev, then "
            "reinstall imapfs"
        ) from None
    except Exception as error:
        _log.exception("internal error")
        where = f"see {log_file}" if log_file else "see above"
        raise ImapfsError(f"internal error: {type(error).__name__}: {error}; {where}") from None


def _keep_memory_private() -> None:
    """Let no debugger of the same user, and no core file, have the memory: the password is in it."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _be_child(
    config: MountConfig, credentials: CredentialProvider, sender: int, log_file: Path, verbosity: int
) -> NoReturn:
    report = _StartReport(sender)
    code = 1
    try:
        _detach(sender)
        _start_log(log_file, verbosity)
        observer = _MountObserver(config, systemd.Manager(None), person_waits=True, on_live=report.live)
        _serve(config, credentials, observer, log_file)
        code = 0
    except ImapfsError as error:
        _log.error("%s", error)
        report.failed(str(error), refused=isinstance(error, AuthenticationFailed))
    finally:
        # This copy of the caller must never continue with the caller's code.
        logging.shutdown()
        os._exit(code)


def _detach(keep: int) -> None:
    """Leave the caller's terminal, working directory and open files; ``keep`` stays open."""
    os.setsid()
    os.umask(0o077)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))


class _StartReport:
    """The child's end of the pipe, which is closed after one report."""

    def __init__(self, sender: int) -> None:
        self._sender: int | None = sender

    def live(self) -> None:
        self._send(_LIVE)

    def failed(self, line: str, *, refused: bool) -> None:
        self._send((_REFUSED if refused else _FAILED) + line.encode(errors="surrogateescape"))

    def _send(self, data: bytes) -> None:
        if self._sender is None:
            return
        sender, self._sender = self._sender, None
        with os.fdopen(sender, "wb") as pipe, contextlib.suppress(BrokenPipeError):
            pipe.write(data)


def _wait_for_report(child: int, receiver: int, log_file: Path) -> None:
    try:
        with os.fdopen(receiver, "rb") as pipe:
            report = pipe.read()
    except KeyboardInterrupt:
        # The child has left the terminal, so that Ctrl-C does not reach it.
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if report == _LIVE:
        return
    # The cache is locked until the child has ended.
    _, status = os.waitpid(child, 0)
    for kind, error in ((_FAILED, ImapfsError), (_REFUSED, AuthenticationFailed)):
        if report.startswith(kind):
            raise error(report[1:].decode(errors="surrogateescape"))
    code = os.waitstatus_to_exitcode(status)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise ImapfsError(f"the process of the mount {how} before the mount was live: see {log_file}")


# ---- The log


class _OneLine(logging.Formatter):
    """Keeps text from servers and messages from looking like further lines of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        return one_line(super().formatMessage(record))


class _ForJournal(logging.Formatter):
    """Puts a traceback on one line, too, as each line is an entry in the journal, which adds the time."""

    def format(self, record: logging.LogRecord) -> str:
        return systemd.priority(record.levelno) + one_line(super().format(record))


def _start_log(log_file: Path | None, verbosity: int) -> None:
    handler: logging.Handler
    formatter: logging.Formatter = _OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s")
    if log_file is None:
        if systemd.is_journal(sys.stderr.fileno()):
            formatter = _ForJournal("%(name)s: %(message)s")
        handler = logging.StreamHandler()
    else:
        try:
            # Another mount that starts at the same time may create it as well.
            log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handler = RotatingFileHandler(
                log_file,
                maxBytes=_MAX_LOG_BYTES,
                backupCount=_LOG_BACKUPS,
                encoding="utf-8",
                errors="backslashreplace",
            )
        except OSError as error:
            raise UsageError(
                f"log file {log_file}: cannot be written: {error.strerror}: choose another with --log-file"
            ) from None
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.addHandler(handler)
    # Only warnings from libraries: at lower levels IMAP libraries log commands, including LOGIN.
    root.setLevel(logging.WARNING)
    logging.getLogger("imapfs").setLevel(logging.DEBUG if verbosity else logging.INFO)
    logging.getLogger("imapfs.protocol").setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
