"""The mounts of this machine, as the kernel lists them in /proc/self/mountinfo.

Nothing here makes a system call on a mount itself: a mount whose daemon is stuck never answers one.
"""

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

FSTYPE: Final = "fuse.imapfs"


class Mount(NamedTuple):
    mountpoint: Path
    fstype: str
    source: str


def parse(data: bytes) -> list[Mount]:
    """Return the mounts in the text of ``/proc/PID/mountinfo`` (proc_pid_mountinfo(5)), in its order."""
    mounts = []
    for line in data.splitlines():
        before, _, after = line.partition(b" - ")
        mountpoint = before.split(b" ")[4]
        fstype, source = after.split(b" ")[:2]
        mounts.append(Mount(Path(_unescape(mountpoint)), _unescape(fstype), _unescape(source)))
    return mounts


def _unescape(field: bytes) -> str:
    """Undo the kernel's escapes: space, tab, newline, backslash and # are written as three octal digits."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))


def all_mounts() -> list[Mount]:
    """Return all mounts that this process can see."""
    return parse(Path("/proc/self/mountinfo").read_bytes())


def imapfs_mounts() -> list[Mount]:
    """Return the mounts of imapfs."""
    return [mount for mount in all_mounts() if mount.fstype == FSTYPE]


def mount_at(path: Path) -> Mount | None:
    """Return the mount whose root is ``path``, the topmost of several; None if it is not a mountpoint."""
    return {mount.mountpoint: mount for mount in all_mounts()}.get(real_path(path))


def real_path(path: Path) -> Path:
    """Make ``path`` absolute and resolve its symbolic links, without touching a mountpoint at its end."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - Path cannot resolve ".." without I/O
    direct = Path(os.path.realpath(absolute.parent)) / absolute.name
    if any(mount.mountpoint == direct for mount in all_mounts()):
        return direct
    return Path(os.path.realpath(path))
