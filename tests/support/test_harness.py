"""The server and the mail that the other tests rely on are what they claim to be."""

import imaplib
import logging
import os
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ExpectedLog, LogGuard
from tests.support.mail import plain, sample_account, wild
from tests.support.mounting import DEADLINE, ROOT, wait_until
from tests.support.servers.dovecot import Account, Dovecot, as_served
from tests.support.servers.tls import CertificateAuthority


def bodies(client: imaplib.IMAP4_SSL, mailbox: str = "INBOX") -> list[bytes]:
    assert client.select(mailbox, readonly=True)[0] == "OK"
    answer = client.uid("FETCH", "1:*", "(BODY.PEEK[])")[1]
    return [part[1] for part in answer if isinstance(part, tuple)]


def mailboxes(client: imaplib.IMAP4_SSL) -> set[bytes]:
    found = set()
    for line in client.list()[1]:
        assert isinstance(line, bytes)
        found.add(line.split(b" ", 2)[2].removeprefix(b'"/" ').strip(b'"'))
    return found


def test_wild_mail_is_served_byte_for_byte_but_for_nul_and_bare_lf(user: Account) -> None:
    messages = wild()
    user.deliver("INBOX", ((content, 1_700_000_000, "") for content in messages.values()))
    with user.client() as client:
        served = dict(zip(messages, bodies(client), strict=True))
    assert served == {name: as_served(content) for name, content in messages.items()}
    changed = {name for name, content in messages.items() if served[name] != content}
    assert changed == {"NULs", "bare LF", "mixed line ends", "every byte"}


def test_appended_mail_is_served_like_delivered_mail_but_for_stray_carriage_returns(user: Account) -> None:
    messages = wild()
    empty = messages.pop("0 bytes")
    for uid, content in enumerate(messages.values(), 1):
        assert user.append("INBOX", content, 1_700_000_000, "\\Seen $Work") == uid
    with user.client() as client:
        served = dict(zip(messages, bodies(client), strict=True))
        assert client.uid("FETCH", "1", "(FLAGS INTERNALDATE)")[1] == [
            b'1 (UID 1 FLAGS (\\Seen \\Recent $Work) INTERNALDATE "14-Nov-2023 22:13:20 +0000")'
        ]
    changed = {name for name, content in messages.items() if served[name] != as_served(content)}
    assert changed == {"one CR", "CR at the end", "bare CR", "mixed line ends"}
    with pytest.raises(RuntimeError, match="APPEND to INBOX"):
        user.append("INBOX", empty, 1_700_000_000)


def test_delivered_mail_keeps_order_date_and_flags(user: Account) -> None:
    dates = [1_700_000_000 - 60 * number for number in range(500)]
    user.deliver("INBOX", ((plain(number), date, "FS") for number, date in enumerate(dates)))
    with user.client() as client:
        assert bodies(client) == [plain(number) for number in range(500)]
        lines = [
            line for line in client.uid("FETCH", "1:*", "(FLAGS INTERNALDATE)")[1] if isinstance(line, bytes)
        ]
    assert all(b"FLAGS (\\Flagged \\Seen \\Recent)" in line for line in lines)
    assert lines[60].endswith(b'INTERNALDATE "14-Nov-2023 21:13:20 +0000")')


def test_sizes_in_the_names_of_delivered_files_are_true(user: Account) -> None:
    messages = wild()
    user.deliver("INBOX", ((content, 0, "") for content in messages.values()))
    with user.client() as client:
        client.select("INBOX", readonly=True)
        answer = client.uid("FETCH", "1:*", "(RFC822.SIZE)")[1]
        sizes = [int(line.split()[-1].rstrip(b")")) for line in answer if isinstance(line, bytes)]
    assert sizes == [len(as_served(content)) for content in messages.values()]


def test_sample_account_has_the_mailboxes_it_names(user: Account) -> None:
    account = sample_account()
    for mailbox, content, date, flags in account:
        user.deliver(mailbox, [(content, date, flags)])
    names = {user.server_name(mailbox).encode() for mailbox, *_ in account}
    assert {b"&ZeVnLIqe-", b"Projects/Z&APw-rich", b"R&-D", b"100% done"} <= names
    with user.client() as client:
        assert mailboxes(client) == names | {b"Archive", b"Lists", b"Projects", b"Trash"}
        assert bodies(client, '"&ZeVnLIqe-"') == [
            mail for mailbox, mail, *_ in account if mailbox == "日本語"
        ]


@pytest.mark.parametrize("size", [600, 601, 602, 2_000, 100_000])
def test_plain_mail_has_exactly_the_size_asked_for(size: int) -> None:
    assert len(plain(7, size)) == size
    assert as_served(plain(7, size)) == plain(7, size)


def test_trace_shows_the_commands_of_every_traced_connection(user: Account) -> None:
    with user.client() as client:
        client.select("INBOX")
    user.start_trace()
    for _ in range(2):
        with user.client() as client:
            client.select("INBOX", readonly=True)
    verbs = [line.split()[1] for line in user.protocol_trace() if b"CAPABILITY" not in line]
    assert verbs == [b"EXAMINE", b"LOGOUT"] * 2


def test_doveadm_reaches_the_running_instance(user: Account) -> None:
    user.deliver("INBOX", [(plain(1), 0, "")])
    user.server.doveadm("mailbox", "update", "-u", user.name, "--uid-validity", "4711", "INBOX")
    with user.client() as client:
        assert client.status("INBOX", "(UIDVALIDITY)")[1] == [b"INBOX (UIDVALIDITY 4711)"]
        user.server.doveadm("kick", user.name)

        def has_ended() -> bool:
            try:
                client.noop()
            except imaplib.IMAP4.abort:
                return True
            return False

        # The session is told to, and may answer once more.
        wait_until(has_ended, "the session was ended")
    with pytest.raises(RuntimeError, match="doveadm no-such-command"):
        user.server.doveadm("no-such-command")


def test_options_reach_the_server(ca: CertificateAuthority) -> None:
    options = Dovecot(ca, plain=True, separator=".", prefix="INBOX.", quota="10M", max_userip_connections=1)
    with options as server:
        user = server.account("alice")
        user.deliver("Projects/Zürich", [(plain(1), 0, "")])
        with user.client() as client:
            assert b'(\\HasNoChildren) "." INBOX.Projects.Z&APw-rich' in client.list()[1]
            assert b"10240" in repr(client.getquotaroot("INBOX")).encode()
            with pytest.raises(imaplib.IMAP4.error, match="connections"), user.client():
                pass
        assert server.plain_port is not None
        with socket.create_connection(("127.0.0.1", server.plain_port), 10) as connection:
            assert connection.recv(4) == b"* OK"


@pytest.mark.parametrize("password", ["", "pä ss%u\"'{}#\\$x"])
def test_any_password_is_the_password(ca: CertificateAuthority, password: str) -> None:
    with Dovecot(ca, password=password) as server, server.account("alice").client() as client:
        assert client.state == "AUTH"
        context = ssl.create_default_context(cafile=ca.certificate)
        other = imaplib.IMAP4_SSL(server.host, server.port, ssl_context=context, timeout=10)
        with other, pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
            other.login("alice", "wrong")


@pytest.mark.parametrize(
    ("names", "expired", "reason"),
    [(["localhost"], True, "expired"), (["mail.example.org"], False, "localhost")],
)
def test_bad_certificate_is_refused(
    ca: CertificateAuthority, names: list[str], expired: bool, reason: str
) -> None:
    server = Dovecot(ca, certificate=ca.issue(names, expired=expired))
    refused = pytest.raises(ssl.SSLCertVerificationError, match=reason)
    with server, refused, server.account("alice").client():
        pass


def test_server_with_an_open_session_leaves_nothing_behind(ca: CertificateAuthority) -> None:
    context = ssl.create_default_context(cafile=ca.certificate)
    with Dovecot(ca) as server:
        client = imaplib.IMAP4_SSL(server.host, server.port, ssl_context=context, timeout=10)
        client.login("alice", server.password)
        client.select()
        assert any(
            Path(f"/proc/{process}/cmdline").read_bytes() == b"dovecot/imap\0"
            for process in server.processes()
        )
    assert not server.processes()
    assert not server.directory.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), 10)
    client.shutdown()


def test_server_that_cannot_start_says_why_and_leaves_nothing_behind(ca: CertificateAuthority) -> None:
    server = Dovecot(ca, quota="10M\nthis is no setting")
    with pytest.raises(RuntimeError, match=r"did not start\n.*Error in configuration file"), server:
        pass
    assert not server.processes()
    assert not server.directory.exists()


def test_server_runs_without_privileges_and_logs_no_warning(ca: CertificateAuthority) -> None:
    with Dovecot(ca) as server:
        user = server.account("alice")
        user.deliver("INBOX", [(plain(1), 0, "")])
        with user.client() as client:
            assert bodies(client) == [plain(1)]
            owners = {Path(f"/proc/{process}").stat().st_uid for process in server.processes()}
        assert owners == {server.uid}
        assert server.uid != 0
        assert not [line for line in server.log_lines() if re.search("Warning|Error|Fatal|Panic", line)]


def test_expected_warning_passes(expected_log: ExpectedLog) -> None:
    expected_log("disk .* full")
    logging.getLogger("imapfs.store.cache").warning("the disk is full")


def test_stray_warning_and_unmet_expectation_are_complaints() -> None:
    guard = LogGuard()
    guard.expect("disk full")
    guard.handle(
        logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "name": "imapfs", "msg": "no"})
    )
    assert guard.complaints() == ["logged unexpectedly: ERROR imapfs: no", "never logged: disk full"]


# -- what tests need of the machine

WITHOUT = """\
for path in /dev/fuse $(PATH=$PATH:/usr/sbin command -v dovecot); do
    mount --bind /dev/null "$path" || exit 99
done
exec "$@"
"""
"""Runs a command where /dev/fuse is another device, and no dovecot can be executed."""


def without_dovecot_and_fuse(directory: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run pytest where neither Dovecot nor FUSE can be used, in a mount namespace of its own.

    ``directory`` is for its temporary files: those of other runs are none of its business.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"--basetemp={directory}", *tests]
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", WITHOUT, "sh", *command],
        # Wide enough for pytest not to cut its summary.
        cwd=ROOT, env={**os.environ, "COLUMNS": "500"}, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip


def test_unit_tests_need_neither_dovecot_nor_fuse(tmp_path: Path) -> None:
    done = without_dovecot_and_fuse(tmp_path / "t", "tests/unit/sync", "tests/unit/imap/test_wire.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed in ", done.stdout, re.M)


def test_what_is_missing_fails_the_tests_that_need_it_and_no_other(tmp_path: Path) -> None:
    tests = ("test_expected_warning_passes", "test_delivered_mail_keeps_order_date_and_flags")
    done = without_dovecot_and_fuse(
        tmp_path / "t",
        *(f"tests/support/test_harness.py::{test}" for test in tests),
        "tests/mount/test_failures.py::test_odd_mailbox_names_hurt_nobody",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.search("^ERROR .*test_delivered.*: this test needs dovecot: .*dovecot-imapd", done.stdout, re.M)
    failed = re.findall("^FAILED .*test_odd.*: this test needs .* /dev/fuse: .*modprobe", done.stdout, re.M)
    assert failed
    assert re.search(rf"^{len(failed)} failed, 1 passed, 1 error in ", done.stdout, re.M)
