"""Fetching ahead: a program that reads one message after another should not wait for each.

A scan is noticed when several bodies that are not cached are opened in one mailbox within a short time. From
then on, messages after the one being read are fetched in batches over several connections, and every further
open shows that the scan goes on and moves the window. When nothing is opened any more, nothing is fetched.

The order of a scan is that of inodes (``grep -r``, ``find``) or of names (``rsync``). The window is bounded
in bytes; what it may add up to within a day is the budget, so that no crawler downloads an account unasked.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from imapfs.model import Ino
from imapfs.store.cache import Cache
from imapfs.store.rows import Node

_NOTICE: Final = 3
"""Uncached bodies opened in a row that make a scan."""
_IDLE: Final = 2.0
"""Seconds without an open after which a scan is over."""
_BATCH_MESSAGES: Final = 500
_BATCHES: Final = 4
"""Batches that a window is made of: one each for as many connections as there are by default."""
_WINDOW_FIRST: Final = 2 << 20
_WINDOW_MOST: Final = 16 << 20
_DAY: Final = 86400.0


class _Scan:
    """What is being read in one mailbox."""

    def __init__(self) -> None:
        self.at = 0.0
        self.opened: list[Node] = []
        self.running = False
        self.misses = 0
        """Messages opened in a row that were not fetched ahead, though others were."""
        self.by_name = False
        self.cursor: Node | None = None
        """Up to where messages were fetched or asked for."""
        self.window = _WINDOW_FIRST
        self.ahead: OrderedDict[Ino, int] = OrderedDict()
        """Bytes of messages asked for and not opened yet."""
        self.ahead_bytes = 0

    def take(self, ino: Ino) -> None:
        self.ahead_bytes -= self.ahead.pop(ino, 0)


class FetchAhead:
    """Notices scans. ``fetch(nodes)`` has messages of one mailbox fetched, together; ``budget`` is in bytes a
    day, and 0 turns it off."""

    def __init__(self, cache: Cache, fetch: Callable[[Sequence[Node]], None], budget: int) -> None:
        self._cache = cache
        self._fetch = fetch
        self._budget = budget
        self._spent = 0
        self._day = time.monotonic()
        self._scans: dict[Ino, _Scan] = {}

    def opened(self, node: Node) -> None:
        """A message is opened, which may have been fetched ahead, and is to be fetched now if it was not."""
        if not self._budget:
            return
        now = time.monotonic()
        scan = self._scans.get(node.parent)
        if scan is None or now - scan.at > _IDLE:
            if node.crc is not None:
                return  # what is cached needs no help, and says nothing about what is not
            self._scans = {ino: s for ino, s in self._scans.items() if now - s.at <= _IDLE}
            scan = self._scans[node.parent] = _Scan()
        scan.at = now
        if scan.running:
            scan.misses = 0 if node.ino in scan.ahead or node.crc is not None else scan.misses + 1
            if scan.misses >= _NOTICE:
                # It goes another way than was thought.
                scan.running, scan.opened = False, []
        scan.take(node.ino)
        if not scan.running:
            if node.crc is None:
                scan.opened.append(node)
            del scan.opened[:-_NOTICE]
            if len(scan.opened) < _NOTICE:
                return
            scan.running, scan.misses = True, 0
            scan.by_name = _goes_by_name(scan.opened)
            scan.cursor = node
        self._top_up(scan)

    def _top_up(self, scan: _Scan) -> None:
        while (
            scan.ahead_bytes < scan.window
            and len(scan.ahead) < _BATCHES * _BATCH_MESSAGES
            and scan.cursor is not None
            and (left := self._left()) > 0
        ):
            found = self._cache.uncached_after(scan.cursor, scan.by_name, _BATCH_MESSAGES)
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
                scan.ahead[node.ino] = node.size
            scan.ahead_bytes += size
            self._spent += size
            # A scan that goes on deserves more.
            scan.window = min(_WINDOW_MOST, scan.window * 2)
            self._fetch(batch)

    def _left(self) -> int:
        """Bytes that may still be fetched ahead today."""
        now = time.monotonic()
        if now - self._day > _DAY:
            self._day, self._spent = now, 0
        return self._budget - self._spent


def _goes_by_name(opened: Sequence[Node]) -> bool:
    """Whether a scan goes by name rather than by inode; by inode if it is neither."""
    inos = [node.ino for node in opened]
    names = [node.name or b"" for node in opened]
    return inos != sorted(inos) and names == sorted(names)
