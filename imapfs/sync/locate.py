"""Where things are on the server: the mailbox of a directory, and the message behind a reference."""

from dataclasses import dataclass

from imapfs.errors import MailboxGone, MessageGone
from imapfs.imap.responses import MailboxState
from imapfs.imap.session import Session
from imapfs.model import Ino, MessageRef, ModSeq, Uid, UidValidity
from imapfs.store.cache import Cache
from imapfs.store.rows import Mailbox, Node
from imapfs.sync.identify import is_other, select_known
from imapfs.sync.synchroniser import Synchroniser


@dataclass(frozen=True, slots=True)
class ServerMailbox:
    """A mailbox that can be selected: its directory, and what a command needs to know of it."""

    ino: Ino
    name: bytes
    """As the server spells it."""
    uidvalidity: UidValidity
    """0 until a message of it is known: before that, Courier names another one each time."""
    uidnext: int
    """As of the last synchronisation; 0 until then. A search for what has come since begins here."""
    modseq: ModSeq
    """HIGHESTMODSEQ as of the last synchronisation; 0 if there is none."""
    reached: int
    """The highest UIDNEXT that is known: a lower one is that of a restored mailbox."""

    def ref(self, uid: Uid) -> MessageRef:
        """Return the identity of the message in this mailbox that has ``uid``."""
        return MessageRef(self.name, self.uidvalidity, uid)

    def known(self, node: Node) -> MessageRef:
        """Return the identity of a message of this mailbox, with what proves it."""
        assert node.uid is not None
        return MessageRef(self.name, self.uidvalidity, node.uid, node.date, node.announced)

    def select(self, session: Session, ref: MessageRef, *, afresh: bool = False) -> MailboxState:
        """In a thread: see `imapfs.sync.identify.select_known`."""
        return select_known(session, ref, self.reached, self.modseq, afresh=afresh)


class Locator:
    """Finds mailboxes and messages, in the cache first."""

    def __init__(self, cache: Cache, sync: Synchroniser) -> None:
        self._cache = cache
        self._sync = sync

    def mailbox(self, ino: Ino) -> ServerMailbox:
        """Return the mailbox of a directory. Raises MailboxGone if it has none that holds messages."""
        mailbox = self._cache.mailbox(ino)
        name = mailbox and mailbox.selectable_name
        if mailbox is None or name is None:
            raise MailboxGone("this directory is no mailbox")
        is_empty = not self._cache.last_uid(ino)
        return self._as_known(mailbox, name, UidValidity(0) if is_empty else mailbox.uidvalidity)

    def named(self, name: bytes, uidvalidity: int) -> ServerMailbox:
        """Return the mailbox of that name on the server, with the given UIDVALIDITY. Raises MailboxGone."""
        mailbox = self._cache.mailbox_named(name)
        if mailbox is None:
            raise MailboxGone("the mailbox is gone")
        return self._as_known(mailbox, name, UidValidity(uidvalidity))

    def _as_known(self, mailbox: Mailbox, name: bytes, uidvalidity: UidValidity) -> ServerMailbox:
        reached = self._cache.uidnext(mailbox)
        return ServerMailbox(mailbox.ino, name, uidvalidity, mailbox.uidnext, mailbox.modseq, reached)

    def message(self, ino: Ino, mailbox: Ino | None = None) -> Node:
        """Return the message with that inode number, which must still be in ``mailbox`` if that is given.

        Raises MessageGone.
        """
        node = self._cache.node(ino)
        if node is None or node.uid is None or mailbox not in {None, node.parent}:
            raise MessageGone("it was removed on the server")
        return node

    def find(self, ref: MessageRef) -> Node | None:
        """Return the message with that identity, or None if the cache does not have it."""
        node = self._with_uid(ref)
        return None if node is None or is_other(ref, node.date, node.announced) else node

    def is_taken(self, ref: MessageRef) -> bool:
        """Return whether the cache has another message than the expected one under this UID."""
        node = self._with_uid(ref)
        return node is not None and is_other(ref, node.date, node.announced)

    def _with_uid(self, ref: MessageRef) -> Node | None:
        mailbox = self._cache.mailbox_named(ref.mailbox)
        if mailbox is None or mailbox.uidvalidity != ref.uidvalidity:
            return None
        return self._cache.message(mailbox.ino, ref.uid)

    async def find_listed(self, ref: MessageRef, *, afresh: bool = False) -> Node | None:
        """Do as `find`, but synchronise the mailbox if the cache lacks the message, or ``afresh`` is true.

        Raises ImapfsError if that fails.
        """
        mailbox = self._cache.mailbox_named(ref.mailbox)
        found = self.find(ref)
        known = mailbox is not None and mailbox.uidvalidity in {0, ref.uidvalidity}
        if mailbox is not None and known and (found is None or afresh):
            refresh = self._sync.refresh_mailbox(mailbox.ino, 0)
            if refresh is not None:
                await refresh.finished()
                if refresh.error is not None:
                    raise refresh.error.with_traceback(None)
            found = self.find(ref)
        return found
