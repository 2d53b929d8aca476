"""The space that statfs shows: the account's quota, or if it has none, the disk that holds the cache."""

import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import trio

from imapfs.fs.refresh import patience
from imapfs.imap.pool import SessionPool
from imapfs.imap.responses import Quota
from imapfs.imap.session import Session
from imapfs.log import report

_MAX_AGE: Final = 60.0
"""Seconds for which a quota is shown without asking the server again."""


class Space(NamedTuple):
    """Size and free space in bytes."""

    total: int
    free: int


class SpaceReporter:
    """Asks for the quota (RFC 9208, resource STORAGE) in the background.

    ``timeout`` limits a request, in seconds.
    """

    def __init__(self, pool: SessionPool, directory: Path, nursery: trio.Nursery, timeout: float) -> None:
        self._pool = pool
        self._directory = directory
        self._nursery = nursery
        self._patience = patience(timeout)
        self._quota: Quota | None = None
        self._asked_at = -math.inf

    async def space(self) -> Space:
        """Return the quota if it is known or the server answers soon, else the space on the disk."""
        if time.monotonic() - self._asked_at > _MAX_AGE:
            self._asked_at = time.monotonic()
            answered = trio.Event()
            self._nursery.start_soon(self._ask, answered)
            with trio.move_on_after(0 if self._pool.is_away else self._patience):
                await answered.wait()
        if self._quota is not None:
            return Space(self._quota.limit, max(0, self._quota.limit - self._quota.used))
        disk = os.statvfs(self._directory)
        return Space(disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize)

    async def _ask(self, answered: trio.Event) -> None:
        try:
            self._quota = await self._pool.run(partial(Session.quota, mailbox=b"INBOX"))
        except Exception as error:
            report(error, "cannot get the quota")
        finally:
            answered.set()
