"""Names of messages in a mount: whose name is in them, and what a change of the template does."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.mail import plain, sample_account
from tests.support.mounting import Mounter, MountFailed
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Proxy

DATE = 1_700_000_000
FOR_BOB = (
    b"From: Me <me@example.org>\r\nTo: Bob Builder <bob@example.net>, Eve <eve@example.net>\r\n"
    b"Subject: Lunch\r\n\r\nSee you.\r\n"
)


@pytest.fixture
def proxy(dovecot: Dovecot) -> Iterator[Proxy]:
    with Proxy(dovecot) as made:
        yield made


class Times(NamedTuple):
    mtime: int
    ctime: int


def entries(directory: Path) -> dict[str, tuple[int, int, Times]]:
    """Inode, size and times of each entry."""
    stats = {path.name: path.stat() for path in directory.iterdir()}
    return {
        name: (found.st_ino, found.st_size, Times(found.st_mtime_ns, found.st_ctime_ns))
        for name, found in stats.items()
    }


def messages(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(".eml")]


def test_own_mail_is_named_after_its_recipient(user: Account, mount: Mounter) -> None:
    for mailbox, content, date, letters in sample_account():
        user.deliver(mailbox, [(content, date, letters)])
    root = mount(user).path
    assert sorted(os.listdir(root / "Sent")) == [
        "2026-10-16_1533_Alice_Example_My_application.2.eml",
        "2026-11-01_1045_Alice_Example_Re_Party_on_Friday.1.eml",
    ]
    assert os.listdir(root / "Drafts") == ["2026-11-13_1709_Alice_Example_Not_finished.1.eml"]
    assert "2026-10-27_0945_Bob_Builder_Re_Quarterly_report.2.eml" in os.listdir(root / "INBOX")


def test_mailboxes_of_own_mail_can_be_named(user: Account, mount: Mounter) -> None:
    """For servers that mark none, also after the first mount."""
    with user.client() as client:
        client.create("a")
        client.create("a/Gesendet")
    for mailbox in ("INBOX", "Sent", "a", "a/Gesendet"):
        user.deliver(mailbox, [(FOR_BOB, DATE, "")])
    first = mount(user, "--names", "{from}.{uid}")
    found = [messages(first.path / name) for name in ("INBOX", "Sent", "a", "a/Gesendet")]
    assert found == [["Me.1.eml"], ["Bob_Builder.1.eml"], ["Me.1.eml"], ["Me.1.eml"]]
    first.unmount()
    second = mount(
        user, "--names", "{from}.{uid}", "--sent", "a/Gesendet", "--drafts", "a", cache=first.cache
    )
    found = [messages(second.path / name) for name in ("INBOX", "Sent", "a", "a/Gesendet")]
    assert found == [["Me.1.eml"], ["Bob_Builder.1.eml"], ["Bob_Builder.1.eml"], ["Bob_Builder.1.eml"]]


def test_a_change_of_the_template_renames_without_asking_the_server(
    user: Account, mount: Mounter, proxy: Proxy
) -> None:
    """At stake: hours of listing for a large account, names that people have given, and backups: they find a
    renamed file by its ctime, and must not find a changed one by its mtime."""
    user.deliver("INBOX", ((plain(n), DATE + 60 * n, "S") for n in range(50)))
    first = mount(proxy.account(user))
    inbox = first.path / "INBOX"
    (inbox / sorted(os.listdir(inbox))[6]).rename(inbox / "mine.eml")
    bodies, before = {path.read_bytes() for path in inbox.iterdir()}, entries(inbox)
    first.unmount()
    proxy.forget_commands()

    second = mount(proxy.account(user), "--names", "{uid}_{time}", cache=first.cache)
    inbox = second.path / "INBOX"
    after = entries(inbox)
    assert after.keys() == {
        "mine.eml",
        *(f"{n + 1}_{(13 + n) // 60 + 22}{(13 + n) % 60:02}.eml" for n in range(50) if n != 6),
    }
    was = {ino: (size, times) for ino, size, times in before.values()}
    for name, (ino, size, times) in after.items():
        old_size, old_times = was.pop(ino)
        assert (size, times.mtime) == (old_size, old_times.mtime)
        assert (times.ctime > old_times.ctime) == (name != "mine.eml")
    assert not was
    assert {path.read_bytes() for path in inbox.iterdir()} == bodies
    listed = [command for command in proxy.commands() if b"HEADER.FIELDS" in command]
    assert all(b" FETCH 50:* " in command for command in listed), listed
    assert not [command for command in proxy.commands() if b"BODY.PEEK[]" in command]
    second.unmount()

    third = mount(proxy.account(user), "--names", "{uid}_{time}", cache=first.cache)
    assert entries(third.path / "INBOX") == after


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{date}", "imapfs: --names: must have the field {uid}"),
        ("{uid}/{subject}", "imapfs: --names: must not contain '/'"),
        ("\n", 'imapfs: --names: must be "subject", "uid" or a template'),
    ],
)
def test_bad_template_is_one_line(user: Account, mount: Mounter, template: str, says: str) -> None:
    with pytest.raises(MountFailed) as failed:
        mount(user, "--names", template)
    assert failed.value.stderr.startswith(says)
    assert failed.value.stderr.count("\n") == 1
