"""From an address to settings, asked of a name server, a web server and mail servers on the loopback."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import dns.resolver
import pytest

from imapfs.account import discovery, providers
from imapfs.account.discovery import Found, MailServer, discover, parse_address, parse_autoconfig
from imapfs.account.oauth import PROVIDERS
from imapfs.errors import UsageError
from tests.support.servers.domain import Domain, Page
from tests.support.servers.tls import CertificateAuthority

ALICE = parse_address("alice@example.org")
WELL_KNOWN = "https://example.org/.well-known/autoconfig/mail/config-v1.1.xml"
AUTOCONFIG = "https://autoconfig.example.org/mail/config-v1.1.xml"


@pytest.fixture
def domain(ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Domain]:
    monkeypatch.setattr(discovery, "TIMEOUT", 3.0)
    with Domain(ca, "example.org", "autoconfig.example.org", "other.net") as made:
        yield made


def srv(domain: Domain, *records: str, service: str = "_imaps._tcp", of: str = "example.org") -> None:
    domain.records[f"{service}.{of}", "SRV"] = list(records)


def file(*servers: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="UTF-8"?><clientConfig version="1.1"><emailProvider id="example.org">'
        + "".join(servers)
        + "</emailProvider></clientConfig>"
    ).encode()


def server(
    host: str = "mx.example.org",
    port: str = "993",
    socket: str = "SSL",
    user: str = "%EMAILADDRESS%",
    kind: str = "imap",
    more: str = "",
) -> str:
    return (
        f'<incomingServer type="{kind}"><hostname>{host}</hostname><port>{port}</port>'
        f"<socketType>{socket}</socketType><username>{user}</username>{more}</incomingServer>"
    )


def places(found: Found | list[MailServer]) -> list[tuple[str, int, str, str]]:
    settings = found.servers if isinstance(found, Found) else found
    return [(one.host, one.port, one.security, one.user) for one in settings]


# ---- The address


def test_address_is_taken_apart() -> None:
    assert parse_address(" Alice+x@Example.ORG ") == ("Alice+x", "example.org")
    assert parse_address("a@müller.de").domain == "xn--mller-kva.de"
    assert str(parse_address('"a@b"@example.org')) == '"a@b"@example.org'


@pytest.mark.parametrize(
    "text", ["", "alice", "@example.org", "alice@", "a b@c.de", "a@b c", "a@[::1]", "a@b/c", "a\x07@b.de"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"alice@example\.org"):
        parse_address(text)


# ---- The table


def test_table_is_complete_and_unambiguous() -> None:
    domains = [domain for provider in providers.table() for domain in (*provider.domains, *provider.mx)]
    own = [domain for provider in providers.table() for domain in provider.domains]
    assert len(own) == len(set(own))
    assert all(re.fullmatch(r"[a-z0-9.-]+\.[a-z]+", domain) for domain in domains)
    for provider in providers.table():
        assert provider.source.startswith("https://"), provider.name
        assert provider.page is None or provider.page.startswith("https://"), provider.name
        assert provider.oauth is None or provider.oauth in PROVIDERS, provider.name
        assert provider.hint is not None or provider.sign_in == "password", provider.name
        assert provider.host is not None or provider.hint is not None, provider.name


def test_table_says_nothing_that_is_not_used() -> None:
    text = Path(providers.__file__).with_suffix(".toml").read_text()
    known = {"name", "domains", "mx", "host", "user", "sign-in", "oauth", "hint", "page", "source"}
    assert {key for entry in tomllib.loads(text)["provider"] for key in entry} == known


def test_known_domain_needs_no_network() -> None:
    found = discover(parse_address("a@gmail.com"), None)
    assert places(found) == [("imap.gmail.com", 993, "tls", "a@gmail.com")]
    assert found.servers[0].sign_in == "app"
    assert found.servers[0].doubt is None
    assert places(discover(parse_address("a@icloud.com"), None)) == [("imap.mail.me.com", 993, "tls", "a")]


def test_known_domain_asks_nobody(domain: Domain) -> None:
    srv(domain, "0 1 993 evil.net.", of="gmail.com")
    assert [one.host for one in discover(parse_address("a@gmail.com"), domain.network).servers] == [
        "imap.gmail.com"
    ]
    assert domain.asked == []


def test_provider_without_imap_is_told_apart_from_an_unknown_one() -> None:
    found = discover(parse_address("a@tuta.io"), None)
    assert found.servers == []
    assert found.provider is not None
    assert found.provider.hint == "Tuta offers no IMAP"
    assert discover(ALICE, None) == ([], None)


# ---- SRV


def test_srv_record_names_server_and_port(domain: Domain) -> None:
    srv(domain, "0 1 9993 Mail.Example.org.")
    (found,) = discover(ALICE, domain.network).servers
    assert places([found]) == [("mail.example.org", 9993, "tls", "alice@example.org")]
    assert found.doubt is None


def test_srv_priority_goes_before_weight(domain: Domain) -> None:
    srv(domain, "10 99 993 c.example.org.", "5 1 993 b.example.org.", "5 7 993 a.example.org.")
    assert [one.host for one in discover(ALICE, domain.network).servers] == ["a.example.org"]


def test_srv_target_of_a_dot_is_no_offer(domain: Domain) -> None:
    srv(domain, "0 0 0 .")
    srv(domain, "0 1 143 mail.example.org.", service="_imap._tcp")
    assert places(discover(ALICE, domain.network)) == [
        ("mail.example.org", 143, "starttls", "alice@example.org")
    ]


def test_tls_from_the_first_byte_goes_before_starttls(domain: Domain) -> None:
    srv(domain, "0 1 143 mail.example.org.", service="_imap._tcp")
    srv(domain, "9 1 993 mail.example.org.")
    assert [one.port for one in discover(ALICE, domain.network).servers] == [993, 143]


def test_srv_to_another_domain_is_doubted_and_comes_last(domain: Domain) -> None:
    srv(domain, "0 1 993 imap.notexample.org.")
    domain.pages[WELL_KNOWN] = Page(file(server()))
    sure, doubtful = discover(ALICE, domain.network).servers
    assert (sure.host, sure.doubt) == ("mx.example.org", None)
    assert doubtful.host == "imap.notexample.org"
    assert "RFC 6186" in (doubtful.doubt or "")


def test_real_resolver_is_asked(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    srv(domain, "0 1 993 mail.example.org.")
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = domain.name_server
    monkeypatch.setattr(dns.resolver, "default_resolver", resolver)
    network = discovery.Network(connect=domain.network.connect)
    assert [one.host for one in discover(ALICE, network).servers] == ["mail.example.org"]


# ---- Autoconfig


@pytest.mark.parametrize("url", [WELL_KNOWN, AUTOCONFIG])
def test_autoconfig_of_the_domain_is_read(domain: Domain, url: str) -> None:
    domain.pages[url] = Page(file(server("imap.%EMAILDOMAIN%", user="%EMAILLOCALPART%")))
    (found,) = discover(ALICE, domain.network).servers
    assert places([found]) == [("imap.example.org", 993, "tls", "alice")]
    assert found.found == url
    assert f"{url}?emailaddress=alice%40example.org" in domain.asked


def test_autoconfig_is_followed_over_https_only(domain: Domain) -> None:
    domain.pages[AUTOCONFIG] = Page(status=302, location="http://other.net/c.xml")
    domain.pages[WELL_KNOWN] = Page(status=301, location="https://other.net/c.xml")
    domain.pages["https://other.net/c.xml"] = Page(file(server()))
    assert [one.host for one in discover(ALICE, domain.network).servers] == ["mx.example.org"]
    assert sum("other.net" in url for url in domain.asked) == 1


def test_autoconfig_that_leads_in_circles_or_is_endless_is_given_up(domain: Domain) -> None:
    domain.pages[AUTOCONFIG] = Page(status=302, location=AUTOCONFIG)
    domain.pages[WELL_KNOWN] = Page(file(server(), "<x/>" * discovery.MAX_FILE))
    assert discover(ALICE, domain.network).servers == []


def test_web_server_of_another_name_is_not_believed(domain: Domain, ca: CertificateAuthority) -> None:
    with Domain(ca, "wrong.org") as wrong:
        wrong.pages["https://example.org/.well-known/autoconfig/mail/config-v1.1.xml"] = Page(file(server()))
        domain.lead("example.org:443", *wrong.where("wrong.org:443"))
        assert discover(ALICE, domain.network).servers == []
        assert wrong.asked == []


def test_servers_without_tls_and_of_other_kinds_are_left_out() -> None:
    data = file(
        server("pop.example.org", "995", kind="pop3"),
        server("plain.example.org", "143", "plain"),
        server("b.example.org", "143", "STARTTLS"),
        server("a.example.org"),
    )
    assert places(parse_autoconfig(data, ALICE, "")) == [
        ("a.example.org", 993, "tls", "alice@example.org"),
        ("b.example.org", 143, "starttls", "alice@example.org"),
    ]


def test_only_oauth_is_told() -> None:
    oauth, password = (
        "<authentication>OAuth2</authentication>",
        "<authentication>password-cleartext</authentication>",
    )
    data = file(server(more=oauth), server(more=oauth + password))
    assert [one.sign_in for one in parse_autoconfig(data, ALICE, "")] == ["oauth", "password"]


@pytest.mark.parametrize(
    "bad",
    [
        server("a b"),
        server("-o.example.org/x"),
        server("%EMAILHOST%"),
        server(port="0"),
        server(port="99999"),
        server(port="-1"),
        server(user="%REALNAME%"),
        server(user="a&#10;b"),
        server(""),
    ],
)
def test_server_that_makes_no_sense_is_left_out(bad: str) -> None:
    assert [one.host for one in parse_autoconfig(file(bad, server()), ALICE, "")] == ["mx.example.org"]


@pytest.mark.parametrize(
    "data",
    [
        b'<!DOCTYPE x [<!ENTITY a "b">]><clientConfig>&a;</clientConfig>',
        b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><clientConfig/>',
        '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE x><clientConfig/>'.encode("utf-16"),
        b"<html><p>Not found",
        b"",
        b"\xff\xfe\x00",
    ],
)
def test_file_with_entities_or_of_no_xml_is_refused(data: bytes) -> None:
    with pytest.raises(Exception, match=r"document type|line 1"):
        parse_autoconfig(data, ALICE, "")


# ---- MX and guesses


def test_mail_exchanger_leads_to_a_provider(domain: Domain) -> None:
    domain.records["example.org", "MX"] = [
        "20 mx.messagingengine.com.",
        "10 ASPMX.L.google.com.",
        "5 mx.example.org.",
    ]
    found = discover(ALICE, domain.network)
    assert places(found) == [("imap.gmail.com", 993, "tls", "alice@example.org")]
    assert found.servers[0].sign_in == "app"
    assert "forged" in (found.servers[0].doubt or "")


def test_mail_exchanger_of_a_provider_without_imap_is_told(domain: Domain) -> None:
    domain.records["example.org", "MX"] = ["10 mail.protonmail.ch."]
    found = discover(ALICE, domain.network)
    assert found.servers == []
    assert found.provider is not None
    assert "Bridge" in (found.provider.hint or "")


def test_hint_of_the_provider_comes_with_its_server(domain: Domain) -> None:
    srv(domain, "0 1 993 imap.gmail.com.")
    (found,) = discover(ALICE, domain.network).servers
    assert found.provider is not None
    assert found.provider.name == "Gmail"


def test_usual_name_counts_if_its_certificate_is_valid_and_it_speaks_imap(
    domain: Domain, ca: CertificateAuthority
) -> None:
    valid = ca.issue(names=["imap.example.org", "mail.example.org"])
    with (
        domain.greeter("imap.example.org:993", valid, b"220 ftp\r\n"),
        domain.greeter("mail.example.org:993", valid, b"* OK hello\r\n"),
    ):
        (found,) = discover(ALICE, domain.network).servers
    assert places([found]) == [("mail.example.org", 993, "tls", "alice@example.org")]


def test_usual_name_with_a_certificate_of_another_does_not_count(
    domain: Domain, ca: CertificateAuthority
) -> None:
    with domain.greeter("imap.example.org:993", ca.issue(names=["other.net"]), b"* OK hello\r\n"):
        assert discover(ALICE, domain.network).servers == []


# ---- All together


def test_same_server_is_proposed_once_by_its_best_source(domain: Domain) -> None:
    srv(domain, "0 1 993 mx.example.org.")
    domain.pages[WELL_KNOWN] = domain.pages[AUTOCONFIG] = Page(file(server()))
    (found,) = discover(ALICE, domain.network).servers
    assert found.found == "the SRV records of example.org"


def test_silent_name_server_holds_nothing_up(domain: Domain) -> None:
    domain.silent = True
    domain.pages[WELL_KNOWN] = Page(file(server()))
    assert [one.host for one in discover(ALICE, domain.network).servers] == ["mx.example.org"]


def test_nothing_found_is_no_error(domain: Domain) -> None:
    assert discover(ALICE, domain.network) == ([], None)
