"""An account as files, with two drivers: through a real mount, and by its model without a kernel.

What an operation means does not depend on the kernel. A test of that meaning is written once, against
`FileTree`, and runs with both drivers; see ``tests/fs``.
"""

import contextlib
import errno
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, TypeVar

import trio

from imapfs.daemon import mount as daemon
from imapfs.errors import ImapfsError, NotFound
from imapfs.fs.event_source import EventSource
from imapfs.fs.events import EventStream
from imapfs.fs.tree import Entry
from imapfs.imap.pool import SessionPool
from imapfs.kernel.invalidation import KernelCache
from imapfs.model import ROOT, DeletePolicy, Ino, MountConfig, Secret
from imapfs.store.cache import Cache
from tests.support.accounts import address
from tests.support.mailboxes import settle, waiting
from tests.support.mounting import DEADLINE, MailAccount, Mount

T = TypeVar("T")

Mode = Literal["r", "r+", "w", "a"]
"""Of `FileTree.open`, as for the builtin: "r" and "r+" for what exists, "w" begins empty."""


class Status(NamedTuple):
    """What stat shows of a file."""

    ino: int
    size: int
    mtime_ns: int


class OpenFile(ABC):
    """An open file; used as a context manager, it is closed at the end of the block."""

    @abstractmethod
    def read(self, offset: int = 0, size: int = 1 << 30) -> bytes:
        """Return bytes; fewer than ``size`` only at the end of the file."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Write behind what this descriptor wrote before; mode "a" begins at the end of the file."""

    @abstractmethod
    def fsync(self) -> None:
        """Return when the file is safe."""

    @abstractmethod
    def close(self) -> None:
        """End the use of the file."""

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


class FileTree(ABC):
    """The files of an account. Paths are relative to the mountpoint. All methods raise OSError."""

    cache: Path
    """For another `FileTree` of the account to go on with, after `end`."""

    @abstractmethod
    def listdir(self, path: str = "") -> list[str]:
        """Return the names in a directory."""

    @abstractmethod
    def stat(self, path: str) -> Status:
        """Return what stat shows of a file or directory."""

    @abstractmethod
    def open(self, path: str, mode: Mode) -> OpenFile:
        """Open a file."""

    @abstractmethod
    def truncate(self, path: str, size: int) -> None:
        """Set the size of a file that this caller does not have open."""

    @abstractmethod
    def utime(self, path: str, mtime: int) -> None:
        """Set the mtime, in seconds since the epoch."""

    @abstractmethod
    def rename(self, path: str, new: str) -> None:
        """Do what ``mv`` does."""

    @abstractmethod
    def unlink(self, path: str) -> None:
        """Do what ``rm`` does."""

    @abstractmethod
    def mkdir(self, path: str) -> None:
        """Create a directory."""

    @abstractmethod
    def rmdir(self, path: str) -> None:
        """Remove a directory."""

    @abstractmethod
    def getxattr(self, path: str, name: str) -> bytes:
        """Return the value of an extended attribute."""

    @abstractmethod
    def setxattr(self, path: str, name: str, value: bytes) -> None:
        """Set an extended attribute."""

    @abstractmethod
    def removexattr(self, path: str, name: str) -> None:
        """Remove an extended attribute."""

    @abstractmethod
    def settle(self) -> None:
        """Return when what can be uploaded is on the server: fsync of a directory."""

    @abstractmethod
    def waiting(self) -> list[tuple[str, str]]:
        """Return path and state of the files that the server does not have yet."""

    @abstractmethod
    def end(self) -> None:
        """Unmount; everything has been uploaded that can be when this returns."""

    def read(self, path: str) -> bytes:
        """Return the bytes of a file."""
        with self.open(path, "r") as file:
            return file.read()

    def write(
        self, path: str, data: bytes, mode: Mode = "w", *, sync: bool = False, mtime: int | None = None
    ) -> None:
        """Write to a file and close it; if ``sync``, wait for the server as sync(1) does; set ``mtime``."""
        with self.open(path, mode) as file:
            file.write(data)
        if sync:
            with self.open(path, "r") as file:
                file.fsync()
        if mtime is not None:
            self.utime(path, mtime)

    def exists(self, path: str) -> bool:
        """Return whether there is a file or directory."""
        try:
            self.stat(path)
        except FileNotFoundError:
            return False
        return True

    def file(self, uid: int, mailbox: str = "INBOX") -> str:
        """Return the path of the message that has had this UID since it was listed."""
        (name,) = [name for name in self.listdir(mailbox) if name.endswith(f".{uid}.eml")]
        return f"{mailbox}/{name}"


# -- through the kernel


class MountedFile(OpenFile):
    """A descriptor of this process."""

    def __init__(self, path: Path, mode: Mode) -> None:
        flags = {"r": os.O_RDONLY, "r+": os.O_RDWR, "a": os.O_RDWR | os.O_APPEND | os.O_CREAT}
        self._fd = os.open(path, flags.get(mode, os.O_RDWR | os.O_CREAT | os.O_TRUNC), 0o600)

    def read(self, offset: int = 0, size: int = 1 << 30) -> bytes:
        found = b""
        while more := os.pread(self._fd, min(1 << 20, size - len(found)), offset + len(found)):
            found += more
        return found

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def fsync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class MountedTree(FileTree):
    """A real mount."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._top = mount.path
        self.cache = mount.cache

    def listdir(self, path: str = "") -> list[str]:
        return os.listdir(self._top / path)

    def stat(self, path: str) -> Status:
        found = os.stat(self._top / path)
        return Status(found.st_ino, found.st_size, found.st_mtime_ns)

    def open(self, path: str, mode: Mode) -> OpenFile:
        return MountedFile(self._top / path, mode)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self._top / path, size)

    def utime(self, path: str, mtime: int) -> None:
        os.utime(self._top / path, (mtime, mtime))

    def rename(self, path: str, new: str) -> None:
        os.rename(self._top / path, self._top / new)

    def unlink(self, path: str) -> None:
        os.unlink(self._top / path)

    def mkdir(self, path: str) -> None:
        os.mkdir(self._top / path)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._top / path)

    def getxattr(self, path: str, name: str) -> bytes:
        return os.getxattr(self._top / path, name)

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        os.setxattr(self._top / path, name, value)

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self._top / path, name)

    def settle(self) -> None:
        settle(self._mount)

    def waiting(self) -> list[tuple[str, str]]:
        return waiting(self._mount)

    def end(self) -> None:
        self._mount.unmount()


# -- without it


class ModelFile(OpenFile):
    """An open file of a `ModelTree`."""

    def __init__(self, tree: "ModelTree", ino: Ino, offset: int, *, writing: bool) -> None:
        self._tree = tree
        self._ino = ino
        self._offset = offset
        self._writing = writing

    def read(self, offset: int = 0, size: int = 1 << 30) -> bytes:
        return self._tree.run(self._tree.model.files.read, self._ino, offset, size)

    def write(self, data: bytes) -> None:
        self._offset += self._tree.run(self._tree.model.files.write, self._ino, self._offset, data)

    def fsync(self) -> None:
        self._tree.run(partial(self._tree.model.fs.fsync, self._ino, writing=self._writing))

    def flush(self) -> None:
        """Do what close() waits for. The rest, RELEASE, may be lost with the mount."""
        self._tree.run(self._tree.model.files.flush, self._ino)

    def close(self) -> None:
        async def close() -> None:
            try:
                if self._writing:
                    await self._tree.model.files.flush(self._ino)
            finally:
                self._tree.model.fs.release(self._ino, writing=self._writing)

        self._tree.run(close)


class ModelTree(FileTree):
    """`imapfs.daemon.mount.Model` in a thread of its own, asked as the kernel would ask it."""

    def __init__(self, account: MailAccount, cache: Path, *, delete: DeletePolicy) -> None:
        self.cache = cache
        self._config = MountConfig(
            account=address(account),
            mountpoint=Path("/nowhere"),
            cache_dir=cache,
            cache_size=1 << 30,
            fetch_ahead=0,
            names="subject",
            own_mail={},
            list_attributes=False,
            delete=delete,
            trash=None,
            connections=4,
            timeout=DEADLINE,
            poll=300,
            read_only=False,
            fuse_options=frozenset(),
        )
        self._password = Secret(account.password)
        self._error: BaseException | None = None
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._work, name="model")
        self._thread.start()
        self._is_ready.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error

    def _work(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            self._error = error
        finally:
            self._is_ready.set()

    async def _serve(self) -> None:
        """Do what `daemon.mount` does for a mount, without the mount."""
        config = self._config
        pool = SessionPool(config.account, self._password, config.connections, config.timeout)
        cache = Cache.open(config.cache_dir / "account", config.names)
        try:
            async with trio.open_nursery() as background:
                background.start_soon(pool.keep_connected)
                self.model = daemon.build_model(config, pool, cache, background)
                source = EventSource(self.model.tree, cache, EventStream())
                daemon.subscribe(self.model, KernelCache(self.model.tree), source)
                try:
                    await daemon.start(self.model, background)
                    self._token = trio.lowlevel.current_trio_token()
                    self._over = trio.Event()
                    self._is_ready.set()
                    await self._over.wait()
                    await daemon.end(self.model)
                finally:
                    await pool.close()
                    background.cancel_scope.cancel()
        finally:
            cache.close()

    def end(self) -> None:
        if self._thread.is_alive():
            self._token.run_sync_soon(self._over.set)
            self._thread.join(DEADLINE)
            assert not self._thread.is_alive(), "the model does not end"
        if self._error is not None:
            raise self._error

    def run(self, request: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Make a request, within its timeout, and raise what the kernel would raise."""

        async def bounded() -> T:
            with trio.fail_after(self._config.timeout):
                return await request(*arguments)

        try:
            return trio.from_thread.run(bounded, trio_token=self._token)
        except trio.TooSlowError:
            raise OSError(self.model.fs.late_errno, "too late") from None
        except ImapfsError as error:
            if error.errno == errno.ESTALE:
                # The kernel looks the path up again.
                raise FileNotFoundError(errno.ENOENT, str(error)) from error
            raise OSError(error.errno, str(error)) from error

    async def _parent(self, path: str) -> tuple[Ino, bytes]:
        parts = path.encode().split(b"/")
        ino = ROOT
        for name in parts[:-1]:
            ino = (await self.model.fs.lookup(ino, name)).ino
        return ino, parts[-1]

    async def _named(self, path: str) -> tuple[Ino, bytes]:
        """Return a directory and a name in it, which the kernel looks up before it changes anything."""
        parent, name = await self._parent(path)
        with contextlib.suppress(NotFound):
            await self.model.fs.lookup(parent, name)
        return parent, name

    async def _entry(self, path: str) -> Entry:
        if not path:
            return self.model.fs.getattr(ROOT)
        return await self.model.fs.lookup(*await self._parent(path))

    def listdir(self, path: str = "") -> list[str]:
        async def listdir() -> list[str]:
            fs = self.model.fs
            ino = (await self._entry(path)).ino
            await fs.opendir(ino)
            try:
                names, after = [], 0
                while page := await fs.readdir(ino, after):
                    names += [entry.name.decode() for entry in page]
                    after = page[-1].ino
                return names
            finally:
                fs.closedir(ino)

        return self.run(listdir)

    def stat(self, path: str) -> Status:
        entry = self.run(self._entry, path)
        return Status(entry.ino, entry.size, entry.mtime)

    def open(self, path: str, mode: Mode) -> ModelFile:
        async def opened() -> tuple[Ino, int]:
            fs, files = self.model.fs, self.model.files
            parent, name = await self._parent(path)
            try:
                entry = await fs.lookup(parent, name)
            except NotFound:
                if mode in {"r", "r+"}:
                    raise
                return (await fs.create(parent, name, 0o600)).ino, 0
            opening = fs.open(entry.ino, writing=mode != "r", wanted=mode == "r")
            try:
                if isinstance(opening, Awaitable):
                    await opening
                if mode == "w":
                    await files.truncate(entry.ino, 0)
            except BaseException:
                fs.release(entry.ino, writing=mode != "r")
                raise
            return entry.ino, fs.getattr(entry.ino).size if mode == "a" else 0

        ino, offset = self.run(opened)
        return ModelFile(self, ino, offset, writing=mode != "r")

    def truncate(self, path: str, size: int) -> None:
        async def truncate() -> None:
            await self.model.fs.truncate((await self._entry(path)).ino, size, is_open=False)

        self.run(truncate)

    def utime(self, path: str, mtime: int) -> None:
        async def utime() -> None:
            ino = (await self._entry(path)).ino
            self.model.fs.set_attributes(ino, mode=None, mtime=mtime * 10**9, owner=None, group=None)

        self.run(utime)

    def rename(self, path: str, new: str) -> None:
        async def rename() -> None:
            here, there = await self._named(path), await self._named(new)
            await self.model.fs.rename(*here, *there, keep_existing=False)

        self.run(rename)

    def unlink(self, path: str) -> None:
        self._change(self.model.fs.unlink, path)

    def mkdir(self, path: str) -> None:
        self._change(self.model.fs.mkdir, path)

    def rmdir(self, path: str) -> None:
        self._change(self.model.fs.rmdir, path)

    def _change(self, request: Callable[[Ino, bytes], Awaitable[object]], path: str) -> None:
        async def change() -> None:
            await request(*await self._named(path))

        self.run(change)

    def getxattr(self, path: str, name: str) -> bytes:
        async def get() -> bytes:
            return await self.model.xattrs.get((await self._entry(path)).ino, name.encode())

        return self.run(get)

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        async def set_() -> None:
            await self.model.xattrs.set((await self._entry(path)).ino, name.encode(), value)

        self.run(set_)

    def removexattr(self, path: str, name: str) -> None:
        async def remove() -> None:
            await self.model.xattrs.remove((await self._entry(path)).ino, name.encode())

        self.run(remove)

    def settle(self) -> None:
        self.run(self.model.fs.fsync_directory)

    def waiting(self) -> list[tuple[str, str]]:
        async def waiting() -> list[tuple[str, str]]:
            model = self.model
            drafts = [draft for draft in model.spool if draft.state in {"sending", "unsent"}]
            return [(model.tree.path_of(draft), draft.state) for draft in drafts]

        return self.run(waiting)
