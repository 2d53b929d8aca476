"""Drafts stay where their mailbox is, and are not lost with it."""

from pathlib import Path
from typing import cast

import pytest

from imapfs.errors import ImapfsError
from imapfs.fs.drafts import Drafts
from imapfs.fs.scratch import ScratchDirectories
from imapfs.model import ROOT, Ino
from imapfs.store.journal import Attempt, Journal
from imapfs.store.spool import Draft, Spool
from imapfs.sync.changes import ChangeHub, Changes, Moved, Renamed
from imapfs.sync.upload import Uploader
from tests.conftest import ExpectedLog
from tests.support.model import UIDVALIDITY, Model, model

LOST = "its mailbox was deleted"


class IdleUploader:
    """Stands for the uploader, which has no server here."""

    def submit(self, draft: Draft) -> None:
        draft.state = "sending"

    def refuse(self, draft: Draft, error: ImapfsError) -> None:
        draft.state, draft.error = "unsent", str(error)


class Mounted:
    """The drafts of one mount, and what was published."""

    def __init__(self, account: Model) -> None:
        self.published: list[Changes] = []
        hub = ChangeHub()
        self.scratch = ScratchDirectories(account.tree, account.cache, account.spool, hub)
        self.journal = Journal(account.spool.directory.parent / "journal.json")
        self.drafts = Drafts(
            account.tree,
            account.cache,
            account.spool,
            self.journal,
            self.scratch,
            cast(Uploader, IdleUploader()),
            hub,
        )
        hub.subscribe(self.published.append)


@pytest.fixture
def mounted(account: Model) -> Mounted:
    return Mounted(account)


def as_found(draft: Draft) -> tuple[Ino, bytes, tuple[bytes, ...]]:
    return draft.parent, draft.name, draft.path


def on_disk(account: Model, draft: Draft) -> Draft:
    found = Spool(account.spool.directory).get(draft.ino)
    assert found is not None
    return found


# -- mailboxes that are deleted


def test_a_draft_of_a_deleted_mailbox_moves_to_the_top(
    account: Model, mounted: Mounted, expected_log: ExpectedLog
) -> None:
    expected_log(LOST)
    draft, other = account.write("Work/2024", b"new.eml", b"text"), account.write("INBOX", b"new.eml")
    gone = account.node(account.ino("Work/2024"))
    account.list_mailboxes("INBOX", "Work")
    mounted.drafts.on_changes(Changes(gone.parent, gone=[gone]))
    assert as_found(draft) == (ROOT, b"new.eml", ())
    assert as_found(other) == (account.ino("INBOX"), b"new.eml", (b"INBOX",))
    assert mounted.published == [Changes(ROOT, added=[(draft.ino, b"new.eml")])]
    assert account.names(ROOT) == ["INBOX", "Work", "new.eml"]
    assert as_found(on_disk(account, draft)) == as_found(draft)
    assert draft.file.read_bytes() == b"text"


def test_rescued_drafts_have_names_of_their_own(
    account: Model, mounted: Mounted, expected_log: ExpectedLog
) -> None:
    expected_log(LOST)
    account.write("", b"new.eml")
    drafts = [account.write(mailbox, b"new.eml") for mailbox in ("INBOX", "Work")]
    for name in ("INBOX", "Work"):
        mounted.drafts.on_changes(Changes(ROOT, gone=[account.node(account.ino(name))]))
    assert [draft.name for draft in drafts] == [b"new~2.eml", b"new~3.eml"]


def test_the_top_is_that_of_the_mount(account: Model, mounted: Mounted, expected_log: ExpectedLog) -> None:
    expected_log(LOST)
    work = account.ino("Work")
    account.tree.mount_below(work)
    draft = account.write("Work/2024", b"new.eml")
    mounted.drafts.on_changes(Changes(work, gone=[account.node(account.ino("Work/2024"))]))
    assert as_found(draft) == (work, b"new.eml", (b"Work",))
    assert mounted.published == [Changes(work, added=[(draft.ino, b"new.eml")])]


def test_a_message_that_is_removed_takes_no_draft_along(account: Model, mounted: Mounted) -> None:
    first, _ = account.deliver("INBOX", 1, 2)
    draft = account.change(first)
    before = as_found(draft)
    (gone,) = account.cache.remove_node(first)
    mounted.drafts.on_changes(Changes(account.ino("INBOX"), gone=[gone]))
    assert as_found(draft) == before
    assert mounted.published == []


def test_a_scratch_directory_of_a_deleted_mailbox_moves_to_the_top(
    account: Model, mounted: Mounted, expected_log: ExpectedLog
) -> None:
    expected_log(LOST)
    scratch = mounted.scratch.make(account.ino("Work/2024"), b".tmp")
    below = mounted.scratch.make(scratch.ino, b"below")
    draft = account.write("Work/2024/.tmp/below", b"new.eml", b"text")
    gone = account.node(account.ino("Work/2024"))
    account.list_mailboxes("INBOX", "Work")
    mounted.drafts.on_changes(Changes(gone.parent, gone=[gone]))
    assert as_found(draft) == (below.ino, b"new.eml", (b".tmp", b"below"))
    assert mounted.published == [Changes(ROOT, added=[(scratch.ino, b".tmp")])]
    assert as_found(on_disk(account, draft)) == as_found(draft)
    assert account.names(ROOT) == ["INBOX", "Work", ".tmp"]


def test_a_mailbox_takes_its_name_from_a_scratch_directory(account: Model, mounted: Mounted) -> None:
    """Servers may have mailboxes that begin with a dot. What waits in the directory does not go into it."""
    scratch = mounted.scratch.make(account.ino("Work"), b".tmp")
    draft = account.write("Work/.tmp", b"x.eml")
    account.list_mailboxes(*account.mailboxes, "Work/.tmp")
    mailbox = account.ino("Work/.tmp")
    mounted.drafts.on_changes(Changes(account.ino("Work"), added=[(mailbox, b".tmp")]))
    assert mailbox != scratch.ino
    assert as_found(draft) == (scratch.ino, b"x.eml", (b"Work", b".tmp~2"))
    assert as_found(on_disk(account, draft)) == as_found(draft)


def test_a_draft_of_a_deleted_mailbox_goes_back_and_on(
    account: Model, mounted: Mounted, expected_log: ExpectedLog
) -> None:
    expected_log(LOST)
    drafts = {state: account.write("Work/2024", state.encode()) for state in ("sending", "unsent", "local")}
    for state, draft in drafts.items():
        draft.state, draft.dirty = state, False  # type: ignore[assignment]
    gone = account.node(account.ino("Work/2024"))
    account.list_mailboxes("INBOX", "Work")
    mounted.drafts.on_changes(Changes(gone.parent, gone=[gone]))
    assert [draft.state for draft in drafts.values()] == ["unsent", "unsent", "local"]
    account.list_mailboxes("INBOX", "Work", "Work/2024")
    again = account.ino("Work/2024")
    mounted.drafts.on_changes(Changes(account.ino("Work"), added=[(again, b"2024")]))
    assert as_found(drafts["sending"]) == (again, b"sending", (b"Work", b"2024"))
    assert drafts["sending"].state == "sending"
    # What the server has refused, and what is local, waits for a person.
    for state in ("unsent", "local"):
        assert as_found(drafts[state]) == (ROOT, state.encode(), ())
        assert drafts[state].state == state


# -- mailboxes that are renamed


def test_drafts_follow_their_mailbox(account: Model, mounted: Mounted) -> None:
    (ino,) = account.deliver("Work/2024", 1)
    version, below = account.change(ino), account.write("Work/2024/May", b"new.eml")
    beside = account.write("Work", b"new.eml")
    account.attempt(below, "Work/2024/May", 3)
    mounted.journal.add_removal(account.base(ino).ref)
    year, parent = account.ino("Work/2024"), account.ino("")
    account.cache.rename_directory(year, parent, b"Old", b"Work/2024", b"Old")
    renamed = Renamed(b"Work/2024", b"Old", b"/")
    moved = Moved(year, account.ino("Work"), b"2024", b"Old", renamed)
    mounted.drafts.on_changes(Changes(ROOT, moved=[moved]))
    for found in (version, on_disk(account, version)):
        assert as_found(found) == (year, b"1.eml", (b"Old",))
        assert found.base is not None
        assert found.base.ref.mailbox == b"Old"
    for found in (below, on_disk(account, below)):
        assert found.path == (b"Old", b"May")
    assert below.attempt is not None
    assert below.attempt.mailbox == b"Old/May"
    assert beside.path == (b"Work",)
    assert [ref.mailbox for ref in mounted.journal.removals] == [b"Old"]
    assert mounted.published == []


def test_a_message_that_moves_changes_no_draft(account: Model, mounted: Mounted) -> None:
    draft = account.write("Work", b"new.eml")
    before = as_found(draft), draft.ctime
    mounted.drafts.on_changes(
        Changes(account.ino("INBOX"), moved=[Moved(Ino(7), account.ino("Work"), b"1.eml", b"2.eml")])
    )
    assert (as_found(draft), draft.ctime) == before


# -- what an earlier mount left


def test_drafts_are_found_by_path_in_a_rebuilt_cache(account: Model, tmp_path: Path) -> None:
    draft, top = account.write("Work/2024", b"new.eml"), account.write("", b"notes")
    with model(tmp_path / "rebuilt", account.spool.directory) as rebuilt:
        rebuilt.list_mailboxes(*account.mailboxes)
        mounted = Mounted(rebuilt)
        mounted.drafts.restore()
        found, notes = rebuilt.spool.get(draft.ino), rebuilt.spool.get(top.ino)
        assert found is not None
        assert notes is not None
        assert rebuilt.ino("Work/2024") != account.ino("Work/2024")
        assert as_found(found) == (rebuilt.ino("Work/2024"), b"new.eml", (b"Work", b"2024"))
        assert as_found(notes) == (ROOT, b"notes", ())
        assert mounted.published == []


def test_drafts_whose_path_is_gone_are_rescued(
    account: Model, tmp_path: Path, expected_log: ExpectedLog
) -> None:
    expected_log(LOST)
    draft = account.write("Work/2024", b"new.eml")
    with model(tmp_path / "rebuilt", account.spool.directory) as rebuilt:
        rebuilt.list_mailboxes("INBOX", "Work")
        mounted = Mounted(rebuilt)
        mounted.drafts.restore()
        assert mounted.published == [Changes(ROOT, added=[(draft.ino, b"new.eml")])]
        assert set(rebuilt.names(ROOT)) == {"INBOX", "Work", "new.eml"}


def test_hidden_messages_are_shown_unless_they_are_still_to_be_removed(
    account: Model, mounted: Mounted
) -> None:
    replaced, lost, owed = account.deliver("INBOX", 1, 2, 4)
    (deleted,) = account.deliver("INBOX", 3, flags="\\Deleted")
    draft = account.write("INBOX", b"new.eml")
    draft.base = account.base(replaced)
    mounted.journal.add_removal(account.base(owed).ref)
    for ino in (replaced, lost, owed, deleted):
        account.cache.hide(ino)
    mounted.drafts.restore()
    names = [account.node(ino).name for ino in (replaced, lost, owed, deleted)]
    assert names == [None, b"2.eml", None, None]


def test_notes_follow_a_mailbox_whose_rename_some_of_them_have_missed(
    account: Model, mounted: Mounted
) -> None:
    """After a power cut: the cache had another name of that time, so that no rename fitted the notes."""
    version, owed, other = account.deliver("Work/2024", 1, 2, 3)
    draft, new = account.change(version), account.write("Work/2024", b"new.eml")
    account.cache.hide(owed)
    mounted.journal.add_removal(account.base(owed).ref)
    mounted.journal.add_removal(account.base(other).ref)
    attempt = Attempt(b"Work/2024", UIDVALIDITY, 3, new.size, "")
    mounted.journal.begin_uploads({new.file.name: attempt})
    year, work = account.ino("Work/2024"), account.ino("Work")
    account.cache.rename_directory(year, work, b"Now", b"Work/2024", b"Work/Now")
    renamed = Renamed(b"Work/Older", b"Work/Now", b"/")
    mounted.drafts.on_changes(Changes(work, moved=[Moved(year, work, b"Older", b"Now", renamed)]))
    mounted.drafts.restore()
    for found in (draft, on_disk(account, draft)):
        assert found.base is not None
        assert found.base.ref.mailbox == b"Work/Now"
    assert mounted.journal.uploads[new.file.name].mailbox == b"Work/Now"
    # What is shown is no message that was replaced.
    assert {ref.mailbox: ref.uid for ref in mounted.journal.removals} == {b"Work/Now": 2, b"Work/2024": 3}
    assert account.node(owed).name is None
