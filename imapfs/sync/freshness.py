"""How old the cached state is: of each mailbox and, under `ROOT`, of the list of mailboxes.

The state is known as of the moment when the server was asked. If the server announces changes, the state is
fresh until it announces one; otherwise it is fresh for as long as the caller accepts.
"""

import math
import time

from imapfs.model import Ino


class Freshness:
    """Tracks ages. All times are seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._asked: dict[Ino, float] = {}
        self._listed: dict[Ino, float] = {}
        """When the messages themselves were last looked at."""
        self._announced: dict[Ino, float] = {}
        """When the server last announced a change."""
        self._watched: dict[Ino, float] = {}
        """Since when it has announced all changes."""
        self._everywhere = math.inf

    def asked(self, what: Ino, at: float) -> None:
        """Note that the state is known as of a time."""
        self._asked[what] = max(at, self._asked.get(what, -math.inf))

    def listed(self, mailbox: Ino, at: float) -> None:
        """Note that a mailbox was synchronised as of a time."""
        self._listed[mailbox] = at
        self.asked(mailbox, at)

    def was_listed(self, mailbox: Ino, since: float) -> bool:
        """Return whether a mailbox was synchronised since a time."""
        return self._listed.get(mailbox, -math.inf) >= since

    def forget(self, what: Ino) -> None:
        """Note that the state is unknown."""
        self._asked.pop(what, None)

    def announced(self, what: Ino) -> None:
        """Note that the server has announced a change."""
        self._announced[what] = time.monotonic()

    def watch(self, what: Ino | None, since: float) -> None:
        """Note that the server announces all changes after ``since``; None: in all mailboxes."""
        if what is None:
            self._everywhere = since
        else:
            self._watched[what] = since

    def unwatch(self, what: Ino | None) -> None:
        """Undo `watch`."""
        if what is None:
            self._everywhere = math.inf
        else:
            self._watched.pop(what, None)

    def is_watched(self, what: Ino) -> bool:
        """Return whether the server announces all changes."""
        return what in self._watched or self._everywhere < math.inf

    def has_news(self, what: Ino) -> bool:
        """Return whether the server has announced a change since it was last asked."""
        return self._asked.get(what, -math.inf) < self._announced.get(what, -math.inf)

    def is_due(self, what: Ino, max_age: float) -> bool:
        """Return whether the server has to be asked, as the state is older than ``max_age`` seconds."""
        asked = self._asked.get(what, -math.inf)
        if self.has_news(what):
            return True
        since = min(self._watched.get(what, math.inf), self._everywhere)
        if max_age > 0 and asked >= since:
            return False
        return time.monotonic() - asked > max_age
