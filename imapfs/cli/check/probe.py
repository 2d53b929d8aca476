"""What answers at a host and port, looked at from below: names, TCP, TLS or cleartext, the certificate.

For finding out why there is no connection. A certificate is shown here whether or not it verifies, so nothing
is sent over what these functions open but a request for STARTTLS.
"""

import contextlib
import dataclasses
import hashlib
import queue
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from cryptography import x509

from imapfs.errors import ConnectionLost, TimedOut
from imapfs.imap import connect
from imapfs.imap.wire import Wire
from imapfs.model import Account

_MAX_LINE: Final = 8 << 10
"""Longest line that is read of a server."""


class Address(NamedTuple):
    """One address of a host."""

    family: socket.AddressFamily
    ip: str
    where: tuple[Any, ...]
    """For ``connect``, with port, flow and scope."""


def resolve(host: str, port: int, seconds: float) -> list[Address]:
    """The addresses of ``host``, in the order in which they are tried. Raises ConnectionLost, TimedOut."""
    outcome: queue.SimpleQueue[list[Address] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            outcome.put(list(dict.fromkeys(Address(f, str(where[0]), where) for f, _, _, _, where in found)))
        except (OSError, UnicodeError) as error:
            outcome.put(error)

    # The resolver has timeouts of its own, which may be minutes, and cannot be interrupted.
    threading.Thread(target=ask, daemon=True).start()
    try:
        got = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimedOut(
            f"no name server answered for {host} within {seconds:g} s",
            remedy="check this machine's network and its name server",
        ) from None
    if isinstance(got, socket.gaierror) and got.errno == socket.EAI_AGAIN:
        raise ConnectionLost(
            f"the name servers could not say what {host} is", remedy="check the network, and try again"
        )
    if isinstance(got, Exception):
        raise ConnectionLost(f"there is no host {host}", remedy="check its spelling, and your network")
    return got


def reach(addresses: Sequence[Address], seconds: float) -> dict[Address, float | OSError]:
    """How long a TCP connection to each address took, in seconds, or why there was none."""
    found: dict[Address, float | OSError] = {}
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for address in addresses:
            try:
                sock = stack.enter_context(socket.socket(address.family, socket.SOCK_STREAM))
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(address.where)
                selector.register(sock, selectors.EVENT_WRITE, address)
            except OSError as error:
                found[address] = error
        while selector.get_map() and (left := begin + seconds - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                assert isinstance(key.fileobj, socket.socket)
                number = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                found[key.data] = OSError(number, "") if number else time.monotonic() - begin
                selector.unregister(key.fileobj)
        for key in list(selector.get_map().values()):
            found[key.data] = TimeoutError()
    return {address: found[address] for address in addresses}


@dataclass(frozen=True, slots=True)
class Handshake:
    """What TLS agreed on with a server whose certificate nobody has verified."""

    version: str
    cipher: str
    certificate: bytes
    """In DER."""


def shake_hands(account: Account, address: Address, seconds: float) -> Handshake | None:
    """The TLS handshake with whatever answers at ``address``, at once or by STARTTLS; None if not offered.

    Raises OSError, among them ssl.SSLError, or ConnectionLost; TlsError also where a file that the account
    names is not usable.
    """
    context = connect.tls_context(account)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with _connection(address, seconds) as sock:
        if account.security == "tls":
            with context.wrap_socket(sock, server_hostname=account.host) as secured:
                return _agreed(secured)
        wire = Wire.greet(sock, dataclasses.replace(account, tls_fingerprint=None), seconds)
        try:
            if "STARTTLS" not in wire.greeting_capabilities:
                return None
            wire.start_tls(context)
            assert isinstance(wire.sock, ssl.SSLSocket)
            return _agreed(wire.sock)
        finally:
            wire.close()


def _agreed(secured: ssl.SSLSocket) -> Handshake:
    certificate = secured.getpeercert(binary_form=True)
    cipher = secured.cipher()
    assert certificate is not None, "a client always asks for one"
    return Handshake(secured.version() or "TLS", cipher[0] if cipher else "", certificate)


def hear(address: Address, seconds: float) -> str:
    """The first line that the server says in the clear; "" where it is silent. Raises OSError."""
    with _connection(address, seconds) as sock:
        try:
            return _readline(sock).decode("utf-8", "replace").strip()
        except TimeoutError:
            return ""


def protocol(line: str) -> str:
    """Which protocol a server that says this first speaks, or ""."""
    for beginning, name in (
        (("* OK", "* PREAUTH", "* BYE"), "IMAP"),
        (("220",), "SMTP or FTP"),
        (("+OK",), "POP3"),
        (("SSH-",), "SSH"),
        (("HTTP/",), "HTTP"),
    ):
        if line.upper().startswith(beginning):
            return name
    return ""


@contextlib.contextmanager
def _connection(address: Address, seconds: float) -> Iterator[socket.socket]:
    """A TCP connection all of which ends after ``seconds``, however slowly the server goes on."""
    with socket.socket(address.family, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        sock.connect(address.where)
        late = threading.Event()
        # A socket of TLS takes the descriptor over; what is done to the copy is done to the connection.
        with sock.dup() as copy:

            def end() -> None:
                late.set()
                with contextlib.suppress(OSError):
                    copy.shutdown(socket.SHUT_RDWR)

            timer = threading.Timer(seconds, end)
            timer.daemon = True
            timer.start()
            try:
                yield sock
            except OSError:
                if late.is_set():
                    raise TimeoutError from None
                raise
            finally:
                timer.cancel()


def _readline(sock: socket.socket) -> bytes:
    """One line, or what there is of it at the end; byte by byte, so that nothing of what follows is taken."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < _MAX_LINE:
        byte = sock.recv(1)
        if not byte:
            break
        line += byte
    return bytes(line)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a person wants to know of a certificate (RFC 5280)."""

    subject: str
    issuer: str
    names: tuple[str, ...]
    """The hosts that it is for."""
    begins: datetime
    expires: datetime
    self_signed: bool
    fingerprint: str
    """SHA-256, 64 hexadecimal digits."""


def describe(der: bytes) -> Certificate:
    """Raises ValueError for what is no certificate."""
    found = x509.load_der_x509_certificate(der)
    try:
        general = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = general.get_values_for_type(x509.DNSName)
        names += [str(address) for address in general.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        names = []
    return Certificate(
        _common_name(found.subject),
        _common_name(found.issuer),
        tuple(names),
        found.not_valid_before_utc,
        found.not_valid_after_utc,
        found.subject == found.issuer,
        hashlib.sha256(der).hexdigest(),
    )


def _common_name(name: x509.Name) -> str:
    """The common name; of an issuer without one its organisation; else all of it."""
    for kind in (x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME):
        for attribute in name.get_attributes_for_oid(kind):
            return str(attribute.value)
    return name.rfc4514_string() or "nobody"
