"""One user of a test server, whichever server it is: putting mail in, and a second client to look at it."""

import base64
import contextlib
import imaplib
import itertools
import os
import re
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypedDict

from tests.support.servers.tls import CertificateAuthority

DEADLINE = 60.0
"""Seconds that a start, a stop or one answer of a server may take before it counts as broken."""

_sequence = itertools.count(1_000_000_000)


class Dependents:
    """What runs on a server, such as a mount, and has to end before the server does."""

    def __init__(self) -> None:
        self._running: list[AbstractContextManager[object]] = []

    def add(self, dependent: AbstractContextManager[object]) -> None:
        """Have ``dependent`` exited when the server ends, unless it is removed before."""
        self._running.append(dependent)

    def remove(self, dependent: AbstractContextManager[object]) -> None:
        """Forget ``dependent``, which has ended."""
        if dependent in self._running:
            self._running.remove(dependent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Exit all of them, the last first. Raises the last of their errors."""
        with contextlib.ExitStack() as stack:
            while self._running:
                stack.push(self._running.pop(0))
            stack.pop_all().__exit__(kind, error, where)


class Endpoint(Protocol):
    """Where IMAP over TLS is spoken: a server, or what stands before one."""

    host: str
    port: int
    authority: CertificateAuthority


class MaildirServer(Endpoint, Protocol):
    """What an `ImapAccount` must know of its server."""

    dependents: Dependents
    password: str
    separator: str
    prefix: str
    uid: int

    def own(self, path: Path) -> None:
        """Give ``path`` to the user that the server runs as."""


class ImapAccount(ABC):
    """One user of a server that keeps mail in Maildirs.

    A mailbox is named by its decoded path, with ``/`` and without the namespace prefix, whatever the server's
    separator.
    """

    def __init__(self, server: MaildirServer, name: str) -> None:
        self.server = server
        self.name = name
        self.password = server.password

    def server_name(self, mailbox: str) -> str:
        """Return ``mailbox`` as the server spells it: prefix, separator, modified UTF-7."""
        if mailbox == "INBOX":
            return mailbox
        parts = mailbox.split("/")
        return self.server.prefix + self.server.separator.join(modified_utf7(part) for part in parts)

    def deliver(self, mailbox: str, messages: Iterable[tuple[bytes, int, str]]) -> None:
        """Write messages straight into the Maildir: (bytes, INTERNALDATE in epoch seconds, Maildir flags).

        UIDs follow the order given. Flags are Maildir's letters, such as ``"FS"`` for ``\\Flagged \\Seen``.
        The mailbox is created where it is missing.
        """
        directory = self._mailbox_directory(mailbox)
        for content, date, flags in messages:
            # Servers give UIDs in the order of the number at the start of the name.
            stored, more = self._as_stored(content)
            name = f"{next(_sequence)}.M1P1.test,S={len(stored)}{more}"
            written = directory / "tmp" / name
            descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with open(descriptor, "wb", buffering=0, closefd=False) as file:
                    file.write(stored)
                os.utime(descriptor, (date, date))
            finally:
                os.close(descriptor)
            self.server.own(written)
            os.rename(written, directory / "cur" / f"{name}:2,{''.join(sorted(flags))}")

    def append(self, mailbox: str, message: bytes, date: int, flags: str = "") -> int:
        """APPEND (RFC 9051 section 6.3.12) the exact bytes and return the UID (RFC 4315).

        ``date`` is the INTERNALDATE in epoch seconds, ``flags`` IMAP's words, such as ``\\Seen $Work``. The
        mailbox must exist.

        Raises RuntimeError where the server refuses.
        """
        with self.client() as client:
            internal_date = imaplib.Time2Internaldate(datetime.fromtimestamp(date, UTC))
            # Its append() would turn every bare CR and LF into CRLF.
            client.literal = message  # type: ignore[assignment]  # typeshed: str
            status, data = client.xatom(
                "APPEND", f'"{self.server_name(mailbox)}"', f"({flags})", internal_date
            )
            appended = re.search(rb"\[APPENDUID \d+ (\d+)\]", data[0])
            if status != "OK" or appended is None:
                raise RuntimeError(f"APPEND to {mailbox}: {status} {data[0]!r}")
            return int(appended[1])

    @contextmanager
    def client(self, via: Endpoint | None = None) -> Iterator[imaplib.IMAP4_SSL]:
        """Log in as a second, independent client; it logs out at the end of the block.

        ``via`` is what to connect to in place of the server itself.
        """
        endpoint = via or self.server
        context = ssl.create_default_context(cafile=endpoint.authority.certificate)
        client = imaplib.IMAP4_SSL(endpoint.host, endpoint.port, ssl_context=context, timeout=DEADLINE)
        try:
            # LOGIN could not carry a password that is not ASCII.
            client.authenticate("PLAIN", lambda _: f"\0{self.name}\0{self.password}".encode())
            yield client
        finally:
            try:
                client.logout()
            except (imaplib.IMAP4.abort, OSError):
                # The server ended the connection first, as a test of just that makes it do.
                client.shutdown()

    @abstractmethod
    def _mailbox_directory(self, mailbox: str) -> Path:
        """Return the Maildir of ``mailbox``, which is made where it is missing."""

    @abstractmethod
    def _as_stored(self, content: bytes) -> tuple[bytes, str]:
        """Return what to write into the file, and what its name tells of it beside its size."""

    def _make(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.server.own(directory)


class Identity(TypedDict, total=False):
    """Arguments of subprocess.Popen."""

    user: int
    group: int
    extra_groups: list[int]


def run_as(uid: int, gid: int) -> Identity:
    """Return what makes a subprocess run as this user: nothing where this process does already."""
    if os.geteuid() == uid:
        return {}
    return {"user": uid, "group": gid, "extra_groups": []}


def modified_utf7(name: str) -> str:
    """Encode one part of a mailbox name (RFC 3501 section 5.1.3)."""

    def shift(run: re.Match[str]) -> str:
        if run[0] == "&":
            return "&-"
        return "&" + base64.b64encode(run[0].encode("utf-16-be"), b"+,").decode().rstrip("=") + "-"

    return re.sub(r"&|[^ -~]+", shift, name)
