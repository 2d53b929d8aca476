"""A private Courier-IMAP, the second real server: without MOVE, LITERAL+, CONDSTORE, all below ``INBOX.``

Unlike Dovecot it cannot be run whole by an ordinary user, since the paths of its configuration and of its
authentication socket are compiled in. But those matter only until the login: TLS, greeting and login are done
here, and each session is then a real ``imapd``, started in the way Courier's own login program starts it.

It is not installed, because the packages conflict with Dovecot's: ``set_up_second_server`` in
``scripts/setup.sh`` unpacks it.
"""

import asyncio
import base64
import binascii
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.support.servers.account import DEADLINE, Dependents, ImapAccount, run_as
from tests.support.servers.loop import BUFFER, LoopThread, Port, abort, accept, accept_tls, server_context
from tests.support.servers.process import copy_programs, server_user
from tests.support.servers.tls import CertificateAuthority

UNPACKED = Path(__file__).parents[3] / ".servers" / "courier"
"""The packages; nothing is run from here, because the user that the server runs as may not get here."""

MAILBOXES = ("Drafts", "Sent", "Trash", "Junk")
"""Mailboxes that every account has beside INBOX; nothing but the names says what they are for."""

_CAPABILITY = (
    "IMAP4rev1 UIDPLUS CHILDREN NAMESPACE THREAD=ORDEREDSUBJECT THREAD=REFERENCES SORT QUOTA IDLE AUTH=PLAIN"
)
_LINE_END = re.compile(rb"\r?\n")


class Courier:
    """A running server while the ``with`` block lasts; any user name is accepted with ``password``.

    ``quota`` is the limit of each account in bytes. ``certificate`` (with its key) replaces the valid one for
    localhost and 127.0.0.1. IDLE tells of a change within seconds.

    Raises RuntimeError where it is not unpacked or does not start.
    """

    host = "localhost"
    separator = "."
    prefix = "INBOX."

    def __init__(
        self,
        authority: CertificateAuthority,
        *,
        certificate: tuple[Path, Path] | None = None,
        password: str = "secret",
        quota: int | None = None,
    ) -> None:
        self.authority = authority
        self.dependents = Dependents()
        self.password = password
        self.port = 0
        user = server_user()
        self.uid = user.pw_uid
        self.gid = user.pw_gid
        self._tls = server_context(certificate or authority.issue())
        self._quota = quota
        self._sessions: set[subprocess.Popen[bytes]] = set()
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Courier":
        if not (UNPACKED / "stamp").exists():
            raise RuntimeError(f"Courier-IMAP is not in {UNPACKED}: run scripts/test, which puts it there")
        # Not TMPDIR: one of root's may be closed to "nobody".
        self.directory = Path(tempfile.mkdtemp(prefix="imapfs-courier-", dir="/tmp"))
        try:
            self._prepare()
            self._start_watcher()
        except BaseException:
            self._stop_watcher()
            shutil.rmtree(self.directory)
            raise
        self._port = Port()
        self.port = self._port.number
        self._thread = LoopThread("courier")
        self._listener = self._port.listen()
        self._thread.run(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self.dependents.__exit__(kind, error, where)
        finally:
            self._end()

    def _end(self) -> None:
        try:
            self._thread.close()
        finally:
            # Those whose waiting was cut off by the end of the loop.
            for process in list(self._sessions):
                _reap(process)
            self._listener.close()
            self._port.close()
            self._stop_watcher()
            shutil.rmtree(self.directory)

    def account(self, name: str) -> "CourierAccount":
        """Return the account of the user ``name``."""
        return CourierAccount(self, name)

    def log_lines(self) -> list[str]:
        """Return the lines that the sessions have logged so far, of every severity."""
        return (self.directory / "log").read_text(errors="replace").splitlines()

    def processes(self) -> list[int]:
        """Return the ids of the processes of this instance that run: one for each session, and one more."""
        running = [*self._sessions] + ([self._watcher] if self._watcher else [])
        return [process.pid for process in running if process.poll() is None]

    def own(self, path: Path) -> None:
        """Give ``path`` to the user that the server runs as."""
        if os.geteuid() != self.uid:
            os.chown(path, self.uid, self.gid)

    def _prepare(self) -> None:
        for path in (self.directory, self.directory / "mail", self.directory / "bin"):
            path.mkdir(mode=0o755, exist_ok=True)
            path.chmod(0o755)
            self.own(path)
        programs = [UNPACKED / "usr/bin/imapd", *UNPACKED.glob("usr/**/gam_server")]
        copy_programs(programs, UNPACKED, self.directory / "bin")
        (self.directory / "log").touch()

    def _start(self, *command: str, **environment: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        user = environment.get("AUTHENTICATED")
        with (self.directory / "log").open("ab") as log, theirs:
            process = subprocess.Popen(
                [str(self.directory / "bin" / command[0]), *command[1:]],
                cwd=self.directory / "mail" / user if user else self.directory,
                env={
                    "PATH": "/usr/bin:/bin",
                    "LC_ALL": "C.UTF-8",
                    "LD_LIBRARY_PATH": str(self.directory / "bin"),
                    # In the name of the socket on which imapd and gam_server meet.
                    "GAM_CLIENT_ID": self.directory.name,
                    **environment,
                },
                **run_as(self.uid, self.gid),
                start_new_session=True,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=log,
            )
        return process, ours

    def _start_watcher(self) -> None:
        """Start what tells imapd of changes in a Maildir; without it each IDLE first waits for seconds.

        Later versions of Courier do without, and have no such program.
        """
        if not (self.directory / "bin" / "gam_server").exists():
            return
        # It looks each second. Told by the kernel it would lose changes that follow soon upon others.
        (self.directory / ".gaminrc").write_text(f"poll {self.directory}/*\n")
        self._watcher, connection = self._start(
            "gam_server", "--notimeout", self.directory.name, HOME=str(self.directory)
        )
        connection.close()
        deadline = time.monotonic() + DEADLINE
        while f"-{self.directory.name}" not in Path("/proc/net/unix").read_text():
            if self._watcher.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("\n".join(["Courier's gam_server did not start", *self.log_lines()]))
            time.sleep(0.005)

    def _stop_watcher(self) -> None:
        if self._watcher:
            self._watcher.kill()
            self._watcher.wait()

    async def _listen(self) -> None:
        self._thread.spawn(self._accept())

    async def _accept(self) -> None:
        while True:
            connection = await accept(self._listener)
            self._thread.spawn(self._serve(connection), owned=connection)

    async def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, asyncio.IncompleteReadError), connection:
            reader, writer = await accept_tls(connection, self._tls)
            try:
                if login := await _Login(reader, writer, self.password).run():
                    await self._session(reader, writer, *login)
                await writer.drain()
            finally:
                await abort(writer)

    async def _session(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tag: str, user: str
    ) -> None:
        self.account(user).make()
        quota = {} if self._quota is None else {"MAILDIRQUOTA": f"{self._quota}S"}
        process, ours = self._start(
            "imapd",
            "Maildir",
            AUTHENTICATED=user,
            HOME=str(self.directory / "mail" / user),
            MAILDIR="Maildir",
            IMAPLOGINTAG=tag,
            PROTOCOL="IMAP",
            TCPREMOTEIP="127.0.0.1",
            # Without a port imapd ends at once and says nothing.
            TCPREMOTEPORT="1",
            IMAP_TLS="1",
            IMAP_STARTTLS="NO",
            IMAP_CAPABILITY=_CAPABILITY.removesuffix(" AUTH=PLAIN"),
            IMAP_ACL="1",
            IMAP_KEYWORDS="1",
            IMAP_USELOCKS="1",
            IMAP_ENHANCEDIDLE="1",
            **quota,
        )
        self._sessions.add(process)
        try:
            session_reader, session_writer = await asyncio.open_connection(sock=ours, limit=BUFFER)
            pumps = [
                asyncio.create_task(_pump(reader, session_writer)),
                asyncio.create_task(_pump(session_reader, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                # Before anything that waits: the server may be closed at that moment.
                await abort(session_writer)
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            # Only then: if this is cancelled here, the end of the server still has to wait for it.
            await asyncio.to_thread(_reap, process)
            self._sessions.discard(process)


class CourierAccount(ImapAccount):
    """One user of a `Courier`.

    It keeps LF where it sends CRLF, so `deliver` makes LF of CRLF. A bare LF is therefore sent as CRLF, and
    a CR at the very end is not sent; `append` also drops bare CRs and adds a missing final newline.
    """

    server: Courier

    def __init__(self, server: Courier, name: str) -> None:
        super().__init__(server, name)
        self._maildir = server.directory / "mail" / name / "Maildir"

    def make(self) -> None:
        """Make INBOX and `MAILBOXES` where they are missing, as a login does."""
        for mailbox in ("INBOX", *MAILBOXES):
            self._mailbox_directory(mailbox)

    def _mailbox_directory(self, mailbox: str) -> Path:
        self._make(self._maildir.parent)
        self._make(self._maildir)
        directory = self._maildir
        if mailbox != "INBOX":
            # Unlike in the protocol, and unlike Dovecot, a name is UTF-8 here.
            directory = self._maildir / f".{mailbox.replace('/', '.')}"
            self._make(directory)
            mark = directory / "maildirfolder"
            mark.touch(mode=0o600)
            self.server.own(mark)
        for part in ("tmp", "new", "cur"):
            self._make(directory / part)
        return directory

    def _as_stored(self, content: bytes) -> tuple[bytes, str]:
        return content.replace(b"\r\n", b"\n"), ""


class _Login:
    """The part of a connection that in Courier is not imapd's either: from the greeting to the login."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, password: str) -> None:
        self._reader = reader
        self._writer = writer
        self._password = password

    async def run(self) -> tuple[str, str] | None:
        """Return the tag, which imapd will answer, and the user; None if the client left.

        Raises OSError or asyncio.IncompleteReadError where the connection ends.
        """
        self._say(f"* OK [CAPABILITY {_CAPABILITY}] Courier-IMAP ready.")
        while True:
            tag, verb, arguments = (await self._command()).groups()
            match verb.upper():
                case "CAPABILITY":
                    self._say(f"* CAPABILITY {_CAPABILITY}")
                    self._say(f"{tag} OK CAPABILITY completed")
                case "NOOP":
                    self._say(f"{tag} OK NOOP completed")
                case "LOGOUT":
                    self._say("* BYE Courier-IMAP server shutting down")
                    self._say(f"{tag} OK LOGOUT completed")
                    return None
                case "LOGIN" | "AUTHENTICATE" as how:
                    given = await (
                        self._plain(arguments) if how == "AUTHENTICATE" else self._login(arguments)
                    )
                    # The user becomes the name of a directory.
                    if given and given[1] == self._password and re.fullmatch(r"[\w@+-][\w@.+-]*", given[0]):
                        return tag, given[0]
                    self._say(f"{tag} NO Login failed." if given else f"{tag} NO Error in IMAP command.")
                case _:
                    self._say(f"{tag} NO Error in IMAP command received by server.")

    def _say(self, line: str) -> None:
        self._writer.write(line.encode() + b"\r\n")

    async def _line(self) -> str:
        return _LINE_END.sub(b"", await self._reader.readuntil(b"\n")).decode(errors="replace")

    async def _command(self) -> re.Match[str]:
        while not (command := re.fullmatch(r"(\S+) (\S+) ?(.*)", line := await self._line())):
            self._say(f"{line.partition(' ')[0] or '*'} NO Error in IMAP command received by server.")
        return command

    async def _plain(self, mechanism: str) -> tuple[str, str] | None:
        """Read user and password (RFC 4616); None where it is another mechanism or malformed."""
        if mechanism.upper() != "PLAIN":
            return None
        self._say("+ ")
        try:
            _, user, password = base64.b64decode(await self._line(), validate=True).decode().split("\0")
        except (binascii.Error, ValueError):
            return None
        return user, password

    async def _login(self, arguments: str) -> tuple[str, str] | None:
        """Read two astrings (RFC 3501 section 6.2.3); None where there are not two."""
        found = []
        for _ in range(2):
            if literal := re.fullmatch(r"\{(\d+)\}", arguments):
                self._say("+ OK")
                found.append((await self._reader.readexactly(int(literal[1]))).decode(errors="replace"))
                arguments = (await self._line()).lstrip(" ")
            elif quoted := re.match(r'"((?:[^"\\]|\\.)*)" ?', arguments):
                found.append(re.sub(r"\\(.)", r"\1", quoted[1]))
                arguments = arguments[quoted.end() :]
            elif atom := re.match(r"([^\s\"{]+) ?", arguments):
                found.append(atom[1])
                arguments = arguments[atom.end() :]
        return (found[0], found[1]) if len(found) == 2 and not arguments else None


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(BUFFER):
            writer.write(data)
            await writer.drain()


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for a session to end, as it does when its connection has ended."""
    try:
        process.wait(DEADLINE / 4)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
