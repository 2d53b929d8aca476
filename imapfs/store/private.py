"""Directories for what nobody else may see or change: cache, spool and journal."""

import os
import stat
from pathlib import Path

from imapfs.errors import CacheError

_MAX_LINKS = 40
"""Symbolic links that the kernel follows in one path (path_resolution(7))."""


def make_private(directory: Path, what: str) -> None:
    """Make a directory that only this user can use, with its parents, or check one that is there.

    Refused is a directory of somebody else, and one whose path somebody other than this user and root could
    lead elsewhere: by a directory or a link that is theirs, or by a directory in which others can rename.
    ``what`` is the directory's purpose, such as ``"cache"``. Raises CacheError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_path(directory, what)
        if directory.stat().st_uid != os.geteuid():
            raise CacheError(
                f"the {what} directory {directory} belongs to another user: name one of your own"
            )
        directory.chmod(0o700)
    except OSError as error:
        raise CacheError.from_os_error(error, f"cannot use the {what} directory {directory}") from None


def _check_path(directory: Path, what: str) -> None:
    waiting = list(reversed(directory.absolute().parts))
    path = Path(waiting.pop())
    links = 0
    while waiting:
        part = waiting.pop()
        if part == "..":
            path = path.parent
            continue
        parent = path.lstat()
        path /= part
        found = path.lstat()
        trusted = {0, os.geteuid()}
        others = stat.S_IWOTH | (0 if parent.st_gid in {0, os.getegid()} else stat.S_IWGRP)
        if found.st_uid not in trusted or (parent.st_mode & others and not parent.st_mode & stat.S_ISVTX):
            raise CacheError(
                f"the {what} directory {directory} is not safe, as others can replace {path}: name another"
            )
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise CacheError(f"the {what} directory {directory} is a circle of links: name another")
            target = Path(path.readlink())
            path = Path("/") if target.is_absolute() else path.parent
            waiting += reversed([part for part in target.parts if part != "/"])
