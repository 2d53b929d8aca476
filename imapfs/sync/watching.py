"""Watching: how a mount learns of changes on the server without being asked for them.

If the server has NOTIFY, one connection watches all mailboxes, with INBOX selected. If it has IDLE, one
connection each watches the mailboxes in use: INBOX, open directories, then the last used. These connections
are given up as soon as another task needs one, and opened again when no task does. In addition, and if the
server has neither, the list of mailboxes and the STATUS of each mailbox that was ever listed are polled:
servers do not announce everything (Dovecot's NOTIFY not what was delivered straight into a Maildir).

An announcement is a hint that something has changed. It leads to an ordinary synchronisation, after a moment,
as changes come in bursts, and one at a time per mailbox. An announcement of what the cache has already, such
as a change made through the mount, leads to nothing. All of this runs on the trio thread, except `Watch.run`.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, Literal

import trio

from imapfs.errors import ImapfsError, MailboxGone, NotSupported
from imapfs.imap.idle import (
    AllMailboxes,
    CountChanged,
    FlagsChanged,
    MailboxChanged,
    MailboxOpened,
    MessagesVanished,
    StatusChanged,
    Watch,
    WatchBegan,
    WatchEvent,
)
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.log import report
from imapfs.model import ROOT, Ino, Uid
from imapfs.names import is_inbox
from imapfs.store.cache import Cache
from imapfs.store.rows import Mailbox
from imapfs.sync.mailbox_list import display_name
from imapfs.sync.synchroniser import Synchroniser
from imapfs.waiting import Delays, Signal

log = logging.getLogger(__name__)

WatchMethod = Literal["notify", "idle", "poll"]

_DEBOUNCE: Final = 0.05
"""Seconds from the first announcement of a change to the synchronisation."""
_SETTLE: Final = 2.0
"""Seconds during which the mailboxes in use may change before watches move to others."""
_FIRST_RETRY: Final = 1.0
"""Seconds until a watch that failed is tried again; doubled each time, up to"""
_MAX_RETRY: Final = 60.0
_FIRST_REFUSAL: Final = 60.0
"""Seconds for which a refused IDLE or NOTIFY is not tried again; doubled each time, up to"""
_MAX_REFUSAL: Final = 3600.0
_STABLE: Final = 30.0
"""Seconds after which a watch counts as a success when it ends."""
_POLL_IN_USE: Final = 5.0
"""Seconds between polls while mailboxes are in use, as servers do not announce everything: Dovecot does not
announce what is delivered straight into a Maildir within a second of another change."""
_MIN_POLL_GAP: Final = 20
"""Minimum time between these polls, as a multiple of the last poll's duration."""
_MAX_FOLLOWED: Final = 2
"""Maximum number of synchronisations at once that announcements lead to."""


class Watching:
    """Keeps the cache up to date as long as ``nursery`` lives. ``interval``: seconds between polls."""

    def __init__(
        self, pool: SessionPool, cache: Cache, sync: Synchroniser, nursery: trio.Nursery, interval: float
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._sync = sync
        self._fresh = sync.freshness
        self._nursery = nursery
        self._interval = interval
        self._root = ROOT
        self._method: WatchMethod = "poll"
        self._chosen = trio.Event()
        self._refusals: dict[str, tuple[float, float]] = {}
        """Capability that the server offers, but has refused -> when it is tried again, and how long that was
        after the refusal."""
        self._used: dict[Ino, float] = {}
        self._opened: Counter[Ino] = Counter()
        self._watchers: dict[Ino, _MailboxWatch] = {}
        """Mailbox -> what watches it; `ROOT` -> what watches everything."""
        self._wanted_changed = Signal()
        self._settling = False
        self._following: set[Ino] = set()
        self._turns = trio.Semaphore(max(1, min(_MAX_FOLLOWED, pool.limit - 1)))
        self._last_poll = time.monotonic()
        self._poll_took = 0.0
        self._polled: dict[Ino, Mapping[str, int]] = {}
        """The last STATUS of mailboxes for which it differs from what a synchronisation finds."""

    def start(self, root: Ino) -> None:
        """Start watching the mailboxes below ``root``."""
        self._root = root
        self._nursery.start_soon(self._watch_forever)
        self._nursery.start_soon(self._poll_forever)

    def unwatch(self, key: Ino) -> None:
        """Note that changes are no longer announced."""
        self._fresh.unwatch(None if key == ROOT else key)

    def status(self) -> dict[str, object]:
        """Return how changes are learned of now, for ``imapfs status``."""
        live = [ino for ino, watcher in self._watchers.items() if watcher.live]
        boxes = [box for ino in live if (box := self._cache.mailbox(ino)) is not None]
        return {
            "by": "notify" if ROOT in live else "idle" if live else "poll",
            "idle": [display_name(box.server_name or b"") for box in boxes],
            "poll": self._interval,
        }

    # -- mailboxes in use ----------------------------------------------------------------------------------

    def used(self, mailbox: Ino) -> None:
        """Note that a program uses a mailbox."""
        now = time.monotonic()
        self._used[mailbox] = now
        if self._fresh.is_watched(mailbox) and now - self._last_poll > max(
            _POLL_IN_USE, _MIN_POLL_GAP * self._poll_took
        ):
            self._last_poll = now
            self._nursery.start_soon(self._poll)
        if self._method == "idle" and mailbox not in self._watchers and not self._settling:
            self._settling = True
            self._nursery.start_soon(self._settle)

    def opened(self, mailbox: Ino) -> None:
        """Note that a directory was opened; it is in use until it is `closed`."""
        self._opened[mailbox] += 1
        self.used(mailbox)

    def closed(self, mailbox: Ino) -> None:
        """Undo one call of `opened`."""
        self._opened[mailbox] -= 1
        if not self._opened[mailbox]:
            del self._opened[mailbox]

    async def _settle(self) -> None:
        """Move watches to mailboxes that rank higher."""
        self._wanted_changed.send()
        await trio.sleep(_SETTLE)
        self._settling = False
        try:
            wanted = self._wanted()
        except ImapfsError as error:
            report(error, "the watches stay where they are")
            return
        for ino, watcher in self._watchers.items():
            if ino not in wanted:
                watcher.stop()
        self._wanted_changed.send()

    def rank(self, ino: Ino) -> tuple[bool, bool, float]:
        """Return the rank of a mailbox; the highest ranks are watched."""
        box = self._cache.mailbox(ino)
        return (ino == ROOT or _is_inbox(box), ino in self._opened, self._used.get(ino, 0.0))

    def _wanted(self) -> list[Ino]:
        """Return the mailboxes to be watched by IDLE, the highest rank first."""
        known = [
            box.ino
            for box in self._mailboxes()
            if (box.ino in self._used or _is_inbox(box)) and self._is_listed(box)
        ]
        return sorted(known, key=self.rank, reverse=True)[: self._pool.watch_limit]

    def follow_inbox(self) -> None:
        """Have INBOX listed and watched, although no program has looked into it."""
        for box in self._mailboxes():
            if _is_inbox(box):
                self.used(box.ino)
                if not box.complete:
                    self._sync.refresh_mailbox(box.ino, 0)

    def _mailboxes(self) -> list[Mailbox]:
        """Return the mailboxes that hold messages and are mounted."""
        return [box for box in self._cache.mailboxes() if box.selectable and self._is_mounted(box.ino)]

    def _is_mounted(self, ino: Ino) -> bool:
        if self._root == ROOT:
            return True
        top = self._cache.path(self._root)
        return self._cache.path(ino)[: len(top)] == top

    def _is_listed(self, box: Mailbox) -> bool:
        """Return whether the cache has messages that could be out of date."""
        return bool(box.complete) or self._sync.is_refreshing(box.ino)

    # -- watching ------------------------------------------------------------------------------------------

    async def _watch_forever(self) -> None:
        pause = _Pause()
        while True:
            await self._pool.wait_until_online()
            try:
                method = await self._pool.run(self._choose)
                if method != self._method or not self._chosen.is_set():
                    log.info("changes are learned of by %s", method)
                self._method = method
                self._chosen.set()
                if method == "notify":
                    await self._watch_everything(pause)
                elif method == "idle":
                    await self._watch_used()
                else:
                    await trio.sleep(self._interval)
            except ImapfsError as error:
                log.debug("nothing can be watched: %s", error)
                await pause.after(0)
            except Exception as error:
                report(error, "watching failed")
                await pause.after(0)

    def _refused(self, capability: str) -> None:
        """Do without a capability for a while: a refusal may be about that moment, or for good."""
        _, before = self._refusals.get(capability, (0.0, _FIRST_REFUSAL / 2))
        pause = min(_MAX_REFUSAL, before * 2)
        self._refusals[capability] = time.monotonic() + pause, pause

    def _is_refused(self, capability: str) -> bool:
        return time.monotonic() < self._refusals.get(capability, (0.0, 0.0))[0]

    def _choose(self, session: Session) -> WatchMethod:
        def can(capability: str) -> bool:
            return session.has(capability) and not self._is_refused(capability)

        if not can("IDLE"):
            return "poll"
        # Without modification sequences the first responses of NOTIFY would not show what is new.
        return "notify" if can("NOTIFY") and can("CONDSTORE") else "idle"

    async def _watch_everything(self, pause: "_Pause") -> None:
        started = time.monotonic()
        inbox = next((box for box in self._mailboxes() if _is_inbox(box)), None)
        try:
            if await self._watch(ROOT, inbox):
                return
        except NotSupported as error:
            log.info("the server cannot watch all mailboxes: %s", error)
            self._refused("NOTIFY")
            return
        await pause.after(time.monotonic() - started)

    async def _watch_used(self) -> None:
        """Watch the mailboxes in use until the server turns out not to support it."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._pool.watch_limit):
                nursery.start_soon(self._watch_one_after_another)

    async def _watch_one_after_another(self) -> None:
        pause = _Pause()
        while not self._is_refused("IDLE"):
            started = time.monotonic()
            try:
                ino = next((ino for ino in self._wanted() if ino not in self._watchers), None)
                box = self._cache.mailbox(ino) if ino is not None else None
                if box is None:
                    await self._wanted_changed.wait()
                    continue
                if await self._watch(box.ino, box):
                    continue
            except NotSupported as error:
                log.info("the server does not watch mailboxes now: %s", error)
                self._refused("IDLE")
                for watcher in self._watchers.values():
                    watcher.stop()
                self._wanted_changed.send()
                return
            except Exception as error:
                report(error, "a mailbox cannot be watched")
            await pause.after(time.monotonic() - started)

    async def _watch(self, key: Ino, box: Mailbox | None) -> bool:
        """Watch a mailbox or, if ``key`` is `ROOT`, everything with ``box`` selected.

        Return whether the watch ended because it was stopped. Raises NotSupported.
        """
        watcher = self._watchers[key] = _MailboxWatch(self, key, box)
        try:
            await self._pool.watch(watcher, box.server_name if box is not None else None)
        except NotSupported:
            raise
        except ImapfsError as error:
            log.log(logging.INFO if watcher.live else logging.DEBUG, "a watch ended: %s", error)
            if isinstance(error, MailboxGone):
                self._used.pop(key, None)
                self._sync.refresh_tree(0)
            return False
        finally:
            watcher.end()
            del self._watchers[key]
        return watcher.stopped

    # -- announcements -------------------------------------------------------------------------------------

    def handle(self, watcher: "_MailboxWatch", events: Sequence[WatchEvent]) -> None:
        """Handle what the server has announced to a watcher. Raises nothing, as trio itself calls this."""
        try:
            for event in events:
                self._handle(watcher, event)
        except Exception as error:
            report(error, "an announcement of the server was not understood")

    def _handle(self, watcher: "_MailboxWatch", event: WatchEvent) -> None:
        box = watcher.selected
        match event:
            case WatchBegan():
                watcher.live = True
                self._fresh.watch(None if watcher.key == ROOT else watcher.key, watcher.since)
            case AllMailboxes(entries):
                if self._sync.is_known(entries):
                    self._fresh.asked(ROOT, watcher.since)
                else:
                    self._changed(ROOT)
            case MailboxChanged(entry):
                is_there = "\\nonexistent" not in entry.attributes
                if is_there != (self._cache.mailbox_named(entry.name) is not None):
                    self._changed(ROOT)
            case StatusChanged(mailbox, numbers):
                named = self._cache.mailbox_named(mailbox)
                if named is not None:
                    self._look(named.ino, numbers, None if watcher.live else watcher.since)
            case MailboxOpened(state) if box is not None:
                numbers = {
                    "UIDVALIDITY": state.uidvalidity,
                    "UIDNEXT": state.uidnext,
                    "MESSAGES": state.exists,
                    "HIGHESTMODSEQ": state.highestmodseq,
                }
                self._look(
                    box.ino, {key: n for key, n in numbers.items() if n or key == "MESSAGES"}, watcher.since
                )
                # Without MODSEQ flags may have changed unnoticed. Asking for them takes a second connection.
                if not state.highestmodseq and self._pool.limit > 1 and self._is_listed(box):
                    self._changed(box.ino)
            case _ if box is not None and self._is_news(box.ino, event):
                self._changed(box.ino)

    def _is_news(self, ino: Ino, event: WatchEvent) -> bool:
        """Return whether an event is news; changes made through the mount are announced as well."""
        match event:
            case _ if self._fresh.has_news(ino) or self._sync.is_refreshing(ino):
                return True  # there may be more news than this event
            case CountChanged(count):
                return count != self._cache.counts(ino)[0]
            case MessagesVanished(ranges):
                return any(low <= self._cache.last_uid(ino, high + 1) for low, high in ranges)
            case FlagsChanged(uid, modseq):
                known = self._cache.message(ino, Uid(uid))
                details = self._cache.details(known.ino) if known is not None else None
                return details is None or not 0 < modseq <= details.modseq
        return True

    def _look(self, ino: Ino, numbers: Mapping[str, int], asked: float | None) -> None:
        """Compare a mailbox with its STATUS; if that proves it, the mailbox is up to date as of ``asked``."""
        box = self._cache.mailbox(ino)
        if box is None or not self._is_listed(box):
            return
        differs = not box.complete or self._differs(box, numbers)
        doubtful = not differs and asked is not None and not self._agrees(ino, asked)
        if differs or (doubtful and ino in self._used):
            self._changed(ino)

    def _agrees(self, ino: Ino, asked: float) -> bool:
        """Note that STATUS is as it was, as of ``asked``; return whether that proves that nothing changed."""
        if not self._sync.is_current(ino):
            return False
        self._fresh.asked(ino, asked)
        return True

    def _differs(self, box: Mailbox, numbers: Mapping[str, int]) -> bool:
        messages, unseen = self._cache.counts(box.ino)
        known = {"UIDVALIDITY": box.uidvalidity, "UIDNEXT": self._cache.uidnext(box), "MESSAGES": messages}
        if numbers.get("HIGHESTMODSEQ") and box.modseq:
            known["HIGHESTMODSEQ"] = box.modseq
        else:
            known["UNSEEN"] = unseen
        return any(numbers.get(key, value) != value for key, value in known.items())

    def _changed(self, what: Ino) -> None:
        """Note that a mailbox has changed, or for `ROOT` the list of mailboxes."""
        self._fresh.announced(what)
        if what not in self._following and self._is_mounted(what):
            self._following.add(what)
            self._nursery.start_soon(self._follow, what)

    async def _follow(self, what: Ino) -> None:
        """Synchronise until there is no more news."""
        pause = _DEBOUNCE
        try:
            while True:
                await trio.sleep(pause)
                box = self._cache.mailbox(what)
                wanted = what == ROOT or (box is not None and self._is_listed(box))
                if not wanted or not self._fresh.has_news(what):
                    return
                await self._sync.at_rest(what)
                async with self._turns:
                    started = time.monotonic()
                    refresh = (
                        self._sync.refresh_tree(0) if what == ROOT else self._sync.refresh_mailbox(what, 0)
                    )
                    if refresh is not None:
                        await refresh.finished()
                        if refresh.error is not None:
                            return  # the next poll, or use, tries again
                # A mailbox that changes all the time is not synchronised all the time.
                pause = _DEBOUNCE + time.monotonic() - started
        except Exception as error:
            report(error, "a change was not followed")
        finally:
            self._following.discard(what)

    # -- polling -------------------------------------------------------------------------------------------

    async def _poll_forever(self) -> None:
        await self._chosen.wait()
        if self._method != "notify":
            await self._poll()
        while True:
            await trio.sleep(self._interval)
            await self._poll()

    async def _poll(self) -> None:
        """Ask the server for changes, unless it is away: then other tasks try to reach it."""
        if self._pool.reason is not None:
            return
        started = self._last_poll = time.monotonic()
        try:
            listed = [box for box in self._mailboxes() if box.complete]
            if not listed and not self._fresh.is_due(ROOT, self._interval):
                return
            found = await self._sync.poll([box.server_name or b"" for box in listed])
            self._poll_took = time.monotonic() - started
            in_use = set(self._wanted())
            for box in listed:
                numbers = found.get(box.server_name or b"")
                if numbers is not None:
                    self._compare(box.ino, numbers, started, box.ino in in_use)
                elif box.ino in in_use:
                    self._changed(box.ino)  # its STATUS could not be read
        except ImapfsError as error:
            log.debug("the server was not polled: %s", error)
        except Exception as error:
            report(error, "polling failed")

    def _compare(self, ino: Ino, numbers: Mapping[str, int], asked: float, in_use: bool) -> None:
        box = self._cache.mailbox(ino)
        if box is None or not box.complete:
            return
        if self._differs(box, numbers):
            # Some servers give one UIDNEXT here, and another one or none when the mailbox is opened.
            if self._polled.get(ino) == numbers and not self._fresh.has_news(ino):
                return
            self._polled[ino] = numbers
            self._changed(ino)
        elif numbers.get("HIGHESTMODSEQ"):
            if not self._agrees(ino, asked) and in_use:
                self._changed(ino)
        elif in_use and not (self._fresh.is_watched(ino) and self._pool.limit > 1):
            # STATUS shows no change of most flags.
            self._changed(ino)
        if self._fresh.has_news(ino):
            self._changed(ino)


class _MailboxWatch:
    """One watch, of a mailbox or of everything: a `imapfs.imap.pool.Preemptible`."""

    def __init__(self, watching: Watching, key: Ino, selected: Mailbox | None) -> None:
        self.key = key
        self.selected = selected
        self.live = False
        """Whether the server announces all changes now."""
        self.since = 0.0
        """When it was started, on the monotonic clock."""
        self._watching = watching
        self._ended = False
        token = trio.lowlevel.current_trio_token()
        self._watch = Watch(
            selected and selected.server_name,
            self._on_events,
            partial(token.run_sync_soon, idempotent=True),
            everywhere=key == ROOT,
        )

    @property
    def rank(self) -> tuple[bool, bool, float]:
        return self._watching.rank(self.key)

    @property
    def stopped(self) -> bool:
        return self._watch.stopped

    def run(self, session: Session) -> None:
        self.since = time.monotonic()
        self._watch.run(session)

    def stop(self) -> None:
        self._watch.stop()

    def end(self) -> None:
        self._ended = True
        self.live = False
        self._watch.close()
        self._watching.unwatch(self.key)

    def _on_events(self, events: Sequence[WatchEvent]) -> None:
        if not self._ended:
            self._watching.handle(self, events)


class _Pause:
    """The time between watches, longer with each that fails.

    Coming online again does not reset it, as a server may end each connection that watches. It need not: a
    watch waits for being online, and does not fail meanwhile.
    """

    def __init__(self) -> None:
        self._delays = Delays(_FIRST_RETRY, _MAX_RETRY)

    async def after(self, lasted: float) -> None:
        """Wait after a watch that has lasted so many seconds."""
        if lasted > _STABLE:
            self._delays.reset()
        await self._delays.sleep()


def _is_inbox(box: Mailbox | None) -> bool:
    return box is not None and is_inbox(box.server_name)
