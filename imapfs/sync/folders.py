"""Mailboxes: CREATE, DELETE and RENAME on the server, then the tree of directories."""

import logging
from collections.abc import Callable
from typing import TypeVar

from imapfs.errors import ConnectionLost, Throttled
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.model import Ino
from imapfs.store.cache import Cache
from imapfs.sync.locate import Locator
from imapfs.sync.synchroniser import Synchroniser
from imapfs.sync.trash import TrashFinder

log = logging.getLogger(__name__)

T = TypeVar("T")


class Folders:
    """Creates, deletes and renames mailboxes. Raises ImapfsError."""

    def __init__(
        self, pool: SessionPool, cache: Cache, sync: Synchroniser, locator: Locator, trash: TrashFinder
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._sync = sync
        self._locator = locator
        self._trash = trash

    async def create(self, server_name: bytes) -> None:
        """Create a mailbox; its directory is there when this returns."""
        await self._once(
            lambda session: session.create_mailbox(server_name),
            lambda listed: server_name in listed,
        )
        await self._relist()

    async def delete(self, ino: Ino) -> bool:
        """Delete a mailbox that is empty on the server; return False if it is not empty."""
        name = self._locator.mailbox(ino).name
        async with self._sync.changing(ino):
            deleted = await self._once(
                lambda session: session.delete_mailbox(name), lambda listed: name not in listed
            )
        await self._relist()
        return deleted is not False or await self._discard(ino, name)

    async def _discard(self, ino: Ino, name: bytes) -> bool:
        """Move a mailbox below Trash that holds nothing but messages which were deleted here.

        Without UIDPLUS the server keeps those, marked as deleted, and DELETE would be for good. Return False,
        and change nothing, if there is anything else in it, or no Trash that it is outside of.
        """
        deleted = self._cache.count_if_hidden(ino)
        found = self._trash.find()
        trash = found and found.ino
        target = None if trash is None else self._cache.mailbox(trash)
        mailbox = self._cache.mailbox(ino)
        if not deleted or trash is None or target is None or target.server_name is None or mailbox is None:
            return False
        path, top = self._cache.path(ino), self._cache.path(trash)
        if not target.delimiter or path[: len(top)] == top:
            return False

        def holds_only_those(session: Session) -> bool:
            state = session.examine(name)
            return (state.exists, state.uidvalidity) == (deleted, mailbox.uidvalidity)

        if not await self._pool.run(holds_only_those, name):
            return False
        shown, component = path[-1], name.split(mailbox.delimiter)[-1] if mailbox.delimiter else name
        number = 1
        while self._cache.child(trash, shown) is not None:
            number += 1
            shown, component = path[-1] + b"~%d" % number, component + b"~%d" % number
        await self.rename(ino, name, target.server_name + target.delimiter + component, trash, shown)
        return True

    async def rename(self, ino: Ino, old: bytes, new: bytes, parent: Ino, name: bytes) -> None:
        """Rename a mailbox and all below it; messages keep their inode numbers and cached bodies.

        ``old`` and ``new`` are its names on the server, ``parent`` and ``name`` its new place in the tree.
        """
        async with self._sync.tree_lock, self._sync.changing(*self._cache.family(ino)):
            await self._once(
                lambda session: session.rename_mailbox(old, new),
                lambda listed: new in listed and old not in listed,
            )
            self._cache.rename_directory(ino, parent, name, old, new)

    async def _once(self, work: Callable[[Session], T], is_done: Callable[[set[bytes]], bool]) -> T | None:
        """Run ``work``. If the connection breaks, look at the list of mailboxes before running it again.

        Return None if ``is_done`` says of that list that the command was carried out.
        """
        try:
            return await self._pool.run(work, repeat=False)
        except (ConnectionLost, Throttled) as error:
            log.info("a change of mailboxes was cut off, looking at its outcome: %s", error)
        if is_done({entry.name for entry in await self._pool.run(Session.list_mailboxes)}):
            return None
        return await self._pool.run(work, repeat=False)

    async def _relist(self) -> None:
        refresh = self._sync.refresh_tree(0)
        if refresh is not None:
            await refresh.finished()
            # One that was under way may have been answered before the change.
            again = self._sync.refresh_tree(0)
            if again is not None:
                await again.finished()
