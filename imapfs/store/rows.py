"""Rows of the cache: what its queries return, and its changes take. Columns are explained in the schema."""

from dataclasses import dataclass
from typing import Final, NamedTuple

from imapfs.model import Ino, ModSeq, Uid, UidValidity


class Node(NamedTuple):
    """A directory entry; columns as in the schema."""

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

    @property
    def is_dir(self) -> bool:
        return self.uid is None

    def without_body(self) -> "Node":
        """The same entry for whoever removes it while its cached body stays."""
        return self._replace(crc=None, pack=None, offset=0)


NODE_COLUMNS: Final = "ino, parent, name, uid, size, exact, date, mtime, ctime, mode, crc, pack, offset"


class NewMessage(NamedTuple):
    """A message as the server lists it; columns as in the schema."""

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


class Details(NamedTuple):
    """What the extended attributes of a message show; columns as in the schema."""

    parent: Ino
    uid: Uid
    date: int
    zone: int
    flags: str
    modseq: ModSeq
    subject: str
    from_: str
    message_id: str


class Mailbox(NamedTuple):
    """What a directory stands for on the server; columns as in the schema."""

    ino: Ino
    server_name: bytes | None
    delimiter: bytes
    selectable: int
    special_use: str
    uidvalidity: UidValidity
    uidnext: int
    modseq: ModSeq
    complete: int

    @property
    def selectable_name(self) -> bytes | None:
        """Return the name to select the mailbox by, or None for a directory that holds no messages."""
        return self.server_name if self.selectable else None


MAILBOX_COLUMNS: Final = (
    "ino, server_name, delimiter, selectable, special_use, uidvalidity, uidnext, modseq, complete"
)


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory that the account should have: entry names from the root, and what it stands for."""

    path: tuple[bytes, ...]
    server_name: bytes | None
    delimiter: bytes
    selectable: bool
    special_use: str


class Body(NamedTuple):
    """A body that is complete and on disk, for a message that had this UID."""

    ino: Ino
    uid: Uid
    size: int
    crc: int
    pack: int | None
    """The pack that it is in; None if it has a file of its own."""
    offset: int
