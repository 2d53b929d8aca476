"""Recognises what another client moved or renamed: it keeps its inode and what is cached of it.

IMAP does not tell of it: one mailbox loses a message and another one gets one. What comes with the
Message-ID, INTERNALDATE and size of a message in another mailbox is a copy if that one is still there, which
is asked; else it was moved. A mailbox that is new, with the UIDVALIDITY of one that is gone, is that one.
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
from imapfs.store.cache import Cache, Directory, Mailbox, NewMessage, Node
from imapfs.store.spool import Spool
from imapfs.sync.changes import Moved
from imapfs.sync.identify import find_moved
from imapfs.waiting import Signal

_MOST: Final = 1000
"""Messages that come at once and are looked for in other mailboxes; more are somebody's archive."""
_MOST_MAILBOXES: Final = 20
"""New ones that are compared with those that are gone: each is a question to the server."""
_PATIENCE: Final = 1.0
"""Seconds that a synchronisation waits for others."""


class Crossing:
    """Where synchronisations of mailboxes wait for each other, so that what was moved between them is found
    whichever of them is the first. Used on the trio thread.

    ``running`` are the mailboxes that are synchronised, ``locks`` those that are in exclusive use. A message
    that something in ``spool`` is a new version of has to stay where it is.
    """

    def __init__(self, running: Collection[Ino], locks: Mapping[Ino, trio.Lock], spool: Spool) -> None:
        self._running = running
        self._locks = locks
        self._waiting: set[Ino] = set()
        """Mailboxes whose synchronisation waits here: from these messages can be taken."""
        self._forgetting: set[Ino] = set()
        """Those of them that are about to forget what is gone."""
        self._changed = Signal()
        self._spool = spool

    def may_take(self, ino: Ino, mailbox: Ino) -> bool:
        """Whether a message that another client has moved can be taken from ``mailbox`` now."""
        return self._is_at_rest(mailbox) and self._spool.get(ino) is None

    def _is_at_rest(self, mailbox: Ino) -> bool:
        lock = self._locks.get(mailbox)
        return lock is None or not lock.locked() or mailbox in self._waiting

    async def before_taking(self, mailbox: Ino, sources: Collection[Ino]) -> None:
        """Wait a moment until messages that were moved to ``mailbox`` can be taken from ``sources``."""
        await self._wait(mailbox, lambda: all(map(self._is_at_rest, sources)))

    async def before_forgetting(self, mailbox: Ino) -> None:
        """Wait a moment for the others, which may have got what ``mailbox`` is about to forget."""
        self._forgetting.add(mailbox)
        try:
            await self._wait(mailbox, lambda: self._forgetting.issuperset(self._running))
        finally:
            self._forgetting.remove(mailbox)

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
        """A synchronisation has come further, or to its end."""
        self._changed.send()


class Arrivals:
    """Messages that come into one mailbox. Used by one synchronisation: see there which thread calls what.

    ``may_take(ino, mailbox)`` says whether a message of another mailbox can be taken from there now.
    """

    def __init__(self, cache: Cache, mailbox: Ino, may_take: Callable[[Ino, Ino], bool]) -> None:
        self._cache = cache
        self._mailbox = mailbox
        self._may_take = may_take
        self._held: dict[Uid, tuple[NewMessage, Node]] = {}
        self._there: dict[Ino, set[int]] = {}

    def hold_back(self, messages: Sequence[NewMessage]) -> list[NewMessage]:
        """On the trio thread: those that are new for sure; the others wait for `look` and `take`."""
        if len(self._held) + len(messages) > _MOST:
            return list(messages)
        new = []
        for message in messages:
            known = self._cache.message(self._mailbox, message.uid)
            twin = None if known is not None else find_moved(self._cache, self._mailbox, message)
            if twin is None:
                new.append(message)
            else:
                self._held[message.uid] = message, twin
        return new

    def look(self, session: Session) -> set[Ino]:
        """In a thread: find out which of those that were held back are still elsewhere too; where that is.

        Another mailbox may be selected afterwards. Raises ImapfsError.
        """
        sources = {twin.parent for _, twin in self._held.values()}
        for source in sources:
            uids = [twin.uid or 0 for _, twin in self._held.values() if twin.parent == source]
            box = trio.from_thread.run_sync(self._cache.mailbox, source)
            self._there[source] = _still_there(session, box, uids)
        return sources

    def take(self) -> tuple[list[NewMessage], list[Moved]]:
        """On the trio thread, after `look`: the new messages, and those that were moved, as they are now."""
        held, there = list(self._held.values()), self._there
        self._held.clear()
        new, moved = [], []
        for message, twin in held:
            now = self._cache.node(twin.ino)
            same = now is not None and (now.parent, now.uid, now.name) == (twin.parent, twin.uid, twin.name)
            if twin.uid in there[twin.parent] or not same or not self._may_take(twin.ino, twin.parent):
                new.append(message)
                continue
            name = self._cache.relocate(twin.ino, self._mailbox, message)
            moved.append(Moved(twin.ino, twin.parent, twin.name or b"", name))
        return new, moved


def _still_there(session: Session, box: Mailbox | None, uids: list[int]) -> set[int]:
    """Which of these messages the mailbox has; all of them, where that cannot be known."""
    found: list[FetchData] = []
    try:
        name = box and box.selectable_name
        if box is None or name is None:
            return set(uids)
        state = session.examine(name)
        if state.uidvalidity != box.uidvalidity:
            return set(uids)
        session.fetch_metadata(uids, found.append, headers=False)
    except (MailboxGone, Refused):
        return set(uids)
    return {data.uid or 0 for data in found}


async def find_renamed(
    pool: SessionPool, cache: Cache, wanted: Sequence[Directory]
) -> list[tuple[Mailbox, Directory, Ino]]:
    """Mailboxes that are in the cache under another name than in the list from the server: as they are there
    and as they are here, and the directory that they are in now. Raises ImapfsError.

    What is below a renamed mailbox is not looked for; it is renamed too.
    """
    names = {directory.server_name for directory in wanted}
    gone: dict[int, list[Mailbox]] = {}
    for box in cache.mailboxes():
        if box.uidvalidity and box.server_name not in names:
            gone.setdefault(box.uidvalidity, []).append(box)
    new = [d for d in wanted if d.selectable and d.server_name and not cache.mailbox_named(d.server_name)]
    if not gone or len(new) > _MOST_MAILBOXES:
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
        match = gone.pop(numbers.get("UIDVALIDITY", 0), [])
        if len(match) == 1 and numbers.get("UIDNEXT", 0) >= match[0].uidnext:
            found.append((match[0], directory, parent))
    return found
