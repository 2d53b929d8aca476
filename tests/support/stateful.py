"""A mounted account under random operations and faults, and a model of what must become of every message.

Every version of every message has bytes of its own, so that it is recognised wherever it is. For each the
model holds the places where it may be in the end: an operation that succeeded leads to one, an operation
that failed to the one before or the one after. What must never be is a version that was accepted and is
nowhere, one that is in two places, and bytes that nobody wrote.

Used by tests.mount.test_stateful in short and by scripts/stateful in long.
"""

import contextlib
import errno
import json
import os
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.mailboxes import Held, everything, mailboxes, settle, waiting
from tests.support.mounting import DEADLINE, Mount, RobustMount, wait_until
from tests.support.servers.dovecot import Account
from tests.support.servers.proxy import Action, Fault, Point, Proxy

NOWHERE = "(nowhere)"
SPOOL = "(spool)"
TRASH = "Trash"
LOCAL = ".bak"
"""The end of the names of files that are not for the server."""
FIXED = {"INBOX", "Drafts", "Sent", "Trash", "Junk"}
NO_FLAGS: Final[frozenset[str]] = frozenset()
FLAGS_OF_NEW: Final = {"Drafts": frozenset({"\\Draft"}), "Sent": frozenset({"\\Seen"})}
_MARK = re.compile(rb"^X-Version: (\d+)\r?$", re.M)
_CHANGING = rb"APPEND|UID MOVE|UID COPY|UID STORE|UID EXPUNGE|CREATE|DELETE|RENAME"
_ANY = _CHANGING + rb"|UID FETCH|EXAMINE|SELECT|LIST|STATUS"


@dataclass
class Version:
    """Bytes that some program handed over."""

    content: bytes
    """As a server has it."""
    places: set[str]
    """Where it may be in the end."""
    flags: set[frozenset[str]] | None = None
    """What its flags may be in the end; None for any."""
    settled: bool = False
    """Whether it was on the server when everything was last looked at."""
    left: str = ""
    """The directory that it was deleted from since then."""
    past: set[str] = field(default_factory=set)
    """Where it may have been since then."""
    altered: bytes | None = None
    """What the server makes of its bytes, if it makes something else of them."""
    read: bytes = b""
    """What was last read of it, with CRLF."""
    temporary: bool = False
    """Whether it may be only in a temporary file, which no promise is made of before it is renamed."""


@dataclass
class Figures:
    """What a run consisted of."""

    operations: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    versions: int = 0


class Violation(AssertionError):
    """A message was lost, doubled, altered or misplaced."""


class World:
    """One account, its mount through a proxy, and the model. Ends with `close`."""

    mount_type: type[Mount] = RobustMount
    arguments: tuple[str, ...] = ()
    """Of the mount."""
    operations: Sequence[tuple[str, int]] = ()
    """Methods and how often each is wanted; `OPERATIONS` if empty."""

    def __init__(self, user: Account, proxy: Proxy, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        """Of the present operation: what one of them draws does not change the others."""
        self._seed = seed
        self._order = random.Random(seed)
        self.figures = Figures()
        self.history: list[str] = []
        self._user = user
        self._proxy = proxy
        self._directory = directory
        self._mounts = 0
        self._logs: deque[str] = deque(maxlen=6)
        """Of the last mounts before the present one."""
        self._names = 0
        self._steps = 0
        self._versions: dict[int, Version] = {}
        self._fault: Fault | None = None
        self._killing = False
        self._mailboxes = {*FIXED, "Work"}
        user.deliver("Work", [])
        self._mount = self._start()

    # -- the mount -----------------------------------------------------------------------------------------

    def _start(self) -> Mount:
        if self._mounts:
            self._logs.append(self._mount.log_text())
        self._mounts += 1
        made = self.mount_type(
            self._proxy.account(self._user),
            self._directory / str(self._mounts),
            *self.arguments,
            cache=self._cache,
            environment=self._environment(),
        )
        return made.__enter__()

    def _stop(self) -> None:
        self._mount.__exit__(None, None, None)

    def _restart(self) -> None:
        self._stop()
        self._mount = self._start()

    @property
    def _cache(self) -> Path:
        return self._directory / "cache"

    def _environment(self) -> Mapping[str, str]:
        """Of the mount."""
        return {}

    def _after_kill(self) -> None:
        """The daemon was killed, and the next one has not been started."""

    def close(self) -> None:
        """End the mount, whatever state it is in."""
        self._mount.__exit__(AssertionError, None, None)

    @property
    def root(self) -> Path:
        return self._mount.path

    # -- the model -----------------------------------------------------------------------------------------

    def _new(self, place: str, *, based_on: bytes = b"", like: bytes = b"") -> tuple[int, Version]:
        """Make a version: a message of its own, a later one of ``based_on``, or one as long as ``like``."""
        number = len(self._versions) + 1
        self.figures.versions = number
        # As long as all others.
        mark = b"X-Version: %06d\r\n" % number
        if based_on:
            content = based_on + mark
        elif like:
            *_, last = _MARK.finditer(like)
            content = like[: last.start(1)] + b"%06d" % number + like[last.end(1) :]
        else:
            content = b"Message-ID: <%d@example.org>\r\nSubject: message %d\r\n%s\r\n" % (
                number,
                number,
                self._header() + mark,
            )
            content += b"text\r\n" * self.random.choice([0, 1, 50, 2000])
        version = Version(
            content, {place}, {FLAGS_OF_NEW.get(place, NO_FLAGS)}, altered=self._altered(content)
        )
        self._versions[number] = version
        return number, version

    def _header(self) -> bytes:
        """More header fields of a new message."""
        return b""

    def _altered(self, content: bytes) -> bytes | None:
        """What the server makes of a message that is appended; None if it leaves it as it is."""
        return None

    def _known(self, content: bytes) -> Version | None:
        marks = _MARK.findall(content)
        version = self._versions.get(int(marks[-1])) if marks else None
        normal = re.sub(rb"(?<!\r)\n", b"\r\n", content)
        if version is None or normal not in (version.content, version.altered):
            return None
        version.read = normal
        return version

    def _is_half(self, content: bytes) -> bool:
        """Whether this is what was written of a version that nobody has acknowledged."""
        return any(
            len(content) <= len(whole) and all(a in (b, 0) for a, b in zip(content, whole, strict=False))
            for version in self._versions.values()
            if NOWHERE in version.places
            for whole in (version.content, version.content.replace(b"\r\n", b"\n"))
        )

    @staticmethod
    def _went(version: Version, source: str, target: str, *, surely: bool) -> None:
        """It left a directory, unless another client has taken it from there before."""
        after = {target if place == source else place for place in version.places}
        version.places = after if surely else version.places | after
        if not version.settled and version.flags is not None:
            # Not on the server yet, it may become a new message there.
            version.flags |= {has | FLAGS_OF_NEW.get(target, NO_FLAGS) for has in version.flags}

    def _deleted(self, version: Version, directory: str, *, surely: bool) -> None:
        """It went the way of rm; what never got to the server leaves nothing."""
        version.left = directory
        self._went(version, directory, NOWHERE if directory == TRASH else TRASH, surely=surely)
        if not version.settled:
            version.places |= {NOWHERE}

    # -- victims -------------------------------------------------------------------------------------------

    def _directories(self) -> list[str]:
        return sorted(self._mailboxes)

    def _place(self) -> str:
        return self.random.choice([name for name in self._directories() if name != TRASH])

    def _victim(self, *, trash: bool = False) -> tuple[Path, str, Version] | None:
        """A random file that can be read, and which version it is."""
        directories = [name for name in self._directories() if trash or name != TRASH]
        self.random.shuffle(directories)
        for directory in directories:
            with contextlib.suppress(OSError):
                names = sorted(os.listdir(self.root / directory))
                names = [name for name in names if name.endswith(".eml")]
                if not names:
                    continue
                path = self.root / directory / self.random.choice(names)
                content = path.read_bytes()
                version = self._known(content)
                if version is None:
                    if content and not self._is_half(content):
                        raise Violation(f"{path} has bytes that nobody wrote: {content[:300]!r}")
                    continue
                if not version.settled and self._is_shown_twice(path, version):
                    continue
                return path, directory, version
        return None

    def _is_shown_twice(self, path: Path, version: Version) -> bool:
        """Return whether a file that waits has these bytes as well.

        Until the outcome of its upload is known, the file and what may have become of it are both shown. Who
        deletes one of them then has the other.
        """
        others = [self.root / one for one, _ in waiting(self._mount) if self.root / one != path]
        return any(self._known(other.read_bytes()) is version for other in others)

    def _name(self) -> str:
        self._names += 1
        return f"file {self._names}.eml"

    # -- faults --------------------------------------------------------------------------------------------

    def _inject(self) -> None:
        """Perhaps have something go wrong in the operation that comes next."""
        self._heal()
        roll = self.random.random()
        if roll < 0.55:
            return
        if roll < 0.60:
            self._arm(b"APPEND|UID MOVE", b"NO [OVERQUOTA] full", "command", 1)
        elif roll < 0.64:
            self._killing = True
            self.figures.faults["kill at rest"] += 1
        else:
            changing = self.random.random() < 0.7
            command = _CHANGING if changing else _ANY
            points: list[Point] = ["command", "answer", "upload"] if changing else ["command", "answer"]
            point = self.random.choice(points)
            if point == "upload":
                command = b"APPEND"
            self._killing = roll < 0.70
            action: Action = "stall" if self._killing else "cut"
            self._arm(command, action, point, self.random.choice((1, 1, 2, 3)))

    def _arm(self, command: bytes, action: Action, point: Point, times: int) -> None:
        nth = self.random.choice((1, 1, 2))
        after = 30 if point == "upload" else 0
        self._fault = self._proxy.fault(command, action, at=point, nth=nth, times=times, after=after)
        self.history.append(f"  fault: {action!r} at {point} of {command[:40]!r}, {nth=}, {times=}")

    def _heal(self) -> None:
        if self._fault is not None:
            self._fault.cancel()
            if self._fault.hits:
                how = "refusal" if isinstance(self._fault.action, bytes) else self._fault.action
                self.figures.faults[f"{how} at {self._fault.at}"] += self._fault.hits
            self._fault = None

    def _run(self, what: str, operation: Callable[[], object], *, at_rest: bool = True) -> OSError | None:
        """Do something through the mount, with whatever goes wrong; None if it succeeded.

        ``at_rest`` allows a kill at any time; without it the server hears no more after the kill.
        """
        self._inject()
        self._killing = self._killing and (at_rest or self._fault is not None)
        patience = 0.5 if at_rest else DEADLINE
        self.figures.operations[what.split()[0]] += 1
        self.history.append(what)
        error = self._run_and_kill(operation, patience) if self._killing else outcome(operation)
        if error is not None:
            self.figures.failed[errno.errorcode.get(error.errno or 0, "?")] += 1
            self.history.append(f"  {error}")
        return error

    def _run_and_kill(self, operation: Callable[[], object], patience: float) -> OSError | None:
        self._killing = False
        fault = self._fault
        with ThreadPoolExecutor(1) as executor:
            done = executor.submit(outcome, operation)
            # The operation itself, or what it leaves to the background, comes upon the fault, or does not.
            deadline = time.monotonic() + patience
            while fault is not None and not fault.hits and time.monotonic() < deadline:
                if patience > 1 and done.done():
                    break
                with contextlib.suppress(TimeoutError):
                    fault.wait_hit(1, 0.01)
            self._mount.kill()
            self._proxy.cut_all()
            error = done.result(DEADLINE)
        self._heal()
        self._proxy.resume()
        self.history.append("  killed")
        self._after_kill()
        self._mount = self._start()
        return error

    # -- operations through the mount ----------------------------------------------------------------------

    def create(self) -> None:
        """cp: a new file, whose bytes are safe when close() returns."""
        place = self._place()
        number, version = self._new(place)
        path = self.root / place / self._name()
        content = version.content
        if self.random.random() < 0.5:
            content = content.replace(b"\r\n", b"\n")
        error = self._run(f"create {number} as {place}/{path.name}", lambda: write_at_once(path, content))
        if error is not None:
            version.places |= {NOWHERE}

    def save(self) -> None:
        """What rsync and editors do: a temporary file is renamed, perhaps over an existing message."""
        victim = self._victim() if self.random.random() < 0.5 else None
        place = victim[1] if victim else self._place()
        target = victim[0] if victim else self.root / place / self._name()
        number, version = self._new(place)
        version.flags = None
        temporary = target.with_name(f".tmp{number}")
        over = f" over {number_of(victim[2])}" if victim else ""

        def operation() -> None:
            write_at_once(temporary, version.content)
            os.rename(temporary, target)

        error = self._run(f"save {number} as {place}/{target.name}{over}", operation)
        if error is not None:
            # It may not have come as far as to its first byte.
            version.places |= {SPOOL, NOWHERE}
            version.temporary = True
        if victim:
            self._deleted(victim[2], place, surely=error is None)

    def edit(self) -> None:
        """Write to an existing file in place, or append to it."""
        if (victim := self._victim()) is None:
            return
        path, place, old = victim
        appending = self.random.random() < 0.5
        before = old.read
        number, version = self._new(place, based_on=before)
        version.flags = None

        def operation() -> None:
            if appending:
                with open(path, "ab", buffering=0) as file:
                    file.write(version.content[len(before) :])
            else:
                write_at_once(path, version.content)

        error = self._run(
            f"{'append' if appending else 'rewrite'} {number_of(old)} as {number} in {place}", operation
        )
        self._deleted(old, place, surely=error is None)
        if error is not None:
            version.places |= {NOWHERE}

    def move(self) -> None:
        """mv, within a directory or across, to a new name or over another message."""
        if (victim := self._victim()) is None:
            return
        path, _, version = victim
        over = self._victim() if self.random.random() < 0.3 else None
        if over is not None and over[2] is version:
            over = None
        place = over[1] if over else self._place()
        target = over[0] if over else self.root / place / self._name()
        text = f"move {number_of(version)} from {path.parent.name} to {place}/{target.name}"
        error = self._run(
            text + (f" over {number_of(over[2])}" if over else ""), lambda: os.rename(path, target)
        )
        if path.parent.name != place:
            self._went(version, path.parent.name, place, surely=error is None)
        if over:
            self._deleted(over[2], place, surely=error is None)
            if not version.settled:
                # Not on the server yet, it becomes a new version of that message, with its flags.
                version.flags = None

    def remove(self) -> None:
        """rm, also of what is in Trash."""
        if (victim := self._victim(trash=True)) is None:
            return
        path, _, version = victim
        error = self._run(f"remove {number_of(version)} from {path.parent.name}", lambda: os.unlink(path))
        self._deleted(version, path.parent.name, surely=error is None)
        if error is not None and path.parent.name == TRASH and version.flags is not None:
            # Marked, but not expunged.
            version.flags |= {has | {"\\Deleted"} for has in version.flags}

    def flag(self) -> None:
        """setfattr."""
        if (victim := self._victim(trash=True)) is None:
            return
        path, _, version = victim
        flag = self.random.choice(["seen", "flagged", "answered"])
        on = self.random.random() < 0.7

        def operation() -> None:
            os.setxattr(path, f"user.imap.{flag}", b"1" if on else b"0")

        error = self._run(f"flag {number_of(version)} {flag} {on}", operation)
        if version.flags is not None:
            imap = frozenset({"\\" + flag.capitalize()})
            after = {has | imap if on else has - imap for has in version.flags}
            version.flags = after if error is None else version.flags | after

    def touch(self) -> None:
        """utimens and chmod, which are kept here."""
        if (victim := self._victim()) is None:
            return
        path, _, version = victim

        def operation() -> None:
            os.utime(path, (1, 2))
            os.chmod(path, 0o640)

        self._run(f"touch {number_of(version)}", operation)

    def look(self) -> None:
        """ls -l of everything."""

        def operation() -> None:
            for directory, _, names in os.walk(self.root):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        os.stat(os.path.join(directory, name))

        self._run("look", operation)

    def sync(self) -> None:
        """fsync of a directory."""
        self._run("sync", lambda: settle(self._mount))

    def make_directory(self) -> None:
        if len(self._mailboxes) < 10:
            self._names += 1
            name = f"box{self._names}"
            self._run(f"mkdir {name}", lambda: os.mkdir(self.root / name), at_rest=False)
            self._learn_mailboxes()

    def remove_directory(self) -> None:
        name = self.random.choice(self._directories())
        if name not in FIXED:
            self._run(f"rmdir {name}", lambda: os.rmdir(self.root / name), at_rest=False)
            self._learn_mailboxes()

    def rename_directory(self) -> None:
        name = self.random.choice(self._directories())
        if name in FIXED:
            return
        self._names += 1
        new = f"box{self._names}"
        source, target = self.root / name, self.root / new
        error = self._run(f"rename {name} to {new}", lambda: os.rename(source, target), at_rest=False)
        self._learn_mailboxes()
        if new in self._mailboxes:
            for version in self._versions.values():
                version.places = {new if place == name else place for place in version.places}
                if error is not None and version.left == name:
                    # Cut off, it took along what was still to be removed, and nobody knows where to.
                    version.places |= {new}

    def _learn_mailboxes(self) -> None:
        """What became of a change of mailboxes is for the server to say: it is certain at once."""
        self._mailboxes = set(mailboxes(self._user))

    # -- the other client ----------------------------------------------------------------------------------

    def other_delivers(self) -> None:
        place = self._place()
        number, version = self._new(place)
        version.settled, version.flags = True, {NO_FLAGS}
        self.figures.operations["other"] += 1
        self.history.append(f"other client appends {number} to {place}")
        self._user.append(place, version.content, 1_700_000_000 + number)

    def other_changes(self) -> None:
        """Expunge, move or flag a message that nothing else is about to happen to."""
        place = self._place()
        with self._user.client() as client:
            client.select(f'"{place}"')
            uids = client.uid("SEARCH", "UNDELETED")[1][0].split()
            if not uids:
                return
            uid = self.random.choice(uids).decode()
            parts = client.uid("FETCH", uid, "(BODY.PEEK[])")[1]
            content = next((part[1] for part in parts if isinstance(part, tuple)), None)
            if content is None:
                # What was still to be removed is gone.
                return
            version = self._known(content)
            if version is None:
                raise Violation(f"bytes in {place} that nobody wrote: {content[:300]!r}")
            if not version.settled or version.places != {place}:
                return
            self.figures.operations["other"] += 1
            match self.random.choice(["expunge", "move", "flag"]):
                case "expunge":
                    self.history.append(f"other client expunges {number_of(version)} in {place}")
                    client.uid("STORE", uid, "+FLAGS", "(\\Deleted)")
                    client.uid("EXPUNGE", uid)
                    version.places = {NOWHERE}
                case "move":
                    target = self._place()
                    if target != place:
                        self.history.append(
                            f"other client moves {number_of(version)} from {place} to {target}"
                        )
                        client.uid("MOVE", uid, f'"{target}"')
                        version.places = {target}
                case "flag":
                    self.history.append(f"other client flags {number_of(version)} in {place}")
                    client.uid("STORE", uid, "+FLAGS", "($Other)")
                    if version.flags is not None:
                        version.flags = {has | {"$Other"} for has in version.flags}

    def other_makes_mailbox(self) -> None:
        if len(self._mailboxes) < 10:
            self._names += 1
            name = f"box{self._names}"
            self.history.append(f"other client creates {name}")
            self.figures.operations["other"] += 1
            with self._user.client() as client:
                client.create(name)
            self._learn_mailboxes()

    # -- the end -------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One random operation with perhaps a fault."""
        operations = self.operations or OPERATIONS
        (operation,) = self._order.choices([name for name, _ in operations], [n for _, n in operations])
        self.do(operation)

    def do(self, operation: str) -> None:
        """Run one of the operations, with perhaps a fault."""
        self._steps += 1
        self.random = random.Random(f"{self._seed} {self._steps}")
        for version in self._versions.values():
            version.past |= version.places
        if self.random.random() < 0.5:
            # Else what went wrong last time still does, perhaps for something in the background.
            self._heal()
        getattr(self, operation)()

    def check(self) -> None:
        """Let everything come to rest, and compare. Raises Violation."""
        self._heal()
        self._killing = False
        self.figures.checks += 1
        self.history.append("check")
        self._drain()
        self._restart()
        self._drain()
        held = self._held()
        shown = self._shown()
        found: dict[int, list[str]] = {number: [] for number in self._versions}
        for place, messages in held.items():
            for message in messages:
                version = self._known(message.content)
                if version is None:
                    raise self._violation(f"{place}: bytes that nobody wrote: {message.content[:300]!r}")
                found[number_of(version)].append(place)
                if version.flags is not None and message.flags not in version.flags:
                    number, flags = number_of(version), set(message.flags)
                    raise self._violation(
                        f"{number} in {place} has the flags {flags}: {version.flags}", number
                    )
                version.flags = {message.flags}
        for content in self._spooled():
            version = self._known(content)
            if version is not None:
                found[number_of(version)].append(SPOOL)
        for number, version in self._versions.items():
            places = found[number] or [NOWHERE]
            if len(places) > 1 or not set(places) <= version.places:
                raise self._violation(
                    f"message {number} is in {places}, not in one of {version.places}", number
                )
            version.places, version.left, version.past = set(places), "", set()
            if version.temporary and SPOOL in places:
                version.places |= {NOWHERE}
            version.settled = places[0] not in {NOWHERE, SPOOL}
        self._compare(shown, held)

    def _held(self) -> dict[str, list[Held]]:
        """What the server has; without UIDPLUS what is marked as deleted is as good as gone."""
        found = everything(self._user)
        if "UIDPLUS" in self._proxy.hidden.names:
            found = {
                place: [message for message in messages if "\\Deleted" not in message.flags]
                for place, messages in found.items()
            }
        return {place: messages for place, messages in found.items() if messages}

    def _compare(self, shown: dict[str, list[bytes]], held: dict[str, list[Held]]) -> None:
        expected = {place: sorted(message.content for message in held[place]) for place in held}
        if shown != expected:
            raise self._violation(
                "the mount shows something else than the server has: "
                + str({p: (_marks(shown.get(p)), _marks(expected.get(p))) for p in {*shown, *expected}
                       if shown.get(p) != expected.get(p)})
            )  # fmt: skip

    def _violation(self, text: str, number: int | None = None) -> Violation:
        """Return what is raised: with all that was done to the message ``number``, and what was done last."""
        about = re.compile(rf"\b{number}\b")
        its = [line for line in self.history if number is not None and about.search(line)]
        last = self.history[-150:]
        logs = [log[-5000:] for log in [*self._logs, self._mount.log_text()]]
        with contextlib.suppress(Exception):
            its.append(f"waiting: {self._mount.status()['waiting']}")
        return Violation("\n".join([text, "-- the message", *its, "-- the last of all", *last, *logs]))

    def _drain(self) -> None:
        """Have everything sent, also what was refused by an injected fault."""

        def done() -> bool:
            settle(self._mount)
            left = waiting(self._mount)
            refused = [p for p, state in left if state == "unsent" and os.path.getsize(self.root / p)]
            for path in refused:
                content = (self.root / path).read_bytes()
                if self._known(content) is None and self._is_half(content):
                    self.history.append(f"half of a file, {path}, is removed")
                    os.unlink(self.root / path)
                else:
                    self._retry(path)
            return not refused and all(state == "unsent" for _, state in left)

        wait_until(done, "everything is sent")
        for path, _ in waiting(self._mount):
            # A kill between opening and writing: there was nothing to be accepted.
            os.unlink(self.root / path)

    def _retry(self, path: str) -> None:
        if "/" in path:
            os.setxattr(self.root / path, "user.imap.state", b"sending")
            return
        # Its mailbox was renamed in a way that was cut off: it is for a person to put it elsewhere.
        version = self._known((self.root / path).read_bytes())
        os.rename(self.root / path, self.root / "INBOX" / self._name())
        if version is not None:
            version.places = {"INBOX"}

    def _shown(self) -> dict[str, list[bytes]]:
        found: dict[str, list[bytes]] = {}
        for directory, _, names in os.walk(self.root):
            messages = [
                Path(directory, name).read_bytes()
                for name in names
                if not name.startswith(".tmp") and not name.endswith(LOCAL)
            ]
            # A kill between the making of a file and the first write to it leaves an empty one.
            messages = [content for content in messages if content]
            if messages:
                found[os.path.relpath(directory, self.root)] = sorted(messages)
        return found

    def _spooled(self) -> Iterator[bytes]:
        for name, content in self._drafts():
            if not name.endswith(LOCAL):
                yield content

    def _drafts(self) -> Iterator[tuple[str, bytes]]:
        """Return names and bytes of all files of which the spool has both a description and bytes."""
        for description in self._mount.cache.parent.rglob("*.json"):
            file = description.with_suffix("")
            if not file.exists():
                continue
            try:
                found = json.loads(description.read_text())
            except ValueError:
                found = {"name": "", "state": "damaged"}
            if found["state"] != "sent":
                yield found["name"] or "", file.read_bytes()


OPERATIONS: list[tuple[str, int]] = [
    ("create", 8),
    ("save", 6),
    ("edit", 8),
    ("move", 10),
    ("remove", 6),
    ("flag", 5),
    ("touch", 2),
    ("look", 3),
    ("sync", 2),
    ("make_directory", 2),
    ("remove_directory", 2),
    ("rename_directory", 2),
    ("other_delivers", 6),
    ("other_changes", 6),
    ("other_makes_mailbox", 1),
]
"""Methods of `World` and how often each is wanted."""


def outcome(operation: Callable[[], object]) -> OSError | None:
    try:
        operation()
    except OSError as error:
        return error
    return None


def write_at_once(path: Path, content: bytes) -> None:
    # In one write: a kill then leaves all of it or nothing.
    with open(path, "wb", buffering=0) as file:
        file.write(content)


def number_of(version: Version) -> int:
    return int(_MARK.findall(version.content)[-1])


def _marks(contents: list[bytes] | None) -> list[object]:
    return [marks[-1] if (marks := _MARK.findall(content)) else content for content in contents or ()]
