"""Courier, the second server, is real, behaves as its harness says, and leaves nothing behind."""

import contextlib
import imaplib
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mail import plain, wild
from tests.support.servers.courier import MAILBOXES, Courier, CourierAccount
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000


@pytest.fixture(scope="module")
def courier(ca: CertificateAuthority) -> Iterator[Courier]:
    with Courier(ca) as server:
        yield server


@pytest.fixture
def account(courier: Courier, request: pytest.FixtureRequest) -> CourierAccount:
    return courier.account(re.sub(r"\W+", "-", request.node.name).strip("-"))


def bodies(client: imaplib.IMAP4_SSL, mailbox: str = "INBOX") -> list[bytes]:
    assert client.select(mailbox, readonly=True)[0] == "OK"
    answer = client.uid("FETCH", "1:*", "(BODY.PEEK[])")[1]
    return [part[1] for part in answer if isinstance(part, tuple)]


def test_mail_is_served_byte_for_byte_but_for_line_ends(account: CourierAccount) -> None:
    messages = wild()
    account.deliver("INBOX", ((content, DATE, "") for content in messages.values()))
    with account.client() as client:
        served = dict(zip(messages, bodies(client), strict=True))
    changed = {name for name, content in messages.items() if served[name] != content}
    assert changed == {"one CR", "CR at the end", "bare LF", "mixed line ends", "every byte"}
    assert served["bare LF"] == messages["bare LF"].replace(b"\n", b"\r\n")


def test_appended_mail_gets_a_final_newline_and_loses_bare_carriage_returns(account: CourierAccount) -> None:
    odd = ("0 bytes", "one CR", "no final newline", "CR at the end", "bare CR", "bare LF", "mixed line ends")
    messages = {name: wild()[name] for name in (*odd, "NULs", "8-bit header in Latin-1", "header of 210 KB")}
    for uid, content in enumerate(messages.values(), 1):
        assert account.append("Sent", content, DATE, "\\Seen $Work") == uid
    with account.client() as client:
        served = dict(zip(messages, bodies(client, "INBOX.Sent"), strict=True))
        assert client.uid("FETCH", "1", "(FLAGS INTERNALDATE)")[1] == [
            b'1 (UID 1 FLAGS (\\Seen $Work) INTERNALDATE "14-Nov-2023 22:13:20 +0000")'
        ]
    for name, content in messages.items():
        lines = re.sub(rb"\r(?!\n)", b"", content).replace(b"\r\n", b"\n")
        closed = lines if content.endswith(b"\n") else lines + b"\n"
        assert served[name] == closed.replace(b"\n", b"\r\n"), name


def test_delivered_mail_keeps_order_date_and_flags(account: CourierAccount) -> None:
    account.deliver("INBOX", [(plain(number), DATE - 60 * number, "FS") for number in range(300)])
    with account.client() as client:
        assert bodies(client) == [plain(number) for number in range(300)]
        lines = [
            line for line in client.uid("FETCH", "1:*", "(FLAGS INTERNALDATE)")[1] if isinstance(line, bytes)
        ]
    assert all(b"\\Flagged" in line and b"\\Seen" in line for line in lines)
    assert lines[60].endswith(b'INTERNALDATE "14-Nov-2023 21:13:20 +0000")')


def test_it_lacks_what_it_was_chosen_for(account: CourierAccount) -> None:
    account.deliver("INBOX", [(plain(1), DATE, "")])
    with account.client() as client:
        announced = client.capability()[1][0].split()
        assert {b"UIDPLUS", b"IDLE", b"ACL"} <= set(announced)
        assert not {b"MOVE", b"LITERAL+", b"CONDSTORE", b"SPECIAL-USE", b"QRESYNC"} & set(announced)
        client.select("INBOX")
        for command in (b"UID MOVE 1 INBOX.Trash", b"STATUS {5+}\r\nINBOX (MESSAGES)"):
            client.send(b"a " + command + b"\r\n")
            assert client.readline().startswith((b"a NO", b"a BAD"))
            client.send(b"b NOOP\r\n")
            while not client.readline().startswith(b"b OK"):
                pass


def test_mailboxes_are_below_inbox(account: CourierAccount) -> None:
    account.deliver("Projects/Zürich & R&D", [(plain(1), DATE, "")])
    name = account.server_name("Projects/Zürich & R&D")
    assert name == "INBOX.Projects.Z&APw-rich &- R&-D"
    with account.client() as client:
        assert client.namespace()[1] == [b'(("INBOX." ".")) NIL (("#shared." ".")("shared." "."))']
        lines = [line for line in client.list()[1] if isinstance(line, bytes)]
        listed = {line.partition(b' "." ')[2].strip(b'"').decode() for line in lines}
        assert listed == {"INBOX", "INBOX.Projects", name} | {f"INBOX.{mailbox}" for mailbox in MAILBOXES}
        assert bodies(client, f'"{name}"') == [plain(1)]


def test_idle_tells_of_new_mail(account: CourierAccount) -> None:
    with account.client() as client:
        client.select("INBOX")
        client.send(b"a IDLE\r\n")
        assert client.readline().startswith(b"+")
        account.append("INBOX", plain(1), DATE)
        while b"1 EXISTS" not in (line := client.readline()):
            assert line
        client.send(b"DONE\r\n")
        while not (line := client.readline()).startswith(b"a OK"):
            assert line


def test_quota_is_enforced(ca: CertificateAuthority) -> None:
    with Courier(ca, quota=10_000) as server:
        alice = server.account("alice")
        assert alice.append("INBOX", plain(1, 5_000), DATE) == 1
        with pytest.raises(RuntimeError, match="quota"):
            alice.append("INBOX", plain(2, 6_000), DATE)


@pytest.mark.parametrize(
    "login", ['LOGIN "us\\"er" "x"', "LOGIN user", "AUTHENTICATE CRAM-MD5", "XYZZY", "SELECT INBOX"]
)
def test_what_is_no_login_is_refused(courier: Courier, login: str) -> None:
    context = ssl.create_default_context(cafile=courier.authority.certificate)
    with imaplib.IMAP4_SSL(courier.host, courier.port, ssl_context=context, timeout=20) as client:
        client.send(b"a " + login.encode() + b"\r\n")
        assert client.readline().startswith(b"a NO ")
        with pytest.raises(imaplib.IMAP4.error, match="Login failed"):
            client.login("user", "wrong")
        with pytest.raises(imaplib.IMAP4.error, match="Login failed"):
            client.login("../user", courier.password)
        assert client.login("user", courier.password)[0] == "OK"


def test_any_password_is_the_password(ca: CertificateAuthority) -> None:
    with Courier(ca, password="pä ss%u\"'{}#\\$x") as server, server.account("alice").client() as client:
        assert client.state == "AUTH"


def test_proxy_stands_before_it_too(account: CourierAccount) -> None:
    with Proxy(account.server, hide=["UIDPLUS", "IDLE"]) as proxy, proxy.account(account).client() as client:
        assert b"APPENDUID" not in repr(client.append("INBOX", "", "", plain(1))).encode()
        client.send(b"a IDLE\r\n")
        assert client.readline().startswith(b"a BAD")
        assert bodies(client) == [plain(1)]


def test_sessions_run_without_privileges_and_complain_of_nothing(ca: CertificateAuthority) -> None:
    with Courier(ca) as server:
        with server.account("alice").client() as client:
            client.select("INBOX")
            owners = {Path(f"/proc/{process}").stat().st_uid for process in server.processes()}
        assert owners == {server.uid}
        assert server.uid != 0
        assert not [line for line in server.log_lines() if not line.startswith("INFO: ")]


def test_server_with_an_open_session_leaves_nothing_behind(ca: CertificateAuthority) -> None:
    context = ssl.create_default_context(cafile=ca.certificate)
    with Courier(ca) as server:
        client = imaplib.IMAP4_SSL(server.host, server.port, ssl_context=context, timeout=20)
        client.login("alice", server.password)
        client.select()
        processes = server.processes()
        assert any(b"imapd" in Path(f"/proc/{process}/cmdline").read_bytes() for process in processes)
    assert not server.processes()
    assert not [process for process in processes if Path(f"/proc/{process}").exists()]
    assert not server.directory.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), 10)
    with contextlib.suppress(OSError):
        client.shutdown()


def test_missing_packages_are_explained(ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.servers.courier.UNPACKED", Path("/nonexistent"))
    with pytest.raises(RuntimeError, match="run scripts/test"), Courier(ca):
        pass
