"""The database and the body files by themselves: identity, eviction, damage, and what is cleaned up."""

import contextlib
import errno
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import trio

from imapfs.errors import CacheError
from imapfs.model import ROOT, Ino, ModSeq, Uid, UidValidity
from imapfs.store import database
from imapfs.store.bodies import SMALL, BodyStore, IncomingBody
from imapfs.store.cache import Cache
from imapfs.store.database import Database
from imapfs.store.rows import Directory, NewMessage, Node
from tests.conftest import ExpectedLog

DATE = 1_700_000_000
INBOX = Directory((b"INBOX",), b"INBOX", b"/", True, "")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    opened = Cache.open(tmp_path / "cache", "subject")
    yield opened
    opened.close()


def inbox(cache: Cache) -> Ino:
    cache.set_tree([INBOX])
    node = cache.child(ROOT, b"INBOX")
    assert node is not None
    return node.ino


def message(uid: int, size: int = 10, subject: str = "Report", flags: str = "") -> NewMessage:
    return NewMessage(
        Uid(uid), size, DATE, 0, flags, ModSeq(1), subject, "Alice", "Alice <a@example.org>", f"<{uid}@x>"
    )


def keep(cache: Cache, store: BodyStore, ino: Ino, content: bytes) -> Node:
    """Cache a body as a download that has come to its end does."""
    incoming = IncomingBody(store, len(content))
    incoming.write(content)
    node = cache.node(ino)
    assert node is not None
    assert node.uid is not None
    with store.lend_pack() as pack:
        body = incoming.keep(ino, node.uid, pack)
        assert body is not None
        store.add([body])
    incoming.discard()
    node = cache.node(ino)
    assert node is not None
    return node


def place(store: BodyStore, node: Node) -> tuple[Path, int]:
    """The file that a body is in, and its offset there."""
    if node.pack is None:
        return store.path(node.ino), 0
    return store.directory / "packs" / str(node.pack), node.offset


async def given_out(store: BodyStore, node: Node) -> bytes | None:
    """What the store says a body is."""
    if node.pack is not None:
        return store.load(node)
    fd = await store.open(node)
    if fd is None:
        return None
    try:
        return os.pread(fd, node.size + 1, 0)
    finally:
        os.close(fd)


# -- identity


def test_inode_is_never_used_again(tmp_path: Path) -> None:
    seen: set[int] = set()
    for _ in range(3):
        cache = Cache.open(tmp_path / "cache", "subject")
        box = inbox(cache)
        for _ in range(2):
            new = {ino for ino, _ in cache.add_messages(box, [message(uid) for uid in range(1, 101)])}
            assert len(new) == 100
            assert not new & seen
            seen |= new
            assert {gone.ino for gone in cache.reset(box, UidValidity(7))} == new
        cache.close()
        # As a newer version or damage has it, and at once, as no clock may be needed for this.
        for path in (tmp_path / "cache").glob("cache.db*"):
            path.unlink()


def test_message_known_already_keeps_inode_and_name(cache: Cache) -> None:
    box = inbox(cache)
    [(ino, name)] = cache.add_messages(box, [message(1)])
    assert cache.add_messages(box, [message(1, subject="Other", flags="\\Seen")]) == []
    node = cache.message(box, Uid(1))
    assert node is not None
    assert (node.ino, node.name) == (ino, name)
    assert cache.flags(box) == {1: "\\Seen"}


def test_other_naming_renames_every_message_and_keeps_inodes(tmp_path: Path) -> None:
    names: dict[str, dict[int, bytes | None]] = {}
    inos: list[dict[int, int]] = []
    for scheme in ("subject", "uid", "subject"):
        cache = Cache.open(tmp_path / "cache", scheme)
        box = inbox(cache)
        cache.add_messages(box, [message(1), message(2, subject="2.eml"), message(3, subject="1")])
        nodes = cache.children(box, 0, 10)
        names.setdefault(scheme, {int(n.uid or 0): n.name for n in nodes})
        assert names[scheme] == {int(n.uid or 0): n.name for n in nodes}
        inos.append({int(n.uid or 0): n.ino for n in nodes})
        cache.close()
    assert names["uid"] == {1: b"1.eml", 2: b"2.eml", 3: b"3.eml"}
    assert names["subject"][1] == b"2023-11-14_2213_Alice_Report.1.eml"
    assert inos[0] == inos[1] == inos[2]


def names_in(cache: Cache, box: Ino) -> dict[int, bytes | None]:
    return {int(node.uid or 0): node.name for node in cache.children(box, 0, 100)}


def test_messages_named_by_an_older_version_are_renamed_once(tmp_path: Path) -> None:
    """Without asking the server for anything: a mailbox is listed for hours where it has a million messages.

    Programs that look only into directories and files that have changed must find the new names: a backup
    would miss them, and delete what it has under the old ones.
    """
    cache = Cache.open(tmp_path / "cache", "subject")
    box = inbox(cache)
    cache.add_messages(box, [message(1), message(2), message(3), message(4, subject="")])
    cache.rename(Ino(cache.message(box, Uid(2)).ino), b"mine.eml")  # type: ignore[union-attr]
    cache.hide(Ino(cache.message(box, Uid(3)).ino))  # type: ignore[union-attr]
    with cache._database.write() as db:
        db.execute("UPDATE meta SET value = 'subject' WHERE key = 'names'")
        db.execute("DELETE FROM meta WHERE key = 'own_mail'")
        db.execute("UPDATE node SET name = '2023-11-14_Alice_Report.1.eml' WHERE uid = 1")
    before = {node.uid: node for node in cache.children(ROOT, 0, 10) + cache.children(box, 0, 10)}
    cache.close()

    cache = Cache.open(tmp_path / "cache", "subject")
    assert names_in(cache, box) == {
        1: b"2023-11-14_2213_Alice_Report.1.eml",
        2: b"mine.eml",
        4: b"2023-11-14_2213_Alice.4.eml",
    }
    after = {node.uid: node for node in cache.children(ROOT, 0, 10) + cache.children(box, 0, 10)}
    for uid, node in after.items():
        was = before[uid]
        assert (node.ino, node.size) == (was.ino, was.size)
        assert (node.ctime > was.ctime) == (uid in (None, Uid(1)))
        assert (node.mtime > was.mtime) == (uid is None)
    cache.close()

    cache = Cache.open(tmp_path / "cache", "subject")
    assert {node.uid: node for node in cache.children(ROOT, 0, 10) + cache.children(box, 0, 10)} == after
    cache.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_cache_for_which_a_full_disk_has_no_room_is_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_log: ExpectedLog, number: int
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise sqlite3.OperationalError("unable to open database file")

    def refuse_file(*_: object, **__: object) -> NoReturn:
        raise OSError(number, "full")

    expected_log("is the disk full|keeps it in memory")
    monkeypatch.setattr(database, "_connect", refuse)
    with pytest.raises(CacheError, match="cannot open the cache"):
        Cache.open(tmp_path / "cache", "subject")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse_file)
    cache = Cache.open(tmp_path / "cache", "subject")
    assert cache.new_ino() > 1 << 50
    assert cache.children(ROOT, 0, 1) == []
    cache.close()


def test_a_full_disk_prevents_no_mount_although_messages_need_new_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_log: ExpectedLog
) -> None:
    """At stake: files that wait for the server and are in reach only through a mount."""
    cache = Cache.open(tmp_path / "cache", "uid")
    box = inbox(cache)
    cache.add_messages(box, [message(uid) for uid in range(1, 501)])
    before = cache.children(ROOT, 0, 10) + cache.children(box, 0, 1000)
    cache.close()

    def open_full(directory: Path) -> Database:
        made = open_as_usual(directory)
        with made.read() as db:
            (pages,) = db.execute("PRAGMA page_count").fetchone()
            db.execute(f"PRAGMA max_page_count = {pages}")
        return made

    open_as_usual = Database.open
    with monkeypatch.context() as full:
        full.setattr(Database, "open", open_full)
        expected_log("messages keep their old names until a later mount: .*full")
        cache = Cache.open(tmp_path / "cache", "subject")
    assert cache.children(ROOT, 0, 10) + cache.children(box, 0, 1000) == before
    cache.close()
    cache = Cache.open(tmp_path / "cache", "subject")
    assert names_in(cache, box)[1] == b"2023-11-14_2213_Alice_Report.1.eml"
    cache.close()


@pytest.mark.parametrize("use", ["\\Sent", "\\Drafts"])
def test_own_mail_is_named_after_its_recipient(cache: Cache, use: str) -> None:
    cache.set_tree([INBOX, Directory((b"Mine",), b"Mine", b"/", True, use)])
    here, there = (node.ino for node in cache.children(ROOT, 0, 10))
    to_bob = [message(1)._replace(recipient="Bob"), message(2)]
    cache.add_messages(here, to_bob)
    cache.add_messages(there, to_bob)
    assert names_in(cache, here) == {
        1: b"2023-11-14_2213_Alice_Report.1.eml",
        2: b"2023-11-14_2213_Alice_Report.2.eml",
    }
    own = {1: b"2023-11-14_2213_Bob_Report.1.eml", 2: b"2023-11-14_2213_Report.2.eml"}
    assert names_in(cache, there) == own
    [(ino, name)] = cache.add_messages(there, [message(3)._replace(recipient="Bob")])
    cache.rename(ino, b"mine.eml")
    cache.hide(ino)
    cache.show(ino)
    assert names_in(cache, there) == {**own, 3: name}
    assert cache.relocate(ino, here, message(4)._replace(recipient="Bob"), same_bytes=True).endswith(
        b"_Alice_Report.4.eml"
    )
    assert cache.relocate(ino, there, message(4)._replace(recipient="Bob"), same_bytes=True).endswith(
        b"_Bob_Report.4.eml"
    )


def test_mailboxes_of_own_mail_may_be_configured(tmp_path: Path) -> None:
    """For servers that mark none. A change of the configuration renames what is in these mailboxes."""
    paths = [(b"INBOX",), (b"a",), (b"a", b"Gesendet")]
    tree = [Directory(path, b"/".join(path), b"/", True, "") for path in paths]
    found = []
    for own_mail in ((), ("a/Gesendet",), ("a/Gesendet", "a"), ("Gesendet", "INBOX")):
        cache = Cache.open(tmp_path / "cache", "{from}.{uid}", dict.fromkeys(own_mail, "\\Sent"))
        cache.set_tree(tree)
        boxes = [cache.directory_at(path) for path in paths]
        for box in boxes:
            assert box is not None
            cache.add_messages(box, [message(1)._replace(recipient="Bob")])
        found.append([names_in(cache, box)[1] for box in boxes if box is not None])
        cache.close()
    alice, bob = b"Alice.1.eml", b"Bob.1.eml"
    assert found == [[alice, alice, alice], [alice, alice, bob], [alice, bob, bob], [bob, alice, alice]]


def test_listing_goes_on_behind_any_entry(cache: Cache) -> None:
    box = inbox(cache)
    cache.add_messages(box, [message(uid) for uid in range(1, 51)])
    found: list[int] = []
    after = 0
    while page := cache.children(box, after, 7):
        found += [int(node.uid or 0) for node in page]
        after = page[-1].ino
        cache.remove_node(page[-1].ino)
    assert found == list(range(1, 51))


# -- mailboxes and flags


def test_reset_forgets_that_mailbox_only(cache: Cache) -> None:
    cache.set_tree([INBOX, Directory((b"x",), b"x", b"/", True, "")])
    boxes = [node.ino for node in cache.children(ROOT, 0, 10)]
    for box in boxes:
        cache.add_messages(box, [message(1), message(2)])
        cache.set_state(box, UidValidity(5), 3, ModSeq(9), complete=True)
    assert len(cache.reset(boxes[0], UidValidity(6))) == 2
    first, second = (cache.mailbox(box) for box in boxes)
    assert first is not None
    assert second is not None
    assert (first.uidvalidity, first.uidnext, first.modseq, first.complete) == (6, 0, 0, 0)
    assert (second.uidvalidity, second.uidnext, second.modseq, second.complete) == (5, 3, 9, 1)
    assert [cache.counts(box)[0] for box in boxes] == [0, 2]


def test_flags_that_only_change_their_order_are_no_change(cache: Cache) -> None:
    box = inbox(cache)
    [(ino, _)] = cache.add_messages(box, [message(1, flags="\\Seen $Work")])
    assert cache.set_flags(box, [(Uid(1), "$Work \\Seen", ModSeq(2))]) == []
    assert cache.set_flags(box, [(Uid(1), "\\Seen", ModSeq(3)), (Uid(9), "\\Seen", ModSeq(3))]) == [ino]
    assert cache.counts(box) == (1, 0)


def test_modseq_never_goes_back(cache: Cache) -> None:
    """An answer may be older than what was learned meanwhile."""
    box = inbox(cache)
    [(ino, _)] = cache.add_messages(box, [message(1)])
    modseqs = []
    for modseq in (5, 3, 7):
        cache.set_flags(box, [(Uid(1), "\\Seen", ModSeq(modseq))])
        details = cache.details(ino)
        assert details is not None
        modseqs.append(details.modseq)
    assert modseqs == [5, 5, 7]


def test_message_whose_name_is_given_to_another_gets_one_like_it(cache: Cache) -> None:
    box = inbox(cache)
    [(first, name), (second, other)] = cache.add_messages(box, [message(1), message(2)])
    cache.rename(first, other)
    shown = {node.ino: node.name for node in cache.children(box, 0, 10)}
    assert shown == {first: other, second: b"2023-11-14_2213_Alice_Report.2~2.eml"}
    assert cache.child(box, name) is None
    cache.rename(first, b"2023-11-14_2213_Alice_Report.2~2.eml")
    [(third, _)] = cache.add_messages(box, [message(3)])
    cache.rename(third, other)
    cache.rename(second, b"mine.eml")
    cache.hide(second)
    cache.show(second)
    node = cache.node(second)
    assert node is not None
    assert node.name == b"2023-11-14_2213_Alice_Report.2~3.eml"


def test_times_of_a_directory_never_go_back(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock may be set back, and programs take a directory that is older than before for unchanged."""
    box = inbox(cache)
    monkeypatch.setattr(time, "time_ns", lambda: DATE * 2 * 10**9)
    cache.touch_directory(box)
    before = cache.node(box)
    monkeypatch.setattr(time, "time_ns", lambda: DATE * 10**9)
    cache.touch_directory(box)
    assert before is not None
    assert (before.mtime, before.ctime) == (DATE * 2 * 10**9,) * 2
    assert cache.node(box) == before


def test_tree_that_is_as_before_changes_nothing(cache: Cache) -> None:
    tree = [
        INBOX,
        Directory((b"a",), None, b"/", False, ""),
        Directory((b"a", b"b"), b"a/b", b"/", True, "\\Archive"),
    ]
    added, gone = cache.set_tree(tree)
    assert (len(added), gone) == (3, [])
    root = cache.node(ROOT)
    assert cache.set_tree(tree) == ([], [])
    assert cache.node(ROOT) == root
    added, gone = cache.set_tree([INBOX])
    assert added == []
    assert [entry.name for entry in gone] == [b"b", b"a"]


# -- opening


def test_cache_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot use the cache directory .*Not a directory|File exists"):
        Cache.open(tmp_path / "file" / "cache", "subject")


def test_cache_is_for_one_at_a_time(cache: Cache) -> None:
    with pytest.raises(CacheError, match=rf"another mount \(process {os.getpid()}\) uses the cache"):
        Cache.open(cache.directory, "subject")


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_database_that_is_none_is_built_anew(
    tmp_path: Path, expected_log: ExpectedLog, content: bytes
) -> None:
    expected_log(r"cache\.db is not usable .*rebuilt from the server")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.db").write_bytes(content)
    cache = Cache.open(tmp_path / "cache", "subject")
    assert cache.totals() == (0, 0, 0)
    assert cache.children(ROOT, 0, 10) == []
    cache.close()


def of_format_3(directory: Path, *read: Ino) -> None:
    """Turn a closed cache into what the version before wrote; the messages ``read`` have exact sizes."""
    with contextlib.closing(sqlite3.connect(directory / "cache.db", isolation_level=None)) as db:
        for table, column in [
            ("node", "announced"),
            ("node", "object_id"),
            ("node", "recipient"),
            ("mailbox", "object_id"),
        ]:
            db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        db.executemany("UPDATE node SET exact = 1, size = size + 5 WHERE ino = ?", [(ino,) for ino in read])
        db.execute("PRAGMA user_version = 3")


def test_cache_of_format_3_is_taken_over(tmp_path: Path) -> None:
    """At stake: everybody's mail is listed again, and every inode number changes, at the first new mount."""
    cache = Cache.open(tmp_path, "subject")
    box = inbox(cache)
    (unread, _), (read, _) = cache.add_messages(box, [message(1), message(2)])
    cache.set_state(box, UidValidity(7), 3, ModSeq(9), complete=True)
    before = cache.children(box, 0, 10)
    cache.close()
    of_format_3(tmp_path, read)
    cache = Cache.open(tmp_path, "subject")
    try:
        assert [n._replace(announced=10, size=10, exact=0) for n in cache.children(box, 0, 10)] == before
        # What was read has its true size only: nobody knows what the server announced.
        assert [(n.ino, n.size, n.announced) for n in cache.children(box, 0, 10)] == [
            (unread, 10, 10),
            (read, 15, None),
        ]
        details, mailbox = cache.details(unread), cache.mailbox(box)
        assert details is not None
        assert mailbox is not None
        assert (details.recipient, details.object_id) == ("", None)
        assert (mailbox.uidvalidity, mailbox.modseq, mailbox.complete, mailbox.object_id) == (7, 9, 1, None)
    finally:
        cache.close()


def test_cut_upgrade_leaves_the_cache_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_log: ExpectedLog
) -> None:
    """At stake: a cache of neither format, so that all mail is listed again."""
    expected_log("cut_here")
    cache = Cache.open(tmp_path, "subject")
    cache.add_messages(inbox(cache), [message(1)])
    cache.close()
    of_format_3(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(database, "_UPGRADES", {3: database._UPGRADES[3] + "SELECT cut_here();"})
        with pytest.raises(CacheError, match="cut_here"):
            Cache.open(tmp_path, "subject")
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (3,)
    cache = Cache.open(tmp_path, "subject")
    assert cache.totals()[0] == 1
    cache.close()


def test_true_size_leaves_the_announced_one(cache: Cache) -> None:
    """At stake: whether the message that has a UID is the one we know is judged by the announced size."""
    ((ino, _),) = cache.add_messages(inbox(cache), [message(1, size=10)])
    assert cache.set_size(ino, 12)
    node, details = cache.node(ino), cache.details(ino)
    assert node is not None
    assert details is not None
    assert (node.size, node.announced, details.announced) == (12, 10, 10)


def test_what_a_listing_says_is_kept(cache: Cache) -> None:
    listed = message(1)._replace(recipient="Bob", object_id="M1")
    ((ino, _),) = cache.add_messages(inbox(cache), [listed])
    details = cache.details(ino)
    assert details is not None
    assert (details.recipient, details.object_id) == ("Bob", "M1")


# -- bodies


def test_least_recently_used_bodies_go_first(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(DATE, DATE + 100))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    store = BodyStore(cache, 100)
    added = cache.add_messages(inbox(cache), [message(uid) for uid in range(1, 5)])
    nodes = [keep(cache, store, ino, b"ten bytes.") for ino, _ in added]
    assert store.load(nodes[0]) == b"ten bytes."
    store.limit = 25
    store.add([])
    cached = [cache.node(node.ino) for node in nodes]
    assert [node is not None and node.crc is not None for node in cached] == [True, False, False, True]
    assert store.size == cache.totals()[2] == 20


def test_limit_that_became_smaller_counts_from_the_start(cache: Cache) -> None:
    store = BodyStore(cache, 100)
    for ino, _ in cache.add_messages(inbox(cache), [message(uid) for uid in range(1, 5)]):
        keep(cache, store, ino, b"ten bytes.")
    assert BodyStore(cache, 25).size == cache.totals()[2] <= 25


@pytest.mark.parametrize("size", [1, 1000, SMALL, SMALL + 1])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.trio
async def test_damaged_body_is_not_given_out(
    cache: Cache, size: int, damage: str, expected_log: ExpectedLog
) -> None:
    store = BodyStore(cache, 1 << 30)
    [(ino, _)] = cache.add_messages(inbox(cache), [message(1)])
    content = os.urandom(size)
    node = keep(cache, store, ino, content)
    assert (node.pack is None) == (size > SMALL)
    assert await given_out(store, node) == content
    store.close()
    path, offset = place(store, node)
    match damage:
        case "flip":
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(bytes([content[0] ^ 1]))
        case "cut":
            os.truncate(path, offset + size - 1)
        case _:
            path.unlink()
    expected_log(f"the cached body of file {ino} is damaged or gone: it is fetched again")
    assert await given_out(store, node) is None
    after = cache.node(ino)
    assert after is not None
    # Still the exact size: only the body is forgotten.
    assert (after.crc, after.size, bool(after.exact)) == (None, size, True)
    assert store.size == 0


def test_bodies_in_packs_survive_a_restart_and_others_go_behind_them(cache: Cache) -> None:
    added = cache.add_messages(inbox(cache), [message(uid) for uid in range(1, 7)])
    contents = [bytes([65 + i]) * (5000 * i) for i in range(6)]
    for i, (ino, _) in enumerate(added):
        store = BodyStore(cache, 1 << 30)
        keep(cache, store, ino, contents[i])
        store.close()
    store = BodyStore(cache, 1 << 30)
    nodes = [cache.node(ino) for ino, _ in added]
    assert [node and store.load(node) for node in nodes] == contents
    assert len({node.pack for node in nodes if node}) == 1


def test_two_packs_that_are_lent_are_different_ones(cache: Cache) -> None:
    store = BodyStore(cache, 1 << 30)
    with store.lend_pack() as one, store.lend_pack() as other:
        assert one.path != other.path


def test_disk_that_takes_no_body_keeps_nobody_from_what_is_in_memory(
    cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = BodyStore(cache, 1 << 30)
    [(ino, _)] = cache.add_messages(inbox(cache), [message(1)])
    shutil.rmtree(store.directory)
    incoming = IncomingBody(store, 4)
    incoming.write(b"body")
    with store.lend_pack() as pack, pytest.raises(CacheError):
        incoming.keep(ino, Uid(1), pack)
    written = tmp_path / "written"
    written.write_bytes(b"body")
    caplog.set_level("INFO")
    store.take(written, ino, Uid(1))
    assert "a body was not kept in the cache" in caplog.text
    assert written.read_bytes() == b"body"
    node = cache.node(ino)
    assert node is not None
    assert node.crc is None


def test_full_pack_is_lent_no_more(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imapfs.store.bodies._MAX_PACK", 8192)
    store = BodyStore(cache, 1 << 30)
    nodes = [
        keep(cache, store, ino, b"x" * 5000)
        for ino, _ in cache.add_messages(inbox(cache), [message(1), message(2)])
    ]
    assert nodes[0].pack != nodes[1].pack


def test_removed_bodies_give_their_space_back(cache: Cache) -> None:
    store = BodyStore(cache, 1 << 30)
    added = cache.add_messages(inbox(cache), [message(uid) for uid in range(1, 4)])
    nodes = [keep(cache, store, ino, bytes([n]) * 100_000) for n, (ino, _) in enumerate(added)]
    path, _ = place(store, nodes[0])
    full = path.stat().st_blocks
    store.drop(cache.remove_node(nodes[1].ino))
    assert path.stat().st_blocks * 512 <= full * 512 - 100_000
    assert [store.load(node) for node in (nodes[0], nodes[2])] == [bytes([n]) * 100_000 for n in (0, 2)]
    assert store.size == 200_000
    store.drop([*cache.remove_node(nodes[0].ino), *cache.remove_node(nodes[2].ino)])
    assert not path.exists()
    assert store.size == 0


def test_body_that_comes_for_an_inode_that_is_another_message_by_now_is_not_its_body(cache: Cache) -> None:
    store = BodyStore(cache, 1 << 30)
    [(ino, _)] = cache.add_messages(inbox(cache), [message(1)])
    late = IncomingBody(store, 3)
    late.write(b"old")
    cache.displace(ino)
    cache.adopt(ino, inbox(cache), b"new.eml", message(2))
    with store.lend_pack() as pack:
        body = late.keep(ino, Uid(1), pack)
        assert body is not None
        store.add([body])
    node = cache.node(ino)
    assert node is not None
    assert (node.uid, node.crc, store.size) == (2, None, 0)


def test_packs_that_no_message_is_in_go_when_the_store_opens(cache: Cache) -> None:
    store = BodyStore(cache, 1 << 30)
    [(ino, _)] = cache.add_messages(inbox(cache), [message(1)])
    kept, _ = place(store, keep(cache, store, ino, b"kept"))
    stray = kept.with_name("77")
    stray.write_bytes(b"of a kill before the database knew of it")
    store.close()
    BodyStore(cache, 1 << 30)
    assert kept.exists()
    assert not stray.exists()


@pytest.mark.trio
async def test_sweep_removes_what_no_message_has_and_nothing_else(cache: Cache) -> None:
    store = BodyStore(cache, 1 << 30)
    [(kept, _), (stray, _)] = cache.add_messages(inbox(cache), [message(1), message(2)])
    large = b"kept" * SMALL
    keep(cache, store, kept, large)
    store.path(stray).write_bytes(b"stray")
    older = store.directory / "2a"
    older.mkdir()
    (older / "42").write_bytes(b"of another layout")
    for ino in (kept, stray):
        os.utime(store.path(ino), (DATE, DATE))
    young = store.path(Ino(stray + 256))
    young.write_bytes(b"on its way into the database")
    os.utime(young, (2 * DATE, 2 * DATE))
    with trio.fail_after(20):
        await store.sweep()
    assert store.path(kept).read_bytes() == large
    assert not store.path(stray).exists()
    assert not older.exists()
    assert young.exists()


def test_message_larger_than_the_disk_is_refused(cache: Cache) -> None:
    store = BodyStore(cache, 1 << 30)
    store.check_space(1)
    with pytest.raises(CacheError, match=r"a message of .* bytes does not fit") as raised:
        store.check_space(1 << 60)
    assert raised.value.errno == 28


def test_half_written_bodies_go_when_the_store_opens(cache: Cache) -> None:
    path = BodyStore(cache, 100).temporary()
    path.write_bytes(b"half")
    BodyStore(cache, 100)
    assert not path.exists()


def test_a_name_that_an_earlier_version_took_is_cut(tmp_path: Path) -> None:
    """No program could look it up any more, not even to rename it."""
    first = Cache.open(tmp_path / "cache", "subject")
    mailbox = inbox(first)
    inos = [ino for ino, _ in first.add_messages(mailbox, [message(1), message(2), message(3)])]
    for n, ino in enumerate(inos[:2]):
        first.rename(ino, b"x" * 300 + b"%d.eml" % n)
    first.close()
    second = Cache.open(tmp_path / "cache", "subject")
    names = [second.node(ino).name or b"" for ino in inos]  # type: ignore[union-attr]
    assert names[0] == b"x" * 251 + b".eml"
    assert names[1].startswith(b"x" * 240) and len(names[1]) <= 255 and names[1] != names[0]
    assert names[2].endswith(b".3.eml")
    assert second.is_named(mailbox, 1)
    second.close()
