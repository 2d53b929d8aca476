"""What is reported to those who watch: each kind of change, once, as far as it is below the mountpoint."""

from collections.abc import Callable

import pytest

from imapfs.fs.event_source import EventSource
from imapfs.fs.events import Event, EventStream, Place
from imapfs.model import ROOT, Ino, ModSeq, Uid
from imapfs.store.rows import Node
from imapfs.sync.changes import Changes, Moved, Renamed
from tests.support.model import Model

Report = Callable[[Changes], list[Event]]


@pytest.fixture
def report(account: Model) -> Report:
    """Return a function that returns the events that changes lead to."""
    stream, seen = EventStream(), list[Event]()
    stream.subscribe(seen.append)
    source = EventSource(account.tree, account.cache, stream)

    def made(changes: Changes) -> list[Event]:
        seen.clear()
        source.on_changes(changes)
        return list(seen)

    return made


def removed(account: Model, ino: Ino) -> Node:
    (node,) = account.cache.remove_node(ino)
    return node


def renamed(account: Model, old: str, parent: str, new: str) -> Changes:
    """Another client renames a mailbox."""
    node, directory = account.node(account.ino(old)), account.ino(parent)
    path = f"{parent}/{new}" if parent else new
    account.cache.rename_directory(node.ino, directory, new.encode(), old.encode(), path.encode())
    moved = Moved(
        node.ino, node.parent, node.name or b"", new.encode(), Renamed(old.encode(), path.encode(), b"/")
    )
    return Changes(directory, moved=[moved])


def moved(account: Model, ino: Ino, mailbox: str, uid: int) -> Changes:
    """Another client moves a message."""
    node, directory, name = account.node(ino), account.ino(mailbox), b"%d.eml" % uid
    account.cache.move(ino, directory, Uid(uid), name)
    return Changes(directory, moved=[Moved(ino, node.parent, node.name or b"", name)])


# -- each kind


def test_arrived(account: Model, report: Report) -> None:
    inbox = account.ino("INBOX")
    (ino,) = account.deliver("INBOX", 1, flags="\\Seen")
    place = Place(inbox, (b"INBOX",), b"1.eml")
    assert report(Changes(inbox, [(ino, b"1.eml")])) == [Event("arrived", place, ino, Uid(1), "\\Seen")]


def test_old_mail_of_a_first_look_does_not_arrive(account: Model, report: Report) -> None:
    inbox = account.ino("INBOX")
    (ino,) = account.deliver("INBOX", 1)
    assert report(Changes(inbox, [(ino, b"1.eml")], first_look=True)) == []


def test_what_is_not_shown_does_not_arrive(account: Model, report: Report) -> None:
    inbox = account.ino("INBOX")
    account.write("INBOX", b"2.eml")
    (other,) = account.deliver("INBOX", 2, size=7)
    assert report(Changes(inbox, [(other, b"2.eml")])) == []


def test_a_rescued_draft_arrives(account: Model, report: Report) -> None:
    inbox = account.ino("INBOX")
    draft = account.write("INBOX", b"new.eml")
    (event,) = report(Changes(inbox, [(draft.ino, b"new.eml")]))
    assert (event.kind, event.ino, event.uid) == ("arrived", draft.ino, None)


def test_expunged(account: Model, report: Report) -> None:
    inbox = account.ino("INBOX")
    (ino,) = account.deliver("INBOX", 1)
    node = removed(account, ino)
    place = Place(inbox, (b"INBOX",), b"1.eml")
    assert report(Changes(inbox, gone=[node])) == [Event("expunged", place, ino, Uid(1), gone=node)]


def test_what_was_replaced_or_hidden_is_not_expunged(account: Model, report: Report) -> None:
    inbox = account.ino("INBOX")
    first, second = account.deliver("INBOX", 1, 2)
    account.cache.hide(second)
    gone = [removed(account, first), removed(account, second)]
    assert report(Changes(inbox, gone=gone, replaced=[b"1.eml"])) == []


def test_flags(account: Model, report: Report) -> None:
    inbox = account.ino("INBOX")
    ino, hidden, left = account.deliver("INBOX", 1, 2, 3)
    account.cache.set_flags(inbox, [(Uid(1), "\\Seen $Work", ModSeq(2))])
    account.cache.hide(hidden)
    removed(account, left)
    place = Place(inbox, (b"INBOX",), b"1.eml")
    assert report(Changes(inbox, flagged=[ino, hidden, left])) == [
        Event("flags", place, ino, Uid(1), "\\Seen $Work")
    ]


def test_moved(account: Model, report: Report) -> None:
    (ino,) = account.deliver("INBOX", 1)
    (event,) = report(moved(account, ino, "Work", 5))
    work, source = account.ino("Work"), Place(account.ino("INBOX"), (b"INBOX",), b"1.eml")
    assert event == Event("moved", Place(work, (b"Work",), b"5.eml"), ino, Uid(5), "", source)


def test_created_and_deleted(account: Model, report: Report) -> None:
    account.list_mailboxes(*account.mailboxes, "New")
    ino = account.ino("New")
    assert report(Changes(ROOT, [(ino, b"New")])) == [Event("created", Place(ROOT, (), b"New"), ino)]
    node = account.node(ino)
    account.list_mailboxes("INBOX")
    assert report(Changes(ROOT, gone=[node])) == [
        Event("deleted", Place(ROOT, (), b"New"), ino, None, gone=node)
    ]


def test_a_deleted_mailbox_speaks_for_its_messages_and_mailboxes(account: Model, report: Report) -> None:
    work, year = account.node(account.ino("Work")), account.node(account.ino("Work/2024"))
    (ino,) = account.deliver("Work", 1)
    message = account.node(ino)
    account.list_mailboxes("INBOX")
    assert report(Changes(work.ino, gone=[message, year])) == []
    assert [event.kind for event in report(Changes(ROOT, gone=[work]))] == ["deleted"]


def test_renamed(account: Model, report: Report) -> None:
    ino = account.ino("Work/2024")
    (event,) = report(renamed(account, "Work/2024", "", "Old"))
    source = Place(account.ino("Work"), (b"Work",), b"2024")
    assert event == Event("renamed", Place(ROOT, (), b"Old"), ino, source=source)


def test_nothing_to_see(account: Model, report: Report) -> None:
    inbox = account.ino("INBOX")
    (ino,) = account.deliver("INBOX", 1)
    assert report(Changes(inbox, uploaded=[ino], resized=[ino], rewritten=[ino])) == []


# -- a subtree


@pytest.fixture
def subtree(account: Model) -> Model:
    """Mount Work only."""
    account.tree.mount_below(account.ino("Work"))
    return account


def test_in_the_directory_that_is_mounted(subtree: Model, report: Report) -> None:
    work = subtree.ino("Work")
    (ino,) = subtree.deliver("Work", 1)
    assert report(Changes(work, [(ino, b"1.eml")])) == [
        Event("arrived", Place(ROOT, (), b"1.eml"), ino, Uid(1), "")
    ]
    (flags,) = report(Changes(work, flagged=[ino]))
    assert flags.place == Place(ROOT, (), b"1.eml")
    node = removed(subtree, ino)
    assert report(Changes(work, gone=[node])) == [
        Event("expunged", Place(ROOT, (), b"1.eml"), ino, Uid(1), gone=node)
    ]


def test_above_and_beside_what_is_mounted(subtree: Model, report: Report) -> None:
    inbox = subtree.ino("INBOX")
    (ino,) = subtree.deliver("INBOX", 1)
    assert report(Changes(inbox, [(ino, b"1.eml")])) == []
    assert report(Changes(inbox, flagged=[ino])) == []
    assert report(Changes(inbox, gone=[removed(subtree, ino)])) == []
    # Not even if the mount has something of the same name.
    subtree.list_mailboxes(*subtree.mailboxes, "2024")
    above = subtree.ino("2024")
    assert report(Changes(ROOT, [(above, b"2024")])) == []
    assert report(Changes(ROOT, gone=[subtree.node(above)])) == []
    assert report(renamed(subtree, "INBOX", "", "Inbox2")) == []


def test_into_the_mount_and_out_of_it(subtree: Model, report: Report) -> None:
    (ino,) = subtree.deliver("INBOX", 1)
    (event,) = report(moved(subtree, ino, "Work", 5))
    assert event == Event("arrived", Place(ROOT, (), b"5.eml"), ino, Uid(5), "")
    (event,) = report(moved(subtree, ino, "INBOX", 6))
    assert event == Event("expunged", Place(ROOT, (), b"5.eml"), ino, gone=subtree.node(ino).without_body())
    year = subtree.ino("Work/2024")
    (event,) = report(renamed(subtree, "Work/2024", "", "Old"))
    assert (event.kind, event.place, event.ino) == ("deleted", Place(ROOT, (), b"2024"), year)
    assert event.gone is not None
    (event,) = report(renamed(subtree, "Old", "Work", "New"))
    assert event == Event("created", Place(ROOT, (), b"New"), year)


def test_the_mounted_mailbox_itself_is_deleted(subtree: Model, report: Report) -> None:
    work = subtree.node(subtree.ino("Work"))
    subtree.list_mailboxes("INBOX")
    assert report(Changes(ROOT, gone=[work])) == []
