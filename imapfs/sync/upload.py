"""Turning drafts into messages: each is appended at most once.

A draft is submitted when it is complete. Its bytes are copied, with CRLF line ends, and compared with the
message that it is a new version of. Then it is appended, up to `_MAX_BATCH` drafts at a time, after the place
where it will be has been noted on disk (`Attempt`). Once it is on the server, the cache adopts it under the
same inode and name. Only then does the draft leave the spool, and the old version the server.

If the connection breaks, or the process ends, in between, the note says where to search: the message with
the same bytes and the UIDNEXT of that time or a higher UID is the upload, and nothing is appended again. The
note is not made durable, so after a restart of the machine the whole mailbox is searched.

A draft may be written to while it is being uploaded. Then the copy becomes a message, and the draft goes on
as a new version of it.
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
from imapfs.imap.session import Upload
from imapfs.log import report
from imapfs.model import Ino, Uid
from imapfs.store.bodies import BodyStore
from imapfs.store.cache import Cache
from imapfs.store.rows import NewMessage, Node
from imapfs.store.spool import Attempt, Base, Draft, Spool
from imapfs.sync.append import AppendBatch, Payload, UploadSearch, make_payload
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.download import Downloader
from imapfs.sync.flags import FlagChanger
from imapfs.sync.locate import Locator, ServerMailbox
from imapfs.sync.mailbox import new_message
from imapfs.sync.replaced import ReplacedMessages
from imapfs.sync.synchroniser import Synchroniser
from imapfs.waiting import Delays

log = logging.getLogger(__name__)

_GRACE: Final = 0.25
"""Seconds before an upload that nobody waits for: programs set a file's time just after closing it."""
_MAX_BATCH: Final = 100
"""Drafts that are appended together."""
_MAX_BATCH_BYTES: Final = 4 << 20
"""Size at which a batch is full; a single draft may be larger."""
_FIRST_RETRY: Final = 0.5
"""Seconds until a failed upload is tried again; doubled each time, up to"""
_MAX_RETRY: Final = 60.0
_CHUNK: Final = 1 << 20
_HEADER_FIELD = re.compile(rb"[!-9;-~]{1,76}[ \t]*:")


class PendingUpload:
    """A draft that is to be uploaded, for those who wait for the outcome."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.due = time.monotonic() + _GRACE
        self.error: ImapfsError | None = None
        """Why the upload was refused, or why the last attempt failed."""
        self._settled = trio.Event()
        self._attempted = trio.Event()

    def settle(self, error: ImapfsError | None) -> None:
        """Note the outcome: the draft is on the server, or was refused because of ``error``."""
        self.error = error
        self._settled.set()
        self._attempted.set()

    def fail(self, error: ImapfsError) -> None:
        """Note that an attempt has failed, and that there will be another one."""
        self.error = error
        self._attempted.set()

    def hurry(self) -> None:
        """Make it due now, and let `wait` be about the outcome of the next attempt."""
        self.due = -math.inf
        if self._attempted.is_set() and not self.settled:
            self.error, self._attempted = None, trio.Event()

    @property
    def settled(self) -> bool:
        """Whether no further attempt will be made."""
        return self._settled.is_set()

    async def wait(self) -> None:
        """Wait until the draft is on the server. Raises why it is not, which may be ConnectionLost."""
        await self._attempted.wait()
        if self.error is not None:
            raise self.error.with_traceback(None)


@dataclass(slots=True)
class _Prepared:
    """A draft that is ready to be appended."""

    pending: PendingUpload
    payload: Payload
    message: Upload

    @property
    def draft(self) -> Draft:
        return self.pending.draft


class Uploader:
    """Uploads drafts, one batch per mailbox at a time. Used on the trio thread."""

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
        self._pending: dict[Ino, PendingUpload] = {}
        self._workers: dict[Ino, trio.Event] = {}
        """Mailbox -> the event that wakes its worker."""
        self._appending: set[Ino] = set()
        self._claimed: dict[Ino, trio.Event] = {}
        """Draft that one task works on -> the event that is set when it has finished."""

    # -- submitting ----------------------------------------------------------------------------------------

    def submit(self, draft: Draft, *, now: bool = False) -> PendingUpload:
        """Have a complete draft uploaded; ``now``: without delay, as somebody waits for it.

        Raises CacheError.
        """
        pending = self._pending.get(draft.ino)
        if pending is None or pending.settled:
            pending = self._pending[draft.ino] = PendingUpload(draft)
        if now:
            pending.hurry()
        draft.state, draft.error = "sending", ""
        draft.save()
        self._wake(draft.parent)
        return pending

    async def deliver(self, draft: Draft) -> None:
        """Have a draft uploaded and wait for it; if the connection breaks meanwhile, try once more.

        Raises why the upload is refused, or ConnectionLost if it has to wait for the server.
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
        """Cancel the upload of a draft; return False if it is a message already.

        Raises ConnectionLost if only the server knows which of the two is true.
        """
        while (claim := self._claimed.get(draft.ino)) is not None:
            await claim.wait()
        if draft.attempt is not None and self._spool.get(draft.ino) is draft:
            with self._claim([draft]):
                async with self._sync.changing(draft.parent):
                    await self._adopt_earlier([draft])
        pending = self._pending.pop(draft.ino, None)
        if pending is not None and not pending.settled:
            pending.settle(MessageGone("it was withdrawn"))
        return self._spool.get(draft.ino) is draft

    def is_uploading(self, draft: Draft) -> bool:
        """Return whether a draft is being appended, so that no synchronisation can have seen the message."""
        return draft.ino in self._appending

    def pending(self) -> list[Draft]:
        """Return the drafts that are to be uploaded, now or once they are complete."""
        return [pending.draft for pending in self._pending.values() if not pending.settled]

    async def drain(self) -> None:
        """Wait until no more can be uploaded: all is uploaded or refused, or the server is away."""
        complete = self._complete()
        for pending in complete:
            pending.hurry()
            self._wake(pending.draft.parent)
        for pending in complete:
            with contextlib.suppress(ImapfsError):
                await pending.wait()

    def hurry(self) -> None:
        """Try now to upload what waits for the server."""
        for pending in self._complete():
            pending.due = min(pending.due, time.monotonic() + _GRACE)
            self._wake(pending.draft.parent)

    def _complete(self) -> list[PendingUpload]:
        return [p for p in self._pending.values() if not p.settled and p.draft.state == "sending"]

    def resume(self) -> None:
        """Continue with the drafts of an earlier process. Raises CacheError, OSError."""
        for draft in self._spool:
            mailbox = self._cache.mailbox(draft.parent)
            if self._spool.rebooted and mailbox is not None and mailbox.server_name is not None:
                # The note of an attempt may be lost, so the message could be anywhere in the mailbox.
                payload = make_payload(draft)
                draft.attempt = Attempt(
                    mailbox.server_name, mailbox.uidvalidity, 1, len(payload.data), payload.digest
                )
                payload.close()
            if draft.state == "sending":
                # If the cache has adopted it already, it is found by its attempt.
                self.submit(draft)

    # -- the worker of a mailbox ---------------------------------------------------------------------------

    async def _work(self, mailbox: Ino) -> None:
        delays = Delays(_FIRST_RETRY, _MAX_RETRY)
        try:
            while waiting := self._waiting(mailbox):
                news = self._workers[mailbox] = trio.Event()
                pause = min(pending.due for pending in waiting) - time.monotonic()
                if pause > 0:
                    with trio.move_on_after(pause):
                        await news.wait()
                    continue
                batch = [pending for pending in waiting if pending.due <= time.monotonic()][:_MAX_BATCH]
                try:
                    await self._upload(mailbox, batch)
                    delays.reset()
                except (ConnectionLost, AuthenticationFailed, Throttled) as error:
                    log.info("%d uploads wait for the server: %s", len(batch), error)
                    due = time.monotonic() + delays.next()
                    for pending in batch:
                        if not pending.settled:
                            pending.draft.error = str(error)
                            pending.fail(error)
                            pending.due = due
        finally:
            del self._workers[mailbox]

    def _waiting(self, mailbox: Ino) -> list[PendingUpload]:
        return [
            pending
            for pending in self._complete()
            if pending.draft.parent == mailbox and pending.draft.ino not in self._claimed
        ]

    @contextlib.contextmanager
    def _claim(self, drafts: Sequence[Draft]) -> Iterator[None]:
        """Keep other tasks from uploading or withdrawing these drafts."""
        over = trio.Event()
        self._claimed |= {draft.ino: over for draft in drafts}
        try:
            yield
        finally:
            for draft in drafts:
                del self._claimed[draft.ino]
            over.set()
            for parent in {draft.parent for draft in drafts}:
                self._wake(parent)

    async def _upload(self, mailbox: Ino, batch: Sequence[PendingUpload]) -> None:
        """Upload a batch, or the first part of it.

        Raises ConnectionLost, Throttled, AuthenticationFailed if it has to wait.
        """
        ready: list[_Prepared] = []
        try:
            with self._claim([pending.draft for pending in batch]):
                size = 0
                for pending in batch:
                    if ready and size > _MAX_BATCH_BYTES:
                        break
                    prepared = await self._prepare(pending)
                    if prepared is not None:
                        ready.append(prepared)
                        size += len(prepared.payload.data)
                if ready:
                    async with self._sync.changing(mailbox):
                        await self._append(mailbox, ready)
            if ready:
                await self._replaced.remove_all()
        except (ConnectionLost, AuthenticationFailed, Throttled):
            raise
        except Exception as error:
            failure = report(error, f"{len(batch)} files were not uploaded")
            for pending in batch:
                if not pending.settled and not isinstance(failure, CacheError):
                    self._refuse(pending, failure)
                elif not pending.settled:
                    pending.due = time.monotonic() + _MAX_RETRY
                    pending.fail(failure)
        finally:
            for prepared in ready:
                prepared.payload.close()

    def _refuse(self, pending: PendingUpload, error: ImapfsError) -> None:
        draft = pending.draft
        log.warning("%s is not uploaded: %s", draft.shown, error)
        if draft.state == "sending":  # otherwise a program is writing to it, and it is tried again after that
            draft.state, draft.error = "unsent", str(error)
        with contextlib.suppress(CacheError):
            draft.save()
        pending.settle(error)

    # -- before APPEND -------------------------------------------------------------------------------------

    async def _prepare(self, pending: PendingUpload) -> _Prepared | None:
        """Copy a draft for uploading; return None if there is nothing to upload."""
        draft = pending.draft
        try:
            payload = await trio.to_thread.run_sync(make_payload, draft)
            if not payload.is_current(draft):
                return None
            if not _HEADER_FIELD.match(payload.data[:100]):
                raise Invalid("it is no mail message: the first line is no header field")
            if draft.base is not None and draft.attempt is None:
                old = self._locator.find(draft.base.ref)
                # If another client has deleted the old version, this is simply a new message.
                with contextlib.suppress(MessageGone, MailboxGone):
                    if old is not None and await self._is_unchanged(old, payload):
                        await self._keep_unchanged(draft, payload, old)
                        return None
        except (Invalid, TooBig) as error:
            self._refuse(pending, error)
            return None
        except FileNotFoundError as error:
            if self._spool.get(draft.ino) is draft:
                self._refuse(pending, CacheError.from_os_error(error, f"its bytes are lost: {draft.file}"))
            else:
                pending.settle(MessageGone("it was deleted before it was uploaded"))
            return None
        except (CacheError, OSError) as error:
            # The other drafts of the batch need not wait for a problem of this one with the disk.
            if isinstance(error, OSError):
                error = CacheError.from_os_error(error, f"cannot read {draft.file}")
            pending.due = time.monotonic() + _MAX_RETRY
            pending.fail(report(error, f"{draft.shown} is not uploaded yet"))
            return None
        date, zone = draft.mtime // 1_000_000_000, 0
        if draft.base is not None and not draft.timed:
            date, zone = draft.base.date, draft.base.zone
        return _Prepared(pending, payload, Upload(payload.data, draft.flags, date, zone))

    async def _is_unchanged(self, old: Node, payload: Payload) -> bool:
        """Return whether a payload has the bytes of the old version. Raises ImapfsError."""
        if old.exact and old.size != len(payload.data):
            return False
        content = await self._downloads.contents(old)
        if len(content) != len(payload.data):
            return False
        if isinstance(payload.data, bytes):
            return content == payload.data
        return await trio.to_thread.run_sync(_equal, content, payload.data)

    async def _keep_unchanged(self, draft: Draft, payload: Payload, old: Node) -> None:
        """Let the old version stay: the new one has the same bytes, and nothing has to be uploaded."""
        if old.ino != draft.ino and old.name is not None:
            await self._replaced.keep_backup(old, old.name)
        if not payload.is_current(draft):
            return  # written to meanwhile: compared again when it is complete
        if old.ino != draft.ino:
            self._bodies.rename(old.ino, draft.ino)
            self._cache.give_inode(old.ino, draft.ino, draft.name)
        self._keep_attributes(draft, old.date or 0)
        self._spool.forget(draft)
        self._finish(draft, altered=True)

    def _keep_attributes(self, draft: Draft, date: int) -> None:
        """Keep mtime and mode of a draft where they do not follow from the message and its INTERNALDATE."""
        if draft.timed or draft.mtime // 1_000_000_000 != date:
            self._cache.set_local(draft.ino, mtime=draft.mtime)
        if draft.mode != 0o600:
            self._cache.set_local(draft.ino, mode=draft.mode)

    # -- APPEND --------------------------------------------------------------------------------------------

    async def _append(self, directory: Ino, ready: list[_Prepared]) -> None:
        """Append messages and adopt them. The caller has the mailbox in exclusive use."""
        mailbox = self._locator.mailbox(directory)
        uncertain = {p.draft.ino: p.draft for p in ready if p.draft.attempt is not None}
        await self._adopt_earlier(list(uncertain.values()))
        # The others of these are compared with their old versions first, in the next batch.
        ready = [p for p in ready if p.draft.ino not in uncertain and p.payload.is_current(p.draft)]
        if not ready:
            return
        batch = AppendBatch(mailbox, [prepared.message for prepared in ready])
        await self._pool.run(batch.prepare, mailbox.name)
        mailbox = replace(mailbox, uidvalidity=batch.uidvalidity)
        for prepared in ready:
            draft, payload = prepared.draft, prepared.payload
            draft.attempt = Attempt(
                mailbox.name, mailbox.uidvalidity, batch.uidnext, len(payload.data), payload.digest
            )
            draft.save()
        appending = {prepared.draft.ino for prepared in ready}
        self._appending |= appending
        try:
            await self._pool.run(batch.run, mailbox.name, repeat=False)
        finally:
            self._appending -= appending
        unlisted: dict[Ino, tuple[_Prepared, int | None]] = {}
        throttled: Throttled | None = None
        for prepared, outcome in zip(ready, batch.outcomes, strict=True):
            draft = prepared.draft
            if isinstance(outcome, Throttled):
                draft.attempt, throttled = None, outcome
            elif isinstance(outcome, Refused):
                draft.attempt = None
                self._refuse(prepared.pending, outcome)
            elif outcome is not None and (data := batch.listed(outcome)) is not None:
                self._adopt(mailbox, draft, data, prepared.payload, prepared.message.flags)
            else:
                # Even if a UID was named: Courier names a wrong one in a mailbox that was only examined.
                unlisted[draft.ino] = prepared, outcome
        found = await self._adopt_earlier([prepared.draft for prepared, _ in unlisted.values()])
        for prepared, uid in unlisted.values():
            if prepared.draft.ino in found:
                continue
            if uid is not None and uid >= batch.uidnext:
                # Another client, or a filter, has moved it away at once.
                self._was_removed(mailbox, prepared.draft, Uid(uid), prepared.payload)
            else:
                error = Refused("the server took it but does not list it: look for it there")
                self._refuse(prepared.pending, error)
        if throttled is not None:
            self._pool.throttle(throttled)
            raise throttled

    # -- after APPEND --------------------------------------------------------------------------------------

    async def _adopt_earlier(self, uncertain: Sequence[Draft]) -> set[Ino]:
        """Adopt the drafts that an earlier attempt has uploaded, and return which; the others were not."""
        if not uncertain:
            return set()
        search = UploadSearch(uncertain, self._is_other)
        await self._pool.run(search.run)
        for draft, attempt, data in search.found:
            mailbox = self._locator.named(attempt.mailbox, attempt.uidvalidity)
            payload = await trio.to_thread.run_sync(make_payload, draft)
            try:
                same = payload.digest == attempt.digest
                self._adopt(mailbox, draft, data, payload if same else None, draft.flags)
            finally:
                payload.close()
        found = {draft.ino for draft, _, _ in search.found}
        for draft in uncertain:
            if draft.ino not in found:
                draft.attempt = None
        return found

    def _is_other(self, draft: Draft, attempt: Attempt, uid: Uid) -> bool:
        """Return whether a message is known to be another one than a draft may have become."""
        if draft.base is not None and draft.base.ref == attempt.ref(uid):
            return True
        mailbox = self._cache.mailbox_named(attempt.mailbox)
        if mailbox is None or not self._cache.is_named(mailbox.ino, uid):
            return False
        node = self._cache.message(mailbox.ino, uid)
        return node is None or node.ino != draft.ino

    def _was_removed(self, mailbox: ServerMailbox, draft: Draft, uid: Uid, payload: Payload) -> None:
        """Forget a draft that was uploaded as ``uid`` and then removed by another client."""
        draft.attempt = None
        if payload.is_current(draft):
            self._hub.publish(Changes(mailbox.ino, gone=[_as_node(draft, uid)]))
            if draft.base is not None:
                self._replaced.note(draft.base.ref)
            self._spool.forget(draft)
            self._finish(draft, altered=True)

    def _adopt(
        self, mailbox: ServerMailbox, draft: Draft, data: FetchData, payload: Payload | None, flags: str
    ) -> None:
        """Make a message of a draft that is on the server. ``flags`` are those that it was uploaded with.

        If the draft was written to since, ``payload`` is None or not current, and the draft goes on as a new
        version of the message.
        """
        current = payload is not None and payload.is_current(draft)
        message = new_message(data)
        old = self._cache.node(draft.ino)
        if old is not None:
            # The new version takes over the inode: the old one needs another until it is removed.
            self._cache.displace(draft.ino)
            self._bodies.drop([old])
        gone = self._cache.adopt(draft.ino, mailbox.ino, draft.name, message)
        names = [draft.name, *(g.name or b"" for g in gone)]
        self._hub.publish(Changes(mailbox.ino, gone=gone, replaced=names))
        if payload is None or not current:
            self._continue(draft, mailbox, message)
            return
        if draft.base is not None:
            # Before the draft goes: from here on only the journal knows that the old version has to go.
            self._replaced.note(draft.base.ref)
        same = payload.clean and message.size == len(payload.data)
        if same:
            if payload.converted:
                replace_file(draft.file, payload.data, durable=False)
            self._bodies.take(draft.file, draft.ino, message.uid)
        self._keep_attributes(draft, message.date)
        self._spool.forget(draft)
        self._finish(draft, altered=payload.converted or not same)
        if draft.flags != flags:
            self._nursery.start_soon(self._update_flags, draft, set(flags.split()))

    async def _update_flags(self, draft: Draft, uploaded: set[str]) -> None:
        """Set the flags that were changed while a draft was being uploaded."""
        wanted = set(draft.flags.split())

        def change(present: list[str]) -> tuple[set[str], set[str]]:
            return wanted - {*present}, uploaded - wanted

        try:
            await self._flags.change(draft.ino, change)
        except ImapfsError as error:
            report(error, f"flags of {draft.shown} were not set")
        newer = self._spool.get(draft.ino)
        if newer is not None:
            newer.change_flags(change)

    def _continue(self, draft: Draft, mailbox: ServerMailbox, message: NewMessage) -> None:
        """Let a draft that was written to go on as a new version of the message that it has become."""
        if draft.base is not None:
            self._replaced.note(draft.base.ref)
        ref = replace(mailbox.ref(message.uid), date=message.date, size=message.size)
        draft.base = Base(ref, message.date, message.zone)
        draft.attempt = None
        draft.save()
        pending = self._pending.get(draft.ino)
        if pending is not None and draft.state != "sending":
            del self._pending[draft.ino]
            pending.settle(None)

    def _finish(self, draft: Draft, *, altered: bool) -> None:
        """Announce that a draft is a message. ``altered``: its bytes may not be those that were shown."""
        pending = self._pending.pop(draft.ino, None)
        same, other = ([], [draft.ino]) if altered else ([draft.ino], [])
        self._hub.publish(Changes(draft.parent, uploaded=[draft.ino], resized=same, rewritten=other))
        self._cache.touch_directory(draft.parent)
        if pending is not None:
            pending.settle(None)


def _equal(content: bytes, data: mmap.mmap) -> bool:
    """In a thread: compare as many bytes as ``content`` has."""
    return all(content[at : at + _CHUNK] == data[at : at + _CHUNK] for at in range(0, len(content), _CHUNK))


def _as_node(draft: Draft, uid: Uid) -> Node:
    """Return a draft as the message that it was on the server for a moment."""
    times = None, draft.mtime, draft.ctime, draft.mode
    return Node(draft.ino, draft.parent, draft.name, uid, draft.size, 1, *times, None, None, 0)
