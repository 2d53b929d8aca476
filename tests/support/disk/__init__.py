"""A disk that can lose its power: what a process does to a directory is recorded and can be half undone.

A small library (``recorder.c``, loaded by LD_PRELOAD) records each change of the files below one directory in
order: names made, renamed and removed, bytes written, sizes set, and every fsync. From that follows what can
be there after a power cut:

- of the bytes of a file, all that was written before its last fsync, and any of the writes since then;
- of the names in a directory, all changes before the last fsync of the directory, and a first part of those
  since then, since file systems keep them in order. An fsync of a file says nothing about its name. An fsync
  of whatever is in a directory makes that directory itself last, as all common file systems do.

Not covered: changes through a shared map (SQLite's ``-shm``, which is nobody's after a power cut, is left
out), writes that reach the disk in part, and programs that make system calls without libc.

The same library makes the disk full, and kills the process before the n-th change.
"""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, NamedTuple

_SOURCE: Final = Path(__file__).with_name("recorder.c")
_LEFT_OUT: Final = "-shm"
Choice = Callable[[], bool]
"""Whether one change that nothing has made last is there after the power cut."""


@cache
def _library() -> Path:
    made = Path(mkdtemp(prefix="imapfs-recorder-")) / "recorder.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", made, _SOURCE, "-lpthread"], check=True)
    return made


class Change(NamedTuple):
    """One record."""

    what: str
    """C: made, T: size set, W: written, R: renamed, U: removed, D: directory made, L: linked, S: fsync."""
    inode: int
    """0 for a directory."""
    offset: int
    path: str
    other: str
    data: bytes


@dataclass(eq=False)
class _File:
    """The bytes of one file: what has been made to last, and what was done since."""

    content: bytes = b""
    pending: list[Change] = field(default_factory=list)

    def sync(self) -> None:
        self.content = self.after(_always)
        self.pending.clear()

    def after(self, choice: Choice) -> bytes:
        content = bytearray(self.content)
        for change in self.pending:
            if not choice():
                continue
            end = change.offset + len(change.data)
            if len(content) < end:
                content.extend(bytes(end - len(content)))
            if change.what == "T":
                del content[change.offset :]
            else:
                content[change.offset : end] = change.data
        return bytes(content)


@dataclass(eq=False)
class _Naming:
    """One change of names."""

    change: Change
    file: _File | None
    directories: tuple[str, ...]
    lasts: bool = False


Image = dict[str, bytes | None]
"""Path -> bytes, None for a directory; of all that is below the root."""


class Disk:
    """A directory ``root`` that is made below ``directory``, and the record of what is done to it.

    What a process started with `environment` does is recorded; others must leave it alone while one runs.
    """

    def __init__(self, directory: Path) -> None:
        self.root = directory / "disk"
        self._log = directory / "disk.log"
        self._full = directory / "disk.full"
        self._counting = directory / "disk.counting"
        self.root.mkdir(parents=True)
        self._base: Image = {}
        self._inodes: dict[int, str] = {}
        self.forget()

    def environment(self, *, stop: int = 0, only: str = "", later: bool = False) -> dict[str, str]:
        """Return the variables that have a program recorded.

        It is killed before its change number ``stop``; only changes of paths with one of the words ``only``,
        which colons separate, count, and with ``later`` only those after `count`.
        """
        made = {
            "LD_PRELOAD": str(_library()),
            "RECORD_ROOT": str(self.root),
            "RECORD_LOG": str(self._log),
            "RECORD_FULL": str(self._full),
            # What is no cache may be kept elsewhere.
            "XDG_DATA_HOME": str(self.root / "data"),
        }
        if stop:
            made["RECORD_STOP"] = str(stop)
        if later:
            made["RECORD_FROM"] = str(self._counting)
        if only:
            made["RECORD_ONLY"] = only
        return made

    def count(self) -> None:
        """Count the changes from now on; see `environment`."""
        self._counting.touch()

    # -- full ----------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Have whatever needs space fail from now on."""
        self._full.touch()

    def free(self) -> None:
        """End what `fill` began."""
        self._full.unlink(missing_ok=True)

    # -- power ---------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Take what is there now for what lasts, and begin the record again. Nothing may run."""
        self._base = self.image()
        self._inodes = {
            (self.root / path).stat().st_ino: path
            for path, content in self._base.items()
            if content is not None
        }
        self._log.unlink(missing_ok=True)

    def image(self) -> Image:
        """Return what is there."""
        found: Image = {}
        for directory, names, files in os.walk(self.root):
            below = Path(directory).relative_to(self.root)
            found |= {str(below / name): None for name in names}
            for name in files:
                path = Path(directory, name)
                # Neither sockets nor what SQLite shares.
                if path.is_file() and not name.endswith(_LEFT_OUT):
                    found[str(below / name)] = path.read_bytes()
        return found

    def put(self, image: Image) -> None:
        """Replace what is there. Nothing may run."""
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path, content in sorted(image.items()):
            to = self.root / path
            if content is None:
                to.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                to.write_bytes(content)
                to.chmod(0o600)
        self.forget()

    def cut_power(self, chance: random.Random) -> str:
        """Replace what is there by what may be there after a power cut; return which of the kinds it is."""
        names, data = (chance.choice(list(CHOICES)) for _ in "nd")
        self.put(self.after_power_cut(_choice(names, chance), _choice(data, chance)))
        return f"names: {names}, bytes: {data}"

    def after_power_cut(self, names: Choice, data: Choice, count: int | None = None) -> Image:
        """Return what may be there if the power is cut after ``count`` changes, None for all.

        The choices are for the changes of names and of bytes that no fsync has made last.
        """
        files, naming = self._replay(list(self.changes())[:count])
        kept: list[_Naming] = []
        needed: set[str] = set()
        for one in reversed(naming):
            # What a directory has kept of its changes are the first ones.
            if one.lasts or needed & set(one.directories) or names():
                needed |= set(one.directories)
                kept.append(one)
        there: dict[str, _File | None] = dict(files)
        for one in reversed(kept):
            _name(there, one)
        return {
            path: None if file is None else file.after(data)
            for path, file in there.items()
            if not path.endswith(_LEFT_OUT)
        }

    def changes(self) -> Iterator[Change]:
        """Return the record so far."""
        if not self._log.exists():
            return
        record = self._log.read_bytes()
        at = 0
        while at < len(record):
            end = record.index(b"\n", at)
            what, *numbers = record[at:end].decode().split(" ")
            inode, offset, *sizes = map(int, numbers)
            parts = []
            at = end + 1
            for size in sizes:
                parts.append(record[at : at + size])
                at += size
            path, other = (self._below(part.decode()) for part in parts[:2])
            yield Change(what, inode, offset, path, other, parts[2])

    def _below(self, path: str) -> str:
        return os.path.normpath(os.path.relpath(path, self.root)) if path else ""

    def _replay(self, changes: list[Change]) -> tuple[dict[str, _File | None], list[_Naming]]:
        base = {path: None if content is None else _File(content) for path, content in self._base.items()}
        by_inode = {inode: file for inode, path in self._inodes.items() if (file := base[path]) is not None}
        naming: list[_Naming] = []
        for change in changes:
            match change.what:
                case "W" | "T":
                    if change.inode in by_inode:
                        by_inode[change.inode].pending.append(change)
                case "S":
                    if change.inode in by_inode:
                        by_inode[change.inode].sync()
                    self._make_last(naming, change)
                case what:
                    file = None
                    if what == "C":
                        file = by_inode[change.inode] = _File()
                    paths = [path for path in (change.path, change.other) if path]
                    naming.append(_Naming(change, file, tuple({os.path.dirname(p) for p in paths})))
        return base, naming

    @staticmethod
    def _make_last(naming: list[_Naming], change: Change) -> None:
        above = {change.path} if change.inode == 0 else set()
        leading = {str(parent) for parent in Path(change.path).parents} | above
        for one in naming:
            target = one.change.other or one.change.path
            if above & set(one.directories) or (one.change.what in "DR" and target in leading):
                one.lasts = True


def _name(there: dict[str, _File | None], one: _Naming) -> None:
    """Do one change of names."""
    old, new = one.change.path, one.change.other
    match one.change.what:
        case "C":
            there[old] = one.file
        case "D":
            there[old] = None
        case "U":
            there.pop(old, None)
        case "L":
            if old in there:
                there[new] = there[old]
        case "R":
            if old in there:
                there[new] = there.pop(old)
                for path in [path for path in there if path.startswith(old + "/")]:
                    there[new + path[len(old) :]] = there.pop(path)


def _always() -> bool:
    return True


def _never() -> bool:
    return False


CHOICES: Final = ("none", "all", "some")
"""How much of what no fsync has made last is there after a power cut."""


def _choice(which: str, chance: random.Random) -> Choice:
    return {"none": _never, "all": _always, "some": lambda: chance.random() < 0.5}[which]
