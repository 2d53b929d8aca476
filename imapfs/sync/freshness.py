"""How old what is known is: of each mailbox, and, as `ROOT`, of the list of mailboxes.

Something is known as of the moment in which the server was asked. Where the server tells of changes, that is
good until it tells of one; elsewhere it is good for as long as whoever asks thinks so.
"""

import math
import time

from imapfs.model import Ino


class Freshness:
    """All times are of the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._asked: dict[Ino, float] = {}
        self._told: dict[Ino, float] = {}
        """When the server said last that there is something new."""
        self._watched: dict[Ino, float] = {}
        """Since when it says so by itself."""
        self._everywhere = math.inf

    def asked(self, what: Ino, at: float) -> None:
        """It is known as it was on the server at that time."""
        self._asked[what] = max(at, self._asked.get(what, -math.inf))

    def forget(self, what: Ino) -> None:
        """Whatever was asked before does not count."""
        self._asked.pop(what, None)

    def told(self, what: Ino) -> None:
        """The server has said that there is something new."""
        self._told[what] = time.monotonic()

    def watch(self, what: Ino | None, since: float) -> None:
        """The server tells of all that happens after ``since``; of everything for None."""
        if what is None:
            self._everywhere = since
        else:
            self._watched[what] = since

    def unwatch(self, what: Ino | None) -> None:
        """It does so no more."""
        if what is None:
            self._everywhere = math.inf
        else:
            self._watched.pop(what, None)

    def is_watched(self, what: Ino) -> bool:
        return what in self._watched or self._everywhere < math.inf

    def has_news(self, what: Ino) -> bool:
        """Whether the server has told of something since it was asked last."""
        return self._asked.get(what, -math.inf) < self._told.get(what, -math.inf)

    def is_due(self, what: Ino, max_age: float) -> bool:
        """Whether to ask the server: it is not known as of ``max_age`` seconds ago or less."""
        asked = self._asked.get(what, -math.inf)
        if self.has_news(what):
            return True
        since = min(self._watched.get(what, math.inf), self._everywhere)
        if max_age > 0 and asked >= since:
            return False
        return time.monotonic() - asked > max_age
