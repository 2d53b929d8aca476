"""Prefetching bodies: a program that reads one message after another should not wait for each.

A scan begins when several messages of one mailbox without cached bodies are opened within a short time. From
then on the messages that follow are fetched in batches over several connections. Each further open moves the
window ahead; when the program opens no more messages, nothing more is fetched.

A scan goes by inode number (``grep -r``, ``find``) or by name (``rsync``). The window is limited in bytes. A
daily budget limits all windows together, so that no indexing program downloads a whole account unnoticed.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from imapfs.model import Ino
from imapfs.store.cache import Cache
from imapfs.store.rows import Node

_MIN_MISSES: Final = 3
"""Number of messages without cached bodies, opened in a row, that make a scan."""
_IDLE: Final = 2.0
"""Seconds without an open after which a scan is over."""
_MAX_BATCH: Final = 500
_BATCHES: Final = 4
"""Batches in a window: one for each connection, as many as there are by default."""
_FIRST_WINDOW: Final = 2 << 20
"""Bytes of the first window of a scan; doubled with each batch, up to"""
_MAX_WINDOW: Final = 16 << 20
_DAY: Final = 86400.0


class _Scan:
    """A program that reads one mailbox."""

    def __init__(self) -> None:
        self.at = 0.0
        self.opened: list[Node] = []
        self.running = False
        self.misses = 0
        """Messages opened in a row that were not prefetched, although others were."""
        self.by_name = False
        self.cursor: Node | None = None
        """The last message that was fetched or requested."""
        self.window = _FIRST_WINDOW
        self.prefetched: OrderedDict[Ino, int] = OrderedDict()
        """Bytes of each message that was requested and not opened yet."""
        self.prefetched_bytes = 0

    def take(self, ino: Ino) -> None:
        """Note that a message was opened."""
        self.prefetched_bytes -= self.prefetched.pop(ino, 0)


class Prefetcher:
    """Detects scans and prefetches for them.

    ``fetch(nodes)`` fetches messages of one mailbox together, in the background. ``budget``: maximum bytes
    per day; 0 for no prefetching.
    """

    def __init__(self, cache: Cache, fetch: Callable[[Sequence[Node]], None], budget: int) -> None:
        self._cache = cache
        self._fetch = fetch
        self._budget = budget
        self._spent = 0
        self._day = time.monotonic()
        self._scans: dict[Ino, _Scan] = {}

    def opened(self, node: Node) -> None:
        """Note that a message is opened, whether it was prefetched or has to be fetched now."""
        if not self._budget:
            return
        now = time.monotonic()
        scan = self._scans.get(node.parent)
        if scan is None or now - scan.at > _IDLE:
            if node.crc is not None:
                return  # a cached message needs no prefetching, and shows nothing about others
            self._scans = {ino: s for ino, s in self._scans.items() if now - s.at <= _IDLE}
            scan = self._scans[node.parent] = _Scan()
        scan.at = now
        if scan.running:
            scan.misses = 0 if node.ino in scan.prefetched or node.crc is not None else scan.misses + 1
            if scan.misses >= _MIN_MISSES:
                # The scan goes in another order than expected.
                scan.running, scan.opened = False, []
        scan.take(node.ino)
        if not scan.running:
            if node.crc is None:
                scan.opened.append(node)
            del scan.opened[:-_MIN_MISSES]
            if len(scan.opened) < _MIN_MISSES:
                return
            scan.running, scan.misses = True, 0
            scan.by_name = _goes_by_name(scan.opened)
            scan.cursor = node
        self._top_up(scan)

    def _top_up(self, scan: _Scan) -> None:
        while (
            scan.prefetched_bytes < scan.window
            and len(scan.prefetched) < _BATCHES * _MAX_BATCH
            and scan.cursor is not None
            and (left := self._left()) > 0
        ):
            found = self._cache.uncached_after(scan.cursor, scan.by_name, _MAX_BATCH)
            batch: list[Node] = []
            size = 0
            for node in found:
                if size + node.size > min(left, scan.window // _BATCHES) and (batch or node.size > left):
                    break
                batch.append(node)
                size += node.size
            if not batch:
                scan.cursor = None
                return
            scan.cursor = batch[-1]
            for node in batch:
                scan.prefetched[node.ino] = node.size
            scan.prefetched_bytes += size
            self._spent += size
            # The longer a scan goes on, the more it gets.
            scan.window = min(_MAX_WINDOW, scan.window * 2)
            self._fetch(batch)

    def _left(self) -> int:
        """Return the bytes that may still be prefetched today."""
        now = time.monotonic()
        if now - self._day > _DAY:
            self._day, self._spent = now, 0
        return self._budget - self._spent


def _goes_by_name(opened: Sequence[Node]) -> bool:
    """Return whether a scan goes by name, and not by inode number."""
    inos = [node.ino for node in opened]
    names = [node.name or b"" for node in opened]
    return inos != sorted(inos) and names == sorted(names)
