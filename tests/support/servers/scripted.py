"""A small IMAP server over TLS that says what a test wants it to say, and misbehaves where it is told to.

It knows just enough of RFC 3501 for a client to log in, list, and fetch from one mailbox, INBOX. Each
connection has a thread; a test and the script share no lock, so a script waits for events only.
"""

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType

from tests.support.servers.account import Dependents
from tests.support.servers.tls import CertificateAuthority

Script = Callable[[bytes, bytes], Iterable[bytes] | None]
"""Given tag and command line: what to send instead of the usual answer, piece by piece; None for that."""

DEADLINE = 60.0
_LITERAL = re.compile(rb"\{(\d+)(\+?)\}\Z")


class HangUp(Exception):
    """Raised by a script: the connection is closed without a word."""


class Scripted:
    """A running server while the ``with`` block lasts; any password will do for any user.

    ``messages`` have the UIDs 1, 2, ... and the sizes that ``claim`` makes of them. ``script`` sees each
    command first and may be replaced at any time; what it answers to AUTHENTICATE is the whole answer.
    ``capabilities`` is what CAPABILITY says. ``greeting`` is the first line, without its end; None for one
    that announces the same. ``before_tls`` is called with each connection and its number, from 1, and may
    close it. ``plain`` starts in cleartext, until a client says STARTTLS and is not answered with NO or BAD.
    ``prepare`` may change the server's settings of TLS. ``store`` makes the message of what is appended. A
    script sees the literal of a command after its line.
    """

    host = "localhost"

    def __init__(
        self,
        authority: CertificateAuthority,
        messages: Sequence[bytes] = (),
        *,
        claim: Callable[[bytes], int] = len,
        script: Script = lambda tag, command: None,
        greeting: bytes | None = None,
        capabilities: bytes = b"IMAP4rev1 AUTH=PLAIN",
        before_tls: Callable[[socket.socket, int], object] = lambda connection, number: None,
        plain: bool = False,
        prepare: Callable[[ssl.SSLContext], object] = lambda context: None,
        store: Callable[[bytes], bytes] = lambda content: content,
    ) -> None:
        self.authority = authority
        self.dependents = Dependents()
        self.messages = list(messages)
        self.claim = claim
        self.script = script
        self.greeting = greeting
        self.capabilities = capabilities
        self.before_tls = before_tls
        self.plain = plain
        self._prepare = prepare
        self.store = store
        self.accepted = 0
        """Connections so far."""
        self.commands: list[bytes] = []
        """What was said by clients, without tags, in the order of arrival."""
        self.closing = threading.Event()
        """Set at the end: what a script waits for that never answers."""
        self.name = "alice"
        self.password = "secret"
        self.port = 0
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []

    @property
    def server(self) -> "Scripted":
        """The account is the server: it has only one."""
        return self

    def __enter__(self) -> "Scripted":
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*self.authority.issue())
        self._prepare(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self.dependents.__exit__(kind, error, where)
        finally:
            self._end()

    def _end(self) -> None:
        self.closing.set()
        # Only this wakes a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE)
        for connection in self._connections:
            connection.close()

    def hang(self) -> Iterator[bytes]:
        """For a script: never answer."""
        self.closing.wait()
        raise HangUp
        yield

    def then_hang_up(self, answer: bytes) -> Iterator[bytes]:
        """For a script: send ``answer`` and close the connection."""
        yield answer
        raise HangUp

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self.accepted += 1
            self._start(self._serve, connection, self.accepted)

    def _serve(self, plain: socket.socket, number: int) -> None:
        plain.settimeout(DEADLINE)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.before_tls(plain, number)
            connection = plain if self.plain else self._secured(plain)
        except OSError:
            return
        # HangUp, and whatever the client does to the connection.
        with contextlib.suppress(HangUp, OSError):
            greeting = self.greeting
            if greeting is None:
                greeting = b"* OK [CAPABILITY " + self.capabilities + b"] ready"
            connection.sendall(greeting + b"\r\n")
            if self._converse(connection):
                connection = self._secured(connection)
                self._converse(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def _secured(self, plain: socket.socket) -> ssl.SSLSocket:
        # Returns with the socket inside detached: the TLS socket is the one to close from now on.
        connection = self._context.wrap_socket(plain, server_side=True)
        self._connections.append(connection)
        return connection

    def _converse(self, connection: socket.socket) -> bool:
        """Answer commands until the client goes, or until it is to become TLS: then true."""
        with connection.makefile("rb") as lines:
            for line in lines:
                tag, _, command = line.rstrip(b"\r\n").partition(b" ")
                self.commands.append(command)
                if (literal := _LITERAL.search(command)) is not None:
                    if not literal[2]:
                        connection.sendall(b"+ go ahead\r\n")
                    command += b"\r\n" + lines.read(int(literal[1]))
                    lines.readline()
                answer = self.script(tag, command)
                usual = answer is None
                piece = b""
                for piece in self.answer(tag, command) if answer is None else answer:
                    connection.sendall(piece)
                if command.upper() == b"STARTTLS" and tag + b" OK" in piece:
                    return True
                if usual and command.upper().startswith(b"AUTHENTICATE"):
                    lines.readline()
                    connection.sendall(tag + b" OK logged in\r\n")
        return False

    def answer(self, tag: bytes, command: bytes) -> Iterator[bytes]:
        """Answer as a well-behaved server does."""
        verb = command.upper()
        if verb.startswith(b"AUTHENTICATE"):
            yield b"+ \r\n"
            return
        if verb.startswith(b"CAPABILITY"):
            yield b"* CAPABILITY " + self.capabilities + b"\r\n"
        elif verb.startswith(b"LIST"):
            yield b'* LIST (\\HasNoChildren) "/" INBOX\r\n'
        elif verb.startswith((b"SELECT", b"EXAMINE")):
            yield b"* %d EXISTS\r\n* OK [UIDVALIDITY 7] valid\r\n" % len(self.messages)
            yield b"* OK [UIDNEXT %d] next\r\n" % (len(self.messages) + 1)
            if b"OBJECTID" in self.capabilities:
                yield b"* OK [MAILBOXID (F7)] a name for ever\r\n"
        elif verb.startswith(b"STATUS"):
            count = len(self.messages)
            yield b"* STATUS INBOX (MESSAGES %d UIDNEXT %d UIDVALIDITY 7 UNSEEN 0)\r\n" % (count, count + 1)
        elif verb.startswith(b"UID FETCH"):
            _, _, uid_set, items = verb.split(b" ", 3)
            for uid in self.uids(uid_set):
                yield self.fetch(uid, items)
        elif verb.startswith(b"UID SEARCH"):
            # By UID or by number, which are the same here.
            found = self.uids(verb.split(b" ")[-1])
            yield b" ".join([b"* SEARCH", *(b"%d" % uid for uid in found)]) + b"\r\n"
        elif verb.startswith(b"APPEND"):
            self.messages.append(self.store(command.split(b"\r\n", 1)[1]))
        elif not verb.startswith((b"NOOP", b"LOGIN", b"LOGOUT", b"CLOSE", b"ENABLE", b"STARTTLS")):
            yield tag + b" BAD unknown\r\n"
            return
        yield tag + b" OK done\r\n"

    def fetch(self, uid: int, items: bytes) -> bytes:
        """Return the FETCH response for one message with those of ``items`` that there are."""
        content = self.messages[uid - 1]
        parts = [b"UID %d" % uid]
        if b"FLAGS" in items:
            parts.append(b"FLAGS ()")
        if b"INTERNALDATE" in items:
            parts.append(b'INTERNALDATE "20-Nov-2026 10:00:00 +0000"')
        if b"RFC822.SIZE" in items:
            parts.append(b"RFC822.SIZE %d" % self.claim(content))
        if b"EMAILID" in items:
            parts.append(b"EMAILID (M%d)" % uid)
        if b"X-GM-MSGID" in items:
            parts.append(b"X-GM-MSGID %d" % (1278455344230334864 + uid))
        if b"BODY.PEEK[HEADER" in items:
            header = (
                b"".join(re.findall(rb"(?mi)^(?:From|To|Subject|Date|Message-ID):.*\r\n", content)) + b"\r\n"
            )
            parts.append(
                b"BODY[HEADER.FIELDS (FROM TO SUBJECT DATE MESSAGE-ID)] {%d}\r\n%s" % (len(header), header)
            )
        if b"BODY.PEEK[]" in items:
            parts.append(b"BODY[] {%d}\r\n%s" % (len(content), content))
        return b"* %d FETCH (%s)\r\n" % (uid, b" ".join(parts))

    def uids(self, uid_set: bytes) -> list[int]:
        """Return the UIDs of a set that there are."""
        last = len(self.messages)
        found: set[int] = set()
        for piece in uid_set.split(b","):
            ends = [last if end == b"*" else int(end) for end in piece.split(b":")]
            found |= set(range(min(ends), max(ends) + 1))
        return sorted(uid for uid in found if 1 <= uid <= last)
