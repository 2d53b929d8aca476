"""One IMAP connection: bytes out, responses in, every wait bounded.

IMAPClient reads the greeting; from then on this module uses the socket itself. A generic parser takes most
of a listing's time, buffers whole responses, files FETCH data without a UID under the sequence number, bounds
each ``recv`` but not a command, and reports a connection that ends during the login as a wrong password. The
only module that knows IMAPClient.

Theory of operation. A command is sent, possibly several at once (pipelining, RFC 9051 section 5.5), then
responses are read until each has its tagged completion. A response is a list of parts that alternate between
text and literal, so that no text can be mistaken for a literal's content. A large literal can be streamed to
a sink instead of being kept. After anything but a tagged OK, NO or BAD the connection is of no further use:
``alive`` turns false and the owner throws the object away. One thread at a time; ``abort`` alone may be
called from another.
"""

import base64
import binascii
import contextlib
import errno
import imaplib
import math
import mmap
import re
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol

import imapclient

from imapfs.errors import (
    ConnectionLost,
    NetworkLost,
    ProtocolError,
    Refused,
    ServerBusy,
    Throttled,
    TimedOut,
    TlsError,
)
from imapfs.imap import connect, refusals
from imapfs.imap.grammar import number
from imapfs.imap.sasl import Mechanism
from imapfs.imap.throttle import asked_wait
from imapfs.imap.trace import Trace
from imapfs.model import Account

MAX_LINE: Final = 8 << 20
"""Longest accepted run of bytes without a line end."""
MAX_LITERAL: Final = 16 << 20
"""Longest literal kept in memory; longer ones are accepted only by a sink."""
_RECV: Final = 256 << 10
_PROGRESS: Final = 64 << 10
"""Bytes of a literal that count as progress and renew the deadline, so that a trickle does not."""

_BEFORE_LOGIN: Final = 256 << 10
"""Most bytes that a server may say before we are logged in."""
_CHALLENGES: Final = 10
"""Most challenges of one login."""
_LONGEST_CHALLENGE: Final = 64 << 10
"""Most bytes of one, in base64."""
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
    """A socket with a read buffer and one deadline over many reads.

    Every method may raise _Ended, and those that read ProtocolError. Until `trust` what comes in is limited,
    and no progress renews the deadline: whoever is at the other end.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.sock = sock
        self.timeout = timeout
        self._buffer = b""
        self._at = 0
        self._deadline = 0.0
        self._left: int | None = _BEFORE_LOGIN
        """How many bytes may still come in; None for any number."""
        self.renew()

    def trust(self) -> None:
        """The other end is the server, and knows us."""
        self._left = None

    def progress(self) -> None:
        """Something came, or went, that may take long as long as it goes on."""
        if self._left is None:
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
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise ProtocolError("the server talks without an end before the login")
        return data

    def has_more(self) -> bool:
        """Whether there is something that came and was not read, as far as can be said without waiting."""
        if self._at < len(self._buffer):
            return True
        self.sock.settimeout(0)
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def wait(self, wake: int, seconds: float) -> bool:
        """Wait for something to read; false after ``seconds`` or once the descriptor ``wake`` is readable.

        Not by a read with a deadline: TLS sends records without data (RFC 8446 section 4.6), after which it
        would take the server's silence for a failure.
        """
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if self._at < len(self._buffer):
                left = 0.0
            elif isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
                left = 0.0  # TLS has read ahead, of which the kernel knows nothing
            ready = {fd for fd, _ in poll.poll(math.ceil(left * 1000))}
            if wake in ready:
                return False
            if self._at < len(self._buffer):
                return True
            if not left or ready:
                self.sock.settimeout(0)
                try:
                    data = self.sock.recv(_RECV)
                except (ssl.SSLWantReadError, BlockingIOError):
                    continue
                except OSError as error:
                    raise _Ended(error) from None
                if not data:
                    raise _Ended(EOFError())
                self._buffer, self._at = data, 0
                return True
        return False

    def readline(self) -> bytes:
        """One line with its end."""
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
                self.progress()

    def write(self, data: Buffer) -> None:
        """Send all of ``data``; the timeout counts anew for each piece that the network takes."""
        view = memoryview(data)
        try:
            for start in range(0, len(view), _PROGRESS):
                self.sock.settimeout(self.timeout)
                self.sock.sendall(view[start : start + _PROGRESS])
        except OSError as error:
            raise _Ended(error) from None
        self.progress()


@contextlib.contextmanager
def _as_the_socket_said() -> Iterator[None]:
    try:
        yield
    except _Ended as ended:
        raise ended.error from None


class _Imap4(imaplib.IMAP4):
    """imaplib on a connection that is there, reading through `_Stream`, so that a greeting is bounded too."""

    def __init__(self, stream: _Stream, host: str) -> None:
        self.stream = stream
        super().__init__(host)

    def open(self, host: str = "", port: int = 143, timeout: float | None = None) -> None:  # noqa: ARG002
        self.host, self.port = host, port
        self.sock = self.stream.sock

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

    def send(self, data: bytes) -> None:  # type: ignore[override]  # it sends nothing else
        with _as_the_socket_said():
            self.stream.write(data)

    def shutdown(self) -> None:
        self.sock.close()


class _Client(imapclient.IMAPClient):  # type: ignore[misc]  # IMAPClient is not annotated
    def __init__(self, stream: _Stream, host: str) -> None:
        self._stream = stream
        super().__init__(host, ssl=False)

    def _create_IMAP4(self) -> _Imap4:  # noqa: N802  # IMAPClient's name
        return _Imap4(self._stream, self.host)

    def _set_read_timeout(self) -> None:
        """The stream bounds every read itself."""


_NETWORK: Final = frozenset(
    {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET}
)
"""What the kernel says when it is the network that has gone."""


class Wire:
    """A connection. Every method raises ConnectionLost (or a subclass) when it is no more.

    `open` gives one that is safe to log in on (`imapfs.imap.login`); it consists of `connect.open_tcp`,
    `connect.secure`, `greet` and `protect`, which can be called one by one.
    """

    def __init__(self, stream: _Stream, account: Account) -> None:
        self._stream = stream
        self._account = account
        self._tag = 0
        self._bye = ""
        self._trace = Trace()
        self._challenge = b""
        """What the last continuation request said."""
        self._exists = 0
        """Messages in the selected mailbox, by the server's word."""
        self._renewals = _SPARE_FETCHES
        self._protected = False
        """Whether `protect` has found that what is secret may be sent."""
        self.alive = True
        self.greeting = ""
        """The server's first line, without what marks it as a greeting."""
        self.preauthenticated = False
        """Whether the greeting was PREAUTH: the server knows who we are, and no login is to be made."""
        self.capabilities: frozenset[str] = frozenset()
        """Upper case; before the login what is offered then, afterwards what there is afterwards."""

    @classmethod
    def open(cls, account: Account, context: ssl.SSLContext, timeout: float) -> "Wire":
        """Connect, verify the server, read its greeting. ``timeout`` in seconds bounds each step.

        ``context`` is the account's `connect.tls_context`. Raises TlsError, TimedOut, ConnectionLost.
        """
        sock: socket.socket = connect.open_tcp(account, timeout)
        if account.security == "tls":
            sock = connect.secure(sock, account, context, timeout)
        wire = cls.greet(sock, account, timeout)
        try:
            wire.protect(context)
        except BaseException:
            wire.close()
            raise
        return wire

    @classmethod
    def greet(cls, sock: socket.socket, account: Account, timeout: float) -> "Wire":
        """Read the greeting and ask for the capabilities; takes ``sock`` over. Raises ConnectionLost."""
        stream = _Stream(sock, timeout)
        try:
            client = _Client(stream, account.host)
        except Exception as error:
            sock.close()
            if isinstance(error, TimeoutError) and account.security == "starttls":
                raise TimedOut(
                    f"{account.host}:{account.port} is connected but did not greet within {timeout:g} s:"
                    " if that is its port for TLS (usually 993), write imaps://"
                ) from None
            raise connect.explain(error, account, timeout) from None
        wire = cls(stream, account)
        kind, _, wire.greeting = client.welcome.decode("utf-8", "replace").strip()[2:].partition(" ")
        wire.preauthenticated = wire._trace.let_in = kind.upper() == "PREAUTH"
        wire.capabilities = frozenset(name.upper() for name in client._imap.capabilities)
        return wire

    @property
    def encrypted(self) -> bool:
        return isinstance(self._stream.sock, ssl.SSLSocket)

    @property
    def sock(self) -> socket.socket:
        """For those who want to know more about the connection; not to be read from."""
        return self._stream.sock

    def protect(self, context: ssl.SSLContext) -> None:
        """Have TLS from here on, or a connection that may do without: nothing secret goes out before.

        TLS is used wherever it is offered. There is no login without having called this. Raises TlsError.
        """
        if not self.encrypted:
            self._protect(context)
        self._protected = True

    def _protect(self, context: ssl.SSLContext) -> None:
        account = self._account
        may_do_without = not account.names_certificates and (
            account.insecure_plaintext or connect.is_this_machine(account, self._stream.sock)
        )
        if self.preauthenticated and not may_do_without:
            # What is logged in already cannot turn to TLS any more (RFC 9051 section 6.2.1).
            raise TlsError(
                f"{account.host} lets us in before there is TLS (PREAUTH), which is an attack or a mistake:"
                " not used; write imaps:// if it has a port for TLS (usually 993)"
            )
        if "STARTTLS" in self.capabilities and not self.preauthenticated:
            self.start_tls(context)
        elif not may_do_without:
            raise TlsError(
                f"{account.host} does not offer STARTTLS, and without it the password would go in the clear",
                remedy="write imaps:// if it has a port for TLS (usually 993)",
            )

    def start_tls(self, context: ssl.SSLContext) -> None:
        """STARTTLS (RFC 9051 section 6.2.1): nothing that was said before it counts any more.

        Raises TlsError, ConnectionLost.
        """
        account = self._account
        (completion,) = self.execute_all([(b"STARTTLS",)])
        if completion.status != "OK":
            said = (completion.text or completion.status)[:200]
            raise TlsError(
                f"{account.host} refused STARTTLS: {said}: write imaps:// if it has a TLS port (usually 993)"
            )
        if self._stream.has_more():
            self.abort()
            raise TlsError(
                f"{account.host} went on in plaintext after it had agreed to TLS, as somebody would who puts"
                " words in its mouth: not used; check the network, or write imaps:// (usually port 993)"
            )
        with self._breaking():
            secured = connect.secure(self._stream.sock, account, context, self._stream.timeout)
        self._stream = _Stream(secured, self._stream.timeout)
        self._bye, self._exists = "", 0
        self._learn_capabilities(b"")

    def _learn_capabilities(self, announced: bytes) -> None:
        """Note the capabilities, as ``announced`` or as asked for now where nothing was."""

        def take(response: Response) -> None:
            nonlocal announced
            if response[0][:13].upper() == b"* CAPABILITY ":
                announced = response[0][13:]

        if not announced:
            self.execute_all([(b"CAPABILITY",)], on_response=take)
        self.capabilities = frozenset(_upper(c) for c in announced.split())

    def login(self, user: Part, password: Part) -> Completion:
        """The LOGIN command (RFC 9051 section 6.2.3); with OK the capabilities are those afterwards."""
        self._check_protected()
        announced = _Announced()
        (completion,) = self.execute_all([(b"LOGIN ", user, b" ", password)], on_response=announced.take)
        self._logged_in(completion, announced)
        return completion

    def authenticate(self, mechanism: Mechanism, sent: list[bytes]) -> Completion:
        """AUTHENTICATE (RFC 9051 section 6.2.2); with OK the capabilities are those afterwards.

        ``sent`` gets what went out, in base64: for the caller to keep out of errors. Raises what
        ``mechanism`` raises.
        """
        self._check_protected()
        announced = _Announced()
        tag = self._next_tag()
        done: dict[bytes, Completion] = {}
        command = tag + b" AUTHENTICATE " + mechanism.name.encode()
        first = base64.b64encode(mechanism.initial())
        sent.append(first)
        with self._breaking():
            self._stream.renew()
            if self._trace.on:
                self._trace.sent(tag, [b"AUTHENTICATE ", mechanism.name.encode()])
            # With an initial response a round trip is saved (RFC 4959).
            at_once = "SASL-IR" in self.capabilities
            self._stream.write(command + (b" " + (first or b"=") if at_once else b"") + b"\r\n")
            answer: bytes | None = None if at_once else first
            for _ in range(_CHALLENGES):
                while tag not in done and not self._read_response(announced.take, None, done):
                    pass
                if tag in done:
                    break
                if answer is None:
                    if len(self._challenge) > _LONGEST_CHALLENGE:
                        raise ProtocolError(f"{self._account.host} sent a challenge without an end")
                    response = mechanism.respond(_challenge(self._challenge))
                    # Whatever else the server wants to know, it is told that there is no more.
                    answer = b"*" if response is None else base64.b64encode(response)
                    sent.append(answer)
                self._stream.write(answer + b"\r\n")
                answer = None
            else:
                raise ProtocolError(f"{self._account.host} does not come to an end with the login")
        self._logged_in(done[tag], announced)
        return done[tag]

    def _check_protected(self) -> None:
        if not self._protected:
            raise TlsError(f"the connection to {self._account.host} is not protected: no login")

    def trust(self) -> None:
        """End the limits of the time before the login, when the server and we know each other."""
        self._stream.trust()

    def _logged_in(self, completion: Completion, announced: "_Announced") -> None:
        if completion.status == "OK":
            self._trace.let_in = True
            in_code = completion.argument if completion.code == "CAPABILITY" else b""
            self._learn_capabilities(in_code or announced.capabilities)

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

    def idle(self, on_response: Callable[[Response], None], wake: int, seconds: float) -> bool:
        """IDLE (RFC 2177) for ``seconds``, or until the descriptor ``wake`` is readable.

        False if the server has ended it before. Raises Refused. What is said goes to ``on_response`` as it
        comes.
        """
        done: dict[bytes, Completion] = {}
        command = (b"IDLE",)
        with self._breaking():
            self._stream.renew()
            tag = self._send(command, on_response, done)
            # Whatever has happened since the last command is said before the continuation request.
            while tag not in done and not self._read_response(on_response, None, done):
                pass
            until = time.monotonic() + seconds
            while tag not in done and self._stream.wait(wake, until - time.monotonic()):
                # From its first byte on a response is bounded as any other.
                self._stream.renew()
                self._read_response(on_response, None, done)
            ended_here = tag not in done
            if ended_here:
                self._stream.write(b"DONE\r\n")
            while tag not in done:
                self._read_response(on_response, None, done)
        self.check(command, done[tag])
        return ended_here

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
        if self._trace.on:
            self._trace.sent(tag, [p if isinstance(p, bytes) else len(p.data) for p in command])
        out = bytearray(tag + b" ")
        for part in command:
            if isinstance(part, bytes):
                out += part
                continue
            # LITERAL- allows non-synchronising literals up to 4096 bytes (RFC 7888 section 5).
            plus = "LITERAL+" in self.capabilities or (
                "LITERAL-" in self.capabilities and len(part.data) <= 4096
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
            self._challenge = line[1:].strip()
            return True
        if line[:2] != b"* ":
            tag, _, rest = line.partition(b" ")
            completion = Completion.parse(rest)
            if completion is None or not tag:
                raise ProtocolError(f"{self._account.host} sent what is not IMAP: {line[:80]!r}")
            done[tag] = completion
            if self._trace.on:
                self._trace.completed(tag, completion.status, line)
            return False
        response: Response = []
        sizes: list[int] = []
        human = _HUMAN.match(line)
        while not human and (m := _LITERAL.search(line, max(0, len(line) - 24))):
            response.append(line[: m.start()])
            size = number(m.group(1))
            sizes.append(size)
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
        if self._trace.on:
            self._trace.heard(response, sizes)
        if b" FETCH " in response[0][:24]:
            self._renewals -= 1
            if self._renewals > 0:
                stream.progress()
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
        said = f"{self._account.host} refused {verb.decode('ascii', 'replace')}:{code} {words}"
        remedy = refusals.explain_later(words)
        wait = asked_wait(completion.code, completion.text)
        if wait is not None:
            raise Throttled(said, completion.code, wait, remedy=remedy)
        raise Refused(said, completion.code, remedy=remedy)

    def _fail(self, error: OSError | EOFError) -> NoReturn:
        """Turn what ended the connection into an error of ours."""
        host = self._account.host
        # With an errno it is the kernel that gave up on the connection, long before.
        if isinstance(error, TimeoutError) and error.errno is None:
            raise TimedOut(f"{host} did not answer within {self._stream.timeout:g} s") from None
        if self._bye:
            said = f"{host} closed the connection: {self._bye}"
            farewell = Completion.parse(b"BYE " + self._bye.encode())
            wait = asked_wait(farewell.code, farewell.text) if farewell else None
            if wait is not None:
                raise ServerBusy(said, wait) from None
            raise ConnectionLost(said) from None
        if isinstance(error, ssl.SSLError) and error.reason:
            raise ConnectionLost(f"TLS to {host} broke: {connect.words(error.reason)}") from None
        detail = getattr(error, "strerror", None) or "the connection ended without a word"
        lost = NetworkLost if getattr(error, "errno", None) in _NETWORK else ConnectionLost
        raise lost(f"lost the connection to {host}: {detail}") from None

    def has_hung_up(self) -> bool:
        """Whether the server has ended the connection, or it broke; only while no command is under way."""
        look = select.poll()
        try:
            look.register(self._stream.sock, select.POLLRDHUP)
        except (OSError, ValueError):
            return True
        return bool(look.poll(0))

    def is_stranded(self) -> bool:
        """Whether this machine has lost the address that the connection is from."""
        own = self._stream.sock
        try:
            with socket.socket(own.family, socket.SOCK_STREAM) as trial:
                address, _, *scope = own.getsockname()
                trial.bind((address, 0, *scope))
        except OSError:
            return True
        return False

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


class _Announced:
    """Takes the responses to a login: what the server says of its capabilities (RFC 9051 section 7.2.2)."""

    def __init__(self) -> None:
        self.capabilities = b""

    def take(self, response: Response) -> None:
        if response[0][:13].upper() == b"* CAPABILITY ":
            self.capabilities = response[0][13:]
        elif response[0][:16].upper() == b"* OK [CAPABILITY":
            self.capabilities = response[0][16:].partition(b"]")[0]


def _challenge(text: bytes) -> bytes:
    """A challenge decoded; one that is not base64 says nothing."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""


def _upper(capability: bytes) -> str:
    return capability.decode("ascii", "replace").upper()
