"""The connections of one account: how many there are, which one is used next, and what happens without one.

`SessionPool` holds all mutable state, and only the trio thread touches it. Sessions work in threads.
`imapfs.imap.backoff` decides when to try the next connection.

INVARIANTS: a session is either in ``_idle``, or in ``_lent`` and used by exactly one task. ``_open`` counts
both, and the connections being made (``_connecting``); it is at most ``_limit``.

A task that needs a session and cannot have a new one waits for an open one, as long as there is one: at the
server's connection limit, requests take longer but do not fail. While the server asks clients to wait, every
task waits. After a connection is lost, only `keep_connected` makes the next one. Requests wait for that
attempt if it may end soon, and otherwise fail at once, so that no program waits a whole timeout for a network
that is down.

Watchers borrow sessions that no request needs. They return them when a request does, or when the number of
connections must shrink. They never cause an attempt to connect: while the account is offline they wait,
however long that takes. Since they only listen, their connections prove nothing about the server; after a
loss each watcher has to check its own.
"""

import contextlib
import logging
import math
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn, Protocol, TypeVar

import trio

from imapfs.errors import (
    AuthenticationFailed,
    ConnectionLost,
    CredentialUnavailable,
    Offline,
    ServerBusy,
    Throttled,
    TimedOut,
    TlsError,
)
from imapfs.imap.backoff import Backoff, Connectivity
from imapfs.imap.connect import tls_context
from imapfs.imap.session import Session
from imapfs.model import Account, CredentialProvider
from imapfs.waiting import Flag, Signal

log = logging.getLogger(__name__)

T = TypeVar("T")

_GRACE: Final = 2.0
"""Seconds that requests wait for another connection after the network or the server fell silent."""
_LATE: Final = 1.0
"""Seconds beyond the timeout after which an attempt to connect that has not failed by itself is given up."""
_COOLDOWN: Final = 2.0
"""Seconds without a want of connections after which a watcher may have one again: at first, and"""
_MAX_COOLDOWN: Final = 16.0
"""at most, as it grows with each watcher that had one for less than that."""


class Preemptible(Protocol):
    """Who has a session only until somebody else needs it."""

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The one with the lowest is the first to give its session back."""

    def run(self, session: Session) -> None:
        """In a thread: use the session, until told to stop; has heard from the server when it returns."""

    def stop(self) -> None:
        """On the trio thread: make `run` return soon."""


class SessionPool:
    """Up to ``limit`` connections to ``account``, made when needed and kept; `keep_connected` has to run.

    ``timeout`` in seconds bounds each wait for the server. A password that was never accepted is tried once
    only; one that was is tried again, at long intervals, as servers also refuse a login when they are busy.
    """

    def __init__(self, account: Account, credentials: CredentialProvider, limit: int, timeout: float) -> None:
        self._account = account
        self._credentials = credentials
        self._timeout = timeout
        self._context: ssl.SSLContext = tls_context(account)
        self._idle: list[Session] = []
        self._lent: set[Session] = set()
        self._dropped: set[Session] = set()
        """Lent sessions that were ended from here, or are in doubt: what they were at may be tried again."""
        self._open = 0
        self._connecting = 0
        self._limit = limit
        self._turn = trio.Condition()
        self._threads = trio.CapacityLimiter(limit)
        # An attempt that was given up may sit in a name look-up for long.
        self._connecting_threads = trio.CapacityLimiter(limit)
        self._watching: dict[Session, tuple[Preemptible, float]] = {}
        """Those that were not told yet to give their sessions back, and since when they have them."""
        self._leaving: set[Session] = set()
        """Sessions of watchers that were."""
        self._spare = 0
        """How many watchers have a session, or are getting one."""
        self._waiting = 0
        """Requests that wait for a session."""
        self._cooldown = _COOLDOWN
        self._watchers_wait_until = -math.inf
        """When watchers may have sessions again."""
        self._closed = False
        self._backoff = Backoff(limit)
        self._started = time.monotonic()
        self._error: ConnectionLost | AuthenticationFailed | None = None
        """What the last attempt to connect failed of."""
        self._accepted = False
        """Whether the password was accepted once."""
        self._work_for_keep = Flag()
        self._online = Signal()
        """Sent each time that the account comes back online."""
        self.state_changed = Flag()
        """Set when the account goes online or offline, or `needs_person` may have changed.

        One task may wait for it, and read `state`, `reason` and `needs_person` then. The task always sees the
        latest state, and misses one only if the next follows before the task runs. The end of a pause
        requested by the server sets nothing.
        """

    # -- how it is -----------------------------------------------------------------------------------------

    @property
    def needs_person(self) -> bool:
        """Whether the login is refused, and that will hardly change before somebody sets it right."""
        return self._backoff.needs_person

    @property
    def open(self) -> int:
        return self._open

    @property
    def limit(self) -> int:
        """The most connections that there may ever be."""
        return self._limit

    @property
    def current_limit(self) -> int:
        """The most connections that there may be now, by what the server has said."""
        return self._backoff.allowed(time.monotonic())

    @property
    def watch_limit(self) -> int:
        """Most sessions that watchers may ever have, so that they are rarely in anybody's way."""
        return _for_watchers(self._limit)

    @property
    def state(self) -> Connectivity:
        return self._backoff.state(time.monotonic())

    @property
    def is_away(self) -> bool:
        """Whether it is known that the server will not answer soon."""
        return self.state in {Connectivity.OFFLINE, Connectivity.THROTTLED}

    @property
    def reason(self) -> str | None:
        """Why the account is not online; None while it is."""
        return self._backoff.reason(time.monotonic()) or None

    @property
    def since(self) -> datetime:
        """When the state began."""
        now = time.monotonic()
        began = max(self._started, self._backoff.since(now))
        return datetime.now(UTC) - timedelta(seconds=now - began)

    @property
    def retry_in(self) -> float | None:
        """Seconds until something is tried next; None while online, infinite where nothing will be."""
        now = time.monotonic()
        at = self._backoff.retry_at(now)
        return None if at is None else max(0.0, at - now)

    def check_idle(self) -> None:
        """Notice idle connections that the server has ended: nobody else does before they are needed."""
        self._drop_dead()
        if self._accepted and not self._open and self.state is Connectivity.ONLINE:
            self._lost("the server closed the connection", self._timeout)

    async def wait_for_reconnect(self) -> None:
        """Wait until the account comes online again."""
        await self._online.wait()

    async def wait_until_online(self) -> None:
        """Return once the account is online, or as long as nothing speaks against it."""
        while (state := self.state) is not Connectivity.ONLINE:
            with trio.move_on_after((self.retry_in or 0.0) if state is Connectivity.THROTTLED else math.inf):
                await self._online.wait()

    # -- what is new of the network ------------------------------------------------------------------------

    def network_changed(self) -> None:
        """Addresses or routes of this machine are others now."""
        self._drop(lambda session: session.is_stranded(), "the network changed")
        self._hurry()

    def resumed(self) -> None:
        """The machine was asleep: whatever is at the other end may have forgotten the connections."""
        self._drop(lambda _: True, "the machine was asleep")
        self._hurry()

    def _hurry(self) -> None:
        self._backoff.network_changed(time.monotonic())
        self._work_for_keep.set()

    def _drop(self, which: Callable[[Session], bool], why: str) -> None:
        dropped = [session for session in (*self._idle, *self._lent) if which(session)]
        self._dropped.update(session for session in dropped if session in self._lent)
        for session in dropped:
            session.abort()
        self._drop_dead()
        if dropped:
            log.info("%d connections dropped: %s", len(dropped), why)
            self._doubt_watchers()
            self._lost(why, self._timeout)

    # -- work ----------------------------------------------------------------------------------------------

    async def run(
        self, work: Callable[[Session], T], mailbox: bytes | None = None, *, repeat: bool = True
    ) -> T:
        """Run ``work`` in a thread with a session, if possible one that has ``mailbox`` selected.

        With ``repeat``, ``work`` is tried once more with a new connection if a kept one turns out to be
        dead, and again whenever the server asks to wait; without, that is for the caller, as its command may
        have been carried out. A caller that is cancelled ends the connection, as it may stand still.

        Raises what ``work`` raises, and ConnectionLost (TlsError among them) or AuthenticationFailed.
        """
        again = repeat
        while True:
            session, kept = await self._take(mailbox)
            try:
                result = await self._in_thread(work, session)
                self._succeeded()
                return result
            except Throttled as error:
                self._succeeded()
                self.throttle(error)
                if not repeat:
                    raise
            except ConnectionLost as error:
                blameless = kept or session in self._dropped or isinstance(error, ServerBusy)
                self._ended(session, error)
                if not (blameless and again) or self._closed or isinstance(error, TimedOut):
                    raise
                again = False
                log.info("connection lost, trying again with a new one: %s", error)
            finally:
                await self._give_back(session)

    async def watch(self, watcher: Preemptible, mailbox: bytes | None) -> None:
        """Let ``watcher`` run in a thread with a session, as soon as there is one that nobody else needs.

        Waits for the account to be online, for any time. Raises what ``watcher`` raises, and ConnectionLost
        when its connection ends; nothing is repeated.
        """
        session, _ = await self._take(mailbox, spare=True)
        self._watching[session] = watcher, time.monotonic()
        try:
            await self._in_thread(watcher.run, session)
            self._succeeded()
        except Throttled as error:
            self._succeeded()
            self.throttle(error)
            raise
        except ConnectionLost as error:
            self._watching.pop(session, None)  # the others are in doubt, this one need not be told
            self._ended(session, error)
            if not self._closed:
                raise
        finally:
            self._watching.pop(session, None)
            self._leaving.discard(session)
            self._spare -= 1
            await self._give_back(session)

    async def _in_thread(self, work: Callable[[Session], T], session: Session) -> T:
        if trio.current_effective_deadline() == math.inf:
            return await trio.to_thread.run_sync(work, session, limiter=self._threads)
        ended = False

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                # Not passed on: whoever is cancelled will see it, after the thread has ended.
                if not ended:
                    session.abort()

        outcome: list[T] = []
        failure: list[Exception] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                outcome.append(await trio.to_thread.run_sync(work, session, limiter=self._threads))
            except Exception as error:
                failure.append(error)
            ended = True
            nursery.cancel_scope.cancel()
        if failure:
            if isinstance(failure[0], ConnectionLost):
                try:
                    await trio.lowlevel.checkpoint_if_cancelled()
                except trio.Cancelled:
                    # It stood still for as long as anybody was willing to wait.
                    self._ended(session, TimedOut(f"{self._account.host} did not answer in time"))
                    raise
            raise failure[0]
        return outcome[0]

    def _succeeded(self) -> None:
        """The server has let us in, or has answered: whatever was wrong is over."""
        now, was_online = time.monotonic(), self._backoff.is_online
        if self._backoff.state(now) is Connectivity.OFFLINE:
            log.info("online again: %s, after %.0f s", self._account.url, now - self._backoff.since(now))
        self._backoff.succeeded(now)
        self._error = None
        if not was_online:
            self._online.send()
            self.state_changed.set()

    def _ended(self, session: Session, error: ConnectionLost) -> None:
        """A session has ended in the middle of its work."""
        if self._closed:
            return
        if isinstance(error, ServerBusy):
            self.throttle(error)
            return
        if session in self._dropped:
            return
        # Those that nobody is at work with were made in the same past and have most likely died of the same
        # cause.
        for other in (*self._idle, *(self._watching if error.silent else ())):
            other.abort()
        self._drop_dead()
        self._doubt_watchers()
        if error.silent:
            self._lost(str(error), _GRACE)
        elif self._lent - self._leaving - self._watching.keys() <= {session}:
            self._lost(str(error), self._timeout)

    def _lost(self, why: str, patience: float) -> None:
        self._backoff.lost(why, time.monotonic(), patience)
        self._work_for_keep.set()

    def throttle(self, error: Throttled | ServerBusy) -> None:
        """Do as a server asks; `run` does so by itself for what its work raises."""
        now, why = time.monotonic(), str(error)
        was = self._backoff.state(now)
        self._backoff.throttled(error.wait, why, max(1, self._open), now)
        if was is not Connectivity.THROTTLED:
            pause = (self._backoff.retry_at(now) or now) - now
            log.warning("slowing down for %.0f s, to %d connections: %s", pause, self.current_limit, why)
        while self._watching and self._open - len(self._leaving) > self.current_limit:
            self._send_watcher_away()
        while self._idle and self._open - len(self._leaving) > self.current_limit:
            self._idle[0].abort()
            self._drop_dead()

    # -- watchers ------------------------------------------------------------------------------------------

    def _doubt_watchers(self) -> None:
        """Have watchers find out whether their connections live, of which they would not notice for long."""
        for watcher, _ in self._watching.values():
            watcher.stop()
        # If not, it is no news: those that were made meanwhile may be well.
        self._dropped.update(self._watching)

    def _send_watcher_away(self) -> float:
        """Have the session of the least of them given back; since when it had it."""
        session = min(self._watching, key=lambda s: self._watching[s][0].rank)
        watcher, since = self._watching.pop(session)
        self._leaving.add(session)
        watcher.stop()
        return since

    @contextlib.contextmanager
    def _counted(self, state: Connectivity) -> Iterator[None]:
        """Somebody waits, so that watchers have to go: as many as wait, if not as many are leaving.

        Unless it is not their sessions that are waited for.
        """
        self._waiting += 1
        try:
            now = time.monotonic()
            if state is Connectivity.ONLINE and self._watching and len(self._leaving) < self._waiting:
                had_it_for = now - self._send_watcher_away()
                self._cooldown = (
                    min(_MAX_COOLDOWN, self._cooldown * 2) if had_it_for < _MAX_COOLDOWN else _COOLDOWN
                )
            self._watchers_wait_until = now + self._cooldown
            yield
        finally:
            self._waiting -= 1

    def _spare_in(self, state: Connectivity, now: float) -> float:
        """Seconds until a watcher may look for a session; infinite for not before something happens."""
        if state is not Connectivity.ONLINE:
            return math.inf
        if self._spare >= _for_watchers(self._backoff.allowed(now)):
            return self._backoff.grows_in(now)
        if not self._open:
            return 0.0
        return math.inf if self._waiting else max(0.0, self._watchers_wait_until - now)

    # -- sessions ------------------------------------------------------------------------------------------

    async def _take(self, mailbox: bytes | None, *, spare: bool = False) -> tuple[Session, bool]:
        """A session and whether it is one that was kept (and may have died meanwhile).

        ``spare``: one that nobody else needs, for a watcher.
        """
        while True:
            async with self._turn:
                session = await self._wait_for_one(mailbox, spare)
                self._spare += spare
                if session is not None:
                    self._idle.remove(session)
                    self._lent.add(session)
                    return session, True
                self._open += 1
                self._connecting += 1
            connected = False
            try:
                session = await self._connect()
                connected = True
                with trio.CancelScope(shield=True):
                    async with self._turn:
                        self._turn.notify_all()  # for those who did not dare
                return session, False
            except (AuthenticationFailed, ConnectionLost) as error:
                may_wait = self._open or spare or (self._accepted and isinstance(error, ServerBusy))
                if not may_wait:
                    raise
            finally:
                self._spare -= spare and not connected

    async def _wait_for_one(self, mailbox: bytes | None, spare: bool) -> Session | None:
        """An idle session to be used, or None when it is time to make one."""
        while True:
            if self._closed:
                raise ConnectionLost("the mount is ending")
            self._drop_dead()
            now = time.monotonic()
            state = self._backoff.state(now)
            wait = math.inf
            if state is Connectivity.THROTTLED:
                wait = (self._backoff.retry_at(now) or now) - now
            elif spare and (hold := self._spare_in(state, now)):
                wait = hold
            elif self._idle:
                # To select another mailbox costs one round trip, to connect five. Of those that have it
                # selected the last used, so that what lies longest can be closed by the server; of the
                # others the one that lies longest, as its mailbox is the least wanted.
                same = [s for s in self._idle if s.selected == mailbox]
                return same[-1] if same else self._idle[0]
            elif state is Connectivity.ONLINE:
                if self._may_connect(now):
                    return None
            else:
                self._backoff.wanted(now)
                self._work_for_keep.set()
                wait = self._backoff.patience(now)
                if not wait:
                    self._raise_offline()
            # Until a session is given back, or something else may be done.
            waiting = contextlib.nullcontext() if spare else self._counted(state)
            with waiting, trio.move_on_after(wait):
                await self._turn.wait()

    def _may_connect(self, now: float) -> bool:
        if self._open >= self._backoff.allowed(now):
            return False
        # Where it is doubtful whether the server lets anybody in, one attempt at a time is enough.
        return not self._connecting or (self._accepted and self._backoff.expects_success)

    def _drop_dead(self) -> None:
        for session in [s for s in self._idle if not s.alive or s.has_hung_up()]:
            self._idle.remove(session)
            self._open -= 1
            session.abort()
            session.close()

    def _raise_offline(self) -> NoReturn:
        if isinstance(self._error, AuthenticationFailed):
            # The same object for everybody: without this its traceback would grow each time.
            raise self._error.with_traceback(None)
        why = self._error if isinstance(self._error, TlsError | CredentialUnavailable) else ConnectionLost
        raise Offline(f"offline: {self.reason}", why.errno)

    async def keep_connected(self) -> NoReturn:
        """Connect again whenever the connection is lost; wakes for nothing else."""
        while True:
            with trio.move_on_after(self._due_in()):
                await self._work_for_keep.wait()
            if self._due_in():
                continue
            self._open += 1
            self._connecting += 1
            try:
                session = await self._connect()
            except (AuthenticationFailed, ConnectionLost):
                continue
            await self._give_back(session)

    def _due_in(self) -> float:
        """Seconds until `keep_connected` has to connect; infinite for not before something happens."""
        if self._closed or self._connecting or self._open >= self._limit:
            return math.inf
        return self._backoff.due_in(time.monotonic())

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
                    self._work_for_keep.set()
                    self._turn.notify_all()
            if session is not None:
                session.abort()
                session.close()
            raise
        self._lent.add(session)
        self._connecting -= 1
        self._accepted = True
        self._succeeded()
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
            with trio.fail_after(self._timeout + _LATE):
                return await trio.to_thread.run_sync(
                    connect, limiter=self._connecting_threads, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            abandoned = True
            where = f"{self._account.host}:{self._account.port}"
            raise TimedOut(f"{where} did not let us in within {self._timeout:g} s") from None
        except trio.Cancelled:
            abandoned = True
            raise

    def _failed(self, error: AuthenticationFailed | ConnectionLost) -> None:
        """Note a failed attempt to connect."""
        now = time.monotonic()
        beside = len(self._idle) + len(self._lent)
        answered = isinstance(error, (AuthenticationFailed, ServerBusy))
        works = beside
        if isinstance(error, ConnectionLost) and error.silent:
            # Those who only listen have not noticed.
            works -= len(self._watching) + len(self._leaving)
            self._doubt_watchers()
        if works and (answered or self._backoff.state(now) is Connectivity.ONLINE):
            # Beside connections that work it is their number that is refused, whatever the server says.
            log.info("no further connection, going on with %d: %s", beside, error)
            self._succeeded()
            # Of those that are being made some may still be let in.
            self._backoff.limit_reached(beside + self._connecting, now)
            return
        self._error = error
        if isinstance(error, ServerBusy) and self._accepted:
            self._succeeded()
            self.throttle(error)
            return
        if self._backoff.state(now) is not Connectivity.OFFLINE:
            log.warning("offline: %s", error)
        self._backoff.failed(str(error), now, refused=isinstance(error, AuthenticationFailed))
        if isinstance(error, AuthenticationFailed) and not self._accepted:
            self._backoff.give_up()
        self.state_changed.set()

    async def _give_back(self, session: Session) -> None:
        with trio.CancelScope(shield=True):
            async with self._turn:
                self._lent.discard(session)
                self._dropped.discard(session)
                is_one_too_many = self._open - self._connecting > self.current_limit
                if session.alive and not self._closed and not is_one_too_many:
                    self._idle.append(session)
                else:
                    session.abort()
                    session.close()
                    self._open -= 1
                    self._work_for_keep.set()  # `keep_connected` may have waited for its place
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


def _for_watchers(limit: int) -> int:
    """How many of so many sessions watchers may have."""
    return max(1, limit - 2)


async def _close(session: Session) -> None:
    try:
        await trio.to_thread.run_sync(session.close, abandon_on_cancel=True)
    finally:
        session.abort()  # wakes the thread if it still waits for an answer
