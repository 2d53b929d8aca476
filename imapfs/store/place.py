"""Where the precious files of an account are: its spool and its journal.

They are no part of the cache, which everybody may delete, but in the XDG data directory. They have a lock of
their own there, as a cache that was deleted locks nothing. Earlier versions kept them beside the cache.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from imapfs.atomic import TEMPORARY, replace_file, sync_path
from imapfs.errors import CacheError
from imapfs.store.private import make_private

log = logging.getLogger(__name__)

SPOOL: Final = "spool"
JOURNAL: Final = "journal.json"
_DIRECTORIES: Final = "directories.json"
_TAKEN: Final = "taken-over.json"
"""What was copied, but may still be in the old place."""


@contextlib.contextmanager
def claim(directory: Path, cache: Path) -> Iterator[Path]:
    """Yield the directory for spool and journal, locked for this process. Raises CacheError.

    If that is not the cache's own, what an earlier version left in ``cache`` is taken over. If there is no
    room for that, the old place is used once more.
    """
    if directory == cache:
        yield directory  # locked with the cache
        return
    make_private(directory, "spool")
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CacheError.from_os_error(error, f"cannot use the spool directory {directory}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(f"another mount uses the spool {directory}: unmount it first") from None
        is_new = not os.fstat(lock).st_size
        try:
            _take_over(cache, directory)
        except OSError as error:
            log.warning("the spool in %s is not moved to %s yet: %s", cache, directory, error.strerror)
            yield cache if is_new else directory
            return
        with contextlib.suppress(OSError):
            os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        yield directory
    finally:
        os.close(lock)


def _take_over(old: Path, new: Path) -> None:
    """Move spool and journal: copied and durable first, then removed.

    Raises OSError while all is still in ``old``.
    """
    marker = new / _TAKEN
    taken = _load(marker)
    found = _files(old)
    copied = [name for name in found if name in taken or _copy(old, new, name)]
    if set(copied) - taken:
        if (new / SPOOL).exists():
            sync_path(new / SPOOL)
        # From here on the next mount copies nothing of it again: it may have been uploaded meanwhile.
        replace_file(marker, json.dumps(copied).encode(), durable=True)
    try:
        for name in copied:
            (old / name).unlink()
        if copied:
            sync_path(old)
        marker.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s was copied to %s and cannot be removed: %s", old, new, error.strerror)


def _files(old: Path) -> list[str]:
    spool = old / SPOOL
    names = [f"{SPOOL}/{path.name}" for path in sorted(spool.iterdir())] if spool.exists() else []
    names = [name for name in names if not name.endswith(TEMPORARY) and name != f"{SPOOL}/boot"]
    return names + [JOURNAL] * (old / JOURNAL).exists()


def _load(marker: Path) -> set[str]:
    try:
        return set(map(str, json.loads(marker.read_text())))
    except (FileNotFoundError, ValueError, TypeError):
        return set()


def _copy(old: Path, new: Path, name: str) -> bool:
    """Copy a file; durable on return, but for its name. Return False if another file has that name."""
    source, target = old / name, new / name
    data = source.read_bytes()
    target.parent.mkdir(mode=0o700, exist_ok=True)
    if target.exists() and (present := target.read_bytes()) != data:
        if name == JOURNAL:
            data = b"%b\n%b" % (present, data)  # a log: what is in it twice counts once
        elif name == f"{SPOOL}/{_DIRECTORIES}":
            data = json.dumps([*json.loads(present), *json.loads(data)]).encode()
        else:
            log.warning("%s is not taken over: %s is another file", source, target)
            return False
    replace_file(target, data, durable=True)
    return True
