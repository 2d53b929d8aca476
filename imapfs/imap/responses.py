"""What a server says about the mailbox that it opens, and other responses that several lines make up."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from imapfs.errors import ProtocolError
from imapfs.imap.budget import MAX_MAILBOX_NAME, MAX_RANGES
from imapfs.imap.grammar import (
    Completion,
    FetchData,
    Response,
    flag_list,
    number,
    parse_exists,
    parse_fetch,
    parse_sequence_set,
    values,
)
from imapfs.model import MessageRef, ModSeq, Uid, UidValidity

_MAX_OBJECT_ID: Final = 255
"""Characters of an objectid (RFC 8474 section 7)."""

OnMessage = Callable[[FetchData], None]


@dataclass(slots=True)
class MailboxState:
    """The responses to SELECT or EXAMINE (RFC 9051 section 6.3.2); 0 for what the server left out."""

    uidvalidity: UidValidity = field(default=UidValidity(0))
    uidnext: int = 0
    exists: int = -1
    """Number of messages. -1 only while the responses are read: a server must send it."""
    highestmodseq: ModSeq = field(default=ModSeq(0))
    """0 also for a mailbox without modification sequences (NOMODSEQ)."""
    permanent_flags: frozenset[str] | None = None
    """Flags that the server keeps, in lower case. None if it does not say, which means all."""
    read_only: bool = False
    object_id: str | None = None
    """MAILBOXID (RFC 8474 section 4.2), which a mailbox keeps when it is renamed."""
    vanished: list[tuple[int, int]] = field(default_factory=list)
    """UID ranges that QRESYNC reports as expunged (RFC 7162 section 3.2.10)."""

    def take(self, response: Response) -> None:
        """Read one untagged response about the mailbox."""
        text = response[0]
        if (exists := parse_exists(text)) is not None:
            self.exists = exists
        elif text[:19].upper() == b"* VANISHED (EARLIER":
            self.vanished += parse_sequence_set(text.rstrip().rpartition(b" ")[2])
            if len(self.vanished) > MAX_RANGES:
                raise ProtocolError(f"the server sends more than {MAX_RANGES} ranges of vanished UIDs")
        elif text[:6].upper() == b"* OK [":
            completion = Completion.parse(text[2:])
            if completion is None:
                return
            if completion.code == "PERMANENTFLAGS":
                self.permanent_flags = frozenset(flag_list(completion.argument.strip(b"()")).lower().split())
            if completion.code == "MAILBOXID":
                object_id = completion.argument.strip(b"()")[: _MAX_OBJECT_ID + 1].decode("ascii", "replace")
                self.object_id = object_id if len(object_id) <= _MAX_OBJECT_ID else None
            if not completion.argument.isdigit():
                return
            match completion.code:
                case "UIDVALIDITY":
                    self.uidvalidity = UidValidity(number(completion.argument))
                case "UIDNEXT":
                    self.uidnext = number(completion.argument)
                case "HIGHESTMODSEQ":
                    self.highestmodseq = ModSeq(number(completion.argument))


class SelectResponses:
    """Takes the responses to SELECT or EXAMINE, without those that still concern the previous mailbox.

    With QRESYNC the server sends CLOSED between the two (RFC 7162 section 3.2.11). Otherwise the UIDVALIDITY
    of the new mailbox separates them: servers send its FETCH and VANISHED data after that.
    """

    def __init__(self, on_message: OnMessage, *, was_selected: bool, modseqs: bool) -> None:
        self.state = MailboxState()
        self._modseqs = modseqs
        self._on_message = on_message
        self._is_new = not was_selected

    def take(self, response: Response) -> None:
        text = response[0]
        if text[:13].upper() == b"* OK [CLOSED]":
            self.state = MailboxState()
            self._is_new = True
        elif (data := parse_fetch(response)) is not None:
            if self._is_new and data.uid is not None:
                self._on_message(data)
        elif self._is_new or text[:11].upper() != b"* VANISHED ":
            self.state.take(response)
            if not self._modseqs:
                # Yahoo has HIGHESTMODSEQ without CONDSTORE, and refuses a FETCH of MODSEQ.
                self.state.highestmodseq = ModSeq(0)
            self._is_new |= bool(self.state.uidvalidity)


@dataclass(frozen=True, slots=True)
class Quota:
    """STORAGE of a quota root (RFC 9208), in bytes."""

    used: int
    limit: int


def parse_quota(response: Response) -> Quota | None:
    """Return STORAGE of a QUOTA response (RFC 9208 section 5.1); None for another kind."""
    if response[0][:8].upper() != b"* QUOTA ":
        return None
    match values(response, 8):
        case [_, [*items]]:
            for triple in zip(items[::3], items[1::3], items[2::3], strict=False):
                match triple:
                    case (bytes(name), bytes(used), bytes(limit)) if name.upper() == b"STORAGE":
                        # In units of 1024 octets. Servers without a real limit may send odd numbers, which
                        # must not end the connection.
                        with contextlib.suppress(ProtocolError):
                            return Quota(number(used) * 1024, number(limit) * 1024)
    return None


def parse_prefix(response: Response) -> bytes | None:
    """Return the prefix of the personal namespace (RFC 2342); None if the response does not name it."""
    if response[0][:12].upper() == b"* NAMESPACE ":
        match values(response, 12):
            case [[[bytes(first), *_], *_], *_] if len(first) <= MAX_MAILBOX_NAME:
                return first
    return None


def copied_message(completion: Completion, uid: int, target: bytes) -> MessageRef | None:
    """Return the copy of ``uid`` in ``target`` according to COPYUID (RFC 4315 section 3); None if it has
    none."""
    with contextlib.suppress(ProtocolError, ValueError):
        validity, old, new = completion.argument.split(b" ", 3)
        uidvalidity = UidValidity(number(validity))
        position = 0
        for low, high in parse_sequence_set(old):
            if low <= uid <= high:
                position += uid - low
                break
            position += high - low + 1
        else:
            return None
        for low, high in parse_sequence_set(new):
            if position <= high - low:
                return MessageRef(target, uidvalidity, Uid(low + position))
            position -= high - low + 1
    return None
