"""What is checked of a mount on a server, each on a mailbox and through a mount of its own.

A check raises AssertionError, or whatever else went wrong, where something is not as it should be, and Lacks
where the server by itself lacks what is asked for.
"""

import contextlib
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.acceptance.outside import Message, Outside, living
from tests.support.acceptance.peers import Peer
from tests.support.mail import plain, wild
from tests.support.mailboxes import settle, waiting
from tests.support.mounting import ROOT, Mount, wait_until

DATE = 1_700_000_000
LATER = 1_750_000_000
POLL = ("--poll", "2")
"""For servers that announce little."""
ODD_NAMES = ("Zürich & Co", "100% done", "日本語", "two  spaces", 'He said "ship it"')
ODD_MAIL = (
    "no date", "empty subject", "subject with slashes", "8-bit header in UTF-8", "no sender", "empty body",
    "line of 5,000 bytes", "dots alone on lines", "text like a protocol answer", "subject of emoji",
)  # fmt: skip
"""Keys of `wild`: what servers should keep byte by byte."""

_LOGGED = re.compile(r"^\S+ \S+ (?:WARNING|ERROR|CRITICAL) (.*)")
_BODY = re.compile(r" C: .*\bBODY\.PEEK\[\]")


class Lacks(Exception):
    """The server lacks what is asked for, as a second client found; the text says what."""


class KeptMount(Mount):
    """A mount whose complaints are kept instead of raised."""

    patience = 120.0

    def __init__(self, peer: Peer, directory: Path, *arguments: str, cache: Path | None = None) -> None:
        super().__init__(peer, directory, *arguments, cache=cache)
        self.complaints: list[str] = []
        for pattern in peer.expected:
            self.expect_log(pattern)

    def _check_log(self) -> None:
        found = [_LOGGED.match(line) for line in self.log_text().splitlines()]
        wanted = (line[1] for line in found if line)
        self.complaints += [line for line in wanted if not any(re.search(w, line) for w in self._expected)]


class Trial:
    """One check of one server: its mailbox, its mounts, and a second client."""

    def __init__(
        self,
        peer: Peer,
        name: str,
        directory: Path,
        stack: contextlib.ExitStack,
        outside: Outside,
        *,
        detailed: bool,
    ) -> None:
        self._arguments = [*POLL, *(("-v", "-v") if detailed else ())]
        self.peer = peer
        self.mailbox = f"Check {name}"
        self._first = 1000 * [*CHECKS].index(name)
        outside.make(self.mailbox)
        self.outside = outside
        self.directory = directory
        self.mounts: list[KeptMount] = []
        self._stack = stack

    def mount(self, *arguments: str, cache: Path | None = None) -> Mount:
        """Mount the account."""
        directory = self.directory / f"mount-{len(self.mounts) + 1}"
        made = KeptMount(self.peer, directory, *self._arguments, *arguments, cache=cache)
        self.mounts.append(made)
        return self._stack.enter_context(made)

    def mail(self, number: int) -> bytes:
        """Return an ordinary message that no other check uses, as the server keeps it."""
        return plain(self._first + number).replace(b"\r\n", self.peer.line_end)

    def fill(self, numbers: range, mailbox: str | None = None) -> list[Message]:
        """Put plain messages into a mailbox, the check's own where none is named, and return them."""
        place = mailbox or self.mailbox
        for number in numbers:
            self.outside.put(place, self.mail(number), DATE + 60 * number)
        return self.outside.held(place)

    def path(self, mounted: Mount) -> Path:
        """Return the directory of the check's mailbox."""
        return mounted.path / self.mailbox

    def living(self, mailbox: str | None = None) -> list[Message]:
        """Return what the server holds in a mailbox now."""
        return living(self.outside.held(mailbox or self.mailbox))

    def complaints(self) -> list[str]:
        """Return the warnings and errors that the mounts have logged."""
        return [complaint for mounted in self.mounts for complaint in mounted.complaints]


def mount(trial: Trial) -> None:
    """An account can be mounted and unmounted."""
    mounted = trial.mount()
    assert "INBOX" in os.listdir(mounted.path), f"no INBOX in {os.listdir(mounted.path)}"
    state = mounted.status()["state"]
    assert state == "online", f"the mount is {state}"
    mounted.unmount()


def listing(trial: Trial) -> None:
    """Every mailbox is a directory, and every message a file."""
    held = trial.fill(range(60))
    mounted = trial.mount()
    assert not (missing := trial.outside.mailboxes() - directories(mounted)), f"not shown: {missing}"
    shown = by_uid(trial.path(mounted))
    wanted = {message.uid for message in held}
    assert set(shown) == wanted, f"{len(shown)} files of {len(wanted)} messages"
    dates = {uid: int(path.stat().st_mtime) for uid, path in shown.items()}
    assert dates == {message.uid: message.date for message in held}, "mtime is not the date of arrival"


def contents(trial: Trial) -> None:
    """Every file has the bytes that the server gives."""
    trial.fill(range(5))
    messages = wild()
    for key in ODD_MAIL:
        # What a server does not take cannot be read from it either.
        with contextlib.suppress(Exception):
            trial.outside.put(trial.mailbox, messages[key], DATE)
    held = trial.outside.held(trial.mailbox)
    assert len(held) > 10, f"the server took {len(held)} messages only"
    shown = by_uid(trial.path(trial.mount()))
    for message in held:
        content = shown[message.uid].read_bytes()
        assert content == message.content, (
            f"UID {message.uid}: {len(content)} bytes read, {len(message.content)} on the server"
        )


def sizes(trial: Trial) -> None:
    """The size is the announced one before a message is read, and the true one after that."""
    held = [*trial.fill(range(3)), *trial.fill(range(100, 103))]
    shown = by_uid(trial.path(trial.mount("--fetch-ahead", "0")))
    for message in held:
        path = shown[message.uid]
        before = path.stat().st_size
        assert before in (message.size, len(message.content)), (
            f"UID {message.uid}: {before} bytes shown, {message.size} announced"
        )
        path.read_bytes()
        after = path.stat().st_size
        assert after == len(message.content), f"UID {message.uid}: {after} of {len(message.content)} bytes"


def names(trial: Trial) -> None:
    """Mailboxes have the names that they have on the server, files end in their UID, and names last."""
    made = []
    for name in ODD_NAMES:
        with contextlib.suppress(Exception):
            trial.outside.make(f"{name} {trial.peer.key}")
            made.append(f"{name} {trial.peer.key}")
    held = trial.fill(range(4))
    mounted = trial.mount()
    shown = directories(mounted)
    on_server = trial.outside.mailboxes()
    assert not (missing := [name for name in made if name in on_server and name not in shown]), missing
    files = sorted(os.listdir(trial.path(mounted)))
    assert len(files) == len(held), f"{len(files)} files of {len(held)} messages"
    for message, name in zip(held, files, strict=True):
        assert name.endswith(f".{message.uid}.eml"), f"{name} is not of UID {message.uid}"
        assert "Sender" in name, f"{name} has no sender"
    mounted.unmount()
    again = trial.mount()
    assert sorted(os.listdir(trial.path(again))) == files, "other names with an empty cache"


def make_mailboxes(trial: Trial) -> None:
    """A directory that is made is a mailbox, and so is one within it."""
    mounted = trial.mount()
    new = f"New {trial.peer.key}"
    os.mkdir(mounted.path / new)
    assert new in trial.outside.mailboxes(), "not on the server"
    os.mkdir(mounted.path / new / "Sub & Söhne")
    assert f"{new}/Sub & Söhne" in trial.outside.mailboxes(), "the one within is not on the server"
    os.mkdir(mounted.path / new / "Sub & Söhne" / "日本")
    assert f"{new}/Sub & Söhne/日本" in trial.outside.mailboxes(), "the third one is not on the server"


def rename_mailboxes(trial: Trial) -> None:
    """A directory that is renamed is the mailbox that is renamed, with its messages and with those within."""
    old, new = f"Old {trial.peer.key}", f"Renamed {trial.peer.key}"
    together = trial.outside.renames_within(trial.mailbox)
    trial.outside.make(old)
    trial.outside.make(f"{old}/Within")
    trial.fill(range(2), old)
    within = trial.fill(range(2, 3), f"{old}/Within")
    mounted = trial.mount()
    path = mounted.path / old
    inode = path.stat().st_ino
    os.rename(path, mounted.path / new)
    mailboxes = trial.outside.mailboxes()
    assert new in mailboxes and old not in mailboxes, "not renamed on the server"
    assert (mounted.path / new).stat().st_ino == inode, "another inode"
    assert [m.content for m in trial.living(new)] == [trial.mail(0), trial.mail(1)], (
        "the messages are not in it"
    )
    assert bytes_in(mounted.path / new) == sorted([trial.mail(0), trial.mail(1)]), "the files are not in it"
    if not together:
        raise Lacks("RENAME leaves the mailboxes within behind")
    assert [m.content for m in trial.living(f"{new}/Within")] == [m.content for m in within]
    assert bytes_in(mounted.path / new / "Within") == [m.content for m in within]


def remove_mailboxes(trial: Trial) -> None:
    """An empty directory can be removed; one with messages cannot."""
    empty, full = f"Empty {trial.peer.key}", f"Full {trial.peer.key}"
    trial.outside.make(empty)
    trial.outside.make(full)
    trial.fill(range(1), full)
    mounted = trial.mount()
    with refused(errno.ENOTEMPTY):
        os.rmdir(mounted.path / full)
    os.rmdir(mounted.path / empty)
    assert not (mounted.path / empty).exists(), "still a directory"
    mailboxes = trial.outside.mailboxes()
    assert empty not in mailboxes, "still on the server"
    assert [m.content for m in trial.living(full)] == [trial.mail(0)], "the other one lost its message"


def move(trial: Trial) -> None:
    """mv of a message keeps inode, bytes, date and flags, and there is one of it afterwards."""
    one, two = trial.fill(range(2))
    trial.outside.add_flags(trial.mailbox, one.uid, "\\Flagged")
    target = f"Target {trial.peer.key}"
    trial.outside.make(target)
    mounted = trial.mount()
    path = by_uid(trial.path(mounted))[one.uid]
    inode = path.stat().st_ino
    moved = mounted.path / target / "moved.eml"
    os.rename(path, moved)
    assert moved.stat().st_ino == inode, "another inode"
    assert moved.read_bytes() == one.content, "other bytes"
    drain(mounted)
    mounted.unmount()
    assert [m.content for m in trial.living()] == [two.content], "the mailbox is not right afterwards"
    (there,) = trial.living(target)
    assert (there.content, there.date) == (one.content, one.date), "other bytes, or another date"
    assert "\\Flagged" in there.flags, "the flag is lost"


def remove(trial: Trial) -> None:
    """rm moves to the Trash, and with --delete expunge deletes for good; nothing else goes."""
    first, second, third, _ = trial.fill(range(10, 14))
    mounted = trial.mount()
    by_uid(trial.path(mounted))[first.uid].unlink()
    drain(mounted)
    assert len(os.listdir(trial.path(mounted))) == 3, "still shown"
    mounted.unmount()
    where = trial.outside.everywhere(first.content)
    assert len(where) == 1 and where[0] != trial.mailbox, f"after rm it is in {where}"
    for_good = trial.mount("--delete", "expunge")
    by_uid(trial.path(for_good))[second.uid].unlink()
    drain(for_good)
    for_good.unmount()
    where = trial.outside.everywhere(second.content)
    assert not where, f"after rm --delete expunge it is in {where}"
    assert third.content in [m.content for m in trial.living()], "another message went as well"
    assert len(trial.living()) == 2, f"{len(trial.living())} messages are left, not 2"


def copy(trial: Trial) -> None:
    """cp of a file makes a message with its bytes and its date, once."""
    mounted = trial.mount()
    source = trial.directory / "new.eml"
    source.write_bytes(trial.mail(20).replace(b"\r\n", b"\n"))
    os.utime(source, (LATER, LATER))
    run("cp", "-p", source, trial.path(mounted))
    drain(mounted)
    (found,) = trial.living()
    assert found.content == trial.mail(20), "other bytes"
    assert found.date == LATER, f"date of arrival {found.date}, not {LATER}"
    assert os.listdir(trial.path(mounted)) == ["new.eml"]
    assert (trial.path(mounted) / "new.eml").read_bytes() == trial.mail(20), "the file has other bytes"
    inode = (trial.path(mounted) / "new.eml").stat().st_ino
    mounted.unmount()
    again = trial.mount(cache=mounted.cache)
    assert os.listdir(trial.path(again)) == ["new.eml"], "another name after a remount"
    assert (trial.path(again) / "new.eml").stat().st_ino == inode, "another inode after a remount"


def rsync(trial: Trial) -> None:
    """rsync to the mount and from the mount: the second run has nothing to do."""
    source, out = trial.directory / "source", trial.directory / "out"
    source.mkdir()
    for number in range(30, 38):
        (source / f"{number}.eml").write_bytes(trial.mail(number))
        os.utime(source / f"{number}.eml", (DATE + number, DATE + number))
    mounted = trial.mount()
    target = trial.path(mounted)
    run("rsync", "-a", f"{source}/", f"{target}/")
    drain(mounted)
    again = run(
        "rsync", "-a", "--itemize-changes", "--no-perms", "--omit-dir-times", f"{source}/", f"{target}/"
    )
    assert not again, f"the second run to the mount did: {again.splitlines()[0]}"
    drain(mounted)
    found = sorted(m.content for m in trial.living())
    assert found == sorted(trial.mail(number) for number in range(30, 38)), f"{len(found)} messages, not 8"
    run("rsync", "-a", f"{target}/", f"{out}/")
    again = run("rsync", "-a", "--itemize-changes", f"{target}/", f"{out}/")
    assert not again, f"the second run from the mount did: {again.splitlines()[0]}"
    assert bytes_in(out) == found, "the copy has other bytes"


def edit(trial: Trial) -> None:
    """A message that is written to is replaced by its new version, and there is one of it."""
    one, two = trial.fill(range(40, 42))
    trial.outside.add_flags(trial.mailbox, one.uid, "\\Flagged")
    mounted = trial.mount()
    path = by_uid(trial.path(mounted))[one.uid]
    inode = path.stat().st_ino
    with path.open("ab") as file:
        file.write(b"edited\n")
    drain(mounted)
    edited = one.content + b"edited" + trial.peer.line_end
    assert path.stat().st_ino == inode, "another inode"
    assert path.read_bytes() == edited, "the file has other bytes"
    assert bytes_in(trial.path(mounted)) == sorted([edited, two.content]), "other files"
    mounted.unmount()
    left = trial.living()
    assert sorted(m.content for m in left) == sorted([edited, two.content]), f"{len(left)} messages, not 2"
    (new,) = [m for m in left if m.content == edited]
    assert new.date == one.date, "another date"
    assert "\\Flagged" in new.flags, "the flag is lost"


def flags(trial: Trial) -> None:
    """Flags that are set here are on the server, and those of others show up here."""
    one, _ = trial.fill(range(50, 52))
    mounted = trial.mount()
    directory = trial.path(mounted)
    path = by_uid(directory)[one.uid]
    os.setxattr(path, "user.imap.flagged", b"1")
    os.setxattr(path, "user.imap.seen", b"1")
    assert {"\\Flagged", "\\Seen"} <= flags_of(trial, one.uid), "not on the server"
    os.setxattr(path, "user.imap.seen", b"0")
    assert "\\Seen" not in flags_of(trial, one.uid), "not taken away on the server"
    trial.outside.add_flags(trial.mailbox, one.uid, "\\Answered")
    seen_soon(
        lambda: os.getxattr(path, "user.imap.answered") == b"1",
        "the flag of another client",
        trial.path(mounted),
    )
    assert os.getxattr(path, "user.imap.flagged") == b"1", "its own flag is lost"


def tags(trial: Trial) -> None:
    """Keywords are tags; where the server keeps none, setting one is refused."""
    (one,) = trial.fill(range(60, 61))
    kept = trial.outside.keeps_keywords(trial.mailbox, one.uid)
    path = by_uid(trial.path(trial.mount()))[one.uid]
    if not kept:
        with refused():
            os.setxattr(path, "user.xdg.tags", b"Work")
        raise Lacks("keeps no keywords; setting one is refused")
    os.setxattr(path, "user.xdg.tags", b"Work,Later")
    found = {word.lower() for word in flags_of(trial, one.uid)}
    assert {"work", "later"} <= found, f"on the server: {sorted(found)}"
    os.setxattr(path, "user.xdg.tags", b"Later")
    found = {word.lower() for word in flags_of(trial, one.uid)}
    assert "work" not in found and "later" in found, f"on the server after one was removed: {sorted(found)}"


def remote(trial: Trial) -> None:
    """What another client adds, deletes, and makes shows up."""
    one, two = trial.fill(range(70, 72))
    mounted = trial.mount()
    path = trial.path(mounted)
    assert bytes_in(path) == sorted([one.content, two.content])
    trial.fill(range(72, 73))
    seen_soon(lambda: len(os.listdir(path)) == 3, "a new message", path)
    trial.outside.delete(trial.mailbox, one.uid)
    seen_soon(lambda: len(os.listdir(path)) == 2, "a deletion", path)
    assert bytes_in(path) == sorted([two.content, trial.mail(72)])
    made = f"Made by others {trial.peer.key}"
    trial.outside.make(made)
    seen_soon(lambda: made in os.listdir(mounted.path), "a new mailbox", mounted.path)


def restart(trial: Trial) -> None:
    """The server ends and starts again: reading and writing go on, and nothing is lost or doubled."""
    one, two = trial.fill(range(80, 82))
    mounted = trial.mount("--fetch-ahead", "0", "--timeout", "10")
    for word in ("offline", "connection", "server", "reconnect"):
        mounted.expect_log(word)
    path = trial.path(mounted)
    shown = by_uid(path)
    assert shown[one.uid].read_bytes() == one.content
    trial.peer.stop()
    try:
        assert shown[one.uid].read_bytes() == one.content, "what is cached cannot be read"
        (path / "new.eml").write_bytes(trial.mail(82))
    finally:
        trial.peer.start_again()
    seen_soon(lambda: mounted.status()["state"] == "online", "a connection", path)
    assert shown[two.uid].read_bytes() == two.content, "other bytes after the restart"
    drain(mounted)
    wanted = sorted([one.content, two.content, trial.mail(82)])
    assert bytes_in(path) == wanted, "other files after the restart"
    mounted.unmount()
    with trial.peer.outside() as client:
        found = sorted(m.content for m in living(client.held(trial.mailbox)))
    assert found == wanted, f"{len(found)} messages after the restart, not 3"


def remount(trial: Trial) -> None:
    """What was read once is read again by the next mount without being fetched."""
    held = trial.fill(range(90, 98))
    mounted = trial.mount()
    before = {path.name: path.stat().st_ino for path in trial.path(mounted).iterdir()}
    assert bytes_in(trial.path(mounted)) == sorted(m.content for m in held)
    mounted.unmount()
    again = trial.mount("-v", "-v", "--fetch-ahead", "0", cache=mounted.cache)
    assert bytes_in(trial.path(again)) == sorted(m.content for m in held), "other bytes"
    after = {path.name: path.stat().st_ino for path in trial.path(again).iterdir()}
    assert after == before, "other names, or other inodes"
    again.unmount()
    fetched = [line for line in again.log_text().splitlines() if _BODY.search(line)]
    assert not fetched, f"{len(fetched)} times fetched again"


def check(trial: Trial) -> None:
    """``imapfs check`` finds nothing in the way of a mount."""
    password = trial.directory / "password"
    password.touch(mode=0o600)
    password.write_text(trial.peer.password)
    server = trial.peer.server
    done = subprocess.run(
        [
            sys.executable, "-m", "imapfs", "check", f"imaps://{trial.peer.name}@{server.host}:{server.port}",
            "--ca-file", str(server.authority.certificate), "--password-file", str(password),
            "--cache-dir", str(trial.directory / "cache"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(trial.directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, " ".join((done.stdout + done.stderr).split())[-300:]


CHECKS: dict[str, Callable[[Trial], None]] = {
    "mount": mount,
    "list": listing,
    "bytes": contents,
    "sizes": sizes,
    "names": names,
    "mkdir": make_mailboxes,
    "mv dir": rename_mailboxes,
    "rmdir": remove_mailboxes,
    "mv": move,
    "rm": remove,
    "cp": copy,
    "rsync twice": rsync,
    "edit": edit,
    "flags": flags,
    "tags": tags,
    "remote": remote,
    "restart": restart,
    "remount": remount,
    "check": check,
}
"""All of them, by the heads of their columns. One column more tells what the mounts of all have logged."""


def by_uid(directory: Path) -> dict[int, Path]:
    """Return the message files by the UID in their names."""
    return {int(path.name.split(".")[-2]): path for path in directory.iterdir() if path.suffix == ".eml"}


def bytes_in(directory: Path) -> list[bytes]:
    """Return the bytes of all files of a directory, in a fixed order."""
    return sorted(path.read_bytes() for path in directory.iterdir() if path.is_file())


def directories(mounted: Mount) -> set[str]:
    """Return the paths of all directories of a mount."""
    root = str(mounted.path)
    return {
        os.path.relpath(os.path.join(where, name), root)
        for where, below, _ in os.walk(root)
        for name in below
    }


def flags_of(trial: Trial, uid: int) -> frozenset[str]:
    """Return the flags of a message on the server."""
    (message,) = [message for message in trial.outside.held(trial.mailbox) if message.uid == uid]
    return message.flags


def drain(mounted: Mount) -> None:
    """Wait until everything is on the server."""

    def done() -> bool:
        settle(mounted)
        left = waiting(mounted)
        refused = [one for one in mounted.status()["waiting"] if one["state"] == "unsent"]
        assert not refused, f"not sent: {refused[0]['path']}: {refused[0]['error']}"
        return not left

    wait_until(done, "everything is sent")


def seen_soon(condition: Callable[[], object], what: str, directory: Path) -> None:
    """Wait until something shows up, and look at the directory meanwhile, as a person does."""

    def done() -> bool:
        os.listdir(directory)
        return bool(condition())

    wait_until(done, f"{what} shows up")


def run(*command: str | Path) -> str:
    """Run a program and return its output; a failure is raised with the last line that it said."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    said = done.stderr.strip().splitlines() or [""]
    assert done.returncode == 0, f"{command[0]}: {said[0]}"
    return done.stdout


@contextlib.contextmanager
def refused(number: int | None = None) -> Iterator[None]:
    """Demand that what the block does is refused, with this errno if one is given."""
    try:
        yield
    except OSError as error:
        assert number in (None, error.errno), f"refused with {errno.errorcode.get(error.errno or 0)}"
        return
    raise AssertionError("not refused")
