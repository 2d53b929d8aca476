"""One IMAP connection: commands out, responses in, every wait bounded.

This module has a reader of its own because a generic one (imaplib's, IMAPClient's) takes most of a listing's
time, buffers whole responses, files FETCH data without a UID under the sequence number, bounds each ``recv``
but not a command, and reports a connection that ends during the login as a wrong password.

Theory of operation. Commands are sent, possibly several at once (pipelining, RFC 9051 section 5.5). Then
responses are read until each command has its tagged completion. A response is a list of parts that alternate
between text and literal, so that text is never mistaken for the content of a literal. A large literal can be
streamed to a sink instead of being kept in memory. After anything but a tagged OK, NO or BAD the connection
is useless: ``alive`` becomes false, and its owner discards the object. One thread at a time may use a
connection; only ``abort`` may be called from another.
"""

import base64
import binascii
import contextlib
import errno
import logging
import re
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol

from imapfs.errors import (
    ConnectionLost,
    Malformed,
    NetworkLost,
    ProtocolError,
    Refused,
    ServerBusy,
    Throttled,
    TimedOut,
    TlsError,
)
from imapfs.imap import connect, refusals
from imapfs.imap.budget import MAX_CAPABILITIES, MAX_CHALLENGE, MAX_RESPONSE, MAX_TEXT, Held
from imapfs.imap.grammar import Completion, Response, number, parse_exists
from imapfs.imap.sasl import Mechanism
from imapfs.imap.stream import Buffer, SocketStream, StreamEnded
from imapfs.imap.throttle import asked_wait, may_be_of_one
from imapfs.imap.trace import Trace
from imapfs.log import one_line
from imapfs.model import Account

log = logging.getLogger(__name__)

_MAX_CHALLENGES: Final = 10
"""Maximum number of challenges in one login."""
_MAX_COPIED: Final = 64 << 10
"""Maximum size of a literal that is sent together with what surrounds it."""
_MAX_LOGGED: Final = 20
"""Maximum number of malformed responses that are named in the log, for one connection."""
_EXTRA_FETCHES: Final = 1000
"""Unsolicited FETCH responses that may move the deadline of a command, beyond two for each message."""

_GREETING = re.compile(rb"\* (OK|PREAUTH|BYE)\b", re.I)
_LITERAL = re.compile(rb"\{(\d+)\}\r?\n\Z")
_BLANK: Final = frozenset({b"\r\n", b"\n"})
"""Lines that some servers send after a literal, once too often."""
_TAGGED = re.compile(rb"f\d+ ")
_STATUS_RESPONSE = re.compile(rb"\* (?:OK|NO|BAD|BYE|PREAUTH)\b", re.I)
"""Responses that end in text for people, which contains no literals (RFC 9051 section 7.1)."""
_COMPLAINT = re.compile(rb"\* ((?:NO|BAD)\b[^\r\n]*)", re.I)
_QUOTABLE = re.compile(rb"[\x01-\x09\x0b\x0c\x0e-\x7f]*+\Z")
_VERSIONS: Final = frozenset({"IMAP4", "IMAP4REV1", "IMAP4REV2"})
_NETWORK_ERRORS: Final = frozenset(
    {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET}
)
"""What the kernel reports when the network, not the server, is gone."""


class Sink(Protocol):
    """Takes a literal piece by piece."""

    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes to send as a literal within a command (RFC 9051 section 4.3)."""

    data: Buffer


Part = bytes | Literal
Command = Sequence[Part]
"""A command without its tag and line end."""

SinkFor = Callable[[Response, int], Sink | None]
"""Given the parts of a response so far and the size of the next literal: where to stream it, or None."""

OnResponse = Callable[[Response], None]


def _ignore(_: Response) -> None:
    """Drop a response."""


def astring(value: bytes) -> Part:
    """Return ``value`` as a quoted string, or as a literal where it cannot be quoted (RFC 9051 section
    4.3)."""
    if _QUOTABLE.match(value):
        return b'"' + value.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
    return Literal(value)


class Wire:
    """A connection. Every method raises ConnectionLost (or a subclass) once the connection has ended.

    `open` returns one that is safe to log in on (`imapfs.imap.login`). It consists of `connect.open_tcp`,
    `connect.secure`, `greet` and `protect`, which can also be called one by one.
    """

    def __init__(self, stream: SocketStream, account: Account) -> None:
        self._stream = stream
        self._account = account
        self._tag = 0
        self._bye = ""
        """Text of the last BYE response."""
        self._complaint = ""
        """The last untagged NO or BAD response during the present command."""
        self._trace = Trace()
        self._challenge = b""
        """Text of the last continuation request."""
        self._exists = 0
        """Number of messages in the selected mailbox, according to the server."""
        self._fetches: int | None = None
        """How many more FETCH responses may move the deadline; None for a command that asks for none."""
        self._passed_over = 0
        """Number of malformed responses."""
        self._held: Held | None = None
        """Counts what the responses to the present command cost; None where they pass through."""
        self._protected = False
        """Whether `protect` has found that secrets may be sent."""
        self.alive = True
        self.greeting = ""
        """The server's first line, without its status."""
        self.preauthenticated = False
        """Whether the greeting was PREAUTH: the server knows the user already, and there is no login."""
        self.capabilities: frozenset[str] = frozenset()
        """In upper case, as the server announced them for the present state: before or after the login."""

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
        """Read the greeting and learn the capabilities. Takes over ``sock``; raises ConnectionLost."""
        wire = cls(SocketStream(sock, timeout), account)
        try:
            greeting = wire._read_greeting()
            # Before TLS the answer decides whether TLS is used at all. A greeting may announce only some of
            # the capabilities, so the server is asked. After TLS the greeting saves a round trip.
            announced = greeting.argument if wire.encrypted and greeting.code == "CAPABILITY" else b""
            wire._learn_capabilities(announced)
            if not announced and not wire.capabilities & _VERSIONS:
                raise wire._not_imap("it announces no version of IMAP")
        except BaseException:
            wire.close()
            raise
        return wire

    def _read_greeting(self) -> Completion:
        """Read the first line (RFC 9051 section 7.1)."""
        account = self._account
        where = f"{account.host}:{account.port}"
        try:
            line = self._stream.readline()
        except StreamEnded as ended:
            if isinstance(ended.error, EOFError):
                raise ConnectionLost(f"{where} closed the connection before its greeting") from None
            if isinstance(ended.error, TimeoutError) and account.security == "starttls":
                raise TimedOut(
                    f"{where} is connected but did not greet within {self._stream.timeout:g} s:"
                    " if that is its port for TLS (usually 993), write imaps://"
                ) from None
            raise connect.explain(ended.error, account, self._stream.timeout) from None
        greeting = Completion.parse(line[2:]) if _GREETING.match(line) else None
        if greeting is not None and greeting.status != "BYE":
            self.greeting = line.decode("utf-8", "replace").strip()[2:].partition(" ")[2]
            self.preauthenticated = self._trace.logged_in = greeting.status == "PREAUTH"
            return greeting
        code = greeting.code if greeting is not None else ""
        words = _shortened(line[6:] if greeting is not None else line)
        wait = asked_wait(code, words)
        if wait is not None and self._is_private:
            raise ServerBusy(f"{where} accepts no connections now: {words}", wait)
        if greeting is None:
            raise self._not_imap(words or "its first line is empty")
        raise ConnectionLost(f"{where} closed the connection: {words or 'it gave no reason'}")

    def _not_imap(self, words: str) -> ConnectionLost:
        account = self._account
        return ConnectionLost(f"{account.host}:{account.port} did not greet as an IMAP server: {words}")

    @property
    def encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return isinstance(self._stream.sock, ssl.SSLSocket)

    @property
    def _is_private(self) -> bool:
        """Whether what is said here is the server's word. Before TLS, anybody on the way can say it."""
        return self.encrypted or self._plaintext_allowed

    @property
    def _plaintext_allowed(self) -> bool:
        account = self._account
        return not account.names_certificates and (
            account.insecure_plaintext or connect.is_this_machine(account, self._stream.sock)
        )

    @property
    def sock(self) -> socket.socket:
        """The socket, to inspect the connection; never read from it."""
        return self._stream.sock

    def protect(self, context: ssl.SSLContext) -> None:
        """Use TLS from here on, or find that the connection may do without; no secret is sent before.

        TLS is used wherever it is offered. No login is possible before this call. Raises TlsError.
        """
        if not self.encrypted:
            self._protect(context)
        self._protected = True

    def _protect(self, context: ssl.SSLContext) -> None:
        account = self._account
        if self.preauthenticated and not self._plaintext_allowed:
            # STARTTLS is not allowed once logged in (RFC 9051 section 6.2.1).
            raise TlsError(
                f"{account.host} logs us in before TLS (PREAUTH), which is an attack or a mistake:"
                " not used; write imaps:// if it has a port for TLS (usually 993)"
            )
        if "STARTTLS" in self.capabilities and not self.preauthenticated:
            self.start_tls(context)
        elif not self._plaintext_allowed:
            raise TlsError(
                f"{account.host} does not offer STARTTLS, and without it the password would go in the clear",
                remedy="write imaps:// if it has a port for TLS (usually 993)",
            )

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Run STARTTLS (RFC 9051 section 6.2.1), and forget everything that the server said before.

        Raises TlsError, ConnectionLost.
        """
        account = self._account
        (completion,) = self.execute_all([(b"STARTTLS",)])
        if completion.status != "OK":
            words = (completion.text or completion.status)[:200]
            raise TlsError(
                f"{account.host} refused STARTTLS: {words}: write imaps:// if it has a TLS port (usually 993)"
            )
        if self._stream.has_pending_input():
            self.abort()
            raise TlsError(
                f"{account.host} went on in plaintext after it agreed to STARTTLS, which looks like an"
                " injection attack: not used; check the network, or write imaps:// (usually port 993)"
            )
        with self._dead_after_error():
            secured = connect.secure(self._stream.sock, account, context, self._stream.timeout)
        self._stream = SocketStream(secured, self._stream.timeout)
        self._bye, self._exists = "", 0
        self._learn_capabilities(b"")

    def _learn_capabilities(self, announced: bytes) -> None:
        """Set the capabilities to ``announced``; ask the server where that is empty."""
        if not announced:
            collector = _CapabilityCollector()
            self.execute_all([(b"CAPABILITY",)], on_response=collector.take)
            announced = collector.announced
        names = announced[:MAX_CAPABILITIES].split()
        self.capabilities = frozenset(name.decode("ascii", "replace").upper() for name in names)

    def login(self, user: Part, password: Part) -> Completion:
        """Run LOGIN (RFC 9051 section 6.2.3). After OK, `capabilities` are those after the login."""
        self._check_protected()
        collector = _CapabilityCollector()
        (completion,) = self.execute_all([(b"LOGIN ", user, b" ", password)], on_response=collector.take)
        self._after_login(completion, collector)
        return completion

    def authenticate(self, mechanism: Mechanism, sent: list[bytes]) -> Completion:
        """Run AUTHENTICATE (RFC 9051 section 6.2.2). After OK, `capabilities` are those after the login.

        Everything that was sent, in base64, is added to ``sent``, so that the caller can keep it out of
        errors. Raises what ``mechanism`` raises.
        """
        self._check_protected()
        collector = _CapabilityCollector()
        tag = self._next_tag()
        done: dict[bytes, Completion] = {}
        command = tag + b" AUTHENTICATE " + mechanism.name.encode()
        first = base64.b64encode(mechanism.initial())
        sent.append(first)
        with self._dead_after_error():
            self._stream.renew_deadline()
            if self._trace.on:
                self._trace.sent(tag, [b"AUTHENTICATE ", mechanism.name.encode()])
            # An initial response saves a round trip (RFC 4959).
            at_once = "SASL-IR" in self.capabilities
            self._stream.write(command + (b" " + (first or b"=") if at_once else b"") + b"\r\n")
            answer: bytes | None = None if at_once else first
            for _ in range(_MAX_CHALLENGES):
                while tag not in done and not self._read_response(collector.take, None, done):
                    pass
                if tag in done:
                    break
                if answer is None:
                    if len(self._challenge) > MAX_CHALLENGE:
                        raise ProtocolError(f"{self._account.host} sent a challenge that is too long")
                    response = mechanism.respond(_decoded_challenge(self._challenge))
                    # "*" cancels the exchange: the mechanism has nothing more to say.
                    answer = b"*" if response is None else base64.b64encode(response)
                    sent.append(answer)
                self._stream.write(answer + b"\r\n")
                answer = None
            else:
                raise ProtocolError(f"{self._account.host} does not come to an end with the login")
        self._after_login(done[tag], collector)
        return done[tag]

    def _check_protected(self) -> None:
        if not self._protected:
            raise TlsError(f"the connection to {self._account.host} is not protected: no login")

    def lift_login_limits(self) -> None:
        """Accept any amount of data from now on, once server and client have authenticated each other."""
        self._stream.lift_limit()

    def _after_login(self, completion: Completion, collector: "_CapabilityCollector") -> None:
        if completion.status == "OK":
            self._trace.logged_in = True
            in_code = completion.argument if completion.code == "CAPABILITY" else b""
            self._learn_capabilities(in_code or collector.announced)

    def execute(
        self,
        *command: Part,
        on_response: OnResponse = _ignore,
        sink_for: SinkFor | None = None,
        fetches: bool = False,
        held: bool = True,
    ) -> Completion:
        """Run one command, as `execute_all` does. Raises Refused for NO and BAD."""
        completion = self.execute_all(
            [command], on_response=on_response, sink_for=sink_for, fetches=fetches, held=held
        )[0]
        self.check(command, completion)
        return completion

    def execute_all(
        self,
        commands: Sequence[Command],
        *,
        on_response: OnResponse = _ignore,
        sink_for: SinkFor | None = None,
        fetches: bool = False,
        held: bool = True,
    ) -> list[Completion]:
        """Run commands in one round trip, and pass all untagged responses to ``on_response``.

        ``fetches``: FETCH data is asked for, which may come in for longer than the timeout. Not ``held``:
        ``on_response`` passes it on instead of keeping it, so that it may be of any size. A response that
        ``on_response`` cannot read (Malformed) is passed over.

        The caller has to `check` each completion. An exception from a callback leaves the connection in the
        middle of a response, and so ends it.
        """
        done: dict[bytes, Completion] = {}
        self._complaint = ""
        with self._dead_after_error():
            self._held = Held() if held else None
            self._fetches = 2 * self._exists + _EXTRA_FETCHES if fetches else None
            tags = [self._send(command, on_response, done) for command in commands]
            self._stream.renew_deadline()
            while not all(tag in done for tag in tags):
                self._read_response(on_response, sink_for, done)
        return [done[tag] for tag in tags]

    def idle(self, on_response: OnResponse, wake: int, seconds: float) -> bool:
        """Run IDLE (RFC 2177) for ``seconds``, or until the descriptor ``wake`` is readable.

        Responses go to ``on_response`` as they arrive. Return false if the server ended IDLE before. Raises
        Refused.
        """
        done: dict[bytes, Completion] = {}
        command = (b"IDLE",)
        with self._dead_after_error():
            self._fetches = None
            tag = self._send(command, on_response, done)
            # The server reports what has happened since the last command before its continuation request.
            while tag not in done and not self._read_response(on_response, None, done):
                pass
            until = time.monotonic() + seconds
            while tag not in done and self._stream.wait(wake, until - time.monotonic()):
                # From its first byte on, the response has a deadline like any other.
                self._stream.renew_deadline()
                self._held = Held()
                self._read_response(on_response, None, done)
            ended_here = tag not in done
            self._stream.renew_deadline()
            if ended_here:
                self._stream.write(b"DONE\r\n")
            while tag not in done:
                self._read_response(on_response, None, done)
        self.check(command, done[tag])
        return ended_here

    @contextlib.contextmanager
    def _dead_after_error(self) -> Iterator[None]:
        """End the connection after any exception, which leaves it in the middle of a command or response."""
        try:
            yield
        except BaseException as error:
            self.alive = False
            if isinstance(error, StreamEnded):
                self._raise_lost(error.error)
            raise

    def _next_tag(self) -> bytes:
        self._tag += 1
        return b"f%d" % self._tag

    def _send(self, command: Command, on_response: OnResponse, done: dict[bytes, Completion]) -> bytes:
        tag = self._next_tag()
        if self._trace.on:
            self._trace.sent(tag, [p if isinstance(p, bytes) else len(p.data) for p in command])
        self._stream.renew_deadline()
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
                while not self._read_response(on_response, None, done):
                    if tag in done:
                        return tag  # refused before the literal was sent
            if len(part.data) > _MAX_COPIED:
                self._stream.write(bytes(out))
                out.clear()
                self._stream.write(part.data)
            else:
                out += part.data
        self._stream.write(bytes(out) + b"\r\n")
        return tag

    def _read_response(
        self,
        on_response: OnResponse,
        sink_for: SinkFor | None,
        done: dict[bytes, Completion],
    ) -> bool:
        """Read one response and dispatch it. Return whether it was a continuation request."""
        stream = self._stream
        line = stream.readline()
        while line in _BLANK:
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
        is_fetch = b" FETCH " in line[:24].upper()
        transfer = is_fetch and bool(self._fetches)
        response: Response = []
        sizes: list[int] = []
        held = len(line)
        text_only = _STATUS_RESPONSE.match(line)
        while not text_only and (m := _LITERAL.search(line, max(0, len(line) - 24))):
            response.append(line[: m.start()])
            size = number(m.group(1))
            sizes.append(size)
            sink = sink_for(response, size) if sink_for else None
            if sink is not None:
                stream.copy_to(sink.write, size, transfer=True)
                response.append(b"")
            else:
                held += size
                if held > MAX_RESPONSE:
                    raise self._too_large(held)
                response.append(stream.read(size, transfer=transfer))
            line = self._after_literal(is_fetch)
            held += len(line)
            if held > MAX_RESPONSE:
                raise self._too_large(held)
        response.append(line)
        if self._trace.on:
            self._trace.received(response, sizes)
        if self._held is not None:
            self._held.add(held)
        if is_fetch and self._fetches:
            self._fetches -= 1
            stream.note_progress(sum(map(len, response[::2])))
        elif (exists := parse_exists(line)) is not None:
            self._note_exists(exists)
        elif line[:6].upper() == b"* BYE ":
            self._bye = line[6:][:MAX_TEXT].decode("utf-8", "replace").strip()
        elif (complaint := _COMPLAINT.match(line)) is not None:
            self._complaint = _shortened(complaint[1])
        try:
            on_response(response)
        except Malformed as error:
            self._passed_over += 1
            if self._passed_over <= _MAX_LOGGED:
                log.info("%s: passed over: %s", self._account.host, error)
        return False

    def _after_literal(self, is_fetch: bool) -> bytes:
        """Read what follows a literal. FETCH data does not end with one, so a blank line there means
        nothing."""
        stream = self._stream
        line = stream.readline()
        while is_fetch and line in _BLANK:
            following = stream.readline()
            if following[:2] == b"* " or _TAGGED.match(following):
                stream.unread(following)
                break
            line = following
        return line

    def _note_exists(self, exists: int) -> None:
        """Store the number of messages. Only the mailbox that a command opens changes what it may take."""
        if self._fetches == 2 * self._exists + _EXTRA_FETCHES:
            self._fetches = 2 * exists + _EXTRA_FETCHES
        self._exists = exists

    def _too_large(self, size: int) -> ProtocolError:
        return ProtocolError(
            f"{self._account.host} announced {size} bytes where {MAX_RESPONSE >> 20} MiB are the maximum"
        )

    def check(self, command: Command, completion: Completion) -> None:
        """Raise Refused unless ``completion`` is OK."""
        if completion.status == "OK":
            return
        first = command[0]
        verb = b" ".join(first.split()[:2]) if isinstance(first, bytes) else b"command"
        code = f" [{completion.code}]" if completion.code else ""
        words = completion.text or completion.status
        problem = f"{self._account.host} refused {verb.decode('ascii', 'replace')}:{code} {words}"
        remedy = refusals.explain_later(words)
        wait = asked_wait(completion.code, completion.text)
        if wait is not None:
            of_one = may_be_of_one(completion.code, completion.text)
            raise Throttled(problem, completion.code, wait, remedy=remedy, of_one=of_one)
        raise Refused(problem, completion.code, remedy=remedy)

    def _raise_lost(self, error: OSError | EOFError) -> NoReturn:
        """Raise the error that says what ended the connection."""
        lost = self._lost(error)
        if self._complaint:
            lost.problem = f"{lost.problem}; it said {self._complaint}"
        ended_here = isinstance(error, EOFError | ssl.SSLEOFError | ssl.SSLZeroReturnError)
        lost.by_server = bool(self._bye or self._complaint) or ended_here
        raise lost from None

    def _lost(self, error: OSError | EOFError) -> ConnectionLost:
        host = self._account.host
        # With an errno the kernel has given up on the connection, long before the deadline.
        if isinstance(error, TimeoutError) and error.errno is None:
            return TimedOut(f"{host} did not answer within {self._stream.timeout:g} s")
        if self._bye:
            problem = f"{host} closed the connection: {self._bye}"
            bye = Completion.parse(b"BYE " + self._bye.encode())
            wait = asked_wait(bye.code, bye.text) if bye else None
            if wait is not None and self._is_private:
                return ServerBusy(problem, wait)
            return ConnectionLost(problem)
        if isinstance(error, ssl.SSLError) and error.reason:
            return ConnectionLost(f"TLS to {host} broke: {connect.words(error.reason)}")
        detail = getattr(error, "strerror", None) or "it closed the connection without a reason"
        lost = NetworkLost if getattr(error, "errno", None) in _NETWORK_ERRORS else ConnectionLost
        return lost(f"lost the connection to {host}: {detail}")

    def has_hung_up(self) -> bool:
        """Return whether the server has ended the connection, or it broke. Only between commands."""
        poll = select.poll()
        try:
            poll.register(self._stream.sock, select.POLLRDHUP)
        except (OSError, ValueError):
            return True
        return bool(poll.poll(0))

    def is_stranded(self) -> bool:
        """Return whether this machine has lost the address that the connection uses."""
        own = self._stream.sock
        try:
            with socket.socket(own.family, socket.SOCK_STREAM) as trial:
                address, _, *scope = own.getsockname()
                trial.bind((address, 0, *scope))
        except OSError:
            return True
        return False

    def abort(self) -> None:
        """End the connection at once, from any thread; a thread that waits in it wakes up."""
        self.alive = False
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown, which would discard the TLS state while another thread reads.
            socket.socket.shutdown(self._stream.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close without LOGOUT; may be called twice."""
        self.alive = False
        with contextlib.suppress(OSError):
            self._stream.sock.close()


class _CapabilityCollector:
    """Collects the capabilities that untagged responses announce (RFC 9051 sections 7.1 and 7.2.2)."""

    def __init__(self) -> None:
        self.announced = b""

    def take(self, response: Response) -> None:
        if response[0][:13].upper() == b"* CAPABILITY ":
            self.announced = response[0][13:]
        elif response[0][:16].upper() == b"* OK [CAPABILITY":
            self.announced = response[0][16:].partition(b"]")[0]


def _shortened(line: bytes) -> str:
    """Return a server's line in short and printable, for an error message."""
    return one_line(" ".join(line.decode("utf-8", "replace").split()))[:200]


def _decoded_challenge(text: bytes) -> bytes:
    """Decode a challenge; one that is not base64 is taken for empty."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""
