"""One IMAP connection: bytes out, responses in, every wait bounded.

IMAPClient makes the connection and reads the greeting; from then on this module uses the socket itself. A
generic parser takes most of a listing's time, buffers whole responses, files FETCH data without a UID under
the sequence number, bounds each ``recv`` but not a command, and reports a connection that ends during the
login as a wrong password. The only module that knows IMAPClient.

Theory of operation. A command is sent, possibly several at once (pipelining, RFC 9051 section 5.5), then
responses are read until each has its tagged completion. A response is a list of parts that alternate between
text and literal, so that no text can be mistaken for a literal's content. A large literal can be streamed to
a sink instead of being kept. After anything but a tagged OK, NO or BAD the connection is of no further use:
``alive`` turns false and the owner throws the object away. One thread at a time; ``abort`` alone may be
called from another.
"""

import base64
import contextlib
import mmap
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol

import imapclient
from imapclient import tls

from imapfs.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ProtocolError,
    Refused,
    TimedOut,
    TlsError,
)
from imapfs.imap.grammar import number
from imapfs.model import Account, Secret

MAX_LINE: Final = 8 << 20
"""Longest accepted run of bytes without a line end."""
MAX_LITERAL: Final = 16 << 20
"""Longest literal kept in memory; longer ones are accepted only by a sink."""
_RECV: Final = 256 << 10
_PROGRESS: Final = 64 << 10
"""Bytes of a literal that count as progress and renew the deadline, so that a trickle does not."""

_DEAD_AFTER: Final = 10
"""Seconds without an acknowledgement after which what was sent counts as lost: a network that forgot the
connection says nothing, and the program that asked should not wait for the whole timeout to learn it."""
_IDLE_PROBE: Final = 60
"""Seconds after which an idle connection is probed, so that address translators do not forget it."""
_SPARE_FETCHES: Final = 1000
"""Unsolicited FETCH responses that a command may meet, beyond the messages that there are."""

_LITERAL = re.compile(rb"\{(\d+)\}\r?\n\Z")
_EXISTS = re.compile(rb"\* (\d{1,10}) EXISTS\b", re.I)
_HUMAN = re.compile(rb"\* (?:OK|NO|BAD|BYE|PREAUTH)\b", re.I)
"""Responses that end in text for people, in which nothing is a literal (RFC 9051 section 7.1)."""
_STATUS = re.compile(rb"(OK|NO|BAD|BYE|PREAUTH)(?: \[([A-Za-z0-9-]+)([^\]\r\n]*)\])?[ ]?([^\r\n]*)", re.I)
_QUOTABLE = re.compile(rb"[\x01-\x09\x0b\x0c\x0e-\x7f]*\Z")


class Sink(Protocol):
    """Takes a literal piece by piece."""

    def write(self, data: bytes, /) -> object: ...


Buffer = bytes | mmap.mmap


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes to be sent as a literal within a command (RFC 9051 section 4.3)."""

    data: Buffer


Part = bytes | Literal
Command = Sequence[Part]
"""A command without its tag and line end."""

Response = list[bytes]
"""Text, literal, text, literal, ..., text: always an odd number of parts; a streamed literal is b""."""

SinkFor = Callable[[Response, int], Sink | None]
"""Given a response's parts so far and the size of the literal that follows: where to stream it, or None."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A status response: ``code`` in upper case, ``argument`` what follows it in the brackets."""

    status: str
    code: str
    argument: bytes
    text: str

    @classmethod
    def parse(cls, line: bytes) -> "Completion | None":
        m = _STATUS.match(line)
        if not m:
            return None
        status, code, argument, text = m.groups()
        return cls(
            status.decode().upper(),
            (code or b"").decode().upper(),
            (argument or b"").strip(),
            text.decode("utf-8", "replace").strip(),
        )


def astring(value: bytes) -> Part:
    """``value`` as a quoted string, or as a literal where it cannot be quoted (RFC 9051 section 4.3)."""
    if _QUOTABLE.match(value):
        return b'"' + value.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
    return Literal(value)


class _Ended(Exception):
    """The stream gives no more: ``error`` is what the socket said, EOFError for the end of the connection.

    A class of its own so that an OSError of a sink, whose disk may be full, is not taken for one.
    """

    def __init__(self, error: OSError | EOFError) -> None:
        super().__init__(str(error))
        self.error = error


class _Stream:
    """A socket with a read buffer and one deadline over many reads. Every method may raise _Ended."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.sock = sock
        self.timeout = timeout
        self._buffer = b""
        self._at = 0
        self._deadline = 0.0
        self.renew()

    def renew(self) -> None:
        """Allow another ``timeout`` seconds from now."""
        self._deadline = time.monotonic() + self.timeout

    def _receive(self) -> bytes:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise _Ended(TimeoutError())
        try:
            self.sock.settimeout(left)
            data = self.sock.recv(_RECV)
        except OSError as error:
            raise _Ended(error) from None
        if not data:
            raise _Ended(EOFError())
        return data

    def readline(self) -> bytes:
        """One line with its end. Raises also ProtocolError."""
        end = self._buffer.find(b"\n", self._at)
        if end < 0:
            pieces = [self._buffer[self._at :]]
            held = len(pieces[0])
            while True:
                data = self._receive()
                cut = data.find(b"\n")
                if cut >= 0:
                    break
                pieces.append(data)
                held += len(data)
                if held > MAX_LINE:
                    raise ProtocolError("the server sent a line without an end")
            pieces.append(data[: cut + 1])
            self._buffer, self._at = data, cut + 1
            return b"".join(pieces)
        line = self._buffer[self._at : end + 1]
        self._at = end + 1
        return line

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes."""
        end = self._at + size
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        pieces: list[bytes] = []
        self.pour(size, pieces.append)
        return b"".join(pieces)

    def pour(self, size: int, write: Callable[[bytes], object]) -> None:
        """Hand the next ``size`` bytes to ``write`` as they arrive."""
        since = 0
        while size:
            if self._at == len(self._buffer):
                self._buffer, self._at = self._receive(), 0
            data = self._buffer[self._at : self._at + size]
            self._at += len(data)
            size -= len(data)
            write(data)
            since += len(data)
            if since >= _PROGRESS:
                since = 0
                self.renew()

    def write(self, data: Buffer) -> None:
        """Send all of ``data``; the timeout counts anew for each piece that the network takes."""
        view = memoryview(data)
        try:
            for start in range(0, len(view), _PROGRESS):
                self.sock.settimeout(self.timeout)
                self.sock.sendall(view[start : start + _PROGRESS])
        except OSError as error:
            raise _Ended(error) from None
        self.renew()


@contextlib.contextmanager
def _as_the_socket_said() -> Iterator[None]:
    try:
        yield
    except _Ended as ended:
        raise ended.error from None


class _Imap4(tls.IMAP4_TLS):  # type: ignore[misc]  # IMAPClient is not annotated
    """imaplib's connection reading through `_Stream`, so that the greeting is bounded like what follows."""

    stream: _Stream

    def open(self, host: str = "", port: int = 993, timeout: float | None = None) -> None:  # noqa: ARG002
        # imaplib calls this from its constructor, without the timeout that was given to ours.
        self.host, self.port = host, port
        self.sock = self._create_socket(self._timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_PROBE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _DEAD_AFTER)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_AFTER * 1000)
        self.stream = _Stream(self.sock, self._timeout)

    # imaplib knows the socket's own exceptions.

    def read(self, size: int) -> bytes:
        with _as_the_socket_said():
            return self.stream.read(size)

    def readline(self) -> bytes:
        try:
            with _as_the_socket_said():
                return self.stream.readline()
        except EOFError:
            return b""  # imaplib's own sign for the end of the connection

    def send(self, data: bytes) -> None:
        with _as_the_socket_said():
            self.stream.write(data)

    def shutdown(self) -> None:
        self.sock.close()


class _Client(imapclient.IMAPClient):  # type: ignore[misc]  # IMAPClient is not annotated
    def _create_IMAP4(self) -> _Imap4:  # noqa: N802  # IMAPClient's name
        return _Imap4(self.host, self.port, self.ssl_context, self._timeout.read)

    def _set_read_timeout(self) -> None:
        """The stream bounds every read itself."""


def tls_context(account: Account) -> ssl.SSLContext:
    """TLS 1.2 or newer, full verification against the system's store or the account's CA file."""
    try:
        context = ssl.create_default_context(cafile=str(account.ca_file) if account.ca_file else None)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or "it holds no certificate in PEM form"
        raise TlsError(f"cannot use the CA file {account.ca_file}: {reason}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


_NOT_NOW: Final = frozenset({"INUSE", "LIMIT", "SERVERBUG", "THROTTLED", "UNAVAILABLE"})
_HIDDEN: Final = "(its answer repeats the password and is not shown)"


class Wire:
    """A logged-in connection. Every method raises ConnectionLost (or a subclass) when it is no more."""

    def __init__(self, client: Any, account: Account) -> None:
        self._client = client
        self._stream: _Stream = client._imap.stream
        self._account = account
        self._tag = 0
        self._bye = ""
        self._exists = 0
        """Messages in the selected mailbox, by the server's word."""
        self._renewals = _SPARE_FETCHES
        self.alive = True
        self.greeting_capabilities: frozenset[str] = frozenset()

    @classmethod
    def connect(cls, account: Account, password: Secret, context: ssl.SSLContext, timeout: float) -> "Wire":
        """Connect, verify, log in. ``timeout`` in seconds bounds each step.

        Raises TlsError, AuthenticationFailed, TimedOut, ConnectionLost.
        """
        where = f"{account.host}:{account.port}"
        try:
            client = _Client(account.host, account.port, ssl=True, ssl_context=context, timeout=timeout)
        except Exception as error:
            raise _connect_error(error, where, account.host, timeout) from None
        wire = cls(client, account)
        try:
            wire._login(password)
        except BaseException:
            wire.close()
            raise
        return wire

    def _login(self, password: Secret) -> None:
        """Log in and learn the capabilities. Raises AuthenticationFailed, ConnectionLost."""
        host, user = self._account.host, self._account.user
        try:
            completion = self._offer(password)
        except ProtocolError:
            # What it sent is not shown: it may be a part of the command, with the password.
            raise ProtocolError(f"{host} answered the login with what is not IMAP") from None
        except ConnectionLost as error:
            if _repeats(str(error), user, password):
                raise ConnectionLost(f"{host} closed the connection: {_HIDDEN}") from None
            raise
        words = completion.text or completion.status
        if _repeats(words, user, password):
            words = _HIDDEN
        # RFC 5530: these codes say that the credentials were not even looked at; nor were they for BAD.
        if completion.status == "BAD" or completion.code in _NOT_NOW:
            raise ConnectionLost(f"{host} does not let {user} in now: {words}")
        if completion.status != "OK":
            code = f"[{completion.code}] " if completion.code else ""
            raise AuthenticationFailed(f"{host} refused the password of {user}: {code}{words}")

    def _offer(self, password: Secret) -> Completion:
        """The answer to a login by the best way that the server offers; also learn its capabilities."""
        host, user = self._account.host, self._account.user
        self._stream.renew()
        announced = b""

        def take(response: Response) -> None:
            nonlocal announced
            if response[0][:13].upper() == b"* CAPABILITY ":
                announced = response[0][13:]
            elif response[0][:16].upper() == b"* OK [CAPABILITY":
                announced = response[0][16:].partition(b"]")[0]

        offered = {_upper(c) for c in self._client.capabilities()}
        # LOGIN takes ASCII only; SASL PLAIN carries any UTF-8 (RFC 4616).
        if "AUTH=PLAIN" in offered:
            plain = base64.b64encode(f"\0{user}\0{password.reveal()}".encode())
            completion = self._authenticate(b"PLAIN", plain, take)
        elif "LOGINDISABLED" in offered:
            raise AuthenticationFailed(
                f"{host} offers no login with a password; it may want OAuth or an app password"
            )
        elif not (user + password.reveal()).isascii():
            raise AuthenticationFailed(
                f"{host} takes only ASCII names and passwords (no AUTH=PLAIN): change the password there"
            )
        else:
            command = (b"LOGIN ", astring(user.encode()), b" ", astring(password.reveal().encode()))
            (completion,) = self.execute_all([command], on_response=take)
        if completion.status == "OK":
            if completion.code == "CAPABILITY":
                announced = completion.argument
            elif not announced:
                self.execute_all([(b"CAPABILITY",)], on_response=take)
            self.greeting_capabilities = frozenset(_upper(c) for c in announced.split())
        return completion

    def _authenticate(
        self, mechanism: bytes, answer: bytes, handle: Callable[[Response], None]
    ) -> Completion:
        """AUTHENTICATE with the one ``answer`` that a simple mechanism has (RFC 9051 section 6.2.2)."""
        tag = self._next_tag()
        done: dict[bytes, Completion] = {}
        with self._breaking():
            self._stream.write(tag + b" AUTHENTICATE " + mechanism + b"\r\n")
            answers = iter((answer,))
            while tag not in done:
                if self._read_response(handle, None, done):
                    # Whatever else the server wants to know, it is told that there is no more.
                    self._stream.write(next(answers, b"*") + b"\r\n")
        return done[tag]

    def execute(
        self,
        *command: Part,
        on_response: Callable[[Response], None] | None = None,
        sink_for: SinkFor | None = None,
    ) -> Completion:
        """Run one command; raises Refused for NO and BAD."""
        completion = self.execute_all([command], on_response=on_response, sink_for=sink_for)[0]
        self.check(command, completion)
        return completion

    def execute_all(
        self,
        commands: Sequence[Command],
        *,
        on_response: Callable[[Response], None] | None = None,
        sink_for: SinkFor | None = None,
    ) -> list[Completion]:
        """Run commands in one round trip; untagged responses of all of them go to ``on_response``.

        Each completion is for the caller to `check`. An exception from a callback leaves the connection in
        the middle of a response: it is then not alive any more.
        """
        handle = on_response or (lambda _: None)
        done: dict[bytes, Completion] = {}
        with self._breaking():
            self._stream.renew()
            self._allow_fetches()
            tags = [self._send(command, handle, done) for command in commands]
            while not all(tag in done for tag in tags):
                self._read_response(handle, sink_for, done)
        return [done[tag] for tag in tags]

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """After any exception the connection is in the middle of something: it is not alive any more."""
        try:
            yield
        except BaseException as error:
            self.alive = False
            if isinstance(error, _Ended):
                self._fail(error.error)
            raise

    def _allow_fetches(self) -> None:
        """Allow each message, and some changes beside, to renew the deadline during this command.

        So a listing may take as long as it goes on, but a server cannot keep a command alive for ever.
        """
        self._renewals = 2 * self._exists + _SPARE_FETCHES

    def _next_tag(self) -> bytes:
        self._tag += 1
        return b"f%d" % self._tag

    def _send(
        self, command: Command, handle: Callable[[Response], None], done: dict[bytes, Completion]
    ) -> bytes:
        tag = self._next_tag()
        out = bytearray(tag + b" ")
        for part in command:
            if isinstance(part, bytes):
                out += part
                continue
            # LITERAL- allows non-synchronising literals up to 4096 bytes (RFC 7888 section 5).
            plus = "LITERAL+" in self.greeting_capabilities or (
                "LITERAL-" in self.greeting_capabilities and len(part.data) <= 4096
            )
            out += b"{%d%s}\r\n" % (len(part.data), b"+" if plus else b"")
            if not plus:
                self._stream.write(bytes(out))
                out.clear()
                while not self._read_response(handle, None, done):
                    if tag in done:
                        return tag  # refused before the literal was sent
            if len(part.data) > _PROGRESS:
                self._stream.write(bytes(out))
                out.clear()
                self._stream.write(part.data)
            else:
                out += part.data
        self._stream.write(bytes(out) + b"\r\n")
        return tag

    def _read_response(
        self,
        handle: Callable[[Response], None],
        sink_for: SinkFor | None,
        done: dict[bytes, Completion],
    ) -> bool:
        """Read one response and file it; true if it was a continuation request."""
        stream = self._stream
        line = stream.readline()
        if line[:1] == b"+":
            return True
        if line[:2] != b"* ":
            tag, _, rest = line.partition(b" ")
            completion = Completion.parse(rest)
            if completion is None or not tag:
                raise ProtocolError(f"{self._account.host} sent what is not IMAP: {line[:80]!r}")
            done[tag] = completion
            return False
        response: Response = []
        human = _HUMAN.match(line)
        while not human and (m := _LITERAL.search(line, max(0, len(line) - 24))):
            response.append(line[: m.start()])
            size = number(m.group(1))
            sink = sink_for(response, size) if sink_for else None
            if sink is not None:
                stream.pour(size, sink.write)
                response.append(b"")
            elif size > MAX_LITERAL:
                raise ProtocolError(f"{self._account.host} announced {size} bytes where a few were expected")
            else:
                response.append(stream.read(size))
            line = stream.readline()
        response.append(line)
        if b" FETCH " in response[0][:24]:
            self._renewals -= 1
            if self._renewals > 0:
                stream.renew()
        elif m := _EXISTS.match(line):
            self._exists = int(m[1])
            self._allow_fetches()
        elif line[:6].upper() == b"* BYE ":
            self._bye = line[6:].decode("utf-8", "replace").strip()
        handle(response)
        return False

    def check(self, command: Command, completion: Completion) -> None:
        """Raise Refused unless ``completion`` is OK."""
        if completion.status == "OK":
            return
        first = command[0]
        verb = b" ".join(first.split()[:2]) if isinstance(first, bytes) else b"command"
        code = f" [{completion.code}]" if completion.code else ""
        words = completion.text or completion.status
        raise Refused(
            f"{self._account.host} refused {verb.decode('ascii', 'replace')}:{code} {words}", completion.code
        )

    def _fail(self, error: OSError | EOFError) -> NoReturn:
        """Turn what ended the connection into an error of ours."""
        host = self._account.host
        # With an errno it is the kernel that gave up on the connection, long before.
        if isinstance(error, TimeoutError) and error.errno is None:
            raise TimedOut(f"{host} did not answer within {self._stream.timeout:g} s") from None
        if self._bye:
            raise ConnectionLost(f"{host} closed the connection: {self._bye}") from None
        if isinstance(error, ssl.SSLError) and error.reason:
            raise ConnectionLost(f"TLS to {host} broke: {_words(error.reason)}") from None
        detail = getattr(error, "strerror", None) or "the connection ended without a word"
        raise ConnectionLost(f"lost the connection to {host}: {detail}") from None

    def abort(self) -> None:
        """From any thread: end the connection at once, which wakes a thread that waits in it."""
        self.alive = False
        with contextlib.suppress(OSError):
            # Not SSLSocket's own shutdown, which would discard the TLS state under the reader's feet.
            socket.socket.shutdown(self._stream.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close without a word; safe to call twice."""
        self.alive = False
        with contextlib.suppress(OSError):
            self._stream.sock.close()


def _connect_error(error: Exception, where: str, host: str, timeout: float) -> ConnectionLost:
    match error:
        case ConnectionLost():
            return error
        case TimeoutError():
            return TimedOut(
                f"{where} did not answer within {timeout:g} s: check host, port and firewall"
                " (IMAP over TLS is usually port 993)"
            )
        case ssl.SSLCertVerificationError():
            return TlsError(
                f"the certificate of {host} does not verify: {error.verify_message};"
                " if you trust its issuer, name it with --ca-file"
            )
        case ssl.SSLError(reason=reason) if reason in {
            "WRONG_VERSION_NUMBER",
            "PACKET_LENGTH_TOO_LONG",
            "RECORD_LAYER_FAILURE",
            "HTTP_REQUEST",
        }:
            return TlsError(f"{where} does not speak TLS: use the server's IMAPS port, usually 993")
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return ConnectionLost(f"{where} hung up before there was a TLS connection: it may be too busy")
        case ssl.SSLError(reason=reason) if "ALERT" in (reason or ""):
            return ConnectionLost(f"{where} refuses a TLS connection: {_words(reason)}")
        case ssl.SSLError():
            return TlsError(f"no TLS connection to {where}: {_words(error.reason or str(error))}")
        case socket.gaierror():
            return ConnectionLost(f"the name {host} cannot be resolved: check its spelling and your network")
        case ConnectionRefusedError():
            return ConnectionLost(
                f"{where} refuses connections: check the port (IMAP over TLS is usually 993)"
            )
        case OSError():
            return ConnectionLost(f"cannot reach {where}: {error.strerror or error}")
        case _:
            # imaplib: the greeting was BYE, or no IMAP greeting at all.
            words = " ".join(str(error).split())[:200]
            return ConnectionLost(f"{where} did not greet as an IMAP server: {words or 'it hung up'}")


def _words(reason: str) -> str:
    """OpenSSL's name of an error, more readable."""
    return reason.replace("_", " ").lower()


def _upper(capability: bytes) -> str:
    return capability.decode("ascii", "replace").upper()


def _repeats(words: str, user: str, password: Secret) -> bool:
    """Whether ``words`` hold the password, in one of the forms in which it may have been sent."""
    secret = password.reveal()
    forms = {
        secret,
        secret.replace("\\", "\\\\").replace('"', '\\"'),
        base64.b64encode(f"\0{user}\0{secret}".encode()).decode(),
        base64.b64encode(secret.encode()).decode(),
    }
    # As a word of its own: a short password may well be a part of some other word.
    return any(form and re.search(rf"(?<!\w){re.escape(form)}(?!\w)", words) for form in forms)
