"""The connections of one account: how many, which one next, and what happens when there is none.

The only mutable state is in `SessionPool`, touched on the trio thread alone. Sessions work in threads.

INVARIANTS: a session is in ``_idle`` or in ``_lent``, to exactly one task; ``_open`` counts both and the
``_connecting`` ones, and is at most ``_limit``.

Whoever needs a session and cannot have a new one waits for one that is open, as long as there is one: at the
server's limit of connections things take longer but do not fail. Only with none open does a request fail.

Watchers have sessions that nobody else needs, and give them back when somebody does.
"""

import contextlib
import logging
import math
import random
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Final, NoReturn, Protocol, TypeVar

import trio

from imapfs.errors import AuthenticationFailed, ConnectionLost
from imapfs.imap.connect import tls_context
from imapfs.imap.session import Session
from imapfs.model import Account, CredentialProvider

log = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_FIRST: Final = 1.0
_BACKOFF_MOST: Final = 60.0
_BACKOFF_REFUSED: Final = 15.0
"""Seconds to wait at least after a refused login, for an account may be locked after a few of them."""
_REFUSALS: Final = 4
"""Refusals in a row after which a password that was good once counts as changed."""


_CALM: Final = 2.0
"""Seconds without a want of connections after which a watcher may have one again: at first, and"""
_CALM_MOST: Final = 16.0
"""at most, as it grows with each watcher that had one for less than that."""


class Watcher(Protocol):
    """Who has a session only until somebody else needs it."""

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The one with the lowest is the first to give its session back."""

    def run(self, session: Session) -> None:
        """In a thread: use the session, until told to stop."""

    def stop(self) -> None:
        """On the trio thread: make `run` return soon."""


class SessionPool:
    """Up to ``limit`` connections to ``account``, made when needed and kept.

    ``timeout`` in seconds bounds each wait for the server. After a failed attempt no other is made for a
    while that grows with each failure. A password that was never accepted is tried once only; one that was
    is given up after several refusals in a row, as servers also refuse a login when they are busy.
    """

    def __init__(self, account: Account, credentials: CredentialProvider, limit: int, timeout: float) -> None:
        self._account = account
        self._credentials = credentials
        self._timeout = timeout
        self._context: ssl.SSLContext = tls_context(account)
        self._idle: list[Session] = []
        self._lent: set[Session] = set()
        self._open = 0
        self._connecting = 0
        self._limit = limit
        self._turn = trio.Condition()
        self._online = trio.Event()
        self._threads = trio.CapacityLimiter(limit)
        self._watching: dict[Session, tuple[Watcher, float]] = {}
        """Those that were not told yet to give their sessions back, and since when they have them."""
        self._leaving: set[Session] = set()
        """Sessions of watchers that were."""
        self._waiting = 0
        """Requests that wait for a session."""
        self._calm = _CALM
        self._calm_at = -math.inf
        """When watchers may have sessions again."""
        self._closed = False
        self._failures = 0
        self._retry_at = -math.inf
        self._beside = False
        """Whether the last attempt failed while other connections were open: perhaps for their number."""
        self._why = ""
        """What the last attempt to connect failed of."""
        self._accepted = False
        """Whether the password was accepted once."""
        self._refusals = 0
        """Refused logins in a row, while no connection was open."""
        self._refused: AuthenticationFailed | None = None
        """Why no further login will be tried."""
        self.reason: str | None = None
        """Why the account is offline; None while it is online."""
        self.since = datetime.now(UTC)
        """When the account went on- or offline."""
        self.on_state: Callable[[], None] = lambda: None
        """Called when `reason` or `needs_person` has changed."""

    @property
    def needs_person(self) -> bool:
        """Whether no login will be tried before somebody sets the credentials right."""
        return self._refused is not None

    @property
    def open(self) -> int:
        return self._open

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def watch_limit(self) -> int:
        """Most sessions that watchers may have, so that they are rarely in anybody's way."""
        return max(1, self._limit - 2)

    @property
    def retry_in(self) -> float:
        """Seconds until another attempt to connect may be made."""
        return max(0.0, self._retry_at - time.monotonic())

    async def came_online(self) -> None:
        """Wait until the account comes online again."""
        await self._online.wait()

    async def run(
        self, work: Callable[[Session], T], mailbox: bytes | None = None, *, repeat: bool = True
    ) -> T:
        """Run ``work`` in a thread with a session, if possible one that has ``mailbox`` selected.

        With ``repeat``, ``work`` is tried once more with a new connection if a kept one turns out to be
        dead; without, that is for the caller, as its command may have been carried out. Raises what ``work``
        raises, and ConnectionLost (TlsError among them) or AuthenticationFailed.
        """
        while True:
            session, kept = await self._take(mailbox)
            try:
                return await trio.to_thread.run_sync(work, session, limiter=self._threads)
            except ConnectionLost as error:
                self._doubt_watchers()
                if not (kept and repeat) or self._closed:
                    raise
                log.info("connection lost, trying again with a new one: %s", error)
                # The others were made in the same past and have most likely died of the same cause.
                for other in self._idle:
                    other.abort()
            finally:
                await self._give_back(session)

    async def watch(self, watcher: Watcher, mailbox: bytes | None) -> None:
        """Let ``watcher`` run in a thread with a session, as soon as there is one that nobody else needs.

        At most `watch_limit` at once. Raises as `run` does, but nothing is repeated.
        """
        session, _ = await self._take(mailbox, spare=True)
        self._watching[session] = watcher, time.monotonic()
        try:
            await trio.to_thread.run_sync(watcher.run, session, limiter=self._threads)
        except ConnectionLost:
            if not self._closed:
                raise
        finally:
            self._watching.pop(session, None)
            self._leaving.discard(session)
            await self._give_back(session)

    def _doubt_watchers(self) -> None:
        """Have watchers find out whether their connections live, of which they would not notice for long."""
        for watcher, _ in self._watching.values():
            watcher.stop()

    def _ask_watcher(self) -> None:
        """Have a session given back by a watcher, if not enough are on their way for those who wait."""
        now = time.monotonic()
        if self._watching and len(self._leaving) < self._waiting:
            session = min(self._watching, key=lambda s: self._watching[s][0].rank)
            watcher, since = self._watching.pop(session)
            self._leaving.add(session)
            watcher.stop()
            self._calm = min(_CALM_MOST, self._calm * 2) if now - since < _CALM_MOST else _CALM
        self._calm_at = now + self._calm

    async def _take(self, mailbox: bytes | None, *, spare: bool = False) -> tuple[Session, bool]:
        """A session and whether it is one that was kept (and may have died meanwhile).

        ``spare``: one that nobody else needs.
        """
        while True:
            async with self._turn:
                session = await self._wait_for_one(mailbox, spare)
                if session is not None:
                    self._idle.remove(session)
                    self._lent.add(session)
                    return session, True
                self._open += 1
                self._connecting += 1
            try:
                return await self._connect(), False
            except (AuthenticationFailed, ConnectionLost):
                if not self._open:
                    raise

    async def _wait_for_one(self, mailbox: bytes | None, spare: bool) -> Session | None:
        """An idle session to be used, or None when it is time to make one."""
        while True:
            if self._closed:
                raise ConnectionLost("the mount is ending")
            self._drop_dead()
            calm_in = self._calm_at - time.monotonic() if spare else 0.0
            if spare and self._open and (self._waiting or calm_in > 0):
                with trio.move_on_after(calm_in if calm_in > 0 else math.inf):
                    await self._turn.wait()
                continue
            if self._idle:
                # To select another mailbox costs one round trip, to connect five. Of those that have it
                # selected the last used, so that what lies longest can be closed by the server; of the
                # others the one that lies longest, as its mailbox is the least wanted.
                same = [s for s in self._idle if s.selected == mailbox]
                return same[-1] if same else self._idle[0]
            if self._may_connect():
                return None
            if not self._open:
                self._raise_offline()
            # Until a session is given back, or another attempt may be made.
            with self._counted(spare), trio.move_on_after(self.retry_in or math.inf):
                await self._turn.wait()

    @contextlib.contextmanager
    def _counted(self, spare: bool) -> Iterator[None]:
        """Somebody waits, and unless it is a watcher, watchers have to go."""
        if spare:
            yield
            return
        self._waiting += 1
        try:
            self._ask_watcher()
            yield
        finally:
            self._waiting -= 1

    def _may_connect(self) -> bool:
        if self._open >= self._limit or self._refused is not None:
            return False
        if time.monotonic() < self._retry_at and (self._open or not self._beside):
            return False
        # Where it is doubtful whether the server lets anybody in, one attempt at a time is enough.
        return not self._connecting or (self._accepted and not self._failures)

    def _drop_dead(self) -> None:
        for session in [s for s in self._idle if not s.alive]:
            self._idle.remove(session)
            self._open -= 1
            session.close()

    def _raise_offline(self) -> NoReturn:
        self._note_offline()
        if self._refused is not None:
            # The same object for everybody: without this its traceback would grow each time.
            raise self._refused.with_traceback(None)
        raise ConnectionLost(f"offline: {self._why}")

    def _note_offline(self) -> None:
        if self.reason is None:
            self.since = datetime.now(UTC)
            log.warning("offline: %s", self._why)
        self.reason = self._why
        self.on_state()

    async def _connect(self) -> Session:
        """A new session, lent; whoever calls has counted it as open and connecting."""
        session: Session | None = None
        try:
            session = await self._connect_in_thread()
            if self._closed:
                raise ConnectionLost("the mount is ending")
        except BaseException as error:
            with trio.CancelScope(shield=True):
                async with self._turn:
                    self._open -= 1
                    self._connecting -= 1
                    if isinstance(error, (AuthenticationFailed, ConnectionLost)) and not self._closed:
                        self._failed(error)
                    self._turn.notify_all()
            if session is not None:
                session.abort()
                session.close()
            raise
        self._lent.add(session)
        self._connecting -= 1
        if self.reason is not None:
            log.info("online again: %s", self._account.url)
            self.reason, self.since = None, datetime.now(UTC)
            self._online.set()
            self._online = trio.Event()
            self.on_state()
        self._accepted = True
        self._failures = self._refusals = 0
        self._retry_at = -math.inf
        with trio.CancelScope(shield=True):
            async with self._turn:
                self._turn.notify_all()
        return session

    async def _connect_in_thread(self) -> Session:
        """Connect; can be cancelled, as a name look-up or a handshake may take its whole timeout."""
        abandoned = False

        def connect() -> Session:
            session = Session.connect(self._account, self._credentials, self._context, self._timeout)
            if abandoned:
                session.close()
            return session

        try:
            return await trio.to_thread.run_sync(connect, limiter=self._threads, abandon_on_cancel=True)
        except trio.Cancelled:
            abandoned = True
            raise

    def _failed(self, error: AuthenticationFailed | ConnectionLost) -> None:
        """Note a failed attempt to connect."""
        wait = min(_BACKOFF_MOST, _BACKOFF_FIRST * 2 ** min(self._failures, 6))
        self._why = str(error)
        self._failures += 1
        self._beside = bool(self._idle or self._lent)
        if isinstance(error, AuthenticationFailed):
            wait = max(wait, _BACKOFF_REFUSED)
            # Beside connections that work it is their number that is refused, whatever the server says.
            self._refusals += not self._beside
            if not self._accepted or self._refusals >= _REFUSALS:
                self._refused = error
        self._retry_at = time.monotonic() + wait * random.uniform(0.5, 1.0)  # noqa: S311
        if self._open:
            log.info("no further connection, going on with %d: %s", self._open, error)
        else:
            self._note_offline()

    async def _give_back(self, session: Session) -> None:
        with trio.CancelScope(shield=True):
            async with self._turn:
                self._lent.discard(session)
                if session.alive and not self._closed:
                    self._idle.append(session)
                else:
                    session.abort()
                    session.close()
                    self._open -= 1
                self._turn.notify_all()

    async def close(self) -> None:
        """End all connections: idle ones with LOGOUT within a second, those at work at once."""
        self._closed = True
        for session in self._lent:
            session.abort()
        idle, self._idle = self._idle, []
        with trio.CancelScope(shield=True):
            async with self._turn:
                self._open -= len(idle)
                self._turn.notify_all()
            with trio.move_on_after(1) as scope:
                async with trio.open_nursery() as nursery:
                    for session in idle:
                        nursery.start_soon(_close, session)
            if scope.cancelled_caught:
                log.info("the server did not answer LOGOUT in time")


async def _close(session: Session) -> None:
    try:
        await trio.to_thread.run_sync(session.close, abandon_on_cancel=True)
    finally:
        session.abort()  # wakes the thread if it still waits for an answer
