"""``imapfs check``: each wrong turn is named, with its remedy, and nothing is changed or given away."""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from imapfs.cli.check import connection, steps
from imapfs.cli.check.finding import Finding
from imapfs.daemon import preflight
from imapfs.errors import CredentialError
from imapfs.model import Account as Address
from imapfs.model import CredentialProvider, MountConfig, Secret
from tests.support.accounts import address
from tests.support.mail import plain
from tests.support.mounting import ROOT, MailAccount
from tests.support.servers.courier import Courier
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

DEADLINE = 30.0
NETWORK = ("resolution", "tcp", "protocol", "tls", "certificate", "greeting")
ACCOUNT = ("credentials", "login", "capabilities", "mailboxes", "quota", "connections", "latency")
SAMPLE = ("throughput", "sizes")
MACHINE = ("fuse-device", "fusermount3", "pyfuse3", "allow-other", "cache")
EVERY = (*NETWORK, *ACCOUNT, *SAMPLE, *MACHINE)


class Report:
    """What `steps.run` found."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = list(findings)

    def of(self, step: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.step == step]

    def one(self, step: str) -> Finding:
        (finding,) = self.of(step)
        return finding

    @property
    def failed(self) -> Finding:
        """The only one that failed; what needs it was skipped, and nothing else."""
        (finding,) = [finding for finding in self.findings if finding.status == "failed"]
        return finding

    @property
    def skipped(self) -> tuple[str, ...]:
        return tuple(finding.step for finding in self.findings if finding.status == "skipped")

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "warning"]


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Report]:
    """Return a function that checks what a mount of an address, with these settings, would need."""

    def look(
        account: Address,
        password: str | Callable[[], CredentialProvider] = "secret",
        timeout: float = 20.0,
        **changes: object,
    ) -> Report:
        config = MountConfig(
            account=account,
            mountpoint=Path("/"),
            cache_dir=tmp_path / "cache",
            cache_size=1 << 20,
            fetch_ahead=0,
            names="subject",
            own_mail={},
            list_attributes=False,
            delete="trash",
            trash=None,
            connections=2,
            timeout=timeout,
            poll=60.0,
            read_only=False,
            fuse_options=frozenset(),
        )
        ask = password if callable(password) else lambda: Secret(password)
        return Report(steps.run(dataclasses.replace(config, **changes), ask))  # type: ignore[arg-type]

    return look


Look = Callable[..., Report]


# ---- All well


def test_good_account_has_every_step_and_nothing_to_remedy(user: Account, look: Look) -> None:
    user.deliver("INBOX", [(plain(1), 1, "")])
    report = look(address(user))
    assert tuple(dict.fromkeys(finding.step for finding in report.findings)) == EVERY
    assert {finding.status for finding in report.findings} == {"ok"}
    assert "127.0.0.1" in report.one("resolution").detail
    assert "TLSv1." in report.one("tls").detail
    assert "PLAIN" in report.one("greeting").detail
    assert "\\Trash is Trash" in report.of("mailboxes")[1].detail
    assert report.one("connections").detail.startswith("2 ")
    assert report.one("sizes").detail == "exact for 1 messages"


def test_nothing_is_changed_on_the_server(user: Account, look: Look) -> None:
    user.deliver("INBOX", [(plain(1), 1, ""), (plain(2), 2, "S")])
    user.start_trace()
    look(address(user))
    harmless = (
        *(b"CAPABILITY", b"NAMESPACE", b"LIST", b"GETQUOTAROOT", b"EXAMINE", b"NOOP", b"LOGOUT"),
        *(b"ENABLE", b"ID", b"UID FETCH"),
    )
    said = [line.partition(b" ")[2] for line in user.protocol_trace()]
    assert [line for line in said if not line.upper().startswith(harmless)] == []
    assert any(b"BODY.PEEK[]" in line for line in said)
    assert [line for line in said if b"BODY[" in line] == []


def test_server_that_does_not_say_uidnext_is_opened_read_only_too(
    ca: CertificateAuthority, look: Look
) -> None:
    with Courier(ca) as server, Proxy(server) as proxy:
        account = server.account("alice")
        account.deliver("INBOX", [(plain(1), 1, "")])
        report = look(address(proxy.account(account)))
        assert report.one("sizes").detail == "exact for 1 messages"
        assert any(command.startswith(b"EXAMINE") for command in proxy.commands())
        assert not any(command.startswith(b"SELECT") for command in proxy.commands())


def test_account_without_mail_has_nothing_to_measure(user: Account, look: Look) -> None:
    report = look(address(user))
    assert report.one("throughput").status == report.one("sizes").status == "ok"


def test_starttls_is_checked_like_tls(ca: CertificateAuthority, look: Look) -> None:
    with Dovecot(ca, plain=True) as server:
        assert server.plain_port is not None
        account = dataclasses.replace(
            address(server.account("alice")), port=server.plain_port, security="starttls"
        )
        report = look(account)
    assert "TLSv1." in report.one("tls").detail
    assert report.warnings == []
    assert report.one("login").status == "ok"


# ---- The way to the server


def test_name_that_does_not_exist(look: Look) -> None:
    report = look(Address("mail.example.invalid", "alice"))
    assert report.failed.step == "resolution"
    assert report.skipped == (*NETWORK[1:], *ACCOUNT, *SAMPLE)


def test_refused_port_is_told_from_a_silent_one(look: Look) -> None:
    with closed_port() as port:
        refused = look(Address("127.0.0.1", "alice", port)).failed
    with blackhole() as port:
        silent = look(Address("127.0.0.1", "alice", port), timeout=0.3).failed
    assert refused.step == silent.step == "tcp"
    assert "refuses" in refused.detail
    assert "does not answer" in silent.detail
    assert "firewall" in silent.remedy


def test_one_dead_address_among_others_is_a_warning(
    user: Account, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, real = user.server.port, socket.getaddrinfo
    with blackhole() as dead:
        elsewhere = real("127.0.0.1", dead, type=socket.SOCK_STREAM)
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, number, *more, **how: (
                (elsewhere if number == port else []) + real(host, number, *more, **how)
            ),
        )
        # What goes on from here on does so at the address that answers.
        report = look(address(user), timeout=0.5)
    (warning,) = report.of("tcp")
    assert warning.status == "warning"
    assert "but not at" in warning.detail


def test_server_that_says_nothing(look: Look) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        report = look(Address("127.0.0.1", "alice", listener.getsockname()[1]), timeout=0.3)
    assert report.failed.step == "protocol"
    assert "did not answer" in report.failed.detail


def test_server_that_hangs_up_is_not_taken_for_one_with_tls(look: Look) -> None:
    with serving(lambda connection: connection.shutdown(socket.SHUT_RDWR)) as port:
        report = look(Address("127.0.0.1", "alice", port))
    assert report.failed.step == "protocol"
    assert "hung up" in report.failed.detail or "reset" in report.failed.detail


def test_server_with_tls_that_is_too_old_is_named(ca: CertificateAuthority, look: Look) -> None:
    def refuse(connection: socket.socket, _: int) -> None:
        connection.recv(4096)
        # The alert protocol_version (RFC 8446 section 6).
        connection.sendall(bytes.fromhex("15030100020246"))
        connection.close()

    with Scripted(ca, before_tls=refuse) as server:
        report = look(address(server))
    assert report.one("protocol").status == "ok"
    assert report.failed.step == "tls"
    assert "older than 1.2" in report.failed.detail


def test_line_without_an_end_is_not_waited_for(look: Look) -> None:
    stop, sent = threading.Event(), []

    def drip(connection: socket.socket) -> None:
        while not stop.wait(0.005):
            connection.sendall(b"x")
            sent.append(b"x")

    with serving(drip) as port:
        report = look(Address("127.0.0.1", "alice", port, security="starttls"), timeout=0.5)
        stop.set()
    assert report.failed.step == "protocol"
    assert "says 'xxx" in report.failed.detail
    assert len(sent) < 1000


def test_plaintext_server_on_the_port_for_tls(ca: CertificateAuthority, look: Look) -> None:
    with Dovecot(ca, plain=True) as server:
        assert server.plain_port is not None
        report = look(dataclasses.replace(address(server.account("alice")), port=server.plain_port))
    assert report.failed.step == "protocol"
    assert "IMAP without TLS" in report.failed.detail
    assert f"imap://alice@localhost:{server.plain_port}" in report.failed.remedy


def test_tls_server_on_the_port_for_starttls(
    user: Account, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_LISTEN_SECONDS", 0.2)
    report = look(dataclasses.replace(address(user), security="starttls"))
    assert report.failed.step == "protocol"
    assert "TLS from the first byte" in report.failed.detail
    assert "imaps://" in report.failed.remedy


@pytest.mark.parametrize("security", ["tls", "starttls"])
def test_server_of_another_protocol_is_named(look: Look, security: str) -> None:
    with serving(lambda connection: connection.sendall(b"220 mail.example.org ESMTP\r\n")) as port:
        report = look(Address("127.0.0.1", "alice", port, security=security))  # type: ignore[arg-type]
    assert report.failed.step == "protocol"
    assert "SMTP" in report.failed.detail


def test_no_starttls_where_the_password_would_go_in_the_clear(
    ca: CertificateAuthority, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imapfs.imap.connect.is_this_machine", lambda *_: False)
    with Scripted(ca, plain=True) as server:
        report = look(dataclasses.replace(address(server), security="starttls"))
    assert report.failed.step == "tls"
    assert not any(command.startswith((b"AUTHENTICATE", b"LOGIN")) for command in server.commands)
    assert "in the clear" in report.failed.detail


# ---- Certificates


@pytest.mark.parametrize(
    ("how", "says", "remedy"),
    [
        ({"expired": True}, "expired on", "must renew"),
        ({"self_signed": True}, "self-signed", "--ca-file"),
        ({"names": ["elsewhere.example.org"], "addresses": []}, "for elsewhere.example.org", "use a name"),
        ({"unknown": True}, "local issuer", "--ca-file"),
    ],
)
def test_bad_certificate_is_explained_and_can_be_pinned(
    ca: CertificateAuthority, tmp_path: Path, look: Look, how: dict[str, object], says: str, remedy: str
) -> None:
    authority = CertificateAuthority(tmp_path) if how.pop("unknown", False) else ca
    certificate = authority.issue(**how)  # type: ignore[arg-type]
    with Dovecot(ca, certificate=certificate) as server:
        account = address(server.account("alice"))
        report = look(account)
        fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate[0].read_text())).hexdigest()
        assert report.failed.step == "certificate"
        assert says in report.failed.detail
        assert remedy in report.failed.remedy
        assert f"--tls-fingerprint {fingerprint}" in report.failed.remedy
        assert f'tls-fingerprint = "{fingerprint}"' in report.failed.remedy
        assert report.skipped == ("greeting", *ACCOUNT, *SAMPLE)
        pinned = look(dataclasses.replace(account, tls_fingerprint=fingerprint))
        assert pinned.one("certificate").detail.endswith("pinned")
        assert pinned.one("login").status == "ok"


def test_certificate_that_ends_soon_is_a_warning(
    user: Account, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_SOON", 0.99)
    (warning,) = look(address(user)).warnings
    assert warning.step == "certificate"
    assert "renew" in warning.remedy


def test_other_certificate_than_the_pinned_one(user: Account, look: Look) -> None:
    report = look(dataclasses.replace(address(user), tls_fingerprint="ab" * 32))
    assert report.failed.step == "certificate"
    assert "not the pinned one" in report.failed.detail
    assert "only if you know that it was renewed" in report.failed.remedy


@pytest.mark.parametrize(
    ("version", "step"), [(ssl.TLSVersion.TLSv1_2, "tls"), (ssl.TLSVersion.TLSv1_3, "certificate")]
)
def test_server_that_wants_a_certificate_of_ours(
    ca: CertificateAuthority, look: Look, version: ssl.TLSVersion, step: str
) -> None:
    def demand(context: ssl.SSLContext) -> None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ca.certificate)
        context.maximum_version = version

    with Scripted(ca, prepare=demand) as server:
        without = look(address(server)).failed
        certificate, key = ca.issue(client="alice")
        account = dataclasses.replace(address(server), client_cert=certificate, client_key=key)
        assert look(account).one("login").status == "ok"
    assert without.step == step
    assert "--client-cert" in without.remedy


# ---- Login


def test_wrong_password_has_the_remedy_of_the_mount(user: Account, look: Look) -> None:
    report = look(address(user), "not-it")
    assert report.failed.step == "login"
    assert "refused the password" in report.failed.detail
    assert report.failed.remedy.startswith("check the password")
    assert report.skipped == (*ACCOUNT[2:], *SAMPLE)


def test_missing_password_is_found_before_a_login(user: Account, look: Look) -> None:
    def nothing() -> CredentialProvider:
        raise CredentialError("no password for it: use the keyring")

    report = look(address(user), nothing)
    assert report.failed == Finding("credentials", "failed", "no password for it: use the keyring")


def test_login_that_opens_no_mailbox(ca: CertificateAuthority, look: Look) -> None:
    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        refused = command.startswith((b"LIST", b"NAMESPACE"))
        return [tag + b" BAD User is authenticated but not connected.\r\n"] if refused else None

    with Scripted(ca, script=script) as server:
        report = look(address(server))
    assert report.failed.step == "mailboxes"
    assert "IMAP.AccessAsUser.All" in report.failed.remedy


def test_check_asks_what_a_listing_asks(ca: CertificateAuthority, look: Look) -> None:
    """At stake: check says that a mount would work, whose every directory is then refused."""
    server = Scripted(ca, [plain(1)])

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        return [tag + b" BAD no such item\r\n"] if b"HEADER.FIELDS" in command else None

    server.script = script
    with server:
        report = look(address(server))
    assert report.failed.step == "throughput"
    assert "INBOX cannot be listed: localhost refused UID FETCH: no such item" in report.failed.detail


# ---- What the account can do


def test_each_absent_extension_has_its_cost(user: Account, look: Look) -> None:
    hidden = ["MOVE", "UIDPLUS", "CONDSTORE", "IDLE", "SPECIAL-USE", "NAMESPACE", "LITERAL+", "NOTIFY"]
    with Proxy(user.server, hide=hidden) as proxy:
        report = look(address(proxy.account(user)))
    absent = {finding.detail.split(":")[0] for finding in report.of("capabilities")[1:]}
    assert absent >= {
        *("no MOVE", "no UIDPLUS", "no CONDSTORE", "no QRESYNC", "no IDLE", "no SPECIAL-USE"),
        *("no NAMESPACE", "no LITERAL+/LITERAL-", "no NOTIFY"),
    }
    assert all(finding.detail.split(": ")[1] for finding in report.of("capabilities")[1:])
    warned = [warning.detail for warning in report.warnings]
    assert any(detail.startswith("no UIDPLUS") for detail in warned)
    assert any("rm moves to Trash, because of its name" in detail for detail in warned)
    assert all(finding.status != "failed" for finding in report.findings)


def test_mailbox_that_is_not_there(user: Account, look: Look) -> None:
    report = look(dataclasses.replace(address(user), mailbox="Archiv"))
    assert report.failed.step == "mailboxes"
    assert "Drafts" in report.failed.remedy


def test_quota_and_limit_of_connections(ca: CertificateAuthority, look: Look) -> None:
    with Dovecot(ca, quota="10M", max_userip_connections=2) as server:
        account = server.account("alice")
        account.deliver("INBOX", [(plain(1), 1, "")])
        report = look(address(account), connections=4)
    assert report.one("quota").detail.endswith("of 10 MiB used")
    (warning,) = report.warnings
    assert warning.step == "connections"
    assert warning.detail.startswith("2 of 4")
    assert "--connections 2" in warning.remedy


def test_wrong_sizes_are_noticed(ca: CertificateAuthority, look: Look) -> None:
    messages = [plain(1), plain(2, 30_000)]
    with Scripted(ca, messages, claim=lambda content: len(content) - 3) as server:
        report = look(address(server))
    assert report.one("sizes").status == "warning"
    assert "2 of 2" in report.one("sizes").detail
    assert "by up to 3 bytes" in report.one("sizes").detail


def test_message_far_larger_than_announced_is_not_fetched_to_its_end(
    ca: CertificateAuthority, look: Look
) -> None:
    huge = plain(1) + bytes(64 << 20)
    sent: list[bytes] = []

    def script(tag: bytes, command: bytes) -> Iterator[bytes] | None:
        if b"BODY.PEEK[]" not in command:
            return None

        def pieces() -> Iterator[bytes]:
            yield b"* 1 FETCH (UID 1 BODY[] {%d}\r\n" % len(huge)
            for at in range(0, len(huge), 1 << 20):
                sent.append(b"")
                yield huge[at : at + (1 << 20)]

        return pieces()

    with Scripted(ca, [huge], claim=lambda _: 1000, script=script) as server:
        report = look(address(server))
    assert "1 of 1" in report.one("sizes").detail
    assert len(sent) < 64
    assert all(finding.status != "failed" for finding in report.findings)


def test_connection_that_breaks_in_an_optional_step_is_a_warning(user: Account, look: Look) -> None:
    user.deliver("INBOX", [(plain(1), 1, "")])
    with Proxy(user.server) as proxy:
        proxy.fault(rb"NOOP", "cut", at="command")
        report = look(address(proxy.account(user)))
    assert [warning.step for warning in report.warnings] == ["latency"]
    assert report.one("sizes").detail == "exact for 1 messages"


# ---- This machine


def test_machine_without_fuse(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "DEVICE", tmp_path / "fuse")
    monkeypatch.setenv("PATH", str(tmp_path))
    report = look(Address("mail.example.invalid", "alice"))
    assert report.one("fuse-device").status == report.one("fusermount3").status == "failed"
    assert "modprobe" in report.one("fuse-device").remedy
    assert "package fuse3" in report.one("fusermount3").remedy


def test_allow_other_matters_to_those_who_want_it(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "FUSE_CONF", tmp_path / "fuse.conf")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    nowhere = Address("mail.example.invalid", "alice")
    asked = frozenset({"allow_other"})
    assert look(nowhere).one("allow-other").status == "ok"
    assert look(nowhere, fuse_options=asked).one("allow-other").status == "failed"
    (tmp_path / "fuse.conf").write_text("# comment\nuser_allow_other\n")
    assert look(nowhere, fuse_options=asked).one("allow-other").status == "ok"


def test_room_for_the_cache(look: Look, tmp_path: Path) -> None:
    nowhere = Address("mail.example.invalid", "alice")
    assert look(nowhere).one("cache").status == "ok"
    small = look(nowhere, cache_size=1 << 62).one("cache")
    assert small.status == "warning"
    assert "--cache-size" in small.remedy
    (tmp_path / "file").touch()
    assert look(nowhere, cache_dir=tmp_path / "file").one("cache").status == "failed"
    assert not (tmp_path / "cache").exists()


# ---- The command


@contextlib.contextmanager
def command(
    account: MailAccount, home: Path, *arguments: str, password: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """``imapfs check`` of an account, in a process of its own."""
    (home / "password").touch(mode=0o600)
    (home / "password").write_text(password or account.password)
    server = account.server
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "imapfs", "check", f"imaps://{account.name}@{server.host}:{server.port}"),
            *("--ca-file", str(server.authority.certificate), "--password-file", str(home / "password")),
            *arguments,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), "XDG_CONFIG_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_json_and_exit_code(user: Account, tmp_path: Path) -> None:
    with command(user, tmp_path, "--json") as process:
        out, err = process.communicate(timeout=DEADLINE)
    shown = json.loads(out)
    assert (process.returncode, err) == (0, "")
    assert set(shown) == {"version", "source", "usable", "steps"}
    assert shown["usable"] is True
    assert {tuple(step) for step in shown["steps"]} == {("step", "status", "detail", "remedy")}
    assert tuple(dict.fromkeys(step["step"] for step in shown["steps"])) == EVERY


def test_text_for_people_holds_no_password_and_no_control_characters(
    ca: CertificateAuthority, tmp_path: Path
) -> None:
    password = "correct-horse"

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"LOGIN"):
            return None
        return [tag + b" NO \x07 I do not like " + command + b"\r\n"]

    greeting = b"* OK [CAPABILITY IMAP4rev1] \x07 ready"
    with (
        Scripted(ca, script=script, greeting=greeting, capabilities=b"IMAP4rev1") as server,
        command(server, tmp_path, password=password) as process,
    ):
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (1, "")
    assert "refused the password of alice" in out
    assert password not in out
    assert "\x07" not in out
    assert f"- not checked   {', '.join((*ACCOUNT[2:], *SAMPLE))}\n" in out
    assert out.endswith("A mount would not work.\n")


def test_ctrl_c_ends_it_without_a_word(ca: CertificateAuthority, tmp_path: Path) -> None:
    reached = threading.Event()
    server = Scripted(ca)

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if not command.startswith(b"AUTHENTICATE"):
            return None
        reached.set()
        return server.hang()

    server.script = script
    with server, command(server, tmp_path) as process:
        assert reached.wait(DEADLINE)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err.strip()) == (130, "")


# ---- Servers of a line or two


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port at which nothing listens, and that nobody else gets."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextlib.contextmanager
def blackhole() -> Iterator[int]:
    """A port at which no connection comes about, and none is refused: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.contextmanager
def serving(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that talks like this to whoever connects, and then waits for the other side to go."""

    def serve(connection: socket.socket) -> None:
        connection.settimeout(DEADLINE)
        with contextlib.suppress(OSError), connection:
            talk(connection)
            while connection.recv(4096):
                pass

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept, daemon=True)]
        threads[0].start()
        try:
            yield listener.getsockname()[1]
        finally:
            # Only this wakes a thread that waits in accept().
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(DEADLINE)
