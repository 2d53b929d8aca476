"""A cache that is kept equal to a real server, without a file system above it."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from imapfs.imap.pool import SessionPool
from imapfs.model import ROOT, Ino
from imapfs.store.bodies import BodyStore
from imapfs.store.cache import Cache
from imapfs.store.spool import Spool
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.synchroniser import Synchroniser
from tests.support.accounts import pool
from tests.support.mounting import DEADLINE, MailAccount


class Mirror:
    """A cache with its synchroniser, and the changes that were published."""

    def __init__(self, connections: SessionPool, cache: Cache, nursery: trio.Nursery) -> None:
        self.pool = connections
        self.cache = cache
        self.bodies = BodyStore(cache, 1 << 30)
        self.changes: list[Changes] = []
        self.hub = ChangeHub()
        self.hub.subscribe(self.changes.append)
        self.hub.subscribe(lambda change: self.bodies.drop([*change.gone, *change.outdated]))
        self.spool = Spool(cache.directory / "spool")
        self.sync = Synchroniser(connections, cache, self.spool, nursery, self.hub)

    async def refresh_tree(self) -> None:
        refresh = self.sync.refresh_tree(0)
        assert refresh is not None
        with trio.fail_after(DEADLINE):
            await refresh.finished()
        if refresh.error is not None:
            raise refresh.error

    async def refresh(self, mailbox: str = "INBOX") -> None:
        """Synchronise afresh; `changes` are those of this time afterwards."""
        self.changes.clear()
        refresh = self.sync.refresh_mailbox(self.ino(mailbox), -1)
        assert refresh is not None
        with trio.fail_after(DEADLINE):
            await refresh.finished()
        if refresh.error is not None:
            raise refresh.error

    async def refresh_at_once(self, *mailboxes: str) -> None:
        """Begin to synchronise all of them before the first one is done."""
        self.changes.clear()
        with trio.fail_after(DEADLINE):
            for refresh in [self.sync.refresh_mailbox(self.ino(mailbox), -1) for mailbox in mailboxes]:
                assert refresh is not None
                await refresh.finished()
                assert refresh.error is None

    def ino(self, mailbox: str) -> Ino:
        ino = ROOT
        for name in mailbox.split("/"):
            node = self.cache.child(ino, name.encode())
            assert node is not None, f"no {name}"
            ino = node.ino
        return ino

    def flags(self, mailbox: str = "INBOX") -> dict[int, set[str]]:
        return {uid: set(words.split()) for uid, words in self.cache.flags(self.ino(mailbox)).items()}

    def messages(self, mailbox: str = "INBOX") -> dict[int, tuple[Ino, int, int | None]]:
        """UID -> inode, size, INTERNALDATE."""
        nodes = self.cache.children(self.ino(mailbox), 0, 1_000_000)
        return {int(n.uid): (n.ino, n.size, n.date) for n in nodes if n.uid is not None}

    def gone(self) -> list[Ino]:
        return [gone.ino for changes in self.changes for gone in changes.gone]

    def added(self) -> list[Ino]:
        return [ino for changes in self.changes for ino, _ in changes.added]

    def flagged(self) -> list[Ino]:
        return [ino for changes in self.changes for ino in changes.flagged]


@contextlib.asynccontextmanager
async def mirror(account: MailAccount, directory: Path) -> AsyncIterator[Mirror]:
    """Begin with the cache in ``directory``, whatever it holds, and know the list of mailboxes."""
    cache = Cache.open(directory / "cache", "subject")
    try:
        async with pool(account) as connections, trio.open_nursery() as nursery:
            made = Mirror(connections, cache, nursery)
            await made.refresh_tree()
            yield made
    finally:
        cache.close()
