"""OAuth 2.0: consent, refreshing, and the way from `imapfs login` to a mount that outlives its tokens."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imapfs.account import consent, credentials, keyring, oauth, post
from imapfs.errors import AuthenticationFailed, CredentialError, CredentialUnavailable, NoMechanism
from imapfs.imap.connect import tls_context
from imapfs.imap.session import Session
from imapfs.model import AccessToken, Account, Secret
from tests.support.accounts import address
from tests.support.mounting import DEADLINE, ROOT, Mounter, wait_until
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority
from tests.support.servers.tokens import TokenServer

ACCOUNT = Account("mail.example.org", "alice")
ExpectedLog = Callable[[str], None]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ca: CertificateAuthority) -> Path:
    """Have a keyring of this test's own, here and in what is started; and trust in our authority."""
    path = tmp_path / "keyring"
    path.write_text("{}")
    monkeypatch.setenv("IMAPFS_TEST_KEYRING", str(path))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "tests.support.keyrings.FileKeyring")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.certificate))
    return path


@pytest.fixture
def server(ca: CertificateAuthority) -> Iterator[TokenServer]:
    with TokenServer(ca, "alice") as made:
        yield made


def client(server: TokenServer) -> oauth.OAuthClient:
    return oauth.OAuthClient("our-id", f"{server.url}/token", "mail", client_secret=Secret("not-so-secret"))


def tokens(server: TokenServer) -> credentials.Tokens:
    """Return what a mount has after `imapfs login`."""
    server.refresh_token = "refresh-0"
    keyring.save(keyring.REFRESH_TOKENS, ACCOUNT.url, Secret("refresh-0"))
    sources = credentials.CredentialSources(oauth=client(server), name="work")
    made = credentials.resolve(ACCOUNT, sources)
    assert isinstance(made, credentials.Tokens)
    return made


# -- tokens


@pytest.mark.usefixtures("kept")
def test_access_token_is_used_until_it_is_about_to_end(
    server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tokens(server)
    first = made.get()
    assert isinstance(first, AccessToken)
    assert made.get() is first
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    # The machine may sleep meanwhile.
    monkeypatch.setattr(time, "clock_gettime", {time.CLOCK_BOOTTIME: now + server.lifetime - 70}.__getitem__)
    assert made.get() is first
    monkeypatch.setattr(time, "clock_gettime", {time.CLOCK_BOOTTIME: now + server.lifetime - 50}.__getitem__)
    second = made.get()
    assert second.reveal() == server.access_tokens[1] != first.reveal()
    assert [one["grant_type"] for one in server.requests] == ["refresh_token"] * 2
    assert all(one["client_secret"] == "not-so-secret" for one in server.requests)


@pytest.mark.usefixtures("kept")
def test_refused_access_token_is_replaced_by_whoever_notices_first(server: TokenServer) -> None:
    made = tokens(server)
    old = made.get()
    new = made.get(refused=old)
    assert new is not old
    # Another connection that was refused with the old one gets what there is by now.
    assert made.get(refused=old) is new
    assert len(server.requests) == 2


@pytest.mark.usefixtures("kept")
def test_refusal_that_no_new_token_helps_with_costs_one(
    server: TokenServer, ca: CertificateAuthority
) -> None:
    refuses = False

    def script(tag: bytes, command: bytes) -> list[bytes] | None:
        refused = refuses and command.startswith(b"AUTHENTICATE")
        return [tag + b" NO not now\r\n"] if refused else None

    made = tokens(server)
    capabilities = b"IMAP4rev1 AUTH=XOAUTH2"
    greeting = b"* OK [CAPABILITY " + capabilities + b"] ready"
    with Scripted(ca, capabilities=capabilities, greeting=greeting, script=script) as imap:
        where = address(imap)

        def log_in() -> None:
            Session.connect(where, made, tls_context(where), DEADLINE).close()

        log_in()
        refuses = True
        for _ in range(5):
            with pytest.raises(AuthenticationFailed):
                log_in()
        assert len(server.requests) == 2
        # One more for the token that came instead, and no second one for the same refusal.
        assert imap.accepted == 1 + 6
        refuses = False
        log_in()
        refuses = True
        with pytest.raises(AuthenticationFailed):
            log_in()
        assert len(server.requests) == 3


@pytest.mark.usefixtures("kept")
def test_server_without_oauth_costs_no_token(server: TokenServer, ca: CertificateAuthority) -> None:
    made = tokens(server)
    with Scripted(ca) as imap:
        where = address(imap)
        with pytest.raises(NoMechanism, match="takes no OAuth tokens"):
            Session.connect(where, made, tls_context(where), DEADLINE)
        assert imap.accepted == 1
    assert len(server.requests) == 1


@pytest.mark.usefixtures("kept")
def test_replaced_refresh_token_goes_into_the_keyring(server: TokenServer) -> None:
    tokens(server).get()
    found = keyring.load(keyring.REFRESH_TOKENS, ACCOUNT.url)
    assert found is not None
    assert found.reveal() == server.refresh_token != "refresh-0"


def test_keyring_that_locks_meanwhile_does_not_end_the_mount(
    server: TokenServer, kept: Path, expected_log: ExpectedLog
) -> None:
    made = tokens(server)
    first = made.get()
    kept.unlink()
    expected_log("the next mount will need 'imapfs login work': the keyring does not take the secret")
    assert made.get(refused=first).reveal() == server.access_tokens[-1]


def test_keyring_that_takes_nothing_does_not_bring_back_an_old_token(
    server: TokenServer, kept: Path, expected_log: ExpectedLog
) -> None:
    made = tokens(server)
    kept.chmod(0o400)
    expected_log("the next mount will need 'imapfs login work': the keyring does not take the secret")
    made.get()
    for _ in range(2):
        vars(made)["_until"] = 0.0
        assert made.get().reveal() == server.access_tokens[-1]
    assert [one["refresh_token"] for one in server.requests].count("refresh-0") == 1
    kept.chmod(0o600)
    vars(made)["_until"] = 0.0
    made.get()
    found = keyring.load(keyring.REFRESH_TOKENS, ACCOUNT.url)
    assert found is not None
    assert found.reveal() == server.refresh_token
    # A new consent still counts.
    server.refresh_token = "refresh-new"
    keyring.save(keyring.REFRESH_TOKENS, ACCOUNT.url, Secret("refresh-new"))
    vars(made)["_until"] = 0.0
    assert made.get().reveal() == server.access_tokens[-1]


@pytest.mark.usefixtures("kept")
def test_mounts_of_one_account_do_not_use_the_same_refresh_token(server: TokenServer) -> None:
    mounts = [tokens(server), tokens(server)]
    # Both would have read the same one from the keyring by then.
    threads = [threading.Thread(target=made.get) for made in mounts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.access_tokens) == 2


@pytest.mark.usefixtures("kept")
def test_revoked_consent_is_asked_about_once_and_heals_with_a_new_one(server: TokenServer) -> None:
    made = tokens(server)
    first = made.get()
    server.revoke()
    for _ in range(3):
        with pytest.raises(CredentialUnavailable, match=r"revoked\.: run 'imapfs login work'") as caught:
            made.get(refused=first)
        assert "\n" not in str(caught.value)
    assert len(server.requests) == 2
    server.refresh_token = "refresh-new"
    keyring.save(keyring.REFRESH_TOKENS, ACCOUNT.url, Secret("refresh-new"))
    assert made.get(refused=first).reveal() == server.access_tokens[-1]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((503, {}), "HTTP status 503: try again later"),
        ((429, {"error": "slow"}), "says slow"),
        ((400, {"error": "invalid_scope", "error_description": "two\nlines"}), "invalid_scope: two lines"),
        ((400, {"error": "x", "error_description": "not-so-secret is wrong"}), "not shown"),
        ((400, {"error": "x" * 190, "error_description": "refresh-0 is wrong"}), "not shown"),
        ((302, {}), "something that is not OAuth"),
        (b"<html>", "something that is not OAuth"),
        (b"[1]", "something that is not OAuth"),
        (b'{"access_token": 5, "expires_in": "soon"}', "is not OAuth 2"),
        (b'{"access_token": "\\ud800"}', "printable ASCII"),
        (b'{"access_token": "two\\nlines"}', "printable ASCII"),
        (b"[" * 200_000, "is not OAuth 2"),
        (b'{"access_token": "x", "scope": {"y": ' + b"[" * 50_000 + b"}", "is not OAuth 2"),
        (b"x" * (1 << 20), "does not end"),
    ],
)
def test_failing_token_server_is_told_in_one_line(
    server: TokenServer, refusal: tuple[int, dict[str, object]] | bytes, says: str
) -> None:
    made = tokens(server)
    server.refusal = refusal
    with pytest.raises(CredentialUnavailable, match=says) as caught:
        made.get()
    assert "\n" not in str(caught.value)
    assert "refresh-0" not in str(caught.value)
    assert "not-so-secret" not in str(caught.value)
    server.refusal = None
    assert made.get().reveal() == server.access_tokens[-1]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    "lifetime", [b"1e999", b"-1e999", b"NaN", b"1" * 400, b"-5", b"null", b'"soon"', b"[]"]
)
def test_absurd_lifetime_does_not_cost_the_new_refresh_token(server: TokenServer, lifetime: bytes) -> None:
    made = tokens(server)
    server.refusal = b'{"access_token": "good", "refresh_token": "new", "expires_in": ' + lifetime + b"}"
    first = made.get()
    assert first.reveal() == "good"
    assert made.get() is first
    found = keyring.load(keyring.REFRESH_TOKENS, ACCOUNT.url)
    assert found is not None
    assert found.reveal() == "new"


def test_keyring_that_never_answers_is_given_up(
    server: TokenServer, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is when it wants somebody to unlock it."""
    made = tokens(server)
    kept.unlink()
    os.mkfifo(kept)
    monkeypatch.setattr(keyring, "_TIMEOUT", 0.3)
    with pytest.raises(CredentialUnavailable, match=r"keyring cannot be read \(no answer within 0\.3 s\)"):
        made.get()
    with pytest.raises(CredentialError, match="does not take the secret"):
        keyring.save(keyring.REFRESH_TOKENS, ACCOUNT.url, Secret("x"))


def test_process_that_asks_the_keyring_ends_without_its_parent(kept: Path) -> None:
    kept.unlink()
    os.mkfifo(kept)
    asked = json.dumps([0.1, {"service": "imapfs", "url": "u"}])
    command = [sys.executable, "-P", "-m", "imapfs.account.keyring"]
    done = subprocess.run(command, input=asked.encode(), capture_output=True, timeout=DEADLINE)
    assert done.returncode == -signal.SIGALRM


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("piece", [b"HTTP/1.1 100 Continue\r\n\r\n", b"X"])
def test_token_server_that_goes_on_for_ever_is_given_up(
    server: TokenServer, ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch, piece: bytes
) -> None:
    made = tokens(server)
    over = threading.Event()

    def trickle(connection: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(9999)
            while not over.wait(0.05):
                connection.sendall(piece)

    with serving(ca, trickle) as port:
        vars(made)["_fetch"] = oauth.TokenRefresher(
            dataclasses.replace(client(server), token_url=f"https://localhost:{port}/"), ACCOUNT, "log in"
        )
        monkeypatch.setattr(post, "_LIMIT", 1.5)
        with pytest.raises(CredentialUnavailable, match=r"cannot be reached: no answer within 1\.5 s"):
            made.get()
        over.set()


@contextlib.contextmanager
def serving(ca: CertificateAuthority, serve: Callable[[ssl.SSLSocket], None]) -> Iterator[int]:
    """Hand one connection over TLS to ``serve``, in a thread; yield the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*ca.issue())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)
        thread = threading.Thread(
            target=lambda: serve(context.wrap_socket(listener.accept()[0], server_side=True))
        )
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.mark.usefixtures("kept")
def test_token_server_is_verified_like_any_other(
    server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tokens(server)
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(CredentialUnavailable, match="unable to get local issuer certificate: check the net"):
        made.get()
    assert not server.requests


@pytest.mark.usefixtures("kept")
def test_without_consent_there_is_no_mount(server: TokenServer) -> None:
    sources = credentials.CredentialSources(oauth=client(server), name="work")
    with pytest.raises(CredentialError, match=r"no consent for imaps://alice@.*: run 'imapfs login work'"):
        credentials.resolve(ACCOUNT, sources)


def test_token_command_is_asked_again_when_its_token_is_refused(tmp_path: Path) -> None:
    count = tmp_path / "count"
    command = f"echo x >> {count}; echo token-$(wc -l < {count})"
    made = credentials.resolve(ACCOUNT, credentials.CredentialSources(token_command=command))
    first = made.get()
    assert first is not None
    assert made.get() is first
    second = made.get(refused=first)
    assert (first.reveal(), second and second.reveal()) == ("token-1", "token-2")
    assert isinstance(second, AccessToken)


def test_token_command_that_fails_later_is_no_reason_to_give_up(tmp_path: Path) -> None:
    flag = tmp_path / "works"
    flag.touch()
    command = f"test -e {flag} && echo token || {{ echo no network >&2; exit 1; }}"
    made = credentials.resolve(ACCOUNT, credentials.CredentialSources(token_command=command))
    first = made.get()
    flag.unlink()
    with pytest.raises(CredentialUnavailable, match="the token command failed with exit code 1: no network"):
        made.get(refused=first)


# -- the whole way


@dataclasses.dataclass
class Home:
    """A person's, with an account called "work" in the configuration file."""

    directory: Path
    environment: dict[str, str]

    def login(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "imapfs", "login", "work", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )


@pytest.fixture
def imap(ca: CertificateAuthority, server: TokenServer) -> Iterator[Dovecot]:
    mechanisms = ("plain", "xoauth2", "oauthbearer")
    with Dovecot(ca, mechanisms=mechanisms, tokens=server.introspection) as made:
        yield made


@pytest.fixture
def home(tmp_path: Path, kept: Path, server: TokenServer, imap: Dovecot) -> Home:
    config = tmp_path / "config" / "imapfs"
    config.mkdir(parents=True)
    (config / "config.toml").write_text(f"""
        [accounts.work]
        host = "{imap.host}"
        port = {imap.port}
        user = "{server.user}"
        ca-file = "{imap.authority.certificate}"
        [accounts.work.oauth]
        client-id = "our-id"
        authorize-url = "{server.url}/authorize"
        token-url = "{server.url}/token"
        device-url = "{server.url}/device"
        scope = "mail offline_access"
    """)
    browser = tmp_path / "browser"
    browser.write_text(
        f"#!{sys.executable}\n"
        "import sys, urllib.error, urllib.parse, urllib.request\n"
        # Some page in it knows the port, and no more.
        "query = urllib.parse.parse_qs(urllib.parse.urlsplit(sys.argv[1]).query)\n"
        "try:\n"
        "    urllib.request.urlopen(query['redirect_uri'][0] + '?state=guess&code=evil')\n"
        "except urllib.error.HTTPError as error:\n"
        "    assert error.code == 400\n"
        "with urllib.request.urlopen(sys.argv[1]) as page:\n"
        "    open(__file__ + '.saw', 'wb').write(page.read())\n"
    )
    browser.chmod(0o700)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "BROWSER": str(browser),
    }
    return Home(tmp_path, environment)


def test_browser_brings_consent(home: Home, server: TokenServer) -> None:
    done = home.login()
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{server.url}/authorize?" in done.stdout
    assert done.stdout.endswith("logged in as alice\n")
    assert b"you can close this window" in (home.directory / "browser.saw").read_bytes()
    # Nothing of it is shown.
    assert [one["grant_type"] for one in server.requests] == ["authorization_code"]
    assert not [word for word in ("access-", "refresh-", "code-") if word in done.stdout]


def test_connection_without_an_end_does_not_keep_the_browser_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent, "TIMEOUT", 4.0)
    over = threading.Event()

    def trickle(port: int) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
            began.set()
            # Longer than the other one may take, and never silent for long.
            for _ in range(60):
                connection.sendall(b"G")
                if over.wait(0.1):
                    return

    def come_back(uri: str) -> None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}?state=ours&code=1") as page:
            page.read()

    began = threading.Event()
    with consent._RedirectServer("ours", "https://localhost/") as redirect:
        idle = threading.Thread(target=trickle, args=(redirect.server_address[1],))
        idle.start()
        assert began.wait(DEADLINE)
        browser = threading.Thread(target=come_back, args=(redirect.uri,))
        browser.start()
        try:
            assert redirect.wait()["code"] == "1"
        finally:
            over.set()
            idle.join()
    browser.join()


@pytest.mark.parametrize(
    ("url", "host"),
    [("https://login.microsoftonline.com/common", "localhost"), ("https://example.org/", "127.0.0.1")],
)
def test_browser_comes_back_to_an_address_where_the_provider_takes_it(url: str, host: str) -> None:
    with consent._RedirectServer("ours", url) as redirect:
        assert redirect.uri.startswith(f"http://{host}:")


def test_code_brings_consent(home: Home, server: TokenServer) -> None:
    """A server that is away for a moment is asked again."""
    server.pending = server.failing = 1
    done = home.login("--device")
    assert (done.returncode, done.stderr) == (0, "")
    assert "https://example.org/device" in done.stdout
    assert "ABCD[2J-EFGH" in done.stdout
    assert len(server.requests) == 3


def test_refused_consent_is_told_in_one_line(home: Home, server: TokenServer) -> None:
    server.refusal = (400, {"error": "access_denied", "error_description": "The user said no."})
    for arguments in ((), ("--device",)):
        done = home.login(*arguments)
        assert done.returncode == 3
        assert done.stderr.startswith("imapfs: no consent: localhost:")
        assert done.stderr.endswith("says access_denied: The user said no.\n")
        assert done.stderr.count("\n") == 1


def test_consent_of_somebody_else_is_noticed_and_not_kept(
    home: Home, server: TokenServer, imap: Dovecot
) -> None:
    where = address(imap.account("alice")).url
    keyring.save(keyring.REFRESH_TOKENS, where, Secret("good"))
    server.user = "bob"
    done = home.login()
    assert done.returncode == 3
    assert "localhost refused the access token of alice" in done.stderr
    assert done.stderr.count("\n") == 1
    found = keyring.load(keyring.REFRESH_TOKENS, where)
    assert found is not None
    assert found.reveal() == "good"


def test_without_a_keyring_consent_is_of_no_use(home: Home, kept: Path) -> None:
    kept.unlink()
    done = home.login()
    assert done.returncode == 3
    assert "the keyring does not take the secret (KeyringLocked): unlock it" in done.stderr


def test_mount_outlives_its_tokens(home: Home, server: TokenServer, imap: Dovecot, mount: Mounter) -> None:
    assert home.login().returncode == 0
    account = imap.account("alice")
    mounted = mount(
        account,
        "-v",
        source="work",
        environment=home.environment,
        expected_log=["offline: the consent for imaps://alice@localhost:[0-9]+ has ended"],
    )
    assert os.listdir(mounted.path / "INBOX") == []
    account.deliver("Drafts", [(b"Subject: one\r\n\r\none\r\n", 1_700_000_000, "")])
    server.end_tokens()
    imap.doveadm("kick", "alice")
    assert len(os.listdir(mounted.path / "Drafts")) == 1
    server.revoke()
    imap.doveadm("kick", "alice")
    assert not _listed(mounted.path / "Junk")
    assert "run 'imapfs login work'" in mounted.status()["reason"]
    assert home.login().returncode == 0
    wait_until(lambda: _listed(mounted.path / "Junk"), "the mount is back after a new consent")
    mounted.unmount()
    assert "access-" not in mounted.log_text()
    assert "refresh-" not in mounted.log_text()


def _listed(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        os.listdir(directory)
        return True
    return False
