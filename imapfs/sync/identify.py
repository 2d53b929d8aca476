"""Is it the same message? The one module that decides this.

IMAP identifies a message by mailbox, UIDVALIDITY and UID, and by nothing else that every server has. Nothing
is removed, and no cached bytes are shown as a message's, on likeness. That needs proof:

- the tagged OK of the command that carried the message, with APPENDUID or COPYUID;
- the same mailbox, UIDVALIDITY and UID, with the INTERNALDATE and announced size that are known
  (`select_known`). The true size proves nothing, since servers announce wrong ones;
- equal bytes (`find_same`, `find_uploads`);
- an identity that the server gives: EMAILID and MAILBOXID (RFC 8474), X-GM-MSGID. Whether a server keeps its
  word is tried before the bytes of one message are shown as another's (`imapfs.sync.same_bodies`).

Without it nothing is removed, and what can be shown twice is shown twice. The questions are about:

- an APPEND, or a move, whose outcome is not known (`find_uploads`, `find_copy`): all that came to the mailbox
  since then, which is what has the UIDNEXT of that time or a higher UID, is compared. If the bytes prove
  nothing, the answer is that it is not there, or that this is not known;
- a message that another client has moved (`find_moved`). By Message-ID, date and size it keeps its inode, but
  not its cached bytes;
- a mailbox that another client has renamed (`is_same_mailbox`);
- a mailbox that was deleted and created again within the second that its UIDVALIDITY counts (`is_alike`), or
  that was restored from a backup (`is_other_mailbox`).

The callers act on the answer; none of them compares sizes, dates or digests itself. Functions that take a
session run in a thread, and leave the mailbox in question selected read-only.
"""

import hashlib
import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from imapfs.errors import MessageGone, OtherMailbox, OtherMessage
from imapfs.headers import parse_headers
from imapfs.imap.grammar import FetchData, parse_date
from imapfs.imap.responses import MailboxState
from imapfs.imap.session import Session
from imapfs.model import Ino, MessageRef, ModSeq, Uid, UidValidity
from imapfs.store.cache import Cache
from imapfs.store.journal import Attempt
from imapfs.store.rows import Mailbox, NewMessage, Node

_NONE = ModSeq(0)
_UNNAMED = UidValidity(0)
_HEAD = 1 << 18
"""Bytes at the beginning of a message in which its header is expected to end."""


# -- the message that is known -----------------------------------------------------------------------------


def is_other(ref: MessageRef, date: int | None, size: int | None) -> bool:
    """Return whether date and announced size of the message with the UID of ``ref`` are not those known.

    0 stands for what the server did not say.
    """
    return any(known and found and known != found for known, found in ((ref.date, date), (ref.size, size)))


def ref_of(mailbox: bytes, uidvalidity: UidValidity, data: FetchData) -> MessageRef:
    """Return the identity of a message that the server has listed, with its date and announced size."""
    return MessageRef(
        mailbox, uidvalidity, data.uid or Uid(0), parse_date(data.date or b"")[0] or None, data.size
    )


def is_other_mailbox(uidvalidity: UidValidity, uidnext: int, modseq: ModSeq, state: MailboxState) -> bool:
    """Return whether a mailbox is not the known one: numbers have decreased that only grow in a mailbox."""
    return state.uidvalidity != uidvalidity or 0 < state.uidnext < uidnext or 0 < state.highestmodseq < modseq


def select_known(
    session: Session, ref: MessageRef, uidnext: int = 0, modseq: ModSeq = _NONE, *, afresh: bool = False
) -> MailboxState:
    """Select the mailbox of a message, for a command that changes or removes this message.

    Unless the mailbox is selected already, verify that it and the message are those that are known: what has
    the UID has the date and size of ``ref``. ``uidnext`` and ``modseq`` are of the last synchronisation.

    Raises OtherMailbox, OtherMessage, MessageGone, MailboxGone, Refused.
    """

    def check(state: MailboxState, found: FetchData | None) -> None:
        if is_other_mailbox(ref.uidvalidity, uidnext, modseq, state):
            raise OtherMailbox("the mailbox on the server is an older one: list it again")
        if found is None:
            raise MessageGone("it was removed on the server")
        if is_other(ref, parse_date(found.date or b"")[0], found.size or 0):
            raise OtherMessage("another message has its place on the server: list the directory again")

    return session.select(ref.mailbox, ref.uidvalidity, ref.uid, check, afresh=afresh)


def is_same_mailbox(session: Session, known: Mailbox, messages: Iterable[MessageRef], name: bytes) -> bool:
    """Return whether the mailbox ``name`` is ``known``, which had another name; it is selected afterwards.

    Proof is the MAILBOXID (RFC 8474), or else that all ``messages`` that are known have their UID, date and
    size. The UIDVALIDITY has to be the same in both cases. Raises MailboxGone.
    """
    state = session.examine(name)
    if is_other_mailbox(known.uidvalidity, known.uidnext, known.modseq, state):
        return False
    if known.object_id is not None and state.object_id is not None:
        return known.object_id == state.object_id
    found = session.identities()
    return all(
        (data := found.get(ref.uid)) is not None
        and not is_other(ref, parse_date(data.date or b"")[0], data.size or 0)
        for ref in messages
    )


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
    is_known: Callable[[MessageRef], bool] = lambda _: False,
) -> Uid | None:
    """Return the UID of what looks like the copy among messages with ``uidnext`` or a higher UID, or None.

    This proves nothing about its bytes. ``is_known``: whether this was there before. Raises MailboxGone.
    """
    state = session.examine(mailbox)
    for uid, data in _arrived_since(session, uidnext):
        if not is_known(ref_of(mailbox, state.uidvalidity, data)) and wanted.matches(Fingerprint.of(data)):
            return uid
    return None


def find_same(
    session: Session,
    original: MessageRef,
    mailbox: bytes,
    uidnext: int,
    wanted: Fingerprint,
    is_known: Callable[[MessageRef], bool] = lambda _: False,
) -> Uid | None:
    """Return the UID of a message with the same bytes as ``original``; see `find_copy`.

    Only this allows that the original is deleted, if the outcome of the COPY is not known.
    """
    content = session.fetch_body(original.mailbox, original.uidvalidity, original.uid)
    if content is None:
        return None
    state = session.examine(mailbox)
    for uid, data in _arrived_since(session, uidnext):
        if not is_known(ref_of(mailbox, state.uidvalidity, data)) and wanted.matches(Fingerprint.of(data)):
            other = session.fetch_body(mailbox, state.uidvalidity, uid)
            if other == content:
                return uid
    return None


# -- uploads -----------------------------------------------------------------------------------------------


_NUL_AS_0X80: Final = bytes.maketrans(b"\0", b"\x80")
_8BIT_AS_X: Final = bytes.maketrans(bytes(range(0x80, 0x100)), b"X" * 0x80)

ALTERATIONS: Final[tuple[tuple[str, Literal["header", "message"], Callable[[bytes], bytes]], ...]] = (
    ("a NUL is replaced by 0x80 (Dovecot)", "message", lambda text: text.translate(_NUL_AS_0X80)),
    ("a final line end is added (Courier)", "message", lambda text: text.rstrip(b"\r\n")),
    (
        "8-bit bytes of the header are replaced by X (Cyrus)",
        "header",
        lambda text: text.translate(_8BIT_AS_X),
    ),
)
"""What servers change in a message that is appended: what, where, and the text without the difference. They
also add lines to the header (mailutils), which `_is_altered` knows. The only table of this."""
_MAX_ALTERED: Final = 1 << 16
"""Bytes by which the size of a message may change with that."""


@dataclass(frozen=True, slots=True)
class Sought:
    """An upload to look for."""

    attempt: Attempt
    is_other: Callable[[MessageRef], bool]
    """Whether this is known to be another message."""
    load: Callable[[], bytes | None]
    """Return the bytes that were uploaded, or None if they are not known any more."""


@dataclass(slots=True)
class Whereabouts:
    """What is known about an upload: if nothing is set, it is not on the server."""

    found: FetchData | None = None
    """The message, which has the bytes that were uploaded, but for what is in `ALTERATIONS`."""
    is_same: bool = False
    """Whether it has all of these bytes, and no others."""
    uidvalidity: UidValidity = _UNNAMED
    """UIDVALIDITY of the mailbox as it was searched."""
    perhaps: Uid | None = None
    """A message that may be the upload or another one: without proof, nobody may act on this."""
    is_restored: bool = False
    """Whether the mailbox is another one than was noted, so that what is known of its UIDs is wrong."""


def find_uploads(session: Session, sought: Sequence[Sought]) -> list[Whereabouts]:
    """Look in one pass for uploads to one mailbox, all with the same UIDVALIDITY. Raises MailboxGone.

    The proof is the digest of all bytes. If a server has altered the message, it is the same Message-ID, and
    bytes that differ in nothing but `ALTERATIONS`.
    """
    first = sought[0].attempt
    state = session.examine(first.mailbox)
    restored = any(is_other_mailbox(first.uidvalidity, one.attempt.uidnext, _NONE, state) for one in sought)
    answers = [Whereabouts(uidvalidity=state.uidvalidity, is_restored=restored) for _ in sought]
    if restored:
        # UIDNEXT of that time says nothing about the upload, which may be there all the same: the server took
        # it after it was restored, or it is Courier, where UIDVALIDITY is the time of each EXAMINE until a
        # message is in the mailbox.
        sought = [replace(one, attempt=replace(one.attempt, uidnext=1)) for one in sought]
    equal: list[tuple[FetchData, list[int]]] = []
    altered: list[tuple[FetchData, list[int]]] = []
    for uid, data in _arrived_since(session, min(one.attempt.uidnext for one in sought)):
        message_id = parse_headers(data.body or b"").message_id
        candidates = [
            i
            for i, one in enumerate(sought)
            if may_be_upload(one.attempt, uid, data.size, message_id)
            and not one.is_other(ref_of(first.mailbox, state.uidvalidity, data))
        ]
        content = session.fetch_body(first.mailbox, state.uidvalidity, uid) if candidates else None
        if content is None:
            continue
        same = digest(content)
        equal.append((data, [i for i in candidates if sought[i].attempt.digest == same]))
        if equal[-1][1]:
            continue
        alike = [i for i in candidates if sought[i].attempt.message_id == message_id]
        proven = [i for i in alike if _is_altered(sought[i].load(), content)]
        if message_id:
            altered.append((data, proven))
            unproven = [i for i in alike if i not in proven]
        else:
            unproven = proven
        for i in unproven:
            answers[i].perhaps = uid
    for found, is_same in (equal, True), (altered, False):
        for data, matching in found:
            answer = next((answers[i] for i in matching if answers[i].found is None), None)
            if answer is not None:
                answer.found, answer.is_same = data, is_same
    return answers


def may_be_upload(attempt: Attempt, uid: int, size: int | None, message_id: str) -> bool:
    """Return whether what a server lists of a message allows that it is what was uploaded.

    With this its bytes are worth fetching: it is no proof of anything.
    """
    if uid < attempt.uidnext or size is None:
        return False
    same_id = message_id == attempt.message_id
    return size == attempt.size or (same_id and abs(size - attempt.size) <= _MAX_ALTERED)


def _is_altered(sent: bytes | None, stored: bytes) -> bool:
    """Return whether a server has stored what was sent, but for `ALTERATIONS` and added header lines."""
    if sent is None:
        return False
    for _, where, unify in ALTERATIONS:
        if where == "message":
            sent, stored = unify(sent), unify(stored)
    (head, _, body), (stored_head, _, stored_body) = (
        sent.partition(b"\r\n\r\n"),
        stored.partition(b"\r\n\r\n"),
    )
    if body != stored_body:
        return False
    for _, where, unify in ALTERATIONS:
        if where == "header":
            head, stored_head = unify(head), unify(stored_head)
    lines = iter(stored_head.split(b"\r\n"))
    return all(line in lines for line in head.split(b"\r\n"))


def digest(data: bytes | mmap.mmap) -> str:
    """Return the digest of an `Attempt`: SHA-256 of all bytes."""
    return hashlib.sha256(data).hexdigest()


def message_id_of(data: bytes | mmap.mmap) -> str:
    """Return the Message-ID of a message as a server lists it, or an empty string."""
    return parse_headers(_header(data)).message_id


def is_clean(data: bytes | mmap.mmap) -> bool:
    """Return whether a server has no reason to change a message: no 8-bit header, no NUL."""
    return _header(data).isascii() and data.find(b"\0") < 0


def _header(data: bytes | mmap.mmap) -> bytes:
    head = bytes(data[:_HEAD])
    end = head.find(b"\r\n\r\n")
    return head if end < 0 else head[:end]


# -- messages of other clients -----------------------------------------------------------------------------


def is_alike(node: Node, message: NewMessage) -> bool:
    """Return whether nothing that is known of ``node`` contradicts that the server lists it as ``message``.

    Both have the same mailbox, UIDVALIDITY and UID. This is no proof of anything.
    """
    ref = MessageRef(b"", UidValidity(0), message.uid, node.date, node.announced)
    return not is_other(ref, message.date, message.size)


def known_size(node: Node) -> int:
    """Return the size that the server has announced for a message; the true one where that is not known.

    The true size differs from it on a server that announces wrong ones. Then nothing is proven.
    """
    return node.size if node.announced is None else node.announced


@dataclass(frozen=True, slots=True)
class Original:
    """A message that was perhaps moved by another client."""

    node: Node
    same_bytes: bool
    """Whether the server has named it by the same EMAILID or X-GM-MSGID."""


def find_moved(cache: Cache, mailbox: Ino, message: NewMessage) -> Original | None:
    """Return the message of another mailbox that ``message``, which is new in ``mailbox``, seems to be.

    Whether it is still there as well, so that this one is a copy, is for the caller to find out.
    """
    similar = None
    for node, details in cache.similar(message, besides=mailbox):
        if message.object_id is not None and details.object_id is not None:
            if message.object_id == details.object_id:
                return Original(node, same_bytes=True)
        elif similar is None:
            similar = node if known_size(node) == message.size else None
    return similar and Original(similar, same_bytes=False)


# -- helpers -----------------------------------------------------------------------------------------------


def _arrived_since(session: Session, uidnext: int) -> list[tuple[Uid, FetchData]]:
    """Return the metadata of the messages in the selected mailbox with ``uidnext`` or a higher UID."""
    found: list[FetchData] = []
    session.fetch_metadata_from(uidnext, found.append)
    return [(data.uid, data) for data in found if data.uid is not None and data.uid >= uidnext]
