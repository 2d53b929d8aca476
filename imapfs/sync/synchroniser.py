"""Keeping the cache equal to the server: the tree of mailboxes, and the messages of each.

A mailbox is synchronised by the cheapest way that the server has: QRESYNC (one round trip for what changed),
CONDSTORE (flags since a MODSEQ; a comparison of UIDs only if the count does not fit), or a comparison of all
UIDs and flags. The first listing is applied while it comes in, so that a directory fills from its start.

One synchronisation a mailbox at a time; whoever asks meanwhile waits for that one. The IMAP half runs in a
thread and hands over results in batches; each batch is one transaction on the trio thread.
"""

import contextlib
import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

import trio

from imapfs.errors import ConnectionLost, ImapfsError, MailboxGone, ProtocolError, Refused, TimedOut
from imapfs.headers import parse_headers
from imapfs.imap.grammar import FetchData, ListEntry, parse_date
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import MailboxState, Session
from imapfs.log import report
from imapfs.model import ROOT, Ino, ModSeq, Uid, UidValidity
from imapfs.names import decode_mailbox, entry_name, is_inbox
from imapfs.store.cache import MAX_UID, Cache, Directory, Mailbox, NewMessage
from imapfs.store.spool import Spool
from imapfs.sync.changes import ChangeHub, Changes, Moved, Renamed
from imapfs.sync.freshness import Freshness
from imapfs.sync.identify import is_alike
from imapfs.sync.renames import Arrivals, Crossing, find_renamed
from imapfs.waiting import Signal

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_BATCH: Final = 64
"""Messages in the first transaction of a listing: small, so that `ls` shows something soon."""
_BATCH: Final = 1000
"""Most rows in one transaction, so that the trio thread is never busy with one for long."""
_REST: Final = 0.3
"""Seconds without a change made here after which a mailbox is at rest; and"""
_REST_MOST: Final = 2.0
"""how long that is waited for at most."""
_STUCK: Final = 3
"""Attempts to list a mailbox that may end without any message more."""
_ATTEMPTS: Final = 50
_MAX_DEPTH: Final = 100
_MAX_SIZE: Final = (1 << 62) - 1

FlagChange = tuple[Uid, str, ModSeq]
"""UID, all flags, MODSEQ."""


class Refresh:
    """A synchronisation in progress."""

    def __init__(self) -> None:
        self.done = False
        self.started = trio.current_time()
        self._error: ImapfsError | None = None
        self._changed = Signal()

    @property
    def error(self) -> ImapfsError | None:
        """What kept it from being done; to be raised by everyone who waits, so that its traceback is none."""
        return self._error and self._error.with_traceback(None)

    def wake(self) -> None:
        self._changed.send()

    def finish(self, error: ImapfsError | None) -> None:
        self.done, self._error = True, error
        self.wake()

    async def progress(self) -> None:
        """Wait until more is known, or nothing more comes."""
        if not self.done:
            await self._changed.wait()

    async def finished(self) -> None:
        while not self.done:
            await self._changed.wait()


class Synchroniser:
    """Synchronises on demand. What each transaction changed is published on ``hub``."""

    def __init__(
        self,
        pool: SessionPool,
        cache: Cache,
        spool: Spool,
        nursery: trio.Nursery,
        hub: ChangeHub,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._nursery = nursery
        self._hub = hub
        self.freshness = Freshness()
        self.tree_lock = trio.Lock()
        """Held while mailboxes are listed or renamed. LOCK ORDER: before those of mailboxes."""
        self._tree: Refresh | None = None
        self._mailboxes: dict[Ino, Refresh] = {}
        self._locks: dict[Ino, trio.Lock] = {}
        self._changing: Counter[Ino] = Counter()
        """How many changes are being made from here; and"""
        self._changed_at: dict[Ino, float] = {}
        """when the last one ended."""
        self.crossing = Crossing(self._mailboxes.keys(), self._locks, spool)
        self.prefix = b""
        """Prefix of the personal namespace, once the tree is known."""
        self.delimiter = b""
        """Hierarchy delimiter of the personal namespace, once the tree is known."""

    # -- the tree ------------------------------------------------------------------------------------------

    def refresh_tree(self, max_age: float) -> Refresh | None:
        """Have the list of mailboxes not older than ``max_age`` seconds; None if it is so already."""
        if self._tree is None and self.freshness.is_due(ROOT, max_age):
            self._tree = Refresh()
            self._nursery.start_soon(self._run_tree, self._tree, Session.list_mailboxes)
        return self._tree

    async def poll(self, mailboxes: Sequence[bytes]) -> dict[bytes, dict[str, int]]:
        """Refresh the list of mailboxes, and have STATUS at least of ``mailboxes``. Raises ImapfsError."""
        found: dict[bytes, dict[str, int]] = {}

        def look(session: Session) -> list[ListEntry]:
            found.clear()
            return session.list_with_status(mailboxes, found.__setitem__)

        while self._tree is not None:
            await self._tree.finished()
        refresh = self._tree = Refresh()
        await self._run_tree(refresh, look)
        if refresh.error is not None:
            raise refresh.error
        return found

    async def _run_tree(self, refresh: Refresh, look: Callable[[Session], list[ListEntry]]) -> None:
        error: ImapfsError | None = None

        def ask(session: Session) -> list[ListEntry]:
            self.prefix = session.personal_prefix
            return look(session)

        try:
            async with self.tree_lock:
                started = time.monotonic()
                entries = await self._pool.run(ask)
                self.delimiter = next((e.delimiter for e in entries if e.delimiter), b"")
                wanted = plan_tree(entries, self.prefix)
                for box, directory, parent in await find_renamed(self._pool, self._cache, wanted):
                    await self._follow(box, directory, parent)
                added, gone = self._cache.set_tree(wanted)
            self.freshness.asked(ROOT, started)
            # In the order in which a client could have done it.
            for parent in dict.fromkeys([*(g.parent for g in gone), *(n.parent for n in added)]):
                self._hub.publish(
                    Changes(
                        parent,
                        added=[(n.ino, n.name or b"") for n in added if n.parent == parent],
                        gone=[g for g in gone if g.parent == parent],
                    )
                )
        except Exception as failure:
            error = report(failure, "the list of mailboxes was not refreshed")
        finally:
            self._tree = None
            refresh.finish(error)

    def is_known(self, entries: Iterable[ListEntry]) -> bool:
        """Whether the list of mailboxes is what the cache holds."""
        known = {(m.server_name, bool(m.selectable), m.special_use) for m in self._cache.mailboxes()}
        return known == {(entry.name, entry.selectable, entry.special_use) for entry in entries}

    async def _follow(self, box: Mailbox, directory: Directory, parent: Ino) -> None:
        """Another client has renamed a mailbox."""
        old, new, name = box.server_name, directory.server_name, directory.path[-1]
        async with self.exclusive(*self._cache.family(box.ino)):
            node, now = self._cache.node(box.ino), self._cache.mailbox(box.ino)
            if node is None or now is None or now.server_name != old or old is None or new is None:
                return
            self._cache.rename_directory(box.ino, parent, name, old, new)
        renamed = Renamed(old, new, box.delimiter)
        self._hub.publish(
            Changes(parent, moved=[Moved(box.ino, node.parent, node.name or b"", name, renamed)])
        )

    # -- the messages of one mailbox -----------------------------------------------------------------------

    def refresh_mailbox(self, ino: Ino, max_age: float) -> Refresh | None:
        """Have the mailbox's messages not older than ``max_age`` seconds; None if they are so already."""
        refresh = self._mailboxes.get(ino)
        if refresh is None and self.freshness.is_due(ino, max_age):
            refresh = self._mailboxes[ino] = Refresh()
            self._nursery.start_soon(self._run_mailbox, ino, refresh)
        return refresh

    def is_refreshing(self, ino: Ino) -> bool:
        return ino in self._mailboxes

    async def _run_mailbox(self, ino: Ino, refresh: Refresh) -> None:
        error: ImapfsError | None = None
        started = time.monotonic()
        try:
            mailbox = self._cache.mailbox(ino)
            name = mailbox and mailbox.selectable_name
            if name is None:
                raise MailboxGone("the mailbox is gone")
            work = _MailboxSync(self._cache, ino, refresh, self._hub, self.crossing)
            async with self.exclusive(ino):
                await self._list_messages(work, name)
            self.freshness.asked(ino, started)
        except Exception as failure:
            error = report(failure, f"mailbox {ino} was not refreshed")
            if isinstance(failure, MailboxGone):
                # Perhaps it was renamed or deleted: the list of mailboxes knows.
                self.refresh_tree(0)
        finally:
            del self._mailboxes[ino]
            self.crossing.wake()
            refresh.finish(error)

    async def _list_messages(self, work: "_MailboxSync", name: bytes) -> None:
        while True:
            try:
                return await self._pool.run(work.run, name)
            except (ConnectionLost, Refused) as error:
                if not work.may_go_on(error):
                    raise
                log.info("mailbox %d: going on where the listing ended: %s", work.ino, error)

    @contextlib.asynccontextmanager
    async def changing(self, *mailboxes: Ino) -> AsyncIterator[None]:
        """`exclusive`, for who changes something in these mailboxes: see `at_rest`."""
        self._changing.update(mailboxes)
        try:
            async with self.exclusive(*mailboxes):
                yield
        finally:
            self._changing.subtract(mailboxes)
            self._changed_at.update(dict.fromkeys(mailboxes, time.monotonic()))

    def is_at_rest(self, mailbox: Ino) -> bool:
        """Whether nothing was changed in a mailbox from here just now.

        While something is, the news that the server has of it is of that, and to ask for it would only be in
        the way of the next change.
        """
        was = self._changed_at.get(mailbox, -math.inf)
        return not self._changing[mailbox] and time.monotonic() >= was + _REST

    async def at_rest(self, mailbox: Ino) -> None:
        """Wait until a mailbox is at rest, but not for long."""
        with trio.move_on_after(_REST_MOST):
            while True:
                if self.is_at_rest(mailbox):
                    return
                await trio.sleep(_REST)

    @contextlib.asynccontextmanager
    async def exclusive(self, *mailboxes: Ino) -> AsyncIterator[None]:
        """No synchronisation and no other change of these mailboxes meanwhile.

        LOCK ORDER: by inode number. Held over questions to the server, so never waited for by a handler that
        can answer from the cache.
        """
        async with contextlib.AsyncExitStack() as stack:
            for ino in sorted(set(mailboxes)):
                await stack.enter_async_context(self._locks.setdefault(ino, trio.Lock()))
            try:
                yield
            except MailboxGone:
                for ino in mailboxes:
                    self.look_again(ino)
                raise
            except (ConnectionLost, trio.Cancelled):
                # Who knows what the server has made of it.
                for ino in mailboxes:
                    self.freshness.forget(ino)
                raise

    def look_again(self, mailbox: Ino) -> None:
        """A mailbox turned out not to be what is known of it: it was made anew, renamed or deleted."""
        self.freshness.forget(mailbox)
        if mailbox not in self._mailboxes:
            self.refresh_mailbox(mailbox, 0)


class _Stale(Exception):
    """What is cached is of another incarnation of the mailbox."""


class _News:
    """What the server tells of a mailbox, handed over a transaction's worth at a time.

    Sorted by what it holds, not by what was asked for: any answer may have changes of flags among it.
    """

    def __init__(self, apply: Callable[[Sequence[NewMessage], Sequence[FlagChange]], None]) -> None:
        self._apply = apply
        self._messages: list[NewMessage] = []
        self._flags: list[FlagChange] = []
        self._limit = _FIRST_BATCH
        self.uids: set[int] = set()
        """Of the messages so far."""

    def take(self, data: FetchData) -> None:
        if data.size is not None:
            self._messages.append(new_message(data))
            self.uids.add(self._messages[-1].uid)
        elif data.flags is not None:
            assert data.uid is not None
            self._flags.append((data.uid, data.flags, data.modseq or ModSeq(0)))
        if len(self._messages) + len(self._flags) >= self._limit:
            self.flush()

    def flush(self) -> None:
        messages, self._messages = self._messages, []
        # After the messages, for they may be about them.
        flags, self._flags = self._flags, []
        if messages or flags:
            self._apply(messages, flags)
            self._limit = _BATCH


class _MailboxSync:
    """One synchronisation of one mailbox: runs in a thread, touches the cache through the trio thread.

    A server may be unable to read a message, and end the connection in mid-listing (Dovecot) or refuse the
    whole command. What came before is kept, and the listing can be taken up by another `run`, which compares
    UIDs and asks for the rest. A message at which that ended twice is listed without its headers.
    """

    def __init__(
        self,
        cache: Cache,
        ino: Ino,
        refresh: Refresh,
        hub: ChangeHub,
        crossing: Crossing,
    ) -> None:
        self._cache = cache
        self.ino = ino
        self._refresh = refresh
        self._hub = hub
        self._crossing = crossing
        self._arrivals = Arrivals(cache, ino, crossing.may_take)
        self._listing = False
        """Whether metadata is coming in: a failure may be the fault of a message."""
        self._progress = False
        self._attempts = 0
        self._stuck = 0
        self._asked: list[int] = []
        """UIDs of which metadata was asked for last, in order."""
        self._suspect = 0
        """The first of them that did not come."""
        self._unreadable: set[int] = set()
        self._first_look = False

    def _on_trio(self, call: Callable[..., T], *args: object) -> T:
        return trio.from_thread.run_sync(call, *args)

    def may_go_on(self, error: ConnectionLost | Refused) -> bool:
        """After `run` has raised ``error``: whether it may get further if it is called again."""
        self._attempts += 1
        self._stuck = 0 if self._progress else self._stuck + 1
        return (
            self._listing
            and not isinstance(error, TimedOut)
            and self._stuck < _STUCK
            and self._attempts < _ATTEMPTS
        )

    def run(self, session: Session) -> None:
        """Bring the mailbox up to date, starting from whatever is known of it now."""
        self._listing = self._progress = False
        box = self._on_trio(self._cache.mailbox, self.ino)
        name = box and box.selectable_name
        if box is None or name is None:
            raise MailboxGone("the mailbox is gone")
        if not self._attempts:
            self._first_look = not box.complete
        highest = last = self._on_trio(self._cache.last_uid, self.ino)
        if box.uidnext:
            # What was put there from here is known already, what came before it from elsewhere is not.
            last = min(last, box.uidnext - 1)
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
            log.info("mailbox %d was made anew on the server: it is listed from the start", self.ino)
            self._from_nothing(session, name)

    @contextlib.contextmanager
    def _taking(self) -> Iterator[_News]:
        """Metadata comes in, and what has come is kept whatever happens then."""
        news = _News(self._add)
        self._listing = True
        try:
            yield news
        except (ConnectionLost, Refused):
            news.flush()
            self._accuse(news.uids)
            raise
        news.flush()
        self._listing = False

    def _accuse(self, came: set[int]) -> None:
        """The listing ended at the first message that was asked for and did not come."""
        self._progress |= bool(came)
        suspect = next((uid for uid in self._asked if uid not in came), 0)
        if suspect and suspect == self._suspect:
            self._unreadable.add(suspect)
            self._progress = True
            log.warning("the server cannot read message %d of mailbox %d", suspect, self.ino)
        self._suspect = suspect

    def _by_qresync(self, session: Session, name: bytes, box: Mailbox, last: int) -> None:
        # Nothing is applied before it is clear that it is about the mailbox that is known.
        found: list[FetchData] = []
        self._listing = True
        state = session.list_changes(name, box.uidvalidity, box.modseq, last, found.append)
        self._listing = False
        _check_incarnation(box, state)
        if not state.highestmodseq:
            return self._by_comparison(session, name, box)
        if not self._check_known(found, last):
            self._check_one(session, self._last_but(state.vanished))
        self._take_all(found)
        self._settle(session)
        self._remove(state.vanished)
        if self._on_trio(self._cache.counts, self.ino)[0] != state.exists:
            return self._by_comparison(session, name, box)
        return self._done(state)

    def _by_condstore(self, session: Session, name: bytes, box: Mailbox, last: int) -> None:
        state = session.examine(name)
        _check_incarnation(box, state)
        found: list[FetchData] = []
        if state.exists:
            # Asked for even if UIDNEXT has not moved: the last message proves that the mailbox is the same.
            self._listing = True
            session.fetch_metadata_from(last, found.append, found.append)
            self._listing = False
        if not self._check_known(found, last) or not state.highestmodseq:
            return self._by_comparison(session, name, box)
        if state.highestmodseq != box.modseq:
            session.fetch_changed_flags(box.modseq, found.append)
        self._take_all(found)
        self._settle(session)
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
        self._remove([(uid, uid) for uid in known if uid not in there])
        self._take_all(changed.values())
        new = sorted(there.difference(known))
        if new:
            self._asked = [uid for uid in new if uid not in self._unreadable]
            with self._taking() as news:
                session.fetch_metadata(
                    self._unreadable.intersection(new), news.take, news.take, headers=False
                )
                session.fetch_metadata(self._asked, news.take, news.take)
            self._settle(session)
        self._done(state)

    def _from_nothing(self, session: Session, name: bytes) -> None:
        self._asked = []
        with self._taking() as news:
            session.list_all(name, news.take, self._reset, news.take)
        state = session.state
        self._settle(session)
        self._done(state)

    def _check_known(self, found: Iterable[FetchData], last: int) -> bool:
        """Whether a message that is known is among ``found``; raises _Stale if it comes back as another one.

        ``last`` is the last UID that is known.

        UIDVALIDITY is often the time in seconds: a mailbox deleted and made again within one has the same.
        """
        checked = False
        for data in found:
            if data.size is None or data.uid is None or data.uid > last:
                continue
            message = new_message(data)
            node = self._on_trio(self._cache.message, self.ino, message.uid)
            if node is None:
                continue
            if not is_alike(node, message):
                raise _Stale
            checked = True
        return checked

    def _check_one(self, session: Session, uid: int) -> None:
        """`_check_known` for a message that was not asked for yet."""
        if uid:
            found: list[FetchData] = []
            # Without headers, for it may be a message that the server cannot read.
            session.fetch_metadata([uid], found.append, headers=False)
            self._check_known(found, uid)

    def _last_but(self, vanished: Iterable[tuple[int, int]]) -> int:
        """The last message that is known and not in these ranges."""
        uid = self._on_trio(self._cache.last_uid, self.ino)
        for low, high in sorted(vanished, reverse=True):
            if low <= uid <= high:
                uid = self._on_trio(self._cache.last_uid, self.ino, low)
        return uid

    def _take_all(self, found: Iterable[FetchData]) -> None:
        news = _News(self._add)
        for data in found:
            news.take(data)
        news.flush()

    def _add(self, messages: Sequence[NewMessage], flags: Sequence[FlagChange]) -> None:
        self._on_trio(self._apply, messages, flags)

    def _settle(self, session: Session) -> None:
        """Have what may have been moved here. Selects other mailboxes."""
        sources = self._arrivals.look(session)
        if sources:
            trio.from_thread.run(self._crossing.before_taking, self.ino, sources)
            self._on_trio(self._apply_arrivals)

    def _remove(self, ranges: Sequence[tuple[int, int]]) -> None:
        if ranges:
            trio.from_thread.run(self._crossing.before_forgetting, self.ino)
        for start in range(0, len(ranges), _BATCH):
            while self._on_trio(self._apply_removal, ranges[start : start + _BATCH]) == _BATCH:
                pass

    def _reset(self, state: MailboxState) -> None:
        uidvalidity = _uidvalidity(state)
        # In pieces: until the last of them the mailbox is known to be another one than is cached.
        self._remove([(0, MAX_UID)])
        self._on_trio(self._apply_reset, uidvalidity)

    # On the trio thread:

    def _apply(self, messages: Sequence[NewMessage], flags: Sequence[FlagChange]) -> None:
        if self._cache.mailbox(self.ino) is None:
            raise MailboxGone("the mailbox is gone")
        if not self._first_look:
            messages = self._arrivals.hold_back(messages)
        added = self._cache.add_messages(self.ino, messages) if messages else []
        flagged = self._cache.set_flags(self.ino, flags) if flags else []
        self._hub.publish(Changes(self.ino, added, flagged=flagged, first_look=self._first_look))
        self._refresh.wake()

    def _apply_arrivals(self) -> None:
        new, moved = self._arrivals.take()
        self._hub.publish(Changes(self.ino, self._cache.add_messages(self.ino, new), moved=moved))
        self._refresh.wake()

    def _apply_removal(self, ranges: Sequence[tuple[int, int]]) -> int:
        gone = self._cache.remove(self.ino, ranges, _BATCH)
        self._hub.publish(Changes(self.ino, gone=gone))
        self._refresh.wake()
        return len(gone)

    def _apply_reset(self, uidvalidity: UidValidity) -> None:
        self._hub.publish(Changes(self.ino, gone=self._cache.reset(self.ino, uidvalidity)))

    def _done(self, state: MailboxState) -> None:
        def note() -> None:
            uidnext = state.uidnext or self._cache.last_uid(self.ino) + 1
            self._cache.set_state(self.ino, _uidvalidity(state), uidnext, state.highestmodseq, complete=True)

        self._on_trio(note)


def _uidvalidity(state: MailboxState) -> UidValidity:
    if not state.uidvalidity:
        raise ProtocolError("the server names no UIDVALIDITY: its messages cannot be told apart")
    return state.uidvalidity


def _check_incarnation(box: Mailbox, state: MailboxState) -> None:
    """Raise _Stale if the mailbox is not the one that is cached: numbers that only grow went back."""
    if (
        _uidvalidity(state) != box.uidvalidity
        or (state.uidnext and state.uidnext < box.uidnext)
        or (state.highestmodseq and state.highestmodseq < box.modseq)
    ):
        raise _Stale


def new_message(data: FetchData) -> NewMessage:
    """A cache row for what a FETCH of metadata gave."""
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
    )


def plan_tree(entries: Iterable[ListEntry], prefix: bytes) -> list[Directory]:
    """The directories for a LIST response, parents before children.

    The personal namespace (``prefix``, such as ``INBOX.``) is the root; INBOX is spelled so whatever the
    server writes (RFC 9051 section 5.1). Ancestors that the server does not list become directories without
    messages. Two mailboxes that would have the same name (which takes an odd server) are told apart by a
    suffix.
    """
    planned: dict[tuple[bytes, ...], Directory] = {}
    for entry in sorted(entries, key=lambda e: e.name):
        components = _components(entry, prefix)
        if len(components) > _MAX_DEPTH:
            log.warning("a mailbox is not shown, it is nested %d deep", len(components))
            continue
        path = tuple(map(entry_name, components))
        for depth in range(1, len(path)):
            planned.setdefault(path[:depth], Directory(path[:depth], None, entry.delimiter, False, ""))
        there = planned.get(path)
        if there is not None and there.server_name is not None and there.server_name != entry.name:
            digest = hashlib.sha256(entry.name).hexdigest()[:16].encode()
            path = (*path[:-1], path[-1][:230].decode("utf-8", "ignore").encode() + b"%~" + digest)
        planned[path] = Directory(path, entry.name, entry.delimiter, entry.selectable, entry.special_use)
    return [planned[path] for path in sorted(planned, key=lambda p: (len(p), p))]


def _components(entry: ListEntry, prefix: bytes) -> list[bytes]:
    """The hierarchy levels of a mailbox name as the mount shows them, still encoded."""
    name, delimiter = entry.name, entry.delimiter
    if not delimiter:
        return [b"INBOX" if is_inbox(name) else name]
    name = name.removesuffix(delimiter)
    if prefix and name[: len(prefix)].upper() == prefix.upper() and len(name) > len(prefix):
        rest = name[len(prefix) :].split(delimiter)
        # INBOX.INBOX stays under INBOX, for there is an INBOX already.
        if not is_inbox(rest[0]):
            return rest
    components = name.split(delimiter)
    if is_inbox(components[0]):
        components[0] = b"INBOX"
    return components


def display_name(server_name: bytes) -> str:
    """A mailbox name for people; one in no known encoding with its odd bytes escaped."""
    decoded = decode_mailbox(server_name)
    return decoded if decoded is not None else server_name.decode("ascii", "backslashreplace")
