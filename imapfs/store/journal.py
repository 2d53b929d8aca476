"""The journal: moves between two commands, in a file that survives a power cut.

A server without MOVE copies a message and then deletes the original. An entry is written before the copy and
removed after the deletion, so that whatever cuts the two apart, the next attempt knows where to look.
"""

import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imapfs.atomic import replace_file
from imapfs.errors import CacheError
from imapfs.model import MessageRef, Uid, UidValidity

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A move by COPY and deletion that is under way."""

    source: MessageRef
    target: bytes
    """The name of the mailbox on the server."""
    uidnext: int
    """UIDNEXT of the target before the copy, which therefore has this UID or a higher one."""
    size: int
    date: int
    message_id: str


class Journal:
    """The moves under way. Used from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: list[JournalEntry] = []
        try:
            self._entries = [_restore(entry) for entry in json.loads(path.read_text())]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
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
        text = json.dumps([_describe(entry) for entry in self._entries])
        try:
            replace_file(self._path, text.encode(), durable=True)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write the journal {self._path}") from None


def _describe(entry: JournalEntry) -> dict[str, Any]:
    return {
        "source": entry.source.mailbox.decode("latin-1"),
        "uidvalidity": entry.source.uidvalidity,
        "uid": entry.source.uid,
        "target": entry.target.decode("latin-1"),
        "uidnext": entry.uidnext,
        "size": entry.size,
        "date": entry.date,
        "message_id": entry.message_id,
    }


def _restore(found: dict[str, Any]) -> JournalEntry:
    mailbox = found["source"].encode("latin-1")
    return JournalEntry(
        MessageRef(mailbox, UidValidity(found["uidvalidity"]), Uid(found["uid"])),
        found["target"].encode("latin-1"),
        found["uidnext"],
        found["size"],
        found["date"],
        found["message_id"],
    )
