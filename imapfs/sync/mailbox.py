"""One synchronisation of one mailbox.

A mailbox is synchronised by the cheapest way that the server offers: QRESYNC (one round trip for all
changes), CONDSTORE (flags since a MODSEQ, and a comparison of UIDs only if the number of messages differs),
or a comparison of all UIDs and flags. The first listing is applied while it comes in, so that a directory
fills from its start.

The IMAP half runs in a thread and hands over its results in batches; each batch is one transaction on the
trio thread.
"""

import contextlib
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

import trio

from imapfs.errors import ConnectionLost, MailboxGone, ProtocolError, Refused, TimedOut
from imapfs.headers import parse_headers
from imapfs.imap.grammar import FetchData, parse_date
from imapfs.imap.responses import MailboxState
from imapfs.imap.session import Session
from imapfs.model import Ino, ModSeq, Uid, UidValidity
from imapfs.store.cache import MAX_UID, Cache
from imapfs.store.rows import Mailbox, NewMessage
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.identify import is_alike, is_other_mailbox
from imapfs.sync.refresh import Refresh
from imapfs.sync.renames import MoveCoordinator, MoveDetector

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_BATCH: Final = 64
"""Messages in the first transaction of a listing: few, so that `ls` shows something soon."""
_MAX_BATCH: Final = 1000
"""Maximum rows in a transaction, so that none keeps the trio thread busy for long."""
_MAX_SINGLE: Final = 100
"""Messages that are asked for one by one because an answer has left them out."""
_MAX_STUCK: Final = 3
"""Consecutive attempts without progress after which a listing is given up."""
_MAX_ATTEMPTS: Final = 50
_MAX_SIZE: Final = (1 << 62) - 1

FlagUpdate = tuple[Uid, str, ModSeq]
"""UID, all flags, MODSEQ."""


class _Stale(Exception):
    """The cache has another incarnation of the mailbox."""


class _Batches:
    """Collects what the server sends about messages, and applies it in batches.

    What a response holds decides, not what was asked for: any answer may have changes of flags in it.
    """

    def __init__(
        self, apply: Callable[[Sequence[NewMessage], Sequence[FlagUpdate]], None], *, note_uids: bool
    ) -> None:
        self._apply = apply
        self._note_uids = note_uids
        self._messages: list[NewMessage] = []
        self._flags: list[FlagUpdate] = []
        self._limit = _FIRST_BATCH
        self.any = False
        """Whether a message has come."""
        self.uids: set[int] = set()
        """UIDs of the messages so far, if they are noted."""

    def add(self, data: FetchData) -> None:
        """Add a response, and apply the batch if it is full."""
        if data.is_metadata:
            self._messages.append(new_message(data))
            self.any = True
            if self._note_uids:
                self.uids.add(self._messages[-1].uid)
        elif data.flags is not None:
            assert data.uid is not None
            self._flags.append((data.uid, data.flags, data.modseq or ModSeq(0)))
        if len(self._messages) + len(self._flags) >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Apply what was collected."""
        messages, self._messages = self._messages, []
        # Flags after messages: they may belong to these.
        flags, self._flags = self._flags, []
        if messages or flags:
            self._apply(messages, flags)
            self._limit = _MAX_BATCH


class MailboxRun:
    """One synchronisation of one mailbox. `run` runs in a thread; the trio thread changes the cache for it.

    A server that cannot read a message may end the connection in the middle of a listing (Dovecot), or refuse
    the whole command. What came before that is kept, and another `run` can continue: it compares UIDs and
    asks for the rest. A message at which a listing has ended twice is listed without its header fields.
    """

    def __init__(
        self,
        cache: Cache,
        ino: Ino,
        refresh: Refresh,
        hub: ChangeHub,
        moves: MoveCoordinator,
    ) -> None:
        self._cache = cache
        self.ino = ino
        self.shown = cache.shown(ino)
        """Its path, for people."""
        self._refresh = refresh
        self._hub = hub
        self._moves = moves
        self._detector = MoveDetector(cache, ino, moves)
        self._listing = False
        """Whether metadata is coming in, so that a message may be the cause of a failure."""
        self._progress = False
        self._attempts = 0
        self._stuck = 0
        self._asked: list[int] = []
        """UIDs of the last request for metadata, in order."""
        self._suspect = 0
        """The first of them that was not answered."""
        self._unreadable: set[int] = set()
        self._first_look = False

    def _on_trio(self, call: Callable[..., T], *args: object) -> T:
        return trio.from_thread.run_sync(call, *args)

    def can_continue(self, error: ConnectionLost | Refused) -> bool:
        """Return whether `run`, which has raised ``error``, may get further if it is called again."""
        self._attempts += 1
        self._stuck = 0 if self._progress else self._stuck + 1
        return (
            self._listing
            and not isinstance(error, TimedOut)
            and self._stuck < _MAX_STUCK
            and self._attempts < _MAX_ATTEMPTS
        )

    def run(self, session: Session) -> None:
        """Bring the mailbox up to date, starting from what the cache knows. Raises ImapfsError."""
        self._listing = self._progress = False
        box = self._on_trio(self._cache.mailbox, self.ino)
        name = box and box.selectable_name
        if box is None or name is None:
            raise MailboxGone("the mailbox is gone")
        if not self._attempts:
            self._first_look = not box.complete
        highest = last = self._on_trio(self._cache.last_uid, self.ino)
        if box.uidnext:
            # Messages with UIDNEXT or a higher UID are known only because this mount has put them there:
            # there may be others before them.
            last = min(last, box.uidnext - 1)
            # But each proves, as the last synchronisation does, that UIDNEXT was higher.
            box = box._replace(uidnext=self._on_trio(self._cache.uidnext, box))
        tracked = box.complete and box.modseq and not self._attempts
        try:
            if tracked and session.has("QRESYNC"):
                self._by_qresync(session, name, box, last)
            elif tracked and session.has("CONDSTORE"):
                self._by_condstore(session, name, box, last)
            elif highest:
                self._by_comparison(session, name, box)
            else:
                self._from_nothing(session, name)
        except _Stale:
            log.info("%s was created again on the server: it is listed from the start", self.shown)
            self._from_nothing(session, name)

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[_Batches]:
        """Collect metadata; what has come is kept even if the request then fails."""
        # All of a large mailbox would take much memory, and nothing is missed where nothing was named.
        batches = _Batches(self._add, note_uids=bool(self._asked))
        self._listing = True
        try:
            yield batches
        except (ConnectionLost, Refused):
            batches.flush()
            self._progress |= batches.any
            self._note_failure(batches.uids)
            raise
        batches.flush()
        self._listing = False

    def _note_failure(self, came: set[int]) -> None:
        """Suspect the first message that was asked for and did not come; the second time, as unreadable."""
        suspect = next((uid for uid in self._asked if uid not in came), 0)
        if suspect and suspect == self._suspect:
            self._unreadable.add(suspect)
            self._progress = True
            log.warning("the server cannot read message %d of %s", suspect, self.shown)
        self._suspect = suspect

    def _by_qresync(self, session: Session, name: bytes, box: Mailbox, last: int) -> None:
        # Nothing is applied before it is certain that this is the mailbox in the cache.
        found: list[FetchData] = []
        self._listing = True
        state = session.list_changes(name, box.uidvalidity, box.modseq, last, found.append)
        self._listing = False
        _check_incarnation(box, state)
        if not state.highestmodseq:
            return self._by_comparison(session, name, box)
        if not self._check_known(found, last):
            self._check_one(session, self._last_but(state.vanished))
        gone = self._gone(session, state.vanished)
        self._take_all(found)
        self._apply_moves(session)
        self._remove(gone)
        if self._on_trio(self._cache.counts, self.ino)[0] != state.exists:
            return self._by_comparison(session, name, box)
        return self._done(state)

    def _by_condstore(self, session: Session, name: bytes, box: Mailbox, last: int) -> None:
        state = session.examine(name)
        _check_incarnation(box, state)
        found: list[FetchData] = []
        if state.exists:
            # Even if UIDNEXT is the same: the last message proves that the mailbox is the same.
            self._listing = True
            session.fetch_metadata_from(last, found.append, found.append)
            self._listing = False
        if not self._check_known(found, last) or not state.highestmodseq:
            return self._by_comparison(session, name, box)
        if state.highestmodseq != box.modseq:
            session.fetch_changed_flags(box.modseq, found.append)
        self._take_all(found)
        self._apply_moves(session)
        if self._on_trio(self._cache.counts, self.ino)[0] != state.exists:
            return self._by_comparison(session, name, box)
        return self._done(state)

    def _by_comparison(self, session: Session, name: bytes, box: Mailbox) -> None:
        known = self._on_trio(self._cache.flags, self.ino)
        there: set[int] = set()
        changed: dict[int, FetchData] = {}

        def take(data: FetchData) -> None:
            assert data.uid is not None
            there.add(data.uid)
            if data.flags is not None and known.get(data.uid, data.flags) != data.flags:
                changed[data.uid] = data

        state = session.list_flags(name, take)
        _check_incarnation(box, state)
        self._check_one(session, max(there.intersection(known), default=0))
        self._remove(self._gone(session, [(uid, uid) for uid in known if uid not in there]))
        self._take_all(changed.values())
        new = sorted(there.difference(known))
        if new:
            self._asked = [uid for uid in new if uid not in self._unreadable]
            with self._collecting() as batches:
                session.fetch_metadata(
                    self._unreadable.intersection(new), batches.add, batches.add, headers=False, held=False
                )
                session.fetch_metadata(self._asked, batches.add, batches.add, held=False)
        self._complete(session)
        self._apply_moves(session)
        self._done(state)

    def _from_nothing(self, session: Session, name: bytes) -> None:
        self._asked = []
        with self._collecting() as batches:
            session.list_all(name, batches.add, self._reset, batches.add)
        state = session.state
        self._complete(session)
        self._apply_moves(session)
        self._done(state)

    def _complete(self, session: Session) -> None:
        """Add the messages that the answers have left out, although they ended with OK.

        They are asked for again in other words. A message of which the server says nothing at all is added
        without its metadata: to hide it would have a backup delete its copy.
        """
        if self._on_trio(self._cache.counts, self.ino)[0] >= session.state.exists:
            return
        known = self._on_trio(self._known)
        if len(known) >= session.state.exists:
            return
        left = session.present() - known
        requests = [(left, True), (left, False), *(({uid}, False) for uid in sorted(left)[:_MAX_SINGLE])]
        for uids, headers in requests:
            self._asked = sorted(left & uids)
            if self._asked:
                with self._collecting() as batches:
                    session.fetch_metadata(self._asked, batches.add, batches.add, headers=headers, held=False)
                left = left - batches.uids
        if left:
            left &= session.present()
        if left:
            log.warning(
                "the server says nothing about %d messages of %s, the first with UID %d: they have"
                " no date, size and subject",
                len(left), self.shown, min(left),
            )  # fmt: skip
        self._take_all(FetchData(Uid(uid), flags="", size=0, date=b"") for uid in sorted(left))

    def _gone(self, session: Session, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the part of ``ranges`` in which the server really has no message.

        What an answer leaves out, or calls vanished, may be there: SEARCH decides. The mailbox must still be
        selected, so before `_apply_moves`.
        """
        there = sorted(session.present(ranges)) if ranges else []
        if not there:
            return list(ranges)
        log.info("%d messages that the server has called gone are there", len(there))
        gone: list[tuple[int, int]] = []
        for low, high in ranges:
            for uid in there[bisect_left(there, low) : bisect_right(there, high)]:
                if low < uid:
                    gone.append((low, uid - 1))
                low = uid + 1
            if low <= high:
                gone.append((low, high))
        return gone

    def _check_known(self, found: Iterable[FetchData], last: int) -> bool:
        """Return whether ``found`` has a known message, one with a UID up to ``last``.

        Raises _Stale if the UID of any that is known belongs to another message now: UIDVALIDITY often is the
        time in seconds, so that a mailbox which is deleted and created again within a second has the same;
        and after a server was restored, others may have the UIDs that this mount has been given there.
        """
        checked = False
        for data in found:
            if not data.is_metadata or data.uid is None:
                continue
            message = new_message(data)
            node = self._on_trio(self._cache.message, self.ino, message.uid)
            if node is None:
                continue
            if not is_alike(node, message):
                raise _Stale
            checked |= data.uid <= last
        return checked

    def _check_one(self, session: Session, uid: int) -> None:
        """Fetch the metadata of a message for `_check_known`."""
        if uid:
            found: list[FetchData] = []
            # Without header fields: the server may be unable to read the message.
            session.fetch_metadata([uid], found.append, headers=False)
            self._check_known(found, uid)

    def _last_but(self, vanished: Iterable[tuple[int, int]]) -> int:
        """Return the highest known UID that is not in these ranges."""
        uid = self._on_trio(self._cache.last_uid, self.ino)
        for low, high in sorted(vanished, reverse=True):
            if low <= uid <= high:
                uid = self._on_trio(self._cache.last_uid, self.ino, low)
        return uid

    def _take_all(self, found: Iterable[FetchData]) -> None:
        batches = _Batches(self._add, note_uids=False)
        for data in found:
            batches.add(data)
        batches.flush()

    def _add(self, messages: Sequence[NewMessage], flags: Sequence[FlagUpdate]) -> None:
        self._on_trio(self._apply, messages, flags)

    def _apply_moves(self, session: Session) -> None:
        """Find out which new messages were moved here. Selects other mailboxes."""
        sources = self._detector.check_sources(session)
        if sources:
            trio.from_thread.run(self._moves.wait_for_sources, self.ino, sources)
            self._on_trio(self._resolve_moves)

    def _remove(self, ranges: Sequence[tuple[int, int]]) -> None:
        if ranges:
            trio.from_thread.run(self._moves.wait_before_removal, self.ino)
        for start in range(0, len(ranges), _MAX_BATCH):
            while self._on_trio(self._apply_removal, ranges[start : start + _MAX_BATCH]) == _MAX_BATCH:
                pass

    def _reset(self, state: MailboxState) -> None:
        uidvalidity = _uidvalidity(state)
        # In batches; the cache has the old UIDVALIDITY until the last of them.
        self._remove([(0, MAX_UID)])
        self._on_trio(self._apply_reset, uidvalidity)

    # -- on the trio thread --------------------------------------------------------------------------------

    def _known(self) -> set[int]:
        """Return the UIDs of the messages that have come."""
        return {*self._cache.flags(self.ino), *self._detector.kept_back}

    def _apply(self, messages: Sequence[NewMessage], flags: Sequence[FlagUpdate]) -> None:
        if self._cache.mailbox(self.ino) is None:
            raise MailboxGone("the mailbox is gone")
        flagged: list[Ino] = []
        if not self._first_look:
            messages = self._detector.keep_back(messages)
            # The newest message that is known comes with those that are new.
            known = [m for m in messages if self._cache.message(self.ino, m.uid) is not None]
            flagged = self._cache.set_flags(self.ino, [(m.uid, m.flags, m.modseq) for m in known])
        added = self._cache.add_messages(self.ino, messages) if messages else []
        if flags:
            flagged += self._cache.set_flags(self.ino, flags)
        self._hub.publish(Changes(self.ino, added, flagged=flagged, first_look=self._first_look))
        self._refresh.wake()

    def _resolve_moves(self) -> None:
        new, moved, rewritten = self._detector.resolve()
        self._hub.publish(
            Changes(
                self.ino,
                self._cache.add_messages(self.ino, new),
                moved=moved,
                rewritten=[node.ino for node in rewritten],
                outdated=rewritten,
            )
        )
        self._refresh.wake()

    def _apply_removal(self, ranges: Sequence[tuple[int, int]]) -> int:
        gone = self._cache.remove(self.ino, ranges, _MAX_BATCH)
        self._hub.publish(Changes(self.ino, gone=gone))
        self._refresh.wake()
        return len(gone)

    def _apply_reset(self, uidvalidity: UidValidity) -> None:
        self._hub.publish(Changes(self.ino, gone=self._cache.reset(self.ino, uidvalidity)))

    def _done(self, state: MailboxState) -> None:
        def note() -> None:
            uidnext = state.uidnext or self._cache.last_uid(self.ino) + 1
            self._cache.set_state(
                *(self.ino, _uidvalidity(state), uidnext, state.highestmodseq),
                complete=True,
                object_id=state.object_id,
            )

        self._on_trio(note)


def _uidvalidity(state: MailboxState) -> UidValidity:
    if not state.uidvalidity:
        raise ProtocolError("the server names no UIDVALIDITY: its messages cannot be told apart")
    return state.uidvalidity


def _check_incarnation(box: Mailbox, state: MailboxState) -> None:
    """Raise _Stale if the cache has another mailbox."""
    _uidvalidity(state)
    if is_other_mailbox(box.uidvalidity, box.uidnext, box.modseq, state):
        raise _Stale
    if None not in {box.object_id, state.object_id} and box.object_id != state.object_id:
        raise _Stale


def new_message(data: FetchData) -> NewMessage:
    """Return the cache row for the metadata of a message."""
    assert data.uid is not None
    date, zone = parse_date(data.date or b"")
    headers = parse_headers(data.body or b"")
    return NewMessage(
        data.uid,
        min(data.size or 0, _MAX_SIZE),
        date,
        zone,
        data.flags or "",
        data.modseq or ModSeq(0),
        headers.subject,
        headers.sender,
        headers.from_,
        headers.message_id,
        headers.recipient,
        data.object_id,
    )
