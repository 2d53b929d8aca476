"""Where a real mount gets its password from, and that it leaves it nowhere."""

import base64
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounting import Mount, Mounter, MountFailed
from tests.support.servers.dovecot import Dovecot
from tests.support.servers.secretservice import SecretService
from tests.support.servers.tls import CertificateAuthority

PASSWORD = 'Tr0ub4dor&3 "\\ ü'


@pytest.fixture(scope="module")
def server(ca: CertificateAuthority) -> Iterator[Dovecot]:
    with Dovecot(ca, password=PASSWORD, plain=True, mechanisms=("plain", "scram-sha-256")) as made:
        yield made


@pytest.fixture
def secret_service() -> Iterator[SecretService]:
    with SecretService() as made:
        yield made


def source(server: Dovecot, *, starttls: bool = False) -> str:
    if starttls:
        return f"imap://alice@{server.host}:{server.plain_port}"
    return f"imaps://alice@{server.host}:{server.port}"


def test_password_comes_from_the_secret_service(
    server: Dovecot, secret_service: SecretService, mount: Mounter
) -> None:
    url = source(server)
    assert secret_service.keyring("set", "imapfs", url, secret=PASSWORD).returncode == 0
    account, ca_file = server.account("alice"), str(server.authority.certificate)

    def mounted() -> Mount:
        return mount(account, "--ca-file", ca_file, source=url, environment=secret_service.environment)

    assert "INBOX" in os.listdir(mounted().path)
    secret_service.lock()
    with pytest.raises(MountFailed) as caught:
        mounted()
    assert caught.value.stderr.startswith(f"imapfs: no password for {url}: use --password-command")
    assert caught.value.stderr.count("\n") == 1


def test_password_comes_from_a_systemd_credential(server: Dovecot, mount: Mounter, tmp_path: Path) -> None:
    (tmp_path / "imapfs").write_text(PASSWORD + "\n")
    (tmp_path / "imapfs").chmod(0o400)
    mounted = mount(
        server.account("alice"),
        *("--ca-file", str(server.authority.certificate)),
        source=source(server),
        environment={"CREDENTIALS_DIRECTORY": str(tmp_path)},
    )
    assert "INBOX" in os.listdir(mounted.path)


# -- nothing leaks


class Watch:
    """Reads the command lines of all processes, over and over, while the ``with`` block lasts."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.is_set():
            for process in Path("/proc").iterdir():
                if process.name.isdecimal():
                    self.seen |= _content(process / "cmdline")


def _content(path: Path) -> set[bytes]:
    try:
        return {path.read_bytes()}
    except OSError:
        return set()


def _everything_in(*directories: Path) -> Iterator[tuple[Path, bytes]]:
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file():
                yield path, path.read_bytes()


@pytest.mark.parametrize(
    ("right", "starttls", "auth"),
    [(True, False, "auto"), (True, True, "plain"), (False, True, "auto"), (False, False, "plain")],
)
def test_password_is_in_no_log_file_or_command_line(
    server: Dovecot, mount: Mounter, tmp_path: Path, right: bool, starttls: bool, auth: str
) -> None:
    password = PASSWORD if right else PASSWORD[::-1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(password)
    prepared = mount.prepare(
        server.account("alice"),
        *("--ca-file", str(server.authority.certificate), "--auth", auth, "-vv"),
        *("--password-command", f"cat {elsewhere}; echo a warning >&2"),
        source=source(server, starttls=starttls),
    )
    said = ""
    with Watch() as watch:
        try:
            with prepared as mounted:
                assert "INBOX" in os.listdir(mounted.path)
                assert right
                environment = Path(f"/proc/{mounted.pid}/environ").read_bytes()
                said = str(mounted.status()) + environment.decode(errors="replace")
        except MountFailed as error:
            assert not right
            said = error.stderr
            assert "refused the password of alice" in said
    assert any(b"imapfs\0mount" in one for one in watch.seen)
    assert prepared.log_text()
    for form in (password.encode(), base64.b64encode(f"\0alice\0{password}".encode())):
        assert not [path for path, content in _everything_in(prepared.log.parent) if form in content]
        assert form not in said.encode()
        assert not [one for one in watch.seen if form in one]
