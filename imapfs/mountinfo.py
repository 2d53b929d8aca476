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
    """Return the mounts in the text of ``/proc/PID/mountinfo`` (proc_pid_mountinfo(5)), in its order.

    Every user of the machine can have a part in it: a line that is not understood is passed over.
    """
    # Only a newline ends a line: the kernel escapes it within a field, but neither \r nor \f.
    return [mount for line in data.split(b"\n") if (mount := _parse_line(line)) is not None]


def _parse_line(line: bytes) -> Mount | None:
    before, _, after = line.partition(b" - ")
    left, right = before.split(b" ", 5), after.split(b" ", 2)
    if len(left) < 5 or len(right) < 2:
        return None
    return Mount(Path(_unescape(left[4])), _unescape(right[0]), _unescape(right[1]))


def _unescape(field: bytes) -> str:
    """Undo the kernel's escapes: space, tab, newline, backslash and # are written as three octal digits."""
    return os.fsdecode(re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), field))


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
