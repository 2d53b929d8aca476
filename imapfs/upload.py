"""Turning drafts into messages: APPEND, at most once.

A draft is submitted when it is complete. It is then made fit for a server (CRLF line ends), compared with
the message that it is a new version of, and appended, with a note on disk of where it is about to go; several
at a time in one flight. When the server has it, the cache adopts it under the same inode
and name, and only then does the draft leave the spool and the old version the server.

If a connection breaks in between, or the process ends, the note says where to look: what is found beyond the
UIDNEXT of that time, with the same bytes, is the message, and is not sent again. The note need not survive
a power cut: a draft of an earlier process that has none is looked for in the whole mailbox.
"""

import contextlib
import logging
import math
import mmap
import os
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from imapfs.bodies import BodyStore
from imapfs.cache import Cache, Gone, Node
from imapfs.errors import (
    AuthenticationFailed,
    CacheError,
    ConnectionLost,
    ImapfsError,
    Invalid,
    MailboxGone,
    MessageGone,
    Refused,
    TooBig,
    report,
)
from imapfs.imap.grammar import FetchData
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session, Upload
from imapfs.model import Ino
from imapfs.operations import Box, Operations
from imapfs.spool import Attempt, Draft, Spool
from imapfs.sync import Changes, Synchroniser, new_message

log = logging.getLogger(__name__)

GRACE: Final = 0.25
"""Seconds that an upload nobody waits for is held back: programs set a file's time just after closing it."""
_BATCH_BYTES: Final = 4 << 20
_BATCH: Final = 100
_CHUNK: Final = 1 << 20
_RETRY_MOST: Final = 60.0
_HEADER = re.compile(rb"[!-9;-~]{1,76}[ \t]*:")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_APPENDLIMIT = re.compile(r"APPENDLIMIT=(\d+)")


class Job:
    """The upload of one draft, as those see it who wait for it."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.due = time.monotonic() + GRACE
        self.error: ImapfsError | None = None
        """Why it was refused, or the last reason why it could not be sent."""
        self._settled = trio.Event()
        self._tried = trio.Event()

    def settle(self, error: ImapfsError | None) -> None:
        """It is on the server, or refused for good."""
        self.error = error
        self._settled.set()
        self._tried.set()

    def tried(self, error: ImapfsError) -> None:
        """It could not be sent now."""
        self.error = error
        self._tried.set()

    @property
    def settled(self) -> bool:
        return self._settled.is_set()

    async def wait(self) -> None:
        """Wait until it is on the server. Raises why it is refused, or ConnectionLost if it has to wait."""
        await self._tried.wait()
        if self.error is not None:
            raise self.error


@dataclass(slots=True)
class _Prepared:
    """A draft that is fit to be sent."""

    job: Job
    data: bytes | mmap.mmap
    date: int
    zone: int
    flags: str
    clean: bool
    """Whether a server has no reason to change the bytes."""

    def matches(self, data: FetchData) -> bool:
        """Whether a message on the server may be this one (its size is right, but for a final line end)."""
        return data.size is not None and 0 <= data.size - len(self.data) <= 2


OnSent = Callable[[Draft, bool], None]
"""Called when a draft has become a message; the flag says whether its bytes are not those that it had."""


class Uploader:
    """Uploads drafts, one batch a mailbox at a time. ``on_sent`` is called after the cache has adopted one.

    ``old_version(ino)`` gives the bytes of the message that a draft replaces.
    """

    def __init__(
        self,
        pool: SessionPool,
        cache: Cache,
        bodies: BodyStore,
        spool: Spool,
        sync: Synchroniser,
        operations: Operations,
        nursery: trio.Nursery,
        old_version: Callable[[Ino], Awaitable[bytes]],
        on_sent: OnSent,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._bodies = bodies
        self._spool = spool
        self._sync = sync
        self._operations = operations
        self._nursery = nursery
        self._old_version = old_version
        self._on_sent = on_sent
        self._jobs: dict[Ino, Job] = {}
        self._workers: dict[Ino, trio.Event] = {}
        """Mailbox -> the event that tells its worker of something new."""
        self._in_flight: set[Ino] = set()
        self._removing = trio.Lock()
        self._removes_later = False

    # -- for those who have drafts -------------------------------------------------------------------------

    def submit(self, draft: Draft, *, now: bool = False) -> Job:
        """Have a complete draft sent; with ``now`` somebody waits for it."""
        job = self._jobs.get(draft.ino)
        if job is None or job.settled:
            job = self._jobs[draft.ino] = Job(draft)
        if now:
            job.due = -math.inf
        draft.state, draft.error = "sending", ""
        draft.save()
        self._wake(draft.parent)
        return job

    def _wake(self, mailbox: Ino) -> None:
        news = self._workers.get(mailbox)
        if news is None:
            self._workers[mailbox] = trio.Event()
            self._nursery.start_soon(self._work, mailbox)
        else:
            news.set()

    async def withdraw(self, draft: Draft) -> bool:
        """Take a draft back before it is sent; false if it was sent meanwhile, and is a message now."""
        while draft.ino in self._in_flight:
            with contextlib.suppress(ImapfsError):
                await self._jobs[draft.ino].wait()
            await trio.lowlevel.checkpoint()
        job = self._jobs.pop(draft.ino, None)
        if job is not None and not job.settled:
            job.settle(MessageGone("it was withdrawn"))
        return self._spool.get(draft.ino) is draft

    def pending(self) -> list[Draft]:
        """Drafts that are to be sent."""
        return [job.draft for job in self._jobs.values() if not job.settled]

    async def drain(self) -> None:
        """Wait until nothing can be sent any more: all is sent, refused, or the server is away."""
        for job in list(self._jobs.values()):
            job.due = -math.inf
            self._wake(job.draft.parent)
        for job in list(self._jobs.values()):
            with contextlib.suppress(ImapfsError):
                await job.wait()
        await self._remove_all_old()
        await self._operations.recover()

    def resume(self) -> None:
        """Go on with what an earlier process left."""
        for draft in self._spool:
            mailbox = self._cache.mailbox(draft.parent)
            if draft.attempt is None and mailbox is not None and mailbox.server_name is not None:
                draft.attempt = Attempt(mailbox.server_name, mailbox.uidvalidity, 1)
            if draft.state != "sending":
                continue
            node = self._cache.node(draft.ino)
            if node is not None and (draft.base is None or node.uid != draft.base.uid):
                # The cache had adopted it already, only the spool did not know yet.
                self._leave_spool(draft)
            else:
                self.submit(draft)
        self._nursery.start_soon(self._remove_all_old)

    async def _remove_all_old(self) -> None:
        async with self._removing:
            for draft in list(self._spool.sent):
                await self._remove_old(draft)
        if self._spool.sent and not self._removes_later:
            self._removes_later = True
            self._nursery.start_soon(self._remove_later)

    async def _remove_later(self) -> None:
        """Try again to remove old versions, as until then other clients see two messages."""
        delay = 1.0
        while self._spool.sent:
            await trio.sleep(delay)
            delay = min(_RETRY_MOST, delay * 2)
            await self._remove_all_old()
        self._removes_later = False

    # -- the worker of a mailbox ---------------------------------------------------------------------------

    async def _work(self, mailbox: Ino) -> None:
        delay = 0.5
        try:
            while jobs := self._waiting(mailbox):
                news = self._workers[mailbox] = trio.Event()
                pause = min(job.due for job in jobs) - time.monotonic()
                if pause > 0:
                    with trio.move_on_after(pause):
                        await news.wait()
                    continue
                batch = [job for job in jobs if job.due <= time.monotonic()][:_BATCH]
                try:
                    await self._send(mailbox, batch)
                    delay = 0.5
                except (ConnectionLost, AuthenticationFailed) as error:
                    log.info("%d uploads wait for the server: %s", len(batch), error)
                    for job in batch:
                        if not job.settled:
                            job.draft.error = str(error)
                            job.tried(error)
                            job.due = time.monotonic() + delay
                    delay = min(_RETRY_MOST, delay * 2)
        finally:
            del self._workers[mailbox]

    def _waiting(self, mailbox: Ino) -> list[Job]:
        return [j for j in self._jobs.values() if not j.settled and j.draft.parent == mailbox]

    async def _send(self, mailbox: Ino, batch: Sequence[Job]) -> None:
        """Send a batch, or the first part of it. Raises ConnectionLost, AuthenticationFailed."""
        self._in_flight |= {job.draft.ino for job in batch}
        ready: list[_Prepared] = []
        try:
            size = 0
            for job in batch:
                if ready and size > _BATCH_BYTES:
                    break
                prepared = await self._prepare(job)
                if prepared is not None:
                    ready.append(prepared)
                    size += len(prepared.data)
            if ready:
                async with self._sync.exclusive(mailbox):
                    await self._append(mailbox, ready)
                await self._remove_all_old()
        except (ConnectionLost, AuthenticationFailed):
            raise
        except Exception as error:
            failure = report(error, f"{len(batch)} files were not sent")
            for job in batch:
                if not job.settled and not isinstance(failure, CacheError):
                    self._refuse(job, failure)
                elif not job.settled:
                    job.due = time.monotonic() + _RETRY_MOST
                    job.tried(failure)
        finally:
            self._in_flight -= {job.draft.ino for job in batch}
            for prepared in ready:
                if isinstance(prepared.data, mmap.mmap):
                    prepared.data.close()

    def _refuse(self, job: Job, error: ImapfsError) -> None:
        log.warning("%s is not sent: %s", job.draft.shown, error)
        draft = job.draft
        draft.state, draft.error, draft.attempt = "unsent", str(error), None
        with contextlib.suppress(CacheError):
            draft.save()
        job.settle(error)

    # -- before --------------------------------------------------------------------------------------------

    async def _prepare(self, job: Job) -> _Prepared | None:
        """Make a draft fit to be sent; None if there is nothing to send."""
        draft = job.draft
        try:
            await trio.to_thread.run_sync(_normalise, draft.file)
            data = _contents(draft.file)
            if not _HEADER.match(data[:100]):
                raise Invalid("it is no mail message: the first line is no header field")
            base = draft.base
            if base is not None and draft.attempt is None:
                old = self._operations.find(base)
                # If it was deleted by another client meanwhile, this is simply a new message.
                with contextlib.suppress(MessageGone, MailboxGone):
                    if old is not None and await self._old_version(old.ino) == data[:]:
                        self._unchanged(job, old)
                        return None
        except (Invalid, TooBig) as error:
            self._refuse(job, error)
            return None
        except FileNotFoundError:
            job.settle(MessageGone("it was deleted before it was sent"))
            return None
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot read {draft.file}") from None
        date, zone = draft.mtime // 1_000_000_000, 0
        if draft.base is not None and not draft.timed:
            date, zone = draft.base.date, draft.base.zone
        head = bytes(data[: max(0, bytes(data[: 1 << 18]).find(b"\r\n\r\n"))])
        clean = head.isascii() and data.find(b"\0") < 0
        return _Prepared(job, data, date, zone, draft.flags, clean)

    def _unchanged(self, job: Job, old: Node) -> None:
        """The new version is the old one: nothing is to be done on the server."""
        draft = job.draft
        if old.ino != draft.ino:
            self._bodies.rename(old.ino, draft.ino)
            self._cache.give_inode(old.ino, draft.ino, draft.name)
        self._keep_local(draft, old.date or 0)
        self._spool.forget(draft)
        self._finish(job, altered=True)

    def _keep_local(self, draft: Draft, date: int) -> None:
        """What stat showed of a draft goes on to be shown where it does not follow from the message."""
        if draft.timed or draft.mtime // 1_000_000_000 != date:
            self._cache.set_local(draft.ino, mtime=draft.mtime)
        if draft.mode != 0o600:
            self._cache.set_local(draft.ino, mode=draft.mode)

    # -- on the server -------------------------------------------------------------------------------------

    async def _append(self, mailbox: Ino, ready: list[_Prepared]) -> None:
        """Have the messages on the server and in the cache."""
        box = self._operations.mailbox(mailbox)
        await self._look_up(box, [p for p in ready if p.job.draft.attempt is not None])
        ready = [p for p in ready if not p.job.settled]
        if not ready:
            return
        flight = _Flight(box, ready)
        await self._pool.run(flight.look, box.name)
        for prepared in ready:
            draft = prepared.job.draft
            draft.attempt = Attempt(box.name, flight.uidvalidity, flight.uidnext)
            draft.save()
        await self._pool.run(flight.send, box.name, repeat=False)
        for prepared, data in flight.pairs():
            self._adopt(box, prepared, data)
        for prepared, outcome in zip(ready, flight.outcomes, strict=True):
            if isinstance(outcome, Refused):
                self._refuse(prepared.job, outcome)
        unnamed = [p for p in ready if not p.job.settled]
        await self._look_up(box, unnamed)
        for prepared in unnamed:
            if not prepared.job.settled:
                self._refuse(prepared.job, Refused("the server took it but does not show it: look there"))

    async def _look_up(self, box: Box, uncertain: list[_Prepared]) -> None:
        """Adopt those that are on the server already; whatever is left is not."""
        if not uncertain:
            return
        search = _Search(uncertain, partial(self._cache.is_named, box.ino))
        await self._pool.run(search.run, box.name)
        for prepared, data in search.found:
            self._adopt(box, prepared, data)
        for prepared in uncertain:
            prepared.job.draft.attempt = None

    def _adopt(self, box: Box, prepared: _Prepared, data: FetchData) -> None:
        """A draft is on the server: from now on it is a message."""
        draft = prepared.job.draft
        message = new_message(data)
        if self._cache.node(draft.ino) is not None:
            # The inode goes over to the new version: the old one needs another until it is removed.
            self._cache.displace(draft.ino)
            self._bodies.drop_file(draft.ino)
        gone = self._cache.adopt(draft.ino, box.ino, draft.name, message)
        self._sync.publish(Changes(box.ino, gone=gone, added=[(draft.ino, draft.name)]))
        same = prepared.clean and message.size == len(prepared.data)
        if same:
            self._bodies.take(draft.file, draft.ino)
        self._keep_local(draft, message.date)
        self._leave_spool(draft)
        self._finish(prepared.job, altered=not same)

    def _leave_spool(self, draft: Draft) -> None:
        """It is a message now; its old version, if any, is removed from the server next."""
        if draft.base is None:
            self._spool.forget(draft)
            return
        draft.state = "sent"
        draft.save()
        self._spool.detach(draft)
        self._spool.sent.append(draft)

    def _finish(self, job: Job, *, altered: bool) -> None:
        self._jobs.pop(job.draft.ino, None)
        self._on_sent(job.draft, altered)
        job.settle(None)

    async def _remove_old(self, draft: Draft) -> None:
        """The new version is safe: the old one goes the way of rm.

        If it is shown under another name, as an editor's backup, it stays there as a local file.
        """
        assert draft.base is not None
        old = self._operations.find(draft.base)
        try:
            if old is not None and old.name is not None:
                await self._keep_backup(draft, old, old.name)
            if old is not None:
                await self._operations.remove(old.ino)
        except (MessageGone, MailboxGone):
            pass
        except ImapfsError as error:
            report(error, "the old version of a message is not removed yet")
            return
        self._spool.sent.remove(draft)
        self._spool.forget(draft)

    async def _keep_backup(self, draft: Draft, old: Node, name: bytes) -> None:
        content = await self._old_version(old.ino)
        self._cache.hide(old.ino)
        backup = self._spool.create(self._cache.new_ino(), old.parent, name, draft.path, 0o600)
        backup.file.write_bytes(content)
        backup.state = "local"
        backup.save()
        self._sync.publish(Changes(old.parent, gone=[Gone.of(old)], added=[(backup.ino, name)]))


class _Flight:
    """One batch of APPENDs in a thread."""

    def __init__(self, box: Box, ready: Sequence[_Prepared]) -> None:
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
            self.uidnext = state.uidnext or _next_uid(session)

    def send(self, session: Session) -> None:
        limit = next((int(m[1]) for c in session.capabilities if (m := _APPENDLIMIT.match(c))), None)
        refused = {
            i: Refused(f"it has {len(p.data)} bytes, and the server takes {limit} at most", "TOOBIG")
            for i, p in enumerate(self._ready)
            if limit is not None and len(p.data) > limit
        }
        uploads = [
            Upload(p.data, p.flags, p.date, p.zone) for i, p in enumerate(self._ready) if i not in refused
        ]
        outcomes = iter(
            session.append(self._box.name, uploads, self.uidnext, self._list)[0] if uploads else []
        )
        self.outcomes = [refused.get(i) or next(outcomes) for i in range(len(self._ready))]

    def _list(self, data: FetchData) -> None:
        if data.uid is not None:
            self._listed[data.uid] = data

    def pairs(self) -> list[tuple[_Prepared, FetchData]]:
        """Those that are on the server under a UID that it named, with their metadata."""
        return [
            (prepared, self._listed[uid])
            for prepared, uid in zip(self._ready, self.outcomes, strict=True)
            if isinstance(uid, int) and uid in self._listed
        ]


def _next_uid(session: Session) -> int:
    """UIDNEXT of the selected mailbox where the server does not say (Courier)."""
    last = 0

    def take(data: FetchData) -> None:
        nonlocal last
        last = max(last, data.uid or 0)

    if session.state.exists:
        session.fetch_metadata_from(0xFFFFFFFF, take)
    return last + 1


class _Search:
    """Looks, in a thread, for drafts that may be on the server already."""

    def __init__(self, uncertain: Sequence[_Prepared], known: Callable[[int], bool]) -> None:
        self._uncertain = uncertain
        self._known = known
        self.found: list[tuple[_Prepared, FetchData]] = []

    def run(self, session: Session) -> None:
        self.found = []
        taken: set[int] = set()
        for prepared in self._uncertain:
            attempt = prepared.job.draft.attempt
            if attempt is None:
                continue
            state = session.examine(attempt.mailbox)
            if state.uidvalidity != attempt.uidvalidity:
                continue
            listed: list[FetchData] = []
            session.fetch_metadata_from(attempt.uidnext, listed.append)
            for data in listed:
                uid = data.uid or 0
                if uid < attempt.uidnext or uid in taken or not prepared.matches(data):
                    continue
                if trio.from_thread.run_sync(self._known, uid):
                    continue
                if self._equal(session, attempt, uid, prepared):
                    taken.add(uid)
                    self.found.append((prepared, data))
                    break

    @staticmethod
    def _equal(session: Session, attempt: Attempt, uid: int, prepared: _Prepared) -> bool:
        """Whether the bytes are those of the draft, but for what servers do to them."""
        content = session.fetch_body(attempt.mailbox, attempt.uidvalidity, uid)
        if content is None:
            return False
        sent = bytes(prepared.data)
        if content.rstrip(b"\r\n") == sent.rstrip(b"\r\n"):
            return True
        return not prepared.clean and len(content) == len(sent)


# -- files -------------------------------------------------------------------------------------------------


def _normalise(path: Path) -> None:
    """Give a file CRLF line ends where it has bare LF (RFC 9051 section 4.3 via RFC 5322)."""
    temporary = path.with_suffix(".tmp")
    changed, last = False, b""
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            # A CR at the end of the chunk before belongs to a LF at the start of this one.
            fixed = _BARE_LF.sub(b"\r\n", last + chunk)[len(last) :]
            changed = changed or len(fixed) != len(chunk)
            last = chunk[-1:] if chunk[-1:] == b"\r" else b""
    if not changed:
        return
    temporary.touch(mode=0o600)
    last = b""
    with path.open("rb") as source, temporary.open("wb") as target:
        while chunk := source.read(_CHUNK):
            target.write(_BARE_LF.sub(b"\r\n", last + chunk)[len(last) :])
            last = chunk[-1:] if chunk[-1:] == b"\r" else b""
        target.flush()
        os.fsync(target.fileno())
    temporary.rename(path)


def _contents(path: Path) -> bytes | mmap.mmap:
    if path.stat().st_size <= _CHUNK:
        return path.read_bytes()
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
