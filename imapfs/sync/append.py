"""The half of an upload that runs in threads: copies of drafts, APPEND, and the look for what was sent.

See `imapfs.sync.upload` for when and why.
"""

import hashlib
import mmap
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from imapfs.errors import MailboxGone, Refused
from imapfs.imap.grammar import FetchData
from imapfs.imap.session import Session, Upload
from imapfs.store.spool import Attempt, Draft
from imapfs.sync.locate import ServerMailbox

_CHUNK: Final = 1 << 20
_BARE_LF = re.compile(rb"(?<!\r)\n")
_APPENDLIMIT = re.compile(r"APPENDLIMIT=(\d+)")


@dataclass(slots=True)
class Fit:
    """The bytes of a draft as a server takes them; a copy, as the draft may be written to meanwhile."""

    data: bytes | mmap.mmap
    writes: int
    """`Draft.writes` when the copy was made."""
    converted: bool
    """Whether line ends were changed."""
    digest: str
    """See `Attempt`."""
    clean: bool
    """Whether a server has no reason to change the bytes."""

    def is_current(self, draft: Draft) -> bool:
        """Whether the draft still has these bytes, and nobody is about to change them."""
        return draft.writes == self.writes and draft.state != "open"


@dataclass(frozen=True, slots=True)
class Item:
    """What is sent of one draft."""

    fit: Fit
    flags: str
    date: int
    """INTERNALDATE, seconds since the epoch."""
    zone: int
    """Minutes east of UTC."""


class Flight:
    """One batch of APPENDs in a thread."""

    def __init__(self, box: ServerMailbox, ready: Sequence[Item]) -> None:
        self._box = box
        self._ready = ready
        self.uidvalidity = int(box.uidvalidity)
        self.uidnext = box.uidnext
        self.outcomes: list[int | Refused | None] = []
        self._listed: dict[int, FetchData] = {}

    def look(self, session: Session) -> None:
        """Learn where new messages will be, unless that is known; refuse what is too large."""
        if not self.uidnext or not self.uidvalidity:
            state = session.examine(self._box.name)
            self.uidvalidity = int(state.uidvalidity)
            self.uidnext = session.next_uid()

    def send(self, session: Session) -> None:
        self._listed = {}
        limit = next((int(m[1]) for c in session.capabilities if (m := _APPENDLIMIT.match(c))), None)
        refused = {
            i: Refused(f"it has {len(p.fit.data)} bytes, and the server takes {limit} at most", "TOOBIG")
            for i, p in enumerate(self._ready)
            if limit is not None and len(p.fit.data) > limit
        }
        uploads = [
            Upload(p.fit.data, p.flags, p.date, p.zone) for i, p in enumerate(self._ready) if i not in refused
        ]
        outcomes = iter(
            session.append(self._box.name, uploads, self.uidnext, self._list)[0] if uploads else []
        )
        self.outcomes = [refused.get(i) or next(outcomes) for i in range(len(self._ready))]

    def _list(self, data: FetchData) -> None:
        if data.uid is not None:
            self._listed[data.uid] = data

    def listed(self, uid: int) -> FetchData | None:
        """The metadata of a message; None if it was removed at once."""
        return self._listed.get(uid)


class Search:
    """Looks, in a thread, for drafts that may be on the server already."""

    def __init__(self, uncertain: Sequence[Draft], is_other: Callable[[Draft, Attempt, int], bool]) -> None:
        self._uncertain = uncertain
        self._is_other = is_other
        self.found: list[tuple[Draft, Attempt, FetchData]] = []

    def run(self, session: Session) -> None:
        self.found = []
        taken: set[tuple[bytes, int]] = set()
        for draft in self._uncertain:
            attempt = draft.attempt
            if attempt is None:
                continue
            try:
                state = session.examine(attempt.mailbox)
            except MailboxGone:
                continue
            if state.uidvalidity != attempt.uidvalidity:
                continue
            listed: list[FetchData] = []
            session.fetch_metadata_from(attempt.uidnext, listed.append)
            for data in listed:
                uid = data.uid or 0
                # Servers may add a final line end.
                if data.size is None or not 0 <= data.size - attempt.size <= 2:
                    continue
                if uid < attempt.uidnext or (attempt.mailbox, uid) in taken:
                    continue
                if trio.from_thread.run_sync(self._is_other, draft, attempt, uid):
                    continue
                if self._equal(session, attempt, uid):
                    taken.add((attempt.mailbox, uid))
                    self.found.append((draft, attempt, data))
                    break

    @staticmethod
    def _equal(session: Session, attempt: Attempt, uid: int) -> bool:
        """Whether the bytes are those that were sent, but for what servers do to them."""
        content = session.fetch_body(attempt.mailbox, attempt.uidvalidity, uid)
        if content is None:
            return False
        return _digest(content) == attempt.digest or (not _is_clean(content) and len(content) == attempt.size)


def fit_for_server(draft: Draft) -> Fit:
    """In a thread: copy what a draft holds, with CRLF for bare LF (RFC 9051 section 4.3 via RFC 5322)."""
    writes = draft.writes
    path = draft.file
    data: bytes | mmap.mmap
    if path.stat().st_size <= _CHUNK:
        raw = path.read_bytes()
        data = _BARE_LF.sub(b"\r\n", raw)
        converted = len(data) != len(raw)
    else:
        data, converted = _copy(path)
    return Fit(data, writes, converted, _digest(data), _is_clean(data))


def _copy(path: Path) -> tuple[bytes | mmap.mmap, bool]:
    """A large draft in a file that goes when the map does: the draft itself may be truncated meanwhile."""
    copy = path.with_name(f"{path.name}.send.tmp")
    copy.touch(mode=0o600)
    converted, last = False, b""
    try:
        with path.open("rb") as source, copy.open("r+b") as target:
            while chunk := source.read(_CHUNK):
                # A CR at the end of the chunk before belongs to a LF at the start of this one.
                fixed = _BARE_LF.sub(b"\r\n", last + chunk)[len(last) :]
                converted = converted or len(fixed) != len(chunk)
                target.write(fixed)
                last = chunk[-1:] if chunk[-1:] == b"\r" else b""
            if not target.tell():
                return b"", False  # cut to nothing at this moment; a map cannot be empty
            target.flush()
            return mmap.mmap(target.fileno(), 0, access=mmap.ACCESS_READ), converted
    finally:
        copy.unlink()


def _digest(data: bytes | mmap.mmap) -> str:
    end = len(data)
    while end and data[end - 1] in b"\r\n":
        end -= 1
    with memoryview(data) as view, view[:end] as text:
        return hashlib.sha256(text).hexdigest()


def _is_clean(data: bytes | mmap.mmap) -> bool:
    head = bytes(data[: 1 << 18])
    return head[: max(0, head.find(b"\r\n\r\n"))].isascii() and data.find(b"\0") < 0
