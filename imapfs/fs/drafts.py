"""Keeps drafts in directories that exist: they follow their mailboxes, and are never lost with one.

A draft has the path of its directory, because a rebuilt cache gives directories new inodes. If a mailbox is
renamed on the server, its drafts go with it. If it is deleted, they move to the top of the mount.
"""

import logging

from imapfs.fs.tree import MailTree
from imapfs.store.cache import Cache
from imapfs.store.journal import Journal
from imapfs.store.spool import Draft, Spool
from imapfs.sync.changes import ChangeHub, Changes, Renamed

log = logging.getLogger(__name__)


class Drafts:
    """Keeps the drafts of a mount in directories that exist."""

    def __init__(self, tree: MailTree, cache: Cache, spool: Spool, journal: Journal, hub: ChangeHub) -> None:
        self._tree = tree
        self._cache = cache
        self._spool = spool
        self._journal = journal
        self._hub = hub

    def restore(self) -> None:
        """Take over the drafts of an earlier mount, and show messages that it hid but did not remove."""
        self._place_all()
        self._show_hidden()

    def _place_all(self) -> None:
        """Find the directories of all drafts by their paths."""
        # After a power cut the database may not know that it has assigned their inodes.
        self._cache.reserve_inos(max((d.ino for d in self._spool), default=0))
        for draft in self._spool:
            directory = self._cache.directory_at(draft.path)
            if directory is None:
                self._rescue(draft)
            elif directory != draft.parent:
                self._spool.rename(draft, directory, draft.name, draft.path)

    def _show_hidden(self) -> None:
        """Show hidden messages again, except for those that are still to be removed."""
        due = {draft.base.ref for draft in self._spool if draft.base is not None}
        due.update(self._journal.removals)
        for ino, ref, flags in self._cache.hidden():
            if ref not in due and "\\deleted" not in flags.lower():
                self._cache.show(ino)

    def on_changes(self, changes: Changes) -> None:
        """Move the drafts of mailboxes that were deleted or renamed."""
        for node in changes.gone:
            if node.is_dir:
                for draft in self._spool.within(node.ino):
                    self._rescue(draft)
        for moved in changes.moved:
            if moved.mailbox is not None:
                self.follow(moved.mailbox)

    def _rescue(self, draft: Draft) -> None:
        """Move a draft to the top of the mount, where the user finds it."""
        log.warning("%s: its mailbox was deleted; the file is now at the top of the mount", draft.shown)
        root = self._tree.root
        name = self._spool.free_name(root, draft.name)
        self._spool.rename(draft, root, name, self._cache.path(root))
        self._hub.publish(Changes(root, added=[(draft.ino, name)]))

    def follow(self, change: Renamed) -> None:
        """Update what refers to a renamed mailbox, or to a mailbox below it."""
        self._spool.rename_mailbox(*change)
        self._journal.rename_mailbox(*change)
        for draft in self._spool:
            path = self._cache.path(draft.parent)
            if path != draft.path:
                self._spool.rename(draft, draft.parent, draft.name, path)
