"""The journal: what is half done on the server and must not be forgotten.

It has three kinds of entries:

- A *move* between COPY and the deletion of the original, for servers without MOVE. The entry is durable
  before COPY is sent, so that after an interruption both mailboxes are looked at before anything is repeated.
- A *removal* of a message that a newer version has replaced. The entry is written in the same step in which
  the newer version becomes known to be safe.
- An *upload* between APPEND and the moment at which its outcome is known. The notes of a whole batch are
  durable, by one write, before the first byte of an APPEND is sent. So a draft without a note was not
  uploaded.

The file is a log: each line is a JSON value that adds an entry or says that one is done. A line that is
written survives the end of the process, and after `Journal.sync` also a power cut. Only the last line can be
incomplete, and it is dropped then, as what it announces has not begun. Each line has a line end before it as
well, so that an incomplete one spoils nothing after it. Without entries there is no file. Earlier versions
wrote one list of moves, with names in Latin-1; it is still read.
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from imapfs.atomic import replace_file, sync_path
from imapfs.errors import CacheError
from imapfs.model import MessageRef, Uid, UidValidity
from imapfs.names import as_bytes, as_text, renamed

log = logging.getLogger(__name__)

_MAX_LINES: Final = 1000
"""Lines after which the file is written again with only the entries that are open."""


@dataclass(frozen=True, slots=True)
class PendingMove:
    """A move by COPY and deletion that is under way."""

    source: MessageRef
    target: bytes
    """The name of the mailbox on the server."""
    uidnext: int
    """UIDNEXT of the target before the copy, which therefore has this UID or a higher one."""
    size: int
    """RFC822.SIZE, bytes."""
    date: int
    """INTERNALDATE, seconds since the epoch."""
    message_id: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """An upload whose outcome is not known: if it succeeded, the message has ``uidnext`` or a higher UID."""

    mailbox: bytes
    """As the server spells it."""
    uidvalidity: UidValidity
    uidnext: int
    size: int
    """Of the bytes that were uploaded."""
    digest: str
    """SHA-256 of all these bytes."""
    message_id: str = ""
    accepted: bool = False
    """Whether the server has said OK without naming the message: it is never uploaded again."""

    def ref(self, uid: Uid) -> MessageRef:
        """Return the identity of the message in the same mailbox that has ``uid``."""
        return MessageRef(self.mailbox, self.uidvalidity, uid)


@dataclass(frozen=True, slots=True)
class _UploadNote:
    file: str
    """Name of the draft's file in the spool."""
    attempt: Attempt


_Entry = PendingMove | MessageRef | _UploadNote
_Verb = Literal["add", "done"]


class Journal:
    """The open entries. Used from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: dict[_Entry, None] = {}
        self._lines = 0
        self._load()
        self.interrupted = [entry for entry in self._entries if isinstance(entry, PendingMove)]
        """Moves that no task works on, to be finished. Used on the trio thread only."""

    # -- moves, in a thread --------------------------------------------------------------------------------

    def begin(self, move: PendingMove) -> None:
        """Add a move; durable when this returns. Raises CacheError."""
        self._write("add", move)
        self.sync()

    def finish(self, move: PendingMove) -> None:
        """Note that a move is done, or never will be; durable when this returns. Raises CacheError."""
        self._write("done", move)
        self.sync()

    # -- removals, on the trio thread ----------------------------------------------------------------------

    @property
    def removals(self) -> list[MessageRef]:
        """Messages that are still to be removed from the server, the oldest entry first."""
        with self._lock:
            return [entry for entry in self._entries if isinstance(entry, MessageRef)]

    def add_removal(self, ref: MessageRef) -> None:
        """Note that a message is to be removed. Survives the end of the process. Raises CacheError."""
        self._write("add", ref)

    def end_removal(self, ref: MessageRef) -> None:
        """Note that a message was removed, or was gone already.

        Raises nothing: an entry that comes back after a full disk or a power cut finds that the message is
        gone, as no other message ever has its UID.
        """
        try:
            self._write("done", ref)
        except CacheError as error:
            log.info("a removal that is done stays in the journal: %s", error)

    # -- uploads -------------------------------------------------------------------------------------------

    @property
    def uploads(self) -> dict[str, Attempt]:
        """Uploads whose outcome is not known, by the names of the drafts' files in the spool."""
        with self._lock:
            return {e.file: e.attempt for e in self._entries if isinstance(e, _UploadNote)}

    def begin_uploads(self, attempts: Mapping[str, Attempt], ended: Collection[str] = ()) -> None:
        """In a thread: note uploads that are about to begin; durable when this returns. Raises CacheError.

        ``ended``: files whose notes are no longer needed. What has become of them has to be durable.
        """
        self._end_uploads(ended)
        self._write_all("add", [_UploadNote(file, attempt) for file, attempt in attempts.items()])
        if attempts:
            self.sync()

    def _end_uploads(self, files: Collection[str]) -> None:
        with self._lock:
            done = [e for e in self._entries if isinstance(e, _UploadNote) and e.file in files]
        self._write_all("done", done)

    def rename_mailbox(self, old: bytes, new: bytes, delimiter: bytes) -> None:
        """Follow the rename of a mailbox, and of those below it. Raises CacheError."""
        self.correct_mailboxes(
            lambda _, attempt: renamed(attempt.mailbox, old, new, delimiter),
            lambda ref: renamed(ref.mailbox, old, new, delimiter),
        )

    def correct_mailboxes(
        self,
        of_upload: Callable[[str, Attempt], bytes | None],
        of_removal: Callable[[MessageRef], bytes | None],
    ) -> None:
        """Give entries another name of their mailbox, except for those for which None is returned.

        An upload is given by the draft's file in the spool. Raises CacheError.
        """
        for file, attempt in self.uploads.items():
            name = of_upload(file, attempt)
            if name is not None:
                self._write("add", _UploadNote(file, replace(attempt, mailbox=name)))
                self._write("done", _UploadNote(file, attempt))
        for ref in self.removals:
            name = of_removal(ref)
            if name is not None:
                self.add_removal(replace(ref, mailbox=name))
                self.end_removal(ref)

    # -- the file ------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """In a thread: return when all that was written survives a power cut. Raises CacheError."""
        try:
            with contextlib.suppress(FileNotFoundError):
                sync_path(self._path)
            sync_path(self._path.parent)
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> CacheError:
        return CacheError.from_os_error(error, f"cannot write the journal {self._path}")

    def _write(self, verb: _Verb, entry: _Entry) -> None:
        self._write_all(verb, [entry])

    def _write_all(self, verb: _Verb, entries: Sequence[_Entry]) -> None:
        with self._lock:
            entries = [entry for entry in entries if (verb == "add") != (entry in self._entries)]
            if not entries:
                return
            if verb == "done":
                # Even if the disk is full: for this process they are done.
                for entry in entries:
                    del self._entries[entry]
            try:
                if verb == "done" and not self._entries:
                    self._path.unlink(missing_ok=True)
                    self._lines = 0
                elif self._lines >= max(_MAX_LINES, 2 * len(self._entries)):
                    self._compact([*self._entries, *(entries if verb == "add" else [])])
                else:
                    _append(self._path, b"".join(_line(verb, entry) for entry in entries))
                    self._lines += len(entries)
            except OSError as error:
                raise self._failure(error) from None
            if verb == "add":
                self._entries.update(dict.fromkeys(entries))

    def _compact(self, entries: list[_Entry]) -> None:
        replace_file(self._path, b"".join(_line("add", entry) for entry in entries), durable=True)
        self._lines = len(entries)

    def _load(self) -> None:
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(error)
            return
        damage: Exception | None = None
        for number, line in enumerate(lines, 1):
            try:
                for verb, entry in _parse(line):
                    if verb == "add":
                        self._entries[entry] = None
                    else:
                        self._entries.pop(entry, None)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if number < len(lines) or not line.startswith(b"{"):
                    damage = error
        if damage is not None:
            self._warn(damage)
        self._lines = len(lines)
        # If this fails, the next mount reads the same lines again.
        with contextlib.suppress(OSError):
            if self._entries:
                self._compact(list(self._entries))
            else:
                self._path.unlink()
                self._lines = 0

    def _warn(self, error: Exception) -> None:
        log.warning("the journal %s cannot be read (%s): look for doubled messages", self._path, error)


def _append(path: Path, line: bytes) -> None:
    """Append a line, all of it or nothing. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except OSError:
            os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


def _line(verb: _Verb, entry: _Entry) -> bytes:
    described: dict[str, Any]
    if isinstance(entry, MessageRef):
        described = {"removal": _describe(entry)}
    elif isinstance(entry, _UploadNote):
        attempt = {**dataclasses.asdict(entry.attempt), "mailbox": as_text(entry.attempt.mailbox)}
        described = {"upload": {"file": entry.file, **attempt}}
    else:
        described = {
            "move": {
                "source": _describe(entry.source),
                "target": as_text(entry.target),
                "uidnext": entry.uidnext,
                "size": entry.size,
                "date": entry.date,
                "message_id": entry.message_id,
            }
        }
    return b"\n%s\n" % json.dumps({verb: described}).encode()


def _parse(line: bytes) -> Iterator[tuple[_Verb, _Entry]]:
    """Yield what a line says. Raises ValueError, TypeError, KeyError or AttributeError for a damaged one."""
    if not line:
        return
    found = json.loads(line)
    if isinstance(found, list):
        for entry in found:
            yield "add", _restore_latin1(entry)
        return
    ((verb, described),) = found.items()
    if verb not in {"add", "done"}:
        raise ValueError(f"unknown verb {verb!r}")
    if "removal" in described:
        yield verb, _restore(described["removal"])
        return
    if "upload" in described:
        upload = dict(described["upload"])
        yield verb, _UploadNote(upload.pop("file"), restore_attempt(upload))
        return
    move = described["move"]
    yield (
        verb,
        PendingMove(
            _restore(move["source"]),
            as_bytes(move["target"]),
            move["uidnext"],
            move["size"],
            move["date"],
            move["message_id"],
        ),
    )


def _describe(ref: MessageRef) -> dict[str, Any]:
    return {
        "mailbox": as_text(ref.mailbox),
        "uidvalidity": ref.uidvalidity,
        "uid": ref.uid,
        "date": ref.date,
        "size": ref.size,
    }


def _restore(found: dict[str, Any]) -> MessageRef:
    # Earlier versions did not note date and size.
    return MessageRef(
        as_bytes(found["mailbox"]),
        UidValidity(found["uidvalidity"]),
        Uid(found["uid"]),
        found.get("date"),
        found.get("size"),
    )


def restore_attempt(found: dict[str, Any]) -> Attempt:
    """Return an attempt as it is described in JSON. Raises TypeError, KeyError or AttributeError."""
    return Attempt(**{**found, "mailbox": as_bytes(found["mailbox"])})


def _restore_latin1(found: dict[str, Any]) -> PendingMove:
    """Return an entry of a journal that an earlier version has written."""
    source = found["source"].encode("latin-1")
    return PendingMove(
        MessageRef(source, UidValidity(found["uidvalidity"]), Uid(found["uid"])),
        found["target"].encode("latin-1"),
        found["uidnext"],
        found["size"],
        found["date"],
        found["message_id"],
    )
