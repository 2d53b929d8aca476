"""Flags: STORE on the server, then the cache."""

from collections.abc import Callable, Collection
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
from imapfs.imap.session import Session
from imapfs.log import report
from imapfs.model import Ino, MessageRef, ModSeq
from imapfs.store.cache import Cache
from imapfs.store.spool import Draft
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.locate import Locator, ServerMailbox
from imapfs.sync.synchroniser import Synchroniser

_MAX_CONFLICTS: Final = 5
"""How often a change is derived again because another client changed the message first."""


class FlagChanger:
    """Changes the flags of messages."""

    def __init__(
        self, pool: SessionPool, cache: Cache, sync: Synchroniser, locator: Locator, hub: ChangeHub
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._sync = sync
        self._locator = locator
        self._hub = hub

    async def change(self, ino: Ino, change: Callable[[list[str]], tuple[set[str], set[str]]]) -> None:
        """Add and remove the flags that ``change`` derives from the present ones.

        Raises NotSupported for a flag that the server would not keep, MessageGone, or Refused if other
        clients keep changing the message.
        """
        node = self._locator.message(ino)
        async with self._sync.changing(node.parent):
            for _ in range(_MAX_CONFLICTS):
                details = self._cache.details(ino)
                if details is None or details.parent != node.parent:
                    raise MessageGone("it was removed on the server")
                add, remove = change(details.flags.split())
                if not add and not remove:
                    return
                mailbox = self._locator.mailbox(details.parent)
                node = self._locator.message(ino, node.parent)
                ref = mailbox.known(node)
                store = _Store(mailbox, ref, details.modseq, add, remove)
                try:
                    data = await self._pool.run(store.run, mailbox.name)
                except OtherMessage:
                    self._sync.disown(node)
                    raise
                if data is None:
                    raise MessageGone("it was removed on the server")
                flags = data.flags or ""
                changed = self._cache.set_flags(mailbox.ino, [(details.uid, flags, data.modseq or ModSeq(0))])
                self._hub.publish(Changes(mailbox.ino, flagged=changed))
                if not store.conflict:
                    missing = {flag for flag in add if flag.lower() not in flags.lower().split()}
                    if missing:
                        # A server also ignores flags of a message that is being expunged.
                        await self._pool.run(partial(mailbox.select, ref=ref, afresh=True), mailbox.name)
                        raise NotSupported(f"the server does not keep {' '.join(sorted(missing))}")
                    return
        raise Refused("another client keeps changing this message", "INUSE")

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
                stored = await self._pool.run(store.run, mailbox.name)
            except (ConnectionLost, AuthenticationFailed, Throttled):
                raise
            except ImapfsError as error:
                report(error, f"flags of {draft.shown} were not set")
                return data
            if stored is None:
                return data
            data = replace(data, flags=stored.flags, modseq=stored.modseq)
            if not store.conflict:
                uploaded = wanted
        return data


class _Store:
    """One change of flags, in a thread."""

    def __init__(
        self, mailbox: ServerMailbox, ref: MessageRef, modseq: int, add: set[str], remove: set[str]
    ) -> None:
        self._mailbox = mailbox
        self._ref = ref
        self._modseq = modseq
        self._add = add
        self._remove = remove
        self.conflict = False
        """Whether nothing was changed because another client had changed the message."""

    def run(self, session: Session) -> FetchData | None:
        """Return the message's flags afterwards, or None if it is gone."""
        state = self._mailbox.select(session, self._ref)
        kept = state.permanent_flags
        if kept is not None:
            # Some servers say only that new keywords can be made, and keep the system flags all the same.
            says_little = kept == {"\\*"}
            for flag in self._add | self._remove:
                is_new = "\\*" in kept and (says_little or not flag.startswith("\\"))
                if flag.lower() not in kept and not is_new:
                    raise NotSupported(f"the server does not keep the flag {flag} in this mailbox")
        uid = self._ref.uid
        modseq = self._modseq if session.has("CONDSTORE") else 0
        data: FetchData | None = None
        for sign, flags in (("+", self._add), ("-", self._remove)):
            if flags:
                data = session.store(uid, sign, sorted(flags), modseq)
                if data is None:
                    break
                modseq = (data.modseq or 0) if modseq else 0
        if data is None:
            found: list[FetchData] = []
            self._mailbox.select(session, self._ref, afresh=True)
            session.fetch_metadata([uid], found.append)
            self.conflict = True
            return found[0] if found else None
        return data
