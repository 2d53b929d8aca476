"""``imapfs check``: what a mount needs, one thing after the other, each with a remedy where it is amiss.

Nothing is changed on the server: mailboxes are opened with EXAMINE, bodies asked for with PEEK. No password
or token is part of a finding, so that all of it can be shown to others; host, user and mailboxes can be seen.

The steps stand in `_STEPS`. Each is a function of `_Check` that yields findings; what it raises is one too. A
step that needs another which failed is skipped, and only a failed step makes the whole fail.
"""

import contextlib
import dataclasses
import importlib
import os
import shutil
import ssl
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

from imapfs.account.values import show_size
from imapfs.cli.check import probe
from imapfs.cli.check.sample import Sample
from imapfs.daemon import preflight as machine
from imapfs.errors import CertificateRejected, ConnectionLost, ImapfsError, TlsError
from imapfs.imap import connect
from imapfs.imap.grammar import ListEntry
from imapfs.imap.session import Session
from imapfs.imap.wire import Wire
from imapfs.model import Account, CredentialProvider, MountConfig
from imapfs.sync.synchroniser import display_name, plan_tree

Status = Literal["ok", "warning", "failed", "skipped"]

_STEP_SECONDS: Final = 10.0
"""Longest wait for each of: the name servers, TCP, the handshake. Never longer than the account's timeout."""
_LISTEN_SECONDS: Final = 3.0
"""How long a server that has not spoken TLS may take to say in the clear what it is."""
_SPEND_SECONDS: Final = 15.0
"""Longest that opening connections, and fetching a sample, may go on."""
_ROUND_TRIPS: Final = 5
_SOON: Final = 1 / 6
"""How much of a certificate's life may be left when it is worth a warning: most are renewed at a third."""


class Finding(NamedTuple):
    """What one step found."""

    step: str
    status: Status
    """``warning``: a mount works, but not as well as it could."""
    detail: str
    remedy: str = ""


def run(config: MountConfig, credentials: Callable[[], CredentialProvider]) -> Generator[Finding, None, None]:
    """Everything that a mount by ``config`` needs, as it is found out. ``credentials`` may ask a person.

    Ends within some times the account's timeout. Closing the iterator ends it at once.
    """
    unusable: set[str] = set()
    with _Check(config, credentials) as check:
        for step in _STEPS:
            missing = next((name for name in step.needs if name in unusable), None)
            if missing is not None:
                unusable.add(step.name)
                yield Finding(step.name, "skipped", f"needs {missing}")
                continue
            for finding in check.perform(step):
                if finding.status == "failed":
                    unusable.add(step.name)
                yield finding


class _Said(NamedTuple):
    """A finding of a step that need not repeat its own name."""

    status: Status
    detail: str
    remedy: str = ""


class _Check:
    """What the steps have found out for those that come later."""

    def __init__(self, config: MountConfig, credentials: Callable[[], CredentialProvider]) -> None:
        self._config = config
        self._account = config.account
        self._ask = credentials
        self._seconds = min(_STEP_SECONDS, config.timeout)
        self._addresses: list[probe.Address] = []
        self._handshake: probe.Handshake | None = None
        self._greeting: str | ImapfsError = ""
        self._context: ssl.SSLContext | None = None
        self._credentials: CredentialProvider | None = None
        self._session: Session | None = None
        self._entries: list[ListEntry] = []
        self._sample = Sample()

    def __enter__(self) -> "_Check":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._session is not None:
            if kind is not None:
                self._session.abort()
            self._session.close()

    def perform(self, step: "_Step") -> Iterator[Finding]:
        try:
            for said in step.work(self):
                yield Finding(step.name, *said)
        except (ImapfsError, OSError) as error:
            problem = error.problem if isinstance(error, ImapfsError) else str(error)
            remedy = error.remedy if isinstance(error, ImapfsError) else ""
            yield Finding(step.name, "failed" if step.essential else "warning", problem, remedy)

    # -- from the name to the greeting ---------------------------------------------------------------------

    def resolution(self) -> Iterator[_Said]:
        self._addresses = probe.resolve(self._account.host, self._account.port, self._seconds)
        yield _Said("ok", ", ".join(address.ip for address in self._addresses))

    def tcp(self) -> Iterator[_Said]:
        """Which addresses take a connection; a mount tries them in order."""
        reached = probe.reach(self._addresses, self._seconds)
        where = f"port {self._account.port}"
        usable = [address for address, outcome in reached.items() if isinstance(outcome, float)]
        if not usable:
            yield _unreachable(list(reached.values()), where, self._seconds)
            return
        silent = [a.ip for a in self._addresses if isinstance(reached[a], TimeoutError)]
        shown = ", ".join(f"{a.ip} in {_milliseconds(o)}" for a, o in reached.items() if isinstance(o, float))
        if silent:
            yield _Said(
                "warning",
                f"{where} answers at {shown}, but not at {', '.join(silent)}",
                "every connection may wait there first: have the address taken out of the name's records, or"
                " mend this machine's IPv6",
            )
        else:
            refused = ", ".join(a.ip for a, outcome in reached.items() if isinstance(outcome, OSError))
            yield _Said("ok", f"{where} answers at {shown}" + (f" (not at {refused})" if refused else ""))
        self._addresses = usable

    def protocol(self) -> Iterator[_Said]:
        """Whether what answers speaks TLS or cleartext, as the account expects."""
        account = self._account
        if account.security == "starttls":
            yield self._expect_cleartext()
            return
        try:
            self._handshake = probe.shake_hands(account, self._addresses[0], self._seconds)
        except OSError as error:
            if _is_about_tls(error):
                # The next step says what is wrong with it.
                yield _Said("ok", "TLS answers")
                return
            heard = self._hear(min(_LISTEN_SECONDS, self._seconds))
            if probe.protocol(heard) == "IMAP":
                yield _Said(
                    "failed",
                    f"port {account.port} speaks IMAP without TLS",
                    f"if the server has STARTTLS there, write imap://{account.user}@{account.host}:"
                    f"{account.port}; else use its port for TLS, usually 993",
                )
            elif heard:
                yield self._no_imap(heard)
            else:
                raise connect.explain(error, account, self._seconds) from None
            return
        yield _Said("ok", "TLS answers")

    def _expect_cleartext(self) -> _Said:
        account = self._account
        heard = self._hear(min(_LISTEN_SECONDS, self._seconds))
        if not heard:
            # A server for TLS waits for the client to speak first.
            as_tls = dataclasses.replace(account, security="tls")
            with contextlib.suppress(OSError, ConnectionLost):
                probe.shake_hands(as_tls, self._addresses[0], self._seconds)
                return _Said(
                    "failed",
                    f"port {account.port} speaks TLS from the first byte, and STARTTLS was asked for",
                    f"write imaps://{account.user}@{account.host}:{account.port}",
                )
            heard = self._hear(self._config.timeout)
        if not heard:
            return _Said("failed", f"port {account.port} says nothing", "check host and port (143 is usual)")
        if probe.protocol(heard) != "IMAP":
            return self._no_imap(heard)
        return _Said("ok", "IMAP answers, for STARTTLS")

    def _hear(self, seconds: float) -> str:
        with contextlib.suppress(OSError):
            return probe.hear(self._addresses[0], seconds)
        return ""

    def _no_imap(self, heard: str) -> _Said:
        known = probe.protocol(heard)
        what = f"speaks {known}" if known else f"says {heard[:80]!r}"
        return _Said(
            "failed",
            f"port {self._account.port} {what}, which is not IMAP",
            "check host and port: IMAP over TLS is usually 993, with STARTTLS 143",
        )

    def tls(self) -> Iterator[_Said]:
        if self._handshake is None:
            try:
                self._handshake = probe.shake_hands(self._account, self._addresses[0], self._seconds)
            except OSError as error:
                raise connect.explain(error, self._account, self._seconds) from None
        if self._handshake is not None:
            yield _Said("ok", f"{self._handshake.version} with {self._handshake.cipher}")
            return
        with contextlib.closing(self._open()) as wire:
            assert not wire.encrypted
        yield _Said(
            "warning",
            "no STARTTLS: password and mail go in the clear, as allowed for this machine itself or by"
            " insecure-plaintext",
            "have the server offer TLS",
        )

    def _open(self) -> Wire:
        """A connection as a mount makes it, before the login."""
        self._context = self._context or connect.tls_context(self._account)
        return Wire.open(self._account, self._context, self._config.timeout)

    def certificate(self) -> Iterator[_Said]:
        """The certificate as such, and whether a mount takes it."""
        account = self._account
        shown = None
        if self._handshake is not None:
            try:
                shown = probe.describe(self._handshake.certificate)
            except ValueError as error:
                yield _Said("failed", f"cannot be read: {error}", "the server's owner must replace it")
                return
        try:
            with contextlib.closing(self._open()) as wire:
                self._greeting = _welcome(wire)
        except CertificateRejected as error:
            assert shown is not None
            yield _Said("failed", f"{error.problem} ({_summary(shown)})", _trust(shown, account, error))
            return
        except TlsError:
            raise
        except ConnectionLost as error:
            # For whatever reason, but not for the certificate: the next step's matter.
            self._greeting = error
        if shown is None:
            yield _Said("warning", "there is none, as there is no TLS")
            return
        pinned = account.tls_fingerprint is not None
        left = (shown.expires - datetime.now(UTC)) / (shown.expires - shown.begins)
        if left < _SOON and not pinned:
            yield _Said("warning", _summary(shown), "its owner should renew it soon")
        else:
            yield _Said("ok", _summary(shown) + (", pinned" if pinned else ", verified"))
        if not pinned:
            yield _Said("ok", f"to trust this very certificate alone: {_pin(shown)}")

    def greeting(self) -> Iterator[_Said]:
        if isinstance(self._greeting, ImapfsError):
            raise self._greeting
        yield _Said("ok", self._greeting)

    # -- the account ---------------------------------------------------------------------------------------

    def credentials(self) -> Iterator[_Said]:
        self._credentials = self._ask()
        yield _Said("ok", f"found for {self._account.user}")

    def login(self) -> Iterator[_Said]:
        session = self._log_in()
        self._session = session
        yield _Said("ok", f"{self._account.user} is logged in")

    def _log_in(self) -> Session:
        assert self._credentials is not None
        assert self._context is not None
        return Session.connect(self._account, self._credentials, self._context, self._config.timeout)

    def _live(self) -> Session:
        """The session, or a new one where an earlier step has cost it."""
        if self._session is None or not self._session.alive:
            if self._session is not None:
                self._session.close()
            self._session = self._log_in()
        return self._session

    def capabilities(self) -> Iterator[_Said]:
        session = self._live()
        present = [one for names, _ in _COSTS for one in names.split("/") if session.has(one)]
        yield _Said("ok", " ".join(present) or "none that imapfs can use")
        for names, cost in _COSTS:
            # Without the others there is nothing to enable.
            matters = names != "ENABLE" or session.has("CONDSTORE") or session.has("QRESYNC")
            if matters and not any(one in present for one in names.split("/")):
                yield _Said("warning" if names in _MISSED else "ok", f"no {names}: {cost}")

    def mailboxes(self) -> Iterator[_Said]:
        session = self._live()
        prefix = session.personal_prefix
        self._entries = session.list_mailboxes()
        tree = plan_tree(self._entries, prefix)
        delimiters = {entry.delimiter.decode("ascii", "replace") for entry in self._entries}
        yield _Said(
            "ok",
            f"{sum(directory.selectable for directory in tree)} mailboxes,"
            f" personal namespace {_quoted(prefix)}, delimiter {' '.join(map(repr, sorted(delimiters)))}",
        )
        wanted = self._account.mailbox
        if wanted is not None and not any(directory.path == _path(wanted) for directory in tree):
            top = ", ".join(d.path[0].decode("utf-8", "replace") for d in tree if len(d.path) == 1)
            yield _Said("failed", f"there is no mailbox {wanted}", f"choose another; at the top are: {top}")
        uses = {
            use: "/".join(part.decode("utf-8", "replace") for part in directory.path)
            for directory in reversed(tree)
            if (use := directory.special_use) and directory.selectable
        }
        yield _Said("ok", ", ".join(f"{use} is {uses[use]}" for use in sorted(uses)) or "no special use")
        if "\\Trash" not in uses and self._config.delete == "trash" and not self._config.read_only:
            yield _Said(
                "warning",
                "no mailbox is marked as \\Trash: rm deletes messages for good",
                "have the server mark one, if it can; --read-only keeps everything",
            )

    def quota(self) -> Iterator[_Said]:
        found = self._live().quota(b"INBOX")
        if found is None:
            yield _Said("ok", "none told: df shows the disk that the cache is on")
            return
        detail = f"{show_size(found.used)} of {show_size(found.limit)} used"
        if found.used >= 0.95 * found.limit:
            yield _Said("warning", detail, "new files may be refused: delete something, or get more space")
        else:
            yield _Said("ok", detail)

    def connections(self) -> Iterator[_Said]:
        """How many connections there can be at once, up to what a mount would use."""
        self._live()
        wanted, count = self._config.connections, 1
        end = time.monotonic() + _SPEND_SECONDS
        with _Others() as others:
            while count < wanted and time.monotonic() < end:
                try:
                    others.append(self._log_in())
                except ImapfsError as error:
                    yield _Said(
                        "warning",
                        f"{count} of {wanted} can be open at once: {error.problem}",
                        f"close other mail programs and mounts, or use --connections {count}",
                    )
                    return
                count += 1
        yield _Said(
            "ok",
            f"{count} can be open at once"
            + (
                f" (more were not tried, for lack of time; {wanted} are set)"
                if count < wanted
                else ", as set"
            ),
        )

    def latency(self) -> Iterator[_Said]:
        session, took = self._live(), []
        for _ in range(_ROUND_TRIPS):
            begin = time.monotonic()
            session.noop()
            took.append(time.monotonic() - begin)
        yield _Said("ok", f"{_milliseconds(statistics.median(took))} a round trip")

    def throughput(self) -> Iterator[_Said]:
        self._sample.take(self._live(), self._entries, _SPEND_SECONDS)
        sample = self._sample
        if not sample.bytes:
            yield _Said("ok", "no message to measure it with")
            return
        rate = sample.bytes / max(sample.seconds, 1e-6)
        count = len(sample.exact)
        yield _Said(
            "ok",
            f"{show_size(rate)} a second ({show_size(sample.bytes)} in {sample.seconds:.2g} s,"
            f" {count} {'message' if count == 1 else 'messages'})",
        )

    def sizes(self) -> Iterator[_Said]:
        """Whether RFC822.SIZE is what BODY[] has (RFC 9051 section 7.5.2)."""
        sample = self._sample
        pairs = [
            (sample.announced[uid], exact) for uid, exact in sample.exact.items() if uid in sample.announced
        ]
        wrong = [abs(announced - exact) for announced, exact in pairs if announced != exact]
        if wrong:
            yield _Said(
                "warning",
                f"{len(wrong)} of {len(pairs)} messages are announced with a wrong size, by up to"
                f" {show_size(max(wrong))}",
                "ls is right once a message was read; run 'imapfs fetch' before rsync, tar or a backup",
            )
        else:
            yield _Said("ok", f"exact for {len(pairs)} messages" if pairs else "no message to compare")

    # -- this machine --------------------------------------------------------------------------------------

    def device(self) -> Iterator[_Said]:
        machine.check_device()
        yield _Said("ok", f"{machine.DEVICE} can be used")

    def fusermount(self) -> Iterator[_Said]:
        machine.check_fusermount()
        yield _Said("ok", f"{shutil.which('fusermount3')}")

    def pyfuse3(self) -> Iterator[_Said]:
        try:
            importlib.import_module("imapfs.kernel.adapter")
        except ImportError as error:
            raise ImapfsError(
                f"pyfuse3 cannot be used: {error}",
                remedy="install imapfs anew, with libfuse3-dev, pkg-config, gcc and python3-dev there",
            ) from None
        yield _Said("ok", "pyfuse3 can be used")

    def allow_other(self) -> Iterator[_Said]:
        machine.check_options(self._config.fuse_options)
        allowed = machine.user_allow_other()
        who = "all users" if allowed else "root alone"
        yield _Said("ok", f"{who} may use -o allow_other (user_allow_other in {machine.FUSE_CONF})")

    def cache(self) -> Iterator[_Said]:
        directory = self._config.cache_dir
        there = next(path for path in (directory, *directory.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield _Said("failed", f"{there} is not writable", "choose another place with --cache-dir")
            return
        free = shutil.disk_usage(there).free
        room = free + _used(directory)
        if room < self._config.cache_size:
            yield _Said(
                "warning",
                f"{show_size(free)} free at {there}, of {show_size(self._config.cache_size)} for the cache",
                f"use --cache-size {max(room // 2 >> 20, 1)}M, or another place with --cache-dir",
            )
        else:
            yield _Said("ok", f"{show_size(free)} free at {there}")


class _Others(list[Session]):
    """Sessions that are closed when the block ends, without waiting for the server if it ends early."""

    def __enter__(self) -> "_Others":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for session in self:
            if kind is not None:
                session.abort()
            session.close()


# ---- Words


_COSTS: Final = (
    ("UIDPLUS", "what is deleted stays on the server, marked as deleted, and uploads must be looked for"),
    ("MOVE", "a message is moved by copying it and deleting the original"),
    ("ENABLE", "CONDSTORE and QRESYNC can hardly be used"),
    ("CONDSTORE", "to refresh a mailbox all of its flags are compared, slow where there are many messages"),
    ("QRESYNC", "what others deleted is found by comparing all UIDs, so that refreshing takes longer"),
    ("IDLE", "the server cannot tell news: mailboxes are looked at when they are opened, and now and then"),
    ("NOTIFY", "mailboxes in use are watched with a connection each, the others looked at now and then"),
    ("LIST-STATUS", "to look for news each mailbox is asked for by itself"),
    ("LITERAL+/LITERAL-", "each upload takes a round trip more"),
    ("SPECIAL-USE", "Trash is known only if the server marks it all the same"),
    ("NAMESPACE", "a prefix of all mailboxes, such as INBOX., is shown as a directory"),
    ("QUOTA", "df does not show how full the account is"),
)
"""What imapfs uses, most important first, and what its absence costs; of alternatives one is enough."""
_MISSED: Final = frozenset({"UIDPLUS", "CONDSTORE", "IDLE"})
"""Whose absence a person would want to know of even where everything else is well."""


def _is_about_tls(error: OSError) -> bool:
    """Whether a handshake that failed with this was with a server that speaks TLS."""
    hung_up = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    return isinstance(error, ssl.SSLError) and not hung_up and error.reason not in connect.NOT_TLS


def _unreachable(outcomes: list[float | OSError], where: str, seconds: float) -> _Said:
    """Why none of the addresses takes a connection."""
    if any(isinstance(outcome, ConnectionRefusedError) for outcome in outcomes):
        return _Said(
            "failed",
            f"{where} refuses connections: nothing listens there",
            "check host and port: IMAP over TLS is usually 993, with STARTTLS 143",
        )
    if any(isinstance(outcome, TimeoutError) for outcome in outcomes):
        return _Said(
            "failed",
            f"{where} does not answer within {seconds:g} s",
            "a firewall may be in the way: try another network, and check host and port (993 is usual)",
        )
    first = next(outcome for outcome in outcomes if isinstance(outcome, OSError))
    return _Said(
        "failed", f"no way to {where}: {os.strerror(first.errno or 0)}", "check this machine's network"
    )


def _welcome(wire: Wire) -> str:
    """The greeting without its response code, and the ways to log in."""
    text = wire.greeting[wire.greeting.find("]") + 1 :] if wire.greeting.startswith("[") else wire.greeting
    ways = sorted(c.removeprefix("AUTH=") for c in wire.greeting_capabilities if c.startswith("AUTH="))
    if "LOGINDISABLED" not in wire.greeting_capabilities and "LOGIN" not in ways:
        ways.append("LOGIN")
    return f"{text.strip()[:200] or 'no words'} (login by {', '.join(ways) or 'nothing known'})"


def _summary(certificate: probe.Certificate) -> str:
    left = (certificate.expires - datetime.now(UTC)).days
    until = f"until {certificate.expires:%Y-%m-%d} ({left} days left)"
    if left < 0:
        until = f"expired on {certificate.expires:%Y-%m-%d} ({-left} days ago)"
    by = "self-signed" if certificate.self_signed else f"issued by {certificate.issuer}"
    return f"for {', '.join(certificate.names[:5]) or certificate.subject}, {by}, {until}"


def _trust(certificate: probe.Certificate, account: Account, error: CertificateRejected) -> str:
    """What to do about a certificate that is not trusted."""
    if account.tls_fingerprint is not None:
        return f"if it was renewed, and only then: {_pin(certificate)}"
    now = datetime.now(UTC)
    if certificate.begins > now:
        return f"check this machine's clock: it says {now:%Y-%m-%d %H:%M} UTC"
    if certificate.expires < now:
        return f"its owner must renew it; or, if you know it: {_pin(certificate)}"
    if "mismatch" in error.problem and certificate.names:
        return f"use a name that it is for instead of {account.host}; or, if you know it: {_pin(certificate)}"
    return f"name its issuer's certificate with --ca-file; or, if you know it: {_pin(certificate)}"


def _pin(certificate: probe.Certificate) -> str:
    digits = certificate.fingerprint
    return f'--tls-fingerprint {digits}, or in the configuration file: tls-fingerprint = "{digits}"'


def _quoted(name: bytes) -> str:
    return repr(display_name(name)) if name else "without a prefix"


def _path(mailbox: str) -> tuple[bytes, ...]:
    return tuple(mailbox.strip("/").encode().split(b"/"))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _used(directory: Path) -> int:
    """Bytes below ``directory``, as the disk counts them."""
    total = 0
    for root, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(root, name)).st_blocks * 512
    return total


# ---- The order


@dataclass(frozen=True, slots=True)
class _Step:
    name: str
    work: Callable[[_Check], Iterator[_Said]]
    needs: tuple[str, ...] = ()
    essential: bool = True
    """Whether a mount does not work where this fails."""


_STEPS: Final = (
    _Step("resolution", _Check.resolution),
    _Step("tcp", _Check.tcp, ("resolution",)),
    _Step("protocol", _Check.protocol, ("tcp",)),
    _Step("tls", _Check.tls, ("protocol",)),
    _Step("certificate", _Check.certificate, ("tls",)),
    _Step("greeting", _Check.greeting, ("certificate",)),
    _Step("credentials", _Check.credentials, ("greeting",)),
    _Step("login", _Check.login, ("credentials",)),
    _Step("capabilities", _Check.capabilities, ("login",), essential=False),
    _Step("mailboxes", _Check.mailboxes, ("login",)),
    _Step("quota", _Check.quota, ("login",), essential=False),
    _Step("connections", _Check.connections, ("login",), essential=False),
    _Step("latency", _Check.latency, ("login",), essential=False),
    _Step("throughput", _Check.throughput, ("mailboxes",), essential=False),
    _Step("sizes", _Check.sizes, ("mailboxes",), essential=False),
    _Step("fuse-device", _Check.device),
    _Step("fusermount3", _Check.fusermount),
    _Step("pyfuse3", _Check.pyfuse3),
    _Step("allow-other", _Check.allow_other),
    _Step("cache", _Check.cache),
)
