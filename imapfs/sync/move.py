"""Messages leave their mailbox: moved to another one, moved to Trash, or expunged.

The server comes first, the cache second. If the connection breaks after MOVE or COPY was sent, nobody knows
whether the server carried it out, and a second one might double the message. So the server is asked first:
is the message still there, and is there a new one where it was to go? The same question finishes a move by
COPY that the end of the process cut in two: such moves are in the journal while they last. Uploads
(`imapfs.sync.upload`) follow the same principle.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

import trio

from imapfs.errors import (
    ConnectionLost,
    ImapfsError,
    MailboxGone,
    MessageGone,
    NotPermitted,
    OtherMessage,
    Refused,
    Throttled,
)
from imapfs.imap.grammar import FetchData
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.log import report
from imapfs.model import DeletePolicy, Ino, MessageRef, ModSeq, Uid
from imapfs.store.cache import Cache
from imapfs.store.journal import Journal, PendingMove
from imapfs.store.rows import Details, Node
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.folders import Folders
from imapfs.sync.identify import Fingerprint, find_copy, find_same, select_known
from imapfs.sync.locate import Locator, ServerMailbox
from imapfs.sync.synchroniser import Synchroniser
from imapfs.sync.trash import NAME, Trash, TrashFinder
from imapfs.waiting import Delays, Flag

log = logging.getLogger(__name__)

_FINAL: Final = frozenset(
    {"INUSE", "LIMIT", "NONEXISTENT", "NOPERM", "OVERQUOTA", "SERVERBUG", "TOOBIG", "TRYCREATE"}
)
"""Codes of a refused MOVE that COPY would be refused with as well."""

_FIRST_RETRY: Final = 1.0
"""Seconds until an interrupted move is tried again; doubled each time, up to"""
_MAX_RETRY: Final = 60.0


class Mover:
    """Moves and removes messages, and finishes moves that were interrupted."""

    def __init__(
        self,
        pool: SessionPool,
        cache: Cache,
        sync: Synchroniser,
        locator: Locator,
        journal: Journal,
        policy: DeletePolicy,
        trash: TrashFinder,
        folders: Folders,
        hub: ChangeHub,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._sync = sync
        self._locator = locator
        self._journal = journal
        self._policy = policy
        self._trash = trash
        self._folders = folders
        self._hub = hub
        self._interrupted = Flag()
        if journal.interrupted:
            self._interrupted.set()

    async def move(self, ino: Ino, target: Ino, name: bytes) -> None:
        """Move a message to another mailbox, with ``name``; its inode number and cached body stay.

        Raises ImapfsError.
        """
        node = self._locator.message(ino)
        async with self._sync.changing(node.parent, target):
            node = self._locator.message(ino, node.parent)
            moved = await self._transfer(node, target)
            if moved.uid is None:
                # The server did not name the UID, and it was not found: the next listing shows the message.
                self._remove(node, stays=moved.original_stays)
                self._sync.freshness.forget(target)
                return
            if moved.uidvalidity:
                self._cache.learn_uidvalidity(target, moved.uidvalidity)
            gone = self._cache.move(
                *(ino, target, Uid(moved.uid), name),
                original_stays=moved.original_stays,
                same_bytes=moved.is_proven,
            )
            if moved.original_stays:
                self._note_deleted(node)
            self._publish(gone)
            if not moved.is_proven:
                self._hub.publish(Changes(target, rewritten=[ino], outdated=[node]))

    async def remove(self, ino: Ino) -> None:
        """Delete a message as the account's policy says: move it to Trash, or expunge it.

        If there is no Trash, one is made. Raises NotPermitted if that cannot be, or if the message is in what
        is only called like a Trash; ImapfsError.
        """
        node = self._locator.message(ino)
        found = await self._find_trash() if self._policy == "trash" else None
        trash = found and found.ino
        if found is not None and not found.is_sure and self._is_within(node.parent, found.ino):
            path = self._cache.shown(found.ino)
            raise NotPermitted(
                f"{path} is taken for the Trash because of its name: to delete in it for good, set trash = "
                f'"{path}" in the configuration file'
            )
        if trash is not None and not self._is_within(node.parent, trash):
            async with self._sync.changing(node.parent, trash):
                node = self._locator.message(ino, node.parent)
                moved = await self._transfer(node, trash)
                self._remove(node, stays=moved.original_stays)
                self._sync.freshness.forget(trash)
            return
        async with self._sync.changing(node.parent):
            node = self._locator.message(ino, node.parent)
            mailbox = self._locator.mailbox(node.parent)

            def expunge(session: Session) -> bool:
                mailbox.select(session, mailbox.known(node))
                return session.expunge(_uid(node))

            try:
                expunged = await self._pool.run(expunge, mailbox.name)
            except OtherMessage:
                self._sync.disown(node)
                raise
            except MessageGone:
                expunged = True
            self._remove(node, stays=not expunged)

    async def _find_trash(self) -> Trash:
        """Return the Trash; make one if there is none. Raises NotPermitted, ConnectionLost."""
        found = self._trash.find()
        if found is None and self._trash.may_make:
            name = self._sync.prefix + NAME
            try:
                await self._folders.create(name)
            except (ConnectionLost, Throttled):
                raise
            except ImapfsError as error:
                raise NotPermitted(f"there is no Trash, and none can be made: {error}") from None
            self._cache.note_made_trash(name)
            found = self._trash.find()
        if found is None:
            raise NotPermitted(
                "there is no Trash: set trash in the configuration file to a mailbox that is there"
            )
        return found

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
        """Note in the cache that a message which could not be expunged has the flag \\Deleted."""
        uid = _uid(node)
        flags = self._cache.flags(node.parent).get(uid, "")
        if "\\deleted" not in flags.lower():
            self._cache.set_flags(node.parent, [(uid, f"{flags} \\Deleted".strip(), ModSeq(0))])

    async def _transfer(self, node: Node, target: Ino) -> "_Transfer":
        source, destination = self._locator.mailbox(node.parent), self._locator.mailbox(target)
        for entry in self._journal.interrupted:
            if entry.source == source.ref(_uid(node)):
                # An earlier attempt may have copied it: nothing would ever remove a second copy.
                await self._recover(entry)
                node = self._locator.message(node.ino)
                break
        details = self._cache.details(node.ino)
        assert details is not None
        transfer = _Transfer(source, destination, source.known(node), details, self._journal, self._known)
        try:
            await self._run_transfer(transfer, source)
        except MessageGone:
            self._sync.disown(node)
            raise
        except Refused:
            # There may be a copy, which is to be shown then.
            self._sync.freshness.forget(target)
            raise
        finally:
            if transfer.entry is not None:
                self._journal.interrupted.append(transfer.entry)
                self._interrupted.set()
        return transfer

    async def _run_transfer(self, transfer: "_Transfer", source: ServerMailbox) -> None:
        try:
            await self._pool.run(transfer.run, source.name, repeat=False)
        except Throttled:
            # It may have been between two of its commands. The pool waits as long as the server asks.
            await self._pool.run(transfer.run, source.name)
        except ConnectionLost as error:
            log.info("a move was interrupted, looking at its outcome: %s", error)
            await self._pool.run(transfer.run, source.name)

    def _known(self, ref: MessageRef) -> bool:
        return self._locator.find(ref) is not None

    # -- interrupted moves ---------------------------------------------------------------------------------

    async def recover_forever(self) -> None:
        """Finish the moves that the end of a connection, or of an earlier process, has interrupted."""
        while True:
            await self._interrupted.wait()
            delays = Delays(_FIRST_RETRY, _MAX_RETRY)
            while not await self.recover():
                await delays.sleep()

    async def recover(self) -> bool:
        """Try to finish interrupted moves; return False if some have to wait for the server."""
        for entry in list(self._journal.interrupted):
            names = (entry.source.mailbox, entry.target)
            mailboxes = [self._cache.mailbox_named(name) for name in names]
            async with self._sync.changing(*(mailbox.ino for mailbox in mailboxes if mailbox is not None)):
                if entry not in self._journal.interrupted:
                    continue
                try:
                    await self._recover(entry)
                except ImapfsError as error:
                    report(error, "an interrupted move is not finished yet")
        return not self._journal.interrupted

    async def _recover(self, entry: PendingMove) -> None:
        """Finish one move. The caller has its mailboxes in exclusive use."""
        recovery = _Recovery(entry)
        try:
            await self._pool.run(recovery.run)
        except MailboxGone:
            log.info("an interrupted move cannot be finished: its mailbox is gone")
        self._journal.finish(entry)
        self._journal.interrupted.remove(entry)
        source = self._cache.mailbox_named(entry.source.mailbox)
        if recovery.finished and source is not None and source.uidvalidity == entry.source.uidvalidity:
            node = self._locator.find(entry.source)
            if node is not None:
                self._remove(node, stays=recovery.original_stays)
            target = self._cache.mailbox_named(entry.target)
            if target is not None:
                self._sync.freshness.forget(target.ino)

    def _publish(self, gone: list[Node]) -> None:
        for parent in {g.parent for g in gone}:
            self._hub.publish(Changes(parent, gone=[g for g in gone if g.parent == parent]))


def _uid(node: Node) -> Uid:
    assert node.uid is not None
    return node.uid


class _Transfer:
    """One move. `run` runs in a thread, and again if the connection breaks."""

    def __init__(
        self,
        source: ServerMailbox,
        target: ServerMailbox,
        original: MessageRef,
        details: Details,
        journal: Journal,
        known: Callable[[MessageRef], bool],
    ) -> None:
        self._source = source
        self._target = target
        self._original = original
        self._journal = journal
        self._known = known
        self._sent = False
        self._by_copy = False
        """Whether the server has refused MOVE, although it offers it."""
        self._uidnext = target.uidnext
        self._wanted = Fingerprint(details.announced or 0, details.date, details.message_id)
        self.entry: PendingMove | None = None
        """The journal's entry, as long as there may be a copy beside the original."""
        self.uid: int | None = None
        """The UID in the target, once it is known."""
        self.is_proven = False
        """Whether the server has named that UID. Otherwise a message that looks like it was found there."""
        self.original_stays = False
        self.uidvalidity = target.uidvalidity
        """Of the target; 0 until the server has named it."""

    def run(self, session: Session) -> None:
        """Move the message, or find out that it was moved. Raises MessageGone if it is nowhere."""
        uid = self._original.uid
        if self._sent and self._settle(session, uid):
            return
        if not self._uidnext:
            self._uidnext = session.status(self._target.name).get("UIDNEXT", 1)
        self._source.select(session, self._original)
        if self._by_copy or not session.has("MOVE"):
            self._copy(session, uid)
            return
        self._sent = True
        try:
            if not self._named(session.move(uid, self._target.name)) and not self._settle(session, uid):
                # The connection had not seen the message yet, or the server moved nothing.
                self._source.select(session, self._original, afresh=True)
                if not self._named(session.move(uid, self._target.name)) and not self._settle(session, uid):
                    raise Refused("the server did not move the message")
        except Throttled:
            raise
        except Refused as error:
            if error.code in _FINAL:
                raise
            log.info("the server refuses MOVE, trying COPY: %s", error)
            self._by_copy = True
            if not self._settle(session, uid):
                self._copy(session, uid)

    def _named(self, copy: MessageRef | None) -> bool:
        """Note what the server has named as the message in the target; return whether it has."""
        # Some gateways send UIDVALIDITY 0 or a wrong one: such a UID is useless.
        if copy is None or self._target.uidvalidity not in {0, copy.uidvalidity}:
            return False
        self.uid, self.is_proven, self.uidvalidity = copy.uid, True, copy.uidvalidity
        return True

    def _copy(self, session: Session, uid: Uid) -> None:
        """Copy the message, then delete the original; the journal has an entry in between."""
        if self.entry is None:
            self._wanted = self._fingerprint(session, uid)
            # Not from the cache: a message that came since then may look like the copy, and the original
            # would be deleted.
            session.examine(self._target.name)
            self._uidnext = session.next_uid()
            self._source.select(session, self._original)
            entry = PendingMove(
                self._source.ref(uid),
                self._target.name,
                self._uidnext,
                self._wanted.size,
                self._wanted.date,
                self._wanted.message_id,
            )
            self._journal.begin(entry)
            self.entry = entry
        self._sent = True
        copy = session.copy(uid, self._target.name)
        if not self._named(copy):
            # The server has said that it made a copy.
            self.uid = self._find(session)
            if self.uid is None:
                raise Refused("the server did not copy the message")
            self._source.select(session, self._original)
        self._delete_original(session, uid, copy)

    def _delete_original(self, session: Session, uid: Uid, copy: MessageRef | None) -> None:
        """Delete the original. If the server refuses, delete the copy, if the server has named it."""
        try:
            self.original_stays = not session.expunge(uid)
        except Throttled:
            raise
        except Refused:
            self._undo(session, copy)
            self._forget_entry()
            raise
        self._forget_entry()

    def _undo(self, session: Session, copy: MessageRef | None) -> None:
        try:
            if copy is not None:
                known = replace(copy, date=self._wanted.date, size=self._wanted.size or None)
                select_known(session, known)
                session.expunge(copy.uid)
                return
        except MessageGone:
            return
        except (Refused, MailboxGone) as error:
            log.info("the copy of a message that could not be moved is not removed: %s", error)
        log.warning("a message was copied, but the server refuses to delete the original: it is there twice")

    def _forget_entry(self) -> None:
        if self.entry is not None:
            self._journal.finish(self.entry)
            self.entry = None

    def _settle(self, session: Session, uid: Uid) -> bool:
        """Look at the outcome of the move; return whether nothing is left to do.

        If something is, the original's mailbox is selected.
        """
        self.uid, self.is_proven = None, False
        try:
            self._source.select(session, self._original, afresh=True)
        except MessageGone:
            self._forget_entry()
            self.uid = self._find(session)
            if self.uid is None:
                raise
            return True
        if session.has("MOVE") and not self._by_copy:
            return False
        self.uid = find_same(
            session, self._original, self._target.name, self._uidnext, self._wanted, self._is_known
        )
        self._source.select(session, self._original)
        if self.uid is None:
            return False
        self.is_proven = True
        self._delete_original(session, uid, None)
        return True

    def _find(self, session: Session) -> Uid | None:
        """Return the UID of what looks like the message in the target, or None if nothing does."""
        return find_copy(session, self._target.name, self._uidnext, self._wanted, self._is_known)

    def _is_known(self, ref: MessageRef) -> bool:
        return trio.from_thread.run_sync(self._known, ref)

    def _fingerprint(self, session: Session, uid: Uid) -> Fingerprint:
        found = _metadata(session, [uid])
        if not found:
            raise MessageGone("it was removed on the server")
        return Fingerprint.of(found[0])


def _metadata(session: Session, uids: Iterable[int]) -> list[FetchData]:
    found: list[FetchData] = []
    session.fetch_metadata(uids, found.append)
    return found


class _Recovery:
    """Finishes an interrupted move in a thread: if the copy is there, the original goes."""

    def __init__(self, move: PendingMove) -> None:
        self._move = move
        self.finished = False
        self.original_stays = False

    def run(self, session: Session) -> None:
        """Look for the copy, and delete the original. Raises MailboxGone."""
        move = self._move
        wanted = Fingerprint(move.size, move.date, move.message_id)
        if find_same(session, move.source, move.target, move.uidnext, wanted) is None:
            return
        try:
            select_known(session, replace(move.source, date=move.date, size=move.size or None))
            self.original_stays = not session.expunge(move.source.uid)
        except Throttled:
            raise
        except Refused as error:
            log.warning("the original of a message that was copied is not deleted, both stay: %s", error)
            return
        except MessageGone:
            pass
        self.finished = True
        log.info("finished an interrupted move of message %d", move.source.uid)
