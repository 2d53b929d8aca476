"""What each operation means on the server, and what a program that asks for the impossible is told."""

import errno
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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

DATE = 1_700_000_000
LATER = 1_750_000_000
MARKED = frozenset({"\\Seen", "\\Flagged"})
STATE = "user.imap.state"
ERROR = "user.imap.error"


@pytest.fixture
def filled(user: Account) -> Account:
    """Return an account with three messages in INBOX and an empty mailbox."""
    user.deliver("INBOX", [(plain(n), DATE + n, "FS") for n in (1, 2, 3)])
    user.deliver("Work", [])
    return user


def inbox(*numbers: int) -> list[Held]:
    """What `filled` has put into INBOX."""
    return in_order(*(Held(plain(n), DATE + n, MARKED) for n in numbers))


def fails_with(number: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


def write(path: Path, data: bytes, *, sync: bool = False, mtime: int | None = None) -> None:
    """Write a file and close it; with ``sync`` fsync comes before, whose errno is raised."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    if mtime is not None:
        os.utime(path, (mtime, mtime))


def flags_of(path: Path) -> set[str]:
    return set(os.getxattr(path, "user.imap.flags").decode().split())


def fetches(account: Account) -> list[bytes]:
    """The commands so far that brought bodies."""
    return [line for line in account.protocol_trace() if b"BODY.PEEK[])" in line]


# ---- moving and naming


def test_a_moved_message_keeps_name_inode_times_and_cached_body(filled: Account, mount: Mounter) -> None:
    filled.start_trace()
    mounted = mount(filled)
    source = file_of(mounted, 1)
    assert source.read_bytes() == plain(1)
    before = source.stat()
    fetched = fetches(filled)
    assert fetched
    target = mounted.path / "Work" / source.name
    source.rename(target)
    after = target.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino, before.st_size, before.st_mtime_ns,
    )  # fmt: skip
    assert not source.exists()
    assert os.listdir(mounted.path / "Work") == [source.name]
    mounted.unmount()
    again = mount(filled, cache=mounted.cache)
    target = again.path / "Work" / source.name
    assert target.stat().st_ino == before.st_ino
    assert target.read_bytes() == plain(1)
    assert fetches(filled) == fetched
    again.unmount()
    moves = [line for line in filled.protocol_trace() if b"UID MOVE" in line or b"UID COPY" in line]
    assert len(moves) == 1


def test_an_own_name_lasts_across_mounts_and_moves(filled: Account, mount: Mounter) -> None:
    first = mount(filled)
    file_of(first, 1).rename(first.path / "INBOX" / "no mail name")
    first.unmount()
    second = mount(filled, cache=first.cache)
    assert (second.path / "INBOX" / "no mail name").read_bytes() == plain(1)
    (second.path / "INBOX" / "no mail name").rename(second.path / "Work" / "other.eml")
    second.unmount()
    third = mount(filled, cache=first.cache)
    assert os.listdir(third.path / "Work") == ["other.eml"]
    third.unmount()
    assert everything(filled) == {"INBOX": inbox(2, 3), "Work": inbox(1)}


def test_a_name_that_is_taken_stays_with_who_has_it(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    mine = file_of(mounted, 1).rename(mounted.path / "INBOX" / file_of(mounted, 1).name.replace(".1.", ".4."))
    filled.append("INBOX", plain(1), DATE + 1)
    wait_until(lambda: len(os.listdir(mounted.path / "INBOX")) == 4, "the new message is listed")
    assert mine.stat().st_mtime == DATE + 1
    assert os.getxattr(mine, "user.imap.uid") == b"1"
    assert len(set(os.listdir(mounted.path / "INBOX"))) == 4


def test_rename_onto_itself_and_of_what_is_not_there(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    target.rename(target)
    fails_with(errno.ENOENT, os.rename, mounted.path / "INBOX" / "none.eml", target)
    fails_with(errno.EISDIR, os.rename, target, mounted.path / "Work")
    mounted.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_message_that_is_open_is_moved_and_read_on(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    source = file_of(mounted, 1)
    with source.open("rb", buffering=0) as file:
        start = file.read(10)
        source.rename(mounted.path / "Work" / "moved.eml")
        assert start + file.read() == plain(1)


# ---- deleting


def test_delete_expunge_leaves_what_other_clients_have_marked(filled: Account, mount: Mounter) -> None:
    with filled.client() as client:
        client.select("INBOX")
        client.uid("STORE", "2", "+FLAGS.SILENT", r"(\Deleted)")
    mounted = mount(filled, "--delete", "expunge")
    file_of(mounted, 1).unlink()
    mounted.unmount()
    marked = Held(plain(2), DATE + 2, MARKED | {"\\Deleted"})
    assert everything(filled) == {"INBOX": in_order(marked, *inbox(3))}


def test_delete_trash_leaves_what_other_clients_have_marked(filled: Account, mount: Mounter) -> None:
    with filled.client() as client:
        client.select("INBOX")
        client.uid("STORE", "2", "+FLAGS.SILENT", r"(\Deleted)")
    mounted = mount(filled)
    file_of(mounted, 1).unlink()
    file_of(mounted, 3).rename(mounted.path / "Work" / "moved.eml")
    with file_of(mounted, 2).open("ab") as file:
        file.write(b"more\r\n")
    mounted.unmount()
    after = everything(filled)
    assert after["Trash"][0] in inbox(1) or after["Trash"][1] in inbox(1)
    # The changed message is still marked: a new version has the flags of the old one.
    assert after["INBOX"] == [Held(plain(2) + b"more\r\n", DATE + 2, MARKED | {"\\Deleted"})]
    assert after["Work"] == inbox(3)


def test_a_message_deleted_here_is_not_deleted_twice(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    with filled.client() as client:
        client.select("INBOX")
        client.uid("STORE", "1", "+FLAGS.SILENT", r"(\Deleted)")
        client.uid("EXPUNGE", "1")
    # ESTALE, upon which the kernel looks the name up again.
    fails_with(errno.ENOENT, os.unlink, target)
    assert not target.exists()
    mounted.unmount()
    assert everything(filled) == {"INBOX": inbox(2, 3)}


def test_a_message_that_another_client_expunged_cannot_be_moved(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    with filled.client() as client:
        client.select("INBOX")
        client.uid("STORE", "1", "+FLAGS.SILENT", r"(\Deleted)")
        client.uid("EXPUNGE", "1")
    fails_with(errno.ENOENT, os.rename, target, mounted.path / "Work" / "x.eml")
    mounted.unmount()
    assert everything(filled) == {"INBOX": inbox(2, 3)}


# ---- new messages


@pytest.mark.parametrize("when", ["before closing", "after closing", "never"])
def test_the_mtime_of_a_new_file_is_its_internaldate(filled: Account, mount: Mounter, when: str) -> None:
    mounted = mount(filled)
    target = mounted.path / "Work" / "new.eml"
    start = int(time.time())
    with target.open("wb") as file:
        file.write(plain(10))
        file.flush()
        if when == "before closing":
            os.utime(file.fileno(), (LATER, LATER))
    if when == "after closing":
        os.utime(target, (LATER, LATER))
    settle(mounted)
    mtime = int(target.stat().st_mtime)
    mounted.unmount()
    (new,) = held(filled, "Work").values()
    if when == "never":
        assert start <= new.date <= time.time()
    else:
        assert new.date == LATER
    assert abs(mtime - new.date) <= 1


def test_flags_set_before_the_upload_go_with_it(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = mounted.path / "Work" / "new.eml"
    with target.open("wb") as file:
        os.setxattr(target, "user.xdg.tags", b"urgent, to do")
        os.setxattr(target, "user.imap.seen", b"1")
        file.write(plain(10))
    assert flags_of(target) == {"urgent", "to_do", "\\Seen"}
    mounted.unmount()
    (new,) = held(filled, "Work").values()
    assert new.flags == {"urgent", "to_do", "\\Seen"}


def test_a_new_file_keeps_name_and_inode_and_is_not_fetched(filled: Account, mount: Mounter) -> None:
    filled.start_trace()
    mounted = mount(filled)
    target = mounted.path / "Work" / "new.eml"
    write(target, plain(10).replace(b"\r\n", b"\n"), sync=True)
    inode = target.stat().st_ino
    assert target.read_bytes() == plain(10)
    assert os.getxattr(target, "user.imap.uid") == b"1"
    mounted.unmount()
    again = mount(filled, cache=mounted.cache)
    target = again.path / "Work" / "new.eml"
    assert target.stat().st_ino == inode
    assert target.read_bytes() == plain(10)
    assert os.listdir(again.path / "Work") == ["new.eml"]
    again.unmount()
    assert fetches(filled) == []


def test_an_empty_file_is_never_sent(filled: Account, mount: Mounter) -> None:
    first = mount(filled)
    target = first.path / "Work" / "empty.eml"
    write(target, b"", sync=True)
    os.utime(target, (LATER, LATER))
    target.rename(first.path / "Work" / "still empty.eml")
    settle(first)
    first.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}
    second = mount(filled, cache=first.cache)
    target = second.path / "Work" / "still empty.eml"
    assert target.stat().st_size == 0
    write(target, plain(10))
    second.unmount()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


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
            mounted.expect_log("is not sent:")
            proxy.fault(b"APPEND", b"NO [OVERQUOTA] Full")
            fails_with(errno.EDQUOT, lambda: write(work / "new.eml", content, sync=True))
        else:
            proxy.fault(b"APPEND", "cut", times=None)
            with pytest.raises(OSError):
                write(work / "new.eml", content, sync=True)
        assert (work / "new.eml").stat().st_size == len(content)
        assert (work / "new.eml").read_bytes() == content
        (work / "new.eml").unlink()


def test_fsync_returns_when_the_server_has_it(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    with (mounted.path / "Work" / "new.eml").open("wb", buffering=0) as file:
        file.write(plain(10))
        os.fsync(file.fileno())
        assert [message.content for message in held(filled, "Work").values()] == [plain(10)]
        file.write(b"more\r\n")
    mounted.unmount()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10) + b"more\r\n"]


def test_a_rename_to_a_message_name_returns_when_the_server_has_it(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    temporary = mounted.path / "Work" / ".new.part"
    write(temporary, plain(10), mtime=LATER)
    temporary.rename(mounted.path / "Work" / "new.eml")
    assert everything(filled)["Work"] == [Held(plain(10), LATER)]
    write(mounted.path / "INBOX" / "tmp", plain(11), mtime=LATER)
    (mounted.path / "INBOX" / "tmp").rename(mounted.path / "Work" / "other.eml")
    assert everything(filled)["Work"] == in_order(Held(plain(10), LATER), Held(plain(11), LATER))


def test_a_new_file_deleted_at_once_leaves_nothing_but_perhaps_in_trash(
    filled: Account, mount: Mounter
) -> None:
    mounted = mount(filled)
    target = mounted.path / "Work" / "new.eml"
    write(target, plain(10))
    target.unlink()
    assert not target.exists()
    mounted.unmount()
    after = everything(filled)
    assert "Work" not in after
    assert len(after.get("Trash", [])) <= 1


def test_a_new_file_moved_before_it_is_sent(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    with (mounted.path / "Work" / "new.eml").open("wb") as file:
        file.write(plain(10))
        (mounted.path / "Work" / "new.eml").rename(mounted.path / "INBOX" / "new.eml")
    assert os.listdir(mounted.path / "Work") == []
    mounted.unmount()
    after = everything(filled)
    assert "Work" not in after
    assert [message.content for message in after["INBOX"] if message not in inbox(1, 2, 3)] == [plain(10)]


def test_what_the_server_alters_is_shown_as_the_server_has_it(filled: Account, mount: Mounter) -> None:
    content = b"Subject: bare CR\r\n\r\none\rtwo\r\r\nthree\r"
    mounted = mount(filled)
    target = mounted.path / "Work" / "new.eml"
    write(target, content, sync=True)
    (kept,) = held(filled, "Work").values()
    assert kept.content != content
    assert target.read_bytes() == kept.content
    assert target.stat().st_size == len(kept.content)


# ---- changing a message


def test_a_change_replaces_the_message_and_keeps_flags_and_date(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    inode = target.stat().st_ino
    with target.open("r+b") as file:
        file.write(b"X")
    settle(mounted)
    assert target.stat().st_ino == inode
    assert target.read_bytes() == b"X" + plain(1)[1:]
    mounted.unmount()
    after = everything(filled)
    assert after["INBOX"] == in_order(Held(b"X" + plain(1)[1:], DATE + 1, MARKED), *inbox(2, 3))
    assert after["Trash"] == inbox(1)


@pytest.mark.parametrize("how", ["same bytes", "LF", "opened only", "truncated and put back", "renamed over"])
def test_a_change_of_nothing_costs_the_server_nothing(filled: Account, mount: Mounter, how: str) -> None:
    mounted = mount(filled)
    before = all_uids(filled)
    target = file_of(mounted, 1)
    inode = target.stat().st_ino
    match how:
        case "same bytes":
            with target.open("r+b") as file:
                file.write(plain(1))
        case "LF":
            write(target, plain(1).replace(b"\r\n", b"\n"))
        case "opened only":
            target.open("r+b").close()
        case "truncated and put back":
            os.truncate(target, 1000)
            with target.open("ab") as file:
                file.write(plain(1)[1000:])
        case "renamed over":
            write(target.with_name("tmp"), plain(1))
            inode = target.with_name("tmp").stat().st_ino
            target.with_name("tmp").rename(target)
    settle(mounted)
    assert target.read_bytes() == plain(1)
    assert target.stat().st_ino == inode
    mounted.unmount()
    if how == "truncated and put back":
        # Two programs, so that the half may have been sent between them.
        assert everything(filled)["INBOX"] == inbox(1, 2, 3)
    else:
        assert all_uids(filled) == before
        assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_change_that_follows_a_move(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = mounted.path / "Work" / "moved.eml"
    file_of(mounted, 1).rename(target)
    with target.open("ab") as file:
        file.write(b"more\r\n")
    target.rename(mounted.path / "INBOX" / "back.eml")
    mounted.unmount()
    after = everything(filled)
    assert "Work" not in after
    assert after["INBOX"] == in_order(Held(plain(1) + b"more\r\n", DATE + 1, MARKED), *inbox(2, 3))
    assert after["Trash"] == inbox(1)


def test_many_changes_of_one_message_end_in_one_message(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    for number in range(10):
        with target.open("ab") as file:
            file.write(b"line %d\r\n" % number)
    expected = plain(1) + b"".join(b"line %d\r\n" % number for number in range(10))
    assert target.read_bytes() == expected
    mounted.unmount()
    assert everything(filled)["INBOX"] == in_order(Held(expected, DATE + 1, MARKED), *inbox(2, 3))


def test_a_message_changed_here_and_expunged_there_is_a_new_one(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    with file_of(mounted, 1).open("ab") as file:
        file.write(b"more\r\n")
        file.flush()
        with filled.client() as client:
            client.select("INBOX")
            client.uid("STORE", "1", "+FLAGS.SILENT", r"(\Deleted)")
            client.uid("EXPUNGE", "1")
    mounted.unmount()
    after = everything(filled)
    assert after == {"INBOX": in_order(Held(plain(1) + b"more\r\n", DATE + 1, MARKED), *inbox(2, 3))}


def test_flags_that_another_client_set_meanwhile_are_on_the_new_version(
    filled: Account, mount: Mounter
) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    os.setxattr(target, "user.xdg.tags", b"mine")
    with target.open("ab") as file:
        file.write(b"more\r\n")
    mounted.unmount()
    changed = [m for m in everything(filled)["INBOX"] if m not in inbox(2, 3)]
    assert [m.flags for m in changed] == [MARKED | {"mine"}]


def test_deleting_a_message_with_changes_deletes_it(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    with target.open("ab") as file:
        file.write(b"more\r\n")
    target.unlink()
    assert len(os.listdir(mounted.path / "INBOX")) == 2
    mounted.unmount()
    after = everything(filled)
    assert after["INBOX"] == inbox(2, 3)
    assert all(m.content.startswith(plain(1)) for m in after["Trash"])


# ---- flags


def test_every_flag_attribute_changes_the_flags_on_the_server(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)

    def on_server() -> frozenset[str]:
        return held(filled)[1].flags

    os.setxattr(target, "user.imap.seen", b"0")
    assert on_server() == {"\\Flagged"} == flags_of(target)
    os.removexattr(target, "user.imap.flagged")
    assert on_server() == frozenset()
    for name in ("seen", "answered", "flagged", "deleted", "draft"):
        os.setxattr(target, f"user.imap.{name}", b"1")
        assert on_server() == {f"\\{name.capitalize()}"} == flags_of(target)
        assert os.getxattr(target, f"user.imap.{name}") == b"1"
        os.removexattr(target, f"user.imap.{name}")
        assert on_server() == frozenset()
        assert os.getxattr(target, f"user.imap.{name}") == b"0"
    os.setxattr(target, "user.imap.flags", b"\\Seen $Forwarded work")
    assert on_server() == {"\\Seen", "$Forwarded", "work"}
    os.setxattr(target, "user.xdg.tags", b"home,to do")
    assert on_server() == {"\\Seen", "home", "to_do"}
    assert set(os.getxattr(target, "user.xdg.tags").split(b",")) == {b"home", b"to_do"}
    os.removexattr(target, "user.xdg.tags")
    assert on_server() == {"\\Seen"}
    os.setxattr(target, "user.imap.flags", b"\\seen \\ANSWERED")
    assert on_server() == {"\\Seen", "\\Answered"}
    os.removexattr(target, "user.imap.flags")
    assert on_server() == frozenset()
    mounted.unmount()
    assert all_uids(filled)["INBOX"] == [1, 2, 3]


def test_flags_that_cannot_be_are_refused(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    for name, value, number in [
        ("user.imap.seen", b"yes", errno.EINVAL),
        ("user.imap.flags", b"two(parts", errno.EINVAL),
        ("user.imap.flags", b"\xff\xfe", errno.EINVAL),
        ("user.imap.flags", "größe".encode(), errno.EINVAL),
        ("user.imap.flags", b"\\Recent", errno.EINVAL),
        ("user.imap.flags", b"a\r\nb LOGOUT\r\n{", errno.EINVAL),
        ("user.imap.flags", b"\\Unheard", errno.EOPNOTSUPP),
        ("user.xdg.tags", b"\\Seen", errno.EINVAL),
        ("user.xdg.tags", b"a\"b", errno.EINVAL),
        ("user.imap.uid", b"7", errno.EOPNOTSUPP),
        ("user.comment", b"x", errno.EOPNOTSUPP),
        ("security.x", b"x", errno.EOPNOTSUPP),
        ("user.imap.state", b"unsent", errno.EINVAL),
        ("user.imap.state", b"sending", errno.EINVAL),
    ]:  # fmt: skip
        with pytest.raises(OSError) as caught:
            os.setxattr(target, name, value)
        assert caught.value.errno == number, (name, value)
    fails_with(errno.EPERM, os.removexattr, target, "user.imap.uid")
    fails_with(errno.ENODATA, os.removexattr, target, "user.comment")
    fails_with(errno.EOPNOTSUPP, os.setxattr, mounted.path / "Work", "user.imap.seen", b"1")
    mounted.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


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


def test_a_change_of_flags_does_not_undo_that_of_another_client(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    target = file_of(mounted, 1)
    assert flags_of(target) == MARKED
    with filled.client() as client:
        client.select("INBOX")
        client.uid("STORE", "1", "FLAGS.SILENT", r"(\Answered theirs)")
    os.setxattr(target, "user.imap.draft", b"1")
    assert held(filled)[1].flags == {"\\Answered", "theirs", "\\Draft"}
    assert flags_of(target) == {"\\Answered", "theirs", "\\Draft"}


# ---- mailboxes


def test_mkdir_makes_a_subscribed_mailbox_and_rmdir_deletes_it(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    os.makedirs(mounted.path / "Größe" / "Sub & more")
    assert {"Gr&APYA3w-e", "Gr&APYA3w-e/Sub &- more"} <= set(mailboxes(filled))
    with filled.client() as client:
        assert any(b"Gr&APYA3w-e/Sub &- more" in (line or b"") for line in client.lsub()[1])
    fails_with(errno.EEXIST, os.mkdir, mounted.path / "Größe")
    fails_with(errno.ENOTEMPTY, os.rmdir, mounted.path / "Größe")
    os.rmdir(mounted.path / "Größe" / "Sub & more")
    os.rmdir(mounted.path / "Größe")
    assert not (mounted.path / "Größe").exists()
    mounted.unmount()
    assert not [name for name in mailboxes(filled) if name.startswith("Gr")]


def test_rmdir_of_what_is_not_empty_on_the_server(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    assert os.listdir(mounted.path / "Work") == []
    filled.append("Work", plain(10), DATE)
    fails_with(errno.ENOTEMPTY, os.rmdir, mounted.path / "Work")
    fails_with(errno.EPERM, os.rmdir, mounted.path / "INBOX")
    fails_with(errno.ENOENT, os.rmdir, mounted.path / "None")
    fails_with(errno.ENOTDIR, os.rmdir, file_of(mounted, 1))
    mounted.unmount()
    assert everything(filled)["Work"] == [Held(plain(10), DATE)]


def test_rmdir_of_what_holds_only_a_local_file(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    write(mounted.path / "Work" / "notes", b"mine")
    fails_with(errno.ENOTEMPTY, os.rmdir, mounted.path / "Work")
    assert (mounted.path / "Work" / "notes").read_bytes() == b"mine"


def test_a_renamed_mailbox_keeps_children_inodes_and_cached_bodies(filled: Account, mount: Mounter) -> None:
    filled.deliver("Work/Sub", [(plain(5), DATE + 5, "S")])
    filled.start_trace()
    mounted = mount(filled)
    message = file_of(mounted, 1, "Work/Sub")
    assert message.read_bytes() == plain(5)
    inode, fetched = message.stat().st_ino, fetches(filled)
    (mounted.path / "Play").mkdir()
    (mounted.path / "Work").rename(mounted.path / "Play" / "New")
    moved = mounted.path / "Play" / "New" / "Sub" / message.name
    assert moved.stat().st_ino == inode
    mounted.unmount()
    again = mount(filled, cache=mounted.cache)
    moved = again.path / "Play" / "New" / "Sub" / message.name
    assert moved.stat().st_ino == inode
    assert moved.read_bytes() == plain(5)
    assert fetches(filled) == fetched
    write(again.path / "Play" / "New" / "new.eml", plain(6), mtime=LATER)
    again.unmount()
    after = everything(filled)
    assert after["Play/New/Sub"] == [Held(plain(5), DATE + 5, frozenset({"\\Seen"}))]
    assert after["Play/New"] == [Held(plain(6), LATER)]
    assert "Work" not in mailboxes(filled)


def test_drafts_go_with_their_mailbox(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    write(mounted.path / "Work" / "notes", b"mine")
    with (mounted.path / "Work" / "new.eml").open("wb") as file:
        file.write(plain(10))
        (mounted.path / "Work").rename(mounted.path / "Play")
    assert (mounted.path / "Play" / "notes").read_bytes() == b"mine"
    mounted.unmount()
    assert [message.content for message in everything(filled)["Play"]] == [plain(10)]
    again = mount(filled, cache=mounted.cache)
    assert (again.path / "Play" / "notes").read_bytes() == b"mine"


def test_inbox_and_directories_onto_others_are_not_renamed(filled: Account, mount: Mounter) -> None:
    filled.deliver("Other", [])
    mounted = mount(filled)
    before = mailboxes(filled)
    fails_with(errno.EPERM, os.rename, mounted.path / "INBOX", mounted.path / "Old")
    fails_with(errno.ENOTEMPTY, os.rename, mounted.path / "Work", mounted.path / "Other")
    fails_with(errno.EINVAL, os.rename, mounted.path / "Work", mounted.path / "Work" / "Sub")
    mounted.unmount()
    assert mailboxes(filled) == before
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


@pytest.mark.parametrize("name", [".hidden", ".Trash-1000", ".~tmp~", ".git"])
def test_no_mailbox_begins_with_a_dot(filled: Account, mount: Mounter, name: str) -> None:
    mounted = mount(filled)
    before = mailboxes(filled)
    fails_with(errno.EPERM, os.mkdir, mounted.path / name)
    fails_with(errno.EPERM, os.mkdir, mounted.path / "Work" / name)
    fails_with(errno.EPERM, os.rename, mounted.path / "Work", mounted.path / name)
    mounted.unmount()
    assert mailboxes(filled) == before


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


def test_a_message_name_at_the_top_is_no_place_for_mail(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled)
    fails_with(errno.ENOENT, write, mounted.path / "new.eml", plain(1))
    write(mounted.path / "scratch", plain(1))
    fails_with(errno.ENOENT, os.rename, mounted.path / "scratch", mounted.path / "new.eml")
    assert (mounted.path / "scratch").read_bytes() == plain(1)


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


def test_what_is_no_mail_is_kept_unsent_and_said_so(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled, expected_log=[r"Work/new\.eml is not sent: it is no mail message"])
    target = mounted.path / "Work" / "new.eml"
    write(target, NOT_MAIL)
    wait_until(lambda: os.getxattr(target, STATE) == b"unsent", "it is unsent")
    assert b"no mail message" in os.getxattr(target, ERROR)
    assert waiting(mounted) == [("Work/new.eml", "unsent")]
    assert target.read_bytes() == NOT_MAIL
    mounted.unmount()
    again = mount(filled, cache=mounted.cache)
    target = again.path / "Work" / "new.eml"
    assert os.getxattr(target, STATE) == b"unsent"
    assert target.read_bytes() == NOT_MAIL
    # Corrected, it is sent.
    write(target, plain(10), sync=True)
    again.unmount()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


def test_what_is_no_mail_is_einval_where_somebody_waits(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled, expected_log=["is not sent: it is no mail message"])
    work = mounted.path / "Work"
    fails_with(errno.EINVAL, lambda: write(work / "new.eml", NOT_MAIL, sync=True))
    assert os.getxattr(work / "new.eml", STATE) == b"unsent"
    write(work / "scratch", NOT_MAIL)
    fails_with(errno.EINVAL, os.rename, work / "scratch", work / "renamed.eml")
    assert (work / "scratch").read_bytes() == NOT_MAIL
    assert not (work / "renamed.eml").exists()
    assert os.getxattr(work / "scratch", STATE) == b"local"
    (work / "new.eml").unlink()
    assert waiting(mounted) == []
    mounted.unmount()
    assert "Work" not in everything(filled)


def test_a_refused_replacement_leaves_the_message(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled, expected_log=["is not sent: it is no mail message"])
    target = file_of(mounted, 1)
    write(target.with_name("tmp"), NOT_MAIL)
    fails_with(errno.EINVAL, os.rename, target.with_name("tmp"), target)
    assert target.read_bytes() == plain(1)
    assert target.with_name("tmp").read_bytes() == NOT_MAIL
    assert len(os.listdir(target.parent)) == 4
    mounted.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_refused_change_in_place_can_be_discarded(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled, expected_log=["is not sent: it is no mail message"])
    target = file_of(mounted, 1)
    fails_with(errno.EINVAL, lambda: write(target, NOT_MAIL, sync=True))
    assert target.read_bytes() == NOT_MAIL
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}
    write(target, plain(1), sync=True)
    mounted.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_refused_rename_of_a_change_leaves_its_name(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled, expected_log=["is not sent: it is no mail message"])
    target = file_of(mounted, 1)
    names = sorted(os.listdir(target.parent))
    with open(target, "wb") as file:
        file.write(NOT_MAIL)
        file.flush()
        fails_with(errno.EINVAL, os.rename, target, target.with_name("other.eml"))
    assert sorted(os.listdir(target.parent)) == names
    assert target.read_bytes() == NOT_MAIL
    assert not target.with_name("other.eml").exists()
    write(target, plain(1), sync=True)
    mounted.unmount()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_refused_rename_of_a_change_leaves_what_it_was_to_replace(filled: Account, mount: Mounter) -> None:
    mounted = mount(filled, "--delete", "expunge", expected_log=["is not sent: it is no mail message"])
    target, other = file_of(mounted, 1), file_of(mounted, 2)
    with open(target, "wb") as file:
        file.write(NOT_MAIL)
        file.flush()
        fails_with(errno.EINVAL, os.rename, target, other)
    assert target.read_bytes() == NOT_MAIL
    assert other.read_bytes() == plain(2)
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}
    write(target, plain(10), sync=True)
    target.rename(other)
    mounted.unmount()
    assert sorted(message.content for message in held(filled).values()) == sorted([plain(3), plain(10)])


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
        mounted = mount(proxy.account(filled), expected_log=["is not sent:"])
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
    mounted = mount(account, expected_log=[r"INBOX/\w+\.eml is not sent: .*[Qq]uota"])
    target = mounted.path / "INBOX" / "big.eml"
    write(target, plain(2, 20_000))
    wait_until(lambda: os.getxattr(target, STATE) == b"unsent", "it is unsent")
    assert b"uota" in os.getxattr(target, ERROR)
    assert waiting(mounted) == [("INBOX/big.eml", "unsent")]
    fails_with(errno.EDQUOT, lambda: write(mounted.path / "INBOX" / "b.eml", plain(2, 20_000), sync=True))
    write(mounted.path / "INBOX" / "tmp", plain(3, 20_000))
    fails_with(errno.EDQUOT, os.rename, mounted.path / "INBOX" / "tmp", mounted.path / "INBOX" / "c.eml")
    assert target.read_bytes() == plain(2, 20_000)
    target.unlink()
    (mounted.path / "INBOX" / "b.eml").unlink()
    write(mounted.path / "INBOX" / "fits.eml", plain(4, 2000), sync=True)
    mounted.unmount()
    assert [message.content for message in held(account).values()] == [plain(1, 2000), plain(4, 2000)]


def test_a_mailbox_deleted_under_an_open_file(filled: Account, mount: Mounter) -> None:
    with Proxy(filled.server) as proxy:
        mounted = mount(proxy.account(filled), expected_log=["is not sent:"])
        with (mounted.path / "Work" / "new.eml").open("wb", buffering=0) as file:
            file.write(plain(10))
            with filled.client() as client:
                assert client.delete("Work")[0] == "OK"
            # A connection that knows the mailbox would make Dovecot stumble: NO [SERVERBUG].
            proxy.cut_all()
            fails_with(errno.ENOENT, _fsync_again, file.fileno())
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
    mounted = mount(filled, expected_log=["is not sent:"])
    write(mounted.path / "Work" / "bad.eml", NOT_MAIL)
    wait_until(lambda: waiting(mounted) == [("Work/bad.eml", "unsent")], "it is refused")
    command = [*mounted.command[:3], "status", "--json", str(mounted.path)]
    shown = json.loads(subprocess.run(command, env=mounted.environment, capture_output=True).stdout)
    assert [(one["path"], one["state"]) for one in shown["waiting"]] == [("Work/bad.eml", "unsent")]
    assert "no mail message" in shown["waiting"][0]["error"]
    (mounted.path / "Work" / "bad.eml").unlink()
