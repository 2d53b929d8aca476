"""The least that a pyfuse3 file system can be: files from memory, with handlers that do nothing.

It waits for requests as imapfs does. What its second ``grep -r`` takes is what the handlers of imapfs cannot
go below: the kernel has every byte and every name by then, and asks for open, flush and release only.
"""

import errno
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import pyfuse3
import trio

from imapfs.kernel.loop import quick_requests

_ROOT = pyfuse3.ROOT_INODE
_FOREVER = 86400.0


class Bare(pyfuse3.Operations):
    """Inode 2 + n is the n-th file. ``read_only``: flush answers ENOSYS, so that it is not asked again."""

    def __init__(self, files: Sequence[Path], read_only: bool) -> None:
        super().__init__()
        self._files = [(path.name.encode(), path.read_bytes()) for path in files]
        self._read_only = read_only

    def _entry(self, ino: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(ino)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o500 if ino == _ROOT else stat.S_IFREG | 0o400)
        entry.st_size = 0 if ino == _ROOT else len(self._files[ino - 2][1])
        entry.entry_timeout = entry.attr_timeout = _FOREVER
        return entry

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(inode)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(1)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for number, (name, _) in enumerate(self._files[start_id:], start_id):
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), self._entry(number + 2), number + 1):
                return

    async def open(self, inode: pyfuse3.InodeT, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return self._files[fh - 2][1][off : off + size]

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        if self._read_only:
            raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        pass


def main() -> None:
    """Arguments: mountpoint, directory of the files, and ``ro`` or ``rw``. Serves until it is unmounted."""
    mountpoint, directory, mode = sys.argv[1:]
    files = sorted(path for path in Path(directory).iterdir() if path.is_file())
    options = {"fsname=bare", "default_permissions", *(["ro"] if mode == "ro" else [])}
    pyfuse3.init(Bare(files, mode == "ro"), os.fspath(mountpoint), options)
    try:
        with quick_requests(pyfuse3):
            trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
