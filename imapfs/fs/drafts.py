"""Keeps drafts in directories that exist: they follow their mailboxes, and are never lost with one.

A draft has the path of its directory, because a rebuilt cache gives directories new inodes. If a mailbox is
renamed on the server, its drafts go with it. If it is deleted, they move to the top of the mount. Those that
were to be uploaded go back, and on, when a mailbox of the same path appears.
"""

import logging

from imapfs.errors import CacheError, MailboxGone
from imapfs.fs.scratch import ScratchDirectories
from imapfs.fs.tree import MailTree
from imapfs.log import report
from imapfs.model import MessageRef
from imapfs.store.cache import Cache
from imapfs.store.journal import Attempt, Journal
from imapfs.store.spool import Draft, Spool
from imapfs.sync.changes import ChangeHub, Changes, Moved, Renamed
from imapfs.sync.identify import is_other
from imapfs.sync.upload import Uploader

log = logging.getLogger(__name__)


class Drafts:
    """Keeps the drafts of a mount in directories that exist."""

    def __init__(
        self,
        tree: MailTree,
        cache: Cache,
        spool: Spool,
        journal: Journal,
        scratch: ScratchDirectories,
        uploader: Uploader | None,
        hub: ChangeHub,
    ) -> None:
        """``uploader``: None for a mount that uploads nothing."""
        self._tree = tree
        self._cache = cache
        self._spool = spool
        self._journal = journal
        self._scratch = scratch
        self._uploader = uploader
        self._hub = hub

    def restore(self) -> None:
        """Take over the drafts of an earlier mount, and show messages that it hid but did not remove."""
        self._scratch.restore()
        self._place_all()
        self._follow_lost_renames()
        self._return_home()
        self._show_hidden()

    def _place_all(self) -> None:
        """Find the directories of all drafts by their paths."""
        for draft in self._spool:
            directory = self._cache.directory_at(draft.path)
            if draft.rescued:
                # Not saved: what is left of its description may be of use to a person.
                root = self._tree.root
                name = self._spool.free_name(root, draft.name) if root != draft.parent else draft.name
                self._spool.place(draft, root, name, self._cache.path(root))
            elif directory is None:
                self._rescue(draft)
            elif directory != draft.parent:
                self._spool.move(draft, directory, draft.name, draft.path)

    def _follow_lost_renames(self) -> None:
        """Let drafts and notes refer to mailboxes by the names that these have in the cache.

        After a power cut, the cache, the journal and a draft's description may each have another of the names
        that a mailbox has had. By such a name neither an upload nor what it replaces would be found again.
        """
        by_file = {draft.file.name: draft for draft in self._spool}

        def of_draft(draft: Draft | None, ref: MessageRef | Attempt) -> bytes | None:
            own = None if draft is None else self._cache.mailbox(draft.parent)
            if own is None or own.uidvalidity != ref.uidvalidity or self._is_there(ref):
                return None
            return own.selectable_name

        def of_removal(ref: MessageRef) -> bytes | None:
            if self._is_there(ref):
                return None
            # Only a message that is replaced is hidden.
            found = [
                hidden.mailbox
                for ino, hidden, _ in self._cache.hidden()
                if (hidden.uidvalidity, hidden.uid) == (ref.uidvalidity, ref.uid)
                and (node := self._cache.node(ino)) is not None
                and not is_other(ref, node.date, node.announced)
            ]
            return found[0] if len(found) == 1 else None

        self._spool.correct_mailboxes(of_draft)
        try:
            self._journal.correct_mailboxes(lambda file, ref: of_draft(by_file.get(file), ref), of_removal)
        except CacheError as error:
            report(error, "what is to be removed from renamed mailboxes stays there")

    def _is_there(self, ref: MessageRef | Attempt) -> bool:
        """Return whether the cache has the mailbox that is referred to, or one that may be that."""
        known = self._cache.mailbox_named(ref.mailbox)
        return known is not None and known.uidvalidity in {0, ref.uidvalidity}

    def _show_hidden(self) -> None:
        """Show hidden messages again, except for those that are still to be removed."""
        due = {draft.base.ref for draft in self._spool if draft.base is not None}
        due.update(self._journal.removals)
        for ino, ref, flags in self._cache.hidden():
            if ref not in due and "\\deleted" not in flags.lower():
                try:
                    self._cache.show(ino)
                except CacheError as error:
                    report(error, "a message that was not removed is shown at the next mount")

    def on_changes(self, changes: Changes) -> None:
        """Move the drafts of mailboxes that were deleted or renamed."""
        self._scratch.on_changes(changes)
        for node in changes.gone:
            if node.is_dir:
                for draft in self._spool.within(node.ino):
                    self._rescue(draft)
        for moved in changes.moved:
            if moved.mailbox is not None:
                self.follow(moved.mailbox)
        if changes.added or changes.moved:
            self._return_home()

    def _rescue(self, draft: Draft) -> None:
        """Move a draft to the top of the mount, where the user finds it.

        If it was to be uploaded, it keeps the path of its mailbox, which may be found again.
        """
        log.warning("%s: its mailbox was deleted; the file is now at the top of the mount", draft.shown)
        root = self._tree.root
        if draft.state in {"open", "sending"}:
            draft.home = draft.home or draft.path
        name = self._spool.free_name(root, draft.name)
        self._spool.move(draft, root, name, self._cache.path(root))
        if draft.state == "sending" and self._uploader is not None:
            lost = (
                "its mailbox was deleted: it is uploaded when that is found again, or moved into another one"
            )
            self._uploader.refuse(draft, MailboxGone(lost))
        self._hub.publish(Changes(root, added=[(draft.ino, name)]))

    def _return_home(self) -> None:
        """Move drafts whose mailbox is found again back into it, and upload them."""
        for draft in self._spool:
            directory = None if draft.home is None else self._cache.directory_at(draft.home)
            if draft.home is None or directory is None or self._tree.is_scratch(directory):
                continue
            parent, old_name = draft.parent, draft.name
            name = self._spool.free_name(directory, draft.name)
            path, draft.home = draft.home, None
            self._spool.move(draft, directory, name, path)
            if draft.state == "unsent" and not draft.dirty and self._uploader is not None:
                try:
                    self._uploader.submit(draft)
                except CacheError as error:
                    report(error, f"{draft.shown} is not uploaded before the next mount")
            moved = Moved(draft.ino, parent, old_name, name)
            self._hub.publish(Changes(directory, moved=[moved]))

    def follow(self, change: Renamed) -> None:
        """Update what refers to a renamed mailbox, or to a mailbox below it."""
        self._scratch.follow()
        self._spool.rename_mailbox(*change)
        try:
            self._journal.rename_mailbox(*change)
        except CacheError as error:
            report(error, "old versions of messages in a renamed mailbox are not removed")
        for draft in self._spool:
            path = self._cache.path(draft.parent)
            if path != draft.path:
                self._spool.move(draft, draft.parent, draft.name, path)
