"""Makes system calls on a mount in place of its daemon: a program by itself, run by `imapfs.kernel.inotify`.

It is a process because a thread cannot do this. If the daemon is killed while a thread of its own waits for
an answer, that thread keeps the descriptor of the device open at which nobody answers any more: the process
never ends, and the mount hangs. This process has no such descriptor: when the daemon dies, so does the
connection to the kernel, and the call fails.

Reads a JSON list a line, ``[call, directory, inode of the directory, name, ...]``, and answers each with the
errno in a line, 0 for done. Names are bytes as latin-1 text, directories relative to the mountpoint. Ends
when its input does. Imports nothing of the package, so that it can be started without it.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from typing import Final

PROOF: Final = "user.imapfs.announcer"
"""The extended attribute of the mountpoint that only this process can read."""
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Caller:
    """System calls in one mount, and never in another file system that happens to be at the same place."""

    def __init__(self, mountpoint: bytes) -> None:
        self._mountpoint = mountpoint
        self._device = -1

    def call(self, what: str, *arguments: str | int) -> None:
        """Raises OSError."""
        with contextlib.ExitStack() as stack:
            # Each time anew, because a descriptor that stays open would keep the mount from being ended.
            root = stack.enter_context(_opened(self._mountpoint, None))
            if what == "prove":
                # Both of the same descriptor: who answers the one is the device of the other.
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
        # The owner may always do this, also with a file that is closed to writing.
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
