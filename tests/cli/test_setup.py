"""From an address to a mount: ``imapfs setup`` as a person meets it, at a terminal and without one."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner

from imapfs import mountinfo
from imapfs.account import discovery, keyring, oauth, providers
from imapfs.account.providers import Provider
from imapfs.cli.main import commands
from imapfs.daemon import control
from imapfs.errors import ImapfsError
from tests.support.mounting import wait_until
from tests.support.servers.domain import Domain, Page, enter
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority
from tests.support.servers.tokens import TokenServer
from tests.support.terminal import Terminal

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0
TOKENS = "IMAPFS_TEST_TOKENS"
WELL_KNOWN = "https://example.org/.well-known/autoconfig/mail/config-v1.1.xml"


# ---- What runs in the child processes


def run() -> None:
    if tokens := os.environ.get(TOKENS):
        # A provider like Microsoft: it is known, and takes no passwords.
        known = Provider("Tokens", "", ("tokens.org",), (), "localhost", sign_in="oauth", oauth="microsoft")
        vars(providers)["table"] = lambda: (known,)
        urls = {"authorize-url": f"{tokens}/authorize", "token-url": f"{tokens}/token", "scope": "mail"}
        cast(dict[str, object], oauth.PROVIDERS)["microsoft"] = urls
    enter()
    from imapfs.cli.main import main

    main()


# ---- Running it


class Home:
    """A person's files and commands, for one account of the test server."""

    def __init__(self, path: Path, user: Account, domain: Domain) -> None:
        self.path = path
        self.user = user
        self.domain = domain
        self.config = path / "config" / "imapfs" / "config.toml"
        self.address = f"{user.name}@example.org"
        self.mail = path / "mail"
        self.mail.mkdir()
        self.more: dict[str, str] = {}
        """Further environment variables."""
        self.keyring = path / "keyring.json"
        self.keyring.write_text("{}")

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", "") + f":{ROOT}",
            "HOME": str(self.path),
            "XDG_CONFIG_HOME": str(self.path / "config"),
            "XDG_CACHE_HOME": str(self.path / "cache"),
            "XDG_STATE_HOME": str(self.path / "state"),
            "PYTHON_KEYRING_BACKEND": "tests.support.keyrings.FileKeyring",
            "IMAPFS_TEST_KEYRING": str(self.keyring),
            **self.domain.environment,
            **self.more,
        }

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-c", "from tests.cli.test_setup import run; run()", *map(str, arguments)]

    def setup(self, *arguments: str | Path) -> Terminal:
        """The walk at a terminal."""
        return Terminal(self.command("setup", "--ca-file", self.ca_file, *arguments), self.environment)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Any command, without a terminal."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert "Traceback" not in done.stderr
        assert self.user.password not in done.stdout + done.stderr
        return done

    def refusal(self, *arguments: str | Path, code: int = 1) -> str:
        """The one line on stderr of a setup that must fail and write nothing."""
        done = self.run("setup", *arguments)
        assert done.returncode == code, done
        assert done.stderr.count("\n") == 1, done.stderr
        assert not self.config.exists()
        return done.stderr

    @property
    def ca_file(self) -> Path:
        return self.domain.authority.certificate

    def publish(self, port: int | None = None, security: str = "SSL") -> None:
        """Let the domain say where the account is, in its autoconfig file."""
        self.domain.pages[WELL_KNOWN] = Page(
            f"""<clientConfig version="1.1"><emailProvider id="example.org"><incomingServer type="imap">
            <hostname>localhost</hostname><port>{port or self.user.server.port}</port>
            <socketType>{security}</socketType><username>%EMAILLOCALPART%</username>
            </incomingServer></emailProvider></clientConfig>""".encode()
        )

    def password_file(self, password: str | None = None) -> Path:
        path = self.path / "password"
        path.touch(mode=0o600)
        path.write_text(password or self.user.password)
        return path

    def logins(self) -> int:
        """How often somebody tried to log in to the account, with whatever success."""
        user = re.compile(f"user=<{self.user.name}>|\\({self.user.name}[,)]")
        return sum(
            "Login: " in line or "auth failed" in line or "Aborted login" in line
            for line in self.user.server.log_lines()
            if user.search(line)
        )

    def unmount_all(self) -> None:
        for mount in mountinfo.imapfs_mounts():
            if self.path in mount.mountpoint.parents:
                with contextlib.suppress(Exception):
                    control.unmount(mount.mountpoint)
                if mountinfo.mount_at(mount.mountpoint) is not None:
                    subprocess.run(["fusermount3", "-uz", mount.mountpoint], check=False)


@pytest.fixture
def home(tmp_path: Path, user: Account, ca: CertificateAuthority) -> Iterator[Home]:
    with Domain(ca, "example.org", "autoconfig.example.org") as domain:
        made = Home(tmp_path, user, domain)
        try:
            yield made
        finally:
            made.unmount_all()


# ---- At a terminal


def test_address_and_password_lead_to_a_mounted_mailbox(home: Home) -> None:
    home.publish()
    home.user.deliver("INBOX", [(b"Subject: hello\r\n\r\nhello\r\n", 1_700_000_000, "")])
    with home.setup() as terminal:
        terminal.answer("E-mail address", home.address)
        terminal.answer("Name of the account [example]", "work")
        shown = terminal.answer("Server [1]", "")
        assert (
            f"localhost, port {home.user.server.port}, TLS, user {home.user.name} (from {WELL_KNOWN})"
            in shown
        )
        terminal.answer("Password [k]", "")
        terminal.answer("(not shown)", home.user.password)
        terminal.expect("logged in")
        terminal.answer(f"Mount it now on {home.mail}/work? [Y/n]", "")
        terminal.expect(f"mounted on {home.mail}/work; to end it: imapfs umount {home.mail}/work")
        assert terminal.end() == 0
        assert home.user.password not in terminal.shown
    assert home.user.password not in home.config.read_text()
    assert "keyring set imapfs imaps://" in home.config.read_text()
    assert len(os.listdir(home.mail / "work" / "INBOX")) == 1
    listed = json.loads(home.run("accounts", "--json").stdout)
    assert [(one["name"], one["mountpoints"]) for one in listed] == [("work", [f"{home.mail}/work"])]
    assert home.run("accounts").stdout.endswith(f"(keyring or prompt)  {home.mail}/work\n")
    # Later, the name alone is enough.
    assert home.run("umount", home.mail / "work").returncode == 0
    (home.mail / "work").rmdir()
    assert home.run("mount", "work").returncode == 0
    assert len(os.listdir(home.mail / "work" / "INBOX")) == 1


def test_wrong_password_is_told_and_tried_only_when_asked_to(home: Home) -> None:
    home.publish()
    file = home.path / "secrets" / "mail"
    with home.setup("--address", home.address, "--name", "work") as terminal:
        terminal.answer("Server [1]", "")
        terminal.answer("Password [k]", "f")
        terminal.answer(f"File [{home.config.with_name('work.password')}]", str(file))
        terminal.answer("(not shown)", "wrong")
        terminal.answer("What now [p]", "p")
        wait_until(lambda: home.logins() == 1, "as many logins as were asked for")
        terminal.answer("Password [k]", "f")
        terminal.answer("File", str(file))
        terminal.answer("(not shown)", home.user.password)
        terminal.expect("logged in")
        terminal.answer("Mount it now", "n")
        terminal.expect("imapfs mount work")
        assert terminal.end() == 0
    wait_until(lambda: home.logins() == 2, "as many logins as were asked for")
    assert file.read_text() == home.user.password + "\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert home.run("mount", "work", home.mail).returncode == 0


def test_settings_can_be_corrected_without_typing_the_password_again(home: Home) -> None:
    with home.setup("--address", home.address, "--name", "work", "--no-lookup", "--yes") as terminal:
        assert "no server was found for example.org" in terminal.answer("Server: ", "not a host")
        assert "host name" in terminal.answer("Server: ", "localhost")
        terminal.answer("Encryption (tls or starttls) [tls]", "")
        terminal.answer("Port [993]", "1")
        terminal.answer(f"User [{home.address}]", home.user.name)
        terminal.answer("Password [k]", "a")
        terminal.answer("(not shown)", home.user.password)
        assert "localhost:1 refuses connections" in terminal.answer("What now [p]", "s")
        terminal.answer("Server [localhost]", f"localhost:{home.user.server.port}")
        terminal.answer("Encryption", "")
        terminal.answer(f"Port [{home.user.server.port}]", "")
        terminal.answer("User", "")
        terminal.expect("logged in")
        assert terminal.end() == 0
    assert "The password is asked for at each mount." in home.config.read_text()


def test_the_other_form_of_the_user_name_can_be_tried(home: Home) -> None:
    arguments = "--address", home.address, "--name", "work", "--user", home.address
    with Proxy(home.user.server) as proxy:
        home.publish(proxy.port)
        proxy.fault(b"AUTHENTICATE|LOGIN", b"NO [AUTHENTICATIONFAILED] No such user")
        with home.setup(*arguments, "--password-file", home.password_file()) as terminal:
            terminal.answer("Server [1]", "")
            shown = terminal.answer("What now [p]", "u")
            assert f"log in as {home.user.name} instead of {home.address}" in shown
            terminal.expect(f"logged in at localhost as {home.user.name}")
            terminal.answer("Mount it now", "n")
            assert terminal.end() == 0
    assert f'user = "{home.user.name}"' in home.config.read_text()


@pytest.mark.parametrize("trusts", [True, False])
def test_a_certificate_is_pinned_only_if_the_person_says_so(home: Home, trusts: bool) -> None:
    server = home.user.server
    arguments = home.command(
        "setup", "--host", "localhost", "--port", str(server.port), "--user", home.user.name,
        "--name", "work", "--password-file", home.password_file(),
    )  # fmt: skip
    with Terminal(arguments, home.environment) as terminal:
        shown = terminal.answer("What now [p]", "c")
        assert "does not verify" in shown
        shown = terminal.answer("be trusted? [y/N]", "y" if trusts else "")
        (digits,) = re.findall(r"SHA-256 +([0-9a-f]{64})", shown)
        assert "for         localhost" in shown
        if trusts:
            terminal.expect("logged in")
            terminal.answer("Mount it now", "")
            terminal.expect("mounted on")
            assert terminal.end() == 0
            assert f'tls-fingerprint = "{digits}"' in home.config.read_text()
        else:
            terminal.answer("What now [p]", "q")
            assert terminal.end() == 130
            assert not home.config.exists()


def test_an_address_is_no_account(home: Home) -> None:
    assert f"run 'imapfs setup --address {home.address}'" in home.run("mount", home.address).stderr
    home.config.parent.mkdir(parents=True)
    home.config.write_text(f'[accounts.work]\nhost = "h"\nuser = "{home.address}"\n')
    assert "run 'imapfs mount work'" in home.run("mount", home.address).stderr


def test_server_that_only_dns_names_is_asked_about(home: Home) -> None:
    home.domain.records["_imaps._tcp.example.org", "SRV"] = [f"0 1 {home.user.server.port} localhost."]
    with home.setup("--address", home.address, "--name", "work", "--user", home.user.name) as terminal:
        terminal.answer("Server [1]", "")
        shown = terminal.answer("the right place for your password? [y/N]", "")
        assert "RFC 6186" in shown
        terminal.answer("Server: ", "localhost")
        terminal.answer("Encryption", "")
        terminal.answer("Port", "")
        terminal.answer("User", "")
        terminal.expect("Password [k]")
        assert home.logins() == 0
        assert terminal.interrupt() == 130
    assert not home.config.exists()


@pytest.mark.parametrize("key", ["Ctrl-C", "Ctrl-D"])
def test_leaving_at_the_password_writes_nothing(home: Home, key: str) -> None:
    home.publish()
    with home.setup("--address", home.address, "--name", "work", "--keyring") as terminal:
        terminal.answer("Server [1]", "")
        terminal.expect("(not shown)")
        if key == "Ctrl-D":
            terminal.type("\x04")
            assert terminal.end() == 130
        else:
            assert terminal.interrupt() == 130
        assert "Traceback" not in terminal.shown
    assert not home.config.exists()
    assert home.keyring.read_text() == "{}"


def test_locked_keyring_leads_back_to_the_question(home: Home) -> None:
    home.publish()
    home.keyring.unlink()
    with home.setup("--address", home.address, "--name", "work") as terminal:
        terminal.answer("Server [1]", "")
        terminal.answer("Password [k]", "k")
        shown = terminal.answer("What now [p]", "q")
        assert "the keyring cannot be read (KeyringLocked): unlock it" in shown
        assert terminal.end() == 130
    assert not home.config.exists()


def test_name_that_exists_is_asked_for_again(home: Home) -> None:
    home.config.parent.mkdir(parents=True)
    home.config.write_text('[accounts.example]\nhost = "h"\nuser = "u"\n')
    home.publish()
    with home.setup("--address", home.address, "--password-file", home.password_file()) as terminal:
        terminal.answer("Name of the account: ", "example")
        assert "already has an account example" in terminal.answer("Name of the account: ", "other")
        terminal.answer("Server [1]", "")
        terminal.answer("Mount it now", "n")
        assert terminal.end() == 0
    assert home.config.read_text().startswith(
        '[accounts.example]\nhost = "h"\nuser = "u"\n\n[accounts.other]\n'
    )


def test_consent_in_a_browser_leads_to_a_mount_as_well(home: Home, ca: CertificateAuthority) -> None:
    browser = home.path / "browser"
    browser.write_text(
        f"#!{sys.executable}\nimport sys, urllib.request\nurllib.request.urlopen(sys.argv[1])\n"
    )
    browser.chmod(0o700)
    address = "alice@tokens.org"
    with (
        TokenServer(ca, address) as tokens,
        Dovecot(ca, mechanisms=("plain", "xoauth2", "oauthbearer"), tokens=tokens.introspection) as server,
    ):
        home.more = {TOKENS: tokens.url, "BROWSER": str(browser), "SSL_CERT_FILE": str(home.ca_file)}
        with home.setup("--address", address, "--name", "work", "--port", str(server.port)) as terminal:
            terminal.answer("Server [1]", "")
            terminal.answer("Password [o]", "")
            terminal.answer("Client id", "our-id")
            terminal.answer("Client secret", "")
            terminal.expect(f"logged in at localhost as {address}")
            terminal.answer("Mount it now", "n")
            assert terminal.end() == 0
            assert not [word for word in ("access-", "refresh-", "code-") if word in terminal.shown]
        assert 'oauth = {provider = "microsoft", client-id = "our-id"}' in home.config.read_text()
        assert "OAuth 2.0" in home.run("accounts").stdout
        assert home.run("mount", "work", home.mail).returncode == 0
        home.unmount_all()


# ---- Without a terminal


def test_options_alone_make_an_account_that_mounts(home: Home) -> None:
    home.publish()
    done = home.run(
        "setup", "--name", "work", "--address", home.address, "--ca-file", home.ca_file, "--yes",
        "--password-command", f"cat '{home.password_file()}'",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wait_until(lambda: home.logins() == 1, "as many logins as were asked for")
    assert home.run("mount", "work", home.mail).returncode == 0
    assert (home.mail / "INBOX").is_dir()


def test_starttls_is_taken_from_the_autoconfig_file(home: Home, ca: CertificateAuthority) -> None:
    with Dovecot(ca, plain=True) as server:
        home.user = server.account("alice")
        assert server.plain_port is not None
        home.publish(server.plain_port, "STARTTLS")
        done = home.run(
            "setup", "--name", "w", "--address", home.address, "--ca-file", home.ca_file, "--yes",
            "--password-file", home.password_file(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert 'security = "starttls"' in home.config.read_text()
        assert home.run("mount", "w", home.mail).returncode == 0
        home.unmount_all()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ([], "--address"),
        (["--address", "alice@example.org"], "--name, or --yes for 'example'"),
        (["--address", "alice@example.org", "--name", "work"], "give --yes or --host"),
        (["--address", "alice@example.org", "--yes"], "--password-command, "),
        (["--address", "alice@example.org", "--yes", "--prompt"], "or --no-test"),
        (
            ["--address", "alice@example.org", "--yes", "--keyring"],
            "keyring set imapfs imaps://alice@localhost",
        ),
        (["--address", "alice@example.net", "--yes"], "no server was found for example.net: give --host"),
        (["--address", "alice@tuta.io", "--yes"], "Tuta offers no IMAP"),
        (["--address", "alice@example.org", "--insecure-plaintext", "--yes"], "contradicts TLS"),
        (["--address", "alice"], "not an e-mail address"),
        (
            ["--host", "h/h", "--user", "u", "--name", "n", "--prompt", "--no-test"],
            "--host: has no valid host",
        ),
        (["--address", "alice@example.org", "--name", "a/b"], "slash"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    home: Home, monkeypatch: pytest.MonkeyPatch, given: Sequence[str], missing: str
) -> None:
    home.publish()
    network = home.domain.network
    monkeypatch.setattr(discovery, "Network", lambda ca_file: network)
    monkeypatch.setattr(keyring, "load", lambda service, url: None)
    environment = {"XDG_CONFIG_HOME": str(home.path / "config")}
    done = CliRunner().invoke(commands, ["setup", "--ca-file", str(home.ca_file), *given], env=environment)
    assert isinstance(done.exception, ImapfsError), done
    assert missing in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not home.config.exists()


def test_yes_does_not_trust_dns_with_the_password(home: Home) -> None:
    home.domain.records["_imaps._tcp.example.org", "SRV"] = [f"0 1 {home.user.server.port} localhost."]
    line = home.refusal(
        "--name", "work", "--address", home.address, "--ca-file", home.ca_file, "--yes",
        "--password-file", home.password_file(), "--user", home.user.name,
    )  # fmt: skip
    assert line.endswith("if it is right, give --host localhost\n")
    assert home.logins() == 0


def test_login_that_fails_is_tried_once_and_writes_nothing(home: Home) -> None:
    home.publish()
    line = home.refusal(
        "--name", "work", "--address", home.address, "--ca-file", home.ca_file, "--yes",
        "--password-file", home.password_file("wrong"), code=3,
    )  # fmt: skip
    assert "localhost" in line
    wait_until(lambda: home.logins() == 1, "as many logins as were asked for")


# ---- All at once


def account(home: Home, name: str, user: str, port: int) -> str:
    return (
        f'[accounts.{name}]\nhost = "localhost"\nport = {port}\nuser = "{user}"\ntimeout = 5\n'
        f'ca-file = "{home.ca_file}"\npassword-file = "{home.password_file()}"\n'
    )


def test_one_account_that_is_down_does_not_keep_the_others_from_being_mounted(home: Home) -> None:
    port = home.user.server.port
    home.config.parent.mkdir(parents=True)
    others = account(home, "one", f"{home.user.name}a", port) + account(
        home, "two", f"{home.user.name}b", port
    )
    home.config.write_text(others + account(home, "down", home.user.name, 1))
    done = home.run("mount", "--all", home.mail, "--read-only", "-o", "noatime,nodev")
    assert done.returncode == 1
    assert done.stderr == "imapfs: not all accounts are mounted\n"
    lines = sorted(done.stdout.splitlines())
    assert "down: localhost:1 refuses connections" in lines[0]
    assert lines[0].endswith(f"; to retry: imapfs mount down {home.mail}/down")
    assert lines[1:] == ["one: mounted", "two: mounted"]
    assert (home.mail / "one" / "INBOX").is_dir()
    assert control.read_status(home.mail / "two")["read_only"]
    home.config.write_text(others)
    again = home.run("mount", "--all", home.mail)
    assert (again.returncode, sorted(again.stdout.splitlines())) == (0, ["one: mounted", "two: mounted"])
    gone = home.run("umount", "--all", home.mail)
    assert gone.returncode == 0, gone
    assert len(gone.stdout.splitlines()) == 2
    assert not any(home.mail in mount.mountpoint.parents for mount in mountinfo.imapfs_mounts())


def test_mount_whose_daemon_died_is_mounted_again(home: Home) -> None:
    home.config.parent.mkdir(parents=True)
    home.config.write_text(account(home, "one", home.user.name, home.user.server.port))
    assert home.run("mount", "--all", home.mail).returncode == 0
    os.kill(control.read_status(home.mail / "one")["pid"], signal.SIGKILL)
    done = home.run("mount", "--all", home.mail)
    assert (done.returncode, done.stdout) == (0, "one: mounted\n")
    assert (home.mail / "one" / "INBOX").is_dir()


def test_unmounting_all_tells_which_one_is_in_use(home: Home) -> None:
    home.config.parent.mkdir(parents=True)
    home.config.write_text(account(home, "one", home.user.name, home.user.server.port))
    assert home.run("mount", "--all", home.mail).returncode == 0
    with open(home.mail / "one" / "INBOX" / "draft", "w"):
        done = home.run("umount", "--all", home.mail)
    assert done.returncode == 1
    assert "is busy" in done.stdout
    assert home.run("umount", "--all", home.mail).returncode == 0
    assert "there is no imapfs mount below" in home.run("umount", "--all", home.mail).stderr


def test_all_needs_accounts_and_a_directory(home: Home) -> None:
    assert "add one with 'imapfs setup'" in home.run("mount", "--all", home.mail).stderr
    home.config.parent.mkdir(parents=True)
    home.config.write_text(account(home, "one", home.user.name, 1))
    assert "mkdir -p" in home.run("mount", "--all", home.path / "missing").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["mount", "--all", "d", "x"],
        ["mount", "--all", "d", "--foreground"],
        ["mount", "--all", "d", "--password-file", "f"],
        ["mount", "--all", "d", "--log-file", "f"],
        ["mount", "imaps://alice@localhost"],
        ["umount"],
        ["umount", "d", "--all", "d"],
    ],
)
def test_contradictory_arguments_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(commands, arguments).exit_code == 2
