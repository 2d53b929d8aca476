"""A few messages of an account, fetched to learn how fast that is and how large they really are.

Nothing is changed by it, and nothing kept.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Final

from imapfs.errors import ImapfsError
from imapfs.imap.grammar import ListEntry
from imapfs.imap.session import Session

_MOST_BYTES: Final = 8 << 20
_MOST_MESSAGES: Final = 100
_MOST_MAILBOXES: Final = 10
"""How many are opened in search of a message."""


class _Enough(Exception):
    """The sample has taken as many bytes or seconds as it may."""


class Sample:
    """What `take` has learned."""

    def __init__(self) -> None:
        self.announced: dict[int, int] = {}
        """RFC822.SIZE by UID."""
        self.exact: dict[int, int] = {}
        """What BODY[] had, by UID, of those that were fetched."""
        self.bytes = 0
        """All that came, and in how many ``seconds``."""
        self.seconds = 0.0
        self._literal = 0
        self._end = 0.0

    def take(self, session: Session, entries: Sequence[ListEntry], seconds: float) -> None:
        """Fetch the newest messages of the first mailbox that has any, INBOX before others.

        Ends after ``seconds``, or with 8 MiB; the session may be of no further use then. Raises
        ConnectionLost, Refused.
        """
        names = sorted(
            (entry.name for entry in entries if entry.selectable), key=lambda name: name.upper() != b"INBOX"
        )
        for name in names[:_MOST_MAILBOXES]:
            with contextlib.suppress(ImapfsError):
                self.announced = session.sample(name, _MOST_MESSAGES)
            if self.announced or not session.alive:
                break
        if not self.announced:
            return
        begin = time.monotonic()
        self._end = begin + seconds
        assert session.selected is not None
        try:
            session.fetch_bodies(
                session.selected, session.state.uidvalidity, self._chosen(), self._open, self._note
            )
        except _Enough:
            session.close()
        self.seconds = time.monotonic() - begin

    def _chosen(self) -> list[int]:
        """The newest that fit together into what may be fetched, at least one."""
        chosen: list[int] = []
        total = 0
        for uid in sorted(self.announced, reverse=True):
            total += self.announced[uid]
            if total > _MOST_BYTES and chosen:
                break
            chosen.append(uid)
        return chosen

    def _open(self, uid: int | None, size: int) -> "Sample":
        if uid is not None:
            # Now, because it may be too large to be fetched to its end.
            self.exact[uid] = size
        self._literal = size
        return self

    def _note(self, uid: int, body: bytes | None) -> None:
        if body is None:
            self.exact.pop(uid, None)
        elif body:
            self.exact[uid] = len(body)
            self.bytes += len(body)
        else:
            self.exact[uid] = self._literal
        self._literal = 0

    def write(self, data: bytes) -> None:
        """Count what comes; raises _Enough."""
        self.bytes += len(data)
        if self.bytes > _MOST_BYTES or time.monotonic() > self._end:
            raise _Enough
