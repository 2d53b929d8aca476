"""Message bodies on disk: one file each, written once, verified whenever it is opened.

A body is written to a temporary file, renamed into place, and only then noted in the database with its
CRC-32. Whatever a kill, a power cut or a full disk leaves behind therefore is either not noted (and swept
away) or fails the check (and is fetched again): wrong bytes are never served. No fsync is needed for that.
"""

import contextlib
import itertools
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from imapfs.cache import Cache, Gone, Node
from imapfs.errors import CacheError, report
from imapfs.model import Ino

log = logging.getLogger(__name__)

SMALL: Final = 256 << 10
"""Bodies up to this many bytes are handled as one piece of memory; larger ones go through a file."""
_CHUNK: Final = 1 << 20
_SHARDS: Final = 256
_ROOM: Final = 64 << 20
"""Most bytes that are evicted at once beyond what is needed."""


@dataclass(frozen=True, slots=True)
class Body:
    """A body that is complete and in its file."""

    ino: Ino
    size: int
    crc: int


class Spool:
    """A body on its way from the server to its file. Used by one thread; others may look at ``written``."""

    def __init__(self, store: "BodyStore", size: int) -> None:
        self._store = store
        self.size = size
        self.written = 0
        self.crc = 0
        self.small: bytearray | None = bytearray() if size <= SMALL else None
        """The bytes so far of a small body; a large one is in a file from the start."""
        self.path: Path | None = None
        self.fd = -1
        if self.small is None:
            store.check_space(size)
            self._open()

    def _open(self) -> None:
        path = self._store.temporary()
        with self._store.writing():
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.path = path

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises CacheError if the disk does not."""
        self.crc = zlib.crc32(data, self.crc)
        if self.small is not None:
            self.small += data
        else:
            self._write(data)
        self.written += len(data)

    def _write(self, data: bytes | bytearray) -> None:
        with self._store.writing():
            view = memoryview(data)
            while view:
                view = view[os.write(self.fd, view) :]

    def keep(self, ino: Ino) -> Body | None:
        """Make the file permanent as the body of ``ino``. The descriptor of a large body stays open.

        None for a body that alone is larger than the cache may be: it is there until `discard` only.
        """
        if self.written > self._store.limit:
            return None
        if self.small is not None:
            self._open()
            self._write(self.small)
        with self._store.writing():
            if self.small is not None:
                fd, self.fd = self.fd, -1
                os.close(fd)
            assert self.path is not None
            self.path.rename(self._store.path(ino))
        self.path = None
        return Body(ino, self.written, self.crc)

    def discard(self) -> None:
        """Release what is not kept; safe at any point and more than once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.path is not None:
            _unlink(self.path)
            self.path = None


class BodyStore:
    """The body files of one account, at most ``limit`` bytes of them, least recently used first out."""

    def __init__(self, cache: Cache, limit: int) -> None:
        self._cache = cache
        self.directory = cache.directory / "bodies"
        self.limit = limit
        _, _, self.size = cache.totals()
        self._used: set[Ino] = set()
        self._serial = itertools.count()
        self._started = time.time()
        try:
            for shard in range(_SHARDS):
                (self.directory / f"{shard:02x}").mkdir(mode=0o700, parents=True, exist_ok=True)
            self._temporary = self.directory / "tmp"
            self._temporary.mkdir(mode=0o700, exist_ok=True)
            for left in self._temporary.iterdir():
                left.unlink()
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot use the cache {self.directory}") from None
        if self.size > limit:
            self._evict()

    def path(self, ino: Ino) -> Path:
        """Where the body of ``ino`` is, if it is cached."""
        return self.directory / f"{ino % _SHARDS:02x}" / str(ino)

    def temporary(self) -> Path:
        """A new name beside the bodies."""
        return self._temporary / str(next(self._serial))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the disk says into CacheError."""
        try:
            yield
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to the cache {self.directory}") from None

    def check_space(self, size: int) -> None:
        """Raise CacheError if ``size`` more bytes do not fit on the disk."""
        try:
            stat = os.statvfs(self.directory)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot use the cache {self.directory}") from None
        if stat.f_bavail * stat.f_frsize < size:
            raise CacheError.from_os_error(
                OSError(28, "No space left on device"),
                f"a message of {size} bytes does not fit in {self.directory}",
            )

    # -- reading -------------------------------------------------------------------------------------------

    def load(self, node: Node) -> bytes | None:
        """The body of a small message, or None if it is not intact in the cache."""
        try:
            with self.path(node.ino).open("rb", buffering=0) as file:
                data = file.read()
        except OSError:
            data = b""
        if len(data) != node.size or zlib.crc32(data) != node.crc:
            self._lost(node)
            return None
        self._note_use(node.ino)
        return data

    async def open(self, node: Node) -> int | None:
        """A descriptor of the body of any message, or None if it is not intact in the cache."""
        fd = self.pin(node.ino)
        if fd is None:
            self._lost(node)
            return None
        try:
            if node.size <= SMALL:
                intact = _check(fd, node)
            else:
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

    def pin(self, ino: Ino) -> int | None:
        """A descriptor, unverified, that outlives the file's removal; None if there is no file."""
        try:
            return os.open(self.path(ino), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None

    def _lost(self, node: Node) -> None:
        log.warning("the cached body of message %d is damaged or gone: it is fetched again", node.uid)
        self._cache.forget_bodies([node.ino])
        self.size -= node.size
        _unlink(self.path(node.ino))

    def _note_use(self, ino: Ino) -> None:
        self._used.add(ino)
        if len(self._used) >= 512:
            self.flush_use()

    def flush_use(self) -> None:
        """Write down what was used since the last time: exact order within it does not matter."""
        if self._used:
            self._cache.use_bodies(self._used)
            self._used.clear()

    # -- adding and removing -------------------------------------------------------------------------------

    def add(self, bodies: Sequence[Body]) -> None:
        """Note bodies that `Spool.keep` made permanent, and make room for them."""
        noted = self._cache.add_bodies((b.ino, b.size, b.crc) for b in bodies)
        self.size += sum(b.size for b in bodies)
        if noted < len(bodies):
            # Expunged while they were fetched.
            for body in bodies:
                if self._cache.node(body.ino) is None:
                    self.size -= body.size
                    _unlink(self.path(body.ino))
        if self.size > self.limit:
            self._evict()

    def _evict(self) -> None:
        """Make room, and some more, so that not every body that comes has to."""
        self.flush_use()
        room = min(self.limit // 20, _ROOM)
        oldest = self._cache.oldest_bodies(self.size - self.limit + room)
        self._cache.forget_bodies(ino for ino, _ in oldest)
        for ino, size in oldest:
            _unlink(self.path(ino))
            self.size -= size

    def take(self, path: Path, ino: Ino) -> None:
        """Make a file that is complete elsewhere on this disk the body of ``ino``."""
        try:
            crc = size = 0
            with path.open("rb") as file:
                while data := file.read(_CHUNK):
                    crc = zlib.crc32(data, crc)
                    size += len(data)
            if size > self.limit:
                return
            path.rename(self.path(ino))
        except OSError as error:
            log.info("a body was not kept in the cache, it will be fetched: %s", error)
            return
        self.add([Body(ino, size, crc)])

    def rename(self, old: Ino, new: Ino) -> None:
        """A message goes on under another inode."""
        with contextlib.suppress(FileNotFoundError):
            self.path(old).rename(self.path(new))

    def drop_file(self, ino: Ino) -> None:
        """Remove the body of a message that is in the database without it already."""
        with contextlib.suppress(FileNotFoundError):
            self.size -= self.path(ino).stat().st_size
            _unlink(self.path(ino))

    def drop(self, gone: Iterable[Gone]) -> None:
        """Remove the files of messages that were removed from the database."""
        for entry in gone:
            if entry.had_body:
                self.drop_file(entry.ino)

    async def sweep(self) -> None:
        """Remove files that no message has: what a kill between rename and commit left behind.

        Raises nothing: what stays behind is in nobody's way.
        """
        try:
            for shard in range(_SHARDS):
                directory = self.directory / f"{shard:02x}"
                inos = await trio.to_thread.run_sync(_old_files, directory, self._started)
                wanted = self._cache.cached(inos)
                for ino in inos:
                    if ino not in wanted:
                        _unlink(self.path(ino))
        except Exception as error:
            report(error, "the cache was not swept")


def _unlink(path: Path) -> None:
    """Remove a file; one that cannot be removed only takes up room."""
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
        # A newer one may be on its way into the database.
        found += [
            Ino(int(entry.name))
            for entry in entries
            if entry.name.isdigit() and entry.stat().st_mtime < before
        ]
    return found
