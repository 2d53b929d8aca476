"""The servers of the acceptance behind one narrow face, each with one account that a mount and a test use."""

import gzip
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from tests.support.acceptance.outside import Outside, outside
from tests.support.requirements import Missing
from tests.support.servers import courier, cyrus
from tests.support.servers.courier import Courier
from tests.support.servers.cyrus import Cyrus
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.intermediary import Intermediary
from tests.support.servers.relay import Relay
from tests.support.servers.tls import CertificateAuthority


class Peer(ABC):
    """A running server while the ``with`` block lasts, behind what keeps its port; a mount uses it as its
    account.

    Raises Missing where it cannot be run.
    """

    key: ClassVar[str]
    """What it is called on the command line."""
    tls: ClassVar[bool] = True
    """Whether the relay speaks TLS, since the server does not."""

    line_end: ClassVar[bytes] = b"\r\n"
    """What it makes of the line ends that it is given."""
    expected: ClassVar[Sequence[str]] = ()
    """What the log of a mount says because of it: regular expressions."""

    name = "acceptance"
    password = "secret"
    server: Intermediary

    def __init__(self, authority: CertificateAuthority) -> None:
        self.authority = authority
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self._start(self._stack)
            self.server = self._stack.enter_context(self._before())
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, where)

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is called in the matrix, with its version."""

    @abstractmethod
    def _start(self, stack: ExitStack) -> None:
        """Start what is behind the relay, and have it ended by ``stack``."""

    def _before(self) -> Intermediary:
        """Return what stands before the server."""
        return Relay(self.authority, self._port, tls=self.tls)

    @abstractmethod
    def _port(self) -> int:
        """Return the port of the server as it runs now."""

    def stop(self) -> None:
        """End all connections and refuse new ones. A subclass also ends a server that keeps its mail."""
        self.server.refuse()

    def start_again(self) -> None:
        """Start after `stop`: the same mail at the same port."""
        self.server.accept()

    def outside(self) -> AbstractContextManager[Outside]:
        """Log in as a second client."""
        return outside(self.server, self.name, self.password)


class DovecotPeer(Peer):
    key = "dovecot"
    tls = False
    root: ClassVar[Path | None] = None
    """See `Dovecot`."""

    @property
    def title(self) -> str:
        return f"Dovecot {self.dovecot.version().split()[0]}"

    def _start(self, stack: ExitStack) -> None:
        if self.root is not None and not (self.root / "stamp").exists():
            raise Missing("the system that has it could not be unpacked")
        self.dovecot = stack.enter_context(Dovecot(self.authority, password=self.password, root=self.root))
        self.dovecot.account(self.name)

    def _port(self) -> int:
        return self.dovecot.port

    def stop(self) -> None:
        super().stop()
        self.dovecot.stop()

    def start_again(self) -> None:
        self.dovecot.start_again()
        super().start_again()


class NewDovecotPeer(DovecotPeer):
    """The Dovecot of Debian 13."""

    key = "dovecot-2.4"
    root = Path(__file__).parents[3] / ".servers" / "trixie"


class CourierPeer(Peer):
    """Each session is a process of its own, which ends with its connection."""

    key = "courier"
    tls = False

    @property
    def title(self) -> str:
        with gzip.open(courier.UNPACKED / "usr/share/doc/courier-imap/changelog.gz", "rt") as lines:
            return f"Courier {next(lines).strip()}"

    def _start(self, stack: ExitStack) -> None:
        self._courier = stack.enter_context(Courier(self.authority, password=self.password))
        self._courier.account(self.name).make()

    def _port(self) -> int:
        return self._courier.port


class CyrusPeer(Peer):
    key = "cyrus"
    tls = False

    @property
    def title(self) -> str:
        changes = cyrus.UNPACKED / "usr/share/doc/cyrus-imapd/changelog.Debian.gz"
        with gzip.open(changes, "rt") as lines:
            version = re.search(r"\((.*?)-", next(lines))
        return f"Cyrus {version[1] if version else ''}"

    def _start(self, stack: ExitStack) -> None:
        self._cyrus = stack.enter_context(Cyrus(self.authority, self.name, self.password))

    def _port(self) -> int:
        return self._cyrus.port

    def stop(self) -> None:
        super().stop()
        self._cyrus.stop()

    def start_again(self) -> None:
        self._cyrus.start_again()
        super().start_again()
