"""What becomes of a message on the server after a newer version has replaced it.

The newer version is safe before this is called: it is on the server, or in the spool. The old one then is
removed as `rm` would remove it. Until that has worked, it is in the journal, and is not shown. If the old
version is still shown under another name, as the backup that an editor makes, a local file keeps its bytes.
"""

import logging

import trio

from imapfs.errors import MailboxGone, MessageGone, NotPermitted, OtherMailbox, OtherMessage
from imapfs.log import report
from imapfs.model import MessageRef
from imapfs.names import is_message_name
from imapfs.store.cache import Cache
from imapfs.store.journal import Journal
from imapfs.store.rows import Node
from imapfs.store.spool import Spool
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.download import Downloader
from imapfs.sync.locate import Locator
from imapfs.sync.move import Mover
from imapfs.sync.synchroniser import Synchroniser
from imapfs.waiting import Delays

log = logging.getLogger(__name__)

_FIRST_RETRY = 1.0
"""Seconds until a removal that failed is tried again; doubled each time, up to"""
_MAX_RETRY = 60.0

_STAYS = OtherMessage | OtherMailbox | NotPermitted
"""What is no proof that the message is gone, and does not change by trying again."""


class ReplacedMessages:
    """Removes replaced messages from the server: at once if that is possible, otherwise later."""

    def __init__(
        self,
        cache: Cache,
        spool: Spool,
        journal: Journal,
        locator: Locator,
        mover: Mover,
        downloads: Downloader,
        nursery: trio.Nursery,
        sync: Synchroniser,
        hub: ChangeHub,
    ) -> None:
        self._cache = cache
        self._spool = spool
        self._journal = journal
        self._locator = locator
        self._mover = mover
        self._downloads = downloads
        self._nursery = nursery
        self._sync = sync
        self._hub = hub
        self._lock = trio.Lock()
        self._retrying = False

    def note(self, ref: MessageRef) -> None:
        """Note that a message is to be removed by the next `remove_all`. Raises CacheError."""
        self._journal.add_removal(ref)

    async def discard(self, ref: MessageRef) -> None:
        """Remove a message, now or later. Raises CacheError if that cannot be noted."""
        self.note(ref)
        await self.remove_all()

    async def remove_all(self) -> None:
        """Try to remove all messages that are to be removed. What fails is tried again in the background."""
        try:
            async with self._lock:
                for ref in self._journal.removals:
                    await self._remove(ref)
        finally:
            if self._journal.removals and not self._retrying:
                self._retrying = True
                self._nursery.start_soon(self._retry)

    async def _retry(self) -> None:
        """Remove what could not be removed yet, as other clients see two messages until then."""
        try:
            await trio.to_thread.run_sync(self._journal.sync)
        except Exception as error:
            report(error, "the journal may not survive a power cut")
        delays = Delays(_FIRST_RETRY, _MAX_RETRY)
        while self._journal.removals:
            await delays.sleep()
            await self.remove_all()
        self._retrying = False

    async def _remove(self, ref: MessageRef) -> None:
        """Remove a message, or find that it is not to be removed; what is uncertain is tried again later."""
        try:
            try:
                await self._remove_listed(ref)
            except MailboxGone:
                # Another client has renamed or deleted it, or it is an older one, and is listed again.
                await self._sync.list_mailboxes()
                if ref not in self._journal.removals:
                    return  # the note has followed the mailbox to its new name
                await self._remove_listed(ref, afresh=True)
        except (MessageGone, MailboxGone, NotPermitted) as error:
            if isinstance(error, MailboxGone) and self._is_about_another(error, ref):
                report(error, "the old version of a message is not removed yet")
                return
            # It may have been listed again as another one since it was found.
            if isinstance(error, _STAYS) or self._locator.is_taken(ref):
                log.warning(
                    "the version of a message that was edited here is not removed, both stay: %s", error
                )
                self._show(ref)
            else:
                log.info("the version of a message that was edited here is gone: %s: %s", ref, error)
        except Exception as error:
            report(error, "the old version of a message is not removed yet")
            return
        self._journal.end_removal(ref)

    def _is_about_another(self, error: MailboxGone, ref: MessageRef) -> bool:
        """Return whether the mailbox that is gone is another one than the message's, such as the Trash."""
        return not isinstance(error, OtherMailbox) and self._cache.mailbox_named(ref.mailbox) is not None

    def _show(self, ref: MessageRef) -> None:
        """Show a message again that stays."""
        node = self._locator.find(ref)
        if node is not None and node.name is None:
            self._cache.show(node.ino)
            shown = self._cache.node(node.ino)
            if shown is not None and shown.name is not None:
                self._hub.publish(Changes(shown.parent, added=[(shown.ino, shown.name)]))

    async def _remove_listed(self, ref: MessageRef, *, afresh: bool = False) -> None:
        """Remove a message that the server lists; do nothing if there is none. Raises ImapfsError.

        ``afresh``: whether what the cache knows of the mailbox may be out of date.
        """
        old = await self._locator.find_listed(ref, afresh=afresh)
        if old is None:
            if self._locator.is_taken(ref):
                raise OtherMessage("another message has its place on the server")
            if self._cache.mailbox_named(ref.mailbox) is None:
                raise MailboxGone("the mailbox is gone")
        while old is not None:
            # Only an editor renames the message that it replaces, and to no message's name. Any other name
            # that is still there comes from a cache that is older than the edit.
            if old.name is not None and not is_message_name(old.name):
                await self.keep_backup(old, old.name)
            try:
                await self._mover.remove(old.ino)
            except MessageGone as error:
                again = await self._locator.find_listed(ref)
                if isinstance(error, OtherMessage) or again is None or again.ino == old.ino:
                    raise
                # Meanwhile its mailbox was listed from the start.
                old = again
            else:
                return

    async def keep_backup(self, old: Node, name: bytes) -> None:
        """Keep the bytes of a message as a local file with its ``name``, and show the message no more.

        Raises ImapfsError.
        """
        content = await self._downloads.contents(old)
        self._cache.hide(old.ino)
        path = self._cache.path(old.parent)
        backup = self._spool.create(self._cache.new_ino(), old.parent, name, path, 0o600)
        await trio.to_thread.run_sync(backup.file.write_bytes, content)
        backup.state = "local"
        backup.save()
        # Before the message goes.
        await backup.secure()
        self._hub.publish(Changes(old.parent, gone=[old.without_body()], replaced=[name]))
