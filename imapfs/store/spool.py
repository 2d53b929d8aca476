"""Files that are not on the server: what programs write, until it is a message, or for good.

The durable half of "at every instant every message exists on the server or in the spool". Each draft is two
plain files, so that nothing but a text editor is needed to rescue mail from it: ``INO`` with the bytes and
``INO.json`` with the rest. It is apart from the database on purpose: that one is made to be thrown away.

INVARIANT: a draft leaves the disk only when its bytes are known to be on the server, or when the user
deleted it. The description is replaced atomically; `Draft.secure` makes both files survive a power cut.
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import trio

from imapfs.atomic import replace_file
from imapfs.errors import CacheError
from imapfs.model import ROOT, Ino, MessageRef, Uid, UidValidity
from imapfs.names import as_bytes, as_text, renamed

log = logging.getLogger(__name__)

State = Literal["local", "open", "sending", "unsent", "sent"]
"""``local``: not meant for the server; ``open``: being written; ``sending``: complete, to be sent;
``unsent``: refused, or of doubtful completeness, so that a person has to decide; ``sent``: a message now, of
which the old version has still to be removed from the server."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Where an upload was tried whose outcome is not known: it is looked for from ``uidnext`` on."""

    mailbox: bytes
    """As the server spells it."""
    uidvalidity: UidValidity
    uidnext: int
    size: int
    """Bytes that were sent."""
    digest: str
    """SHA-256 of what was sent but for line ends at the very end, which servers add and drop."""


@dataclass(frozen=True, slots=True)
class Base:
    """The message that a draft is a new version of."""

    ref: MessageRef
    date: int
    """INTERNALDATE, seconds since the epoch."""
    zone: int
    """Minutes east of UTC."""


@dataclass(slots=True)
class Draft:
    """A file in the spool."""

    spool: "Spool"
    ino: Ino
    parent: Ino
    name: bytes
    path: tuple[bytes, ...] = ()
    """Names of the directories that lead to it: how it is found again if the database was rebuilt."""
    mode: int = 0o600
    mtime: int = 0
    """Nanoseconds since the epoch."""
    timed: bool = False
    """Whether the user set mtime, so that it is to be the INTERNALDATE."""
    ctime: int = 0
    flags: str = ""
    state: State = "open"
    error: str = ""
    """Why it is unsent, or the last reason why it could not be sent."""
    base: Base | None = None
    attempt: Attempt | None = None
    dirty: bool = False
    """Whether it was written to since it was last complete."""
    known_size: int = 0
    """What `size` was when it was last looked at; not on disk."""
    writes: int = 0
    """Counts the changes of its bytes; not on disk."""

    @property
    def file(self) -> Path:
        return self.spool.directory / str(self.ino)

    @property
    def size(self) -> int:
        """Bytes."""
        # Without its file it stays in sight: to leave it out would make others believe that it was removed.
        with contextlib.suppress(OSError):
            self.known_size = self.file.stat().st_size
        return self.known_size

    @property
    def shown(self) -> str:
        """Its path below the mountpoint, for people."""
        return b"/".join((*self.path, self.name)).decode("utf-8", "replace")

    def touch(self) -> None:
        """Its bytes were changed now."""
        self.writes += 1
        self.ctime = time.time_ns()
        if not self.timed:
            self.mtime = self.ctime

    def change_flags(self, change: Callable[[list[str]], tuple[set[str], set[str]]]) -> None:
        """Add and remove the flags that ``change`` derives from those that it has."""
        flags = self.flags.split()
        add, remove = change(flags)
        gone = {flag.lower() for flag in remove}
        self.flags = " ".join([flag for flag in flags if flag.lower() not in gone] + sorted(add))
        self.save()

    def save(self) -> None:
        """Write the description down."""
        self.spool.save(self)

    async def secure(self) -> None:
        """Return when bytes and description survive a power cut."""
        await trio.to_thread.run_sync(self.spool.sync, self.ino)


class Spool:
    """All drafts of one account, by inode and by name. Drafts are few: they are kept in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._drafts: dict[Ino, Draft] = {}
        self._names: dict[tuple[Ino, bytes], Ino] = {}
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            for left in directory.glob("*.tmp"):
                left.unlink()
            found = sorted({Ino(int(path.stem)) for path in directory.iterdir() if path.stem.isdigit()})
            self.rebooted = _has_rebooted(directory / "boot")
            """Whether descriptions may be older than they should be, as they are not secured each time."""
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot use the spool {directory}") from None
        self.sent: list[Draft] = []
        """Drafts that are messages now, of which the old version has still to be removed."""
        for ino in found:
            draft = self._load(ino)
            if draft is None:
                continue
            if draft.state == "sent":
                self.sent.append(draft)
            else:
                # A kill while one was to replace another leaves both.
                draft.name = self.free_name(draft.parent, draft.name)
                self._add(draft)

    # -- looking -------------------------------------------------------------------------------------------

    def get(self, ino: Ino) -> Draft | None:
        return self._drafts.get(ino)

    def child(self, parent: Ino, name: bytes) -> Draft | None:
        ino = self._names.get((parent, name))
        return None if ino is None else self._drafts[ino]

    def within(self, parent: Ino) -> list[Draft]:
        """The drafts in a directory, by inode number."""
        return sorted((d for d in self._drafts.values() if d.parent == parent), key=lambda d: d.ino)

    def __iter__(self) -> Iterator[Draft]:
        return iter(list(self._drafts.values()))

    # -- changing ------------------------------------------------------------------------------------------

    def create(
        self,
        ino: Ino,
        parent: Ino,
        name: bytes,
        path: tuple[bytes, ...],
        mode: int,
        base: Base | None = None,
    ) -> Draft:
        """A new, empty draft."""
        draft = Draft(self, ino, parent, name, path, mode, base=base)
        draft.touch()
        try:
            os.close(os.open(draft.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to the spool {self.directory}") from None
        try:
            self.save(draft)
        except CacheError:
            draft.file.unlink(missing_ok=True)
            raise
        self._add(draft)
        return draft

    def free_name(self, parent: Ino, name: bytes) -> bytes:
        """``name``, or where another draft has it, one like it."""
        stem, dot, suffix = name.rpartition(b".")
        n = 1
        while (parent, name) in self._names:
            n += 1
            name = b"%s~%d%s%s" % (stem, n, dot, suffix)
        return name

    def set_aside(self, draft: Draft) -> None:
        """Free the name of a draft that is about to be replaced, until `put_back` or `forget`."""
        if self._names.get((draft.parent, draft.name)) == draft.ino:
            del self._names[draft.parent, draft.name]

    def put_back(self, draft: Draft) -> None:
        """Undo `set_aside`; if another has the name now, this one gets one like it."""
        name = self.free_name(draft.parent, draft.name)
        if name != draft.name:
            draft.name = name
            draft.save()
        self._names[draft.parent, name] = draft.ino

    def _add(self, draft: Draft) -> None:
        self._drafts[draft.ino] = draft
        self._names[draft.parent, draft.name] = draft.ino

    def owe(self, ino: Ino, old: Base, path: tuple[bytes, ...] = ()) -> None:
        """Note that a message was replaced and is to be removed from the server."""
        note = Draft(self, ino, ROOT, b"", path, state="sent", base=old)
        note.save()
        self.sent.append(note)

    def rename(self, draft: Draft, parent: Ino, name: bytes, path: tuple[bytes, ...]) -> None:
        """Give a draft another place; nothing else may be there."""
        if self._names.get((draft.parent, draft.name)) == draft.ino:
            del self._names[draft.parent, draft.name]
        draft.parent, draft.name, draft.path = parent, name, path
        draft.ctime = time.time_ns()
        self._names[parent, name] = draft.ino
        draft.save()

    def rename_mailbox(self, old: bytes, new: bytes, delimiter: bytes) -> None:
        """Follow the rename of a mailbox, and of those below it: drafts refer to mailboxes by name."""
        for draft in (*self, *self.sent):
            base, attempt = draft.base, draft.attempt
            if base is not None and (name := renamed(base.ref.mailbox, old, new, delimiter)) is not None:
                draft.base = replace(base, ref=replace(base.ref, mailbox=name))
            if attempt is not None and (name := renamed(attempt.mailbox, old, new, delimiter)) is not None:
                draft.attempt = replace(attempt, mailbox=name)
            if (draft.base, draft.attempt) != (base, attempt):
                draft.save()

    def detach(self, draft: Draft) -> None:
        """It is a message now; what is left on disk says only that its old version has to go."""
        self._drafts.pop(draft.ino, None)
        if self._names.get((draft.parent, draft.name)) == draft.ino:
            del self._names[draft.parent, draft.name]

    def forget(self, draft: Draft) -> None:
        """It is not a draft any more; its bytes, if they are still here, go with it."""
        self.detach(draft)
        # The description last: bytes without one would come back as a rescued file.
        for path in (draft.file, self._description(draft.ino)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    # -- the disk ------------------------------------------------------------------------------------------

    def _description(self, ino: Ino) -> Path:
        return self.directory / f"{ino}.json"

    def save(self, draft: Draft) -> None:
        """Write the description of ``draft`` down, all of it or nothing. Raises CacheError."""
        try:
            replace_file(self._description(draft.ino), json.dumps(_describe(draft)).encode(), durable=False)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to the spool {self.directory}") from None

    def sync(self, ino: Ino) -> None:
        """In a thread: see `Draft.secure`."""
        try:
            for path in (self.directory / str(ino), self._description(ino), self.directory):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except FileNotFoundError as error:
            if not self.directory.exists():
                raise CacheError.from_os_error(error, f"cannot write to the spool {self.directory}") from None
            return  # the draft was deleted meanwhile: nothing to secure
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to the spool {self.directory}") from None

    def _load(self, ino: Ino) -> Draft | None:
        """The draft of an earlier process; None if what is left of it means nothing any more."""
        path = self.directory / str(ino)
        try:
            draft = _restore(self, ino, json.loads(self._description(ino).read_text()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            if not path.exists() or not path.stat().st_size:
                # An end between the making of the two.
                path.unlink(missing_ok=True)
                return None
            log.warning("the spool file %s has lost its description (%s): see rescued-%d", path, error, ino)
            draft = Draft(self, ino, ROOT, b"rescued-%d" % ino, state="local")
            draft.touch()
        never_written = draft.state == "open" and not draft.dirty and draft.base is not None
        if never_written or (draft.state != "sent" and not path.exists()):
            # Begun and not written to, so that the message is unchanged; or forgotten but for this.
            self.forget(draft)
            return None
        if draft.state == "open" and draft.dirty:
            # Half a message must not reach the server.
            draft.state = "unsent"
            draft.error = "imapfs ended before this file was closed: look at it, then run 'imapfs retry'"
        return draft


def _has_rebooted(note: Path) -> bool:
    """Whether the machine was started anew since the last time that this was asked."""
    now = Path("/proc/sys/kernel/random/boot_id").read_text()
    if note.exists() and note.read_text() == now:
        return False
    note.write_text(now)
    return True


def _describe(draft: Draft) -> dict[str, Any]:
    base, attempt = draft.base, draft.attempt
    return {
        "path": [as_text(name) for name in draft.path],
        "name": as_text(draft.name),
        "parent": draft.parent,
        "mode": draft.mode,
        "mtime": draft.mtime,
        "timed": draft.timed,
        "ctime": draft.ctime,
        "flags": draft.flags,
        "state": draft.state,
        "error": draft.error,
        "dirty": draft.dirty,
        "base": base
        and {
            "mailbox": as_text(base.ref.mailbox),
            "uidvalidity": base.ref.uidvalidity,
            "uid": base.ref.uid,
            "date": base.date,
            "zone": base.zone,
        },
        "attempt": attempt and {**dataclasses.asdict(attempt), "mailbox": as_text(attempt.mailbox)},
    }


def _restore_base(found: dict[str, Any]) -> Base:
    ref = MessageRef(as_bytes(found["mailbox"]), UidValidity(found["uidvalidity"]), Uid(found["uid"]))
    return Base(ref, found["date"], found["zone"])


def _restore(spool: Spool, ino: Ino, found: dict[str, Any]) -> Draft:
    base, attempt = found["base"], found["attempt"]
    return Draft(
        spool,
        ino,
        Ino(found["parent"]),
        as_bytes(found["name"]),
        tuple(as_bytes(name) for name in found["path"]),
        found["mode"],
        found["mtime"],
        found["timed"],
        found["ctime"],
        found["flags"],
        found["state"],
        found["error"],
        _restore_base(base) if base else None,
        Attempt(**{**attempt, "mailbox": as_bytes(attempt["mailbox"])}) if attempt else None,
        found["dirty"],
    )
