"""A synchronisation in progress, for those who wait for it."""

import trio

from imapfs.errors import ImapfsError
from imapfs.waiting import Signal


class Refresh:
    """One synchronisation of a mailbox, or of the list of mailboxes. Used on the trio thread."""

    def __init__(self) -> None:
        self.done = False
        self.started = trio.current_time()
        self._error: ImapfsError | None = None
        self._changed = Signal()

    @property
    def error(self) -> ImapfsError | None:
        """Why it failed, without a traceback, as each task that waits may raise it."""
        return self._error and self._error.with_traceback(None)

    def wake(self) -> None:
        """Announce progress."""
        self._changed.send()

    def finish(self, error: ImapfsError | None) -> None:
        """Announce the end."""
        self.done, self._error = True, error
        self.wake()

    async def progress(self) -> None:
        """Wait until more is known, or the end."""
        if not self.done:
            await self._changed.wait()

    async def finished(self) -> None:
        """Wait for the end."""
        while not self.done:
            await self._changed.wait()
