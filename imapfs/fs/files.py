"""Open files: where the bytes of each come from and go to.

A file is a message (its bytes come from the cache or the server, and never change), or a draft (its bytes are
in the spool). The first write to a message makes a draft of it, with the same inode: copy-on-write.

A descriptor belongs to the inode, not to the handle: whoever has a file open sees what others write to it.
"""

import os
from collections.abc import Awaitable, Callable

from imapfs.errors import CacheError, MessageGone
from imapfs.model import Ino
from imapfs.store.bodies import SMALL, BodyStore
from imapfs.store.cache import Cache, Node
from imapfs.store.spool import Draft, Spool
from imapfs.sync.download import Download, Downloader
from imapfs.sync.prefetch import FetchAhead

Opening = bytes | None | Awaitable[bytes | None]
"""All bytes of a small message, if they are wanted; or what has to be awaited for them."""


class OpenFile:
    """What some program has open."""

    def __init__(self) -> None:
        self.users = 0
        self.writers = 0
        self.fd = -1
        self.data: bytes | None = None
        """All of a small message that is not in the cache any more."""
        self.download: Download | None = None
        self.gone: Node | None = None
        """What it was, once it was removed on the server."""
        self.orphan: Draft | None = None
        """The draft that it was, once it was deleted: as on any disk it lives on until it is closed."""

    def forget_source(self) -> None:
        """Find the bytes anew at the next read."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.data = None
        if self.download is not None:
            self.download.release()
            self.download = None


class Files:
    """All open files of a mount. ``make_draft(node)`` begins a new version of a message."""

    def __init__(
        self,
        cache: Cache,
        bodies: BodyStore,
        downloads: Downloader,
        ahead: FetchAhead,
        spool: Spool,
        make_draft: Callable[[Node], Draft],
    ) -> None:
        self._cache = cache
        self._bodies = bodies
        self._downloads = downloads
        self._ahead = ahead
        self._spool = spool
        self._make_draft = make_draft
        self._open: dict[Ino, OpenFile] = {}
        self._verified: set[Ino] = set()
        """Large messages whose cached bodies were found intact since the mount began."""

    def get(self, ino: Ino) -> OpenFile | None:
        return self._open.get(ino)

    def close(self) -> None:
        """Release everything."""
        for file in self._open.values():
            file.forget_source()
        self._open.clear()

    # -- opening and closing -------------------------------------------------------------------------------

    def open(self, node: Node, *, writing: bool, wanted: bool) -> Opening:
        """Begin to use a message; its exact size is known when this returns, or what it returns was awaited.

        ``wanted``: the whole body is of use to the caller, and is returned if it is small. Who gives up the
        waiting calls `release`.
        """
        file = self._use(node.ino, writing)
        if wanted:
            if node.crc is None:
                # Before what is fetched ahead of it.
                file.download = file.download or self._downloads.start(node).acquire()
            self._ahead.opened(node)
        if node.exact and not (wanted and node.size <= SMALL):
            return None
        data = self._bodies.load(node)
        return self._whole(node, file) if data is None else data

    def open_known(self, ino: Ino) -> None:
        """Begin to read a file that the caller has all bytes of."""
        self._use(ino, writing=False)

    def open_draft(self, draft: Draft, *, writing: bool) -> None:
        """Begin to use a draft."""
        self._use(draft.ino, writing)

    def _use(self, ino: Ino, writing: bool) -> OpenFile:
        file = self._open.setdefault(ino, OpenFile())
        file.users += 1
        file.writers += writing
        return file

    def release(self, ino: Ino, *, writing: bool) -> bool:
        """End one use of a file; true if it was the last one for writing."""
        file = self._open[ino]
        file.users -= 1
        file.writers -= writing
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
            # It is in its file: no need to hold it in memory too.
            file.download.release()
            file.download = None
        return data

    # -- reading -------------------------------------------------------------------------------------------

    async def read(self, ino: Ino, offset: int, size: int) -> bytes:
        """Bytes of an open file; fewer than ``size`` only at its end."""
        file = self._open[ino]
        if file.fd < 0 and file.data is None and file.download is None:
            data = await self._locate(ino, file)
            if data is not None:
                # Not to be kept: the kernel keeps it, so that it hardly asks twice.
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
        """All bytes of a small message; of any other file have either a descriptor or a download."""
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
                os.close(fd)  # another reader was quicker, or the last one gave up
            else:
                file.fd = fd
            return None
        if file.download is None:
            file.download = self._downloads.start(node).acquire()
        return None

    # -- writing -------------------------------------------------------------------------------------------

    async def write(self, ino: Ino, offset: int, data: bytes) -> int:
        draft, fd = await self._for_writing(ino, keep=None)
        try:
            view, at = memoryview(data), offset
            while view:
                written = os.pwrite(fd, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to {draft.file}") from None
        self._wrote(draft)
        return len(data)

    async def truncate(self, ino: Ino, size: int) -> None:
        """Set the size of a file, open or not."""
        self._use(ino, writing=True)
        try:
            draft, fd = await self._for_writing(ino, keep=size)
            try:
                os.ftruncate(fd, size)
            except OSError as error:
                raise CacheError.from_os_error(error, f"cannot write to {draft.file}") from None
            self._wrote(draft)
        finally:
            self.release(ino, writing=True)

    def _wrote(self, draft: Draft) -> None:
        draft.touch()
        if self._spool.get(draft.ino) is not draft:
            return  # deleted, and only here for who has it open
        if not draft.dirty or draft.state in {"sending", "unsent"}:
            draft.dirty = True
            if draft.state != "local":
                draft.state = "open"
            draft.save()

    async def _for_writing(self, ino: Ino, keep: int | None) -> tuple[Draft, int]:
        """The draft of an open file and its descriptor, made from the message if there is none yet.

        ``keep``: how many bytes of the message are wanted; None for all.
        """
        file = self._open[ino]
        if file.orphan is not None:
            return file.orphan, file.fd
        draft = self._spool.get(ino)
        if draft is None:
            draft = await self._begin(ino, keep)
            file.forget_source()
        if file.fd < 0:
            file.fd = _open_draft(draft)
        return draft, file.fd

    async def _begin(self, ino: Ino, keep: int | None) -> Draft:
        node = self._cache.node(ino)
        if node is None:
            raise MessageGone("it was removed on the server")
        content = b""
        if keep != 0:
            content = (await self._downloads.contents(node))[:keep]
            # Somebody else may have begun while this one was waiting.
            begun = self._spool.get(ino)
            if begun is not None:
                return begun
        draft = self._make_draft(node)
        try:
            draft.file.write_bytes(content)
        except OSError as error:
            self._spool.forget(draft)
            raise CacheError.from_os_error(error, f"cannot write to {draft.file}") from None
        return draft

    async def flush(self, ino: Ino) -> None:
        """Make what was written to a message survive a power cut: the program is told so by close()."""
        draft = self._spool.get(ino)
        if draft is not None and draft.dirty and draft.state != "local":
            await draft.secure()

    # -- what happens to open files ------------------------------------------------------------------------

    def removed(self, gone: Node) -> None:
        """A message was removed: whoever has it open goes on reading what is cached."""
        file = self._open.get(gone.ino)
        if file is not None and self._cache.node(gone.ino) is None:
            file.gone = gone
            if file.fd < 0 and file.download is None:
                file.data = self._bodies.load(gone)
                file.fd = -1 if (fd := self._bodies.pin(gone)) is None else fd

    def deleted(self, draft: Draft) -> None:
        """A draft is about to be deleted: who has it open keeps it."""
        file = self._open.get(draft.ino)
        if file is not None and self._cache.node(draft.ino) is None:
            if file.fd < 0:
                file.fd = _open_draft(draft)
            file.orphan = draft

    def orphan(self, ino: Ino) -> tuple[Draft, int] | None:
        """A draft that was deleted and is still open, and its size in bytes; None if there is none."""
        file = self._open.get(ino)
        if file is None or file.orphan is None:
            return None
        return file.orphan, os.fstat(file.fd).st_size

    def replaced(self, ino: Ino) -> None:
        """The bytes of a file are others now: find them anew."""
        self._verified.discard(ino)
        file = self._open.get(ino)
        if file is not None:
            file.forget_source()


def _open_draft(draft: Draft) -> int:
    try:
        return os.open(draft.file, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise CacheError.from_os_error(error, f"cannot open {draft.file}") from None
