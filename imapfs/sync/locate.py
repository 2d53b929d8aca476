"""Where things are on the server: the mailbox of a directory, and the message behind a reference."""

from dataclasses import dataclass

from imapfs.errors import MailboxGone, MessageGone
from imapfs.model import Ino, Uid, UidValidity
from imapfs.store.cache import Cache, Node
from imapfs.store.spool import Base
from imapfs.sync.synchroniser import Synchroniser


@dataclass(frozen=True, slots=True)
class ServerMailbox:
    """A mailbox that can be selected: its directory, and what a command needs to know of it."""

    ino: Ino
    name: bytes
    """As the server spells it."""
    uidvalidity: UidValidity
    """0 until the mailbox was synchronised."""
    uidnext: int
    """As of the last synchronisation; 0 until then."""


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
        return ServerMailbox(ino, name, mailbox.uidvalidity, mailbox.uidnext)

    def named(self, name: bytes, uidvalidity: int) -> ServerMailbox:
        """Return the mailbox of that name on the server, with the given UIDVALIDITY. Raises MailboxGone."""
        mailbox = self._cache.mailbox_named(name)
        if mailbox is None:
            raise MailboxGone("the mailbox is gone")
        return ServerMailbox(mailbox.ino, name, UidValidity(uidvalidity), mailbox.uidnext)

    def message(self, ino: Ino, mailbox: Ino | None = None) -> Node:
        """Return the message with that inode number, which must still be in ``mailbox`` if that is given.

        Raises MessageGone.
        """
        node = self._cache.node(ino)
        if node is None or node.uid is None or mailbox not in {None, node.parent}:
            raise MessageGone("it was removed on the server")
        return node

    def find(self, base: Base) -> Node | None:
        """Return the message that a reference points to, or None if the cache does not have it."""
        mailbox = self._cache.mailbox_named(base.mailbox)
        if mailbox is None or mailbox.uidvalidity != base.uidvalidity:
            return None
        return self._cache.message(mailbox.ino, Uid(base.uid))

    async def find_listed(self, base: Base) -> Node | None:
        """Do as `find`, but synchronise the mailbox if the cache does not have the message.

        Raises ImapfsError if that fails.
        """
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
