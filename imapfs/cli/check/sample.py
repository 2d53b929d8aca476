"""A few messages of an account, fetched to measure the throughput and their real sizes.

Nothing is changed on the server, and nothing is kept.
"""

import time
from collections.abc import Sequence
from typing import Final

from imapfs.errors import ImapfsError, MailboxGone, Refused
from imapfs.imap.grammar import ListEntry
from imapfs.imap.session import Session
from imapfs.names import is_inbox
from imapfs.sync.mailbox_list import display_name

_MAX_BYTES: Final = 8 << 20
_MAX_MESSAGES: Final = 100
_MAX_MAILBOXES: Final = 10
"""Mailboxes that are opened in search of a message."""


class _Enough(Exception):
    """The sample has reached its limit of bytes or seconds."""


class NotListed(ImapfsError):
    """The server refuses what a listing asks, and no mailbox could be listed that has messages."""


class Sample:
    """What `take` has measured."""

    def __init__(self) -> None:
        self.announced: dict[int, int] = {}
        """RFC822.SIZE by UID."""
        self.exact: dict[int, int] = {}
        """Size of BODY[] by UID, for the messages that were fetched."""
        self.bytes = 0
        """Bytes received in ``seconds``."""
        self.seconds = 0.0
        self._literal = 0
        self._end = 0.0

    def take(self, session: Session, entries: Sequence[ListEntry], seconds: float) -> None:
        """Fetch the newest messages of the first mailbox that has any, starting with INBOX.

        Stops after ``seconds``, or at 8 MiB; the session may be closed then. Raises NotListed,
        ConnectionLost, Refused.
        """
        names = sorted(
            (entry.name for entry in entries if entry.selectable), key=lambda name: not is_inbox(name)
        )
        refused: NotListed | None = None
        for name in names[:_MAX_MAILBOXES]:
            try:
                self.announced = session.sample(name, _MAX_MESSAGES)
            except Refused as error:
                refused = refused or NotListed(f"{display_name(name)} cannot be listed: {error}")
            except MailboxGone:
                continue
            if self.announced:
                break
        if not self.announced:
            if refused is not None:
                raise refused
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
        """Return the newest messages that together stay below the limit, but at least one."""
        chosen: list[int] = []
        total = 0
        for uid in sorted(self.announced, reverse=True):
            total += self.announced[uid]
            if total > _MAX_BYTES and chosen:
                break
            chosen.append(uid)
        return chosen

    def _open(self, uid: int | None, size: int) -> "Sample":
        if uid is not None:
            # Noted at once: the message may be too large to be fetched completely.
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
        """Count received bytes. Raises _Enough at the limit."""
        self.bytes += len(data)
        if self.bytes > _MAX_BYTES or time.monotonic() > self._end:
            raise _Enough
