"""Passes FUSE requests from the kernel to `imapfs.fs`, and the answers back. Only this module knows pyfuse3.

It decides nothing about mail. A handler raises only FUSEError: any other exception would end the mount.
`imapfs.kernel.invalidation` keeps track of what the kernel has cached; this module sends the notifications.

LOCK ORDER: there are no locks here. A handler that depends on a notification waits for the thread that sends
it, which waits for the kernel only.
"""

import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CoroutineType
from typing import Any, Concatenate, Final, ParamSpec, TypeAlias, TypeVar, cast, overload

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FUSEError,
    InodeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
)

from imapfs.errors import CacheError, ImapfsError, UsageError
from imapfs.fs.events import EventStream
from imapfs.fs.files import Files, Opening
from imapfs.fs.filesystem import Filesystem
from imapfs.fs.tree import Entry
from imapfs.fs.xattrs import ExtendedAttributes
from imapfs.kernel.caller import PROOF
from imapfs.kernel.inotify import Announcer
from imapfs.kernel.invalidation import Invalidation, KernelCache
from imapfs.kernel.loop import quick_requests
from imapfs.kernel.status import ATTRIBUTE as STATUS
from imapfs.kernel.status import MountStatus
from imapfs.log import report
from imapfs.model import ROOT, Ino
from imapfs.names import MAX_NAME

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_TIMEOUT: Final = 86400.0
"""Seconds for which the kernel may use names and attributes without asking again."""
_BLOCK: Final = 4096
_MIN_TASKS: Final = 16
_MAX_PUSH: Final = 1 << 17
"""Bytes in one notification."""
_DOT, _DOTDOT = 1, 2
"""Directory positions of ``.`` and ``..``; any other entry's is its inode number, which is larger."""


Method: TypeAlias = Callable[Concatenate["Adapter", P], Coroutine[Any, Any, T]]
Answer: TypeAlias = Coroutine[Any, Any, T] | T
"""What a handler returns: the answer, or what has to be awaited for it."""


@overload
def handler(method: Method[P, T]) -> Method[P, T]: ...
@overload
def handler(method: Callable[Concatenate["Adapter", P], Answer[T]]) -> Method[P, T]: ...
def handler(method: Callable[Concatenate["Adapter", P], Answer[T]]) -> Method[P, T]:
    """Let a FUSE handler raise only FUSEError, and limit the time that it takes.

    A handler that can answer at once is no coroutine, or returns one only where it has to wait.
    """
    name = method.__name__

    @functools.wraps(method)
    async def wrapper(self: "Adapter", /, *args: P.args, **kwargs: P.kwargs) -> T:
        context = args[-1] if args else None
        try:
            if isinstance(context, RequestContext) and self.announcer.is_own(context.pid):
                return cast(T, self.answer_announcer(name, *args))
            answer = method(self, *args, **kwargs)
            if isinstance(answer, CoroutineType):
                with trio.fail_after(self.timeout):
                    return cast(T, await answer)
            return cast(T, answer)
        except FUSEError:
            raise
        except trio.TooSlowError:
            log.warning("%s: no answer from the server within %g s", name, self.timeout)
            raise FUSEError(self.late_errno) from None
        except ImapfsError as error:
            if isinstance(error, CacheError):
                report(error, name)
            else:
                log.debug("%s%r: %s", name, args[:1], error)
            raise FUSEError(error.errno) from None
        except OSError as error:
            log.warning("%s: %s", name, error)
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("internal error in %s", name)
            raise FUSEError(errno.EIO) from None

    return wrapper


@dataclass(slots=True)
class _Listing:
    """An open directory and the page of it that the kernel is reading."""

    ino: Ino
    page: Sequence[Entry] = ()
    index: int = 0
    version: tuple[int, int] = (0, 0)
    """`KernelCache.listing_version` of the page."""


class Adapter(pyfuse3.Operations):
    """FUSE requests for one `Filesystem`."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        fs: Filesystem,
        files: Files,
        xattrs: ExtendedAttributes,
        status: MountStatus,
        kernel: KernelCache,
        announcer: Announcer,
        events: EventStream,
        *,
        timeout: float,
        read_only: bool,
    ) -> None:
        super().__init__()
        self._fs = fs
        self._files = files
        self._xattrs = xattrs
        self._status = status
        self._kernel = kernel
        self.announcer = announcer
        self._events = events
        self.timeout = timeout
        self._read_only = read_only
        self._file_mode = 0o400 if read_only else 0o600
        self._dir_mode = 0o500 if read_only else 0o700
        self._uid, self._gid = os.getuid(), os.getgid()
        self._handles: dict[int, Ino] = {}
        """Handle -> file. The lowest bit says that it is open for writing."""
        self._next_file = 1
        self._listings: dict[int, _Listing] = {}
        self._next_listing = 1

    @property
    def late_errno(self) -> int:
        """The errno of a request that has taken longer than the timeout."""
        return self._fs.late_errno

    # -- the mount -----------------------------------------------------------------------------------------

    def mount(self, mountpoint: Path, options: set[str]) -> None:
        """Mount, with options for fusermount3. Raises UsageError."""
        try:
            pyfuse3.init(self, str(mountpoint), options)
        except RuntimeError as error:
            raise UsageError(
                f"cannot mount on {mountpoint} ({error}): see what fusermount3 says with --foreground"
            ) from None

    async def serve(self) -> None:
        """Answer the kernel's requests until somebody unmounts."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._invalidate_forever)
            try:
                # With fewer, almost every request would start and end a task.
                with quick_requests(pyfuse3):
                    await pyfuse3.main(min_tasks=_MIN_TASKS)
            except* ConnectionAbortedError:
                # By a write to /sys/fs/fuse/connections. Some kernels report this at every unmount.
                log.info("the kernel has ended the connection")
            nursery.cancel_scope.cancel()

    @staticmethod
    def unmount() -> None:
        """End the mount, if the kernel has not."""
        pyfuse3.close(unmount=True)

    async def _invalidate_forever(self) -> None:
        while True:
            batch = await self._kernel.next_invalid()
            await trio.to_thread.run_sync(_invalidate, batch, abandon_on_cancel=True)

    # -- announcements -------------------------------------------------------------------------------------

    def answer_announcer(self, request: str, *args: Any) -> object:
        """Answer a request of the announcer's helper process: at once, and without changing anything."""
        announcer = self.announcer
        if request == "lookup":
            entry = self._known(announcer.lookup(*args[:2]))
            # It may be about to vanish, or may already be gone.
            entry.entry_timeout = entry.attr_timeout = 0
            return entry
        if request == "getattr":
            return self._entry(self._fs.getattr(args[0]))
        if request in {"mknod", "mkdir"}:
            return self._known(announcer.make(*args[:2], directory=request == "mkdir"))
        if request in {"unlink", "rmdir"}:
            announcer.remove(*args[:2], directory=request == "rmdir")
            return None
        if request == "rename":
            announcer.rename(*args[:4])
            return None
        if request == "setattr":
            return self._entry(announcer.touch(args[0]))
        if request == "getxattr" and args[:2] == (ROOT, PROOF.encode()):
            return b""
        raise FUSEError(errno.EPERM)

    # -- attributes ----------------------------------------------------------------------------------------

    def _new_entry(self) -> EntryAttributes:
        """Return what the entries of all files have in common."""
        entry = EntryAttributes()
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_blksize = _BLOCK
        entry.entry_timeout = entry.attr_timeout = _TIMEOUT
        return entry

    def _entry(self, attributes: Entry, entry: EntryAttributes | None = None) -> EntryAttributes:
        """Return attributes for the kernel; ``entry`` is one that is used again."""
        entry = entry or self._new_entry()
        size = attributes.size
        entry.st_ino = InodeT(attributes.ino)
        if attributes.is_dir:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | self._dir_mode)
        else:
            mode = self._file_mode if attributes.mode is None else attributes.mode
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | mode)
        entry.st_size = size
        entry.st_blocks = (size + 511) // 512
        entry.st_atime_ns = entry.st_mtime_ns = attributes.mtime
        entry.st_ctime_ns = attributes.ctime
        return entry

    @handler
    def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> Answer[EntryAttributes]:
        found = self._fs.known(Ino(parent_inode), name)
        return self._known(found) if found is not None else self._look_up(Ino(parent_inode), name)

    async def _look_up(self, parent: Ino, name: bytes) -> EntryAttributes:
        return self._known(await self._fs.lookup(parent, name))

    def _known(self, attributes: Entry) -> EntryAttributes:
        """Return an entry for an answer that gives the kernel a reference to the inode."""
        self._kernel.remember(attributes.ino)
        return self._entry(attributes)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for ino, n in inode_list:
            self._kernel.forget(Ino(ino), n)

    @handler
    def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self._fs.getattr(Ino(inode)))

    @handler
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        space = await self._fs.statfs()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = space.total // _BLOCK
        data.f_bfree = data.f_bavail = space.free // _BLOCK
        data.f_namemax = MAX_NAME
        return data

    # -- directories ---------------------------------------------------------------------------------------

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        await self._fs.opendir(Ino(inode))
        handle = self._next_listing
        self._next_listing += 1
        self._listings[handle] = _Listing(Ino(inode))
        return FileHandleT(handle)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id < _DOTDOT:
            # For these two the kernel uses neither attributes nor references.
            here = self._entry(self._fs.getattr(listing.ino))
            for name, position in ((b".", _DOT), (b"..", _DOTDOT)):
                if start_id < position and not pyfuse3.readdir_reply(token, name, here, position):
                    return
            start_id = _DOTDOT
        position = start_id
        while True:
            if not self._continues(listing, position):
                listing.version = self._kernel.listing_version(listing.ino)
                listing.page, listing.index = await self._fs.readdir(listing.ino, position), 0
                if not listing.page:
                    return
            entry = self._new_entry()
            while listing.index < len(listing.page):
                found = listing.page[listing.index]
                if not pyfuse3.readdir_reply(token, found.name, self._entry(found, entry), found.ino):
                    return
                self._kernel.remember(found.ino)
                listing.index += 1
                position = found.ino
            listing.page, listing.index = (), 0
            if position != start_id:
                return  # the kernel asks again when it needs more

    def _continues(self, listing: _Listing, position: int) -> bool:
        """Return whether the page is current and continues right after ``position``."""
        if listing.index >= len(listing.page):
            return False
        if listing.version != self._kernel.listing_version(listing.ino):
            return False
        before = listing.page[listing.index - 1].ino if listing.index else position
        return before == position and listing.page[listing.index].ino > position

    @handler
    def releasedir(self, fh: FileHandleT) -> None:
        self._fs.closedir(self._listings.pop(fh).ino)

    # -- files ---------------------------------------------------------------------------------------------

    def _file_info(self, ino: Ino, flags: int) -> FileInfo:
        """Return a handle, which stands for the file and for whether it was opened for writing."""
        handle = self._next_file << 1 | (flags & os.O_ACCMODE != os.O_RDONLY)
        self._next_file += 1
        self._handles[handle] = ino
        # What the kernel has cached of a file is valid until a notification says otherwise.
        return FileInfo(fh=FileHandleT(handle), keep_cache=True)

    @handler
    def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> Answer[FileInfo]:
        ino, writing = Ino(inode), flags & os.O_ACCMODE != os.O_RDONLY
        is_pushed = ino in self._kernel.pushed
        if is_pushed and not flags & (os.O_ACCMODE | os.O_TRUNC):
            # The kernel has all of it. The second read of a file takes this path.
            self._files.open_known(ino)
            return self._file_info(ino, flags)
        opening = self._fs.open(ino, writing=writing, wanted=not is_pushed and not writing)
        is_ready = opening is None or isinstance(opening, bytes)
        if not is_ready or ino in self._kernel.resized or flags & os.O_TRUNC:
            return self._opened(ino, opening, flags)
        if isinstance(opening, bytes):
            self._push(inode, opening)
        return self._file_info(ino, flags)

    async def _opened(self, ino: Ino, opening: Opening, flags: int) -> FileInfo:
        try:
            data = await opening if isinstance(opening, Awaitable) else opening
            if ino in self._kernel.resized:
                # Before the first read: the kernel would truncate or pad the file to the size that it knows.
                await trio.to_thread.run_sync(_invalidate, Invalidation(attributes={ino}))
                self._kernel.resized.discard(ino)
            if flags & os.O_TRUNC:
                await self._files.truncate(ino, 0)
            elif data is not None and ino not in self._kernel.pushed:
                self._push(InodeT(ino), data)
        except BaseException:
            self._fs.release(ino, writing=flags & os.O_ACCMODE != os.O_RDONLY)
            raise
        return self._file_info(ino, flags)

    def _push(self, inode: InodeT, data: bytes) -> None:
        """Give the kernel the bytes before it asks for them.

        This is safe only while no other program has the file open. A reader that waits for a page of the
        file would hold the lock of that page, and only this thread could answer it.
        """
        if self._files.is_shared(Ino(inode)):
            return
        try:
            for start in range(0, len(data), _MAX_PUSH):
                pyfuse3.notify_store(inode, start, data[start : start + _MAX_PUSH])
        except OSError as error:
            log.debug("the kernel did not take the bytes of inode %d: %s", inode, error)
            return
        self._kernel.pushed.add(Ino(inode))

    @handler
    async def create(
        self, parent_inode: InodeT, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        attributes = await self._fs.create(Ino(parent_inode), name, stat.S_IMODE(mode) & ~ctx.umask)
        return self._file_info(attributes.ino, flags), self._known(attributes)

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return await self._files.read(self._handles[fh], off, size)

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self._files.write(self._handles[fh], off, buf)

    @handler
    def flush(self, fh: FileHandleT) -> Answer[None]:
        if self._read_only:
            raise FUSEError(errno.ENOSYS)  # the kernel then never sends it again
        return self._files.flush(self._handles[fh]) if fh & 1 else None

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._fs.fsync(self._handles[fh], writing=bool(fh & 1))

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        await self._fs.fsync_directory()

    @handler
    def release(self, fh: FileHandleT) -> None:
        self._fs.release(self._handles.pop(fh), writing=bool(fh & 1))

    @handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        ino = Ino(inode)
        if fields.update_size:
            await self._fs.truncate(ino, attr.st_size, is_open=fh is not None)
        # With a new size the kernel also sends the current time, which no program has set.
        sets_time = fields.update_mtime and not fields.update_size
        if sets_time or fields.update_mode or fields.update_uid or fields.update_gid:
            self._fs.set_attributes(
                ino,
                mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
                mtime=attr.st_mtime_ns if sets_time else None,
                owner=attr.st_uid if fields.update_uid else None,
                group=attr.st_gid if fields.update_gid else None,
            )
        return self._entry(self._fs.getattr(ino))

    # -- names ---------------------------------------------------------------------------------------------

    @handler
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: bytes,
        parent_inode_new: InodeT,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        keep_existing = bool(flags & pyfuse3.RENAME_NOREPLACE)
        here, there = Ino(parent_inode_old), Ino(parent_inode_new)
        with self._events.request((here, name_old), (there, name_new)):
            await self._fs.rename(here, name_old, there, name_new, keep_existing=keep_existing)

    @handler
    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        with self._events.request((parent_inode, name)):
            await self._fs.unlink(Ino(parent_inode), name)

    @handler
    async def mkdir(
        self, parent_inode: InodeT, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        with self._events.request((parent_inode, name)):
            return self._known(await self._fs.mkdir(Ino(parent_inode), name))

    @handler
    async def rmdir(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        with self._events.request((parent_inode, name)):
            await self._fs.rmdir(Ino(parent_inode), name)

    @handler
    def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @handler
    def symlink(
        self, parent_inode: InodeT, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @handler
    async def mknod(
        self, parent_inode: InodeT, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        if not stat.S_ISREG(mode):
            raise FUSEError(errno.EPERM)
        # As `tar --xattrs` makes files.
        with self._events.request((parent_inode, name)):
            attributes = await self._fs.create(Ino(parent_inode), name, stat.S_IMODE(mode) & ~ctx.umask)
        self._fs.release(attributes.ino, writing=True)
        return self._known(attributes)

    # -- extended attributes -------------------------------------------------------------------------------

    @handler
    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        if inode == ROOT and name == STATUS:
            return self._status.attribute()
        return await self._xattrs.get(Ino(inode), name)

    @handler
    def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[bytes]:
        names = self._xattrs.names(Ino(inode))
        return [STATUS, *names] if inode == ROOT and self._xattrs.lists_all else names

    @handler
    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: RequestContext) -> None:
        with self._events.request(inode):
            await self._xattrs.set(Ino(inode), name, value)

    @handler
    async def removexattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        with self._events.request(inode):
            await self._xattrs.remove(Ino(inode), name)


def _invalidate(batch: Invalidation) -> None:
    """Notify the kernel. Called in a thread: this may wait for requests in the same directories."""
    for parent, name, ino in [*batch.entries, *((*entry, 0) for entry in batch.names)]:
        try:
            pyfuse3.invalidate_entry(InodeT(parent), pyfuse3.FileNameT(name), InodeT(ino))
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.debug("the kernel did not drop %r: %s", name, error)
    for ino in batch.attributes | batch.contents:
        try:
            pyfuse3.invalidate_inode(InodeT(ino), attr_only=ino not in batch.contents)
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.debug("the kernel did not drop the attributes of inode %d: %s", ino, error)
