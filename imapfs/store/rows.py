"""Types of the rows in the cache. Their fields are the columns that `imapfs.store.database` explains."""

from dataclasses import dataclass
from typing import Final, NamedTuple

from imapfs.model import Ino, ModSeq, Uid, UidValidity


class Node(NamedTuple):
    """A directory entry."""

    ino: Ino
    parent: Ino
    name: bytes | None
    uid: Uid | None
    size: int
    exact: int
    date: int | None
    mtime: int
    ctime: int
    mode: int | None
    crc: int | None
    pack: int | None
    offset: int
    announced: int | None = None

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory, not a message."""
        return self.uid is None

    def without_body(self) -> "Node":
        """Return the entry as one that has no cached body, for a removal that must not drop the body."""
        return self._replace(crc=None, pack=None, offset=0)


NODE_COLUMNS: Final = (
    "ino, parent, name, uid, size, exact, date, mtime, ctime, mode, crc, pack, offset, announced"
)


class NewMessage(NamedTuple):
    """A message as the server lists it."""

    uid: Uid
    size: int
    date: int
    zone: int
    flags: str
    modseq: ModSeq
    subject: str
    sender: str
    from_: str
    message_id: str
    recipient: str = ""
    object_id: str | None = None


class Details(NamedTuple):
    """What the extended attributes of a message show."""

    parent: Ino
    uid: Uid
    date: int
    zone: int
    flags: str
    modseq: ModSeq
    subject: str
    from_: str
    message_id: str
    recipient: str
    object_id: str | None
    announced: int | None


DETAILS_COLUMNS: Final = (
    "parent, uid, date, zone, flags, modseq, subject, from_, message_id, recipient, object_id, announced"
)


class Mailbox(NamedTuple):
    """The mailbox of a directory."""

    ino: Ino
    server_name: bytes | None
    delimiter: bytes
    selectable: int
    special_use: str
    uidvalidity: UidValidity
    uidnext: int
    modseq: ModSeq
    complete: int
    object_id: str | None = None

    @property
    def selectable_name(self) -> bytes | None:
        """Return the name to select the mailbox by, or None for a directory that holds no messages."""
        return self.server_name if self.selectable else None


MAILBOX_COLUMNS: Final = (
    "ino, server_name, delimiter, selectable, special_use, uidvalidity, uidnext, modseq, complete, object_id"
)


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory that the account should have, and its mailbox."""

    path: tuple[bytes, ...]
    """Entry names from the root."""
    server_name: bytes | None
    delimiter: bytes
    selectable: bool
    special_use: str


class Body(NamedTuple):
    """A complete body on disk, of the message that had this inode number and UID."""

    ino: Ino
    uid: Uid
    size: int
    crc: int
    pack: int | None
    """The pack that has it, or None if it has a file of its own."""
    offset: int
