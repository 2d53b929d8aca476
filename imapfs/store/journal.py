"""The journal: moves between two commands, in a file that survives a power cut.

A server without MOVE copies a message and then deletes the original. An entry is written before the copy and
removed after the deletion, so that whatever cuts the two apart, the next attempt knows where to look.
"""

import json
import logging
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from imapfs.atomic import replace_file
from imapfs.errors import CacheError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A move by COPY and deletion that is under way; names as latin-1 text of the server's bytes."""

    source: str
    uidvalidity: int
    uid: int
    target: str
    uidnext: int
    """UIDNEXT of the target before the copy, which therefore has this UID or a higher one."""
    size: int
    date: int
    message_id: str

    def is_of(self, source: bytes, uidvalidity: int, uid: int) -> bool:
        """Return whether the entry is about this message."""
        return (self.source, self.uidvalidity, self.uid) == (source.decode("latin-1"), uidvalidity, uid)


class Journal:
    """The moves under way. Used from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: list[JournalEntry] = []
        try:
            self._entries = [JournalEntry(**entry) for entry in json.loads(path.read_text())]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            log.warning("the journal %s cannot be read (%s): look for messages that are doubled", path, error)
        self.left = list(self._entries)
        """Entries that no task works on any more, to be finished. Used on the trio thread only."""

    def add(self, entry: JournalEntry) -> None:
        """Write ``entry``; durable when this returns. Raises CacheError."""
        with self._lock:
            self._entries = [*self._entries, entry]
            self._write()

    def remove(self, entry: JournalEntry) -> None:
        """Remove the entry of a move that is finished. Raises CacheError."""
        with self._lock:
            self._entries = [e for e in self._entries if e != entry]
            self._write()

    def _write(self) -> None:
        text = json.dumps([asdict(entry) for entry in self._entries])
        try:
            replace_file(self._path, text.encode(), durable=True)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write the journal {self._path}") from None
