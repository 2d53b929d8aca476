"""What each operation means on the server, and what a program that asks for the impossible is told.

Nothing here is about the kernel: each test runs through a mount, and on the model alone.
"""

import contextlib
import errno
import sqlite3
import time

import pytest

from tests.fs.conftest import Start
from tests.support.filetree import FileTree
from tests.support.filled import DATE, MARKED, fails_with, fill, inbox
from tests.support.mail import plain
from tests.support.mailboxes import Held, all_uids, everything, held, in_order, mailboxes
from tests.support.mounting import wait_until
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Proxy

LATER = 1_750_000_000
STATE = "user.imap.state"
ERROR = "user.imap.error"
NO_MAIL = b"this is no mail message at all\n"


@pytest.fixture
def filled(user: Account) -> Account:
    """Return an account with three messages in INBOX and an empty mailbox."""
    return fill(user)


def flags_of(files: FileTree, path: str) -> set[str]:
    return set(files.getxattr(path, "user.imap.flags").decode().split())


def fetches(account: Account) -> list[bytes]:
    """The commands so far that brought bodies."""
    return [line for line in account.protocol_trace() if b"BODY.PEEK[])" in line]


def expunge(account: Account, uid: str) -> None:
    """Expunge a message in INBOX by another client."""
    with account.client() as client:
        client.select("INBOX")
        client.uid("STORE", uid, "+FLAGS.SILENT", r"(\Deleted)")
        client.uid("EXPUNGE", uid)


# ---- moving and naming


def test_a_moved_message_keeps_name_inode_times_and_cached_body(filled: Account, start: Start) -> None:
    filled.start_trace()
    files = start(filled)
    source = files.file(1)
    assert files.read(source) == plain(1)
    before = files.stat(source)
    fetched = fetches(filled)
    assert fetched
    target = source.replace("INBOX", "Work")
    files.rename(source, target)
    assert files.stat(target) == before
    assert not files.exists(source)
    assert [f"Work/{name}" for name in files.listdir("Work")] == [target]
    files.end()
    again = start(filled, cache=files.cache)
    assert again.stat(target).ino == before.ino
    assert again.read(target) == plain(1)
    assert fetches(filled) == fetched
    again.end()
    moves = [line for line in filled.protocol_trace() if b"UID MOVE" in line or b"UID COPY" in line]
    assert len(moves) == 1


def test_an_own_name_lasts_across_mounts_and_moves(filled: Account, start: Start) -> None:
    first = start(filled)
    first.rename(first.file(1), "INBOX/no mail name")
    first.end()
    second = start(filled, cache=first.cache)
    assert second.read("INBOX/no mail name") == plain(1)
    second.rename("INBOX/no mail name", "Work/other.eml")
    second.end()
    third = start(filled, cache=first.cache)
    assert third.listdir("Work") == ["other.eml"]
    third.end()
    assert everything(filled) == {"INBOX": inbox(2, 3), "Work": inbox(1)}


def test_a_name_that_is_taken_stays_with_its_message(filled: Account, start: Start) -> None:
    files = start(filled)
    mine = files.file(1).replace(".1.", ".4.")
    files.rename(files.file(1), mine)
    filled.append("INBOX", plain(1), DATE + 1)
    wait_until(lambda: len(files.listdir("INBOX")) == 4, "the new message is listed")
    assert files.stat(mine).mtime_ns == (DATE + 1) * 10**9
    assert files.getxattr(mine, "user.imap.uid") == b"1"
    assert len(set(files.listdir("INBOX"))) == 4


def test_rename_over_another_message_removes_that_one(filled: Account, start: Start) -> None:
    files = start(filled)
    first, second = files.file(1), files.file(2)
    files.rename(first, second)
    assert files.read(second) == plain(1)
    assert len(files.listdir("INBOX")) == 2
    files.end()
    assert everything(filled) == {"INBOX": inbox(1, 3), "Trash": inbox(2)}


def test_rename_onto_itself_and_of_what_is_not_there(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    files.rename(target, target)
    fails_with(errno.ENOENT, files.rename, "INBOX/none.eml", target)
    fails_with(errno.EISDIR, files.rename, target, "Work")
    files.end()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_message_that_is_open_is_moved_and_read_on(filled: Account, start: Start) -> None:
    files = start(filled)
    with files.open(files.file(1), "r") as file:
        begin = file.read(size=10)
        files.rename(files.file(1), "Work/moved.eml")
        assert begin + file.read(10) == plain(1)


# ---- deleting


def test_delete_expunge_leaves_what_other_clients_have_marked(filled: Account, start: Start) -> None:
    with filled.client() as client:
        client.select("INBOX")
        client.uid("STORE", "2", "+FLAGS.SILENT", r"(\Deleted)")
    files = start(filled, delete="expunge")
    files.unlink(files.file(1))
    files.end()
    marked = Held(plain(2), DATE + 2, MARKED | {"\\Deleted"})
    assert everything(filled) == {"INBOX": in_order(marked, *inbox(3))}


def test_delete_trash_leaves_what_other_clients_have_marked(filled: Account, start: Start) -> None:
    with filled.client() as client:
        client.select("INBOX")
        client.uid("STORE", "2", "+FLAGS.SILENT", r"(\Deleted)")
    files = start(filled)
    files.unlink(files.file(1))
    files.rename(files.file(3), "Work/moved.eml")
    files.write(files.file(2), b"more\r\n", "a")
    files.end()
    after = everything(filled)
    assert after["Trash"][0] in inbox(1) or after["Trash"][1] in inbox(1)
    # The changed message is still marked: a new version has the flags of the old one.
    assert after["INBOX"] == [Held(plain(2) + b"more\r\n", DATE + 2, MARKED | {"\\Deleted"})]
    assert after["Work"] == inbox(3)


def test_a_message_deleted_elsewhere_is_not_deleted_twice(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    expunge(filled, "1")
    fails_with(errno.ENOENT, files.unlink, target)
    assert not files.exists(target)
    files.end()
    assert everything(filled) == {"INBOX": inbox(2, 3)}


def test_a_message_that_another_client_expunged_cannot_be_moved(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    expunge(filled, "1")
    fails_with(errno.ENOENT, files.rename, target, "Work/x.eml")
    files.end()
    assert everything(filled) == {"INBOX": inbox(2, 3)}


# ---- new messages


@pytest.mark.parametrize("when", ["before closing", "after closing", "never"])
def test_the_mtime_of_a_new_file_is_its_internaldate(filled: Account, start: Start, when: str) -> None:
    files = start(filled)
    began = int(time.time())
    with files.open("Work/new.eml", "w") as file:
        file.write(plain(10))
        if when == "before closing":
            files.utime("Work/new.eml", LATER)
    if when == "after closing":
        files.utime("Work/new.eml", LATER)
    files.settle()
    mtime = files.stat("Work/new.eml").mtime_ns // 10**9
    files.end()
    (new,) = held(filled, "Work").values()
    if when == "never":
        assert began <= new.date <= time.time()
    else:
        assert new.date == LATER
    assert abs(mtime - new.date) <= 1


def test_flags_set_before_the_upload_go_with_it(filled: Account, start: Start) -> None:
    files = start(filled)
    with files.open("Work/new.eml", "w") as file:
        files.setxattr("Work/new.eml", "user.xdg.tags", b"urgent, to do")
        files.setxattr("Work/new.eml", "user.imap.seen", b"1")
        file.write(plain(10))
    assert flags_of(files, "Work/new.eml") == {"urgent", "to_do", "\\Seen"}
    files.end()
    (new,) = held(filled, "Work").values()
    assert new.flags == {"urgent", "to_do", "\\Seen"}


def test_a_new_file_keeps_name_and_inode_and_is_not_fetched(filled: Account, start: Start) -> None:
    filled.start_trace()
    files = start(filled)
    files.write("Work/new.eml", plain(10).replace(b"\r\n", b"\n"), sync=True)
    inode = files.stat("Work/new.eml").ino
    assert files.read("Work/new.eml") == plain(10)
    assert files.getxattr("Work/new.eml", "user.imap.uid") == b"1"
    files.end()
    again = start(filled, cache=files.cache)
    assert again.stat("Work/new.eml").ino == inode
    assert again.read("Work/new.eml") == plain(10)
    assert again.listdir("Work") == ["new.eml"]
    again.end()
    assert fetches(filled) == []


def test_an_empty_file_is_never_uploaded(filled: Account, start: Start) -> None:
    first = start(filled)
    first.write("Work/empty.eml", b"", sync=True)
    first.utime("Work/empty.eml", LATER)
    first.rename("Work/empty.eml", "Work/still empty.eml")
    first.settle()
    first.end()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}
    second = start(filled, cache=first.cache)
    assert second.stat("Work/still empty.eml").size == 0
    second.write("Work/still empty.eml", plain(10))
    second.end()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


def test_a_file_is_uploaded_when_its_last_writer_closes_it(filled: Account, start: Start) -> None:
    files = start(filled)
    with files.open("Work/new.eml", "w") as file:
        file.write(plain(10)[:500])
        assert files.read("Work/new.eml") == plain(10)[:500]
        files.settle()
        assert held(filled, "Work") == {}
        files.write("Work/new.eml", plain(10)[500:1000], "a")
        files.settle()
        assert held(filled, "Work") == {}
        with files.open("Work/new.eml", "a") as second:
            second.write(plain(10)[1000:])
    files.end()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


def test_fsync_by_a_writer_publishes_no_half(filled: Account, start: Start) -> None:
    """A program that fsyncs while it writes lost bytes, and left halves in Trash (``dd oflag=sync``)."""
    files = start(filled)
    text = plain(10, 30_000).replace(b"\r\n", b"\n")
    with files.open("Work/new.eml", "w") as file:
        for start_of in range(0, len(text), 4096):
            file.write(text[start_of : start_of + 4096])
            file.fsync()
            assert held(filled, "Work") == {}
        assert files.read("Work/new.eml") == text, "its bytes do not change under a writer"
    files.end()
    assert everything(filled)["Work"][0].content == plain(10, 30_000)
    assert sorted(everything(filled)) == ["INBOX", "Work"]


def test_fsync_without_a_writer_returns_when_the_server_has_it(filled: Account, start: Start) -> None:
    files = start(filled)
    files.write("Work/new.eml", plain(10))
    with files.open("Work/new.eml", "r") as file:
        file.fsync()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


def test_fsync_without_a_writer_gives_the_refusal(filled: Account, start: Start) -> None:
    files = start(filled, expected_log=["no mail message"])
    files.write("Work/new.eml", NO_MAIL)
    with files.open("Work/new.eml", "r") as file:
        for _ in range(2):
            fails_with(errno.EINVAL, file.fsync)
    files.unlink("Work/new.eml")


def test_a_file_renamed_while_it_is_written_is_uploaded_when_it_is_closed(
    filled: Account, start: Start
) -> None:
    """The version with CRLF replaced the file under the writer's offset, and bytes went wrong."""
    files = start(filled)
    text = plain(10).replace(b"\r\n", b"\n")
    with files.open("Work/tmp", "w") as file:
        file.write(text[:500])
        files.rename("Work/tmp", "Work/new.eml")
        files.settle()
        assert held(filled, "Work") == {}
        file.write(text[500:])
    files.end()
    assert sorted(everything(filled)) == ["INBOX", "Work"]
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


def test_a_file_opened_for_writing_before_it_is_uploaded_keeps_its_bytes(
    filled: Account, start: Start
) -> None:
    """What a program appends belongs behind the bytes that it sees, not behind those that are uploaded."""
    files = start(filled)
    text = plain(10).replace(b"\r\n", b"\n")
    files.write("Work/new.eml", text)
    with files.open("Work/new.eml", "r+") as file:
        files.settle()
        assert file.read() == text
        file.write(text[:10])
        file.write(text[10:] + b"more\n")
    files.end()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10) + b"more\r\n"]


def test_a_time_after_2262_does_not_keep_a_message_from_the_server(filled: Account, start: Start) -> None:
    """The cache cannot store it: the message was appended, and the file stayed unsent."""
    files = start(filled)
    files.write("Work/.new", plain(10), mtime=10_000_000_000)
    files.rename("Work/.new", "Work/new.eml")
    files.settle()
    assert files.waiting() == []
    assert files.stat("Work/new.eml").mtime_ns == 2**63 - 1
    files.end()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


def test_a_rename_to_a_message_name_does_not_wait_for_the_server(filled: Account, start: Start) -> None:
    """A copy with rsync took a round trip a file and more."""
    with Proxy(filled.server) as proxy:
        files = start(proxy.account(filled))
        proxy.fault(b"APPEND", "stall")
        files.write("Work/.new.part", plain(10), mtime=LATER)
        files.rename("Work/.new.part", "Work/new.eml")
        files.write("INBOX/tmp", plain(11), mtime=LATER)
        files.rename("INBOX/tmp", "Work/other.eml")
        assert sorted(files.waiting()) == [("Work/new.eml", "sending"), ("Work/other.eml", "sending")]
        assert "Work" not in everything(filled)
        proxy.resume()
        files.settle()
        assert everything(filled)["Work"] == in_order(Held(plain(10), LATER), Held(plain(11), LATER))
        files.end()


@pytest.mark.parametrize("refusal", [b"NO [OVERQUOTA] Full", b"NO [NOPERM] Not yours"])
def test_a_mailbox_that_takes_no_messages_says_so_before_anything_is_put_there(
    filled: Account, start: Start, refusal: bytes
) -> None:
    number = errno.EDQUOT if b"QUOTA" in refusal else errno.EACCES
    with Proxy(filled.server) as proxy:
        files = start(proxy.account(filled), expected_log=["is not uploaded:"])
        full = proxy.fault(b"APPEND", refusal, times=None)
        files.write("Work/1.eml", plain(1), mtime=LATER)
        wait_until(lambda: files.waiting() == [("Work/1.eml", "unsent")], "it is refused")
        files.write("Work/tmp", plain(2), mtime=LATER)
        fails_with(number, files.write, "Work/2.eml", plain(2))
        fails_with(number, files.rename, "Work/tmp", "Work/2.eml")
        assert sorted(files.listdir("Work")) == ["1.eml", "tmp"]
        full.cancel()

        def is_taken() -> bool:
            # Whether it takes messages again is tried every few seconds.
            try:
                files.rename("Work/tmp", "Work/2.eml")
            except OSError as error:
                assert error.errno == number
                return False
            return True

        wait_until(is_taken, "the mailbox takes messages again")
        files.settle()
        assert files.waiting() == []
        files.end()
    assert everything(filled)["Work"] == in_order(Held(plain(1), LATER), Held(plain(2), LATER))


def test_a_message_that_is_refused_concerns_no_other(filled: Account, start: Start) -> None:
    with Proxy(filled.server) as proxy:
        files = start(proxy.account(filled), expected_log=["is not uploaded:"])
        proxy.fault(b"APPEND", b"NO [TOOBIG] Too big")
        files.write("Work/1.eml", plain(1), mtime=LATER)
        wait_until(lambda: files.waiting() == [("Work/1.eml", "unsent")], "it is refused")
        files.write("Work/2.eml", plain(2), mtime=LATER)
        files.settle()
        assert files.waiting() == [("Work/1.eml", "unsent")]
        files.unlink("Work/1.eml")
        files.end()
    assert everything(filled)["Work"] == [Held(plain(2), LATER)]


def test_who_deletes_what_was_refused_can_put_other_messages_there(filled: Account, start: Start) -> None:
    with Proxy(filled.server) as proxy:
        files = start(proxy.account(filled), expected_log=["is not uploaded:"])
        proxy.fault(b"APPEND", b"NO [OVERQUOTA] Full")
        files.write("Work/1.eml", plain(1), mtime=LATER)
        wait_until(lambda: files.waiting() == [("Work/1.eml", "unsent")], "it is refused")
        files.unlink("Work/1.eml")
        files.write("Work/2.eml", plain(2), mtime=LATER)
        files.end()
    assert everything(filled)["Work"] == [Held(plain(2), LATER)]


def test_a_new_file_deleted_at_once_leaves_nothing_but_perhaps_in_trash(
    filled: Account, start: Start
) -> None:
    files = start(filled)
    files.write("Work/new.eml", plain(10))
    files.unlink("Work/new.eml")
    assert not files.exists("Work/new.eml")
    files.end()
    after = everything(filled)
    assert "Work" not in after
    assert len(after.get("Trash", [])) <= 1


def test_a_new_file_moved_while_it_is_written(filled: Account, start: Start) -> None:
    files = start(filled)
    with files.open("Work/new.eml", "w") as file:
        file.write(plain(10))
        files.rename("Work/new.eml", "INBOX/new.eml")
    assert files.listdir("Work") == []
    files.end()
    after = everything(filled)
    assert "Work" not in after
    assert [message.content for message in after["INBOX"] if message not in inbox(1, 2, 3)] == [plain(10)]


def test_what_the_server_alters_is_shown_as_the_server_has_it(filled: Account, start: Start) -> None:
    content = b"Subject: bare CR\r\n\r\none\rtwo\r\r\nthree\r"
    files = start(filled)
    files.write("Work/new.eml", content, sync=True)
    (kept,) = held(filled, "Work").values()
    assert kept.content != content
    assert files.read("Work/new.eml") == kept.content
    assert files.stat("Work/new.eml").size == len(kept.content)


# ---- changing a message


def test_a_change_replaces_the_message_and_keeps_flags_and_date(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    inode = files.stat(target).ino
    files.write(target, b"X", "r+")
    files.settle()
    assert files.stat(target).ino == inode
    assert files.read(target) == b"X" + plain(1)[1:]
    files.end()
    after = everything(filled)
    assert after["INBOX"] == in_order(Held(b"X" + plain(1)[1:], DATE + 1, MARKED), *inbox(2, 3))
    assert after["Trash"] == inbox(1)


@pytest.mark.parametrize("how", ["same bytes", "LF", "opened only", "truncated and put back", "renamed over"])
def test_a_change_of_nothing_costs_the_server_nothing(filled: Account, start: Start, how: str) -> None:
    files = start(filled)
    before = all_uids(filled)
    target = files.file(1)
    inode = files.stat(target).ino
    match how:
        case "same bytes":
            files.write(target, plain(1), "r+")
        case "LF":
            files.write(target, plain(1).replace(b"\r\n", b"\n"))
        case "opened only":
            files.open(target, "r+").close()
        case "truncated and put back":
            files.truncate(target, 1000)
            files.write(target, plain(1)[1000:], "a")
        case "renamed over":
            files.write("INBOX/tmp", plain(1))
            inode = files.stat("INBOX/tmp").ino
            files.rename("INBOX/tmp", target)
    files.settle()
    assert files.read(target) == plain(1)
    assert files.stat(target).ino == inode
    files.end()
    if how == "truncated and put back":
        # Two programs, so that the half may have been uploaded between them.
        assert everything(filled)["INBOX"] == inbox(1, 2, 3)
    else:
        assert all_uids(filled) == before
        assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_change_that_follows_a_move(filled: Account, start: Start) -> None:
    files = start(filled)
    files.rename(files.file(1), "Work/moved.eml")
    files.write("Work/moved.eml", b"more\r\n", "a")
    files.rename("Work/moved.eml", "INBOX/back.eml")
    files.end()
    after = everything(filled)
    assert "Work" not in after
    assert after["INBOX"] == in_order(Held(plain(1) + b"more\r\n", DATE + 1, MARKED), *inbox(2, 3))
    assert after["Trash"] == inbox(1)


def test_many_changes_of_one_message_end_in_one_message(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    for number in range(10):
        files.write(target, b"line %d\r\n" % number, "a")
    expected = plain(1) + b"".join(b"line %d\r\n" % number for number in range(10))
    assert files.read(target) == expected
    files.end()
    assert everything(filled)["INBOX"] == in_order(Held(expected, DATE + 1, MARKED), *inbox(2, 3))


def test_a_message_changed_here_and_expunged_there_is_a_new_one(filled: Account, start: Start) -> None:
    files = start(filled)
    with files.open(files.file(1), "a") as file:
        file.write(b"more\r\n")
        expunge(filled, "1")
    files.end()
    after = everything(filled)
    assert after == {"INBOX": in_order(Held(plain(1) + b"more\r\n", DATE + 1, MARKED), *inbox(2, 3))}


def test_flags_are_on_the_new_version(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    files.setxattr(target, "user.xdg.tags", b"mine")
    files.write(target, b"more\r\n", "a")
    files.end()
    changed = [m for m in everything(filled)["INBOX"] if m not in inbox(2, 3)]
    assert [m.flags for m in changed] == [MARKED | {"mine"}]


def test_deleting_a_message_with_changes_deletes_it(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    files.write(target, b"more\r\n", "a")
    files.unlink(target)
    assert len(files.listdir("INBOX")) == 2
    files.end()
    after = everything(filled)
    assert after["INBOX"] == inbox(2, 3)
    assert all(m.content.startswith(plain(1)) for m in after["Trash"])


# ---- flags


def test_every_flag_attribute_changes_the_flags_on_the_server(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)

    def on_server() -> frozenset[str]:
        return held(filled)[1].flags

    files.setxattr(target, "user.imap.seen", b"0")
    assert on_server() == {"\\Flagged"} == flags_of(files, target)
    files.removexattr(target, "user.imap.flagged")
    assert on_server() == frozenset()
    for name in ("seen", "answered", "flagged", "deleted", "draft"):
        files.setxattr(target, f"user.imap.{name}", b"1")
        assert on_server() == {f"\\{name.capitalize()}"} == flags_of(files, target)
        assert files.getxattr(target, f"user.imap.{name}") == b"1"
        files.removexattr(target, f"user.imap.{name}")
        assert on_server() == frozenset()
        assert files.getxattr(target, f"user.imap.{name}") == b"0"
    files.setxattr(target, "user.imap.flags", b"\\Seen $Forwarded work")
    assert on_server() == {"\\Seen", "$Forwarded", "work"}
    files.setxattr(target, "user.xdg.tags", b"home,to do")
    assert on_server() == {"\\Seen", "home", "to_do"}
    assert set(files.getxattr(target, "user.xdg.tags").split(b",")) == {b"home", b"to_do"}
    files.removexattr(target, "user.xdg.tags")
    assert on_server() == {"\\Seen"}
    files.setxattr(target, "user.imap.flags", b"\\seen \\ANSWERED")
    assert on_server() == {"\\Seen", "\\Answered"}
    files.removexattr(target, "user.imap.flags")
    assert on_server() == frozenset()
    files.end()
    assert all_uids(filled)["INBOX"] == [1, 2, 3]


def test_flags_that_cannot_be_are_refused(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
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
            files.setxattr(target, name, value)
        assert caught.value.errno == number, (name, value)
    fails_with(errno.EPERM, files.removexattr, target, "user.imap.uid")
    fails_with(errno.ENODATA, files.removexattr, target, "user.comment")
    fails_with(errno.EOPNOTSUPP, files.setxattr, "Work", "user.imap.seen", b"1")
    files.end()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_change_of_flags_does_not_undo_that_of_another_client(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    assert flags_of(files, target) == MARKED
    with filled.client() as client:
        client.select("INBOX")
        client.uid("STORE", "1", "FLAGS.SILENT", r"(\Answered theirs)")
    files.setxattr(target, "user.imap.draft", b"1")
    assert held(filled)[1].flags == {"\\Answered", "theirs", "\\Draft"}
    assert flags_of(files, target) == {"\\Answered", "theirs", "\\Draft"}


# ---- mailboxes


def test_mkdir_makes_a_subscribed_mailbox_and_rmdir_deletes_it(filled: Account, start: Start) -> None:
    files = start(filled)
    files.mkdir("Größe")
    files.mkdir("Größe/Sub & more")
    assert {"Gr&APYA3w-e", "Gr&APYA3w-e/Sub &- more"} <= set(mailboxes(filled))
    with filled.client() as client:
        assert any(b"Gr&APYA3w-e/Sub &- more" in (line or b"") for line in client.lsub()[1])
    fails_with(errno.EEXIST, files.mkdir, "Größe")
    fails_with(errno.ENOTEMPTY, files.rmdir, "Größe")
    files.rmdir("Größe/Sub & more")
    files.rmdir("Größe")
    assert not files.exists("Größe")
    files.end()
    assert not [name for name in mailboxes(filled) if name.startswith("Gr")]


def test_rmdir_of_what_is_not_empty_on_the_server(filled: Account, start: Start) -> None:
    files = start(filled)
    assert files.listdir("Work") == []
    filled.append("Work", plain(10), DATE)
    fails_with(errno.ENOTEMPTY, files.rmdir, "Work")
    fails_with(errno.EPERM, files.rmdir, "INBOX")
    fails_with(errno.ENOENT, files.rmdir, "None")
    fails_with(errno.ENOTDIR, files.rmdir, files.file(1))
    files.end()
    assert everything(filled)["Work"] == [Held(plain(10), DATE)]


def test_rmdir_of_what_holds_only_a_local_file(filled: Account, start: Start) -> None:
    files = start(filled)
    files.write("Work/notes", b"mine")
    fails_with(errno.ENOTEMPTY, files.rmdir, "Work")
    assert files.read("Work/notes") == b"mine"


def test_a_renamed_mailbox_keeps_children_inodes_and_cached_bodies(filled: Account, start: Start) -> None:
    filled.deliver("Work/Sub", [(plain(5), DATE + 5, "S")])
    filled.start_trace()
    files = start(filled)
    message = files.file(1, "Work/Sub")
    assert files.read(message) == plain(5)
    inode, fetched = files.stat(message).ino, fetches(filled)
    files.mkdir("Play")
    files.rename("Work", "Play/New")
    moved = message.replace("Work", "Play/New")
    assert files.stat(moved).ino == inode
    files.end()
    again = start(filled, cache=files.cache)
    assert again.stat(moved).ino == inode
    assert again.read(moved) == plain(5)
    assert fetches(filled) == fetched
    again.write("Play/New/new.eml", plain(6), mtime=LATER)
    again.end()
    after = everything(filled)
    assert after["Play/New/Sub"] == [Held(plain(5), DATE + 5, frozenset({"\\Seen"}))]
    assert after["Play/New"] == [Held(plain(6), LATER)]
    assert "Work" not in mailboxes(filled)


def test_drafts_go_with_their_mailbox(filled: Account, start: Start) -> None:
    files = start(filled)
    files.write("Work/notes", b"mine")
    with files.open("Work/new.eml", "w") as file:
        file.write(plain(10))
        files.rename("Work", "Play")
    assert files.read("Play/notes") == b"mine"
    files.end()
    assert [message.content for message in everything(filled)["Play"]] == [plain(10)]
    again = start(filled, cache=files.cache)
    assert again.read("Play/notes") == b"mine"


def test_inbox_and_directories_onto_others_are_not_renamed(filled: Account, start: Start) -> None:
    filled.deliver("Other", [])
    files = start(filled)
    before = mailboxes(filled)
    fails_with(errno.EPERM, files.rename, "INBOX", "Old")
    fails_with(errno.ENOTEMPTY, files.rename, "Work", "Other")
    files.end()
    assert mailboxes(filled) == before
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


RESERVED = [".Trash", ".Trash-1000", ".trash", ".text", ".parts", ".search", ".maildir"]


@pytest.mark.parametrize("name", RESERVED)
def test_names_of_directories_that_are_reserved(filled: Account, start: Start, name: str) -> None:
    files = start(filled)
    before = mailboxes(filled)
    files.mkdir(".tmp")
    for parent in ("", "Work/", ".tmp/"):
        fails_with(errno.EPERM, files.mkdir, f"{parent}{name}")
        fails_with(errno.EPERM, files.rename, "Trash", f"{parent}{name}")
        fails_with(errno.EPERM, files.rename, ".tmp", f"Work/{name}")
    files.end()
    assert mailboxes(filled) == before


def test_a_new_mailbox_does_not_get_the_inode_of_a_file_that_waits(filled: Account, start: Start) -> None:
    """After a power cut the database may not know that it has given the number to a file."""
    files = start(filled)
    with files.open("INBOX/note.txt", "w") as file:
        file.write(b"text")
    ino = files.stat("INBOX/note.txt").ino
    files.end()
    (database,) = files.cache.rglob("cache.db")
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'next_ino'", (ino,))
    with filled.client() as client:
        client.create("New")
    again = start(filled, cache=files.cache)
    assert again.stat("INBOX/note.txt").ino == ino
    assert again.stat("New").ino > ino


# ---- scratch directories


def test_a_directory_that_begins_with_a_dot_is_local(filled: Account, start: Start) -> None:
    """Programs that made one for their temporary files transferred nothing, and some said nothing of it."""
    before = mailboxes(filled)
    files = start(filled)
    files.mkdir("Work/.~tmp~")
    files.mkdir("Work/.~tmp~/below")
    assert files.listdir("Work/.~tmp~") == ["below"]
    fails_with(errno.EEXIST, files.mkdir, "Work/.~tmp~")
    # What is in one is local whatever its name, until it is renamed out.
    for name in ("a.eml", "below/b.eml"):
        files.write(f"Work/.~tmp~/{name}", plain(8), mtime=LATER)
        assert files.getxattr(f"Work/.~tmp~/{name}", STATE) == b"local"
    files.settle()
    assert files.waiting() == []
    assert "Work" not in everything(filled)
    fails_with(errno.ENOTEMPTY, files.rmdir, "Work/.~tmp~")
    fails_with(errno.ENOTEMPTY, files.rmdir, "Work")
    # It never becomes a mailbox, and no mailbox becomes one.
    for name in ("Work/tmp", "tmp", "INBOX/tmp"):
        fails_with(errno.EPERM, files.rename, "Work/.~tmp~", name)
    fails_with(errno.EPERM, files.rename, "Work", ".Work")
    fails_with(errno.EPERM, files.rename, "Trash", "Work/.~tmp~/Trash")
    files.rename("Work/.~tmp~", "INBOX/.moved")
    assert files.read("INBOX/.moved/below/b.eml") == plain(8)
    files.rename("INBOX/.moved/a.eml", "Work/a.eml")
    assert everything(filled)["Work"] == [Held(plain(8), LATER)]
    # Over a message, as an update of it does.
    files.rename("INBOX/.moved/below/b.eml", files.file(1))
    files.rmdir("INBOX/.moved/below")
    files.rmdir("INBOX/.moved")
    assert not files.exists("INBOX/.moved")
    files.end()
    assert mailboxes(filled) == before
    assert everything(filled)["INBOX"] == in_order(Held(plain(8), LATER, MARKED), *inbox(2, 3))
    assert everything(filled)["Trash"] == inbox(1)


def test_a_message_is_not_moved_into_a_scratch_directory(filled: Account, start: Start) -> None:
    """It would leave the account; mv(1) copies it then, and deletes the message as rm does."""
    files = start(filled)
    files.mkdir("INBOX/.tmp")
    changed = files.file(2)
    fails_with(errno.EXDEV, files.rename, files.file(1), "INBOX/.tmp/x.eml")
    with files.open(changed, "a") as file:
        file.write(b"more\r\n")
        fails_with(errno.EXDEV, files.rename, changed, "INBOX/.tmp/x.eml")
    assert files.listdir("INBOX/.tmp") == []
    files.write("INBOX/new.txt", b"local")
    files.rename("INBOX/new.txt", "INBOX/.tmp/x.eml")
    assert files.listdir("INBOX/.tmp") == ["x.eml"]
    files.end()
    assert len(everything(filled)["INBOX"]) == 3


@pytest.mark.parametrize("kept", ["the cache", "only the spool"])
def test_scratch_directories_survive_a_remount(filled: Account, start: Start, kept: str) -> None:
    """They are as durable as the spool: the cache can be rebuilt."""
    first = start(filled)
    first.mkdir(".top")
    first.mkdir("Work/.tmp")
    first.mkdir("Work/.tmp/below")
    first.mkdir("Work/.empty")
    names = [".top/1.eml", "Work/.tmp/2.eml", "Work/.tmp/below/3.eml"]
    for name in names:
        first.write(name, name.encode())
    first.end()
    if kept == "only the spool":
        for file in first.cache.glob("*/cache.db*"):
            file.unlink()
    second = start(filled, cache=first.cache)
    assert {name: second.read(name) for name in names} == {name: name.encode() for name in names}
    assert second.listdir("Work/.empty") == []
    # They follow their mailbox.
    second.rename("Work", "Other")
    second.end()
    third = start(filled, cache=first.cache)
    assert third.read("Other/.tmp/below/3.eml") == b"Work/.tmp/below/3.eml"
    third.unlink("Other/.tmp/below/3.eml")
    third.rmdir("Other/.tmp/below")
    third.end()
    fourth = start(filled, cache=first.cache)
    assert sorted(fourth.listdir("Other")) == [".empty", ".tmp"]
    assert fourth.listdir("Other/.tmp") == ["2.eml"]
    fourth.end()


def test_scratch_directories_of_a_deleted_mailbox_move_to_the_top(filled: Account, start: Start) -> None:
    first = start(filled)
    for name in ("Work/.tmp", "Work/.tmp/below"):
        first.mkdir(name)
        first.write(f"{name}/x.eml", name.encode())
    first.end()
    with filled.client() as client:
        client.delete("Work")
    for _ in range(2):
        files = start(filled, cache=first.cache)
        assert "Work" not in files.listdir()
        assert files.read(".tmp/x.eml") == b"Work/.tmp"
        assert files.read(".tmp/below/x.eml") == b"Work/.tmp/below"
        files.end()


# ---- what is no mail


def test_a_scratch_file_is_local_and_outlives_the_mount(filled: Account, start: Start) -> None:
    filled.start_trace()
    first = start(filled)
    first.write("Work/.x.eml.swp", b"From: me\r\n\r\nnot to be sent", sync=True, mtime=LATER)
    first.write("Work/#x#", b"x" * 300_000)
    first.write("top", b"at the top")
    assert first.getxattr("Work/.x.eml.swp", STATE) == b"local"
    first.truncate("Work/.x.eml.swp", 1_000_001)
    first.utime("Work/.x.eml.swp", LATER)
    first.end()
    second = start(filled, cache=first.cache)
    shown = second.stat("Work/.x.eml.swp")
    assert (shown.size, shown.mtime_ns) == (1_000_001, LATER * 10**9)
    assert second.read("Work/.x.eml.swp").startswith(b"From: me\r\n\r\nnot to be sent\0\0\0\0")
    assert second.read("Work/#x#") == b"x" * 300_000
    assert second.read("top") == b"at the top"
    second.rename("Work/.x.eml.swp", "Work/.other")
    second.unlink("Work/#x#")
    second.end()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}
    assert not [line for line in filled.protocol_trace() if line.startswith(b"APPEND")]


def test_a_message_name_at_the_top_is_no_place_for_mail(filled: Account, start: Start) -> None:
    files = start(filled)
    fails_with(errno.EPERM, files.write, "new.eml", plain(1))
    files.write("scratch", plain(1))
    fails_with(errno.EPERM, files.rename, "scratch", "new.eml")
    assert files.read("scratch") == plain(1)


def test_what_is_no_mail_is_kept_unsent_and_said_so(filled: Account, start: Start) -> None:
    files = start(filled, expected_log=[r"Work/new\.eml .* no mail message"])
    files.write("Work/new.eml", NO_MAIL)
    wait_until(lambda: files.getxattr("Work/new.eml", STATE) == b"unsent", "it is unsent")
    assert b"no mail message" in files.getxattr("Work/new.eml", ERROR)
    assert files.waiting() == [("Work/new.eml", "unsent")]
    assert files.read("Work/new.eml") == NO_MAIL
    files.end()
    again = start(filled, cache=files.cache)
    assert again.getxattr("Work/new.eml", STATE) == b"unsent"
    assert again.read("Work/new.eml") == NO_MAIL
    # Corrected, it is uploaded.
    again.write("Work/new.eml", plain(10), sync=True)
    again.end()
    assert [message.content for message in held(filled, "Work").values()] == [plain(10)]


def test_what_is_no_mail_is_einval_where_a_program_waits(filled: Account, start: Start) -> None:
    files = start(filled, expected_log=["no mail message"])
    fails_with(errno.EINVAL, lambda: files.write("Work/new.eml", NO_MAIL, sync=True))
    assert files.getxattr("Work/new.eml", STATE) == b"unsent"
    files.write("Work/scratch", NO_MAIL)
    fails_with(errno.EINVAL, files.rename, "Work/scratch", "Work/renamed.eml")
    assert files.read("Work/scratch") == NO_MAIL
    assert not files.exists("Work/renamed.eml")
    assert files.getxattr("Work/scratch", STATE) == b"local"
    files.unlink("Work/new.eml")
    assert files.waiting() == []
    files.end()
    assert "Work" not in everything(filled)


def test_a_refused_replacement_leaves_the_message(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    files.write("INBOX/tmp", NO_MAIL)
    fails_with(errno.EINVAL, files.rename, "INBOX/tmp", target)
    assert files.read(target) == plain(1)
    assert files.read("INBOX/tmp") == NO_MAIL
    assert len(files.listdir("INBOX")) == 4
    files.end()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_refused_change_in_place_can_be_discarded(filled: Account, start: Start) -> None:
    files = start(filled, expected_log=["no mail message"])
    target = files.file(1)
    fails_with(errno.EINVAL, lambda: files.write(target, NO_MAIL, sync=True))
    assert files.read(target) == NO_MAIL
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}
    files.write(target, plain(1), sync=True)
    files.end()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_refused_rename_of_a_change_leaves_its_name(filled: Account, start: Start) -> None:
    files = start(filled)
    target = files.file(1)
    names = sorted(files.listdir("INBOX"))
    files.write(target, NO_MAIL)
    fails_with(errno.EINVAL, files.rename, target, "INBOX/other.eml")
    assert sorted(files.listdir("INBOX")) == names
    assert files.read(target) == NO_MAIL
    files.write(target, plain(1), sync=True)
    files.end()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}


def test_a_refused_rename_of_a_change_leaves_what_it_was_to_replace(filled: Account, start: Start) -> None:
    files = start(filled, delete="expunge")
    target, other = files.file(1), files.file(2)
    files.write(target, NO_MAIL)
    fails_with(errno.EINVAL, files.rename, target, other)
    assert files.read(target) == NO_MAIL
    assert files.read(other) == plain(2)
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}
    files.write(target, plain(10), sync=True)
    files.rename(target, other)
    files.end()
    assert sorted(message.content for message in held(filled).values()) == sorted([plain(3), plain(10)])


# ---- deleted while open, and names that cannot be


@pytest.mark.parametrize("how", ["rm", "mv"])
@pytest.mark.parametrize("lacks", [(), ("UIDPLUS",), ("MOVE", "UIDPLUS")], ids=["nothing", "UIDPLUS", "both"])
def test_a_message_deleted_while_it_is_open_for_writing_brings_nothing_back(
    filled: Account, start: Start, how: str, lacks: tuple[str, ...]
) -> None:
    """A write to it made an entry with an empty name, and the mailbox could never be listed again."""
    with Proxy(filled.server, hide=lacks) as proxy:
        files = start(proxy.account(filled))
        name, other, third = (files.file(uid) for uid in (1, 2, 3))
        with files.open(name, "r+") as file:
            if how == "rm":
                files.unlink(name)
            else:
                files.rename(other, name)
            with contextlib.suppress(OSError):
                file.write(b"X-Late: 1\r\n")
        stays = name if how == "mv" else other
        left = sorted(path.removeprefix("INBOX/") for path in (stays, third))
        assert sorted(files.listdir("INBOX")) == left
        files.settle()
        assert sorted(files.listdir("INBOX")) == left
        files.end()
        again = start(proxy.account(filled), cache=files.cache)
        assert sorted(again.listdir("INBOX")) == left
        assert again.waiting() == []
        again.end()


def test_a_name_is_at_most_255_bytes_long(filled: Account, start: Start) -> None:
    """Names of up to 1,004 bytes were accepted, which other programs and file systems cannot copy."""
    files = start(filled)
    longest = "x" * 251 + ".eml"
    source = files.file(1)
    for name in ("INBOX/x" + longest, "INBOX/" + "x" * 1000, "x" * 256, ".x" + "x" * 254):
        fails_with(errno.ENAMETOOLONG, files.write, name, plain(9))
        fails_with(errno.ENAMETOOLONG, files.rename, source, name)
        fails_with(errno.ENAMETOOLONG, files.rename, "Work", name)
        fails_with(errno.ENAMETOOLONG, files.mkdir, name)
        fails_with(errno.ENAMETOOLONG, files.unlink, name)
        fails_with(errno.ENAMETOOLONG, files.rmdir, name)
        fails_with(errno.ENAMETOOLONG, files.stat, name)
    files.rename(source, "INBOX/" + longest)
    assert longest in files.listdir("INBOX")


# ---- mailboxes that other clients rename or delete while files wait


@pytest.mark.parametrize("when", ["while the server is away", "just then"])
def test_files_follow_a_mailbox_that_another_client_renames(filled: Account, start: Start, when: str) -> None:
    """They were unsent, 'Mailbox doesn't exist', until somebody thought of 'imapfs retry'."""
    filled.append("Work", plain(5), DATE)
    with Proxy(filled.server, hide=("NOTIFY", "IDLE")) as proxy:
        files = start(
            proxy.account(filled),
            expected_log=["offline: "] if when != "just then" else [],
        )
        files.listdir("Work")
        if when != "just then":
            proxy.refuse()
            proxy.cut_all()
            files.write("Work/new.eml", plain(9), mtime=LATER)
            files.settle()
        with filled.client() as client:
            assert client.rename("Work", "Other")[0] == "OK"
        if when == "just then":
            files.write("Work/new.eml", plain(9), mtime=LATER)
        proxy.accept()
        wait_until(lambda: len(everything(filled).get("Other", [])) == 2, "it is uploaded where it belongs")
        wait_until(lambda: files.waiting() == [], "nothing waits")
        assert "Work" not in mailboxes(filled)
        assert files.read("Other/new.eml") == plain(9)
        files.end()


def test_files_of_a_deleted_mailbox_are_uploaded_when_it_is_found_again(
    filled: Account, start: Start
) -> None:
    """They are at the top of the mount, where a person sees them, and go on without a manual retry."""
    lost = ["its mailbox was deleted", "is not uploaded: its mailbox was deleted"]
    with Proxy(filled.server) as proxy:
        files = start(proxy.account(filled), expected_log=[*lost, "offline: "])
        files.listdir("Work")
        proxy.refuse()
        proxy.cut_all()
        files.write("Work/new.eml", plain(9), mtime=LATER)
        files.settle()
        with filled.client() as client:
            assert client.delete("Work")[0] == "OK"
        proxy.accept()
        wait_until(lambda: files.waiting() == [("new.eml", "unsent")], "it is at the top")
        assert b"its mailbox was deleted" in files.getxattr("new.eml", ERROR)
        assert files.read("new.eml") == plain(9)
        files.end()
        again = start(proxy.account(filled), cache=files.cache)
        assert again.waiting() == [("new.eml", "unsent")]
        with filled.client() as client:
            assert client.create("Work")[0] == "OK"
        wait_until(lambda: everything(filled).get("Work") == [Held(plain(9), LATER)], "it is uploaded")
        wait_until(lambda: again.waiting() == [], "nothing waits")
        wait_until(lambda: len(again.listdir("Work")) == 1, "it is shown once")
        assert not again.exists("new.eml")
        again.end()


def test_a_message_makes_a_mailbox_of_what_is_only_a_parent(filled: Account, start: Start) -> None:
    with filled.client() as client:
        client.create("Parent/Below")
    files = start(filled)
    assert files.listdir("Parent") == ["Below"]
    files.write("Parent/one.eml", plain(7), sync=True)
    files.rename(files.file(1), "Parent/moved.eml")
    files.settle()
    assert sorted(files.listdir("Parent")) == ["Below", "moved.eml", "one.eml"]
    assert {one.content for one in held(filled, "Parent").values()} == {plain(1), plain(7)}
    ino = files.stat("Parent/one.eml").ino
    files.end()
    again = start(filled, cache=files.cache)
    assert again.stat("Parent/one.eml").ino == ino
    assert sorted(again.listdir("Parent")) == ["Below", "moved.eml", "one.eml"]


def test_a_message_that_the_server_lets_no_mailbox_hold_is_refused(filled: Account, start: Start) -> None:
    with filled.client() as client:
        client.create("Parent/Below")
    with Proxy(filled.server) as proxy:
        files = start(proxy.account(filled))
        proxy.fault(b"CREATE", b"NO [CANNOT] Not here", times=None)
        assert files.listdir("Parent") == ["Below"]
        fails_with(errno.EPERM, files.write, "Parent/one.eml", plain(7))
        fails_with(errno.EPERM, files.rename, files.file(1), "Parent/moved.eml")
        files.end()
    assert everything(filled) == {"INBOX": inbox(1, 2, 3)}
