"""Drafts: files that are not on the server, whether they will be uploaded or always stay local.

The spool is the durable half of "at every instant every message exists on the server or in the spool". Each
draft is two plain files, so that a text editor is enough to rescue mail: ``INO`` has the bytes, ``INO.json``
the description. The spool is no part of the database, because the database can be rebuilt and drafts cannot.

INVARIANT: a draft leaves the disk only when its bytes are known to be on the server, or when the user
has deleted it. The description is replaced atomically; `Draft.secure` makes both files survive a power cut,
and from then on each new description is durable before it replaces another.
"""

import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

import trio

from imapfs.atomic import create_file, replace_file, sync_path
from imapfs.errors import CacheError
from imapfs.log import report, shown_path
from imapfs.model import ROOT, Ino, MessageRef, Uid, UidValidity
from imapfs.names import (
    MAX_NAME,
    as_bytes,
    as_text,
    is_file_name,
    renamed,
    shortened,
)
from imapfs.store.journal import Attempt, Journal, restore_attempt

log = logging.getLogger(__name__)

DraftState = Literal["local", "open", "sending", "unsent"]
"""``local``: never uploaded. ``open``: being written. ``sending``: complete, to be uploaded. ``unsent``:
refused by the server, or perhaps incomplete, so that a person has to decide."""

MAX_TIME: Final = (1 << 63) - 1
"""Nanoseconds since the epoch, in the year 2262: the latest time that the cache can store."""
_RESCUED: Final = (
    "its description was damaged, so its name and mailbox are lost: look at it, then rename or delete it"
)
T = TypeVar("T")


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
    """Names of the directories from the root to it, by which it is placed again in a rebuilt database."""
    mode: int = 0o600
    mtime: int = 0
    """Nanoseconds since the epoch."""
    timed: bool = False
    """Whether the user has set mtime, which then becomes the INTERNALDATE."""
    ctime: int = 0
    """Nanoseconds since the epoch."""
    flags: str = ""
    state: DraftState = "open"
    error: str = ""
    """Why it is unsent, or why the last attempt to upload it failed."""
    base: Base | None = None
    attempt: Attempt | None = None
    """The upload whose outcome is not known; on disk it is in the journal."""
    home: tuple[bytes, ...] | None = None
    """Path of the mailbox that it is to be uploaded to, if that was deleted by another client."""
    dirty: bool = False
    """Whether it was written to since it was last complete."""
    closed: bool = False
    """Whether every program that had it open for writing has called close() since the last write. The
    description then says ``sending``, although the kernel has not said yet that these were the last."""
    described: bytes = b""
    """Its description on disk."""
    secured: bool = False
    """Whether the description is durable, so that it is replaced by a durable one only."""
    known_size: int = 0
    """The last known `size`; not on disk."""
    writes: int = 0
    """Number of changes of its bytes; not on disk."""
    flagged: bool = False
    """Whether a program has said which flags it has."""
    rescued: bool = False
    """Whether its description was damaged; not on disk."""

    @property
    def file(self) -> Path:
        return self.spool.directory / str(self.ino)

    @property
    def size(self) -> int:
        """Bytes."""
        # If its file is missing, the draft is still shown: hiding it would look like a deletion to programs.
        with contextlib.suppress(OSError):
            self.known_size = self.file.stat().st_size
        return self.known_size

    @property
    def is_written(self) -> bool:
        """Whether a program has it open for writing, so that nobody else may change its bytes."""
        return self.spool.is_written(self.ino)

    @property
    def is_temporary(self) -> bool:
        """Whether it is a local file that only a program knows: ``.new.eml.Xy12ab``, ``.new.eml.swp``."""
        return self.state == "local" and self.name.startswith(b".")

    @property
    def shown(self) -> str:
        """Return its path from the account's root, for people."""
        return shown_path((*self.path, self.name))

    def touch(self) -> None:
        """Note that its bytes have just changed."""
        self.writes += 1
        self.ctime = time.time_ns()
        if not self.timed:
            self.mtime = self.ctime

    def change_flags(self, change: Callable[[list[str]], tuple[set[str], set[str]]]) -> None:
        """Add and remove the flags that ``change`` derives from the present ones. Raises CacheError."""
        flags = self.flags.split()
        add, remove = change(flags)
        gone = {flag.lower() for flag in remove}
        self.flags = " ".join([flag for flag in flags if flag.lower() not in gone] + sorted(add))
        self.flagged = True
        self.save()

    def save(self) -> None:
        """Write the description to disk. Raises CacheError."""
        self.spool.save(self)

    async def secure(self) -> None:
        """Return when bytes and description survive a power cut. Raises CacheError."""
        self.save()
        await trio.to_thread.run_sync(self.spool.sync, self.ino)
        self.secured = True


class Spool:
    """All drafts of one account. There are few of them, so that they are kept in memory.

    Each has a name that a directory can show. A draft without one would be in no listing, or would break it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._drafts: dict[Ino, Draft] = {}
        self._names: dict[tuple[Ino, bytes], Ino] = {}
        self._writers: Counter[Ino] = Counter()
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            for left in directory.glob("*.tmp"):
                left.unlink()
            found = sorted({Ino(int(path.stem)) for path in directory.iterdir() if path.stem.isdigit()})
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot use the spool {directory}") from None
        self._removals: dict[Ino, MessageRef] = {}
        """Removals from the server that an earlier version has noted here."""
        for ino in found:
            draft = self._load(ino)
            if draft is not None:
                # A kill while one draft was replacing another leaves both.
                draft.name = self.free_name(draft.parent, draft.name)
                self._add(draft)

    @property
    def kept(self) -> Path:
        """The directory of what was uploaded and cannot be found on the server; outside of the spool."""
        return self.directory.with_name("kept")

    def hand_over_removals(self, journal: Journal) -> None:
        """Pass on what an earlier version has noted in the spool: removals belong to the journal now."""
        try:
            for ref in self._removals.values():
                journal.add_removal(ref)
            journal.sync()
        except CacheError as error:
            report(error, "messages that were replaced are removed at the next mount")
            return
        for ino in self._removals:
            self._unlink(ino)
        self._removals.clear()

    # -- queries -------------------------------------------------------------------------------------------

    def get(self, ino: Ino) -> Draft | None:
        """Return the draft with that inode number."""
        return self._drafts.get(ino)

    def child(self, parent: Ino, name: bytes) -> Draft | None:
        """Return the draft with that name in a directory."""
        ino = self._names.get((parent, name))
        return None if ino is None else self._drafts[ino]

    def within(self, parent: Ino) -> list[Draft]:
        """Return the drafts in a directory, ordered by inode number."""
        return sorted((d for d in self._drafts.values() if d.parent == parent), key=lambda d: d.ino)

    def __len__(self) -> int:
        return len(self._drafts)

    def __iter__(self) -> Iterator[Draft]:
        return iter(list(self._drafts.values()))

    def is_written(self, ino: Ino) -> bool:
        """Return whether a program has a file open for writing, be it a draft already or not yet."""
        return self._writers[ino] > 0

    # -- changes -------------------------------------------------------------------------------------------

    def add_writer(self, ino: Ino) -> None:
        """Note that a program has opened a file for writing."""
        self._writers[ino] += 1

    def remove_writer(self, ino: Ino) -> None:
        """Note that a program has closed a file that it had open for writing."""
        self._writers[ino] -= 1
        if not self._writers[ino]:
            del self._writers[ino]

    def create(
        self,
        ino: Ino,
        parent: Ino,
        name: bytes,
        path: tuple[bytes, ...],
        mode: int,
        base: Base | None = None,
        state: DraftState = "open",
    ) -> Draft:
        """Create an empty draft. Raises CacheError."""
        assert is_file_name(name), name
        draft = Draft(self, ino, parent, name, path, mode, base=base, state=state)
        draft.touch()
        try:
            os.close(os.open(draft.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to the spool {self.directory}") from None
        try:
            self.save(draft)
        except CacheError:
            self._unlink(ino)
            raise
        self._add(draft)
        return draft

    def free_name(self, parent: Ino, name: bytes) -> bytes:
        """Return ``name``, or a variant of it if another draft has that name."""
        stem, dot, suffix = name.rpartition(b".")
        n = 1
        while (parent, name) in self._names:
            n += 1
            end = (b"~%d%s%s" % (n, dot, suffix))[:MAX_NAME]
            name = stem[: MAX_NAME - len(end)] + end
        return name

    def set_aside(self, draft: Draft) -> None:
        """Free the name of a draft that is being replaced, until `put_back` or `forget`."""
        if self._names.get((draft.parent, draft.name)) == draft.ino:
            del self._names[draft.parent, draft.name]

    def put_back(self, draft: Draft) -> None:
        """Undo `set_aside`; if another draft has the name by now, use a variant. Raises CacheError."""
        name = self.free_name(draft.parent, draft.name)
        if name != draft.name:
            draft.name = name
            draft.save()
        self._names[draft.parent, name] = draft.ino

    def _add(self, draft: Draft) -> None:
        self._drafts[draft.ino] = draft
        self._names[draft.parent, draft.name] = draft.ino

    def rename(self, draft: Draft, parent: Ino, name: bytes, path: tuple[bytes, ...]) -> None:
        """Give a draft another place, where no other draft may be. Raises CacheError."""
        before = draft.parent, draft.name, draft.path
        self.place(draft, parent, name, path)
        draft.ctime = time.time_ns()
        home, error, rescued = draft.home, draft.error, draft.rescued
        draft.home = None
        if rescued:
            # A person has decided what it is.
            draft.rescued, draft.error = False, ""
        try:
            draft.save()
        except CacheError:
            draft.home, draft.rescued, draft.error = home, rescued, error
            self.place(draft, *before)
            raise

    def place(self, draft: Draft, parent: Ino, name: bytes, path: tuple[bytes, ...]) -> None:
        """Show a draft at another place, where no other draft may be. This is not saved."""
        assert is_file_name(name), name
        if self._names.get((draft.parent, draft.name)) == draft.ino:
            del self._names[draft.parent, draft.name]
        draft.parent, draft.name, draft.path = parent, name, path
        self._names[parent, name] = draft.ino

    def rename_mailbox(self, old: bytes, new: bytes, delimiter: bytes) -> None:
        """Follow the rename of a mailbox, and of those below it: drafts refer to mailboxes by name.

        Raises nothing: it has happened on the server, whatever the disk takes.
        """
        self.correct_mailboxes(lambda _, ref: renamed(ref.mailbox, old, new, delimiter))

    def correct_mailboxes(self, name_of: Callable[[Draft, MessageRef | Attempt], bytes | None]) -> None:
        """Give what drafts refer to another name of its mailbox, unless ``name_of`` returns None.

        Raises nothing.
        """
        for draft in self:
            base, attempt = draft.base, draft.attempt
            if base is not None and (name := name_of(draft, base.ref)) is not None:
                draft.base = replace(base, ref=replace(base.ref, mailbox=name))
            if attempt is not None and (name := name_of(draft, attempt)) is not None:
                draft.attempt = replace(attempt, mailbox=name)
            if (draft.base, draft.attempt) != (base, attempt):
                self.try_save(draft)

    def move(self, draft: Draft, parent: Ino, name: bytes, path: tuple[bytes, ...]) -> None:
        """Show a draft where its mailbox is now. Raises nothing, as `rename_mailbox`."""
        self.place(draft, parent, name, path)
        self.try_save(draft)

    def try_save(self, draft: Draft) -> None:
        """Save a description whose former state on disk loses nothing: the next mount begins from that."""
        try:
            self.save(draft)
        except CacheError as error:
            report(error, f"where {draft.shown} belongs now is not saved")

    def keep_aside(self, draft: Draft) -> Path:
        """In a thread: keep the bytes of a draft in `kept` as well, and return where. Raises CacheError."""
        try:
            self.kept.mkdir(mode=0o700, exist_ok=True)
            path = self.kept / os.fsdecode(shortened(b"%d-%s" % (draft.ino, draft.name)))
            path.unlink(missing_ok=True)
            path.hardlink_to(draft.file)
            for one in (path, self.kept, self.kept.parent):
                sync_path(one)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to {self.kept}") from None
        return path

    def forget(self, draft: Draft) -> None:
        """Remove a draft, with its bytes if they are still here. Raises nothing."""
        self._drafts.pop(draft.ino, None)
        if self._names.get((draft.parent, draft.name)) == draft.ino:
            del self._names[draft.parent, draft.name]
        self._unlink(draft.ino)

    # -- files ---------------------------------------------------------------------------------------------

    def _unlink(self, ino: Ino) -> None:
        # The description last: bytes without one would come back as a rescued file.
        for path in (self.directory / str(ino), self._description(ino)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _description(self, ino: Ino) -> Path:
        return self.directory / f"{ino}.json"

    def save(self, draft: Draft) -> None:
        """Replace the description of ``draft`` on disk as a whole. Raises CacheError."""
        described = json.dumps(_describe(draft)).encode()
        if described == draft.described:
            return  # it may be durable already, which a new one would not be
        try:
            if draft.described or draft.secured:
                replace_file(self._description(draft.ino), described, durable=draft.secured)
            else:
                # A new draft has no bytes yet: nothing is lost with a description that is cut off.
                create_file(self._description(draft.ino), described)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to the spool {self.directory}") from None
        draft.described = described

    def sync(self, ino: Ino) -> None:
        """In a thread: see `Draft.secure`."""
        try:
            for path in (self.directory / str(ino), self._description(ino), self.directory):
                sync_path(path)
        except FileNotFoundError as error:
            if not self.directory.exists():
                raise CacheError.from_os_error(error, f"cannot write to the spool {self.directory}") from None
            return  # the draft was deleted meanwhile: there is nothing to secure
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to the spool {self.directory}") from None

    def sync_removals(self) -> None:
        """In a thread: return when no draft that was forgotten comes back after a power cut.

        Raises CacheError.
        """
        try:
            sync_path(self.directory)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write to the spool {self.directory}") from None

    def _load(self, ino: Ino) -> Draft | None:
        """Return the draft of an earlier process, or None if what is left of it is no draft."""
        path = self.directory / str(ino)
        try:
            found = json.loads(self._description(ino).read_text())
            if found["state"] == "sent" and found["base"]:
                self._removals[ino] = _restore_base(found["base"]).ref
                return None
            draft = _restore(self, ino, found)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if not path.exists() or not path.stat().st_size:
                # The process ended before the description was written.
                path.unlink(missing_ok=True)
                return None
            log.warning("the spool file %s has lost its description (%s): see rescued-%d", path, error, ino)
            # The damaged description stays as it is until a person has decided what the file is.
            draft = Draft(self, ino, ROOT, b"rescued-%d" % ino, state="unsent", error=_RESCUED, rescued=True)
            draft.touch()
        if draft.state == "open" and draft.base is None and draft.size:
            # The first write to a new file does not write its description.
            draft.dirty = True
        draft.secured = True
        never_written = draft.state == "open" and not draft.dirty and draft.base is not None
        if never_written or not path.exists():
            # The message is unchanged, or the process ended while the draft was being removed.
            self.forget(draft)
            return None
        if draft.state == "open" and draft.dirty:
            # Half a message must never reach the server.
            draft.state = "unsent"
            draft.error = "imapfs ended before this file was closed: look at it, then run 'imapfs retry'"
        return draft


def _describe(draft: Draft) -> dict[str, Any]:
    base = draft.base
    closed = draft.closed and draft.state == "open"
    return {
        "path": [as_text(name) for name in draft.path],
        "name": as_text(draft.name),
        "parent": draft.parent,
        "mode": draft.mode,
        "mtime": draft.mtime,
        "timed": draft.timed,
        "ctime": draft.ctime,
        "flags": draft.flags,
        "flagged": draft.flagged,
        "state": "sending" if closed else draft.state,
        "error": draft.error,
        "dirty": draft.dirty and not closed,
        "home": draft.home and [as_text(name) for name in draft.home],
        "base": base
        and {
            "mailbox": as_text(base.ref.mailbox),
            "uidvalidity": base.ref.uidvalidity,
            "uid": base.ref.uid,
            "size": base.ref.size,
            "date": base.date,
            "zone": base.zone,
        },
        "attempt": None,  # earlier versions had it here, and expect the key
    }


def _is(kind: type[T], value: object) -> T:
    """Return a value of a description. Raises TypeError if it is of another kind."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _number(value: object, low: int = 0, high: int = (1 << 63) - 1) -> int:
    number = _is(int, value)
    if not low <= number <= high:
        raise ValueError(f"{number} is out of range")
    return number


def _time(value: object) -> int:
    # Files may have times that an int64 of nanoseconds does not hold.
    return _number(value, -(1 << 90), 1 << 90)


def _name(value: object, *, longer: bool = False) -> bytes:
    name = as_bytes(_is(str, value))
    if longer:
        name = shortened(name)  # earlier versions took up to 1,004 bytes
    if not is_file_name(name):
        raise ValueError(f"{name!r} is not the name of a file")
    return name


def _home(value: object) -> tuple[bytes, ...] | None:
    return None if value is None else tuple(_name(name) for name in _is(list, value))


def _state(value: object) -> DraftState:
    for state in get_args(DraftState):
        if value == state:
            return state  # type: ignore[no-any-return]
    raise ValueError(f"{value!r} is not a state")


def _restore_base(found: dict[str, Any]) -> Base:
    size = found.get("size")  # earlier versions did not note it
    ref = MessageRef(
        as_bytes(_is(str, found["mailbox"])),
        UidValidity(_number(found["uidvalidity"])),
        Uid(_number(found["uid"])),
        _time(found["date"]),
        None if size is None else _number(size),
    )
    return Base(ref, _time(found["date"]), _number(found["zone"], -1440, 1440))


def _restore(spool: Spool, ino: Ino, found: dict[str, Any]) -> Draft:
    """Return the draft with a description. Raises ValueError, TypeError or KeyError for a damaged one."""
    base, attempt = found["base"], found.get("attempt")
    return Draft(
        spool,
        ino,
        Ino(_number(found["parent"])),
        _name(found["name"], longer=True),
        tuple(_name(name) for name in _is(list, found["path"])),
        _number(found["mode"], high=0o7777),
        _time(found["mtime"]),
        _is(bool, found["timed"]),
        _time(found["ctime"]),
        _is(str, found["flags"]),
        _state(found["state"]),
        _is(str, found["error"]),
        _restore_base(base) if base else None,
        restore_attempt(attempt) if attempt else None,
        _home(found.get("home")),
        _is(bool, found["dirty"]),
        flagged=_is(bool, found.get("flagged", False)),  # earlier versions did not note it
    )
