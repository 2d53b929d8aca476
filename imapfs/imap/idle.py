"""Watching mailboxes on one connection: IDLE (RFC 2177), with NOTIFY (RFC 5465) where the server has it.

A `Watch` runs in a thread, which waits in the kernel. It wakes when the server sends something, when IDLE
must be renewed, and for `Watch.stop`. Responses become events for the trio thread. An event says that
something changed, but seldom what; a synchronisation finds that out.

A watch begins with the present state, read on the same connection: the server reports every later change, so
that none is missed in between.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from imapfs.errors import MailboxGone, NotSupported, Refused, Throttled
from imapfs.imap.grammar import (
    ListEntry,
    Response,
    parse_exists,
    parse_fetch,
    parse_list,
    parse_sequence_set,
    parse_status,
)
from imapfs.imap.responses import MailboxState
from imapfs.imap.session import Session

RENEWAL: Final = 540.0
"""Seconds after which IDLE is renewed. RFC 2177 allows 29 minutes, but NAT devices forget an idle connection
after 5 to 15. TCP keepalive helps where its probes get through."""

_EXPUNGE = re.compile(rb"\* \d+ EXPUNGE\b", re.I)
_VANISHED = re.compile(rb"\* VANISHED ([\d:,]+)", re.I)
_OVERFLOW = re.compile(rb"\* OK \[NOTIFICATIONOVERFLOW\b", re.I)


@dataclass(frozen=True, slots=True)
class MailboxOpened:
    """State of the watched mailbox at the start. The server reports all later changes."""

    state: MailboxState


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """Items of a STATUS response. A response about a change contains only the items that changed."""

    mailbox: bytes
    numbers: dict[str, int]


@dataclass(frozen=True, slots=True)
class AllMailboxes:
    """All mailboxes at the start."""

    entries: Sequence[ListEntry]


@dataclass(frozen=True, slots=True)
class MailboxChanged:
    """A mailbox was created or changed, or with \\NonExistent deleted."""

    entry: ListEntry


@dataclass(frozen=True, slots=True)
class WatchBegan:
    """The state at the start is complete; later events are changes as they happen."""


@dataclass(frozen=True, slots=True)
class CountChanged:
    """Number of messages in the watched mailbox."""

    count: int


@dataclass(frozen=True, slots=True)
class MessagesVanished:
    """UID ranges expunged from the watched mailbox (RFC 7162 section 3.2.10)."""

    ranges: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class FlagsChanged:
    """Flags of a message in the watched mailbox changed; 0 for a number that the server left out."""

    uid: int
    modseq: int


@dataclass(frozen=True, slots=True)
class MessageExpunged:
    """A message was expunged from the watched mailbox; which one is unknown, as there is no UID."""


WatchEvent = (
    MailboxOpened
    | StatusChanged
    | AllMailboxes
    | MailboxChanged
    | WatchBegan
    | CountChanged
    | MessagesVanished
    | FlagsChanged
    | MessageExpunged
)


class Watch:
    """Watches ``mailbox`` by IDLE, and with ``everywhere`` all mailboxes by NOTIFY.

    Create, stop and close it on the trio thread. ``on_events`` is called there, through ``post``, which is
    trio's ``run_sync_soon``.
    """

    def __init__(
        self,
        mailbox: bytes | None,
        on_events: Callable[[list[WatchEvent]], None],
        post: Callable[[Callable[[], None]], None],
        *,
        everywhere: bool = False,
    ) -> None:
        self.mailbox = mailbox
        self._on_events = on_events
        self._post = post
        self._everywhere = everywhere
        self._events: deque[WatchEvent] = deque()
        self._is_over = False
        self._stopped = False
        # No second thread may use a TLS connection in Python, so `stop` wakes the one that waits.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def stop(self) -> None:
        """Make `run` return after one round trip."""
        self._stopped = True
        self._end()

    def _end(self) -> None:
        self._is_over = True
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Release the descriptor, once `run` has returned or will not be called."""
        os.close(self._wake)

    def run(self, session: Session) -> None:
        """Wait for changes, in a thread, until stopped or until the server ends IDLE.

        Raises MailboxGone and Refused for the mailbox, NotSupported if the server refuses IDLE or NOTIFY
        although it offers them, ConnectionLost, Throttled.
        """
        if self.mailbox is not None:
            self._add(MailboxOpened(session.examine(self.mailbox)))
        try:
            if self._everywhere:
                session.notify(self._take)
                self._add(AllMailboxes(session.list_mailboxes(on_response=self._take_other)))
            self._add(WatchBegan())
            # With NOTIFY too: otherwise Dovecot reports no change of the selected mailbox for the first
            # second.
            while not self._is_over and session.idle(self._take, self._wake, RENEWAL):
                pass  # if the server ends IDLE itself, the loop ends as well
        except Throttled:
            raise
        except Refused as error:
            if error.code == "NONEXISTENT":
                raise MailboxGone(str(error)) from None
            raise NotSupported(str(error)) from None
        if self._everywhere:
            session.end_notify()

    def _take(self, response: Response) -> None:
        if response[0][:7].upper() == b"* LIST ":
            if (entry := parse_list(response)) is not None:
                self._add(MailboxChanged(entry))
        else:
            self._take_other(response)

    def _take_other(self, response: Response) -> None:
        text = response[0]
        if (count := parse_exists(text)) is not None:
            self._add(CountChanged(count))
        elif (data := parse_fetch(response)) is not None:
            self._add(FlagsChanged(data.uid or 0, data.modseq or 0))
        elif m := _VANISHED.match(text):
            self._add(MessagesVanished(parse_sequence_set(m[1])))
        elif _EXPUNGE.match(text):
            self._add(MessageExpunged())
        elif (status := parse_status(response)) is not None:
            self._add(StatusChanged(*status))
        elif _OVERFLOW.match(text):
            # The server sends no more notifications (RFC 5465 section 5.8), so the watch must start over.
            self._end()

    def _add(self, event: WatchEvent) -> None:
        self._events.append(event)
        self._post(self._deliver)

    def _deliver(self) -> None:
        events = []
        while self._events:
            events.append(self._events.popleft())
        if events:
            self._on_events(events)
