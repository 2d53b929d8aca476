"""What the kernel, the server's answers and the end of a mount make of operations that change something.

What each operation means is tested in ``tests/fs``, with a mount and without one.
"""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.filled import DATE, MARKED, fails_with, fill, inbox
from tests.support.mail import plain
from tests.support.mailboxes import (
    Held,
    all_uids,
    everything,
    file_of,
    held,
    in_order,
    mailboxes,
    settle,
    waiting,
)
from tests.support.mounting import DEADLINE, Mount, Mounter, wait_until
from tests.support.servers.dovecot import Account, Dovecot
from tests.support.servers.proxy import Proxy
from tests.support.servers.tls import CertificateAuthority

LATER = 1_750_000_000
STATE = "user.imap.state"
ERROR = "user.imap.error"


@pytest.fixture
def filled(user: Account) -> Account:
    """Return an account with three messages in INBOX and an empty mailbox."""
    return fill(user)


def write(path: Path, data: bytes, *, sync: bool = False, mtime: int | None = None) -> None:
    """Write a file and close it; with ``sync`` wait for the server as sync(1) does, whose errno is raised."""
    with open(path, "wb") as file:
        file.write(data)
    if sync:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if mtime is not None:
        os.utime(path, (mtime, mtime))


def flags_of(path: Path) -> set[str]:
    return set(os.getxattr(path, "user.imap.flags").decode().split())


def fetches(account: Account) -> list[bytes]:
    """The commands so far that brought bodies."""
    return [line for line in account.protocol_trace() if b"BODY.PEEK[])" in line]


# ---- new messages


@pytest.mark.parametrize(
    ("mailbox", "flags"),
    [("Drafts", {"\\Draft"}), ("Sent", {"\\Seen"}), ("Work", set()), ("Mine", {"\\Draft"})],
)
def test_a_new_message_has_the_flags_of_its_mailbox(
    filled: Account, mount: Mounter, mailbox: str, flags: set[str]
) -> None:
    filled.deliver("Mine", [])
    mounted = mount(filled, "--drafts", "Mine")
    directory = mounted.path / mailbox
    write(directory / "new.eml", plain(10))
    write(directory / ".tmp", plain(11))
    os.rename(directory / ".tmp", directory / "saved.eml")
    settle(mounted)
    assert [flags_of(directory / name) for name in ("new.eml", "saved.eml")] == [flags, flags]
    mounted.unmount()
    assert [set(one.flags) for one in held(filled, mailbox).values()] == [flags, flags]


def test_a_new_message_has_the_flags_that_it_was_given(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    for name, attribute, value in (("a", "user.imap.flagged", b"1"), ("b", "user.imap.draft", b"0")):
        with (mounted.path / "Drafts" / f"{name}.eml").open("wb", buffering=0) as file:
            file.write(plain(10))
            os.setxattr(file.fileno(), attribute, value)
    settle(mounted)
    assert flags_of(mounted.path / "Drafts" / "a.eml") == {"\\Flagged"}
    assert flags_of(mounted.path / "Drafts" / "b.eml") == set()
    mounted.unmount()


def test_a_new_version_has_the_flags_of_the_old_one(filled: Account, mount: Mounter) -> None:
    """Also where a file that waits, and has the flags of new messages there, is renamed to its name."""
    filled.deliver("Drafts", [(plain(1), DATE, "F")])
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled))
        old = file_of(mounted, 1, "Drafts")
        assert flags_of(old) == {"\\Flagged"}
        mounted.expect_log("offline")
        proxy.refuse()
        proxy.cut_all()
        write(mounted.path / "Drafts" / "new.eml", plain(2))
        os.rename(mounted.path / "Drafts" / "new.eml", old)
        proxy.accept()
        wait_until(lambda: not waiting(mounted), "it is sent")
        assert flags_of(old) == {"\\Flagged"}
        assert old.read_bytes() == plain(2)
        mounted.unmount()


def test_a_file_for_a_mailbox_that_was_never_listed_waits_for_the_server(
    filled: Account, mount: Mounter
) -> None:
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled))
        assert "Work" in os.listdir(mounted.path)
        mounted.expect_log("offline")
        proxy.refuse()
        proxy.cut_all()
        new = mounted.path / "Work" / "new.eml"
        subprocess.run(["cp", "/dev/stdin", new], input=plain(10), check=True)
        assert new.read_bytes() == plain(10)
        proxy.accept()
        wait_until(lambda: not waiting(mounted), "it is sent")
        assert new.read_bytes() == plain(10)
        mounted.unmount()
    assert [one.content for one in held(filled, "Work").values()] == [plain(10)]


def test_a_file_is_sent_when_the_last_writer_closes_it(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = mounted.path / "Work" / "new.eml"
    with target.open("wb", buffering=0) as file:
        file.write(plain(10)[:500])
        # A close, and with it a flush, of a file that is still being written.
        os.close(os.dup(file.fileno()))
        with target.open("rb") as reader:
            assert reader.read() == plain(10)[:500]
        settle(mounted)
        assert held(filled, "Work") == {}
        with target.open("ab") as second:
            second.write(plain(10)[500:1000])
        settle(mounted)
        assert held(filled, "Work") == {}
        file.seek(0, os.SEEK_END)
        file.write(plain(10)[1000:])
    mounted.unmount()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


@pytest.mark.parametrize("message", ["new.eml", "one that is there"])
def test_what_is_written_while_an_upload_is_under_way_is_not_lost(
    filled: Account, mount: Mounter, message: str
) -> None:
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled))
        target = mounted.path / "INBOX" / message if message == "new.eml" else file_of(mounted, 1)
        fault = proxy.fault(b"APPEND", "stall", at="answer")
        write(target, plain(10))
        fault.wait_hit()
        append = subprocess.Popen(["sh", "-c", 'printf "more\r\n" >> "$1"', "sh", target])
        tagging = subprocess.Popen(["setfattr", "-n", "user.xdg.tags", "-v", "tag", target])
        # Whatever they wait for, both are at it when the other answers.
        assert target.stat().st_size >= 2000
        proxy.resume()
        assert (append.wait(DEADLINE), tagging.wait(DEADLINE)) == (0, 0)
        assert target.read_bytes() == plain(10) + b"more\r\n"
        mounted.unmount()
    known = inbox(1, 2, 3)
    new = [message for message in everything(filled)["INBOX"] if message not in known]
    assert [message.content for message in new] == [plain(10) + b"more\r\n"]
    assert "tag" in new[0].flags


def test_a_second_change_while_the_first_old_version_is_removed(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled))
        target = file_of(mounted, 1)
        fault = proxy.fault(b"UID MOVE", "stall")
        write(target, plain(10))
        fault.wait_hit()
        with target.open("ab", buffering=0) as file:
            file.write(b"more\r\n")
            proxy.resume()
            wait_until(
                lambda: everything(filled).get("Trash") == inbox(1), "the first old version is removed"
            )
            file.write(b"even more\r\n")
        expected = plain(10) + b"more\r\neven more\r\n"
        assert target.read_bytes() == expected
        mounted.unmount()
    after = everything(filled)
    assert after["INBOX"] == in_order(Held(expected, DATE + 1, MARKED), *inbox(2, 3))
    assert after["Trash"] == in_order(Held(plain(10), DATE + 1, MARKED), *inbox(1))


def test_half_of_a_second_version_is_never_sent(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = mounted.path / "Work" / "new.eml"
    write(target, plain(10))
    with target.open("wb", buffering=0) as file:
        file.write(plain(11)[:1000])
        settle(mounted)
        assert [m.content for m in held(filled, "Work").values() if m.content != plain(10)] == []
        file.write(plain(11)[1000:])
    mounted.unmount()
    assert [message.content for message in held(filled, "Work").values()] == [plain(11)]


@pytest.mark.parametrize("why", ["refused", "away"])
def test_the_bytes_of_a_file_do_not_change_before_it_is_sent(
    filled: Account, mount: Mounter, why: str
) -> None:
    content = plain(10).replace(b"\r\n", b"\n")
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled))
        work = mounted.path / "Work"
        os.listdir(work)
        if why == "refused":
            mounted.expect_log("is not uploaded:")
            proxy.fault(b"APPEND", b"NO [OVERQUOTA] Full")
            fails_with(errno.EDQUOT, lambda: write(work / "new.eml", content, sync=True))
        else:
            proxy.fault(b"APPEND", "cut", times=None)
            with pytest.raises(OSError):
                write(work / "new.eml", content, sync=True)
        assert (work / "new.eml").stat().st_size == len(content)
        assert (work / "new.eml").read_bytes() == content
        (work / "new.eml").unlink()


# ---- flags


def test_flags_that_the_server_does_not_keep_are_refused(filled: Account, mount: Mounter) -> None:
    def no_keywords(line: bytes) -> bytes:
        if b"PERMANENTFLAGS" in line:
            return b"* OK [PERMANENTFLAGS (\\Seen \\Flagged \\Deleted)] Limited\r\n"
        return line

    with Proxy(filled.server, edits=[no_keywords]) as proxy:
        mounted = mount(proxy.account(filled))
        target = file_of(mounted, 1)
        fails_with(errno.EOPNOTSUPP, os.setxattr, target, "user.xdg.tags", b"work")
        fails_with(errno.EOPNOTSUPP, os.setxattr, target, "user.imap.answered", b"1")
        os.setxattr(target, "user.imap.seen", b"0")
        mounted.unmount()
    assert held(filled)[1].flags == {"\\Flagged"}


# ---- mailboxes


def test_a_mailbox_of_deleted_messages_goes_to_trash_where_they_cannot_be_expunged(
    user: Account, mount: Mounter
) -> None:
    """``rm -r`` must end, and must not delete for good what the server only marks."""
    user.deliver("Old", [(plain(n), DATE + n, "") for n in range(3)])
    user.deliver("Trash", [(plain(9), DATE, "")])
    with Proxy(user.server, hide=["UIDPLUS", "MOVE"]) as proxy:
        mounted = mount(proxy.account(user))
        os.listdir(mounted.path / "Trash")
        subprocess.run(["rm", "-r", mounted.path / "Old"], check=True, timeout=DEADLINE)
        assert "Old" not in os.listdir(mounted.path)
        assert os.listdir(mounted.path / "Trash" / "Old") == []
        # With a message that came meanwhile it stays.
        os.mkdir(mounted.path / "Old")
        user.append("Old", plain(5), DATE)
        wait_until(lambda: len(os.listdir(mounted.path / "Old")) == 1, "it is shown")
        fails_with(errno.ENOTEMPTY, os.rmdir, mounted.path / "Old")
        mounted.unmount()
    found = everything(user)
    assert len(found["Trash/Old"]) == 3
    assert len(found["Old"]) == 1


def test_a_directory_is_not_renamed_into_itself(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    fails_with(errno.EINVAL, os.rename, mounted.path / "Work", mounted.path / "Work" / "Sub")
    mounted.unmount()
    assert "Work" in mailboxes(filled)


def test_a_mailbox_name_that_the_server_cannot_have(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    before = mailboxes(filled)
    fails_with(errno.EINVAL, os.mkdir, os.fsencode(mounted.path) + b"/\xff\xfe")
    mounted.unmount()
    assert mailboxes(filled) == before


# ---- what mail is not


def test_links_and_devices_are_refused(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    work = mounted.path / "Work"
    fails_with(errno.EPERM, os.link, file_of(mounted, 1), work / "link.eml")
    fails_with(errno.EPERM, os.symlink, "target", work / "link.eml")
    fails_with(errno.EPERM, os.mkfifo, work / "fifo.eml")
    assert os.listdir(work) == []


def test_files_belong_to_who_mounted_them(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    os.chown(target, os.getuid(), os.getgid())
    fails_with(errno.EPERM, os.chown, target, os.getuid() + 1, -1)
    target.chmod(0o444)
    assert target.stat().st_mode & 0o777 == 0o444
    mounted.unmount()
    again = mount(filled, cache=mounted.cache)
    assert file_of(again, 1).stat().st_mode & 0o777 == 0o444


def test_a_scratch_file_is_local_and_outlives_the_mount(filled: Account, mount: Mounter) -> None:
    filled.start_trace()
    first = mount(filled)
    scratch = first.path / "Work" / ".x.eml.swp"
    write(scratch, b"From: me\r\n\r\nnot to be sent", sync=True, mtime=LATER)
    write(first.path / "Work" / "#x#", b"x" * 300_000)
    write(first.path / "top", b"at the top")
    scratch.chmod(0o640)
    assert os.getxattr(scratch, STATE) == b"local"
    with scratch.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"end")
        file.truncate(1_000_001)
        file.seek(26)
        assert file.read(4) == b"\0\0\0\0"
    os.utime(scratch, (LATER, LATER))
    first.unmount()
    second = mount(filled, cache=first.cache)
    scratch = second.path / "Work" / ".x.eml.swp"
    shown = scratch.stat()
    assert (shown.st_size, shown.st_mtime, shown.st_mode & 0o777) == (1_000_001, LATER, 0o640)
    assert scratch.read_bytes().startswith(b"From: me\r\n\r\nnot to be sent\0")
    assert (second.path / "Work" / "#x#").read_bytes() == b"x" * 300_000
    assert (second.path / "top").read_bytes() == b"at the top"
    scratch.rename(second.path / "Work" / ".other")
    os.unlink(second.path / "Work" / "#x#")
    second.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}
    assert not [line for line in filled.protocol_trace() if line.startswith(b"APPEND")]


def test_noise_is_answered_without_the_network(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled))
        os.listdir(mounted.path / "Work")
        settle(mounted)
        proxy.forget_commands()
        _look_for_noise(mounted)
        assert proxy.commands() == []


def _look_for_noise(mounted: Mount) -> None:
    for name in (".Trash", ".Trash-0", ".hidden", ".directory", ".git", "CVS", ".xdg-volume-info"):
        assert not (mounted.path / name).exists()
        assert not (mounted.path / "Work" / name).exists()


# ---- refusals


NOT_MAIL = b"this is no mail message at all\n"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (b"NO [OVERQUOTA] Full", errno.EDQUOT),
        (b"NO [NOPERM] Not yours", errno.EACCES),
        (b"NO [TOOBIG] Too big", errno.EFBIG),
        (b"NO [LIMIT] Too big", errno.EFBIG),
        (b"NO No", errno.EIO),
        (b"BAD No", errno.EIO),
    ],
)
def test_a_refusal_is_an_errno_and_can_be_retried(
    filled: Account, mount: Mounter, answer: bytes, number: int
) -> None:
    with Proxy(filled.server, hide=["LITERAL+"]) as proxy:
        mounted = mount(proxy.account(filled), expected_log=["is not uploaded:"])
        target = mounted.path / "Work" / "new.eml"
        proxy.fault(b"APPEND", answer)
        fails_with(number, lambda: write(target, plain(10), sync=True))
        assert os.getxattr(target, STATE) == b"unsent"
        assert answer.split(b"] ")[-1].split()[-1] in os.getxattr(target, ERROR)
        assert held(filled, "Work") == {}
        os.setxattr(target, STATE, b"sending")
        settle(mounted)
        assert waiting(mounted) == []
        mounted.unmount()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


@pytest.fixture(scope="module")
def full_dovecot(ca: CertificateAuthority) -> Iterator[Dovecot]:
    with Dovecot(ca, quota="10k") as server:
        yield server


def test_over_quota(full_dovecot: Dovecot, mount: Mounter) -> None:
    account = full_dovecot.account("small")
    account.deliver("INBOX", [(plain(1, 2000), DATE, "S")])
    mounted = mount(account, expected_log=[r"INBOX/\w+\.eml is not uploaded: .*[Qq]uota"])
    target = mounted.path / "INBOX" / "big.eml"
    write(target, plain(2, 20_000))
    wait_until(lambda: os.getxattr(target, STATE) == b"unsent", "it is unsent")
    assert b"uota" in os.getxattr(target, ERROR)
    assert waiting(mounted) == [("INBOX/big.eml", "unsent")]
    fails_with(errno.EDQUOT, lambda: write(mounted.path / "INBOX" / "b.eml", plain(2, 20_000)))
    write(mounted.path / "INBOX" / "tmp", plain(3, 20_000))
    fails_with(errno.EDQUOT, os.rename, mounted.path / "INBOX" / "tmp", mounted.path / "INBOX" / "c.eml")
    assert target.read_bytes() == plain(2, 20_000)
    target.unlink()
    write(mounted.path / "INBOX" / "fits.eml", plain(4, 2000), sync=True)
    mounted.unmount()
    assert [message.content for message in held(account).values()] == [plain(1, 2000), plain(4, 2000)]


def test_a_mailbox_deleted_under_an_open_file(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled), expected_log=["is not uploaded:", "its mailbox was deleted"])
        path = mounted.path / "Work" / "new.eml"
        with path.open("wb", buffering=0) as file:
            file.write(plain(10))
            with filled.client() as client:
                assert client.delete("Work")[0] == "OK"
            # A connection that knows the mailbox would make Dovecot stumble: NO [SERVERBUG].
            proxy.cut_all()
        with path.open("rb") as file:
            fails_with(errno.ENOENT, _fsync_again, file.fileno())
        wait_until((mounted.path / "new.eml").exists, "the file is at the top of the mount")
        _check_left_unsent(mounted)


def _fsync_again(descriptor: int) -> None:
    """Until the lost connections are noticed."""

    def answered() -> bool:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno == errno.EHOSTUNREACH:
                return False
            raise
        return True

    wait_until(answered, "an answer")


def _check_left_unsent(mounted: Mount) -> None:
    assert [state for _, state in waiting(mounted)] == ["unsent"]
    mounted.unmount()
    (left,) = [path for path in mounted.cache.glob("*/spool/*") if path.name.isdigit()]
    assert left.read_bytes() == plain(10)


def test_a_mailbox_that_may_only_be_read(filled: Account, mount: Mounter) -> None:
    def read_only(line: bytes) -> bytes:
        return line.replace(b"[READ-WRITE]", b"[READ-ONLY]")

    with Proxy(filled.server, edits=[read_only]) as proxy:
        mounted = mount(proxy.account(filled), "--delete", "expunge")
        target = file_of(mounted, 1)
        fails_with(errno.EACCES, os.unlink, target)
        fails_with(errno.EACCES, os.rename, target, mounted.path / "Work" / "x.eml")
        fails_with(errno.EACCES, os.setxattr, target, "user.imap.seen", b"0")
        assert target.read_bytes() == plain(1)
        mounted.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_read_only_refuses_every_change(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled, "--read-only")
    before = all_uids(filled)
    target, work = file_of(mounted, 1), mounted.path / "Work"
    refused: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (os.open, (target, os.O_RDWR)),
        (os.open, (work / "new.eml", os.O_WRONLY | os.O_CREAT)),
        (os.open, (work / "scratch", os.O_WRONLY | os.O_CREAT)),
        (os.truncate, (target, 0)),
        (os.unlink, (target,)),
        (os.rename, (target, work / "x.eml")),
        (os.rename, (target, target.with_name("x.eml"))),
        (os.mkdir, (mounted.path / "New",)),
        (os.rmdir, (work,)),
        (os.rename, (work, mounted.path / "New")),
        (os.utime, (target, (DATE, DATE))),
        (os.chmod, (target, 0o600)),
        (os.setxattr, (target, "user.imap.seen", b"0")),
        (os.removexattr, (target, "user.imap.seen")),
        (os.symlink, ("x", work / "link")),
        (os.link, (target, work / "link.eml")),
    ]
    for call, arguments in refused:
        with pytest.raises(OSError) as caught:
            call(*arguments)
        assert caught.value.errno == errno.EROFS, call.__name__
    mounted.unmount()
    assert all_uids(filled) == before
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


# ---- the end of a mount, and of a server


def test_umount_waits_for_uploads(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server, latency=0.05) as proxy:
        mounted = mount(proxy.account(filled))
        for number in range(10, 30):
            write(mounted.path / "Work" / f"{number}.eml", plain(number), mtime=LATER)
        mounted.unmount()
    assert everything(filled)["Work"] == in_order(*(Held(plain(n), LATER) for n in range(10, 30)))


def test_umount_waits_until_the_old_version_is_removed(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server, latency=0.1) as proxy:
        mounted = mount(proxy.account(filled))
        write(file_of(mounted, 1), plain(10))
        mounted.unmount()
    assert everything(filled) == {
        "INBOX": in_order(Held(plain(10), DATE + 1, MARKED), *inbox(2, 3)),
        "Trash": inbox(1),
    }


def test_an_old_version_that_could_not_be_removed_is_removed_later(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled))
        fault = proxy.fault(b"UID (MOVE|COPY)", b"NO [INUSE] Not now", times=2)
        write(file_of(mounted, 1), plain(10))
        fault.wait_hit(2)
        wait_until(lambda: everything(filled).get("Trash") == inbox(1), "the old version is removed")
        mounted.unmount()
    assert everything(filled)["INBOX"] == in_order(Held(plain(10), DATE + 1, MARKED), *inbox(2, 3))


def test_a_draft_that_a_kill_left_unsent_is_sent_once_by_the_next_mount(
    filled: Account, mount: Mounter
) -> None:
    with Proxy(filled.server) as proxy:
        first = mount(proxy.account(filled))
        os.listdir(first.path / "Work")
        fault = proxy.fault(b"APPEND", "stall")
        write(first.path / "Work" / "new.eml", plain(10), mtime=LATER)
        fault.wait_hit()
        first.kill()
        assert held(filled, "Work") == {}
        second = mount(proxy.account(filled), cache=first.cache)
        settle(second)
        assert os.listdir(second.path / "Work") == ["new.eml"]
        second.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3), "Work": [Held(plain(10), LATER)]}


def test_a_draft_that_was_sent_before_a_kill_is_not_sent_again(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server) as proxy:
        first = mount(proxy.account(filled))
        fault = proxy.fault(b"APPEND", "stall", at="answer")
        write(first.path / "Work" / "new.eml", plain(10), mtime=LATER)
        fault.wait_hit()
        first.kill()
        assert len(held(filled, "Work")) == 1
        second = mount(proxy.account(filled), cache=first.cache)
        settle(second)
        assert os.listdir(second.path / "Work") == ["new.eml"]
        assert (second.path / "Work" / "new.eml").read_bytes() == plain(10)
        second.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3), "Work": [Held(plain(10), LATER)]}


def test_a_replacement_cut_by_a_kill_ends_with_one_message(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server) as proxy:
        first = mount(proxy.account(filled))
        target = file_of(first, 1)
        fault = proxy.fault(b"UID MOVE", "stall")
        write(target, plain(10))
        fault.wait_hit()
        first.kill()
        second = mount(proxy.account(filled), cache=first.cache)
        wait_until(lambda: everything(filled).get("Trash") == inbox(1), "the old version is removed")
        assert (second.path / "INBOX" / target.name).read_bytes() == plain(10)
        assert len(os.listdir(second.path / "INBOX")) == 3
        second.unmount()
    assert everything(filled)["INBOX"] == in_order(Held(plain(10), DATE + 1, MARKED), *inbox(2, 3))


def test_half_a_message_left_by_a_kill_is_not_sent(filled: Account, mount: Mounter) -> None:
    first = mount(filled)
    file = (first.path / "Work" / "new.eml").open("wb", buffering=0)
    file.write(plain(10)[:1000])
    os.close(os.dup(file.fileno()))
    (description,) = first.cache.glob("*/spool/*.json")
    # For a moment this looks like the last close().
    wait_until(lambda: json.loads(description.read_text())["state"] == "open", "it is open again")
    first.kill()
    with pytest.raises(OSError):
        file.close()
    second = mount(filled, cache=first.cache)
    settle(second)
    target = second.path / "Work" / "new.eml"
    assert os.getxattr(target, STATE) == b"unsent"
    assert target.read_bytes() == plain(10)[:1000]
    assert held(filled, "Work") == {}
    os.setxattr(target, STATE, b"sending")
    second.unmount()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)[:1000]]


OFFLINE = [r"imapfs\.imap\.pool: offline: "]


def take_away(proxy: Proxy, mounted: Mount) -> None:
    """End the server, as far as the mount can see, and have that noticed."""
    proxy.refuse()
    proxy.cut_all()

    def offline() -> bool:
        fails_with(errno.EHOSTUNREACH, os.mkdir, mounted.path / "New")
        return bool(mounted.status()["state"] == "offline")

    wait_until(offline, "it is offline")


def test_new_files_are_accepted_while_the_server_is_away_and_sent_later(
    filled: Account, mount: Mounter
) -> None:
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled), expected_log=OFFLINE)
        work = mounted.path / "Work"
        os.listdir(work)
        take_away(proxy, mounted)
        write(work / "closed.eml", plain(10), mtime=LATER)
        write(work / "tmp", plain(11), mtime=LATER)
        (work / "tmp").rename(work / "renamed.eml")
        fails_with(errno.EHOSTUNREACH, lambda: write(work / "synced.eml", plain(12), sync=True))
        os.utime(work / "synced.eml", (LATER, LATER))
        os.setxattr(work / "closed.eml", "user.xdg.tags", b"late")
        for name in ("closed.eml", "renamed.eml", "synced.eml"):
            assert os.getxattr(work / name, STATE) == b"sending"
        assert sorted(waiting(mounted)) == [
            (f"Work/{name}.eml", "sending") for name in ("closed", "renamed", "synced")
        ]
        assert (work / "closed.eml").read_bytes() == plain(10)
        assert sorted(os.listdir(work)) == ["closed.eml", "renamed.eml", "synced.eml"]
        proxy.accept()
        wait_until(lambda: len(held(filled, "Work")) == 3, "all are sent")
        settle(mounted)
        fails_with(errno.ENODATA, os.getxattr, work / "closed.eml", STATE)
        mounted.unmount()
    assert everything(filled)["Work"] == in_order(
        Held(plain(10), LATER, frozenset({"late"})), Held(plain(11), LATER), Held(plain(12), LATER)
    )


def test_umount_while_the_server_is_away_keeps_drafts_for_the_next_mount(
    filled: Account, mount: Mounter
) -> None:
    with Proxy(filled.server) as proxy:
        first = mount(proxy.account(filled), expected_log=[*OFFLINE, "files not on the server yet: 1"])
        os.listdir(first.path / "Work")
        take_away(proxy, first)
        write(first.path / "Work" / "new.eml", plain(10), mtime=LATER)
        first.unmount()
        proxy.accept()
        second = mount(proxy.account(filled), cache=first.cache)
        settle(second)
        assert os.listdir(second.path / "Work") == ["new.eml"]
        second.unmount()
    assert everything(filled)["Work"] == [Held(plain(10), LATER)]


def test_changes_of_what_is_on_the_server_fail_while_it_is_away(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled), expected_log=OFFLINE)
        target = file_of(mounted, 1)
        take_away(proxy, mounted)
        fails_with(errno.EHOSTUNREACH, os.unlink, target)
        fails_with(errno.EHOSTUNREACH, os.rename, target, mounted.path / "Work" / "x.eml")
        fails_with(errno.EHOSTUNREACH, os.setxattr, target, "user.imap.seen", b"0")
        fails_with(errno.EHOSTUNREACH, os.rename, mounted.path / "Work", mounted.path / "New")
        assert target.exists()
        assert len(os.listdir(mounted.path / "INBOX")) == 3
        mounted.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_the_status_lists_what_waits(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled, expected_log=["is not uploaded:"])
    write(mounted.path / "Work" / "bad.eml", NOT_MAIL)
    wait_until(lambda: waiting(mounted) == [("Work/bad.eml", "unsent")], "it is refused")
    command = [*mounted.command[:3], "status", "--json", str(mounted.path)]
    shown = json.loads(subprocess.run(command, env=mounted.environment, capture_output=True).stdout)
    assert [(one["path"], one["state"]) for one in shown["waiting"]] == [("Work/bad.eml", "unsent")]
    assert "no mail message" in shown["waiting"][0]["error"]
    (mounted.path / "Work" / "bad.eml").unlink()
