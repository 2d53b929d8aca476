"""Small servers from package collections: without TLS, and most of them keep mail in memory only."""

import base64
import hashlib
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from tests.support.acceptance.peers import Peer
from tests.support.requirements import Missing
from tests.support.servers.process import Program, free_ports

_SERVERS = Path(__file__).parents[3] / ".servers"
PYTHON = _SERVERS / "python"
"""A virtual environment with the packages of programs/requirements.txt."""
GO_SERVER = _SERVERS / "go" / "goimap"
_PROGRAMS = Path(__file__).parents[1] / "servers" / "programs"


class LightPeer(Peer):
    """One program on one port. Memory is lost with the process, so a restart ends all connections only."""

    keeps_mail: ClassVar[bool] = False
    """Whether mail outlives the process."""
    distribution: ClassVar[str]
    """The package whose version is that of the server."""

    @property
    def title(self) -> str:
        (found,) = PYTHON.glob(f"lib/python*/site-packages/{self.distribution}-*.dist-info")
        return f"{self.distribution.replace('_', '-')} {found.name.split('-')[1].removesuffix('.dist')}"

    def _start(self, stack: ExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imapfs-light-")))
        port, spare = free_ports(2)
        self._program = Program(self._command(port, spare, directory), port, directory / "log")
        stack.callback(self._program.stop)
        self._program.start()

    def _command(self, port: int, spare: int, directory: Path) -> list[str | Path]:
        """Return what to run. Raises Missing where that is not here."""
        raise NotImplementedError

    def _port(self) -> int:
        return self._program.port

    def stop(self) -> None:
        super().stop()
        if self.keeps_mail:
            self._program.stop()

    def start_again(self) -> None:
        if self.keeps_mail:
            self._program.start()
        super().start_again()


class PymapPeer(LightPeer):
    key = "pymap"
    line_end = b"\n"
    keeps_mail = True
    distribution = "pymap"

    def _command(self, port: int, spare: int, directory: Path) -> list[str | Path]:
        salt = b"0123456789abcdef"
        # Few rounds, because each connection pays for them.
        digest = hashlib.pbkdf2_hmac("sha256", self.password.encode(), salt, 1000)
        coded = "$".join(base64.b64encode(part).decode() for part in (salt, digest))
        (directory / "pymap-etc-passwd").write_text(f"{self.name}:x::::mail:\n")
        (directory / "pymap-etc-shadow").write_text(f"{self.name}:$pbkdf2-sha256$1000${coded}:::::::\n")
        return [
            installed("pymap"), "--host", "127.0.0.1", "--port", str(port), "--no-tls", "maildir", directory,
        ]  # fmt: skip


class MailDevelPeer(LightPeer):
    key = "mail-devel"
    distribution = "mail_devel"

    def _command(self, port: int, spare: int, directory: Path) -> list[str | Path]:
        return [
            installed("mail_devel"), "--host", "127.0.0.1", "--no-http",
            "--imap-port", str(port), "--smtp-port", str(spare),
            "--user", self.name, "--password", self.password,
        ]  # fmt: skip


class TwistedPeer(LightPeer):
    key = "twisted"
    distribution = "twisted"

    def _command(self, port: int, spare: int, directory: Path) -> list[str | Path]:
        return [installed("python"), _PROGRAMS / "twisted_imap4.py", str(port), self.name, self.password]


class GoImapPeer(LightPeer):
    key = "go-imap"
    name = "username"
    password = "password"

    @property
    def title(self) -> str:
        return f"go-imap {(GO_SERVER.parent / 'version').read_text().strip()}"

    def _command(self, port: int, spare: int, directory: Path) -> list[str | Path]:
        if not GO_SERVER.exists():
            raise Missing("it could not be built: the Go packages of Debian are not here")
        return [GO_SERVER, f"127.0.0.1:{port}"]


def installed(program: str) -> Path:
    """Return the path of a program of `PYTHON`. Raises Missing where it is not there."""
    if not (PYTHON / "stamp").exists():
        raise Missing(
            "the packages of tests/support/servers/programs/requirements.txt could not be installed"
        )
    return PYTHON / "bin" / program
