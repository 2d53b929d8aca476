"""The cache becomes equal to the server, whichever of the three ways the server allows."""

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from imapfs.errors import MailboxGone, MessageGone
from imapfs.imap.grammar import ListEntry
from imapfs.model import ROOT, ModSeq, Uid
from imapfs.names import is_inbox
from imapfs.store.bodies import IncomingBody
from imapfs.store.cache import Cache
from imapfs.store.journal import Journal
from imapfs.store.rows import Body, Directory, NewMessage, Node
from imapfs.sync.changes import ChangeHub
from imapfs.sync.flags import FlagChanger
from imapfs.sync.folders import Folders
from imapfs.sync.identify import find_moved
from imapfs.sync.locate import Locator
from imapfs.sync.mailbox_list import plan_tree
from imapfs.sync.move import Mover
from imapfs.sync.trash import TrashFinder
from tests.conftest import ExpectedLog
from tests.support import compare
from tests.support.accounts import hide, pool, until
from tests.support.mail import plain
from tests.support.mirror import Mirror, mirror
from tests.support.mounting import DEADLINE
from tests.support.servers.dovecot import Account

DATE = 1_700_000_000
TIERS = {
    "QRESYNC": (set[str](), b"(QRESYNC ("),
    "CONDSTORE": ({"QRESYNC"}, b"CHANGEDSINCE"),
    "comparison": ({"QRESYNC", "CONDSTORE"}, b" 1:* (UID FLAGS)"),
}
"""What the server is made to lack, and what the trace of this way must hold."""


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    hide(monkeypatch, *TIERS[request.param][0])
    return str(request.param)


def server_flags(account: Account, mailbox: str = "INBOX") -> dict[int, set[str]]:
    return {uid: words - {"\\Recent"} for uid, words in compare.flags(account, mailbox).items()}


# -- one mailbox


@pytest.mark.trio
async def test_what_a_second_client_did_is_learned(user: Account, tmp_path: Path, tier: str) -> None:
    user.deliver("INBOX", ((plain(n), DATE + n, "S" * (n % 2)) for n in range(8)))
    user.start_trace()
    async with mirror(user, tmp_path) as made:
        await made.refresh()
        before = made.messages()
        assert made.flags() == server_flags(user)
        assert {uid: (size, date) for uid, (_, size, date) in before.items()} == {
            n + 1: (2000, DATE + n) for n in range(8)
        }
        with user.client() as client:
            client.select()
            client.uid("STORE", "2,7", "+FLAGS", "(\\Deleted)")
            client.expunge()
            client.uid("STORE", "3", "+FLAGS", "(\\Flagged $Work)")
            client.uid("STORE", "4", "-FLAGS", "(\\Seen)")
        user.append("INBOX", plain(10, 3000), DATE + 10, "\\Answered")
        await made.refresh()
        assert made.flags() == server_flags(user)
        after = made.messages()
        assert set(after) == {1, 3, 4, 5, 6, 8, 9}
        assert after[9][1:] == (3000, DATE + 10)
        assert {uid: after[uid] for uid in after if uid != 9} == {
            uid: before[uid] for uid in after if uid != 9
        }
        assert sorted(made.gone()) == sorted(before[uid][0] for uid in (2, 7))
        assert made.added() == [after[9][0]]
        assert set(made.flagged()) == {after[3][0], after[4][0]}
        await made.refresh()
        assert made.changes == []
    assert any(TIERS[tier][1] in line for line in user.protocol_trace())


@pytest.mark.trio
async def test_what_came_before_something_from_here_is_learned(
    user: Account, tmp_path: Path, tier: str
) -> None:
    user.append("INBOX", plain(0), DATE)
    async with mirror(user, tmp_path) as made:
        await made.refresh()
        user.append("INBOX", plain(1), DATE)
        ours = user.append("INBOX", plain(2), DATE)
        message = NewMessage(Uid(ours), len(plain(2)), DATE, 0, "", ModSeq(0), "ours", "", "", "")
        made.cache.adopt(made.cache.new_ino(), made.ino("INBOX"), b"ours.eml", message)
        await made.refresh()
        assert set(made.messages()) == {ours - 2, ours - 1, ours}


@pytest.mark.trio
async def test_mailbox_that_is_emptied_and_filled_again(user: Account, tmp_path: Path, tier: str) -> None:
    async with mirror(user, tmp_path) as made:
        await made.refresh()
        assert made.messages() == {}
        for first in (0, 3):
            for n in range(3):
                user.append("INBOX", plain(first + n), DATE)
            await made.refresh()
            assert set(made.messages()) == {first + 1, first + 2, first + 3}
            with user.client() as client:
                client.select()
                client.store("1:*", "+FLAGS", "(\\Deleted)")
                client.expunge()
            await made.refresh()
            assert made.messages() == {}
            assert len(made.gone()) == 3


@pytest.mark.trio
async def test_changes_while_nobody_looked_are_learned_by_the_next_mount(
    user: Account, tmp_path: Path, tier: str
) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(300)))
    async with mirror(user, tmp_path) as made:
        await made.refresh()
        before = made.messages()
    with user.client() as client:
        client.select()
        client.uid("STORE", ",".join(map(str, range(1, 300, 3))), "+FLAGS", "(\\Deleted)")
        client.expunge()
        client.uid("STORE", "2:200", "+FLAGS", "(\\Seen)")
    user.deliver("INBOX", ((plain(n), DATE, "F") for n in range(5)))
    async with mirror(user, tmp_path) as made:
        await made.refresh()
        assert made.flags() == server_flags(user)
        after = made.messages()
        assert len(after) == 205
        assert all(after[uid] == before[uid] for uid in after if uid <= 300)


@pytest.mark.trio
async def test_changed_uidvalidity_begins_anew(user: Account, tmp_path: Path, tier: str) -> None:
    for mailbox in ("kept", "changed"):
        user.deliver(mailbox, ((plain(n), DATE, "") for n in range(3)))
    async with mirror(user, tmp_path) as made:
        await made.refresh("kept")
        await made.refresh("changed")
        before = made.messages("kept"), made.messages("changed")
        await trio.to_thread.run_sync(
            user.server.doveadm, "mailbox", "update", "-u", user.name, "--uid-validity", "4711", "changed"
        )
        await made.refresh("kept")
        assert made.changes == []
        await made.refresh("changed")
        assert sorted(made.gone()) == sorted(ino for ino, *_ in before[1].values())
        after = made.messages("changed")
        assert set(after) == {1, 2, 3}
        assert not {ino for ino, *_ in after.values()} & {ino for ino, *_ in before[1].values()}
        assert made.messages("kept") == before[0]
        box = made.cache.mailbox(made.ino("changed"))
        assert box is not None
        assert (box.uidvalidity, box.complete) == (4711, 1)


@pytest.mark.parametrize(
    ("messages", "expunged"),
    [(3, []), (2, []), (6, []), (3, [1, 2]), (6, [4, 5, 6]), (6, [3]), (9, [2, 3]), (9, [1, 2, 3]), (0, [])],
    ids=["as many", "fewer", "more", "most gone", "new gone", "last gone", "two gone", "old gone", "none"],
)
@pytest.mark.trio
async def test_mailbox_made_anew_with_the_same_uidvalidity_shows_no_old_message(
    user: Account, tmp_path: Path, tier: str, messages: int, expunged: list[int]
) -> None:
    def set_uidvalidity() -> None:
        user.server.doveadm("mailbox", "update", "-u", user.name, "--uid-validity", "4711", "x")

    user.deliver("x", ((plain(n), DATE + n, "") for n in range(3)))
    set_uidvalidity()
    async with mirror(user, tmp_path) as made:
        await made.refresh("x")
        before = made.messages("x")
        assert set(before) == {1, 2, 3}
    with user.client() as client:
        assert client.delete("x")[0] == "OK"
        assert client.create("x")[0] == "OK"
    set_uidvalidity()
    for n in range(messages):
        user.append("x", plain(100 + n, 3000 + n), DATE + 100 + n)
    with user.client() as client:
        client.select("x")
        for uid in expunged:
            client.uid("STORE", str(uid), "+FLAGS", "(\\Deleted)")
        client.expunge()
    async with mirror(user, tmp_path) as made:
        await made.refresh("x")
        left = set(range(1, messages + 1)) - set(expunged)
        after = made.messages("x")
        assert {uid: (size, date) for uid, (_, size, date) in after.items()} == {
            uid: (2999 + uid, DATE + 99 + uid) for uid in left
        }
        assert not {ino for ino, *_ in after.values()} & {ino for ino, *_ in before.values()}


@pytest.mark.trio
async def test_body_of_a_message_that_goes_leaves_the_disk(user: Account, tmp_path: Path) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(2)))
    async with mirror(user, tmp_path) as made:
        await made.refresh()
        inos = {uid: ino for uid, (ino, *_) in made.messages().items()}
        for uid, ino in inos.items():
            made.bodies.path(ino).write_bytes(b"x" * 10)
            made.bodies.add([Body(ino, Uid(uid), 10, 0, None, 0)])
        with user.client() as client:
            client.select()
            client.uid("STORE", "1", "+FLAGS", "(\\Deleted)")
            client.expunge()
        await made.refresh()
        assert not made.bodies.path(inos[1]).exists()
        assert made.bodies.path(inos[2]).exists()


# -- the tree


# -- moved and renamed by others


@pytest.mark.trio
@pytest.mark.parametrize("first", ["INBOX", "Archive"])
async def test_message_that_another_client_moved_is_the_same_file(
    user: Account, tmp_path: Path, tier: str, first: str
) -> None:
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(3)))
    user.deliver("Archive", [(plain(7), DATE, "")])
    async with mirror(user, tmp_path) as here:
        for mailbox in ("INBOX", "Archive"):
            await here.refresh(mailbox)
        before = here.messages()
        with user.client() as client:
            client.select("INBOX")
            client.uid("STORE", "2", "+FLAGS", "(\\Flagged)")
            client.uid("MOVE", "2", "Archive")
            client.uid("COPY", "3", "Archive")
        await here.refresh_at_once(first, *({"INBOX", "Archive"} - {first}))
        after = here.messages("Archive")
        assert after[2] == before[2]
        assert after[3][0] not in {ino for ino, _, _ in before.values()}, "a copy is another file"
        assert here.messages() == {uid: before[uid] for uid in (1, 3)}
        assert here.flags("Archive") == server_flags(user, "Archive")
        (moved,) = [moved for changes in here.changes for moved in changes.moved]
        assert (moved.ino, moved.parent) == (before[2][0], here.ino("INBOX"))
        assert not [changes for changes in here.changes if changes.gone]


@pytest.mark.trio
async def test_what_vanished_is_looked_for_in_its_own_mailbox(user: Account, tmp_path: Path) -> None:
    """Another mailbox is selected to find out where new messages come from; it has a message of this UID."""
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(3)))
    user.deliver("Archive", ((plain(n), DATE, "") for n in range(7, 10)))
    async with mirror(user, tmp_path) as here:
        for mailbox in ("INBOX", "Archive"):
            await here.refresh(mailbox)
        with user.client() as client:
            client.select("Archive")
            client.uid("STORE", "2", "+FLAGS", "(\\Deleted)")
            client.uid("EXPUNGE", "2")
            client.select("INBOX")
            client.uid("MOVE", "3", "Archive")
        await here.refresh_at_once("Archive", "INBOX")
        assert here.messages("Archive").keys() == {1, 3, 4}
        assert here.messages().keys() == {1, 2}


def keep_body(here: Mirror, mailbox: str, uid: int, content: bytes) -> Node:
    """Cache a body as a download does; return the message."""
    message = here.cache.message(here.ino(mailbox), Uid(uid))
    assert message is not None
    with here.bodies.lend_pack() as pack:
        incoming = IncomingBody(here.bodies, len(content))
        incoming.write(content)
        body = incoming.keep(message.ino, Uid(uid), pack)
        assert body is not None
        here.bodies.add([body])
        incoming.discard()
    kept = here.cache.node(message.ino)
    assert kept is not None
    assert here.bodies.load(kept) == content
    return kept


@pytest.mark.trio
@pytest.mark.parametrize("edited", [b"changed elsewhere: of equal length", b"of another length"])
async def test_bytes_of_a_message_that_was_edited_and_moved_are_not_the_cached_ones(
    user: Account, tmp_path: Path, edited: bytes
) -> None:
    """At stake: the old bytes under the new place, for ever; to edit that file destroys the other's edit."""
    content = plain(1) + b"changed elsewhere: of equal length"
    user.deliver("INBOX", [(content, DATE, "")])
    user.deliver("Archive", [(plain(7), DATE, "")])
    async with mirror(user, tmp_path) as here:
        for mailbox in ("INBOX", "Archive"):
            await here.refresh(mailbox)
        before = keep_body(here, "INBOX", 1, content)
        # As a client that edits does: same date, same Message-ID.
        other = plain(1) + edited[::-1]
        user.deliver("Archive", [(other, DATE, "")])
        with user.client() as client:
            client.select("INBOX")
            client.uid("STORE", "1", "+FLAGS", "(\\Deleted)")
            client.expunge()
        await here.refresh_at_once("INBOX", "Archive")
        after = here.cache.message(here.ino("Archive"), Uid(2))
        assert after is not None
        assert here.bodies.load(after) is None
        assert (after.size, after.exact, after.announced) == (len(other), 0, len(other))
        if len(other) == len(content):
            assert after.ino == before.ino, "who watches sees the file moved"
            assert after.ctime > before.ctime
            assert [ino for changes in here.changes for ino in changes.rewritten] == [after.ino]
        else:
            assert after.ino != before.ino


def test_message_that_a_server_names_by_its_emailid_keeps_its_bytes(tmp_path: Path) -> None:
    """An EMAILID (RFC 8474) proves that the bytes are the same: nothing is fetched again."""
    with contextlib.closing(Cache.open(tmp_path, "subject")) as cache:
        cache.set_tree([Directory((name,), name, b"/", True, "") for name in (b"INBOX", b"Archive")])
        inbox, archive = (cache.child(ROOT, name) for name in (b"INBOX", b"Archive"))
        assert inbox is not None
        assert archive is not None
        listed = NewMessage(Uid(1), 10, DATE, 0, "", ModSeq(0), "", "", "", "<a>", "", "M1")
        ((ino, _),) = cache.add_messages(inbox.ino, [listed])
        original = find_moved(cache, archive.ino, listed._replace(uid=Uid(5), message_id="", size=11))
        assert original is not None
        assert (original.node.ino, original.same_bytes) == (ino, True)
        assert find_moved(cache, archive.ino, listed._replace(object_id="M2")) is None
        without = find_moved(cache, archive.ino, listed._replace(object_id=None))
        assert without is not None
        assert not without.same_bytes
        # The true size, whatever it is, says nothing about what the server announces.
        cache.set_size(ino, 12)
        for size in (11, 12):
            assert find_moved(cache, archive.ino, listed._replace(object_id=None, size=size)) is None


@pytest.mark.trio
async def test_flags_of_the_newest_message_are_reported(user: Account, tmp_path: Path, tier: str) -> None:
    """At stake: `imapfs watch` is silent about the newest message, which each synchronisation lists."""
    user.deliver("INBOX", ((plain(n), DATE, "") for n in range(2)))
    async with mirror(user, tmp_path) as here:
        await here.refresh()
        with user.client() as client:
            client.select("INBOX")
            client.uid("STORE", "2", "+FLAGS", "(\\Flagged)")
        await here.refresh()
        assert here.flagged() == [here.messages()[2][0]]
        assert here.flags()[2] == {"\\Flagged"}


@pytest.mark.trio
async def test_message_that_another_client_moves_meanwhile_is_not_changed(
    user: Account, tmp_path: Path
) -> None:
    user.deliver("INBOX", [(plain(1), DATE, "")])
    user.deliver("Archive", [(plain(7), DATE, "")])
    async with mirror(user, tmp_path) as here, pool(user) as connections:
        for mailbox in ("INBOX", "Archive"):
            await here.refresh(mailbox)
        ino, _, _ = here.messages()[1]
        journal = Journal(tmp_path / "journal.json")
        locator = Locator(here.cache, here.sync)
        trash = TrashFinder(here.cache, None)
        folders = Folders(connections, here.cache, here.sync, locator, trash)
        mover = Mover(
            connections, here.cache, here.sync, locator, journal, "expunge", trash, folders, ChangeHub()
        )
        flags = FlagChanger(connections, here.cache, here.sync, locator, ChangeHub())
        outcomes = []

        async def expect_gone(work: Callable[[], Awaitable[None]]) -> None:
            with pytest.raises(MessageGone):
                await work()
            outcomes.append(work)

        async with trio.open_nursery() as nursery, here.sync.exclusive(here.ino("INBOX")):
            nursery.start_soon(expect_gone, partial(mover.remove, ino))
            nursery.start_soon(expect_gone, partial(mover.move, ino, here.ino("Trash"), b"x.eml"))
            flag = partial(flags.change, ino, lambda _: ({"\\Flagged"}, set()))
            nursery.start_soon(expect_gone, flag)
            await trio.testing.wait_all_tasks_blocked()
            with user.client() as client:
                client.select("INBOX")
                client.uid("MOVE", "1", "Archive")
            details = here.cache.details(ino)
            assert details is not None
            moved = NewMessage(Uid(2), 2000, details.date, 0, "", ModSeq(0), "", "", "", details.message_id)
            here.cache.relocate(ino, here.ino("Archive"), moved, same_bytes=False)
        assert len(outcomes) == 3
        assert server_flags(user, "Archive") == {1: set(), 2: set()}


@pytest.mark.trio
async def test_mailbox_that_another_client_renamed_is_the_same_directory(
    user: Account, tmp_path: Path
) -> None:
    for mailbox in ("Old", "Old/below", "Other"):
        user.deliver(mailbox, [(plain(1), DATE, "")])
    async with mirror(user, tmp_path) as here:
        for mailbox in ("Old", "Old/below", "Other"):
            await here.refresh(mailbox)
        inodes = [here.ino(mailbox) for mailbox in ("Old", "Old/below")]
        with user.client() as client:
            client.rename("Old", "New")
            # Made anew under the old name, it is another one.
            client.delete("Other")
            client.create("Another")
        await here.refresh_tree()
        assert [here.ino(mailbox) for mailbox in ("New", "New/below")] == inodes
        assert here.cache.child(ROOT, b"Old") is None
        assert here.cache.child(ROOT, b"Other") is None
        messages = here.messages("New/below")
        for mailbox in ("New", "New/below", "Another"):
            await here.refresh(mailbox)
        assert here.messages("New/below") == messages
        assert here.messages("Another") == {}


@pytest.mark.trio
@pytest.mark.parametrize("same", [True, False])
async def test_renamed_mailbox_is_proven_by_its_messages(user: Account, tmp_path: Path, same: bool) -> None:
    """At stake: cached bytes of a deleted mailbox are shown as messages of a new one that happens to have the
    same UIDVALIDITY, which often is the time in seconds."""

    def set_uidvalidity(mailbox: str) -> None:
        user.server.doveadm("mailbox", "update", "-u", user.name, "--uid-validity", "4711", mailbox)

    for mailbox, first in (("Old", 0), ("New", 0 if same else 3)):
        user.deliver(mailbox, ((plain(n), DATE + n, "") for n in range(first, 3 + first)))
        set_uidvalidity(mailbox)
    with user.client() as client:
        client.rename("New", "New.later")
    async with mirror(user, tmp_path) as here:
        await here.refresh("Old")
        old, before = here.ino("Old"), here.messages("Old")
        listed = here.cache.mailbox(here.ino("New.later"))
        assert listed is not None
        assert not listed.uidvalidity, "it was never opened"
    with user.client() as client:
        client.delete("Old")
        client.rename("New.later", "New")
    async with mirror(user, tmp_path) as here:
        await here.refresh("New")
        assert (here.ino("New") == old) is same
        assert (here.messages("New") == before) is same
        assert {uid: date for uid, (_, _, date) in here.messages("New").items()} == {
            n: DATE + n - 1 + (0 if same else 3) for n in (1, 2, 3)
        }


@pytest.mark.trio
async def test_mailboxes_come_and_go(user: Account, tmp_path: Path) -> None:
    user.deliver("a/b/c", [(plain(1), DATE, "")])
    user.deliver("old", [(plain(1), DATE, "")])
    async with mirror(user, tmp_path) as made:
        deep, old = made.ino("a/b/c"), made.ino("old")
        await made.refresh("old")
        with user.client() as client:
            assert client.delete("old")[0] == "OK"
            assert client.create("fresh")[0] == "OK"
        made.changes.clear()
        await made.refresh_tree()
        assert made.ino("a/b/c") == deep
        assert made.added() == [made.ino("fresh")]
        assert old in made.gone()
        assert made.cache.child(ROOT, b"old") is None
        assert made.cache.node(old) is None


@pytest.mark.trio
async def test_mailbox_that_vanished_is_gone_and_leaves_the_list(user: Account, tmp_path: Path) -> None:
    user.deliver("x", [(plain(1), DATE, "")])
    async with mirror(user, tmp_path) as made:
        await made.refresh("x")
        with user.client() as client:
            assert client.delete("x")[0] == "OK"
        with pytest.raises(MailboxGone):
            await made.refresh("x")
        with trio.fail_after(DEADLINE):
            await until(lambda: made.cache.child(ROOT, b"x") is None)


# -- plan_tree


def plan(*names: bytes, delimiter: bytes = b"/", prefix: bytes = b"") -> dict[bytes, Directory]:
    planned = plan_tree([ListEntry(name, delimiter) for name in names], prefix)
    check(planned)
    return {b"/".join(directory.path): directory for directory in planned}


def check(planned: list[Directory]) -> None:
    """What must be so whatever a server says."""
    seen: set[tuple[bytes, ...]] = {()}
    for directory in planned:
        assert directory.path[:-1] in seen, "a child before its parent"
        assert directory.path not in seen
        seen.add(directory.path)
        for name in directory.path:
            assert 0 < len(name) <= 255
            assert b"/" not in name
            assert b"\0" not in name
            assert name not in {b".", b".."}
            assert not name.lower().endswith(b".eml")


def test_hierarchy_follows_the_delimiter() -> None:
    assert set(plan(b"a/b", b"a", b"INBOX")) == {b"a", b"a/b", b"INBOX"}
    assert set(plan(b"a.b", b"a/b", delimiter=b".")) == {b"a", b"a/b", b"a%2Fb"}
    assert set(plan(b"a/b", delimiter=b"")) == {b"a%2Fb"}


def test_ancestor_that_is_not_listed_holds_no_messages() -> None:
    found = plan(b"a/b/c")
    assert [found[path].server_name for path in (b"a", b"a/b", b"a/b/c")] == [None, None, b"a/b/c"]
    assert [found[path].selectable for path in (b"a", b"a/b", b"a/b/c")] == [False, False, True]


def test_noselect_is_a_directory_without_messages() -> None:
    entries = [ListEntry(b"a", b"/", frozenset({"\\noselect"})), ListEntry(b"a/b", b"/")]
    assert [(d.path, d.server_name, d.selectable) for d in plan_tree(entries, b"")] == [
        ((b"a",), b"a", False),
        ((b"a", b"b"), b"a/b", True),
    ]


@pytest.mark.parametrize("spelling", [b"INBOX", b"inbox", b"Inbox", b"iNBOX"])
def test_inbox_has_one_spelling(spelling: bytes) -> None:
    assert set(plan(spelling, spelling + b"/x")) == {b"INBOX", b"INBOX/x"}
    assert plan(spelling)[b"INBOX"].server_name == spelling
    assert set(plan(b"x/" + spelling)) == {b"x", b"x/" + spelling}


def test_inbox_that_is_listed_in_several_spellings_is_one_mailbox() -> None:
    found = plan(b"Inbox", b"INBOX", b"inbox", b"Inbox/x", b"INBOX/x")
    assert [path for path, directory in found.items() if is_inbox(directory.server_name)] == [b"INBOX"]
    assert found[b"INBOX"].server_name == b"INBOX"
    assert {d.server_name for d in found.values()} == {b"INBOX", b"INBOX/x", b"Inbox/x"}


def test_personal_namespace_is_the_root() -> None:
    found = plan(b"INBOX", b"INBOX.a", b"INBOX.a.b", b"INBOX.INBOX", delimiter=b".", prefix=b"INBOX.")
    assert set(found) == {b"INBOX", b"a", b"a/b", b"INBOX/INBOX"}
    assert found[b"a/b"].server_name == b"INBOX.a.b"
    shared = plan(b"INBOX", b"INBOX.a", b"shared.bob", delimiter=b".", prefix=b"INBOX.")
    assert set(shared) == {b"INBOX", b"a", b"shared", b"shared/bob"}
    assert set(plan(b"~mail/x", b"INBOX", prefix=b"~mail/")) == {b"x", b"INBOX"}


def test_two_mailboxes_of_one_name_are_both_there() -> None:
    found = plan(b"INBOX.x", b"x", delimiter=b".", prefix=b"INBOX.")
    assert {directory.server_name for directory in found.values()} == {b"INBOX.x", b"x"}


@pytest.mark.parametrize(
    "name",
    [
        b"../../x", b"..", b".", b"/etc/passwd", b"a//b", b"a/", b"/", b"", b"a\0b", b"x" * 5000, b"\xff\xfe",
        b"&bad", b"&AC8-", b"a.eml", b"a/b.EML/c", b"&Jjo-!", "é".encode() * 200, b"a\r\nb",
    ],
)  # fmt: skip
def test_hostile_name_is_a_harmless_one(name: bytes) -> None:
    found = plan(b"INBOX", name)
    assert name in {directory.server_name for directory in found.values()}
    assert b"INBOX" in found


def test_too_deep_a_mailbox_is_left_out(expected_log: ExpectedLog) -> None:
    expected_log("mailboxes are not shown that are nested more than 100 levels deep: 1")
    assert set(plan(b"/".join([b"x"] * 5000), b"INBOX")) == {b"INBOX"}


NAMES = st.one_of(
    st.binary(max_size=20),
    st.lists(
        st.sampled_from([b"INBOX", b"inbox", b"a", b"A", b"..", b".", b"", b"x.eml", b"%~", b"%41", b"&"])
    ).map(b"/".join),
)


@given(
    st.lists(NAMES, unique=True, max_size=12),
    st.sampled_from([b"/", b".", b"", b"\\"]),
    st.sampled_from([b"", b"INBOX/", b"INBOX.", b"a/", b"~"]),
)
def test_every_mailbox_has_exactly_one_directory(names: list[bytes], delimiter: bytes, prefix: bytes) -> None:
    planned = plan_tree([ListEntry(name, delimiter) for name in names], prefix)
    check(planned)
    inboxes = sorted(name for name in names if is_inbox(name))
    expected = [name for name in names if name not in inboxes[1:]]
    assert sorted(d.server_name for d in planned if d.server_name is not None) == sorted(expected)
    again = plan_tree([ListEntry(name, delimiter) for name in reversed(names)], prefix)
    assert again == planned
