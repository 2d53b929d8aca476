"""Decides when to try the next connection, and how many connections there may be.

Pure: its methods take what happened and when, in seconds of a monotonic clock.

A server that asks clients to wait is obeyed, and gets fewer connections from then on, which grow again one by
one. A lost connection is verified at once; only if that fails does the account count as offline. The delay
between attempts grows exponentially, but an attempt comes sooner when a request waits for one or the network
has changed. After a refused login the next attempt comes minutes or hours later, because repeated refusals
may lock the account.
"""

import math
import random
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from imapfs.waiting import Delays

_FIRST_RETRY: Final = 1.0
_MAX_RETRY: Final = 60.0
"""Seconds between attempts."""
_MAX_RETRY_WANTED: Final = 5.0
"""Maximum of the same while a request waits for a connection."""
_REFUSED: Final = (15.0, 60.0, 300.0, 1800.0, 3600.0)
"""Seconds to wait after the first, second, ... consecutive refused login."""
_REFUSALS_FOR_PERSON: Final = 4
"""Consecutive refused logins after which a person probably has to act."""
_FIRST_PAUSE: Final = 5.0
_MAX_PAUSE: Final = 300.0
"""Seconds of a pause for which the server named no time."""
_QUIET: Final = 60.0
"""Seconds without a request to slow down after which pauses start short again."""
_GROWTH: Final = 60.0
_MAX_GROWTH: Final = 960.0
"""Seconds until one more connection is allowed; doubled each time that this proves too early."""


class Connectivity(StrEnum):
    """The state of an account, as `imapfs status` shows it."""

    ONLINE = "online"
    CONNECTING = "connecting"
    """A connection was lost, and the next attempt will show whether the server is still reachable."""
    OFFLINE = "offline"
    THROTTLED = "throttled"
    """The server has asked clients to wait."""


def _jitter() -> float:
    return random.uniform(0.5, 1.0)  # noqa: S311


class Backoff:
    """The state of one account. ``limit`` is the configured maximum number of connections."""

    def __init__(self, limit: int, jitter: Callable[[], float] = _jitter) -> None:
        self._limit = limit
        self._jitter = jitter
        self._allowed = limit
        self._allowed_at = 0.0
        """When there were ``_allowed`` connections; the number has grown since."""
        self._growth = _GROWTH
        self._condition = Connectivity.ONLINE
        """The state apart from pauses."""
        self._since = 0.0
        self._reason = ""
        self._patience_until = -math.inf
        self._retries = Delays(_FIRST_RETRY, _MAX_RETRY)
        self._has_failed = False
        self._failed_at = -math.inf
        self._refusals = 0
        self._retry_at = -math.inf
        self._earliest_retry = -math.inf
        """No request makes an attempt come sooner than this."""
        self._pauses = Delays(_FIRST_PAUSE, _MAX_PAUSE)
        self._pause_until = -math.inf
        self._paused_at = -math.inf
        self._pause_reason = ""

    # -- state ---------------------------------------------------------------------------------------------

    def state(self, now: float) -> Connectivity:
        """Return the state of the account."""
        return Connectivity.THROTTLED if now < self._pause_until else self._condition

    def reason(self, now: float) -> str:
        """Return why the account is in its state; "" while it is online."""
        match self.state(now):
            case Connectivity.ONLINE:
                return ""
            case Connectivity.THROTTLED:
                return self._pause_reason
            case _:
                return self._reason

    def since(self, now: float) -> float:
        """Return when the state began."""
        return self._paused_at if now < self._pause_until else self._since

    def retry_at(self, now: float) -> float | None:
        """Return when the next attempt is due: None while online, infinity for never."""
        match self.state(now):
            case Connectivity.ONLINE:
                return None
            case Connectivity.THROTTLED:
                return self._pause_until
            case _:
                return max(now, self._retry_at)

    def due_in(self, now: float) -> float:
        """Return the seconds until a lost connection is to be replaced; infinity where none was lost."""
        if self._condition is Connectivity.ONLINE:
            return math.inf
        return max(0.0, self._retry_at - now, self._pause_until - now)

    def allowed(self, now: float) -> int:
        """Return the maximum number of connections at present."""
        if self._allowed >= self._limit:
            return self._limit
        return min(self._limit, self._allowed + int((now - self._allowed_at) / self._growth))

    def grows_in(self, now: float) -> float:
        """Return the seconds until one more connection is allowed; infinity if the limit is reached."""
        if self.allowed(now) >= self._limit:
            return math.inf
        return self._growth - (now - self._allowed_at) % self._growth

    def patience(self, now: float) -> float:
        """Return the seconds for which a request should wait for the present attempt to connect; 0 for
        none."""
        return max(0.0, self._patience_until - now) if self._condition is Connectivity.CONNECTING else 0.0

    @property
    def is_online(self) -> bool:
        """Whether the server was reachable when last heard of; true also during a pause."""
        return self._condition is Connectivity.ONLINE

    @property
    def needs_person(self) -> bool:
        """Whether logins are refused, and will hardly succeed until a person acts."""
        return self._refusals >= _REFUSALS_FOR_PERSON or (self._refusals > 0 and self._retry_at == math.inf)

    @property
    def expects_success(self) -> bool:
        """Whether no attempt has failed since the last success."""
        return not self._has_failed

    # -- events --------------------------------------------------------------------------------------------

    def lost(self, reason: str, now: float, patience: float) -> None:
        """A working connection was lost: an attempt is due at once, to find out what that means.

        Requests may wait for it for ``patience`` seconds, or less if another loss allowed less.
        """
        if self._condition is Connectivity.ONLINE:
            self._condition, self._since, self._reason = Connectivity.CONNECTING, now, reason
            self._retry_at, self._patience_until = now, math.inf
        self._patience_until = min(self._patience_until, now + patience)

    def failed(self, reason: str, now: float, *, refused: bool = False) -> None:
        """An attempt to connect failed, and no other connection works. ``refused``: the login was refused."""
        wait = self._retries.next() * self._jitter()
        self._earliest_retry = now + min(wait, _MAX_RETRY_WANTED)
        if refused:
            wait = _REFUSED[min(self._refusals, len(_REFUSED) - 1)]
            self._refusals += 1
            self._earliest_retry = now + wait
        self._has_failed = True
        self._failed_at = now
        self._retry_at = now + wait
        self._reason = reason
        if self._condition is not Connectivity.OFFLINE:
            if self._condition is Connectivity.ONLINE:
                self._since = now
            self._condition = Connectivity.OFFLINE

    def give_up(self) -> None:
        """Never try again."""
        self._retry_at = self._earliest_retry = math.inf

    def succeeded(self, now: float) -> None:
        """The server accepted a connection, or answered on one."""
        if self._condition is not Connectivity.ONLINE:
            self._condition, self._since, self._reason = Connectivity.ONLINE, now, ""
        self._retries.reset()
        self._has_failed = False
        self._refusals = 0
        self._retry_at = self._earliest_retry = -math.inf

    def limit_reached(self, working: int, now: float) -> None:
        """The server refused another connection beside ``working`` ones: so many are allowed for a while."""
        allowed = max(1, working)
        if allowed < self._limit:
            self._growth = _GROWTH if self.allowed(now) == self._limit else min(_MAX_GROWTH, self._growth * 2)
            self._allowed, self._allowed_at = allowed, now

    def throttled(self, wait: float, reason: str, working: int, now: float) -> None:
        """The server asks to wait for ``wait`` seconds, 0 for an unspecified time, with ``working``
        connections."""
        if now >= self._pause_until:
            if now - self._pause_until > _QUIET:
                self._pauses.reset()
            self._paused_at = now
            unspecified = self._pauses.next()
            wait = wait or unspecified
            self.limit_reached(working // 2, now)
        # Otherwise another connection was told the same, and once is enough.
        if now + wait > self._pause_until:
            self._pause_until, self._pause_reason = now + wait, reason

    def wanted(self, now: float) -> None:
        """A request waits for a connection: the next attempt comes sooner, within limits."""
        self._retry_at = min(self._retry_at, max(now, self._earliest_retry))

    def network_changed(self, now: float) -> None:
        """The network changed, or a person wants another attempt: what failed before may work now."""
        self._pause_until = min(self._pause_until, now)
        if not self._refusals and self._retry_at < math.inf:
            self._retries.reset()
            self._has_failed = False
            self._retry_at = min(self._retry_at, max(now, self._failed_at + _FIRST_RETRY))
