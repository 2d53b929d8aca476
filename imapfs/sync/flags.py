"""Flags: STORE on the server, then the cache.

Changes of different messages of a mailbox that come while one is under way are joined: all of them are sent
together, and each has its own answer.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from imapfs.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ImapfsError,
    MessageGone,
    NotSupported,
    OtherMessage,
    Refused,
    Throttled,
)
from imapfs.imap.grammar import FetchData
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import FlagChange, Session
from imapfs.log import report
from imapfs.model import Ino, MessageRef, ModSeq
from imapfs.store.cache import Cache
from imapfs.store.spool import Draft
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.locate import Locator, ServerMailbox
from imapfs.sync.synchroniser import Synchroniser

Derive = Callable[[list[str]], tuple[set[str], set[str]]]
"""Returns the flags to add and to remove, given the present ones."""
_MAX_BATCH: Final = 100
"""Changes that share a round trip."""
_MAX_CONFLICTS: Final = 5
"""How often a change is derived again because another client changed the message first."""


class _Change:
    """A change of one message's flags that somebody waits for."""

    def __init__(self, ino: Ino, mailbox: Ino, derive: Derive) -> None:
        self.ino = ino
        self.mailbox = mailbox
        self.derive = derive
        self.done = False
        self.error: ImapfsError | None = None

    def finish(self, error: ImapfsError | None = None) -> None:
        self.done, self.error = True, error


class FlagChanger:
    """Changes the flags of messages. Changes that come while one is under way share the next round trip."""

    def __init__(
        self, pool: SessionPool, cache: Cache, sync: Synchroniser, locator: Locator, hub: ChangeHub
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._sync = sync
        self._locator = locator
        self._hub = hub
        self._waiting: list[_Change] = []

    async def change(self, ino: Ino, derive: Derive) -> None:
        """Add and remove the flags that ``derive`` returns for the present ones.

        Raises NotSupported for a flag that the server would not keep, MessageGone, or Refused if other
        clients keep changing the message.
        """
        own = _Change(ino, self._locator.message(ino).parent, derive)
        self._waiting.append(own)
        try:
            async with self._sync.changing(own.mailbox):
                if not own.done:  # it was not done with the change of somebody else
                    await self._run(own.mailbox, self._take(own))
        finally:
            if own in self._waiting:
                self._waiting.remove(own)
        if own.error is not None:
            raise own.error.with_traceback(None)

    def _take(self, own: _Change) -> list[_Change]:
        """Take a change, and others that wait for the same mailbox: one for each message."""
        taken = {own.ino: own}
        for other in self._waiting:
            if other.mailbox == own.mailbox and len(taken) < _MAX_BATCH:
                taken.setdefault(other.ino, other)
        batch = list(taken.values())
        # If this task is cancelled, each of the others goes on by itself.
        self._waiting = [change for change in self._waiting if change not in batch]
        return batch

    async def _run(self, directory: Ino, batch: Sequence[_Change]) -> None:
        """Carry out changes of messages of one mailbox, which the caller has in exclusive use."""
        for _ in range(_MAX_CONFLICTS):
            stores = [(change, store) for change in batch if (store := self._prepare(directory, change))]
            if not stores:
                return
            mailbox = stores[0][1].mailbox
            try:
                await self._pool.run(_Stores([store for _, store in stores]).run, mailbox.name)
            except ImapfsError as error:
                if isinstance(error, Throttled) and len(stores) > 1:
                    # It may be about one message.
                    for change, _ in stores:
                        await self._run(directory, [change])
                    return
                for change, _ in stores:
                    change.finish(error)
                return
            self._learn(mailbox, [store for _, store in stores])
            for change, store in stores:
                await self._conclude(change, store)
        for change in batch:
            if not change.done:
                change.finish(Refused("another client keeps changing this message", "INUSE"))

    def _prepare(self, directory: Ino, change: _Change) -> "_Store | None":
        """Return what is to be asked for; None if the change is done."""
        if change.done:
            return None
        try:
            node = self._locator.message(change.ino, directory)
            details = self._cache.details(change.ino)
            if details is None:
                raise MessageGone("it was removed on the server")
            add, remove = change.derive(details.flags.split())
            if add or remove:
                mailbox = self._locator.mailbox(directory)
                return _Store(mailbox, mailbox.known(node), details.modseq, add, remove)
        except ImapfsError as error:
            change.finish(error)
        else:
            change.finish()
        return None

    def _learn(self, mailbox: ServerMailbox, stores: Iterable["_Store"]) -> None:
        flags = [
            (store.ref.uid, store.data.flags or "", store.data.modseq or ModSeq(0))
            for store in stores
            if store.data is not None
        ]
        changed = self._cache.set_flags(mailbox.ino, flags)
        self._hub.publish(Changes(mailbox.ino, flagged=changed))

    async def _conclude(self, change: _Change, store: "_Store") -> None:
        """Finish a change, unless another client has changed the message first."""
        error = store.error
        if isinstance(error, OtherMessage):
            self._sync.disown(self._locator.message(change.ino))
        elif error is None and store.data is None:
            error = MessageGone("it was removed on the server")
        elif error is None and store.conflict:
            return
        elif error is None and store.data is not None:
            kept = (store.data.flags or "").lower().split()
            missing = {flag for flag in store.add if flag.lower() not in kept}
            if missing:
                error = await self._why_missing(store, missing)
        change.finish(error)

    async def _why_missing(self, store: "_Store", missing: Collection[str]) -> ImapfsError:
        try:
            # A server also ignores flags of a message that is being expunged.
            look = partial(store.mailbox.select, ref=store.ref, afresh=True)
            await self._pool.run(look, store.mailbox.name)
        except ImapfsError as error:
            return error
        return NotSupported(f"the server does not keep {' '.join(sorted(missing))}")

    async def bring(
        self, mailbox: ServerMailbox, draft: Draft, data: FetchData, uploaded: Collection[str]
    ) -> FetchData:
        """Give the message that a draft has become the flags that the draft got while it was uploaded.

        ``data`` describes the message, ``uploaded`` are the flags that it was uploaded with. Return what
        describes it afterwards. A change that the server refuses is reported. The caller has the mailbox in
        exclusive use. Raises ConnectionLost, Throttled, AuthenticationFailed: the draft must stay then, as
        nothing else knows of the flags.
        """
        for _ in range(_MAX_CONFLICTS):
            wanted, present = {*draft.flags.split()}, {*(data.flags or "").split()}
            add, remove = wanted - {*uploaded} - present, ({*uploaded} - wanted) & present
            if (not add and not remove) or data.uid is None:
                return data
            ref = replace(mailbox.ref(data.uid), size=data.size)
            store = _Store(mailbox, ref, data.modseq or 0, add, remove)
            try:
                await self._pool.run(_Stores([store]).run, mailbox.name)
                if store.error is not None:
                    raise store.error
            except (ConnectionLost, AuthenticationFailed, Throttled):
                raise
            except ImapfsError as error:
                report(error, f"flags of {draft.shown} were not set")
                return data
            stored = store.data
            if stored is None:
                return data
            data = replace(data, flags=stored.flags, modseq=stored.modseq)
            if not store.conflict:
                uploaded = wanted
        return data


class _Store:
    """One change of flags, as it is asked for, and what came of it."""

    def __init__(
        self, mailbox: ServerMailbox, ref: MessageRef, modseq: int, add: set[str], remove: set[str]
    ) -> None:
        self.mailbox = mailbox
        self.ref = ref
        self.modseq = modseq
        self.add = add
        self.steps = [(sign, sorted(flags)) for sign, flags in (("+", add), ("-", remove)) if flags]
        self.data: FetchData | None = None
        """The message's flags afterwards; None if it is gone, or if there is an ``error``."""
        self.error: ImapfsError | None = None
        self.conflict = False
        """Whether nothing was changed because another client had changed the message."""

    def check(self, session: Session) -> None:
        """Select the mailbox. Raises ImapfsError if the change is impossible there."""
        kept = self.mailbox.select(session, self.ref).permanent_flags
        if kept is None:
            return
        # Some servers say only that new keywords can be made, and keep the system flags all the same.
        says_little = kept == {"\\*"}
        for flag in {flag for _, flags in self.steps for flag in flags}:
            is_new = "\\*" in kept and (says_little or not flag.startswith("\\"))
            if flag.lower() not in kept and not is_new:
                raise NotSupported(f"the server does not keep the flag {flag} in this mailbox")


class _Stores:
    """Changes of flags of messages of one mailbox, in a thread. Each has an outcome of its own."""

    def __init__(self, stores: Sequence[_Store]) -> None:
        self._stores = stores

    def run(self, session: Session) -> None:
        """Carry them out, in one round trip where none is an exception.

        Raises ConnectionLost, Throttled.
        """
        for store in self._stores:
            store.data, store.error, store.conflict = None, None, False
            try:
                store.check(session)
            except (ConnectionLost, Throttled):
                raise
            except ImapfsError as error:
                store.error = error
        for step in range(2):
            due = [s for s in self._stores if s.error is None and not s.conflict and len(s.steps) > step]
            self._store(session, due, step)
        for store in self._stores:
            if store.conflict:
                self._look(session, store)

    @staticmethod
    def _store(session: Session, stores: Sequence[_Store], step: int) -> None:
        if not stores:
            return
        changes = []
        for store in stores:
            unchanged_since = store.modseq if session.has("CONDSTORE") else 0
            if store.data is not None and unchanged_since:
                unchanged_since = store.data.modseq or 0
            changes.append(FlagChange(store.ref.uid, *store.steps[step], unchanged_since))
        for store, outcome in zip(stores, session.store(changes), strict=True):
            if isinstance(outcome, Throttled):
                raise outcome
            if isinstance(outcome, Refused):
                store.error = outcome
            elif outcome is None:
                store.conflict = True
            else:
                store.data = outcome

    @staticmethod
    def _look(session: Session, store: _Store) -> None:
        """Find out how the message is now."""
        found: list[FetchData] = []
        try:
            store.mailbox.select(session, store.ref, afresh=True)
            session.fetch_metadata([store.ref.uid], found.append)
        except (ConnectionLost, Throttled):
            raise
        except ImapfsError as error:
            store.error = error
        store.data = found[0] if found else None
