"""Rename detection: what another client moved or renamed keeps its inode.

IMAP does not announce a move: one mailbox loses a message, another one gets one. If a new message looks like
one in another mailbox (`imapfs.sync.identify`), the server is asked whether that one is still there. If so,
the new one is a copy; if not, it was moved. Without proof that the bytes are the same, as another client may
have edited it before, the file keeps inode and name here, but the bytes are fetched again. A new mailbox is a
renamed one if it is proven to be one that is gone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Final

import trio

from imapfs.errors import MailboxGone, Refused
from imapfs.imap.grammar import FetchData
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.model import Ino, Uid
from imapfs.store.cache import Cache
from imapfs.store.rows import Directory, Mailbox, NewMessage, Node
from imapfs.store.spool import Spool
from imapfs.sync.changes import Moved
from imapfs.sync.identify import Original, find_moved, is_same_mailbox
from imapfs.waiting import Signal

_MAX_MESSAGES: Final = 1000
"""New messages of one synchronisation that are looked for in other mailboxes; more are an import."""
_MAX_MAILBOXES: Final = 20
"""New mailboxes that are compared with those that are gone: each takes a question to the server."""
_PATIENCE: Final = 1.0
"""Maximum seconds that a synchronisation waits for others."""


class MoveCoordinator:
    """Lets synchronisations wait for each other, so that a move is found whichever of them runs first.

    ``running`` are the mailboxes that are being synchronised, ``locks`` those that are in exclusive use. A
    message that has a new version in ``spool`` stays where it is. Used on the trio thread.
    """

    def __init__(self, running: Collection[Ino], locks: Mapping[Ino, trio.Lock], spool: Spool) -> None:
        self._running = running
        self._locks = locks
        self._waiting: set[Ino] = set()
        """Mailboxes whose synchronisation waits here, so that messages can be taken out of them."""
        self._removing: set[Ino] = set()
        """Those of them that are about to remove what is gone."""
        self._changed = Signal()
        self._spool = spool

    def can_take(self, ino: Ino, mailbox: Ino) -> bool:
        """Return whether a message that another client has moved can be taken out of ``mailbox`` now."""
        return self._is_free(mailbox) and self._spool.get(ino) is None

    def _is_free(self, mailbox: Ino) -> bool:
        lock = self._locks.get(mailbox)
        return lock is None or not lock.locked() or mailbox in self._waiting

    async def wait_for_sources(self, mailbox: Ino, sources: Collection[Ino]) -> None:
        """Wait, but not long, until messages can be taken out of ``sources`` into ``mailbox``."""
        await self._wait(mailbox, lambda: all(map(self._is_free, sources)))

    async def wait_before_removal(self, mailbox: Ino) -> None:
        """Wait, but not long, for synchronisations that may find what ``mailbox`` is about to remove."""
        self._removing.add(mailbox)
        try:
            await self._wait(mailbox, lambda: self._removing.issuperset(self._running))
        finally:
            self._removing.remove(mailbox)

    async def _wait(self, mailbox: Ino, condition: Callable[[], bool]) -> None:
        self._waiting.add(mailbox)
        self.wake()
        try:
            with trio.move_on_after(_PATIENCE):
                while not condition():
                    await self._changed.wait()
        finally:
            self._waiting.remove(mailbox)

    def wake(self) -> None:
        """Announce that a synchronisation has made progress, or has ended."""
        self._changed.send()


class MoveDetector:
    """Tells moved messages from new ones in one synchronisation of one mailbox.

    `keep_back` and `resolve` are called on the trio thread, `check_sources` between them in a thread.
    """

    def __init__(self, cache: Cache, mailbox: Ino, coordinator: MoveCoordinator) -> None:
        self._cache = cache
        self._mailbox = mailbox
        self._coordinator = coordinator
        self._candidates: dict[Uid, tuple[NewMessage, Original]] = {}
        self._there: dict[Ino, set[int]] = {}

    def keep_back(self, messages: Sequence[NewMessage]) -> list[NewMessage]:
        """Keep back the messages that may have been moved here, for `resolve`; return the others."""
        if len(self._candidates) + len(messages) > _MAX_MESSAGES:
            return list(messages)
        new = []
        for message in messages:
            known = self._cache.message(self._mailbox, message.uid)
            original = None if known is not None else find_moved(self._cache, self._mailbox, message)
            if original is None:
                new.append(message)
            else:
                self._candidates[message.uid] = message, original
        return new

    @property
    def kept_back(self) -> set[Uid]:
        """UIDs of the messages that wait for `resolve`."""
        return {*self._candidates}

    def check_sources(self, session: Session) -> set[Ino]:
        """Ask the server which originals are still there; return the mailboxes that they are in.

        Another mailbox may be selected afterwards. Raises ImapfsError.
        """
        originals = [original.node for _, original in self._candidates.values()]
        sources = {original.parent for original in originals}
        for source in sources:
            uids = [original.uid or 0 for original in originals if original.parent == source]
            mailbox = trio.from_thread.run_sync(self._cache.mailbox, source)
            self._there[source] = _still_there(session, mailbox, uids)
        return sources

    def resolve(self) -> tuple[list[NewMessage], list[Moved], list[Node]]:
        """After `check_sources`: move in the cache what was moved.

        Return the new messages, the moves, and the messages as they were whose cached bytes were forgotten.
        """
        candidates, there = list(self._candidates.values()), self._there
        self._candidates.clear()
        new, moved, rewritten = [], [], []
        for message, original in candidates:
            before = original.node
            now = self._cache.node(before.ino)
            place = before.parent, before.uid, before.name
            same = now is not None and (now.parent, now.uid, now.name) == place
            can_take = same and self._coordinator.can_take(before.ino, before.parent)
            if before.uid in there[before.parent] or not can_take:
                new.append(message)
                continue
            name = self._cache.relocate(before.ino, self._mailbox, message, same_bytes=original.same_bytes)
            moved.append(Moved(before.ino, before.parent, before.name or b"", name))
            if not original.same_bytes:
                # Its body may have been cached since it was compared.
                rewritten.append(now or before)
        return new, moved, rewritten


def _still_there(session: Session, mailbox: Mailbox | None, uids: list[int]) -> set[int]:
    """Return which of these messages the mailbox has; all of them, if that cannot be known."""
    found: list[FetchData] = []
    try:
        name = mailbox and mailbox.selectable_name
        if mailbox is None or name is None:
            return set(uids)
        state = session.examine(name)
        if state.uidvalidity != mailbox.uidvalidity:
            return set(uids)
        session.fetch_metadata(uids, found.append, headers=False)
    except (MailboxGone, Refused):
        return set(uids)
    return {data.uid or 0 for data in found}


async def find_renamed_mailboxes(
    pool: SessionPool, cache: Cache, wanted: Sequence[Directory]
) -> list[tuple[Mailbox, Directory, Ino]]:
    """Return the mailboxes of the cache that the server lists under another name.

    For each: the mailbox in the cache, the directory that it has to become, and the inode of the directory
    above. Mailboxes below a renamed one are not returned; they are renamed with it. Raises ImapfsError.
    """
    names = {directory.server_name for directory in wanted}
    gone: dict[int, list[Mailbox]] = {}
    for mailbox in cache.mailboxes():
        if mailbox.uidvalidity and mailbox.server_name not in names:
            gone.setdefault(mailbox.uidvalidity, []).append(mailbox)
    new = [d for d in wanted if d.selectable and d.server_name and not cache.mailbox_named(d.server_name)]
    if not gone or len(new) > _MAX_MAILBOXES:
        return []
    found = []
    for directory in new:
        parent = cache.directory_at(directory.path[:-1])
        if parent is None or cache.child(parent, directory.path[-1]) is not None:
            continue
        try:
            numbers = await pool.run(partial(Session.status, mailbox=directory.server_name or b""))
        except (MailboxGone, Refused):
            continue
        candidates = gone.get(numbers.get("UIDVALIDITY", 0), [])
        name = directory.server_name or b""
        proven = [mailbox for mailbox in candidates if await _is_renamed(pool, cache, mailbox, name)]
        if len(proven) == 1:
            candidates.remove(proven[0])
            found.append((proven[0], directory, parent))
    return found


async def _is_renamed(pool: SessionPool, cache: Cache, mailbox: Mailbox, name: bytes) -> bool:
    messages = cache.identities(mailbox.ino)
    try:
        return await pool.run(partial(is_same_mailbox, known=mailbox, messages=messages, name=name), name)
    except (MailboxGone, Refused):
        return False
