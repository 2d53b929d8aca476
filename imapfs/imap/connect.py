"""Connecting: TCP, TLS, and proof that the peer is the account's server.

The steps are `open_tcp` and `secure`, which can be used separately. `explain` turns a failure into an error
with cause and remedy on one line.
"""

import hashlib
import ipaddress
import socket
import ssl
import stat
from typing import Final

from imapfs.errors import CertificateRejected, ConnectionLost, TimedOut, TlsError
from imapfs.model import Account

_UNACKNOWLEDGED: Final = 10
"""Seconds without an acknowledgement after which the kernel gives up on a connection. If the network has
forgotten it there is no answer at all, and a program should not have to wait for the whole timeout."""
_KEEPALIVE: Final = 60
"""Seconds after which an idle connection is probed, so that NAT devices do not forget it."""


_CERTIFICATE_ALERTS: Final = frozenset(
    {
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "SSLV3_ALERT_CERTIFICATE_REVOKED",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "TLSV1_ALERT_ACCESS_DENIED",
        "TLSV1_ALERT_UNKNOWN_CA",
    }
)
"""OpenSSL's names of the alerts by which a server refuses a client certificate (RFC 8446 section 6.2)."""
NOT_TLS: Final = frozenset(
    {"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"}
)
"""OpenSSL's reasons if the peer does not speak TLS."""


def tls_context(account: Account) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer, with which `secure` verifies the server.

    Raises TlsError if a file that the account names cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=str(account.ca_file) if account.ca_file else None)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or "it holds no certificate in PEM form"
        raise TlsError(f"cannot use the CA file {account.ca_file}: {reason}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A name in the subject counts for nothing (RFC 9525 section 6.3).
    context.hostname_checks_common_name = False
    if account.tls_fingerprint is not None:
        # `secure` compares the certificate itself; its issuer, names and dates do not matter.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if account.client_cert is not None:
        _load_client_certificate(context, account)
    return context


def _load_client_certificate(context: ssl.SSLContext, account: Account) -> None:
    encrypted = False

    def no_passphrase() -> str:
        # Without this callback OpenSSL would prompt on the terminal.
        nonlocal encrypted
        encrypted = True
        return ""

    certificate, key = account.client_cert, account.client_key or account.client_cert
    assert certificate is not None
    assert key is not None
    try:
        context.load_cert_chain(certificate, key, no_passphrase)
    except ssl.SSLError as error:
        if encrypted:
            why = "the key has a passphrase: store it without one, readable only by you ('openssl pkey')"
        elif error.reason == "KEY_VALUES_MISMATCH":
            why = "the key does not belong to the certificate: check --client-cert and --client-key"
        else:
            why = "certificate and key must be in PEM form: check --client-cert and --client-key"
        raise TlsError(f"cannot use the client certificate {certificate} with key {key}: {why}") from None
    except OSError as error:
        reason = f"{error.strerror}: check --client-cert and --client-key"
        raise TlsError(f"cannot use the client certificate {certificate} with key {key}: {reason}") from None
    mode = stat.S_IMODE(key.stat().st_mode)
    # Group access may be intended, as with Debian's group ssl-cert.
    if mode & 0o007:
        raise TlsError(
            f"the client key {key} is accessible to all users (mode {mode:04o}): chmod 600 it, and replace it"
        )


def open_tcp(account: Account, timeout: float) -> socket.socket:
    """Connect by TCP, trying each address of the host for ``timeout`` seconds. Raises ConnectionLost."""
    try:
        sock = socket.create_connection((account.host, account.port), timeout)
    except (OSError, UnicodeError) as error:
        # UnicodeError if IDNA cannot encode the host, for example a label of more than 63 characters.
        raise explain(error, account, timeout) from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _UNACKNOWLEDGED)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED * 1000)
    return sock


def secure(sock: socket.socket, account: Account, context: ssl.SSLContext, timeout: float) -> ssl.SSLSocket:
    """Run the TLS handshake and verify the server. ``context`` is the account's `tls_context`.

    Takes over ``sock``, and closes it on failure. Raises TlsError, ConnectionLost.
    """
    try:
        sock.settimeout(timeout)
        secured = context.wrap_socket(sock, server_hostname=account.host)
    except (OSError, ValueError) as error:
        sock.close()
        raise explain(error, account, timeout) from None
    found = fingerprint(secured)
    if account.tls_fingerprint not in (None, found):
        secured.close()
        raise CertificateRejected(
            f"the certificate of {account.host} is not the pinned one",
            remedy="only if it was renewed, give its new fingerprint to --tls-fingerprint"
            " ('imapfs check' shows it)",
        )
    return secured


def fingerprint(secured: ssl.SSLSocket) -> str:
    """Return the SHA-256 of the server's certificate in DER, in the form of `Account.tls_fingerprint`."""
    certificate = secured.getpeercert(binary_form=True)
    assert certificate is not None, "a client always gets one"
    return hashlib.sha256(certificate).hexdigest()


def is_this_machine(account: Account, sock: socket.socket) -> bool:
    """Return whether the connection never leaves this machine, by the host's name and by its address.

    A name that only resolves to a loopback address does not count, because that depends on a name server.
    """
    try:
        named = account.host == "localhost" or ipaddress.ip_address(account.host).is_loopback
        return named and ipaddress.ip_address(sock.getpeername()[0]).is_loopback
    except (ValueError, OSError):
        return False


def explain(error: Exception, account: Account, timeout: float) -> ConnectionLost:
    """Return the error for a failure before the login: cause and remedy on one line."""
    host = account.host
    where = f"{host}:{account.port}"
    usual = (
        "IMAP over TLS is usually port 993" if account.security == "tls" else "STARTTLS is usually port 143"
    )
    match error:
        case ConnectionLost():
            return error
        case TimeoutError():
            return TimedOut(
                f"{where} did not answer within {timeout:g} s",
                remedy=f"check host, port and firewall ({usual})",
            )
        case ssl.SSLCertVerificationError():
            return CertificateRejected(
                f"the certificate of {host} does not verify: {error.verify_message}",
                remedy="if you trust its issuer, name it with --ca-file; if you know the certificate itself,"
                " --tls-fingerprint pins it ('imapfs check' shows the fingerprint)",
            )
        case ssl.SSLError(reason=reason) if reason in NOT_TLS:
            if account.security == "tls":
                return TlsError(
                    f"{where} does not speak TLS",
                    remedy="use the server's IMAPS port, usually 993, or imap://",
                )
            return TlsError(
                f"{where} agreed to STARTTLS and then did not speak TLS",
                remedy="use imaps://, usually port 993",
            )
        case ssl.SSLError(reason="UNSUPPORTED_PROTOCOL" | "TLSV1_ALERT_PROTOCOL_VERSION"):
            return TlsError(
                f"{where} offers only TLS older than 1.2, which are not safe",
                remedy="its administrator must update it",
            )
        case ssl.SSLError(reason="TLSV13_ALERT_CERTIFICATE_REQUIRED" | "SSLV3_ALERT_HANDSHAKE_FAILURE") if (
            account.client_cert is None
        ):
            return TlsError(
                f"{where} refuses the TLS handshake",
                remedy="it may require a client certificate, --client-cert",
            )
        case ssl.SSLError(reason=reason) if account.client_cert is not None and reason in _CERTIFICATE_ALERTS:
            return TlsError(
                f"{where} does not accept the client certificate {account.client_cert}: {words(reason)}"
            )
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return ConnectionLost(f"{where} hung up during the TLS handshake: it may be too busy")
        case ssl.SSLError(reason=reason) if "ALERT" in (reason or ""):
            return ConnectionLost(f"{where} refuses a TLS connection: {words(reason)}")
        case ssl.SSLError():
            return TlsError(f"no TLS connection to {where}: {words(error.reason or str(error))}")
        case socket.gaierror():
            return ConnectionLost(
                f"the name {host} cannot be resolved", remedy="check its spelling and your network"
            )
        case UnicodeError():
            return ConnectionLost(f"{host} is not a valid host name", remedy="check its spelling")
        case ConnectionRefusedError():
            return ConnectionLost(f"{where} refuses connections", remedy=f"check the port ({usual})")
        case OSError():
            return ConnectionLost(f"cannot reach {where}: {error.strerror or error}")
        case _:
            return ConnectionLost(f"cannot connect to {where}: {error}")


def words(reason: str) -> str:
    """Return OpenSSL's name of an error in readable form."""
    return reason.replace("_", " ").lower()
