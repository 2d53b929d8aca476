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

What runs in threads is in `imapfs.sync.append`, the notes are in `imapfs.sync.upload_notes`, and what
becomes of a draft that is on the server in `imapfs.sync.adopt`.
"""

import contextlib
import logging
import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import trio

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
from imapfs.store.rows import Node
from imapfs.store.spool import MAX_TIME, Draft, Spool
from imapfs.sync.adopt import Adopter
from imapfs.sync.append import HEAD, AppendBatch, Payload, UploadSearch, check_is_message, make_payload
from imapfs.sync.changes import ChangeHub
from imapfs.sync.download import Downloader
from imapfs.sync.flags import FlagChanger
from imapfs.sync.identify import ref_of
from imapfs.sync.locate import Locator
from imapfs.sync.pending_upload import FIRST_RETRY, GRACE, MAX_RETRY, PendingUpload
from imapfs.sync.replaced import ReplacedMessages
from imapfs.sync.synchroniser import Synchroniser
from imapfs.sync.upload_notes import UploadNotes
from imapfs.waiting import Delays

log = logging.getLogger(__name__)

_FLAGS_OF_NEW: Final = {"\\Drafts": "\\Draft", "\\Sent": "\\Seen"}
"""Use of a mailbox -> flags of a new message there, unless a program has said which. Clients do the same."""
_MAX_BATCH: Final = 100
"""Drafts that are appended together."""
_MAX_BATCH_BYTES: Final = 4 << 20
"""Size at which a batch is full; a single draft may be larger."""
_MAX_ENDED: Final = 3
"""Attempts that the server ends without an answer, although other commands work, before that is a refusal."""
_CHUNK: Final = 1 << 20
_OF_MAILBOX: Final = frozenset({"NOPERM", "OVERQUOTA"})
"""Response codes (RFC 5530) of a refusal that holds for other messages in the mailbox too."""
_REFUSED_PAUSE: Final = 5.0
"""Seconds after which such a refusal is put to the test again, if somebody puts a message there."""


@dataclass(slots=True)
class _Prepared:
    """A draft that is ready to be appended."""

    pending: PendingUpload
    payload: Payload
    message: Upload

    @property
    def draft(self) -> Draft:
        return self.pending.draft


@dataclass(slots=True)
class _RefusedMailbox:
    """A mailbox that takes no messages, as far as is known."""

    error: Refused
    drafts: dict[Ino, Draft]
    """Those that were refused for that."""
    retry: float
    """When one of them may be tried again, as time.monotonic()."""


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
        self._sync = sync
        self._locator = locator
        self._replaced = replaced
        self._nursery = nursery
        self._downloads = downloads
        self._pending: dict[Ino, PendingUpload] = {}
        self._notes = UploadNotes(journal, spool)
        self._flags = flags
        self._adopter = Adopter(cache, bodies, spool, replaced, self._notes, hub, self._pending)
        self._refused: dict[Ino, _RefusedMailbox] = {}
        self._workers: dict[Ino, trio.Event] = {}
        """Mailbox -> the event that wakes its worker."""
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
        if draft.base is None and not (draft.flagged or draft.flags):
            draft.flags = _FLAGS_OF_NEW.get(self._cache.use(draft.parent), "")
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

    async def check_takes(self, mailbox: Ino) -> None:
        """Raise why a mailbox takes no messages, if the server has refused one for that.

        Every few seconds this tries one of those again. If the server takes it now, all are uploaded.
        """
        refused = self._refused.get(mailbox)
        if refused is None:
            return
        refused.drafts = {ino: d for ino, d in refused.drafts.items() if self._is_refused(d, mailbox)}
        if refused.drafts:
            if time.monotonic() < refused.retry:
                raise refused.error.with_traceback(None)
            refused.retry = time.monotonic() + _REFUSED_PAUSE
            # Some servers refuse a message only when they have all of it.
            smallest = min(refused.drafts.values(), key=lambda draft: draft.size)
            try:
                await self.submit(smallest, now=True).wait()
            except (ConnectionLost, AuthenticationFailed, Throttled) as error:
                log.info("%s is tried again later: %s", smallest.shown, error)
            except ImapfsError as error:
                if isinstance(error, Refused) and error.code in _OF_MAILBOX:
                    raise
        self._refused.pop(mailbox, None)
        for draft in refused.drafts.values():
            if self._is_refused(draft, mailbox):
                self.submit(draft)

    def _is_refused(self, draft: Draft, mailbox: Ino) -> bool:
        is_here = self._spool.get(draft.ino) is draft and draft.parent == mailbox
        return is_here and draft.state == "unsent"

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
        await self._notes.drop_ended()

    def hurry(self) -> None:
        """Try now to upload what waits for the server."""
        for pending in self._complete():
            pending.due = min(pending.due, time.monotonic() + GRACE)
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
        self._notes.take_over()
        for draft in self._spool:
            if draft.state == "sending":
                try:
                    # If the cache has adopted it already, it is found by its attempt.
                    self.submit(draft)
                except CacheError as error:
                    report(error, f"{draft.shown} has no new description")

    # -- the worker of a mailbox ---------------------------------------------------------------------------

    async def _work(self, mailbox: Ino) -> None:
        delays = Delays(FIRST_RETRY, MAX_RETRY)
        try:
            while True:
                waiting = self._waiting(mailbox)
                if not waiting:
                    await self._notes.drop_ended()
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
                        # What the server did not answer may be what it cannot take: alone it delays none.
                        others = [pending for pending in batch if not pending.ended_by_server]
                        batch = others[:_MAX_BATCH] or batch[:1]
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
                    if pending.ended_by_server >= _MAX_ENDED:
                        why = str(pending.error or "the server ends the connection")
                        self._refuse(pending, Refused(f"the server does not take it: {why}"))
                        continue
                    prepared = await self._prepare(pending)
                    if prepared is not None:
                        ready.append(prepared)
                        size += len(prepared.payload.data)
                if ready:
                    await self._look_if_lost(mailbox)
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
        await self._sync.list_mailboxes()
        if self._server_name(mailbox) not in {None, name}:
            log.info("%d uploads follow their mailbox, which was renamed", len(batch))
            return
        for pending in batch:
            if not pending.settled:
                self._refuse(pending, error)

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
            check_is_message(payload.data[:HEAD])
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
        date, zone = min(draft.mtime, MAX_TIME) // 1_000_000_000, 0
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
        self._adopter.keep_attributes(draft, old.date or 0)
        self._spool.forget(draft)
        self._adopter.finish(draft, altered=True)

    # -- APPEND --------------------------------------------------------------------------------------------

    async def _look_if_lost(self, mailbox: Ino) -> None:
        """Synchronise a mailbox whose UIDNEXT may have gone back, as an upload could not be found by it then.

        Raises ImapfsError.
        """
        self._pool.check_idle()
        known = self._cache.mailbox(mailbox)
        if known is None or not known.complete or self._sync.is_current(mailbox):
            return
        await self._synchronise(mailbox)

    async def _synchronise(self, mailbox: Ino) -> None:
        """Synchronise a mailbox, if it is there. Raises ImapfsError if that fails."""
        refresh = self._sync.refresh_mailbox(mailbox, 0)
        if refresh is not None:
            await refresh.finished()
            if refresh.error is not None and not isinstance(refresh.error, MailboxGone):
                raise refresh.error

    async def _append(self, directory: Ino, ready: list[_Prepared]) -> None:
        """Append messages and adopt them. The caller has the mailbox in exclusive use."""
        mailbox = self._locator.mailbox(directory)
        ready = [p for p in ready if p.payload.is_current(p.draft)]
        if not ready:
            return
        if not self._sync.is_current(directory):
            mailbox = replace(mailbox, uidnext=0)
        lost_at = self._pool.lost_at
        batch = AppendBatch(
            mailbox, [prepared.message for prepared in ready], lambda: self._pool.lost_at == lost_at
        )
        await self._pool.run(batch.prepare, mailbox.name)
        mailbox = replace(mailbox, uidvalidity=batch.uidvalidity)
        await self._notes.note(mailbox, batch.uidnext, [(p.draft, p.payload) for p in ready])
        try:
            await self._pool.run(batch.run, mailbox.name, repeat=False)
            mailbox = replace(mailbox, uidvalidity=batch.uidvalidity)
        except ConnectionLost as error:
            if error.by_server:
                for prepared in ready:
                    # Of several it may be any: from now on they are sent one by one.
                    ended = prepared.pending.ended_by_server
                    prepared.pending.ended_by_server = ended + 1 if len(ready) == 1 else max(1, ended)
            raise
        flagged: list[tuple[_Prepared, FetchData]] = []
        """Drafts whose flags were changed meanwhile."""
        unlisted: dict[Ino, tuple[_Prepared, int | None]] = {}
        throttled: Throttled | None = None
        gone: MailboxGone | None = None
        for prepared, outcome in zip(ready, batch.outcomes, strict=True):
            draft = prepared.draft
            if isinstance(outcome, Throttled):
                throttled = outcome
                self._notes.drop(draft)
            elif isinstance(outcome, Refused) and outcome.code in {"TRYCREATE", "NONEXISTENT"}:
                gone = MailboxGone(str(outcome))
                self._notes.drop(draft)
            elif isinstance(outcome, Refused):
                self._notes.drop(draft)
                self._refuse(prepared.pending, outcome)
                if outcome.code in _OF_MAILBOX:
                    retry = time.monotonic() + _REFUSED_PAUSE
                    refused = self._refused.setdefault(directory, _RefusedMailbox(outcome, {}, retry))
                    refused.drafts[draft.ino] = draft
            elif outcome is not None and (data := batch.listed(outcome)) is not None:
                if draft.flags != prepared.message.flags:
                    flagged.append((prepared, data))
                else:
                    self._adopter.adopt(mailbox, draft, data, prepared.payload)
            else:
                # Even if a UID was named: Courier names a wrong one in a mailbox that was only examined.
                unlisted[draft.ino] = prepared, outcome
                if outcome is not None and outcome < batch.uidnext and draft.attempt is not None:
                    # The server was restored from a backup, and UIDNEXT is not the one that was known. For
                    # the cache the UID is another message's: `_settle_earlier` lists the mailbox first.
                    draft.attempt = replace(draft.attempt, uidnext=outcome)
        await self._notes.accept(
            [p.draft for p, uid in unlisted.values() if uid is None or uid < batch.uidnext]
        )
        for prepared, data in flagged:
            data = await self._flags.bring(mailbox, prepared.draft, data, prepared.message.flags.split())
            self._adopter.adopt(mailbox, prepared.draft, data, prepared.payload)
        search = await self._search(
            [p.draft for p, uid in unlisted.values() if uid is None or uid >= batch.uidnext]
        )
        settled = await self._adopt_found(search)
        for prepared, uid in unlisted.values():
            if prepared.draft.ino not in settled and uid is not None and uid >= batch.uidnext:
                # Another client, or a filter, has moved it away at once. Of any other, only the note says
                # that the server has taken it: it is searched again.
                self._adopter.was_removed(mailbox, prepared.draft, Uid(uid), prepared.payload)
        if throttled is not None:
            self._pool.refused(throttled, mailbox.name)
            raise throttled
        if gone is not None:
            raise gone

    # -- after APPEND --------------------------------------------------------------------------------------

    async def _settle_earlier(self, directory: Ino, uncertain: Sequence[Draft]) -> None:
        """Find out whether an earlier attempt has uploaded these drafts, and adopt those that it has.

        The search needs no lock: who waits for the mailbox does not wait for that.

        Raises ImapfsError if that cannot be found out: ConnectionLost, Throttled, AuthenticationFailed if it
        has to wait, CacheError if the disk is full.
        """
        # What the cache knows under a UID counts for another message. After a power cut, or on a restored
        # server, that may be out of date.
        await self._look_if_lost(directory)
        search = await self._search(uncertain)
        if any(answer.is_restored or attempt.accepted for _, attempt, answer in search.answers):
            # The UID of the upload may have been that of another message, which the cache still has.
            await self._synchronise(directory)
            search = await self._search(uncertain)
        if search.is_mailbox_missing:
            # If it was renamed, its notes follow it, and it is searched under its new name. To take the
            # message for missing would upload it twice.
            await self._sync.list_mailboxes()
        async with self._sync.changing(directory):
            await self._adopt_found(search)

    async def _search(self, uncertain: Sequence[Draft]) -> UploadSearch:
        search = UploadSearch(uncertain, self._adopter.is_other)
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
            if answer.found is not None:
                mailbox = self._locator.named(attempt.mailbox, answer.uidvalidity)
                if self._adopter.is_other(draft, ref_of(mailbox.name, mailbox.uidvalidity, answer.found)):
                    continue  # another task has found that it is the upload of an equal file: searched again
                # Flags may have been set since: those of that time are not known, so none is removed.
                data = await self._flags.bring(mailbox, draft, answer.found, ())
                payload = await trio.to_thread.run_sync(make_payload, draft)
                try:
                    same = payload.digest == attempt.digest
                    self._adopter.adopt(
                        mailbox, draft, data, payload if same else None, is_same=answer.is_same
                    )
                finally:
                    payload.close()
                settled.add(draft.ino)
            elif attempt.accepted:
                await self._keep_aside(draft, attempt)
                settled.add(draft.ino)
            elif answer.perhaps is not None:
                self._leave_to_person(draft, attempt, answer.perhaps)
                settled.add(draft.ino)
            self._notes.drop(draft)
        return settled

    async def _keep_aside(self, draft: Draft, attempt: Attempt) -> None:
        """Let go of a draft that is on the server, as its OK proves, in a form that cannot be recognised.

        To upload it again would double it.
        """
        if draft.state != "sending" or draft.is_written:
            return  # a program has written to it since: that is another message
        path = await trio.to_thread.run_sync(self._spool.keep_aside, draft)
        where = attempt.mailbox.decode("utf-8", "replace")
        log.warning(
            "%s is on the server, which has changed it: it is one of the new messages in %s. What was sent is"
            " kept in %s: compare, then delete it",
            draft.shown, where, path,
        )  # fmt: skip
        self._adopter.let_go(draft)
        self._sync.look_again(draft.parent)

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


def _equal(content: bytes, data: mmap.mmap) -> bool:
    """In a thread: compare as many bytes as ``content`` has."""
    return all(content[at : at + _CHUNK] == data[at : at + _CHUNK] for at in range(0, len(content), _CHUNK))
