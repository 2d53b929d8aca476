"""Changes on the server: each is done there first and then in the cache, at most once.

A connection that breaks after a command was sent leaves open whether it was carried out. Commands that can
be repeated without harm are; for the others (MOVE, COPY) the outcome is looked up on the server before
anything is done again: is the message still there, and is there a new one where it was to go? The same look
finishes, at the next start, a move by COPY that a kill cut in two: such moves are in a journal while they
last. APPEND has its own module, `imapfs.sync.upload`, on the same principle.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import trio

from imapfs.atomic import replace_file
from imapfs.errors import (
    CacheError,
    ConnectionLost,
    ImapfsError,
    MailboxGone,
    MessageGone,
    NotSupported,
    Refused,
    Throttled,
)
from imapfs.headers import parse_headers
from imapfs.imap.grammar import FetchData, parse_date
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.log import report
from imapfs.model import DeletePolicy, Ino, ModSeq, Uid, UidValidity
from imapfs.store.cache import Cache, Details, Node
from imapfs.store.spool import Base
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.synchroniser import Synchroniser
from imapfs.waiting import Delays, Flag

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONFLICTS = 5
"""How often a change of flags is worked out anew because another client was quicker."""
_FIRST_RETRY = 1.0
_MAX_RETRY = 60.0


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells a copy of a message from other messages."""

    size: int
    """As the server gives it; 0 where that is not known."""
    date: int
    """INTERNALDATE, seconds since the epoch."""
    message_id: str

    def matches(self, other: "Fingerprint") -> bool:
        """Whether the other is a copy. Different messages may have one Message-ID: the size must fit too.
        Without a Message-ID, date and size have to do."""
        if self.message_id or other.message_id:
            return self.message_id == other.message_id and self.size in {0, other.size}
        return self.date == other.date and self.size == other.size

    @classmethod
    def of(cls, data: FetchData) -> "Fingerprint":
        date, _ = parse_date(data.date or b"")
        return cls(data.size or 0, date, parse_headers(data.body or b"").message_id)


class Operations:
    """Moves, deletions, flags and mailboxes of one account."""

    def __init__(
        self,
        pool: SessionPool,
        cache: Cache,
        sync: Synchroniser,
        journal: "Journal",
        policy: DeletePolicy,
        hub: ChangeHub,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._sync = sync
        self._journal = journal
        self._policy = policy
        self._hub = hub
        self._cut_off = Flag()
        if journal.left:
            self._cut_off.set()

    # -- messages ------------------------------------------------------------------------------------------

    async def move(self, ino: Ino, target: Ino, name: bytes) -> None:
        """Move a message to another mailbox, where it has ``name``; inode and cached body stay."""
        node = self._message(ino)
        async with self._sync.changing(node.parent, target):
            node = self._message(ino, node.parent)
            moved = await self._transfer(node, target)
            if moved.uid is None:
                # The server did not say, and no look found it: the next listing will.
                self._remove(node, stays=moved.original_stays)
                self._sync.freshness.forget(target)
                return
            gone = self._cache.move(ino, target, Uid(moved.uid), name, original_stays=moved.original_stays)
            if moved.original_stays:
                self._note_deleted(node)
            self._publish(gone)

    async def remove(self, ino: Ino) -> None:
        """Delete a message by the account's policy: into Trash, or, from there, for good."""
        node = self._message(ino)
        trash = self._cache.special_use("\\Trash")
        if self._policy == "trash" and trash is not None and not self._is_within(node.parent, trash):
            async with self._sync.changing(node.parent, trash):
                node = self._message(ino, node.parent)
                moved = await self._transfer(node, trash)
                self._remove(node, stays=moved.original_stays)
                self._sync.freshness.forget(trash)
            return
        async with self._sync.changing(node.parent):
            node = self._message(ino, node.parent)
            mailbox = self.mailbox(node.parent)

            def expunge(session: Session) -> bool:
                session.select(mailbox.name, mailbox.uidvalidity)
                return session.expunge(_uid(node))

            expunged = await self._pool.run(expunge, mailbox.name)
            self._remove(node, stays=not expunged)

    def _is_within(self, ino: Ino, ancestor: Ino) -> bool:
        path, top = self._cache.path(ino), self._cache.path(ancestor)
        return path[: len(top)] == top

    def _remove(self, node: Node, *, stays: bool) -> None:
        if stays:
            self._note_deleted(node)
            self._cache.hide(node.ino)
        else:
            self._publish(self._cache.remove_node(node.ino))

    def _note_deleted(self, node: Node) -> None:
        """A message that could not be expunged is marked as deleted on the server."""
        uid = Uid(_uid(node))
        flags = self._cache.flags(node.parent).get(uid, "")
        if "\\deleted" not in flags.lower():
            self._cache.set_flags(node.parent, [(uid, f"{flags} \\Deleted".strip(), ModSeq(0))])

    async def _transfer(self, node: Node, target: Ino) -> "_Transfer":
        source, destination = self.mailbox(node.parent), self.mailbox(target)
        for entry in self._journal.left:
            if entry.is_of(source.name, source.uidvalidity, _uid(node)):
                # Copied by an earlier attempt, perhaps: a second copy would stay for ever.
                await self._recover(entry)
                node = self._message(node.ino)
                break
        details = self._cache.details(node.ino)
        assert details is not None
        transfer = _Transfer(source, destination, node, details, self._journal, self._known)
        try:
            await self._run_transfer(transfer, source)
        except MessageGone:
            self._publish(self._cache.remove_node(node.ino))
            raise
        finally:
            if transfer.entry is not None:
                self._journal.left.append(transfer.entry)
                self._cut_off.set()
        return transfer

    async def _run_transfer(self, transfer: "_Transfer", source: "Box") -> None:
        try:
            await self._pool.run(transfer.run, source.name, repeat=False)
        except Throttled:
            # Perhaps between two of its commands; the pool waits as long as it was asked to.
            await self._pool.run(transfer.run, source.name)
        except ConnectionLost as error:
            log.info("a move was cut off, looking what became of it: %s", error)
            await self._pool.run(transfer.run, source.name)

    def _known(self, mailbox: Ino, uid: int) -> bool:
        return self._cache.message(mailbox, Uid(uid)) is not None

    async def change_flags(self, ino: Ino, change: Callable[[list[str]], tuple[set[str], set[str]]]) -> None:
        """Add and remove the flags that ``change`` derives from those that the message has.

        Raises NotSupported for what the server would not keep.
        """
        node = self._message(ino)
        async with self._sync.changing(node.parent):
            for _ in range(_CONFLICTS):
                details = self._cache.details(ino)
                if details is None or details.parent != node.parent:
                    raise MessageGone("it was removed on the server")
                add, remove = change(details.flags.split())
                if not add and not remove:
                    return
                mailbox = self.mailbox(details.parent)
                store = _Store(mailbox, details, add, remove)
                data = await self._pool.run(store.run, mailbox.name)
                if data is None:
                    raise MessageGone("it was removed on the server")
                flags = data.flags or ""
                changed = self._cache.set_flags(mailbox.ino, [(details.uid, flags, data.modseq or ModSeq(0))])
                self._hub.publish(Changes(mailbox.ino, flagged=changed))
                if not store.conflict:
                    missing = {flag for flag in add if flag.lower() not in flags.lower().split()}
                    if missing:
                        raise NotSupported(f"the server does not keep {' '.join(sorted(missing))}")
                    return
        raise Refused("another client keeps changing this message", "INUSE")

    # -- mailboxes -----------------------------------------------------------------------------------------

    async def create_mailbox(self, server_name: bytes) -> None:
        await self._once(
            lambda session: session.create_mailbox(server_name),
            lambda listed: server_name in listed,
        )
        await self._relist()

    async def delete_mailbox(self, ino: Ino) -> bool:
        """Delete a mailbox that is empty on the server; false if it is not."""
        name = self.mailbox(ino).name
        async with self._sync.changing(ino):
            deleted = await self._once(
                lambda session: session.delete_mailbox(name), lambda listed: name not in listed
            )
        await self._relist()
        return deleted is not False

    async def rename_mailbox(self, ino: Ino, old: bytes, new: bytes, parent: Ino, name: bytes) -> None:
        """Rename a mailbox and all below it; messages keep inodes and cached bodies."""
        async with self._sync.tree_lock, self._sync.changing(*self._cache.family(ino)):
            await self._once(
                lambda session: session.rename_mailbox(old, new),
                lambda listed: new in listed and old not in listed,
            )
            self._cache.rename_directory(ino, parent, name, old, new)

    async def _once(self, work: Callable[[Session], T], is_done: Callable[[set[bytes]], bool]) -> T | None:
        """Run ``work``; if the connection breaks meanwhile, again unless the list of mailboxes shows that it
        was carried out, which gives None."""
        try:
            return await self._pool.run(work, repeat=False)
        except (ConnectionLost, Throttled) as error:
            log.info("a change of mailboxes was cut off, looking what became of it: %s", error)
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

    # -- the past ------------------------------------------------------------------------------------------

    async def recover_forever(self) -> None:
        """Finish the moves that the end of an earlier process, or of a connection, cut in two."""
        while True:
            await self._cut_off.wait()
            delays = Delays(_FIRST_RETRY, _MAX_RETRY)
            while not await self.recover():
                await delays.sleep()

    async def recover(self) -> bool:
        """Try to finish the moves that were cut in two; false if some have to wait for the server."""
        for entry in list(self._journal.left):
            boxes = [
                self._cache.mailbox_named(name.encode("latin-1")) for name in (entry.source, entry.target)
            ]
            async with self._sync.changing(*(box.ino for box in boxes if box is not None)):
                if entry not in self._journal.left:
                    continue
                try:
                    await self._recover(entry)
                except ImapfsError as error:
                    report(error, "a move that was cut off is not finished yet")
        return not self._journal.left

    async def _recover(self, entry: "JournalEntry") -> None:
        """Finish one move; its mailboxes are in exclusive use."""
        recovery = _Recovery(entry)
        try:
            await self._pool.run(recovery.run)
        except MailboxGone:
            log.info("a move that was cut off cannot be finished: its mailbox is gone")
        self._journal.remove(entry)
        self._journal.left.remove(entry)
        box = self._cache.mailbox_named(entry.source.encode("latin-1"))
        if recovery.finished and box is not None and box.uidvalidity == entry.uidvalidity:
            node = self._cache.message(box.ino, Uid(entry.uid))
            if node is not None:
                self._remove(node, stays=recovery.original_stays)
            target = self._cache.mailbox_named(entry.target.encode("latin-1"))
            if target is not None:
                self._sync.freshness.forget(target.ino)

    # -- helpers -------------------------------------------------------------------------------------------

    def _message(self, ino: Ino, mailbox: Ino | None = None) -> Node:
        """A message, which must be in ``mailbox`` if that is given: another client may have moved it on."""
        node = self._cache.node(ino)
        if node is None or node.uid is None or mailbox not in {None, node.parent}:
            raise MessageGone("it was removed on the server")
        return node

    def mailbox(self, ino: Ino) -> "Box":
        """The mailbox of a directory. Raises MailboxGone if it has none that holds messages."""
        mailbox = self._cache.mailbox(ino)
        if mailbox is None or mailbox.server_name is None or not mailbox.selectable:
            raise MailboxGone("this directory is no mailbox")
        return Box(ino, mailbox.server_name, mailbox.uidvalidity, mailbox.uidnext)

    def find(self, base: Base) -> Node | None:
        """The message that a draft is a new version of, if it is still there."""
        mailbox = self._cache.mailbox_named(base.mailbox)
        if mailbox is None or mailbox.uidvalidity != base.uidvalidity:
            return None
        return self._cache.message(mailbox.ino, Uid(base.uid))

    async def find_listed(self, base: Base) -> Node | None:
        """`find`, after a look at the server if the cache does not know it. Raises ImapfsError."""
        mailbox = self._cache.mailbox_named(base.mailbox)
        found = self.find(base)
        if found is None and mailbox is not None and mailbox.uidvalidity in {0, base.uidvalidity}:
            refresh = self._sync.refresh_mailbox(mailbox.ino, 0)
            if refresh is not None:
                await refresh.finished()
                if refresh.error is not None:
                    raise refresh.error.with_traceback(None)
            found = self.find(base)
        return found

    def box_named(self, name: bytes, uidvalidity: int) -> "Box":
        """The mailbox of that name on the server. Raises MailboxGone."""
        mailbox = self._cache.mailbox_named(name)
        if mailbox is None:
            raise MailboxGone("the mailbox is gone")
        return Box(mailbox.ino, name, UidValidity(uidvalidity), mailbox.uidnext)

    def _publish(self, gone: list[Node]) -> None:
        for parent in {g.parent for g in gone}:
            self._hub.publish(Changes(parent, gone=[g for g in gone if g.parent == parent]))


@dataclass(frozen=True, slots=True)
class Box:
    """A mailbox as an operation needs it."""

    ino: Ino
    name: bytes
    uidvalidity: UidValidity
    uidnext: int


def _uid(node: Node) -> int:
    assert node.uid is not None
    return node.uid


class _Transfer:
    """One move; `run` runs in a thread, and again if the connection breaks."""

    def __init__(
        self,
        source: Box,
        target: Box,
        node: Node,
        details: Details,
        journal: "Journal",
        known: Callable[[Ino, int], bool],
    ) -> None:
        self._source = source
        self._target = target
        self._node = node
        self._details = details
        self._journal = journal
        self._known = known
        self._sent = False
        self._uidnext = target.uidnext
        # The size that is known may be the true one, and not what the server says of the copy.
        size = 0 if details.message_id else node.size
        self._wanted = Fingerprint(size, details.date, details.message_id)
        self.entry: JournalEntry | None = None
        """Set as long as there may be a copy beside the original."""
        self.uid: int | None = None
        """The UID in the target, once it is known."""
        self.original_stays = False

    def run(self, session: Session) -> None:
        """Move the message, or find out that it is moved. Raises MessageGone if it is nowhere."""
        uid = _uid(self._node)
        if self._sent and self._settle(session, uid):
            return
        if not self._uidnext:
            self._uidnext = session.status(self._target.name).get("UIDNEXT", 1)
        session.select(self._source.name, self._source.uidvalidity)
        if not session.has("MOVE"):
            self._copy(session, uid)
            return
        self._sent = True
        self.uid = session.move(uid, self._target.name)
        if self.uid is None and not self._settle(session, uid):
            # The connection did not know of the message yet, or the server moved nothing.
            session.select(self._source.name, self._source.uidvalidity, afresh=True)
            self.uid = session.move(uid, self._target.name)
            if self.uid is None and not self._settle(session, uid):
                raise Refused("the server did not move the message")

    def _copy(self, session: Session, uid: int) -> None:
        """COPY, then delete: the journal has it between the two."""
        if self.entry is None:
            self._wanted = self._fingerprint(session, uid)
            # Not from the cache: what came since then may look like the copy, and the original would go.
            session.examine(self._target.name)
            self._uidnext = session.next_uid()
            session.select(self._source.name, self._source.uidvalidity)
            entry = JournalEntry(
                self._source.name.decode("latin-1"),
                self._source.uidvalidity,
                uid,
                self._target.name.decode("latin-1"),
                self._uidnext,
                self._wanted.size,
                self._wanted.date,
                self._wanted.message_id,
            )
            self._journal.add(entry)
            self.entry = entry
        self._sent = True
        self.uid = session.copy(uid, self._target.name)
        if self.uid is None:
            self.uid = self._find(session)
            session.select(self._source.name, self._source.uidvalidity)
            if self.uid is None:
                raise Refused("the server did not copy the message")
        self._delete_original(session, uid)

    def _delete_original(self, session: Session, uid: int) -> None:
        self.original_stays = not session.expunge(uid)
        self._forget_entry()

    def _forget_entry(self) -> None:
        if self.entry is not None:
            self._journal.remove(self.entry)
            self.entry = None

    def _settle(self, session: Session, uid: int) -> bool:
        """Look what became of the move; true if nothing is left to do."""
        session.select(self._source.name, self._source.uidvalidity, afresh=True)
        here = bool(_metadata(session, [uid]))
        self.uid = self._find(session)
        if here and self.uid is not None and not session.has("MOVE"):
            session.select(self._source.name, self._source.uidvalidity)
            self._delete_original(session, uid)
            return True
        if not here:
            self._forget_entry()
            if self.uid is None:
                raise MessageGone("it was removed on the server")
            return True
        return False

    def _find(self, session: Session) -> int | None:
        """The message in the target, among what came after the move was begun."""
        session.examine(self._target.name)
        found: list[FetchData] = []
        session.fetch_metadata_from(self._uidnext, found.append)
        for data in found:
            assert data.uid is not None
            if data.uid < self._uidnext or trio.from_thread.run_sync(self._known, self._target.ino, data.uid):
                continue
            if self._wanted.matches(Fingerprint.of(data)):
                return data.uid
        return None

    def _fingerprint(self, session: Session, uid: int) -> Fingerprint:
        found = _metadata(session, [uid])
        if not found:
            raise MessageGone("it was removed on the server")
        return Fingerprint.of(found[0])


def _metadata(session: Session, uids: Iterable[int]) -> list[FetchData]:
    found: list[FetchData] = []
    session.fetch_metadata(uids, found.append)
    return found


class _Store:
    """One change of flags in a thread."""

    def __init__(self, mailbox: Box, details: Details, add: set[str], remove: set[str]) -> None:
        self._mailbox = mailbox
        self._details = details
        self._add = add
        self._remove = remove
        self.conflict = False
        """Whether nothing was changed because another client had changed the message."""

    def run(self, session: Session) -> FetchData | None:
        """The message's flags afterwards; None if it is gone."""
        state = session.select(self._mailbox.name, self._mailbox.uidvalidity)
        kept = state.permanent_flags
        if kept is not None:
            for flag in self._add | self._remove:
                if flag.lower() not in kept and ("\\*" not in kept or flag.startswith("\\")):
                    raise NotSupported(f"the server does not keep the flag {flag} in this mailbox")
        uid = self._details.uid
        modseq = self._details.modseq if session.has("CONDSTORE") else 0
        data: FetchData | None = None
        for sign, flags in (("+", self._add), ("-", self._remove)):
            if flags:
                data = session.store(uid, sign, sorted(flags), modseq)
                if data is None:
                    break
                modseq = (data.modseq or 0) if modseq else 0
        if data is None:
            found: list[FetchData] = []
            session.select(self._mailbox.name, self._mailbox.uidvalidity, afresh=True)
            session.fetch_metadata([uid], found.append)
            self.conflict = True
            return found[0] if found else None
        return data


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A move by COPY and delete that is under way; names as latin-1 text of the server's bytes."""

    source: str
    uidvalidity: int
    uid: int
    target: str
    uidnext: int
    """Of the target before the move: the copy has this UID or a higher one."""
    size: int
    date: int
    message_id: str

    def is_of(self, source: bytes, uidvalidity: int, uid: int) -> bool:
        """Whether it is about this message."""
        return (self.source, self.uidvalidity, self.uid) == (source.decode("latin-1"), uidvalidity, uid)


class Journal:
    """Moves under way, in a file that survives a power cut. Used from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: list[JournalEntry] = []
        try:
            self._entries = [JournalEntry(**entry) for entry in json.loads(path.read_text())]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            log.warning("the journal %s cannot be read (%s): look for messages that are doubled", path, error)
        self.left = list(self._entries)
        """Those that nobody works on any more, to be finished; touched on the trio thread only."""

    def add(self, entry: JournalEntry) -> None:
        """Note ``entry``; durable when this returns. Raises CacheError."""
        with self._lock:
            self._entries = [*self._entries, entry]
            self._write()

    def remove(self, entry: JournalEntry) -> None:
        """Note that it is finished."""
        with self._lock:
            self._entries = [e for e in self._entries if e != entry]
            self._write()

    def _write(self) -> None:
        text = json.dumps([asdict(entry) for entry in self._entries])
        try:
            replace_file(self._path, text.encode(), durable=True)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write the journal {self._path}") from None


class _Recovery:
    """Finishes a move of an earlier process: if the copy is there, the original goes."""

    def __init__(self, entry: JournalEntry) -> None:
        self._entry = entry
        self.finished = False
        self.original_stays = False

    def run(self, session: Session) -> None:
        entry = self._entry
        wanted = Fingerprint(entry.size, entry.date, entry.message_id)
        session.examine(entry.target.encode("latin-1"))
        found: list[FetchData] = []
        session.fetch_metadata_from(entry.uidnext, found.append)
        if any((d.uid or 0) >= entry.uidnext and wanted.matches(Fingerprint.of(d)) for d in found):
            session.select(entry.source.encode("latin-1"), UidValidity(entry.uidvalidity))
            self.original_stays = not session.expunge(entry.uid)
            self.finished = True
            log.info("finished a move of message %d that was cut off", entry.uid)
