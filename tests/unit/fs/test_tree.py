"""What each directory entry is: messages, drafts, both of one file, and where each is shown."""

import itertools

import pytest

from imapfs.errors import MessageGone, NotADirectory
from imapfs.fs import tree as module
from imapfs.fs.events import Place
from imapfs.fs.tree import Entry
from imapfs.model import ROOT, Ino, Uid
from imapfs.names import is_message_name
from tests.support.model import Model

SMALL_PAGE = 3


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_PAGE", SMALL_PAGE)


def child(account: Model, parent: Ino, name: str) -> Entry:
    found = account.tree.child(parent, name.encode())
    assert found is not None
    assert found.name == name.encode()
    return found


@pytest.mark.parametrize(
    ("name", "is_message"),
    [(b"a.eml", True), (b"a.EML", True), (b".eml", False), (b".a.eml.swp", False), (b"a.eml~", False)],
)
def test_which_names_make_a_message(name: bytes, is_message: bool) -> None:
    assert is_message_name(name) == is_message


# -- messages and directories


def test_a_message_and_a_directory(account: Model) -> None:
    (ino,) = account.deliver("Work", 1, size=123)
    account.cache.set_local(ino, mode=0o640, mtime=5)
    work, message = child(account, ROOT, "Work"), child(account, account.ino("Work"), "1.eml")
    assert (work.ino, work.is_dir, work.draft) == (account.ino("Work"), True, None)
    assert (message.ino, message.is_dir, message.size) == (ino, False, 123)
    assert (message.mode, message.mtime) == (0o640, 5)
    assert message.ctime == account.node(ino).ctime
    assert account.tree.entry(ino) == message
    assert account.tree.child(account.ino("Work"), b"2.eml") is None
    assert account.names(ROOT) == ["INBOX", "Work"]
    assert account.names(work.ino) == ["2024", "1.eml"]


def test_what_is_gone_and_what_is_no_directory(account: Model) -> None:
    (ino,) = account.deliver("INBOX", 1)
    with pytest.raises(NotADirectory):
        account.tree.directory(ino)
    account.cache.remove_node(ino)
    for ask in (account.tree.entry, account.tree.node, account.tree.directory):
        with pytest.raises(MessageGone):
            ask(ino)


def test_a_hidden_message_is_shown_nowhere(account: Model) -> None:
    (ino,) = account.deliver("INBOX", 1)
    account.cache.hide(ino)
    assert account.names(account.ino("INBOX")) == []
    assert account.tree.places(account.node(ino)) == []


# -- drafts


def test_a_new_file_is_listed_between_messages(account: Model) -> None:
    inbox = account.ino("INBOX")
    account.deliver("INBOX", 1)
    draft = account.write("INBOX", b"new.eml", b"12345")
    account.deliver("INBOX", 2)
    assert account.names(inbox) == ["1.eml", "new.eml", "2.eml"]
    found = child(account, inbox, "new.eml")
    assert (found.ino, found.size, found.draft, found.node) == (draft.ino, 5, draft, None)
    assert found == account.tree.entry(draft.ino) == account.tree.page(inbox, draft.ino - 1)[0]


def test_a_new_version_hides_its_message(account: Model) -> None:
    inbox = account.ino("INBOX")
    (ino, _) = account.deliver("INBOX", 1, 2, flags="\\Seen")
    account.cache.set_local(ino, mode=0o640)
    draft = account.change(ino, b"123")
    assert (draft.name, draft.parent, draft.path) == (b"1.eml", inbox, (b"INBOX",))
    assert (draft.base, draft.flags, draft.mode) == (account.base(ino), "\\Seen", 0o640)
    assert account.names(inbox) == ["1.eml", "2.eml"]
    for found in (child(account, inbox, "1.eml"), account.tree.entry(ino), account.tree.page(inbox, 0)[0]):
        assert (found.ino, found.size, found.draft) == (ino, 3, draft)
    account.spool.forget(draft)
    assert child(account, inbox, "1.eml").node == account.node(ino)


def test_a_new_version_under_another_name_hides_its_message(account: Model) -> None:
    inbox = account.ino("INBOX")
    (ino,) = account.deliver("INBOX", 1)
    draft = account.change(ino)
    account.spool.rename(draft, inbox, b"other.eml", draft.path)
    assert account.names(inbox) == ["other.eml"]
    assert child(account, inbox, "other.eml").ino == ino
    assert account.tree.child(inbox, b"1.eml") is None


def test_a_version_that_is_being_replaced_is_shown_until_it_is_gone(account: Model) -> None:
    inbox = account.ino("INBOX")
    (ino,) = account.deliver("INBOX", 1)
    draft = account.change(ino, b"123")
    account.spool.set_aside(draft)
    assert account.names(inbox) == ["1.eml"]
    assert (child(account, inbox, "1.eml").ino, child(account, inbox, "1.eml").size) == (ino, 3)
    account.spool.put_back(draft)
    assert child(account, inbox, "1.eml").draft is draft


def test_a_draft_has_its_name_before_a_message_that_came_later(account: Model, small_pages: None) -> None:
    inbox = account.ino("INBOX")
    draft = account.write("INBOX", b"9.eml")
    # On another page than the draft.
    account.deliver("INBOX", 1, 2, 3, 9)
    assert child(account, inbox, "9.eml").ino == draft.ino
    assert account.names(inbox) == ["9.eml", "1.eml", "2.eml", "3.eml"]


def test_a_message_has_the_attributes_of_the_draft_that_was_left_behind(account: Model) -> None:
    """While it was moved to another mailbox, a program wrote to it."""
    (ino,) = account.deliver("INBOX", 1)
    draft = account.change(ino, b"12345")
    draft.mode = 0o640
    work = account.ino("Work")
    account.cache.move(ino, work, Uid(1), b"moved.eml")
    moved = child(account, work, "moved.eml")
    assert (moved.ino, moved.draft) == (ino, None)
    assert (moved.size, moved.mtime, moved.ctime, moved.mode) == (5, draft.mtime, draft.ctime, 0o640)
    assert account.tree.page(work, ino - 1) == [moved]
    assert child(account, account.ino("INBOX"), "1.eml").draft is draft


def test_no_message_is_hidden_because_it_is_like_an_upload_of_unknown_outcome(account: Model) -> None:
    """A program that copies a directory would miss it, and a backup with ``--delete`` would drop it."""
    inbox = account.ino("INBOX")
    draft = account.write("INBOX", b"new.eml", b"x" * 100)
    account.attempt(draft, "INBOX", 5)
    account.deliver("INBOX", 4, 5, 6, size=100)
    shown = ["new.eml", "4.eml", "5.eml", "6.eml"]
    assert account.names(inbox) == shown
    for name in shown:
        child(account, inbox, name)


# -- pages


def test_pages_have_every_entry_once(account: Model, small_pages: None) -> None:
    inbox = account.ino("INBOX")
    uids = itertools.count(1)
    expected = []
    for n in range(12):
        uid = next(uids)
        (ino,) = account.deliver("INBOX", uid)
        expected.append(f"{uid}.eml")
        if n % 4 == 1:
            account.change(ino)
        if n % 4 == 2:
            account.write("INBOX", b"draft%d.eml" % n)
            expected.append(f"draft{n}.eml")
    account.write("INBOX", b"last.eml")
    assert account.names(inbox) == [*expected, "last.eml"]
    assert len(account.tree.page(inbox, 0)) <= SMALL_PAGE + 1


def test_a_page_of_nothing_to_show_is_not_the_end(account: Model, small_pages: None) -> None:
    uids = range(1, 3 * SMALL_PAGE + 1)
    account.deliver("INBOX", *uids)
    account.deliver("INBOX", 50)
    names = [f"{uid}.eml" for uid in uids]
    for name in names:
        account.write("INBOX", name.encode())
    assert account.names(account.ino("INBOX")) == ["50.eml", *names]


# -- a subtree


def test_a_mounted_subtree(account: Model) -> None:
    work, year, may = account.ino("Work"), account.ino("Work/2024"), account.ino("Work/2024/May")
    (inside,) = account.deliver("Work/2024", 1)
    (outside,) = account.deliver("Work", 2)
    tree = account.tree
    tree.mount_below(year)
    draft = account.write("Work/2024", b"new.eml")
    assert account.names(ROOT) == ["May", "1.eml", "new.eml"]
    root = tree.entry(ROOT)
    assert (root.ino, root.is_dir, root.node) == (ROOT, True, account.node(year))
    assert (tree.directory(ROOT).ino, tree.root) == (year, year)
    assert child(account, ROOT, "1.eml").ino == inside
    # Inodes: those of the kernel, and those of the cache.
    assert (tree.inside(ROOT), tree.inside(may)) == (year, may)
    assert (tree.outside(year), tree.outside(may), tree.outside(ROOT)) == (ROOT, may, None)
    # Paths and places begin at the mountpoint.
    assert (tree.path(ROOT), tree.path(may), tree.path(work)) == ((), (b"May",), None)
    assert tree.path_of(draft) == "new.eml"
    assert tree.place(year, b"1.eml") == Place(ROOT, (), b"1.eml")
    assert tree.place(may, b"x") == Place(may, (b"May",), b"x")
    assert tree.places(account.node(inside)) == [(ROOT, b"1.eml")]
    # What is above is not in the mount: least of all the account's root, whose number is the mountpoint's.
    assert tree.place(ROOT, b"INBOX") is tree.place(work, b"2.eml") is None
    assert tree.places(account.node(account.ino("INBOX"))) == []
    assert tree.path(tree.places(account.node(outside))[0][0]) is None


def test_paths_of_a_whole_account(account: Model) -> None:
    tree, may = account.tree, account.ino("Work/2024/May")
    assert (tree.path(ROOT), tree.path(may)) == ((), (b"Work", b"2024", b"May"))
    assert tree.outside(ROOT) == tree.inside(ROOT) == ROOT
    assert tree.place(may, b"1.eml") == Place(may, (b"Work", b"2024", b"May"), b"1.eml")
    assert str(tree.place(may, b"1.eml")) == "Work/2024/May/1.eml"
    assert tree.path_of(account.write("Work", b"new.eml")) == "Work/new.eml"
    account.list_mailboxes("INBOX", "Work")
    assert tree.path(may) is None
    assert tree.place(may, b"1.eml") is None


# -- versions


def test_a_reference_names_the_message_on_the_server(account: Model) -> None:
    (ino,) = account.deliver("INBOX", 7, flags="\\Seen")
    base, flags = account.tree.reference(account.node(ino)) or (None, "")
    assert base is not None
    assert (base.ref.mailbox, base.ref.uidvalidity, base.ref.uid) == (b"INBOX", 99, 7)
    assert (base.date, base.zone, flags) == (1_700_000_000, 0, "\\Seen")
    assert account.tree.reference(account.node(account.ino("INBOX"))) is None
