"""The status of a mount, as JSON: in full, and in short as an extended attribute of the mountpoint."""

import contextlib
import json
import math
import os
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Final

from imapfs import __version__
from imapfs.fs.tree import MailTree
from imapfs.imap.pool import SessionPool
from imapfs.kernel.invalidation import KernelCache
from imapfs.log import printable, shown_path
from imapfs.model import MountConfig
from imapfs.store.cache import Cache
from imapfs.store.spool import Spool
from imapfs.sync.watching import Watching

ATTRIBUTE: Final = b"user.imapfs.status"
MAX_ATTRIBUTE: Final = 4096
"""Bytes of the attribute: file systems and tools do not expect more."""


class MountStatus:
    """Collects the status of one mount."""

    def __init__(
        self,
        config: MountConfig,
        pool: SessionPool,
        cache: Cache,
        spool: Spool,
        watching: Watching,
        tree: MailTree,
        kernel: KernelCache,
    ) -> None:
        self._config = config
        self._pool = pool
        self._cache = cache
        self._spool = spool
        self._watching = watching
        self._tree = tree
        self._kernel = kernel
        self.socket = ""
        """Name of the abstract socket that gives the status in full."""

    def attribute(self) -> bytes:
        """Return the value of the attribute: at most `MAX_ATTRIBUTE` bytes."""
        status = self._status()
        while True:
            value = json.dumps({**status, "socket": self.socket}).encode()
            if len(value) <= MAX_ATTRIBUTE:
                return value
            # Paths can have 4,096 bytes each.
            longest = max(status, key=lambda key: len(json.dumps(status[key])))
            del status[longest]

    def in_full(self) -> bytes:
        """Return the status with all files that are not on the server, as JSON."""
        return json.dumps({**self._status(), **self._files()}).encode()

    def _files(self) -> dict[str, object]:
        waiting = [
            {
                "path": self._tree.path_of(draft),
                "state": draft.state,
                "error": printable(draft.error),
                "size": draft.size,
            }
            for draft in self._spool
            if draft.state in {"sending", "unsent"}
        ]
        scratch = [
            {"path": self._tree.path_of(draft), "size": draft.size}
            for draft in self._spool
            if self._tree.is_scratch(draft.parent)
        ]
        return {
            "waiting": waiting,
            "scratch": scratch,
            "kept": self._kept(),
            "mailboxes": self._mailboxes(),
        }

    def _mailboxes(self) -> list[dict[str, object]]:
        """Return the mailboxes that were listed, those with the most unread messages first."""
        found: list[dict[str, object]] = []
        for box in self._cache.mailboxes():
            path = self._tree.path(box.ino) if box.complete else None
            if path:
                messages, unseen = self._cache.counts(box.ino)
                shown = printable(shown_path(path))
                found.append({"path": shown, "messages": messages, "unseen": unseen})
        return sorted(found, key=lambda one: (-int(str(one["unseen"])), str(one["path"])))

    def _kept(self) -> list[str]:
        with contextlib.suppress(OSError):
            return sorted(str(path) for path in self._spool.kept.iterdir())
        return []

    def _status(self) -> dict[str, object]:
        config, pool, cache = self._config, self._pool, self._cache
        pool.check_idle()
        messages, bodies, size = cache.totals()
        states = Counter(draft.state for draft in self._spool)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "source": config.account.url,
            "mountpoint": str(config.mountpoint),
            "state": pool.state.value,
            "reason": None if pool.reason is None else printable(pool.reason),
            "since": pool.since.isoformat(timespec="seconds"),
            **self._next_try(),
            "timeout": config.timeout,
            "read_only": config.read_only,
            "connections": {"open": pool.open, "most": pool.current_limit, "limit": pool.limit},
            "push": self._watching.status(),
            "cache": {
                "path": str(cache.directory),
                "deleted": cache.is_gone,
                "bytes": size,
                "limit": config.cache_size,
                "messages": messages,
                "bodies": bodies,
            },
            "spool": str(self._spool.directory),
            "inodes": len(self._kernel),
            "files": {"sending": states["sending"], "unsent": states["unsent"]},
        }

    def _next_try(self) -> dict[str, object]:
        """Return when the next attempt to connect is due: as a time, and in seconds from now."""
        wait = self._pool.retry_in
        if wait is None or math.isinf(wait):
            return {"retry_at": None, "retry_in": None}
        at = datetime.now(UTC) + timedelta(seconds=wait)
        return {"retry_at": at.isoformat(timespec="seconds"), "retry_in": round(wait, 1)}
