"""The stateful test in a worse world: power cuts, full disks, restored servers, and what other clients do.

Each kind of adversity is one of `KINDS` and can be left out; the others then happen as before, so that a seed
can be bisected. What must hold is that of `tests.support.stateful`, and in addition: what a program was told
is safe (close or fsync returned) survives a power cut; local files are neither lost nor altered; what is
shown at rest are the bytes of the server's messages also before a remount; files that were closed before an
unmount go to the server by themselves.

After a power cut what was not on the server may be where it was before: a name that was given, or a removal,
is not promised to last. After a server was restored it has what it had; what only it had is lost with it.
"""

import contextlib
import functools
import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Mapping
from imaplib import IMAP4_SSL
from pathlib import Path
from typing import Final

from tests.support.disk import Disk
from tests.support.mailboxes import waiting
from tests.support.mounting import Mount, MountFailed, wait_until
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Proxy
from tests.support.stateful import (
    FIXED,
    LOCAL,
    NOWHERE,
    OPERATIONS,
    SPOOL,
    Violation,
    World,
    number_of,
    outcome,
    write_at_once,
)

KINDS: Final[dict[str, list[tuple[str, int]]]] = {
    "power": [("power_cut", 3)],
    "reboot": [("reboot", 2)],
    "restore": [("restore_server", 2)],
    "edits": [("other_edits", 5)],
    "alike": [("other_adds_one_alike", 5)],
    "renames": [("other_renames_mailbox", 2)],
    "fsync": [("create_with_fsync", 4)],
    "local": [("create_local", 4), ("remove_local", 2)],
    "full": [("with_full_disk", 3)],
    "full-mount": [("mount_with_full_disk", 1)],
    "umount": [("close_and_unmount", 2)],
    "shown": [],
}
"""What is in a worse world: the operations of each kind, and how often each is wanted."""
_ZERO_BOOT_ID: Final = "00000000-0000-0000-0000-000000000000\n"
_DATE: Final = 1_700_000_000
_PATIENCE: Final = 15.0
"""Seconds until a mount must show what another client did."""


def altered(content: bytes) -> bytes:
    """What some servers make of a message: a header line is added, and 8-bit bytes in the header become X."""
    head, blank, body = content.partition(b"\r\n\r\n")
    head = re.sub(rb"[\x80-\xff]", b"X", head)
    if not head.startswith(b"X-Added"):
        head = b"X-Added: by the server\r\n" + head
    return head + blank + body


class AdverseWorld(World):
    """A world with all `KINDS` but those of ``without``."""

    operations = (*OPERATIONS, *(one for kind in KINDS.values() for one in kind))

    def __init__(
        self, user: Account, proxy: Proxy, directory: Path, seed: int, without: frozenset[str] = frozenset()
    ) -> None:
        self._disk = Disk(directory)
        self._without = without
        self._left_out = {operation for kind in without for operation, _ in KINDS[kind]}
        self._locals: dict[tuple[str, str], bytes] = {}
        """Directory and name -> bytes of local files that are there."""
        self._uncertain: set[tuple[str, str]] = set()
        """Local files that may be there."""
        self._power_was_cut = False
        self._backup: tuple[Path, dict[int, str], set[str]] | None = None
        self._copies = directory / "backup"
        super().__init__(user, proxy, directory, seed)

    @property
    def _cache(self) -> Path:
        return self._disk.root / "cache"

    def _environment(self) -> Mapping[str, str]:
        return self._disk.environment()

    def _start(self) -> Mount:
        try:
            return super()._start()
        except MountFailed as error:
            raise Violation("\n".join([f"no mount: {error}", *self.history[-100:]])) from None

    def _header(self) -> bytes:
        return self.random.choice([b"", b"X-Pad: aou\r\n", b"X-Pad: \xe4\xf6\xfc\r\n"])

    def _altered(self, content: bytes) -> bytes | None:
        return altered(content) if self._proxy.alter is not None else None

    def do(self, operation: str) -> None:
        if self._power_was_cut:
            self._widen()
        if operation in self._left_out:
            # Drawn all the same.
            self._steps += 1
            return
        super().do(operation)

    def check(self) -> None:
        if self._power_was_cut:
            self._widen()
        super().check()
        self._check_locals()
        if "restore" not in self._without:
            self._back_up()

    def _compare_running(self) -> None:
        """What is shown at rest must become what the server has, without a remount."""
        held = self._held()
        deadline = time.monotonic() + _PATIENCE
        while True:
            # Between two looks at a directory a file may become another.
            with contextlib.suppress(OSError):
                shown = self._shown()
                if time.monotonic() > deadline:
                    self._compare(shown, held)
                if shown == {place: sorted(one.content for one in held[place]) for place in held}:
                    return
            time.sleep(0.1)

    def _restart(self) -> None:
        if "shown" not in self._without:
            self._compare_running()
        super()._restart()

    # -- power ---------------------------------------------------------------------------------------------

    def _after_kill(self) -> None:
        if "full-mount" in self._without:
            self._disk.free()
        if "power" not in self._without and self.random.random() < 0.5:
            self._cut_power()

    def _cut_power(self) -> None:
        self.history.append(f"  power cut, {self._disk.cut_power(self.random)}")
        self.figures.faults["power cut"] += 1
        self._boot()
        self._power_was_cut = True

    def _boot(self) -> None:
        for note in self._disk.root.rglob("boot"):
            note.write_text(_ZERO_BOOT_ID)
        self._disk.forget()

    def _widen(self) -> None:
        self._power_was_cut = False
        for version in self._versions.values():
            if not version.settled:
                version.places |= version.past
            if version.left:
                # The note that it is to be removed may be lost, and the new version stands beside it.
                version.places |= {version.left}
        self._uncertain |= {*self._gone}

    _gone: frozenset[tuple[str, str]] = frozenset()
    """Local files that were removed, or whose directory was renamed, since the last check."""

    def power_cut(self) -> None:
        """Cut the power at rest, or what looks like it."""
        self._heal()
        self.figures.operations["power_cut"] += 1
        self.history.append("power cut")
        self._mount.kill()
        self._proxy.cut_all()
        self._cut_power()
        self._mount = self._start()

    def reboot(self) -> None:
        """Unmount, boot, mount."""
        self._heal()
        self.figures.operations["reboot"] += 1
        self.history.append("reboot")
        self._stop()
        self._boot()
        self._mount = self._start()

    def close_and_unmount(self) -> None:
        """Write files, and unmount with no pause behind the last close: they are sent by themselves."""
        self._heal()
        self.figures.operations["close_and_unmount"] += 1
        made = []
        for _ in range(6):
            place = self._place()
            number, version = self._new(place)
            made.append((number, self.root / place / self._name(), version))
        self.history.append(f"create {[number for number, _, _ in made]} and fusermount3 -u")
        for _, path, version in made:
            if (error := outcome(functools.partial(write_at_once, path, version.content))) is not None:
                self.history.append(f"  {error}")
                version.places |= {NOWHERE}
        # Busy while the daemon announces something.
        wait_until(lambda: _has_unmounted(self.root), "unmounted")
        self._mount.wait_ended()
        self._restart_ended()
        unsent = [path for path, state in waiting(self._mount) if state == "unsent"]
        names = {path.name for _, path, version in made if NOWHERE not in version.places}
        if left := [path for path in unsent if os.path.basename(path) in names]:
            raise self._violation(f"closed before the unmount, and unsent: {left}")

    def _restart_ended(self) -> None:
        self._stop()
        self._mount = self._start()

    # -- programs ------------------------------------------------------------------------------------------

    def create_with_fsync(self) -> None:
        """A program that makes what it has written last, and writes on: at its own offset, or at the end."""
        place = self._place()
        number, version = self._new(place)
        path = self.root / place / self._name()
        how = self.random.choice(["plain", "append", "rename"])
        content = version.content
        if self.random.random() < 0.7:
            content = content.replace(b"\r\n", b"\n")
        half = self.random.randrange(1, len(content))
        first = path.with_name(f".tmp{number}") if how == "rename" else path

        def operation() -> None:
            flags = os.O_APPEND if how == "append" else 0
            descriptor = os.open(first, os.O_WRONLY | os.O_CREAT | flags, 0o600)
            try:
                os.write(descriptor, content[:half])
                if how == "rename":
                    os.rename(first, path)
                else:
                    os.fsync(descriptor)
                os.write(descriptor, content[half:])
            finally:
                os.close(descriptor)

        if self._run(f"fsync {number}, {how}, as {place}/{path.name}", operation) is not None:
            version.places |= {NOWHERE, SPOOL}

    def create_local(self) -> None:
        """A copy of a message beside it, as cp and editors make them: it is not for the server."""
        if (victim := self._victim()) is None:
            return
        path, place, version = victim
        name = f"{self._name()}{LOCAL}"
        content = version.read
        error = self._run(
            f"copy {number_of(version)} to {place}/{name}",
            lambda: write_at_once(path.with_name(name), content),
        )
        self._locals[place, name] = content
        if error is not None:
            self._uncertain |= {(place, name)}

    def remove_local(self) -> None:
        if not self._locals:
            return
        place, name = self.random.choice(sorted(self._locals))
        error = self._run(f"remove {place}/{name}", lambda: os.unlink(self.root / place / name))
        if error is None:
            self._gone |= {(place, name)}
            del self._locals[place, name]
        else:
            self._uncertain |= {(place, name)}

    def with_full_disk(self) -> None:
        """Run another operation while nothing can be written."""
        operation = self.random.choice(["create", "save", "edit", "move", "remove", "flag", "look"])
        self.history.append("  the disk is full")
        self.figures.faults["disk full"] += 1
        self._disk.fill()
        try:
            getattr(self, operation)()
        finally:
            self._disk.free()

    def mount_with_full_disk(self) -> None:
        """There is a mount all the same."""
        self._heal()
        self.figures.operations["mount_with_full_disk"] += 1
        self.history.append("mount with a full disk")
        self._disk.fill()
        try:
            self._stop()
            if "reboot" not in self._without:
                self._boot()
            self._mount = self._start()
        finally:
            self._disk.free()

    def _check_locals(self) -> None:
        for (place, name), content in list(self._locals.items()):
            path = self.root / place / name
            if not path.exists() and (self.root / name).exists():
                # Another client has renamed the mailbox, and nothing proves it: it was moved to the top.
                path = self.root / name
                self._uncertain.add((place, name))
            there = path.read_bytes() if path.exists() else None
            if (place, name) in self._uncertain and (there is None or content.startswith(there)):
                if there is not None:
                    path.unlink()
                del self._locals[place, name]
            elif there != content:
                raise self._violation(f"the local file {place}/{name} is lost or altered: {there!r}")
        for place, name in self._uncertain | self._gone:
            if (place, name) not in self._locals:
                (self.root / place / name).unlink(missing_ok=True)
        self._uncertain, self._gone = set(), frozenset()

    def remove_directory(self) -> None:
        before = self._mailboxes
        super().remove_directory()
        for place, name in list(self._locals):
            if place in before - self._mailboxes:
                raise self._violation(f"{place} was removed with the local file {name} in it")

    def rename_directory(self) -> None:
        before = self._mailboxes
        super().rename_directory()
        self._follow(before)

    def _follow(self, before: set[str]) -> None:
        """Local files go with their directory."""
        if not (gone := before - self._mailboxes):
            return
        (old,), (new,) = gone, self._mailboxes - before
        for place, name in [key for key in self._locals if key[0] == old]:
            self._locals[new, name] = self._locals.pop((place, name))

        def followed(keys: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
            return {(new if place == old else place, name) for place, name in keys}

        self._uncertain, self._gone = followed(self._uncertain), frozenset(followed(self._gone))

    # -- other clients -------------------------------------------------------------------------------------

    def other_edits(self) -> None:
        """Replace a message by a version of it, of equal length or longer, perhaps in another mailbox."""
        place, target = self._place(), self._place()
        with self._user.client() as client:
            client.select(f'"{place}"')
            uids = client.uid("SEARCH", "UNDELETED")[1][0].split()
            if not uids:
                return
            uid = self.random.choice(uids).decode()
            parts = client.uid("FETCH", uid, "(INTERNALDATE BODY.PEEK[])")[1]
            found = [part for part in parts if isinstance(part, tuple)]
            if not found:
                return
            head, content = found[0]
            old = self._known(content)
            if old is None or not old.settled or old.places != {place}:
                return
            longer = self.random.random() < 0.5
            number, version = (
                self._new(target, based_on=content) if longer else self._new(target, like=content)
            )
            version.altered, version.settled, version.flags = None, True, None
            self.figures.operations["other"] += 1
            how = "a longer" if longer else "an equally long"
            self.history.append(
                f"other client replaces {number_of(old)} in {place} by {how} {number} in {target}"
            )
            date = re.search(rb'INTERNALDATE "([^"]+)"', head)
            assert date is not None
            client.literal = version.content  # type: ignore[assignment]  # typeshed: str
            status, data = client.xatom("APPEND", f'"{target}"', f'"{date[1].decode()}"')
            assert status == "OK", data
            client.uid("STORE", uid, "+FLAGS", "(\\Deleted)")
            client.uid("EXPUNGE", uid)
            old.places = {NOWHERE}

    def other_adds_one_alike(self) -> None:
        """Append a message with the size, the Message-ID and most of the bytes of another, sent or not."""
        numbers = sorted(self._versions)[-20:]
        if not numbers:
            return
        like = self._versions[self.random.choice(numbers)]
        place = next(iter(sorted({*like.places} & self._mailboxes)), "INBOX")
        number, version = self._new(place, like=like.content)
        version.altered, version.settled, version.flags = None, True, None
        self.figures.operations["other"] += 1
        self.history.append(f"other client appends {number}, which is like {number_of(like)}, to {place}")
        self._user.append(place, version.content, _DATE)

    def other_renames_mailbox(self) -> None:
        name = self.random.choice(self._directories())
        if name in FIXED:
            return
        self._names += 1
        new = f"box{self._names}"
        self.figures.operations["other"] += 1
        self.history.append(f"other client renames {name} to {new}")
        before = self._mailboxes
        with self._user.client() as client:
            status, data = client.rename(name, new)
            assert status == "OK", data
        self._learn_mailboxes()
        for version in self._versions.values():
            version.places = {new if place == name else place for place in version.places}
            version.past = {new if place == name else place for place in version.past}
            if version.left == name:
                version.places |= {new}
        self._follow(before)

    # -- the server ----------------------------------------------------------------------------------------

    def _back_up(self) -> None:
        self._user.back_up(self._copies)
        places = {number: next(iter(v.places)) for number, v in self._versions.items() if v.settled}
        self._backup = self._copies, places, {*self._mailboxes}

    def restore_server(self) -> None:
        """Put the server's mail back to what it was at the last check: UIDNEXT goes back."""
        if self._backup is None or self._backup[2] != self._mailboxes:
            return
        self._heal()
        self.figures.operations["restore"] += 1
        self.history.append("the server is restored")
        copy, places, _ = self._backup
        self._user.server.stop()
        waits = {number_of(v) for content in self._spooled() if (v := self._known(content)) is not None}
        self._user.restore(copy)
        self._user.server.start_again()
        self._let_it_notice()
        for number, version in self._versions.items():
            version.flags = None
            if number in places:
                version.places |= {places[number]}
                version.settled = True
            elif number not in waits:
                version.places |= {NOWHERE}

    def _let_it_notice(self) -> None:
        """Wait until the mount has listed what was restored, if it can.

        Else other clients may bring UIDNEXT, HIGHESTMODSEQ and the count of messages to what it knows.
        Then nothing that it asks for says that the server was restored.
        """
        with self._user.client() as client:
            reached = {name: _uidnext(client, name) for name in self._mailboxes}
        (database,) = self._mount.cache.rglob("cache.db")

        def has_noticed() -> bool:
            for name in self._directories():
                with contextlib.suppress(OSError):
                    os.listdir(self.root / name)
            with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
                known = db.execute("SELECT server_name, uidnext FROM mailbox WHERE server_name NOT NULL")
                return all(uidnext <= reached.get(bytes(name).decode(), uidnext) for name, uidnext in known)

        with contextlib.suppress(AssertionError, sqlite3.Error):
            wait_until(has_noticed, "the restored server was listed")


def _uidnext(client: IMAP4_SSL, mailbox: str) -> int:
    _, data = client.status(mailbox, "(UIDNEXT)")
    return int(data[0].rpartition(b"UIDNEXT ")[2].rstrip(b")"))


def _has_unmounted(root: Path) -> bool:
    return subprocess.run(["fusermount3", "-u", root], capture_output=True).returncode == 0


def without(kinds: str) -> frozenset[str]:
    """Return the kinds of a comma-separated list. Raises ValueError if one is unknown."""
    chosen = frozenset(kind for kind in kinds.split(",") if kind)
    if unknown := chosen - {*KINDS}:
        raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return chosen
