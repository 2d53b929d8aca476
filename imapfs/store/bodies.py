"""Message bodies on disk: written once, verified whenever they are used.

Small bodies are appended to a few large files, the packs, because creating a file for each would cost more
than everything else that is done with it. Large bodies have a file each. In a pack each body starts at a
block of its own, so that its blocks can be returned to the file system when it is removed.

A body is written first; then its place and its CRC-32 are noted in the database. So what a kill, a power cut
or a full disk leaves behind is either not noted, and is overwritten or swept away, or fails the check, and is
fetched again. Wrong bytes are never served, and no fsync is needed for that.

Threads: a `Pack` belongs to the thread that it is lent to, an `IncomingBody` to the thread that fills it, and
all else to the trio thread.
"""

import contextlib
import ctypes
import itertools
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import trio

from imapfs.errors import CacheError
from imapfs.log import report
from imapfs.model import Ino, Uid
from imapfs.store.cache import Cache
from imapfs.store.rows import Body, Node

log = logging.getLogger(__name__)

SMALL: Final = 256 << 10
"""Bodies up to this many bytes are kept in memory as a whole, and go into packs."""
_CHUNK: Final = 1 << 20
_BLOCK: Final = 4096
_MAX_PACK: Final = 64 << 20
"""Bytes after which a pack is full."""
_MAX_OPEN_PACKS: Final = 64
_MAX_ROOM: Final = 64 << 20
"""Maximum bytes that are evicted at once beyond what is needed."""
_MAX_RESERVE: Final = 64 << 20
"""Bytes of the disk that bodies leave free, for the spool and for other programs; of a small disk, a part."""
_PUNCH_HOLE: Final = 0x03
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE of linux/falloc.h."""

_libc: Final = ctypes.CDLL(None)
# If libc has both, the other one takes 32-bit offsets.
_fallocate: Final = getattr(_libc, "fallocate64", _libc.fallocate)
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class BodyPlace(Protocol):
    """Where a body is: a `Node` or a `Body`. ``crc`` is None if it is not cached."""

    @property
    def ino(self) -> Ino: ...
    @property
    def size(self) -> int: ...
    @property
    def crc(self) -> int | None: ...
    @property
    def pack(self) -> int | None: ...
    @property
    def offset(self) -> int: ...


class Pack:
    """A file of small bodies. Lent to one thread at a time, which may `append`."""

    def __init__(self, path: Path, number: int, live: int, end: int) -> None:
        self.path = path
        self.number = number
        self.live = live
        """Number of bodies in it that the database knows."""
        self.end = -(-end // _BLOCK) * _BLOCK
        self.lent = False
        self._fd = -1

    @property
    def fd(self) -> int:
        """Its descriptor, opened if necessary. Raises OSError."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._fd

    def append(self, data: bytes | bytearray) -> int:
        """Write a body; return its offset. Raises OSError."""
        offset, view = self.end, memoryview(data)
        at = offset
        while view:
            written = os.pwrite(self.fd, view, at)
            view, at = view[written:], at + written
        self.end = -(-at // _BLOCK) * _BLOCK
        return offset

    def punch(self, offset: int, size: int) -> None:
        """Return the blocks of a body to the file system, or leave them if it does not support that."""
        _fallocate(self.fd, _PUNCH_HOLE, offset, -(-size // _BLOCK) * _BLOCK)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class IncomingBody:
    """A body on its way from the server to the disk. One thread fills it; others may read ``written``."""

    def __init__(self, store: "BodyStore", size: int) -> None:
        self._store = store
        self.size = size
        self.written = 0
        self.crc = 0
        self.small: bytearray | None = bytearray() if size <= SMALL else None
        """The bytes of a small body so far; a large one is in a file from the start."""
        self.path: Path | None = None
        self.fd = -1
        if self.small is None:
            store.check_space(size)
            path = store.temporary()
            with store.writing():
                self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.path = path

    def write(self, data: bytes) -> None:
        """Append bytes. Raises CacheError."""
        self.crc = zlib.crc32(data, self.crc)
        if self.small is not None:
            self.small += data
        else:
            with self._store.writing():
                view = memoryview(data)
                while view:
                    view = view[os.write(self.fd, view) :]
        self.written += len(data)

    def keep(self, ino: Ino, uid: Uid, pack: Pack) -> Body | None:
        """Make it permanent as the body of ``ino``, in ``pack`` if it is small. Raises CacheError.

        The descriptor of a large body stays open. Return None for a body that is larger than the cache may
        be: it can be read until `discard` only.
        """
        if self.written > self._store.limit:
            return None
        with self._store.writing():
            if self.small is not None:
                return Body(ino, uid, self.written, self.crc, pack.number, pack.append(self.small))
            assert self.path is not None
            self.path.rename(self._store.path(ino))
        self.path = None
        return Body(ino, uid, self.written, self.crc, None, 0)

    def discard(self) -> None:
        """Release what is not permanent. May be called at any time, and more than once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.path is not None:
            _unlink(self.path)
            self.path = None


class BodyStore:
    """The cached bodies of one account. Beyond ``limit`` bytes the least recently used ones are evicted."""

    def __init__(self, cache: Cache, limit: int) -> None:
        self._cache = cache
        self.directory = cache.directory / "bodies"
        self.limit = limit
        self._large = self.directory / "large"
        self._packs_at = self.directory / "packs"
        self._temporary = self.directory / "tmp"
        self._used: set[Ino] = set()
        self._serial = itertools.count()
        self._started = time.time()
        self.size = 0
        self._packs: dict[int, Pack] = {}
        self._open: dict[int, Pack] = {}
        """Packs with an open descriptor, ordered from the least recently used one."""
        for number, live, size, end in cache.bodies.packs():
            self.size += size
            if number is not None:
                self._packs[number] = Pack(self._packs_at / str(number), number, live, end)
        self._next_pack = max(self._packs, default=0) + 1
        self._room = [pack for pack in self._packs.values() if pack.end < _MAX_PACK]
        """Packs that have room and are not lent."""
        try:
            for directory in (self._large, self._packs_at, self._temporary):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in self._temporary.iterdir():
                left.unlink()
            for path in self._packs_at.iterdir():
                if not path.name.isdigit() or int(path.name) not in self._packs:
                    path.unlink()
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot use the cache {self.directory}") from None
        if self.size > limit:
            self._evict()

    def close(self) -> None:
        """Save the order of use, and close the packs."""
        self.flush_use()
        for pack in self._open.values():
            pack.close()
        self._open.clear()

    def path(self, ino: Ino) -> Path:
        """Return where the body of ``ino`` is, if it is large and cached."""
        return self._large / str(ino)

    def temporary(self) -> Path:
        """Return a new path on the same file system as the bodies."""
        return self._temporary / str(next(self._serial))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn OSError into CacheError."""
        try:
            yield
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to the cache {self.directory}") from None

    def check_space(self, size: int) -> None:
        """Raise CacheError if ``size`` more bytes do not fit on the disk, with a reserve left."""
        try:
            stat = os.statvfs(self.directory)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot use the cache {self.directory}") from None
        reserve = min(_MAX_RESERVE, stat.f_blocks * stat.f_frsize // 20)
        if stat.f_bavail * stat.f_frsize < size + reserve:
            raise CacheError.from_os_error(
                OSError(28, "No space left on device"),
                f"a message of {size} bytes does not fit in {self.directory}",
            )

    # -- packs ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lend_pack(self) -> Iterator[Pack]:
        """Lend a pack to the caller alone."""
        if self._room:
            pack = self._room.pop()
        else:
            pack = Pack(self._packs_at / str(self._next_pack), self._next_pack, 0, 0)
            self._packs[pack.number] = pack
            self._next_pack += 1
        pack.lent = True
        try:
            # Here, so that two threads never open it at once. An error is raised again by the first write.
            with contextlib.suppress(OSError):
                self._opened(pack)
            yield pack
        finally:
            pack.lent = False
            if not pack.live:
                self._remove_pack(pack)
            elif pack.end < _MAX_PACK:
                self._room.append(pack)

    def _opened(self, pack: Pack) -> int:
        """Return the descriptor of a pack; those of other packs may be closed for it. Raises OSError."""
        fd = pack.fd
        self._open.pop(pack.number, None)
        self._open[pack.number] = pack
        if len(self._open) > _MAX_OPEN_PACKS:
            for number, other in list(self._open.items())[: len(self._open) - _MAX_OPEN_PACKS]:
                if not other.lent:
                    other.close()
                    del self._open[number]
        return fd

    def _remove_pack(self, pack: Pack) -> None:
        pack.close()
        self._open.pop(pack.number, None)
        del self._packs[pack.number]
        _unlink(pack.path)

    # -- reading -------------------------------------------------------------------------------------------

    def load(self, place: BodyPlace) -> bytes | None:
        """Return the body of a small message, or None if the cache does not have it intact."""
        if place.crc is None or place.pack is None:
            return None
        pack = self._packs.get(place.pack)
        data = b""
        if pack is not None:
            with contextlib.suppress(OSError):
                data = os.pread(self._opened(pack), place.size, place.offset)
        if pack is None or len(data) != place.size or zlib.crc32(data) != place.crc:
            self._lost(place)
            return None
        self._note_use(place.ino)
        return data

    async def open(self, node: Node) -> int | None:
        """Return a descriptor of a large message's body, or None if the cache does not have it intact."""
        if node.crc is None or node.pack is not None:
            return None
        fd = self.pin(node)
        if fd is None:
            self._lost(node)
            return None
        try:
            intact = await trio.to_thread.run_sync(_check, fd, node)
        except BaseException:
            os.close(fd)
            raise
        if not intact:
            os.close(fd)
            self._lost(node)
            return None
        self._note_use(node.ino)
        return fd

    def pin(self, place: BodyPlace) -> int | None:
        """Return a descriptor of a large body, unverified, which stays valid when the body is removed."""
        if place.crc is None or place.pack is not None:
            return None
        try:
            return os.open(self.path(place.ino), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None

    def _lost(self, place: BodyPlace) -> None:
        log.warning("the cached body of file %d is damaged or gone: it is fetched again", place.ino)
        node = self._cache.node(place.ino)
        if node is not None and (node.crc, node.pack, node.offset) == (
            place.crc,
            place.pack,
            place.offset,
        ):
            self._cache.bodies.forget([place.ino])
            self.drop([place])

    def _note_use(self, ino: Ino) -> None:
        self._used.add(ino)
        if len(self._used) >= 512:
            try:
                self.flush_use()
            except CacheError as error:
                # A full disk can still be read.
                self._used.clear()
                report(error, "the order of use was not saved")

    def flush_use(self) -> None:
        """Save what was used since the last call; the order within that does not matter."""
        if self._used:
            self._cache.bodies.note_use(self._used)
            self._used.clear()

    # -- adding and removing -------------------------------------------------------------------------------

    def add(self, bodies: Sequence[Body]) -> None:
        """Note bodies that `IncomingBody.keep` has made permanent, and evict others if necessary.

        Raises CacheError.
        """
        unwanted = self._cache.bodies.add(bodies)
        for body in bodies:
            self.size += body.size
            if body.pack is not None:
                self._packs[body.pack].live += 1
        self.drop(unwanted)
        if self.size > self.limit:
            self._evict()

    def _evict(self) -> None:
        """Make more room than is needed, so that not every new body has to."""
        self.flush_use()
        room = min(self.limit // 20, _MAX_ROOM)
        oldest = self._cache.bodies.oldest(self.size - self.limit + room)
        self._cache.bodies.forget(node.ino for node in oldest)
        self.drop(oldest)

    def take(self, path: Path, ino: Ino, uid: Uid) -> None:
        """Make a complete file on the same file system the body of a message. It may be moved.

        Raises CacheError.
        """
        try:
            size = path.stat().st_size
            if size > self.limit:
                return
            if size <= SMALL:
                data = path.read_bytes()
                with self.lend_pack() as pack:
                    body = Body(ino, uid, len(data), zlib.crc32(data), pack.number, pack.append(data))
                    self.add([body])
                return
            crc = 0
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    crc = zlib.crc32(chunk, crc)
            path.rename(self.path(ino))
        except OSError as error:
            log.info("a body was not kept in the cache, it will be fetched: %s", error)
            return
        self.add([Body(ino, uid, size, crc, None, 0)])

    def rename(self, old: Ino, new: Ino) -> None:
        """Follow a message that has another inode number now."""
        with contextlib.suppress(FileNotFoundError):
            self.path(old).rename(self.path(new))

    def drop(self, gone: Iterable[BodyPlace]) -> None:
        """Remove bodies that the database no longer knows. Messages without a body are passed over."""
        packed = []
        for place in gone:
            if place.crc is None:
                continue
            self.size -= place.size
            if place.pack is None:
                _unlink(self.path(place.ino))
            elif (pack := self._packs.get(place.pack)) is not None:
                pack.live -= 1
                packed.append((pack, place))
        for pack, place in packed:
            if pack.live or pack.lent:
                with contextlib.suppress(OSError):
                    self._opened(pack)
                    pack.punch(place.offset, place.size)
            elif pack.number in self._packs:
                if pack in self._room:
                    self._room.remove(pack)
                self._remove_pack(pack)

    async def sweep(self) -> None:
        """Remove the files that a kill between rename and commit left behind. Raises nothing."""
        try:
            inos = await trio.to_thread.run_sync(_old_files, self._large, self._started)
            wanted = self._cache.bodies.cached(inos)
            for ino in inos:
                if ino not in wanted:
                    _unlink(self.path(ino))
            ours = {self._large, self._packs_at, self._temporary}
            for path in self.directory.iterdir():
                if path not in ours:
                    # From a version with another layout.
                    await trio.to_thread.run_sync(shutil.rmtree, path)
        except Exception as error:
            report(error, "the cache was not swept")


def _unlink(path: Path) -> None:
    """Remove a file. One that cannot be removed does no harm but take up room."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot remove %s from the cache: %s", path, error.strerror)


def _check(fd: int, node: Node) -> bool:
    if os.fstat(fd).st_size != node.size:
        return False
    crc = at = 0
    while data := os.pread(fd, _CHUNK, at):
        crc = zlib.crc32(data, crc)
        at += len(data)
    return crc == node.crc


def _old_files(directory: Path, before: float) -> list[Ino]:
    found: list[Ino] = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        # A newer file may not be in the database yet.
        found += [
            Ino(int(entry.name))
            for entry in entries
            if entry.name.isdigit() and entry.stat().st_mtime < before
        ]
    return found
