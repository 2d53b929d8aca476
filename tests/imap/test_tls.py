"""Connecting: whom imapfs talks to, when it dares to say a password, and what it says when it does not."""

import dataclasses
import hashlib
import socket
import ssl
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from imapfs.errors import ConnectionLost, ImapfsError, ProtocolError, ServerBusy, TimedOut, TlsError
from imapfs.imap import connect
from imapfs.imap.connect import tls_context
from imapfs.imap.login import log_in
from imapfs.imap.session import Session
from imapfs.imap.wire import Wire
from imapfs.model import Account, Secret
from tests.support.accounts import TIMEOUT, address
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.scripted import Script, Scripted
from tests.support.servers.tls import CertificateAuthority


def connected(account: Account, timeout: float = TIMEOUT) -> Session:
    return Session.connect(account, Secret("secret"), tls_context(account), timeout)


def refusal(account: Account, timeout: float = TIMEOUT) -> ImapfsError:
    with pytest.raises(ImapfsError) as caught:
        connected(account, timeout).close()
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    return caught.value


def fingerprint(certificate: Path) -> str:
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text())
    return hashlib.sha256(der).hexdigest()


# -- certificates


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    """Make an authority that nobody has heard of."""
    return CertificateAuthority(tmp_path_factory.mktemp("strangers"))


@pytest.fixture(params=["expired", "self-signed", "wrong name", "unknown authority"])
def bad_certificate(
    request: pytest.FixtureRequest, ca: CertificateAuthority, strangers: CertificateAuthority
) -> tuple[Path, str]:
    """Make a certificate that is no good; its file and what should be said of it."""
    match request.param:
        case "expired":
            return ca.issue(expired=True)[0], "certificate has expired"
        case "self-signed":
            return strangers.issue(self_signed=True)[0], "self.signed certificate"
        case "wrong name":
            return ca.issue(names=["mail.example.org"], addresses=["127.0.0.2"])[0], "match.*'localhost'"
        case _:
            return strangers.issue()[0], "unable to get local issuer certificate"


@pytest.mark.parametrize("port", ["tls", "starttls"])
def test_certificate_that_does_not_verify_is_refused_unless_pinned(
    ca: CertificateAuthority, bad_certificate: tuple[Path, str], port: str
) -> None:
    certificate, says = bad_certificate
    with Dovecot(ca, certificate=(certificate, certificate.with_suffix(".key")), plain=True) as server:
        where = address(server.account("alice"))
        if port == "starttls":
            assert server.plain_port is not None
            where = dataclasses.replace(where, security="starttls", port=server.plain_port)
        error = refusal(where)
        assert isinstance(error, TlsError)
        assert error.args[0].startswith("the certificate of localhost does not verify: ")
        assert pytest.RaisesExc(TlsError, match=says + ".*--ca-file.*--tls-fingerprint").matches(error)
        pinned = dataclasses.replace(where, ca_file=None, tls_fingerprint=fingerprint(certificate))
        connected(pinned).close()


def test_other_certificate_than_the_pinned_one_is_refused_though_valid(dovecot: Dovecot) -> None:
    pinned = dataclasses.replace(address(dovecot.account("alice")), tls_fingerprint="0" * 64)
    error = refusal(pinned)
    assert isinstance(error, TlsError)
    assert "not the pinned one" in str(error)


def test_fingerprint_is_that_of_the_certificate(ca: CertificateAuthority) -> None:
    certificate, key = ca.issue()
    with Dovecot(ca, certificate=(certificate, key)) as server:
        where = address(server.account("alice"))
        secured = connect.secure(connect.open_tcp(where, TIMEOUT), where, tls_context(where), TIMEOUT)
        with secured:
            assert connect.fingerprint(secured) == fingerprint(certificate)


def test_tls_older_than_1_2_is_refused(ca: CertificateAuthority) -> None:
    def age(context: ssl.SSLContext) -> None:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1

    with Scripted(ca, prepare=age) as server:
        error = refusal(address(server))
        assert isinstance(error, TlsError)
        assert "offers only TLS older than 1.2" in str(error)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_server_that_wants_a_certificate_says_so(
    ca: CertificateAuthority, strangers: CertificateAuthority, version: ssl.TLSVersion
) -> None:
    def demand(context: ssl.SSLContext) -> None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ca.certificate)
        context.maximum_version = version

    with Scripted(ca, prepare=demand) as server:
        where = address(server)
        error = refusal(where)
        assert isinstance(error, TlsError)
        assert "it may require a client certificate, --client-cert" in str(error)
        certificate, key = ca.issue(client="alice")
        connected(dataclasses.replace(where, client_cert=certificate, client_key=key)).close()
        certificate, key = strangers.issue(client="alice")
        error = refusal(dataclasses.replace(where, client_cert=certificate, client_key=key))
        assert isinstance(error, TlsError)
        assert f"does not accept the client certificate {certificate}" in str(error)


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("missing.pem", None, "No such file"),
        ("empty.pem", None, "must be in PEM form"),
        ("alice.pem", None, "must be in PEM form"),
        ("alice.pem", "bob.key", "does not belong to the certificate"),
        ("alice.pem", "locked.key", "has a passphrase"),
        ("alice.pem", "alice.key", r"accessible to all users \(mode 0604\): chmod 600"),
    ],
)
def test_unusable_client_certificate_is_explained(
    ca: CertificateAuthority, tmp_path: Path, certificate: str, key: str | None, says: str
) -> None:
    from cryptography.hazmat.primitives import serialization

    for name in ("alice", "bob"):
        for issued, suffix in zip(ca.issue(client=name), (".pem", ".key"), strict=True):
            (tmp_path / (name + suffix)).write_bytes(issued.read_bytes())
            (tmp_path / (name + suffix)).chmod(0o604)
    (tmp_path / "empty.pem").touch()
    loaded = serialization.load_pem_private_key((tmp_path / "alice.key").read_bytes(), None)
    (tmp_path / "locked.key").write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"x"),
        )
    )
    account = Account(
        "h", "u", client_cert=tmp_path / certificate, client_key=tmp_path / key if key else None
    )
    with pytest.raises(TlsError, match=says) as caught:
        tls_context(account)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", [f"{'a' * 64}.example", "a..example", f"{'ä' * 60}.example"])
def test_name_that_no_host_can_have_is_told(host: str) -> None:
    assert "is not a valid host name: check its spelling" in str(refusal(Account(host, "alice")))


# -- STARTTLS


@pytest.fixture(scope="module")
def both_ports(ca: CertificateAuthority) -> Iterator[Dovecot]:
    with Dovecot(ca, plain=True) as server:
        yield server


def by_starttls(server: Dovecot | Scripted, **changes: object) -> Account:
    """Return the account of alice on the port where a connection starts as cleartext."""
    where = address(server.account("alice") if isinstance(server, Dovecot) else server)
    port = server.plain_port if isinstance(server, Dovecot) else server.port
    assert port is not None
    return dataclasses.replace(where, security="starttls", port=port, **changes)  # type: ignore[arg-type]


def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine count as another."""
    monkeypatch.setattr(connect, "is_this_machine", lambda account, sock: False)


def test_starttls_secures_the_connection(both_ports: Dovecot) -> None:
    where = by_starttls(both_ports)
    wire = Wire.open(where, tls_context(where), TIMEOUT)
    assert wire.encrypted
    assert "AUTH=PLAIN" in wire.capabilities
    wire.close()
    connected(where).close()


def test_wrong_port_is_recognised(both_ports: Dovecot) -> None:
    where = address(both_ports.account("alice"))
    assert both_ports.plain_port is not None
    implicit = dataclasses.replace(where, port=both_ports.plain_port)
    assert "does not speak TLS" in str(refusal(implicit))
    assert "imap://" in str(refusal(implicit))
    error = refusal(dataclasses.replace(where, security="starttls"), 0.5)
    assert isinstance(error, TimedOut)
    assert "write imaps://" in str(error)


def test_plaintext_only_to_this_machine_or_when_spelled_out(
    ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Dovecot(ca, tls=False) as server:
        connected(by_starttls(server, ca_file=None)).close()
        remote(monkeypatch)
        error = refusal(by_starttls(server, ca_file=None))
        assert isinstance(error, TlsError)
        assert "does not offer STARTTLS" in str(error)
        connected(by_starttls(server, ca_file=None, insecure_plaintext=True)).close()
        logged_in = [line for line in server.log_lines() if "Login: user=<alice>" in line]
        assert len(logged_in) == 2


@pytest.mark.parametrize("named", ["ca_file", "tls_fingerprint", "client_cert"])
@pytest.mark.parametrize("greeting", [b"* OK ready", b"* PREAUTH hello"])
def test_no_plaintext_for_who_names_certificates(
    ca: CertificateAuthority, named: str, greeting: bytes
) -> None:
    """Also not to this machine, where another user may have taken the port."""
    certificate, key = ca.issue(client="alice")
    values = {"ca_file": ca.certificate, "tls_fingerprint": "0" * 64, "client_cert": certificate}
    with Scripted(ca, plain=True, greeting=greeting) as server:
        where = by_starttls(server, **{"ca_file": None, "client_key": key, named: values[named]})
        where = dataclasses.replace(where, insecure_plaintext=True)
        assert isinstance(refusal(where), TlsError)
        assert nothing_was_told(server)


def test_a_name_in_the_subject_of_a_certificate_counts_for_nothing() -> None:
    """RFC 9525 section 6.3: only subjectAltName names a server."""
    context = tls_context(Account("localhost", "alice"))
    assert context.check_hostname
    assert not context.hostname_checks_common_name


def test_what_is_said_before_tls_stops_nobody(ca: CertificateAuthority) -> None:
    """Anybody on the way can say it, and go."""
    greeting = b"* BYE [UNAVAILABLE] try again in 24 hours"
    for plain in (True, False):
        with Scripted(ca, plain=plain, greeting=greeting) as server:
            error = refusal(by_starttls(server) if plain else address(server))
            assert isinstance(error, ServerBusy) is not plain

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return server.then_hang_up(greeting + b"\r\n") if command == b"STARTTLS" else None

    capabilities = b"IMAP4rev1 STARTTLS"
    with Scripted(ca, plain=True, capabilities=capabilities, script=script) as server:
        assert type(refusal(by_starttls(server))) is ConnectionLost


@pytest.mark.parametrize("insecure", [False, True])
def test_offered_tls_is_used_whatever_is_allowed(both_ports: Dovecot, insecure: bool) -> None:
    where = by_starttls(both_ports, insecure_plaintext=insecure)
    wire = Wire.open(where, tls_context(where), TIMEOUT)
    assert wire.encrypted
    wire.close()


@pytest.mark.parametrize("capabilities", [b"IMAP4rev1 AUTH=PLAIN", b"IMAP4rev1"])
def test_nothing_logs_in_on_a_connection_that_nobody_has_looked_at(
    ca: CertificateAuthority, capabilities: bytes
) -> None:
    with Scripted(ca, plain=True, greeting=b"* OK hello", capabilities=capabilities) as server:
        where = by_starttls(server)
        wire = Wire.greet(connect.open_tcp(where, TIMEOUT), where, TIMEOUT)
        with pytest.raises(TlsError, match="not protected"):
            log_in(wire, where, Secret("secret"))
        wire.close()
        assert nothing_was_told(server)


def test_connection_is_dead_when_the_handshake_fails(both_ports: Dovecot) -> None:
    where = by_starttls(both_ports, ca_file=None)
    wire = Wire.greet(connect.open_tcp(where, TIMEOUT), where, TIMEOUT)
    with pytest.raises(TlsError, match="does not verify"):
        wire.protect(tls_context(where))
    assert not wire.alive


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("mail.example.org", False),
        ("192.0.2.1", False),
    ],
)
def test_a_name_that_leads_to_this_machine_by_chance_is_not_this_machine(
    both_ports: Dovecot, host: str, is_local: bool
) -> None:
    with connect.open_tcp(by_starttls(both_ports), TIMEOUT) as sock:
        assert connect.is_this_machine(Account(host, "alice"), sock) is is_local


# -- servers, and those on the way to them, that mean ill


OFFERS = b"* OK [CAPABILITY IMAP4rev1 STARTTLS AUTH=PLAIN] ready"
CAPABILITIES = b"IMAP4rev1 STARTTLS AUTH=PLAIN"


def hostile(
    ca: CertificateAuthority, starttls: bytes = b"TAG OK begin\r\n", greeting: bytes = OFFERS
) -> Scripted:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command == b"STARTTLS":
            return [starttls.replace(b"TAG", tag)]
        return None

    return Scripted(ca, plain=True, greeting=greeting, capabilities=CAPABILITIES, script=script)


def nothing_was_told(server: Scripted) -> bool:
    return not [one for one in server.commands if one.startswith((b"LOGIN", b"AUTHENTICATE"))]


@pytest.mark.parametrize(
    ("starttls", "says"),
    [
        (b"TAG NO not today\r\n", "refused STARTTLS: not today"),
        (b"TAG BAD what\r\n", "refused STARTTLS: what"),
        (b"TAG OK begin\r\n* CAPABILITY IMAP4rev1 AUTH=PLAIN\r\n", "went on in plaintext"),
        (b"TAG OK begin\r\nf3 OK done\r\n", "went on in plaintext"),
        (b"TAG OK begin\r\n*", "went on in plaintext"),
    ],
)
def test_words_put_in_before_the_handshake_end_the_connection(
    ca: CertificateAuthority, starttls: bytes, says: str
) -> None:
    """Also on this machine, where plaintext alone would do."""
    with hostile(ca, starttls) as server:
        assert says in str(refusal(by_starttls(server)))
        assert nothing_was_told(server)


def test_what_was_said_before_tls_does_not_count(ca: CertificateAuthority) -> None:
    server = Scripted(ca, plain=True, greeting=OFFERS, capabilities=CAPABILITIES + b" AUTH=WEAK MOVE")

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command == b"NOOP":
            return server.then_hang_up(b"")
        if command != b"STARTTLS":
            return None
        server.capabilities = b"IMAP4rev1 AUTH=STRONG"
        return [b"* CAPABILITY IMAP4rev1 AUTH=WEAK\r\n* BYE nonsense\r\n" + tag + b" OK begin\r\n"]

    server.script = script
    with server:
        where = by_starttls(server)
        wire = Wire.open(where, tls_context(where), TIMEOUT)
        assert wire.capabilities == {"IMAP4REV1", "AUTH=STRONG"}
        with pytest.raises(ConnectionLost) as caught:
            wire.execute(b"NOOP")
        assert "nonsense" not in str(caught.value)
        wire.close()


@pytest.mark.parametrize(
    ("greeting", "capabilities", "says"),
    [
        (b"* PREAUTH welcome back", CAPABILITIES, "PREAUTH"),
        (b"* OK ready", b"IMAP4rev1 AUTH=PLAIN", "does not offer STARTTLS"),
    ],
)
def test_tls_that_was_taken_away_costs_no_password(
    ca: CertificateAuthority,
    monkeypatch: pytest.MonkeyPatch,
    greeting: bytes,
    capabilities: bytes,
    says: str,
) -> None:
    remote(monkeypatch)
    with hostile(ca, greeting=greeting) as server:
        server.capabilities = capabilities
        error = refusal(by_starttls(server))
        assert isinstance(error, TlsError)
        assert says in str(error)
        assert "imaps://" in str(error)
        assert server.commands == [b"CAPABILITY"]


def test_preauth_over_tls_needs_no_login(ca: CertificateAuthority) -> None:
    with Scripted(ca, greeting=b"* PREAUTH hello") as server:
        connected(address(server)).close()
        assert nothing_was_told(server)


def endless(start: bytes, piece: bytes) -> Script:
    """Answer CAPABILITY without an end."""

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command != b"CAPABILITY":
            return None
        return _forever(start, piece)

    return script


def _forever(start: bytes, piece: bytes) -> Iterator[bytes]:
    yield start
    while True:
        yield piece * 1000


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b"* OK still here\r\n"),
        (b"* CAPABILITY ", b"IMAP4rev1 "),
        (b"* CAPABILITY {4000000000}\r\n", b"x"),
        (b"* 7 LIST {1000}\r\n", b"x" * 1000 + b" {1000}\r\n"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_endless_greeting_is_cut_off(
    ca: CertificateAuthority, start: bytes, piece: bytes, plain: bool
) -> None:
    with Scripted(ca, script=endless(start, piece), greeting=b"* OK ready", plain=plain) as server:
        where = by_starttls(server) if plain else address(server)
        error = refusal(where)
        assert isinstance(error, ProtocolError)
        assert ("bytes where 8 MiB are the maximum" if b"{4" in start else "without an end") in str(error)


def test_greeting_that_trickles_ends_with_the_timeout(ca: CertificateAuthority) -> None:
    with Scripted(ca) as server:

        def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
            return server.hang()

        server.script = script
        assert isinstance(refusal(address(server), 0.3), TimedOut)


@pytest.mark.parametrize(
    ("greeting", "says"),
    [
        (b"220 smtp.example.org ESMTP", "did not greet as an IMAP server: 220 smtp.example.org ESMTP"),
        (b"SSH-2.0-OpenSSH_9", "did not greet as an IMAP server: SSH-2.0-OpenSSH_9"),
        (b"* OKAY", "did not greet as an IMAP server: * OKAY"),
        (b"* NO", "did not greet as an IMAP server: * NO"),
        (b"\x1b[2J\xff", "did not greet as an IMAP server: \\x1b[2J\N{REPLACEMENT CHARACTER}"),
        (b"", "did not greet as an IMAP server: its first line is empty"),
        (b"* BYE full", "closed the connection: full"),
        (b"* BYE", "closed the connection: it gave no reason"),
    ],
)
def test_a_server_that_does_not_greet_is_named_with_its_words(
    ca: CertificateAuthority, greeting: bytes, says: str
) -> None:
    with Scripted(ca, greeting=greeting) as server:
        error = refusal(address(server))
        assert type(error) is ConnectionLost
        assert str(error) == f"localhost:{server.port} {says}"


@pytest.mark.parametrize(
    ("greeting", "wait"),
    [
        (b"* BYE Too many connections", 0.0),
        (b"* BYE [UNAVAILABLE] Server Unavailable. 15", 0.0),
        (b"* BYE Request is throttled. Suggested Backoff Time: 9000 milliseconds", 9.0),
        (b"421 too many connections", 0.0),
    ],
)
def test_a_server_that_is_busy_when_it_should_greet_is_waited_for(
    ca: CertificateAuthority, greeting: bytes, wait: float
) -> None:
    with Scripted(ca, greeting=greeting) as server:
        error = refusal(address(server))
        assert isinstance(error, ServerBusy)
        assert error.wait == wait
        assert greeting.removeprefix(b"* BYE ").decode() in str(error)


@pytest.mark.parametrize("begun", [b"", b"* OK rea"])
def test_server_that_closes_the_connection_before_it_greets(begun: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(begun)
    with pytest.raises(ConnectionLost) as caught:
        Wire.greet(ours, Account("mail.example.org", "alice"), TIMEOUT)
    assert str(caught.value) == "mail.example.org:993 closed the connection before its greeting"
    assert ours.fileno() == -1


@pytest.mark.parametrize("capabilities", [b"", b"SMTP AUTH=PLAIN"])
def test_server_that_announces_no_version_of_imap_is_none(
    ca: CertificateAuthority, capabilities: bytes
) -> None:
    with Scripted(ca, greeting=b"* OK ready", capabilities=capabilities) as server:
        error = refusal(address(server))
        assert type(error) is ConnectionLost
        assert "did not greet as an IMAP server: it announces no version of IMAP" in str(error)


def test_capabilities_of_the_greeting_save_a_round_trip_after_tls_only(ca: CertificateAuthority) -> None:
    """Before TLS a greeting that leaves out STARTTLS would have the password go in the clear."""
    greeting = b"* OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] ready"
    with Scripted(ca, greeting=greeting, capabilities=CAPABILITIES) as server:
        where = address(server)
        wire = Wire.open(where, tls_context(where), TIMEOUT)
        assert wire.capabilities == {"IMAP4REV1", "AUTH=PLAIN"}
        assert server.commands == []
        wire.close()
    with Scripted(ca, plain=True, greeting=greeting, capabilities=CAPABILITIES) as server:
        where = by_starttls(server, insecure_plaintext=True)
        wire = Wire.open(where, tls_context(where), TIMEOUT)
        assert wire.encrypted
        assert server.commands == [b"CAPABILITY", b"STARTTLS", b"CAPABILITY"]
        wire.close()
