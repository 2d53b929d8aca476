"""Writing a file as a whole. One that is replaced has either its old or its new contents after a kill."""

import mmap
import os
from pathlib import Path
from typing import Final

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
TEMPORARY: Final = ".tmp"
"""Suffix of a file that is not complete. What has it after a kill is of no use."""


def create_file(path: Path, data: bytes) -> None:
    """Make a file, readable by its owner only. A kill can leave a part of it. Raises OSError."""
    with os.fdopen(os.open(path, _NEW, 0o600), "wb") as file:
        file.write(data)


def replace_file(path: Path, data: bytes | mmap.mmap, *, durable: bool) -> None:
    """Replace the contents of ``path``, or make it, readable by its owner only.

    ``durable``: the new contents survive a power cut from when this returns. Raises OSError; the old contents
    are still there then.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    fd = os.open(temporary, _NEW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(fd)
    temporary.rename(path)
    if durable:
        sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Make the contents of a file, or the names in a directory, survive a power cut. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
