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

Watchers borrow sessions that no request needs, and leave the last idle one where there may be one more: a
request that had to connect would wait for five round trips and more. They return them when a request needs
one, or when the number of connections must shrink. They never try whether the server is back: while the
account is offline they wait, however long that takes. Since they only listen, their connections prove nothing
about the server; after a loss each watcher has to check its own.

The class is long because its methods share the counts of these invariants: each changes them in one step on
the trio thread, and a second object would only hide which step that is.
"""

import contextlib
import logging
import math
import ssl
import time
from collections.abc import Callable, Hashable, Iterator
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

_SILENCE_GRACE: Final = 2.0
"""Seconds that requests wait for a new connection after the network or the server fell silent."""
_CONNECT_MARGIN: Final = 1.0
"""Seconds beyond the timeout after which an attempt to connect is abandoned."""
_COOLDOWN: Final = 2.0
"""Seconds without a waiting request after which a watcher may borrow a session again. It doubles each time
that a watcher had its session for less than `_MAX_COOLDOWN`."""
_MAX_COOLDOWN: Final = 16.0
_SEVERAL: Final = 3
"""Mailboxes and messages that have to be refused within `_SAME_TIME` for the whole account to slow down."""
_SAME_TIME: Final = 60.0
"""Seconds."""


class Preemptible(Protocol):
    """A watcher: it borrows a session until a request needs it."""

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Importance: the watcher with the lowest rank is the first to return its session."""

    def run(self, session: Session) -> None:
        """Use the session in a thread until stopped. A normal return means that the server has answered."""

    def stop(self) -> None:
        """Make `run` return soon. Called on the trio thread."""


class SessionPool:
    """Up to ``limit`` connections to ``account``, made on demand and kept open.

    `keep_connected` must run in a task of its own. ``timeout`` bounds each wait for the server, in seconds. A
    password that was never accepted is tried only once. One that was accepted before is tried again at long
    intervals, because some servers refuse logins when they are busy.
    """

    def __init__(self, account: Account, credentials: CredentialProvider, limit: int, timeout: float) -> None:
        self._account = account
        self._credentials = credentials
        self._timeout = timeout
        self._context: ssl.SSLContext = tls_context(account)
        self._idle: list[Session] = []
        self._lent: set[Session] = set()
        self._doubtful: set[Session] = set()
        """Lent sessions that the pool has ended or distrusts: if they fail, that is no news, and their work
        may be repeated."""
        self._open = 0
        self._connecting = 0
        self._limit = limit
        self._turn = trio.Condition()
        self._threads = trio.CapacityLimiter(limit)
        # An abandoned attempt may hang in a name lookup for a long time.
        self._connecting_threads = trio.CapacityLimiter(limit)
        self._watching: dict[Session, tuple[Preemptible, float]] = {}
        """Watchers by session, and when each borrowed it; without those in ``_recalled``."""
        self._recalled: set[Session] = set()
        """Sessions whose watchers were asked to return them."""
        self._watchers = 0
        """How many watchers have a session, or are about to get one."""
        self._waiting = 0
        """How many requests wait for a session."""
        self._cooldown = _COOLDOWN
        self._watchers_wait_until = -math.inf
        """When watchers may borrow sessions again."""
        self._refused: dict[Hashable, float] = {}
        """What the server would not do now, although it did other things, and when it said so."""
        self._closed = False
        self._backoff = Backoff(limit)
        self._started = time.monotonic()
        self.lost_at = self._started
        """When a connection last ended by itself (monotonic): the server may be another one since."""
        self._error: ConnectionLost | AuthenticationFailed | None = None
        """Why the last attempt to connect failed."""
        self._accepted = False
        """Whether the password has ever been accepted."""
        self._connect_needed = Flag()
        """Wakes `keep_connected`, which then checks what is due."""
        self._online = Signal()
        """Sent each time that the account comes back online."""
        self.state_changed = Flag()
        """Set when the account goes online or offline, or `needs_person` may have changed.

        One task may wait for it, and read `state`, `reason` and `needs_person` then. The task always sees the
        latest state, and misses one only if the next follows before the task runs. The end of a pause
        requested by the server sets nothing.
        """

    # -- state --------------------------------------------------------------------------------------------

    @property
    def needs_person(self) -> bool:
        """Whether logins are refused, and will hardly succeed until a person acts."""
        return self._backoff.needs_person

    @property
    def open(self) -> int:
        """Number of connections that are open or being made."""
        return self._open

    @property
    def limit(self) -> int:
        """Configured maximum number of connections."""
        return self._limit

    @property
    def current_limit(self) -> int:
        """Maximum number of connections at present, which a server that is busy lowers."""
        return self._backoff.allowed(time.monotonic())

    @property
    def watch_limit(self) -> int:
        """Maximum number of sessions that watchers may borrow, so that they rarely delay a request."""
        return _for_watchers(self._limit)

    @property
    def state(self) -> Connectivity:
        """State of the account."""
        return self._backoff.state(time.monotonic())

    @property
    def is_away(self) -> bool:
        """Whether the server is known not to answer soon."""
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
        """Seconds until the next attempt; None while online, infinity for never."""
        now = time.monotonic()
        at = self._backoff.retry_at(now)
        return None if at is None else max(0.0, at - now)

    def check_idle(self) -> None:
        """Notice idle connections that the server has ended; otherwise nothing does until one is needed."""
        self._drop_dead()
        if self._accepted and not self._open and self.state is Connectivity.ONLINE:
            self._lost("the server closed the connection", self._timeout)

    async def wait_for_reconnect(self) -> None:
        """Wait until the account comes back online."""
        await self._online.wait()

    async def wait_until_online(self) -> None:
        """Wait until the account is online; return at once if nothing has failed."""
        while (state := self.state) is not Connectivity.ONLINE:
            with trio.move_on_after((self.retry_in or 0.0) if state is Connectivity.THROTTLED else math.inf):
                await self._online.wait()

    # -- events of this machine ----------------------------------------------------------------------------

    def try_now(self) -> None:
        """A person wants no further wait: end a pause, and connect soon."""
        self._retry_soon()

    def network_changed(self) -> None:
        """Addresses or routes of this machine have changed."""
        self._drop(lambda session: session.is_stranded(), "the network changed")
        self._retry_soon()

    def resumed(self) -> None:
        """The machine was suspended, so the server may have forgotten the connections."""
        self._drop(lambda _: True, "the machine was suspended")
        self._retry_soon()

    def _retry_soon(self) -> None:
        self._backoff.network_changed(time.monotonic())
        self._connect_needed.set()

    def _drop(self, which: Callable[[Session], bool], why: str) -> None:
        ended = [session for session in (*self._idle, *self._lent) if which(session)]
        self._doubtful.update(session for session in ended if session in self._lent)
        for session in ended:
            session.abort()
        self._drop_dead()
        if ended:
            log.info("%d connections dropped: %s", len(ended), why)
            self._verify_watchers()
            self._lost(why, self._timeout)

    # -- work ----------------------------------------------------------------------------------------------

    async def run(
        self,
        work: Callable[[Session], T],
        mailbox: bytes | None = None,
        *,
        about: Hashable = None,
        fresh: bool = False,
        repeat: bool = True,
    ) -> T:
        """Run ``work`` in a thread with a session, if possible one that has ``mailbox`` selected.

        ``fresh``: on a connection that is made for it. ``about`` is what a refusal to do it now may be about,
        unless it is the whole mailbox: a message.

        With ``repeat``, ``work`` runs once more on a new connection if a kept one turns out to be dead, and
        again whenever the server asks the account to wait. Without it the caller decides, because its command
        may have been carried out. If the caller is cancelled, the connection ends, because it may hang.

        Raises what ``work`` raises, and ConnectionLost (TlsError among them) or AuthenticationFailed.
        """
        may_repeat = repeat
        while True:
            session, kept = await self._take(mailbox, fresh=fresh)
            try:
                result = await self._in_thread(work, session)
                self._succeeded()
                return result
            except Throttled as error:
                self._succeeded()
                if not self.refused(error, about or mailbox) or not repeat:
                    raise
            except ConnectionLost as error:
                expected = kept or session in self._doubtful or isinstance(error, ServerBusy)
                self._session_lost(session, error)
                if not (expected and may_repeat) or self._closed or isinstance(error, TimedOut):
                    raise
                may_repeat = False
                log.info("connection lost, trying again on a new one: %s", error)
            finally:
                await self._return(session)

    async def watch(self, watcher: Preemptible, mailbox: bytes | None) -> None:
        """Run ``watcher`` in a thread with a session, as soon as no request needs it.

        Waits for the account to be online, however long that takes. Raises what ``watcher`` raises, and
        ConnectionLost when its connection ends; nothing is repeated.
        """
        session, _ = await self._take(mailbox, for_watcher=True)
        self._watching[session] = watcher, time.monotonic()
        try:
            await self._in_thread(watcher.run, session)
            self._succeeded()
        except Throttled as error:
            self._succeeded()
            self.throttle(error)
            raise
        except ConnectionLost as error:
            self._watching.pop(session, None)  # it has ended, so there is nothing to verify
            self._session_lost(session, error)
            if not self._closed:
                raise
        finally:
            self._watching.pop(session, None)
            self._recalled.discard(session)
            self._watchers -= 1
            await self._return(session)

    async def _in_thread(self, work: Callable[[Session], T], session: Session) -> T:
        if trio.current_effective_deadline() == math.inf:
            return await trio.to_thread.run_sync(work, session, limiter=self._threads)
        ended = False

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                # Not raised here: the caller sees the cancellation after the thread has ended.
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
                    # The connection hung for as long as the caller was willing to wait.
                    self._session_lost(session, TimedOut(f"{self._account.host} did not answer in time"))
                    raise
            raise failure[0]
        return outcome[0]

    def _succeeded(self) -> None:
        """The server accepted a connection or answered on one: the trouble, if any, is over."""
        now, was_online = time.monotonic(), self._backoff.is_online
        if self._backoff.state(now) is Connectivity.OFFLINE:
            log.info("online again: %s, after %.0f s", self._account.url, now - self._backoff.since(now))
        self._backoff.succeeded(now)
        self._error = None
        if not was_online:
            self._online.send()
            self.state_changed.set()

    def _session_lost(self, session: Session, error: ConnectionLost) -> None:
        """A session ended in the middle of its work."""
        if self._closed:
            return
        self.lost_at = time.monotonic()
        if isinstance(error, ServerBusy):
            self.throttle(error)
            return
        if session in self._doubtful:
            return
        # Connections that no request uses are as old, and have most likely ended for the same reason.
        for other in (*self._idle, *(self._watching if error.silent else ())):
            other.abort()
        self._drop_dead()
        self._verify_watchers()
        if error.silent:
            self._lost(str(error), _SILENCE_GRACE)
        elif self._lent - self._recalled - self._watching.keys() <= {session}:
            self._lost(str(error), self._timeout)

    def _lost(self, why: str, patience: float) -> None:
        self._backoff.lost(why, time.monotonic(), patience)
        self._connect_needed.set()

    def refused(self, error: Throttled, about: Hashable) -> bool:
        """Slow down as the server asks, unless this concerns one object only; return whether it does not.

        If several objects are refused, it concerns the account.
        """
        if error.of_one and about is not None:
            now = time.monotonic()
            self._refused = {one: at for one, at in self._refused.items() if now - at < _SAME_TIME}
            self._refused[about] = now
            if len(self._refused) < _SEVERAL:
                return False
        self.throttle(error)
        return True

    def throttle(self, error: Throttled | ServerBusy) -> None:
        """Slow down as the server asks. `run` and `watch` call this for the errors of their work."""
        now, why = time.monotonic(), str(error)
        was = self._backoff.state(now)
        self._backoff.throttled(error.wait, why, max(1, self._open), now)
        if was is not Connectivity.THROTTLED:
            pause = (self._backoff.retry_at(now) or now) - now
            seconds = max(1, round(pause))
            log.warning("slowing down for %d s, to %d connections: %s", seconds, self.current_limit, why)
        while self._watching and self._open - len(self._recalled) > self.current_limit:
            self._recall_watcher()
        while self._idle and self._open - len(self._recalled) > self.current_limit:
            self._idle[0].abort()
            self._drop_dead()

    # -- watchers ------------------------------------------------------------------------------------------

    def _verify_watchers(self) -> None:
        """Make watchers check their connections: they only listen, and would notice a loss late."""
        for watcher, _ in self._watching.values():
            watcher.stop()
        # If they fail, that is no news: connections made meanwhile may work.
        self._doubtful.update(self._watching)

    def _recall_watcher(self) -> float:
        """Ask the watcher with the lowest rank to return its session; return when it borrowed it."""
        session = min(self._watching, key=lambda s: self._watching[s][0].rank)
        watcher, since = self._watching.pop(session)
        self._recalled.add(session)
        watcher.stop()
        return since

    @contextlib.contextmanager
    def _count_as_waiting(self, state: Connectivity) -> Iterator[None]:
        """Count a waiting request, and recall a watcher for it unless enough sessions are being returned.

        Only while online: otherwise the request does not wait for a watcher's session.
        """
        self._waiting += 1
        try:
            now = time.monotonic()
            if state is Connectivity.ONLINE and self._watching and len(self._recalled) < self._waiting:
                had_it_for = now - self._recall_watcher()
                self._cooldown = (
                    min(_MAX_COOLDOWN, self._cooldown * 2) if had_it_for < _MAX_COOLDOWN else _COOLDOWN
                )
            self._watchers_wait_until = now + self._cooldown
            yield
        finally:
            self._waiting -= 1

    def _watcher_may_start_in(self, state: Connectivity, now: float) -> float:
        """Return the seconds until a watcher may take a session; infinity until something changes."""
        if state is not Connectivity.ONLINE:
            return math.inf
        if self._watchers >= _for_watchers(self._backoff.allowed(now)):
            return self._backoff.grows_in(now)
        if not self._open:
            return 0.0
        return math.inf if self._waiting else max(0.0, self._watchers_wait_until - now)

    # -- sessions ------------------------------------------------------------------------------------------

    async def _take(
        self, mailbox: bytes | None, *, for_watcher: bool = False, fresh: bool = False
    ) -> tuple[Session, bool]:
        """Return a session, and whether it was kept open before, so that it may have ended meanwhile.

        ``for_watcher``: one that no request needs. ``fresh``: a new one, in place of an idle one if there can
        be no more.
        """
        while True:
            async with self._turn:
                if fresh and self._idle and not self._may_connect(time.monotonic()):
                    self._idle[0].abort()
                    self._drop_dead()
                session = await self._wait_for_session(mailbox, for_watcher, fresh)
                self._watchers += for_watcher
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
                        self._turn.notify_all()  # for tasks that waited for the outcome
                return session, False
            except (AuthenticationFailed, ConnectionLost) as error:
                may_wait = self._open or for_watcher or (self._accepted and isinstance(error, ServerBusy))
                if not may_wait:
                    raise
            finally:
                self._watchers -= for_watcher and not connected

    async def _wait_for_session(
        self, mailbox: bytes | None, for_watcher: bool, fresh: bool
    ) -> Session | None:
        """Wait for an idle session and return it, or None when it is time to connect."""
        while True:
            if self._closed:
                raise ConnectionLost("the mount is ending")
            self._drop_dead()
            now = time.monotonic()
            state = self._backoff.state(now)
            wait = math.inf
            if state is Connectivity.THROTTLED:
                wait = (self._backoff.retry_at(now) or now) - now
            elif for_watcher and (hold := self._watcher_may_start_in(state, now)):
                wait = hold
            elif self._idle:
                # Selecting another mailbox takes one round trip, connecting takes about five. If several have
                # the mailbox selected, the last used one: the server may close the others. Otherwise the one
                # idle for longest, whose mailbox is least wanted.
                if (fresh or (for_watcher and len(self._idle) == 1)) and self._may_connect(now):
                    return None
                same = [s for s in self._idle if s.selected == mailbox]
                return same[-1] if same else self._idle[0]
            elif state is Connectivity.ONLINE:
                if self._may_connect(now):
                    return None
            else:
                self._backoff.wanted(now)
                self._connect_needed.set()
                wait = self._backoff.patience(now)
                if not wait:
                    self._raise_offline()
            # Until a session is returned, or something else may be done.
            waiting = contextlib.nullcontext() if for_watcher else self._count_as_waiting(state)
            with waiting, trio.move_on_after(wait):
                await self._turn.wait()

    def _may_connect(self, now: float) -> bool:
        if self._open >= self._backoff.allowed(now):
            return False
        # While it is unclear whether the server accepts connections, one attempt at a time.
        return not self._connecting or (self._accepted and self._backoff.expects_success)

    def _drop_dead(self) -> None:
        for session in [s for s in self._idle if not s.alive or s.has_hung_up()]:
            self.lost_at = time.monotonic()
            self._idle.remove(session)
            self._open -= 1
            session.abort()
            session.close()

    def _raise_offline(self) -> NoReturn:
        if isinstance(self._error, AuthenticationFailed):
            # The same object is raised many times; its traceback would grow each time.
            raise self._error.with_traceback(None)
        why = self._error if isinstance(self._error, TlsError | CredentialUnavailable) else ConnectionLost
        raise Offline(f"offline: {self.reason}", why.errno)

    async def keep_connected(self) -> NoReturn:
        """Connect again whenever a connection was lost; wakes only when an attempt is due."""
        while True:
            with trio.move_on_after(self._due_in()):
                await self._connect_needed.wait()
                async with self._turn:
                    self._turn.notify_all()  # a pause may have ended before its time
            if self._due_in():
                continue
            self._open += 1
            self._connecting += 1
            try:
                session = await self._connect()
            except (AuthenticationFailed, ConnectionLost):
                continue
            await self._return(session)

    def _due_in(self) -> float:
        """Return the seconds until `keep_connected` must connect; infinity until something changes."""
        if self._closed or self._connecting or self._open >= self._limit:
            return math.inf
        return self._backoff.due_in(time.monotonic())

    async def _connect(self) -> Session:
        """Return a new session, lent to the caller, who has counted it as open and connecting."""
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
                        self._connect_failed(error)
                    self._connect_needed.set()
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
        """Connect. Can be cancelled at once, although a name lookup or a handshake may block its thread."""
        abandoned = False
        made: list[Session] = []

        def connect() -> Session:
            session = Session.connect(self._account, self._credentials, self._context, self._timeout)
            made.append(session)
            if abandoned:
                session.close()
            return session

        def abandon() -> None:
            # It may be made already, with nobody to take it.
            nonlocal abandoned
            abandoned = True
            for session in made:
                session.abort()
                session.close()

        try:
            with trio.fail_after(self._timeout + _CONNECT_MARGIN):
                return await trio.to_thread.run_sync(
                    connect, limiter=self._connecting_threads, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            abandon()
            where = f"{self._account.host}:{self._account.port}"
            raise TimedOut(f"{where} did not complete the login within {self._timeout:g} s") from None
        except trio.Cancelled:
            abandon()
            raise

    def _connect_failed(self, error: AuthenticationFailed | ConnectionLost) -> None:
        """Record a failed attempt to connect."""
        now = time.monotonic()
        others = len(self._idle) + len(self._lent)
        answered = isinstance(error, (AuthenticationFailed, ServerBusy))
        works = others
        if isinstance(error, ConnectionLost) and error.silent:
            # Watchers only listen, and would not have noticed.
            works -= len(self._watching) + len(self._recalled)
            self._verify_watchers()
        if works and (answered or self._backoff.state(now) is Connectivity.ONLINE):
            # Others work, so it is their number that the server refuses, whatever its words are.
            log.info("no further connection, continuing with %d: %s", others, error)
            self._succeeded()
            # The server may still accept some of those being made.
            self._backoff.limit_reached(others + self._connecting, now)
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

    async def _return(self, session: Session) -> None:
        with trio.CancelScope(shield=True):
            async with self._turn:
                self._lent.discard(session)
                self._doubtful.discard(session)
                is_one_too_many = self._open - self._connecting > self.current_limit
                if session.alive and not self._closed and not is_one_too_many:
                    self._idle.append(session)
                else:
                    session.abort()
                    session.close()
                    self._open -= 1
                    self._connect_needed.set()  # `keep_connected` may have waited for its place
                self._turn.notify_all()

    async def close(self) -> None:
        """End all connections: idle ones by LOGOUT within a second, those in use at once."""
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
    """Return how many of ``limit`` sessions watchers may borrow."""
    return max(1, limit - 2)


async def _close(session: Session) -> None:
    try:
        await trio.to_thread.run_sync(session.close, abandon_on_cancel=True)
    finally:
        session.abort()  # wakes the thread if it still waits for an answer
