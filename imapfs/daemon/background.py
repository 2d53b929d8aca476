"""The life of the process that serves a mount: checks, the background, the log, and its end.

In the background the starting process waits on a pipe for exactly one report: the mount is live, or one
line why not. The end of the pipe without a report means that the child has died.
"""

import contextlib
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
from typing import NoReturn

from imapfs import mountinfo
from imapfs.daemon import control, desktop, systemd
from imapfs.daemon import preflight as machine
from imapfs.errors import AuthenticationFailed, ImapfsError, UsageError
from imapfs.log import one_line
from imapfs.model import CredentialProvider, MountConfig

_LOG_BYTES = 5 * 2**20
_LOG_BACKUPS = 2
_LIVE = b"+"
_FAILED = b"-"
_REFUSED = b"!"
"""The login was refused."""

_log = logging.getLogger(__name__)


def run(
    config: MountConfig,
    credentials: CredentialProvider,
    *,
    foreground: bool,
    log_file: Path | None,
    verbosity: int,
) -> None:
    """Serve the mount: in the foreground until it is unmounted, else return once it is live.

    The log goes to ``log_file``; without one to stderr in the foreground, else to the account's file in the
    XDG log directory. ``verbosity`` above 0 logs details, above 1 the protocol. In the foreground the service
    manager is told how the mount is, if one has started it. Raises ImapfsError if the mount does not come
    about, or in the foreground ends because of a failure.

    Must be called while the process has one thread only: it forks.
    """
    preflight(config, log_file)
    if foreground:
        os.umask(0o077)
        _start_log(log_file, verbosity)
        # A person at the terminal sees why there is no mount; a service manager does not care.
        observer = _Observer(config, systemd.Manager.take(), person_waits=sys.stderr.isatty())
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
    """One for each account and mountpoint, because two processes cannot rotate the same file."""
    import platformdirs

    account = config.account
    name = re.sub(r"[^\w.@+-]", "_", f"{account.user}@{account.host}")[:100]
    mountpoint = hashlib.sha256(os.fsencode(config.mountpoint)).hexdigest()[:8]
    return platformdirs.user_log_path("imapfs") / f"{name}-{mountpoint}.log"


# ---- Checks


def preflight(config: MountConfig, log_file: Path | None) -> None:
    """Refuse what cannot work before anything is asked or started; raises ImapfsError."""
    _check_mountpoint(config.mountpoint)
    for what, path in (("cache directory", config.cache_dir), ("log file", log_file)):
        # The daemon would wait for itself.
        if path is not None and Path(os.path.realpath(path)).is_relative_to(config.mountpoint):
            raise UsageError(
                f"the {what} {path} is inside the mountpoint: choose another place for one of them"
            )
    ca_file = config.account.ca_file
    if ca_file is not None and not (ca_file.is_file() and os.access(ca_file, os.R_OK)):
        raise UsageError(f"CA file {ca_file}: does not exist or cannot be read: check --ca-file")
    machine.check_device()
    machine.check_fusermount()
    machine.check_options(config.fuse_options)


def _check_mountpoint(path: Path) -> None:
    mount = mountinfo.mount_at(path)
    if mount is not None and mount.fstype == mountinfo.FSTYPE:
        control.read_status(path)
        raise UsageError(f"{path} is in use: {mount.source} is mounted there; 'imapfs umount {path}' first")
    if mount is not None:
        raise UsageError(
            f"{path} is in use: it is the mountpoint of a {mount.fstype} file system; choose another"
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
            f"{path} is not empty: the mount would hide what is in it; choose an empty directory"
        )
    if not os.access(path, os.W_OK):
        raise UsageError(
            f"{path} is not writable for you, which mounting requires: choose a directory of yours"
        )


# ---- Serving


class _Observer:
    """Passes on how the mount is: to who started it, to the service manager, to the person at the desktop.

    ``on_live`` is called when the mount is live. Before that, ``person_waits`` for it and learns of a failure
    by the error.
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
            # Nothing of what the server said: who knows what it repeats.
            desktop.notify(
                f"{self._config.account.host} refuses the login",
                f"The mail of {self._config.account.user} in {self._config.mountpoint} is offline: set the "
                "password or consent right and mount it again.",
            )

    def ending(self) -> None:
        self._manager.tell(STOPPING="1", STATUS="unmounted, sending what is waiting")

    def _status(self) -> str:
        where = f"{self._config.account.url} on {self._config.mountpoint}"
        return f"{where}: offline: {self._reason}" if self._reason else f"{where}: online"


def _serve(
    config: MountConfig, credentials: CredentialProvider, observer: _Observer, log_file: Path | None
) -> None:
    """Returns after the unmount; any failure comes out as ImapfsError, the unexpected ones logged in full."""
    try:
        # pyfuse3 and trio, which must not be there yet when the process forks.
        from imapfs.daemon.mount import serve

        # An open file takes a descriptor here as well.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        serve(config, credentials, observer)
    except ImapfsError:
        raise
    except ImportError as error:
        # pyfuse3 is built against this machine's libfuse and Python; either may have been removed since.
        raise ImapfsError(
            f"a part of imapfs cannot be loaded ({error}): install the packages fuse3 and libfuse3-dev, then "
            "imapfs again"
        ) from None
    except Exception as error:
        _log.exception("internal error")
        where = f"see {log_file}" if log_file else "see above"
        raise ImapfsError(f"internal error: {type(error).__name__}: {error}; {where}") from None


def _be_child(
    config: MountConfig, credentials: CredentialProvider, sender: int, log_file: Path, verbosity: int
) -> NoReturn:
    report = _Report(sender)
    code = 1
    try:
        _detach(sender)
        _start_log(log_file, verbosity)
        observer = _Observer(config, systemd.Manager(None), person_waits=True, on_live=report.live)
        _serve(config, credentials, observer, log_file)
        code = 0
    except ImapfsError as error:
        _log.error("%s", error)
        report.failed(str(error), refused=isinstance(error, AuthenticationFailed))
    finally:
        # Whatever happens, this copy of the caller must not run the caller's code.
        logging.shutdown()
        os._exit(code)


def _detach(keep: int) -> None:
    """Leave terminal, working directory and open files of the caller; ``keep`` stays open."""
    os.setsid()
    os.umask(0o077)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))


class _Report:
    """The child's end of the pipe: one report at most, then it is closed."""

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
        # The child has left the terminal and does not get its Ctrl-C.
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if report == _LIVE:
        return
    # The cache is free again only when the child is gone.
    _, status = os.waitpid(child, 0)
    for kind, error in ((_FAILED, ImapfsError), (_REFUSED, AuthenticationFailed)):
        if report.startswith(kind):
            raise error(report[1:].decode(errors="surrogateescape"))
    code = os.waitstatus_to_exitcode(status)
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise ImapfsError(f"the process of the mount {how} before the mount was live: see {log_file}")


# ---- The log


class _OneLine(logging.Formatter):
    """Keeps what servers and messages put into a log line from looking like further lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        return one_line(super().formatMessage(record))


class _ForJournal(logging.Formatter):
    """Also a traceback on one line, as each line is an entry of its own; the journal adds the time."""

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
            # Another mount that starts at the same time may make it as well.
            log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handler = RotatingFileHandler(
                log_file,
                maxBytes=_LOG_BYTES,
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
    # Of the libraries only warnings: at lower levels IMAP libraries log commands, LOGIN among them.
    root.setLevel(logging.WARNING)
    logging.getLogger("imapfs").setLevel(logging.DEBUG if verbosity else logging.INFO)
    logging.getLogger("imapfs.protocol").setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
