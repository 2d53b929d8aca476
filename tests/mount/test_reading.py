"""What programs see in a mount: every byte, and attributes that are true."""

import errno
import json
import os
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.compare import contents, flags, served, shown
from tests.support.mail import plain, sample_account, wild
from tests.support.mounting import DEADLINE, Mounter, MountFailed, wait_until
from tests.support.servers.dovecot import SPECIAL_USE, Account, Dovecot
from tests.support.servers.scripted import Scripted
from tests.support.servers.tls import CertificateAuthority

DATE = 1_700_000_000
ODD_MAILBOXES = (
    "100% done",
    "R&D",
    "日本語",
    "a b",
    "-rf",
    "$HOME",
    "'quoted'",
    ".hidden",
    "x.eml",
    "é" * 60,
)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, ""), (command, done)
    return done.stdout


@pytest.fixture
def sample(user: Account) -> Account:
    for mailbox, content, date, letters in sample_account():
        user.deliver(mailbox, [(content, date, letters)])
    return user


# -- bytes and sizes


def test_every_byte_and_every_size_is_the_servers(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((content, DATE, "") for content in wild().values()))
    inbox = mount(user).path / "INBOX"
    there = served(user)
    assert len(there) == len(wild())
    assert {uid: path.stat().st_size for uid, path in shown(inbox).items()} == {
        uid: len(content) for uid, content in there.items()
    }
    assert contents(inbox) == there
    # Once more, now from the caches of the kernel and of imapfs.
    assert contents(inbox) == there


def test_parts_of_a_message_can_be_read_from_anywhere(user: Account, mount: Mounter) -> None:
    message = plain(1, 1_000_000)
    user.deliver("INBOX", [(message, DATE, "")])
    (path,) = (mount(user).path / "INBOX").iterdir()
    with path.open("rb", buffering=0) as file:
        for offset, size in ((999_990, 100), (0, 10), (500_000, 131_073), (1_000_000, 1), (2_000_000, 1)):
            assert os.pread(file.fileno(), size, offset) == message[offset : offset + size]


def test_message_of_50_megabytes_is_exact(user: Account, mount: Mounter, tmp_path: Path) -> None:
    message = plain(1, 50_000_000)
    user.deliver("INBOX", [(message, DATE, "")])
    (path,) = (mount(user).path / "INBOX").iterdir()
    assert path.stat().st_size == 50_000_000
    (tmp_path / "expected").write_bytes(message)
    run("cmp", path, tmp_path / "expected")


def test_start_of_a_large_message_comes_before_its_end(ca: CertificateAuthority, mount: Mounter) -> None:
    message = plain(1, 10_000_000)
    start_was_read = threading.Event()

    def in_two_parts(tag: bytes) -> Iterator[bytes]:
        response = server.fetch(1, b"BODY.PEEK[]")
        yield response[:1_000_000]
        assert start_was_read.wait(DEADLINE)
        yield response[1_000_000:] + tag + b" OK done\r\n"

    def script(tag: bytes, command: bytes) -> Iterator[bytes] | None:
        return in_two_parts(tag) if b"BODY.PEEK[]" in command else None

    with Scripted(ca, [message], script=script) as server:
        mounted = mount(server)
        (path,) = (mounted.path / "INBOX").iterdir()
        with path.open("rb", buffering=0) as file:
            assert file.read(1000) == message[:1000]
            start_was_read.set()
            assert file.read(1000) == message[1000:2000]
        assert path.read_bytes() == message
        mounted.unmount()


def test_many_readers_of_one_message_get_the_same_bytes_from_one_download(
    user: Account, mount: Mounter
) -> None:
    message = plain(1, 3_000_000)
    user.deliver("INBOX", [(message, DATE, "")])
    user.start_trace()
    mounted = mount(user)
    (path,) = (mounted.path / "INBOX").iterdir()
    readers = [subprocess.Popen(["cat", path], stdout=subprocess.PIPE) for _ in range(6)]
    assert all(reader.communicate(timeout=DEADLINE)[0] == message for reader in readers)
    mounted.unmount()
    assert sum(b"BODY.PEEK[]" in line for line in user.protocol_trace()) == 1


# -- attributes


def test_attributes_are_those_of_the_message(user: Account, mount: Mounter) -> None:
    dates = [0, 1, 1_000_000_000, 1_700_000_000, 4_000_000_000]
    user.deliver("INBOX", ((plain(n, 5000), date, "") for n, date in enumerate(dates)))
    mounted = mount(user)
    for (_, path), date in zip(sorted(shown(mounted.path / "INBOX").items()), dates, strict=True):
        for _ in range(2):
            is_ = path.stat()
            assert (is_.st_mtime, is_.st_ctime, is_.st_nlink) == (date, date, 1)
            assert (is_.st_mode, is_.st_uid, is_.st_gid) == (stat.S_IFREG | 0o600, os.getuid(), os.getgid())
            assert (is_.st_size, is_.st_blocks) == (5000, 10)
            path.read_bytes()
    for directory in (mounted.path, mounted.path / "INBOX"):
        assert directory.stat().st_mode == stat.S_IFDIR | 0o700


def test_inodes_and_names_stay_over_a_remount(sample: Account, mount: Mounter) -> None:
    def everything(root: Path) -> dict[str, tuple[int, float, float]]:
        return {
            str(path.relative_to(root)): (is_.st_ino, is_.st_mtime, is_.st_ctime)
            for path in root.rglob("*")
            for is_ in [path.stat()]
        }

    first = mount(sample)
    # The first listing of a mailbox is a change of its directory.
    everything(first.path)
    before = everything(first.path)
    assert len({ino for ino, *_ in before.values()}) == len(before) > 50
    first.unmount()
    again = mount(sample, cache=first.cache)
    assert everything(again.path) == before


def test_names_are_the_same_with_a_fresh_cache(sample: Account, mount: Mounter) -> None:
    first, second = mount(sample), mount(sample)
    names = {str(path.relative_to(first.path)) for path in first.path.rglob("*")}
    assert {str(path.relative_to(second.path)) for path in second.path.rglob("*")} == names
    assert all(len(os.fsencode(path.name)) <= 150 for path in first.path.rglob("*.eml"))
    assert "2026-10-26_0733_Alice_Example_Quarterly_report.1.eml" in os.listdir(first.path / "INBOX")


def test_a_flag_does_not_change_a_name(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    first = mount(user)
    (path,) = (first.path / "INBOX").iterdir()
    first.unmount()
    with user.client() as client:
        client.select()
        client.store("1", "+FLAGS", "(\\Flagged \\Seen)")
    second = mount(user, cache=first.cache)
    assert [file.name for file in (second.path / "INBOX").iterdir()] == [path.name]
    assert os.getxattr(second.path / "INBOX" / path.name, "user.imap.flagged") == b"1"


def test_reading_sets_no_flag_and_takes_no_recent(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "F" * (n % 2)) for n in range(10)))
    inbox = mount(user).path / "INBOX"
    assert len(contents(inbox)) == 10
    assert run("grep", "-rc", "Subject", inbox)
    assert flags(user) == {
        uid: {"\\Recent"} | ({"\\Flagged"} if uid % 2 == 0 else set()) for uid in range(1, 11)
    }


def test_directory_mtime_moves_when_a_message_comes_or_goes(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    first = mount(user)
    list((first.path / "INBOX").iterdir())
    old = first.path / "INBOX"
    before = old.stat().st_mtime
    first.unmount()
    unchanged = mount(user, cache=first.cache)
    assert (unchanged.path / "INBOX").stat().st_mtime == before
    list((unchanged.path / "INBOX").iterdir())
    assert (unchanged.path / "INBOX").stat().st_mtime == before
    unchanged.unmount()
    wait_until(lambda: int(time.time()) > before, "the next second, which is the resolution")
    user.deliver("INBOX", [(plain(2), DATE, "")])
    later = mount(user, cache=first.cache)
    assert len(list((later.path / "INBOX").iterdir())) == 2
    assert (later.path / "INBOX").stat().st_mtime > before


def test_statfs_shows_the_quota(ca: CertificateAuthority, mount: Mounter) -> None:
    with Dovecot(ca, quota="10M") as server:
        user = server.account("alice")
        user.deliver("INBOX", [(plain(1, 1_000_000), DATE, "")])
        mounted = mount(user)
        space = os.statvfs(mounted.path)
        assert space.f_blocks * space.f_frsize == 10 * 2**20
        assert 8 * 2**20 < space.f_bavail * space.f_frsize < 10 * 2**20 - 900_000
        assert space.f_namemax == 255
        mounted.unmount()


# -- extended attributes


def test_extended_attributes_of_a_message(user: Account, mount: Mounter) -> None:
    message = (
        b"From: =?utf-8?q?Cl=C3=A9o?= <cleo@example.com>\r\nSubject: =?utf-8?q?=C3=A9t=C3=A9?=\r\n"
        b"Message-ID: <1@example.com>\r\n\r\nbody\r\n"
    )
    uid = user.append("INBOX", message, DATE, "\\Seen \\Answered $Work later")
    mounted = mount(user, "--list-attributes")
    (path,) = (mounted.path / "INBOX").iterdir()
    found = {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}
    assert set(found.pop("user.imap.flags").split()) == {"\\Seen", "\\Answered", "$Work", "later"}
    assert set(found.pop("user.xdg.tags").split(",")) == {"$Work", "later"}
    assert int(found.pop("user.imap.modseq")) > 0
    directory = mounted.path / "INBOX"
    assert found.pop("user.imap.uidvalidity") == os.getxattr(directory, "user.imap.uidvalidity").decode()
    assert found == {
        "user.imap.uid": str(uid),
        "user.imap.seen": "1",
        "user.imap.answered": "1",
        "user.imap.flagged": "0",
        "user.imap.deleted": "0",
        "user.imap.draft": "0",
        "user.imap.internaldate": "2023-11-14T22:13:20+00:00",
        "user.mime_type": "message/rfc822",
        "user.xdg.origin.email.subject": "été",
        "user.xdg.origin.email.from": "Cléo <cleo@example.com>",
        "user.xdg.origin.email.message-id": "<1@example.com>",
    }
    assert 'user.imap.seen="1"' in run("getfattr", "--absolute-names", "-d", path)


def test_only_attributes_that_can_be_copied_are_listed(user: Account, mount: Mounter) -> None:
    """Else rsync -X and tar --xattrs fail at what nobody can set."""
    user.append("INBOX", plain(1), DATE, "\\Seen $Work")
    mounted = mount(user)
    (path,) = (mounted.path / "INBOX").iterdir()
    flags = [f"user.imap.{name}" for name in ("seen", "answered", "flagged", "deleted", "draft", "flags")]
    assert sorted(os.listxattr(path)) == sorted([*flags, "user.xdg.tags"])
    assert os.listxattr(mounted.path / "INBOX") == os.listxattr(mounted.path) == []
    for name in os.listxattr(path):
        os.setxattr(path, name, os.getxattr(path, name))
    uid = os.getxattr(path, "user.imap.uid")
    os.setxattr(path, "user.imap.uid", uid)
    with pytest.raises(OSError) as raised:
        os.setxattr(path, "user.imap.uid", b"7")
    assert raised.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("listed", [False, True])
def test_extended_attributes_of_a_directory(sample: Account, mount: Mounter, listed: bool) -> None:
    mounted = mount(sample, "--list-attributes")
    directory = mounted.path / "Projects" / "Zürich"
    if listed:
        assert len(list(directory.iterdir())) == 3
    found = {name: os.getxattr(directory, name).decode() for name in os.listxattr(directory)}
    with sample.client() as client:
        answer = client.status('"Projects/Z&APw-rich"', "(UIDVALIDITY UIDNEXT)")[1][0].decode()
    assert f"UIDVALIDITY {found.pop('user.imap.uidvalidity')}" in answer
    assert f"UIDNEXT {found.pop('user.imap.uidnext')}" in answer
    assert found == {
        "user.imap.mailbox": "Projects/Zürich",
        "user.imap.messages": "3",
        "user.imap.unseen": "0",
    }


def test_special_use_and_status_are_extended_attributes(user: Account, mount: Mounter) -> None:
    mounted = mount(user, "--list-attributes")
    for name in SPECIAL_USE:
        assert os.getxattr(mounted.path / name, "user.imap.special_use").decode() == f"\\{name}"
    status = json.loads(os.getxattr(mounted.path, "user.imapfs.status"))
    del status["socket"]
    lists: dict[str, object] = {"waiting": [], "scratch": [], "kept": [], "mailboxes": []}
    assert mounted.status() == {**status, **lists}
    assert (status["pid"], status["state"]) == (mounted.pid, "online")
    assert "user.imapfs.status" in os.listxattr(mounted.path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user.nothing", errno.ENODATA),
        ("user.imapfs.status", errno.ENODATA),
        ("user.xdg.origin.email.message-id", errno.ENODATA),
        ("security.selinux", errno.ENOTSUP),
        ("system.posix_acl_access", errno.ENOTSUP),
    ],
)
def test_attribute_that_is_not_there(user: Account, mount: Mounter, name: str, expected: int) -> None:
    user.deliver("INBOX", [(b"Subject: x\r\n\r\n", DATE, "")])
    (path,) = (mount(user).path / "INBOX").iterdir()
    for what in (path, path.parent):
        with pytest.raises(OSError) as raised:
            os.getxattr(what, name)
        assert raised.value.errno == expected
    assert os.getxattr(path, "user.imap.uid") == b"1"


# -- directories


def test_mailboxes_are_directories_whatever_their_names(user: Account, mount: Mounter) -> None:
    for number, name in enumerate(ODD_MAILBOXES):
        user.deliver(f"deep/er/{name}", [(plain(number), DATE, "")])
    root = mount(user).path
    assert {path.name for path in root.iterdir()} == {"INBOX", "deep", *SPECIAL_USE}
    assert [path.name for path in (root / "deep").iterdir()] == ["er"]
    below = {path.name: path for path in (root / "deep" / "er").iterdir()}
    assert set(below) == {name if name != "x.eml" else "x%2Eeml" for name in ODD_MAILBOXES}
    for number, name in enumerate(ODD_MAILBOXES):
        (path,) = below[name if name != "x.eml" else "x%2Eeml"].iterdir()
        assert path.read_bytes() == plain(number)


def test_inbox_may_have_any_prefix(ca: CertificateAuthority, mount: Mounter) -> None:
    with Dovecot(ca, separator=".", prefix="INBOX.") as server:
        user = server.account("alice")
        user.deliver("INBOX", [(plain(1), DATE, "")])
        user.deliver("Projects/Zürich", [(plain(2), DATE, "")])
        mounted = mount(user)
        assert {path.name for path in mounted.path.iterdir()} == {"INBOX", "Projects", *SPECIAL_USE}
        assert contents(mounted.path / "INBOX") == {1: plain(1)}
        assert contents(mounted.path / "Projects" / "Zürich") == {1: plain(2)}
        mounted.unmount()


def test_parent_that_is_no_mailbox_is_a_directory_without_messages(sample: Account, mount: Mounter) -> None:
    archive = mount(sample).path / "Archive"
    assert {path.name for path in archive.iterdir()} == {"2024", "2025"}
    assert not [name for name in os.listxattr(archive) if name.startswith("user.imap.uid")]


def test_listings_hold_dot_and_dotdot_and_each_entry_once(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n, 700), DATE + n, "") for n in range(1500)))
    user.deliver("INBOX/below", [(plain(1), DATE, "")])
    inbox = mount(user).path / "INBOX"
    names = run("ls", "-aU", inbox).splitlines()
    assert len(names) == len(set(names)) == 1500 + 3
    assert {".", "..", "below"} < set(names)
    # A listing that is abandoned half way, and one that begins anew.
    with os.scandir(inbox) as entries:
        next(entries)
    assert sorted(os.listdir(inbox)) == sorted(set(names) - {".", ".."})


def test_name_that_is_not_there_is_enoent(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    root = mount(user).path
    for path in (root / "nothing", root / "INBOX" / "x.eml", root / "INBOX" / ".hidden", root / "n" / "x"):
        assert not path.exists()
    (message,) = (root / "INBOX").iterdir()
    with pytest.raises(NotADirectoryError):
        (message / "x").stat()
    with pytest.raises(IsADirectoryError):
        (root / "INBOX").read_bytes()


# -- options


def test_subtree_mount_shows_that_mailbox_as_its_root(sample: Account, mount: Mounter) -> None:
    root = mount(sample, mailbox="Projects/Z%C3%BCrich").path
    assert contents(root) == served(sample, "Projects/Zürich")
    assert os.getxattr(root, "user.imap.mailbox").decode() == "Projects/Zürich"
    assert json.loads(os.getxattr(root, "user.imapfs.status"))["state"] == "online"


def test_subtree_mount_shows_what_is_below(sample: Account, mount: Mounter) -> None:
    root = mount(sample, mailbox="Archive").path
    assert {path.name for path in root.iterdir()} == {"2024", "2025"}
    assert contents(root / "2024") == served(sample, "Archive/2024")


def test_subtree_that_is_not_there_is_a_clear_error(sample: Account, mount: Mounter) -> None:
    with pytest.raises(MountFailed) as failed:
        mount(sample, mailbox="Archiv")
    assert failed.value.code == 1
    assert failed.value.stderr.count("\n") == 1
    assert "no mailbox Archiv" in failed.value.stderr
    assert "Archive" in failed.value.stderr


def test_names_may_be_uids(user: Account, mount: Mounter) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(3)))
    first = mount(user)
    inodes = {uid: path.stat().st_ino for uid, path in shown(first.path / "INBOX").items()}
    first.unmount()
    second = mount(user, "--names", "uid", cache=first.cache)
    inbox = second.path / "INBOX"
    assert sorted(os.listdir(inbox)) == ["1.eml", "2.eml", "3.eml"]
    assert {uid: path.stat().st_ino for uid, path in shown(inbox).items()} == inodes
    assert contents(inbox) == {n + 1: plain(n) for n in range(3)}


@pytest.mark.parametrize("option", [["--read-only"], ["-o", "ro"]])
def test_read_only_mount_refuses_every_change(user: Account, mount: Mounter, option: list[str]) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    mounted = mount(user, *option)
    (path,) = (mounted.path / "INBOX").iterdir()
    assert mounted.status()["read_only"] is True
    for change in (
        lambda: path.write_bytes(b""),
        lambda: path.unlink(),
        lambda: path.rename(mounted.path / "Trash" / path.name),
        lambda: (path.parent / "new.eml").touch(),
        lambda: (mounted.path / "new").mkdir(),
        lambda: (mounted.path / "Trash").rmdir(),
        lambda: os.setxattr(path, "user.imap.seen", b"1"),
        lambda: os.utime(path, (0, 0)),
    ):
        with pytest.raises(OSError) as raised:
            change()
        assert raised.value.errno == errno.EROFS
    assert path.read_bytes() == plain(1)


# -- tools


def test_tools_work_on_the_tree(sample: Account, mount: Mounter, tmp_path: Path) -> None:
    root = mount(sample).path
    expected = len(sample_account())
    messages = run("find", root, "-name", "*.eml", "-type", "f").splitlines()
    assert len(messages) == expected
    assert len(run("ls", "-lR", root).splitlines()) > expected
    found = run("grep", "-rl", "Invoice 4711", root).splitlines()
    assert [uid for uid, path in shown(root / "INBOX").items() if str(path) in found] == [1, 17]
    copies = {tool: tmp_path / tool for tool in ("rsync", "tar", "cp")}
    for copy in copies.values():
        copy.mkdir()
    run("rsync", "-a", f"{root}/", copies["rsync"])
    run("tar", "-cf", tmp_path / "archive.tar", "-C", root, ".")
    run("tar", "-xf", tmp_path / "archive.tar", "-C", copies["tar"])
    run("cp", "-a", f"{root}/.", copies["cp"])
    for copy in copies.values():
        run("diff", "-r", root, copy)
        for name in messages:
            is_ = (copy / Path(name).relative_to(root)).stat()
            assert is_.st_mtime == Path(name).stat().st_mtime
    for mailbox in ("INBOX", "Archive/2025", "Projects/Zürich", "日本語", "R&D", "100% done"):
        assert contents(copies["tar"] / mailbox) == served(sample, mailbox)
