"""Is it the same message? The one module that decides this.

IMAP identifies a message by mailbox, UIDVALIDITY and UID, and by nothing else that every server has. So when
a message may have come to another place, its identity has to be inferred from what is known of it:

- an APPEND, or a move, whose outcome is not known (`find_upload`, `find_copy`): all that came to the mailbox
  since then, which is what has the UIDNEXT of that time or a higher UID, is compared;
- a message that another client has moved (`find_moved`);
- a mailbox that was deleted and created again within the second that its UIDVALIDITY counts (`is_alike`).

The callers act on the answer; none of them compares sizes, dates or digests itself. Functions that take a
session run in a thread, and leave the mailbox in question selected read-only.
"""

import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass

from imapfs.headers import parse_headers
from imapfs.imap.grammar import FetchData, parse_date
from imapfs.imap.session import Session
from imapfs.model import Ino, Uid
from imapfs.store.cache import Cache
from imapfs.store.rows import NewMessage, Node
from imapfs.store.spool import Attempt

_MAX_ADDED = 2
"""Bytes that a server may add to a message: a final line end."""
_HEAD = 1 << 18
"""Bytes at the beginning of a message in which its header is expected to end."""


# -- copies on the server ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a copy on the same server has in common with its original."""

    size: int
    """RFC822.SIZE in bytes; 0 if it is not known."""
    date: int
    """INTERNALDATE, seconds since the epoch."""
    message_id: str

    def matches(self, other: "Fingerprint") -> bool:
        """Return whether the other message is a copy.

        Message-ID and size decide, as different messages may have the same Message-ID. Without a Message-ID,
        date and size have to do.
        """
        if self.message_id or other.message_id:
            return self.message_id == other.message_id and self.size in {0, other.size}
        return self.date == other.date and self.size == other.size

    @classmethod
    def of(cls, data: FetchData) -> "Fingerprint":
        """Return the fingerprint of a message on the server."""
        date, _ = parse_date(data.date or b"")
        return cls(data.size or 0, date, parse_headers(data.body or b"").message_id)


def find_copy(
    session: Session,
    mailbox: bytes,
    uidnext: int,
    wanted: Fingerprint,
    is_other: Callable[[Uid], bool] = lambda _: False,
) -> Uid | None:
    """Return the UID of the copy among the messages with ``uidnext`` or a higher UID, or None.

    ``is_other``: whether a UID is known to be another message's. Raises MailboxGone.
    """
    session.examine(mailbox)
    for uid, data in _arrived_since(session, uidnext):
        if not is_other(uid) and wanted.matches(Fingerprint.of(data)):
            return uid
    return None


# -- uploads -----------------------------------------------------------------------------------------------


def may_be_upload(attempt: Attempt, uid: int, size: int) -> bool:
    """Return whether a message in the mailbox of an attempt may be what was uploaded, by UID and size."""
    return uid >= attempt.uidnext and 0 <= size - attempt.size <= _MAX_ADDED


def is_upload(attempt: Attempt, content: bytes) -> bool:
    """Return whether the bytes of a message are those that were uploaded, but for what servers change."""
    return digest(content) == attempt.digest or (not is_clean(content) and len(content) == attempt.size)


def find_upload(session: Session, attempt: Attempt, is_other: Callable[[Uid], bool]) -> FetchData | None:
    """Return the message that an attempt has created, or None.

    ``is_other``: whether a UID is known to be another message's. Raises MailboxGone.
    """
    state = session.examine(attempt.mailbox)
    if state.uidvalidity != attempt.uidvalidity:
        return None
    for uid, data in _arrived_since(session, attempt.uidnext):
        if data.size is None or not may_be_upload(attempt, uid, data.size) or is_other(uid):
            continue
        content = session.fetch_body(attempt.mailbox, attempt.uidvalidity, uid)
        if content is not None and is_upload(attempt, content):
            return data
    return None


def digest(data: bytes | mmap.mmap) -> str:
    """Return the digest of an `Attempt`: SHA-256 without the line ends at the very end."""
    end = len(data)
    while end and data[end - 1] in b"\r\n":
        end -= 1
    with memoryview(data) as view, view[:end] as text:
        return hashlib.sha256(text).hexdigest()


def is_clean(data: bytes | mmap.mmap) -> bool:
    """Return whether a server has no reason to change a message: no 8-bit header, no NUL."""
    head = bytes(data[:_HEAD])
    return head[: max(0, head.find(b"\r\n\r\n"))].isascii() and data.find(b"\0") < 0


# -- messages of other clients -----------------------------------------------------------------------------


def is_alike(node: Node, message: NewMessage) -> bool:
    """Return whether date and size allow that a message is the one that the cache knows as ``node``."""
    # An exact size is the number of bytes in BODY[], which can differ from what the server announces.
    return node.date == message.date and bool(node.exact or node.size == message.size)


def find_moved(cache: Cache, mailbox: Ino, message: NewMessage) -> Node | None:
    """Return the message of another mailbox that ``message``, which is new in ``mailbox``, seems to be.

    Whether it is still there as well, so that this one is a copy, is for the caller to find out.
    """
    if not message.message_id:
        return None
    candidates = cache.messages_with_id(message.message_id, message.date, besides=mailbox)
    return next((node for node in candidates if is_alike(node, message)), None)


# -- helpers -----------------------------------------------------------------------------------------------


def _arrived_since(session: Session, uidnext: int) -> list[tuple[Uid, FetchData]]:
    """Return the metadata of the messages in the selected mailbox with ``uidnext`` or a higher UID."""
    found: list[FetchData] = []
    session.fetch_metadata_from(uidnext, found.append)
    return [(data.uid, data) for data in found if data.uid is not None and data.uid >= uidnext]
