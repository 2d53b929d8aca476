"""When the next connection may be tried, how many there may be, and why not sooner or more.

Pure: it is told what happened and when (seconds of a clock that only grows), and decides nothing by itself.

A server that asks to wait is waited for, and gets fewer connections from then on, which grow again one at a
time. What is lost is verified at once, and only if that fails the account counts as offline. Attempts are
spaced out exponentially, but come sooner where somebody waits for one or the network has changed. A refused
password is tried again after minutes and hours only, as an account may be locked after a few refusals.
"""

import math
import random
from collections.abc import Callable
from enum import StrEnum
from typing import Final

_FIRST: Final = 1.0
_MOST: Final = 60.0
_WANTED: Final = 5.0
"""Seconds between two attempts as long as somebody wants one."""
_REFUSED: Final = (15.0, 60.0, 300.0, 1800.0, 3600.0)
"""Seconds after the first, second, ... refused login in a row."""
_HOPELESS: Final = 4
"""Refused logins in a row after which it is hardly the server's mood."""
_PAUSE_FIRST: Final = 5.0
_PAUSE_MOST: Final = 300.0
"""Seconds of a pause that the server did not name."""
_QUIET: Final = 60.0
"""Seconds without another request to slow down after which the pauses begin short again."""
_GROW: Final = 60.0
_GROW_MOST: Final = 960.0
"""Seconds after which there may be one connection more; doubled each time that this was too early."""


class Connectivity(StrEnum):
    """How an account is, as `imapfs status` says it."""

    ONLINE = "online"
    CONNECTING = "connecting"
    """A connection was lost; whether that means anything is being found out."""
    OFFLINE = "offline"
    THROTTLED = "throttled"
    """The server has asked to wait."""


def _jitter() -> float:
    return random.uniform(0.5, 1.0)  # noqa: S311


class Backoff:
    """The account's state. ``limit`` is the most connections that there may ever be."""

    def __init__(self, limit: int, jitter: Callable[[], float] = _jitter) -> None:
        self._limit = limit
        self._jitter = jitter
        self._most = limit
        self._most_at = 0.0
        self._grow = _GROW
        self._trouble = Connectivity.ONLINE
        """What the state is when there is no pause."""
        self._since = 0.0
        self._why = ""
        self._patience_until = -math.inf
        self._failures = 0
        self._refusals = 0
        self._failed_at = -math.inf
        self._retry_at = -math.inf
        self._hurried_at = -math.inf
        """Before this nobody's wish makes an attempt come sooner."""
        self._pause_until = -math.inf
        self._paused_at = -math.inf
        self._pause_why = ""
        self._pauses = 0

    # -- what is so ----------------------------------------------------------------------------------------

    def state(self, now: float) -> Connectivity:
        return Connectivity.THROTTLED if now < self._pause_until else self._trouble

    def why(self, now: float) -> str:
        """What the state is due to; "" while it is online."""
        match self.state(now):
            case Connectivity.ONLINE:
                return ""
            case Connectivity.THROTTLED:
                return self._pause_why
            case _:
                return self._why

    def since(self, now: float) -> float:
        """When the state began."""
        return self._paused_at if now < self._pause_until else self._since

    def retry_at(self, now: float) -> float | None:
        """When something is tried next; None while it is online, infinite where nothing will be."""
        match self.state(now):
            case Connectivity.ONLINE:
                return None
            case Connectivity.THROTTLED:
                return self._pause_until
            case _:
                return max(now, self._retry_at)

    def due_in(self, now: float) -> float:
        """Seconds until a connection that was lost is to be replaced; infinite where none is."""
        if self._trouble is Connectivity.ONLINE:
            return math.inf
        return max(0.0, self._retry_at - now, self._pause_until - now)

    def most(self, now: float) -> int:
        """How many connections there may be."""
        if self._most >= self._limit:
            return self._limit
        return min(self._limit, self._most + int((now - self._most_at) / self._grow))

    def more_in(self, now: float) -> float:
        """Seconds until there may be one connection more; infinite where there may be all of them."""
        if self.most(now) >= self._limit:
            return math.inf
        return self._grow - (now - self._most_at) % self._grow

    def may_wait(self, now: float) -> float:
        """Seconds for which a request should wait for a connection that is being made, 0 for not at all."""
        return max(0.0, self._patience_until - now) if self._trouble is Connectivity.CONNECTING else 0.0

    @property
    def is_troubled(self) -> bool:
        """Whether a connection was lost, and no other has proved since that the server is there."""
        return self._trouble is not Connectivity.ONLINE

    @property
    def needs_person(self) -> bool:
        """Whether logins are refused, and will hardly be taken before somebody does something."""
        return self._refusals >= _HOPELESS or (self._refusals > 0 and self._retry_at == math.inf)

    @property
    def is_certain(self) -> bool:
        """Whether the server is expected to let another connection in."""
        return not self._failures

    # -- what happened -------------------------------------------------------------------------------------

    def lost(self, why: str, now: float, patience: float) -> None:
        """A connection that worked is gone: the next is due at once, to find out what that means.

        Requests may wait ``patience`` seconds for it. What is less than the last loss allowed holds.
        """
        if self._trouble is Connectivity.ONLINE:
            self._trouble, self._since, self._why = Connectivity.CONNECTING, now, why
            self._retry_at, self._patience_until = now, math.inf
        self._patience_until = min(self._patience_until, now + patience)

    def failed(self, why: str, now: float, *, refused: bool = False) -> None:
        """An attempt to connect failed, beside no connection that works; ``refused`` if with the login."""
        if refused:
            wait = _REFUSED[min(self._refusals, len(_REFUSED) - 1)]
            self._refusals += 1
            self._hurried_at = now + wait
        else:
            wait = min(_MOST, _FIRST * 2 ** min(self._failures, 10)) * self._jitter()
            self._hurried_at = now + min(wait, _WANTED)
        self._failures += 1
        self._failed_at = now
        self._retry_at = now + wait
        self._why = why
        if self._trouble is not Connectivity.OFFLINE:
            if self._trouble is Connectivity.ONLINE:
                self._since = now
            self._trouble = Connectivity.OFFLINE

    def give_up(self) -> None:
        """Nothing will be tried again by itself."""
        self._retry_at = self._hurried_at = math.inf

    def works(self, now: float) -> None:
        """The server has let a connection in, or answered on one."""
        if self._trouble is not Connectivity.ONLINE:
            self._trouble, self._since, self._why = Connectivity.ONLINE, now, ""
        self._failures = self._refusals = 0
        self._retry_at = self._hurried_at = -math.inf

    def crowded(self, there: int, now: float) -> None:
        """Beside ``there`` connections that work no other was let in: that many are enough for a while."""
        most = max(1, there)
        if most < self._limit:
            self._grow = _GROW if self.most(now) == self._limit else min(_GROW_MOST, self._grow * 2)
            self._most, self._most_at = most, now

    def throttled(self, wait: float, why: str, there: int, now: float) -> None:
        """The server asks to wait ``wait`` seconds, 0 for an unspecified time, with ``there`` connections."""
        if now >= self._pause_until:
            if now - self._pause_until > _QUIET:
                self._pauses = 0
            self._paused_at = now
            if not wait:
                wait = min(_PAUSE_MOST, _PAUSE_FIRST * 2 ** min(self._pauses, 10))
            self._pauses += 1
            self.crowded(there // 2, now)
        # Else another connection was told the same: once is enough.
        if now + wait > self._pause_until:
            self._pause_until, self._pause_why = now + wait, why

    def wanted(self, now: float) -> None:
        """Somebody waits, or would have: the next attempt comes sooner, within reason."""
        self._retry_at = min(self._retry_at, max(now, self._hurried_at))

    def changed(self, now: float) -> None:
        """The network is another one, or the machine was asleep: what failed before may work now."""
        if not self._refusals and self._retry_at < math.inf:
            self._failures = 0
            self._retry_at = min(self._retry_at, max(now, self._failed_at + _FIRST))
