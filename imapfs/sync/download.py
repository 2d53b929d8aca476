"""Downloading message bodies: one download per message, however many readers wait for it.

A reader continues as soon as the exact size is known and its bytes have arrived; the rest arrives in the
background. A reader that gives up does not stop the download.

Threads: a `_Batch` runs in a thread and fills `IncomingBody` objects. Everything else is used on the trio
thread only, including the descriptor of a body that a reader can see. What the thread reports arrives
there in order.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import trio

from imapfs.errors import (
    CacheError,
    ConnectionLost,
    ImapfsError,
    MailboxGone,
    MessageGone,
    OtherMailbox,
    Refused,
)
from imapfs.imap.grammar import FetchData, parse_date
from imapfs.imap.pool import SessionPool
from imapfs.imap.responses import MailboxState
from imapfs.imap.session import Session
from imapfs.imap.wire import Sink
from imapfs.log import report
from imapfs.model import Ino, MessageRef, Uid
from imapfs.store.bodies import SMALL, BodyStore, IncomingBody, Pack
from imapfs.store.cache import Cache
from imapfs.store.rows import Body, Mailbox, Node
from imapfs.sync.changes import ChangeHub, Changes
from imapfs.sync.identify import is_other, is_other_mailbox
from imapfs.sync.same_bodies import SameBodies
from imapfs.sync.synchroniser import Synchroniser
from imapfs.waiting import Signal

log = logging.getLogger(__name__)

_CHUNK: Final = 1 << 20
_MAX_CONTRADICTIONS: Final = 3
"""Bodies of a wrong size after which the announced sizes of an account are not believed any more."""


class Download:
    """The download of one body. Used on the trio thread."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.users = 0
        self.error: ImapfsError | None = None
        self.done = False
        """Whether it has ended: the body is complete, or ``error`` says why it is not."""
        self._incoming: IncomingBody | None = None
        self._changed = Signal()

    async def wait_for(self, end: int) -> IncomingBody:
        """Wait until the exact size is known and the bytes before ``end`` have arrived.

        A small body has to be complete. Raises ImapfsError if the download fails.
        """
        while True:
            if self.error is not None:
                raise self.error.with_traceback(None)
            incoming = self._incoming
            if incoming is not None and (
                self.done or (incoming.size > SMALL and incoming.written >= min(end, incoming.size))
            ):
                return incoming
            await self._changed.wait()

    def wake(self) -> None:
        """Wake all who wait for progress."""
        self._changed.send()

    def set_incoming(self, incoming: IncomingBody) -> None:
        """Set where the bytes go; an earlier body was of a connection that broke."""
        if self._incoming is not None and self._incoming is not incoming:
            self._incoming.discard()
        self._incoming = incoming

    def finish(self, error: ImapfsError | None) -> None:
        """End the download."""
        self.done, self.error = True, error
        self.wake()
        self._release_if_unused()

    def acquire(self) -> "Download":
        """Keep the downloaded bytes readable until `release`, even if the message is removed meanwhile."""
        self.users += 1
        return self

    def release(self) -> None:
        """Undo one call of `acquire`."""
        self.users -= 1
        self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self.done and not self.users and self._incoming is not None:
            self._incoming.discard()


class Downloader:
    """Downloads bodies. Publishes a message whose size is not the announced one before a reader continues."""

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
        self._same = SameBodies(cache, bodies)
        self._contradictions = 0
        """Bodies that had another size than the announced one, also when they were asked for again."""
        # One connection stays free for bodies that a reader waits for.
        self._prefetches = trio.CapacityLimiter(max(1, pool.limit - 1))

    def start(self, node: Node) -> Download:
        """Start the download of a body, or return the one that is under way."""
        download = self._downloads.get(node.ino)
        if download is None:
            download = self._downloads[node.ino] = Download(node)
            self._nursery.start_soon(self._run, node.parent, [download])
        return download

    def prefetch(self, nodes: Sequence[Node]) -> None:
        """Download messages of one mailbox together, before a reader opens them."""
        new = [Download(node) for node in nodes if node.ino not in self._downloads]
        if new:
            self._downloads |= {download.node.ino: download for download in new}
            self._nursery.start_soon(self._run_prefetch, new[0].node.parent, new)

    async def contents(self, node: Node) -> bytes:
        """Return all bytes of a message as the server has it, from the cache if possible.

        Raises ImapfsError.
        """
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
            incoming = await download.wait_for(sys.maxsize)
            return (
                bytes(incoming.small)
                if incoming.small is not None
                else os.pread(incoming.fd, incoming.size, 0)
            )
        finally:
            download.release()

    async def _run_prefetch(self, directory: Ino, downloads: Sequence[Download]) -> None:
        async with self._prefetches:
            await self._run(directory, downloads)

    async def _run(self, directory: Ino, downloads: Sequence[Download]) -> None:
        """Fetch messages of one mailbox.

        If the server refuses several together, those that somebody waits for are asked for one by one: it may
        be only one of them that it cannot deliver.
        """
        error: ImapfsError | None = None
        try:
            mailbox = self._cache.mailbox(directory)
            name = mailbox and mailbox.selectable_name
            if mailbox is None or name is None:
                raise MailboxGone("the mailbox is gone")
            with self._bodies.lend_pack() as pack:
                batch = _Batch(self, self._bodies, pack, name, mailbox, downloads)
                about = (name, downloads[0].node.uid) if len(downloads) == 1 else None
                try:
                    await self._copy_same(batch, downloads)
                    if batch.is_wanting:
                        await self._pool.run(batch.run, name, about=about)
                    if batch.begin_again():
                        await self._pool.run(batch.run, name, about=about, fresh=True)
                finally:
                    batch.deliver()
                    for uid, download in batch.empty.items():
                        self._empty(uid, download)
                    for node in batch.others:
                        self._sync.disown(node)
            error = MessageGone("it was expunged on the server")
        except Exception as failure:
            waited_for = [download for download in downloads if download.users and not download.done]
            if isinstance(failure, Refused) and len(downloads) > 1:
                for download in waited_for:
                    self._nursery.start_soon(self._run, directory, [download])
                downloads = [download for download in downloads if download not in waited_for]
            shown = self._cache.shown(directory)
            error = report(failure, f"{len(downloads)} messages of {shown} were not fetched")
            if isinstance(failure, MailboxGone):
                self._sync.look_again(directory)
        finally:
            for download in downloads:
                if not download.done:
                    self._finish(download, error or ConnectionLost("the mount is ending"))

    async def _copy_same(self, batch: "_Batch", downloads: Sequence[Download]) -> None:
        """Take the bodies that the cache has as those of other messages; see `SameBodies`."""
        found = self._same.find([download.node for download in downloads])
        for download in downloads:
            other = found.get(download.node.ino)
            if other is None:
                continue
            data = self._bodies.load(other)
            fd = None if data is not None else await self._bodies.open(other)
            if data is not None:
                batch.take(download, len(data), [data])
            elif fd is not None:
                try:
                    await trio.to_thread.run_sync(batch.take, download, other.size, _chunks(fd))
                finally:
                    os.close(fd)
            await trio.lowlevel.checkpoint()
        batch.deliver()

    @property
    def sizes_prove(self) -> bool:
        """Whether an announced size says that a body is not the whole message. Of some servers none does."""
        return self._contradictions < _MAX_CONTRADICTIONS

    def on_changes(self, changes: Changes) -> None:
        """Give up the downloads of messages that may have other bytes now, and drop bodies of no use."""
        for node in changes.outdated:
            download = self._downloads.get(node.ino)
            if download is not None:
                self._finish(download, MessageGone("another client has moved it meanwhile: open it again"))
        self._bodies.drop([*changes.gone, *changes.outdated])

    # -- news from a batch ---------------------------------------------------------------------------------

    def sized(self, download: Download, incoming: IncomingBody) -> None:
        """Note the exact size of a large body, which is announced before its first byte."""
        if download.done:
            return
        download.set_incoming(incoming)
        node = download.node
        try:
            self._cache.set_size(node.ino, incoming.size)
        except Exception as error:
            failure = report(error, f"the size of message {node.uid} was not saved")
            if incoming.size != node.size or not isinstance(failure, CacheError):
                # Without the size in the cache the kernel would continue to use a wrong one.
                self._finish(download, failure)
                return
        self._check_size(node, incoming.size)
        download.wake()

    def _empty(self, uid: int, download: Download) -> None:
        """Fail to read a message of which the server delivers nothing."""
        if not download.done:
            error = Refused(
                f"the server delivers no byte of message {uid}, which it announces with"
                f" {download.node.announced} bytes: try again later, or look at it in another mail program"
            )
            log.warning("%s", error)
            self._finish(download, error)

    def _check_size(self, node: Node, size: int) -> None:
        if size != node.size:
            log.info("message %s has %d bytes, not %d as announced", node.uid, size, node.size)
            self._hub.publish(Changes(node.parent, resized=[node.ino]))

    def arrived(self, arrived: Sequence["Arrival"]) -> None:
        """Note complete bodies."""
        arrived = [a for a in arrived if not a.download.done]
        kept = [a.body for a in arrived if a.body is not None]
        cached = True
        try:
            if kept:
                self._bodies.add(kept)
        except Exception as error:
            report(error, f"{len(kept)} messages were not cached")
            cached = False
        for download, incoming, body in arrived:
            if download.node.announced not in {None, incoming.size} and not download.node.exact:
                self._contradictions += 1
            self._same.arrived(download.node.ino, incoming)
            if body is None or not cached:
                # Not in the cache, but those who wait now can read it.
                self.sized(download, incoming)
            else:
                download.set_incoming(incoming)
                self._check_size(download.node, incoming.size)
            if not download.done:
                self._finish(download, None)

    def _finish(self, download: Download, error: ImapfsError | None) -> None:
        del self._downloads[download.node.ino]
        download.finish(error)


class Arrival(NamedTuple):
    """A complete body. ``body`` says where it is on disk; None if it is not cached."""

    download: Download
    incoming: IncomingBody
    body: Body | None


class _Batch:
    """Downloads messages of one mailbox, in a thread."""

    def __init__(
        self,
        downloader: Downloader,
        bodies: BodyStore,
        pack: Pack,
        name: bytes,
        mailbox: Mailbox,
        downloads: Sequence[Download],
    ) -> None:
        self._downloader = downloader
        self._bodies = bodies
        self._pack = pack
        self._mailbox = name
        self._uidvalidity = mailbox.uidvalidity
        self._uidnext = mailbox.uidnext
        self._modseq = mailbox.modseq
        self.others: list[Node] = []
        """Messages that the server does not have: their UIDs belong to others now."""
        self._wanted = {int(d.node.uid): d for d in downloads if d.node.uid is not None}
        self._doubted: dict[int, Download] = {}
        """Messages of which a body came that is not as large as announced."""
        self.empty: dict[int, Download] = {}
        """Messages of which nothing came twice, although the server announces bytes."""
        self._is_second = False
        """Whether the doubted ones are asked for once more."""
        self._is_dropped = False
        """Whether the body that is arriving is not kept."""
        self._incoming: IncomingBody | None = None
        """The body that is arriving, unless readers can see it."""
        self._shown: IncomingBody | None = None
        """The body that is arriving, if readers can see it."""
        self._arrived: deque[Arrival] = deque()
        self._token = trio.lowlevel.current_trio_token()

    def deliver(self) -> None:
        """On the trio thread: pass on all that has arrived since the last call, in one transaction."""
        arrived = [self._arrived.popleft() for _ in range(len(self._arrived))]
        if arrived:
            self._downloader.arrived(arrived)

    @property
    def is_wanting(self) -> bool:
        """Whether any message is still to be fetched."""
        return bool(self._wanted)

    def take(self, download: Download, size: int, chunks: Iterable[bytes]) -> None:
        """Take the bytes of a message from the cache instead. If the disk is full, it stays wanted."""
        uid = int(download.node.uid or 0)
        try:
            sink = self._open(uid, size)
            for chunk in chunks:
                sink.write(chunk)
            self._close(uid, b"")
        except CacheError as error:
            report(error, f"message {uid} was not copied within the cache")
            self._drop()

    def run(self, session: Session) -> None:
        """Fetch the messages that are still wanted. One that the server does not have stays wanted.

        Raises ImapfsError.
        """
        fresh = session.selected != self._mailbox or session.state.uidvalidity != self._uidvalidity
        try:
            if fresh:
                session.examine_messages(self._mailbox, self._wanted, self._verify)
            self._fetch(session)
            if self._wanted and not fresh:
                # The server may not have announced messages that came after the mailbox was selected: only
                # selecting it again can show that a message is gone.
                session.examine(self._mailbox)
                self._fetch(session)
        finally:
            self._drop()
            self._shown = None

    def begin_again(self) -> bool:
        """Make the doubted messages the wanted ones. Return whether there are any: `run` fetches them again.

        A server that has a hiccup gives an empty or cut body; over another connection, the right one.
        """
        if self._doubted:
            self._wanted, self._doubted, self._is_second = self._doubted, {}, True
        return self._is_second

    def _is_doubtful(self, download: Download, size: int) -> bool:
        """Return whether a body has another size than the server has announced, for the first time."""
        node = download.node
        if node.announced is None or size == node.announced:
            return False
        if size == 0 or self._is_second:
            return size == 0
        return self._downloader.sizes_prove and not (node.exact and size == node.size > node.announced)

    def _verify(self, state: MailboxState, found: dict[int, FetchData]) -> None:
        """Give up the messages whose UIDs belong to others now. Raises OtherMailbox."""
        if state.uidvalidity == self._uidvalidity and is_other_mailbox(
            self._uidvalidity, self._uidnext, self._modseq, state
        ):
            raise OtherMailbox("the mailbox on the server is an older one: list it again")
        for uid, data in found.items():
            download = self._wanted.get(uid)
            if download is None:
                continue
            ref = MessageRef(
                self._mailbox, self._uidvalidity, Uid(uid), download.node.date, download.node.announced
            )
            if is_other(ref, parse_date(data.date or b"")[0], data.size):
                del self._wanted[uid]
                self.others.append(download.node)

    def _fetch(self, session: Session) -> None:
        session.fetch_bodies(self._mailbox, self._uidvalidity, list(self._wanted), self._open, self._close)

    def _open(self, uid: int | None, size: int) -> Sink:
        if uid is None and len(self._wanted) == 1:
            (uid,) = self._wanted
        download = None if uid is None else self._wanted.get(uid)
        self._drop()
        if uid is not None and download is None:
            return _Dropped()  # nobody has asked for it, or it comes for the second time
        if download is not None and self._is_doubtful(download, size):
            self._is_dropped = True
            return _Dropped()
        incoming = IncomingBody(self._bodies, size)
        if download is None or size <= SMALL:
            self._incoming = incoming
            return incoming
        self._shown = incoming
        self._token.run_sync_soon(self._downloader.sized, download, incoming)
        return _Progress(incoming, partial(self._token.run_sync_soon, download.wake, idempotent=True))

    def _close(self, uid: int, data: bytes | None) -> None:
        download = self._wanted.get(uid)
        if download is None or data is None:
            self._drop()
            return
        incoming = self._shown or self._incoming
        if self._is_dropped or self._is_doubtful(download, incoming.written if incoming else len(data)):
            self._drop()
            del self._wanted[uid]
            (self.empty if self._is_second else self._doubted)[uid] = download
            return
        if incoming is None:
            incoming = self._incoming = IncomingBody(self._bodies, len(data))
            incoming.write(data)
        try:
            # While nothing says that this server's sizes are wrong, what is too short is asked for again by
            # the next reader.
            is_cut = incoming.written < (download.node.announced or 0) and self._downloader.sizes_prove
            body = None if is_cut else incoming.keep(download.node.ino, Uid(uid), self._pack)
        except CacheError as error:
            if incoming.small is None:
                raise
            # A message in memory can be read even if the disk is full.
            incoming.discard()
            report(error, f"message {uid} was not cached")
            body = None
        self._incoming = self._shown = None
        del self._wanted[uid]
        self._arrived.append(Arrival(download, incoming, body))
        self._token.run_sync_soon(self.deliver, idempotent=True)

    def _drop(self) -> None:
        self._is_dropped = False
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None


def _chunks(fd: int) -> Iterator[bytes]:
    at = 0
    while data := os.pread(fd, _CHUNK, at):
        yield data
        at += len(data)


class _Dropped:
    """Takes the bytes of a body that is not the message's."""

    def write(self, data: bytes) -> None:
        pass


class _Progress:
    """Writes the bytes of a body, and wakes those who wait for them."""

    def __init__(self, incoming: IncomingBody, wake: Callable[[], object]) -> None:
        self._incoming = incoming
        self._wake = wake

    def write(self, data: bytes) -> None:
        self._incoming.write(data)
        self._wake()
