"""A helper program that makes system calls in a mount for its daemon. `imapfs.kernel.inotify` runs it.

A thread of the daemon could not do this. If the daemon is killed while one of its own threads waits for an
answer in the mount, that thread keeps /dev/fuse open and is never answered: the process never ends, and the
mount hangs. This process does not have /dev/fuse open: when the daemon dies, the kernel ends the connection,
and the call fails.

Each line of its input is a JSON list, ``[call, directory, inode of the directory, name, ...]``. The answer is
a line with the errno, 0 for success. Names are bytes as latin-1 text; directories are relative to the
mountpoint. The program ends when its input does. It imports nothing of this package, so that it starts
quickly.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from typing import Final

PROOF: Final = "user.imapfs.announcer"
"""Extended attribute of the mountpoint that only this process can read."""
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Caller:
    """Makes system calls in one mount, and never in another file system with the same path."""

    def __init__(self, mountpoint: bytes) -> None:
        self._mountpoint = mountpoint
        self._device = -1

    def call(self, what: str, *arguments: str | int) -> None:
        """Make one system call, or prove that this process is the helper of the mount. Raises OSError."""
        with contextlib.ExitStack() as stack:
            # For each call: a descriptor that stays open would keep the mount busy.
            root = stack.enter_context(_opened(self._mountpoint, None))
            if what == "prove":
                # One descriptor for both: the device is that of the mount that has given the proof.
                os.getxattr(f"/proc/self/fd/{root}", PROOF)
                self._device = os.fstat(root).st_dev
                return
            places = []
            for path, ino, name in zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True):
                directory = stack.enter_context(_opened(str(path).encode("latin-1"), root))
                found = os.fstat(directory)
                if (found.st_dev, found.st_ino) != (self._device, ino):
                    raise OSError(errno.EXDEV, "another file system")
                places.append((directory, str(name).encode("latin-1")))
            _make(what, places)


def _make(what: str, places: list[tuple[int, bytes]]) -> None:
    (directory, name), *more = places
    if what == "mknod":
        os.mknod(name, 0o600, dir_fd=directory)
    elif what == "mkdir":
        os.mkdir(name, dir_fd=directory)
    elif what == "unlink":
        os.unlink(name, dir_fd=directory)
    elif what == "rmdir":
        os.rmdir(name, dir_fd=directory)
    elif what == "utime":
        # The owner is always allowed to do this, even if the file is not writable.
        os.utime(name, dir_fd=directory, follow_symlinks=False)
    else:
        ((target, new_name),) = more
        os.rename(name, new_name, src_dir_fd=directory, dst_dir_fd=target)


@contextlib.contextmanager
def _opened(path: bytes, within: int | None) -> Iterator[int]:
    fd = os.open(path, _DIRECTORY, dir_fd=within)
    try:
        yield fd
    finally:
        os.close(fd)


def main() -> None:
    caller = Caller(os.fsencode(sys.argv[1]))
    for line in sys.stdin:
        code = 0
        try:
            caller.call(*json.loads(line))
        except OSError as error:
            code = error.errno or errno.EIO
        print(code, flush=True)


if __name__ == "__main__":
    main()
