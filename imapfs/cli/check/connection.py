"""The steps of ``imapfs check`` from the host's name to the greeting: everything before the login."""

import contextlib
import dataclasses
import os
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from imapfs.cli.check import probe
from imapfs.cli.check.finding import Result
from imapfs.errors import CertificateRejected, ConnectionLost, ImapfsError, TlsError
from imapfs.imap import connect
from imapfs.imap.wire import Wire
from imapfs.model import Account, MountConfig

_MAX_STEP_SECONDS: Final = 10.0
"""Maximum wait for each of: the name servers, TCP, the handshake. At most the account's timeout."""
_LISTEN_SECONDS: Final = 3.0
"""Seconds that a server which does not speak TLS has to say in the clear what it is."""
_SOON: Final = 1 / 6
"""Remaining part of a certificate's life below which there is a warning: most are renewed at a third."""


class ConnectionSteps:
    """Each step needs the one before, and keeps what it found for the next."""

    def __init__(self, config: MountConfig) -> None:
        self._timeout = config.timeout
        self._account = config.account
        self._seconds = min(_MAX_STEP_SECONDS, config.timeout)
        self._addresses: list[probe.Address] = []
        self._handshake: probe.Handshake | None = None
        self._greeting: str | ImapfsError = ""

    def resolution(self) -> Iterator[Result]:
        self._addresses = probe.resolve(self._account.host, self._account.port, self._seconds)
        yield Result("ok", ", ".join(address.ip for address in self._addresses))

    def tcp(self) -> Iterator[Result]:
        """Find out which addresses accept a connection; a mount tries them in order."""
        reached = probe.reach(self._addresses, self._seconds)
        where = f"port {self._account.port}"
        usable = [address for address, outcome in reached.items() if isinstance(outcome, float)]
        if not usable:
            yield _unreachable(list(reached.values()), where, self._seconds)
            return
        silent = [a.ip for a in self._addresses if isinstance(reached[a], TimeoutError)]
        shown = ", ".join(f"{a.ip} in {milliseconds(o)}" for a, o in reached.items() if isinstance(o, float))
        if silent:
            yield Result(
                "warning",
                f"{where} answers at {shown}, but not at {', '.join(silent)}",
                "every connection may first wait there: have the address removed from the host's DNS records,"
                " or repair this machine's IPv6",
            )
        else:
            refused = ", ".join(a.ip for a, outcome in reached.items() if isinstance(outcome, OSError))
            yield Result("ok", f"{where} answers at {shown}" + (f" (not at {refused})" if refused else ""))
        self._addresses = usable

    def protocol(self) -> Iterator[Result]:
        """Find out whether the server speaks TLS or cleartext, as the account expects."""
        account = self._account
        if account.security == "starttls":
            yield self._expect_cleartext()
            return
        try:
            self._handshake = probe.handshake(account, self._addresses[0], self._seconds)
        except OSError as error:
            if _is_about_tls(error):
                # The next step says what is wrong with it.
                yield Result("ok", "TLS answers")
                return
            line = self._first_line(min(_LISTEN_SECONDS, self._seconds))
            if probe.protocol(line) == "IMAP":
                yield Result(
                    "failed",
                    f"port {account.port} speaks IMAP without TLS",
                    f"if the server offers STARTTLS there, write imap://{account.user}@{account.host}:"
                    f"{account.port}; otherwise use its port for TLS, usually 993",
                )
            elif line:
                yield self._not_imap(line)
            else:
                raise connect.explain(error, account, self._seconds) from None
            return
        yield Result("ok", "TLS answers")

    def _expect_cleartext(self) -> Result:
        account = self._account
        line = self._first_line(min(_LISTEN_SECONDS, self._seconds))
        if not line:
            # A server that expects TLS waits for the client to speak first.
            as_tls = dataclasses.replace(account, security="tls")
            with contextlib.suppress(OSError, ConnectionLost):
                probe.handshake(as_tls, self._addresses[0], self._seconds)
                return Result(
                    "failed",
                    f"port {account.port} speaks TLS from the first byte, not STARTTLS",
                    f"write imaps://{account.user}@{account.host}:{account.port}",
                )
            line = self._first_line(self._timeout)
        if not line:
            return Result("failed", f"port {account.port} says nothing", "check host and port (usually 143)")
        if probe.protocol(line) != "IMAP":
            return self._not_imap(line)
        return Result("ok", "IMAP answers, for STARTTLS")

    def _first_line(self, seconds: float) -> str:
        with contextlib.suppress(OSError):
            return probe.first_line(self._addresses[0], seconds)
        return ""

    def _not_imap(self, line: str) -> Result:
        known = probe.protocol(line)
        what = f"speaks {known}" if known else f"says {line[:80]!r}"
        return Result(
            "failed",
            f"port {self._account.port} {what}, which is not IMAP",
            "check host and port: IMAP over TLS usually uses 993, with STARTTLS 143",
        )

    def tls(self) -> Iterator[Result]:
        if self._handshake is None:
            try:
                self._handshake = probe.handshake(self._account, self._addresses[0], self._seconds)
            except OSError as error:
                raise connect.explain(error, self._account, self._seconds) from None
        if self._handshake is not None:
            yield Result("ok", f"{self._handshake.version} with {self._handshake.cipher}")
            return
        with contextlib.closing(self._open()) as wire:
            assert not wire.encrypted
        yield Result(
            "warning",
            "no STARTTLS: password and mail are sent in the clear, as allowed for this machine itself or by"
            " insecure-plaintext",
            "have the server offer TLS",
        )

    def _open(self) -> Wire:
        """Return a connection as a mount makes it, before the login."""
        return Wire.open(self._account, connect.tls_context(self._account), self._timeout)

    def certificate(self) -> Iterator[Result]:
        """Show the certificate, and find out whether a mount accepts it."""
        account = self._account
        shown = None
        if self._handshake is not None:
            try:
                shown = probe.describe(self._handshake.certificate)
            except ValueError as error:
                yield Result("failed", f"cannot be read: {error}", "the server's owner must replace it")
                return
        try:
            with contextlib.closing(self._open()) as wire:
                self._greeting = _greeting(wire)
        except CertificateRejected as error:
            assert shown is not None
            yield Result("failed", f"{error.problem} ({_summary(shown)})", _remedy(shown, account, error))
            return
        except TlsError:
            raise
        except ConnectionLost as error:
            # Not the certificate's fault: the next step reports it.
            self._greeting = error
        if shown is None:
            yield Result("warning", "there is no certificate, as there is no TLS")
            return
        pinned = account.tls_fingerprint is not None
        left = (shown.expires - datetime.now(UTC)) / (shown.expires - shown.begins)
        if left < _SOON and not pinned:
            yield Result("warning", _summary(shown), "its owner should renew it soon")
        else:
            yield Result("ok", _summary(shown) + (", pinned" if pinned else ", verified"))
        if not pinned:
            yield Result("ok", f"to trust only this certificate: {_pin(shown)}")

    def greeting(self) -> Iterator[Result]:
        if isinstance(self._greeting, ImapfsError):
            raise self._greeting
        yield Result("ok", self._greeting)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _is_about_tls(error: OSError) -> bool:
    """Return whether a handshake that failed with ``error`` was with a server that speaks TLS."""
    hung_up = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    return isinstance(error, ssl.SSLError) and not hung_up and error.reason not in connect.NOT_TLS


def _unreachable(outcomes: list[float | OSError], where: str, seconds: float) -> Result:
    """Return why none of the addresses accepts a connection."""
    if any(isinstance(outcome, ConnectionRefusedError) for outcome in outcomes):
        return Result(
            "failed",
            f"{where} refuses connections: no server listens there",
            "check host and port: IMAP over TLS usually uses 993, with STARTTLS 143",
        )
    if any(isinstance(outcome, TimeoutError) for outcome in outcomes):
        return Result(
            "failed",
            f"{where} does not answer within {seconds:g} s",
            "a firewall may be in the way: try another network, and check host and port (usually 993)",
        )
    first = next(outcome for outcome in outcomes if isinstance(outcome, OSError))
    return Result(
        "failed",
        f"{where} cannot be reached: {os.strerror(first.errno or 0)}",
        "check this machine's network",
    )


def _greeting(wire: Wire) -> str:
    """Return the greeting without its response code, and the login mechanisms."""
    text = wire.greeting[wire.greeting.find("]") + 1 :] if wire.greeting.startswith("[") else wire.greeting
    ways = sorted(c.removeprefix("AUTH=") for c in wire.capabilities if c.startswith("AUTH="))
    if "LOGINDISABLED" not in wire.capabilities and "LOGIN" not in ways:
        ways.append("LOGIN")
    return f"{text.strip()[:200] or 'no text'} (login with {', '.join(ways) or 'no known mechanism'})"


# ---- Certificates


def _summary(certificate: probe.Certificate) -> str:
    left = (certificate.expires - datetime.now(UTC)).days
    until = f"until {certificate.expires:%Y-%m-%d} ({left} days left)"
    if left < 0:
        until = f"expired on {certificate.expires:%Y-%m-%d} ({-left} days ago)"
    by = "self-signed" if certificate.self_signed else f"issued by {certificate.issuer}"
    return f"for {', '.join(certificate.names[:5]) or certificate.subject}, {by}, {until}"


def _remedy(certificate: probe.Certificate, account: Account, error: CertificateRejected) -> str:
    """Return what to do about a certificate that is not trusted."""
    if account.tls_fingerprint is not None:
        return f"only if you know that it was renewed: {_pin(certificate)}"
    now = datetime.now(UTC)
    if certificate.begins > now:
        return f"check this machine's clock, which says {now:%Y-%m-%d %H:%M} UTC"
    if certificate.expires < now:
        return f"its owner must renew it; or, if you trust it anyway: {_pin(certificate)}"
    if "mismatch" in error.problem and certificate.names:
        return (
            f"use a name that it is for, not {account.host}; or, if you trust it anyway: {_pin(certificate)}"
        )
    return f"give its issuer's certificate with --ca-file; or, if you trust it anyway: {_pin(certificate)}"


def _pin(certificate: probe.Certificate) -> str:
    digits = certificate.fingerprint
    return f'--tls-fingerprint {digits}, or in the configuration file: tls-fingerprint = "{digits}"'
