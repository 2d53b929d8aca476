"""Logging in: each mechanism alone, against Dovecot, and against servers that want to learn the secret."""

import base64
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from imapfs.errors import AuthenticationFailed, ConnectionLost, ImapfsError, ProtocolError, TimedOut
from imapfs.imap import sasl
from imapfs.imap.connect import tls_context
from imapfs.imap.session import Session
from imapfs.model import AccessToken, Account, AuthMethod, CredentialProvider, Secret
from tests.support.accounts import TIMEOUT, address
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

ACCOUNT = Account("mail.example.org", "alice")
PASSWORD = "pässwörd = 1,5 €"


def log_in(account: Account, credentials: CredentialProvider) -> Session:
    return Session.connect(account, credentials, tls_context(account), TIMEOUT)


# -- mechanisms alone


def test_scram_as_in_rfc_7677() -> None:
    scram = sasl.ScramSha256("user", Secret("pencil"), nonce="rOprNGfwEbeRWgbNEkqO")
    assert scram.initial() == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    first = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    assert scram.respond(first) == (
        b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
        b"p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    )
    with pytest.raises(AuthenticationFailed, match="without proving"):
        scram.finish()
    assert scram.respond(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=") == b""
    scram.finish()


@pytest.mark.parametrize(
    ("first", "final", "says"),
    [
        (b"r=other,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", None, "malformed"),
        (b"r=nonce,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", None, "malformed"),
        (b"r=nonce+,s=,i=4096", None, "malformed"),
        (b"r=nonce+,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=0", None, "malformed"),
        (b"r=nonce+,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=-5", None, "malformed"),
        (b"m=x,r=nonce+,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", None, "malformed"),
        (b"\xff", None, "malformed"),
        (b"r=nonce+,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=2000001", None, "which is too many"),
        (b"r=nonce+,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=1", b"v=AAAA", "does not know"),
        (b"r=nonce+,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=1", b"", "does not know"),
    ],
)
def test_scram_finds_out_a_server_that_does_not_know_the_password(
    first: bytes, final: bytes | None, says: str
) -> None:
    scram = sasl.ScramSha256("alice", Secret("secret"), nonce="nonce")
    with pytest.raises(AuthenticationFailed, match=says):
        scram.respond(first)
        if final is not None:
            scram.respond(final)


@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("I\xadX", "IX"),
        ("user", "user"),
        ("USER", "USER"),
        ("\xaa", "a"),
        ("\u2168", "IX"),
        ("a\xa0b", "a b"),
    ],
)
def test_saslprep_as_in_rfc_4013(text: str, prepared: str) -> None:
    assert sasl.saslprep(text) == prepared


@pytest.mark.parametrize("text", ["\x07", "\u06271", "\u0221", "\ufdd0", "a\u0627b"])
def test_saslprep_refuses_what_rfc_4013_forbids(text: str) -> None:
    with pytest.raises(AuthenticationFailed, match="auth to plain"):
        sasl.saslprep(text)


@pytest.mark.parametrize(
    ("secret", "auth", "offered", "name"),
    [
        (Secret("x"), "auto", "AUTH=PLAIN AUTH=LOGIN AUTH=SCRAM-SHA-256", "SCRAM-SHA-256"),
        (Secret("x"), "auto", "AUTH=PLAIN AUTH=XOAUTH2", "PLAIN"),
        (Secret("x"), "auto", "AUTH=XOAUTH2", None),
        (Secret("x"), "plain", "AUTH=PLAIN AUTH=SCRAM-SHA-256", "PLAIN"),
        (Secret("x"), "login", "AUTH=PLAIN", None),
        (Secret("x"), "xoauth2", "AUTH=XOAUTH2 AUTH=OAUTHBEARER", "XOAUTH2"),
        (AccessToken("x"), "auto", "AUTH=XOAUTH2 AUTH=OAUTHBEARER AUTH=PLAIN", "OAUTHBEARER"),
        (AccessToken("x"), "auto", "AUTH=XOAUTH2 AUTH=PLAIN", "XOAUTH2"),
        (None, "auto", "AUTH=EXTERNAL AUTH=PLAIN", "EXTERNAL"),
        (Secret("\u0221"), "auto", "AUTH=SCRAM-SHA-256 AUTH=PLAIN", "PLAIN"),
    ],
)
def test_strongest_mechanism_is_chosen(
    secret: Secret | None, auth: AuthMethod, offered: str, name: str | None
) -> None:
    chosen = sasl.choose(dataclasses.replace(ACCOUNT, auth=auth), secret, offered.split())
    assert (chosen.name if chosen else None) == name


@pytest.mark.parametrize(
    ("offered", "name"),
    [("AUTH=EXTERNAL AUTH=PLAIN", "PLAIN"), ("AUTH=EXTERNAL LOGINDISABLED", "EXTERNAL"), ("", None)],
)
def test_password_goes_before_the_certificate(offered: str, name: str | None) -> None:
    chosen = sasl.choose(
        dataclasses.replace(ACCOUNT, client_cert=Path("me.pem")), Secret("x"), offered.split()
    )
    assert (chosen.name if chosen else None) == name


@pytest.mark.parametrize(
    ("secret", "auth", "offered", "says"),
    [
        (Secret("x"), "auto", "LOGINDISABLED AUTH=XOAUTH2", "OAuth or an app password"),
        (Secret("x"), "login", "LOGINDISABLED", "no login with a password"),
        (Secret("ä"), "auto", "", "only ASCII"),
        (Secret("x"), "scram-sha-256", "AUTH=PLAIN", "not offer SCRAM-SHA-256.*but PLAIN: set auth to auto"),
        (AccessToken("x"), "auto", "AUTH=PLAIN", "takes no OAuth tokens"),
        (Secret("\u0221"), "auto", "AUTH=SCRAM-SHA-256", "set auth to plain"),
        (Secret("\u0221"), "scram-sha-256", "AUTH=SCRAM-SHA-256 AUTH=PLAIN", "set auth to plain"),
        (None, "auto", "AUTH=PLAIN", "no login by client certificate"),
    ],
)
def test_no_way_to_log_in_says_what_there_is(
    secret: Secret | None, auth: AuthMethod, offered: str, says: str
) -> None:
    with pytest.raises(AuthenticationFailed, match=says):
        sasl.choose(dataclasses.replace(ACCOUNT, auth=auth), secret, offered.split())


# -- against Dovecot


@pytest.fixture(scope="module")
def every_mechanism(ca: CertificateAuthority) -> Iterator[Dovecot]:
    mechanisms = ("plain", "login", "scram-sha-256", "xoauth2", "oauthbearer")
    with Dovecot(ca, mechanisms=mechanisms, password=PASSWORD) as server:
        yield server


@pytest.mark.parametrize("auth", ["auto", "plain", "scram-sha-256", "xoauth2", "oauthbearer"])
def test_dovecot_lets_in_with_the_right_secret_only(every_mechanism: Dovecot, auth: AuthMethod) -> None:
    account = dataclasses.replace(address(every_mechanism.account("alice")), auth=auth)
    made = log_in(account, Secret(PASSWORD))
    assert made.has("MOVE")
    made.close()
    with pytest.raises(
        AuthenticationFailed, match=r"localhost refused the password of alice: .*AUTH"
    ) as caught:
        log_in(account, Secret("wröng"))
    assert "wröng" not in str(caught.value)
    assert ("try --auth plain" in str(caught.value)) is (auth in ("auto", "scram-sha-256"))


def test_dovecot_takes_the_login_command(dovecot: Dovecot) -> None:
    account = dataclasses.replace(address(dovecot.account("alice")), auth="login")
    log_in(account, Secret("secret")).close()


def test_dovecot_knows_the_user_by_certificate(ca: CertificateAuthority) -> None:
    certificate, key = ca.issue(client="alice")
    with Dovecot(ca, mechanisms=("plain", "external"), client_certificates=True) as server:
        where = dataclasses.replace(address(server.account("alice")), client_cert=certificate, client_key=key)
        log_in(where, _Nothing()).close()
        # It is the certificate that counts, not the name that comes with it.
        bob = dataclasses.replace(where, user="bob")
        with pytest.raises(AuthenticationFailed, match="refused the client certificate of bob"):
            log_in(bob, _Nothing())


class _Nothing:
    """Credentials of somebody with a certificate only."""

    def get(self, refused: Secret | None = None) -> None:
        """There is none."""


# -- what a server may do with a login
# -- what servers may do with a login


class LoginServer(Scripted):
    """Answers AUTHENTICATE with ``answers``, in which TAG is the tag, one for each line of the client."""

    def __init__(
        self, authority: CertificateAuthority, mechanism: bytes, *answers: bytes, initial: bool = True
    ) -> None:
        capabilities = b"IMAP4rev1 AUTH=" + mechanism + (b" SASL-IR" if initial else b"")
        super().__init__(authority, capabilities=capabilities, script=self._judge)
        self._answers = iter(answers)
        self._tag = b""
        self.responses: list[bytes] = []
        """What the client said after its AUTHENTICATE."""

    def _judge(self, tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command.startswith(b"AUTHENTICATE"):
            self._tag = tag
        elif not self._tag or command:
            return None
        else:
            # In base64 there are no spaces: the whole line was taken for a tag.
            self.responses.append(tag)
        answer = next(self._answers, b"+ \r\n").replace(b"TAG", self._tag)
        return [answer]


def refusal(server: Scripted, secret: Secret, auth: AuthMethod = "auto") -> ImapfsError:
    with server, pytest.raises(ImapfsError) as caught:
        log_in(dataclasses.replace(address(server), auth=auth), secret)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("mechanism", "dummy"), [(b"OAUTHBEARER", base64.b64encode(b"\1")), (b"XOAUTH2", b"")]
)
def test_refused_token_is_explained_in_the_servers_words(
    ca: CertificateAuthority, mechanism: bytes, dummy: bytes
) -> None:
    why = json.dumps({"status": "invalid_token", "scope": "https://mail.example.org/", "schemes": "bearer"})
    answers = [b"+ " + base64.b64encode(why.encode()) + b"\r\n", b"TAG NO SASL authentication failed\r\n"]
    server = LoginServer(ca, mechanism, *answers)
    error = refusal(server, AccessToken("ya29.token"))
    assert isinstance(error, AuthenticationFailed)
    assert error.problem == (
        "localhost refused the access token of alice: "
        "SASL authentication failed invalid_token, https://mail.example.org/"
    )
    assert server.responses == [dummy]


@pytest.mark.parametrize("echo", ["", "token", "eWEyOS50b2tlbg=="])
def test_token_that_the_server_repeats_is_not_shown(ca: CertificateAuthority, echo: str) -> None:
    said = json.dumps({"status": f"no good: {echo or 'ya29.token'}"}).encode()
    answers = [b"+ " + base64.b64encode(said) + b"\r\n", b"TAG NO failed\r\n"]
    message = str(refusal(LoginServer(ca, b"XOAUTH2", *answers), AccessToken("ya29.token")))
    assert ("not shown" in message) is (echo != "token")
    assert "ya29" not in message


LONG = "eyJhbGciOiJSUzI1NiIsImtpZCI6InNvbWV0aGluZyJ9"


@pytest.mark.parametrize(
    ("challenge", "answer"),
    [
        ("x" * 280 + f" {LONG}", b"NO failed"),
        (f"ends with {LONG[-20:]}", b"NO failed"),
        ("", b"NO [" + LONG.encode() + b"] failed"),
        ("", b"NO it was " + LONG[3:23].encode()),
        ("", b"NO " + b"y" * 2000 + b" " + LONG.encode()),
    ],
)
def test_no_part_of_a_token_is_shown(ca: CertificateAuthority, challenge: str, answer: bytes) -> None:
    said = json.dumps({"status": challenge}).encode()
    answers = [b"+ " + base64.b64encode(said) + b"\r\n", b"TAG " + answer + b"\r\n"]
    message = str(refusal(LoginServer(ca, b"XOAUTH2", *answers), AccessToken(LONG)))
    assert "(its answer repeats the password and is not shown)" in message
    assert not any(LONG[at : at + 16] in message for at in range(len(LONG) - 15))


def test_words_of_a_refusal_are_few(ca: CertificateAuthority) -> None:
    answers = [b"+ \r\n", b"TAG NO no\x1b[2Jt " + b"this one " * 9999 + b"\r\n"]
    message = refusal(LoginServer(ca, b"XOAUTH2", *answers), AccessToken(LONG)).problem
    assert len(message) < 400
    assert message.isprintable()


def test_complaint_without_an_end_to_its_depth_is_a_refusal(ca: CertificateAuthority) -> None:
    answers = [b"+ " + base64.b64encode(b"[" * 40_000) + b"\r\n", b"TAG NO failed\r\n"]
    error = refusal(LoginServer(ca, b"XOAUTH2", *answers), AccessToken("ya29.token"))
    assert isinstance(error, AuthenticationFailed)


def test_message_waits_for_the_server_without_initial_responses(ca: CertificateAuthority) -> None:
    server = LoginServer(ca, b"PLAIN", b"+ \r\n", b"TAG OK in\r\n", initial=False)
    with server:
        log_in(address(server), Secret("secret")).close()
    assert b"AUTHENTICATE PLAIN" in server.commands
    assert server.responses == [base64.b64encode(b"\0alice\0secret")]


def test_endless_challenges_come_to_an_end(ca: CertificateAuthority) -> None:
    assert isinstance(refusal(LoginServer(ca, b"PLAIN"), Secret("secret")), ProtocolError)


@pytest.mark.parametrize("verb", [b"STARTTLS", b"AUTHENTICATE", b"LOGIN"])
def test_nothing_renews_the_time_for_a_login(ca: CertificateAuthority, verb: bytes) -> None:
    """It says without a pause what lets a listing go on, and would end before the test does."""
    capabilities = b"IMAP4rev1 STARTTLS" + (b" LOGINDISABLED AUTH=PLAIN SASL-IR" if verb != b"LOGIN" else b"")
    plain = verb == b"STARTTLS"

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return trickle(tag) if command.startswith(verb) else None

    def trickle(tag: bytes) -> Iterable[bytes]:
        for _ in range(100):
            server.closing.wait(0.05)
            yield b"* 1000 EXISTS\r\n* 1 FETCH (UID 1 FLAGS ())\r\n"
        yield tag + b" NO that was it\r\n"

    greeting = b"* OK [CAPABILITY " + capabilities + b"] ready"
    with Scripted(ca, greeting=greeting, capabilities=capabilities, script=script, plain=plain) as server:
        where = dataclasses.replace(address(server), security="starttls" if plain else "tls")
        with pytest.raises(TimedOut):
            Session.connect(where, Secret("secret"), tls_context(where), 1.0)


@pytest.mark.parametrize(
    ("mechanism", "answer"),
    [
        (b"PLAIN", b"* OK once more\r\n" * 20_000 + b"TAG OK in\r\n"),
        (b"PLAIN", b"* OK " + b"x" * 300_000 + b"\r\nTAG OK in\r\n"),
        (b"XOAUTH2", b"+ " + b"A" * 80_000 + b"\r\n"),
    ],
)
def test_server_has_little_to_say_before_the_login(
    ca: CertificateAuthority, mechanism: bytes, answer: bytes
) -> None:
    server = LoginServer(ca, mechanism, answer, b"TAG OK in\r\n")
    secret = AccessToken("token") if mechanism == b"XOAUTH2" else Secret("secret")
    assert isinstance(refusal(server, secret), ProtocolError)


def test_impostor_is_not_taken_for_the_server(ca: CertificateAuthority) -> None:
    """It says OK without having proven that it knows the password."""
    error = refusal(LoginServer(ca, b"SCRAM-SHA-256", b"TAG OK in\r\n"), Secret("secret"))
    assert "without proving" in str(error)


def test_no_password_goes_to_a_server_that_disables_login(ca: CertificateAuthority) -> None:
    server = Scripted(ca, capabilities=b"IMAP4rev1 LOGINDISABLED")
    assert "app password" in str(refusal(server, Secret("secret")))
    assert server.commands == []


class _Renewing:
    """Tokens of which the first ``ended`` have ended."""

    def __init__(self, ended: int) -> None:
        self._ended = ended
        self.given: list[Secret] = []
        self.refused: list[Secret] = []

    def get(self, refused: Secret | None = None) -> Secret:
        if refused is not None:
            self.refused.append(refused)
        self.given.append(AccessToken("ended" if len(self.given) < self._ended else PASSWORD))
        return self.given[-1]


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_refused_token_is_replaced_once(every_mechanism: Dovecot, ended: int) -> None:
    account = address(every_mechanism.account("alice"))
    tokens = _Renewing(ended)
    if ended < 2:
        log_in(account, tokens).close()
    else:
        with pytest.raises(AuthenticationFailed):
            log_in(account, tokens)
    assert tokens.refused == tokens.given[:1] * min(ended, 1)


def test_busy_server_is_no_reason_for_a_new_token(ca: CertificateAuthority) -> None:
    server = LoginServer(ca, b"XOAUTH2", b"TAG NO [UNAVAILABLE] later\r\n")
    tokens = _Renewing(0)
    with server, pytest.raises(ConnectionLost, match="later"):
        log_in(address(server), tokens)
    assert tokens.refused == []
