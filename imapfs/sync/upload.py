"""Turning drafts into messages: each is appended at most once.

A draft is submitted when it is complete. Its bytes are copied, with CRLF line ends, and compared with the
message that it is a new version of. Then it is appended, up to `_MAX_BATCH` drafts at a time, after the place
where it will be has been noted on disk (`Attempt`). Once it is on the server, the cache adopts it under the
same inode and name. Only then does the draft leave the spool, and the old version the server.

The notes of a batch are durable, by one write, before the first byte of it leaves. So a draft without a note
was not uploaded, and is not searched for. If the connection breaks, or the machine stops, in between, the
note says where to search: the message with the same bytes and the UIDNEXT of that time or a higher UID is the
upload, and nothing is appended again. If a message is only like the upload, the outcome stays unknown: the
draft is kept, and a person decides.

A draft may be written to while it is being uploaded. Then the copy becomes a message, and the draft goes on
as a new version of it. As long as a program has a draft open for writing, its bytes are not replaced here.

The module is long because submitting, appending and adopting change the state of one upload together, and
each step is safe only in its order with the others. What needs no such state is in `imapfs.sync.append`.
"""

import contextlib
import hashlib
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
from imapfs.store.journal import Attempt, Journal
from imapfs.store.rows import NewMessage, Node
from imapfs.store.spool import Base, Draft, Spool
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
_MAX_TIME: Final = (1 << 63) - 1
"""Nanoseconds since the epoch, in the year 2262: the latest time that the cache can store."""
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
        self._delays = Delays(_FIRST_RETRY, _MAX_RETRY)

    def postpone(self, error: ImapfsError) -> None:
        """Note that an attempt has failed because of this disk, and when the next one is due."""
        self.fail(error)
        self.due = time.monotonic() + self._delays.next()

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
        journal: Journal,
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
        self._journal = journal
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
        self._ended: set[str] = set()
        """Files in the spool whose notes in the journal are no longer needed."""
        self._noting = trio.Lock()
        """Held while notes are written, so that no new note is taken for one that is no longer needed."""
        self._claimed: dict[Ino, trio.Event] = {}
        """Draft that one task works on -> the event that is set when it has finished."""

    # -- submitting ----------------------------------------------------------------------------------------

    def submit(self, draft: Draft, *, now: bool = False) -> PendingUpload:
        """Have a complete draft uploaded; ``now``: without delay, as somebody waits for it.

        Raises CacheError if its description cannot be written. It is uploaded all the same.
        """
        pending = self._pending.get(draft.ino)
        if pending is None or pending.settled:
            pending = self._pending[draft.ino] = PendingUpload(draft)
        if now:
            pending.hurry()
        draft.state, draft.error = "sending", ""
        self._wake(draft.parent)
        draft.save()
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

    def refusal(self, draft: Draft) -> ImapfsError:
        """Return why a draft is ``unsent``."""
        pending = self._pending.get(draft.ino)
        if pending is not None and pending.error is not None:
            return pending.error.with_traceback(None)
        return Refused(draft.error)

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
        while draft.attempt is not None and self._spool.get(draft.ino) is draft:
            with self._claim([draft]):
                await self._settle_earlier(draft.parent, [draft])
        pending = self._pending.pop(draft.ino, None)
        if pending is not None and not pending.settled:
            pending.settle(MessageGone("it was withdrawn"))
        return self._spool.get(draft.ino) is draft

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
        await self._drop_notes()

    def hurry(self) -> None:
        """Try now to upload what waits for the server."""
        for pending in self._complete():
            pending.due = min(pending.due, time.monotonic() + _GRACE)
            self._wake(pending.draft.parent)

    def _complete(self) -> list[PendingUpload]:
        # One that a program has open again is complete when that closes it.
        return [
            p
            for p in self._pending.values()
            if not p.settled and p.draft.state == "sending" and not p.draft.is_written
        ]

    def resume(self) -> None:
        """Continue with the drafts of an earlier process. Raises nothing."""
        noted = self._journal.uploads
        by_file = {draft.file.name: draft for draft in self._spool}
        earlier = {
            name: _complete_attempt(draft, draft.attempt)
            for name, draft in by_file.items()
            if draft.attempt is not None and name not in noted
        }
        try:
            if earlier:
                # An earlier version has these in the descriptions, which are written again now.
                self._journal.begin_uploads(earlier)
        except CacheError as error:
            report(error, "the journal does not have the uploads that an earlier version began")
        for name, attempt in {**earlier, **noted}.items():
            draft = by_file.get(name)
            if draft is not None and draft.state != "local":
                draft.attempt = attempt
            else:
                # It has become a message or was deleted; or its rename to a message was lost in a power cut,
                # and who removes the file that is local again means no message.
                self._ended.add(name)
        for draft in self._spool:
            if draft.state == "sending":
                try:
                    # If the cache has adopted it already, it is found by its attempt.
                    self.submit(draft)
                except CacheError as error:
                    report(error, f"{draft.shown} has no new description")

    # -- the worker of a mailbox ---------------------------------------------------------------------------

    async def _work(self, mailbox: Ino) -> None:
        delays = Delays(_FIRST_RETRY, _MAX_RETRY)
        try:
            while True:
                waiting = self._waiting(mailbox)
                if not waiting:
                    await self._drop_notes()
                    if not self._waiting(mailbox):
                        return
                    continue
                news = self._workers[mailbox] = trio.Event()
                pause = min(pending.due for pending in waiting) - time.monotonic()
                if pause > 0:
                    with trio.move_on_after(pause):
                        await news.wait()
                    continue
                batch = [pending for pending in waiting if pending.due <= time.monotonic()]
                try:
                    if uncertain := [pending for pending in batch if pending.draft.attempt is not None]:
                        batch = uncertain
                        await self._settle_batch(mailbox, batch)
                    else:
                        batch = batch[:_MAX_BATCH]
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
        name = self._server_name(mailbox)
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
        except MailboxGone as error:
            await self._find_mailbox(mailbox, name, batch, error)
        except Exception as error:
            self._fail(batch, error)
        finally:
            for prepared in ready:
                prepared.payload.close()

    def _server_name(self, mailbox: Ino) -> bytes | None:
        found = self._cache.mailbox(mailbox)
        return found and found.server_name

    async def _find_mailbox(
        self, mailbox: Ino, name: bytes | None, batch: Sequence[PendingUpload], error: MailboxGone
    ) -> None:
        """Look where a mailbox is that was not found as ``name``. If it was renamed, its drafts have followed
        it, and are uploaded there. If it was deleted, they are refused.

        Raises ConnectionLost, Throttled, AuthenticationFailed if this has to wait.
        """
        await self._list_mailboxes()
        if self._server_name(mailbox) not in {None, name}:
            log.info("%d uploads follow their mailbox, which was renamed", len(batch))
            return
        for pending in batch:
            if not pending.settled:
                self._refuse(pending, error)

    async def _list_mailboxes(self) -> None:
        """Have drafts and notes follow mailboxes that other clients have renamed until now.

        Not while a mailbox is in exclusive use. Raises ConnectionLost, Throttled, AuthenticationFailed.
        """
        for _ in range(2):
            # The first one may have been under way before the mailbox was renamed.
            refresh = self._sync.refresh_tree(0)
            if refresh is not None:
                await refresh.finished()
                if isinstance(refresh.error, ConnectionLost | AuthenticationFailed | Throttled):
                    raise refresh.error

    def refuse(self, draft: Draft, error: ImapfsError) -> None:
        """Give up the upload of a draft, whose mailbox is gone. Raises nothing."""
        pending = self._pending.get(draft.ino)
        self._refuse(PendingUpload(draft) if pending is None else pending, error)

    async def _settle_batch(self, mailbox: Ino, batch: Sequence[PendingUpload]) -> None:
        """Find out what has become of earlier attempts; those that were not uploaded wait for the next batch.

        Raises ConnectionLost, Throttled, AuthenticationFailed if this has to wait.
        """
        try:
            with self._claim([pending.draft for pending in batch]):
                await self._settle_earlier(mailbox, [pending.draft for pending in batch])
            await self._replaced.remove_all()
        except (ConnectionLost, AuthenticationFailed, Throttled):
            raise
        except Exception as error:
            self._fail(batch, error)

    def _fail(self, batch: Sequence[PendingUpload], error: Exception) -> None:
        failure = report(error, f"{len(batch)} files were not uploaded")
        for pending in batch:
            if not pending.settled and not isinstance(failure, CacheError):
                self._refuse(pending, failure)
            elif not pending.settled:
                pending.postpone(failure)

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
            if draft.base is not None:
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
            pending.postpone(report(error, f"{draft.shown} is not uploaded yet"))
            return None
        date, zone = min(draft.mtime, _MAX_TIME) // 1_000_000_000, 0
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
            self._cache.set_local(draft.ino, mtime=min(draft.mtime, _MAX_TIME))
        if draft.mode != 0o600:
            self._cache.set_local(draft.ino, mode=draft.mode)

    # -- APPEND --------------------------------------------------------------------------------------------

    async def _append(self, directory: Ino, ready: list[_Prepared]) -> None:
        """Append messages and adopt them. The caller has the mailbox in exclusive use."""
        mailbox = self._locator.mailbox(directory)
        ready = [p for p in ready if p.payload.is_current(p.draft)]
        if not ready:
            return
        batch = AppendBatch(mailbox, [prepared.message for prepared in ready])
        await self._pool.run(batch.prepare, mailbox.name)
        mailbox = replace(mailbox, uidvalidity=batch.uidvalidity)
        await self._note(mailbox, batch.uidnext, ready)
        await self._pool.run(batch.run, mailbox.name, repeat=False)
        unlisted: dict[Ino, tuple[_Prepared, int | None]] = {}
        throttled: Throttled | None = None
        gone: MailboxGone | None = None
        for prepared, outcome in zip(ready, batch.outcomes, strict=True):
            draft = prepared.draft
            if isinstance(outcome, Throttled):
                throttled = outcome
                self._drop_note(draft)
            elif isinstance(outcome, Refused) and outcome.code in {"TRYCREATE", "NONEXISTENT"}:
                gone = MailboxGone(str(outcome))
                self._drop_note(draft)
            elif isinstance(outcome, Refused):
                self._drop_note(draft)
                self._refuse(prepared.pending, outcome)
            elif outcome is not None and (data := batch.listed(outcome)) is not None:
                self._adopt(mailbox, draft, data, prepared.payload, prepared.message.flags)
            else:
                # Even if a UID was named: Courier names a wrong one in a mailbox that was only examined.
                unlisted[draft.ino] = prepared, outcome
                if outcome is not None and outcome < batch.uidnext and draft.attempt is not None:
                    # The server was restored from a backup, and UIDNEXT is not the one that was known.
                    draft.attempt = replace(draft.attempt, uidnext=outcome)
                    self._sync.look_again(directory)
        search = await self._search([prepared.draft for prepared, _ in unlisted.values()])
        settled = await self._adopt_found(search)
        for prepared, uid in unlisted.values():
            if prepared.draft.ino in settled:
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
        if gone is not None:
            raise gone

    # -- after APPEND --------------------------------------------------------------------------------------

    async def _settle_earlier(self, directory: Ino, uncertain: Sequence[Draft]) -> None:
        """Find out whether an earlier attempt has uploaded these drafts, and adopt those that it has.

        The search needs no lock: who waits for the mailbox does not wait for that.
        """
        search = await self._search(uncertain)
        if search.is_mailbox_missing:
            # If it was renamed, its notes follow it, and it is searched under its new name. To take the
            # message for missing would upload it twice.
            await self._list_mailboxes()
        async with self._sync.changing(directory):
            await self._adopt_found(search)

    async def _search(self, uncertain: Sequence[Draft]) -> UploadSearch:
        search = UploadSearch(uncertain, self._is_other)
        if uncertain:
            await self._pool.run(search.run)
        return search

    async def _adopt_found(self, search: UploadSearch) -> set[Ino]:
        """Adopt what a search has found. Return the drafts that are not to be uploaded.

        These are on the server, or it is not known whether they are, and a person has to decide.
        """
        settled: set[Ino] = set()
        for draft, attempt, answer in search.answers:
            if draft.attempt != attempt or self._spool.get(draft.ino) is not draft:
                continue  # its mailbox was renamed meanwhile: searched again
            if answer.found is not None and self._is_other(draft, attempt, answer.found.uid or Uid(0)):
                continue  # another task has found that this is the upload of an equal file: searched again
            if answer.found is not None:
                mailbox = self._locator.named(attempt.mailbox, attempt.uidvalidity)
                payload = await trio.to_thread.run_sync(make_payload, draft)
                try:
                    same = payload.digest == attempt.digest
                    # Flags may have been set since: those of that time are not known, so none is removed.
                    self._adopt(mailbox, draft, answer.found, payload if same else None, "")
                finally:
                    payload.close()
                settled.add(draft.ino)
            elif answer.perhaps is not None:
                self._leave_to_person(draft, attempt, answer.perhaps)
                settled.add(draft.ino)
            self._drop_note(draft)
        return settled

    def _leave_to_person(self, draft: Draft, attempt: Attempt, uid: Uid) -> None:
        """Keep a draft of which nobody knows whether it is on the server: nothing is removed or repeated."""
        where = attempt.mailbox.decode("utf-8", "replace")
        error = Refused(
            f"it may be the message with UID {uid} in {where}, but that has other bytes: compare them, then "
            "delete this file or run 'imapfs retry'"
        )
        pending = self._pending.get(draft.ino)
        if pending is not None:
            self._refuse(pending, error)
        elif draft.state != "local":
            draft.state, draft.error = "unsent", str(error)
            draft.save()

    async def _note(self, mailbox: ServerMailbox, uidnext: int, ready: Sequence[_Prepared]) -> None:
        """Note where drafts are about to be uploaded: durable on return, before anything is sent."""
        attempts: dict[str, Attempt] = {}
        for prepared in ready:
            payload = prepared.payload
            what = len(payload.data), payload.digest, payload.message_id
            attempts[prepared.draft.file.name] = Attempt(mailbox.name, mailbox.uidvalidity, uidnext, *what)
        await self._write_notes(attempts)
        for prepared in ready:
            prepared.draft.attempt = attempts[prepared.draft.file.name]

    def _drop_note(self, draft: Draft) -> None:
        """Note that the outcome of an attempt is known."""
        if draft.attempt is not None:
            self._ended.add(draft.file.name)
            draft.attempt = None

    async def _drop_notes(self) -> None:
        """Remove notes that are no longer needed from the journal. Raises nothing."""
        try:
            await self._write_notes({})
        except CacheError as error:
            report(error, "notes of uploads that are done stay in the journal")

    async def _write_notes(self, attempts: dict[str, Attempt]) -> None:
        """Add notes to the journal, and remove those that are no longer needed. Raises CacheError."""
        async with self._noting:
            ended, self._ended = self._ended, set()
            kept = [draft.ino for draft in self._spool if draft.file.name in ended]

            def write() -> None:
                # A draft without a note was not uploaded. So one that was is gone before its note is, or goes
                # on as a new version of the message.
                for ino in kept:
                    self._spool.sync(ino)
                if ended:
                    self._spool.sync_removals()
                self._journal.begin_uploads(attempts, ended)

            if not attempts and not ended:
                return
            try:
                await trio.to_thread.run_sync(write)
            except CacheError:
                self._ended |= ended
                raise

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
        self._drop_note(draft)
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
        self._drop_note(draft)
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
        draft.save()
        self._drop_note(draft)
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


def _complete_attempt(draft: Draft, attempt: Attempt) -> Attempt:
    """Return an attempt that an earlier version has noted, with what it did not note.

    Its digest is without the line ends at the end.
    """
    with contextlib.suppress(OSError):
        payload = make_payload(draft)
        try:
            text = bytes(payload.data).rstrip(b"\r\n")
            if hashlib.sha256(text).hexdigest() == attempt.digest:
                return replace(attempt, digest=payload.digest, message_id=payload.message_id)
        finally:
            payload.close()
    return attempt


def _equal(content: bytes, data: mmap.mmap) -> bool:
    """In a thread: compare as many bytes as ``content`` has."""
    return all(content[at : at + _CHUNK] == data[at : at + _CHUNK] for at in range(0, len(content), _CHUNK))


def _as_node(draft: Draft, uid: Uid) -> Node:
    """Return a draft as the message that it was on the server for a moment."""
    times = None, draft.mtime, draft.ctime, draft.mode
    return Node(draft.ino, draft.parent, draft.name, uid, draft.size, 1, *times, None, None, 0)
