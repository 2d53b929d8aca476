"""The half of an upload that runs in threads: copies of drafts, APPEND, and the search for earlier uploads.

`imapfs.sync.upload` decides what is uploaded, and when.
"""

import mmap
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from imapfs.errors import CacheError, ConnectionLost, Invalid, MailboxGone, Refused
from imapfs.imap.grammar import FetchData
from imapfs.imap.session import Session, Upload
from imapfs.model import MessageRef
from imapfs.store.journal import Attempt
from imapfs.store.spool import Draft
from imapfs.sync.identify import Sought, Whereabouts, digest, find_uploads, is_clean, message_id_of
from imapfs.sync.locate import ServerMailbox

_CHUNK: Final = 1 << 20
"""Bytes that are handled at once; a larger draft is copied into a file, not into memory."""
HEAD: Final = 100
"""Bytes that show whether something is a mail message."""
_HEADER_FIELD = re.compile(rb"[!-9;-~]{1,76}[ \t]*:")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_APPENDLIMIT = re.compile(r"APPENDLIMIT=(\d+)")


@dataclass(slots=True)
class Payload:
    """The bytes of a draft as they are uploaded: a copy, because the draft may be written to meanwhile."""

    data: bytes | mmap.mmap
    writes: int
    """`Draft.writes` at the time of the copy."""
    converted: bool
    """Whether line ends were changed."""
    digest: str
    """See `Attempt`."""
    message_id: str
    clean: bool
    """Whether a server has no reason to change the bytes."""

    def is_current(self, draft: Draft) -> bool:
        """Return whether the draft still has these bytes, and no program has it open for writing."""
        return draft.writes == self.writes and draft.state != "open" and not draft.is_written

    def close(self) -> None:
        """Release the copy. The payload must not be used any more."""
        if isinstance(self.data, mmap.mmap):
            self.data.close()


def check_is_message(head: bytes) -> None:
    """Raise Invalid if bytes that begin so are no mail message: if they do not begin with a header field."""
    if not _HEADER_FIELD.match(head):
        raise Invalid("it is no mail message: the first line is no header field")


def head_of(draft: Draft) -> bytes:
    """Return the first bytes of a draft, as many as `check_is_message` needs. Raises CacheError."""
    try:
        with draft.file.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise CacheError.from_os_error(error, f"cannot read {draft.file}") from None


def make_payload(draft: Draft) -> Payload:
    """In a thread: copy the bytes of a draft, with CRLF for each bare LF (RFC 5322 section 2.3).

    Raises OSError.
    """
    writes = draft.writes
    path = draft.file
    data: bytes | mmap.mmap
    if path.stat().st_size <= _CHUNK:
        raw = path.read_bytes()
        data = _BARE_LF.sub(b"\r\n", raw)
        converted = len(data) != len(raw)
    else:
        data, converted = _copy(path)
    return Payload(data, writes, converted, digest(data), message_id_of(data), is_clean(data))


def _copy(path: Path) -> tuple[bytes | mmap.mmap, bool]:
    """Copy a large draft into a file that is deleted with its map, as the draft may be truncated meanwhile.

    Return the copy, and whether line ends were changed.
    """
    copy = path.with_name(f"{path.name}.send.tmp")
    copy.touch(mode=0o600)
    converted, last = False, b""
    try:
        with path.open("rb") as source, copy.open("r+b") as target:
            while chunk := source.read(_CHUNK):
                # A CR at the end of the previous chunk belongs to a LF at the start of this one.
                fixed = _BARE_LF.sub(b"\r\n", last + chunk)[len(last) :]
                converted = converted or len(fixed) != len(chunk)
                target.write(fixed)
                last = chunk[-1:] if chunk[-1:] == b"\r" else b""
            if not target.tell():
                return b"", False  # truncated to nothing at this moment; a map cannot be empty
            target.flush()
            return mmap.mmap(target.fileno(), 0, access=mmap.ACCESS_READ), converted
    finally:
        copy.unlink()


class AppendBatch:
    """Uploads of several messages to one mailbox, in a thread.

    ``is_same_server``: whether no connection was lost since it was made. Called on the trio thread.
    """

    def __init__(
        self, mailbox: ServerMailbox, uploads: Sequence[Upload], is_same_server: Callable[[], bool]
    ) -> None:
        self._mailbox = mailbox
        self._uploads = uploads
        self._is_same_server = is_same_server
        self.uidvalidity = mailbox.uidvalidity
        self.uidnext = mailbox.uidnext
        self.outcomes: list[int | Refused | None] = []
        """Of each upload: the UID that the server has named, why it was refused, or None if all that is known
        is that the server took it."""
        self._listed: dict[int, FetchData] = {}

    def prepare(self, session: Session) -> None:
        """Ask for UIDVALIDITY and UIDNEXT of the mailbox, unless they are known."""
        if not self.uidnext or not self.uidvalidity:
            state = session.examine(self._mailbox.name)
            self.uidvalidity = state.uidvalidity
            self.uidnext = session.next_uid()

    def run(self, session: Session) -> None:
        """Upload all messages, and list what has come to the mailbox."""
        if not trio.from_thread.run_sync(self._is_same_server):
            raise ConnectionLost("the connection was lost before the upload")
        self._listed = {}
        limit = next((int(m[1]) for c in session.capabilities if (m := _APPENDLIMIT.match(c))), None)
        refused = {
            i: Refused(f"it has {len(upload.data)} bytes, and the server takes {limit} at most", "TOOBIG")
            for i, upload in enumerate(self._uploads)
            if limit is not None and len(upload.data) > limit
        }
        wanted = [upload for i, upload in enumerate(self._uploads) if i not in refused]
        named: list[int | Refused | None] = []
        if wanted:
            named, state = session.append(self._mailbox.name, wanted, self.uidnext, self._list)
            if any(isinstance(outcome, int) for outcome in named):
                # Courier invents UIDVALIDITY at each EXAMINE, until a message is in the mailbox.
                self.uidvalidity = state.uidvalidity
        outcomes = iter(named)
        self.outcomes = [refused.get(i) or next(outcomes) for i in range(len(self._uploads))]

    def _list(self, data: FetchData) -> None:
        if data.uid is not None:
            self._listed[data.uid] = data

    def listed(self, uid: int) -> FetchData | None:
        """Return the metadata of an uploaded message, or None if it was removed at once."""
        return self._listed.get(uid)


class UploadSearch:
    """Searches the server, in a thread, for what attempts of unknown outcome may have uploaded.

    ``is_other(draft, ref)``: whether that message is known to be another one. Called on the trio thread.
    """

    def __init__(self, drafts: Sequence[Draft], is_other: Callable[[Draft, MessageRef], bool]) -> None:
        self._sought = [(draft, draft.attempt) for draft in drafts if draft.attempt is not None]
        self._is_other = is_other
        self.answers: list[tuple[Draft, Attempt, Whereabouts]] = []
        self.is_mailbox_missing = False
        """Whether the server has no mailbox of a name that was searched."""

    def run(self, session: Session) -> None:
        """Fill ``answers``: one for each draft, with one pass over each mailbox."""
        self.answers = []
        mailboxes: dict[tuple[bytes, int], list[tuple[Draft, Attempt]]] = {}
        for draft, attempt in self._sought:
            mailboxes.setdefault((attempt.mailbox, attempt.uidvalidity), []).append((draft, attempt))
        for group in mailboxes.values():
            try:
                answers = find_uploads(session, [self._sought_as(draft, attempt) for draft, attempt in group])
            except MailboxGone:
                self.is_mailbox_missing = True
                answers = [Whereabouts() for _ in group]
            self.answers += [(*one, answer) for one, answer in zip(group, answers, strict=True)]

    def _sought_as(self, draft: Draft, attempt: Attempt) -> Sought:
        def is_other(ref: MessageRef) -> bool:
            return trio.from_thread.run_sync(self._is_other, draft, ref)

        def load() -> bytes | None:
            payload = make_payload(draft)
            try:
                return bytes(payload.data) if payload.digest == attempt.digest else None
            finally:
                payload.close()

        return Sought(attempt, is_other, load)
