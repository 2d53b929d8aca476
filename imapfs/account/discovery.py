"""From an e-mail address to where its IMAP server is.

Asked are, all at once and each for a few seconds at most: the SRV records of the domain (RFC 6186), the
autoconfig file at the domain's own well-known places, its MX records, and whether a server with a valid
certificate answers under the names that most domains use. Nothing here knows a password. What comes back is
a proposal: `Settings.doubt` says why a person has to look at it before a password goes there.
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
"""Seconds after which what has not answered is done without."""
MAX_FILE: Final = 64 << 10
"""Largest autoconfig file that is read, in bytes."""
_MAX_REDIRECTS: Final = 3
_MAX_GREETING: Final = 1 << 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """A server to log in to, and how it was found."""

    host: str
    port: int
    security: Security
    user: str
    found: str
    """Where these settings come from, for people."""
    sign_in: SignIn = "password"
    provider: Provider | None = None
    """Whose server it is, where that is known; for what it has to say to its users."""
    doubt: str | None = None
    """Why the host may be somebody else's; None where the domain vouches for it in a way not to be forged."""


class Found(NamedTuple):
    settings: list[Settings]
    """The most trustworthy first; no two with the same server and user."""
    provider: Provider | None
    """Who has the domain's mail, where that is known; perhaps without IMAP."""


class Address(NamedTuple):
    local: str
    domain: str
    """In lower case, and as DNS has it (RFC 5890 A-labels)."""

    def __str__(self) -> str:
        return f"{self.local}@{self.domain}"


def parse_address(text: str) -> Address:
    """The parts of an e-mail address. Raises UsageError."""
    local, _, domain = text.strip().rpartition("@")
    try:
        convert("user", local)
        convert("host", domain)
        ascii_domain = domain.lower().rstrip(".").encode("idna").decode()
    except (ValueError, UnicodeError):
        raise UsageError("this is no e-mail address: write it like alice@example.org") from None
    if any(char.isspace() for char in local) or ":" in ascii_domain:
        raise UsageError("this is no e-mail address: write it like alice@example.org")
    return Address(local, ascii_domain)


# ---- The network


def _query(name: str, kind: str) -> list[Any]:
    import dns.resolver

    return list(dns.resolver.resolve(name, kind, lifetime=TIMEOUT))


def _connect(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), TIMEOUT)


@dataclass(frozen=True, slots=True)
class Network:
    """The ways out, which tests lead to a world of their own."""

    query: Callable[[str, str], list[Any]] = _query
    """The records of a DNS name; raises a DNSException where there are none."""
    connect: Callable[[str, int], socket.socket] = _connect
    ca_file: Path | None = None
    """PEM certificates to trust instead of the system's."""

    def connect_tls(self, host: str, port: int) -> ssl.SSLSocket:
        """A connection to the very server that ``host`` names, by its certificate. Raises OSError."""
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


def discover(address: Address, network: Network | None) -> Found:
    """What there is to be known of where the mail of ``address`` is; never raises.

    Without ``network`` nobody is asked, and only the table of providers is looked into.
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
        f"only DNS, which can be forged, says who takes the mail of {address.domain}, and it may be kept "
        "elsewhere: make sure that your mail is there"
    )
    provider: Provider | None = next(iter(answers.pop("mx")), None)
    every: list[Settings] = [one for found in answers.values() for one in found]
    every += _at_provider(provider, address, f"the MX records of {address.domain}", doubt)
    # Stable: among those to be trusted, what the domain says comes before what was guessed.
    every.sort(key=lambda one: one.doubt is not None)
    best: dict[tuple[str, int, str], Settings] = {}
    for one in every:
        best.setdefault((one.host, one.port, one.user), one)
    return Found([with_provider(one) for one in best.values()], provider)


def _ask(questions: Mapping[str, Callable[[], list[Any]]]) -> dict[str, list[Any]]:
    """The answers to ``questions`` that come in time, in the same order; the others are empty.

    A thread each: name resolution cannot be ended, so that what is late is left behind.
    """
    answers: dict[str, list[Any]] = {name: [] for name in questions}

    def ask(name: str) -> None:
        try:
            found = questions[name]()
        except Exception as error:
            # Most domains answer few of the questions, and a strange answer is as good as none.
            _log.debug("looking for settings, %s: %s: %s", name, type(error).__name__, error)
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
    provider: Provider | None, address: Address, found: str, doubt: str | None = None
) -> list[Settings]:
    if provider is None or provider.host is None:
        return []
    user = address.local if provider.user == "local" else str(address)
    return [Settings(provider.host, 993, "tls", user, found, provider.sign_in, provider, doubt)]


def with_provider(settings: Settings) -> Settings:
    """``settings``, and what the table of providers knows about this server."""
    provider = settings.provider or providers.by_host(settings.host)
    if provider is None:
        return settings
    return replace(settings, provider=provider, sign_in=provider.sign_in)


def _from_srv(address: Address, network: Network) -> list[Settings]:
    """RFC 6186 section 3.2: TLS first, and STARTTLS where there is no TLS."""
    found: list[Settings] = []
    kinds: dict[str, Security] = {"_imaps._tcp": "tls", "_imap._tcp": "starttls"}
    for service, security in kinds.items():
        with contextlib.suppress(Exception):
            found += _from_srv_records(address, security, network.query(f"{service}.{address.domain}", "SRV"))
    return found


def _from_srv_records(address: Address, security: Security, records: list[Any]) -> list[Settings]:
    # RFC 2782 shares load out at random by weight. Here one name is chosen once, for years, and a person who
    # tries again should see the same one.
    first = min(records, key=lambda record: (record.priority, -record.weight))
    host = first.target.to_text(omit_final_dot=True).lower()
    if host == ".":
        return []  # "decidedly not available at this domain" (RFC 2782)
    doubt = None
    if not within(host, address.domain):
        doubt = (
            f"only DNS, which can be forged, says that {host} has the mail of {address.domain}: "
            "make sure that it is your provider's (RFC 6186 section 6)"
        )
    return [_checked(host, first.port, security, str(address), f"the SRV records of {address.domain}", doubt)]


def _from_mx(address: Address, network: Network) -> list[Provider]:
    """Who takes the domain's mail, the preferred first, of those that we know."""
    records = sorted(network.query(address.domain, "MX"), key=lambda record: record.preference)
    hosts = [record.exchange.to_text(omit_final_dot=True).lower() for record in records]
    return [known for known in map(providers.by_mail_exchanger, hosts) if known is not None]


def _by_trying(address: Address, network: Network, host: str) -> list[Settings]:
    with network.connect_tls(host, 993) as connection:
        greeting = b""
        while b"\n" not in greeting and len(greeting) < _MAX_GREETING:
            data = connection.recv(_MAX_GREETING)
            if not data:
                break
            greeting += data
    if not greeting.startswith(b"* "):
        return []
    return [
        _checked(host, 993, "tls", str(address), "a guess, but it answers there with a valid certificate")
    ]


def _checked(
    host: str, port: int, security: Security, user: str, found: str, doubt: str | None = None
) -> Settings:
    """What a stranger said, held to what the configuration file takes. Raises ValueError."""
    convert("port", port)
    convert("user", user)
    return Settings(str(convert("host", host)), port, security, user, found, doubt=doubt)


# ---- The autoconfig file


def _from_autoconfig(address: Address, network: Network, host: str, folder: str) -> list[Settings]:
    url = f"https://{host}/{folder}/config-v1.1.xml"
    data = _download(f"{url}?emailaddress={quote(str(address), safe='')}", network)
    return parse_autoconfig(data, address, url)


def _download(url: str, network: Network) -> bytes:
    """The file at ``url``; raises OSError, HTTPException or ValueError. HTTPS only, also when redirected."""
    for _ in range(1 + _MAX_REDIRECTS):
        parts = urlsplit(url)
        if parts.scheme != "https" or parts.port not in (None, 443) or not parts.hostname:
            raise ValueError("not at an https:// address")
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


def parse_autoconfig(data: bytes, address: Address, found: str) -> list[Settings]:
    """The IMAP servers in an autoconfig file, version 1.1, those with TLS from the first byte first.

    Raises ValueError or ExpatError for what is no such file, or declares a document type.
    """
    servers = [
        settings
        for element in _parse_xml(data).iter("incomingServer")
        if element.get("type") == "imap"
        for settings in _imap_server(element, address, found)
    ]
    return sorted(servers, key=lambda one: one.security != "tls")


def _parse_xml(data: bytes) -> Element:
    """The root element. A document type is refused: nothing needs one, and entities are declared there."""
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


def _imap_server(element: Element, address: Address, found: str) -> Iterator[Settings]:
    """One or none; of several values of one kind the first that we can use counts."""
    names = {
        "EMAILADDRESS": str(address),
        "EMAILLOCALPART": address.local,
        "EMAILDOMAIN": address.domain,
    }

    def text(tag: str) -> str:
        # A placeholder that we do not know stays as it is, and no host has a "%" in it.
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
        settings = _checked(text("hostname"), int(port), security, user, found)
        ways = {(way.text or "").strip() for way in element.iter("authentication")}
        yield replace(settings, sign_in="oauth") if ways == {"OAuth2"} else settings
