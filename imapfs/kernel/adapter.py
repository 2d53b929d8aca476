"""The kernel's side: FUSE requests to `imapfs.fs.filesystem` and back. The only module that knows pyfuse3.

Decides nothing about mail. What it owns: which inodes the kernel knows (lookup counts), what the kernel has
cached and must be told to drop, and that nothing but a FUSEError ever leaves a handler, since anything else
would end the mount.

The kernel may keep names and attributes for as long as it likes (`_TIMEOUT`), because it is told of each
change. Those notifications can wait for a request under way in the same directory, so that they are sent
from a thread, never from a handler. LOCK ORDER: there are no locks here; a handler that needs a notification
to be done waits for the thread, which waits for the kernel only.
"""

import errno
import functools
import logging
import os
import signal
import stat
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar, cast

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
from imapfs.fs.events import Stream
from imapfs.fs.files import Opening
from imapfs.fs.filesystem import Attributes as FileAttributes
from imapfs.fs.filesystem import Filesystem
from imapfs.fs.xattrs import Attributes
from imapfs.imap.backoff import State
from imapfs.imap.pool import SessionPool
from imapfs.kernel import network
from imapfs.kernel.caller import PROOF
from imapfs.kernel.feed import Feed
from imapfs.kernel.inotify import Announcer
from imapfs.log import report
from imapfs.model import ROOT, CredentialProvider, Ino, MountConfig
from imapfs.store.cache import Cache
from imapfs.sync.changes import Changes
from imapfs.waiting import Flag

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_TIMEOUT: Final = 86400.0
"""Seconds for which the kernel may use names and attributes without asking again."""
_BLOCK: Final = 4096
_TASKS: Final = 16
_PUSH: Final = 1 << 17
"""Most bytes in one notification."""
_DOT, _DOTDOT = 1, 2
"""Directory positions of ``.`` and ``..``; any other entry's is its inode number, which is larger."""


Method = Callable[Concatenate["Adapter", P], Coroutine[Any, Any, T]]


def prompt_handler(method: Method[P, T]) -> Method[P, T]:
    """Around every FUSE handler: only FUSEError gets out. Alone where waiting is bounded within."""
    name = method.__name__

    @functools.wraps(method)
    async def wrapper(self: "Adapter", /, *args: P.args, **kwargs: P.kwargs) -> T:
        context = args[-1] if args else None
        try:
            if isinstance(context, RequestContext) and self.announcer.is_own(context.pid):
                return cast(T, self.answer_announcer(name, *args))
            return await method(self, *args, **kwargs)
        except FUSEError:
            raise
        except trio.TooSlowError:
            log.warning("%s: no answer from the server within %g s", name, self.timeout)
            raise FUSEError(self.fs.late_errno) from None
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


def handler(method: Method[P, T]) -> Method[P, T]:
    """Around every FUSE handler that may wait: bounded in time as well."""

    @functools.wraps(method)
    async def bounded(self: "Adapter", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with trio.fail_after(self.timeout):
            return await method(self, *args, **kwargs)

    return prompt_handler(bounded)


@dataclass(slots=True)
class _Listing:
    """An open directory and the page of it that the kernel is reading."""

    ino: Ino
    page: Sequence[tuple[bytes, FileAttributes]] = ()
    index: int = 0

    def forget_page(self) -> None:
        self.page, self.index = (), 0


@dataclass(slots=True)
class _Invalid:
    """What the kernel has to drop."""

    attributes: set[Ino] = field(default_factory=set)
    contents: set[Ino] = field(default_factory=set)
    entries: list[tuple[Ino, bytes, Ino]] = field(default_factory=list)
    """Of what is gone: directory, name, inode."""
    names: list[tuple[Ino, bytes]] = field(default_factory=list)
    """Of what is still there."""

    def __bool__(self) -> bool:
        return bool(self.attributes or self.contents or self.entries or self.names)


class Adapter(pyfuse3.Operations):
    """FUSE requests for one `Filesystem`."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, timeout: float, read_only: bool) -> None:
        super().__init__()
        self.timeout = timeout
        self.fs: Filesystem
        self.xattrs: Attributes
        self.announcer: Announcer
        self.events = Stream()
        self._read_only = read_only
        self._file_mode = 0o400 if read_only else 0o600
        self._dir_mode = 0o500 if read_only else 0o700
        self._uid, self._gid = os.getuid(), os.getgid()
        self._lookups: dict[int, int] = {}
        """Inode -> references that the kernel holds (the nlookup of FORGET)."""
        self._pushed: set[int] = set()
        """Inodes whose bytes the kernel was given."""
        self._resized: set[Ino] = set()
        """Inodes of which the kernel may know a size that is not the exact one."""
        self._handles: dict[int, Ino] = {}
        """Handle -> file. The lowest bit says that it is open for writing."""
        self._next_file = 1
        self._listings: dict[int, _Listing] = {}
        self._next_listing = 1
        self._invalid = _Invalid()
        self._invalid_news = Flag()

    # -- what the server changed ---------------------------------------------------------------------------

    def on_changes(self, changes: Changes) -> None:
        """Have the kernel drop what is no longer so, and tell who watches."""
        # Flags are extended attributes, which the kernel does not keep.
        if changes.added or changes.gone or changes.moved or changes.replaced:
            self._forget_entries(changes)
        for event in self.fs.events(changes):
            self.events.publish(event)

    def _forget_entries(self, changes: Changes) -> None:
        directories = {changes.directory, *(moved.parent for moved in changes.moved)}
        for listing in self._listings.values():
            if listing.ino in directories:
                listing.forget_page()
        for gone in changes.gone:
            if gone.name is not None and gone.ino in self._lookups:
                self._invalid.entries.append((changes.directory, gone.name, gone.ino))
        for moved in changes.moved:
            if moved.ino in self._lookups:
                self._invalid.names.append((moved.parent, moved.name))
        self._invalid.attributes |= directories
        self._invalid_news.set()

    def on_resize(self, ino: Ino) -> None:
        """Have the kernel ask for the size of a message again."""
        for listing in self._listings.values():
            listing.forget_page()
        if ino in self._lookups:
            self._resized.add(ino)
            self._invalid.attributes.add(ino)
            self._invalid_news.set()

    def on_rewrite(self, ino: Ino) -> None:
        """Have the kernel drop the bytes of a file, and its size."""
        self._pushed.discard(ino)
        if ino in self._lookups:
            self._invalid.contents.add(ino)
            self._invalid_news.set()

    async def invalidate_forever(self) -> None:
        """Tell the kernel what it has to drop, as it comes."""
        while True:
            await self._invalid_news.wait()
            batch, self._invalid = self._invalid, _Invalid()
            if batch:
                await trio.to_thread.run_sync(_invalidate, batch, abandon_on_cancel=True)

    # -- announcements -------------------------------------------------------------------------------------

    def holds(self, ino: Ino) -> bool:
        """Whether the kernel has an inode in its caches."""
        return ino == ROOT or ino in self._lookups

    def answer_announcer(self, request: str, *args: Any) -> object:
        """Answer a request of the announcer's own process: at once, and without any change."""
        announcer = self.announcer
        if request == "lookup":
            entry = self._known(announcer.lookup(*args[:2]))
            # It may be about to vanish, or be gone already.
            entry.entry_timeout = entry.attr_timeout = 0
            return entry
        if request == "getattr":
            return self._entry(self.fs.getattr(args[0]))
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

    def _entry(self, attributes: FileAttributes) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(attributes.ino)
        if attributes.is_dir:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | self._dir_mode)
        else:
            mode = self._file_mode if attributes.mode is None else attributes.mode
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | mode)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_size = attributes.size
        entry.st_blksize = _BLOCK
        entry.st_blocks = (attributes.size + 511) // 512
        entry.st_atime_ns = entry.st_mtime_ns = attributes.mtime
        entry.st_ctime_ns = attributes.ctime
        entry.entry_timeout = entry.attr_timeout = _TIMEOUT
        return entry

    @handler
    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._known(await self.fs.lookup(Ino(parent_inode), name))

    def _known(self, attributes: FileAttributes) -> EntryAttributes:
        """An entry whose answer gives the kernel a reference to the inode."""
        self._lookups[attributes.ino] = self._lookups.get(attributes.ino, 0) + 1
        return self._entry(attributes)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for ino, n in inode_list:
            left = self._lookups.get(ino, 0) - n
            if left > 0:
                self._lookups[ino] = left
            else:
                self._lookups.pop(ino, None)
                self._pushed.discard(ino)
                self._resized.discard(Ino(ino))

    @prompt_handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self.fs.getattr(Ino(inode)))

    @handler
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        space = await self.fs.statfs()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = space.total // _BLOCK
        data.f_bfree = data.f_bavail = space.free // _BLOCK
        data.f_namemax = 255
        return data

    # -- directories ---------------------------------------------------------------------------------------

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        await self.fs.opendir(Ino(inode))
        handle = self._next_listing
        self._next_listing += 1
        self._listings[handle] = _Listing(Ino(inode))
        return FileHandleT(handle)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id < _DOTDOT:
            # The kernel takes neither attributes nor references for these two.
            here = self._entry(self.fs.getattr(listing.ino))
            for name, position in ((b".", _DOT), (b"..", _DOTDOT)):
                if start_id < position and not pyfuse3.readdir_reply(token, name, here, position):
                    return
            start_id = _DOTDOT
        position = start_id
        while True:
            if not self._continues(listing, position):
                listing.page, listing.index = await self.fs.readdir(listing.ino, position), 0
                if not listing.page:
                    return
            while listing.index < len(listing.page):
                name, attributes = listing.page[listing.index]
                if not pyfuse3.readdir_reply(token, name, self._entry(attributes), attributes.ino):
                    return
                self._lookups[attributes.ino] = self._lookups.get(attributes.ino, 0) + 1
                listing.index += 1
                position = attributes.ino
            listing.forget_page()
            if position != start_id:
                return  # something to show: more is asked for when it is wanted

    @staticmethod
    def _continues(listing: _Listing, position: int) -> bool:
        """Whether the page goes on right behind ``position``."""
        if listing.index >= len(listing.page):
            return False
        before = listing.page[listing.index - 1][1].ino if listing.index else position
        return before == position and listing.page[listing.index][1].ino > position

    @prompt_handler
    async def releasedir(self, fh: FileHandleT) -> None:
        self.fs.closedir(self._listings.pop(fh).ino)

    # -- files ---------------------------------------------------------------------------------------------

    def _file_info(self, ino: Ino, flags: int) -> FileInfo:
        """A handle says which file it is, and whether it was opened for writing."""
        handle = self._next_file << 1 | (flags & os.O_ACCMODE != os.O_RDONLY)
        self._next_file += 1
        self._handles[handle] = ino
        # What the kernel has of a file stays good until it is told otherwise.
        return FileInfo(fh=FileHandleT(handle), keep_cache=True)

    @prompt_handler
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        ino, writing = Ino(inode), flags & os.O_ACCMODE != os.O_RDONLY
        if inode in self._pushed and flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY:
            # The kernel has all of it: what is read twice comes here the second time.
            self.fs.files.open_known(ino)
            return self._file_info(ino, flags)
        opening = self.fs.open(ino, writing=writing, wanted=inode not in self._pushed and not writing)
        try:
            if isinstance(opening, bytes) and ino not in self._resized and not flags & os.O_TRUNC:
                data: bytes | None = opening
            else:
                with trio.fail_after(self.timeout):
                    data = await self._opened(ino, opening, flags)
            if data is not None and inode not in self._pushed:
                self._push(inode, data)
        except BaseException:
            self.fs.release(ino, writing=writing)
            raise
        return self._file_info(ino, flags)

    async def _opened(self, ino: Ino, opening: Opening, flags: int) -> bytes | None:
        data = await opening if isinstance(opening, Awaitable) else opening
        if ino in self._resized:
            # Before the first read: the kernel would cut off or pad at the size that it knows.
            await trio.to_thread.run_sync(_invalidate, _Invalid(attributes={ino}))
            self._resized.discard(ino)
        if flags & os.O_TRUNC:
            await self.fs.files.truncate(ino, 0)
            return None
        return data

    def _push(self, inode: InodeT, data: bytes) -> None:
        """Give the kernel the bytes before it asks.

        Safe here only because nobody else has the file open: a reader that waits for a page of it would hold
        the page's lock, and this thread is the one that has to answer it.
        """
        file = self.fs.files.get(Ino(inode))
        if file is None or file.users > 1:
            return
        try:
            for start in range(0, len(data), _PUSH):
                pyfuse3.notify_store(inode, start, data[start : start + _PUSH])
        except OSError as error:
            log.debug("the kernel did not take the bytes of inode %d: %s", inode, error)
            return
        self._pushed.add(inode)

    @handler
    async def create(
        self, parent_inode: InodeT, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        attributes = await self.fs.create(Ino(parent_inode), name, stat.S_IMODE(mode) & ~ctx.umask)
        return self._file_info(attributes.ino, flags), self._known(attributes)

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return await self.fs.files.read(self._handles[fh], off, size)

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self.fs.files.write(self._handles[fh], off, buf)

    @prompt_handler
    async def flush(self, fh: FileHandleT) -> None:
        if self._read_only:
            raise FUSEError(errno.ENOSYS)  # for good: then the kernel does not ask at each close
        if fh & 1:
            with trio.fail_after(self.timeout):
                await self.fs.files.flush(self._handles[fh])

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self.fs.fsync(self._handles[fh])

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        await self.fs.fsync_directory()

    @prompt_handler
    async def release(self, fh: FileHandleT) -> None:
        self.fs.release(self._handles.pop(fh), writing=bool(fh & 1))

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
            await self.fs.files.truncate(ino, attr.st_size)
            if fh is None:
                self.fs.release_truncated(ino)
        # With a new size the kernel sends the time of day along, which nobody asked for.
        sets_time = fields.update_mtime and not fields.update_size
        if sets_time or fields.update_mode or fields.update_uid or fields.update_gid:
            self.fs.set_attributes(
                ino,
                mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
                mtime=attr.st_mtime_ns if sets_time else None,
                owner=attr.st_uid if fields.update_uid else None,
                group=attr.st_gid if fields.update_gid else None,
            )
        return self._entry(self.fs.getattr(ino))

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
        with self.events.request((here, name_old), (there, name_new)):
            await self.fs.rename(here, name_old, there, name_new, keep_existing=keep_existing)

    @handler
    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        with self.events.request((parent_inode, name)):
            await self.fs.unlink(Ino(parent_inode), name)

    @handler
    async def mkdir(
        self, parent_inode: InodeT, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        with self.events.request((parent_inode, name)):
            return self._known(await self.fs.mkdir(Ino(parent_inode), name))

    @handler
    async def rmdir(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        with self.events.request((parent_inode, name)):
            await self.fs.rmdir(Ino(parent_inode), name)

    @prompt_handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @prompt_handler
    async def symlink(
        self, parent_inode: InodeT, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    @prompt_handler
    async def mknod(
        self, parent_inode: InodeT, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    # -- extended attributes -------------------------------------------------------------------------------

    @handler
    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        return await self.xattrs.get(Ino(inode), name)

    @prompt_handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[bytes]:
        return self.xattrs.names(Ino(inode))

    @handler
    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: RequestContext) -> None:
        with self.events.request(inode):
            await self.xattrs.set(Ino(inode), name, value)

    @handler
    async def removexattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        with self.events.request(inode):
            await self.xattrs.remove(Ino(inode), name)


def _invalidate(batch: _Invalid) -> None:
    """In a thread: may wait until requests under way in the same directory are answered."""
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


class Observer(Protocol):
    """Who is told how the mount is; called on the trio thread, where nothing may wait."""

    def live(self) -> None:
        """The mount answers: once, and not at all if there can be none."""

    def state(self, reason: str | None, needs_person: bool) -> None:
        """The account is offline for ``reason``, or online if that is None.

        ``needs_person``: and stays so until somebody sets the credentials right.
        """

    def ending(self) -> None:
        """The mount is gone; what is waiting is being sent."""


def serve(config: MountConfig, credentials: CredentialProvider, observer: Observer) -> None:
    """Mount and serve until the mount ends: by umount, SIGINT or SIGTERM.

    Raises ImapfsError if there can be no mount.
    """
    trio.run(_serve, config, credentials, observer)


async def _serve(config: MountConfig, credentials: CredentialProvider, observer: Observer) -> None:
    pool = SessionPool(config.account, credentials, config.connections, config.timeout)
    # Nobody is called when a pause that the server asked for is over: it is not told of.
    pool.on_state = lambda: observer.state(
        pool.reason if pool.state is State.OFFLINE else None, pool.needs_person
    )
    cache = Cache.open(config.cache_dir / _cache_name(config), config.names)
    failure: ImapfsError | None = None
    try:
        async with trio.open_nursery() as background:
            try:
                with (
                    trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
                    trio.CancelScope() as life,
                ):
                    background.start_soon(_end_on_signal, signals, life)
                    background.start_soon(pool.keep)
                    background.start_soon(network.watch, pool.network_changed, pool.resumed)
                    await _run(config, pool, cache, background, observer)
            except ImapfsError as error:
                # Out of the nursery as itself, not in a group.
                failure = error
            finally:
                await pool.close()
                background.cancel_scope.cancel()
    finally:
        cache.close()
    if failure is not None:
        raise failure


async def _end_on_signal(signals: AsyncIterable[int], life: trio.CancelScope) -> None:
    async for number in signals:
        log.info("%s: unmounting", signal.Signals(number).name)
        life.cancel()


async def _run(
    config: MountConfig,
    pool: SessionPool,
    cache: Cache,
    background: trio.Nursery,
    observer: Observer,
) -> None:
    """Mount, and serve until somebody unmounts or this is cancelled."""
    adapter = Adapter(config.timeout, config.read_only)
    fs = adapter.fs = Filesystem(
        config,
        pool,
        cache,
        background,
        on_changes=adapter.on_changes,
        on_resize=adapter.on_resize,
        on_rewrite=adapter.on_rewrite,
    )
    adapter.xattrs = Attributes(fs, lambda: len(adapter._lookups))
    announcer = adapter.announcer = Announcer(fs, adapter.holds)
    feed = Feed(cache.directory)
    try:
        await fs.start()
        # Not before: what the first look at the server finds is no news.
        adapter.events.subscribe(announcer.offer)
        adapter.events.subscribe(feed.offer)
        _mount(adapter, config)
        try:
            log.info("mounted %s on %s", config.account.url, config.mountpoint)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(adapter.invalidate_forever)
                nursery.start_soon(announcer.run)
                nursery.start_soon(feed.serve)
                observer.live()
                try:
                    # With fewer, a task would be begun and ended for almost every request.
                    await pyfuse3.main(min_tasks=_TASKS)
                except* ConnectionAbortedError:
                    # By who may write to /sys/fs/fuse/connections; some kernels say so at any unmount.
                    log.info("the kernel has ended the connection")
                nursery.cancel_scope.cancel()
        finally:
            pyfuse3.close(unmount=True)
            log.info("unmounted %s", config.mountpoint)
            observer.ending()
            with trio.CancelScope(shield=True):
                await announcer.end()
    finally:
        with trio.CancelScope(shield=True):
            await fs.end()


def _mount(adapter: Adapter, config: MountConfig) -> None:
    options = {*config.fuse_options, "default_permissions", "subtype=imapfs"}
    # A comma would begin another option.
    options.add("fsname=" + config.account.url.replace("\\", "\\\\").replace(",", "\\,"))
    if config.read_only:
        options.add("ro")
    try:
        pyfuse3.init(adapter, str(config.mountpoint), options)
    except RuntimeError as error:
        raise UsageError(
            f"cannot mount on {config.mountpoint} ({error}): see what fusermount3 says with --foreground"
        ) from None


def _cache_name(config: MountConfig) -> str:
    """The directory of an account's cache: readable, and no path whatever the user name holds."""
    account = config.account
    return (
        "".join(
            c if c.isalnum() or c in "@.-_+" else f"%{ord(c):02X}" for c in f"{account.user}@{account.host}"
        ).lstrip(".")
        + f"_{account.port}"
    )
