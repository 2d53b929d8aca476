"""What the log says, and what it must not say."""

import re
from collections.abc import Iterable

import pytest

from tests.support.compare import contents
from tests.support.mail import plain
from tests.support.mailboxes import settle
from tests.support.mounting import Mounter
from tests.support.servers.dovecot import Account
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

PASSWORD = "correct-horse-battery"
BODY = b"Subject: quarterly figures\r\nFrom: Alice <alice@example.org>\r\n\r\nnobody else may see this\r\n"
SECRETS = ["nobody else", "quarterly figures", "alice@example.org>", PASSWORD, "Y29ycmVjdC1ob3JzZ"]


def test_vv_traces_the_protocol_without_credentials_and_messages(user: Account, mount: Mounter) -> None:
    user.append("INBOX", BODY, 1_700_000_000)
    mounted = mount(user, "-vv")
    assert contents(mounted.path / "INBOX") == {1: BODY}
    (mounted.path / "INBOX" / "new.eml").write_bytes(BODY.replace(b"quarterly", b"weekly"))
    settle(mounted)
    mounted.unmount()
    log = mounted.log_text()
    for said in (
        "AUTHENTICATE PLAIN",
        "EXAMINE",
        "BODY.PEEK",
        "APPEND",
        r"BODY\[\] \{\d+\}",
        "OK Logged in|OK",
    ):
        assert re.search(rf"imapfs.protocol: \d+ [CS]: .*{said}", log), said
    assert not [
        secret for secret in [*SECRETS, user.password] if re.search(rf"(?<!\w){re.escape(secret)}", log)
    ]


def test_vv_hides_what_a_server_sends_in_another_form(ca: CertificateAuthority, mount: Mounter) -> None:
    """A body as quoted string, and a login that is repeated."""

    def script(tag: bytes, command: bytes) -> Iterable[bytes] | None:
        if command.startswith(b"LOGIN"):
            return [b"* OK you said " + command + b"\r\n", tag + b" OK you said " + command + b"\r\n"]
        if b"BODY.PEEK[]" in command:
            return [b'* 1 FETCH (UID 1 BODY[] "nobody else \\" may")\r\n', tag + b" OK done\r\n"]
        return None

    bare = b"IMAP4rev1"
    greeting = b"* OK [CAPABILITY IMAP4rev1] ready"
    with Scripted(ca, [BODY], script=script, greeting=greeting, capabilities=bare) as server:
        server.password = PASSWORD
        mounted = mount(server, "-vv")
        assert list(contents(mounted.path / "INBOX").values()) == [b'nobody else " may']
        mounted.unmount()
    log = mounted.log_text()
    assert 'BODY[] "..."' in log
    assert "LOGIN ..." in log
    assert not [secret for secret in SECRETS if secret in log]


@pytest.mark.parametrize("arguments", [(), ("-v",)], ids=["plain", "-v"])
def test_without_vv_there_is_no_trace(user: Account, mount: Mounter, arguments: tuple[str, ...]) -> None:
    user.deliver("INBOX", [(plain(1), 1_700_000_000, "")])
    mounted = mount(user, *arguments)
    contents(mounted.path / "INBOX")
    mounted.unmount()
    assert "imapfs.protocol" not in mounted.log_text()
