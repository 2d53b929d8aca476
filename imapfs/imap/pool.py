"""The connections of one account: how many, which one next, and what happens when there is none.

The only mutable state is in `SessionPool`, touched on the trio thread alone. Sessions work in threads.

INVARIANTS: a session is in ``_idle`` or lent to exactly one task; ``_open`` counts both and the ones being
made, and is at most ``_limit``. A session that is not alive is never in ``_idle``.
"""

import logging
import math
import random
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, TypeVar

import trio

from imapfs.errors import AuthenticationFailed, ConnectionLost, TlsError
from imapfs.imap.session import Session
from imapfs.imap.wire import tls_context
from imapfs.model import Account, Secret

log = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_FIRST: Final = 1.0
_BACKOFF_MOST: Final = 60.0


class SessionPool:
    """Up to ``limit`` connections to ``account``, made when needed and kept.

    ``timeout`` in seconds bounds each wait for the server. After a failed connection attempt the pool is
    offline: for a while that grows with each failure, every request fails at once with the reason.
    """

    def __init__(self, account: Account, password: Secret, limit: int, timeout: float) -> None:
        self._account = account
        self._password = password
        self._timeout = timeout
        self._context: ssl.SSLContext = tls_context(account)
        self._idle: list[Session] = []
        self._lent: set[Session] = set()
        self._open = 0
        self._limit = limit
        self._turn = trio.Condition()
        self._threads = trio.CapacityLimiter(limit)
        self._closed = False
        self._failures = 0
        self._retry_at = -math.inf
        self._refused: AuthenticationFailed | TlsError | None = None
        self.reason: str | None = None
        """Why the account is offline; None while it is online."""
        self.since = datetime.now(UTC)
        """When the account went on- or offline."""

    @property
    def open(self) -> int:
        return self._open

    @property
    def limit(self) -> int:
        return self._limit

    async def run(
        self, work: Callable[[Session], T], mailbox: bytes | None = None, *, repeat: bool = True
    ) -> T:
        """Run ``work`` in a thread with a session, if possible one that has ``mailbox`` selected.

        With ``repeat``, ``work`` is tried once more with a new connection if a kept one turns out to be
        dead; without, that is for the caller, as its command may have been carried out. Raises what ``work``
        raises, and ConnectionLost, AuthenticationFailed or TlsError.
        """
        while True:
            session, kept = await self._take(mailbox)
            try:
                return await trio.to_thread.run_sync(work, session, limiter=self._threads)
            except ConnectionLost as error:
                if not (kept and repeat) or self._closed:
                    raise
                log.info("connection lost, trying again with a new one: %s", error)
                # The others were made in the same past and have most likely died of the same cause.
                for other in self._idle:
                    other.abort()
            finally:
                await self._give_back(session)

    async def _take(self, mailbox: bytes | None) -> tuple[Session, bool]:
        """A session and whether it is one that was kept (and may have died meanwhile)."""
        async with self._turn:
            while True:
                if self._closed:
                    raise ConnectionLost("the mount is ending")
                self._drop_dead()
                if self._idle:
                    same = [s for s in self._idle if s.selected == mailbox]
                    if same or self._open >= self._limit or self._offline():
                        # Last used first: what lies longest stays free to be closed by the server.
                        session = same[-1] if same else self._idle[-1]
                        self._idle.remove(session)
                        self._lent.add(session)
                        return session, True
                if self._open < self._limit:
                    break
                await self._turn.wait()
            self._raise_if_offline()
            self._open += 1
        session = await self._connect()
        self._lent.add(session)
        return session, False

    def _drop_dead(self) -> None:
        for session in [s for s in self._idle if not s.alive]:
            self._idle.remove(session)
            self._open -= 1
            session.close()

    def _offline(self) -> bool:
        return self._refused is not None or time.monotonic() < self._retry_at

    def _raise_if_offline(self) -> None:
        if self._refused is not None:
            raise self._refused
        if time.monotonic() < self._retry_at:
            raise ConnectionLost(f"offline: {self.reason}")

    async def _connect(self) -> Session:
        try:
            session = await self._connect_in_thread()
        except BaseException as error:
            with trio.CancelScope(shield=True):
                async with self._turn:
                    self._open -= 1
                    self._turn.notify_all()
            if isinstance(error, (AuthenticationFailed, ConnectionLost)):
                self._went_offline(error)
            raise
        if self.reason is not None:
            log.info("online again: %s", self._account.url)
            self.reason, self.since = None, datetime.now(UTC)
        self._failures = 0
        self._retry_at = -math.inf
        return session

    async def _connect_in_thread(self) -> Session:
        """Connect; can be cancelled, as a name look-up or a handshake may take its whole timeout."""
        abandoned = False

        def connect() -> Session:
            session = Session.connect(self._account, self._password, self._context, self._timeout)
            if abandoned:
                session.close()
            return session

        try:
            return await trio.to_thread.run_sync(connect, limiter=self._threads, abandon_on_cancel=True)
        except trio.Cancelled:
            abandoned = True
            raise

    def _went_offline(self, error: AuthenticationFailed | ConnectionLost) -> None:
        if isinstance(error, (AuthenticationFailed, TlsError)):
            # Trying again would not help, and could lock the account.
            self._refused = error
        wait = min(_BACKOFF_MOST, _BACKOFF_FIRST * 2**self._failures) * random.uniform(0.5, 1.0)  # noqa: S311
        self._failures += 1
        self._retry_at = time.monotonic() + wait
        if self._open:
            # Other connections work: most likely the server's limit is reached, so live with what there is.
            log.info("no further connection, going on with %d: %s", self._open, error)
            return
        if self.reason is None:
            self.since = datetime.now(UTC)
            log.warning("offline: %s", error)
        self.reason = str(error)

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
