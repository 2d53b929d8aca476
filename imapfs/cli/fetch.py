"""``imapfs fetch``: reads what is below a directory of a mount, so that it is in the cache afterwards.

An ordinary program as far as the mount can tell: what makes it quick is that the daemon fetches ahead. It
can be stopped at any time and goes on where it was, because what is cached is read from the disk.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final, NamedTuple

from imapfs.errors import ImapfsError, UsageError
from imapfs.mountinfo import imapfs_mounts

_READERS: Final = 4
_CHUNK: Final = 1 << 20


class Outcome(NamedTuple):
    """What became of one message."""

    size: int
    """Bytes read."""
    error: str
    """Why it could not be read, or ""."""


class Messages(NamedTuple):
    """What there is to read."""

    files: list[Path]
    size: int
    """Bytes, as far as is known before they are read."""


def find(directory: Path) -> Messages:
    """All messages below ``directory``. Raises UsageError if it is in no mount of imapfs."""
    where = Path(os.path.realpath(directory))
    if not any(where == m.mountpoint or m.mountpoint in where.parents for m in imapfs_mounts()):
        raise UsageError(f"{directory} is not below a mountpoint of imapfs: 'imapfs status' lists them")
    files, size = [], 0
    for root, _, names in os.walk(where, onerror=_raise):
        # Not sorted: the order of the directory is that in which the server has them.
        for name in names:
            path = Path(root, name)
            try:
                size += path.stat().st_size
            except FileNotFoundError:
                continue  # deleted meanwhile
            files.append(path)
    return Messages(files, size)


def _raise(error: OSError) -> None:
    raise ImapfsError(f"{error.filename} cannot be listed: {error.strerror}") from None


def read(files: list[Path]) -> Iterator[Outcome]:
    """Read ``files``, several at a time; one outcome each, as they come."""
    with ThreadPoolExecutor(_READERS) as readers:
        try:
            for done in as_completed([readers.submit(_read, path) for path in files]):
                yield done.result()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def _read(path: Path) -> Outcome:
    size = 0
    try:
        with path.open("rb", buffering=0) as file:
            while data := file.read(_CHUNK):
                size += len(data)
    except FileNotFoundError:
        return Outcome(0, "")
    except OSError as error:
        return Outcome(size, f"{path}: {error.strerror}")
    return Outcome(size, "")
