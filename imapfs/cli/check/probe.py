"""What answers at a host and port, layer by layer: name resolution, TCP, TLS or cleartext, the certificate.

This serves to find out why a connection fails. Certificates are not verified here, so that they can be shown;
nothing is sent over these connections but a request for STARTTLS.
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
"""Maximum length in bytes of a line that is read."""


class Address(NamedTuple):
    """One address of a host."""

    family: socket.AddressFamily
    ip: str
    where: tuple[Any, ...]
    """The argument of ``connect``, with port, flow info and scope."""


def resolve(host: str, port: int, seconds: float) -> list[Address]:
    """Return the addresses of ``host``, in the order in which they are tried.

    Raises ConnectionLost, and TimedOut after ``seconds``.
    """
    outcome: queue.SimpleQueue[list[Address] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            outcome.put(list(dict.fromkeys(Address(f, str(where[0]), where) for f, _, _, _, where in found)))
        except (OSError, UnicodeError) as error:
            outcome.put(error)

    # The resolver has timeouts of its own, perhaps of minutes, and cannot be interrupted.
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
            f"the name servers could not resolve {host}", remedy="check the network, and try again"
        )
    if isinstance(got, Exception):
        raise ConnectionLost(f"there is no host {host}", remedy="check its spelling, and the network")
    return got


def reach(addresses: Sequence[Address], seconds: float) -> dict[Address, float | OSError]:
    """Return how many seconds a TCP connection to each address took, or why there was none."""
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
    """The parameters of a TLS connection; the certificate is not verified."""

    version: str
    cipher: str
    certificate: bytes
    """In DER."""


def handshake(account: Account, address: Address, seconds: float) -> Handshake | None:
    """Return the result of a TLS handshake, at once or after STARTTLS; None if STARTTLS is not offered.

    Raises OSError, including ssl.SSLError, and ConnectionLost; TlsError if a file that the account names is
    not usable.
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
            if "STARTTLS" not in wire.capabilities:
                return None
            wire.start_tls(context)
            assert isinstance(wire.sock, ssl.SSLSocket)
            return _agreed(wire.sock)
        finally:
            wire.close()


def certificate(account: Account, seconds: float) -> "Certificate":
    """Return what the server shows as its certificate, which is not verified.

    Raises OSError, including ssl.SSLError; ConnectionLost; ValueError if it is none.
    """
    last: OSError | None = None
    for address in resolve(account.host, account.port, seconds):
        try:
            found = handshake(account, address, seconds)
        except OSError as error:
            last = error
            continue
        if found is not None:
            return describe(found.certificate)
    raise last or ValueError("the server offers no TLS")


def _agreed(secured: ssl.SSLSocket) -> Handshake:
    certificate = secured.getpeercert(binary_form=True)
    cipher = secured.cipher()
    assert certificate is not None, "a client always asks for one"
    return Handshake(secured.version() or "TLS", cipher[0] if cipher else "", certificate)


def first_line(address: Address, seconds: float) -> str:
    """Return the first line that the server sends in the clear; "" if it sends none. Raises OSError."""
    with _connection(address, seconds) as sock:
        try:
            return _readline(sock).decode("utf-8", "replace").strip()
        except TimeoutError:
            return ""


def protocol(line: str) -> str:
    """Return the protocol of a server whose first line is ``line``, or "" if it is not known."""
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
    """Yield a TCP connection that ends after ``seconds`` in any case, even if the server keeps sending."""
    with socket.socket(address.family, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        sock.connect(address.where)
        late = threading.Event()
        # A TLS socket takes over the descriptor. Shutting down a duplicate ends the connection of both.
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
    """Return one line, perhaps incomplete. Reads byte by byte, so that nothing after it is consumed."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < _MAX_LINE:
        byte = sock.recv(1)
        if not byte:
            break
        line += byte
    return bytes(line)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a person wants to know about a certificate (RFC 5280)."""

    subject: str
    issuer: str
    names: tuple[str, ...]
    """The hosts for which it is valid."""
    begins: datetime
    expires: datetime
    self_signed: bool
    fingerprint: str
    """SHA-256, 64 hexadecimal digits."""


def describe(der: bytes) -> Certificate:
    """Return what is in a certificate in DER. Raises ValueError if it is not one."""
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
    """Return the common name; without one, the organization; without either, the whole name."""
    for kind in (x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME):
        for attribute in name.get_attributes_for_oid(kind):
            return str(attribute.value)
    return name.rfc4514_string() or "unknown"
