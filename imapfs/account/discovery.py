"""Find the IMAP server of an e-mail address.

Several questions are asked at the same time, each for a few seconds at most: the domain's SRV records (RFC
6186), the autoconfig file at the domain's well-known addresses, its MX records, and whether a server with a
valid certificate answers under the usual names. No password is involved. The result is a proposal:
`MailServer.doubt` says why a person must confirm it before a password is sent there.

The HTTP client here fetches public files from hosts that are only guesses. `post` has another one, which see.
"""

import contextlib
import http.client
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urljoin, urlsplit
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from imapfs.account import providers
from imapfs.account.providers import Provider, SignIn, within
from imapfs.account.settings import convert
from imapfs.errors import UsageError
from imapfs.imap.connect import tls_context
from imapfs.model import DEFAULT_PORTS, Account, Security

TIMEOUT: Final = 5.0
"""Seconds that each question may take."""
MAX_FILE: Final = 64 << 10
"""Maximum size of an autoconfig file in bytes."""
_MAX_REDIRECTS: Final = 3
_MAX_GREETING: Final = 1 << 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MailServer:
    """A server to log in to, and how it was found."""

    host: str
    port: int
    security: Security
    user: str
    found: str
    """Where these settings come from, for people."""
    sign_in: SignIn = "password"
    provider: Provider | None = None
    """Who runs the server, if known; for what the provider tells its users."""
    doubt: str | None = None
    """Why the host may not be the right one; None if the domain vouches for it in a way that cannot be
    forged."""


class Found(NamedTuple):
    servers: list[MailServer]
    """The most trustworthy first; no two with the same host, port and user."""
    provider: Provider | None
    """Who has the domain's mail, if known; perhaps without IMAP."""


class EmailAddress(NamedTuple):
    local: str
    domain: str
    """In lower case, with A-labels (RFC 5890)."""

    def __str__(self) -> str:
        return f"{self.local}@{self.domain}"


def parse_address(text: str) -> EmailAddress:
    """Return the parts of an e-mail address. Raises UsageError."""
    local, _, domain = text.strip().rpartition("@")
    try:
        convert("user", local)
        convert("host", domain)
        ascii_domain = domain.lower().rstrip(".").encode("idna").decode()
    except (ValueError, UnicodeError):
        raise UsageError("this is not an e-mail address: write it like alice@example.org") from None
    if any(char.isspace() for char in local) or ":" in ascii_domain:
        raise UsageError("this is not an e-mail address: write it like alice@example.org")
    return EmailAddress(local, ascii_domain)


# ---- The network


def _query(name: str, kind: str) -> list[Any]:
    import dns.resolver

    return list(dns.resolver.resolve(name, kind, lifetime=TIMEOUT))


def _connect(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), TIMEOUT)


@dataclass(frozen=True, slots=True)
class Network:
    """How the network is reached; tests replace it with a network of their own."""

    query: Callable[[str, str], list[Any]] = _query
    """Returns the records of a DNS name and type. Raises DNSException if there are none."""
    connect: Callable[[str, int], socket.socket] = _connect
    ca_file: Path | None = None
    """PEM certificates to trust instead of the system's."""

    def connect_tls(self, host: str, port: int) -> ssl.SSLSocket:
        """Return a connection to a server whose certificate is valid for ``host``. Raises OSError."""
        context = tls_context(Account(host, user="", ca_file=self.ca_file))
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(self.connect(host, port))
            secured = context.wrap_socket(sock, server_hostname=host)
            stack.pop_all()
            return secured


class _Https(http.client.HTTPSConnection):
    def __init__(self, network: Network, host: str) -> None:
        super().__init__(host, timeout=TIMEOUT)
        self._network = network

    def connect(self) -> None:
        self.sock = self._network.connect_tls(self.host, 443)


# ---- Finding


def discover(address: EmailAddress, network: Network | None) -> Found:
    """Return the possible servers of ``address``. Never raises.

    Without ``network`` only the table of providers is consulted.
    """
    known = providers.by_domain(address.domain)
    if known is not None or network is None:
        return Found(_at_provider(known, address, "the table that comes with imapfs"), known)
    answers = _ask(
        {
            "srv": lambda: _from_srv(address, network),
            "autoconfig": lambda: _from_autoconfig(address, network, f"autoconfig.{address.domain}", "mail"),
            "well-known": lambda: _from_autoconfig(
                address, network, address.domain, ".well-known/autoconfig/mail"
            ),
            "mx": lambda: _from_mx(address, network),
            "imap": lambda: _by_trying(address, network, f"imap.{address.domain}"),
            "mail": lambda: _by_trying(address, network, f"mail.{address.domain}"),
        }
    )
    doubt = (
        f"only DNS, which can be forged, says who receives the mail of {address.domain}, and it may be kept "
        "elsewhere: make sure that your mail is there"
    )
    provider: Provider | None = next(iter(answers.pop("mx")), None)
    every: list[MailServer] = [one for found in answers.values() for one in found]
    every += _at_provider(provider, address, f"the MX records of {address.domain}", doubt)
    # The sort is stable: among servers without doubt, the domain's own come before guesses.
    every.sort(key=lambda one: one.doubt is not None)
    best: dict[tuple[str, int, str], MailServer] = {}
    for one in every:
        best.setdefault((one.host, one.port, one.user), one)
    return Found([with_provider(one) for one in best.values()], provider)


def _ask(questions: Mapping[str, Callable[[], list[Any]]]) -> dict[str, list[Any]]:
    """Return the answers to ``questions`` that arrive in time, in the same order; the others are empty.

    Each question has a daemon thread, which is left behind if it is late: name resolution cannot be
    interrupted.
    """
    answers: dict[str, list[Any]] = {name: [] for name in questions}

    def ask(name: str) -> None:
        try:
            found = questions[name]()
        except Exception as error:
            # Most domains answer only a few questions, and a malformed answer counts as none.
            _log.debug("searching for the server, %s: %s: %s", name, type(error).__name__, error)
        else:
            answers[name] = found

    deadline = time.monotonic() + 2 * TIMEOUT
    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


def _at_provider(
    provider: Provider | None, address: EmailAddress, found: str, doubt: str | None = None
) -> list[MailServer]:
    if provider is None or provider.host is None:
        return []
    user = address.local if provider.user == "local" else str(address)
    return [MailServer(provider.host, 993, "tls", user, found, provider.sign_in, provider, doubt)]


def with_provider(server: MailServer) -> MailServer:
    """Return ``server`` with what the table of providers knows about it."""
    provider = server.provider or providers.by_host(server.host)
    if provider is None:
        return server
    return replace(server, provider=provider, sign_in=provider.sign_in)


def _from_srv(address: EmailAddress, network: Network) -> list[MailServer]:
    """Return the servers of the SRV records, those with TLS first (RFC 6186 section 3.2)."""
    found: list[MailServer] = []
    kinds: dict[str, Security] = {"_imaps._tcp": "tls", "_imap._tcp": "starttls"}
    for service, security in kinds.items():
        with contextlib.suppress(Exception):
            found += _from_srv_records(address, security, network.query(f"{service}.{address.domain}", "SRV"))
    return found


def _from_srv_records(address: EmailAddress, security: Security, records: list[Any]) -> list[MailServer]:
    # RFC 2782 distributes load at random, by weight. Here a name is chosen once, for years, and a person who
    # tries again should see the same name.
    first = min(records, key=lambda record: (record.priority, -record.weight))
    host = first.target.to_text(omit_final_dot=True).lower()
    if host == ".":
        return []  # "decidedly not available at this domain" (RFC 2782)
    doubt = None
    if not within(host, address.domain):
        doubt = (
            f"only DNS, which can be forged, says that {host} has the mail of {address.domain}: "
            "make sure that the host belongs to your provider (RFC 6186 section 6)"
        )
    return [_checked(host, first.port, security, str(address), f"the SRV records of {address.domain}", doubt)]


def _from_mx(address: EmailAddress, network: Network) -> list[Provider]:
    """Return the known providers that receive the domain's mail, by preference."""
    records = sorted(network.query(address.domain, "MX"), key=lambda record: record.preference)
    hosts = [record.exchange.to_text(omit_final_dot=True).lower() for record in records]
    return [known for known in map(providers.by_mail_exchanger, hosts) if known is not None]


def _by_trying(address: EmailAddress, network: Network, host: str) -> list[MailServer]:
    with network.connect_tls(host, 993) as connection:
        greeting = b""
        while b"\n" not in greeting and len(greeting) < _MAX_GREETING:
            data = connection.recv(_MAX_GREETING)
            if not data:
                break
            greeting += data
    if not greeting.startswith(b"* "):
        return []
    return [_checked(host, 993, "tls", str(address), "a guess, but it answers with a valid certificate")]


def _checked(
    host: str, port: int, security: Security, user: str, found: str, doubt: str | None = None
) -> MailServer:
    """Check untrusted values as those of the configuration file are checked. Raises ValueError."""
    convert("port", port)
    convert("user", user)
    return MailServer(str(convert("host", host)), port, security, user, found, doubt=doubt)


# ---- The autoconfig file


def _from_autoconfig(address: EmailAddress, network: Network, host: str, folder: str) -> list[MailServer]:
    url = f"https://{host}/{folder}/config-v1.1.xml"
    data = _download(f"{url}?emailaddress={quote(str(address), safe='')}", network)
    return parse_autoconfig(data, address, url)


def _download(url: str, network: Network) -> bytes:
    """Return the file at ``url``. Only HTTPS is used, also after a redirection.

    Raises OSError, HTTPException or ValueError.
    """
    for _ in range(1 + _MAX_REDIRECTS):
        parts = urlsplit(url)
        if parts.scheme != "https" or parts.port not in (None, 443) or not parts.hostname:
            raise ValueError("not an https:// address")
        connection = _Https(network, parts.hostname)
        with contextlib.closing(connection):
            connection.request("GET", f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}")
            response = connection.getresponse()
            location = response.headers.get("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                url = urljoin(url, location)
                continue
            if response.status != 200:
                raise ValueError(f"HTTP status {response.status}")
            data = response.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ValueError("too large")
        return data
    raise ValueError("too many redirections")


def parse_autoconfig(data: bytes, address: EmailAddress, found: str) -> list[MailServer]:
    """Return the IMAP servers in an autoconfig file, version 1.1; those with implicit TLS first.

    Raises ValueError or ExpatError if it is not such a file, or if it declares a document type.
    """
    servers = [
        server
        for element in _parse_xml(data).iter("incomingServer")
        if element.get("type") == "imap"
        for server in _imap_server(element, address, found)
    ]
    return sorted(servers, key=lambda one: one.security != "tls")


def _parse_xml(data: bytes) -> Element:
    """Return the root element. A document type, which could declare entities, is refused."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise ValueError("declares a document type")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(data, True)
    return builder.close()


def _imap_server(element: Element, address: EmailAddress, found: str) -> Iterator[MailServer]:
    """Yield the server of an element, if it is usable."""
    names = {
        "EMAILADDRESS": str(address),
        "EMAILLOCALPART": address.local,
        "EMAILDOMAIN": address.domain,
    }

    def text(tag: str) -> str:
        # An unknown placeholder remains, and its "%" makes a host name invalid.
        return re.sub(
            r"%([A-Z]+)%", lambda match: names.get(match[1], match[0]), (element.findtext(tag) or "").strip()
        )

    security: Security | None = {"SSL": "tls", "STARTTLS": "starttls"}.get(text("socketType"))  # type: ignore[assignment]
    if security is None:
        return
    port = text("port") or str(DEFAULT_PORTS[security])
    user = text("username") or str(address)
    if not port.isdecimal() or re.search(r"%[A-Z]+%", user):
        return
    with contextlib.suppress(ValueError):
        server = _checked(text("hostname"), int(port), security, user, found)
        methods = {(method.text or "").strip() for method in element.findall("authentication")}
        yield replace(server, sign_in="oauth") if methods == {"OAuth2"} else server
