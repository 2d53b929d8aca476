"""Open files: where the bytes of each file come from and go to.

A file is a message or a draft. The bytes of a message come from the cache or the server, and never change.
Those of a draft are in the spool. The first write to a message creates a draft with the same inode
(copy-on-write).

A descriptor belongs to the inode, not to the handle: a program sees what other programs write to the file.
"""

import contextlib
import os
from collections.abc import Awaitable
from typing import Final

import trio

from imapfs.errors import CacheError, MessageGone
from imapfs.fs.tree import Entry, MailTree
from imapfs.model import Ino
from imapfs.store.bodies import SMALL, BodyStore
from imapfs.store.cache import Cache
from imapfs.store.rows import Node
from imapfs.store.spool import Draft, Spool
from imapfs.sync.changes import Changes
from imapfs.sync.download import Download, Downloader
from imapfs.sync.prefetch import Prefetcher

_MAX_RELEASE: Final = 1.0
"""Seconds after the last close() of a file in which the kernel has released it."""
Opening = bytes | None | Awaitable[bytes | None]
"""All bytes of a small message, if they are wanted, or an awaitable for them."""


class OpenFile:
    """A file that at least one program has open."""

    __slots__ = ("data", "download", "fd", "flushed", "orphan", "removed", "users", "writers")

    def __init__(self) -> None:
        self.users = 0
        self.writers = 0
        self.flushed = 0
        """Writers that have called close() since the last write. Of some the kernel says later that they are
        gone; one whose descriptor was duplicated may still write."""
        self.fd = -1
        self.data: bytes | None = None
        """All bytes of a small message that is no longer in the cache."""
        self.download: Download | None = None
        self.removed: Node | None = None
        """The message as it was before it was removed on the server."""
        self.orphan: Draft | None = None
        """The draft, if it was deleted. As on any file system, it lives until the last program closes it."""

    def forget_source(self) -> None:
        """Have the next read find out again where the bytes are."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.data = None
        if self.download is not None:
            self.download.release()
            self.download = None


class Files:
    """All open files of a mount."""

    def __init__(
        self,
        cache: Cache,
        bodies: BodyStore,
        downloads: Downloader,
        prefetcher: Prefetcher,
        spool: Spool,
        tree: MailTree,
        background: trio.Nursery,
    ) -> None:
        self._cache = cache
        self._bodies = bodies
        self._downloads = downloads
        self._prefetcher = prefetcher
        self._spool = spool
        self._tree = tree
        self._background = background
        self._open: dict[Ino, OpenFile] = {}
        self._verified: set[Ino] = set()
        """Large messages whose cached bodies were found intact since the mount began."""

    def is_shared(self, ino: Ino) -> bool:
        """Return whether a file is open more than once."""
        file = self._open.get(ino)
        return file is not None and file.users > 1

    def is_written(self, ino: Ino) -> bool:
        """Return whether a program has a file open for writing and has not called close()."""
        file = self._open.get(ino)
        return file is not None and file.writers > file.flushed

    def close(self) -> None:
        """Release everything, as no program can use it any more."""
        for ino, file in self._open.items():
            for _ in range(file.writers):
                self._spool.remove_writer(ino)
            file.forget_source()
        self._open.clear()

    # -- opening and closing -------------------------------------------------------------------------------

    def open(self, node: Node, *, writing: bool, wanted: bool) -> Opening:
        """Open a message. Its exact size is known on return, or once the returned awaitable has finished.

        ``wanted``: return the whole body if it is small. If the caller stops waiting, it calls `release`.
        """
        file = self._use(node.ino, writing)
        if wanted:
            if node.crc is None:
                # Before the prefetcher asks for the messages that follow.
                file.download = file.download or self._downloads.start(node).acquire()
            self._prefetcher.opened(node)
        if node.exact and not (wanted and node.size <= SMALL):
            return None
        data = self._bodies.load(node)
        return self._whole(node, file) if data is None else data

    def open_known(self, ino: Ino) -> None:
        """Open a file for reading whose bytes the kernel already has."""
        self._use(ino, writing=False)

    def open_draft(self, draft: Draft, *, writing: bool) -> None:
        """Open a draft."""
        self._use(draft.ino, writing)

    def _use(self, ino: Ino, writing: bool) -> OpenFile:
        file = self._open.get(ino)
        if file is None:
            file = self._open[ino] = OpenFile()
        file.users += 1
        if writing:
            file.writers += 1
            self._spool.add_writer(ino)
        return file

    def release(self, ino: Ino, *, writing: bool) -> bool:
        """Close a file once. Return whether this was the last writer."""
        file = self._open[ino]
        file.users -= 1
        if writing:
            file.writers -= 1
            file.flushed = max(0, file.flushed - 1)
            self._spool.remove_writer(ino)
        if not file.users:
            del self._open[ino]
            file.forget_source()
        return writing and not file.writers

    async def _whole(self, node: Node, file: OpenFile) -> bytes | None:
        if file.download is None and file.fd < 0:
            file.download = self._downloads.start(node).acquire()
        if file.download is None:
            return None
        spool = await file.download.wait_for(0)
        if spool.small is None:
            return None
        data = bytes(spool.small)
        kept = self._cache.node(node.ino)
        if file.download is not None and kept is not None and kept.crc is not None:
            # It is in the cache now: do not keep it in memory as well.
            file.download.release()
            file.download = None
        return data

    # -- reading -------------------------------------------------------------------------------------------

    async def read(self, ino: Ino, offset: int, size: int) -> bytes:
        """Return bytes of an open file: fewer than ``size`` only at its end. Raises ImapfsError."""
        file = self._open[ino]
        if file.fd < 0 and file.data is None and file.download is None:
            data = await self._locate(ino, file)
            if data is not None:
                # Not kept here: the kernel keeps it, and will hardly ask twice.
                return data[offset : offset + size]
        if file.fd >= 0:
            return os.pread(file.fd, size, offset)
        if file.data is not None:
            return file.data[offset : offset + size]
        assert file.download is not None
        spool = await file.download.wait_for(offset + size)
        if spool.small is not None:
            return bytes(spool.small[offset : offset + size])
        return os.pread(spool.fd, size, offset)

    async def _locate(self, ino: Ino, file: OpenFile) -> bytes | None:
        """Return all bytes of a small message. For any other file, set its descriptor or its download."""
        draft = self._spool.get(ino)
        if draft is not None:
            file.fd = _open_draft(draft)
            return None
        node = self._cache.node(ino)
        if node is None:
            raise MessageGone("it was removed on the server")
        data = self._bodies.load(node)
        if data is not None:
            return data
        fd = self._bodies.pin(node) if ino in self._verified else await self._bodies.open(node)
        if fd is not None:
            self._verified.add(ino)
            if file.fd >= 0 or not file.users:
                os.close(fd)  # another reader was faster, or the last one has given up
            else:
                file.fd = fd
            return None
        if file.download is None:
            file.download = self._downloads.start(node).acquire()
        return None

    # -- writing -------------------------------------------------------------------------------------------

    async def write(self, ino: Ino, offset: int, data: bytes) -> int:
        """Write to an open file, and return the number of bytes. Raises ImapfsError."""
        draft, fd = await self._for_writing(ino, keep=None)
        self._about_to_write(draft)
        try:
            view, at = memoryview(data), offset
            while view:
                written = os.pwrite(fd, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to {draft.file}") from None
        draft.touch()
        return len(data)

    async def truncate(self, ino: Ino, size: int) -> None:
        """Set the size of a file, whether it is open or not. Raises ImapfsError."""
        self._use(ino, writing=True)
        try:
            draft, fd = await self._for_writing(ino, keep=size)
            self._about_to_write(draft)
            try:
                os.ftruncate(fd, size)
            except OSError as error:
                raise CacheError.from_os_error(error, f"cannot write to {draft.file}") from None
            draft.touch()
        finally:
            self.release(ino, writing=True)

    def _about_to_write(self, draft: Draft) -> None:
        """Note that a draft is not complete, before its bytes change. Raises CacheError.

        So a file of which only a part was written is never taken for a complete one.
        """
        if (file := self._open.get(draft.ino)) is not None:
            file.flushed = 0
        if self._spool.get(draft.ino) is not draft:
            return  # deleted: it lives only until it is closed
        if not draft.dirty or draft.closed or draft.state in {"sending", "unsent"}:
            before = draft.dirty, draft.closed, draft.state
            draft.dirty, draft.closed = True, False
            if draft.state == "local":
                return
            draft.state = "open"
            if before == (False, False, "open") and draft.base is None:
                return  # a new file that was not written yet is never taken for a complete one
            try:
                draft.save()
            except CacheError:
                draft.dirty, draft.closed, draft.state = before
                raise

    async def _for_writing(self, ino: Ino, keep: int | None) -> tuple[Draft, int]:
        """Return the draft of an open file and its descriptor. A message becomes a draft with this call.

        ``keep`` is the number of bytes to copy from the message; None for all.
        """
        file = self._open[ino]
        if file.orphan is not None:
            return file.orphan, file.fd
        draft = self._spool.get(ino)
        if draft is None:
            draft = await self._start_version(ino, keep)
            file.forget_source()
        if file.fd < 0:
            file.fd = _open_draft(draft)
        return draft, file.fd

    async def _start_version(self, ino: Ino, keep: int | None) -> Draft:
        node = self._shown(ino)
        content = b""
        if keep != 0:
            content = (await self._downloads.contents(node))[:keep]
            # Another writer may have created the draft meanwhile, or a program may have deleted the message.
            existing = self._spool.get(ino)
            if existing is not None:
                return existing
            node = self._shown(ino)
        draft = self._tree.new_version(node)
        try:
            draft.file.write_bytes(content)
        except OSError as error:
            self._spool.forget(draft)
            raise CacheError.from_os_error(error, f"cannot write to {draft.file}") from None
        return draft

    def _shown(self, ino: Ino) -> Node:
        """Return a message that a program can still reach.

        Raises MessageGone for a removed one, and for one that is hidden because it was deleted or replaced
        here: a new version of it would have no name, and would bring it back.
        """
        node = self._cache.node(ino)
        if node is None or node.name is None:
            raise MessageGone("it was removed")
        return node

    async def flush(self, ino: Ino) -> None:
        """Make what was written to a file survive a power cut. The result is that of close().

        A temporary file is promised nothing before it is renamed, as on any other file system.

        Each close() of a descriptor makes a flush. If all writers have made one since the last write, the
        file is complete: what the kernel says later (RELEASE) may be lost with the mount or the machine.
        """
        file = self._open[ino]
        file.flushed = min(file.writers, file.flushed + 1)
        draft = self._spool.get(ino)
        if draft is None or not draft.dirty or draft.is_temporary:
            return
        if draft.state == "open" and file.flushed == file.writers and draft.size and not draft.closed:
            draft.closed = True
            draft.save()
            self._background.start_soon(self._expect_release, file, draft)
        await draft.secure()

    async def _expect_release(self, file: OpenFile, draft: Draft) -> None:
        """Take a file for open again whose descriptor was duplicated: the kernel says soon if it was not."""
        await trio.sleep(_MAX_RELEASE)
        is_here = self._spool.get(draft.ino) is draft and self._open.get(draft.ino) is file
        if is_here and file.writers and draft.closed and draft.state == "open":
            file.flushed, draft.closed = 0, False
            with contextlib.suppress(CacheError):
                draft.save()

    # -- changes of open files -----------------------------------------------------------------------------

    def on_changes(self, changes: Changes) -> None:
        """Keep the bytes of open messages that were removed; find those that are elsewhere now again."""
        for node in changes.gone:
            self._keep_removed(node)
        for ino in {*changes.uploaded, *(node.ino for node in changes.outdated)}:
            self._verified.discard(ino)
            if (file := self._open.get(ino)) is not None:
                file.forget_source()

    def _keep_removed(self, node: Node) -> None:
        file = self._open.get(node.ino)
        if file is not None and self._cache.node(node.ino) is None:
            file.removed = node
            if file.fd < 0 and file.download is None:
                file.data = self._bodies.load(node)
                file.fd = -1 if (fd := self._bodies.pin(node)) is None else fd

    def deleted(self, draft: Draft) -> None:
        """Keep the bytes of an open draft that is about to be deleted."""
        file = self._open.get(draft.ino)
        if file is not None and self._cache.node(draft.ino) is None:
            if file.fd < 0:
                file.fd = _open_draft(draft)
            file.orphan = draft

    def deleted_entry(self, ino: Ino) -> Entry | None:
        """Return a file that was deleted, or removed on the server, and is still open."""
        file = self._open.get(ino)
        if file is None or self._spool.get(ino) is not None:
            return None
        if file.orphan is not None:
            return Entry.of_draft(file.orphan, size=os.fstat(file.fd).st_size)
        return None if file.removed is None else Entry.of_node(file.removed)


def _open_draft(draft: Draft) -> int:
    try:
        return os.open(draft.file, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise CacheError.from_os_error(error, f"cannot open {draft.file}") from None
