"""How fresh a directory is when it is shown.

Opening a directory asks the server for changes, unless it was asked a moment ago or reports changes on its
own. Looking up an unknown name does the same. If the server does not answer soon, the cache is shown.
"""

import math
from typing import Final

import trio

from imapfs.errors import Offline
from imapfs.fs.tree import Entry, MailTree
from imapfs.imap.pool import SessionPool
from imapfs.model import Ino
from imapfs.store.cache import Cache
from imapfs.store.rows import Node
from imapfs.sync.refresh import Refresh
from imapfs.sync.synchroniser import Synchroniser
from imapfs.sync.watching import Watching

MAX_AGE: Final = 5.0
"""Seconds for which a listing is shown without asking the server again."""
_MAX_PATIENCE: Final = 3.0


def patience(timeout: float) -> float:
    """Return for how long to wait for the server before what is known is shown. All in seconds."""
    return min(_MAX_PATIENCE, timeout / 2)


class DirectoryRefresher:
    """Brings directories up to date before they are shown. ``timeout`` limits a request, in seconds."""

    def __init__(
        self,
        tree: MailTree,
        cache: Cache,
        pool: SessionPool,
        sync: Synchroniser,
        watching: Watching,
        timeout: float,
    ) -> None:
        self._tree = tree
        self._cache = cache
        self._pool = pool
        self._sync = sync
        self._watching = watching
        self._patience = patience(timeout)

    async def opened(self, directory: Node) -> None:
        """Bring a directory up to date that a program opens. It is in use until `closed`."""
        await self._refresh(directory)
        self._watching.opened(directory.ino)

    def closed(self, directory: Ino) -> None:
        """Note that a program has closed a directory."""
        self._watching.closed(directory)

    def used(self, mailbox: Ino) -> None:
        """Note that a program reads a message of a mailbox."""
        self._watching.used(mailbox)

    async def _refresh(self, directory: Node) -> None:
        if self._tree.is_scratch(directory.ino):
            return
        mailbox = self._cache.mailbox(directory.ino)
        tree = self._sync.refresh_tree(MAX_AGE)
        if mailbox is not None and mailbox.selectable:
            messages = self._sync.refresh_mailbox(directory.ino, MAX_AGE)
            if mailbox.complete:
                await self._wait(messages)
            if self._sync.freshness.is_watched(directory.ino):
                return  # changes of the list of mailboxes are shown when they arrive
        await self._wait(tree)

    async def mailbox(self, ino: Ino) -> None:
        """Bring the messages of a mailbox up to date that was listed before."""
        await self._wait(self._sync.refresh_mailbox(ino, MAX_AGE))

    async def _wait(self, refresh: Refresh | None) -> None:
        """Wait a limited time for a refresh, and ignore its result. Do not wait if the server is away.

        The limit counts from the start of the refresh: if one request has waited in vain, the next does not
        wait again.
        """
        if refresh is not None and not self._pool.is_away:
            with trio.move_on_at(refresh.started + self._patience):
                await refresh.finished()

    async def appears(self, directory: Ino, name: bytes, *, is_message: bool) -> Entry | None:
        """Ask the server for an unknown name. Return its entry, or None if none is found in time.

        If the directory was never listed, raises the error of the attempt to list it; but while the server is
        away the name counts as free, so that a file can be put there.
        """
        refresh, known = self._news_of(directory, is_message=is_message)
        found = None
        if refresh is not None and not (known and self._pool.is_away):
            with trio.move_on_at(refresh.started + self._patience if known else math.inf):
                while not refresh.done and found is None:
                    await refresh.progress()
                    found = self._tree.child(directory, name)
        found = found or self._tree.child(directory, name)
        error = None if refresh is None or known else refresh.error
        if found is None and error is not None and not isinstance(error, Offline):
            raise error.with_traceback(None)
        return found

    def _news_of(self, directory: Ino, *, is_message: bool) -> tuple[Refresh | None, bool]:
        """Return the refresh that may find a new name, and whether the directory was listed before."""
        if not is_message:
            return self._sync.refresh_tree(MAX_AGE), True
        ino = self._tree.inside(directory)
        mailbox = self._cache.mailbox(ino)
        if mailbox is None or not mailbox.selectable:
            return None, True
        self._watching.used(ino)
        if mailbox.complete and not self._sync.is_at_rest(ino):
            return None, True
        return self._sync.refresh_mailbox(ino, MAX_AGE), bool(mailbox.complete)

    async def more(self, directory: Ino) -> bool:
        """Wait for more entries of a mailbox that is listed for the first time; False at the end.

        Raises the error that ended the listing.
        """
        ino = self._tree.inside(directory)
        mailbox = self._cache.mailbox(ino)
        if mailbox is None or mailbox.complete or not mailbox.selectable:
            return False
        refresh = self._sync.refresh_mailbox(ino, MAX_AGE)
        if refresh is None:
            return False
        await refresh.progress()
        if refresh.error is not None:
            raise refresh.error.with_traceback(None)
        return True
