"""A mount whose process, or whose machine, ends before any chosen change of its disk, and what must be left.

A fixed `Story` of what programs do is told to a mount that is killed before its n-th change (see
tests.support.disk). The server is then as it really was at that moment. What the disk may hold is put back in
several ways: all of it, as a kill leaves it, and with what no fsync has made last dropped, as a power cut
does. After each there must be a mount, and, once everything was sent, every message that a program was told
is safe, once, with its bytes, and no other.

Used by tests.mount.test_replay for a sample and by scripts/replay for every change.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from tests.support.disk import Choice, Disk
from tests.support.mailboxes import everything, settle, waiting
from tests.support.mounting import Mount, MountFailed, RobustMount, wait_until
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Proxy

Wreck = Literal["kill", "dropped", "names only", "bytes only"]
WRECKS: Final[dict[Wreck, tuple[bool, bool]]] = {
    "kill": (True, True),
    "dropped": (False, False),
    "names only": (True, False),
    "bytes only": (False, True),
}
"""What of the changes of names and of bytes that no fsync has made last is there."""
SPOOL: Final = "spool:journal:data"
"""Words of paths whose changes are those of the precious files, for `Disk.environment`."""
DATABASE: Final = "cache.db:bodies"
"""And those of the rest."""
_PATIENCE: Final = 10.0
"""Seconds until a mount must show what the server has."""
_SUBJECT: Final = re.compile(rb"^Subject: (\w+)\r?$", re.M)


class Wrong(AssertionError):
    """A message was lost, doubled or altered, or there was no mount."""


def message(name: str, lines: int = 3) -> bytes:
    """Return a message that is known by its subject."""
    head = f"From: a@example.org\r\nMessage-ID: <{name}@example.org>\r\nSubject: {name}\r\n\r\n"
    return head.encode() + b"".join(b"line %d\r\n" % n for n in range(lines))


@dataclass
class Story:
    """What programs do in a mount, and what has to be there of it, whenever it was cut off."""

    root: Path
    safe: dict[str, set[bytes]] = field(default_factory=dict)
    """Subject -> contents of which one must be there."""
    maybe: dict[str, set[bytes]] = field(default_factory=dict)
    """Subject -> further contents that may be there."""

    def tell(self) -> None:
        """Do it all. Raises OSError where it was cut off."""
        inbox, work = self.root / "INBOX", self.root / "Work"
        # cp
        self._write(inbox / "one.eml", "one", message("one"))
        # What rsync does.
        self._write(work / ".two.tmp", "two", message("two", 200))
        os.rename(work / ".two.tmp", work / "two.eml")
        # Several at a time, which are uploaded together.
        for name in ("three", "four", "five"):
            self._write(work / f"{name}.eml", name, message(name))
        with self._changing("three", message("three")):
            os.rename(work / "three.eml", inbox / "three moved.eml")
        settle_at(self.root)
        # Edits of a message and of what is on its way.
        new = message("old").replace(b"line 0", b"edited")
        (path,) = inbox.glob("*old*.eml")
        self._replace(path, "old", message("old"), new)
        self._write(inbox / "six.eml", "six", message("six"))
        self._replace(inbox / "six.eml", "six", message("six"), message("six", 5))
        settle_at(self.root)
        # A move and a removal on the server.
        (path,) = inbox.glob("*mover*.eml")
        with self._changing("mover", message("mover")):
            os.rename(path, work / "mover.eml")
        (path,) = work.glob("*victim*.eml")
        with self._changing("victim", message("victim")):
            os.unlink(path)
        # A local file, and what was never to be sent.
        self._write(inbox / "seven.bak", "seven", message("seven"))
        self._write(inbox / "eight.eml", "eight", message("eight"))
        settle_at(self.root)

    def _write(self, path: Path, name: str, content: bytes) -> None:
        self.maybe[name] = {content}
        with open(path, "wb", buffering=0) as file:
            file.write(content)
        # close() has returned.
        del self.maybe[name]
        self.safe[name] = {content}

    def _replace(self, path: Path, name: str, old: bytes, new: bytes) -> None:
        self.maybe[name] = {old, new}
        self.safe[name] = {old, new}
        with open(path, "r+b", buffering=0) as file:
            file.write(new)
        # The old version is in Trash, or was never sent.
        self.maybe[name] = {old}
        self.safe[name] = {new}

    @contextlib.contextmanager
    def _changing(self, name: str, content: bytes) -> Iterator[None]:
        self.safe[name] = {content}
        yield

    def judge(self, found: list[tuple[str, bytes]]) -> None:
        """Compare with all that is on the server and in the spool, as places and bytes. Raises Wrong."""
        by_name: dict[str, list[tuple[str, bytes]]] = {}
        for place, content in found:
            named = _SUBJECT.search(content)
            by_name.setdefault(named[1].decode() if named else "", []).append((place, content))
        for name, contents in self.safe.items():
            if not any(content in contents for _, content in by_name.get(name, [])):
                raise Wrong(f"{name} is lost; there is {by_name.get(name)}")
        for name, copies in by_name.items():
            allowed = self.safe.get(name, set()) | self.maybe.get(name, set())
            for place, content in copies:
                if content not in allowed and not _is_start(content, allowed):
                    raise Wrong(f"in {place} are bytes that nobody wrote: {content!r}")
            whole = [content for _, content in copies if content in allowed]
            if len(whole) != len(set(whole)):
                raise Wrong(f"{name} is doubled: {copies}")


def _is_start(content: bytes, allowed: set[bytes]) -> bool:
    """Whether it is the first part of something that was being written, or of an edit of it."""
    return any(whole.startswith(content) for whole in allowed)


def settle_at(root: Path) -> None:
    """Wait until all is sent that can be. Raises OSError."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Replay:
    """One telling of the story to an account, cut off before change number ``stop``; 0 for never.

    ``only`` says which changes count, as in `Disk.environment`.
    """

    def __init__(
        self,
        user: Account,
        proxy: Proxy,
        directory: Path,
        stop: int,
        only: str,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.disk = Disk(directory)
        self._user = user
        self._proxy = proxy
        self._directory = directory
        self._arguments = arguments
        self._mounts = 0
        user.deliver("INBOX", [(message(name), 1_700_000_000, "S") for name in ("old", "mover")])
        user.deliver("Work", [(message("victim"), 1_700_000_000, "S")])
        self.was_cut_off = True
        self.story = Story(Path())
        for name in ("old", "mover", "victim"):
            self.story.safe[name] = {message(name)}
        with contextlib.suppress(MountFailed):
            mount = self._mount(stop, only)
            mount.__enter__()
            self.story.root = mount.path
            try:
                self.story.tell()
                self.was_cut_off = False
            except (OSError, ValueError):
                # What looks for a file in a mount that has died finds none.
                pass
            finally:
                with contextlib.suppress(ProcessLookupError):
                    mount.kill()
                mount.__exit__(AssertionError, None, None)
        # Else it might still do what it was told last.
        user.server.stop()
        self._image = self.disk.image()
        self._states: dict[Wreck, dict[str, bytes | None]] = {}
        for wreck, (names, data) in WRECKS.items():
            state = self._image if wreck == "kill" else self.disk.after_power_cut(_all(names), _all(data))
            if state not in self._states.values():
                self._states[wreck] = state
        self._copy = directory / "server"
        user.back_up(self._copy)
        user.server.start_again()

    def _mount(self, stop: int = 0, only: str = "") -> Mount:
        self._mounts += 1
        return RobustMount(
            self._proxy.account(self._user),
            self._directory / str(self._mounts),
            *self._arguments,
            cache=self.disk.root / "cache",
            environment=self.disk.environment(stop=stop, only=only),
        )

    @property
    def wrecks(self) -> list[Wreck]:
        """Those that differ."""
        return list(self._states)

    def judge(self, wreck: Wreck) -> None:
        """Mount what a wreck has left, and compare. Raises Wrong."""
        self._user.restart_from(self._copy)
        self.disk.put(self._states[wreck])
        if wreck != "kill":
            for note in self.disk.root.rglob("boot"):
                note.write_text("0\n")
        try:
            with self._mount() as mount:
                self._drain(mount)
                self._judge(mount)
        except MountFailed as error:
            raise Wrong(f"no mount: {error}") from None

    def _judge(self, mount: Mount) -> None:
        held = [(place, one.content) for place, ones in everything(self._user).items() for one in ones]
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                shown = list(_shown(mount.path))
                unsent = [Path(path) for path, state in waiting(mount) if state == "unsent"]
                refused = [(path, (mount.path / path).read_bytes()) for path in unsent]
                if all(one in shown for one in held) or time.monotonic() > deadline:
                    break
            except FileNotFoundError:
                # A file becomes another as long as the mailboxes are listed again.
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)
        kept = [one for one in shown if one not in held]
        self.story.judge(held + kept)
        safe = {content for contents in self.story.safe.values() for content in contents}
        for path, content in refused:
            if content in safe - {one for contents in self.story.maybe.values() for one in contents}:
                raise Wrong(f"{path} was closed, and waits for a person")
        # A version that was cut off while it was written is shown in place of its message, until a person has
        # looked at it.
        cut = {_message_id(content) for _, content in refused}
        if missing := [one for one in held if one not in shown and _message_id(one[1]) not in cut]:
            raise Wrong(f"on the server, and not shown: {missing}; shown: {shown}")

    def _drain(self, mount: Mount) -> None:
        def done() -> bool:
            settle(mount)
            return all(state != "sending" for _, state in waiting(mount))

        wait_until(done, "everything is sent")

    def close(self) -> None:
        """Remove what it has made."""
        shutil.rmtree(self._directory, ignore_errors=True)


def _message_id(content: bytes) -> bytes:
    found = re.search(rb"^Message-ID: (.*?)\r?$", content, re.M)
    return found[1] if found else b""


def _all(there: bool) -> Choice:
    return lambda: there


def _shown(root: Path) -> Iterator[tuple[str, bytes]]:
    for directory, _, names in os.walk(root):
        for name in names:
            content = Path(directory, name).read_bytes()
            if content:
                yield os.path.relpath(directory, root), content
