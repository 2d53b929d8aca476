"""The notes of uploads under way: durable in the journal before the first byte of an APPEND is sent."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import trio

from imapfs.errors import CacheError
from imapfs.log import report
from imapfs.store.journal import Attempt, Journal
from imapfs.store.spool import Draft, Spool
from imapfs.sync.append import Payload, make_payload
from imapfs.sync.locate import ServerMailbox


class UploadNotes:
    """Where drafts were about to be uploaded. Used on the trio thread."""

    def __init__(self, journal: Journal, spool: Spool) -> None:
        self._journal = journal
        self._spool = spool
        self._ended: set[str] = set()
        """Files in the spool whose notes in the journal are no longer needed."""
        self._noting = trio.Lock()
        """Held while notes are written, so that no new note is taken for one that is no longer needed."""

    def take_over(self) -> None:
        """Give the drafts of an earlier process their notes. Raises nothing."""
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

    async def note(
        self, mailbox: ServerMailbox, uidnext: int, ready: Sequence[tuple[Draft, Payload]]
    ) -> None:
        """Note where drafts are about to be uploaded: durable on return, before anything is sent."""
        attempts: dict[str, Attempt] = {}
        for draft, payload in ready:
            what = len(payload.data), payload.digest, payload.message_id
            attempts[draft.file.name] = Attempt(mailbox.name, mailbox.uidvalidity, uidnext, *what)
        await self._write(attempts)
        for draft, _ in ready:
            draft.attempt = attempts[draft.file.name]

    async def accept(self, drafts: Sequence[Draft]) -> None:
        """Note that the server has taken these drafts, so that none is uploaded again. Raises CacheError."""
        accepted = {d.file.name: replace(d.attempt, accepted=True) for d in drafts if d.attempt is not None}
        for draft in drafts:
            draft.attempt = accepted.get(draft.file.name)
        await self._write(accepted)

    def drop(self, draft: Draft) -> None:
        """Note that the outcome of an attempt is known."""
        if draft.attempt is not None:
            self._ended.add(draft.file.name)
            draft.attempt = None

    async def drop_ended(self) -> None:
        """Remove notes that are no longer needed from the journal. Raises nothing."""
        try:
            await self._write({})
        except CacheError as error:
            report(error, "notes of uploads that are done stay in the journal")

    async def _write(self, attempts: dict[str, Attempt]) -> None:
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
