"""Bringing message bodies from the server: one download a message, however many readers wait for it.

A reader goes on as soon as the exact size and its bytes are there; the rest comes in the background. A reader
that gives up does not stop the download.

Threads: a `_Batch` runs in a thread and fills spools. Everything else, descriptors of spools that readers
have seen included, is touched on the trio thread only, where the thread's news arrive in order.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import trio

from imapfs.errors import CacheError, ConnectionLost, ImapfsError, MailboxGone, MessageGone
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.imap.wire import Sink
from imapfs.log import report
from imapfs.model import Ino, Uid
from imapfs.store.bodies import SMALL, BodyStore, IncomingBody, Pack
from imapfs.store.cache import Cache
from imapfs.store.rows import Body, Mailbox, Node
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.synchroniser import Synchroniser
from imapfs.waiting import Signal

log = logging.getLogger(__name__)


class Download:
    """The body of one message on its way; lives on the trio thread."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.users = 0
        self.error: ImapfsError | None = None
        self.done = False
        """Nothing more comes: the body is complete and kept, or ``error`` says why it is not."""
        self._spool: IncomingBody | None = None
        self._changed = Signal()

    async def wait_for(self, end: int) -> IncomingBody:
        """Wait until the exact size is known and the bytes before ``end``, or all there are, have come.

        A small body counts only when it is complete. Raises what kept it from coming.
        """
        while True:
            if self.error is not None:
                raise self.error.with_traceback(None)
            spool = self._spool
            if spool is not None and (
                self.done or (spool.size > SMALL and spool.written >= min(end, spool.size))
            ):
                return spool
            await self._changed.wait()

    def wake(self) -> None:
        """Let everyone who waits look again."""
        self._changed.send()

    def set_spool(self, spool: IncomingBody) -> None:
        """From now on the bytes come here; an earlier spool was of a connection that broke."""
        if self._spool is not None and self._spool is not spool:
            self._spool.discard()
        self._spool = spool

    def finish(self, error: ImapfsError | None) -> None:
        """Nothing more comes."""
        self.done, self.error = True, error
        self.wake()
        self._release_if_unused()

    def acquire(self) -> "Download":
        """Keep what was downloaded readable until `release`, even if the message is removed meanwhile."""
        self.users += 1
        return self

    def release(self) -> None:
        self.users -= 1
        self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self.done and not self.users and self._spool is not None:
            self._spool.discard()


class Downloader:
    """Downloads in progress. A message whose exact size is not the one that was shown is published on ``hub``
    before any reader continues."""

    def __init__(
        self,
        pool: SessionPool,
        cache: Cache,
        bodies: BodyStore,
        sync: Synchroniser,
        nursery: trio.Nursery,
        hub: ChangeHub,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._bodies = bodies
        self._nursery = nursery
        self._sync = sync
        self._hub = hub
        self._downloads: dict[Ino, Download] = {}
        # One connection stays free for what somebody waits for.
        self._ahead = trio.CapacityLimiter(max(1, pool.limit - 1))

    def start(self, node: Node) -> Download:
        """The download of ``node``'s body, joined if it is under way."""
        download = self._downloads.get(node.ino)
        if download is None:
            download = self._downloads[node.ino] = Download(node)
            self._nursery.start_soon(self._run, node.parent, [download])
        return download

    def start_ahead(self, nodes: Sequence[Node]) -> None:
        """Download messages of one mailbox together, before anybody wants them."""
        new = [Download(node) for node in nodes if node.ino not in self._downloads]
        if new:
            self._downloads |= {download.node.ino: download for download in new}
            self._nursery.start_soon(self._run_ahead, new[0].node.parent, new)

    async def contents(self, node: Node) -> bytes:
        """Return all bytes of a message as the server has it, from the cache if they are there."""
        data = self._bodies.load(node)
        if data is not None:
            return data
        fd = await self._bodies.open(node)
        if fd is not None:
            try:
                return os.pread(fd, os.fstat(fd).st_size, 0)
            finally:
                os.close(fd)
        download = self.start(node).acquire()
        try:
            spool = await download.wait_for(sys.maxsize)
            return bytes(spool.small) if spool.small is not None else os.pread(spool.fd, spool.size, 0)
        finally:
            download.release()

    async def _run_ahead(self, directory: Ino, downloads: Sequence[Download]) -> None:
        async with self._ahead:
            await self._run(directory, downloads)

    async def _run(self, directory: Ino, downloads: Sequence[Download]) -> None:
        """Fetch messages of one mailbox."""
        error: ImapfsError | None = None
        try:
            mailbox = self._cache.mailbox(directory)
            if mailbox is None or mailbox.server_name is None:
                raise MailboxGone("the mailbox is gone")
            with self._bodies.lend_pack() as pack:
                batch = _Batch(self, self._bodies, pack, mailbox, downloads)
                try:
                    await self._pool.run(batch.run, mailbox.server_name)
                finally:
                    batch.deliver()
            error = MessageGone("it was expunged on the server")
        except Exception as failure:
            error = report(failure, f"{len(downloads)} messages of mailbox {directory} were not fetched")
            if isinstance(failure, MailboxGone):
                self._sync.look_again(directory)
        finally:
            for download in downloads:
                if not download.done:
                    self._finish(download, error or ConnectionLost("the mount is ending"))

    # News from a batch, on the trio thread:

    def sized(self, download: Download, spool: IncomingBody) -> None:
        """The exact size of a large body is known."""
        if download.done:
            return
        download.set_spool(spool)
        node = download.node
        try:
            self._cache.set_size(node.ino, spool.size)
        except Exception as error:
            failure = report(error, f"the size of message {node.uid} was not kept")
            if spool.size != node.size or not isinstance(failure, CacheError):
                # Without the size in the cache the kernel would go on with the wrong one.
                self._finish(download, failure)
                return
        self._check_size(node, spool.size)
        download.wake()

    def _check_size(self, node: Node, size: int) -> None:
        if size != node.size:
            log.info("message %s has %d bytes, not %d as announced", node.uid, size, node.size)
            self._hub.publish(Changes(node.parent, resized=[node.ino]))

    def came(self, arrived: Sequence["Arrival"]) -> None:
        """Bodies are complete."""
        arrived = [a for a in arrived if not a.download.done]
        kept = [a.body for a in arrived if a.body is not None]
        cached = True
        try:
            if kept:
                self._bodies.add(kept)
        except Exception as error:
            report(error, f"{len(kept)} messages were not cached")
            cached = False
        for download, spool, body in arrived:
            if body is None or not cached:
                # Not in the cache, but there for those who wait now.
                self.sized(download, spool)
            else:
                download.set_spool(spool)
                self._check_size(download.node, spool.size)
            if not download.done:
                self._finish(download, None)

    def _finish(self, download: Download, error: ImapfsError | None) -> None:
        del self._downloads[download.node.ino]
        download.finish(error)


class Arrival(NamedTuple):
    """A body that is complete, and in its file unless ``body`` is None."""

    download: Download
    spool: IncomingBody
    body: Body | None


class _Batch:
    """The part of a fetch that runs in a thread."""

    def __init__(
        self,
        downloader: Downloader,
        bodies: BodyStore,
        pack: Pack,
        mailbox: Mailbox,
        downloads: Sequence[Download],
    ) -> None:
        self._downloader = downloader
        self._bodies = bodies
        self._pack = pack
        self._mailbox = mailbox
        self._wanted = {int(d.node.uid): d for d in downloads if d.node.uid is not None}
        self._spool: IncomingBody | None = None
        """The body that is coming in, unless a download has it already."""
        self._shown: IncomingBody | None = None
        """The body that is coming in, where readers can see it."""
        self._arrived: deque[Arrival] = deque()
        self._token = trio.lowlevel.current_trio_token()

    def deliver(self) -> None:
        """On the trio thread: pass on what has arrived since the last time, all of it in one transaction."""
        arrived = [self._arrived.popleft() for _ in range(len(self._arrived))]
        if arrived:
            self._downloader.came(arrived)

    def run(self, session: Session) -> None:
        """Fetch what is still wanted; what the server does not have stays wanted."""
        name = self._mailbox.server_name
        assert name is not None
        fresh = session.selected != name
        try:
            self._fetch(session, name)
            if self._wanted and not fresh:
                # The server may not have told this connection of messages that came after it was selected:
                # only a fresh look can say that a message is gone.
                session.examine(name)
                self._fetch(session, name)
        finally:
            self._drop()
            self._shown = None

    def _fetch(self, session: Session, name: bytes) -> None:
        session.fetch_bodies(name, self._mailbox.uidvalidity, list(self._wanted), self._open, self._close)

    def _open(self, uid: int | None, size: int) -> Sink:
        if uid is None and len(self._wanted) == 1:
            (uid,) = self._wanted
        spool = IncomingBody(self._bodies, size)
        download = None if uid is None else self._wanted.get(uid)
        if download is None or size <= SMALL:
            self._spool = spool
            return spool
        self._shown = spool
        self._token.run_sync_soon(self._downloader.sized, download, spool)
        return _Progress(spool, partial(self._token.run_sync_soon, download.wake, idempotent=True))

    def _close(self, uid: int, data: bytes | None) -> None:
        download = self._wanted.get(uid)
        if download is None or data is None:
            self._drop()
            return
        spool = self._shown or self._spool
        if spool is None:
            spool = self._spool = IncomingBody(self._bodies, len(data))
            spool.write(data)
        try:
            body = spool.keep(download.node.ino, Uid(uid), self._pack)
        except CacheError as error:
            if spool.small is None:
                raise
            # A full disk is no reason not to show a message that is in memory.
            spool.discard()
            report(error, f"message {uid} was not cached")
            body = None
        self._spool = self._shown = None
        del self._wanted[uid]
        self._arrived.append(Arrival(download, spool, body))
        self._token.run_sync_soon(self.deliver, idempotent=True)

    def _drop(self) -> None:
        if self._spool is not None:
            self._spool.discard()
            self._spool = None


class _Progress:
    """Passes a body on to its spool and tells those who wait for it."""

    def __init__(self, spool: IncomingBody, wake: Callable[[], object]) -> None:
        self._spool = spool
        self._wake = wake

    def write(self, data: bytes) -> None:
        self._spool.write(data)
        self._wake()
