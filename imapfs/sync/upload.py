"""Turning drafts into messages: APPEND, at most once.

A draft is submitted when it is complete. It is then made fit for a server (CRLF line ends), compared with
the message that it is a new version of, and appended, with a note on disk of where it is about to go; several
at a time in one flight. When the server has it, the cache adopts it under the same inode
and name, and only then does the draft leave the spool and the old version the server.

If a connection breaks in between, or the process ends, the note says where to look: what is found beyond the
UIDNEXT of that time, with the same bytes, is the message, and is not sent again. The note need not survive
a power cut: after one a draft is looked for in the whole mailbox.

A draft may be written to while it is on its way. What is sent is a copy, and the draft then goes on as a new
version of the message that the copy has become.
"""

import contextlib
import logging
import math
import mmap
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import trio

from imapfs.atomic import replace_file
from imapfs.errors import (
    AuthenticationFailed,
    CacheError,
    ConnectionLost,
    ImapfsError,
    Invalid,
    MailboxGone,
    MessageGone,
    Offline,
    Refused,
    Throttled,
    TooBig,
)
from imapfs.imap.grammar import FetchData
from imapfs.imap.pool import SessionPool
from imapfs.log import report
from imapfs.model import Ino, MessageRef, Uid, UidValidity
from imapfs.store.bodies import BodyStore
from imapfs.store.cache import Cache, NewMessage, Node
from imapfs.store.spool import Attempt, Base, Draft, Spool
from imapfs.sync.append import Fit, Flight, Item, Search, fit_for_server
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.download import Downloader
from imapfs.sync.flags import FlagChanger
from imapfs.sync.locate import Locator, ServerMailbox
from imapfs.sync.replaced import ReplacedMessages
from imapfs.sync.synchroniser import Synchroniser, new_message
from imapfs.waiting import Delays

log = logging.getLogger(__name__)

GRACE: Final = 0.25
"""Seconds that an upload nobody waits for is held back: programs set a file's time just after closing it."""
_BATCH_BYTES: Final = 4 << 20
_BATCH: Final = 100
_MAX_RETRY: Final = 60.0
_HEADER = re.compile(rb"[!-9;-~]{1,76}[ \t]*:")


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

    def hurry(self) -> None:
        """Have it tried now; `wait` is about what comes of that."""
        self.due = -math.inf
        if self._tried.is_set() and not self.settled:
            self.error, self._tried = None, trio.Event()

    @property
    def settled(self) -> bool:
        return self._settled.is_set()

    async def wait(self) -> None:
        """Wait until it is on the server. Raises why it is refused, or ConnectionLost if it has to wait."""
        await self._tried.wait()
        if self.error is not None:
            raise self.error.with_traceback(None)


@dataclass(slots=True)
class _Prepared:
    """A draft that is fit to be sent."""

    job: Job
    item: Item


class Uploader:
    """Uploads drafts, one batch a mailbox at a time."""

    def __init__(
        self,
        pool: SessionPool,
        cache: Cache,
        bodies: BodyStore,
        spool: Spool,
        sync: Synchroniser,
        locator: Locator,
        replaced: ReplacedMessages,
        flags: FlagChanger,
        downloads: Downloader,
        nursery: trio.Nursery,
        hub: ChangeHub,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._bodies = bodies
        self._spool = spool
        self._sync = sync
        self._locator = locator
        self._replaced = replaced
        self._flags = flags
        self._nursery = nursery
        self._downloads = downloads
        self._hub = hub
        self._jobs: dict[Ino, Job] = {}
        self._workers: dict[Ino, trio.Event] = {}
        """Mailbox -> the event that tells its worker of something new."""
        self._being_sent: set[Ino] = set()
        self._in_flight: dict[Ino, trio.Event] = {}
        """Draft that must not be touched -> set when that is over."""

    # -- for those who have drafts -------------------------------------------------------------------------

    def submit(self, draft: Draft, *, now: bool = False) -> Job:
        """Have a complete draft sent; with ``now`` somebody waits for it."""
        job = self._jobs.get(draft.ino)
        if job is None or job.settled:
            job = self._jobs[draft.ino] = Job(draft)
        if now:
            job.hurry()
        draft.state, draft.error = "sending", ""
        draft.save()
        self._wake(draft.parent)
        return job

    async def deliver(self, draft: Draft) -> None:
        """Have a draft sent and wait until it is on the server, over one connection that breaks meanwhile.

        Raises why it is refused, or ConnectionLost if it has to wait.
        """
        try:
            await self.submit(draft, now=True).wait()
        except Offline:
            raise
        except ConnectionLost as error:
            if error.silent or self._spool.get(draft.ino) is not draft:
                raise
            await self.submit(draft, now=True).wait()

    def _wake(self, mailbox: Ino) -> None:
        news = self._workers.get(mailbox)
        if news is None:
            self._workers[mailbox] = trio.Event()
            self._nursery.start_soon(self._work, mailbox)
        else:
            news.set()

    async def withdraw(self, draft: Draft) -> bool:
        """Take a draft back before it is sent; false if it was sent meanwhile, and is a message now.

        Raises ConnectionLost where only the server could say which of the two is so.
        """
        while (flight := self._in_flight.get(draft.ino)) is not None:
            await flight.wait()
        if draft.attempt is not None and self._spool.get(draft.ino) is draft:
            with self._flight([draft]):
                async with self._sync.changing(draft.parent):
                    await self._look_up([draft])
        job = self._jobs.pop(draft.ino, None)
        if job is not None and not job.settled:
            job.settle(MessageGone("it was withdrawn"))
        return self._spool.get(draft.ino) is draft

    def is_being_sent(self, draft: Draft) -> bool:
        """Whether a draft is on its way, so that no synchronisation has seen what becomes of it."""
        return draft.ino in self._being_sent

    def pending(self) -> list[Draft]:
        """Drafts that are to be sent, now or when they are complete."""
        return [job.draft for job in self._jobs.values() if not job.settled]

    async def drain(self) -> None:
        """Wait until nothing can be sent any more: all is sent, refused, or the server is away."""
        jobs = [job for job in self._jobs.values() if not job.settled and job.draft.state == "sending"]
        for job in jobs:
            job.hurry()
            self._wake(job.draft.parent)
        for job in jobs:
            with contextlib.suppress(ImapfsError):
                await job.wait()

    def hurry(self) -> None:
        """Try now what waits for the server."""
        for job in self._jobs.values():
            if not job.settled and job.draft.state == "sending":
                job.due = min(job.due, time.monotonic() + GRACE)
                self._wake(job.draft.parent)

    def resume(self) -> None:
        """Go on with what an earlier process left."""
        for draft in self._spool:
            mailbox = self._cache.mailbox(draft.parent)
            if self._spool.rebooted and mailbox is not None and mailbox.server_name is not None:
                # The note of an attempt may be lost: it could be anywhere in the mailbox.
                fit = fit_for_server(draft)
                draft.attempt = Attempt(
                    mailbox.server_name, mailbox.uidvalidity, 1, len(fit.data), fit.digest
                )
            if draft.state == "sending":
                # What the cache had adopted already is found again by its attempt.
                self.submit(draft)

    # -- the worker of a mailbox ---------------------------------------------------------------------------

    async def _work(self, mailbox: Ino) -> None:
        delays = Delays(0.5, _MAX_RETRY)
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
                    delays.reset()
                except (ConnectionLost, AuthenticationFailed, Throttled) as error:
                    log.info("%d uploads wait for the server: %s", len(batch), error)
                    due = time.monotonic() + delays.next()
                    for job in batch:
                        if not job.settled:
                            job.draft.error = str(error)
                            job.tried(error)
                            job.due = due
        finally:
            del self._workers[mailbox]

    def _waiting(self, mailbox: Ino) -> list[Job]:
        return [
            job
            for job in self._jobs.values()
            if not job.settled
            and job.draft.state == "sending"
            and job.draft.parent == mailbox
            and job.draft.ino not in self._in_flight
        ]

    @contextlib.contextmanager
    def _flight(self, drafts: Sequence[Draft]) -> Iterator[None]:
        """Keep drafts from being sent by others, withdrawn and so on."""
        over = trio.Event()
        self._in_flight |= {draft.ino: over for draft in drafts}
        try:
            yield
        finally:
            for draft in drafts:
                del self._in_flight[draft.ino]
            over.set()
            for parent in {draft.parent for draft in drafts}:
                self._wake(parent)

    async def _send(self, mailbox: Ino, batch: Sequence[Job]) -> None:
        """Send a batch, or the first part of it. Raises ConnectionLost, Throttled, AuthenticationFailed."""
        ready: list[_Prepared] = []
        try:
            with self._flight([job.draft for job in batch]):
                size = 0
                for job in batch:
                    if ready and size > _BATCH_BYTES:
                        break
                    prepared = await self._prepare(job)
                    if prepared is not None:
                        ready.append(prepared)
                        size += len(prepared.item.fit.data)
                if ready:
                    async with self._sync.changing(mailbox):
                        await self._append(mailbox, ready)
            if ready:
                await self._replaced.remove_all()
        except (ConnectionLost, AuthenticationFailed, Throttled):
            raise
        except Exception as error:
            failure = report(error, f"{len(batch)} files were not sent")
            for job in batch:
                if not job.settled and not isinstance(failure, CacheError):
                    self._refuse(job, failure)
                elif not job.settled:
                    job.due = time.monotonic() + _MAX_RETRY
                    job.tried(failure)
        finally:
            for prepared in ready:
                if isinstance(prepared.item.fit.data, mmap.mmap):
                    prepared.item.fit.data.close()

    def _refuse(self, job: Job, error: ImapfsError) -> None:
        log.warning("%s is not sent: %s", job.draft.shown, error)
        draft = job.draft
        if draft.state == "sending":  # else it is being written anew, and is tried again then
            draft.state, draft.error = "unsent", str(error)
        with contextlib.suppress(CacheError):
            draft.save()
        job.settle(error)

    # -- before --------------------------------------------------------------------------------------------

    async def _prepare(self, job: Job) -> _Prepared | None:
        """Make a draft fit to be sent; None if there is nothing to send."""
        draft = job.draft
        try:
            fit = await trio.to_thread.run_sync(fit_for_server, draft)
            data = fit.data
            if not fit.is_current(draft):
                return None
            if not _HEADER.match(data[:100]):
                raise Invalid("it is no mail message: the first line is no header field")
            base = draft.base
            if base is not None and draft.attempt is None:
                old = self._locator.find(base.ref)
                # If it was deleted by another client meanwhile, this is simply a new message.
                with contextlib.suppress(MessageGone, MailboxGone):
                    if old is not None and await self._downloads.contents(old) == data[:]:
                        await self._unchanged(draft, fit, old)
                        return None
        except (Invalid, TooBig) as error:
            self._refuse(job, error)
            return None
        except FileNotFoundError as error:
            if self._spool.get(draft.ino) is draft:
                self._refuse(job, CacheError.from_os_error(error, f"its bytes are lost: {draft.file}"))
            else:
                job.settle(MessageGone("it was deleted before it was sent"))
            return None
        except (CacheError, OSError) as error:
            # The others need not wait for what this disk cannot do now.
            if isinstance(error, OSError):
                error = CacheError.from_os_error(error, f"cannot read {draft.file}")
            job.due = time.monotonic() + _MAX_RETRY
            job.tried(report(error, f"{draft.shown} is not sent yet"))
            return None
        date, zone = draft.mtime // 1_000_000_000, 0
        if draft.base is not None and not draft.timed:
            date, zone = draft.base.date, draft.base.zone
        return _Prepared(job, Item(fit, draft.flags, date, zone))

    async def _unchanged(self, draft: Draft, fit: Fit, old: Node) -> None:
        """The new version is the old one: nothing is to be done on the server."""
        if old.ino != draft.ino and old.name is not None:
            await self._replaced.keep_backup(old, old.name)
        if not fit.is_current(draft):
            return  # written to since: what comes of that is looked at when it is complete
        if old.ino != draft.ino:
            self._bodies.rename(old.ino, draft.ino)
            self._cache.give_inode(old.ino, draft.ino, draft.name)
        self._keep_local(draft, old.date or 0)
        self._spool.forget(draft)
        self._finish(draft, altered=True)

    def _keep_local(self, draft: Draft, date: int) -> None:
        """What stat showed of a draft goes on to be shown where it does not follow from the message."""
        if draft.timed or draft.mtime // 1_000_000_000 != date:
            self._cache.set_local(draft.ino, mtime=draft.mtime)
        if draft.mode != 0o600:
            self._cache.set_local(draft.ino, mode=draft.mode)

    # -- on the server -------------------------------------------------------------------------------------

    async def _append(self, mailbox: Ino, ready: list[_Prepared]) -> None:
        """Have the messages on the server and in the cache."""
        box = self._locator.mailbox(mailbox)
        uncertain = {p.job.draft.ino: p.job.draft for p in ready if p.job.draft.attempt is not None}
        await self._look_up(list(uncertain.values()))
        # Those that are not there are to be compared with their old versions next, in another round.
        ready = [p for p in ready if p.job.draft.ino not in uncertain and p.item.fit.is_current(p.job.draft)]
        if not ready:
            return
        flight = Flight(box, [prepared.item for prepared in ready])
        await self._pool.run(flight.look, box.name)
        box = replace(box, uidvalidity=UidValidity(flight.uidvalidity))
        for prepared in ready:
            draft, fit = prepared.job.draft, prepared.item.fit
            draft.attempt = Attempt(box.name, box.uidvalidity, flight.uidnext, len(fit.data), fit.digest)
            draft.save()
        being_sent = {prepared.job.draft.ino for prepared in ready}
        self._being_sent |= being_sent
        try:
            await self._pool.run(flight.send, box.name, repeat=False)
        finally:
            self._being_sent -= being_sent
        unnamed: dict[Ino, tuple[_Prepared, int | None]] = {}
        throttled: Throttled | None = None
        for prepared, outcome in zip(ready, flight.outcomes, strict=True):
            draft = prepared.job.draft
            if isinstance(outcome, Throttled):
                draft.attempt, throttled = None, outcome
            elif isinstance(outcome, Refused):
                draft.attempt = None
                self._refuse(prepared.job, outcome)
            elif outcome is not None and (data := flight.listed(outcome)) is not None:
                self._adopt(box, draft, data, prepared.item.fit, prepared.item.flags)
            else:
                # Also where a UID was named: Courier names a wrong one in a mailbox that was only examined.
                unnamed[draft.ino] = prepared, outcome
        found = await self._look_up([prepared.job.draft for prepared, _ in unnamed.values()])
        for prepared, uid in unnamed.values():
            if prepared.job.draft.ino in found:
                continue
            if uid is not None and uid >= flight.uidnext:
                # Another client, or a filter, was quick to move it on.
                self._was_removed(box, prepared.job.draft, Uid(uid), prepared.item.fit)
            else:
                self._refuse(prepared.job, Refused("the server took it but does not show it: look there"))
        if throttled is not None:
            self._pool.throttle(throttled)
            raise throttled

    async def _look_up(self, uncertain: Sequence[Draft]) -> set[Ino]:
        """Adopt those that are on the server already, and return which; whatever is left is not."""
        if not uncertain:
            return set()
        search = Search(uncertain, self._is_other)
        await self._pool.run(search.run)
        for draft, attempt, data in search.found:
            box = self._locator.named(attempt.mailbox, attempt.uidvalidity)
            fit = await trio.to_thread.run_sync(fit_for_server, draft)
            self._adopt(box, draft, data, fit if fit.digest == attempt.digest else None, draft.flags)
        found = {draft.ino for draft, _, _ in search.found}
        for draft in uncertain:
            if draft.ino not in found:
                draft.attempt = None
        return found

    def _is_other(self, draft: Draft, attempt: Attempt, uid: int) -> bool:
        """Whether a message is known to be another one than a draft may have become."""
        base = draft.base
        if base is not None and base.ref == MessageRef(attempt.mailbox, attempt.uidvalidity, Uid(uid)):
            return True
        mailbox = self._cache.mailbox_named(attempt.mailbox)
        if mailbox is None or not self._cache.is_named(mailbox.ino, uid):
            return False
        node = self._cache.message(mailbox.ino, Uid(uid))
        return node is None or node.ino != draft.ino

    def _was_removed(self, box: ServerMailbox, draft: Draft, uid: Uid, fit: Fit) -> None:
        """What was sent of a draft came to the server as ``uid``, and another client has removed it."""
        draft.attempt = None
        if fit.is_current(draft):
            self._hub.publish(Changes(box.ino, gone=[_as_node(draft, uid)]))
            if draft.base is not None:
                self._replaced.note(draft.base.ref)
            self._spool.forget(draft)
            self._finish(draft, altered=True)

    def _adopt(self, box: ServerMailbox, draft: Draft, data: FetchData, fit: Fit | None, flags: str) -> None:
        """What was sent of a draft is on the server: from now on it is a message.

        ``flags`` are those that it was sent with. If it was written to since, ``fit`` is None or not current,
        and it goes on as a new version.
        """
        current = fit is not None and fit.is_current(draft)
        message = new_message(data)
        old = self._cache.node(draft.ino)
        if old is not None:
            # The inode goes over to the new version: the old one needs another until it is removed.
            self._cache.displace(draft.ino)
            self._bodies.drop([old])
        gone = self._cache.adopt(draft.ino, box.ino, draft.name, message)
        self._hub.publish(Changes(box.ino, gone=gone, replaced=[draft.name, *(g.name or b"" for g in gone)]))
        if fit is None or not current:
            self._go_on(draft, box, message)
            return
        if draft.base is not None:
            # Before its bytes go: what is left then says that the old version has to go too.
            self._replaced.note(draft.base.ref)
        same = fit.clean and message.size == len(fit.data)
        if same:
            if fit.converted:
                replace_file(draft.file, fit.data, durable=False)
            self._bodies.take(draft.file, draft.ino, message.uid)
        self._keep_local(draft, message.date)
        self._spool.forget(draft)
        self._finish(draft, altered=fit.converted or not same)
        if draft.flags != flags:
            self._nursery.start_soon(self._flag_later, draft, set(flags.split()))

    async def _flag_later(self, draft: Draft, sent: set[str]) -> None:
        """Set the flags that were changed while it was on its way."""
        wanted = set(draft.flags.split())

        def change(has: list[str]) -> tuple[set[str], set[str]]:
            return wanted - {*has}, sent - wanted

        try:
            await self._flags.change(draft.ino, change)
        except ImapfsError as error:
            report(error, f"flags of {draft.shown} were not set")
        newer = self._spool.get(draft.ino)
        if newer is not None:
            newer.change_flags(change)

    def _go_on(self, draft: Draft, box: ServerMailbox, message: NewMessage) -> None:
        """A draft was written to while it was sent: it is a new version of what it has become."""
        if draft.base is not None:
            self._replaced.note(draft.base.ref)
        draft.base = Base(box.ref(message.uid), message.date, message.zone)
        draft.attempt = None
        draft.save()
        job = self._jobs.get(draft.ino)
        if job is not None and draft.state != "sending":
            del self._jobs[draft.ino]
            job.settle(None)

    def _finish(self, draft: Draft, *, altered: bool) -> None:
        job = self._jobs.pop(draft.ino, None)
        same, other = ([], [draft.ino]) if altered else ([draft.ino], [])
        self._hub.publish(Changes(draft.parent, uploaded=[draft.ino], resized=same, rewritten=other))
        self._cache.touch_directory(draft.parent)
        if job is not None:
            job.settle(None)


def _as_node(draft: Draft, uid: Uid) -> Node:
    """A draft as the message that it was on the server for a moment."""
    times = None, draft.mtime, draft.ctime, draft.mode
    return Node(draft.ino, draft.parent, draft.name, uid, draft.size, 1, *times, None, None, 0)
