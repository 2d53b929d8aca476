"""What becomes of a draft that is on the server: the cache adopts it under the same inode and name.

Only then does the draft leave the spool, and the old version the server.
"""

from dataclasses import replace

from imapfs.atomic import replace_file
from imapfs.imap.grammar import FetchData
from imapfs.model import Ino, MessageRef, Uid
from imapfs.store.bodies import BodyStore
from imapfs.store.cache import Cache
from imapfs.store.rows import NewMessage, Node
from imapfs.store.spool import MAX_TIME, Base, Draft, Spool
from imapfs.sync.append import Payload
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.identify import is_other
from imapfs.sync.locate import ServerMailbox
from imapfs.sync.mailbox import new_message
from imapfs.sync.pending_upload import PendingUpload
from imapfs.sync.replaced import ReplacedMessages
from imapfs.sync.upload_notes import UploadNotes


class Adopter:
    """Makes messages of drafts. Used on the trio thread.

    ``pending``: the drafts that are to be uploaded, by inode; those that are messages leave it here.
    """

    def __init__(
        self,
        cache: Cache,
        bodies: BodyStore,
        spool: Spool,
        replaced: ReplacedMessages,
        notes: UploadNotes,
        hub: ChangeHub,
        pending: dict[Ino, PendingUpload],
    ) -> None:
        self._cache = cache
        self._bodies = bodies
        self._spool = spool
        self._replaced = replaced
        self._notes = notes
        self._hub = hub
        self._pending = pending

    def is_other(self, draft: Draft, ref: MessageRef) -> bool:
        """Return whether a message is known to be another one than a draft may have become."""
        base = draft.base and draft.base.ref
        if base is not None and base == ref and not is_other(base, ref.date, ref.size):
            return True  # the old version, and not what has its UID in a mailbox that was restored
        mailbox = self._cache.mailbox_named(ref.mailbox)
        if mailbox is None or not self._cache.is_named(mailbox.ino, ref.uid):
            return False
        node = self._cache.message(mailbox.ino, ref.uid)
        return node is None or node.ino != draft.ino

    def was_removed(self, mailbox: ServerMailbox, draft: Draft, uid: Uid, payload: Payload) -> None:
        """Forget a draft that was uploaded as ``uid`` and then removed by another client."""
        self._notes.drop(draft)
        if payload.is_current(draft):
            self._hub.publish(Changes(mailbox.ino, gone=[_as_node(draft, uid)]))
            if draft.base is not None:
                self._replaced.note(draft.base.ref)
            self._spool.forget(draft)
            self.finish(draft, altered=True)

    def let_go(self, draft: Draft) -> None:
        """Forget a draft that the server has accepted, but shows as a message that nobody can recognise."""
        self._notes.drop(draft)
        self._hub.publish(Changes(draft.parent, gone=[_as_node(draft, Uid(0))]))
        if draft.base is not None:
            self._replaced.note(draft.base.ref)
        self._spool.forget(draft)
        self.finish(draft, altered=True)

    def adopt(
        self,
        mailbox: ServerMailbox,
        draft: Draft,
        data: FetchData,
        payload: Payload | None,
        *,
        is_same: bool = False,
    ) -> None:
        """Make a message of a draft that is on the server, with all its flags.

        If the draft was written to since, ``payload`` is None or not current, and the draft goes on as a new
        version of the message. ``is_same``: whether the server is known to have the bytes of the payload,
        whatever size it announces.
        """
        current = payload is not None and payload.is_current(draft)
        message = new_message(data)
        old = self._cache.node(draft.ino)
        if old is not None:
            # The new version takes over the inode: the old one needs another until it is removed.
            self._cache.displace(draft.ino)
            self._bodies.drop([old])
        self._cache.learn_uidvalidity(mailbox.ino, mailbox.uidvalidity)
        gone = self._cache.adopt(draft.ino, mailbox.ino, draft.name, message)
        names = [draft.name, *(g.name or b"" for g in gone)]
        self._hub.publish(Changes(mailbox.ino, gone=gone, replaced=names))
        if payload is None or not current:
            self._continue(draft, mailbox, message)
            return
        if draft.base is not None:
            # Before the draft goes: from here on only the journal knows that the old version has to go.
            self._replaced.note(draft.base.ref)
        same = is_same or (payload.clean and message.size == len(payload.data))
        if same:
            if payload.converted:
                replace_file(draft.file, payload.data, durable=False)
            self._bodies.take(draft.file, draft.ino, message.uid)
        self.keep_attributes(draft, message.date)
        self._spool.forget(draft)
        self._notes.drop(draft)
        self.finish(draft, altered=payload.converted or not same)

    def _continue(self, draft: Draft, mailbox: ServerMailbox, message: NewMessage) -> None:
        """Let a draft that was written to go on as a new version of the message that it has become."""
        if draft.base is not None:
            self._replaced.note(draft.base.ref)
        ref = replace(mailbox.ref(message.uid), date=message.date, size=message.size)
        draft.base = Base(ref, message.date, message.zone)
        draft.save()
        self._notes.drop(draft)
        pending = self._pending.get(draft.ino)
        if pending is not None and draft.state != "sending":
            del self._pending[draft.ino]
            pending.settle(None)

    def finish(self, draft: Draft, *, altered: bool) -> None:
        """Announce that a draft is a message. ``altered``: its bytes may not be those that were shown."""
        pending = self._pending.pop(draft.ino, None)
        same, other = ([], [draft.ino]) if altered else ([draft.ino], [])
        self._hub.publish(Changes(draft.parent, uploaded=[draft.ino], resized=same, rewritten=other))
        self._cache.touch_directory(draft.parent)
        if pending is not None:
            pending.settle(None)

    def keep_attributes(self, draft: Draft, date: int) -> None:
        """Keep mtime and mode of a draft where they do not follow from the message and its INTERNALDATE."""
        if draft.timed or draft.mtime // 1_000_000_000 != date:
            self._cache.set_local(draft.ino, mtime=min(draft.mtime, MAX_TIME))
        if draft.mode != 0o600:
            self._cache.set_local(draft.ino, mode=draft.mode)


def _as_node(draft: Draft, uid: Uid) -> Node:
    """Return a draft as the message that it was on the server for a moment."""
    times = None, draft.mtime, draft.ctime, draft.mode
    return Node(draft.ino, draft.parent, draft.name, uid, draft.size, 1, *times, None, None, 0)
