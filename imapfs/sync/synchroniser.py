"""Keeping the cache equal to the server: what is synchronised when, and what has to wait for what.

How one mailbox is synchronised is decided in `imapfs.sync.mailbox`, how mailboxes become directories in
`imapfs.sync.mailbox_list`. One synchronisation per mailbox runs at a time; requests meanwhile wait for it.
"""

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Final

import trio

from imapfs.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ImapfsError,
    MailboxGone,
    Refused,
    Throttled,
)
from imapfs.imap.grammar import ListEntry
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.log import report
from imapfs.model import ROOT, Ino
from imapfs.store.cache import Cache
from imapfs.store.rows import Directory, Mailbox, Node
from imapfs.store.spool import Spool
from imapfs.sync.changes import ChangeHub, Changes, Moved, Renamed
from imapfs.sync.freshness import Freshness
from imapfs.sync.mailbox import MailboxRun
from imapfs.sync.mailbox_list import plan_tree
from imapfs.sync.refresh import Refresh
from imapfs.sync.renames import MoveCoordinator, find_renamed_mailboxes

log = logging.getLogger(__name__)

_REST: Final = 0.3
"""Seconds since the last change made through the mount after which a mailbox is at rest."""
_MAX_REST: Final = 2.0
"""Maximum seconds that a task waits for a mailbox to be at rest."""


class Synchroniser:
    """Synchronises on demand, and publishes the changes of each transaction on ``hub``.

    Used on the trio thread.
    """

    def __init__(
        self,
        pool: SessionPool,
        cache: Cache,
        spool: Spool,
        nursery: trio.Nursery,
        hub: ChangeHub,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._nursery = nursery
        self._hub = hub
        self.freshness = Freshness()
        self.tree_lock = trio.Lock()
        """Held while mailboxes are listed or renamed. LOCK ORDER: before those of mailboxes."""
        self._tree: Refresh | None = None
        self._mailboxes: dict[Ino, Refresh] = {}
        self._locks: dict[Ino, trio.Lock] = {}
        self._changing: Counter[Ino] = Counter()
        """Number of changes of a mailbox that this mount is making."""
        self._changed_at: dict[Ino, float] = {}
        """When the last one ended."""
        self._moves = MoveCoordinator(self._mailboxes.keys(), self._locks, spool)
        self.prefix = b""
        """Prefix of the personal namespace, once the tree is known."""
        self.delimiter = b""
        """Hierarchy delimiter of the personal namespace, once the tree is known."""

    # -- the list of mailboxes -----------------------------------------------------------------------------

    def refresh_tree(self, max_age: float) -> Refresh | None:
        """Refresh the list of mailboxes, or return None if it is not older than ``max_age`` seconds."""
        if self._tree is None and self.freshness.is_due(ROOT, max_age):
            self._tree = Refresh()
            self._nursery.start_soon(self._run_tree, self._tree, Session.list_mailboxes)
        return self._tree

    async def list_mailboxes(self) -> None:
        """Have the cache, drafts and notes follow what other clients have done to mailboxes until now.

        Not while a mailbox is in exclusive use. Raises ConnectionLost, Throttled, AuthenticationFailed.
        """
        for _ in range(2):
            # The first one may have been under way before.
            refresh = self.refresh_tree(0)
            if refresh is not None:
                await refresh.finished()
                if isinstance(refresh.error, ConnectionLost | AuthenticationFailed | Throttled):
                    raise refresh.error

    async def poll(self, mailboxes: Sequence[bytes]) -> dict[bytes, dict[str, int]]:
        """Refresh the list of mailboxes; return the STATUS of at least ``mailboxes``. Raises ImapfsError."""
        found: dict[bytes, dict[str, int]] = {}

        def look(session: Session) -> list[ListEntry]:
            found.clear()
            return session.list_with_status(mailboxes, found.__setitem__)

        while self._tree is not None:
            await self._tree.finished()
        refresh = self._tree = Refresh()
        await self._run_tree(refresh, look)
        if refresh.error is not None:
            raise refresh.error
        return found

    async def _run_tree(self, refresh: Refresh, look: Callable[[Session], list[ListEntry]]) -> None:
        error: ImapfsError | None = None

        def ask(session: Session) -> tuple[list[Directory], bytes, bytes]:
            # Planned in the thread too: a server may list any number of mailboxes.
            entries = look(session)
            delimiter = next((e.delimiter for e in entries if e.delimiter), b"")
            return plan_tree(entries, session.personal_prefix), session.personal_prefix, delimiter

        try:
            async with self.tree_lock:
                started = time.monotonic()
                wanted, self.prefix, self.delimiter = await self._pool.run(ask)
                for mailbox, directory, parent in await find_renamed_mailboxes(
                    self._pool, self._cache, wanted
                ):
                    await self._follow_rename(mailbox, directory, parent)
                added, gone = self._cache.set_tree(wanted)
            self.freshness.asked(ROOT, started)
            # Deletions first, so that the order is one in which a client could have made the changes.
            gone_from = _by_parent(gone)
            added_to = _by_parent(added)
            for parent in {**gone_from, **added_to}:
                new = [(node.ino, node.name or b"") for node in added_to.get(parent, ())]
                self._hub.publish(Changes(parent, added=new, gone=gone_from.get(parent, ())))
        except Exception as failure:
            error = report(failure, "the list of mailboxes was not refreshed")
        finally:
            self._tree = None
            refresh.finish(error)

    def is_known(self, entries: Iterable[ListEntry]) -> bool:
        """Return whether the cache has exactly these mailboxes."""
        known = {(m.server_name, bool(m.selectable), m.special_use) for m in self._cache.mailboxes()}
        return known == {(entry.name, entry.selectable, entry.special_use) for entry in entries}

    async def _follow_rename(self, mailbox: Mailbox, directory: Directory, parent: Ino) -> None:
        """Rename a directory in the cache, after another client has renamed its mailbox."""
        old, new, name = mailbox.server_name, directory.server_name, directory.path[-1]
        async with self.exclusive(*self._cache.family(mailbox.ino)):
            node, now = self._cache.node(mailbox.ino), self._cache.mailbox(mailbox.ino)
            if node is None or now is None or now.server_name != old or old is None or new is None:
                return
            self._cache.rename_directory(mailbox.ino, parent, name, old, new)
        renamed = Renamed(old, new, mailbox.delimiter)
        self._hub.publish(
            Changes(parent, moved=[Moved(mailbox.ino, node.parent, node.name or b"", name, renamed)])
        )

    # -- mailboxes -----------------------------------------------------------------------------------------

    def refresh_mailbox(self, ino: Ino, max_age: float) -> Refresh | None:
        """Refresh a mailbox's messages, or return None if they are not older than ``max_age`` seconds."""
        refresh = self._mailboxes.get(ino)
        if refresh is None and self.freshness.is_due(ino, max_age):
            refresh = self._mailboxes[ino] = Refresh()
            self._nursery.start_soon(self._run_mailbox, ino, refresh)
        return refresh

    def is_current(self, ino: Ino) -> bool:
        """Return whether a mailbox was synchronised since a connection was last lost.

        If not, the server may have been restored from a backup: it may have other messages although STATUS
        is as it was, and its UIDNEXT may be lower than the one that is known.
        """
        return self.freshness.was_listed(ino, self._pool.lost_at)

    def is_refreshing(self, ino: Ino) -> bool:
        """Return whether a mailbox is being synchronised."""
        return ino in self._mailboxes

    async def _run_mailbox(self, ino: Ino, refresh: Refresh) -> None:
        error: ImapfsError | None = None
        started = time.monotonic()
        try:
            mailbox = self._cache.mailbox(ino)
            name = mailbox and mailbox.selectable_name
            if name is None:
                raise MailboxGone("the mailbox is gone")
            run = MailboxRun(self._cache, ino, refresh, self._hub, self._moves)
            async with self.exclusive(ino):
                await self._list_messages(run, name)
            self.freshness.listed(ino, started)
        except Exception as failure:
            error = report(failure, f"{self._cache.shown(ino)} was not refreshed")
            if isinstance(failure, MailboxGone):
                # Perhaps it was renamed or deleted: the list of mailboxes shows it.
                self.refresh_tree(0)
        finally:
            del self._mailboxes[ino]
            self._moves.wake()
            refresh.finish(error)

    async def _list_messages(self, run: MailboxRun, name: bytes) -> None:
        while True:
            try:
                return await self._pool.run(run.run, name)
            except (ConnectionLost, Refused) as error:
                if not run.can_continue(error):
                    raise
                log.info("%s: continuing where the listing ended: %s", run.shown, error)

    # -- exclusive use -------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def changing(self, *mailboxes: Ino) -> AsyncIterator[None]:
        """Do as `exclusive`, and note that this mount changes these mailboxes: see `is_at_rest`."""
        self._changing.update(mailboxes)
        try:
            async with self.exclusive(*mailboxes):
                yield
        finally:
            self._changing.subtract(mailboxes)
            self._changed_at.update(dict.fromkeys(mailboxes, time.monotonic()))

    def is_at_rest(self, mailbox: Ino) -> bool:
        """Return whether this mount is not changing a mailbox, and has not done so for a moment.

        Until then news from the server is about these changes, and a synchronisation would only delay the
        next of them.
        """
        was = self._changed_at.get(mailbox, -math.inf)
        return not self._changing[mailbox] and time.monotonic() >= was + _REST

    async def at_rest(self, mailbox: Ino) -> None:
        """Wait until a mailbox is at rest, or `_MAX_REST` seconds have passed."""
        with trio.move_on_after(_MAX_REST):
            while True:
                if self.is_at_rest(mailbox):
                    return
                await trio.sleep(_REST)

    @contextlib.asynccontextmanager
    async def exclusive(self, *mailboxes: Ino) -> AsyncIterator[None]:
        """Keep these mailboxes from being synchronised or changed by others.

        LOCK ORDER: by inode number. The locks are held while the server is asked, so a handler that can
        answer from the cache never waits for them.
        """
        async with contextlib.AsyncExitStack() as stack:
            for ino in sorted(set(mailboxes)):
                await stack.enter_async_context(self._locks.setdefault(ino, trio.Lock()))
            try:
                yield
            except MailboxGone:
                for ino in mailboxes:
                    self.look_again(ino)
                raise
            except (ConnectionLost, trio.Cancelled):
                # The server may have carried out a command whose answer was lost.
                for ino in mailboxes:
                    self.freshness.forget(ino)
                raise

    def disown(self, node: Node) -> None:
        """Take a message out of the cache that the server no longer has; list what may have its place."""
        gone = self._cache.remove_node(node.ino)
        self._hub.publish(Changes(node.parent, gone=gone))
        self.look_again(node.parent)

    def look_again(self, mailbox: Ino) -> None:
        """Synchronise a mailbox that turned out to be another one: created again, renamed or deleted."""
        self.freshness.forget(mailbox)
        if mailbox not in self._mailboxes:
            self.refresh_mailbox(mailbox, 0)


def _by_parent(nodes: Iterable[Node]) -> dict[Ino, list[Node]]:
    found: dict[Ino, list[Node]] = {}
    for node in nodes:
        found.setdefault(node.parent, []).append(node)
    return found
