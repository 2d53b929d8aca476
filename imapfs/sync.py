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
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from imapfs.bodies import BodyStore
from imapfs.cache import Cache, Directory, Gone, Mailbox, NewMessage
from imapfs.errors import ImapfsError, MailboxGone, ProtocolError, report
from imapfs.headers import parse_headers
from imapfs.imap.grammar import FetchData, ListEntry, parse_date
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import MailboxState, Session
from imapfs.model import Ino, ModSeq, Uid, UidValidity
from imapfs.names import decode_mailbox, entry_name

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_BATCH: Final = 64
"""Messages in the first transaction of a listing: small, so that `ls` shows something soon."""
_BATCH: Final = 1000
_MAX_DEPTH: Final = 100
_MAX_SIZE: Final = (1 << 62) - 1


@dataclass(frozen=True, slots=True)
class Changes:
    """What a synchronisation did to a directory: for whoever caches or watches it."""

    directory: Ino
    added: Sequence[tuple[Ino, bytes]] = ()
    gone: Sequence[Gone] = ()
    flagged: Sequence[Ino] = ()


class Refresh:
    """A synchronisation in progress."""

    def __init__(self) -> None:
        self.done = False
        self.error: ImapfsError | None = None
        self._changed = trio.Event()

    def wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def finish(self, error: ImapfsError | None) -> None:
        self.done, self.error = True, error
        self.wake()

    async def progress(self) -> None:
        """Wait until more is known, or nothing more comes."""
        if not self.done:
            await self._changed.wait()

    async def finished(self) -> None:
        while not self.done:
            await self._changed.wait()


class Synchroniser:
    """Synchronises on demand. ``on_changes`` is called on the trio thread after each transaction."""

    def __init__(
        self,
        pool: SessionPool,
        cache: Cache,
        bodies: BodyStore,
        nursery: trio.Nursery,
        on_changes: Callable[[Changes], None],
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._bodies = bodies
        self._nursery = nursery
        self._on_changes = on_changes
        self._tree: Refresh | None = None
        self._tree_at = -math.inf
        self._mailboxes: dict[Ino, Refresh] = {}
        self._mailbox_at: dict[Ino, float] = {}
        self._locks: dict[Ino, trio.Lock] = {}
        self._prefix: bytes | None = None
        self.delimiter = b""
        """Hierarchy delimiter of the personal namespace, once the tree is known."""

    # -- the tree ------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> bytes:
        """Prefix of the personal namespace, once the tree is known."""
        return self._prefix or b""

    def refresh_tree(self, max_age: float) -> Refresh | None:
        """Have the list of mailboxes not older than ``max_age`` seconds; None if it is so already."""
        if self._tree is None and time.monotonic() - self._tree_at > max_age:
            self._tree = Refresh()
            self._nursery.start_soon(self._run_tree, self._tree)
        return self._tree

    async def _run_tree(self, refresh: Refresh) -> None:
        error: ImapfsError | None = None
        try:
            entries = await self._pool.run(self._list)
            self.delimiter = next((e.delimiter for e in entries if e.delimiter), b"")
            added, gone = self._cache.set_tree(plan_tree(entries, self.prefix))
            self._tree_at = time.monotonic()
            for parent in {n.parent for n in added} | {g.parent for g in gone}:
                self.publish(
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

    def _list(self, session: Session) -> list[ListEntry]:
        if self._prefix is None:
            self._prefix = session.personal_prefix()
        return session.list_mailboxes()

    # -- the messages of one mailbox -----------------------------------------------------------------------

    def refresh_mailbox(self, ino: Ino, max_age: float) -> Refresh | None:
        """Have the mailbox's messages not older than ``max_age`` seconds; None if they are so already."""
        refresh = self._mailboxes.get(ino)
        if refresh is None and time.monotonic() - self._mailbox_at.get(ino, -math.inf) > max_age:
            refresh = self._mailboxes[ino] = Refresh()
            self._nursery.start_soon(self._run_mailbox, ino, refresh)
        return refresh

    async def _run_mailbox(self, ino: Ino, refresh: Refresh) -> None:
        error: ImapfsError | None = None
        started = time.monotonic()
        try:
            mailbox = self._cache.mailbox(ino)
            if mailbox is None or mailbox.server_name is None or not mailbox.selectable:
                raise MailboxGone("the mailbox is gone")
            work = _MailboxSync(self._cache, ino, refresh, self.publish)
            async with self.exclusive(ino):
                await self._pool.run(work.run, mailbox.server_name)
            self._mailbox_at[ino] = started
            await trio.to_thread.run_sync(self._cache.checkpoint)
        except Exception as failure:
            error = report(failure, f"mailbox {ino} was not refreshed")
            if isinstance(failure, MailboxGone):
                # Perhaps it was renamed or deleted: the list of mailboxes knows.
                self.refresh_tree(0)
        finally:
            del self._mailboxes[ino]
            refresh.finish(error)

    @contextlib.asynccontextmanager
    async def exclusive(self, *mailboxes: Ino) -> AsyncIterator[None]:
        """No synchronisation and no other change of these mailboxes meanwhile.

        LOCK ORDER: by inode number. Held over questions to the server, so never waited for by a handler that
        can answer from the cache.
        """
        async with contextlib.AsyncExitStack() as stack:
            for ino in sorted(set(mailboxes)):
                await stack.enter_async_context(self._locks.setdefault(ino, trio.Lock()))
            yield

    def forget_age(self, mailbox: Ino) -> None:
        """The next look at a mailbox asks the server."""
        self._mailbox_at.pop(mailbox, None)

    def publish(self, changes: Changes) -> None:
        """Tell of a transaction; first those who may want to keep a body that goes."""
        if changes.added or changes.gone or changes.flagged:
            self._on_changes(changes)
            self._bodies.drop(changes.gone)


class _Stale(Exception):
    """What is cached is of another incarnation of the mailbox."""


class _MailboxSync:
    """One synchronisation of one mailbox: runs in a thread, touches the cache through the trio thread."""

    def __init__(self, cache: Cache, ino: Ino, refresh: Refresh, publish: Callable[[Changes], None]) -> None:
        self._cache = cache
        self._ino = ino
        self._refresh = refresh
        self._publish = publish

    def _on_trio(self, call: Callable[..., T], *args: object) -> T:
        return trio.from_thread.run_sync(call, *args)

    def run(self, session: Session) -> None:
        """Bring the mailbox up to date, starting from whatever is known of it now."""
        box = self._on_trio(self._cache.mailbox, self._ino)
        if box is None or box.server_name is None:
            raise MailboxGone("the mailbox is gone")
        name = box.server_name
        last = self._on_trio(self._cache.last_uid, self._ino)
        try:
            if box.complete and box.modseq and session.has("QRESYNC"):
                self._by_qresync(session, name, box, last)
            elif box.complete and box.modseq and session.has("CONDSTORE"):
                self._by_condstore(session, name, box, last)
            elif last:
                self._by_comparison(session, name, box)
            else:
                self._from_nothing(session, name)
        except _Stale:
            log.info("mailbox %d was made anew on the server: it is listed from the start", self._ino)
            self._from_nothing(session, name)

    def _by_qresync(self, session: Session, name: bytes, box: Mailbox, last: int) -> None:
        flags: list[tuple[Uid, str, ModSeq]] = []
        listed: list[NewMessage] = []

        def take(data: FetchData) -> None:
            if data.date is not None:
                listed.append(new_message(data))
            else:
                flags.append(_flags(data))

        state = session.list_changes(name, box.uidvalidity, box.modseq, last, take)
        _check_incarnation(box, state)
        self._check_known(listed, last)
        self._on_trio(self._apply, state.vanished, listed, flags)
        self._done(state)

    def _by_condstore(self, session: Session, name: bytes, box: Mailbox, last: int) -> None:
        state = session.examine(name)
        _check_incarnation(box, state)
        listed: list[NewMessage] = []
        if state.exists:
            # Asked for even if UIDNEXT has not moved: the last message proves that the mailbox is the same.
            session.fetch_metadata_from(last, lambda data: listed.append(new_message(data)))
        self._check_known(listed, last)
        flags: list[tuple[Uid, str, ModSeq]] = []
        if state.highestmodseq != box.modseq:
            session.fetch_changed_flags(box.modseq, lambda data: flags.append(_flags(data)))
        self._on_trio(self._apply, [], listed, flags)
        if self._on_trio(self._cache.counts, self._ino)[0] != state.exists:
            self._by_comparison(session, name, box)
        else:
            self._done(state)

    def _by_comparison(self, session: Session, name: bytes, box: Mailbox) -> None:
        known = self._on_trio(self._cache.flags, self._ino)
        new: list[int] = []
        flags: list[tuple[Uid, str, ModSeq]] = []

        def take(data: FetchData) -> None:
            assert data.uid is not None
            old = known.pop(data.uid, None)
            if old is None:
                new.append(data.uid)
            elif data.flags is not None and data.flags != old:
                flags.append(_flags(data))

        last = max(known, default=0)
        state = session.list_flags(name, take)
        _check_incarnation(box, state)
        listed: list[NewMessage] = []
        if last and last not in known:
            session.fetch_metadata([last], lambda data: listed.append(new_message(data)))
            self._check_known(listed, last)
        self._on_trio(self._apply, [(uid, uid) for uid in known], [], flags)
        batches = _Batches(lambda batch: self._on_trio(self._apply, [], batch, []))
        if new:
            session.fetch_metadata(new, lambda data: batches.add(new_message(data)))
        batches.flush()
        self._done(state)

    def _from_nothing(self, session: Session, name: bytes) -> None:
        batches = _Batches(lambda batch: self._on_trio(self._apply, [], batch, []))
        session.list_all(
            name,
            lambda data: batches.add(new_message(data)),
            lambda state: self._on_trio(self._reset, _uidvalidity(state)),
        )
        batches.flush()
        self._done(session.state)

    def _check_known(self, listed: Iterable[NewMessage], last: int) -> None:
        """Raise _Stale if a message that is known comes back as another one.

        UIDVALIDITY is often the time in seconds: a mailbox deleted and made again within one has the same.
        """
        for message in listed:
            if message.uid <= last:
                node = self._on_trio(self._cache.message, self._ino, message.uid)
                if node and (node.date != message.date or not (node.exact or node.size == message.size)):
                    raise _Stale

    # On the trio thread:

    def _apply(
        self,
        vanished: Sequence[tuple[int, int]],
        listed: Sequence[NewMessage],
        flags: Sequence[tuple[Uid, str, ModSeq]],
    ) -> None:
        gone = self._cache.remove(self._ino, vanished) if vanished else []
        added = self._cache.add_messages(self._ino, listed) if listed else []
        flagged = self._cache.set_flags(self._ino, flags) if flags else []
        self._publish(Changes(self._ino, added, gone, flagged))
        self._refresh.wake()

    def _reset(self, uidvalidity: UidValidity) -> None:
        self._publish(Changes(self._ino, gone=self._cache.reset(self._ino, uidvalidity)))

    def _done(self, state: MailboxState) -> None:
        def note() -> None:
            uidnext = state.uidnext or self._cache.last_uid(self._ino) + 1
            self._cache.set_state(self._ino, _uidvalidity(state), uidnext, state.highestmodseq, complete=True)

        self._on_trio(note)


class _Batches:
    """Collects messages and hands them over a transaction's worth at a time."""

    def __init__(self, apply: Callable[[list[NewMessage]], None]) -> None:
        self._apply = apply
        self._batch: list[NewMessage] = []
        self._limit = _FIRST_BATCH

    def add(self, message: NewMessage) -> None:
        self._batch.append(message)
        if len(self._batch) >= self._limit:
            self.flush()

    def flush(self) -> None:
        if self._batch:
            self._apply(self._batch)
            self._batch = []
            self._limit = _BATCH


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


def _flags(data: FetchData) -> tuple[Uid, str, ModSeq]:
    assert data.uid is not None
    return data.uid, data.flags or "", data.modseq or ModSeq(0)


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
        return [b"INBOX" if name.upper() == b"INBOX" else name]
    name = name.removesuffix(delimiter)
    if prefix and name[: len(prefix)].upper() == prefix.upper() and len(name) > len(prefix):
        rest = name[len(prefix) :].split(delimiter)
        # INBOX.INBOX stays under INBOX, for there is an INBOX already.
        if rest[0].upper() != b"INBOX":
            return rest
    components = name.split(delimiter)
    if components[0].upper() == b"INBOX":
        components[0] = b"INBOX"
    return components


def display_name(server_name: bytes) -> str:
    """A mailbox name for people; one in no known encoding with its odd bytes escaped."""
    decoded = decode_mailbox(server_name)
    return decoded if decoded is not None else server_name.decode("ascii", "backslashreplace")
