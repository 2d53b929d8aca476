"""A draft that is to be uploaded, as those see it who wait for it."""

import math
import time
from typing import Final

import trio

from imapfs.errors import ImapfsError
from imapfs.store.spool import Draft
from imapfs.waiting import Delays

GRACE: Final = 0.25
"""Seconds before an upload that nobody waits for: programs set a file's time just after closing it."""
FIRST_RETRY: Final = 0.5
"""Seconds until a failed upload is tried again; doubled each time, up to"""
MAX_RETRY: Final = 60.0


class PendingUpload:
    """A draft that is to be uploaded, for those who wait for the outcome."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.due = time.monotonic() + GRACE
        self.error: ImapfsError | None = None
        """Why the upload was refused, or why the last attempt failed."""
        self.ended_by_server = 0
        """Attempts, with this draft alone, that the server itself has ended without an answer."""
        self._settled = trio.Event()
        self._attempted = trio.Event()
        self._delays = Delays(FIRST_RETRY, MAX_RETRY)

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
