"""What a server says without being asked, one connection at a time: IDLE (RFC 2177), with NOTIFY (RFC 5465).

A `Watch` runs in a thread, which waits in the kernel until the server says something; nothing wakes it but
that, the renewal, and `Watch.stop`. What is said becomes an event for the trio thread. Events tell that
something changed, and hardly ever what: a synchronisation finds that out.

Push begins with a look at what there is, on the same connection, so that there is no gap in which a change
would be missed: whatever happens after the look is told.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from imapfs.errors import NotSupported, Refused, Throttled
from imapfs.imap.grammar import (
    ListEntry,
    Response,
    parse_exists,
    parse_fetch,
    parse_list,
    parse_sequence_set,
    parse_status,
)
from imapfs.imap.session import MailboxState, Session

RENEWAL: Final = 540.0
"""Seconds after which IDLE is given anew. RFC 2177 allows 29 minutes, but address translators forget a silent
connection after 5 to 15; TCP's own probes keep it alive where they get through."""

_EXPUNGE = re.compile(rb"\* \d+ EXPUNGE\b", re.I)
_VANISHED = re.compile(rb"\* VANISHED ([\d:,]+)", re.I)
_OVERFLOW = re.compile(rb"\* OK \[NOTIFICATIONOVERFLOW\b", re.I)


@dataclass(frozen=True, slots=True)
class MailboxOpened:
    """The look: what the watched mailbox holds. All that happens to it from then on is told."""

    state: MailboxState


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """What STATUS says of a mailbox; changes say only what is other than before."""

    mailbox: bytes
    numbers: dict[str, int]


@dataclass(frozen=True, slots=True)
class AllMailboxes:
    """All mailboxes there are."""

    entries: Sequence[ListEntry]


@dataclass(frozen=True, slots=True)
class MailboxChanged:
    """A mailbox came into being, or with \\NonExistent went."""

    entry: ListEntry


@dataclass(frozen=True, slots=True)
class WatchBegan:
    """Everything from here on is told as it happens."""


@dataclass(frozen=True, slots=True)
class CountChanged:
    """Number of messages in the watched mailbox."""

    count: int


@dataclass(frozen=True, slots=True)
class MessagesVanished:
    """UID ranges that were expunged from the watched mailbox (RFC 7162 section 3.2.10)."""

    ranges: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class FlagsChanged:
    """Flags of a message in the watched mailbox changed; 0 for what is not said."""

    uid: int
    modseq: int


@dataclass(frozen=True, slots=True)
class MessageExpunged:
    """Something was expunged from the watched mailbox, and it is not said what."""


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
    """Waits in IDLE for news of ``mailbox``; with ``everywhere`` of all mailboxes, by NOTIFY.

    Made, stopped and closed on the trio thread. ``on_events`` is called there too, through ``post``, which is
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
        # Python's TLS connections stand no second thread, so that the one that waits has to be woken.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def stopped(self) -> bool:
        """Whether it was made to end by `stop`."""
        return self._stopped

    def stop(self) -> None:
        """Make `run` return after one round trip."""
        self._stopped = True
        self._end()

    def _end(self) -> None:
        self._is_over = True
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """To be called once `run` has returned, or will not be called."""
        os.close(self._wake)

    def run(self, session: Session) -> None:
        """In a thread: wait for news until stopped, or until the server ends it.

        Raises MailboxGone and Refused for the mailbox, NotSupported if the server does not do what it offers,
        ConnectionLost, Throttled.
        """
        if self.mailbox is not None:
            self._say(MailboxOpened(session.examine(self.mailbox)))
        try:
            if self._everywhere:
                session.notify(self._take)
                self._say(AllMailboxes(session.list_mailboxes(on_response=self._take_but_lists)))
            self._say(WatchBegan())
            # With NOTIFY too: otherwise Dovecot tells nothing of the selected mailbox for the first second.
            while not self._is_over and session.idle(self._take, self._wake, RENEWAL):
                pass  # a server that ends IDLE by itself is not asked again at once
        except Throttled:
            raise
        except Refused as error:
            raise NotSupported(str(error)) from None
        if self._everywhere:
            session.end_notify()

    def _take(self, response: Response) -> None:
        if response[0][:7].upper() == b"* LIST ":
            if (entry := parse_list(response)) is not None:
                self._say(MailboxChanged(entry))
        else:
            self._take_but_lists(response)

    def _take_but_lists(self, response: Response) -> None:
        text = response[0]
        if (count := parse_exists(text)) is not None:
            self._say(CountChanged(count))
        elif (data := parse_fetch(response)) is not None:
            self._say(FlagsChanged(data.uid or 0, data.modseq or 0))
        elif m := _VANISHED.match(text):
            self._say(MessagesVanished(parse_sequence_set(m[1])))
        elif _EXPUNGE.match(text):
            self._say(MessageExpunged())
        elif (status := parse_status(response)) is not None:
            self._say(StatusChanged(*status))
        elif _OVERFLOW.match(text):
            # The server tells no more (RFC 5465 section 5.8): it has to be begun anew.
            self._end()

    def _say(self, event: WatchEvent) -> None:
        self._events.append(event)
        self._post(self._deliver)

    def _deliver(self) -> None:
        events = []
        while self._events:
            events.append(self._events.popleft())
        if events:
            self._on_events(events)
